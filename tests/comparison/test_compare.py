"""A comparison end to end, against the table of a fit, stock PEFT on what is exported, and itself."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loracli.adapters.adapter import module_names, read_adapter
from loracli.algebra.factors import norm
from loracli.algebra.methods import METHODS
from loracli.algebra.methods.method import MethodOptions
from loracli.comparison.candidates import Candidate, random_adapters
from loracli.comparison.compare import _Comparison, compare_adapters, plan_comparison, run_comparison
from loracli.comparison.inputs import prepare_comparison
from loracli.comparison.settings import CompareSettings, Controls
from loracli.composition.fitted import TASK
from loracli.errors import NonFiniteLoss, OutputExists, UsageError
from loracli.evaluation.comparison import Comparison
from loracli.evaluation.metrics import TaskMetric
from loracli.evaluation.sentences import claim
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.fitting.criterion import Fold, one_fold
from loracli.fitting.mixing import FixedFactors
from loracli.fitting.run import fit_mixing
from loracli.fitting.settings import FitSettings
from loracli.model.placement import Placement
from tests.heard import Heard
from tests.tiny import make_adapter, make_base, random_records, write_jsonl

QUICK = FitSettings(passes=3)
DATA_FREE = [name for name, method in METHODS.items() if not method.needs_records]


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
        settings=replace(QUICK, control="none"),
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
    from loracli.recipe.recipe import load_recipe

    assert found == compare(data, tiny_base, recipe=load_recipe(recipe), settings=CompareSettings(("uniform", "sum")))
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


def test_weights_by_hand_score_as_the_fit_and_the_methods_that_have_them(
    data: Path, tiny_base: Path, recipe: Path, two_adapters: tuple[Path, Path]
) -> None:
    """The same engine on the same weights: to the last bit where they are one for each adapter."""
    from loracli.composition.weights import weight_tables
    from loracli.recipe.recipe import load_recipe

    tables = weight_tables(["#1", "#2"], load_recipe(recipe).mixing.weights)
    fitted = compare(data, tiny_base, recipe=recipe, settings=CompareSettings(("uniform",), weights=tables))
    assert fitted.row("weights").nats_per_token == fitted.row("fit").nats_per_token
    assert fitted.row("weights").kind == "method" and fitted.row("weights").rank == fitted.row("fit").rank
    settings = CompareSettings(("sum",), options=MethodOptions(scale=0.5), weights=(0.5, 0.5))
    found = compare(data, tiny_base, two_adapters, settings=settings)
    half = found.row("uniform").nats_per_token  # which is not scaled where it was not named
    assert found.row("weights").nats_per_token == found.row("sum").nats_per_token == half
    named = replace(settings, methods=("sum", "uniform"), weights=None)
    assert compare(data, tiny_base, two_adapters, settings=named).row("uniform").nats_per_token != half


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
        export_adapter(ExportRequest(method=name, adapters=[str(p) for p in alike]), out)
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
        export_adapter(ExportRequest(method=name, adapters=[str(p) for p in adapters]), tmp_path / name)
        assert abs(peft_loss(base, tmp_path / name, data) - found.row(name).nats_per_token) < 5e-4, name
    controls = CompareSettings(("sum",), fit=QUICK, controls=Controls(fresh_lora=True))
    with pytest.raises(UsageError, match="a new LoRA cannot be trained on the experts of model"):
        compare(data, base, adapters, fit_data=data / "val.jsonl", settings=controls)
    random = CompareSettings(("sum",), fit=QUICK, controls=Controls(random=True))
    found = compare(data, base, adapters, fit_data=data / "val.jsonl", settings=random)
    assert found.row("random").nats_per_token != found.row("sum").nats_per_token


def peft_loss(base: Path, adapter: Path | None, data: Path) -> float:
    from loracli.calibration.records import parse_sources, read_records
    from loracli.calibration.render import render_file
    from tests.tiny import make_tokenizer

    model = AutoModelForCausalLM.from_pretrained(base).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
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
    data: Path, shallow_base: Path, two_shallow_adapters: tuple[Path, Path]
) -> None:
    settings = CompareSettings(
        ("adapter", "module", "paper", "task-arithmetic"),
        fit=QUICK,
        controls=Controls(fresh_lora=True, random=True, datamix=str(two_shallow_adapters[1])),
    )
    found = compare(data, shallow_base, two_shallow_adapters, fit_data=data / "val.jsonl", settings=settings)
    kinds = {row.name: row.kind for row in found.rows}
    assert [kinds[name] for name in ("fresh-lora", "random", "datamix")] == ["control"] * 3
    assert kinds["module"] == kinds["paper"] == "method"
    second = next(row for row in found.rows if row.name == str(two_shallow_adapters[1]))
    assert found.row("datamix").nats_per_token == pytest.approx(second.nats_per_token, abs=1e-6)
    assert len(found.row("adapter").weights or ()) == 2
    assert found.row("fresh-lora").rank == 6
    assert "base" not in {found.best.name, *found.best.rivals}
    assert not {"fresh-lora", "random", "datamix"} & {found.best.name, *found.best.rivals}


def test_a_level_finds_what_loracat_fit_finds_on_the_same_records(
    data: Path, tiny_base: Path, two_adapters: tuple[Path, Path], recipe: Path
) -> None:
    from loracli.recipe.recipe import load_recipe

    settings = CompareSettings(("module",), fit=QUICK)
    found = compare(data, tiny_base, two_adapters, fit_data=data / "val.jsonl", settings=settings)
    assert found.row("module").nats_per_token == pytest.approx(
        load_recipe(recipe).held_out.row("fit").nats_per_token, abs=5e-3
    )  # the fit takes a Newton step at its end, the level in a comparison does not


def test_the_row_of_random_adapters_is_the_mean_of_five_fits_each_on_other_adapters(
    data: Path, shallow_base: Path, two_shallow_adapters: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draw k composes the adapters that seed + k gives: their lora_A lie in the rows of what was measured."""
    measured: list[tuple[Any, float]] = []
    inner = _Comparison._measure

    def measure(self: _Comparison, row: Candidate, point: Any, engine: Any) -> Any:
        found = inner(self, row, point, engine)
        if row.name == "random":
            measured.append((point.mixing.factors, found.scores.nats_per_token))
        return found

    monkeypatch.setattr(_Comparison, "_measure", measure)
    settings = CompareSettings(("sum", "module"), fit=replace(QUICK, seed=3), controls=Controls(random=True))
    inputs = prepare_comparison(
        data / "test.jsonl",
        adapters=[str(path) for path in two_shallow_adapters],
        fit_data=data / "val.jsonl",
        base=str(shallow_base),
        settings=settings,
    )
    row = run_comparison(inputs).row("random")
    losses = [loss for _, loss in measured]
    assert len(set(losses)) == 5 and row.nats_per_token == pytest.approx(sum(losses) / 5, rel=1e-12)
    assert row.draws is not None and row.draws.nats_per_token == tuple(losses) and row.draws.fit == "module"
    for draw, (pairs, _) in enumerate(measured):
        for other in range(5):
            drawn = random_adapters(inputs.adapters, seed=3 + other)
            rows, own = pairs[0][0], drawn[0].modules[inputs.layout.modules[0]].factors.lora_A
            inside = torch.linalg.matrix_rank(torch.cat([rows, own])) == torch.linalg.matrix_rank(rows)
            assert bool(inside) == (draw == other)


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


