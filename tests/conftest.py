"""Fixtures that more than one room uses, and an environment without surprises."""

from __future__ import annotations

import functools
import gc
import os
import signal
import tempfile
from pathlib import Path

import hypothesis
import pytest
import typer.main
import typer.testing

from tests.tiny import make_adapter, make_base

OF_THE_TESTS = {"LORACAT_BROWSER", "LORACAT_FAULTS", "LORACAT_STRACE"}
os.environ.pop("HF_HUB_OFFLINE", None)  # read once, when huggingface_hub is imported
for name in [name for name in os.environ if name.startswith("LORACAT_") and name not in OF_THE_TESTS]:
    del os.environ[name]  # here, for the fits of session fixtures as well
# Ignored below nohup or a shell's &, and then by all that is started here.
for signum in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(signum) == signal.SIG_IGN:
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
# The same examples on every machine, and few enough for a quick suite.
hypothesis.settings.register_profile("suite", derandomize=True, max_examples=50, deadline=None, database=None)
hypothesis.settings.load_profile("suite")
NO_CONFIGURATION = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # a browser writes there, too
os.environ["XDG_CONFIG_HOME"] = NO_CONFIGURATION.name
# Built anew for every command otherwise, which takes as long as most of them.
typer.testing._get_command = functools.cache(typer.main.get_command)


def pytest_collection_finish() -> None:
    """What was imported stays; to look for garbage there again and again takes a tenth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the environment of whoever runs the tests changes what they see."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer."""
    return make_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="session")
def two_adapters(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Path, Path]:
    """Two adapters of different ranks, alphas and targets."""
    folder = tmp_path_factory.mktemp("adapters")
    return (
        make_adapter(folder / "first", tiny_base, targets=("q_proj", "v_proj", "up_proj"), rank=4, alpha=8, seed=1),
        make_adapter(folder / "second", tiny_base, targets=("q_proj", "o_proj"), rank=2, alpha=6, seed=2),
    )


@pytest.fixture(scope="session")
def shallow_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with one layer, for what is fitted again and again."""
    return make_base(tmp_path_factory.mktemp("base") / "shallow", "shallow")


@pytest.fixture(scope="session")
def two_shallow_adapters(tmp_path_factory: pytest.TempPathFactory, shallow_base: Path) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return (
        make_adapter(folder / "first", shallow_base, targets=("q_proj", "v_proj", "up_proj"), seed=1),
        make_adapter(folder / "second", shallow_base, targets=("q_proj", "o_proj"), rank=2, alpha=6, seed=2),
    )
