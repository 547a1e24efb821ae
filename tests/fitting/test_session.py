"""One opening of a base model: loaded, checked, placed and planned once."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.calibration.dataset import plan_batches
from loracli.calibration.records import CalibrationFile, parse_sources, read_records
from loracli.errors import BaseModelMismatch, CalibrationError, OutOfResources
from loracli.fitting.mixing import make_layout
from loracli.model.attach import attach
from loracli.model.base import load_base
from loracli.model.loss import make_objective
from loracli.model.placement import Placement, decoder_layers
from loracli.model.reference import BaseReference
from loracli.model.session import Opening, open_session, settle_memory
from loracli.progress import Silent
from tests.tiny import logits, make_adapter, make_base, random_records, write_jsonl

CPU = Placement("float32", "cpu")


class Heard(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture
def opening(two_adapters: tuple[Path, Path], tiny_base: Path) -> Opening:
    adapters = tuple(read_adapter(str(path)) for path in two_adapters)
    return Opening(BaseReference("tiny", tiny_base, None), adapters, batch_tokens=64, max_length=48, placement=CPU)


@pytest.fixture
def files(tmp_path: Path) -> tuple[CalibrationFile, ...]:
    data = write_jsonl(tmp_path / "data.jsonl", random_records(20))
    return tuple(read_records(source) for source in parse_sources(data))


def modules_of(adapters: tuple[LoraAdapter, ...]) -> tuple[str, ...]:
    return make_layout(adapters).modules


def test_batches_are_those_of_the_plan_and_planned_once(
    opening: Opening, files: tuple[CalibrationFile, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_session(opening) as session:
        examples = session.render(files)
        wanted = plan_batches(examples, batch_tokens=64)
        found = session.batches(examples)
        assert [batch.indices for batch in found] == [batch.indices for batch in wanted]
        assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(found, wanted, strict=True))
        assert len(found) > 1 and max(batch.tokens for batch in found) <= 64
        monkeypatch.setattr("loracli.model.session.plan_batches", lambda *_, **__: pytest.fail("planned again"))
        assert session.batches(list(examples)) is found


def test_other_examples_are_never_taken_for_those_that_were_planned(
    opening: Opening, files: tuple[CalibrationFile, ...]
) -> None:
    with open_session(opening) as session:
        examples = session.render(files)
        for count in range(1, 6):  # lists that are gone at once, so that their places in memory are used again
            planned = session.batches([replace(example) for example in examples[:count]])
            assert sorted(i for batch in planned for i in batch.indices) == list(range(count))


def test_records_are_used_as_far_as_was_asked_and_the_base_takes_them(opening: Opening, tmp_path: Path) -> None:
    long = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "a", "completion": "b" * 400}])
    file = read_records(parse_sources(long)[0])
    for asked, used in ((48, 48), (10_000, 256)):  # positions of the tiny base
        with open_session(replace(opening, max_length=asked)) as session:
            (example,) = session.render([file])
            assert session.max_length == len(example.input_ids) == used


def test_an_objective_is_that_of_the_adapters_and_is_gone_afterwards(
    opening: Opening, files: tuple[CalibrationFile, ...]
) -> None:
    with open_session(opening) as session:
        before = logits(session.base.model)
        examples = session.render(files)
        with session.attached(opening.adapters, modules_of(opening.adapters), examples) as objective:
            assert torch.equal(logits(session.base.model), before)  # at weight 0
            plain = objective.score(session.batches(examples), len(examples)).nats_per_token
            objective.attached.set_weights(torch.ones(len(objective.attached.modules), 2))
            assert objective.score(session.batches(examples), len(examples)).nats_per_token != pytest.approx(plain)
        assert torch.equal(logits(session.base.model), before)


def test_an_adapter_that_does_not_fit_is_refused_before_the_session_begins(tmp_path: Path, opening: Opening) -> None:
    other = make_base(tmp_path / "other", "gpt2")
    strange = read_adapter(str(make_adapter(tmp_path / "strange", other, targets=("c_attn",))))
    with pytest.raises(BaseModelMismatch, match="c_attn"), open_session(replace(opening, adapters=(strange,))):
        pytest.fail("opened")


def test_memory_that_runs_out_anywhere_in_a_session_is_said_in_our_words(opening: Opening) -> None:
    with pytest.raises(OutOfResources, match="memory ran out"), open_session(opening):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("share", "asked", "checkpointing"), [(100, False, False), (100, True, True), (0.8, False, True)]
)
def test_layers_are_run_again_where_it_is_asked_for_or_memory_is_short(
    opening: Opening, monkeypatch: pytest.MonkeyPatch, share: float, asked: bool, checkpointing: bool
) -> None:
    opening = replace(opening, batch_tokens=2048, placement=replace(CPU, checkpointing=asked))
    needed = opening.memory(opening.plan())[0].total
    monkeypatch.setattr("loracli.model.session._available_memory", lambda *_, **__: int(share * needed))
    heard = Heard()
    settled = settle_memory(opening, progress=heard)
    assert settled == replace(opening, placement=replace(opening.placement, checkpointing=checkpointing))
    assert len(heard.notes) == 1 and heard.notes[0].startswith("memory: about") and not heard.warnings
    with open_session(settled) as session:
        layers = decoder_layers(session.base.model)
        assert layers and all(("forward" in vars(layer)) is checkpointing for layer in layers)
    assert not any("forward" in vars(layer) for layer in layers)


def test_one_process_decides_on_memory_for_all(opening: Opening, monkeypatch: pytest.MonkeyPatch) -> None:
    decided = opening.memory(opening.plan())[1]
    monkeypatch.setattr("loracli.model.session._available_memory", lambda *_, **__: pytest.fail("asked here"))
    elsewhere = replace(decided, checkpointing=True, tight=True, note="it is tight")
    heard = Heard()
    assert settle_memory(opening, agree=lambda decide: elsewhere, progress=heard).placement.checkpointing
    assert heard.warnings == ["it is tight"] and not heard.notes


def test_more_records_than_are_allowed_to_be_cut_are_refused_unless_it_is_said(
    opening: Opening, tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "cut.jsonl", [{"prompt": "a" * 90, "completion": "b"}] * 9 + random_records(9))
    file = read_records(parse_sources(data)[0])
    with open_session(opening) as session:
        with pytest.raises(CalibrationError):
            session.render([file])
        assert len(session.render([file], allow_truncation=True)) == 9


def test_what_a_session_scores_is_what_is_scored_by_hand(opening: Opening, files: tuple[CalibrationFile, ...]) -> None:
    weights = torch.tensor([0.7, -0.4])
    modules = modules_of(opening.adapters)
    with open_session(opening) as session:
        examples = session.render(files)
        with session.attached(opening.adapters, modules, examples) as objective:
            objective.attached.set_weights(weights.expand(len(modules), -1))
            found = objective.score(session.batches(examples), len(examples))
    model = load_base(opening.reference, dtype="float32", device="cpu").model
    batches = plan_batches(examples, batch_tokens=64)
    with attach(model, opening.adapters, modules) as attached:
        attached.set_weights(weights.expand(len(modules), -1))
        assert torch.equal(make_objective(attached, batches[0]).score(batches, len(examples)).nats, found.nats)
