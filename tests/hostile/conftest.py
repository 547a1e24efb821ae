from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import here, project  # noqa: F401  # fixtures of the command's tests
from tests.hostile.canary import Canary


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Canary:
    """Modules of the current folder can be imported, as where Python runs a script of it."""
    monkeypatch.syspath_prepend(tmp_path / "project")
    return Canary(tmp_path / "it-sang")
