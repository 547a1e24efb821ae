"""An adapter's directory held against the rules of servers: what each would do with it, and how it is served.

The rules are data: one TOML file a server beside this file.

    [server]   id, name, layout, versions, read (the version whose source was read), ranks, gguf, serve
    [[rule]]   name, severity, check with its parameters, why, remedy, source (file and function)

`check` names one of the functions in checks.py; everything of a rule that is no field of `Rule` is its parameter.

Nothing of the adapter is run, and nothing of it goes unquoted into a command: its own name for the base only if it is
spelt like a Hub id, its directory's name reduced to harmless characters.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from loracli.adapters.adapter import IDLE, open_adapter
from loracli.adapters.kinds import kind_of
from loracli.errors import InputError, UsageError
from loracli.hub.references import Named, is_repo_id
from loracli.progress import SILENT, Bar, Progress, drawn, takes_bar
from loracli.serving.adapter_files import AdapterFiles, AdapterLayout, BaseFacts, read_adapter_files, read_base_facts
from loracli.serving.checks import CHECKS, Unclear
from loracli.system.display import count_text, path_text, repr_line
from loracli.system.near import did_you_mean

Severity = Literal["refused", "misread", "ignored", "slow"]
_SERVERS = ("peft", "vllm", "sglang", "llamacpp", "tgi", "ollama", "mlx")


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


Verdict = Literal["takes", "differs", "refuses"]
_SHOWN_FINDS = 20
_TASK = "lint"

_OTHER_LAYOUT: dict[AdapterLayout, tuple[str, str]] = {
    "peft": ("MLX's adapters.safetensors", "loracat export --method sum --adapters {path} -o {name}-portable"),
    "mlx": (
        "PEFT's adapter_model.safetensors",
        "loracat export --method sum --profile mlx --adapters {path} -o {name}-mlx",
    ),
}


@dataclass(frozen=True)
class Violation:
    """A rule that the adapter breaks.

    Args:
        rule: its name.
        severity: what the server does then.
        found: what breaks it, the first few.
        count: how much breaks it.
        why: what the server does.
        remedy: what to do.
        source: where the rule was read.
    """

    rule: str
    severity: Severity
    found: tuple[str, ...]
    count: int
    why: str
    remedy: str
    source: str


@dataclass(frozen=True)
class ServerReport:
    """What one server makes of the adapter.

    Args:
        id, name, versions, read: of the server and its rules.
        verdict: it takes it and means the same, it takes it and means something else, or it refuses it.
        violations: of its rules.
        unclear: what could not be told, and why.
        serve: commands, empty if it refuses the adapter.
    """

    id: str
    name: str
    versions: str
    read: str
    verdict: Verdict
    violations: tuple[Violation, ...]
    unclear: tuple[str, ...]
    serve: tuple[str, ...]


@dataclass(frozen=True)
class Lint:
    """What servers make of an adapter.

    Args:
        path: the directory.
        layout: of it.
        rank: the largest.
        modules: how many are adapted.
        servers: a report for each.
    """

    path: Path
    layout: AdapterLayout
    rank: int
    modules: int
    servers: tuple[ServerReport, ...]

    def __repr__(self) -> str:
        others = [f"{server.id} {server.verdict}" for server in self.servers if server.verdict != "takes"]
        taken = f"{len(self.servers) - len(others)} of {count_text(len(self.servers), 'server')} take it"
        return repr_line(
            self, path_text(self.path), f"rank {self.rank}", count_text(self.modules, "module"), taken, *others
        )

    @property
    def taken(self) -> bool:
        """Whether all servers take it and mean the same."""
        return all(server.verdict == "takes" for server in self.servers)

    def as_dict(self) -> dict[str, Any]:
        """For a JSON document."""
        return {
            "path": str(self.path),
            "layout": self.layout,
            "rank": self.rank,
            "modules": self.modules,
            "taken": self.taken,
            "servers": [asdict(server) for server in self.servers],
        }


@takes_bar
def lint_adapter(
    path: str | Path, *, servers: Sequence[str] = (), base: Named | None = None, progress: Progress | Bar = SILENT
) -> Lint:
    """Checks an adapter's directory against the rules of servers.

    Args:
        path: a directory as PEFT or mlx-lm writes it; also of an adapter that loracat does not compose.
        servers: ids of `_SERVERS`; none for all that read the directory's layout.
        base: the base model's directory or Hub id, of which the config is read; None to check without.
        progress: told how far it is.
    Raises:
        AdapterNotFound, MalformedAdapter: if the directory holds no adapter, or its files are damaged.
        UsageError: if there is no server of an id.
        InputError, HubUnreachable: if the base's config cannot be had.
    """
    progress = drawn(progress)
    unknown = next((name for name in servers if name not in _SERVERS), None)
    if unknown is not None:
        raise UsageError(f"--for {unknown} is not one of {', '.join(_SERVERS)}", hint=did_you_mean(unknown, _SERVERS))
    files = read_adapter_files(Path(path))
    if files.changes_nothing():
        progress.warn(f"{path}: {IDLE}")
    obstacle = _obstacle(Path(path), progress)
    facts = None if base is None else read_base_facts(base, task=files.config.get("task_type"), progress=progress)
    asked = [load_server(name) for name in dict.fromkeys(servers or _SERVERS)]
    chosen = asked if servers else [server for server in asked if server.layout == files.layout]
    progress.begin(_TASK, len(chosen), "servers")
    reports = []
    for server in chosen:
        reports.append(_report(server, files, facts, obstacle))
        progress.advance(_TASK, 1, server.name)
    progress.finish(_TASK)
    return Lint(Path(path), files.layout, files.largest_rank, len(files.pairs), tuple(reports))


def _obstacle(path: Path, progress: Progress) -> tuple[str, str] | None:
    """What to say in place of remedies that cannot work, and the words by which these are known; None if all can."""
    try:
        adapter = open_adapter(path)
    except InputError as error:
        progress.warn(f"loracat itself does not take {path}: {error.what}")
        return f"loracat cannot write it again: {error.what}", "loracat export"
    experts = any(kind_of(module).of_experts for module in adapter.modules.values())
    return ("serve it with PEFT or vLLM: no other layout has its experts", "-portable") if experts else None


def _remedy(text: str, words: dict[str, str], obstacle: tuple[str, str] | None) -> str:
    return obstacle[0] if obstacle is not None and obstacle[1] in text else _filled(text, words)


def _report(
    server: Server, files: AdapterFiles, base: BaseFacts | None, obstacle: tuple[str, str] | None
) -> ServerReport:
    violations, unclear = [], []
    words = _words(server, files, base)
    if server.gguf and files.exported_gguf:
        rules: tuple[Rule, ...] = ()
    elif server.layout != files.layout:
        rules = ()
        violations.append(_wrong_layout(server, words, obstacle))
    else:
        rules = server.rules
    for rule in rules:
        try:
            found = list(CHECKS[rule.check](files, base, **rule.parameters))
        except Unclear as reason:
            unclear.append(f"{rule.name}: {reason}")
            continue
        if found:
            violations.append(
                Violation(
                    rule.name,
                    rule.severity,
                    tuple(found[:_SHOWN_FINDS]),
                    len(found),
                    rule.why,
                    _remedy(rule.remedy, words, obstacle),
                    f"{server.name} {server.read}: {rule.source}",
                )
            )
    severities = {violation.severity for violation in violations}
    verdict: Verdict = "takes"
    if "refused" in severities:
        verdict = "refuses"
    elif severities & {"misread", "ignored"}:
        verdict = "differs"
    lines = server.serve_gguf if server.gguf and files.exported_gguf else server.serve
    serve = () if verdict == "refuses" else tuple(_filled(line, words) for line in lines)
    return ServerReport(
        server.id, server.name, server.versions, server.read, verdict, tuple(violations), tuple(unclear), serve
    )


def _wrong_layout(server: Server, words: dict[str, str], obstacle: tuple[str, str] | None) -> Violation:
    found, remedy = _OTHER_LAYOUT[server.layout]
    return Violation(
        "layout",
        "refused",
        (f"the directory holds {found}",),
        1,
        f"{server.name} reads another layout",
        _remedy(remedy, words, obstacle),
        f"{server.name} {server.read}",
    )


def _words(server: Server, files: AdapterFiles, base: BaseFacts | None) -> dict[str, str]:
    """What the placeholders of commands stand for, quoted for a shell."""
    named = files.config.get("base_model_name_or_path") or files.config.get("model")
    own = named if isinstance(named, str) and is_repo_id(named) else "BASE"
    name = re.sub(r"[^A-Za-z0-9._]+", "-", files.path.resolve().name).strip("-.") or "adapter"
    rank = next((rank for rank in server.ranks if rank >= files.largest_rank), files.largest_rank)
    return {
        "{base}": shlex.quote(base.id) if base else own,
        "{name}": name,
        "{path}": shlex.quote(str(files.path)),
        "{path_text}": json.dumps(str(files.path), ensure_ascii=False),
        "{rank}": str(rank),
    }


def _filled(text: str, words: dict[str, str]) -> str:
    return re.sub("|".join(map(re.escape, words)), lambda match: words[match.group()], text)
