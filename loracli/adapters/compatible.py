"""What adapters are beside each other: facts of each, whether they can be composed, how they overlap; all from factors
and configs, without the base model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracli.adapters.adapter import LoraAdapter, LoraModule, kernels_of, read_adapter
from loracli.adapters.claims import WayOut, agreed_task, way_out_of
from loracli.adapters.kinds import kind_of
from loracli.adapters.names import leaf
from loracli.adapters.on_base import warn_of_open_orders
from loracli.adapters.saved_modules import AVERAGE, saved_modules
from loracli.algebra.factors import Factors, inner_product
from loracli.errors import IncompatibleAdapters, InputError, UsageError
from loracli.hub.fetch import fetch_adapter
from loracli.hub.references import Named, distinct_bases
from loracli.progress import SILENT, Bar, Progress, drawn, takes_bar
from loracli.system.display import count_text, names_text, path_text, repr_line
from loracli.system.document import dtype_name


@dataclass(frozen=True)
class Overlap:
    """How alike two adapters are, summed over all modules.

    Args:
        cosine: <dW_1, dW_2> / (|dW_1| |dW_2|) in the Frobenius product; near 0 means that they hardly interfere.
        shared_modules: how many modules both adapt, in the same shape.
        lora_A_cosine: the mean over these of <A_1, A_2> / (|A_1| |A_2|), over the rows that both have; None where no
            module has two that are not 0.
        same_start: whether that is above 0.5, so that training most likely began from the same lora_A: with
            A_i = A + E_i, and E_i at right angles to A and each other, more than half of each |A_i|_F^2 is A's. Of
            adapters that were drawn apart it is 0 within some 1 / sqrt(rank * in_features).
    """

    first: str
    second: str
    cosine: float
    shared_modules: int
    lora_A_cosine: float | None
    same_start: bool


_SAME_START = 0.5


def _problems_of(adapters: Sequence[LoraAdapter], *, base_given: bool = False, base_known: bool = False) -> list[str]:
    """Every reason why these adapters cannot be composed; empty if they can.

    Args:
        adapters: any number.
        base_given: the user names the base model, so that what the adapters name need not agree.
        base_known: the adapters go by its names and in its order; else experts may have lora_A and lora_B the other way
            round.
    """
    problems = []
    names = distinct_bases(adapter.config.base_model for adapter in adapters)
    if len(names) > 1 and not base_given:
        claims = ", ".join(f"{a.reference} names {a.config.base_model}" for a in adapters)
        problems.append(f"the adapters name different base models: {claims}")
    for name, (first, other) in _other_counts(adapters).items():
        counts = ", ".join(f"{len(a.targets[name])} in {a.reference}" for a in (first, other))
        what = "groups" if first.targets[name][0].kernel else "experts"
        problems.append(f"{name} has different numbers of {what}: {counts}")
    first_with: dict[str, LoraAdapter] = {}
    for adapter in adapters:
        for name, module in adapter.modules.items():
            other = first_with.setdefault(name, adapter)
            theirs = other.modules[name]
            if kind_of(module).matrix != kind_of(theirs).matrix:
                problems.append(
                    f"{name} is {theirs.kind} in {other.reference} and {module.kind} in {adapter.reference}"
                )
            elif _shape(module) != _shape(theirs) and not (
                kind_of(module).of_experts and _shape(module) == _shape(theirs)[::-1] and not base_known
            ):
                sizes = "(out, in, kernel)" if module.kernel else "(out, in)"
                problems.append(
                    f"{name} is {sizes} = {_shape(theirs)} in {other.reference} "
                    f"and {_shape(module)} in {adapter.reference}"
                )
    return problems


def _other_counts(adapters: Sequence[LoraAdapter]) -> dict[str, tuple[LoraAdapter, LoraAdapter]]:
    """The first two adapters that change a parameter with different numbers of experts, by the parameter, or a
    convolution with different numbers of groups."""
    first_with: dict[str, tuple[LoraAdapter, int]] = {}
    found: dict[str, tuple[LoraAdapter, LoraAdapter]] = {}
    for adapter in adapters:
        for name, modules in adapter.targets.items():
            first, count = first_with.setdefault(name, (adapter, len(modules)))
            if count != len(modules):
                found.setdefault(name, (first, adapter))
    return found


def check_composable(adapters: Sequence[LoraAdapter], *, base_given: bool = False, base_known: bool = False) -> None:
    """Raises IncompatibleAdapters with the first reason and the number of others, if there is any."""
    problems = _problems_of(adapters, base_given=base_given, base_known=base_known)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        way_out = None if base_given else _way_out(adapters)
        hint = "the adapters were trained on different models" if way_out is None else way_out.hint
        raise IncompatibleAdapters(problems[0] + more, hint=hint)


def _way_out(adapters: Sequence[LoraAdapter]) -> WayOut | None:
    """What to do about the names of the bases, None where they agree."""
    claims = {adapter.reference: adapter.config.base_model for adapter in adapters}
    return way_out_of(claims) if len(distinct_bases(claims.values())) > 1 else None


def check_distinct(adapters: Sequence[LoraAdapter], references: Sequence[str], progress: Progress = SILENT) -> None:
    """Raises UsageError if two of the adapters are one: by their names, or one file by links or by another spelling.

    Args:
        adapters: that are composed.
        references: what they are called.
        progress: warned of two that hold the same bytes.
    """
    names: set[str] = set()
    copies: list[tuple[str, str]] = []
    bytes_of: dict[tuple[tuple[str, str], ...], str] = {}
    files: dict[tuple[int, int], str] = {}
    for reference, adapter in zip(references, adapters, strict=True):
        if reference in names:
            raise UsageError(f"the adapter {reference} is given twice")
        names.add(reference)
        copied = bytes_of.setdefault(tuple(sorted(adapter.sha256.items())), reference) if adapter.sha256 else reference
        if copied != reference:
            copies.append((copied, reference))
        if adapter.file is None:
            continue
        try:
            found = adapter.file.path.stat()
        except OSError:  # gone since it was read, which whoever reads it next will say
            continue
        other = files.setdefault((found.st_dev, found.st_ino), reference)
        if other != reference:
            raise UsageError(f"{other} and {reference} are one adapter: the same file", hint="leave one of them out")
    for first, second in copies:
        progress.warn(f"{first} and {second} hold the same bytes: one is a copy, and what it does counts twice")


def _length(updates: Iterable[Factors]) -> float:
    """The Frobenius norm of all dW together; rounding takes the square of one whose factors cancel below 0."""
    return math.sqrt(max(sum(inner_product(f, f) for f in updates), 0.0))


def _overlaps_of(adapters: Sequence[LoraAdapter]) -> list[Overlap]:
    """The overlap of each pair."""
    lengths = [_length(m.factors for m in adapter.modules.values()) for adapter in adapters]
    result = []
    for i, first in enumerate(adapters):
        for j in range(i + 1, len(adapters)):
            second = adapters[j]
            shared = sorted(
                name
                for name in first.modules.keys() & second.modules.keys()
                if _shape(first.modules[name]) == _shape(second.modules[name])
            )
            product = sum(inner_product(first.modules[n].factors, second.modules[n].factors) for n in shared)
            length = lengths[i] * lengths[j]
            cosines = [c for n in shared if (c := _cosine_of_A(first.modules[n], second.modules[n])) is not None]
            mean = sum(cosines) / len(cosines) if cosines else None
            names, same = (first.reference, second.reference), mean is not None and mean > _SAME_START
            result.append(Overlap(*names, product / length if length else 0.0, len(shared), mean, same))
    return result


def _cosine_of_A(first: LoraModule, second: LoraModule) -> float | None:
    """Of the rows of lora_A that both have, one after the other; None where one's are 0."""
    rank = min(first.factors.rank, second.factors.rank)
    one, other = (module.factors.lora_A[:rank].double() for module in (first, second))
    length = float(one.norm() * other.norm())
    return float((one * other).sum()) / length if length else None


