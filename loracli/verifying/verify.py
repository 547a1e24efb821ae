"""`verify_directory`: an exported adapter or a fused model, checked as far as its ingredients are at hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loracli.adapters.config import read_fields
from loracli.adapters.tasks import TASKS
from loracli.errors import InputError, IntegrityError
from loracli.fusing.workplace import FUSE_CERTIFICATE
from loracli.progress import SILENT, Progress
from loracli.system.files import CERTIFICATE_FILE, CONFIG_FILE, MLX_TENSOR_FILE, TENSOR_FILE
from loracli.system.strict_json import StrictJsonError, parse_json
from loracli.system.tensor_file import open_regular
from loracli.verifying.adapter import verify_adapter
from loracli.verifying.findings import Findings, Verification
from loracli.verifying.model import verify_model

MAX_RECORD_BYTES = 128 << 20


def verify_directory(
    path: str | Path,
    *,
    recipe: str | Path | None = None,
    adapters: Sequence[str] = (),
    base: str | None = None,
    base_revision: str | None = None,
    edited_card: bool = False,
    progress: Progress = SILENT,
) -> Verification:
    """Computes again what was written, from the recorded ingredients, and compares every tensor.

    Args:
        path: a directory that `export_adapter`, `export_method` or `fuse_model` wrote.
        recipe: the recipe's file; needed where its mixing is kept in tensors, and to find local ingredients.
        adapters: where the ingredients are, in the recorded order; empty for where they are recorded.
        base: a Hub id or directory; of a fused model None is the recorded one.
        base_revision: of a base on the Hub.
        edited_card: let a README.md pass, unchecked, that was changed after it was written.
        progress: told how far it is.
    Raises:
        VerificationError: if anything differs, with every difference.
        IntegrityError: if the record is damaged, or an ingredient is not the recorded one.
        InputError: if the directory is none of loracat's, or an ingredient that is named cannot be used.
    """
    path, findings = Path(path), Findings()
    if not path.is_dir():
        raise InputError(f"{path} is not a directory" if path.exists() else f"there is no directory {path}")
    given = None if recipe is None else Path(recipe)
    if (path / FUSE_CERTIFICATE).is_file():
        verify_model(
            path,
            _read(path / FUSE_CERTIFICATE),
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
        from loracli.model.base import find_base, plan_base

        reference = find_base((), base, revision=base_revision, progress=progress)
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


def _stated_task(path: Path) -> str | None:
    """The task that the config of an adapter states, None for none of PEFT's: the config is compared later."""
    stated = read_fields(path / CONFIG_FILE).get("task_type")
    return stated if stated in TASKS else None


def _read(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        data = file.read(MAX_RECORD_BYTES + 1)
    try:
        document = parse_json(data) if len(data) <= MAX_RECORD_BYTES else None
    except StrictJsonError as error:
        raise IntegrityError(f"the record is damaged: {error}", where=str(path)) from None
    if not isinstance(document, dict):
        raise IntegrityError("the record is damaged: it is not a JSON object", where=str(path))
    return document
