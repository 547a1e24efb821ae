"""The cores of a cut that was refitted, and the file that keeps them beside the export.

    dW' = B' M A'        A' (k, in), B' (out, k) of the cut; M (k, k), fitted on calibration records

Only B' M and A' can be seen in the adapter's own file, and B' alone can be computed again from the ingredients: with M
at hand `loracat verify` computes both. The file is a safetensors file, `<module>.core` in float64, whose name does not
end that way, as servers read every file of a directory that does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from loracli.adapters.adapter import kernels_of
from loracli.adapters.names import is_numbered
from loracli.algebra.factors import Factors
from loracli.composition.composition import MethodSource, Source
from loracli.errors import IntegrityError, MalformedAdapter, UnsupportedAdapter, UsageError
from loracli.system.tensor_file import open_tensor_file, write_tensors

_METADATA = {"format": "loracat_refit"}
_SUFFIX = ".core"


@dataclass(frozen=True)
class RefitFile:
    """A file of the records: name, sha256, and how many of its records there are."""

    name: str
    sha256: str
    records: int


@dataclass(frozen=True)
class RefitLoss:
    """Nats per scored token on held-out records, which neither fitted nor chose.

    Args:
        records: how many.
        scored_tokens: in them.
        composition: of the exact composition.
        truncated: of the cut, rounded as it is written.
        refitted: of what is written: the refitted cut, or the cut itself where it was kept.
        interval: 95 % bootstrap interval of refitted minus truncated over records.
    """

    records: int
    scored_tokens: int
    composition: float
    truncated: float
    refitted: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class RefitRecord:
    """How the cores were found.

    Args:
        data: the files that were fitted on, or divided.
        divided: whether the held-out records are a share of them.
        held_out: the files that the held-out records come from.
        kept: what is written: `refit`, or `truncation` where the refit was not clearly better.
        numbers: how many were fitted.
        gain: of the refit over the cut on the validation records, nats per token.
        standard_error: of the gain, paired over records.
        ridge: towards the identity, of the stage that won; None where none beat the identity.
        passes: over the training records that were spent.
        loss: on the held-out records.
        stopped: why the search ended early, None if it did not.
    """

    data: tuple[RefitFile, ...]
    divided: bool
    held_out: str
    kept: str
    numbers: int
    gain: float
    standard_error: float
    ridge: float | None
    passes: float
    loss: RefitLoss
    stopped: str | None = None


@dataclass(frozen=True)
class Refitted:
    """What a refit found: M (k, k) in float64 of each module, none where the cut itself is kept."""

    record: RefitRecord
    cores: Mapping[str, Tensor]


class Refit(Protocol):
    """Fits the cores of a cut."""

    def __call__(self, source: Source, cut: Mapping[str, Factors], dtype: torch.dtype) -> Refitted:
        """`cut` is the cut of each module, sqrt(S) on both sides, and `dtype` that of the output."""


def check_refit(*, refit: bool, fit_data: object, data: object, merge: bool) -> None:
    """Refuses a refit of what was not cut, one without records, and records that nothing is done with.

    Raises:
        UsageError: naming the way out.
    """
    if refit and not merge:
        raise UsageError("--refit is for --merge; a concatenation is exact already", hint="add --merge")
    if refit and fit_data is None and data is None:
        raise UsageError("--refit needs calibration records", hint="give them with --data FILE")
    if data is not None and not refit:
        raise UsageError("records to refit on have no use without --refit", hint="add --refit")


def check_refittable(source: Source) -> None:
    """Refuses a composition whose cut has no core of its own to fit.

    Raises:
        UsageError: naming what stands in the way.
    """
    biased = next((adapter.reference for adapter in source.adapters if adapter.config.lora_bias), None)
    if biased is not None:
        raise UsageError(f"{biased} has lora_bias, which --refit cannot weigh", hint="leave out --refit")
    convolution = next(iter(kernels_of(source.adapters)), None)
    if convolution is not None:
        raise UsageError(f"the convolution {convolution} has no core that --refit fits", hint="leave out --refit")
    expert = next((name for name in source.names() if is_numbered(name)), None)
    if expert is not None:
        raise UsageError(f"the expert {expert} has no core of its own for --refit", hint="leave out --refit")
    if isinstance(source, MethodSource) and source.weights is None:
        raise UsageError(
            f"--refit is for a recipe or a weighted sum, and {source.method.name} merges the factors themselves",
            hint="leave out --refit, or fit a recipe and refit that",
        )


def write_cores(path: Path, cores: Mapping[str, Tensor]) -> str:
    """Writes the file, with the same bytes for the same cores; returns its sha256."""
    shapes = {name + _SUFFIX: tuple(core.shape) for name, core in cores.items()}
    write_tensors(path, shapes, torch.float64, lambda name: cores[name.removesuffix(_SUFFIX)], metadata=_METADATA)
    return open_tensor_file(path).sha256


def read_cores(path: Path) -> dict[str, Tensor]:
    """The cores of an export by module.

    Raises:
        IntegrityError: if the file cannot be read.
    """
    try:
        file = open_tensor_file(path)
        with file.reader() as reader:
            return {name.removesuffix(_SUFFIX): reader.read(name).double() for name in file.shapes}
    except (MalformedAdapter, UnsupportedAdapter) as error:
        raise IntegrityError(f"the cores of its refit cannot be read: {error.what}", where=str(path)) from None
