"""A plain LoRA from an adapter that needs its base: DoRA, and initialisations that were subtracted from the base.

    dW = W' - W,    W' = D (W + dV),    dV = s B A - s B_0 A_0

D is I without DoRA, and B_0 A_0 is 0 where nothing was subtracted. Without DoRA the change has rank 2 r and is
converted exactly; with it the change has full rank, and the result is the best approximation of some rank, at an error
that is stated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from loracli.adapters.claims import agreed_task
from loracli.adapters.names import layer
from loracli.arguments import check_declared
from loracli.composition.base_table import BaseTable, table_of_adapters
from loracli.conversion.read import BaseWeights, Convertible, read_convertible
from loracli.conversion.source import Conversion, Cut, from_conversion
from loracli.errors import UnsupportedAdapter, UsageError
from loracli.export.export import Exported, write_export
from loracli.export.request import ExportRequest, check_form
from loracli.hub.references import Named
from loracli.progress import SILENT, Bar, Progress, drawn, takes_bar
from loracli.system.display import count_text, path_text, repr_line
from loracli.system.files import check_free

DEFAULT_TOLERANCE = 0.1  # of DoRA, where neither a rank nor a tolerance is given
DEFAULT_MOST = 512  # and the largest rank to spend on it: no server loads a larger one
_COMPUTABLE = ("pissa", "olora")
# Of s B A with s B_0 A_0. Measured: 0.3 and more from the right base, at any rate, and 0.02 at most from another.
_LEAST_COSINE = 0.1


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote.

    Args:
        exported: the directory, and how exact each module is.
        relative_error: |dW_written - dW|_F / |dW|_F over all modules.
        uncertainty: about how far an initialisation that was computed again may be off, of a module's |dW|_F.
    """

    exported: Exported
    relative_error: float
    uncertainty: float

    def __repr__(self) -> str:
        exported = self.exported
        error = f"relative error {self.relative_error:.1e}" if self.relative_error else "exact"
        modules = count_text(len(exported.layout.ranks), "module")
        return repr_line(self, path_text(exported.path), f"rank {exported.layout.rank}", modules, error)


