"""What is known before the first byte: sizes against ceilings and the free disk, and what is here already."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from loracli.errors import OutOfResources
from loracli.hub.fetch import MAX_ADAPTER_BYTES, fetch_adapter, fetch_adapters, fetch_base
from loracli.hub.transfer import _side_by_side
from tests.adapters.conftest import Recorder
from tests.stub_hub import StubHub

REPO = "org/math"
WEIGHTS = "adapter_model.safetensors"
ADAPTER = {"README.md": b"# math", "adapter_config.json": b'{"peft_type": "LORA"}', WEIGHTS: b"weights " * 5000}
SIZE = sum(map(len, ADAPTER.values()))
MIB = 1 << 20


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many bytes the disk has free, under the key `bytes`."""
    state = {"bytes": 0}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 0, state["bytes"]))
    return state


def transferred(hub: StubHub) -> list[str]:
    return [path for method, path in hub.requests if "/resolve/" in path or "/large/" in path]


@pytest.mark.parametrize("dry_run", [False, True])
def test_an_adapter_above_its_ceiling_is_refused_before_a_byte_comes(
    hub: StubHub, options: dict[str, Any], dry_run: bool
) -> None:
    hub.add(REPO, ADAPTER)
    with pytest.raises(OutOfResources) as caught:
        fetch_adapter(REPO, max_bytes=SIZE - 1, dry_run=dry_run, **options)
    assert caught.value.exit_code == 6 and f"{SIZE} bytes" in caught.value.what and f"{SIZE - 1}" in caught.value.what
    assert f"--max-size {SIZE}" in (caught.value.hint or "") and transferred(hub) == []
    assert fetch_adapter(REPO, max_bytes=SIZE, dry_run=dry_run, **options).commit


def test_the_ceiling_is_one_of_each_adapter_and_not_of_what_is_cached(hub: StubHub, options: dict[str, Any]) -> None:
    commit, _ = (hub.add(name, ADAPTER) for name in ("org/a", "org/b"))
    assert len(fetch_adapters(["org/a", "org/b"], max_bytes=SIZE, **options)) == 2
    for reference in ("org/a", f"org/a@{commit}"):
        assert fetch_adapter(reference, max_bytes=1, **options).commit == commit
    with pytest.raises(OutOfResources):
        fetch_adapter("org/a", max_bytes=1, force=True, **options)
    assert MAX_ADAPTER_BYTES == 8 << 30


def test_a_config_of_a_stranger_has_at_most_a_mebibyte(hub: StubHub, options: dict[str, Any]) -> None:
    config = b"{}".ljust(MIB)
    hub.add(REPO, {**ADAPTER, "adapter_config.json": config})
    assert (fetch_adapter(REPO, **options).path / "adapter_config.json").read_bytes() == config
    hub.add(REPO, {**ADAPTER, "adapter_config.json": config + b" "})
    hub.requests.clear()
    with pytest.raises(OutOfResources, match=f"adapter_config.json has {MIB + 1} bytes, and at most {MIB} are read"):
        fetch_adapter(REPO, **options)
    hub.add("org/base", {"config.json": config + b" ", "tokenizer.json": b"{}", "model.safetensors": b"weights"})
    with pytest.raises(OutOfResources, match=r"config\.json has"):
        fetch_base("org/base", **options)
    assert transferred(hub) == []


def test_a_readme_above_a_mebibyte_is_left_out_and_that_is_said(hub: StubHub, options: dict[str, Any]) -> None:
    hub.add(REPO, {**ADAPTER, "README.md": bytes(MIB + 1)})
    progress = Recorder()
    fetched = fetch_adapter(REPO, progress=progress, **options)
    assert [file.name for file in fetched.files] == ["adapter_config.json", WEIGHTS]
    assert progress.notes == [f"{REPO}: README.md has 1.0 MB and is left out, and so is the licence that it states"]
    hub.add(REPO, {**ADAPTER, "README.md": bytes(MIB)})
    assert len(fetch_adapter(REPO, **options).files) == 3


def test_the_disk_has_to_have_room_for_all_adapters_together(
    hub: StubHub, options: dict[str, Any], free: dict[str, int]
) -> None:
    for name in ("org/a", "org/b"):
        hub.add(name, ADAPTER)
    free["bytes"] = 2 * SIZE - 1
    with pytest.raises(OutOfResources) as caught:
        fetch_adapters(["org/a", "org/b"], **options)
    assert f"need {2 * SIZE} bytes" in caught.value.what and f"{2 * SIZE - 1} are free" in caught.value.what
    assert caught.value.hint and transferred(hub) == []
    free["bytes"] = 2 * SIZE
    fetch_adapters(["org/a", "org/b"], **options)


def test_only_what_has_to_be_written_needs_room(
    hub: StubHub, options: dict[str, Any], free: dict[str, int], tmp_path: Path
) -> None:
    hub.add(REPO, ADAPTER)
    free["bytes"] = SIZE
    fetch_adapters([REPO, f"{REPO}@main"], **options)  # twice the same files
    free["bytes"] = 0
    assert fetch_adapter(REPO, **options).commit
    hub.add(REPO, {**ADAPTER, "README.md": b"new"})
    with pytest.raises(OutOfResources, match="need 3 bytes"):
        fetch_adapter(REPO, **options)
    with pytest.raises(OutOfResources, match=f"need {SIZE - 3} bytes"):
        fetch_adapter(REPO, force=True, **options)
    with pytest.raises(OutOfResources, match=f"need {SIZE - 3} bytes"):
        fetch_adapter(REPO, endpoint=hub.url, local_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_has_no_ceiling_but_the_free_disk(hub: StubHub, options: dict[str, Any], free: dict[str, int]) -> None:
    hub.add("org/base", {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights"})
    with pytest.raises(OutOfResources, match="need 11 bytes"):
        fetch_base("org/base", **options)
    free["bytes"] = 11
    assert fetch_base("org/base", **options).commit


def test_a_dry_run_tells_file_by_file_what_is_cached_and_asks_once(hub: StubHub, options: dict[str, Any]) -> None:
    hub.add(REPO, ADAPTER)
    fetch_adapter(REPO, **options)
    hub.add(REPO, {**ADAPTER, "README.md": b"# mathematics"})
    hub.requests.clear()
    planned = fetch_adapter(REPO, dry_run=True, **options)
    assert hub.count() == 1 and not planned.path.exists()
    assert {file.name: file.cached for file in planned.files} == {
        "README.md": False,
        "adapter_config.json": True,
        WEIGHTS: True,
    }
    assert fetch_adapter(REPO, **options).files == planned.files
    assert not any(file.cached for file in fetch_adapter(REPO, dry_run=True, force=True, **options).files)


def test_a_failure_tells_the_others_to_stop() -> None:
    stopped, told = threading.Event(), []

    def work(number: int) -> int:
        if number == 0:
            raise OutOfResources("the first fails")
        told.append(stopped.wait(20))
        return number

    with pytest.raises(OutOfResources, match="the first fails"):
        _side_by_side(work, range(8), stopped)
    assert 0 < len(told) < 7 and all(told)  # the rest was never begun
