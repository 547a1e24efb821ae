"""Weights that were edited after their fit: what that measured of its own is nowhere said of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loracli.recipe.recipe import load_recipe
from loracli.recipe.record import EDITED, FitCertificate
from tests.cli.project import document, run
from tests.cli.test_documents import check

CLAIMS = ("95 % interval", "The composition is better", "left to gain", "your data support", "held out")


@pytest.fixture
def fitted(here: Path) -> Path:
    """The project, with a certificate in its recipe as a longer fit leaves one."""
    recipe = load_recipe("recipe.json")
    weights = recipe.mixing.weights
    errors = {group: tuple(None if w is None else 0.25 for w in row) for group, row in weights.items()}
    certificate = FitCertificate(32, 32, 0.01, 0.5, 1e-3, 1e-4, 0.0, 8.0, errors, {})
    (here / "recipe.json").write_text(replace(recipe, fit=replace(recipe.fit, certificate=certificate)).to_json())
    return here


@pytest.fixture
def edited(fitted: Path) -> Path:
    """The project with one weight of its recipe set to another number."""
    recipe = fitted / "recipe.json"
    fields = json.loads(recipe.read_text())
    row = next(iter(fields["mixing"]["weights"].values()))
    row[0] += 0.5
    recipe.write_text(json.dumps(fields, indent=2))
    return fitted


def test_of_weights_as_they_were_fitted_everything_is_said(fitted: Path) -> None:
    recipe = load_recipe("recipe.json")
    assert recipe.mixing.weights_sha256 is not None and not recipe.mixing.edited
    found, shown = document("show"), run("show", "--search").stdout
    assert found["weights_edited"] is False and found["recipe"] == json.loads(Path("recipe.json").read_text())
    assert EDITED not in shown and all(claim in shown for claim in CLAIMS)
    assert "held out" in document("report")["parts"]
    page = (fitted / "report.html").read_text()
    assert EDITED not in page
    assert all(word in page for word in ("±", "left to gain", "The composition is better", "On held-out records"))
    assert EDITED not in run("export").output
    assert "On held-out records" in (fitted / "adapter-cat" / "README.md").read_text()


@pytest.mark.parametrize(
    ("decrement", "loss", "noise", "said"),
    [
        (0.3, 0.5, None, True),
        (0.3, 0.5, 0.2, True),
        (0.3, 0.5, 0.4, False),
        (0.3, 1e-4, None, False),
        (1e-4, 0.5, None, False),
    ],
)
def test_a_fit_that_ended_above_its_optimum_by_more_than_chance_and_rounding_says_so(
    fitted: Path, decrement: float, loss: float, noise: float | None, said: bool
) -> None:
    """There is no more to gain than the loss is; the fixture's 8 effective numbers make chance 8 / 2T."""
    recipe = load_recipe("recipe.json")
    certificate = replace(recipe.fit.certificate, decrement=decrement, loss=loss, noise=noise)
    (fitted / "recipe.json").write_text(replace(recipe, fit=replace(recipe.fit, certificate=certificate)).to_json())
    assert 1e-4 < 8 / (2 * sum(data.scored_tokens for data in recipe.data)) < 0.3
    shown = run("show", "--search").stdout
    assert ("not at the optimum yet: 0.3 nats per token left to gain" in shown) == ("--passes" in shown) == said
    assert ("it is chance, below 0.4 the rounding of bfloat16)" in shown) == (noise == 0.4)


def test_show_says_so_and_leaves_table_verdict_and_certificate_out(edited: Path) -> None:
    shown = run("show", "--search")
    assert shown.exit_code == 0 and EDITED in shown.stdout
    assert not any(claim in shown.stdout for claim in CLAIMS)
    assert run("show", "-q").stdout == f"{EDITED}\n"
    found = document("show")
    check(found, "show")
    assert found["weights_edited"] is True
    assert "held_out" not in found["recipe"] and found["recipe"]["fit"]["certificate"] is None


def test_the_report_says_so_and_has_neither_table_nor_standard_errors(edited: Path) -> None:
    assert "held out" not in document("report")["parts"]
    page = (edited / "report.html").read_text()
    assert f"No verdict: {EDITED}" in page and "On held-out records" not in page
    assert not any(word in page for word in ("±", "left to gain", "The composition is better"))


def test_cards_say_so_and_verify_makes_them_again(edited: Path) -> None:
    written = run("export")
    assert written.exit_code == 0 and EDITED in written.stderr
    card = (edited / "adapter-cat" / "README.md").read_text()
    assert EDITED in card and "On held-out records" not in card and "learnt on" not in card
    for given in (["--recipe", "recipe.json"], ["--adapters", "know", "form"]):
        verified = run("verify", "adapter-cat", *given)
        assert verified.exit_code == 0, verified.stderr
        assert "README.md against the card made again" in verified.stdout
    fused = run("fuse", "--base", "base", "-o", "model")
    assert fused.exit_code == 0 and EDITED in fused.stderr
    card = (edited / "model" / "README.md").read_text()
    assert EDITED in card and "On held-out records" not in card


def _compact(fields: dict[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def _other_numbers(fields: dict[str, Any]) -> str:
    """Each weight with more digits than it needs."""
    weights = fields["mixing"]["weights"]
    long = {json.dumps(w): f"{w:.25e}" for row in weights.values() for w in row if w is not None}
    text = json.dumps(weights)
    for short, digits in long.items():
        text = text.replace(short, digits)
    fields["mixing"]["weights"] = "HERE"
    return json.dumps(fields).replace('"HERE"', text)


@pytest.mark.parametrize("rewritten", [_compact, _other_numbers])
def test_another_writer_of_the_same_numbers_edits_nothing(fitted: Path, rewritten: Any) -> None:
    before = (run("show").stdout, run("export").exit_code, (fitted / "adapter-cat" / "README.md").read_bytes())
    recipe = fitted / "recipe.json"
    written = recipe.read_text()
    recipe.write_text(rewritten(json.loads(written)))
    assert recipe.read_text() != written and not load_recipe(recipe).mixing.edited
    again = (
        run("show").stdout,
        run("export", "--force").exit_code,
        (fitted / "adapter-cat" / "README.md").read_bytes(),
    )
    assert again == before
