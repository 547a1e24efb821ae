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
        ({"label": 1}, {"label": -1}),
        ({"label": "1"}, {"label": "-1"}),
        *(
            ({"label": yes}, {"label": no})
            for yes, no in (
                ("positive", "negative"),
                ("thumbs_up", "thumbs_down"),
                ("thumbs up", "Thumbs Down"),
                ("safe", "unsafe"),
                ("like", "dislike"),
                ("Y", "N"),
                (True, None),
                ("1", None),
            )
        ),
        *(
            ({key: True}, {key: False})
            for key in (
                "preferred",
                "is_preferred",
                "winner",
                "is_winner",
                "thumbs_up",
                "liked",
                "passed",
                "valid",
                "is_valid",
                "verified",
                "success",
                "human_label",
                "feedback_label",
                "answer_correct",
                "correctness",
                "is_good_answer",
                "keep",
                "include",
                "isCorrect",
                "Is-Valid",
            )
        ),
        *(({key: False}, {key: True}) for key in ("skip", "exclude", "thumbs_down")),
        ({"status": "accepted"}, {"status": "rejected"}),
        *(({key: 1}, {key: 0}) for key in ("train", "loss", "loss_scale", "keep", "passed", "is_preferred")),
        ({"train": "true"}, {"train": "false"}),
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
    rows = [RECORDS["prompt-completion"] | {"label": number} for number in (0, 1, 1) * 20 + (2,)]
    assert len(refused(write(tmp_path / "one.jsonl", *rows)).problems) == 20
    rows = [RECORDS["prompt-completion"] | {"label": number} for number in (1, None, 3)]
    assert len(read_records(write(tmp_path / "null.jsonl", *rows)).records) == 3
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
    assert heard.notes == [f"{file.source}: these keys are not read: rating"]


@pytest.mark.parametrize(
    ("values", "warned"),
    [((True, False), True), ((True, True), False), (("fine", "bad"), True), (("0", "1"), False), ((0, 1), False)],
)
def test_what_may_say_no_of_an_answer_under_an_unknown_name_is_warned_of(
    tmp_path: Path, values: tuple[Any, Any], warned: bool
) -> None:
    heard = Heard()
    path = write(tmp_path / "val.jsonl", *(RECORDS["messages"] | {"checked_by_me": value} for value in values))
    assert len(read_records(path, progress=heard).records) == 2
    said = [f"{path}: checked_by_me: not read; every answer is learnt, whatever it says"]
    assert heard.warnings == (said if warned else [])


def test_a_count_of_none_is_warned_of(tmp_path: Path) -> None:
    heard = Heard()
    path = write(tmp_path / "val.jsonl", *(RECORDS["messages"] | {"thumbs_up": count} for count in (2, 0)))
    assert len(read_records(path, progress=heard).records) == 2
    assert heard.warnings == [f"{path}: thumbs_up: not read; every answer is learnt, whatever it says"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "key",
    ["image", "images", "image_url", "img_path", "audio", "audios", "videos", "video_file", "pixel_values", "media",
     "imagePath", "image1", "image_1", "input_image", "audio_filepath", "screenshot", "attachments", "files", "pdf",
     "image_grid_thw", "Image"],
)  # fmt: skip
def test_pictures_audio_and_video_of_a_record_are_refused_where_there_are_any(
    tmp_path: Path, shape: Shape, key: str
) -> None:
    path = tmp_path / "val.jsonl"
    for nothing in (None, "", [], [None], {}, False):
        assert len(read_records(write(path, RECORDS[shape] | {key: nothing})).records) == 1
    for something in ("a.png", ["a.png"], {"bytes": "x"}, [[0.5]]):
        [problem] = refused(write(path, RECORDS[shape] | {key: something})).problems
        assert problem.endswith("of something that is not text; only text is read")


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
        ("messages", {"prompt": "Other words. Add 1 and 2."}),
        *(("messages", {key: "Other words."}) for key in (
            "passage", "document", "background", "knowledge", "evidence", "article", "story", "paragraph", "title",
            "chat_history", "dialogue_history", "Context", "dialogueHistory")),
        *(("prompt-completion", {key: "Be."}) for key in ("System", "systemPrompt", "preprompt", "sys", "persona")),
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
        {"history": [["Add 1", "and"]]},
        {"title": "2", "Context": " Add\t1 "},
    ):
        assert len(read_records(write(path, chat | beside)).records) == 1
    text = {"text": "Below is: Add. ### 3", "instruction": "Add.", "output": "3"}
    assert len(read_records(write(path, text), shape="text").records) == 1
    assert len(read_records(write(path, {"text": "All of it.", "title": "Another"})).records) == 1
    chinese = {"prompt": "法国的首都是哪里？", "completion": "巴黎", "question": "首都是哪里"}
    assert len(read_records(write(path, chinese)).records) == 1


