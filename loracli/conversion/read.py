"""What a conversion reads: the adapter with its own features, DoRA's magnitudes and the adapter as it was before the
training, where there is one; and the base model's weights, one at a time, without loading the model.

A model's parameter goes by three names in the files that people publish: its own, its own without the model's prefix
(`h.0.attn.c_attn.weight` for `transformer.h.0.attn.c_attn.weight`), or, if it is tied, that of the parameter that it
is tied to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loracli.adapters.adapter import LoraAdapter, build_adapter, kernels_of, may_have_any_shape, sort_tensors, take_name
from loracli.adapters.config import read_config
from loracli.adapters.names import parse_tensor_name, whole_parameter
from loracli.algebra.factors import Factors
from loracli.errors import BaseModelMismatch, IncompatibleAdapters, MalformedAdapter, UnsupportedAdapter, UsageError
from loracli.hub.fetch import Fetched, fetch_adapter
from loracli.hub.references import Named
from loracli.model.checkpoint import StoredTensor, read_checkpoint
from loracli.progress import SILENT, Progress
from loracli.system.files import CONFIG_FILE, TENSOR_FILE
from loracli.system.tensor_file import FLOATS, open_tensor_file


class BaseWeights:
    """Reads a base model's parameters by name."""

    def __init__(self, folder: Path, *, prefix: str = "", tied: Mapping[str, str] | None = None) -> None:
        """Reads the headers of the files.

        Args:
            folder: with one safetensors file, or several and their index.
            prefix: transformers' `base_model_prefix`, which files may leave out.
            tied: name of a tied parameter -> name of the one that it is tied to.
        Raises:
            BaseModelMismatch: if there are no safetensors, or they or the index are damaged.
        """
        self._prefix, self._tied = prefix, dict(tied or {})
        self._checkpoint = read_checkpoint(folder)

    def __contains__(self, name: str) -> bool:
        return self._stored(name) is not None

    def tied(self, name: str) -> str | None:
        """Another parameter that is the same tensor, None if there is none."""
        others = {target: name for name, target in self._tied.items()}
        return self._tied.get(name) or others.get(name)

    def read(self, name: str) -> Tensor:
        """The parameter, in the dtype it is stored in.

        Raises:
            BaseModelMismatch: if the files lack it, it is no floating point tensor of 16 bits or more, or it holds an
                infinite value or NaN.
        """
        stored = self._stored(name)
        if stored is None:
            raise BaseModelMismatch(
                f"the base model has no tensor {name!r} in its files",
                where=str(self._checkpoint.folder),
                hint="save the base once with transformers' save_pretrained, which gives its tensors their own names",
            )
        path = self._checkpoint.folder / stored.shard
        if stored.dtype not in FLOATS:
            raise BaseModelMismatch(
                f"the base model's {name!r} has dtype {stored.dtype}",
                where=str(path),
                hint="give the unquantised model with --base",
            )
        tensor = self._checkpoint.read(stored).view(FLOATS[stored.dtype]).view(stored.shape)
        if not torch.isfinite(tensor).all():
            raise BaseModelMismatch(f"the base model's {name!r} holds infinite or undefined values", where=str(path))
        return tensor

    def _stored(self, name: str) -> StoredTensor | None:
        tensors = self._checkpoint.tensors
        for wanted in filter(None, (name, self._tied.get(name))):
            bare = wanted.removeprefix(f"{self._prefix}.")
            for candidate in (wanted, bare, f"{self._prefix}.{wanted}"):
                if candidate in tensors:
                    return tensors[candidate]
        return None


# Folders that PEFT's examples save the initial adapter to, inside that of the training.
_INITIAL_FOLDERS = ("pissa_init", "olora_init", "corda_init", "loraga_init")


@dataclass(frozen=True)
class Convertible:
    """An adapter with what is needed to convert it.

    Args:
        adapter: its factors.
        magnitudes: m (out,) of DoRA by module, for every module or for none.
        initial: the adapter as it was before the training; None if there is none.
    """

    adapter: LoraAdapter
    magnitudes: Mapping[str, Tensor]
    initial: LoraAdapter | None

    @property
    def trained(self) -> tuple[LoraAdapter, ...]:
        """All that was read."""
        return (self.adapter,) if self.initial is None else (self.adapter, self.initial)


