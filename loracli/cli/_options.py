"""The options that more than one command takes, each declared once: alone, or in a class of options that belong
together, which `with_groups` puts in a command's place for it.

Completion runs at a keystroke: no torch, no network, nothing read but names.
"""

from __future__ import annotations

import glob
import inspect
import os
import re
import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer
from typer.models import ParameterInfo

from loracli.cli._help import Panel
from loracli.errors import UsageError
from loracli.system.files import CONFIG_FILE

if TYPE_CHECKING:
    from loracli.cli._output import Output

CACHED = "models--"  # what the name of a model's folder in a Hub cache begins with


def complete_adapter(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Adapters in the folder that is being typed, and those in the Hub cache.

    What can only be a path is left to the shell.
    """
    if incomplete.startswith((".", "/", "~")):
        return []
    return [*_local(incomplete), *_cached(ctx.params.get("cache_dir"))]


def complete_mixing() -> list[str]:
    """What `--mixing` takes."""
    from loracli.recipe.record import MIXING_KINDS

    return [*MIXING_KINDS, "auto"]


def _local(incomplete: str) -> list[tuple[str, str]]:
    pattern = os.path.join(glob.escape(os.path.dirname(incomplete)), "*", CONFIG_FILE)
    return [(os.path.dirname(path), "a directory") for path in sorted(glob.glob(pattern))]


def _cached(cache_dir: Path | None) -> list[tuple[str, str]]:
    """Repositories of which any snapshot is an adapter."""
    if cache_dir is None:
        from loracli.hub.references import surroundings

        cache_dir = surroundings().cache
    folder = glob.escape(str(cache_dir))
    found = glob.glob(os.path.join(folder, f"{CACHED}*", "snapshots", "*", CONFIG_FILE))
    names = {Path(path).parents[2].name.removeprefix(CACHED).replace("--", "/") for path in found}
    return [(name, "in the Hub cache") for name in sorted(names)]


UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZES = {"": 1} | {unit.lower(): size for unit, size in UNITS.items()}


def parse_bytes(text: str, option: str) -> int:
    """`20MB`, `1.5 GiB`, `800000`; units are powers of 1000, with an i of 1024, in any capitals. `option` is what
    errors name.

    Raises:
        UsageError: if it is not a size.
    """
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([A-Za-z]{0,3})", text.strip())
    if found is None or found[2].lower() not in _SIZES:
        raise UsageError(f"{option} {text} is not a size", hint=f"for example 20MB; units: {', '.join(UNITS)}")
    return int(float(found[1]) * _SIZES[found[2].lower()])


Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document on stdout, also on failure.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print values only: no tables, notes or progress.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output."), Panel.OUTPUT]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be written; write nothing."), Panel.OUTPUT]
Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="REV", help="Read this branch, tag or commit of references without @REV."),
]
CacheDir = Annotated[
    Path | None, typer.Option("--cache-dir", metavar="DIR", help="Use this Hub cache instead of the default one.")
]
Token = Annotated[
    str | None,
    typer.Option(
        "--token", metavar="TOKEN", help="Show the Hub this token; prefer `hf auth login` or the variable HF_TOKEN."
    ),
]
EditedCard = Annotated[
    bool, typer.Option("--edited-card", help="Accept a README.md whose words were changed after it was written.")
]

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe that `loracat fit` wrote.")]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="MODEL",
        help="Use this base model, a Hub id or a directory; the default is what the recipe or the adapters name.",
    ),
    Panel.MACHINE,
]
BaseRevision = Annotated[
    str | None,
    typer.Option("--base-revision", metavar="REV", help="Use this branch, tag or commit of a base model on the Hub."),
    Panel.MACHINE,
]


def _adapters(help: str) -> Any:
    return typer.Option("--adapters", "-a", metavar="ADAPTER...", autocompletion=complete_adapter, help=help)


Adapters = Annotated[
    list[str],
    _adapters(
        "Compose these adapters, in order: org/name, org/name@rev, hf://org/name@rev/sub/folder, or a local directory."
    ),
]
AdaptersOrPlaces = Annotated[
    list[str] | None,
    _adapters("Compose these adapters without a fit; with a recipe, say where its ingredients are now, in its order."),
]
Weights = Annotated[
    list[str] | None,
    typer.Option(
        "--weights",
        "-w",
        metavar="W...",
        help="Weigh --adapters by hand: with one number each, or by module with a file as `loracat show --weights` "
        "prints it.",
    ),
]
Places = Annotated[list[str] | None, _adapters("Say where the ingredients are now, in the recorded order.")]

MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", metavar="N", help="End a generated answer after N tokens.")
]
Fields = Annotated[
    str | None,
    typer.Option(
        "--fields",
        metavar="NAME=KEY,...",
        help="Say what the data call the fields that are read: prompt=question,completion=answer.",
    ),
]
Seed = Annotated[
    int,
    typer.Option("--seed", metavar="N", help="Seed what is random: splits, batches, the bootstrap, dare, lorahub."),
]
Density = Annotated[
    float | None,
    typer.Option("--density", metavar="X", help="Keep this share of the entries with ties, dare and knots."),
]
Scale = Annotated[
    float,
    typer.Option("--scale", metavar="X", help="Multiply the result of sum, uniform, ties, dare, knots and tsv by X."),
]
WrittenDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="Write float32, float16 or bfloat16; the default is the widest of the adapters.",
    ),
]
MethodModulesToSave = Annotated[
    str | None,
    typer.Option(
        "--modules-to-save",
        metavar="POLICY",
        help="With --weights or --method: take modules that adapters saved whole by pick:NAME or average, or refuse "
        "them; the default is the recipe's.",
    ),
]


@dataclass(frozen=True)
class ReadingOptions:
    """How records are read and fitted to, by `loracli.fitting.settings.FitSettings`, field by field."""

    PANEL: ClassVar[Panel] = Panel.DATA

    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="SHAPE",
            help="Read records as text, prompt-completion, conversational-prompt-completion, messages, sharegpt or "
            "alpaca; the default is what each file's first record has.",
        ),
    ] = None
    fields: Fields = None
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out lines that cannot be used, and say which.")
    ] = False
    max_length: Annotated[
        int, typer.Option("--max-length", metavar="N", help="Use at most N tokens of a record, from its beginning.")
    ] = 1024
    allow_truncation: Annotated[
        bool,
        typer.Option(
            "--allow-truncation",
            help="Go on although --max-length leaves more than a tenth of a file's records with nothing to score.",
        ),
    ] = False
    batch_tokens: Annotated[
        int, typer.Option("--batch-tokens", metavar="N", help="Make micro-batches of N tokens."), Panel.MACHINE
    ] = 1024
    passes: Annotated[
        float | None,
        typer.Option(
            "--passes",
            metavar="N",
            help="Spend at most N passes, 2 to 1000, over the training records on a fit, with folds in each of them; "
            "layer and module end where more do not pay. The default is 8, for the mixing auto 22, and more below 40 "
            "records and for three adapters.",
        ),
        Panel.SEARCH,
    ] = None
    cv: Annotated[
        int | None,
        typer.Option("--cv", metavar="K", help="Choose by K-fold cross-validation, for few records."),
        Panel.SEARCH,
    ] = None
    seed: Annotated[Seed, Panel.SEARCH] = 0
    modules_to_save: Annotated[
        str,
        typer.Option(
            "--modules-to-save",
            metavar="POLICY",
            help="Take modules that adapters saved whole by pick:NAME or average, or refuse them.",
        ),
        Panel.MAIN,
    ] = "refuse"


@dataclass(frozen=True)
class AnswerOptions:
    """How generated answers are judged."""

    PANEL: ClassVar[Panel] = Panel.ANSWERS

    metric_command: Annotated[
        str | None,
        typer.Option(
            "--metric-command",
            metavar="COMMAND",
            help="Judge greedy answers by your own program: JSONL in, one number per line out.",
        ),
    ] = None
    max_new_tokens: MaxNewTokens = 256
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance",
            metavar="X",
            help="Take numbers for equal within this relative tolerance, with the metric numeric.",
        ),
    ] = 1e-4


Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="Run on auto, cpu, cuda, cuda:1 or mps.")]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device-map", metavar="MAP", help="Spread the base over all devices of this machine, with the one value auto."
    ),
]
Quantise = Annotated[
    str | None,
    typer.Option(
        "--quantise",
        metavar="FORM",
        autocompletion=lambda: ["nf4", "int8", "none"],
        help="Keep the base's linear layers in nf4 or int8, with the extra loracat[bitsandbytes]; none leaves them.",
    ),
]
Checkpointing = Annotated[
    bool,
    typer.Option(
        "--checkpointing",
        help="Run layers again in the backward pass, to save memory; by default where it would run out.",
    ),
    Panel.MACHINE,
]


@dataclass(frozen=True)
class PlacementOptions:
    """Where the base model is, and as what, by `loracli.model.placement.Placement`, field by field."""

    PANEL: ClassVar[Panel] = Panel.MACHINE

    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", metavar="DTYPE", help="Load the base model as auto, float32, bfloat16, float16 or float64."
        ),
    ] = "auto"
    device: Device = "auto"
    device_map: DeviceMap = None
    quantise: Quantise = None


def default_recipe(command: str, adapters: Sequence[str] | None, out: Output) -> Path:
    """The recipe where none is named; with adapters it has to be there, or nothing says how they are composed, and that
    it is taken is told.

    Args:
        command: that has --weights and --method too.
        adapters: of its --adapters.
        out: told.
    Raises:
        UsageError: if there is none.
    """
    recipe = Path("recipe.json")
    behind = [name for name in adapters or () if name.endswith(".json")]
    if behind:
        words = shlex.join([*behind, "--adapters", *(name for name in adapters or () if name not in behind)])
        raise UsageError(
            f"{behind[0]} stands among the adapters", hint=f"put a recipe before them: loracat {command} {words}"
        )
    if adapters and not recipe.exists():
        hint = f"add --weights {' '.join('1' for _ in adapters)}, or --method sum, or name a recipe before --adapters"
        raise UsageError(f"nothing says how the adapters are composed: there is no {recipe} here", hint=hint)
    if adapters:
        out.note(f"the weights are those of {recipe}, as neither --weights nor --method is given")
    return recipe


def set_words(group: ReadingOptions | PlacementOptions) -> list[str]:
    """Every option of a group that is not its default, as it is typed."""
    words: list[str] = []
    for field in fields(group):
        option, value = f"--{field.name.replace('_', '-')}", getattr(group, field.name)
        if value != field.default:
            text = f"{value:.15g}" if isinstance(value, float) else str(value)
            words += [option] if value is True else [option, text]
    return words


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """A command as Typer takes it: in the place of each parameter whose type is a class of this room stand those of the
    class's constructor, and the command gets what it makes of them. The help shows an option under the panel that its
    type names, else under that of its class."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[Callable[..., Any], list[str]]] = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        kind = parameter.annotation
        if isinstance(kind, type) and kind.__module__.startswith(f"{__package__}."):
            inner = inspect.signature(kind, eval_str=True).parameters
            groups[name] = kind, list(inner)
            parameters += [_under(getattr(kind, "PANEL", Panel.MAIN), one) for one in inner.values()]
        else:
            parameters.append(_under(Panel.MAIN, parameter))

    @wraps(command)
    def flat(**values: Any) -> None:
        made = {name: kind(**{word: values.pop(word) for word in words}) for name, (kind, words) in groups.items()}
        with ExitStack() as ended:
            for one in made.values():
                if hasattr(one, "close"):  # its bars are off the screen before anything is said of an error
                    ended.callback(one.close)
            command(**values, **made)

    named = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    flat.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    return flat


def _under(panel: Panel, parameter: inspect.Parameter) -> inspect.Parameter:
    """The parameter with the panel that its type names, else this one, in Typer's declaration of it."""
    notes = getattr(parameter.annotation, "__metadata__", ())
    declared = next((note for note in notes if isinstance(note, ParameterInfo)), None)
    if declared is None:  # Typer's own context
        return parameter
    declared = copy(declared)  # which other commands may have under another panel
    declared.rich_help_panel = next((note for note in reversed(notes) if isinstance(note, Panel)), panel)
    return parameter.replace(annotation=Annotated[parameter.annotation.__origin__, declared])
