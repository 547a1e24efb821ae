"""What each command says to people: the numbers it prints are those of the files."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loracli.adapters.adapter import read_adapter
from loracli.algebra.methods.method import MethodOptions
from loracli.cli.compare import _export_of
from loracli.errors import NonFiniteLoss
from loracli.evaluation.comparison import RecipeRow
from loracli.fitting.engine import Engine
from loracli.recipe.recipe import load_recipe, weights_by_leaf
from tests.cli.project import FIT, FIT_WITH_CONTROL, document, run, tree


def row(text: str, name: str) -> list[str]:
    """The cells of the line that starts with `name`."""
    [line] = [line for line in text.splitlines() if line.split()[:1] == [name]]
    return line.split()


# inspect


def test_the_fields_that_quiet_keeps_are_separated_by_tabs(here: Path) -> None:
    Path("tab\tin").symlink_to("know")
    shown = run("inspect", "./tab\tin", "form", "-q")
    assert [len(line.split("\t")) for line in shown.stdout.splitlines()] == [3, 3]
    assert shown.stdout.startswith("./tab\\tin\trank ")


def test_inspect_tells_what_is_in_the_files(here: Path) -> None:
    found = {a["reference"]: a for a in document("inspect", "know", "form")["adapters"]}
    for name, folder in (("know", here / "know"), ("form", here / "form")):
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        a = found[name]
        assert a["ranks"] == [config["r"]] and a["scaling"] == [config["lora_alpha"] / config["r"]] * 2
        assert a["leaves"] == sorted(config["target_modules"])
        assert a["modules"] == len(tensors) // 2
        assert a["parameters"] == sum(tensor.numel() for tensor in tensors.values())
        assert a["base_model"] == config["base_model_name_or_path"] and a["commit"] is None
        dense = torch.cat([
            (config["lora_alpha"] / config["r"])
            * (tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double()).flatten()
            for key in tensors
            if "lora_A" in key
        ])  # fmt: skip
        assert a["norm"] == pytest.approx(float(dense.norm()), rel=1e-9)


def test_inspect_prints_the_overlap_of_every_pair(here: Path) -> None:
    shutil.copytree("know", "again")  # the same bytes, which is warned of
    content = document("inspect", "know", "form", "again")
    overlaps = {(o["first"], o["second"]): o for o in content["overlaps"]}
    assert list(overlaps) == [("know", "form"), ("know", "again"), ("form", "again")]
    assert overlaps["know", "again"]["cosine"] == pytest.approx(1, abs=1e-12)
    assert abs(overlaps["know", "form"]["cosine"]) < 0.9
    text = run("inspect", "know", "form", "again")
    assert "can be composed" in text.stdout
    assert f"{overlaps['know', 'form']['cosine']:+.4f}" in text.stdout
    assert f"{overlaps['know', 'form']['lora_A_cosine']:+.4f}" in text.stdout
    assert [o["same_start"] for o in overlaps.values()] == [False, True, False]
    assert "know and again started from the same lora_A" in text.stdout and "and form started" not in text.stdout
    assert "loracat fit --adapters know form again --data" in text.stderr


def test_inspect_of_one_adapter_has_nothing_to_compare(here: Path) -> None:
    result = run("inspect", "know")
    assert result.exit_code == 0 and "composed" not in result.stdout and "overlap" not in result.stdout


# fit


def test_a_dry_run_counts_what_a_fit_would_use_and_writes_nothing(here: Path) -> None:
    before = tree(here)
    plan = document(*FIT, "--dry-run")["plan"]
    assert plan["adapters"] == ["know", "form"]
    assert plan["training_records"] == len(Path("calibration.jsonl").read_text().splitlines())
    assert plan["held_out_records"] == len(Path("test.jsonl").read_text().splitlines())
    modules = {name: set(read_adapter(name).modules) for name in ("know", "form")}
    assert plan["modules"] == len(modules["know"] | modules["form"])
    assert plan["numbers"] == len(modules["know"]) + len(modules["form"])
    assert document(*FIT, "--dry-run", "--mixing", "adapter")["plan"]["numbers"] == 2
    assert tree(here) == before


def test_auto_says_which_level_won_and_why_and_logs_its_steps(here: Path) -> None:
    """In the terminal, in the document, in the recipe, and with a line for each step."""
    shown = run(*FIT_WITH_CONTROL, "--mixing", "auto", "-o", "auto.json", "--log", "steps.jsonl", "-v")
    recipe = load_recipe("auto.json")
    document = json.loads(run(*FIT, "--mixing", "auto", "-o", "auto.json", "--force", "--json").stdout)
    assert document["mixing"] == recipe.mixing.kind
    assert [level["why"] for level in document["rungs"]] == [level.why for level in recipe.fit.rungs]
    assert [level["kind"] for level in document["rungs"] if level["won"]] == [recipe.mixing.kind]
    for level in recipe.fit.rungs[1:]:
        assert (
            f"{level.kind}: {level.why}" in shown.stdout
            and f"{level.kind}: {level.why}" in run("show", "auto.json", "--search").stdout
            and f"{level.kind}: {level.why}" not in run("show", "auto.json").stdout
        )
    steps = [json.loads(line) for line in Path("steps.jsonl").read_text().splitlines()]
    assert [step["number"] for step in steps] == list(range(1, len(steps) + 1))
    assert {step["rung"] for step in steps} == {"fresh-lora", *(level.kind for level in recipe.fit.rungs[1:])}
    assert all(step["loss"] > 0 and step["rate"] > 0 and step["spent_tokens"] > 0 for step in steps)
    assert run(*FIT, "-o", "other.json", "--log", "steps.jsonl").exit_code == 2
    assert run(*FIT, "--dry-run", "--json", "--mixing", "auto").exit_code == 0


def test_a_loss_that_is_not_finite_leaves_the_best_weights_and_names_the_records(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total, calls = Engine.total, []

    def breaks(self: Engine, *arguments: object, **key: Any) -> object:
        calls.append(arguments)
        if len(calls) > 24:
            raise NonFiniteLoss("the loss is not finite on the records at calibration.jsonl:3")
        return total(self, *arguments, **key)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "total", breaks)
    result = run(*FIT, "-o", "new.json")
    assert result.exit_code == 1
    assert "error: the fit stopped early: the loss is not finite on the records at calibration.jsonl:3" in result.stderr
    recipe = load_recipe("new.json")
    assert recipe.fit.stopped is not None and "calibration.jsonl:3" in recipe.fit.stopped
    assert recipe.held_out.row("fit").nats_per_token < recipe.held_out.row("base").nats_per_token
    assert run("export", "new.json").exit_code == 0
    assert not Path("new.json.state").exists()


def test_the_table_of_a_fit_is_the_one_in_its_recipe(here: Path) -> None:
    result = run(*FIT_WITH_CONTROL, "-o", "new.json")
    table = load_recipe("new.json").held_out
    assert [r.name for r in table.rows] == ["base", "know", "form", "uniform", "sum", "fit"]
    for entry in table.rows:
        cells = row(result.stdout, entry.name)
        assert cells[1] == f"{entry.nats_per_token:.4f}"
        assert cells[2:3] == ([] if entry.name == table.best_ingredient else [f"{entry.difference:+.4f}"])
    assert result.stdout.startswith("The composition is ")
    assert "written: new.json" in result.stdout
    assert "loracat export new.json --merge" in result.stderr
    content = document(*FIT_WITH_CONTROL, "-o", "newer.json")
    assert Path("newer.json").read_bytes() == Path("new.json").read_bytes()
    assert [r["nats_per_token"] for r in content["rows"]] == [r.nats_per_token for r in table.rows]


def test_a_recipe_goes_by_the_folder_it_is_written_to(here: Path) -> None:
    assert run(*FIT, "--mixing", "adapter", "-o", "recipes/soup.json", "-q").stdout == "recipes/soup.json\n"
    recipe = load_recipe("recipes/soup.json")
    assert [a.reference for a in recipe.adapters] == ["../know", "../form"]
    assert str(here) not in Path("recipes/soup.json").read_text()
    assert run("export", "recipes/soup.json", "-q").exit_code == 0


def with_tasks(path: str, tasks: list[str]) -> None:
    """Gives the records of a file tasks in turn."""
    records = [json.loads(line) for line in Path(path).read_text().splitlines()]
    Path(path).write_text(
        "".join(json.dumps(record | {"task": tasks[i % len(tasks)]}) + "\n" for i, record in enumerate(records))
    )


def test_losses_by_task_are_shown_where_there_are_several(here: Path) -> None:
    with_tasks("test.jsonl", ["city", "job"])
    content = document(*FIT, "--mixing", "adapter", "-o", "new.json")
    table = load_recipe("new.json").held_out
    assert [task["task"] for task in content["tasks"]] == [task.task for task in table.tasks] == ["city", "job"]
    text = run("show", "new.json").stdout
    names = [row.name for row in sorted(table.rows, key=lambda row: row.nats_per_token)]
    for task in table.tasks:
        losses = [f"{task.nats_per_token[name]:.4f}" for name in names]
        cells = [str(task.records), str(task.scored_tokens), *losses]
        assert row(text, task.task) == [task.task, *cells]
    header = next(line for line in text.splitlines() if line.split()[:2] == ["records", "tokens"])
    assert header.split()[2:] == names
    nats = sum(task.nats_per_token["fit"] * task.scored_tokens for task in table.tasks)
    assert nats / table.scored_tokens == pytest.approx(table.row("fit").nats_per_token)
    recipe = json.loads(Path("new.json").read_text())
    recipe["held_out"]["tasks"].pop()
    Path("one.json").write_text(json.dumps(recipe))
    assert "by task" in text and "by task" not in run("show", "one.json").stdout


def test_data_comes_from_standard_input_and_several_files_with_weights(here: Path) -> None:
    data = Path("calibration.jsonl").read_bytes()
    Path("more.jsonl").write_text("".join(json.dumps({"text": f"t {i}"}) + "\n" for i in range(9)) + "oops\n")
    words = ["fit", "-a", "know", "form", "--base", "base", "--eval-data", "test.jsonl", "--passes", "2", "-f"]
    words += ["--mixing", "adapter", "--control", "none"]
    result = run(*words, "--data", "-", "more.jsonl:0.5", "--skip-bad", input=data)
    assert result.exit_code == 0, result.stderr
    assert "more.jsonl: 1 bad lines are left out: 10;" in result.stderr
    first, second = load_recipe("recipe.json").data
    assert (first.name, first.records) == ("<stdin>", len(data.splitlines()))
    assert (second.name, second.weight, second.records, second.skipped) == ("more.jsonl", 0.5, 9, 1)
    text = run("show").stdout
    assert f"fitted on {first.records} records of <stdin> (prompt-completion, {first.scored_tokens} scored" in text
    assert ", weight 0.5), 1 bad lines left out" in text


def test_a_bad_record_of_standard_input_is_named_by_it(here: Path) -> None:
    result = run("fit", "-f", "-a", "know", "--base", "base", "--data", "-", input=b'{"text": "t"}\n{"text": ""}\n')
    assert result.exit_code == 3 and "<stdin>:2: text: empty" in result.stderr


def test_options_of_the_data_reach_the_fit(here: Path) -> None:
    records = [{"prompt": "p" * 40 if i % 2 else "p", "completion": "c", "text": f"{i}"} for i in range(60)]
    Path("val.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["fit", "-a", "know", "form", "--base", "base", "--passes", "2", "-f", "--data", "val.jsonl"]
    words += ["--mixing", "adapter", "--control", "none"]
    assert "say which to read: --format" in run(*words).stderr
    words += ["--format", "prompt-completion", "--max-length", "20"]
    refused = run(*words)
    assert refused.exit_code == 3 and "--allow-truncation" in refused.stderr
    assert run(*words, "--allow-truncation", "--eval-data", "test.jsonl").exit_code == 0
    [data] = load_recipe("recipe.json").data
    assert (data.shape, data.records, data.dropped) == ("prompt-completion", 30, 30)


# show


def test_show_prints_every_weight_and_the_table(here: Path) -> None:
    result = run("show")
    recipe = load_recipe("recipe.json")
    for name, cells in weights_by_leaf(recipe).items():
        spreads = [f"{cell[0]:+.2f} {cell[1]:+.2f} to {cell[2]:+.2f}" if cell else "-" for cell in cells]
        line = next(line for line in result.stdout.splitlines() if line.split()[:1] == [name])
        assert " ".join(line.split()) == " ".join([name, *spreads])
    for entry in recipe.held_out.rows:
        assert f"{entry.nats_per_token:.4f}" in result.stdout
    assert document("show")["recipe"] == json.loads(Path("recipe.json").read_text())


@pytest.mark.parametrize("width", ["40", "80", "200"])
def test_tables_in_a_pipe_are_never_folded(here: Path, monkeypatch: pytest.MonkeyPatch, width: str) -> None:
    expected = run("show").stdout
    monkeypatch.setenv("COLUMNS", width)
    assert run("show").stdout == expected


# export


def delta_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: m.factors.delta_weight() for name, m in read_adapter(str(folder)).modules.items()}


def composed(recipe_file: str) -> dict[str, torch.Tensor]:
    """sum_i w_li s_i B_i A_i from the recipe's JSON and the adapters' files, in float64."""
    recipe = json.loads(Path(recipe_file).read_text())
    adapters = [read_adapter(f"./{a['reference']}") for a in recipe["adapters"]]
    total: dict[str, torch.Tensor] = {}
    for index, adapter in enumerate(adapters):
        for name, module in adapter.modules.items():
            update = recipe["mixing"]["weights"][name][index] * module.factors.delta_weight()
            total[name] = total[name] + update if name in total else update
    return total


def test_an_export_is_the_weighted_sum_of_the_ingredients(here: Path) -> None:
    content = document("export", "--dtype", "float32")
    found = delta_of(here / "adapter-cat")
    for name, expected in composed("recipe.json").items():
        error = float((found[name] - expected).norm() / expected.norm())
        assert error <= 1.5e-7
        [entry] = [m for m in content["modules"] if m["name"] == name]
        assert entry["relative_error"] == pytest.approx(error, rel=0.2, abs=1e-9)
    assert content["size_bytes"] == (here / "adapter-cat" / "adapter_model.safetensors").stat().st_size


def test_an_export_of_rank_k_has_rank_k_and_keeps_what_it_says(here: Path) -> None:
    content = document("export", "--merge", "--rank", "3", "--dtype", "float32")
    found = delta_of(here / "adapter-merged")
    assert content["rank"] == 3
    for name, expected in composed("recipe.json").items():
        values = torch.linalg.svdvals(expected)
        kept = float((values[:3] ** 2).sum() / (values**2).sum())
        [entry] = [m for m in content["modules"] if m["name"] == name]
        assert entry["kept_energy"] == pytest.approx(kept, abs=1e-6)
        best = float((values[3:] ** 2).sum() ** 0.5)
        assert float((found[name] - expected).norm()) == pytest.approx(best, rel=1e-4, abs=1e-6)


def test_a_compression_prints_every_module_and_the_loss_before_and_after(here: Path) -> None:
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps(config | {"dtype": "float32"}))  # in bfloat16 they round apart
    content = document("export", "--merge", "--energy", "0.5", "--data", "test.jsonl", "--base", "base")
    loss = content["loss"]
    compared = document("compare", "recipe.json", "--data", "test.jsonl", "--base", "base")
    [fit] = [row for row in compared["rows"] if row["name"] == "fit"]
    assert loss["before"] == pytest.approx(fit["nats_per_token"], abs=1e-6)
    assert loss["records"] == compared["records"]
    assert loss["difference"] == loss["after"] - loss["before"] and abs(loss["difference"]) > 1e-3
    assert loss["interval"][0] <= loss["difference"] <= loss["interval"][1]
    printed = run("export", "--merge", "--energy", "0.5", "--force").stdout
    worst = sorted(content["modules"], key=lambda module: module["kept_energy"])
    assert f"... and {len(worst) - 10} more" in printed and worst[-1]["name"] not in printed
    for module in worst[:10]:
        assert row(printed, module["name"])[1:3] == [str(module["rank"]), f"{module['kept_energy']:.2%}"]


def test_a_whole_rank_changes_no_loss(here: Path) -> None:
    loss = document(
        "export", "--merge", "--tolerance", "0", "--dtype", "float32", "-d", "test.jsonl", "--base", "base"
    )["loss"]
    assert abs(loss["difference"]) < 1e-4


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_what_is_exported_loads_in_stock_peft(here: Path) -> None:
    assert run("export", "-q", "--dtype", "float32").exit_code == 0
    base = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, "adapter-cat")
    for name, expected in composed("recipe.json").items():
        delta = model.base_model.model.get_submodule(name).get_delta_weight("default").detach().double()
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5)


def test_no_local_path_is_in_an_export(here: Path) -> None:
    assert run("export", "-q").exit_code == 0
    for path in (here / "adapter-cat").iterdir():
        assert str(here).encode() not in path.read_bytes()


# env


def test_env_prints_versions_in_all_three_forms() -> None:
    facts = document("env")["env"]
    installed = version("torch")  # without what a build of it adds, such as +cu130
    assert facts["torch"] == installed
    assert f"torch={installed}\n" in run("env", "-q").stdout
    assert row(run("env").stdout, "torch") == ["torch", installed]
    assert facts["gguf"] == version("gguf")  # an extra


# hints


def hinted(*words: str) -> list[str]:
    """The words of the command that is named next."""
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    [line] = [line for line in result.stderr.splitlines() if line.startswith("next: ")]
    return shlex.split(line.removeprefix("next: "))


def compared(best: str) -> Any:
    """What is asked of a comparison of one recipe with this as its best row."""
    fit = RecipeRow("fit", "0" * 64, ("a b",))
    return SimpleNamespace(best=SimpleNamespace(name=best), recipes=(fit,), adapters=("a b",))


def test_the_next_command_is_named_with_what_was_given_and_can_be_typed(here: Path) -> None:
    assert hinted("compare", "--data", "test.jsonl", "--base", "base", "--methods", "uniform") == ["loracat", "export"]
    os.rename("know", "know how; $(rm)")
    Path("it's").mkdir()
    adapters = ["know how; $(rm)", "form"]
    assert hinted("inspect", *adapters) == ["loracat", "fit", "--adapters", *adapters, "--data", "DATA.jsonl"]
    following = _export_of(compared("ties"), MethodOptions(density=0.9), (), adapters, {"base": "base"})
    assert following[-2:] == adapters and following[-5:-3] == ["--base", "base"]
    assert run(*following[1:], "--dry-run").exit_code == 0
    fit = ["fit", "--adapters", *adapters, "--data", "calibration.jsonl", "--base", "base", "--mixing", "adapter"]
    following = hinted(*fit, "--passes", "2", "--holdout", "0.2", "--control", "none", "-o", "it's/soup.json")
    assert following == ["loracat", "export", "it's/soup.json", "--merge"]
    assert run(*following[1:], "-q").exit_code == 0
    assert hinted("show", "it's/soup.json") == following


def test_weights_that_were_the_best_are_exported_as_they_were_typed() -> None:
    given, weights = {"base": "base", "base-revision": None, "modules-to-save": "average"}, ["0.7", "-0.3"]
    words = _export_of(compared("weights"), MethodOptions(), (), ["a", "b"], given, weights)
    expected = "loracat export --weights 0.7 -0.3 --base base --modules-to-save average --adapters a b"
    assert shlex.join(words) == expected
    assert _export_of(compared("weights"), MethodOptions(), [Path("recipe.json")], ["a", "b"], given, weights) == []


@pytest.mark.parametrize("best", ["ties", "dare", "lorahub", "fit", "module", "base", "random"])
def test_only_what_can_be_exported_is_named_after_a_comparison(best: str) -> None:
    given = {"base": "my base", "base-revision": None, "modules-to-save": "refuse"}
    words = _export_of(compared(best), MethodOptions(density=0.5, scale=2.0, seed=3), (), ["a b"], given)
    expected = {
        "ties": ["--method", "ties", "--density", "0.5", "--scale", "2.0", "--base", "my base", "--adapters", "a b"],
        "dare": [
            "--method",
            "dare",
            "--density",
            "0.5",
            "--scale",
            "2.0",
            "--seed",
            "3",
            "--base",
            "my base",
            "--adapters",
            "a b",
        ],
        "fit": ["--adapters", "a b"],
    }
    assert words[2:] == expected.get(best, []) and words[:2] in ([], ["loracat", "export"])


def test_other_names_of_fields_are_taken_with_data_alone(here: Path) -> None:
    rows = [{"question": f"{i}", "answer": "a"} for i in range(60)]
    Path("qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["fit", "-a", "know", "form", "--base", "base", "-f", "--data", "qa.jsonl", "--dry-run"]
    refused = run(*words)
    assert refused.exit_code == 3 and "--fields prompt=question,completion=answer" in refused.stderr
    assert "--skip-bad" not in refused.stderr
    assert run(*words, "--fields", "prompt=question,completion=answer").exit_code == 0
    idle = run("export", "recipe.json", "-o", "none", "--fields", "prompt=question")
    assert idle.exit_code == 2 and "no data are read" in idle.stderr and not Path("none").exists()
