"""What a recipe names is fetched: adapters at their commits and the base at its own, held against recorded hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loracli.errors import AdapterNotFound, IncompatibleAdapters, IntegrityError, RecipeError, UsageError
from loracli.hub.references import BaseClaim
from loracli.recipe.ingredients import fetch_all, read_record
from loracli.recipe.recipe import Recipe
from loracli.recipe.record import RecipeAdapter, RecipeBase
from loracli.system.document import encode
from tests.stub_hub import StubHub
from tests.test_recipe import make_recipe

CONFIG = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"}).encode()
ADAPTER = {"README.md": b"# x", "adapter_config.json": CONFIG, "adapter_model.safetensors": b"weights " * 500}
BASE = {"config.json": b'{"base": 1}', "tokenizer.json": b"{}", "model.safetensors": b"base weights"}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def recorded(reference: str, repo_id: str | None, subfolder: str | None, commit: str | None) -> RecipeAdapter:
    hashes = {name: sha256(data) for name, data in ADAPTER.items() if name != "README.md"}
    return RecipeAdapter(reference, repo_id, subfolder, commit, hashes, 8, 16.0, False, "float32", "org/base")


@pytest.fixture
def recipe(hub: StubHub, tmp_path: Path) -> Recipe:
    """A recipe of an adapter at the top, one in a folder, and one on this disk, none of them where `main` is now."""
    math = hub.add("org/math", ADAPTER)
    runs = hub.add("org/runs", {f"best/last/{name}": data for name, data in ADAPTER.items()})
    base = hub.add("org/base", BASE)
    for name in ("org/math", "org/runs", "org/base"):
        hub.add(name, {"README.md": b"everything is new"})
    local = tmp_path / "recipes/own"
    local.mkdir(parents=True)
    for name, data in ADAPTER.items():
        (local / name).write_bytes(data)
    adapters = (
        recorded("org/math", "org/math", None, math),
        recorded("hf://org/runs/best/last", "org/runs", "best/last", runs),
        recorded("own", None, None, None),
    )
    base_model = RecipeBase("org/base", base, sha256(BASE["config.json"]))
    return replace(make_recipe(tmp_path / "recipes", *adapters), base=base_model)


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Recipe], str]:
    def write(recipe: Recipe) -> str:
        path = tmp_path / "recipes/recipe.json"
        path.write_text(recipe.to_json())
        return str(path)

    return write


Save = Callable[[Recipe], str]


def test_all_that_a_recipe_names_comes_at_its_commit(
    hub: StubHub, options: dict[str, Any], recipe: Recipe, save: Save, tmp_path: Path
) -> None:
    fetched = fetch_all([save(recipe)], with_base=True, **options)
    assert [(a.reference.text, a.commit) for a in fetched.adapters] == [
        (a.reference, a.commit) for a in recipe.adapters
    ]
    assert all((a.path / "adapter_config.json").read_bytes() == CONFIG for a in fetched.adapters)
    assert fetched.adapters[1].path.parts[-2:] == ("best", "last")
    assert fetched.adapters[2].path == tmp_path / "recipes/own"
    assert fetched.base is not None and fetched.base.commit == recipe.base.commit
    hub.stop()
    assert fetch_all([save(recipe)], with_base=True, **options).adapters[0].path == fetched.adapters[0].path
    assert fetch_all([save(recipe)], **options).base is None


def test_recipes_and_references_are_mixed_in_their_order(
    hub: StubHub, options: dict[str, Any], recipe: Recipe, save: Save
) -> None:
    commit = hub.add("org/other", ADAPTER)
    fetched = fetch_all(["org/other", save(recipe), f"org/other@{commit}"], with_base=True, **options)
    assert [a.commit for a in fetched.adapters] == [commit, *(a.commit for a in recipe.adapters), commit]
    hub.add("org/other", {**ADAPTER, "adapter_config.json": b'{"base_model_name_or_path": "org/else"}'})
    with pytest.raises(IncompatibleAdapters, match=r"recipe\.json names org/base@\w+, org/other names org/else"):
        fetch_all([save(recipe), "org/other"], with_base=True, **options)


def test_the_record_of_an_export_is_as_good_as_the_recipe(
    options: dict[str, Any], recipe: Recipe, tmp_path: Path
) -> None:
    adapters, record = recipe.adapters[:2], tmp_path / "loracat.json"
    with_recipe = {"recipe": json.loads(make_recipe(tmp_path, *adapters).to_json()), "export": {}}
    base = {"id": "org/base", "commit": "c" * 40}
    with_method = {"method": {}, "base": base, "adapters": [encode(adapter) for adapter in adapters]}
    for document in (with_recipe, with_method):
        record.write_text(json.dumps(document))
        assert [a.commit for a in fetch_all([str(record)], **options).adapters] == [a.commit for a in adapters]
    assert read_record(record).base == BaseClaim("org/base", "c" * 40)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_is_not_the_recorded_one_is_an_integrity_error(
    options: dict[str, Any], recipe: Recipe, save: Save, number: int, name: str
) -> None:
    adapters = list(recipe.adapters)
    adapters[number] = replace(adapters[number], sha256=adapters[number].sha256 | {name: "0" * 64})
    path = save(replace(recipe, adapters=tuple(adapters)))
    with pytest.raises(IntegrityError, match=f"{name} of the adapter {adapters[number].reference} is not the file"):
        fetch_all([path], **options)
    assert fetch_all([path], dry_run=True, **options).adapters


def test_a_base_with_another_config_than_recorded_is_an_integrity_error(
    options: dict[str, Any], recipe: Recipe, save: Save
) -> None:
    path = save(replace(recipe, base=replace(recipe.base, config_sha256="0" * 64)))
    assert fetch_all([path], **options).adapters
    with pytest.raises(IntegrityError, match=r"config\.json of the base model org/base is not the one"):
        fetch_all([path], with_base=True, **options)


def test_a_dry_run_of_a_recipe_knows_the_base_before_anything_is_here(
    hub: StubHub, options: dict[str, Any], recipe: Recipe, save: Save
) -> None:
    planned = fetch_all([save(recipe)], with_base=True, dry_run=True, **options)
    assert planned.base is not None and [file.name for file in planned.base.files] == list(BASE)
    assert not [path for _, path in hub.requests if "/resolve/" in path]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"repo_id": "../../etc"}, RecipeError, "is damaged"),
        ({"commit": "../../etc"}, RecipeError, "is damaged"),
        ({"subfolder": "../../etc"}, RecipeError, "is damaged"),
        ({"repo_id": None, "commit": None, "subfolder": None, "reference": "moved"}, AdapterNotFound, "is not at"),
    ],
)
def test_places_that_cannot_be_are_refused_before_any_request(
    hub: StubHub,
    options: dict[str, Any],
    recipe: Recipe,
    save: Save,
    changes: dict[str, Any],
    kind: type[Exception],
    message: str,
) -> None:
    adapters = (replace(recipe.adapters[0], **changes),)
    with pytest.raises(kind, match=message) as caught:
        fetch_all([save(replace(make_recipe(recipe.folder, *adapters)))], **options)
    assert hub.count() == 0 and "loracat export" not in str(getattr(caught.value, "hint", ""))


def test_what_is_no_recipe_is_refused_as_one(options: dict[str, Any], tmp_path: Path) -> None:
    for text in ("[]", "{}", '{"adapters": 3}', '{"loracat_recipe": 99}', "{"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(RecipeError):
            fetch_all([str(tmp_path / "x.json")], **options)
    with pytest.raises(RecipeError, match="cannot be read"):
        fetch_all(["recipes/recipe.json"], **options)


def test_options_that_a_recipe_does_not_leave_open_are_refused(
    hub: StubHub, recipe: Recipe, save: Save, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="its own commits"):
        fetch_all([save(recipe)], revision="main", endpoint=hub.url)
    with pytest.raises(UsageError, match="one adapter"):
        fetch_all([save(recipe)], local_dir=tmp_path / "out", endpoint=hub.url)
    one = make_recipe(tmp_path / "recipes", recipe.adapters[0])
    assert fetch_all([save(one)], local_dir=tmp_path / "out", endpoint=hub.url).adapters[0].path == tmp_path / "out"
