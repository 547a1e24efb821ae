"""`verify_directory`: an exported adapter or a fused model, checked as far as its ingredients are at hand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loracli.adapters.claims import TASKS
from loracli.adapters.config import read_fields
from loracli.composition.composition import Composition
from loracli.errors import (
    AccessDenied,
    BaseModelMismatch,
    HubUnreachable,
    InputError,
    IntegrityError,
    MalformedAdapter,
    RecipeError,
)
from loracli.fitting.reach import named
from loracli.fusing.composition import bypassed_modules, planned_fusion
from loracli.fusing.fuse import changed_dtypes, fused_card
from loracli.fusing.plan import FusedTensor, FusionPlan
from loracli.fusing.quantised import read_quantisation
from loracli.fusing.stream import BLOCK_BYTES, WIDENED, replaced_rows, rounding_bounds, update_of
from loracli.fusing.workplace import CONFIG, FUSE_CERTIFICATE, config_bytes, index_bytes, other_files, read_config
from loracli.hub.references import BaseClaim, Named
from loracli.model.base import plan_base
from loracli.model.checkpoint import (
    INDEX_FILE,
    Checkpoint,
    StoredTensor,
    loaded_names,
    read_bytes,
    read_checkpoint,
    tied_parameters,
)
from loracli.model.modules import check_shapes, named_as
from loracli.model.reference import BaseReference, check_config, find_base
from loracli.progress import SILENT, Bar, Progress, drawn, takes_bar
from loracli.recipe.ingredients import fitted_base
from loracli.recipe.recipe import load_recipe
from loracli.system.document import decode, dtype_name
from loracli.system.files import (
    CERTIFICATE_FILE,
    CONFIG_FILE,
    MLX_TENSOR_FILE,
    README_FILE,
    TENSOR_FILE,
    file_sha256,
    open_regular,
)
from loracli.system.strict_json import read_object
from loracli.system.tensor_file import FLOATS
from loracli.verifying.adapter import verify_adapter
from loracli.verifying.findings import UNPROVEN, Findings, Verification, compare_card
from loracli.verifying.origin import COMPOSITION, compose_again, find_ingredients, read_origin, recipe_digest

_TASK = "verify"
_LEFT_BEHIND = {".git", ".gitattributes", ".gitignore", ".DS_Store", ".cache"}  # .cache: what `hf download` keeps


@dataclass(frozen=True)
class _Base:
    """What is recorded of the base."""

    id: str
    commit: str | None
    sha256: dict[str, str]


def _verify_model(
    path: Path,
    findings: Findings,
    *,
    recipe: Path | None,
    adapters: Sequence[Named],
    base: Named | None,
    base_revision: str | None,
    edited_card: bool,
    progress: Progress,
) -> None:
    """Checks a fused model; everything that differs goes into the findings.

    Raises:
        IntegrityError: if the record is damaged, or an ingredient or the base is not the recorded one.
    """
    where = path / FUSE_CERTIFICATE
    document = _read(where)
    files, recorded, dtype, dequantised, recorded_bypassed, version = _read_record(document, where)
    findings.check_record(document, FUSE_CERTIFICATE)
    whole_card = _check_files(path, files, findings, edited_card=edited_card)
    try:
        written = read_checkpoint(path)
        _check_loads(path, recorded, written, findings)
    except (BaseModelMismatch, MalformedAdapter) as error:
        findings.differs(f"it cannot be read as a model: {error}")
        return
    origin = read_origin(document.get("composition"), where)
    given = find_ingredients(origin, findings, recipe=recipe, adapters=adapters, progress=progress)
    if given is None or origin.by_records:
        _leave_card(whole_card, "its ingredients are" if given is None else "its records are", findings)
        return
    if base is None and recorded.commit is None:
        findings.skip(COMPOSITION, f"{recorded.id} was a local directory: say where it is with --base")
        _leave_card(whole_card, "the base is", findings)
        return
    try:
        asked = base or BaseClaim(recorded.id, recorded.commit)
        reference = find_base(given.adapters, asked, revision=base_revision, progress=progress)
    except (HubUnreachable, AccessDenied, InputError) as error:
        if base is not None:
            raise
        findings.skip(COMPOSITION, str(error))
        _leave_card(whole_card, "the base is", findings)
        return
    _check_base(reference, recorded)
    plan = plan_base(reference, dequantised=dequantised is not None)
    composition = compose_again(origin, replace(given, adapters=named_as(plan.skeleton, given.adapters)))
    check_shapes(plan.skeleton, composition.adapters)
    checkpoint = read_checkpoint(reference.path)
    fields = {} if dequantised is None else read_config(reference.path)
    quantisation = read_quantisation(fields, reference.path / CONFIG)
    bypassed = bypassed_modules(reference, composition, progress)
    if bypassed != recorded_bypassed:
        findings.differs(
            f"the record leaves out the updates of {named(recorded_bypassed) or 'no module'}, and PEFT ignores those "
            f"of {named(bypassed) or 'none'}"
        )
    fusion = planned_fusion(checkpoint, plan, composition, dtype, quantisation, bypassed=bypassed)
    config = config_bytes(reference.path, untied=fusion.untied, dtype=dtype, quantisation=quantisation)
    _check_others(path, checkpoint, fusion, config, findings)
    if whole_card:
        card = fused_card(
            composition.card(),
            recorded.id,
            changed_dtypes(fusion),
            converted=dtype is not None,
            untied=fusion.untied,
            dequantised=None if quantisation is None else quantisation.method,
            replaced=() if composition.saved is None else composition.saved.modules,
            bypassed=bypassed,
        )
        compare_card(path, [card], version, composition, findings)
    _check_weights(checkpoint, written, fusion, composition, findings, progress)


def _leave_card(whole: bool, missing: str, findings: Findings) -> None:
    """Of a card that is as recorded, where something that it is made again of is missing."""
    if whole:
        findings.skip(README_FILE, f"{UNPROVEN}, and {missing} not at hand to make it again")


def _read_record(
    document: dict[str, Any], where: Path
) -> tuple[dict[str, str], _Base, torch.dtype | None, str | None, tuple[str, ...], str | None]:
    problems: list[str] = []
    fuse, certificate = document.get("fuse"), document.get("certificate")
    if not isinstance(fuse, dict) or not isinstance(certificate, dict):
        raise IntegrityError("the record is damaged: it lacks fuse or certificate", where=str(where))
    files = decode(dict[str, str], certificate.get("files"), "certificate.files", problems)
    recorded = decode(_Base, fuse.get("base"), "fuse.base", problems)
    names = {dtype_name(dtype): dtype for dtype in FLOATS.values()}
    dtype = decode(str | None, fuse.get("dtype"), "fuse.dtype", problems)
    if dtype is not None and dtype not in names:
        problems.append("fuse.dtype: unknown")
    dequantised = decode(str | None, fuse.get("dequantised"), "fuse.dequantised", problems)
    if dequantised is not None and dtype is None:
        problems.append("fuse.dequantised: without a dtype")
    bypassed = decode(tuple[str, ...], fuse.get("bypassed", []), "fuse.bypassed", problems)
    versions = decode(dict[str, str], fuse.get("versions", {}), "fuse.versions", problems)
    if problems:
        raise IntegrityError(f"the record is damaged: {problems[0]}", where=str(where))
    return files, recorded, None if dtype is None else names[dtype], dequantised, bypassed, versions.get("loracat")


def _check_files(path: Path, files: dict[str, str], findings: Findings, *, edited_card: bool) -> bool:
    """Whether the card is as recorded; every file is held against its hash, and there may be no other."""
    present, whole_card = {entry.name for entry in path.iterdir()} - {FUSE_CERTIFICATE}, False
    for name in sorted(present - files.keys()):
        if name in _LEFT_BEHIND:
            findings.skip(name, "version control or a file manager leaves it there, and no fusion wrote it")
        else:
            findings.differs(f"{name} is not in the record")
    for name in sorted(files):
        if name not in present:
            findings.differs(f"{name} is missing")
        elif name == README_FILE:
            whole_card = findings.check_card(file_sha256(path / name), files[name], edited=edited_card)
        elif file_sha256(path / name) != files[name]:
            findings.differs(f"{name} is not the file of the certificate")
    findings.checked.append("the sha256 of every other file")
    return whole_card


def _check_loads(path: Path, recorded: _Base, written: Checkpoint, findings: Findings) -> None:
    """Whether transformers would find every parameter of the model, in its shape.

    Of a model that computes parameters from several tensors, such as fused experts, only those that it takes as they
    are: one rule may make more than one parameter.
    """
    skeleton = plan_base(BaseReference(recorded.id, path, None)).skeleton
    names, tied = loaded_names(skeleton, written.tensors), tied_parameters(skeleton)
    for parameter, group in sorted(tied.items()):
        stored = names.stored.get(parameter, ())
        if not names.computed and not any(member in names.stored for member in group):
            findings.differs(f"the model has no tensor for its {parameter}")
        for name in stored:
            if written.tensors[name].shape != tuple(skeleton.get_parameter(parameter).shape):
                findings.differs(f"{name} has the shape {written.tensors[name].shape}, which the model does not take")
    findings.checked.append(
        "the shape of every tensor that transformers takes as it is"
        if names.computed
        else "that transformers finds a tensor for every parameter"
    )


def _check_base(reference: BaseReference, recorded: _Base) -> None:
    """Raises IntegrityError if a file of the base is not the recorded one."""
    present = {entry.name for entry in reference.path.iterdir()}
    for name, digest in sorted(recorded.sha256.items()):
        if name not in present or file_sha256(reference.path / name) != digest:
            raise IntegrityError(
                f"{name} of the base model {reference.id} is not the file that the update was folded into",
                where=str(reference.path),
                hint="name the base that was used with --base",
            )


def _check_others(path: Path, checkpoint: Checkpoint, fusion: FusionPlan, config: bytes, findings: Findings) -> None:
    """Config, index and all other files are the base's, with what a fusion changes in them."""
    contents = {CONFIG: config}
    index = index_bytes(checkpoint, fusion)
    if index is not None:
        contents[INDEX_FILE] = index
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    digests |= {name: file_sha256(checkpoint.folder / name) for name in other_files(checkpoint)[0]}
    for name, digest in sorted(digests.items()):
        if not (path / name).is_file() or file_sha256(path / name) != digest:
            findings.differs(f"{name} is not the base model's")
    findings.checked.append("config and all other files against the base's")


