"""An exported adapter against its record: hashes, config, every tensor, the figures of the certificate, and PEFT."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loracli.adapters.adapter import LoraAdapter, kernels_of, read_adapter
from loracli.adapters.config import read_fields
from loracli.adapters.kinds import BaseModule, kind_of
from loracli.algebra.factors import Factors, relative_error, thin_svd
from loracli.algebra.methods.method import Merged
from loracli.algebra.packing import Convolution
from loracli.algebra.truncate import project, relative_gap, truncate, truncate_for
from loracli.composition.base_table import modules_of
from loracli.composition.card import EXPORT_FORMAT, EXPORT_SCHEMA, ModuleCertificate
from loracli.composition.composition import Composition
from loracli.errors import InputError, IntegrityError, UsageError
from loracli.export.activations import recorded_moments
from loracli.export.layout import PROFILES, choose_layout, ranks_of_targets
from loracli.export.refit import read_cores
from loracli.hub.references import Named
from loracli.model.modules import base_modules, check_shapes
from loracli.progress import Progress
from loracli.system.document import decode, dtype_name
from loracli.system.files import (
    CERTIFICATE_FILE,
    CONFIG_FILE,
    CORES_FILE,
    GGUF_FILE,
    MLX_TENSOR_FILE,
    README_FILE,
    TENSOR_FILE,
    file_sha256,
)
from loracli.verifying.factors import (
    TURN,
    column_space,
    compare_bias,
    compare_concatenation,
    compare_projection,
    compare_refit,
    compare_truncation,
    stripped,
)
from loracli.verifying.findings import UNPROVEN, Findings, compare_card, export_cards, readable_options
from loracli.verifying.origin import Origin, compose_again, find_ingredients, read_origin
from loracli.verifying.peft_reload import reload_differences, skeleton_of

_TASK = "verify"
_FIGURE = 1e-6  # relative, of a figure of the certificate
_ROOT_NOISE = 4.0  # of a cut by activations: eps sqrt(cond) / 2, where damping keeps the condition of G below R 1e4
_DENSE_NOISE = 1e-5  # of a method that approximates a dense matrix, see algebra/truncate.py
_ABSENT = "nothing"
_RULES = {"tolerance", "energy", "budget"}  # what ranks were chosen by, which stand in the certificate
_EXPORT_KEYS = {"profile", "merged", "rank", "dtype", "activation_aware", "moments", "refit", "options"} | _RULES


@dataclass(frozen=True)
class _Cut:
    """What modules were cut by and refitted with.

    Args:
        moments: G by module of a cut by activations, none of a plain one, None where they are not at hand.
        cores: M by module of a refit, none without.
    """

    moments: Mapping[str, Tensor] | None = field(default_factory=dict)
    cores: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Record:
    """What `loracat.json` says of the written bytes."""

    profile: str
    merged: bool
    rank: int
    dtype: str
    sha256: dict[str, str]  # of files
    text_sha256: dict[str, str]  # of those that people read; none of an older export
    largest_error: float
    modules: dict[str, ModuleCertificate]
    activation_aware: bool
    moments: str | None  # what a cut by activations went by: `recipe` or `records`
    refitted: bool
    options: str | None  # of the command, as the card has them; none of an older export
    written_by: str | None  # version of loracat
    otherwise: tuple[str, ...]  # keys of the export that this version does not know


def verify_adapter(
    path: Path,
    document: dict[str, Any],
    findings: Findings,
    *,
    recipe: Path | None,
    adapters: Sequence[Named],
    skeleton: nn.Module | None,
    edited_card: bool,
    progress: Progress,
) -> None:
    """Checks an exported adapter; everything that differs goes into the findings.

    Args:
        path: the directory.
        document: its `loracat.json`.
        findings: takes what is checked, not checked and different.
        recipe, adapters: as in `find_ingredients`.
        skeleton: the base model without numbers, None if it is not at hand.
        edited_card: whether the card may have been changed.
        progress: told how far it is.
    Raises:
        IntegrityError: if the record is damaged, or an ingredient is not the recorded one.
    """
    origin, record = read_origin(document, path / CERTIFICATE_FILE), _read_record(document, path / CERTIFICATE_FILE)
    findings.check_record(document, CERTIFICATE_FILE)
    whole_card = _check_texts(path, record, findings, edited_card=edited_card)
    for name, recorded in record.sha256.items():
        found = _sha256(path / name)
        if found != recorded:
            findings.differs(f"{name} is not the file of the certificate: its sha256 is {found}")
        findings.checked.append(f"the sha256 of {name}")
    if GGUF_FILE in record.sha256:
        findings.skip(f"the tensors of {GGUF_FILE}", "they are copies of those of the other file; only its hash is")
    try:
        written = read_adapter(str(path), progress=progress)
    except InputError as error:
        findings.differs(f"it cannot be read as an adapter: {error}")
        return
    told = bool(origin.table) or record.profile != "peft" or _tells_layout(written)
    if not told and skeleton is not None:  # which has the modules that nothing changes
        check_shapes(skeleton, [written])
        origin, told = replace(origin, table=base_modules(skeleton, [written])), True
    origin = replace(origin, table=origin.table or modules_of([written]))
    table = {module.name: module for module in origin.table}
    sound = _check_config(path, written, origin, record, table, findings)
    if written.saved or record.profile == "mlx":
        kept = "modules_to_save need the base model itself" if written.saved else "PEFT does not read this layout"
        findings.skip("what PEFT makes of it", kept)
    elif sound:
        # A config that an export would not write is not handed to PEFT, which runs the patterns in it.
        counts = {name: len(modules) for name, modules in written.targets.items()}
        kernels = kernels_of([written]).items()
        convolutions = {name: Convolution(counts[name], kernel) for name, kernel in kernels}
        if skeleton is not None:
            check_shapes(skeleton, [written])
        layers = skeleton or skeleton_of(origin.table, counts, convolutions)
        findings.differences += reload_differences(path, written, layers)
        where = "the base model's own layers" if skeleton is not None else "layers of the recorded shapes"
        findings.checked.append(f"that PEFT loads these tensors with these scalings, into {where}")
    else:
        findings.skip("what PEFT makes of it", f"{CONFIG_FILE} is not what an export of this record has")
    given = find_ingredients(origin, findings, recipe=recipe, adapters=adapters, progress=progress)
    composition = None if given is None else compose_again(origin, given)
    if whole_card and composition is None:
        findings.skip(README_FILE, f"{UNPROVEN}, and the ingredients that it is made again of are not at hand")
    if composition is not None:
        if whole_card and record.profile in PROFILES:
            cards = export_cards(
                composition,
                record.modules,
                profile=record.profile,
                rank=record.rank,
                merged=record.merged,
                options=record.options,
                task_type=written.config.task_type,
            )
            compare_card(path, cards, record.written_by, composition, findings, base_told=told)
        if origin.by_records:
            return
        cut = _Cut(_find_moments(composition, recipe, record, findings), _read_cores(path, record, findings))
        _check_composition(composition, written, record, cut, findings, progress)


def _tells_layout(written: LoraAdapter) -> bool:
    """Whether what it changes is by itself why only PEFT reads its layout: else other modules of the base can be."""
    if written.config.lora_bias or written.saved or kernels_of([written]):
        return True
    return any(kind_of(module).portable_obstacle(module.name) is not None for module in modules_of([written]))


def _check_texts(path: Path, record: _Record, findings: Findings, *, edited_card: bool) -> bool:
    """Whether the card is as recorded; it and the config are held against their hashes, which older exports lack."""
    if not record.text_sha256:
        findings.skip(README_FILE, "an older version wrote no hash of it: export again")
    whole_card = False
    for name, recorded in record.text_sha256.items():
        there = (path / name).is_file() and not (path / name).is_symlink()
        found = file_sha256(path / name) if there else None
        if name == README_FILE:
            whole_card = findings.check_card(found, recorded, edited=edited_card)
        elif found != recorded:
            findings.differs(f"{name} {'was changed after it was written' if there else 'is missing'}")
    return whole_card


def _find_moments(
    composition: Composition, recipe: Path | None, record: _Record, findings: Findings
) -> Mapping[str, Tensor] | None:
    """The second moments that a cut by activations went by, None where they are not at hand."""
    if not record.activation_aware:
        return {}
    if record.moments == "recipe" and recipe is not None and composition.fitted:
        return recorded_moments(composition, recipe).by_module
    why = "the records that it went by are not kept"
    if record.moments == "recipe":
        why = "what it went by is beside the recipe: name the recipe with --recipe"
    findings.skip("that a cut by activations keeps the best directions", why)
    return None


def _read_cores(path: Path, record: _Record, findings: Findings) -> dict[str, Tensor]:
    """The cores of a refit by module, none where a cut was not refitted; each is square, of its module's rank."""
    if not record.refitted:
        return {}
    findings.skip("that the refit found the best cores", "the records that they were fitted on are not kept")
    cores = read_cores(path / CORES_FILE)
    wrong = [
        name
        for name in sorted(cores.keys() | record.modules.keys())
        if name not in cores
        or name not in record.modules
        or tuple(cores[name].shape) != (record.modules[name].rank,) * 2
    ]
    if wrong:
        raise IntegrityError(f"the core of {wrong[0]} is none of this export's", where=str(path / CORES_FILE))
    return cores


