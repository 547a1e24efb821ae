"""Other names of what a shape reads: `--fields prompt=question,completion=answer`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from loracli.calibration.beside import HISTORY_NAMES, PASSAGE_NAMES, SYSTEM_KEYS, SYSTEM_NAMES, spelled
from loracli.calibration.checks import is_nothing
from loracli.errors import UsageError

READABLE = (
    "text", "prompt", "completion", "messages", "conversations", "instruction", "input", "output", "system", "history",
    "tools", "task", "choices",
)  # fmt: skip

# What people call the two texts, most telling first.
_QUESTIONS = ("question", "query", "problem", "instruction", "prompt", "input", "inputs", "user", "human", "source")
_ANSWERS = (
    "answer", "response", "completion", "output", "solution", "target", "targets", "outputs", "reply", "generation",
    "assistant", "gpt",
)  # fmt: skip


def parse_fields(text: str | None) -> dict[str, str]:
    """The key of the file for each of ours: {"prompt": "question"}.

    Raises:
        UsageError: if it is not NAME=KEY between commas, or a name is twice there or read by no shape.
    """
    found: dict[str, str] = {}
    for pair in (text or "").split(",") if text is not None else ():
        name, sign, key = (word.strip() for word in pair.partition("="))
        if not sign or not key:
            raise UsageError(f"--fields {text}: {pair or 'nothing'} is not NAME=KEY", hint=_EXAMPLE)
        if name not in READABLE:
            raise UsageError(f"--fields {text}: {name} is not one of {', '.join(READABLE)}", hint=_EXAMPLE)
        if name in found:
            raise UsageError(f"--fields {text}: {name} is there twice", hint=_EXAMPLE)
        found[name] = key
    return found


_EXAMPLE = "write it as --fields prompt=question,completion=answer"


def renamed(fields: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The record with our names; a key that it lacks is left to what is missed later."""
    there = {name: key for name, key in names.items() if key in fields}
    kept = {key: value for key, value in fields.items() if key not in there.values() and key not in there}
    return kept | {name: fields[key] for name, key in there.items()}


def shadowed(fields: Mapping[str, Any], names: Mapping[str, str]) -> set[str]:
    """Keys of the record whose names stand for another of its keys."""
    return {name for name, key in names.items() if key in fields and name in fields and name != key}


def suggestion(fields: Mapping[str, Any]) -> str | None:
    """The option that reads a record of no shape, None where nothing suggests one."""
    chosen = fields.get("chosen")
    if isinstance(chosen, list):
        first = chosen[0] if chosen and isinstance(chosen[0], dict) else {}
        answers = first.get("role", first.get("from")) in ("assistant", "gpt")
        return "--fields completion=chosen" if answers and "prompt" in fields else "--fields messages=chosen"
    if "chosen" in fields:
        return _pair(fields, ("chosen",))
    return _pair(fields, _ANSWERS)


def _pair(fields: Mapping[str, Any], answers: tuple[str, ...]) -> str | None:
    """Prompt and completion; where a record has more that the model should see, an instruction that keeps it."""
    keys = {spelled(key): key for key, value in reversed(list(fields.items())) if not is_nothing(value)}
    texts = {name: key for name, key in keys.items() if isinstance(fields[key], str)}
    answer = next((texts[name] for name in answers if name in texts), None)
    question = next((texts[name] for name in _QUESTIONS if name in texts and texts[name] != answer), None)
    if answer is None or question is None:
        return None
    beside = [texts[name] for name in ("input", *PASSAGE_NAMES) if name in texts]
    more = {
        "system": next((texts[name] for name in SYSTEM_NAMES if name in texts), None),
        "history": next(
            (keys[name] for name in HISTORY_NAMES if isinstance(fields.get(keys.get(name, "")), list)), None
        ),
        "input": next((key for key in beside if key not in (question, answer)), None),
    }
    if not any(more.values()):
        return _option({"prompt": question, "completion": answer})
    return _option({"instruction": question} | {name: key for name, key in more.items() if key} | {"output": answer})


def _option(names: Mapping[str, str]) -> str | None:
    """Without what is called so already; None where a key cannot be written."""
    if any(set(key) & set(",=") or key != key.strip() for key in names.values()):
        return None
    written = (f"{name}={key}" for name, key in names.items() if key != name and (name, key) not in _READ_AS_THEY_ARE)
    return "--fields " + shlex.quote(",".join(written))


_READ_AS_THEY_ARE = {("system", key) for key in SYSTEM_KEYS}
