"""Twice as much of a stranger's bytes is twice the work, and no more: counted in steps, not in seconds."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest

from loracli.adapters.adapter import sort_tensors
from loracli.adapters.claims import read_front_matter
from loracli.errors import BaseModelMismatch, LoracatError, MalformedAdapter, RecipeError
from loracli.model.checkpoint import read_checkpoint
from loracli.recipe.recipe import Recipe, decode_recipe
from loracli.recipe.record import MAX_ADAPTERS
from loracli.report.charts import heat_map
from loracli.report.grid import grids, short_names
from loracli.serving.adapter_files import _read_headers
from loracli.system.document import MAX_PROBLEMS, decode
from loracli.system.strict_json import StrictJsonError, _object
from loracli.system.tensor_file import _MAX_NAME, open_tensor_file
from tests.test_recipe import FILES, local, make_recipe

LORA = "base_model.model.model.layers.{}.q_proj.lora_A.weight"


class Text(str):
    """Text that counts how often it is compared, where a search goes through a list below any line of Python."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        Text.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def steps(work: Callable[[], object]) -> int:
    """Lines, calls and comparisons that the work takes."""
    count, Text.compared = 0, 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count + Text.compared


def grows_like_its_input(make: Callable[[int], Callable[[], object]], size: int = 200) -> bool:
    """Whether twice the input takes at most twice the steps, and a little; a square would take four times as many."""
    make(size)()  # what is loaded or kept at the first call
    once, twice = steps(make(size)), steps(make(2 * size))
    assert once > size / 2, "the steps are not counted"
    return twice <= 2.3 * once + 200


def test_a_square_is_seen() -> None:
    """Or none of the tests below could fail."""
    assert not grows_like_its_input(lambda n: lambda: [a for a in range(n) if all(a >= b or True for b in range(n))])
    names = [Text(n) for n in range(400)]
    assert not grows_like_its_input(lambda n: lambda: [names[:n].count(name) for name in names[:n]])


