"""What stands beside what is read: bad answers are not learnt, and nothing that the model should see is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loracli.calibration.dataset import read_dataset, render_dataset
from loracli.calibration.records import read_records
from loracli.calibration.shapes import SHAPES, Shape
from tests.calibration.test_file_forms import contents, refused, run, write
from tests.calibration.test_render import Heard
from tests.calibration.test_shapes import RECORDS
from tests.tiny import make_tokenizer

ANSWERED = [shape for shape in SHAPES if shape != "text"]


@pytest.mark.parametrize("shape", ANSWERED)
@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"label": True}, {"label": False}),
        ({"label": 1}, {"label": 0}),
        ({"label": "True"}, {"label": "False"}),
        ({"kto_tag": True}, {"kto_tag": False}),
        ({"is_correct": 1}, {"is_correct": 0}),
        ({}, {"weight": 0}),
        ({"weight": 1.0}, {"weight": 0.0}),
        ({"rejected": False}, {"rejected": True}),
        ({"train": True}, {"train": False}),
    ],
    ids=str,
)
def test_a_bad_answer_is_refused_and_the_command_shown_keeps_the_good_ones(
    tmp_path: Path, shape: Shape, good: dict[str, Any], bad: dict[str, Any]
) -> None:
    path = write(tmp_path / "val.jsonl", RECORDS[shape] | good, RECORDS[shape] | bad, RECORDS[shape] | good)
    error = refused(path)
    [problem] = error.problems
    assert problem.startswith(f"{path}:2: {next(iter(bad))}: ") and "--skip-bad" not in (error.hint or "")
    assert [record.line for record in read_records(path, skip_bad=True).records] == [1, 3]
    if shape != "messages":
        return  # the command is the same
    run((error.hint or "").removeprefix("keep the others: "), tmp_path)
    kept = read_records(tmp_path / "val.kept.jsonl")
    assert contents(kept) == contents(read_records(write(tmp_path / "two.jsonl", *[RECORDS[shape]] * 2)))


def test_a_label_that_is_a_class_is_no_mark(tmp_path: Path) -> None:
    rows = [RECORDS["prompt-completion"] | {"label": number} for number in (0, 2, 1)]
    assert len(read_records(write(tmp_path / "val.jsonl", *rows)).records) == 3
    rows = [{"text": "t", "label": number} for number in (0, 1, False)]
    assert len(read_records(write(tmp_path / "text.jsonl", *rows)).records) == 3
    choice = RECORDS["prompt-completion"] | {"choices": ["c", "d"], "correct": 0}
    assert len(read_records(write(tmp_path / "choice.jsonl", choice)).records) == 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "beside",
    [{"rejected": "b"}, {"chosen": "a", "rejected": "b"}, {"rejected_response": "b"},
     {"rejected_messages": [{"a": "b"}]}, {"chosen": {"from": "gpt", "value": "a"}},
     {"weight": 0.5}, {"sample_weight": 2}],
    ids=str,
)  # fmt: skip
def test_preferences_and_weights_beside_any_shape_are_refused_and_the_command_leaves_the_key_out(
    tmp_path: Path, shape: Shape, beside: dict[str, Any]
) -> None:
    path = write(tmp_path / "val.jsonl", RECORDS[shape] | beside)
    for key in beside:
        error = refused(path)
        assert error.problems[0].startswith(f"{path}:1: {key}: ")
        if shape != "text":
            return  # the command is the same
        run((error.hint or "").split("leave the key out: ")[1], tmp_path)
        path = (tmp_path / f"{path.stem}.kept.jsonl").rename(tmp_path / f"{path.stem}x.jsonl")
    assert len(read_records(path).records) == 1


def test_the_command_fits_an_array_too(tmp_path: Path) -> None:
    path = tmp_path / "val.json"
    path.write_text(json.dumps([{"text": "a", "weight": weight} for weight in (0, 1)], indent=2))
    run((refused(path).hint or "").removeprefix("keep the others: "), tmp_path)
    assert len(read_records(tmp_path / "val.jsonl").records) == 1


def test_grades_on_an_unknown_scale_are_warned_of_and_kept(tmp_path: Path) -> None:
    heard = Heard()
    file = read_records(write(tmp_path / "val.jsonl", {"text": "t", "score": 1, "rating": None}), progress=heard)
    assert file.ignored_keys == ("rating", "score")
    assert heard.warnings == [f"{file.source}: score: not read; every answer is learnt, whatever its grade"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "key",
    ["image", "images", "image_url", "img_path", "audio", "audios", "videos", "video_file", "pixel_values", "media"],
)
def test_pictures_audio_and_video_of_a_record_are_refused_where_there_are_any(
    tmp_path: Path, shape: Shape, key: str
) -> None:
    path = tmp_path / "val.jsonl"
    for nothing in (None, "", [], [None], {}, False):
        assert len(read_records(write(path, RECORDS[shape] | {key: nothing})).records) == 1
    for something in ("a.png", ["a.png"], {"bytes": "x"}, [[0.5]]):
        [problem] = refused(write(path, RECORDS[shape] | {key: something})).problems
        assert problem.endswith("of what is no text; only text is read")


@pytest.mark.parametrize(
    ("shape", "beside"),
    [
        *((shape, {key: "Other words."}) for shape in ("messages", "sharegpt", "prompt-completion", "text")
          for key in ("instruction", "input", "context")),
        *((shape, {"history": [["u1", "a1"]]}) for shape in ("messages", "sharegpt", "prompt-completion")),
        *((shape, {key: "Be."}) for shape in ("prompt-completion", "text") for key in ("system", "system_prompt")),
        *((shape, {"tools": [{"name": "f"}]}) for shape in ("prompt-completion", "text")),
        ("messages", {"functions": [{"name": "f"}]}),
        ("messages", {"documents": [{"text": "d"}]}),
        ("messages", {"prompt": "Other words."}),
        ("alpaca", {"context": "Other words."}),
    ],
    ids=str,
)  # fmt: skip
def test_text_that_belongs_before_an_answer_and_is_not_read_is_refused(
    tmp_path: Path, shape: Shape, beside: dict[str, Any]
) -> None:
    [key] = beside
    path = write(tmp_path / "val.jsonl", RECORDS[shape] | beside)
    error = refused(path, shape=shape)
    [problem] = error.problems
    assert problem.startswith(f"{path}:1: {key}: the model would not see it") and f'k != "{key}"' in (error.hint or "")
    nothing = {key: [] if isinstance(beside[key], list) else " "}
    assert len(read_records(write(path, RECORDS[shape] | nothing), shape=shape).records) == 1


def test_text_beside_that_is_in_what_is_read_is_no_loss(tmp_path: Path) -> None:
    path = tmp_path / "val.jsonl"
    chat = {"messages": [{"role": "user", "content": "Add 1\n and 2."}, {"role": "assistant", "content": "3"}]}
    for beside in (
        {"prompt": "Add 1 and 2."},
        {"instruction": "Add 1", "input": "and 2."},
        {"history": [["Add 1", "3"]]},
    ):
        assert len(read_records(write(path, chat | beside)).records) == 1
    text = {"text": "Below is: Add. ### 3", "instruction": "Add.", "output": "3"}
    assert len(read_records(write(path, text), shape="text").records) == 1
    alpaca = {"instruction": "Add 1.", "output": "3", "prompt": "Below is an instruction: Add 1. Response:"}
    assert len(read_records(write(path, alpaca)).records) == 1


def test_what_becomes_the_first_turn_is_said_and_what_is_not_read_is_kept_for_the_recipe(tmp_path: Path) -> None:
    heard = Heard()
    chats = [[{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "a"}] for i in range(40)]
    rows = [{"messages": messages, "system": "s", "x" * 200: 1} for messages in chats]
    path = write(tmp_path / "val.jsonl", *rows)
    dataset = read_dataset(path, None, holdout=0.5, seed=0, progress=heard)
    assert heard.notes == [
        f"{path}: system: becomes the first turn of its conversation",
        f"{path}: these keys are not read: {'x' * 60}...",
    ]
    [data] = render_dataset(dataset, make_tokenizer(), max_length=200).data
    assert data.unread == ("x" * 100,)


def test_deep_and_wide_values_beside_are_looked_at_all_the_same(tmp_path: Path) -> None:
    deep: Any = "x"
    for _ in range(400):
        deep = [deep, None]
    assert refused(write(tmp_path / "val.jsonl", {"text": "t", "images": deep, "context": deep})).problems
    keys = {f"key {i}": i for i in range(500)}
    assert len(read_records(write(tmp_path / "wide.jsonl", {"text": "t"} | keys)).ignored_keys) == 100
    [problem] = refused(write(tmp_path / "none.jsonl", keys)).problems
    assert problem.endswith(" and 480 more")
