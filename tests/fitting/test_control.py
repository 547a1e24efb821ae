"""The control of a fit: a new LoRA on the same records, and what the verdict makes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loracli.calibration.render import Example
from loracli.comparison.candidates import random_adapters
from loracli.comparison.compare import compare_adapters
from loracli.comparison.settings import CompareSettings, Controls
from loracli.demo.run import example_folder
from loracli.errors import OutOfResources, UsageError
from loracli.evaluation.statistics import held_out_table
from loracli.fitting.control import FreshTraining, _descend, as_memory_allows
from loracli.fitting.inputs import FitInputs, prepare_fit
from loracli.fitting.mixing import FreshLora, HalfOfEach, Layout
from loracli.fitting.run import fit_mixing, run_fit
from loracli.fitting.settings import FitSettings
from loracli.model.loss import Scores
from loracli.model.placement import Placement
from loracli.model.session import Opening
from loracli.recipe.recipe import load_recipe
from loracli.recipe.record import HeldOut
from tests.heard import Heard
from tests.tiny import make_adapter, make_base, random_records, write_jsonl

CPU = Placement("float32", "cpu")


def fresh(rank: int = 3) -> FreshLora:
    layout = Layout(("model.a", "model.b"), ((rank,), (rank,)))
    return FreshLora(layout, [(8, 5), (6, 4)], rank, seed=0)


def test_a_new_lora_starts_as_peft_starts_one() -> None:
    """B is 0, and A is spread as torch spreads it with Kaiming's a = sqrt 5: uniformly within 1 / sqrt(in)."""
    control = fresh(rank=400)
    for (lora_A, lora_B), (width, out) in zip(control.factors(control.start), [(8, 5), (6, 4)], strict=True):
        assert lora_A.shape == (400, width) and lora_B.shape == (out, 400) and not lora_B.any()
        like = torch.empty(400, width)
        torch.nn.init.kaiming_uniform_(like, a=math.sqrt(5))
        assert lora_A.abs().max() <= 1 / math.sqrt(width)
        assert float(lora_A.std()) == pytest.approx(float(like.std()), rel=0.05)
        assert abs(float(lora_A.mean())) < 0.03


def test_a_new_lora_has_a_scaling_of_two_on_each_b_and_its_numbers_in_the_order_of_the_modules() -> None:
    control = fresh()
    assert control.numbers == 3 * (8 + 6 + 5 + 4)
    pairs = control.factors(torch.arange(control.numbers).double())
    assert [(tuple(a.shape), tuple(b.shape)) for a, b in pairs] == [((3, 8), (5, 3)), ((3, 6), (4, 3))]
    assert (
        pairs[0][0][0, 0] == 0
        and pairs[1][0][0, 0] == 24
        and pairs[0][1][0, 0] == 2 * 42
        and pairs[1][1][-1, -1] == 2 * 68
    )


