"""The files of one adapter directory, as planned: tensors module by module, config, card and record."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracli._version import __version__
from loracli.adapters.claims import head_size
from loracli.algebra.factors import Factors
from loracli.algebra.packing import pack
from loracli.composition.card import EXPORT_FORMAT, EXPORT_SCHEMA, Certificate, ModuleCertificate, closed
from loracli.composition.composition import Composition
from loracli.errors import IntegrityError, UsageError
from loracli.export.activations import Moments
from loracli.export.card import model_card
from loracli.export.gguf import write_gguf
from loracli.export.module import ModuleExport, module_export
from loracli.export.plan import TASK, ExportPlan
from loracli.export.refit import Refitted, write_cores
from loracli.export.request import ExportRequest
from loracli.progress import Progress
from loracli.system.document import dtype_name
from loracli.system.files import CERTIFICATE_FILE, CONFIG_FILE, CORES_FILE, GGUF_FILE, README_FILE, write_file
from loracli.system.machine import in_order
from loracli.system.tensor_file import open_tensor_file, write_tensors


def write(
    plan: ExportPlan,
    composition: Composition,
    request: ExportRequest,
    folder: Path,
    *,
    moments: Moments | None,
    refitted: Refitted | None,
    progress: Progress,
    workers: int,
) -> tuple[Certificate, int]:
    """Writes every file into an empty directory; returns the certificate and the bytes of the tensor file.

    Args:
        plan: of these files.
        composition: what is exported.
        request: how.
        folder: the directory.
        moments: G of each module that its cut goes by, None to cut by |dW|_F.
        refitted: the cores of the cut, None where they were not fitted.
        progress: told of every module.
        workers: modules that are worked on at once.
    Raises:
        UsageError: if a value overflows the output's dtype.
        IntegrityError: if an ingredient changes meanwhile, or what was written reads back otherwise.
    """
    by_module: Mapping[str, Tensor] = {} if moments is None else moments.by_module
    cores: Mapping[str, Tensor] = {} if refitted is None else refitted.cores

    def made(name: str) -> ModuleExport:
        if name in plan.held:
            return plan.held[name]
        cut, moment, core = plan.cuts.get(name), by_module.get(name), cores.get(name)
        return module_export(composition, name, plan.dtype, rank=cut, moment=moment, refit=core)

    path = folder / plan.layout.tensor_file
    certificate = _write_tensors(path, plan, composition, made, progress, workers)
    hashes = {plan.layout.tensor_file: certificate.sha256}
    if plan.llama_cpp is not None:
        hashes[GGUF_FILE] = write_gguf(folder / GGUF_FILE, plan.llama_cpp, plan.gguf, path, plan.places)
    if cores:
        hashes[CORES_FILE] = write_cores(folder / CORES_FILE, cores)
    options = _repeated_options(plan, composition, request, moments, refitted)
    saved = composition.saved
    card = model_card(
        composition.card(),
        plan.layout,
        certificate,
        merged=plan.merged,
        options=options,
        labels=None if saved is None else head_size(saved.shapes),
    )
    config = plan.layout.config(composition.base.id, plan.modules)
    texts = {CONFIG_FILE: _json(config), README_FILE: card.encode()}
    for name, data in texts.items():
        write_file(folder / name, data)
    document = {
        EXPORT_FORMAT: EXPORT_SCHEMA,
        **composition.document(),
        "versions": {"loracat": __version__, "torch": torch.__version__},
        "export": {
            "profile": plan.layout.profile,
            "merged": plan.merged,
            "rank": plan.layout.rank,
            "dtype": dtype_name(plan.dtype),
            **_decided(request, moments),
            **({"refit": True} if cores else {}),
            "options": options,
        },
        **({} if refitted is None else {"refit": dataclasses.asdict(refitted.record)}),
        "certificate": {
            "sha256": hashes,
            "largest_relative_error": certificate.largest_error,
            "modules": [dataclasses.asdict(module) for module in certificate.modules],
        },
        "text_sha256": {name: sha256(data).hexdigest() for name, data in texts.items()},
    }
    write_file(folder / CERTIFICATE_FILE, _json(closed(document)))
    progress.finish(TASK)
    return certificate, path.stat().st_size


def _write_tensors(
    path: Path,
    plan: ExportPlan,
    composition: Composition,
    made: Callable[[str], ModuleExport],
    progress: Progress,
    workers: int,
) -> Certificate:
    """Writes the tensor file, one module in memory after the other, and reads it back while it goes to the disk."""
    certificates: list[ModuleCertificate] = []
    hashes: list[str] = []
    factors: dict[str, Factors] = {}  # of the module being written
    order = dict.fromkeys(plan.places[name].module for name in sorted(plan.places))  # that tensors are asked for in
    work = in_order(lambda module: _module(plan, module, made), order, workers=workers)

    def tensor(name: str) -> Tensor:
        if name in plan.whole:
            return _saved_parameter(plan, composition, plan.whole[name])
        place = plan.places[name]
        if place.module not in factors:
            factors.clear()
            factors[place.module], updates = next(work)
            certificates.extend(updates)
            progress.advance(TASK, sum(update.name not in plan.held for update in updates))
        return place.tensor_of(factors[place.module])

    write_tensors(path, plan.shapes, plan.dtype, tensor, meanwhile=lambda: hashes.append(_read_back(path, plan)))
    return Certificate(tuple(certificates), *hashes)


def _module(
    plan: ExportPlan, name: str, made: Callable[[str], ModuleExport]
) -> tuple[Factors, tuple[ModuleCertificate, ...]]:
    """The factors of a module, of all experts of a parameter or all groups of a convolution, as they go into the file,
    with a certificate for each update; none where it only pads the layout."""
    layout, rank = plan.layout, plan.layout.ranks[name]
    updates = layout.updates_of(name)
    if updates[0] not in plan.ranks:
        module = plan.modules[name]
        zeros = Factors(torch.zeros(rank, module.in_features), torch.zeros(module.out_features, rank))
        return zeros.to(plan.dtype), ()
    several = [made(update) for update in updates]
    packed = pack(layout.kind(name).packing, [one.factors for one in several], rank)
    return packed, tuple(one.certificate for one in several)


def _saved_parameter(plan: ExportPlan, composition: Composition, path: str) -> Tensor:
    assert composition.saved is not None
    written = composition.saved.read(path).to(plan.dtype)
    if not bool(torch.isfinite(written).all()):
        raise UsageError(f"{path} overflows {plan.dtype}", hint="export with --dtype float32 or bfloat16")
    return written


def _read_back(path: Path, plan: ExportPlan) -> str:
    """The sha256 of the file, after all of it has been read: finite tensors of the planned shapes."""
    file = open_tensor_file(path, any_shape=lambda name: len(plan.shapes.get(name, ())) != 2)
    if file.shapes != plan.shapes:
        raise IntegrityError(f"{path.name} reads back with other shapes than were written")
    return file.sha256


def _decided(request: ExportRequest, moments: Moments | None) -> dict[str, float | int | str | None]:
    """What decided on ranks and cuts, by the name of its option."""
    if request.activation_aware:
        return {"activation_aware": True, "moments": None if moments is None else moments.origin}
    return {**request.rank_rule}


def _repeated_options(
    plan: ExportPlan,
    composition: Composition,
    request: ExportRequest,
    moments: Moments | None,
    refitted: Refitted | None,
) -> str:
    """Those of the command that concern compression, dtype and layout. FILE is fitted on, HELD_OUT is not; a method
    that searches names its FILE itself."""
    searched = composition.method is not None and composition.method.needs_records
    apart = refitted is not None and not refitted.record.divided
    fitted = apart or (moments is not None and moments.origin == "records")
    words = [" --merge"] if request.merge else []
    words += [" --activation-aware"] if request.activation_aware else []
    words += [] if refitted is None else [" --refit"]
    words += [" --fit-data FILE"] if fitted and not searched else []
    if apart:
        words.append(" --data HELD_OUT")
    elif refitted is not None and not fitted and not searched:
        words.append(" --data FILE")
    rank = plan.rank if request.merge else request.rank
    decided = request.rank_rule.items() or [("rank", rank)]
    for name, value in (*decided, ("dtype", request.dtype), ("profile", request.profile)):
        words += [] if value is None else [f" --{name} {value}"]
    words += [" --gguf"] if request.gguf else []
    return "".join(words)


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
