"""What every command has: lists of words, values from files and variables, shared options, a help that is quick to
print.

Options that take several words, `--adapters a b` beside `--adapters a --adapters b` and `--adapters=a`: Click refuses
them by design (pallets/click#1351) and Typer inherits that, so the words are rewritten to the repeated form before
Typer parses them. Only documented methods of the command class are used.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from loracli.cli._help import argument_word, write_examples, write_parameters, write_text, write_usage
from loracli.cli._output import COLORS, DETAILS, TALK, Output
from loracli.cli._settings import (
    SHARED,
    Options,
    Setting,
    config_files,
    defaults_for,
    options_of,
    read_settings,
    unknown_variables,
    variable,
)
from loracli.errors import LoracatError, UsageError
from loracli.system.machine import read_launch


class GreedyCommand(TyperCommand):
    """A command whose list options each take one or more words. It can have no positional argument beside them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = {word: p for p in self.get_params(ctx) if p.param_type_name == "option" for word in p.opts}
        rewritten: list[str] = []
        loose: list[str] = []  # that stand behind no option
        strange: list[str] = []  # that look like options, which Click knows or refuses
        rest, still_open = list(args), None
        while rest:
            word = rest.pop(0)
            option, still_open = options.get(word), None  # the exact word only: --option=value stays one value
            if word == "--":
                rewritten += [word, *rest]
                break
            if option is None:
                (strange if word[:1] == "-" else loose).append(word)
            if option is None or getattr(option, "is_flag", False) or getattr(option, "count", False):
                rewritten.append(word)
            elif not getattr(option, "multiple", False):  # another option's value passes untouched: --seed -3
                rewritten += [word, *rest[: option.nargs]]
                del rest[: option.nargs]
            else:
                count = next((i for i, value in enumerate(rest) if _is_option(value)), len(rest))
                if not count and not ctx.resilient_parsing:
                    ctx.fail(f"Option '{word}' needs at least one value.")
                rewritten += [part for value in rest[:count] for part in (word, value)]
                del rest[:count]
                still_open = None if rest else option
        if loose and not strange and not ctx.resilient_parsing:
            self.meet_loose(ctx, loose, args)
        ctx.meta["greedy"] = still_open  # the list option that the cursor is still inside, for completion
        return super().parse_args(ctx, rewritten)

    def meet_loose(self, ctx: Any, words: Sequence[str], args: Sequence[str]) -> None:
        """Told of words that no option takes, and of all words, before Click; may raise what says more than Click."""

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        option = None if incomplete[:1] == "-" else ctx.meta.get("greedy")
        return option.shell_complete(ctx, incomplete) if option else super().shell_complete(ctx, incomplete)


def _is_option(word: str) -> bool:
    """Whether a word begins an option. A lone dash is a value, standard input, and so are negative numbers."""
    if word[:1] != "-" or word == "-":
        return False
    try:
        float(word.partition(",")[0])
    except ValueError:
        return True
    return False


_COMMA_LISTS = ("SERVERS", "METHODS")  # what options that take one word of several names call it
# In a context's meta.
FILES, SETTINGS, ORIGINS, UNREAD = "loracat.files", "loracat.settings", "loracat.origins", "loracat.unread"


