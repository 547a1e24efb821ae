"""What an export or a fused model says of itself: the held-out table, the verdict, the card. Edited, it is found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loracli.composition.card import RECORD_DIGEST
from loracli.errors import IntegrityError, VerificationError
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.fusing.composition import FuseRequest
from loracli.fusing.fuse import fuse_model
from loracli.verifying.origin import _EVIDENCE, read_origin
from loracli.verifying.verify import verify_directory
from tests.export.test_export import Made
from tests.verifying.test_verify_adapter import change, only_the_recipe_is_missing

OTHER_CARD = "README.md is not the card that record and ingredients make"
RECORDS = {"adapter": "loracat.json", "model": "loracat-fuse.json"}


def made(folder: Path, kind: str) -> tuple[Path, dict[str, Any], Path]:
    """An export or a fused model, where its ingredients are, and its recipe."""
    parts = Made(folder, "plain")
    recipe = folder / "recipe.json"
    parts.recipe.save(recipe)
    where: dict[str, Any] = {"adapters": [str(path) for path in parts.paths]}
    if kind == "adapter":
        export_adapter(ExportRequest(parts.recipe), folder / "out")
    else:
        fuse_model(FuseRequest(parts.recipe, base=str(parts.base)), folder / "out")
        where["base"] = str(parts.base)
    return folder / "out", where, recipe


def edit(path: Path, change_fields: Callable[[dict[str, Any]], object]) -> None:
    """Changes a record and leaves its digest."""
    fields = json.loads(path.read_text())
    change_fields(fields.get("composition", fields)["recipe"]["held_out"])
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize("kind", RECORDS)
def test_evidence_that_was_edited_is_a_difference(tmp_path: Path, kind: str) -> None:
    out, where, _ = made(tmp_path, kind)
    record = out / RECORDS[kind]
    whole = record.read_text()
    assert only_the_recipe_is_missing(verify_directory(out, **where))
    record.write_text(json.dumps(json.loads(whole), sort_keys=True))  # other white space and order say the same
    assert only_the_recipe_is_missing(verify_directory(out, **where))
    edits: list[Callable[[dict[str, Any]], object]] = [
        lambda table: table.update(verdict="better"),
        lambda table: table["rows"][-1].update(nats_per_token=0.01),
        lambda table: table.update(records=10_000),
    ]
    for one in edits:
        record.write_text(whole)
        edit(record, one)
        for options in (where, {}):
            with pytest.raises(VerificationError) as caught:
                verify_directory(out, **options)
            first, *others = caught.value.problems
            assert first == f"{record.name} was changed: its fields are not those that its own {RECORD_DIGEST} is of"
            assert set(others) <= {OTHER_CARD}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_digest_written_anew_is_found_with_the_recipe(tmp_path: Path, kind: str) -> None:
    out, where, recipe = made(tmp_path, kind)
    assert not verify_directory(out, recipe=recipe, **where).not_checked
    change(
        out / RECORDS[kind],
        lambda fields: fields.get("composition", fields)["recipe"]["held_out"].update(verdict="better"),
    )
    assert [item.what for item in verify_directory(out, **where).not_checked] == [_EVIDENCE]
    with pytest.raises(VerificationError) as caught:
        verify_directory(out, recipe=recipe, **where)
    assert caught.value.problems == (f"the recorded recipe is not {recipe}",)


@pytest.mark.parametrize("kind", RECORDS)
def test_a_card_with_other_words_is_a_difference_unless_they_are_allowed(tmp_path: Path, kind: str) -> None:
    out, where, recipe = made(tmp_path, kind)
    with (out / "README.md").open("a") as card:
        card.write("\nIt beats everything.\n")
    with pytest.raises(VerificationError) as caught:
        verify_directory(out, **where)
    [problem] = caught.value.problems
    assert problem.startswith("README.md was changed") and "--edited-card" in problem
    found = verify_directory(out, recipe=recipe, edited_card=True, **where)
    assert [item.what for item in found.not_checked] == ["README.md"]
    (out / "README.md").unlink()
    with pytest.raises(VerificationError) as caught:
        verify_directory(out, edited_card=True, **where)
    assert caught.value.problems == ("README.md is missing",)


def forge(out: Path, kind: str) -> None:
    """Other words in the card, with its hash and the record's digest written anew."""
    card = out / "README.md"
    card.write_text(card.read_text().replace("scored tokens", "scored tokens, and it beats everything"))
    digest = hashlib.sha256(card.read_bytes()).hexdigest()
    change(
        out / RECORDS[kind],
        lambda fields: (
            fields["text_sha256"].update({card.name: digest})
            if kind == "adapter"
            else fields["certificate"]["files"].update({card.name: digest})
        ),
    )