def test_two_adapters_that_are_safe_alone_and_harmful_together_are_not_shown_safe(
    tmp_path: Path, data: Path, tiny_base: Path
) -> None:
    """A neuron that nothing writes and nothing reads: one adapter writes it, which nobody reads, the other reads it,
    which nobody wrote, so that each alone is the base to the bit; the two together are another model."""
    base, dead = Path(shutil.copytree(tiny_base, tmp_path / "base")), 5
    model = AutoModelForCausalLM.from_pretrained(base)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[dead] = 0.0
        layer.mlp.down_proj.weight.data[:, dead] = 0.0
    model.save_pretrained(base)
    pair = []
    for target, kept in (("up_proj", "lora_B"), ("down_proj", "lora_A")):
        path = make_adapter(tmp_path / target, base, targets=(target,), rank=1, size=2.0)
        tensors = load_file(path / "adapter_model.safetensors")
        for name, tensor in tensors.items():
            if kept in name:
                tensor.copy_((torch.arange(tensor.numel()) == dead).view(tensor.shape))
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        pair.append(path)
    found = compare(data, base, tuple(pair), guard=data / "val.jsonl", settings=CompareSettings(("sum",)))
    guards = {row.name: row.guard for row in found.rows}
    for path in pair:
        alone = guards[str(path)]
        assert alone is not None and alone.safe and alone.difference.mean == pytest.approx(0, abs=1e-6)
    together = guards["sum"]
    assert together is not None and not together.safe and together.difference.interval[0] > found.margin


