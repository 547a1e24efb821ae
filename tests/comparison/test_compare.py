"""A comparison end to end, against the table of a fit, stock PEFT on what is exported, and itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loracli.adapters.adapter import read_adapter
from loracli.algebra.factors import norm
from loracli.algebra.methods import METHODS
from loracli.comparison.candidates import random_adapters
from loracli.comparison.compare import run_comparison
from loracli.comparison.inputs import prepare_comparison
from loracli.comparison.settings import CompareSettings, Controls, parse_controls, parse_methods
from loracli.errors import UsageError
from loracli.evaluation.comparison import Comparison
from loracli.evaluation.metrics import TaskMetric
from loracli.export.method import export_method
from loracli.fitting.run import fit_mixing
from loracli.fitting.settings import FitSettings
from loracli.model.placement import Placement
from loracli.progress import Silent
from tests.tiny import make_adapter, make_base, random_records, write_jsonl

QUICK = FitSettings(passes=3)
DATA_FREE = [name for name, method in METHODS.items() if method.search is None]


class Listener(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, message: str) -> None:
        self.said.append(message)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """val.jsonl with 40 records, test.jsonl with 24 others, which name two tasks."""
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "val.jsonl", random_records(40, seed=1))
    records = [{**r, "task": ["odd", "even"][i % 2]} for i, r in enumerate(random_records(24, seed=2))]
    write_jsonl(folder / "test.jsonl", records)
    return folder


@pytest.fixture(scope="module")
def recipe(data: Path, tiny_base: Path, two_adapters: tuple[Path, Path]) -> Path:
    """Of a fit whose held-out records are those of test.jsonl."""
    fitted = fit_mixing(
        [str(path) for path in two_adapters],
        data / "val.jsonl",
        eval_data=data / "test.jsonl",
        base=str(tiny_base),
        settings=QUICK,
        folder=data,
    )
    fitted.save(data / "recipe.json")
    return data / "recipe.json"


def compare(
    data: Path, base: Path, adapters: tuple[Path, ...] = (), *, metric: TaskMetric | None = None, **options: object
) -> Comparison:
    inputs = prepare_comparison(
        data / "test.jsonl",
        adapters=[str(path) for path in adapters],
        base=str(base),
        **options,  # type: ignore[arg-type]
    )
    return run_comparison(inputs, metric=metric)


def test_base_ingredients_uniform_sum_and_fit_are_those_of_the_held_out_table(
    data: Path, tiny_base: Path, recipe: Path
) -> None:
    """Also their intervals: the same records are drawn for both."""
    found = compare(data, tiny_base, recipe=recipe, settings=CompareSettings(("uniform", "sum")))
    from loracli.recipe.reading import load_recipe

    table = load_recipe(recipe).held_out
    assert [row.name for row in found.rows] == [row.name for row in table.rows]
    assert (found.records, found.scored_tokens, found.best_ingredient) == (
        24,
        table.scored_tokens,
        table.best_ingredient,
    )
    for row, held in zip(found.rows, table.rows, strict=True):
        for ours, theirs in (
            (row.nats_per_token, held.nats_per_token),
            (row.difference, held.difference),
            *zip(row.interval, held.interval, strict=True),
            (row.worse_records, held.worse_records),
        ):
            assert abs(ours - theirs) < 1e-6
        assert row.perplexity == pytest.approx(torch.tensor(row.nats_per_token).double().exp().item())
    assert found.tasks == tuple(
        replace(ours, nats_per_token=theirs.nats_per_token | ours.nats_per_token)
        for ours, theirs in zip(found.tasks, table.tasks, strict=True)
    )
    assert [task.task for task in found.tasks] == ["even", "odd"]


def test_differences_to_uniform_are_paired_and_zero_for_uniform_itself(
    data: Path, tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    found = compare(data, tiny_base, two_adapters, settings=CompareSettings(("sum",)))
    uniform, total = found.row("uniform"), found.row("sum")
    assert uniform.against_uniform is not None and uniform.against_uniform.mean == 0
    assert uniform.against_uniform.interval == (0.0, 0.0)
    assert total.against_uniform is not None
    assert total.against_uniform.mean == pytest.approx(total.nats_per_token - uniform.nats_per_token)
    low, high = total.against_uniform.interval
    assert low < total.against_uniform.mean < high


def test_every_data_free_method_scores_what_its_export_scores_with_stock_peft(
    tmp_path: Path, data: Path, tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    """The loss over the test records by PEFT's own forward pass on the directory that --method writes."""
    alike = (two_adapters[0], make_adapter(tmp_path / "b", tiny_base, targets=("q_proj", "o_proj"), rank=4, seed=4))
    found = compare(data, tiny_base, alike, settings=CompareSettings(("data-free",)))
    assert {row.name for row in found.rows if row.kind == "method"} == set(DATA_FREE)
    assert not found.skipped
    for name in DATA_FREE:
        out = tmp_path / name
        export_method(name, out, adapters=[str(p) for p in alike])
        assert abs(peft_loss(tiny_base, out, data) - found.row(name).nats_per_token) < 2e-5, name