def _read_record(document: dict[str, Any], where: Path) -> _Record:
    export, certificate = document.get("export"), document.get("certificate")
    problems: list[str] = []
    if not isinstance(export, dict) or not isinstance(certificate, dict):
        raise IntegrityError("the record is damaged: it lacks export or certificate", where=str(where))
    kinds = {"profile": str, "merged": bool, "rank": int, "dtype": str}
    refitted = decode(bool, export.get("refit", False), "export.refit", problems)
    aware = decode(bool, export.get("activation_aware", False), "export.activation_aware", problems)
    moments = decode(str | None, export.get("moments"), "export.moments", problems)
    values = {key: decode(kind, export.get(key), f"export.{key}", problems) for key, kind in kinds.items()}
    modules = decode(tuple[ModuleCertificate, ...], certificate.get("modules"), "certificate.modules", problems)
    hashes = decode(dict[str, str], certificate.get("sha256"), "certificate.sha256", problems)
    texts = decode(dict[str, str], document.get("text_sha256", {}), "text_sha256", problems)
    options = decode(str | None, export.get("options"), "export.options", problems)
    versions = decode(dict[str, str], document.get("versions", {}), "versions", problems)
    if not problems and not readable_options(options):
        problems.append("export.options: not those of an export")
    if not problems and EXPORT_FORMAT in document:
        if document[EXPORT_FORMAT] != EXPORT_SCHEMA:
            problems.append(f"{EXPORT_FORMAT}: {EXPORT_SCHEMA} is the only format that this version knows")
        elif not texts:
            problems.append("text_sha256: missing, which an export of its format has")
    largest = decode(float, certificate.get("largest_relative_error"), "certificate.largest_relative_error", problems)
    tensors = MLX_TENSOR_FILE if values.get("profile") == "mlx" else TENSOR_FILE
    if not problems and (tensors not in hashes or not hashes.keys() <= {tensors, GGUF_FILE, CORES_FILE} or not modules):
        problems.append("certificate: no hash or no modules")
    if not problems and texts and texts.keys() != {README_FILE, CONFIG_FILE}:
        problems.append("text_sha256: not those of card and config")
    if not problems and refitted != (CORES_FILE in hashes):
        problems.append(f"export.refit and the hash of {CORES_FILE} contradict each other")
    if not problems and (values["rank"] < 1 or any(module.rank < 1 for module in modules)):
        problems.append("a rank is below 1")
    if problems:
        raise IntegrityError(f"the record is damaged: {problems[0]}", where=str(where))
    return _Record(
        **values,
        sha256=hashes,
        text_sha256=texts,
        largest_error=largest,
        modules={module.name: module for module in modules},
        activation_aware=aware,
        moments=moments,
        refitted=refitted,
        options=options,
        written_by=versions.get("loracat"),
        otherwise=tuple(sorted(set(export) - _EXPORT_KEYS)),
    )


