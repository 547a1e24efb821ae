"""The recipe: what is saved is what is loaded, byte for byte, and a damaged one says everything that is wrong."""

from __future__ import annotations

import dataclasses
import json
import random
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from loracli.adapters.kinds import BaseModule
from loracli.cli._tables import weights_text
from loracli.errors import OutputExists, RecipeError, UsageError
from loracli.recipe.recipe import MAX_RECIPE_BYTES, Recipe, load_recipe, weights_by_leaf
from loracli.recipe.record import (
    INLINE_KINDS,
    FitRecord,
    HeldOut,
    HeldOutControl,
    HeldOutRow,
    HeldOutTask,
    LevelRecord,
    MixingKind,
    RecipeAdapter,
    RecipeBase,
    RecipeData,
    RecipeMixing,
    StageRecord,
    StartRecord,
    group_name,
    weights_digest,
)

KINDS = "'adapter', 'layer', 'module', 'rank', 'core', 'factors'"
FILES = {"adapter_config.json": "c" * 64, "adapter_model.safetensors": "d" * 64}


def local(reference: str, **fields: Any) -> RecipeAdapter:
    adapter = RecipeAdapter(reference, None, None, None, FILES, 8, 16.0, False, "float32", "org/base")
    return replace(adapter, **fields)


def hub(reference: str = "org/math@v1") -> RecipeAdapter:
    return RecipeAdapter(reference, "org/math", "sub/dir", "a" * 40, FILES, 4, 8.5, True, "bfloat16", None)


def make_recipe(folder: Path, *adapters: RecipeAdapter) -> Recipe:
    """A recipe with a value of its own in every field; weights are floats that need all their digits."""
    adapters = adapters or (local("know"), hub())
    generator = random.Random(0)
    names = [f"model.layers.{i}.self_attn.{leaf}" for i in range(3) for leaf in ("q_proj", "v_proj")]
    references = [a.reference for a in adapters]
    weights = {n: (generator.gauss(0, 1), *(None for _ in adapters[1:])) for n in names}
    return Recipe(
        base=RecipeBase("org/base", "b" * 40, "e" * 64),
        adapters=adapters,
        data=(
            RecipeData("val é.jsonl", "f" * 64, "messages", 1.0, 96, 4321, 2, (3, 17), 1, 4, "a" * 64, "b" * 12 * 96),
            RecipeData("<stdin>", "f" * 64, "text", 2.5, 1, 2, 0, (), 0, 0, None, "c" * 12),
        ),
        fit=FitRecord(
            recipe="cat",
            settings={"seed": 3, "ridge": None, "passes": 8.0, "paper": False, "mixing": "module", "rate": 1e-9},
            criterion="nats per token",
            stages=(StageRecord("module", "sum", "probe", 0.01, 3, None, (1.5, 1 / 3)),),
            rungs=(
                LevelRecord(
                    kind="module",
                    numbers=6,
                    starts=(
                        StartRecord("sum", 1.5, 1.0, 1 / 7),
                        StartRecord("adapter", None, None, None, "the loss is not finite"),
                    ),
                    chosen="sum",
                    ridge=0.01,
                    validation=0.1,
                    gain=0.2,
                    standard_error=1e-9,
                    won=True,
                    why="asked for",
                ),
            ),
            folds=1,
            refitted=True,
            passes=7.25,
            largest_move=0.1 + 0.2,
            training_nats_per_token=1 / 3,
        ),
        mixing=RecipeMixing("module", weights, 6),
        modules=(*(BaseModule(n, "linear", 32, 48) for n in names), BaseModule("embed", "embedding", 259, 32)),
        dtype="float32",
        held_out=HeldOut(
            name="val.jsonl",
            records=24,
            scored_tokens=1000,
            best_ingredient=references[0],
            rows=tuple(
                HeldOutRow(name, generator.random(), -generator.random(), (-1e-17, generator.random()), 0.25)
                for name in ("base", *references, "uniform", "sum", "fit")
            ),
            tasks=tuple(
                HeldOutTask(task, 12, 500, dict.fromkeys(("base", *references, "uniform", "sum", "fit"), 1 / 3))
                for task in ("code", "math")
            ),
            verdict="better",
        ),
        versions={"loracat": "0.1.0", "torch": "2.13.0"},
        folder=folder,
    )