@dataclass(frozen=True)
class ConvertRequest:
    """What is converted, and how.

    Args:
        adapter: a reference or a directory.
        base: a Hub id or directory, None for the one that the adapter names.
        base_revision: of a base on the Hub.
        initial: the adapter as it was before its training, if there is one; it needs no weight of the base.
        rank: of every module; the error is what it then is.
        tolerance: the largest relative error of a module; each gets the smallest rank that it takes. Without both, a
            change of low rank is converted exactly, and another to DEFAULT_TOLERANCE or not at all.
        dtype: float32, float16 or bfloat16; None is the adapter's own.
    """

    adapter: Named
    base: Named | None = None
    base_revision: str | None = None
    initial: Named | None = None
    rank: int | None = None
    tolerance: float | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for a value of another type."""
        check_declared(self)

    @property
    def asks_for_size(self) -> bool:
        """Whether a rank or an error is given."""
        return self.rank is not None or self.tolerance is not None


@takes_bar
def convert_adapter(
    request: ConvertRequest, output: str | Path, *, force: bool = False, progress: Progress | Bar = SILENT
) -> Converted:
    """Writes what an adapter changes in its base's weights as one plain LoRA directory.

    Args:
        request: what is converted, and how.
        output: the directory to make.
        force: replace an existing adapter directory.
        progress: told how far it is.
    Raises:
        OutputExists: if `output` is taken, before any work.
        UsageError: if options contradict each other, there is nothing to convert, or the default error cannot be had.
        InputError: of the kind that fits, if the adapter cannot be read or converted.
    """
    progress = drawn(progress)
    written = _check(request)
    check_free(Path(output), force=force)
    read = read_convertible(request.adapter, request.initial, progress=progress)
    _check_way(read)
    table, commit, weights = _find_base(read, request, progress)
    _check_modules(read, table, weights)
    cut = Cut(request.rank, request.tolerance)
    if not request.asks_for_size and read.magnitudes:
        cut = Cut(tolerance=DEFAULT_TOLERANCE, most=DEFAULT_MOST)
    conversion = Conversion(read, table, commit, weights, cut, request.asks_for_size)
    exported = write_export(from_conversion(conversion), Path(output), written, force=force, progress=progress)
    if conversion.tally.alike and (cosine := conversion.tally.cosine()) < _LEAST_COSINE:
        start = "--initial" if read.initial is not None else f"the base {table.id}"
        progress.warn(
            f"{start} is hardly what {read.adapter.reference} was trained from, and with another one the result is "
            f"wrong: the update that it would have begun with has a cosine of {cosine:.2f} with the trained one"
        )
    sizes = conversion.tally.sizes
    errors = [module.relative_error * sizes[module.name] for module in exported.certificate.modules]
    size = math.hypot(*sizes.values())
    return Converted(exported, math.hypot(*errors) / size if size else 0.0, conversion.tally.uncertainty)


def _check(request: ConvertRequest) -> ExportRequest:
    """How the result is written; raises UsageError for what contradicts each other or is out of its range."""
    if request.rank is not None and request.tolerance is not None:
        raise UsageError("--rank and --tolerance cannot be given together")
    if request.tolerance is not None and not 0.0 < request.tolerance < 1.0:
        raise UsageError(f"--tolerance {request.tolerance:g} is not between 0 and 1")
    written = ExportRequest(rank=request.rank, dtype=request.dtype)
    check_form(written)
    return written


def _check_way(read: Convertible) -> None:
    """Raises if there is nothing to convert, or no way to."""
    config = read.adapter.config
    if not config.use_dora and config.initialisation is None and read.initial is None:
        raise UsageError(
            f"{read.adapter.reference} is a plain LoRA already",
            hint="if its config hides that it began with PiSSA or the like, give the adapter before its training with "
            "--initial",
        )
    if config.initialisation is not None and read.initial is None and config.initialisation not in _COMPUTABLE:
        needed = "random numbers" if config.initialisation.startswith("pissa") else "the data of its training"
        raise UnsupportedAdapter(
            f"init_lora_weights is {config.initialisation!r}: what it took from the base depends on {needed} and "
            "cannot be computed again",
            where=read.adapter.reference,
            hint="give the adapter as it was before its training with --initial DIR",
        )


def _find_base(
    read: Convertible, request: ConvertRequest, progress: Progress
) -> tuple[BaseTable, str | None, BaseWeights | None]:
    """What is known of the base, its commit, and its weights where they are needed.

    They are needed for magnitudes, for an initialisation that has to be computed again, and to look at what an adapter
    carries a copy of, or what may be tied: anything outside the layers.
    """
    adapter = read.adapter
    computed = adapter.config.initialisation is not None and read.initial is None
    task = agreed_task([adapter])
    outside = any(layer(name) == name for name in adapter.modules)
    needed = bool(read.magnitudes or computed or adapter.base_copies or outside)
    table = None if needed or request.base is not None else table_of_adapters([adapter])
    if table is not None:
        return table, None, None
    from loracli.model.base import plan_base
    from loracli.model.modules import base_modules, check_shapes
    from loracli.model.reference import find_base

    reference = find_base([adapter], request.base, revision=request.base_revision, progress=progress)
    skeleton = plan_base(reference, task=task).skeleton
    check_shapes(skeleton, [adapter])
    modules = BaseTable(reference.id, base_modules(skeleton, [adapter]))
    if not needed:
        return modules, None, None
    weights = BaseWeights(reference.path, prefix=skeleton.base_model_prefix, tied=dict(skeleton.all_tied_weights_keys))
    return modules, reference.commit, weights


def _check_modules(read: Convertible, table: BaseTable, weights: BaseWeights | None) -> None:
    """Raises for modules whose change in the base is more, or other, than the adapter's."""
    config = read.adapter.config
    if config.initialisation is None and read.initial is None:
        return
    kinds = {module.name: module.kind for module in table.modules}
    for name, module in read.adapter.modules.items():
        if module.kind == "embedding":
            continue
        if config.initialisation == "olora" and kinds[name] == "conv1d":
            raise UnsupportedAdapter(
                f"{name} is a Conv1D with OLoRA: PEFT subtracts the transposed matrix there, so the base it was "
                "trained on is not W - s B_0 A_0",
                where=read.adapter.reference,
                hint="train it with another init_lora_weights",
            )
        other = None if weights is None else weights.tied(f"{name}.weight")
        if other is not None:
            raise UnsupportedAdapter(
                f"{name} is tied to {other}: its initialisation changed both, and a LoRA would change one",
                where=read.adapter.reference,
                hint=f"train it without {name}",
            )