def test_experts_are_compared_as_stock_peft_runs_their_exports(tmp_path: Path, data: Path) -> None:
    """Data-free methods too, each of which has factors of its own for each expert; a new LoRA on experts is refused."""
    base = make_base(tmp_path / "mixtral", "mixtral")
    parameters = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    adapters = tuple(
        make_adapter(tmp_path / str(i), base, targets=("q_proj",), parameters=parameters, rank=2, seed=i, size=0.1)
        for i in (1, 2)
    )
    found = compare(data, base, adapters, settings=CompareSettings(("data-free",)))
    assert {row.name for row in found.rows if row.kind == "method"} == set(DATA_FREE)
    for name in DATA_FREE:
        export_method(name, tmp_path / name, adapters=[str(p) for p in adapters])
        assert abs(peft_loss(base, tmp_path / name, data) - found.row(name).nats_per_token) < 5e-4, name
    controls = CompareSettings(("sum",), fit=QUICK, controls=Controls(fresh_lora=True))
    with pytest.raises(UsageError, match="a new LoRA cannot be trained on the experts of model"):
        compare(data, base, adapters, fit_data=data / "val.jsonl", settings=controls)
    random = CompareSettings(("sum",), fit=QUICK, controls=Controls(random=True))
    found = compare(data, base, adapters, fit_data=data / "val.jsonl", settings=random)
    assert found.row("random").nats_per_token != found.row("sum").nats_per_token


def peft_loss(base: Path, adapter: Path, data: Path) -> float:
    from loracli.calibration.records import parse_sources, read_records
    from loracli.calibration.render import render_file
    from tests.tiny import make_tokenizer

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    (source,) = parse_sources(data / "test.jsonl")
    nats, tokens = 0.0, 0
    for example in render_file(read_records(source), make_tokenizer(), max_length=256).examples:
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([example.input_ids])).logits[0].double().log_softmax(-1)
        for place, scored in enumerate(example.scored):
            if scored:
                nats -= float(logp[place - 1, example.input_ids[place]])
                tokens += 1
    return nats / tokens