def _check_weights(
    checkpoint: Checkpoint,
    written: Checkpoint,
    fusion: FusionPlan,
    composition: Composition,
    findings: Findings,
    progress: Progress,
) -> None:
    planned = {tensor.name: tensor for shard in fusion.shards for tensor in shard.tensors}
    for name in sorted(planned.keys() ^ written.tensors.keys()):
        findings.differs(f"the tensor {name} is {'missing' if name in planned else 'one too many'}")
    progress.begin(_TASK, sum(tensor.source.size for tensor in planned.values()), "B")
    for tensor in planned.values():
        found = written.tensors.get(tensor.name)
        if found is None:
            continue
        findings.tensors += 1
        if (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
            findings.differs(f"{tensor.name} is {found.dtype} {found.shape} and not {tensor.dtype}")
            continue
        wrong = _wrong_entries(checkpoint, written, tensor, found, composition, progress)
        if wrong:
            what = "base plus update" if tensor.replaced is None else "what the adapter saved"
            findings.differs(f"{tensor.name}: {wrong} entries are not {what}, rounded once")
    progress.finish(_TASK)
    findings.checked.append("every tensor against the base's plus the composition of the ingredients in float64")


def _wrong_entries(
    checkpoint: Checkpoint,
    written: Checkpoint,
    tensor: FusedTensor,
    found: StoredTensor,
    composition: Composition,
    progress: Progress,
) -> int:
    own, output = tensor.source, FLOATS.get(tensor.dtype, torch.uint8)
    update, replacement = update_of(composition, tensor), None
    if tensor.replaced is not None:
        assert composition.saved is not None
        replacement = composition.saved.read(tensor.replaced).to(output)
    rows = tensor.shape[0] if own.shape else 1
    if own.size == 0:
        return 0
    block = BLOCK_BYTES if tensor.quantised is None else BLOCK_BYTES // WIDENED
    step, wrong = max(1, block // max(1, own.size // rows)), 0
    decode = None if tensor.quantised is None else tensor.quantised.decoder(checkpoint)
    with open_regular(checkpoint.folder / own.shard) as base, open_regular(written.folder / found.shard) as file:
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            before, after = (
                read_bytes(handle.fileno(), t.begin + start * (t.size // rows), (stop - start) * (t.size // rows))
                for handle, t in ((base, own), (file, found))
            )
            progress.advance(_TASK, len(before))
            if not tensor.changed:
                wrong += int((before != after).sum())
                continue
            if decode is not None:
                weight = decode(before, start)
            else:
                weight = before.view(FLOATS[own.dtype]).view(stop - start, *own.shape[1:])
            value = after.view(output).view(weight.shape)
            if replacement is not None:
                wrong += int((replaced_rows(tensor, start, len(before), replacement) != value).sum())
                continue
            if update is None:
                wrong += int((weight.to(output) != value).sum())
                continue
            left, right = update[0][start:stop], update[1]
            low, high = rounding_bounds(weight, left, right[start:stop] if right.dim() == 3 else right, output)
            wrong += int((~((value >= low) & (value <= high))).sum())
    return wrong


MAX_RECORD_BYTES = 128 << 20


@takes_bar
def verify_directory(
    path: str | Path,
    *,
    recipe: str | Path | None = None,
    adapters: Sequence[Named] = (),
    base: Named | None = None,
    base_revision: str | None = None,
    edited_card: bool = False,
    at_hand: str | Path | None = None,
    progress: Progress | Bar = SILENT,
) -> Verification:
    """Computes again what was written, from the recorded ingredients, and compares every tensor.

    Args:
        path: a directory that `export_adapter` or `fuse_model` wrote.
        recipe: the recipe's file; needed where its mixing is kept in tensors, and to find local ingredients.
        adapters: where the ingredients are, in the recorded order; empty for where they are recorded.
        base: a Hub id or directory; of a fused model None is the recorded one.
        base_revision: of a base on the Hub.
        edited_card: let a README.md pass, unchecked, that was changed after it was written.
        at_hand: the file of a recipe that is taken for `recipe` if that is None and the record has its sha256, and is
            otherwise left alone.
        progress: told how far it is.
    Raises:
        VerificationError: if anything differs, with every difference.
        IntegrityError: if the record is damaged, or an ingredient is not the recorded one.
        InputError: if the directory is none of loracat's, or an ingredient that is named cannot be used.
    """
    progress = drawn(progress)
    path, findings = Path(path), Findings()
    if not path.is_dir():
        raise InputError(f"{path} is not a directory" if path.exists() else f"there is no directory {path}")
    given = None if recipe is None else Path(recipe)
    fused = (path / FUSE_CERTIFICATE).is_file()
    if given is None and at_hand is not None:
        given = _recorded_recipe(path / (FUSE_CERTIFICATE if fused else CERTIFICATE_FILE), Path(at_hand), progress)
    if fused:
        _verify_model(
            path,
            findings,
            recipe=given,
            adapters=adapters,
            base=base,
            base_revision=base_revision,
            edited_card=edited_card,
            progress=progress,
        )
        return findings.result(path, "model")
    if not (path / CERTIFICATE_FILE).is_file():
        raise InputError(
            f"{path} was not written by loracat: it has neither {CERTIFICATE_FILE} nor {FUSE_CERTIFICATE}",
            hint="give the directory of `loracat export` or `loracat fuse`",
        )
    document = _read(path / CERTIFICATE_FILE)
    if "conversion" in document:
        raise InputError(
            f"{path} was made by `loracat convert`, and a conversion is not computed again",
            hint="convert the adapter again and compare the sha256 of the two",
        )
    if not any((path / name).is_file() for name in (TENSOR_FILE, MLX_TENSOR_FILE)):
        raise IntegrityError(f"{path} has a record and no {TENSOR_FILE}")
    skeleton = None
    if base is not None:
        reference = find_base((), base, revision=base_revision, progress=progress)
        if (fitted := fitted_base(path)) is not None:
            check_config(reference, fitted, "the recipe", progress)
        skeleton = plan_base(reference, task=_stated_task(path)).skeleton
    verify_adapter(
        path,
        document,
        findings,
        recipe=given,
        adapters=adapters,
        skeleton=skeleton,
        edited_card=edited_card,
        progress=progress,
    )
    return findings.result(path, "adapter")


def _recorded_recipe(record: Path, recipe: Path, progress: Progress) -> Path | None:
    """The recipe's file, if it is there and what is recorded was made with it."""
    if not (record.is_file() and recipe.is_file()):
        return None
    digest = recipe_digest(_read(record))
    if digest is None:  # made without a recipe
        return None
    try:
        found = load_recipe(recipe).sha256()
    except (RecipeError, IntegrityError) as error:
        progress.note(f"{recipe} is left alone: {error}")
        return None
    if found != digest:
        progress.note(f"{recipe} is left alone: {record.parent} was made with another recipe")
        return None
    progress.note(f"{recipe} is the recipe that {record.parent} was made with")
    return recipe


def _stated_task(path: Path) -> str | None:
    """The task that the config of an adapter states, None for none of PEFT's: the config is compared later."""
    stated = read_fields(path / CONFIG_FILE).get("task_type")
    return stated if stated in TASKS else None


def _read(path: Path) -> dict[str, Any]:
    return read_object(
        path,
        MAX_RECORD_BYTES,
        lambda reason: IntegrityError(f"the record is damaged: {reason}", where=str(path)),
    )
