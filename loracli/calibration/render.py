"""From records to tokens, with a mask of the positions that are scored.

No token reaches across the place where generation would start: a served model sees the prompt's tokens and then
    produces
the completion's, so that is the boundary the loss has to see.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loracli.calibration.records import CalibrationFile, Record
from loracli.errors import CalibrationError
from loracli.progress import SILENT, Progress

MAX_DROPPED = 0.1


@dataclass(frozen=True)
class Example:
    """One record as the model sees it.

    Args:
        line: of the record, for messages.
        input_ids: T tokens.
        scored: T flags; position t is scored when the model's prediction of token t counts. The first never is.
    """

    line: int
    input_ids: tuple[int, ...]
    scored: tuple[bool, ...]

    @property
    def scored_tokens(self) -> int:
        return sum(self.scored)


def render_records(
    file: CalibrationFile,
    tokenizer: Any,
    *,
    max_length: int,
    records: Sequence[Record] | None = None,
    progress: Progress = SILENT,
) -> list[Example]:
    """Tokenises the records of a file (or some of them), cut to `max_length` tokens from the start.

    Raises:
        CalibrationError: if the tokenizer lacks what the shape needs, a template cannot render a record, or more than a
            tenth of the records have no scored token left after the cut.
    """
    render = _renderer(file, tokenizer)
    examples, dropped, cut, problems = [], [], 0, []
    for record in file.records if records is None else records:
        try:
            ids, scored = render(record.content)
        except _RenderError as error:
            problems.append(f"{file.name}:{record.line}: {error}")
            continue
        cut += len(ids) > max_length
        scored = [False, *scored[1:max_length]]
        if any(scored):
            examples.append(Example(record.line, tuple(ids[:max_length]), tuple(scored)))
        else:
            dropped.append(record.line)
    if problems:
        raise CalibrationError(f"{len(problems)} records of {file.name} cannot be rendered", problems=tuple(problems))
    if len(dropped) > MAX_DROPPED * (len(dropped) + len(examples)):
        raise CalibrationError(
            f"{len(dropped)} records of {file.name} have no scored token within {max_length} tokens, the first on line "
            f"{dropped[0]}",
            hint="raise --max-length, or shorten the prompts",
        )
    if cut:
        lost = f", {len(dropped)} of them dropped: nothing scored was left" if dropped else ""
        progress.warn(f"{cut} records are longer than {max_length} tokens and were cut at the end{lost}")
    return examples


def template_sha256(tokenizer: Any) -> str | None:
    """sha256 of the tokenizer's chat template, None without one."""
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None


class _RenderError(Exception):
    """The reason why one record cannot be rendered."""


def _renderer(file: CalibrationFile, tokenizer: Any) -> Any:
    if file.shape == "messages":
        if not getattr(tokenizer, "chat_template", None):
            raise CalibrationError(
                f"{file.name} holds messages, but the base model's tokenizer has no chat template",
                hint='write {"prompt": ..., "completion": ...} records with the text as the model should see it',
            )
        special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
        return lambda content: _render_messages(content["messages"], tokenizer, special)
    if tokenizer.eos_token_id is None:
        raise CalibrationError(
            "the base model's tokenizer has no end-of-sequence token to close a completion with",
            hint='use {"messages": ...} records with its chat template',
        )
    if file.shape == "text":
        return lambda content: _render_completion("", content["text"], tokenizer)
    return lambda content: _render_completion(content["prompt"], content["completion"], tokenizer)


def _render_completion(prompt: str, completion: str, tokenizer: Any) -> tuple[list[int], list[bool]]:
    context = [*_leading_bos(tokenizer, prompt or completion), *_tokens(tokenizer, prompt)]
    target = _continuation(tokenizer, prompt, completion)
    if target[-1:] != [tokenizer.eos_token_id]:
        target.append(tokenizer.eos_token_id)
    return context + target, [False] * len(context) + [True] * len(target)


def _leading_bos(tokenizer: Any, text: str) -> list[int]:
    """The token that the tokenizer itself puts before a text, unless the text has it already."""
    bos = tokenizer.bos_token_id
    if bos is None or _tokens(tokenizer, text)[:1] == [bos]:
        return []
    return [bos] if tokenizer(text).input_ids[:1] == [bos] else []


def _render_messages(messages: list[dict[str, str]], tokenizer: Any, special: set[int]) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    scored: list[bool] = []
    done = ""  # what has been rendered and tokenised
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _template(tokenizer, messages[:index], generation_prompt=True)
        after = _template(tokenizer, messages[: index + 1], generation_prompt=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise _RenderError(
                f"messages[{index}]: the chat template renders earlier turns anew, so the answer's place is unknown"
            )
        context = _continuation(tokenizer, done, before[len(done) :])
        turn = _continuation(tokenizer, before, after[len(before) :])
        end = _end_of_turn(turn, special, tokenizer)
        ids += context + turn
        scored += [False] * len(context) + [i < end for i in range(len(turn))]
        done = after
    last = max(i for i, flag in enumerate(scored) if flag) + 1 if any(scored) else len(ids)
    return ids[:last], scored[:last]


def _end_of_turn(turn: list[int], special: set[int], tokenizer: Any) -> int:
    """How many tokens the model itself would produce: up to its end-of-turn token, without the template's white space
    after."""
    for index in range(len(turn) - 1, -1, -1):
        if turn[index] in special:
            return index + 1
        if tokenizer.decode([turn[index]]).strip():
            break
    return len(turn)


def _template(tokenizer: Any, messages: list[dict[str, str]], *, generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
    except TemplateError as error:
        raise _RenderError(f"messages: the chat template refuses: {error}") from None
    return text


def _continuation(tokenizer: Any, context: str, text: str) -> list[int]:
    """The tokens of `text` after `context`, whose own tokens stay as they are.

    Some tokenizers put a space before whatever they are given, so `text` alone would get one. Where a token would reach
    across the border, `text` is tokenised alone after all: a served model has read the context's tokens and cannot take
    one back.
    """
    before, whole = _tokens(tokenizer, context), _tokens(tokenizer, context + text)
    return whole[len(before) :] if whole[: len(before)] == before else _tokens(tokenizer, text)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return list(ids)
