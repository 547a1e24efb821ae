"""Options from elsewhere than the command line: `LORACAT_*` variables and configuration files.

    the command line  >  LORACAT_* variables  >  --config FILE, or ./loracat.toml  >  the user's config.toml

A file has a table for each command; its keys are the long names of the command's options. Above the tables stand the
options that all commands share:

    color = "never"

    [fit]
    adapters = ["org/math-lora", "org/code-lora"]
    mixing = "auto"

Paths mean what they would mean on the command line.

A `loracat.toml` that lies in the current folder is in force without having been asked for, and the folder may have come
from elsewhere. Such a file may say how adapters are composed, with paths inside of the folder; not what is replaced,
where else anything is read or written, what is run or trusted, or that nobody is told (`TABLE`; docs/configuration.md
prints it, and a test holds both against every option of every command). All of that stands in a file of `--config`, in
the user's own, in variables and on the command line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from loracli.errors import LoracatError, SettingsError, UsageError
from loracli.hub.references import URI_PREFIX, parse_reference
from loracli.system.files import read_regular
from loracli.system.near import did_you_mean
from loracli.system.toml import TomlError, TomlTooLarge, parse_toml

PROJECT_FILE = "loracat.toml"
PREFIX = "LORACAT_"
SHARED = ("color", "quiet", "verbose")
MAX_BYTES = 1 << 16

NOT_IN_A_FILE = {
    "token": "secrets do not belong there; use HF_TOKEN or `hf auth login`",
    "config": "one file does not name another",
    "json": "whoever reads the document asks for it",
    "help": "it is not a setting",
}

Options = Mapping[str, Any]  # of one command, by their long names: `max-length`


@dataclass(frozen=True)
class Setting:
    """One option that a file sets.

    Args:
        command: that it is for; empty for every command.
        option: its long name.
        value: as TOML gives it; None to come back to the default.
        origin: the file.
    """

    command: str
    option: str
    value: Any
    origin: str


def options_of(command: Any) -> dict[str, Any]:
    """The options of a command that can be set elsewhere than on the command line, by their long names."""
    found = {}
    for parameter in command.params:
        long = next((word.removeprefix("--") for word in parameter.opts if word.startswith("--")), None)
        if parameter.param_type_name == "option" and long is not None and long not in NOT_IN_A_FILE:
            found[long] = parameter
    return found


def variable(command: str, option: str) -> str:
    """The environment variable of an option: `LORACAT_FIT_MAX_LENGTH`, `LORACAT_COLOR`."""
    words = (option,) if option in (*SHARED, "config") else (command, option)
    return PREFIX + "_".join(words).upper().replace("-", "_")


def user_file() -> Path:
    """`$XDG_CONFIG_HOME/loracat/config.toml`."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(home, "loracat", "config.toml")


def config_files(explicit: Path | None) -> list[Path]:
    """The files in force, the weakest first."""
    project = Path(PROJECT_FILE) if explicit is None else explicit
    return [path for path in (user_file(), project) if path == explicit or path.is_file()]


def read_settings(explicit: Path | None, commands: Mapping[str, Options]) -> tuple[Setting, ...]:
    """What the files in force set, the weakest first.

    Args:
        explicit: the file of `--config`, in place of the project's.
        commands: every command with its options, to tell what a name means.
    Raises:
        SettingsError: with every key that cannot be honoured, in all files.
        UsageError: if a file cannot be read.
        RecipeError: if it is a recipe that cannot be read.
    """
    settings: list[Setting] = []
    problems: list[str] = []
    unasked: list[str] = []
    for path in config_files(explicit):
        settings += _read_file(path, commands, problems, None if path in (explicit, user_file()) else unasked)
    if unasked and not problems:
        raise SettingsError(
            f"{PROJECT_FILE} is in force without having been asked for, and sets what only you may set",
            problems=tuple(unasked),
            hint=f"if you trust it, say so: --config {PROJECT_FILE}; or fix it",
        )
    if problems:
        files = " and ".join(dict.fromkeys(problem.partition(": ")[0] for problem in problems))
        total = len(problems) + len(unasked)
        count = "a setting" if total == 1 else f"{total} settings"
        hint = f"fix {files}; `loracat COMMAND --help` lists the options of a command"
        hint += f"; --config {PROJECT_FILE} says that you trust it" if unasked else ""
        problems += [f"{one}, and {PROJECT_FILE} is in force without having been asked for" for one in unasked]
        raise SettingsError(f"{count} cannot be honoured", problems=tuple(problems), hint=hint)
    return tuple(settings)