@pytest.mark.parametrize("kind", RECORDS)
def test_a_card_whose_hashes_were_written_anew_is_never_said_to_be_checked(tmp_path: Path, kind: str) -> None:
    out, where, recipe = made(tmp_path, kind)
    for path in where["adapters"]:
        (Path(path) / "README.md").write_text("An adapter.\n")
    whole = verify_directory(out, recipe=recipe, **where)
    assert "README.md against the card made again of record and ingredients" in whole.checked
    forge(out, kind)
    with pytest.raises(VerificationError) as caught:
        verify_directory(out, recipe=recipe, **where)
    assert caught.value.problems == (OTHER_CARD,)
    alone = verify_directory(out)
    assert "README.md" in [item.what for item in alone.not_checked]
    (Path(where["adapters"][0]) / "README.md").unlink()  # which may have stated a licence
    change(out / RECORDS[kind], lambda fields: None)
    found = verify_directory(out, recipe=recipe, **where)
    assert [item.what for item in found.not_checked] == ["README.md"]
    assert not any("README.md" in text for found in (alone, found) for text in found.checked)


@pytest.mark.parametrize(
    "options",
    [
        {"profile": "peft"},
        {"merge": True, "rank": 9, "dtype": "bfloat16"},
        {"merge": True, "tolerance": 0.3},
        {"merge": True, "energy": 0.9, "profile": "portable"},
        {"profile": "mlx"},
    ],
)
def test_the_card_of_every_kind_of_export_is_made_again(tmp_path: Path, options: dict[str, Any]) -> None:
    parts = Made(tmp_path, "mixed ranks")
    export_adapter(ExportRequest(parts.recipe, **options), tmp_path / "out")
    found = verify_directory(tmp_path / "out", adapters=[str(path) for path in parts.paths])
    assert "README.md against the card made again of record and ingredients" in found.checked


def test_a_record_whose_parts_are_of_another_kind_is_damaged(tmp_path: Path) -> None:
    out, where, _ = made(tmp_path, "model")
    change(out / "loracat-fuse.json", lambda fields: fields.update(composition=[1]))
    with pytest.raises(IntegrityError, match="its composition is not a JSON object"):
        verify_directory(out, **where)
    for name in ([], {}, 1, None):
        with pytest.raises(IntegrityError, match="method.name"):
            read_origin({"method": {"name": name}, "base": {"id": "org/base"}, "adapters": []}, out)


def test_a_hidden_entry_of_a_model_is_named(tmp_path: Path) -> None:
    out, where, recipe = made(tmp_path, "model")
    (out / ".git").mkdir()
    (out / ".DS_Store").touch()
    found = verify_directory(out, recipe=recipe, **where)
    assert [item.what for item in found.not_checked] == [".DS_Store", ".git"]
    (out / ".hidden").mkdir()
    (out / ".hidden" / "x.py").write_text("print()")
    with pytest.raises(VerificationError) as caught:
        verify_directory(out, recipe=recipe, **where)
    assert caught.value.problems == (".hidden is not in the record",)


def test_a_record_without_digest_is_of_an_older_version_and_not_checked(tmp_path: Path, tiny_base: Path) -> None:
    out, where, recipe = made(tmp_path, "adapter")
    fields = json.loads((out / "loracat.json").read_text())
    del fields[RECORD_DIGEST]
    (out / "loracat.json").write_text(json.dumps(fields))
    with pytest.raises(VerificationError, match="1 difference"):  # a record of today's format has one
        verify_directory(out, recipe=recipe, **where)
    del fields["loracat_export"]
    (out / "loracat.json").write_text(json.dumps(fields))
    found = verify_directory(out, recipe=recipe, **where)
    assert [item.what for item in found.not_checked] == ["whether loracat.json is as it was written"]
    del fields["text_sha256"]
    (out / "loracat.json").write_text(json.dumps(fields))
    found = verify_directory(out, recipe=recipe, **where)
    assert "README.md" in [item.what for item in found.not_checked]


def test_an_export_of_a_method_has_nothing_that_only_a_recipe_could_tell(
    tmp_path: Path, two_adapters: tuple[Path, Path]
) -> None:
    paths = [str(path) for path in two_adapters]
    export_adapter(ExportRequest(method="sum", adapters=paths), tmp_path / "out")
    assert not verify_directory(tmp_path / "out", adapters=paths).not_checked
    fields = json.loads((tmp_path / "out" / "loracat.json").read_text())
    fields["text_sha256"]["LICENSE"] = "0" * 64
    (tmp_path / "out" / "loracat.json").write_text(json.dumps(fields))
    with pytest.raises(IntegrityError, match="text_sha256: not those of card and config"):
        verify_directory(tmp_path / "out", adapters=paths)