def _sha256(path: Path) -> str:
    return file_sha256(path) if path.is_file() and not path.is_symlink() else "none, for there is no such file"


def _check_config(
    path: Path,
    written: LoraAdapter,
    origin: Origin,
    record: _Record,
    table: dict[str, BaseModule],
    findings: Findings,
) -> bool:
    """Whether the config is that of an export of this record; ranks and dtype in the file are compared too."""
    ranks = {name: module.rank for name, module in record.modules.items()}
    if record.profile not in PROFILES or record.otherwise or not ranks_of_targets(ranks).keys() <= table.keys():
        findings.skip(f"every field of {CONFIG_FILE}", "this version does not know such an export")
        return False
    try:
        layout = choose_layout(
            list(table.values()),
            ranks,
            record.profile,
            rank=record.rank,
            lora_bias="it" if written.config.lora_bias else None,
            saved=tuple(sorted(written.saved)),
            kernels=kernels_of([written]),
            task_type=written.config.task_type,
        )
    except UsageError as error:
        findings.differs(f"the recorded layout is impossible: {error}")
        return False
    expected = layout.config(origin.base_id, table)
    found = read_fields(path / CONFIG_FILE)
    wrong = [k for k in sorted(expected.keys() | found.keys()) if expected.get(k, _ABSENT) != found.get(k, _ABSENT)]
    for key in wrong:
        findings.differs(
            f"{CONFIG_FILE} has {key} = {found.get(key, _ABSENT)!r}; "
            f"an export of this record has {expected.get(key, _ABSENT)!r}"
        )
    own = ranks_of_targets({name: module.factors.rank for name, module in written.modules.items()})
    if own != dict(layout.ranks):
        name = min(n for n in own.keys() | layout.ranks.keys() if own.get(n) != layout.ranks.get(n))
        findings.differs(f"{name} has rank {own.get(name)} in the file and {layout.ranks.get(name)} in the record")
    if dtype_name(written.dtype) != record.dtype:
        findings.differs(f"the tensors are {written.dtype}, recorded as {record.dtype}".replace("torch.", ""))
    findings.checked.append(f"every field of {CONFIG_FILE}, names, ranks and dtype of the tensors")
    return not wrong


