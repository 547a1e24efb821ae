from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.faults.fork_server import ForkServer


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Starts processes that have imported everything already."""
    if sys.platform != "linux":
        pytest.skip("the server watches its processes as Linux has them")
    with ForkServer(tmp_path_factory.mktemp("streams")) as running:
        yield running
