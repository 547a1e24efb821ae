"""Conversations: turns of OpenAI and ShareGPT checked, and brought to one form.

    {"messages": [{"role": ..., "content": ...}, ...], "scored": [3], "tools": [...]}

`scored` are the places of the turns that are scored; it is left out where these are all assistant turns. `tools` is
left out where there are none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loracli.calibration.checks import LineError, check_text, kind_of, shown

Message = dict[str, str]

ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
    "tool": "tool",
}
_CALLS = "calls are not read, as chat templates write them in many ways; write the call into an assistant turn's text"
_REFUSED = ("tool_calls", "function_call")
MAX_NESTING = 50  # of tool definitions: whatever walks them later has a stack of its own


@dataclass(frozen=True)
class Turns:
    """Checked turns: messages of role and content, and the places of the assistant's whose weight is not 0."""

    messages: list[Message]
    scored: list[int]


def read_turns(
    value: Any, path: str, *, role: str = "role", text: str = "content", roles: Mapping[str, str] = ROLES
) -> Turns:
    """A list of turns.

    Args:
        value: as JSON gives it.
        path: of the list, for messages.
        role: the key that holds the role.
        text: the key that holds what is said.
        roles: the roles that may occur, and ours for each.
    """
    if not isinstance(value, list) or not value:
        raise LineError(f"{path}: expected a list of messages, got {kind_of(value)}")
    messages: list[Message] = []
    scored: list[int] = []
    for index, turn in enumerate(value):
        place = f"{path}[{index}]"
        if not isinstance(turn, dict):
            raise LineError(f"{place}: expected an object, got {kind_of(turn)}")
        name = turn.get(role)
        if name == "function_call":
            raise LineError(f"{place}.{role}: {_CALLS}")
        if not isinstance(name, str) or name not in roles:
            raise LineError(f"{place}.{role}: expected one of {', '.join(roles)}, got {shown(name)}")
        for key in sorted(turn.keys() - {role, text, "weight"}):
            if turn[key] is not None:  # a null stands where a table of all keys was filled up
                raise LineError(
                    f"{place}.{key}: {_CALLS if key in _REFUSED else f'only {role}, {text} and weight are read'}"
                )
        answers = roles[name] == "assistant"
        if _weight(turn.get("weight"), f"{place}.weight", answers=answers) and answers:
            scored.append(index)
        messages.append({"role": roles[name], "content": _text(turn.get(text), f"{place}.{text}", answers=answers)})
    return Turns(messages, scored)


def chat(turns: Turns, path: str, tools: Any = None) -> dict[str, Any]:
    """The conversation in our form, if it has something to score.

    Args:
        turns: all of them.
        path: of the list, for messages.
        tools: the record's tool definitions, which go to the chat template.
    """
    answers = [index for index, message in enumerate(turns.messages) if message["role"] == "assistant"]
    if answers[:1] == [0]:
        raise LineError(f"{path}[0]: an assistant turn with nothing before it")
    if not turns.scored:
        reason = "every assistant turn has the weight 0" if answers else "no assistant turn"
        raise LineError(f"{path}: {reason}, so nothing is scored")
    content: dict[str, Any] = {"messages": turns.messages}
    if turns.scored != answers:
        content["scored"] = turns.scored
    if tools:
        content["tools"] = _tools(tools)
    return content


def _text(value: Any, path: str, *, answers: bool) -> str:
    """A string, or a list of text parts, which are joined as they stand."""
    if isinstance(value, list) and value:
        parts = []
        for index, part in enumerate(value):
            place = f"{path}[{index}]"
            if not isinstance(part, dict) or part.get("type") != "text":
                kind = shown(part.get("type")) if isinstance(part, dict) else kind_of(part)
                raise LineError(f'{place}: only parts of the type "text" are read, got {kind}')
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
    if not isinstance(value, list):
        raise LineError(f"tools: expected a list of objects, got {kind_of(value)}")
    for index, tool in enumerate(value):
        if not isinstance(tool, dict):
            raise LineError(f"tools[{index}]: expected an object, got {kind_of(tool)}")
    if _deeper(value, MAX_NESTING):
        raise LineError(f"tools: nested more than {MAX_NESTING} deep")
    return value


def _deeper(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_deeper(item, levels - 1) for item in inner)
