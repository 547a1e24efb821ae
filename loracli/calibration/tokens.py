"""Text to tokens, as a served model meets them.

No token reaches across the place where generation would start: a served model sees the prompt's tokens and then
produces the completion's, so that is the boundary the loss has to see.
"""

from __future__ import annotations

from typing import Any

from loracli.errors import CalibrationError

Rendered = tuple[list[int], list[bool]]  # T tokens, and which of them are scored


def render_completion(prompt: str, completion: str, tokenizer: Any, prepended: list[int]) -> Rendered:
    """Prompt and completion as they stand, the completion and the end-of-sequence token after it scored.

    Args:
        prompt: may be empty.
        completion: what is scored.
        tokenizer: the base model's, with an end-of-sequence token.
        prepended: what the tokenizer puts before a text of its own accord; left out where the text begins with it.
    """
    if tokens(tokenizer, prompt or completion)[: len(prepended)] == prepended:
        prepended = []
    context = [*prepended, *tokens(tokenizer, prompt)]
    target = continuation(tokenizer, prompt, completion)
    if target[-1:] != [tokenizer.eos_token_id]:
        target.append(tokenizer.eos_token_id)
    return context + target, [False] * len(context) + [True] * len(target)


def prepended_tokens(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer itself puts before every text: none, a beginning-of-sequence token, or, as for
    GLM, several.

    Raises:
        CalibrationError: if the text's own tokens are not among those that it makes with them.
    """
    probe = "a"
    plain, whole = tokens(tokenizer, probe), list(tokenizer(probe).input_ids)
    for start in range(len(whole)):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    raise CalibrationError("the base model's tokenizer writes a text otherwise where it adds special tokens")


def continuation(tokenizer: Any, context: str, text: str) -> list[int]:
    """The tokens of `text` after `context`, whose own tokens stay as they are.

    Some tokenizers put a space before whatever they are given, so `text` alone would get one. Where a token would reach
    across the border, `text` is tokenised alone after all: a served model has read the context's tokens and cannot take
    one back.
    """
    before, whole = tokens(tokenizer, context), tokens(tokenizer, context + text)
    return whole[len(before) :] if whole[: len(before)] == before else tokens(tokenizer, text)


def tokens(tokenizer: Any, text: str) -> list[int]:
    """The tokens of the text alone, without any that the tokenizer adds."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)