def _shape(module: LoraModule) -> tuple[int, ...]:
    """(out, in), and of a convolution (out, in, kh, kw)."""
    factors, kernel = module.factors, module.kernel
    return factors.out_features, factors.in_features // math.prod(kernel), *kernel


@dataclass(frozen=True)
class AdapterSummary:
    """One adapter.

    Args:
        reference: as it was typed.
        commit: pinned commit, None for a local directory.
        base_model: the base it names, or None.
        ranks: that occur, ascending; of a grouped convolution that of a group.
        scaling: lowest and highest s of a module.
        lora_alpha: from the config.
        use_rslora: from the config.
        leaves: last names of the adapted modules.
        modules: how many are adapted; the experts of a parameter count as one, and so do the groups of a convolution.
        parameters: in all factors.
        dtype: the widest of the factors.
        norm: |dW|_F over all modules.
        lora_bias: whether its lora_B have biases.
        modules_to_save: modules that it replaces as a whole.
        convolutions: that are among the modules.
        task_type: PEFT's name of its task, None if it states none.
    """

    reference: str
    commit: str | None
    base_model: str | None
    ranks: tuple[int, ...]
    scaling: tuple[float, float]
    lora_alpha: float
    use_rslora: bool
    leaves: tuple[str, ...]
    modules: int
    parameters: int
    dtype: str
    norm: float
    lora_bias: bool
    modules_to_save: tuple[str, ...]
    convolutions: tuple[str, ...]
    task_type: str | None