class Command(GreedyCommand):
    """A command of `loracat`.

    Each option can also be given as a variable or in a file (`loracli.cli._settings`), but for those that are named
    there; `--config`, `--color` and `--verbose` are added here and reach no command function.
    """

    def __init__(self, name: str | None, *, params: Any = None, **options: Any) -> None:
        super().__init__(name, params=[*(params or ()), *_shared_options()], **options)
        for long, parameter in {**options_of(self), "config": self.params[-len(_ADDED)]}.items():
            parameter.envvar = variable(str(name), long)
            parameter.show_envvar = False  # said once, below the options

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            self._refuse_unknown_variables()  # before an option is missed that was to come from one
        return super().parse_args(ctx, args)

    def meet_loose(self, ctx: Any, words: Sequence[str], args: Sequence[str]) -> None:
        arguments = [one for one in self.get_params(ctx) if one.param_type_name == "argument"]
        if any(one.nargs != 1 for one in arguments) or len(words) <= len(arguments):
            return
        hint = f"see `{ctx.command_path} --help`"
        recipes = [word for word in words if arguments and word.endswith(".json")]
        adapters = [word for word in words if not word.endswith(".jsonl") and word not in recipes]
        if adapters and "adapters" in options_of(self):
            command = shlex.join([*ctx.command_path.split(), *recipes, "--adapters", *adapters])
            hint = f"name adapters with --adapters: {command} ..."
        lists = {word for one in options_of(self).values() if one.metavar in _COMMA_LISTS for word in one.opts}
        for option, first, second in zip(args, args[1:], args[2:], strict=False):
            if option in lists and second in words:
                hint = f"put commas between them: {option} {first},{second}"
        takes = f"only one {arguments[0].metavar}" if arguments else "nothing else"
        what = f"{' '.join(words)}: no option stands before it, and {ctx.command_path} takes {takes}"
        raise UsageError(what, hint=hint)

    def invoke(self, ctx: Any) -> Any:
        self._tell_origins(ctx)
        return super().invoke(ctx)

    def _refuse_unknown_variables(self) -> None:
        name = str(self.name)
        if unknown := unknown_variables(name, options_of(self)):
            hint = f"`loracat {name} --help` lists the options; unset the variable"
            if any(word.endswith("_TOKEN") for word in unknown):
                hint = "a token is read from HF_TOKEN, or from `hf auth login`"
            raise UsageError(f"{', '.join(unknown)}: no variable of an option of loracat {name}", hint=hint)

    def _tell_origins(self, ctx: typer.Context) -> None:
        """On stderr: what was set elsewhere than on the command line."""
        verbose = TALK.get().verbosity >= DETAILS
        by_origin: dict[str, list[str]] = {}
        for parameter in self.params:
            source = getattr(ctx.get_parameter_source(str(parameter.name)), "name", "")
            long = next((word for word in getattr(parameter, "opts", ()) if word.startswith("--")), "")
            if source == "DEFAULT_MAP" and (verbose or not _is_shared(parameter)):
                by_origin.setdefault(ctx.meta[ORIGINS][parameter.name].origin, []).append(long)
            elif source == "ENVIRONMENT" and (verbose or not _is_shared(parameter)):
                by_origin.setdefault(str(parameter.envvar), []).append(long)
        if by_origin and not ctx.params.get("quiet") and read_launch().first:
            out = Output()
            for origin, names in by_origin.items():
                out.note(f"from {origin}: {', '.join(names)}")

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        arguments = [one for one in self.get_params(ctx) if one.param_type_name == "argument"]
        return ["[OPTIONS]", *map(argument_word, arguments)]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        write_usage(formatter, ctx.command_path, self.collect_usage_pieces(ctx))
        write_text(formatter, str(self.help))
        write_examples(formatter, self.epilog)
        parameters = self.get_params(ctx)
        shared = [one for one in parameters if _is_shared(one)]
        write_parameters(formatter, ctx, [one for one in parameters if one not in shared], shared)
        if names := [name for name in options_of(self) if name not in SHARED]:
            example = next((name for name in names if "-" in name), names[0])
            write_text(formatter, f"In the environment --{example} is {variable(str(self.name), example)}, and so on.")


def _is_shared(parameter: Any) -> bool:
    names = {word.removeprefix("--") for word in parameter.opts} if parameter.param_type_name == "option" else set()
    return not names.isdisjoint((*SHARED, "config", "json", "help"))


def commands_of(ctx: typer.Context) -> Mapping[str, Options]:
    """The options of every command, by the command's name."""
    root: Any = ctx.find_root().command
    return {name: options_of(command) for name, command in root.commands.items()}


# The shared options. They act through callbacks, so that no command has to hand them on.


def _read_config(context: typer.Context, value: Path | None) -> Path | None:
    """Fills in the defaults before any other option is looked at."""
    context.meta[FILES] = config_files(value)
    if not context.resilient_parsing and context.meta[FILES]:
        if value is not None and value.suffix == ".json" and context.command.name not in ("fit", "env"):
            raise UsageError(f"{value}: a recipe is a configuration of loracat fit alone", hint="leave --config out")
        commands = commands_of(context)
        name = str(context.command.name)
        try:
            settings = read_settings(value, commands)
        except LoracatError as error:
            if name != "env":  # which is how one finds out
                raise
            context.meta[UNREAD] = error
            return value
        found: dict[str, Setting] = defaults_for(name, commands[name], settings)
        context.meta[SETTINGS] = settings
        context.meta[ORIGINS] = found
        context.default_map = {parameter: setting.value for parameter, setting in found.items()}
    return value


def _set_color(context: typer.Context, value: str) -> str:
    if value not in COLORS:
        raise typer.BadParameter(f"{value} is not one of {', '.join(COLORS)}")
    TALK.set(replace(TALK.get(), color=value))
    return value


def _set_verbosity(context: typer.Context, value: int) -> int:
    TALK.set(replace(TALK.get(), verbosity=value))
    return value


def _every_command(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            is_eager=True,
            callback=_read_config,
            help="Read options from this TOML, or for fit from a recipe to repeat; by default from loracat.toml.",
        ),
    ] = None,
    color: Annotated[
        str,
        typer.Option(
            "--color",
            metavar="WHEN",
            callback=_set_color,
            autocompletion=lambda: list(COLORS),
            help="Colour the output auto, always or never; auto heeds NO_COLOR.",
        ),
    ] = "auto",
    verbose: Annotated[
        int,
        typer.Option(
            "--verbose",
            "-v",
            count=True,
            callback=_set_verbosity,
            show_default=False,
            help="Say what was done and how long it took; -vv adds the traceback of an error.",
        ),
    ] = 0,
) -> None:
    """Carries the declarations; never called."""


_ADDED = ("config", "color", "verbose")


def _shared_options() -> list[Any]:
    """Typer's objects for the declarations of `_every_command`."""
    carrier = typer.Typer(add_completion=False)
    carrier.command()(_every_command)
    command: Any = typer.main.get_command(carrier)
    options = [parameter for parameter in command.params if parameter.name in _ADDED]
    for option in options:
        option.expose_value = False
    return options