def test_half_of_each_is_the_mean_of_both_updates() -> None:
    small, large = fresh(rank=2), fresh(rank=5)
    mixing = HalfOfEach(small, large)
    theta = torch.randn(mixing.numbers, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    halves = small.factors(theta[: small.numbers]), large.factors(theta[small.numbers :])
    for (lora_A, lora_B), *both in zip(mixing.factors(theta), *halves, strict=True):
        assert len(lora_A) == 7 and torch.allclose(lora_B @ lora_A, sum(b @ a for a, b in both) / 2, atol=1e-12)


@pytest.mark.parametrize(
    ("losses", "best_at", "runs"),
    [
        ([5, 4, 3, 2, 1], 10, [2, 2, 2, 2, 2]),  # the last is the best
        ([5, 1, 2, 2, 2, 2, 9], 4, [2] * 6),  # four worse in a row: no more
        ([5, 1, 2, 2, 2, 0.5, 1], 12, [2] * 7),  # three in a row are not enough
        ([3, 3, 3, 3, 3, 3], 2, [2] * 5),  # as good is not better
        ([None, None, None], 5, [2, 2, 1]),  # nothing to check with: the last, and no step too many
    ],
)
def test_a_new_lora_stops_where_its_validation_loss_was_lowest(
    losses: list[float | None], best_at: int, runs: list[int]
) -> None:
    done: list[int] = []
    total = 5 if losses[0] is None else 2 * len(losses)

    def run(count: int, before: int) -> None:
        assert before == sum(done)
        done.append(count)

    theta, at = _descend(run, lambda after: losses[len(done) - 1], lambda: torch.tensor([sum(done)]), total, 2)
    assert (int(theta), at, done) == (best_at, best_at, runs)


# What the verdict makes of it


def judged(fit: float, fresh: float | None, *, records: int = 40) -> HeldOut:
    """Of records that differ in their costs, on which every way has the mean that it is given; the adapter's is 2."""
    tokens = torch.full((records,), 3.0, dtype=torch.float64)
    noise = torch.linspace(-0.3, 0.3, records, dtype=torch.float64)

    def scores(mean: float, place: int) -> Scores:
        return Scores(tokens * (mean + noise.roll(7 * place)), tokens)

    examples = [Example(f"x:{i}", (1, 2, 3, 4 + i), (False, True, True, True)) for i in range(records)]
    return held_out_table(
        {"base": scores(3.0, 0), "a": scores(2.0, 1), "fit": scores(fit, 2)},
        ["a"],
        examples=examples,
        name="test.jsonl",
        seed=0,
        controls={} if fresh is None else {"fresh-lora": scores(fresh, 3)},
    )


@pytest.mark.parametrize(
    ("fit", "fresh", "verdict"),
    [
        (1.0, None, "better"),
        (1.0, 1.5, "better"),
        (1.0, 1.02, "no better than a fresh LoRA"),  # lower, but not clearly
        (1.0, 0.5, "no better than a fresh LoRA"),
        (1.98, 2.5, "not better"),  # than the best adapter, whatever else it is better than
        (1.98, 0.5, "not better"),
    ],
)
def test_a_fit_is_better_where_it_clearly_is_so_than_the_best_adapter_and_than_the_fresh_lora(
    fit: float, fresh: float | None, verdict: str
) -> None:
    table = judged(fit, fresh)
    assert table.verdict == verdict
    assert [control.row.name for control in table.controls] == ([] if fresh is None else ["fresh-lora"])
    if fresh is not None:
        [control] = table.controls
        assert control.row.nats_per_token == pytest.approx(fresh) and control.row.difference == pytest.approx(fresh - 2)
        assert control.difference == pytest.approx(fit - fresh)
        assert control.interval[0] < control.difference < control.interval[1]
    assert judged(fit, fresh, records=19).verdict == "too few records"


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> FitInputs:
    """The embedded example, of whose questions 24 are held out."""
    folder, whole = tmp_path_factory.mktemp("example"), example_folder()
    questions = (whole / "test.jsonl").read_text().splitlines(keepends=True)
    (folder / "test.jsonl").write_text("".join(questions[:24]))
    return prepare_fit(
        [str(whole / name) for name in ("know", "form")],
        whole / "calibration.jsonl",
        eval_data=folder / "test.jsonl",
        base=str(whole / "base"),
        settings=FitSettings(passes=2, cv=2),
    )


def test_true_adapters_are_called_better_and_random_ones_are_not_and_a_comparison_trains_the_same_fresh_lora(
    example: FitInputs,
) -> None:
    """Weights on random adapters have a far lower loss than each of these alone; so has a LoRA from nothing."""
    drawn = tuple(random_adapters(example.adapters, seed=0))
    true, random = (
        run_fit(replace(example, adapters=some), placement=CPU).held_out for some in (example.adapters, drawn)
    )
    assert true.verdict == "better" and random.verdict == "no better than a fresh LoRA"
    assert random.row("fit").interval[1] < 0
    first, second = true.controls[0].row, random.controls[0].row
    assert first.nats_per_token == pytest.approx(second.nats_per_token, abs=1e-6)  # all that it knows is the shapes
    found = compare_adapters(
        str(example.data.eval_files[0].source.path),
        adapters=[str(adapter.path) for adapter in example.adapters],
        base=str(example.base.path),
        fit_data=str(example.data.files[0].source.path),
        settings=CompareSettings(("sum",), fit=replace(example.settings, cv=None), controls=Controls(fresh_lora=True)),
        placement=CPU,
    )
    row = found.row("fresh-lora")
    assert first.nats_per_token == pytest.approx(row.nats_per_token, abs=1e-6)
    assert first.difference == pytest.approx(row.difference, abs=1e-6)


def test_where_records_take_turns_no_fresh_lora_has_seen_those_that_it_is_scored_on(
    tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []

    class Watched(FreshTraining):
        def __init__(self, layout: Any, training: Sequence[Example], *rest: Any) -> None:
            super().__init__(layout, training, *rest)
            self.places = {example.place for example in training}

        def run(self, *args: Any, **options: Any) -> Any:
            seen.append(self.places)
            return super().run(*args, **options)

    monkeypatch.setattr("loracli.fitting.control.FreshTraining", Watched)
    data = write_jsonl(tmp_path / "val.jsonl", random_records(24))
    adapters = [str(path) for path in two_adapters]
    recipe = fit_mixing(adapters, data, base=str(tiny_base), settings=FitSettings("adapter", passes=2))
    every = set.union(*seen)
    unseen = [every - places for places in seen]
    assert len(seen) == recipe.held_out.parts == 4 and len(every) == recipe.held_out.records == 24
    assert sum(len(part) for part in unseen) == 24 and set.union(*unseen) == every
    assert len(recipe.held_out.controls) == 1


@pytest.mark.parametrize(
    ("control", "held_out", "passes", "trained"),
    [
        (None, 24, 4.0, True),
        ("none", 24, 4.0, False),
        (None, 12, 4.0, False),  # too few for a verdict
        ("fresh-lora", 12, 4.0, True),
        (None, 24, 60.0, False),  # it would cost more than the fit
        ("fresh-lora", 24, 60.0, True),
    ],
)
def test_a_fresh_lora_is_trained_where_it_costs_less_and_can_change_the_verdict_or_is_asked_for(
    tmp_path: Path,
    tiny_base: Path,
    two_adapters: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    control: str | None,
    held_out: int,
    passes: float,
    trained: bool,
) -> None:
    for bound in ("_FEWEST_PASSES", "_MOST_PASSES"):
        monkeypatch.setattr(f"loracli.fitting.control.{bound}", passes)
    data, settings = write_jsonl(tmp_path / "val.jsonl", random_records(5)), FitSettings("adapter", control=control)
    test = write_jsonl(tmp_path / "test.jsonl", random_records(held_out, seed=9))
    adapters = [str(path) for path in two_adapters]
    recipe = fit_mixing(adapters, data, eval_data=test, base=str(tiny_base), settings=settings)
    assert bool(recipe.held_out.controls) == trained
    recipe.save(tmp_path / "recipe.json")
    assert load_recipe(tmp_path / "recipe.json").held_out.controls == recipe.held_out.controls


@pytest.mark.parametrize(
    ("plain", "tight", "checkpointing", "kept"),
    [
        (False, False, False, True),
        (False, False, True, False),  # layers would run again for it alone
        (True, False, True, True),
        (False, True, True, False),
        (False, None, False, False),  # refused
    ],
)
def test_what_nobody_asked_for_takes_no_memory_that_the_fit_has_not(
    example: FitInputs,
    plain: bool,
    tight: bool | None,
    checkpointing: bool,
    kept: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def memory(opening: Opening, _: Any) -> tuple[None, Any]:
        assert opening.trains_factors
        if tight is None:
            raise OutOfResources("too much")
        return None, SimpleNamespace(tight=tight, checkpointing=checkpointing)

    monkeypatch.setattr(Opening, "memory", memory)
    opening = Opening(example.base, example.adapters, 1024, 1024, placement=replace(CPU, checkpointing=plain))
    told = Heard()
    found = as_memory_allows(example, opening, progress=told)
    assert found.room == kept and found.settings == example.settings
    assert any("no fresh LoRA is trained beside the fit" in said for said in told.said) == (not kept)
    asked = replace(example, settings=replace(example.settings, control="fresh-lora"))
    assert as_memory_allows(asked, opening) is asked


def test_a_fresh_lora_on_experts_is_refused_where_it_is_asked_for_and_left_out_otherwise(tmp_path: Path) -> None:
    base = make_base(tmp_path / "mixtral", "mixtral")
    parameters = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    adapter = make_adapter(tmp_path / "one", base, targets=("q_proj",), parameters=parameters, rank=2, size=0.1)
    data = write_jsonl(tmp_path / "val.jsonl", random_records(5))
    test = write_jsonl(tmp_path / "test.jsonl", random_records(24, seed=9))
    asked = FitSettings(passes=2, mixing="adapter", control="fresh-lora")
    with pytest.raises(UsageError, match=r"cannot be trained on the experts of model\."):
        prepare_fit([str(adapter)], data, eval_data=test, base=str(base), settings=asked)
    settings = replace(asked, control=None)
    recipe = fit_mixing([str(adapter)], data, eval_data=test, base=str(base), settings=settings)
    assert not recipe.held_out.controls


@pytest.mark.parametrize(
    ("word", "hint"), [("random", "are a control of loracat compare"), ("fresh-laura", "did you mean fresh-lora?")]
)
def test_another_control_is_refused_with_the_way_to_what_there_is(word: str, hint: str) -> None:
    with pytest.raises(UsageError, match=f"--control {word} is not one of fresh-lora, none") as refused:
        FitSettings(control=word)
    assert hint in str(refused.value.hint)
