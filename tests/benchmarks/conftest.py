"""The benchmarks are not in the source distribution; its tests do without what imports them."""

from __future__ import annotations

from tests.faults.fork_server import ROOT

collect_ignore = [] if (ROOT / "benchmarks").exists() else ["test_paper.py"]
