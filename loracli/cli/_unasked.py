"""What a `loracat.toml` may say that lies in the current folder and that nobody asked for.

The folder may have come from elsewhere. Its file may say how adapters are composed, with paths inside of the folder;
not what is replaced, where else anything is read or written, what is run or trusted, or that nobody is told. All of
that stands in a file of `--config`, in the user's own, in variables and on the command line.

docs/configuration.md prints this table, and a test holds both against every option of every command.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

from loracli.errors import LoracatError
from loracli.hub.references import URI_PREFIX, parse_reference

Rule = Literal["yes", "inside", "no"]


@dataclass(frozen=True)
class Row:
    """What goes for some options.

    Args:
        rule: whether the file may set them; `inside` for paths within the folder, and for references on the Hub.
        options: long names, of every command or, as `push.revision`, of one.
        why: half a sentence.
    """

    rule: Rule
    options: tuple[str, ...]
    why: str


TABLE = (
    Row("no", ("force",), "replaces what is there"),
    Row("no", ("log", "local-dir"), "writes where no output is expected"),
    Row("no", ("cache-dir", "resume"), "takes a cache, or the state of a run, for the user's own"),
    Row("no", ("base", "base-revision"), "names what is trusted: weights, tokenizer, chat template"),
    Row("no", ("metric-command",), "names a program"),
    Row("no", ("quiet",), "hides that a file was in force"),
    Row("no", ("device", "device-map", "shard"), "takes devices of this machine"),
    Row("no", ("max-size", "with-base"), "lifts a ceiling of a download"),
    Row("no", ("from-pickle", "edited-card"), "lifts a check"),
    Row("no", ("push.revision", "message"), "names another place, or speaks, in the user's name"),
    Row("inside", ("output",), "is a new name, and no hidden one"),
    Row("inside", ("adapters", "control", "initial"), "are directories, or references on the Hub"),
    Row("inside", ("data", "eval-data", "fit-data", "guard", "comparison", "recipe"), "are files"),
    Row(
        "yes",
        tuple(
            "activation-aware allow-truncation batch-tokens budget checkpointing cv density dequantise dtype energy "
            "fields format generate gguf holdout learning-rate margin max-length max-new-tokens merge method methods "
            "mixing modules-to-save paper passes profile rank refit ridge scale seed select-by skip-bad task-type "
            "tolerance".split()
        ),
        "says how it is computed",
    ),
    Row("yes", ("revision",), "says which commit is read"),
    Row("yes", ("create-pr", "private", "dry-run"), "does less"),
    Row("yes", ("for", "color", "verbose"), "says what is shown"),
)
RULES = {option: row for row in TABLE for option in row.options}
WRITTEN = frozenset({"output"})
REFERENCES = frozenset({"adapters", "control", "initial"})  # what else is inside of the folder is a path


def refusal(command: str, option: str, value: Any) -> str | None:
    """Why an unasked file may not set this; None if it may.

    Args:
        command: that it is for; empty for every command.
        option: its long name.
        value: of the type that the option takes.
    """
    row = RULES.get(f"{command}.{option}") or RULES.get(option)
    if row is None or row.rule == "no":
        return row.why if row is not None else "is not on the list of what it may say"
    if row.rule == "yes":
        return None
    for text in value if isinstance(value, list) else [value]:
        if option in REFERENCES and _is_on_the_hub(str(text)):
            continue
        if not is_inside(str(text)) or (option in WRITTEN and _is_hidden(str(text))):
            return f"{text!r} is not inside of the folder: {row.why}"
    return None


def is_inside(text: str) -> bool:
    """Whether a path, of which a weight may be part, leads to the current folder or below it, links followed."""
    if text == "-" or text.startswith("~") or "\0" in text:
        return False
    here = os.path.realpath(os.curdir)
    without_weight = text.rpartition(":")[0] or text
    return all(os.path.commonpath([here, os.path.realpath(path)]) == here for path in (text, without_weight))


def _is_on_the_hub(text: str) -> bool:
    """Whether this is `hf://...` as only a repository on the Hub is named."""
    if not text.startswith(URI_PREFIX):
        return False
    try:
        return parse_reference(text).repo_id is not None
    except LoracatError:
        return False


def _is_hidden(text: str) -> bool:
    return any(part.startswith(".") and part != os.curdir for part in text.replace("\\", "/").split("/"))
