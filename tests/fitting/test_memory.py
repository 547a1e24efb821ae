"""How much memory the operating system leaves, from files as it writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from loracli.model.session import _available_memory

GIB = 1 << 30


def system(root: Path, *, available: int | None, cgroup: str = "", **files: str) -> Path:
    """A file system with proc/meminfo, proc/self/cgroup and the files of control groups."""
    (root / "proc/self").mkdir(parents=True)
    if available is not None:
        text = f"MemTotal:       99999999 kB\nMemFree:            1000 kB\nMemAvailable:   {available // 1024:8d} kB\n"
        (root / "proc/meminfo").write_text(text)
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name.replace("-", ".")).write_text(text)
    return root


def group(folder: str, limit: str, used: int, cache: int = 0) -> dict[str, str]:
    names = ("memory-max", "memory-current", "memory-stat")
    values = (limit, str(used), f"anon 5\ninactive_file {cache}\nactive_file 7\n")
    return {f"{folder}{name}": f"{value}\n" for name, value in zip(names, values, strict=True)}


def test_linux_tells_what_is_available(tmp_path: Path) -> None:
    assert _available_memory("cpu", root=system(tmp_path, available=3 * GIB)) == 3 * GIB


def test_the_lowest_limit_of_the_groups_above_counts(tmp_path: Path) -> None:
    """Version 2: the job's limit is above the step's, which has none; file cache that can be dropped is not used."""
    files = {**group("job__", str(4 * GIB), 3 * GIB, GIB // 2), **group("job__step__", "max", GIB)}
    root = system(tmp_path, available=8 * GIB, cgroup="0::/job/step\n", **files)
    assert _available_memory("cpu", root=root) == GIB + GIB // 2


def test_a_container_that_sees_its_group_at_the_top(tmp_path: Path) -> None:
    root = system(tmp_path, available=8 * GIB, cgroup="0::/docker/abc\n", **group("", str(2 * GIB), GIB))
    assert _available_memory("cpu", root=root) == GIB


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    names = {"memory-limit_in_bytes": 2 * GIB, "memory-usage_in_bytes": GIB}
    files = {f"memory__job__{name}": str(value) for name, value in names.items()}
    files["memory__job__memory-stat"] = f"inactive_file 1\ntotal_inactive_file {GIB // 4}\n"
    root = system(tmp_path, available=8 * GIB, cgroup="9:name=systemd:/\n4:cpu,memory:/job\n0::/\n", **files)
    assert _available_memory("cpu", root=root) == GIB + GIB // 4


def test_a_limit_that_is_passed_leaves_nothing(tmp_path: Path) -> None:
    root = system(tmp_path, available=8 * GIB, cgroup="0::/\n", **group("", str(GIB), 2 * GIB))
    assert _available_memory("cpu", root=root) == 0


def test_of_mps_it_is_what_metal_recommends_less_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12 * GIB)
    for taken, left in ((5 * GIB, 7 * GIB), (13 * GIB, 0)):
        monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda taken=taken: taken)
        assert _available_memory("mps") == left


def test_elsewhere_the_pages_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}

    def sysconf(name: str) -> int:
        if name not in told:
            raise ValueError("unrecognized configuration name")
        return told[name]

    monkeypatch.setattr(os, "sysconf", sysconf)
    assert _available_memory("cpu", root=tmp_path) == 1000 * 4096
    told["SC_AVPHYS_PAGES"] = 10
    assert _available_memory("cpu", root=tmp_path) == 10 * 4096
    told.clear()
    assert _available_memory("cpu", root=tmp_path) is None


def test_a_cuda_device_is_asked_itself_and_other_devices_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: {"cuda:0": (3, 9), "cuda:1": (5, 9)}[device])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert _available_memory("cuda:1") == 5
    assert _available_memory("cuda", every=True) == 8
    assert _available_memory("meta") is None


def test_this_machine_has_memory() -> None:
    assert (_available_memory("cpu") or 0) > 1 << 20
