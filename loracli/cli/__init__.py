"""The command `loracat`: every command registered here, and the one place where errors become messages and exit
codes."""

from __future__ import annotations

import io
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Annotated, Any, NoReturn, TextIO

import typer
from typer.core import TyperGroup

from loracli._version import __version__
from loracli.cli import (
    compare,
    convert,
    demo,
    env,
    export,
    fetch,
    fit,
    fuse,
    generate,
    inspect,
    lint,
    push,
    report,
    show,
    verify,
)
from loracli.cli._command import ORIGINS, Command
from loracli.cli._help import Group, argument_word, records, write_examples, write_rows, write_text, write_usage
from loracli.cli._options import with_groups
from loracli.cli._output import TALK, Output, Talk, print_anything
from loracli.errors import LoracatError, UsageError
from loracli.system.machine import machine_error, read_launch
from loracli.system.near import did_you_mean, hints

# Typer keeps its copy of Click private; this is Click's UsageError, reached through a public name.
_ParseError: type[Exception] = typer.BadParameter.__mro__[1]


class Loracat(TyperGroup):
    """The command group with the error boundary: knows `LoracatError`, parse errors, and what the machine does; a bug
    keeps its traceback."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        as_json = "--json" in words
        TALK.set(Talk())
        hint = None
        try:
            try:
                # Not standalone: parse errors and interruptions come back instead of ending up as Typer's text.
                code = super().main(args, *rest, **{**extra, "standalone_mode": False}) or 0
            except SystemExit as end:
                code, notes = end.code, [*getattr(end, "__notes__", ()), *getattr(end.__cause__, "__notes__", ())]
                hint = "; ".join(notes) or None
            sys.stdout.flush()  # what cannot be written is known here, and not after the last word
            if code in (HUNG_UP, INTERRUPTED, TERMINATED):
                Output(as_json=as_json).interrupted(code, hint)
            sys.exit(code)
        except _ParseError as error:
            _tell(_usage_error(error, next((word for word in words if word in self.commands), None)), as_json)
            sys.exit(UsageError.exit_code)
        except LoracatError as error:
            if _speaks(error):
                _tell(error, as_json)
            sys.exit(error.exit_code)
        except MACHINE_ERRORS as error:
            _end_by_machine(error, as_json)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:  # of which Click would leave the code alone
            raise SystemExit(INTERRUPTED) from stop

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help())
            raise typer.Exit(UsageError.exit_code)
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-") and not ctx.resilient_parsing:
            hint = INSTEAD.get(args[0]) or did_you_mean(args[0], self.commands)
            overview = None if args[0] == "help" else "see `loracat --help`"
            raise UsageError(f"loracat has no command {args[0]}", hint=hints(hint, overview))
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        write_usage(formatter, "loracat", ["[OPTIONS]", "COMMAND ..."])
        write_text(formatter, str(self.help))
        write_examples(formatter, self.epilog)
        commands: dict[str, Any] = dict(self.commands)
        for group in Group:
            here = [(name, one.help) for name, one in commands.items() if one.rich_help_panel == group]
            write_rows(formatter, group, here)
        write_rows(formatter, "Options", records(ctx, self.get_params(ctx)))
        write_text(formatter, DOCUMENTATION)


def _tell(error: LoracatError, as_json: bool) -> None:
    """Prints the error, as a document too if one was asked for; where that cannot be written, the exit code says it.

    With a document stderr gets one line, for stdout may be a file that nobody looks at.
    """
    if as_json:
        try:
            Output(as_json=True).error(error)
            sys.stdout.flush()
        except OSError:
            _give_up_stdout()
            as_json = False
    with suppress(OSError):
        if as_json:
            Output().error_line(error)
        else:
            Output().error(error)


def _give_up_stdout() -> None:
    """Drops what is left to write, or the interpreter would try again, and complain."""
    sys.stdout = open(os.devnull, "w")


def _end_by_machine(error: Exception, as_json: bool) -> NoReturn:
    """Says what the machine did, and ends; raises the error itself if that is a bug."""
    try:
        sys.stdout.flush()
    except OSError:
        _give_up_stdout()
        as_json = False
    ours = machine_error(error)
    if ours is None:
        raise error
    if not isinstance(error, BrokenPipeError):  # nobody listens
        _tell(ours, as_json)
    sys.exit(ours.exit_code)


def _usage_error(error: Any, named: str | None) -> UsageError:
    """A parse error of Typer as one of ours, with the place where a value that was not typed came from; `named` is the
    command, which some errors do not know."""
    context, parameter = error.ctx, getattr(error, "param", None)
    where = None
    if parameter is not None and context.get_parameter_source(parameter.name) is not None:
        source = context.get_parameter_source(parameter.name).name
        if source == "ENVIRONMENT":
            where = f"the variable {parameter.envvar}"
        elif source == "DEFAULT_MAP":
            where = context.meta[ORIGINS][parameter.name].origin
    command = context.command_path if context is not None else " ".join(filter(None, ["loracat", named]))
    other = None if context is None else _instead(context, getattr(error, "option_name", None), parameter)
    said = error.message if other and parameter is None else error.format_message()  # the latter with names alike
    for wrong in getattr(error.__cause__, "errors", list)()[:1]:  # what pydantic says of a value
        if parameter is not None and (kind := _NUMBERS.get(wrong["type"])) is not None:
            said = f"{max(parameter.opts, key=len)} {str(wrong['input'])[:_QUOTED]} is not {kind}"
    return UsageError(said, where=where, hint=hints(other, f"see `{command} --help`"))


def _instead(context: Any, unknown: str | None, parameter: Any) -> str | None:
    """What to write in the place of an option that there is not, or for data that are missed and stand elsewhere."""
    params = context.command.params
    known = {word for one in params for word in one.opts}
    if (meant := OTHER_NAMES.get(unknown or "")) in known:
        return f"it is called {meant} here"
    if unknown in _ELSEWHERE:
        return _ELSEWHERE[unknown]
    takers = [argument_word(one) for one in params if one.param_type_name == "argument"]
    if unknown in ("--adapters", "-a") and takers:
        return f"name them without an option: {context.command_path} {takers[0]}"
    files = [word for word in context.params.get("adapters") or () if word.endswith(".jsonl")]
    if parameter is not None and parameter.name == "data" and files:
        return f"{files[0]} looks like data: --data {shlex.join(files)}"
    return None


def _speaks(error: LoracatError) -> bool:
    """Whether this process prints the error: of several that all raise it, the first."""
    try:
        return read_launch().first or error.told is False
    except UsageError:
        return True


DOCUMENTATION = (
    "`loracat COMMAND --help` explains a command. The documentation is the folder docs of the project; it begins with "
    "docs/quickstart.md."
)
INSTEAD = {  # what other programs call it
    "list": "`loracat inspect ADAPTER...` shows adapters, `loracat show RECIPE` a recipe",
    "chat": "`loracat generate` answers what you type",
    "help": "`loracat --help` lists the commands, `loracat COMMAND --help` explains one",
    "version": "`loracat --version` prints it, `loracat env` those of the packages too",
    "merge": "`loracat export --merge` writes one adapter, `loracat fuse` a whole model",
    "train": "`loracat fit` learns mixing weights of adapters; adapters are trained elsewhere, with PEFT for one",
}
OTHER_NAMES = {
    "--lr": "--learning-rate",
    "--epochs": "--passes",
    "--steps": "--passes",
    "--model": "--base",
    "--base-model": "--base",
    "--out": "--output",
    "--overwrite": "--force",
    "--lora": "--adapters",
}
_ELSEWHERE = {  # options of another command
    **dict.fromkeys(("--weights", "-w"), "weights by hand need no fit: `loracat export --adapters ... --weights 1 1`"),
    "--merge": "`loracat export --merge` compresses an adapter to a rank; here leave it out",
}
_NUMBERS = {"int_parsing": "a whole number", "int_from_float": "a whole number", "float_parsing": "a number"}
_QUOTED = 60  # characters of a value in a message
HUNG_UP, INTERRUPTED, TERMINATED = 129, 130, 143  # SIGHUP, Ctrl-C, SIGTERM
MACHINE_ERRORS = (OSError, MemoryError, RuntimeError, ImportError)  # some of which are bugs

app = typer.Typer(
    name="loracat",
    cls=Loracat,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    pretty_exceptions_enable=False,
    help="Compose several LoRA adapters into one, with mixing weights learnt on a small calibration file (CAT).",
    epilog="loracat demo  ·  loracat inspect org/math-lora org/code-lora  ·  "
    "loracat fit --adapters org/math-lora org/code-lora --data val.jsonl  ·  loracat export --merge",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"loracat {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    command = context.invoked_subcommand
    if command != "fit" and read_launch().world_size > 1:
        raise UsageError(f"loracat {command} is for one process", hint="leave torchrun out; fit can use several")


_COMMANDS = {
    Group.START: (demo, inspect, fit, show, generate),
    Group.SHIP: (export, lint, verify, fuse, push),
    Group.JUDGE: (compare, report),
    Group.OTHER: (fetch, convert, env),
}
for _group, _modules in _COMMANDS.items():
    for _module in _modules:
        _name = _module.__name__.rpartition(".")[2]
        _register = app.command(name=_name, cls=Command, epilog=_module.EPILOG, rich_help_panel=_group)
        _register(with_groups(getattr(_module, _name)))


def _stop(signum: int, frame: FrameType | None) -> None:
    # By itself the signal would skip every `finally`, and with it the removal of half-written outputs.
    sys.exit(128 + signum)


class _Results(io.FileIO):
    """Standard output, which is named where it cannot be written."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, "standard output") from None