def saved(folder: Path, /, **changes: Any) -> dict[str, Any]:
    """The document of a recipe with some fields changed; `a__b=...` changes field b of a."""
    document: dict[str, Any] = json.loads(make_recipe(folder).to_json())
    for path, value in changes.items():
        *parents, last = path.split("__")
        target: Any = document
        for parent in parents:
            target = target[int(parent)] if isinstance(target, list) else target[parent]
        target[int(last) if isinstance(target, list) else last] = value
    return document


def problems(folder: Path, document: object) -> tuple[str, ...]:
    """The problems that loading the document reports."""
    path = folder / "damaged.json"
    path.write_text(json.dumps(document))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    return caught.value.problems


# Round trips.


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    recipe.save(tmp_path / "recipe.json")
    loaded = load_recipe(tmp_path / "recipe.json")
    assert loaded == recipe
    assert repr(vars(loaded)) == repr(vars(recipe))  # also tells tuples from lists, and 8 from 8.0


def test_saving_again_writes_the_same_bytes(tmp_path: Path) -> None:
    make_recipe(tmp_path).save(tmp_path / "one.json")
    load_recipe(tmp_path / "one.json").save(tmp_path / "two.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


@pytest.mark.parametrize("kind", INLINE_KINDS)
def test_weights_are_found_by_the_group_of_a_module(tmp_path: Path, kind: MixingKind) -> None:
    groups = {"adapter": "*", "layer": "model.layers.11", "module": "model.layers.11.mlp.up_proj"}
    other = "model.layers.1.mlp.up_proj"
    weights = {groups[kind]: (0.5, None), **({} if kind == "adapter" else {group_name(other, kind): (2.0, 3.0)})}
    recipe = replace(make_recipe(tmp_path), mixing=RecipeMixing(kind, weights, 2))
    recipe.save(tmp_path / "r.json")
    loaded = load_recipe(tmp_path / "r.json")
    assert loaded.weights_of("model.layers.11.mlp.up_proj") == (0.5, None)
    assert loaded.weights_of(other) == ((0.5, None) if kind == "adapter" else (2.0, 3.0))


def test_the_file_holds_no_absolute_path(tmp_path: Path) -> None:
    folder = tmp_path / "some user"
    folder.mkdir()
    make_recipe(Path(), local(str(tmp_path / "adapters" / "know")), hub()).save(folder / "recipe.json")
    text = (folder / "recipe.json").read_text()
    assert str(tmp_path) not in text and "some user" not in text
    assert '"../adapters/know"' in text


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("recipe.json", "adapters/know"),
        ("adapters/recipe.json", "know"),
        ("adapters/know/recipe.json", "."),
        ("recipes/deep/recipe.json", "../../adapters/know"),
    ],
)
def test_local_adapters_are_named_from_the_folder_of_the_recipe(tmp_path: Path, target: str, expected: str) -> None:
    recipe = make_recipe(tmp_path / "here", local("../adapters/know"), hub())
    recipe.save(tmp_path / target)
    loaded = load_recipe(tmp_path / target)
    assert [a.reference for a in loaded.adapters] == [expected, "org/math@v1"]
    assert loaded.held_out.best_ingredient == expected
    for task in loaded.held_out.tasks:
        assert list(task.nats_per_token) == ["base", expected, "org/math@v1", "uniform", "sum", "fit"]
    assert [row.name for row in loaded.held_out.rows] == ["base", expected, "org/math@v1", "uniform", "sum", "fit"]
    assert (loaded.folder / loaded.adapters[0].reference).resolve() == (tmp_path / "adapters" / "know").resolve()


def test_a_recipe_that_moves_there_and_back_is_unchanged(tmp_path: Path) -> None:
    make_recipe(tmp_path / "here").save(tmp_path / "here" / "r.json")
    load_recipe(tmp_path / "here" / "r.json").save(tmp_path / "a" / "b" / "r.json")
    load_recipe(tmp_path / "a" / "b" / "r.json").save(tmp_path / "here" / "again.json")
    assert (tmp_path / "here" / "again.json").read_bytes() == (tmp_path / "here" / "r.json").read_bytes()


