"""From one line of JSON to a text, prompt and completion, or a conversation: the shapes of a record, and what each
becomes.

    text                              {"text": "..."}
    prompt-completion                 {"prompt": "...", "completion": "..."}
    conversational-prompt-completion  {"prompt": [messages], "completion": [messages]}
    messages                          {"messages": [messages], ...}
    sharegpt                          {"conversations": [{"from": "...", "value": "..."}], ...}
    alpaca                            {"instruction": "...", "input": "..."?, "output": "...", ...}

The first two stay as they are; the others take a system text and `tools` as well, and become a conversation, its turns
checked and brought to one form.

    {"messages": [{"role": ..., "content": ...}, ...], "scored": [3], "tools": [...]}

The last turn is scored: what stands behind it is never seen. `scored` are the places of the turns that are scored; it
is left out where these are all assistant turns. `tools` is left out where there are none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from loracli.calibration.fields import (
    SYSTEM_KEYS,
    LineError,
    WayOut,
    check_text,
    is_nothing,
    kind_of,
    preference_beside_none,
    shown,
    suggestion,
)
from loracli.calibration.file_forms import FileForm
from loracli.system.strict_json import StrictJsonError, parse_json

_SHOWN_KEYS = 20
_SHOWN_KEY = 60  # characters of one


def shown_keys(keys: Iterable[str]) -> str:
    """The first keys in order, between commas, each cut to a length."""
    ordered = sorted(keys)
    more = f" and {len(ordered) - _SHOWN_KEYS} more" if len(ordered) > _SHOWN_KEYS else ""
    return (
        ", ".join(key if len(key) <= _SHOWN_KEY else f"{key[:_SHOWN_KEY]}..." for key in ordered[:_SHOWN_KEYS]) + more
    )


Message = dict[str, str]

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_PAIRS = (("role", "content"), ("from", "value"))  # the keys of a turn, by OpenAI and by ShareGPT
_CALLS = "calls are not read, as chat templates write them in many ways; write the call into an assistant turn's text"
_REFUSED = ("tool_calls", "function_call")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_THOUGHT = "reasoning apart from the answer is not read; write it into the turn's text as the model should write it"
_MAX_TURNS = 1000  # of a conversation: where each answer stands is found by rendering all before it
_MAX_NESTING = 50  # of tool definitions: whatever walks them later has a stack of its own


@dataclass(frozen=True)
class Turns:
    """Checked turns: messages of role and content, and the places of the assistant's whose weight is not 0."""

    messages: list[Message]
    scored: list[int]


def _read_turns(value: Any, path: str, *, sharegpt: bool = False) -> Turns:
    """A list of turns, each with the keys of OpenAI or of ShareGPT.

    Args:
        value: as JSON gives it.
        path: of the list, for messages.
        sharegpt: whether the keys of ShareGPT are the ones to miss.
    """
    if not isinstance(value, list) or not value:
        raise LineError(f"{path}: expected a list of messages, got {kind_of(value)}")
    messages: list[Message] = []
    scored: list[int] = []
    for index, turn in enumerate(value):
        place = f"{path}[{index}]"
        if not isinstance(turn, dict):
            raise LineError(f"{place}: expected an object, got {kind_of(turn)}")
        role, text = next((pair for pair in _PAIRS if pair[0] in turn), _PAIRS[sharegpt])
        if sharegpt and _PAIRS[1][0] in turn:
            role, text = _PAIRS[1]
        given = turn.get(role)
        name = given.lower() if isinstance(given, str) else ""
        if name == "function_call":
            raise LineError(f"{place}.{role}: {_CALLS}")
        if name not in _ROLES:
            raise LineError(f"{place}.{role}: expected one of {', '.join(_ROLES)}, got {shown(given)}")
        _refuse_more(turn, (role, text, "weight"), path, place)
        answers = _ROLES[name] == "assistant"
        if _weight(turn.get("weight"), f"{place}.weight", answers=answers) and answers:
            scored.append(index)
        messages.append({"role": _ROLES[name], "content": _said(turn.get(text), f"{place}.{text}", answers=answers)})
    return Turns(messages, scored)


def _refuse_more(turn: dict[str, Any], read: tuple[str, ...], path: str, place: str) -> None:
    """Refuses a turn that says something in other keys than are read."""
    more = sorted(key for key in turn.keys() - {*read} if not _is_filler(turn[key]))
    for keys, reason in ((_REFUSED, _CALLS), (_REASONING, _THOUGHT)):
        if found := [key for key in more if key in keys]:
            raise LineError(f"{place}.{found[0]}: {reason}")
    if more:
        what = f"only {', '.join(read[:-1])} and {read[-1]} are read"
        kept = f"{{k: v for k, v in t.items() if k not in {json.dumps(more)}}}"
        raise LineError(
            f"{place}.{shown_keys(more)}: {what}",
            way_out=_of_turns(
                path, f"[{kept} for t in c]", "if the chat template would write none of them, leave them out: "
            ),
        )


