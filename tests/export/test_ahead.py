"""Work ahead: results in order, a bounded number of them, and errors that come through."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import pytest
import torch

from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.system.machine import in_order, one_thread_each
from tests.export.test_export import Made


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order_and_no_more_than_the_workers_are_ahead(workers: int) -> None:
    begun: set[int] = set()
    lock = threading.Lock()

    def work(item: int) -> int:
        with lock:
            begun.add(item)
        return item * item

    for place, result in enumerate(in_order(work, range(20), workers=workers)):
        assert result == place * place
        with lock:
            assert max(begun) <= place + workers


def test_an_error_comes_through_and_ends_the_work() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 2:
            raise ValueError("two")
        return item

    with pytest.raises(ValueError, match="two"):
        list(in_order(work, range(100), workers=2))
    assert len(begun) < 10


def test_the_number_of_threads_is_what_it_was_also_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="x"), one_thread_each() as threads:
        assert (threads, torch.get_num_threads()) == (before, 1)
        raise ValueError("x")
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("merge", [False, True])
def test_an_export_has_the_same_bytes_for_any_number_of_threads(tmp_path: Path, merge: bool) -> None:
    made = Made(tmp_path, "mixed ranks")
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            export_adapter(ExportRequest(made.recipe, merge=merge), tmp_path / f"out{threads}")
    finally:
        torch.set_num_threads(before)
    for file in sorted((tmp_path / "out1").iterdir()):
        assert file.read_bytes() == (tmp_path / "out3" / file.name).read_bytes()


def test_a_worker_multiplies_with_as_many_threads_as_the_caller() -> None:
    """Asked of OpenMP itself, for asking torch would set it: a new thread begins with the environment's number."""
    library = next((Path(torch.__file__).parent / "lib").glob("libgomp*"), None)
    if library is None:
        pytest.skip("this torch does not bring GNU's OpenMP")
    openmp, before = ctypes.CDLL(str(library)), torch.get_num_threads()
    torch.set_num_threads(before + 2)
    try:
        assert set(in_order(lambda _: openmp.omp_get_max_threads(), range(6), workers=3)) == {before + 2}
    finally:
        torch.set_num_threads(before)