@dataclass(frozen=True)
class Inspection:
    """Adapters side by side: each alone, each pair's overlap, and every reason why they cannot be composed.

    Args:
        adapters: in their order.
        overlaps: of each pair.
        problems: the reasons.
        hint: what to do if only one thing is wrong and an option helps, as where they name different base models.
        base: what to give with `--base` if, as the hint says, one of these is the other with adapters merged in.
    """

    adapters: tuple[AdapterSummary, ...]
    overlaps: tuple[Overlap, ...]
    problems: tuple[str, ...]
    hint: str | None = None
    base: str | None = None

    def __repr__(self) -> str:
        names = [a.reference if a.commit else path_text(Path(a.reference)) for a in self.adapters]
        found = count_text(len(self.problems), "problem") if self.problems else "no problems"
        return repr_line(self, names_text(names), found)

    def as_dict(self) -> dict[str, Any]:
        """For a JSON document."""
        return {
            "adapters": [dataclasses.asdict(adapter) for adapter in self.adapters],
            "overlaps": [dataclasses.asdict(overlap) for overlap in self.overlaps],
            "composable": not self.problems,
            "problems": list(self.problems),
            "hint": self.hint,
            "base": self.base,
        }


@takes_bar
def inspect_adapters(
    references: Sequence[Named],
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    token: str | None = None,
    progress: Progress | Bar = SILENT,
) -> Inspection:
    """Reads adapters and says what they are and whether they fit each other.

    Raises:
        MalformedAdapter, UnsupportedAdapter: as `read_adapter`, for the first adapter that cannot be read.
        UsageError: if two are one, as `check_distinct`.
    """
    progress = drawn(progress)
    adapters = [
        read_adapter(
            fetch_adapter(r, revision=revision, cache_dir=cache_dir, token=token, progress=progress), progress=progress
        )
        for r in references
    ]
    check_distinct(adapters, [adapter.reference for adapter in adapters], progress)
    warn_of_open_orders(adapters, progress)
    refused = _refusals(adapters) if len(adapters) > 1 else []
    problems = [*_problems_of(adapters), *(error.what for error in refused)]
    way_out = _way_out(adapters) if len(problems) == 1 else None
    hints = [error.hint for error in refused] if way_out is None else [way_out.hint]
    return Inspection(
        adapters=tuple(_summary(adapter) for adapter in adapters),
        overlaps=tuple(_overlaps_of(adapters)),
        problems=tuple(problems),
        hint=hints[0] if len(problems) == 1 and hints else None,
        base=None if way_out is None else way_out.base,
    )


def _refusals(adapters: Sequence[LoraAdapter]) -> list[InputError]:
    """What a fit and an export would refuse beside `_problems_of`, where no option of theirs says otherwise."""
    found: list[InputError] = []
    for check in (
        lambda: agreed_task(adapters),
        lambda: saved_modules(AVERAGE, adapters) if any(adapter.saved for adapter in adapters) else None,
    ):
        try:
            check()
        except InputError as error:
            found.append(error)
    return found


def _summary(adapter: LoraAdapter) -> AdapterSummary:
    factors = [module.factors for module in adapter.modules.values()]
    scaling = [f.scaling for f in factors]
    return AdapterSummary(
        reference=adapter.reference,
        commit=adapter.commit,
        base_model=adapter.config.base_model,
        ranks=adapter.ranks,
        scaling=(min(scaling), max(scaling)),
        lora_alpha=adapter.config.lora_alpha,
        use_rslora=adapter.config.use_rslora,
        leaves=tuple(sorted({leaf(name) for name in adapter.modules})),
        modules=len(adapter.targets),
        parameters=sum(f.lora_A.numel() + f.lora_B.numel() for f in factors),
        dtype=dtype_name(adapter.dtype),
        norm=_length(factors),
        lora_bias=adapter.config.lora_bias,
        modules_to_save=tuple(adapter.saved),
        convolutions=tuple(kernels_of([adapter])),
        task_type=adapter.config.task_type,
    )