def test_test_records_that_were_calibrated_on_are_counted(
    tmp_path: Path, data: Path, tiny_base: Path, two_adapters: tuple[Path, Path], recipe: Path
) -> None:
    """From the recipe's own fingerprints, the calibration file being gone, and from --fit-data."""
    trained = (data / "val.jsonl").read_text().splitlines(keepends=True)
    fresh = (data / "test.jsonl").read_text().splitlines(keepends=True)
    mixed = tmp_path / "test.jsonl"
    mixed.write_text("".join([*trained[:5], *fresh]))
    listener = Heard()
    inputs = prepare_comparison(mixed, recipe=recipe, base=str(tiny_base), progress=listener)
    assert inputs.repeated == 5
    assert any("5 of the test records" in message for message in listener.warnings)
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
    assert {row.name for row in found.rows if row.note == "one draw, seed 0"} == {"dare", "dare-ties"}
    assert {row.name for row in found.rows if row.kind == "method"} == set(DATA_FREE) - {"linear-peft"}
    planned = plan_comparison(
        prepare_comparison(
            data / "test.jsonl", adapters=two_adapters, base=tiny_base, settings=CompareSettings(("all",))
        )
    )
    assert ([row.name for row in planned.rows], planned.skipped) == ([row.name for row in found.rows], found.skipped)
    with pytest.raises(UsageError, match="linear-peft cannot be computed here: factors of the ranks 2, 4"):
        compare(data, tiny_base, two_adapters, settings=CompareSettings(("linear-peft",)))
    with pytest.raises(UsageError, match="module has to be fitted"):
        compare(data, tiny_base, two_adapters, settings=CompareSettings(("module",)))


