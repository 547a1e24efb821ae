from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from tests.stub_hub import StubHub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    """A stub Hub, and nobody logged in. Hand its `url` on as `endpoint`, and a `cache_dir`: both are read at import."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with StubHub() as server:
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def options(hub: StubHub, tmp_path: Path) -> dict[str, Any]:
    """What every call here is given: this Hub, and a cache of its own."""
    return {"endpoint": hub.url, "cache_dir": tmp_path / "cache"}


class Recorder:
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.totals: dict[str, int | None] = {}
        self.done: dict[str, int] = {}
        self.open: set[str] = set()
        self.notes: list[str] = []

    def begin(self, task: str, total: int | None, unit: str) -> None:
        assert unit == "B"
        self.totals[task], self.done[task] = total, 0
        self.open.add(task)

    def advance(self, task: str, amount: int, status: str = "") -> None:
        assert task in self.open
        self.done[task] += amount

    def expect(self, task: str, total: int) -> None: ...

    def finish(self, task: str) -> None:
        self.open.discard(task)

    def note(self, message: str) -> None:
        self.notes.append(message)

    def warn(self, message: str) -> None:
        self.notes.append(message)
