"""`loracat env`: versions, devices, caches and the settings in force, for bug reports."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import typer

from loracli.cli._command import FILES, SETTINGS, UNREAD, commands_of
from loracli.cli._output import Output
from loracli.cli._settings import PREFIX, SHARED, Setting, as_text, variable

_PACKAGES = ("loracat", "torch", "transformers", "peft", "safetensors", "huggingface-hub", "typer", "rich")
_EXTRAS = ("bitsandbytes", "gguf", "nevergrad")
EPILOG = "loracat env  ·  loracat env --json"


def env(*, context: typer.Context, out: Output) -> None:
    """Print versions, devices, caches and which settings are in force, for bug reports."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from loracli.hub.references import surroundings

    facts = {name: version(name) for name in _PACKAGES}
    for name in _EXTRAS:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    facts["python"] = platform.python_version()
    facts["system"] = f"{platform.system()} {platform.machine()}"
    facts["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    facts["threads"] = str(torch.get_num_threads())
    hub = surroundings()
    facts["hub"] = hub.endpoint
    facts["hub_cache"] = str(hub.cache)
    facts["offline"] = "yes" if hub.offline else "no"
    settings: Sequence[Setting] = context.meta.get(SETTINGS, ())
    rows = [{"origin": s.origin, "command": s.command or None, "option": s.option, "value": s.value} for s in settings]
    variables = _from_variables(context)
    rows += variables
    files = [str(path) for path in context.meta[FILES]]
    if (unread := context.meta.get(UNREAD)) is not None:
        out.warn(f"no file is in force: {'; '.join([unread.what, *unread.problems])}")
    out.document({"env": facts, "config_files": files, "settings": rows})
    for name, value in facts.items():
        out.line(f"{name.replace('_', ' '):16} {value}")
        out.value(f"{name}={value}")
    out.line()
    sources = [*files, *(["variables"] if variables else [])]
    out.line(f"settings from {', '.join(sources) or 'no file and no variable'}", style="bold")
    if rows:
        out.table(
            ["option", "value", "from"],
            [[_option_text(row), as_text(row["value"]), row["origin"]] for row in rows],
        )


def _from_variables(context: typer.Context) -> list[dict[str, Any]]:
    """The `LORACAT_*` variables that are set; one that names no option has none."""
    known = {
        variable(command, option): (command, option)
        for command, options in commands_of(context).items()
        for option in (*options, "config")
    }
    shared = {variable("", option) for option in (*SHARED, "config")}
    rows = []
    for name in sorted(name for name in os.environ if name.startswith(PREFIX)):
        command, option = known.get(name, (None, None))
        told = {"origin": name, "command": None if name in shared else command, "option": option}
        rows.append(told | {"value": os.environ[name] if option else None})
    return rows


def _option_text(row: dict[str, Any]) -> str:
    if row["option"] is None:
        return "no option"
    return f"{row['command']} --{row['option']}" if row["command"] else f"--{row['option']}"
