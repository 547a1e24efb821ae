"""Every benchmark runs on the library as it is: with `--quick`, in a process, and its tables are full."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.fork_server import ROOT, ForkServer

BENCHMARKS = sorted(
    path for path in (ROOT / "benchmarks").rglob("*.py") if re.search("^if __name__ ==", path.read_text(), re.MULTILINE)
)
# What is said beside --quick, where that does more than a test has time for.
FEWER = {"__main__.py": ("formats", "pools", "false-alarms", "peers", "--fitted", "paper", "--suffix", "again")}
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(\.\d+)?(e[-+]?\d+)?(?![\w.])")
Table = list[list[str]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Spares each benchmark its imports; nothing is downloaded."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with ForkServer(tmp_path_factory.mktemp("streams"), offline) as running:
        yield running


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.relative_to(ROOT / "benchmarks").as_posix())
def test_a_benchmark_fills_its_tables_quickly(server: ForkServer, tmp_path: Path, path: Path) -> None:
    assert "BenchmarkParser(__doc__)" in path.read_text(), "takes no --quick: see benchmarks/measuring.py"
    ended = server.run("--quick", *FEWER.get(path.name, ()), program=path, cwd=tmp_path, seconds=300)
    assert ended.code == 0, ended.stderr[-3000:]
    assert all(name.endswith("-again") for name in re.findall(r"^### (.*)", ended.stdout, re.MULTILINE))
    tables = list(tables_of(ended.stdout))
    assert tables or "Left out: everything" in ended.stdout
    for head, *rows in tables:
        assert rows and all(len(row) == len(head) for row in rows), head
        cells = [cell for row in rows for cell in row]
        assert any(NUMBER.search(cell) for cell in cells), head
        assert not [cell for cell in cells if re.search(r"\b(nan|inf)\b", cell)], head
    assert not list(tmp_path.iterdir()), "writes where it is started"


def tables_of(text: str) -> Iterator[Table]:
    """The Markdown tables: the cells of their heads and rows."""
    for found in re.finditer(r"(^\|.*\n)\|[-:|]+\|\n((?:\|.*\n)*)", text, re.MULTILINE):
        lines = [found[1], *found[2].splitlines()]
        yield [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