def refused(work: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        with pytest.raises((LoracatError, StrictJsonError)):
            work()

    return run


def test_a_doubled_key_is_found_in_one_pass() -> None:
    def make(n: int) -> Callable[[], object]:
        pairs = [(Text(f"key{i}"), i) for i in range(n)]
        return refused(lambda: _object([*pairs, (Text(f"key{n - 1}"), 0)]))

    assert grows_like_its_input(make)


def headers(path: Path, entries: dict[str, Any], data: bytes) -> Path:
    raw = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def test_a_header_of_many_tensors(tmp_path: Path) -> None:
    def make(n: int) -> Callable[[], object]:
        entries: dict[str, Any] = {
            LORA.format(i): {"dtype": "F32", "shape": [1, 1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(n)
        }
        path = headers(tmp_path / f"{n}.safetensors", entries, bytes(4 * n))
        return lambda: (open_tensor_file(path), _read_headers(path))

    assert grows_like_its_input(make)


SAVED: Any = SimpleNamespace(modules_to_save=("nowhere", "head"), ensure_weight_tying=False)


def test_names_of_many_dots_and_many_modules_saved_whole() -> None:
    def make(n: int) -> Callable[[], object]:
        deep = ".".join("a" * n) + ".weight"
        flat = [LORA.format(i) for i in range(n)]
        return refused(lambda: sort_tensors([deep, *flat], "file", SAVED))

    assert grows_like_its_input(make)


def test_a_name_longer_than_any_models_is_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}
    path = headers(tmp_path / "x.safetensors", {"a." * (_MAX_NAME // 2) + "b": entry}, bytes(4))
    for read in (open_tensor_file, _read_headers):
        with pytest.raises(MalformedAdapter, match=f"at most {_MAX_NAME} are read") as caught:
            read(path)
        assert len(str(caught.value)) < 400


def many(folder: Path, adapters: int, *, groups: int = 0, tasks: int = 0) -> dict[str, Any]:
    """The document of a recipe with many adapters in folders as deep as one another, groups and tasks."""
    recipe = make_recipe(folder, *(local(f"runs/{i}/same/end") for i in range(adapters)))
    document: dict[str, Any] = json.loads(recipe.to_json())
    one = next(iter(document["mixing"]["weights"].values()))
    document["mixing"]["weights"] |= {f"model.layers.{i}.x": one for i in range(groups)}
    document["modules"] += [
        {"name": f"model.layers.{i}.x", "kind": "linear", "in_features": 1, "out_features": 1} for i in range(groups)
    ]
    document["held_out"]["tasks"] *= max(1, tasks)
    for adapter in document["adapters"]:
        adapter["reference"] = Text(adapter["reference"])
    return document


def read(document: dict[str, Any], folder: Path) -> Recipe:
    return decode_recipe(document, "it", folder)


@pytest.mark.parametrize("what", ["adapters", "groups", "tasks"])
def test_a_recipe_of_many(tmp_path: Path, what: str) -> None:
    def make(n: int) -> Callable[[], object]:
        document = many(tmp_path, **{"adapters": 2, what: n})
        return lambda: read(document, tmp_path).public().to_json()

    assert grows_like_its_input(make, 100)


def test_labels_tell_directories_apart_as_a_comparison_of_all_pairs_does(tmp_path: Path) -> None:
    paths = ["a/b/c", "x/b/c", "c", "b/c", "a/base", "fit", "x/fit", "../d/e", "d/e", "q/d/e", "alone"]
    recipe = make_recipe(tmp_path, *(local(path) for path in paths))
    labels = recipe.labels()
    for path, label in labels.items():
        own = (tmp_path / path).resolve().parts[1:]
        others = [(tmp_path / other).resolve().parts[1:] for other in paths if other != path]
        others += [(row,) for row in ("base", "uniform", "sum", "fit")]
        length = label.count("/") + 1
        assert own[-length:] == tuple(label.split("/"))
        assert all(other[-length:] != own[-length:] for other in others)
        assert length == 1 or any(other[1 - length :] == own[1 - length :] for other in others)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["adapters"].extend(d["adapters"] * MAX_ADAPTERS), f"at most {MAX_ADAPTERS} are read"),
        (lambda d: d["data"].extend(d["data"] * 10_000), "at most 10000 are read"),
        (lambda d: d["versions"].update({f"v{i}": "1" for i in range(200)}), "at most 100 are read"),
    ],
)
def test_counts_of_a_recipe_have_ceilings(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    document = many(tmp_path, 2)
    change(document)
    with pytest.raises(RecipeError) as caught:
        read(document, tmp_path)
    assert len(caught.value.problems) == 1 and said in caught.value.problems[0]


def test_no_problem_grows_with_the_keys_around_it() -> None:
    """A key of a megabyte over a list of ten thousand is not written ten thousand times."""
    problems: list[str] = []
    decode(dict[str, tuple[int, ...]], {"k" * 1_000_000: ["x"] * 10_000}, "", problems)
    assert len(problems) == MAX_PROBLEMS and max(map(len, problems)) < 400


def test_names_that_share_no_layer_and_no_kind_make_no_map(tmp_path: Path) -> None:
    """A map of n rows and n columns with n weights in it is a square; the table below it is not."""

    def make(n: int) -> Callable[[], object]:
        document = many(tmp_path, 2)
        names = [f"a{i}.{i}.b{i}" for i in range(n)]
        document["mixing"]["weights"] = {name: [0.5, 0.5] for name in names}
        document["modules"] = [{"name": m, "kind": "linear", "in_features": 1, "out_features": 1} for m in names]
        recipe = read(document, tmp_path)
        return lambda: (grids(recipe), heat_map(recipe), short_names([Text(name) for name in names]))

    assert grows_like_its_input(make, 400)
    assert grids(make_recipe(tmp_path))


@pytest.mark.parametrize("number", ["²", "9" * 900, "٣"])
def test_a_number_that_is_none_is_the_name_of_a_layer(tmp_path: Path, number: str) -> None:
    document = many(tmp_path, 2)
    name = f"model.layers.{number}.q"
    document["mixing"]["weights"] = {name: [0.5, 0.5]}
    document["modules"] = [{"name": name, "kind": "linear", "in_features": 1, "out_features": 1}]
    assert len(grids(read(document, tmp_path))) == 2


def test_an_index_of_many_files(tmp_path: Path) -> None:
    def make(n: int) -> Callable[[], object]:
        folder = tmp_path / str(n)
        folder.mkdir(exist_ok=True)
        for i in range(n):
            (folder / f"a{i}.safetensors").touch()
        index = {"weight_map": {f"t{i}": f"z{i}.safetensors" for i in range(n)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

        def work() -> None:
            with pytest.raises(BaseModelMismatch):
                read_checkpoint(folder)

        return work

    assert grows_like_its_input(make)


@pytest.mark.parametrize(
    "block",
    ["? " * 8_000, "[" * 16_000, "- " * 8_000, "a: &a x\n" + "b: *a\n" * 3_000, "&a [" * 4_000 + "*a", "{a: " * 4_000],
    ids=["keys", "lists", "items", "aliases", "anchors", "mappings"],
)
def test_metadata_within_its_limit_is_read_or_refused(tmp_path: Path, block: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"---\n{block}\n---\n")

    def work() -> None:
        try:
            read_front_matter(path)
        except MalformedAdapter:
            pass

    assert steps(work) < 5_000_000


def test_a_file_name_that_is_hashed_is_checked(tmp_path: Path) -> None:
    document = many(tmp_path, 2)
    document["adapters"][0]["sha256"] = {**FILES, "../x": "0" * 64}
    with pytest.raises(RecipeError) as caught:
        read(document, tmp_path)
    assert caught.value.problems == (
        "a key of adapters[0].sha256: expected a name of letters, digits, ., _ and -, got '../x'",
    )
