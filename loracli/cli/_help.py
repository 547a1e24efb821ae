"""What `--help` prints: examples first, then what may be typed, in headed groups.

Typer's own help loads Rich and half of its width is frame; Click's breaks words at their hyphens.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any

_FEW = 8  # options that need no groups
_INDENT = "  "
_DEFAULT, _NO_BREAK = re.compile(r"\[default: [^\]]*\]"), "\u00a0"
_TOKEN = re.compile(r"""(?:"[^"]*"|\S)+""")


class Panel(StrEnum):
    """The headings of options, in the order in which they are printed. One in an option's `Annotated` puts it there."""

    MAIN = "Main options"
    COMPRESSION = "Compression"
    COMPOSING = "Composition without a fit"
    SEARCH = "Search"
    DATA = "Data"
    ANSWERS = "Answers"
    MACHINE = "Base model and machine"
    OUTPUT = "Output"


class Group(StrEnum):
    """The headings of commands, in the order in which they are printed."""

    START = "Start"
    SHIP = "Ship"
    JUDGE = "Judge"
    OTHER = "Other"


def argument_word(argument: Any) -> str:
    """How an argument stands in a usage line: `REF...`, `[RECIPE]`, `[RECIPE...]`."""
    word = str(argument.metavar or argument.name.upper()) + ("..." if argument.nargs == -1 else "")
    return word if argument.required else f"[{word}]"


def write_usage(formatter: Any, command: str, words: Iterable[str]) -> None:
    """The usage line and an empty one."""
    label = f"Usage: {command} "
    formatter.write(_wrapped(" ".join(words), formatter.width, label, " " * len(label)) + "\n\n")


def write_text(formatter: Any, text: str) -> None:
    """A paragraph and an empty line."""
    formatter.write(_wrapped(" ".join(text.split()), formatter.width, _INDENT, _INDENT) + "\n\n")


def write_examples(formatter: Any, epilog: str | None) -> None:
    """The examples of an epilog, to be copied as they stand: one that is wider than the screen goes on in another line,
    as the shell reads it."""
    if epilog:
        lines = [line for example in epilog.split("·") for line in _broken(example, formatter.width)]
        formatter.write("\n".join(["Examples:", *lines]) + "\n\n")


def write_rows(formatter: Any, title: str, rows: Sequence[tuple[str, str]]) -> None:
    """A heading, what may be typed with its meaning beside it or below, and an empty line; nothing without rows."""
    if not rows:
        return
    width = formatter.width
    column = min(max(len(term) for term, _ in rows) + 2 * len(_INDENT), width // 3)
    lines = [f"{title}:"]
    for term, text in rows:
        beside = _INDENT + term.ljust(column - len(_INDENT)) if len(term) + 2 * len(_INDENT) <= column else ""
        lines += [] if beside else [_INDENT + term]
        lines.append(_wrapped(" ".join(text.split()), width, beside or " " * column, " " * column))
    formatter.write("\n".join(lines) + "\n\n")


def write_parameters(formatter: Any, ctx: Any, parameters: Sequence[Any], shared: Sequence[Any]) -> None:
    """Arguments, options by their panels where there are many, and `shared` ones below.

    Args:
        formatter: where to.
        ctx: of the command.
        parameters: its own.
        shared: options that every command has.
    """
    arguments = [one for one in parameters if one.param_type_name == "argument"]
    options = [one for one in parameters if one.param_type_name == "option"]
    write_rows(formatter, "Arguments", [(argument_word(one), _meaning(one)) for one in arguments])
    if len(options) <= _FEW:
        write_rows(formatter, "Options", records(ctx, options))
    else:
        for panel in Panel:
            here = [one for one in options if (one.rich_help_panel or Panel.MAIN) == panel]
            write_rows(formatter, panel, records(ctx, here))
    write_rows(formatter, "Options of every command", records(ctx, shared))


def records(ctx: Any, options: Sequence[Any]) -> list[tuple[str, str]]:
    """Options, but hidden ones, each with its meaning."""
    return [record for option in options if (record := option.get_help_record(ctx)) is not None]


def _meaning(argument: Any) -> str:
    default = "" if argument.required or argument.default is None else f"  [default: {argument.default}]"
    return f"{argument.help}{default}"


def _wrapped(text: str, width: int, first: str, rest: str) -> str:
    text = _DEFAULT.sub(lambda found: found[0].replace(" ", _NO_BREAK), text)
    lines = textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines).replace(_NO_BREAK, " ")


def _broken(example: str, width: int) -> list[str]:
    """The lines of a command: an option begins a new one where it would not fit with its values."""
    parts: list[str] = []
    for token in _TOKEN.findall(example):
        if parts and not token.startswith(("-", "|", ">", "loracat")):
            parts[-1] += f" {token}"
        else:
            parts.append(token)
    lines = [_INDENT + parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + 1 + len(part) <= width - 2:  # " \" may follow
            lines[-1] += f" {part}"
        else:
            lines[-1] += " \\"
            lines.append(3 * _INDENT + part)
    return lines
