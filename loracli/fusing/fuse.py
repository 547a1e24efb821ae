"""A composition folded into the base model: files in, a model directory with its card out.

The same files as the base's, with W + dW in the place of W. One pass over its weights, each file in blocks of rows, one
rounding (`stream.py`). Whole or not at all, the same bytes for the same inputs; stopped at any moment, it goes on where
it was (`workplace.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from loracli._version import __version__
from loracli.adapters.names import target_of
from loracli.composition.card import CardText, closed
from loracli.composition.composition import Composition
from loracli.errors import BaseModelMismatch, UsageError
from loracli.export.card import front_matter
from loracli.export.request import OUTPUT_DTYPES, ExportRequest, check_form
from loracli.fitting.reach import taken_text
from loracli.fusing.composition import FuseRequest, bypassed_modules, compose_on_base, planned_fusion
from loracli.fusing.plan import FusedTensor, FusionPlan
from loracli.fusing.quantised import Quantisation, read_quantisation
from loracli.fusing.stream import (
    Fold,
    Hashes,
    Replacement,
    make_fold,
    make_replacement,
    precision_for,
    update_of,
    write_shard,
)
from loracli.fusing.workplace import (
    CONFIG,
    FUSE_CERTIFICATE,
    Workplace,
    check_model_free,
    config_bytes,
    index_bytes,
    open_workplace,
    other_files,
    read_config,
)
from loracli.hub.references import is_hub_id
from loracli.model.base import BasePlan, plan_base
from loracli.model.checkpoint import INDEX_FILE, Checkpoint, read_checkpoint, tied_parameters
from loracli.model.modules import check_base_copies, stored_weights
from loracli.progress import SILENT, Bar, Progress, amount_text, drawn, takes_bar
from loracli.recipe.recipe import check_recipe_there
from loracli.system.display import count_text, names_text, path_text, repr_line
from loracli.system.document import dtype_name
from loracli.system.escaping import markdown_code
from loracli.system.files import ANOTHER_NAME, copy_file, flush, holds, told_in_dry_run, write_file
from loracli.system.machine import one_thread_each
from loracli.system.tensor_file import FLOATS


def fused_card(
    text: CardText,
    base_id: str,
    dtypes: Sequence[str],
    *,
    converted: bool,
    untied: bool,
    dequantised: str | None = None,
    replaced: Sequence[str] = (),
    bypassed: Sequence[str] = (),
) -> str:
    """README.md of the fused model.

    Args:
        text: of the composition.
        base_id: the base.
        dtypes: of the changed tensors.
        converted: whether all weights have another dtype than in the base.
        untied: whether a tied matrix became two.
        dequantised: how the base was quantised, None if it was not.
        replaced: modules that adapters saved whole.
        bypassed: modules whose update was left out.
    """
    name = markdown_code(base_id)
    computed = [f"The base is quantised ({dequantised}): its weights are what its numbers and scales stand for.", ""]
    tied = [
        "The base used one matrix as embedding and as head; here they are two, as only one of them is changed.",
        "",
    ]
    return "\n".join(
        [
            *front_matter(base_id, "merge", "transformers"),
            f"# {name} with {text.adapters} LoRA adapter{'s' if text.adapters > 1 else ''} folded in",
            "",
            f"The weights of {name}, with the update of every adapted module added. No adapter is needed.",
            *text.how,
            f"Made with loracat {markdown_code(text.version)}.",
            "",
            "## Ingredients",
            "",
            *text.ingredients,
            *text.results,
            *text.unguarded,
            "## Exactness",
            "",
            f"Every changed weight is the sum of base and update, rounded once to {' or '.join(dtypes)};",
            f"every other is the base's own, {'rounded to the same' if converted else 'byte for byte'}.",
            "",
            *(computed if dequantised else []),
            *(tied if untied else []),
            *(
                [f"As an adapter saved them whole, and not as the base has them: {_code(replaced)}.", ""]
                * bool(replaced)
            ),
            *([*_left_out(base_id, bypassed), ""] if bypassed else []),
            "## Use",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM",
            'model = AutoModelForCausalLM.from_pretrained("path/to/this/model")',
            "```",
            "",
            "What it was made of, with commits and hashes, is in",
            f"`{FUSE_CERTIFICATE}`; `loracat verify` computes it again.",
            "",
        ]
    )


def _left_out(base_id: str, bypassed: Sequence[str]) -> list[str]:
    return [
        f"{markdown_code(base_id)} reads the weight of these modules without calling the layer, so that PEFT ignores",
        f"their update. It is left out here: {_code(bypassed)}.",
    ]


def _code(names: Sequence[str]) -> str:
    return ", ".join(map(markdown_code, names))


_FUSE_SCHEMA = 1
_TASK = "fuse"
_MOST_WORKERS = 4  # blocks that are folded at once


@dataclass(frozen=True)
class Fused:
    """What a fusion wrote.

    Args:
        path: the directory.
        base_id: the base model.
        modules: that were changed; the experts of a parameter count as one.
        shards: files of weights.
        resumed: how many of them an earlier run had finished.
        size_bytes: of the weights.
        dtypes: of the changed tensors.
        untied: whether a tied matrix became two.
        dequantised: how the base was quantised whose weights were computed, None of one that was not.
        left_behind: names in the base's directory that did not come along.
        replaced: modules that adapters saved whole, in the place of the base's.
        bypassed: modules whose update was left out, as the model reads their weight without calling the layer.
    """

    path: Path
    base_id: str
    modules: int
    shards: int
    resumed: int
    size_bytes: int
    dtypes: tuple[str, ...]
    untied: bool
    dequantised: str | None
    left_behind: tuple[str, ...]
    replaced: tuple[str, ...] = ()
    bypassed: tuple[str, ...] = ()

    def __repr__(self) -> str:
        base = self.base_id if is_hub_id(self.base_id) else path_text(Path(self.base_id))
        files, size = count_text(self.shards, "file"), amount_text(self.size_bytes, "B")
        return repr_line(
            self,
            path_text(self.path),
            f"base {names_text([base])}",
            f"{count_text(self.modules, 'module')} changed",
            files,
            size,
        )


@takes_bar
def fuse_model(
    request: FuseRequest,
    output: str | Path,
    *,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    progress: Progress | Bar = SILENT,
) -> Fused:
    """Writes the base model with the composition folded into its weights.

    Args:
        request: what is folded into which base, and how.
        output: the directory to make.
        force: replace an existing fused model.
        resume: go on with a fusion that was stopped.
        dry_run: write nothing, only tell what would be.
        progress: told how far it is.
    Raises:
        OutputExists: if `output` is taken, before any work.
        BaseModelMismatch: if base and composition do not fit, or a weight of the base cannot be found, by name.
        OutOfResources: if there is not enough room on the disk, before anything is written.
        StateMismatch: with `resume`, if the interrupted fusion had other inputs.
        IntegrityError: if an ingredient or the recorded base is not the one that was recorded.
    """
    progress = drawn(progress)
    output = Path(output)
    dtype, dequantise = request.dtype, request.dequantise
    check_form(ExportRequest(request.recipe, request.adapters, request.weights, request.method, dtype=dtype))
    check_recipe_there(request.recipe)
    if not resume:
        with told_in_dry_run(dry_run, "the fusion", progress):
            check_model_free(output, force=force)
    planned, composition = compose_on_base(request, progress=progress)
    quantisation = _quantisation_of(planned.reference.path) if dequantise else None
    chosen = OUTPUT_DTYPES[dtype or "bfloat16"] if dequantise or dtype is not None else None
    fusion = _Fusion(composition, planned, chosen, quantisation, output, progress)
    if dry_run:
        return fusion.result()
    with (
        open_workplace(output, fusion.identity(), force=force, resume=resume, progress=progress) as place,
        one_thread_each() as threads,
    ):
        return fusion.write(place, workers=min(threads, _MOST_WORKERS))


def _quantisation_of(folder: Path) -> Quantisation:
    """Of the base model in a directory.

    Raises:
        UsageError: if it is not quantised.
        BaseModelMismatch: if it is in a way that is not read here.
    """
    found = read_quantisation(read_config(folder), folder / CONFIG)
    if found is None:
        raise UsageError(f"the base model in {folder} is not quantised", hint="leave out --dequantise")
    return found


class _Fusion:
    """One fusion: what is planned, and what is known of the files that are finished."""

    def __init__(
        self,
        composition: Composition,
        base: BasePlan,
        dtype: torch.dtype | None,
        quantisation: Quantisation | None,
        output: Path,
        progress: Progress,
    ) -> None:
        self._quantisation = quantisation
        self._composition, self._base, self._dtype = composition, base, dtype
        self._output, self._progress = output, progress
        folder = base.reference.path
        for path, what in [(a.path, f"the ingredient {a.reference}") for a in self._composition.adapters] + [
            (folder, "the base model")
        ]:
            if holds(output, path):
                raise UsageError(f"{output} holds {what}", hint=ANOTHER_NAME)
        self._checkpoint: Checkpoint = read_checkpoint(folder)
        self._bypassed = bypassed_modules(base.reference, self._composition, progress)
        if self._bypassed:
            progress.warn(
                f"{taken_text(base.reference.id, self._bypassed)}: their updates are left out, as PEFT and the fit "
                "ignore them"
            )
        self._plan: FusionPlan = planned_fusion(
            self._checkpoint, base, self._composition, dtype, quantisation, bypassed=self._bypassed
        )
        check_base_copies(self._composition.adapters, stored_weights(self._checkpoint, base.skeleton))
        self._config = config_bytes(folder, untied=self._plan.untied, dtype=dtype, quantisation=quantisation)
        self._taken, self._left = other_files(self._checkpoint)
        if self._plan.untied:
            self._check_untied()

    def identity(self) -> dict[str, str]:
        """What the bytes of the result depend on."""
        checkpoint = hashlib.sha256()
        for name, shard in self._checkpoint.shards.items():
            checkpoint.update(f"{name}:{len(shard.header)}:".encode() + shard.header)
        adapters = json.dumps([dict(adapter.sha256) for adapter in self._composition.adapters], sort_keys=True)
        return {
            "composition": _sha256(json.dumps(self._composition.document(), sort_keys=True).encode()),
            "adapters": _sha256(adapters.encode()),
            "base config": _sha256((self._checkpoint.folder / CONFIG).read_bytes()),
            "base weights": checkpoint.hexdigest(),
            "dtype": str(self._dtype),
            "dequantise": str(self._quantisation is not None),
            "bypassed": ",".join(self._bypassed),
            "loracat": __version__,
            "torch": torch.__version__,
        }

    def write(self, place: Workplace, *, workers: int) -> Fused:
        if place.done():
            place.drop()
            return self.result(resumed=len(self._plan.shards))
        finished = self._finished(place)
        waiting = [shard for shard in self._plan.shards if shard.name not in finished]
        folder = self._checkpoint.folder
        place.room_for(
            sum(shard.size for shard in waiting) + sum((folder / name).stat().st_size for name in self._taken)
        )
        total = sum(tensor.source.size for shard in waiting for tensor in shard.tensors)
        self._progress.begin(_TASK, total, "B")
        for shard in waiting:
            path = place.folder / shard.name
            partial = path.with_name(f".{path.name}.part")
            for leftover in (partial, path):
                leftover.unlink(missing_ok=True)
            finished[shard.name] = write_shard(
                self._checkpoint.shards[shard.name],
                shard,
                partial,
                self._fold_of,
                lambda quantised: quantised.decoder(self._checkpoint),
                lambda size: self._progress.advance(_TASK, size),
                workers=workers,
            )
            partial.rename(path)
            place.finish(shard.name, finished[shard.name])
        self._progress.finish(_TASK)
        certificate = self._write_others(place, finished)
        flush(place.folder)
        place.complete(_sha256(certificate))
        return self.result(resumed=len(self._plan.shards) - len(waiting))

    def _finished(self, place: Workplace) -> dict[str, Hashes]:
        found = {
            shard.name: place.finished(shard.name, self._checkpoint.shards[shard.name].path)
            for shard in self._plan.shards
        }
        return {name: hashes for name, hashes in found.items() if hashes is not None}

    def _fold_of(self, tensor: FusedTensor) -> Fold | Replacement | None:
        if tensor.replaced is not None:
            assert self._composition.saved is not None
            return make_replacement(
                tensor.replaced, self._composition.saved.read(tensor.replaced), FLOATS[tensor.dtype]
            )
        try:
            update = update_of(self._composition, tensor)
        except ValueError as error:  # a method that these adapters do not suit
            raise UsageError(f"the composition cannot be computed: {error}", hint="choose another --method") from None
        if update is None:
            return None
        precision = torch.float64 if tensor.quantised is not None else precision_for(FLOATS[tensor.dtype])
        return make_fold(*update, precision)

    def _write_others(self, place: Workplace, finished: dict[str, Hashes]) -> bytes:
        """Everything beside the weights; returns the certificate, which is written last."""
        for entry in place.folder.iterdir():
            if entry.name not in finished:
                entry.unlink()
        folder, index = self._checkpoint.folder, index_bytes(self._checkpoint, self._plan)
        contents = {CONFIG: self._config, **({} if index is None else {INDEX_FILE: index})}
        card = fused_card(
            self._composition.card(),
            self._base.reference.id,
            changed_dtypes(self._plan),
            converted=self._dtype is not None,
            dequantised=None if self._quantisation is None else self._quantisation.method,
            untied=self._plan.untied,
            replaced=self._replaced(),
            bypassed=self._bypassed,
        )
        contents["README.md"] = card.encode()
        for name, data in sorted(contents.items()):
            write_file(place.folder / name, data)
        files = {
            **{name: hashes.fused for name, hashes in finished.items()},
            **{name: _sha256(data) for name, data in contents.items()},
            **{name: copy_file(folder / name, place.folder / name) for name in self._taken},
        }
        certificate = self._certificate(dict(sorted(files.items())), finished)
        write_file(place.folder / FUSE_CERTIFICATE, certificate)
        return certificate

    def _certificate(self, files: dict[str, str], finished: dict[str, Hashes]) -> bytes:
        reference = self._base.reference
        config = _sha256((self._checkpoint.folder / CONFIG).read_bytes())
        content: dict[str, Any] = {
            "loracat_fuse": _FUSE_SCHEMA,
            "composition": self._composition.document(),
            "fuse": {
                "base": {
                    "id": reference.id,
                    "commit": reference.commit,
                    "sha256": {CONFIG: config, **{name: hashes.base for name, hashes in sorted(finished.items())}},
                },
                "dtype": None if self._dtype is None else dtype_name(self._dtype),
                "untied": self._plan.untied,
                **({} if self._quantisation is None else {"dequantised": self._quantisation.method}),
                **({"bypassed": self._bypassed} if self._bypassed else {}),
                "versions": {"loracat": __version__, "torch": torch.__version__},
            },
            "certificate": {
                "modules": {
                    tensor.changes: tensor.name
                    for shard in self._plan.shards
                    for tensor in shard.tensors
                    if tensor.module is not None
                },
                **({"replaced": replaced} if (replaced := self._plan.replaced) else {}),
                "files": files,
            },
        }
        return (json.dumps(closed(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()

    def _check_untied(self) -> None:
        """Whether the config that will be written lets the model keep its two matrices apart."""
        with TemporaryDirectory() as folder:
            (Path(folder) / CONFIG).write_bytes(self._config)
            tied = tied_parameters(plan_base(replace(self._base.reference, path=Path(folder))).skeleton)
        for shard in self._plan.shards:
            for tensor in shard.tensors:
                parameter = tensor.replaced or f"{tensor.module}.weight"
                if len(tied.get(parameter, ())) > 1:
                    raise BaseModelMismatch(
                        f"the change of {parameter} needs a tensor of its own, and this model ties it whatever its "
                        "config says",
                        hint="serve the update as an adapter: loracat export",
                    )

    def _replaced(self) -> tuple[str, ...]:
        return () if self._composition.saved is None else self._composition.saved.modules

    def result(self, *, resumed: int = 0) -> Fused:
        """What is there once all is written."""
        return Fused(
            path=self._output,
            base_id=self._base.reference.id,
            modules=len({target_of(name) for name in self._composition.names()} - {*self._bypassed}),
            shards=len(self._plan.shards),
            resumed=resumed,
            size_bytes=sum(shard.size for shard in self._plan.shards),
            dtypes=changed_dtypes(self._plan),
            untied=self._plan.untied,
            dequantised=None if self._quantisation is None else self._quantisation.method,
            left_behind=tuple(self._left),
            replaced=self._replaced(),
            bypassed=self._bypassed,
        )


def changed_dtypes(plan: FusionPlan) -> tuple[str, ...]:
    """Of the tensors that a fusion changes, for its card."""
    changed = {
        FLOATS[tensor.dtype]
        for shard in plan.shards
        for tensor in shard.tensors
        if tensor.module is not None or tensor.replaced is not None
    }
    return tuple(sorted(dtype_name(dtype) for dtype in changed))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