def test_fitted_methods_and_controls_stand_beside_the_others(
    data: Path, tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    settings = CompareSettings(
        ("adapter", "module", "paper", "task-arithmetic"),
        fit=QUICK,
        controls=Controls(fresh_lora=True, random=True, datamix=str(two_adapters[1])),
    )
    found = compare(data, tiny_base, two_adapters, fit_data=data / "val.jsonl", settings=settings)
    kinds = {row.name: row.kind for row in found.rows}
    assert [kinds[name] for name in ("fresh-lora", "random", "datamix")] == ["control"] * 3
    assert kinds["module"] == kinds["paper"] == "method"
    second = next(row for row in found.rows if row.name == str(two_adapters[1]))
    assert found.row("datamix").nats_per_token == pytest.approx(second.nats_per_token, abs=1e-6)
    assert len(found.row("adapter").weights or ()) == 2
    assert found.row("fresh-lora").rank == 6
    assert "base" not in {found.best.name, *found.best.rivals}
    assert not {"fresh-lora", "random", "datamix"} & {found.best.name, *found.best.rivals}


def test_a_rung_finds_what_loracat_fit_finds_on_the_same_records(
    data: Path, tiny_base: Path, two_adapters: tuple[Path, Path], recipe: Path
) -> None:
    from loracli.recipe.reading import load_recipe

    settings = CompareSettings(("module",), fit=QUICK)
    found = compare(data, tiny_base, two_adapters, fit_data=data / "val.jsonl", settings=settings)
    assert found.row("module").nats_per_token == pytest.approx(
        load_recipe(recipe).held_out.row("fit").nats_per_token, abs=5e-3
    )  # the fit takes a Newton step at its end, the rung in a comparison does not


def test_random_adapters_have_the_norms_and_nothing_else(two_adapters: tuple[Path, Path]) -> None:
    adapters = [read_adapter(str(path)) for path in two_adapters]
    drawn = random_adapters(adapters, seed=0)
    for adapter, other in zip(adapters, drawn, strict=True):
        for name, module in adapter.modules.items():
            ours, theirs = other.modules[name].factors, module.factors
            assert norm(ours) == pytest.approx(norm(theirs), rel=1e-5)
            a = (ours.scaling * ours.lora_B @ ours.lora_A).flatten()
            b = (theirs.scaling * theirs.lora_B @ theirs.lora_A).flatten()
            assert abs(float(torch.nn.functional.cosine_similarity(a, b, dim=0))) < 0.3
    again = random_adapters(adapters, seed=0)
    name = next(iter(drawn[0].modules))
    assert torch.equal(drawn[0].modules[name].factors.lora_A, again[0].modules[name].factors.lora_A)


def test_the_guard_says_what_is_shown_not_to_get_worse(
    tmp_path: Path, data: Path, tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    """An adapter of almost nothing is safe, one that breaks the model is not, and the base is as it is."""
    faint = make_adapter(tmp_path / "faint", tiny_base, size=1e-4, seed=5)
    guard = write_jsonl(tmp_path / "guard.jsonl", random_records(30, seed=7))
    settings = CompareSettings(("sum",), margin=0.02)
    found = compare(data, tiny_base, (faint, two_adapters[0]), guard=guard, settings=settings)
    rows = {row.name: row.guard for row in found.rows}
    weak, strong, base = rows[str(faint)], rows[str(two_adapters[0])], rows["base"]
    assert weak is not None and strong is not None and base is not None
    assert weak.safe and base.safe and not strong.safe
    assert strong.difference.mean == pytest.approx(strong.nats_per_token - base.nats_per_token)
    assert found.guard == "guard.jsonl"


def test_test_records_that_were_calibrated_on_are_counted(
    tmp_path: Path, data: Path, tiny_base: Path, two_adapters: tuple[Path, Path], recipe: Path
) -> None:
    """From the recipe's own fingerprints, the calibration file being gone, and from --fit-data."""
    trained = (data / "val.jsonl").read_text().splitlines(keepends=True)
    fresh = (data / "test.jsonl").read_text().splitlines(keepends=True)
    mixed = tmp_path / "test.jsonl"
    mixed.write_text("".join([*trained[:5], *fresh]))
    listener = Listener()
    inputs = prepare_comparison(mixed, recipe=recipe, base=str(tiny_base), progress=listener)
    assert inputs.repeated == 5
    assert any("5 of the test records" in message for message in listener.said)
    adapters = [str(path) for path in two_adapters]
    fitted = CompareSettings(("sum", "module"))
    both = prepare_comparison(
        mixed, adapters=adapters, fit_data=data / "val.jsonl", base=str(tiny_base), settings=fitted
    )
    assert both.repeated == 5
    assert prepare_comparison(mixed, adapters=adapters, base=str(tiny_base)).repeated == 0
    assert compare(data, tiny_base, recipe=recipe, settings=CompareSettings(("sum",))).repeated_records == 0


def test_a_method_that_cannot_honour_the_adapters_is_skipped_in_all_and_an_error_by_name(
    data: Path, tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    """`linear-peft` adds factors, which must have one rank; these have 4 and 2."""
    found = compare(data, tiny_base, two_adapters, settings=CompareSettings(("all",)))
    skipped = {s.name: s.reason for s in found.skipped}
    assert "ranks 2, 4 cannot be added" in skipped.pop("linear-peft")
    assert {"module", "auto", "paper", "lorahub", "task-arithmetic"} <= skipped.keys()
    assert all("--fit-data" in reason for reason in skipped.values())
    assert {row.name for row in found.rows if row.kind == "method"} == set(DATA_FREE) - {"linear-peft"}
    with pytest.raises(UsageError, match="linear-peft cannot be computed here: factors of the ranks 2, 4"):
        compare(data, tiny_base, two_adapters, settings=CompareSettings(("linear-peft",)))
    with pytest.raises(UsageError, match="module has to be fitted"):
        compare(data, tiny_base, two_adapters, settings=CompareSettings(("module",)))


def test_the_metric_is_compared_with_the_ingredient_that_is_best_by_it(
    data: Path, tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    metric = TaskMetric("contains", max_new_tokens=8)
    found = compare(data, tiny_base, two_adapters, metric=metric, settings=CompareSettings(("sum",)))
    alone = [row.metric for row in found.rows if row.kind == "ingredient"]
    assert all(score is not None for score in alone)
    best = max(score.mean for score in alone if score is not None)
    for row in found.rows:
        assert row.metric is not None and row.metric.difference == pytest.approx(row.metric.mean - best)
        assert row.metric.p_value is not None and 0 < row.metric.p_value <= 1
    assert found.metric == "contains"


def test_a_comparison_repeats(data: Path, tiny_base: Path, two_adapters: tuple[Path, Path]) -> None:
    settings = CompareSettings(("data-free", "module"), fit=QUICK, controls=Controls(fresh_lora=True, random=True))
    first, second = (
        compare(data, tiny_base, two_adapters, fit_data=data / "val.jsonl", settings=settings) for _ in range(2)
    )
    assert first == second


def test_words_of_methods_and_controls() -> None:
    assert parse_methods(" ties, dare,ties") == ("ties", "dare")
    assert parse_controls(["random", "datamix", "x", "fresh-lora"]) == Controls(True, True, "x")
    for bad in (["datamix"], ["other"]):
        with pytest.raises(UsageError):
            parse_controls(bad)
    with pytest.raises(UsageError):
        parse_methods(" , ")
    for options in ({"methods": ("tie",)}, {"margin": 0.0}):
        with pytest.raises(UsageError):
            CompareSettings(**options)  # type: ignore[arg-type]


def test_what_cannot_be_compared_is_refused_before_the_base_is_loaded(
    data: Path, tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    with pytest.raises(UsageError, match="nothing to compare"):
        compare(data, tiny_base)
    with pytest.raises(UsageError, match="random has to be fitted"):
        compare(data, tiny_base, two_adapters, settings=CompareSettings(controls=Controls(random=True)))
    with pytest.raises(UsageError, match="given twice"):
        compare(data, tiny_base, (two_adapters[0], two_adapters[0]))
    inputs = prepare_comparison(data / "test.jsonl", adapters=[str(p) for p in two_adapters], base=str(tiny_base))
    with pytest.raises(UsageError):
        run_comparison(inputs, placement=Placement(dtype="int3"))
