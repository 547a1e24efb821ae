"""compare, report, show and exports of methods, as typed: what they print is what the library says."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loracli.evaluation.comparison import Comparison
from loracli.recipe.recipe import load_recipe
from loracli.system.document import decode
from tests.cli.project import document, run, tree

ALONE = "compare --adapters know form --data few.jsonl --base base".split()


@pytest.fixture
def few(here: Path) -> Path:
    """The project with the first twelve test records as a file of their own."""
    lines = (here / "test.jsonl").read_text().splitlines(keepends=True)
    (here / "few.jsonl").write_text("".join(lines[:12]))
    return here


def test_the_rows_of_json_are_those_of_the_recipes_own_table(here: Path) -> None:
    found = document("compare", "--data", "test.jsonl", "--base", "base", "--methods", "sum")
    table = load_recipe("recipe.json").held_out
    assert [row["name"] for row in found["rows"]] == ["base", "know", "form", "uniform", "sum", "fit"]
    for row in found["rows"]:
        held = table.row(row["name"])
        assert row["nats_per_token"] == pytest.approx(held.nats_per_token, abs=1e-5)
        assert row["interval"] == pytest.approx(list(held.interval), abs=1e-5)
    problems: list[str] = []
    decode(Comparison, {k: v for k, v in found.items() if k != "loracat"}, "", problems)
    assert not problems


def test_the_table_shows_every_row_and_the_claim(few: Path) -> None:
    result = run(*ALONE, "--methods", "ties,svd", "--density", "0.3", "--guard", "calibration.jsonl")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert {line.split()[0] for line in lines if line} >= {"base", "know", "form", "uniform", "ties", "svd"}
    assert "what must not get worse: calibration.jsonl, by at most 0.02 nats per token" in result.stdout
    assert "lowest loss of 5 ways" in result.stdout or "is the best of 5 ways" in result.stdout
    assert "4 times in 5" in result.stdout
    quiet = run(*ALONE, "--methods", "ties", "-q")
    assert quiet.stdout.split() in (["form"], ["know"], ["uniform"], ["ties"])


def test_methods_with_blanks_between_them_are_no_recipes(few: Path) -> None:
    result = run(*ALONE, "--methods", "ties", "svd", "dare")
    assert result.exit_code == 2 and "--methods ties,svd,dare" in result.stderr
    result = run("compare", "svd", *ALONE[1:])
    assert result.exit_code == 2 and "--methods svd\n" in result.stderr


def test_options_of_the_methods_change_their_rows(few: Path) -> None:
    def loss(*words: str) -> dict[str, float]:
        return {row["name"]: row["nats_per_token"] for row in document(*ALONE, *words)["rows"]}

    plain = loss("--methods", "ties,dare")
    assert loss("--methods", "ties,dare") == plain
    denser, seeded = loss("--methods", "ties", "--density", "0.9"), loss("--methods", "dare", "--seed", "5")
    assert denser["ties"] != plain["ties"] and seeded["dare"] != plain["dare"]
    assert loss("--methods", "ties", "--rank", "2")["ties"] != plain["ties"]
    assert loss("--methods", "ties", "--scale", "0.5")["ties"] != plain["ties"]


def test_answers_are_judged_by_name_or_by_a_command(few: Path) -> None:
    scorer = few / "grade.py"
    scorer.write_text(
        "import json, sys\nfor line in sys.stdin:\n    a = json.loads(line)\n"
        "    print(int(a['output'].strip() == a['reference'].strip()))\n"
    )
    common = (*ALONE, "--methods", "sum", "--max-new-tokens", "16")
    by_name = document(*common, "--generate", "exact")
    by_command = document(*common, "--metric-command", shlex.join([sys.executable, str(scorer)]))
    assert by_name["metric"] == "exact" and by_command["metric"] == "command"
    for ours, theirs in zip(by_name["rows"], by_command["rows"], strict=True):
        assert ours["metric"] == theirs["metric"]
    shown = run(*common, "--generate", "exact")
    assert "by exact, " in shown.stdout


@pytest.mark.parametrize(
    ("metric", "code", "said"),
    [
        (["--generate", "numeric"], 3, "few.jsonl:1: its answer has no number"),
        (["--metric-command", "./grade.py"], 2, "there is no program ./grade.py"),  # which is not executable
    ],
)
def test_a_metric_that_cannot_judge_is_refused_before_the_base_is_loaded(
    few: Path, monkeypatch: pytest.MonkeyPatch, metric: list[str], code: int, said: str
) -> None:
    (few / "grade.py").write_text("")
    monkeypatch.setattr("loracli.model.session.load_base", lambda *_, **__: pytest.fail("the base is loaded"))
    chosen = ["--select-by" if word == "--generate" else word for word in metric]
    fit = ("fit", "-a", "know", "form", "-d", "few.jsonl", "--base", "base", "-o", "new.json")
    for words in ((*ALONE, "--methods", "sum", *metric), (*fit, *chosen)):
        result = run(*words)
        assert result.exit_code == code and said in result.stderr and "hint: " in result.stderr


def test_after_the_first_row_it_is_said_how_long_the_answers_take(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loracli.comparison.compare._LONG", 0.0)
    result = run(*ALONE, "--methods", "sum", "--generate", "exact", "--max-new-tokens", "1")
    assert result.stderr.count("the answers of a row take") == 1 and "those of the other 4 about" in result.stderr


def test_where_a_kind_of_mixing_is_best_the_next_command_is_its_fit(here: Path) -> None:
    words = (*ALONE[:4], "-d", "test.jsonl", "--base", "base", "-m", "adapter", "--fit-data", "calibration.jsonl")
    found = run(*words, "--passes", "12", "--batch-tokens", "512")
    assert found.exit_code == 0, found.stderr
    [line] = [line for line in found.stderr.splitlines() if line.startswith("next: ")]
    assert line == (
        "next: loracat fit --adapters know form --data calibration.jsonl --mixing adapter --base base "
        "--batch-tokens 512 --passes 12"
    )
    assert found.stdout.startswith("adapter ") and run(*line.split()[2:], "--dry-run").exit_code == 0


def test_every_number_of_the_table_is_the_one_of_the_document(few: Path) -> None:
    """Rows in the same order, each with its rank, loss, perplexity, difference, intervals and share, rounded alone."""
    words = (*ALONE, "--methods", "ties,svd", "--guard", "calibration.jsonl")
    found, lines = document(*words), run(*words).stdout.splitlines()

    def interval(pair: list[float]) -> str:
        return f"{pair[0]:+.4f} to {pair[1]:+.4f}"

    ordered = sorted(found["rows"], key=lambda row: row["nats_per_token"])
    brief = [
        [
            row["name"],
            f"{row['nats_per_token']:.4f}",
            *(
                []
                if row["name"] == found["best_ingredient"]
                else [f"{row['difference']:+.4f}", *interval(row["interval"]).split(), f"{row['worse_records']:.0%}"]
            ),
            *([] if row["rank"] is None else [str(row["rank"])]),
        ]
        for row in ordered
    ]
    more = [[f"{row['perplexity']:.4g}", *interval(row["against_uniform"]["interval"]).split()] for row in ordered]
    full = [[*left, *right] for left, right in zip(brief, more, strict=True)]
    for shown, expected in ((lines, brief), (run(*words, "-v").stdout.splitlines(), full)):
        start = next(i for i, line in enumerate(shown) if line.split()[:1] == ["nats/token"]) + 1
        assert [line.split() for line in shown[start : start + len(expected)]] == expected
    for row in found["rows"][1:]:
        guard = row["guard"]
        shown = [f"{guard['nats_per_token']:.4f}", f"{guard['difference']['mean']:+.4f}"]
        safe = "safe" if guard["safe"] else "NOT SHOWN SAFE"
        assert [row["name"], *shown, *interval(guard["difference"]["interval"]).split(), *safe.split()] in [
            line.split() for line in lines
        ]


@pytest.mark.parametrize("stage", ["read", "loaded", "begun"])
def test_a_comparison_that_is_stopped_leaves_nothing(few: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Neither a file nor a row, as long as no row is done."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    place = {"read": "open_session", "loaded": "candidates", "begun": "_Comparison._measure"}[stage]
    monkeypatch.setattr(f"loracli.comparison.compare.{place}", stop)
    before = tree(few)
    result = run(*ALONE, "--methods", "sum", "--json")
    assert result.exit_code == 130 and tree(few) == before
    assert json.loads(result.stdout)["error"]["kind"] == "Interrupted" and "rows" not in result.stdout


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--methods", "tie"], 2, "--methods tie is not one of"),
        (["--methods", "module"], 2, "module has to be fitted"),
        (["--methods", "linear-peft"], 2, "linear-peft cannot be computed here"),
        (["--control", "random"], 2, "--control random has to be fitted"),
        (["--control", "datamix"], 2, "--control datamix lacks its adapter"),
        (["--generate", "bleu"], 2, "the metric bleu is not one of"),
        (["--density", "0"], 2, "--density 0.0 is not above 0"),
        (["--guard", "none.jsonl"], 3, "none.jsonl cannot be read"),
        (["--methods", "svd", "--scale", "2"], 2, "none of the --methods svd takes --scale"),
        (["--methods", "sum,module", "--density", "0.5"], 2, "none of the --methods sum,module takes --density"),
        (["--methods", "sum", "--rank", "4"], 2, "none of the --methods sum takes --rank"),
        (["--margin", "0.1"], 2, "--margin is for the records of --guard"),
        (["--fit-data", "calibration.jsonl"], 2, "--fit-data has no use here"),
        (["--passes", "3"], 2, "--passes has no use here"),
        (["--methods", "lorahub", "--fit-data", "calibration.jsonl", "--cv", "3"], 2, "--cv has no use here"),
        (["--max-new-tokens", "1"], 2, "--max-new-tokens is for answers that are judged"),
        (["--tolerance", "0.1"], 2, "--tolerance is for answers that are judged"),
        (["--metric-command", "false", "--max-new-tokens", "1"], 1, "the metric command ended with the code 1"),
    ],
)
def test_what_cannot_be_compared_ends_in_one_error_and_its_code(
    few: Path, words: list[str], code: int, said: str
) -> None:
    before = tree(few)
    result = run(*ALONE, *words)
    assert (result.exit_code, result.stderr.count("error: ")) == (code, 1) and said in result.stderr
    assert tree(few) == before and "Traceback" not in result.stderr


def test_records_that_were_calibrated_on_are_said_in_table_and_document(few: Path) -> None:
    (few / "both.jsonl").write_text((few / "few.jsonl").read_text() + (few / "calibration.jsonl").read_text())
    words = ("compare", "--data", "both.jsonl", "--base", "base", "--methods", "sum")
    known = document(*words)["repeated_records"]
    assert known == load_recipe("recipe.json").data[0].records
    result = run(*words)
    assert f"{known} of the test records stand in the calibration data too" in result.stderr


# export --method


def test_an_exported_method_has_the_loss_that_the_comparison_says(few: Path) -> None:
    rows = {row["name"]: row for row in document(*ALONE, "--methods", "ties,knots")["rows"]}
    for name in ("ties", "knots"):
        result = run(
            "export", "--method", name, "--adapters", "know", "form", "--dtype", "float32", "-o", f"{name}-out"
        )
        assert result.exit_code == 0, result.stderr
        alone = document("compare", "--adapters", f"{name}-out", "--data", "few.jsonl", "--base", "base")
        found = next(row for row in alone["rows"] if row["name"] == f"{name}-out")
        assert found["nats_per_token"] == pytest.approx(rows[name]["nats_per_token"], abs=5e-3)  # bfloat16 products


def test_a_method_is_written_to_a_folder_of_its_name_and_repeated_by_the_command_of_its_card(few: Path) -> None:
    result = run("export", "--method", "ties", "--density", "0.2", "--adapters", "know", "form")
    assert result.exit_code == 0 and "adapter-ties" in result.stdout
    card = (few / "adapter-ties" / "README.md").read_text()
    command = next(line for line in card.splitlines() if line.startswith("loracat export "))
    again = run(*shlex.split(command.replace("path/to/", ""))[1:], "-o", "again")
    assert again.exit_code == 0, again.stderr
    one, two = (load_file(few / name / "adapter_model.safetensors") for name in ("adapter-ties", "again"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_options_of_a_method_without_one_and_of_another_are_refused(few: Path) -> None:
    for words, said in (
        (["--density", "0.2"], "are for a method"),
        (["--method", "uniform", "--density", "0.2"], "uniform takes no --density"),
        (["--method", "ties", "--density", "2"], "--density 2.0 is not above 0 and at most 1"),
        (["--method", "module"], "--method module is not one of"),
        (["--method", "lorahub"], "lorahub has to be fitted"),
    ):
        result = run("export", *words)
        assert result.exit_code == 2 and said in result.stderr, result.stderr
    assert not list(few.glob("adapter-*"))


# report and show


def test_compare_and_report_follow_each_other(few: Path) -> None:
    compared = run("compare", "recipe.json", "--data", "few.jsonl", "--base", "base", "--methods", "sum", "--json")
    (few / "comparison.json").write_text(compared.stdout)
    result = run("report", "recipe.json", "--comparison", "comparison.json")
    assert result.exit_code == 0, result.stderr
    content = (few / "report.html").read_text()
    for row in json.loads(compared.stdout)["rows"]:
        assert f"<td>{row['nats_per_token']:.4f}</td>" in content
    again = run("report", "-q")
    assert again.exit_code == 2 and "report.html exists" in again.stderr
    assert run("report", "-f", "-q").stdout == "report.html\n"
    assert document("report", "-f")["parts"][0] == "verdict"


def test_show_has_every_weight_as_a_number_where_there_is_no_terminal(here: Path) -> None:
    shown = run("show").stdout
    recipe = load_recipe("recipe.json")
    for index, label in enumerate(recipe.labels().values()):
        lines = shown[shown.index(f"weights of {label}, layer by module") :].splitlines()[1:]
        names = lines[0].split()
        for layer, line in enumerate(lines[1:3]):
            cells = dict(zip(names, line.split()[1:], strict=True))
            for name, cell in cells.items():
                modules = [m.name for m in recipe.modules if f".{layer}." in m.name and m.name.endswith(f".{name}")]
                weight = recipe.weights_of(modules[0])[index]
                assert cell == ("-" if weight is None else f"{weight:+.2f}")


def test_show_layers_has_every_number_of_the_document_and_a_bar_as_long_as_the_change(few: Path) -> None:
    words = ("show", "--layers", "--data", "few.jsonl", "--base", "base", "--dtype", "float32", "--device", "cpu")
    found, shown = document(*words), run(*words)
    lines = shown.stdout.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("layer "))
    largest = max(abs(effect["change"]) for effect in found["layers"])
    for number, effect in enumerate(found["layers"]):
        cells = lines[start + 1 + number].split()
        assert cells[:3] == [str(number), f"{effect['change']:+.4f}", f"{effect['standard_error']:.4f}"]
        bar = ("#" if effect["change"] > 0 else "-") * round(40 * abs(effect["change"]) / largest)
        assert "".join(cells[3:]) == bar
    assert lines[0].startswith(f"{found['nats_per_token']:.4f} nats per token with all layers")
    assert run(*words, "-q").stdout.split()[::2] == [effect["layer"] for effect in found["layers"]]
    assert document(*words[:6], "--dtype", "bfloat16")["nats_per_token"] != found["nats_per_token"]
    moved = run(*words, "--adapters", "know")
    assert moved.exit_code == 2 and "the recipe has 2 adapters and 1 were given" in moved.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--layers"], "--layers is measured on records"),
        (["--data", "few.jsonl"], "--data is for --layers"),
        (["--weights", "--base", "base"], "--base is for --layers"),
        (["--device", "cpu"], "--device is for --layers"),
        (["--adapters", "know", "form"], "--adapters is for --layers"),
        (["--layers", "--weights", "--data", "few.jsonl"], "--layers is shown by itself, without --weights"),
        (["--layers", "--search", "--data", "few.jsonl"], "--layers is shown by itself, without --search"),
    ],
)
def test_options_of_show_that_do_not_go_together_are_one_error(few: Path, words: list[str], said: str) -> None:
    result = run("show", *words)
    assert result.exit_code == 2 and result.stderr.startswith(f"error: {said}") and not result.stdout


def test_on_a_terminal_the_map_is_coloured_from_uniform_both_ways() -> None:
    from loracli.cli._output import ABOVE, BELOW, MIDDLE, Block

    def colour(share: float) -> str:
        return str(Block("+0.50", share).rendered(7).style).split(" on ")[1]

    assert colour(0.0) == f"rgb{MIDDLE}".replace(" ", "")
    assert colour(1.0) == colour(2.0) == f"rgb{ABOVE}".replace(" ", "")
    assert colour(-1.0) == f"rgb{BELOW}".replace(" ", "")
    assert Block("+0.50", 0.3).rendered(7).plain == "  +0.50"


def test_what_was_written_stays_where_its_loss_cannot_be_taken(few: Path) -> None:
    """The base that the recipe names is a directory, which only `--base` tells; and copies of records are counted."""
    (few / "twice.jsonl").write_text(2 * (few / "few.jsonl").read_text())
    found = run("export", "recipe.json", "-o", "out", "--data", "twice.jsonl")
    assert found.exit_code != 0 and "out is written; only its loss on the records is not known" in found.stderr
    assert "of 24 scored records 12 are different" in found.stderr
    assert run("verify", "out", "--recipe", "recipe.json").exit_code == 0


def test_the_fit_that_is_suggested_is_of_records_without_their_owners(here: Path) -> None:
    (here / "other.jsonl").write_text("".join((here / "calibration.jsonl").read_text().splitlines(keepends=True)[::2]))
    words = (*ALONE[:4], "-d", "test.jsonl", "--base", "base", "-m", "adapter,regmean", "--passes", "12")
    found = run(*words, "--fit-data", "calibration.jsonl:0.125@know", "other.jsonl@form")
    assert found.exit_code == 0, found.stderr
    [line] = [line for line in found.stderr.splitlines() if line.startswith("next: ")]
    assert "fit --adapters know form --data calibration.jsonl:0.125 other.jsonl --mixing adapter" in line
    assert run(*line.split()[2:], "--dry-run").exit_code == 0