def _check_composition(
    composition: Composition,
    written: LoraAdapter,
    record: _Record,
    cut: _Cut,
    findings: Findings,
    progress: Progress,
) -> None:
    names = composition.names()
    if record.merged and (record.otherwise or (cut.moments is None and cut.cores)):
        how = ", ".join(record.otherwise) or "activations that are not at hand, and refitted"
        findings.skip("every tensor against the composition", f"it was cut with {how}")
        return
    progress.begin(_TASK, len(written.modules), "modules")
    findings.tensors += 2 * len(written.targets)
    if set(names) != record.modules.keys():
        findings.differs("the certificate is of other modules than the composition changes")
    for name, module in written.modules.items():
        progress.advance(_TASK, 1)
        if name not in names:
            factors = module.factors.loaded()
            if factors.lora_A.any() or factors.lora_B.any() or (factors.bias is not None and factors.bias.any()):
                findings.differs(f"{name} is not changed by the composition and has tensors that are not zero")
            continue
        if name in record.modules:
            difference = _check_module(composition, name, module.factors.loaded(), record, cut, findings)
            if difference is not None:
                findings.differs(f"{name}: {difference}")
    for name in sorted(set(names) - written.modules.keys()):
        findings.differs(f"{name} is missing")
    _check_saved(composition, written, findings)
    largest = max((m.relative_error for m in record.modules.values()), default=0.0)
    if not math.isclose(largest, record.largest_error, rel_tol=_FIGURE):
        findings.differs(f"the certificate's largest error is {record.largest_error:g} and not {largest:g}")
    progress.finish(_TASK)
    findings.checked.append("every tensor against the composition of the ingredients in float64")
    findings.checked.append("the errors and energies of the certificate")


