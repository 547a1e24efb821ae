"""Conversations through the base model's chat template, with the places of the scored turns.

Where a turn stands is found by rendering twice: what came before it with the generation prompt, and all up to its end.
The first has to be how the second begins; so no mark of the template is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loracli.calibration.conversations import Message
from loracli.calibration.tokens import Rendered, continuation

# A template is a program of strangers: beside its own refusals it can fail as any does.
_FAILURES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class RenderError(Exception):
    """The reason why one record cannot be rendered."""


def render_chat(content: dict[str, Any], tokenizer: Any, special: set[int]) -> Rendered:
    """The conversation up to the end of its last scored turn.

    Args:
        content: a conversation, in the form of `loracli.calibration.conversations`.
        tokenizer: the base model's, with a chat template.
        special: its special and added tokens, one of which ends a turn.
    Raises:
        RenderError: if the template refuses it, or leaves the place of an answer unknown.
    """
    messages: list[Message] = content["messages"]
    tools = content.get("tools")
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    turns: list[int] = content.get("scored", answers)
    if tools and _template(tokenizer, messages[: turns[0]], tools) == _template(tokenizer, messages[: turns[0]], None):
        raise RenderError("tools: the chat template does not write them")
    ids: list[int] = []
    scored: list[bool] = []
    done = ""  # what has been rendered and tokenised
    for index in turns:
        before = _template(tokenizer, messages[:index], tools)
        after = _template(tokenizer, messages[: index + 1], tools, generation_prompt=False)
        if not before.startswith(done):
            raise RenderError(
                f"turn {index + 1}: the chat template renders earlier turns anew, so a conversation has no one text; "
                'give earlier assistant turns "weight": 0'
            )
        if not after.startswith(before):
            raise RenderError(
                f"turn {index + 1}: the answer as the chat template writes it does not begin with its generation prompt"
            )
        context = continuation(tokenizer, done, before[len(done) :])
        turn = continuation(tokenizer, before, after[len(before) :])
        if not turn:
            raise RenderError(f"turn {index + 1}: the chat template writes nothing for it")
        end = _end_of_turn(turn, special, tokenizer)
        ids += context + turn
        scored += [False] * len(context) + [i < end for i in range(len(turn))]
        done = after
    last = max(i for i, flag in enumerate(scored) if flag) + 1
    return ids[:last], scored[:last]


def _end_of_turn(turn: Sequence[int], special: set[int], tokenizer: Any) -> int:
    """How many tokens the model itself would produce: up to its end-of-turn token, without the template's white space
    after."""
    for index in range(len(turn) - 1, -1, -1):
        if turn[index] in special:
            return index + 1
        if tokenizer.decode([turn[index]]).strip():
            break
    return len(turn)


def _template(
    tokenizer: Any, messages: list[Message], tools: list[dict[str, Any]] | None, *, generation_prompt: bool = True
) -> str:
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=generation_prompt
        )
    except (TemplateError, *_FAILURES) as error:
        raise RenderError(f"the chat template refuses it: {error}") from None
    return text
