from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.cli.project import FIT, run, shortened_example


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, two adapters, data, few test records, and the recipe that a fit wrote there."""
    folder = shortened_example(tmp_path_factory.mktemp("project"))
    lines = (folder / "test.jsonl").read_text().splitlines(keepends=True)
    (folder / "test.jsonl").write_text("".join(lines[:48]))
    before = os.getcwd()
    os.chdir(folder)
    try:
        result = run(*FIT)
    finally:
        os.chdir(before)
    assert result.exit_code == 0, result.stderr
    return folder


@pytest.fixture
def here(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project to damage, as the current folder."""
    shutil.copytree(project, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"