def _check_saved(composition: Composition, written: LoraAdapter, findings: Findings) -> None:
    """Modules that replace the base's, against those of the ingredients."""
    found = {name: tensor for tensors in written.saved.values() for name, tensor in tensors.items()}
    expected = {} if composition.saved is None else composition.saved.shapes
    for name in sorted(found.keys() | expected.keys()):
        if name not in found or name not in expected:
            findings.differs(f"{name}: {'is missing' if name not in found else 'no ingredient replaces it'}")
            continue
        assert composition.saved is not None
        findings.tensors += 1
        if not torch.equal(written.read_saved(found[name]), composition.saved.read(name).to(found[name].dtype)):
            findings.differs(f"{name} is not what the ingredients replace it by")


def _check_module(
    composition: Composition, name: str, found: Factors, record: _Record, cut: _Cut, findings: Findings
) -> str | None:
    """What differs in the tensors of one module; its figures are compared too."""
    known = record.modules[name]
    try:
        composed = composition.compose(name)
    except ValueError as error:
        return f"the recorded method cannot be applied: {error}"
    own = stripped(found, known.rank)
    if own is None:
        return f"the rows and columns beyond rank {known.rank} are not zero"
    if (own.in_features, own.out_features) != (composed.factors.in_features, composed.factors.out_features):
        return "its shape is not that of the composition"
    if known.rank < composed.factors.rank and not record.merged:
        return f"is cut to rank {known.rank} from {composed.factors.rank}, and is recorded as not compressed"
    difference = compare_bias(composed.factors.delta_bias(), own.bias)
    difference = difference or _compare(composition, composed, own, known, cut)
    if difference is None:
        _check_figures(composed, own, known, cut, findings)
    return difference


def _compare(
    composition: Composition, composed: Merged, own: Factors, known: ModuleCertificate, cut: _Cut
) -> str | None:
    exact, rank, refit = composed.factors, known.rank, cut.cores.get(known.name)
    noise = _DENSE_NOISE if composition.method is not None and composition.method.full_rank else 0.0
    if refit is not None or rank < exact.rank:
        if cut.moments is None:
            return compare_projection(exact, own)
        expected, others, turn = _cut_again(exact, rank, cut.moments.get(known.name))
        if refit is not None:
            return compare_refit(expected, refit, own, others=others, turn=turn)
        return compare_truncation(expected, own, others=others, noise=noise, turn=turn)
    if composition.merges is not None:
        return compare_truncation(exact, own, others=torch.zeros(0), noise=noise)
    return compare_concatenation(exact, own, summed=composition.product)


def _cut_again(exact: Factors, rank: int, moment: Tensor | None) -> tuple[Factors, Tensor, float]:
    """The cut, the singular values beside those of its own directions, and how far another machine may turn them."""
    if moment is None:
        return truncate(exact, rank).factors, thin_svd(exact)[1][rank:], TURN
    gap = max(relative_gap(exact, rank, moment), torch.finfo(torch.float64).tiny)
    return truncate_for(exact, rank, moment).factors, torch.zeros(0), TURN * _ROOT_NOISE / gap


def _kept_again(exact: Factors, own: Factors, known: ModuleCertificate, cut: _Cut) -> float:
    """The share of |dW|_F^2 that a cut kept."""
    if known.rank >= exact.rank:
        return 1.0
    if cut.moments is None:
        return project(exact, column_space(own.lora_B)[0]).kept_energy
    moment = cut.moments.get(known.name)
    return (truncate(exact, known.rank) if moment is None else truncate_for(exact, known.rank, moment)).kept_energy


def _check_figures(composed: Merged, own: Factors, known: ModuleCertificate, cut: _Cut, findings: Findings) -> None:
    """The certificate's error and energy of a module, computed again as `loracli.export.module.module_export` does."""
    share = composed.kept_energy
    kept = share * _kept_again(composed.factors, own, known, cut)
    plain = Factors(own.lora_A, own.lora_B, bias=own.bias)
    error = math.sqrt(max(1 - share + share * relative_error(plain, composed.factors) ** 2, 0.0))
    for what, recorded, again in (
        ("relative error", known.relative_error, error),
        ("kept energy", known.kept_energy, kept),
    ):
        if not math.isclose(recorded, again, rel_tol=1e-3, abs_tol=1e-12):
            findings.differs(f"{known.name}: the certificate's {what} is {recorded:g}; it is {again:g}")