def _of_turns(path: str, turns: str, why: str) -> WayOut:
    """The command that writes `turns`, an expression of `c`, in the place of each conversation `c` in `path`."""

    def way_out(form: FileForm) -> str:
        key = json.dumps(form.names.get(path, path))
        return why + form.rewritten(f"{{**r, {key}: {turns}}}", having=f"r[{key}]")

    return way_out


def _is_filler(value: Any) -> bool:
    """What stands where a table of all keys was filled up."""
    return value is None or value in ([], {}) or (isinstance(value, str) and is_nothing(value))


def _chat(turns: Turns, path: str, tools: Any = None) -> dict[str, Any]:
    """The conversation in our form, if it has something to score.

    Args:
        turns: all of them.
        path: of the list, for messages.
        tools: the record's tool definitions, which go to the chat template.
    """
    if len(turns.messages) > _MAX_TURNS:
        raise LineError(f"{path}: {len(turns.messages)} turns; at most {_MAX_TURNS} are read; divide the conversation")
    answers = [index for index, message in enumerate(turns.messages) if message["role"] == "assistant"]
    if answers[:1] == [0]:
        own = json.dumps([name for name, role in _ROLES.items() if role == "assistant"])
        first = f'next((i for i, t in enumerate(c) if t.get("role", t.get("from")).lower() not in {own}), 0)'
        raise LineError(
            f"{path}[0]: an assistant turn with nothing before it",
            way_out=_of_turns(path, f"c[{first}:]", "begin with the first turn that is not the assistant's: "),
        )
    if not turns.scored:
        reason = "every assistant turn has the weight 0" if answers else "no assistant turn"
        raise LineError(f"{path}: {reason}, so nothing is scored")
    end = turns.scored[-1] + 1
    content: dict[str, Any] = {"messages": turns.messages[:end]}
    if turns.scored != [index for index in answers if index < end]:
        content["scored"] = turns.scored
    definitions = _tools(tools)
    if definitions:
        content["tools"] = definitions
    return content


def _said(value: Any, path: str, *, answers: bool) -> str:
    """A string, or a list of text parts, which are joined as they stand."""
    if isinstance(value, list) and value:
        parts = []
        for index, part in enumerate(value):
            place = f"{path}[{index}]"
            if not isinstance(part, dict) or part.get("type") != "text":
                kind = shown(part.get("type")) if isinstance(part, dict) else kind_of(part)
                raise LineError(f'{place}: only parts of the type "text" are read, got {kind}')
            more = [key for key in part if key not in ("type", "text") and not _is_filler(part[key])]
            if more:
                raise LineError(f"{place}.{shown_keys(more[:1])}: only type and text of a part are read")
            parts.append(check_text(part.get("text"), f"{place}.text", may_be_empty=True))
        value = "".join(parts)
    return check_text(value, path, may_be_empty=not answers)


def _weight(value: Any, path: str, *, answers: bool) -> bool:
    """Whether the turn counts: OpenAI's weight of an assistant message, 0 or 1."""
    if value is None:
        return True
    if not answers:
        raise LineError(f"{path}: only an assistant turn has one")
    if isinstance(value, bool) or value not in (0, 1):
        raise LineError(f"{path}: expected 0 or 1, got {shown(value)}")
    return bool(value)


def _tools(value: Any) -> list[dict[str, Any]]:
    """A list of objects; it, or each of them, may be JSON as a text, as tables keep what has no one type."""
    value = _from_json(value, "tools")
    if not value:
        return []
    if not isinstance(value, list):
        raise LineError(f"tools: expected a list of objects, got {kind_of(value)}")
    tools = [_from_json(tool, f"tools[{index}]") for index, tool in enumerate(value)]
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise LineError(f"tools[{index}]: expected an object, got {kind_of(tool)}")
    if _deeper(tools, _MAX_NESTING):
        raise LineError(f"tools: nested more than {_MAX_NESTING} deep")
    return tools


def _from_json(value: Any, path: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value) if value.strip() else None
    except StrictJsonError as error:
        raise LineError(f"{path}: a text that cannot be read: {error}") from None


def _deeper(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_deeper(item, levels - 1) for item in inner)


Shape = Literal["text", "prompt-completion", "conversational-prompt-completion", "messages", "sharegpt", "alpaca"]
SHAPES: tuple[Shape, ...] = get_args(Shape)

_Fields = dict[str, Any]