def defaults_for(command: str, options: Options, settings: Iterable[Setting]) -> dict[str, Setting]:
    """The settings that a command takes, by the name of its parameter."""
    return {
        options[setting.option].name: setting
        for setting in settings
        if setting.command in ("", command) and setting.option in options
    }


def unknown_variables(command: str, options: Options, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Variables that begin like those of a command, and name none of its options."""
    known = {variable(command, option) for option in options}
    return sorted(name for name in environment if name.startswith(variable(command, "")) and name not in known)


def _read_file(
    path: Path, commands: Mapping[str, Options], problems: list[str], unasked: list[str] | None
) -> list[Setting]:
    """The settings of a file; what cannot be honoured goes into `problems`, and what a file that nobody asked for may
    not set into `unasked`, which is None for other files."""
    if path.suffix == ".json":
        return _of_recipe(path)
    try:
        data = read_regular(path, MAX_BYTES)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", hint="name another file with --config") from None
    try:
        document = parse_toml(data)
    except TomlTooLarge as error:
        hint = f"fix {path}; it has a table for each command, such as [fit]"
        raise SettingsError("a setting cannot be honoured", problems=(f"{path}: {error}",), hint=hint) from None
    except TomlError as error:
        raise UsageError(
            f"{path} is not TOML: {error}", hint="it has a table for each command, such as [fit]"
        ) from None
    settings = []
    for name, value in document.items():
        if isinstance(value, dict) and name in commands:
            rows = [(name, option, commands[name].get(option), item) for option, item in value.items()]
        else:
            every = {option: parameter for options in commands.values() for option, parameter in options.items()}
            rows = [("", name, every.get(name) if name in SHARED else None, value)]
        for command, option, parameter, item in rows:
            place = f"{path}: {f'{command}.' if command else ''}{option}"
            if (reason := _problem(command, option, parameter, item, commands)) is not None:
                problems.append(f"{place}: {reason}")
            elif unasked is not None and (reason := _refusal(command, option, item)) is not None:
                unasked.append(f"{place}: {reason}")
            else:
                settings.append(Setting(command, option, item, str(path)))
    return settings


def _problem(command: str, option: str, parameter: Any, value: Any, commands: Mapping[str, Options]) -> str | None:
    """Why a key cannot be honoured; None if it can."""
    if option in NOT_IN_A_FILE:
        return NOT_IN_A_FILE[option]
    if parameter is None:
        names = commands[command] if command else [*commands, *SHARED]
        owners = [] if command else [name for name, options in commands.items() if option in options]
        if owners:
            return f"an option of one command stands in its table, such as [{owners[0]}]"
        kind = f"no option of loracat {command}" if command else "no command"
        return "; ".join(filter(None, [kind, did_you_mean(option, list(names))]))
    if parameter.multiple:
        fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
        return None if fits else "expected a list of text"
    if parameter.is_flag and not parameter.count:
        return None if isinstance(value, bool) else "expected true or false"
    if isinstance(value, int) and abs(value) >= 1 << 63:  # in base 16 it may have any length
        return "expected a number that has at most 64 bits"
    fits = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    return None if fits else "expected text or a number"


def _of_recipe(path: Path) -> list[Setting]:
    """What a recipe says about the fit that wrote it: all but where its data are."""
    from loracli.fitting.settings import FitSettings
    from loracli.hub.references import URI_PREFIX
    from loracli.recipe.recipe import load_recipe
    from loracli.recipe.record import ON_LOADING

    recipe = load_recipe(path)
    found: dict[str, Any] = {"adapters": [ingredient_reference(recipe.folder, adapter) for adapter in recipe.adapters]}
    found |= {"base": None, "base-revision": None, "dtype": recipe.dtype}
    if recipe.base.quantisation in ON_LOADING:  # of a base that is stored so it changes nothing
        found |= {"quantise": recipe.base.quantisation}
    if recipe.base.commit is not None:
        found |= {"base": f"{URI_PREFIX}{recipe.base.id}", "base-revision": recipe.base.commit}
    for field in fields(FitSettings):
        found[field.name.replace("_", "-")] = recipe.fit.settings.get(field.name)
    if found.pop("metric-command") is not None:
        raise UsageError(
            f"{path} holds the sha256 of its --metric-command only, so it is not a configuration",
            hint="write the settings into a TOML file",
        )
    return [Setting("fit", option, value, str(path)) for option, value in found.items()]


def ingredient_reference(folder: Path, adapter: Any) -> str:
    """How to name an ingredient from here: pinned to its commit, or as a directory."""
    return adapter.pinned or os.path.join(os.curdir, os.path.relpath(folder / adapter.reference))


def as_text(value: Any) -> str:
    """A value for people, as TOML would have it."""
    return json.dumps(value, ensure_ascii=False)


_Rule = Literal["yes", "inside", "no"]


@dataclass(frozen=True)
class Row:
    """What goes for some options.

    Args:
        rule: whether the file may set them; `inside` for paths within the folder, and for references on the Hub.
        options: long names, of every command or, as `push.revision`, of one.
        why: half a sentence; `inside`, what has to be there.
    """

    rule: _Rule
    options: tuple[str, ...]
    why: str


TABLE = (
    Row("no", ("force",), "replaces what is there"),
    Row("no", ("log", "local-dir", "per-record"), "writes where no output is expected"),
    Row("no", ("cache-dir", "resume"), "takes a cache, or the state of a run, for the user's own"),
    Row("no", ("base", "base-revision"), "names what is trusted: weights, tokenizer, chat template"),
    Row("no", ("metric-command",), "names a program"),
    Row("no", ("quiet",), "hides that a file was in force"),
    Row("no", ("device", "device-map", "shard"), "takes devices of this machine"),
    Row("no", ("max-size", "with-base"), "lifts a ceiling of a download"),
    Row("no", ("from-pickle", "edited-card"), "lifts a check"),
    Row("no", ("push.revision", "message", "prompt"), "names another place, or speaks, in the user's name"),
    Row("inside", ("output",), "a new name there, and no hidden one"),
    Row("inside", ("adapters", "control", "initial"), "a directory there, or a reference on the Hub"),
    Row("inside", ("data", "eval-data", "fit-data", "guard", "comparison", "recipe"), "a file there"),
    Row("inside", ("weights",), "numbers, or a file there"),
    Row(
        "yes",
        tuple(
            "activation-aware allow-truncation base-dtype batch-tokens budget checkpointing cv density dequantise "
            "dtype energy fields format generate gguf holdout learning-rate margin max-length max-new-tokens merge "
            "method methods mixing modules-to-save paper passes profile quantise rank raw refit ridge scale seed "
            "select-by skip-bad task-type tolerance".split()
        ),
        "says how it is computed",
    ),
    Row("yes", ("revision",), "says which commit is read"),
    Row("yes", ("create-pr", "private", "dry-run"), "does less"),
    Row("yes", ("for", "show.weights", "show.search", "layers", "color", "verbose"), "says what is shown"),
)
RULES = {option: row for row in TABLE for option in row.options}
_WRITTEN = frozenset({"output"})
_REFERENCES = frozenset({"adapters", "control", "initial"})  # what else is inside of the folder is a path


def _refusal(command: str, option: str, value: Any) -> str | None:
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
        if option in _REFERENCES and _is_on_the_hub(str(text)):
            continue
        if not _is_inside(str(text)) or (option in _WRITTEN and _is_hidden(str(text))):
            return f"{text!r} is not inside of the folder: it has to be {row.why}"
    return None


def _is_inside(text: str) -> bool:
    """Whether a path leads to the current folder or below it, links followed, whatever of it is a weight or an adapter
    of records (PATH:WEIGHT@ADAPTER)."""
    if text == "-" or text.startswith("~") or "\0" in text:
        return False
    here = os.path.realpath(os.curdir)
    paths = {text} | {text[:end] for end, character in enumerate(text) if character in ":@" and end}
    return all(os.path.commonpath([here, os.path.realpath(path)]) == here for path in paths)


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
