from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.commands import ADAPTERS, FIT, Command
from tests.faults.fork_server import ForkServer
from tests.faults.trials import Tally
from tests.stub_hub import StubHub
from tests.tiny import random_records, write_jsonl

TALLY = pytest.StashKey[Tally]()


@pytest.fixture(scope="session")
def tally(request: pytest.FixtureRequest) -> Tally:
    return request.config.stash.setdefault(TALLY, Tally())


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of xdist hands its counts over."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["faults"] = {
            row: dict(outcomes) for row, outcomes in session.config.stash.setdefault(TALLY, Tally()).rows.items()
        }


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    total = node.config.stash.setdefault(TALLY, Tally())
    for row, outcomes in node.workeroutput.get("faults", {}).items():
        for outcome, count in outcomes.items():
            total.add(row, outcome, count)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table of trials."""
    found = config.stash.get(TALLY, None)
    if found is not None and found.rows:
        terminalreporter.section("faults: trials, and how they ended; numbers are exit codes")
        for line in found.lines():
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def yard(tmp_path_factory: pytest.TempPathFactory, shallow_base: Path, two_shallow_adapters: tuple[Path, Path]) -> Path:
    """A folder with the project that all trials read, in `project/`; each trial has a folder beside it."""
    folder = tmp_path_factory.mktemp("yard")
    shutil.copytree(shallow_base, folder / "project/base")
    for name, adapter in zip(("first", "second"), two_shallow_adapters, strict=True):
        shutil.copytree(adapter, folder / "project" / name)
    write_jsonl(folder / "project/val.jsonl", random_records(44))
    return folder


@pytest.fixture(scope="session")
def hub(yard: Path) -> Iterator[StubHub]:
    """A Hub with the two adapters of the project, as org/first and org/second."""
    with StubHub() as server:
        for name in ("first", "second"):
            files = {path.name: path.read_bytes() for path in (yard / "project" / name).iterdir()}
            server.add(f"org/{name}", files)
        yield server


@pytest.fixture(scope="session")
def server(yard: Path, hub: StubHub) -> Iterator[ForkServer]:
    if sys.platform != "linux":
        pytest.skip("the trials stop and watch processes as Linux has them")
    streams = yard / "streams"
    streams.mkdir()
    with ForkServer(streams, server_environment(yard, hub)) as running:
        yield running


def server_environment(yard: Path, hub: StubHub) -> dict[str, str]:
    """In which the stub is the Hub and nothing of the user's is touched."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(yard / "hub-home"),
        "HF_TOKEN": "",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture(scope="session")
def fetch() -> Command:
    """Into a cache of its own; what huggingface_hub keeps there for itself is not ours to judge."""
    return _fetch("org/first", "org/second")


@pytest.fixture(scope="session")
def fetch_one() -> Command:
    """One alone is fetched in the main thread, several side by side in threads of their own."""
    return _fetch("org/first")


def _fetch(*references: str) -> Command:
    words = ("fetch", *references, "--cache-dir", "cache")
    return Command("fetch", words, ignored=("/blobs", "/tmp", ".locks", "CACHEDIR.TAG"), grows=True)


@pytest.fixture(scope="session")
def fit() -> Command:
    return Command("fit", (*FIT, "--mixing", "adapter"), again=("--resume",))


@pytest.fixture(scope="session")
def fit_core() -> Command:
    """With tensors in a file beside the recipe."""
    return Command("fit --mixing core", (*FIT, "--mixing", "core", "--control", "none"), again=("--resume",))


@pytest.fixture(scope="session")
def recipe(server: ForkServer, fit: Command, yard: Path) -> Path:
    """A folder that holds the recipe of a fit."""
    fit.golden(server, yard / "recipe")
    return yard / "recipe"


@pytest.fixture(scope="session")
def export(recipe: Path) -> Command:
    return Command("export", ("export",), prepared=recipe)


@pytest.fixture(scope="session")
def export_force(server: ForkServer, recipe: Path, yard: Path) -> Command:
    """Over an older export, of another method."""
    shutil.copytree(recipe, yard / "exported")
    words = ("export", "--method", "uniform", "-a", ADAPTERS[0], "-a", ADAPTERS[1], "--base", "../project/base")
    ended = server.run(*words, "-o", "adapter-cat", cwd=yard / "exported")
    assert ended.code == 0, ended
    return Command("export --force", ("export", "--force"), prepared=yard / "exported")
