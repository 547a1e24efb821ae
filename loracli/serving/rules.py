"""The rules by which servers read adapters, as data: one TOML file a server beside this file.

    [server]   id, name, layout, versions, read (the version whose source was read), ranks, gguf, serve
    [[rule]]   name, severity, check with its parameters, why, remedy, source (file and function)

`check` names one of the functions in checks.py; everything of a rule that is no field of `Rule` is its parameter.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.resources import files
from typing import Any, Literal, get_args

from loracli.serving.adapter_files import AdapterLayout

Severity = Literal["refused", "misread", "ignored", "slow"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
SERVERS = ("peft", "vllm", "sglang", "llamacpp", "tgi", "ollama", "mlx")


@dataclass(frozen=True)
class Rule:
    """One thing that a server needs.

    Args:
        name: of it, unique within the server.
        severity: what happens without it: `refused`, `misread` (other numbers), `ignored` (a part is left out), `slow`.
        check: the function that looks for violations.
        why: what the server does.
        remedy: what to do; {path}, {name} and {base} stand for those of the adapter.
        source: where that was read.
        parameters: of the check.
    """

    name: str
    severity: Severity
    check: str
    why: str
    remedy: str
    source: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Server:
    """A server and its rules.

    Args:
        id: on the command line.
        name: for people.
        layout: of the directories that it reads.
        versions: that the rules hold for.
        read: the version whose source was read.
        ranks: that its rank option takes, empty for any.
        gguf: whether it takes a GGUF adapter instead.
        serve: command lines, with placeholders.
        serve_gguf: the same for a GGUF adapter.
        rules: in the order of the file.
    """

    id: str
    name: str
    layout: AdapterLayout
    versions: str
    read: str
    ranks: tuple[int, ...]
    gguf: bool
    serve: tuple[str, ...]
    serve_gguf: tuple[str, ...]
    rules: tuple[Rule, ...]


def load_server(name: str) -> Server:
    """The server of an id."""
    text = files("loracli.serving").joinpath("rules", f"{name}.toml").read_text(encoding="utf-8")
    document = tomllib.loads(text)
    server = document["server"]
    return Server(
        id=server["id"],
        name=server["name"],
        layout=server["layout"],
        versions=server["versions"],
        read=server["read"],
        ranks=tuple(server.get("ranks", ())),
        gguf=server.get("gguf", False),
        serve=tuple(server["serve"]),
        serve_gguf=tuple(server.get("serve_gguf", ())),
        rules=tuple(_rule(entry) for entry in document["rule"]),
    )


def _rule(entry: Mapping[str, Any]) -> Rule:
    own = {field.name for field in fields(Rule)} - {"parameters"}
    parameters = {key: value for key, value in entry.items() if key not in own}
    return Rule(**{key: entry[key] for key in own}, parameters=parameters)