def test_a_method_whose_package_is_not_installed_is_skipped_in_all_and_refused_by_name(
    data: Path, shallow_base: Path, two_shallow_adapters: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name before anything is opened."""
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    settings = CompareSettings(("all",), fit=QUICK)
    inputs = prepare_comparison(
        data / "test.jsonl",
        adapters=two_shallow_adapters,
        base=shallow_base,
        fit_data=data / "val.jsonl",
        settings=settings,
    )
    skipped = {entry.name: entry.reason for entry in plan_comparison(inputs).skipped}
    assert skipped["lorahub"] == "lorahub needs the package nevergrad"
    with pytest.raises(UsageError, match="lorahub needs the package nevergrad"):
        prepare_comparison(data / "none.jsonl", adapters=["./nowhere"], settings=CompareSettings(("lorahub",)))


def test_a_fitted_row_that_took_no_step_from_its_start_says_so(
    data: Path, shallow_base: Path, two_shallow_adapters: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loracli.fitting.search._affordable", lambda *_: 1)  # the first evaluation is of the start
    monkeypatch.setattr("loracli.fitting.search._minimise_again", lambda *_: None)
    settings = CompareSettings(("adapter",), fit=QUICK)
    found = compare(data, shallow_base, two_shallow_adapters, fit_data=data / "val.jsonl", settings=settings)
    assert found.row("adapter").note.startswith("no step from its start, ")


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


def test_a_comparison_repeats(data: Path, shallow_base: Path, two_shallow_adapters: tuple[Path, Path]) -> None:
    settings = CompareSettings(("data-free", "module"), fit=QUICK, controls=Controls(fresh_lora=True, random=True))
    first, second = (
        compare(data, shallow_base, two_shallow_adapters, fit_data=data / "val.jsonl", settings=settings)
        for _ in range(2)
    )
    assert first == second


def loss_of(found: Comparison, adapter: Path) -> float:
    return found.row(str(adapter)).nats_per_token


def test_rows_come_as_base_adapters_methods_in_the_order_asked_fit_and_controls(
    data: Path, tiny_base: Path, recipe: Path, two_adapters: tuple[Path, Path]
) -> None:
    """`uniform` first of the methods, as it is there unasked; with `data-free`, in the order of the methods."""
    settings = CompareSettings(("svd", "sum"), controls=Controls(datamix=str(two_adapters[0])))
    found = compare(data, tiny_base, recipe=recipe, settings=settings)
    first, second = found.adapters
    assert [row.name for row in found.rows] == ["base", first, second, "uniform", "svd", "sum", "fit", "datamix"]
    kinds = ["base", "ingredient", "ingredient", "method", "method", "method", "fit", "control"]
    assert [row.kind for row in found.rows] == kinds
    all_free = compare(data, tiny_base, two_adapters, settings=CompareSettings(("data-free",)))
    able = [name for name in DATA_FREE if name != "linear-peft"]  # ranks differ
    assert [row.name for row in all_free.rows] == ["base", *all_free.adapters, *able]
    assert [skipped.name for skipped in all_free.skipped] == ["linear-peft"]


def test_the_fit_of_every_kind_of_mixing_scores_what_its_export_scores_with_stock_peft(
    tmp_path: Path, data: Path, tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    """The row `fit`, whether it is set as weights or as factors, against PEFT's own forward pass; and the base's row
    against the model alone."""
    for mixing in ("adapter", "rank", "core", "factors"):
        fitted = fit_mixing(
            [str(path) for path in two_adapters],
            data / "val.jsonl",
            eval_data=data / "test.jsonl",
            base=str(tiny_base),
            settings=replace(QUICK, mixing=mixing, control="none"),
        )
        fitted.save(tmp_path / f"{mixing}.json")
        found = compare(data, tiny_base, recipe=tmp_path / f"{mixing}.json", settings=CompareSettings(("sum",)))
        export_adapter(ExportRequest(tmp_path / f"{mixing}.json"), tmp_path / mixing)
        assert abs(peft_loss(tiny_base, tmp_path / mixing, data) - found.row("fit").nats_per_token) < 5e-5, mixing
    for path in two_adapters:
        (row,) = (row for row in found.rows if row.name.endswith(f"/{path.name}"))
        assert abs(peft_loss(tiny_base, path, data) - row.nats_per_token) < 2e-5
    assert abs(peft_loss(tiny_base, None, data) - found.row("base").nats_per_token) < 2e-5


def test_fitted_rows_are_fitted_on_the_calibration_records_alone(
    tmp_path: Path, data: Path, shallow_base: Path, two_shallow_adapters: tuple[Path, Path]
) -> None:
    """Other test records change every loss and no weight; other calibration records change the weights."""
    settings = CompareSettings(
        ("adapter", "task-arithmetic", "paper", "module"), fit=QUICK, controls=Controls(fresh_lora=True, random=True)
    )
    adapters = [str(path) for path in two_shallow_adapters]
    other_test = write_jsonl(tmp_path / "test.jsonl", random_records(9, seed=11))
    other_fit = write_jsonl(tmp_path / "val.jsonl", random_records(40, seed=12))

    def run(test: Path, fit: Path) -> tuple[Comparison, dict[str, torch.Tensor]]:
        """The comparison and, of each row, the numbers that were set on the model."""
        numbers: dict[str, torch.Tensor] = {}
        with pytest.MonkeyPatch.context() as patch:
            inner = _Comparison._measure

            def measure(self: _Comparison, row: Candidate, composition: Any, engine: Any) -> Any:
                pairs = composition.mixing.factors if isinstance(composition.mixing, FixedFactors) else ()
                numbers[row.name] = torch.cat([composition.theta, *(t.flatten().double() for p in pairs for t in p)])
                return inner(self, row, composition, engine)

            patch.setattr(_Comparison, "_measure", measure)
            inputs = prepare_comparison(
                test, adapters=adapters, fit_data=fit, base=str(shallow_base), settings=settings
            )
            return run_comparison(inputs), numbers

    found, weights = run(data / "test.jsonl", data / "val.jsonl")
    tested, unmoved = run(other_test, data / "val.jsonl")
    fitted, moved = run(data / "test.jsonl", other_fit)
    for name in ("adapter", "task-arithmetic", "paper", "module", "fresh-lora", "random"):
        assert weights[name].numel() and torch.equal(weights[name], unmoved[name]), name
        assert name == "task-arithmetic" or not torch.equal(weights[name], moved[name]), name  # it tries few scales
        assert found.row(name).nats_per_token != tested.row(name).nats_per_token
    for name in ("base", "uniform", *adapters):
        assert found.row(name).nats_per_token == pytest.approx(fitted.row(name).nats_per_token, abs=1e-9)


def test_a_new_lora_is_trained_and_stopped_on_the_records_that_a_fit_has_for_each(
    data: Path, tiny_base: Path, two_adapters: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folds: dict[str, Fold] = {}
    for room in ("fitting.control", "fitting.criterion"):

        def seen(*args: Any, room: str = room, **options: Any) -> Fold:
            return folds.setdefault(room, one_fold(*args, **options))

        monkeypatch.setattr(f"loracli.{room}.one_fold", seen)
    settings = CompareSettings(("module",), fit=QUICK, controls=Controls(fresh_lora=True))
    compare(data, tiny_base, two_adapters, fit_data=data / "val.jsonl", settings=settings)
    control, fit = folds["fitting.control"], folds["fitting.criterion"]
    assert control == fit and control.validation
    assert not set(control.fitting) & set(control.validation)


def test_two_files_are_compared_as_one_that_holds_both(
    tmp_path: Path, data: Path, tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    lines = (data / "test.jsonl").read_text().splitlines(keepends=True)
    parts = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for path, part in zip(parts, (lines[:7], lines[7:]), strict=True):
        path.write_text("".join(part))
    adapters = [str(path) for path in two_adapters]
    both = run_comparison(prepare_comparison([str(p) for p in parts], adapters=adapters, base=str(tiny_base)))
    one = compare(data, tiny_base, two_adapters)
    assert both.data == "one.jsonl, two.jsonl" and both.records == one.records == 24
    for ours, theirs in zip(both.rows, one.rows, strict=True):
        assert ours.nats_per_token == pytest.approx(theirs.nats_per_token, abs=1e-7)
        assert ours.interval == pytest.approx(theirs.interval, abs=1e-7)


def test_one_adapter_is_compared_with_the_base_and_with_no_mean_of_one(
    data: Path, tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    found = compare(data, tiny_base, two_adapters[:1], settings=CompareSettings(("svd",)))
    assert [row.name for row in found.rows] == ["base", str(two_adapters[0]), "svd"]
    assert all(row.against_uniform is None for row in found.rows)
    assert found.row("svd").nats_per_token == pytest.approx(loss_of(found, two_adapters[0]), abs=1e-5)


def test_an_adapter_in_a_directory_of_a_methods_name_is_a_row_of_its_own(
    tmp_path: Path, data: Path, tiny_base: Path, two_adapters: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, path in zip(("ties", "weights"), two_adapters, strict=True):
        shutil.copytree(path, tmp_path / name)
    settings = CompareSettings(("ties",), weights=(0.5, 0.25))
    found = compare(data, tiny_base, (Path("ties"), Path("weights")), settings=settings)
    assert [row.name for row in found.rows] == ["base", "./ties", "./weights", "uniform", "ties", "weights"]
    assert found.adapters == ("./ties", "./weights")
    alone = compare(data, tiny_base, two_adapters[1:], settings=CompareSettings(("sum",)))
    assert found.row("./weights").nats_per_token == loss_of(alone, two_adapters[1])


def test_the_rank_of_a_row_is_that_of_its_export(
    tmp_path: Path, data: Path, tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    """An adapter of weight 0 takes no rank, where it has that in some modules and where it has in all."""
    names = module_names([read_adapter(str(two_adapters[1]))])
    for zeros in ([0], range(len(names)), [*range(len(names) - 1)]):
        weights = {"#1": {"default": 0.5}, "#2": {"default": 1.0} | {names[i]: 0.0 for i in zeros}}
        found = compare(data, tiny_base, two_adapters, settings=CompareSettings(("sum",), weights=weights))
        request = ExportRequest(adapters=[str(path) for path in two_adapters], weights=weights, base=str(tiny_base))
        exported = export_adapter(request, tmp_path / f"out-{len(zeros)}")
        assert found.row("weights").rank == exported.layout.rank


def test_of_fewer_than_twenty_records_nothing_is_claimed(
    tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    records = random_records(20, seed=3)
    for count in (1, 19, 20):
        write_jsonl(tmp_path / "test.jsonl", records[:count])
        guard = write_jsonl(tmp_path / "guard.jsonl", records[:count])
        found = compare(tmp_path, tiny_base, two_adapters, guard=guard, settings=CompareSettings(("sum",), margin=9.0))
        assert all(row.guard is not None and row.guard.safe is (count == 20) for row in found.rows)
        if count < 20:
            assert not found.best.clear
            assert "too few to tell: at least 20 different ones" in claim(found) or "not clearly better" in claim(found)


def test_another_seed_draws_other_records_for_the_intervals_and_changes_no_loss(
    data: Path, tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    one, other = (
        compare(data, tiny_base, two_adapters, settings=CompareSettings(("sum",), fit=FitSettings(seed=seed)))
        for seed in (0, 1)
    )
    for ours, theirs in zip(one.rows, other.rows, strict=True):
        assert (ours.nats_per_token, ours.difference) == (theirs.nats_per_token, theirs.difference)
    assert one.row("sum").interval != other.row("sum").interval


def test_an_adapter_whose_loss_is_not_finite_is_left_out_by_name_and_all_of_them_are_an_error(
    tmp_path: Path, data: Path, tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    huge = make_adapter(tmp_path / "huge", tiny_base, targets=("q_proj", "v_proj"), seed=3, size=1e19)
    listener = Heard()
    adapters = [str(huge), str(two_adapters[0])]
    found = run_comparison(
        prepare_comparison(data / "test.jsonl", adapters=adapters, base=str(tiny_base)), progress=listener
    )
    skipped = {entry.name: entry.reason for entry in found.skipped}
    assert str(huge) in skipped and str(huge) not in {row.name for row in found.rows}
    assert any(f"{huge} is left out: " in message for message in listener.warnings)
    assert found.best_ingredient == str(two_adapters[0])
    assert "uniform" in skipped and all(row.against_uniform is None for row in found.rows)
    with pytest.raises(NonFiniteLoss):
        compare(data, tiny_base, (huge,))
    other = make_adapter(tmp_path / "other", tiny_base, targets=("q_proj", "v_proj"), seed=4, size=1e19)
    with pytest.raises(NonFiniteLoss):
        compare(data, tiny_base, (huge, other))


def test_a_fitted_row_whose_loss_is_nowhere_finite_is_left_out_and_a_search_steps_over_such_points(
    tmp_path: Path, data: Path, shallow_base: Path, two_shallow_adapters: tuple[Path, Path]
) -> None:
    """An adapter of numbers so large that the model overflows at every weight that is not almost 0."""
    huge, heard = make_adapter(tmp_path / "huge", shallow_base, seed=3, size=1e19), Heard()
    settings = CompareSettings(
        ("task-arithmetic", "lorahub", "module"), fit=QUICK, controls=Controls(fresh_lora=True, random=True)
    )
    adapters = [str(huge), str(two_shallow_adapters[0])]
    inputs = prepare_comparison(
        data / "test.jsonl", adapters=adapters, fit_data=data / "val.jsonl", base=str(shallow_base), settings=settings
    )
    found = run_comparison(inputs, progress=heard)
    assert {row.name for row in found.rows} == {"base", adapters[1], "lorahub", "fresh-lora"}
    assert abs((found.row("lorahub").weights or ())[0]) < 1e-3
    for name in ("task-arithmetic", "module", "random", "uniform", adapters[0]):
        reason = next(entry.reason for entry in found.skipped if entry.name == name)
        assert reason.startswith("the loss is not finite on the records at ")
        assert f"{name} is left out: {reason}" in heard.warnings


def test_what_is_fitted_is_announced_measured_and_finished_even_where_it_is_stopped(
    data: Path, tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    """The task that is shown begins once and ends once, also where a row raises what nobody expects."""

    class Told(Heard):
        begun = finished = done = 0
        total: int | None = None

        def __init__(self) -> None:
            super().__init__()
            self.stages: list[str] = []

        def begin(self, task: str, total: int | None, unit: str) -> None:
            self.begun += task == TASK
            self.total = total if task == TASK else self.total

        def advance(self, task: str, amount: int, status: str = "") -> None:
            if task == TASK:
                assert amount >= 0
                self.done += amount
                self.stages.append(status.split(", ")[0])

        def finish(self, task: str) -> None:
            self.finished += task == TASK

    adapters = [str(path) for path in two_adapters]
    inputs = prepare_comparison(data / "test.jsonl", adapters=adapters, base=str(tiny_base))
    told = Told()
    run_comparison(inputs, progress=told)
    assert (told.begun, told.finished) == (1, 1)
    ways = 3 + len(DATA_FREE) - 1  # the base, two adapters, every method without a fit but linear-peft: ranks differ
    assert told.stages[0] == f"1/{ways} base" and told.stages[-1].startswith(f"{ways}/{ways} ")
    assert told.total is not None and 0 < told.done <= told.total
    assert any(f"{ways} rows to score on 24 records: about " in message for message in told.said)
    stopped = Told()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Candidate, "composed", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_comparison(inputs, progress=stopped)
    assert (stopped.begun, stopped.finished) == (1, 1)


def test_what_cannot_be_compared_is_refused_before_the_base_is_loaded(
    data: Path, tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    with pytest.raises(UsageError, match="nothing to compare"):
        compare(data, tiny_base)
    with pytest.raises(UsageError, match="random has to be fitted"):
        compare(data, tiny_base, two_adapters, settings=CompareSettings(controls=Controls(random=True)))
    with pytest.raises(UsageError, match="module has to be fitted"):
        prepare_comparison(data / "none.jsonl", adapters=["nowhere"], settings=CompareSettings(("sum", "module")))
    with pytest.raises(UsageError, match="1 number for 2 adapters"):
        prepare_comparison(
            data / "test.jsonl", adapters=two_adapters, base="nowhere", settings=CompareSettings(weights=(1,))
        )
    with pytest.raises(UsageError, match="given twice"):
        compare(data, tiny_base, (two_adapters[0], two_adapters[0]))
    inputs = prepare_comparison(data / "test.jsonl", adapters=[str(p) for p in two_adapters], base=str(tiny_base))
    with pytest.raises(UsageError):
        run_comparison(inputs, placement=Placement(dtype="int3"))


def test_lines_per_record_hold_what_the_table_is_made_of(
    data: Path, tiny_base: Path, two_adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    place = tmp_path / "new" / "records.jsonl"
    found = compare_adapters(
        data / "test.jsonl",
        adapters=two_adapters,
        base=tiny_base,
        settings=CompareSettings(("ties",)),
        metric=TaskMetric("contains", max_new_tokens=4),
        per_record=str(place),
    )
    lines = [json.loads(line) for line in place.read_text().splitlines()]
    kept = {name: [line for line in lines if line["row"] == name] for name in dict.fromkeys(x["row"] for x in lines)}
    assert list(kept) == [row.name for row in found.rows]
    best = kept[found.best_ingredient]
    for row in found.rows:
        of_row = kept[row.name]
        assert [line["record"] for line in of_row] == [f"{data / 'test.jsonl'}:{n}" for n in range(1, 25)]
        assert {line["task"] for line in of_row} == {"even", "odd"}
        nats, tokens = (sum(line[key] for line in of_row) for key in ("nats", "tokens"))
        assert tokens == found.scored_tokens and nats / tokens == pytest.approx(row.nats_per_token, rel=1e-12)
        less = sum(line["nats"] - other["nats"] for line, other in zip(of_row, best, strict=True)) / tokens
        assert less == pytest.approx(row.difference, abs=1e-12)
        assert row.metric is not None and sum(line["value"] for line in of_row) / 24 == row.metric.mean

    kept_text = place.read_text()
    with pytest.raises(OutputExists, match="records.jsonl exists"):
        compare_adapters(data / "test.jsonl", adapters=two_adapters, base=tiny_base, per_record=place)
    assert place.read_text() == kept_text
