"""What can be set for a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from loracli.algebra.methods import METHODS
from loracli.algebra.methods.method import MethodOptions
from loracli.arguments import check_declared
from loracli.composition.composition import takes
from loracli.composition.fitted import PAPER
from loracli.composition.weights import Weights
from loracli.errors import UsageError
from loracli.fitting.settings import AUTO, FRESH_LORA, FitSettings
from loracli.hub.references import Named
from loracli.recipe.record import MIXING_KINDS
from loracli.system.document import encode
from loracli.system.near import did_you_mean

ALL, DATA_FREE = "all", "data-free"
FITTED_MIXINGS = (*MIXING_KINDS, AUTO, PAPER)
UNIFORM = "uniform"
WEIGHTS = "weights"  # the row of weights by hand
RANDOM, DATAMIX = "random", "datamix"
_CONTROLS = (FRESH_LORA, RANDOM, DATAMIX)
_MARGIN = 0.02
_OF_FIT_ALONE = frozenset(  # of the settings of a fit: what a comparison says of each row, or of its answers
    ("mixing", "paper", "holdout", "control", "select_by", "metric_command", "max_new_tokens", "tolerance")
)


@dataclass(frozen=True)
class Controls:
    """What a sceptic asks for.

    Args:
        fresh_lora: a new LoRA of the same rank, trained on the same calibration records.
        random: the same fit on adapters of the same norms with random directions, five times.
        datamix: reference of an adapter that was trained on the data of all skills; None for none.
    """

    fresh_lora: bool = False
    random: bool = False
    datamix: Named | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for a value of another type."""
        check_declared(self)

    @property
    def fitted(self) -> list[str]:
        """Names of those that need calibration data."""
        return [name for name, wanted in ((FRESH_LORA, self.fresh_lora), (RANDOM, self.random)) if wanted]

    @property
    def names(self) -> tuple[str, ...]:
        """Of all."""
        return (*self.fitted, *([] if self.datamix is None else [DATAMIX]))


def parse_controls(words: Sequence[str]) -> Controls:
    """`fresh-lora`, `random`, and `datamix` followed by an adapter, in any order.

    Raises:
        UsageError: for any other word, or `datamix` without its adapter.
    """
    fresh_lora, random, datamix = False, False, None
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == FRESH_LORA:
            fresh_lora = True
        elif word == RANDOM:
            random = True
        elif word == DATAMIX:
            if not rest:
                raise UsageError("--control datamix lacks its adapter", hint="--control datamix DIR")
            datamix = rest.pop(0)
        else:
            raise UsageError(
                f"--control {word} is not one of {', '.join(_CONTROLS)}",
                hint="only datamix is followed by another word, its adapter: --control datamix DIR",
            )
    return Controls(fresh_lora, random, datamix)


def needs_records(name: str) -> bool:
    """Whether a method, a kind of mixing or a control goes by calibration records."""
    return name not in METHODS or METHODS[name].needs_records


def records_needed(name: str) -> tuple[str, str]:
    """Why it needs them, and the option that takes them."""
    own = name in METHODS and METHODS[name].regress is not None
    why = "goes by each adapter's own records" if own else "has to be fitted"
    return why, f"give calibration records with --fit-data{' FILE@ADAPTER' if own else ''}"


@dataclass(frozen=True)
class CompareSettings:
    """The settings of a comparison.

    Args:
        methods: names, or `data-free` for every one that needs no calibration data, or `all`.
        options: of the methods.
        fit: of the levels that are fitted for it.
        controls: that stand beside the methods.
        margin: nats per token that the guard records may get worse by.
        weights: by hand, of a row of their own, as in `ExportRequest`; None for no such row.
    """

    methods: tuple[str, ...] = (DATA_FREE,)
    options: MethodOptions = MethodOptions()
    fit: FitSettings = FitSettings()
    controls: Controls = Controls()
    margin: float = _MARGIN
    weights: Weights | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for a value of another type, a method that there is not, or an option out of its range or
        that no method takes."""
        check_declared(self)
        check_declared(self.options)
        known = (ALL, DATA_FREE, *METHODS, *FITTED_MIXINGS)
        for name in self.methods:
            if name not in known:
                raise UsageError(f"--methods {name} is not one of {', '.join(known)}", hint=did_you_mean(name, known))
        self.options.check()
        if not 0 < self.margin < 100:
            raise UsageError(f"--margin {self.margin} is not between 0 and 100")
        self._check_taken()

    def _check_taken(self) -> None:
        """Raises UsageError for an option that none of the methods takes; the seed is the bootstrap's too."""
        if ALL in self.methods or DATA_FREE in self.methods:
            return
        taken = {"seed"}.union(*(takes(METHODS[name]) for name in self.methods if name in METHODS))
        for option in fields(self.options):
            if getattr(self.options, option.name) != option.default and option.name not in taken:
                able = ", ".join(name for name, method in METHODS.items() if option.name in takes(method))
                raise UsageError(
                    f"none of the --methods {','.join(self.methods)} takes --{option.name}",
                    hint=f"leave it out, or compare one that does: {able}",
                )

    def recorded(self) -> dict[str, int | float | str | bool | None]:
        """The options of the fits and of the methods; the seed is one."""
        fit = {name: value for name, value in self.fit.recorded().items() if name not in _OF_FIT_ALONE}
        return {**encode(self.options), **fit}

    @property
    def regressed(self) -> tuple[str, ...]:
        """The methods that go by each adapter's own records and were asked for by name."""
        return tuple(name for name in self.methods if name in METHODS and METHODS[name].regress is not None)

    def options_of(self, name: str) -> MethodOptions:
        """Those of a method; none of `uniform` where it only stands there to be compared with."""
        return MethodOptions() if name == UNIFORM and UNIFORM not in self.methods else self.options

    def check_used(self, *, fit_data: bool, guard: bool) -> None:
        """Raises UsageError for what could change no row: records or settings of a fit without one, a margin of
        nothing; and for what was asked for by name, a fit without records or a method whose package is not installed.

        Args:
            fit_data: whether there are calibration records.
            guard: whether there are records that must not get worse.
        """
        for name in self.methods:
            if name in METHODS:
                METHODS[name].check_installed()
        if self.margin != _MARGIN and not guard:
            raise UsageError("--margin is for the records of --guard", hint="give --guard FILE, or leave --margin out")
        fits = bool(self.controls.fitted) or any(name == ALL or name in FITTED_MIXINGS for name in self.methods)
        searches = any(name in METHODS and METHODS[name].needs_records for name in self.methods)
        if fit_data and not (fits or searches):
            raise UsageError(
                "--fit-data has no use here: nothing is fitted",
                hint="name what is fitted, such as --methods data-free,module or --control random, or leave it out",
            )
        for option, value in (("--passes", self.fit.passes), ("--cv", self.fit.cv)):
            if value is not None and not (fit_data and fits):
                raise UsageError(
                    f"{option} has no use here: no mixing is fitted",
                    hint=f"name one, such as --methods data-free,module with --fit-data, or leave {option} out",
                )
        asked = [
            *((f"--control {name}", name) for name in self.controls.fitted),
            *((name, name) for name in self.methods),
        ]
        for said, name in asked if not fit_data else ():
            if name not in (ALL, DATA_FREE) and needs_records(name):
                why, hint = records_needed(name)
                raise UsageError(f"{said} {why}", hint=hint)


def parse_methods(text: str) -> tuple[str, ...]:
    """Names between commas, each once.

    Raises:
        UsageError: if there is none.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise UsageError("--methods names no method", hint="for example --methods ties,dare, or all")
    return names
