"""`loracat convert`: what it prints, and that its JSON document holds the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.project import run
from tests.conversion.training import Trained, train


@pytest.fixture(scope="module")
def dora(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Trained:
    return train(tmp_path_factory.mktemp("dora"), tiny_base, use_dora=True)


def test_the_error_is_stated_in_words_and_in_json(tmp_path: Path, tiny_base: Path, dora: Trained) -> None:
    words = ["convert", str(dora.path), "--base", str(tiny_base), "--rank", "3", "-o", str(tmp_path / "out")]
    spoken = run(*words)
    assert spoken.exit_code == 0
    document = json.loads(run(*words, "--json", "--force").stdout)
    assert document["rank"] == 3 and document["path"] == str(tmp_path / "out")
    largest = max(module["relative_error"] for module in document["modules"])
    assert largest == document["largest_relative_error"] >= document["relative_error"] > 0.01
    assert f"{document['relative_error']:.1e} over all modules, {largest:.1e} at most" in spoken.stdout
    assert f"{largest:.2%}" in spoken.stdout
    assert run(*words, "--quiet", "--force").stdout == f"{tmp_path / 'out'}\n"
    assert run("inspect", str(tmp_path / "out")).exit_code == 0


def test_an_adapter_that_is_refused_elsewhere_leads_here(tmp_path: Path, dora: Trained) -> None:
    result = run("inspect", str(dora.path))
    assert result.exit_code == 3 and "loracat convert" in result.stderr


def test_a_taken_output_and_bad_options_end_with_their_code(tmp_path: Path, tiny_base: Path, dora: Trained) -> None:
    (tmp_path / "taken").mkdir()
    words = ["convert", str(dora.path), "--base", str(tiny_base)]
    assert run(*words, "-o", str(tmp_path / "taken")).exit_code == 2
    result = run(*words, "--rank", "3", "--tolerance", "0.1", "--json")
    assert result.exit_code == 2 and json.loads(result.stdout)["error"]["kind"] == "UsageError"