def _results(stdout: TextIO | None) -> TextIO:
    """Standard output as the interpreter opened it; one that the shell has closed fails once something is written, or
    results would be lost without a word."""
    if not isinstance(stdout, io.TextIOWrapper | None):  # of a test
        return stdout
    descriptor = os.open(os.devnull, os.O_RDONLY) if stdout is None else stdout.fileno()
    return io.TextIOWrapper(
        io.BufferedWriter(_Results(descriptor, "wb", closefd=False)),
        encoding="utf-8" if stdout is None else stdout.encoding,
        errors=None if stdout is None else stdout.errors,
        line_buffering=stdout is not None and (stdout.line_buffering or stdout.write_through),
    )


def main() -> None:
    """What `loracat` does, from the words on its command line to its exit code."""
    for stream, mode in (("stdin", "r"), ("stderr", "w")):
        if getattr(sys, stream) is None:  # the shell has closed it
            setattr(sys, stream, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # for as long as we live
    sys.stdout = _results(sys.stdout)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) == signal.SIG_DFL:  # nohup has SIGHUP ignored
            signal.signal(signum, _stop)
    try:
        print_anything()
        app(prog_name="loracat")
    except MACHINE_ERRORS as error:  # before the command has begun
        _end_by_machine(error, "--json" in sys.argv)
    except KeyboardInterrupt:  # as early
        Output(as_json="--json" in sys.argv).interrupted(INTERRUPTED)
        sys.exit(INTERRUPTED)
    finally:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) != signal.SIG_IGN:  # one that comes now would meet the exit handlers
                signal.signal(signum, signal.SIG_DFL)
