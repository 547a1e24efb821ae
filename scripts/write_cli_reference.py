"""Writes docs/cli.md from the live commands, so that the page cannot say anything else than `--help` does.

    python scripts/write_cli_reference.py            writes docs/cli.md
    python scripts/write_cli_reference.py --check    exits 1 if docs/cli.md is not what would be written

Names, metavars, helps and defaults are read from the command objects; the width and the colour of a terminal, which
shape the output of `--help`, do not come in.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import typer

import loracli.cli
from loracli.cli._help import argument_word

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
COMMAND = "python scripts/write_cli_reference.py"
INTRODUCTION = f"""\
# Command line

<!-- Written by `{COMMAND}`: change the commands' help texts, not this page. -->

Results go to stdout; progress, notes, warnings and hints go to stderr. [Exit codes](exit-codes.md),
[JSON documents](json.md), and [options from files and variables](configuration.md) have pages of their own.
`--adapters` takes one or more words and may be repeated: `--adapters a b`, `--adapters a --adapters b` and `-a a b`
mean the same. Write a recipe's name before it, not after.

Three options mean what their command does:

| | of a base that is loaded, or of answers | of what is written |
|---|---|---|
| `--dtype` | in `fit`, `compare`, `generate`, `show` (`export`: `--base-dtype`) | `export`, `convert`, `fuse` |
| `--tolerance` | `fit`, `compare`: numbers that count as equal | `export`, `convert`: error of a rank |
| `--data` | `fit`: to calibrate on; `compare`, `show`: to measure on | `export`: to measure or refit on |
"""


def reference() -> str:
    """The whole page."""
    root: Any = typer.main.get_command(loracli.cli.app)
    context = typer.Context(root, info_name="loracat", **root.context_settings)
    sections = [INTRODUCTION, _section(root, context, "loracat")]
    for name, command in root.commands.items():
        sections.append(_section(command, typer.Context(command, context, info_name=name), f"loracat {name}"))
    return "\n".join(sections)


def _section(command: Any, context: typer.Context, name: str) -> str:
    parameters = command.get_params(context)
    arguments = [p for p in parameters if p.param_type_name == "argument"]
    options = [p for p in parameters if p.param_type_name == "option" and not p.hidden]
    commands = getattr(command, "commands", {})
    usage = [name, "[OPTIONS]", *(["COMMAND ..."] if commands else map(argument_word, arguments))]
    lines = [f"## {name}", "", _one_line(command.help), "", "```text", " ".join(usage), "```", ""]
    if commands:
        rows = ((f"[`{n}`](#loracat-{n})", _one_line(c.help)) for n, c in commands.items())
        lines += _table(("command", "does"), rows)
    if arguments:
        lines += _table(
            ("argument", "meaning", "default"), ((f"`{p.metavar}`", p.help, _default(p)) for p in arguments)
        )
    lines += _table(("option", "meaning", "default"), ((_spelling(p), p.help, _default(p)) for p in options))
    if command.epilog:
        examples = [_one_line(example) for example in command.epilog.split("·")]
        lines += ["```bash", *examples, "```", ""]
    return "\n".join(lines)


def _spelling(option: Any) -> str:
    flag = getattr(option, "is_flag", False) or getattr(option, "count", False)
    value = "" if flag else f" {option.metavar or option.name.upper()}"
    longest_first = sorted(option.opts, key=len, reverse=True)
    return ", ".join(f"`{name}{value}`" if i == 0 else f"`{name}`" for i, name in enumerate(longest_first))


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    flag = getattr(parameter, "is_flag", False) or getattr(parameter, "count", False)
    return "" if flag or parameter.default is None else f"`{parameter.default}`"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _table(columns: tuple[str, ...], rows: Iterable[Sequence[str | None]]) -> list[str]:
    """The lines of a Markdown table, and a blank one."""
    cells = [columns, ["---"] * len(columns), *rows]
    return [*("| " + " | ".join((cell or "").replace("|", "\\|") for cell in row) + " |" for row in cells), ""]


def main() -> int:
    parser = argparse.ArgumentParser(description="Write docs/cli.md from the live commands.")
    parser.add_argument("--check", action="store_true", help="only say whether docs/cli.md is up to date")
    if not parser.parse_args().check:
        PAGE.write_text(reference(), encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == reference():
        return 0
    print(f"docs/cli.md is not what the commands say; write it again with: {COMMAND}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
