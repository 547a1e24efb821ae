from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.pushing.push import Pushed, PushRequest, push_adapter
from tests.export.test_export import Made
from tests.stub_hub_uploads import UploadHub
from tests.tiny import BASE_ID

Push = Callable[..., Pushed]
REQUEST = {field.name for field in fields(PushRequest)}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[UploadHub]:
    """A Hub that has the base model, and is the one that huggingface_hub talks to."""
    with UploadHub() as server:
        server.add(BASE_ID, {"config.json": b"{}"})
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"), "mixed ranks")


@pytest.fixture(scope="session")
def exported(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "out"
    export_adapter(ExportRequest(made.recipe), folder)
    return folder


@pytest.fixture
def out(exported: Path, tmp_path: Path) -> Path:
    """An export to push, or to damage."""
    folder = tmp_path / "out"
    shutil.copytree(exported, folder)
    return folder


@pytest.fixture
def push(hub: UploadHub, out: Path) -> Push:
    """Pushes the export to `org/name`."""

    def run(folder: Path = out, repo_id: str = "org/name", **options: Any) -> Pushed:
        asked = {name: options.pop(name) for name in REQUEST & options.keys()}
        return push_adapter(PushRequest(folder, repo_id, **asked), **options)

    return run