def read_convertible(reference: Named, initial: Named | None = None, *, progress: Progress = SILENT) -> Convertible:
    """Reads an adapter, and the initial one if it is given or lies in one of `_INITIAL_FOLDERS` beside a local one.

    Raises:
        MalformedAdapter, UnsupportedAdapter: as `read_adapter`, for what cannot be converted either.
        IncompatibleAdapters: if the initial adapter is not of the same modules, ranks and scalings.
        UsageError: if the initial adapter is the adapter itself.
    """
    adapter, magnitudes = read_trained(fetch_adapter(reference, progress=progress), progress=progress)
    if initial is None and adapter.config.initialisation is not None and adapter.commit is None:
        found = [name for name in _INITIAL_FOLDERS if (adapter.path / name / CONFIG_FILE).is_file()]
        if len(found) == 1:
            initial = str((adapter.path / found[0]).resolve())
            progress.note(f"the adapter before its training: {Path(reference) / found[0]}")
    if initial is None:
        return Convertible(adapter, magnitudes, None)
    before, _ = read_trained(fetch_adapter(initial, progress=progress))  # an update of zero is nothing odd there
    _check_initial(adapter, before)
    return Convertible(adapter, magnitudes, before)


def read_trained(fetched: Fetched, *, progress: Progress = SILENT) -> tuple[LoraAdapter, dict[str, Tensor]]:
    """The adapter, and its magnitudes by module."""
    config = read_config(fetched.path / CONFIG_FILE, convertible=True)
    where = str(fetched.path / TENSOR_FILE)
    kept = {"lora_bias": config.lora_bias, "target_parameters": config.target_parameters}
    _refuse_kept(next((name for name, value in kept.items() if value), None), fetched)
    names: dict[str, str] = {}  # of the magnitudes, by module
    others: list[str] = []

    def sort(found: Iterable[str]) -> None:
        for name in sorted(found):
            if config.use_dora and whole_parameter(name) is None:
                parsed = parse_tensor_name(name, where=where)
                if parsed.part == "lora_magnitude_vector":
                    take_name(names, parsed.module, name, where)
                    continue
            others.append(name)
        sort_tensors(others, where, config)

    file = open_tensor_file(fetched.path / TENSOR_FILE, check_names=sort, any_shape=may_have_any_shape)
    opened = build_adapter(fetched, config, file, others)
    _refuse_kept("modules_to_save" if opened.saved else None, fetched)
    for warning in opened.warnings:
        progress.warn(warning)
    adapter = opened.loaded()
    convolution = next(iter(kernels_of([adapter])), None)
    if convolution is not None:
        raise UnsupportedAdapter(
            f"{convolution!r} is a convolution, and only adapters of linear layers and embeddings are converted",
            where=where,
            hint="train a plain LoRA",
        )
    with file.reader() as reader:
        magnitudes = {module: reader.read(name) for module, name in names.items()}
    if config.use_dora:
        _check_magnitudes(adapter, magnitudes, where)
    return adapter, magnitudes


def _refuse_kept(feature: str | None, fetched: Fetched) -> None:
    if feature is not None:
        raise UnsupportedAdapter(
            f"has {feature}, which a plain LoRA does not have, and is to be converted into one",
            where=str(fetched.path / CONFIG_FILE),
            hint=f"train the adapter without {feature}",
        )


def _check_magnitudes(adapter: LoraAdapter, magnitudes: Mapping[str, Tensor], where: str) -> None:
    if magnitudes.keys() != adapter.modules.keys():
        odd = min(magnitudes.keys() ^ adapter.modules.keys())
        raise MalformedAdapter(f"{odd!r} does not have both factors and a magnitude", where=where)
    for name, module in adapter.modules.items():
        if tuple(magnitudes[name].shape) != (module.factors.out_features,):
            raise MalformedAdapter(
                f"{name!r} has a magnitude {tuple(magnitudes[name].shape)} for {module.factors.out_features} outputs",
                where=where,
            )


def _check_initial(adapter: LoraAdapter, initial: LoraAdapter) -> None:
    if adapter.sha256[TENSOR_FILE] == initial.sha256[TENSOR_FILE]:
        raise UsageError(f"{initial.reference} is the adapter itself, not what it was before its training")
    for name in sorted(adapter.modules.keys() | initial.modules.keys()):
        ours, theirs = adapter.modules.get(name), initial.modules.get(name)
        same = ours is not None and theirs is not None and _form(ours.factors) == _form(theirs.factors)
        if not same:
            raise IncompatibleAdapters(
                f"{initial.reference} is not {adapter.reference} before its training: they differ in the rank, shape "
                f"or scaling of {name}",
                hint="an adapter that PEFT has converted already has twice the rank; that one is a plain LoRA",
            )


def _form(factors: Factors) -> tuple[int, int, int, float]:
    return factors.rank, factors.in_features, factors.out_features, factors.scaling
