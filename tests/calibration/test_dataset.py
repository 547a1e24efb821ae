"""Several files of different shapes: each on both sides, each with an account, and what flatters the fit is said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from loracli.calibration.dataset import Dataset, read_dataset, render_dataset
from loracli.calibration.render import Example
from loracli.errors import CalibrationError, UsageError
from loracli.fitting.settings import FitSettings
from tests.heard import Heard
from tests.tiny import make_tokenizer


def write(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def texts(count: int, word: str) -> list[dict[str, Any]]:
    return [{"text": f"{word} {i}"} for i in range(count)]


def read(*data: str | Path, eval_data: Any = None, heard: Heard | None = None, **options: Any) -> Dataset:
    return read_dataset(
        data,
        eval_data,
        holdout=None if eval_data else 0.2,
        seed=0,
        **options,
        progress=heard if heard is not None else Heard(),
    )


def places(records: Sequence[Any]) -> list[str]:
    return [record.place for record in records]


def counts(records: Sequence[Any], path: Path) -> int:
    return sum(place.startswith(f"{path}:") for place in places(records))


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[Path, Path]:
    """A file of texts, and one of conversations."""
    pair = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    return (
        write(tmp_path / "texts.jsonl", [t | {"task": "prose"} for t in texts(90, "t")]),
        write(tmp_path / "chats.jsonl", [{"messages": pair[:1] * i + pair, "task": "chat"} for i in range(1, 31)]),
    )


def test_a_share_above_half_is_told_to_be_half_and_one_above_all_to_be_a_share(tmp_path: Path) -> None:
    path, heard = write(tmp_path / "texts.jsonl", texts(60, "t")), Heard()
    assert len(read_dataset(path, None, holdout=0.9, seed=0, progress=heard).held_out) == 30
    assert heard.warnings == ["--holdout 0.9: half of the records is the most"]
    with pytest.raises(UsageError) as refused:
        FitSettings(holdout=25.0)
    assert refused.value.hint == "it is a share of the records: 0.25 for a quarter"


def test_every_file_is_on_both_sides_and_nothing_on_two(mixed: tuple[Path, Path]) -> None:
    dataset = read(*mixed)
    assert [file.shape for file in dataset.files] == ["text", "messages"]
    assert [counts(dataset.held_out, path) for path in mixed] == [18, 6]
    assert [counts(dataset.training, path) for path in mixed] == [72, 24]
    assert len({*places(dataset.training), *places(dataset.held_out)}) == 120
    assert dataset.held_out_name == "texts.jsonl, chats.jsonl"


def test_examples_carry_the_weight_and_the_task_of_their_file(mixed: tuple[Path, Path]) -> None:
    dataset = read(mixed[0], f"{mixed[1]}:2.5")
    examples = render_dataset(dataset, make_tokenizer(), max_length=500)
    for example in (*examples.training, *examples.held_out):
        expected = ("prose", 1.0) if example.place.startswith(str(mixed[0])) else ("chat", 2.5)
        assert (example.task, example.weight) == expected
    assert places(examples.training) == places(dataset.training)
    assert places(examples.held_out) == places(dataset.held_out)
    assert dataset.held_out_name == "texts.jsonl, chats.jsonl:2.5"


def test_each_file_has_an_account_of_its_training_part(mixed: tuple[Path, Path]) -> None:
    dataset = read(mixed[0], f"{mixed[1]}:2.5")
    examples = render_dataset(dataset, make_tokenizer(), max_length=500)
    for data, file, path in zip(examples.data, dataset.files, mixed, strict=True):
        own = [example for example in examples.training if example.place.startswith(f"{path}:")]
        assert (data.name, data.sha256, data.shape) == (path.name, file.sha256, file.shape)
        assert (data.records, data.scored_tokens) == (len(own), sum(example.scored_tokens for example in own))
        assert (data.skipped, data.skipped_lines, data.dropped, data.cut) == (0, (), 0, 0)
    assert [data.weight for data in examples.data] == [1.0, 2.5]
    assert examples.data[0].template_sha256 is None and examples.data[1].template_sha256 is not None


def test_lines_left_out_and_records_cut_or_dropped_are_in_the_account(tmp_path: Path) -> None:
    long = {"prompt": "p" * 50, "completion": "c"}
    cut = {"prompt": "p", "completion": "c" * 50}
    good = [{"prompt": f"{i}", "completion": "c"} for i in range(60)]
    path = write(tmp_path / "val.jsonl", ["oops", *good, long, cut, "[]", *["{}"] * 30])
    with pytest.raises(CalibrationError, match="^32 of 94 records"):
        read(path)
    heard = Heard()
    dataset = read(path, skip_bad=True, heard=heard)
    examples = render_dataset(dataset, make_tokenizer(), max_length=20, skip_bad=True, progress=heard)
    [data] = examples.data
    assert (data.skipped, data.dropped, data.cut) == (32, 1, 2)
    assert data.skipped_lines == (1, *range(64, 83))
    assert sum("bad lines are left out" in said for said in heard.said) == 1
    assert sum("2 of 62 records are longer than 20 tokens" in said for said in heard.said) == 1


def test_records_that_are_not_rendered_stand_on_no_side(tmp_path: Path) -> None:
    records = [{"prompt": "p" * (50 if i % 2 else 1), "completion": f"{i}"} for i in range(60)]
    path = write(tmp_path / "val.jsonl", records)
    dataset = read(path)
    with pytest.raises(CalibrationError, match="30 of 60 records in .* have nothing scored within 20 tokens"):
        render_dataset(dataset, make_tokenizer(), max_length=20)
    examples = render_dataset(dataset, make_tokenizer(), max_length=20, allow_truncation=True)
    assert len(examples.training) + len(examples.held_out) == 30
    assert set(places(examples.held_out)) < set(places(dataset.held_out))


def test_held_out_files_are_taken_whole_with_weights_of_their_own(tmp_path: Path, mixed: tuple[Path, Path]) -> None:
    held = write(tmp_path / "held.jsonl", texts(25, "h"))
    dataset = read(mixed[0], eval_data=[f"{held}:3", mixed[1]])
    assert (len(dataset.training), len(dataset.held_out)) == (90, 55)
    examples = render_dataset(dataset, make_tokenizer(), max_length=500)
    assert {example.weight for example in examples.training} == {1.0}
    assert [example.weight for example in examples.held_out] == [3.0] * 25 + [1.0] * 30
    assert [data.name for data in examples.data] == ["texts.jsonl"]
    assert dataset.held_out_name == "held.jsonl:3, chats.jsonl"


def test_a_file_may_be_both_calibrated_on_and_scored_and_it_is_said(mixed: tuple[Path, Path]) -> None:
    heard = Heard()
    dataset = read(mixed[0], eval_data=f"{mixed[0]}:2", heard=heard)
    assert heard.said == [
        f"warning: 90 records of {mixed[0]} stand in the calibration data too; the table flatters the fit"
    ]
    examples = render_dataset(dataset, make_tokenizer(), max_length=500)
    assert {e.weight for e in examples.training} == {1.0} and {e.weight for e in examples.held_out} == {2.0}


def test_equal_records_in_two_shapes_are_known_as_equal(tmp_path: Path) -> None:
    """One conversation as ShareGPT and as Alpaca, some in both files: none stands on both sides."""
    sharegpt = [
        {"conversations": [{"from": "human", "value": f"{i}"}, {"from": "gpt", "value": "a"}]} for i in range(60)
    ]
    alpaca = [{"instruction": f"{i}", "input": "", "output": "a"} for i in range(30, 90)]
    dataset = read(write(tmp_path / "s.jsonl", sharegpt), write(tmp_path / "a.jsonl", alpaca))
    kept, held = ({r.fingerprint for r in side} for side in (dataset.training, dataset.held_out))
    assert not kept & held and len(kept | held) == 90


def test_a_text_is_a_completion_of_nothing_and_what_follows_the_last_answer_makes_no_other_record(
    tmp_path: Path,
) -> None:
    """Neither is seen by the model, so copies that differ in it stand on one side."""
    answered = [
        {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "a"}]} for i in range(60)
    ]
    thanked = [{"messages": [*r["messages"], {"role": "user", "content": "thanks"}]} for r in answered]
    completions = [{"prompt": "", "completion": t["text"]} for t in texts(60, "t")]
    for pair in ((texts(60, "t"), completions), (answered, thanked)):
        heard = Heard()
        dataset = read(*(write(tmp_path / f"{i}.jsonl", those) for i, those in enumerate(pair)), heard=heard)
        examples = render_dataset(dataset, make_tokenizer(), max_length=50, progress=heard)
        assert not {e.input_ids for e in examples.training} & {e.input_ids for e in examples.held_out}
        assert len(examples.training) + len(examples.held_out) == 120
        assert not any("same to the model" in said for said in heard.said)


def test_records_that_only_the_model_cannot_tell_apart_are_warned_of(tmp_path: Path) -> None:
    long = [{"text": f"{i:04} the same beginning, {end}"} for i in range(60) for end in ("one end", "other end")]
    for holdout, parts in ((0.2, 0), (None, 4)):
        dataset = read_dataset(
            write(tmp_path / "l.jsonl", long[:80] if parts else long), None, holdout=holdout, seed=0, progress=Heard()
        )
        assert len(dataset.parts) == parts
        whole, cut = Heard(), Heard()
        render_dataset(dataset, make_tokenizer(), max_length=500, progress=whole)
        assert not any("same to the model" in said for said in whole.said)
        examples = render_dataset(dataset, make_tokenizer(), max_length=20, progress=cut)
        tokens = {e.place: e.input_ids for e in (*examples.training, *examples.held_out)}
        sides = [{tokens[r.place] for r in side} for side in dataset.parts or (dataset.training, dataset.held_out)]
        common = len({t for side in sides for t in side if sum(t in other for other in sides) > 1})
        assert common and any(f"warning: {common} records that are fitted to" in said for said in cut.said)


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "val.jsonl", texts(30, folder))
    dataset = read(tmp_path / "x" / "val.jsonl", tmp_path / "y" / "val.jsonl")
    assert len({*places(dataset.training), *places(dataset.held_out)}) == 60
    examples = render_dataset(dataset, make_tokenizer(), max_length=50)
    assert [data.name for data in examples.data] == ["val.jsonl", "val.jsonl"]
    assert sum(data.records for data in examples.data) == len(examples.training) == 40


def test_what_cannot_be_divided_is_refused_by_file(tmp_path: Path) -> None:
    many, one = write(tmp_path / "many.jsonl", texts(60, "t")), write(tmp_path / "one.jsonl", texts(1, "o"))
    with pytest.raises(CalibrationError, match="one.jsonl has 1 record, too few to hold some out"):
        read(many, one)
    same = write(tmp_path / "same.jsonl", texts(1, "t") * 40)
    with pytest.raises(CalibrationError, match="same.jsonl has 40 records, all the same, too few"):
        read(many, same)


def test_the_shape_asked_for_is_that_of_all_files(mixed: tuple[Path, Path]) -> None:
    with pytest.raises(CalibrationError) as caught:
        read(*mixed, shape="text")
    assert caught.value.problems[0] == f"{mixed[1]}:1: text: missing; the file's shape is text"
    with pytest.raises(UsageError, match="--format jsonl is not one of text, prompt-completion, "):
        read(*mixed, shape="jsonl")


def test_standard_input_is_taken_once(mixed: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="standard input can be read once"):
        read("-", eval_data="-")


def test_keys_that_nobody_reads_are_named_by_file(tmp_path: Path, mixed: tuple[Path, Path]) -> None:
    heard = Heard()
    other = write(tmp_path / "other.jsonl", [t | {"source": 1} for t in texts(60, "o")])
    read(mixed[0], other, heard=heard)
    assert heard.said == [f"{other}: these keys are not read: source"]


def test_an_example_keeps_the_order_of_files_and_lines(mixed: tuple[Path, Path]) -> None:
    def key(example: Example) -> tuple[bool, int]:
        path, _, line = example.place.rpartition(":")
        return path == str(mixed[1]), int(line)

    examples = render_dataset(read(*mixed), make_tokenizer(), max_length=500)
    assert list(examples.training) == sorted(examples.training, key=key)
