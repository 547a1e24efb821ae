"""`loracat generate`: the same prompt to the base, each adapter and the composition, for looking at the answers."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loracli.cli import _options as opt
from loracli.cli._output import Output
from loracli.errors import UsageError
from loracli.system.document import encode
from loracli.system.escaping import visible

if TYPE_CHECKING:
    from loracli.generating.generate import Answer

EPILOG = (
    'loracat generate --prompt "Where is Oslo?"  ·  loracat generate recipe.json  ·  '
    "loracat generate adapter-merged/ --base ./llama --prompt - < question.txt"
)
_STDIN = "-"
_MAX_PROMPT = 16 << 20  # bytes
_INDENT, _TAB = "  ", "    "


def generate(
    *,
    composed: Annotated[
        Path | None,
        typer.Argument(
            metavar="RECIPE|DIR",
            help="The recipe that `loracat fit` wrote, or an adapter's directory; by default recipe.json.",
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="Ask this, `-` for standard input; the default is a conversation, each line that is typed a prompt.",
        ),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Give the prompt as it stands, without the chat template.")
    ] = False,
    max_new_tokens: opt.MaxNewTokens = 256,
    adapters: opt.Places = None,
    base: opt.Base = None,
    base_revision: opt.BaseRevision = None,
    placement: opt.PlacementOptions,
    out: Output,
) -> None:
    """Ask base, adapters and composition the same, to look at the answers; `loracat lint` names what serves them."""
    from loracli.generating.generate import GenerateRequest, generate_answers
    from loracli.model.placement import Placement

    if composed is None:
        composed = Path("recipe.json")
        if adapters:
            out.note(f"the weights are those of {composed}, as no other recipe is named")
    request = GenerateRequest(
        composed,
        tuple(adapters or ()),
        base=base,
        base_revision=base_revision,
        placement=Placement(**vars(placement)),
        max_new_tokens=max_new_tokens,
        raw=raw,
        composition_alone=out.quiet and not out.as_json,
    )
    found = generate_answers(request, _prompts(prompt, out), listener=_Screen(out), progress=out)
    out.document(
        {
            "base": found.base,
            "composition": found.composition,
            "chat_template": found.chat_template,
            "max_new_tokens": max_new_tokens,
            **(encode(found.turns[0]) if out.as_json else {}),
        }
    )
    if composed.is_dir():
        out.hint(shlex.join(["loracat", "lint", str(composed), *(["--base", base] if base else [])]))
    else:
        moved = ["--adapters", *adapters] if adapters else []
        out.hint(shlex.join(["loracat", "export", str(composed), *moved]))


def _prompts(prompt: str | None, out: Output) -> Iterable[str]:
    """The one that was given, or those that are typed until there is none."""
    if prompt is not None:
        return [_standard_input() if prompt == _STDIN else prompt]
    if out.as_json:
        raise UsageError("--json prints one answer of each, and no prompt is given", hint='give one: --prompt "..."')
    if not sys.stdin.isatty():
        raise UsageError(
            "no prompt is given, and there is no terminal to type one on",
            hint='give one: --prompt "...", or --prompt - to read it from standard input',
        )
    return _typed(out)


def _standard_input() -> str:
    """All of it, without the end of its last line."""
    data = sys.stdin.buffer.read(_MAX_PROMPT + 1)
    if len(data) > _MAX_PROMPT:
        raise UsageError(f"the prompt has more than {_MAX_PROMPT >> 20} MiB")
    try:
        return data.decode().removesuffix("\n")
    except UnicodeDecodeError:
        raise UsageError("the prompt is not UTF-8") from None


def _typed(out: Output) -> Iterator[str]:
    out.note("each line is a prompt; an empty line or Ctrl-D ends the conversation")
    while line := out.ask("> "):
        yield line


class _Screen:
    """Shows answers as they come, one below the other, broken between words where the terminal ends.

    Args:
        out: where to.
    """

    def __init__(self, out: Output) -> None:
        self._out = out
        self._indent = "" if out.quiet else _INDENT
        self._room = max(1, out.width - 1 - len(self._indent))  # the last column is the terminal's own
        self._column = 0  # of the line, without the indent
        self._gap = self._word = ""  # that are not shown yet

    def begin(self, name: str) -> None:
        self._out.line(name, style="bold")

    def piece(self, text: str) -> None:
        from rich.cells import cell_len

        for character in text.replace("\t", _TAB):
            if character == "\n":
                self._end_line()
            elif character == " ":
                self._show_word()
                self._gap += " "
            else:
                self._word += visible(character)
                if cell_len(self._word) >= self._room:  # of writing without spaces
                    self._show_word()

    def finish(self, answer: Answer) -> None:
        self._show_word()
        self._gap = ""
        if self._column or self._out.quiet:
            self._end_line()
        reason = {"max-new-tokens": "--max-new-tokens ended it", "context": "the base takes no more tokens"}
        if not answer.text:
            self._out.line(f"{_INDENT}(nothing)", style="dim")
        elif answer.stopped in reason:
            self._out.line(f"{_INDENT}({reason[answer.stopped]})", style="dim")
        self._out.line()

    def _show_word(self) -> None:
        from rich.cells import cell_len

        if not self._word:
            return
        if self._column and self._column + len(self._gap) + cell_len(self._word) > self._room:
            self._out.piece("", end="\n")
            self._column, self._gap = 0, ""
        self._out.piece(("" if self._column else self._indent) + self._gap + self._word)
        self._column += len(self._gap) + cell_len(self._word)
        self._gap = self._word = ""

    def _end_line(self) -> None:
        self._show_word()
        self._out.piece("", end="\n")
        self._column, self._gap = 0, ""