def test_a_row_or_module_that_there_is_not_is_refused_in_words(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    with pytest.raises(UsageError, match="there is no row 'unifrm'") as caught:
        recipe.held_out.row("unifrm")
    assert caught.value.hint == "did you mean uniform?"
    fresh = replace(recipe.held_out.row("fit"), name="fresh-lora")
    held = replace(recipe.held_out, controls=(HeldOutControl(fresh, 0.0, (0.0, 0.0)),))
    assert held.row("fresh-lora") == fresh
    with pytest.raises(UsageError, match="the recipe has no weights for 'foo'"):
        recipe.weights_of("foo")
    with pytest.raises(UsageError) as caught:
        recipe.weights_of("v_proj")
    assert caught.value.hint == "did you mean model.layers.0.self_attn.v_proj?"


@pytest.mark.parametrize("name", ["base", "uniform", "sum", "fit", "fresh-lora"])
def test_a_directory_called_like_a_row_of_the_table_stays_apart_from_it(tmp_path: Path, name: str) -> None:
    make_recipe(tmp_path, local(f"./{name}"), hub()).save(tmp_path / "r.json")
    loaded = load_recipe(tmp_path / "r.json")
    assert loaded.adapters[0].reference == loaded.held_out.best_ingredient == f"./{name}"
    rows = [row.name for row in loaded.held_out.rows]
    assert rows == ["base", f"./{name}", "org/math@v1", "uniform", "sum", "fit"]
    public = [row.name for row in loaded.public().held_out.rows]
    assert len(set(public)) == len(public)


def test_published_names_show_no_path_and_tell_directories_apart(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, local("../x/run/math"), local("../x/run/code"), local("../y/run/code"), hub())
    assert recipe.labels() == {
        "../x/run/math": "math",
        "../x/run/code": "x/run/code",
        "../y/run/code": "y/run/code",
        "org/math@v1": "org/math@v1",
    }
    public = recipe.public()
    assert [a.reference for a in public.adapters] == list(recipe.labels().values())
    assert public.held_out.best_ingredient == "math"
    assert str(tmp_path) not in public.to_json() and ".." not in public.to_json()


# Saving.


def test_an_existing_file_is_kept_without_force(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text("mine")
    with pytest.raises(OutputExists):
        make_recipe(tmp_path).save(path)
    assert path.read_text() == "mine"
    make_recipe(tmp_path).save(path, force=True)
    assert load_recipe(path) == make_recipe(tmp_path)


def test_a_directory_is_never_replaced(tmp_path: Path) -> None:
    for force in (False, True):
        with pytest.raises(OutputExists, match="is a directory"):
            make_recipe(tmp_path).save(tmp_path, force=force)


def test_a_dangling_link_counts_as_taken(tmp_path: Path) -> None:
    (tmp_path / "r.json").symlink_to("nowhere")
    with pytest.raises(OutputExists):
        make_recipe(tmp_path).save(tmp_path / "r.json")


# Damage.


def test_the_recipe_that_the_cases_below_damage_is_fine(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(saved(tmp_path)))
    assert load_recipe(tmp_path / "r.json") == make_recipe(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("dtype", 5, "dtype: expected text, got 5"),
        ("dtype", None, "dtype: expected text, got null"),
        ("base", [], "base: expected an object, got []"),
        ("base__commit", 5, "base.commit: expected text, got 5"),
        ("adapters", {}, "adapters: expected a list, got {}"),
        ("adapters", [], "adapters: empty"),
        ("adapters__0", "know", 'adapters[0]: expected an object, got "know"'),
        ("adapters__1__rank", "8", 'adapters[1].rank: expected a whole number, got "8"'),
        ("adapters__1__rank", 8.5, "adapters[1].rank: expected a whole number, got 8.5"),
        ("adapters__1__rank", True, "adapters[1].rank: expected a whole number, got true"),
        ("adapters__0__lora_alpha", True, "adapters[0].lora_alpha: expected a number, got true"),
        ("adapters__0__use_rslora", 1, "adapters[0].use_rslora: expected true or false, got 1"),
        (
            "adapters__0__sha256__adapter_config.json",
            1,
            "adapters[0].sha256['adapter_config.json']: expected text, got 1",
        ),
        ("fit__passes", 10**60, "fit.passes: expected a number, got 1" + "0" * 59),
        ("fit__settings__seed", [], "fit.settings['seed']: expected a whole number, got []"),
        ("fit__rungs__0__starts__1", [], "fit.rungs[0].starts[1]: expected an object, got []"),
        ("fit__rungs__0__won", 1, "fit.rungs[0].won: expected true or false, got 1"),
        ("mixing__kind", "diagonal", f"mixing.kind: expected one of {KINDS}, got 'diagonal'"),
        ("mixing__kind", ["module"], f"mixing.kind: expected one of {KINDS}, got ['module']"),
        ("mixing__kind", "core", "mixing.tensors_sha256: expected the sha256 of its tensors with the kind 'core'"),
        ("mixing__tensors_sha256", "0" * 64, "mixing.tensors_sha256: expected null with the kind 'module'"),
        ("mixing__tensors_sha256", 5, "mixing.tensors_sha256: expected text, got 5"),
        ("mixing__numbers", 1.5, "mixing.numbers: expected a whole number, got 1.5"),
        ("mixing__numbers", 0, "mixing.numbers: expected at least 1, got 0"),
        ("mixing__tensors", {}, "mixing.tensors: unknown"),
        ("mixing__weights", [], "mixing.weights: expected an object, got []"),
        ("modules__2__in_features", None, "modules[2].in_features: expected a whole number, got null"),
        (
            "modules__2__kind",
            "conv2d",
            "modules[2].kind: expected one of 'linear', 'conv1d', 'embedding', 'parameter', 'experts', "
            "'convolution', 'other', got 'conv2d'",
        ),
        ("held_out__rows__0__interval", [0.5], "held_out.rows[0].interval: expected 2 values, got 1"),
        ("held_out__rows__0__interval", [0, 1, 2], "held_out.rows[0].interval: expected 2 values, got 3"),
        ("held_out__rows__0__interval__1", "x", 'held_out.rows[0].interval[1]: expected a number, got "x"'),
        ("held_out__best_ingredient", "other", "held_out.best_ingredient: 'other' is none of the adapters"),
        ("held_out__rows", [], "held_out.rows: no row 'fit'"),
        (
            "held_out__verdict",
            "no better than a fresh LoRA",
            "held_out.controls: expected the one that the verdict is about",
        ),
        ("held_out__rows__1__name", "nobody", "held_out.rows: no row 'know', the best adapter"),
        (
            "held_out__tasks__1__nats_per_token",
            {"fit": 1},
            "held_out.tasks[1].nats_per_token: not the names of held_out.rows",
        ),
        ("held_out__tasks__0__task", None, "held_out.tasks[0].task: expected text, got null"),
        ("data", [], "data: empty"),
        ("data__1__weight", "2", 'data[1].weight: expected a number, got "2"'),
        ("host", "my machine", "host: unknown"),
        ("folder", "/root", "folder: unknown"),
        ("base__path", "/root", "base.path: unknown"),
        ("base__quantisation", "nf5", "base.quantisation: expected one of 'nf4', 'fp4', 'int8', got 'nf5'"),
        ("adapters__0__sha256", {}, "adapters[0].sha256: lacks adapter_config.json"),
        (
            "adapters__0__sha256",
            {"adapter_config.json": "c" * 64},
            "adapters[0].sha256: lacks adapter_model.safetensors or adapters.safetensors",
        ),
        (
            "adapters__0__reference",
            "org/math@v1",
            "adapters[1].reference: 'org/math@v1' names another row of the table",
        ),
        ("adapters__0__reference", "sum", "adapters[0].reference: 'sum' names another row of the table"),
    ],
)
def test_a_damaged_field_is_named_with_its_path(tmp_path: Path, field: str, value: object, problem: str) -> None:
    assert problem in problems(tmp_path, saved(tmp_path, **{field: value}))


def test_places_and_experts_that_cannot_be_are_named(tmp_path: Path) -> None:
    """Of a recipe that names modules otherwise than an adapter, or counts experts."""
    places = {"loracat_recipe": 4, "adapters__0__renamed": {"q": {"base": "p", "part": 2, "parts": 2}}}
    assert "adapters[0].renamed['q']: part 2 of 2" in problems(tmp_path, saved(tmp_path, **places))
    counted = {"loracat_recipe": 4, "modules__2__experts": 1 << 20}
    assert "modules[2].experts: expected 0 to 16384, got 1048576" in problems(tmp_path, saved(tmp_path, **counted))


@pytest.mark.parametrize(
    "field", [f.name for f in dataclasses.fields(Recipe) if f.name not in ("folder", "activations")]
)
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    document = saved(tmp_path)
    del document[field]
    assert problems(tmp_path, document) == (f"{field}: missing",)


def test_weights_for_another_number_of_adapters_are_named(tmp_path: Path) -> None:
    document = saved(tmp_path)
    document["mixing"]["weights"]["model.layers.1.self_attn.q_proj"].append(0.5)
    assert problems(tmp_path, document) == (
        "mixing.weights['model.layers.1.self_attn.q_proj']: 3 weights for 2 adapters",
    )


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    document = saved(tmp_path, dtype=5, adapters__0__rank="x", mixing__kind="nonsense", extra=1, modules__0__kind=0)
    del document["base"]["id"], document["fit"]["passes"]
    found = "\n".join(problems(tmp_path, document))
    for field in ("dtype", "adapters[0].rank", "mixing.kind", "extra", "modules[0].kind", "base.id", "fit.passes"):
        assert f"{field}: " in found
    assert len(found.splitlines()) == 7


def test_a_weight_that_is_no_number_is_refused(tmp_path: Path) -> None:
    text = json.dumps(saved(tmp_path, fit__passes="HERE"))
    for number in ("NaN", "Infinity", "1e999"):
        (tmp_path / "r.json").write_text(text.replace('"HERE"', number))
        with pytest.raises(RecipeError, match=number):
            load_recipe(tmp_path / "r.json")


def test_a_recipe_has_the_first_schema_that_has_its_fields(tmp_path: Path) -> None:
    fields = saved(tmp_path)
    assert fields["loracat_recipe"] == 2 and "unread" not in fields["data"][0]
    fields["data"][0]["unread"] = ["notes"]
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.problems == ("loracat_recipe: expected 4 for these fields, got 2",)
    path.write_text(json.dumps(fields | {"loracat_recipe": 4}))
    recipe = load_recipe(path)
    assert recipe.data[0].unread == ("notes",)
    assert json.loads(recipe.to_json())["loracat_recipe"] == 4


def test_a_recipe_says_how_its_base_was_quantised_and_an_older_one_that_it_was_not(tmp_path: Path) -> None:
    older = make_recipe(tmp_path)
    assert older.base.quantisation is None and "quantisation" not in saved(tmp_path)["base"]
    recipe = replace(older, base=replace(older.base, quantisation="nf4"))
    recipe.save(tmp_path / "q.json")
    assert load_recipe(tmp_path / "q.json") == recipe
    document = json.loads((tmp_path / "q.json").read_text())
    assert (document["loracat_recipe"], document["base"]["quantisation"]) == (7, "nf4")


def _weighed(**weights: tuple[float | None, ...]) -> RecipeMixing:
    found: dict[str, tuple[float | None, ...]] = {"a": (1.0, None), "b": (0.0, 1e-7)}
    return RecipeMixing("module", {**found, **weights}, 3, weights_sha256=weights_digest(found))


@pytest.mark.parametrize(
    ("weights", "edited"),
    [
        ({}, False),
        ({"a": (1, None)}, False),
        ({"b": (-0.0, 0.0000001)}, False),
        ({"b": (0.0, 1.0000000000000002e-7)}, True),
        ({"a": (1.0, 0.0)}, True),
        ({"a": (0.0, 1e-7), "b": (1.0, None)}, True),
        ({"c": (1.0, 1.0)}, True),
    ],
)
def test_weights_are_edited_where_a_number_is_another(
    weights: dict[str, tuple[float | None, ...]], edited: bool
) -> None:
    assert _weighed(**weights).edited is edited


def test_the_digest_of_weights_is_what_the_format_says() -> None:
    text = b'{"a":[1.0,null],"b":[0.0,1e-07]}'
    assert _weighed().weights_sha256 == sha256(text).hexdigest()


def test_a_recipe_keeps_the_digest_of_the_weights_that_were_found(tmp_path: Path) -> None:
    """Through an edit, saving, and what may be published; without a digest nothing is known of an edit."""
    plain = make_recipe(tmp_path)
    assert not plain.mixing.edited and plain.held_out_of_weights == plain.held_out
    found = replace(plain.mixing, weights_sha256=weights_digest(plain.mixing.weights))
    group, row = next(iter(found.weights.items()))
    edited = replace(plain, mixing=replace(found, weights={**found.weights, group: (0.7, *row[1:])}))
    edited.save(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["loracat_recipe"] == 5
    for recipe in (edited, load_recipe(tmp_path / "r.json"), load_recipe(tmp_path / "r.json").public()):
        assert recipe.mixing.edited and recipe.mixing.weights_sha256 == found.weights_sha256
        assert recipe.held_out_of_weights is None and recipe.held_out.verdict == "better"


def test_a_digest_of_weights_goes_with_kinds_that_keep_them(tmp_path: Path) -> None:
    core = {"mixing__kind": "core", "mixing__tensors_sha256": "a" * 64, "mixing__weights_sha256": "b" * 64}
    assert problems(tmp_path, saved(tmp_path, loracat_recipe=5, **core)) == (
        "mixing.weights_sha256: expected null with the kind 'core'",
    )
    assert problems(tmp_path, saved(tmp_path, loracat_recipe=5, mixing__weights_sha256="no")) == (
        "mixing.weights_sha256: expected a sha256, 64 hexadecimal digits, got 'no'",
    )


@pytest.mark.parametrize(
    ("version", "way_out"),
    [
        (8, "upgrade"),
        (99, "upgrade"),
        (1, "fit again"),
        (0, None),
        ("2", None),
        (2.0, None),
        (None, None),
        (True, None),
    ],
    ids=repr,
)
def test_another_schema_is_refused_with_the_way_out_where_there_is_one(
    tmp_path: Path, version: object, way_out: str | None
) -> None:
    (tmp_path / "r.json").write_text(json.dumps(saved(tmp_path) | {"loracat_recipe": version, "new_field": 1}))
    with pytest.raises(RecipeError, match="has the schema .*this version reads 2 to 7") as caught:
        load_recipe(tmp_path / "r.json")
    assert caught.value.problems == ()
    assert (way_out in (caught.value.hint or "")) if way_out else caught.value.hint is None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not valid JSON"),
        (b"[]", "is not a recipe"),
        (b"{}", "is not a recipe"),
        (b'{"peft_type": "LORA"}', "is not a recipe"),
        (b'{"loracat_recipe": 2, "loracat_recipe": 2}', "appears twice"),
        (b'{"loracat_recipe": 2', "not valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "r.json").write_bytes(data)
    with pytest.raises(RecipeError, match=reason):
        load_recipe(tmp_path / "r.json")


def test_a_recipe_cut_anywhere_is_refused(tmp_path: Path) -> None:
    data = make_recipe(tmp_path).to_json().encode()
    for length in range(0, len(data) - 2, 7):
        (tmp_path / "r.json").write_bytes(data[:length])
        with pytest.raises(RecipeError):
            load_recipe(tmp_path / "r.json")


def test_a_missing_recipe_and_a_directory_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(RecipeError, match="cannot be read") as caught:
            load_recipe(path)
        assert "loracat fit" in (caught.value.hint or "")


def test_an_endless_recipe_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "r.json").open("wb") as file:
        file.truncate(MAX_RECIPE_BYTES + 1)
    with pytest.raises(RecipeError, match="larger than"):
        load_recipe(tmp_path / "r.json")


# For people.


def test_weights_by_leaf_are_mean_lowest_and_highest(tmp_path: Path) -> None:
    weights: dict[str, tuple[float | None, ...]] = {
        "l.0.q_proj": (1.0, None),
        "l.1.q_proj": (2.0, -4.0),
        "l.2.q_proj": (6.0, 2.0),
        "l.0.v_proj": (None, 0.5),
    }
    recipe = replace(make_recipe(tmp_path), mixing=RecipeMixing("module", weights, 6))
    assert weights_by_leaf(recipe) == {
        "q_proj": [(3.0, 1.0, 6.0), (-1.0, -4.0, 2.0)],
        "v_proj": [None, (0.5, 0.5, 0.5)],
    }


def test_a_fit_as_published_says_that_it_is_one_and_whether_its_weights_are_still_the_random_start() -> None:
    recipe = make_recipe(Path())
    assert "published" not in weights_text(recipe)
    paper = replace(recipe.fit, recipe="paper", settings={"seed": 7}, largest_move=0.00042)
    said = weights_text(replace(recipe, fit=paper))
    assert "CAT as published: softmax weights from a random start, seed 7, moved by 0.00042 at most" in said
    assert said.endswith(": they are still the random start)")
    moved = weights_text(replace(recipe, fit=replace(paper, largest_move=0.2)))
    assert moved.endswith("moved by 0.2 at most)")