TALK = [{"role": role, "content": text} for role, text in (("user", "a b"), ("assistant", "c d"), ("user", "e"),
                                                           ("assistant", "f g"))]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"prompt": "q", "completion": "The sky is blue.", "context": "The sky is blue."}, "context"),
        ({"prompt": "q", "completion": "yes, be terse", "system": "be terse"}, "system"),
        ({"prompt": "What is the capital?", "completion": "Paris", "context": "a"}, "context"),
        ({"prompt": "What is it?", "completion": "Paris", "context": 5}, "context"),
        ({"prompt": "Answer in French only. a b", "messages": TALK}, "prompt"),
        ({"context": "f g", "messages": TALK}, "context"),
        ({"context": "c d", "messages": TALK}, "context"),
        ({"context": "b e", "messages": TALK}, "context"),
        ({"history": [["a b", "f g"]], "messages": TALK}, "history"),
        ({"instruction": "Add 1.", "output": "3", "prompt": "Be brief. Add 1. Response:"}, "prompt"),
    ],
    ids=str,
)
def test_text_beside_counts_as_read_only_whole_and_before_the_answer(
    tmp_path: Path, fields: dict[str, Any], key: str
) -> None:
    [problem] = refused(write(tmp_path / "val.jsonl", fields)).problems
    assert problem.startswith(f"{tmp_path / 'val.jsonl'}:1: {key}: the model would not see it")


def test_earlier_turns_and_what_is_not_learnt_count_as_seen(tmp_path: Path) -> None:
    path = write(tmp_path / "val.jsonl", {"messages": TALK, "history": [["a b", "c d"]], "context": "e"})
    assert len(read_records(path).records) == 1
    silent = [TALK[0], TALK[1] | {"weight": 0}, *TALK[2:]]
    assert len(read_records(write(path, {"messages": silent, "context": "c d"})).records) == 1


@pytest.mark.parametrize("key", ["System", "systemPrompt", "sys", "preprompt", "persona"])
def test_a_system_text_under_another_name_is_read_with_the_option_shown(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "val.jsonl", {"messages": TALK, key: "Be."})
    option = (refused(path).hint or "").split("--fields ")[1]
    content = read_records(path, fields=option).records[0].content
    assert content["messages"] == [{"role": "system", "content": "Be."}, *TALK]


def test_an_empty_list_as_a_text_is_nothing(tmp_path: Path) -> None:
    pair = {"prompt": "p", "completion": "c"}
    path = write(tmp_path / "val.jsonl", pair | {"tools": "[]", "functions": " [] ", "images": "[]", "context": "{}"})
    assert contents(read_records(path)) == [pair]


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


def test_a_text_is_looked_for_a_limited_number_of_times(tmp_path: Path) -> None:
    """So that the time for a record grows with its size alone."""
    words = [f"w{index}" for index in range(201)]
    pair = {"prompt": " ".join(words), "completion": "c"}
    assert len(read_records(write(tmp_path / "val.jsonl", pair | {"documents": words[:200]})).records) == 1
    assert refused(write(tmp_path / "val.jsonl", pair | {"documents": words})).problems
    turns = [{"role": ("user", "assistant")[index % 2], "content": f"w{index}"} for index in range(600)]
    long = {"messages": turns, "chat_history": [turn["content"] for turn in turns[:-1]]}
    assert len(read_records(write(tmp_path / "val.jsonl", long)).records) == 1


def test_deep_and_wide_values_beside_are_looked_at_all_the_same(tmp_path: Path) -> None:
    deep: Any = "x"
    for _ in range(400):
        deep = [deep, None]
    assert refused(write(tmp_path / "val.jsonl", {"text": "t", "images": deep, "context": deep})).problems
    keys = {f"key {i}": i for i in range(500)}
    assert len(read_records(write(tmp_path / "wide.jsonl", {"text": "t"} | keys)).ignored_keys) == 100
    [problem] = refused(write(tmp_path / "none.jsonl", keys)).problems
    assert problem.endswith(" and 480 more")
