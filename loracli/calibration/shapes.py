"""The shapes of a record, and what each becomes.

    text                              {"text": "..."}
    prompt-completion                 {"prompt": "...", "completion": "..."}
    conversational-prompt-completion  {"prompt": [messages], "completion": [messages]}
    messages                          {"messages": [messages], "tools": [...]?}
    sharegpt                          {"conversations": [{"from": "...", "value": "..."}], "system": "..."?}
    alpaca                            {"instruction": "...", "input": "..."?, "output": "...", ...}

The first two stay as they are; the others become a conversation (`loracli.calibration.conversations`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from loracli.calibration.checks import LineError, check_text, kind_of
from loracli.calibration.conversations import SHAREGPT_ROLES, Turns, chat, read_turns

Shape = Literal["text", "prompt-completion", "conversational-prompt-completion", "messages", "sharegpt", "alpaca"]
SHAPES: tuple[Shape, ...] = get_args(Shape)

Fields = dict[str, Any]


@dataclass(frozen=True)
class _Form:
    """The keys of a shape, and how a record of it is checked and brought to one of the three kinds of content."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Fields], dict[str, Any]]


def detect_shape(fields: Fields) -> Shape:
    """The one shape whose keys a record has.

    Raises:
        LineError: if it has those of none, or of several.
    """
    found = [shape for shape in SHAPES if set(_FORMS[shape].required) <= fields.keys()]
    if "prompt-completion" in found:  # and with it the conversational one, whose keys are the same
        other: Shape = "prompt-completion" if isinstance(fields["prompt"], list) else "conversational-prompt-completion"
        found.remove(other)
    if len(found) == 1:
        return found[0]
    if found:
        raise LineError(f"has the keys of the shapes {', '.join(found)}; say with --format which to read")
    if "chosen" in fields or "rejected" in fields:
        raise LineError("chosen/rejected: preference data has no single completion to learn from")
    for shape, form in _FORMS.items():
        if form.required[0] in fields:
            missing = next(key for key in form.required if key not in fields)
            raise LineError(f"{missing}: missing; {form.required[0]} makes it a record of the shape {shape}")
    keys = dict.fromkeys(form.required[0] for form in _FORMS.values())
    raise LineError(f"has none of the keys {', '.join(keys)}; found: {', '.join(sorted(fields)) or 'nothing'}")


def read_content(fields: Fields, shape: Shape) -> dict[str, Any]:
    """What is rendered of a record: a text, prompt and completion, or a conversation.

    Raises:
        LineError: if the record does not have the shape.
    """
    form = _FORMS[shape]
    missing = next((key for key in form.required if key not in fields), None)
    if missing is not None:
        raise LineError(f"{missing}: missing; the file's shape is {shape}")
    return form.read(fields)


def keys_of(shape: Shape) -> set[str]:
    """The keys that are read of a record."""
    return {*_FORMS[shape].required, *_FORMS[shape].optional}


def _text(fields: Fields) -> dict[str, Any]:
    return {"text": check_text(fields["text"], "text", may_be_empty=False)}


def _prompt_completion(fields: Fields) -> dict[str, Any]:
    prompt = check_text(fields["prompt"], "prompt", may_be_empty=True)
    return {"prompt": prompt, "completion": check_text(fields["completion"], "completion", may_be_empty=False)}


def _conversational(fields: Fields) -> dict[str, Any]:
    prompt, completion = (read_turns(fields[key], key) for key in ("prompt", "completion"))
    if prompt.messages[-1]["role"] == "assistant":
        raise LineError(f"prompt[{len(prompt.messages) - 1}]: an assistant turn, which the completion would go on with")
    if completion.messages[0]["role"] != "assistant":
        raise LineError("completion[0]: not an assistant turn")
    if not completion.scored:
        raise LineError("completion: every assistant turn has the weight 0, so nothing is scored")
    turns = Turns(prompt.messages + completion.messages, [len(prompt.messages) + i for i in completion.scored])
    return chat(turns, "prompt", fields.get("tools"))


def _messages(fields: Fields) -> dict[str, Any]:
    return chat(read_turns(fields["messages"], "messages"), "messages", fields.get("tools"))


def _sharegpt(fields: Fields) -> dict[str, Any]:
    turns = read_turns(fields["conversations"], "conversations", role="from", text="value", roles=SHAREGPT_ROLES)
    system = fields.get("system")
    if system and turns.messages[0]["role"] == "system":
        raise LineError("system: the conversation has a system turn of its own")
    return chat(_after_system(system, turns), "conversations", fields.get("tools"))


def _alpaca(fields: Fields) -> dict[str, Any]:
    """Instruction and input are one user turn of two lines; earlier turns are not scored."""
    asked = check_text(fields["instruction"], "instruction", may_be_empty=False)
    addition = check_text(_or_empty(fields.get("input")), "input", may_be_empty=True)
    answer = check_text(fields["output"], "output", may_be_empty=False)
    turns = [*_history(fields.get("history")), (f"{asked}\n{addition}" if addition else asked, answer)]
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return chat(_after_system(fields.get("system"), Turns(messages, [len(messages) - 1])), "history")


def _history(value: Any) -> list[tuple[str, str]]:
    if not isinstance(value or [], list):
        raise LineError(f"history: expected a list of pairs, got {kind_of(value)}")
    pairs = []
    for index, pair in enumerate(value or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise LineError(f"history[{index}]: expected a pair of instruction and answer")
        asked, answered = (check_text(x, f"history[{index}][{i}]", may_be_empty=False) for i, x in enumerate(pair))
        pairs.append((asked, answered))
    return pairs


def _after_system(system: Any, turns: Turns) -> Turns:
    """The turns with a system turn before them, if there is one."""
    text = check_text(_or_empty(system), "system", may_be_empty=True)
    if not text:
        return turns
    return Turns([{"role": "system", "content": text}, *turns.messages], [1 + index for index in turns.scored])


def _or_empty(value: Any) -> Any:
    return "" if value is None else value


_FORMS: dict[Shape, _Form] = {
    "text": _Form(("text",), (), _text),
    "prompt-completion": _Form(("prompt", "completion"), (), _prompt_completion),
    "conversational-prompt-completion": _Form(("prompt", "completion"), ("tools",), _conversational),
    "messages": _Form(("messages",), ("tools",), _messages),
    "sharegpt": _Form(("conversations",), ("system", "tools"), _sharegpt),
    "alpaca": _Form(("instruction", "output"), ("input", "system", "history"), _alpaca),
}