@dataclass(frozen=True)
class _Form:
    """The keys of a shape, and how a record of it is checked and brought to one of the three kinds of content."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[_Fields], dict[str, Any]]


def detect_shape(fields: _Fields, renamed: Mapping[str, str] | None = None) -> Shape:
    """The one shape whose keys a record has.

    Args:
        fields: of the record, by our names.
        renamed: what the file calls those of them that have another name there.
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
        options = " or ".join(f"--format {shape}" for shape in found)
        raise LineError(
            f"has the keys of the shapes {', '.join(found)}", way_out=lambda form: f"say which to read: {options}"
        )
    by_fields = partial(_by_fields, fields, renamed or {})
    if preference_beside_none(fields):
        reason = "chosen/rejected: preference data has no single completion to learn from"
        raise LineError(reason, way_out=by_fields("to learn what was chosen, give "))
    for shape, form in _FORMS.items():
        if form.required[0] in fields:
            missing = next(key for key in form.required if key not in fields)
            reason = f"{missing}: missing; {form.required[0]} makes it a record of the shape {shape}"
            raise LineError(reason, way_out=by_fields())
    keys = dict.fromkeys(form.required[0] for form in _FORMS.values())
    reason = f"has none of the keys {', '.join(keys)}; found: {shown_keys(fields) or 'nothing'}"
    raise LineError(reason, way_out=by_fields())


def _by_fields(fields: _Fields, renamed: Mapping[str, str], why: str = "say what the keys are: ") -> WayOut | None:
    option = suggestion(fields, renamed)
    return None if option is None else lambda form: f"{why}{option}"


def read_content(fields: _Fields, shape: Shape) -> dict[str, Any]:
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


def keys_of_shapes(fields: _Fields) -> set[str]:
    """The keys that make a record one of each shape that it has: of several, the user has said which to read."""
    return {key for form in _FORMS.values() if set(form.required) <= fields.keys() for key in form.required}


def _text(fields: _Fields) -> dict[str, Any]:
    return {"text": check_text(fields["text"], "text", may_be_empty=False)}


def _prompt_completion(fields: _Fields) -> dict[str, Any]:
    prompt = check_text(fields["prompt"], "prompt", may_be_empty=True)
    return {"prompt": prompt, "completion": check_text(fields["completion"], "completion", may_be_empty=False)}


def _conversational(fields: _Fields) -> dict[str, Any]:
    prompt, completion = (_read_turns(fields[key], key) for key in ("prompt", "completion"))
    if prompt.messages[-1]["role"] == "assistant":
        raise LineError(f"prompt[{len(prompt.messages) - 1}]: an assistant turn, which the completion would go on with")
    if completion.messages[0]["role"] != "assistant":
        raise LineError("completion[0]: not an assistant turn")
    if not completion.scored:
        raise LineError("completion: every assistant turn has the weight 0, so nothing is scored")
    turns = Turns(prompt.messages + completion.messages, [len(prompt.messages) + i for i in completion.scored])
    return _chat(_after_system(fields, turns), "prompt", fields.get("tools"))


def _messages(fields: _Fields) -> dict[str, Any]:
    turns = _read_turns(fields["messages"], "messages")
    return _chat(_after_system(fields, turns), "messages", fields.get("tools"))


def _sharegpt(fields: _Fields) -> dict[str, Any]:
    turns = _read_turns(fields["conversations"], "conversations", sharegpt=True)
    return _chat(_after_system(fields, turns), "conversations", fields.get("tools"))


def _alpaca(fields: _Fields) -> dict[str, Any]:
    """Instruction and input are one user turn of two lines; earlier turns are not scored."""
    asked = check_text(fields["instruction"], "instruction", may_be_empty=False)
    addition = check_text(_or_empty(fields.get("input")), "input", may_be_empty=True)
    answer = check_text(fields["output"], "output", may_be_empty=False)
    pairs = [*_history(fields.get("history")), (f"{asked}\n{addition}" if addition else asked, answer)]
    messages = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    turns = Turns(messages, [len(messages) - 1])
    return _chat(_after_system(fields, turns), "history", fields.get("tools"))


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


def _after_system(fields: _Fields, turns: Turns) -> Turns:
    """The turns with a system turn before them, if the record has a system text that is not theirs already."""
    found = {key: check_text(_or_empty(fields.get(key)), key, may_be_empty=True) for key in SYSTEM_KEYS}
    texts = {key: text for key, text in found.items() if text}
    key, text = next(iter(texts.items()), ("", ""))
    if len(set(texts.values())) > 1:
        raise LineError(f"{' and '.join(texts)}: system texts that differ; keep one of them")
    first = turns.messages[0]
    if not text or (first["role"] in ("system", "developer") and first["content"].strip() == text.strip()):
        return turns
    if first["role"] in ("system", "developer"):
        raise LineError(f"{key}: the conversation has a system turn of its own")
    return Turns([{"role": "system", "content": text}, *turns.messages], [1 + index for index in turns.scored])


def _or_empty(value: Any) -> Any:
    return "" if value is None else value


_OF_CHATS = (*SYSTEM_KEYS, "tools")
_FORMS: dict[Shape, _Form] = {
    "text": _Form(("text",), (), _text),
    "prompt-completion": _Form(("prompt", "completion"), (), _prompt_completion),
    "conversational-prompt-completion": _Form(("prompt", "completion"), _OF_CHATS, _conversational),
    "messages": _Form(("messages",), _OF_CHATS, _messages),
    "sharegpt": _Form(("conversations",), _OF_CHATS, _sharegpt),
    "alpaca": _Form(("instruction", "output"), ("input", "history", *_OF_CHATS), _alpaca),
}
