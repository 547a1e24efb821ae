"""What a Hub, or the line to it, can do to a download, one case after the other: the right bytes or one clear error,
nothing wrong that stays usable, and a second run that recovers."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import file_download
from huggingface_hub.utils import _http

from loracli.errors import AccessDenied, AdapterNotFound, HubUnreachable, IntegrityError, LoracatError
from loracli.hub.fetch import fetch_adapter, fetch_adapters, fetch_base
from tests.adapters.conftest import Recorder
from tests.stub_hub import StubHub

REPO = "org/math"
WEIGHTS = "adapter_model.safetensors"
ADAPTER = {"README.md": b"# math", "adapter_config.json": b'{"peft_type": "LORA"}', WEIGHTS: b"weights " * 5000}
SIZE = len(ADAPTER[WEIGHTS])
BASE = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"base weights"}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits seconds before it asks again."""
    for module in (file_download, _http):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(sleep=lambda seconds: None))


def content(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in ADAPTER if (path / name).is_file()}


def holds_only(cache: Path, *allowed: bytes) -> bool:
    """Whether every blob of the cache is one of these, and no other file is large enough to hold weights."""
    files = [file for file in cache.rglob("*") if file.is_file() and not file.is_symlink()]
    assert not [file for file in files if file.suffix in (".incomplete", ".tmp")]
    return {file.read_bytes() for file in files if file.parent.name == "blobs"} <= set(allowed)


# The line breaks, and the client goes on: the right bytes arrive.


@pytest.mark.parametrize("at", [0, 1, SIZE // 2, SIZE - 1])
def test_a_transfer_that_is_cut_goes_on_and_that_is_said(hub: StubHub, options: dict[str, Any], at: int) -> None:
    hub.add(REPO, ADAPTER)
    hub.fail(REPO, "cut", on=("file",), at=at, times=1)
    progress = Recorder()
    assert content(fetch_adapter(REPO, progress=progress, **options).path) == ADAPTER
    assert progress.notes == ["the transfer broke off: going on with it"]
    assert progress.done[f"{REPO}/{WEIGHTS}"] == SIZE


@pytest.mark.parametrize("fault", ["gzip", "drip", "no length"])
def test_unusual_ways_to_send_the_right_bytes_are_taken(hub: StubHub, options: dict[str, Any], fault: str) -> None:
    hub.add(REPO, ADAPTER)
    hub.fail(REPO, fault, on=("file",))
    assert content(fetch_adapter(REPO, **options).path) == ADAPTER


# The line breaks for good.


@pytest.mark.parametrize(
    ("fault", "at", "on", "message"),
    [
        ("cut", 0, "file", "breaks off"),
        ("cut", 1, "file", "breaks off"),
        ("cut", SIZE - 1, "file", "breaks off"),
        ("stall", SIZE // 2, "file", "breaks off"),
        ("hangs up", 0, "file", "breaks off"),
        ("hangs up", 0, "info", "breaks off"),
        (500, 0, "file", "the Hub fails (500)"),
        (503, 0, "file", "the Hub fails (503)"),
        ("limited", 0, "file", "limits the number of requests (429)"),
        ("no etag", 0, "file", "without file metadata"),
        ("other commit", 0, "file", "another commit"),
        ("no sizes", 0, "info", "without size or hash"),
        ("no hashes", 0, "info", "without size or hash"),
        ("evil hashes", 0, "info", "without size or hash"),
        ("no sha", 0, "info", "without a commit"),
        ("evil sha", 0, "info", "without a commit"),
    ],
)
def test_what_the_hub_does_not_give_is_unreachable_and_comes_the_next_time(
    hub: StubHub,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    fault: str | int,
    at: int,
    on: str,
    message: str,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.add(REPO, ADAPTER)
    hub.fail(REPO, fault, on=(on,), at=at)
    with pytest.raises(HubUnreachable) as caught:
        fetch_adapter(REPO, **options)
    assert message in caught.value.what and caught.value.where == REPO and caught.value.hint
    assert holds_only(options["cache_dir"], ADAPTER["README.md"], ADAPTER["adapter_config.json"])
    hub.fail(REPO, None)
    assert content(fetch_adapter(REPO, **options).path) == ADAPTER


def test_a_hub_that_goes_down_between_listing_and_file_is_unreachable(hub: StubHub, options: dict[str, Any]) -> None:
    class Stopper(Recorder):
        def begin(self, task: str, total: int | None, unit: str) -> None:
            super().begin(task, total, unit)
            hub.stop()

    hub.add(REPO, ADAPTER)
    with pytest.raises(HubUnreachable):
        fetch_adapter(REPO, progress=Stopper(), **options)


@pytest.mark.parametrize(("fault", "wait"), [("limited", "wait 55 s"), ("retry after", "wait 17 s"), (429, "minutes")])
def test_a_limit_says_how_long_to_wait(hub: StubHub, options: dict[str, Any], fault: str | int, wait: str) -> None:
    hub.add(REPO, ADAPTER)
    hub.fail(REPO, fault)
    with pytest.raises(HubUnreachable) as caught:
        fetch_adapter(REPO, **options)
    assert wait in (caught.value.hint or "")


def test_what_the_client_waits_for_is_said(hub: StubHub, options: dict[str, Any]) -> None:
    hub.add(REPO, ADAPTER)
    for fault, note in (
        ("limited", "the Hub limits the number of requests: waiting 56 s"),
        (503, "the Hub does not answer as it should: asking again"),
    ):
        hub.fail(REPO, fault, on=("file",))
        progress = Recorder()
        with pytest.raises(HubUnreachable):
            fetch_adapter(REPO, progress=progress, **options)
        assert set(progress.notes) == {note}


@pytest.mark.parametrize(
    ("fault", "kind"), [(401, AccessDenied), (403, AccessDenied), ("gated", AccessDenied), (404, AdapterNotFound)]
)
def test_a_refusal_of_one_file_is_told_as_one_of_the_repository(
    hub: StubHub, options: dict[str, Any], fault: str | int, kind: type[LoracatError]
) -> None:
    hub.add(REPO, ADAPTER)
    hub.fail(REPO, fault, on=("file",))
    with pytest.raises(kind) as caught:
        fetch_adapter(REPO, **options)
    assert caught.value.where == REPO and caught.value.hint


# Bytes that are not the listed ones.


@pytest.mark.parametrize(
    ("name", "at"),
    [(WEIGHTS, 0), (WEIGHTS, SIZE // 2), (WEIGHTS, SIZE - 1), ("adapter_config.json", 3), ("README.md", 0)],
)
def test_other_bytes_of_the_same_length_are_refused_and_removed(
    hub: StubHub, options: dict[str, Any], name: str, at: int
) -> None:
    commit = hub.add(REPO, ADAPTER)
    hub.fail(REPO, "other bytes", on=("file",), at=at, only=name)
    with pytest.raises(IntegrityError, match=f"{name} is not the file that the Hub lists") as caught:
        fetch_adapter(REPO, **options)
    assert caught.value.exit_code == 7 and "it is removed; fetch again" in (caught.value.hint or "")
    assert holds_only(options["cache_dir"], *ADAPTER.values())
    hub.stop()
    with pytest.raises(HubUnreachable):
        fetch_adapter(f"{REPO}@{commit}", **options)


def test_the_client_alone_keeps_other_bytes_of_the_same_length(hub: StubHub, options: dict[str, Any]) -> None:
    """What the test above would not notice otherwise: nobody else looks at the bytes."""
    commit = hub.add(REPO, ADAPTER)
    hub.fail(REPO, "other bytes", on=("file",))
    place = huggingface_hub.hf_hub_download(REPO, WEIGHTS, revision=commit, **options)
    assert Path(place).read_bytes() != ADAPTER[WEIGHTS]
    hub.fail(REPO, None)
    with pytest.raises(IntegrityError):
        fetch_adapter(REPO, **options)
    assert content(fetch_adapter(REPO, **options).path) == ADAPTER


@pytest.mark.parametrize("fault", ["longer", "bomb"])
def test_more_bytes_than_listed_are_not_written_to_their_end(hub: StubHub, options: dict[str, Any], fault: str) -> None:
    hub.add(REPO, ADAPTER)
    hub.fail(REPO, fault, on=("file",))
    progress = Recorder()
    with pytest.raises(IntegrityError, match=f"more bytes of {WEIGHTS} come than the {SIZE}"):
        fetch_adapter(REPO, progress=progress, **options)
    assert progress.done[f"{REPO}/{WEIGHTS}"] < 16 << 20  # the client's block, of the 24 MiB that a bomb unfolds to
    assert holds_only(options["cache_dir"], ADAPTER["README.md"], ADAPTER["adapter_config.json"])
    hub.fail(REPO, None)
    assert content(fetch_adapter(REPO, **options).path) == ADAPTER


def test_other_bytes_do_not_stay_in_a_local_dir(hub: StubHub, tmp_path: Path) -> None:
    hub.add(REPO, ADAPTER)
    hub.fail(REPO, "other bytes", on=("file",))
    options: dict[str, Any] = {"endpoint": hub.url, "local_dir": tmp_path / "out"}
    with pytest.raises(IntegrityError):
        fetch_adapter(REPO, **options)
    assert not (tmp_path / "out" / WEIGHTS).exists()
    hub.fail(REPO, None)
    assert content(fetch_adapter(REPO, **options).path) == ADAPTER


# Other places.


def test_large_files_on_another_host_come_without_the_token(hub: StubHub, options: dict[str, Any]) -> None:
    hub.add(REPO, ADAPTER)
    with StubHub() as other:
        other.add(REPO, ADAPTER)
        hub.elsewhere = other.url
        assert content(fetch_adapter(REPO, token="hf_canary", **options).path) == ADAPTER
        assert hub.tokens == {"Bearer hf_canary"}
        assert other.count("GET") == 1 and other.tokens == {None}


def test_a_renamed_repository_is_followed_and_its_new_name_told(hub: StubHub, options: dict[str, Any]) -> None:
    commit = hub.add("new-org/math", ADAPTER)
    hub.renamed[REPO] = "new-org/math"
    progress = Recorder()
    fetched = fetch_adapter(REPO, progress=progress, **options)
    assert content(fetched.path) == ADAPTER
    assert progress.notes == ["org/math is now new-org/math: use that name, somebody else may take the old one"]
    hub.stop()
    assert fetch_adapter(f"{REPO}@{commit}", **options).path == fetched.path


# The cache.


def damage(place: Path) -> Path:
    """Turns one bit of what is behind a cached file; the blob."""
    blob = place.resolve()
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)
    return blob


@pytest.mark.parametrize("name", list(ADAPTER))
@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("offline", [True, False])
def test_a_cached_file_is_verified_each_time_with_the_hub_and_without(
    hub: StubHub, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str, pinned: bool, offline: bool
) -> None:
    commit = hub.add(REPO, ADAPTER)
    reference = f"{REPO}@{commit}" if pinned else REPO
    place = fetch_adapter(REPO, **options).path / name
    blob = damage(place)
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        assert fetch_adapter(reference, dry_run=True, **options).files and blob.exists()
        with pytest.raises(IntegrityError, match=f"{name} is not the file that the Hub lists"):
            fetch_adapter(reference, **options)
    assert not place.exists() and not blob.exists()
    without = {"README.md"} if pinned and name == "README.md" else set()  # what is cached then is whole without it
    wanted = {key: data for key, data in ADAPTER.items() if key not in without}
    assert content(fetch_adapter(reference, **options).path) == wanted


def test_a_link_to_another_commits_blob_is_removed_and_the_blob_is_kept(hub: StubHub, options: dict[str, Any]) -> None:
    old = hub.add(REPO, ADAPTER)
    place = fetch_adapter(REPO, **options).path / WEIGHTS
    hub.add(REPO, {**ADAPTER, WEIGHTS: ADAPTER[WEIGHTS][::-1]})
    swapped = fetch_adapter(REPO, **options).path / WEIGHTS
    swapped.unlink()
    swapped.symlink_to(place.resolve())
    with pytest.raises(IntegrityError):
        fetch_adapter(REPO, **options)
    assert not swapped.is_symlink() and content(place.parent) == ADAPTER
    hub.requests.clear()
    assert fetch_adapter(f"{REPO}@{old}", **options).commit == old and hub.count() == 0
    assert (fetch_adapter(REPO, **options).path / WEIGHTS).read_bytes() == ADAPTER[WEIGHTS][::-1]


def test_a_damaged_file_that_cannot_be_removed_is_named(
    hub: StubHub, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError

    hub.add(REPO, ADAPTER)
    place = fetch_adapter(REPO, **options).path / WEIGHTS
    blob = damage(place)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(IntegrityError) as caught:
        fetch_adapter(REPO, **options)
    assert f"remove {place} and " in (caught.value.hint or "") and blob.name in (caught.value.hint or "")


def test_a_damaged_copy_in_the_cache_is_not_copied_to_a_local_dir_twice(
    hub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    hub.add(REPO, ADAPTER)
    damage(fetch_adapter(REPO, endpoint=hub.url).path / WEIGHTS)
    with pytest.raises(IntegrityError):
        fetch_adapter(REPO, endpoint=hub.url, local_dir=tmp_path / "out")
    assert content(fetch_adapter(REPO, endpoint=hub.url, local_dir=tmp_path / "out").path) == ADAPTER


def test_a_cache_without_links_asks_the_hub_what_a_file_should_be(hub: StubHub, options: dict[str, Any]) -> None:
    commit = hub.add(REPO, ADAPTER)
    path = fetch_adapter(REPO, **options).path
    for name in ADAPTER:
        data = (path / name).read_bytes()
        (path / name).unlink()
        (path / name).write_bytes(data)
    hub.requests.clear()
    assert fetch_adapter(f"{REPO}@{commit}", **options).path == path and hub.count() == 1
    damage(path / WEIGHTS)
    with pytest.raises(IntegrityError):
        fetch_adapter(f"{REPO}@{commit}", **options)
    fetch_adapter(f"{REPO}@{commit}", **options)
    hub.stop()
    progress = Recorder()
    assert fetch_adapter(f"{REPO}@{commit}", progress=progress, **options).path == path
    assert "keeps no hash of README.md, adapter_config.json: not verified" in progress.notes[0]


def test_a_cached_base_is_hashed_again_on_request_only(hub: StubHub, options: dict[str, Any]) -> None:
    commit = hub.add("org/base", BASE)
    place = fetch_base("org/base", **options).path / "model.safetensors"
    damage(place)
    for revision in (None, commit):
        assert fetch_base("org/base", revision=revision, **options).path == place.parent
    with pytest.raises(IntegrityError):
        fetch_base("org/base", recheck=True, **options)
    assert (fetch_base("org/base", **options).path / "model.safetensors").read_bytes() == BASE["model.safetensors"]


# Side by side.


def test_adapters_come_side_by_side_and_in_the_order_of_their_names(hub: StubHub, options: dict[str, Any]) -> None:
    """The first stops in the middle until the second is there."""

    class Releaser(Recorder):
        def finish(self, task: str) -> None:
            super().finish(task)
            if task == f"org/second/{WEIGHTS}":
                hub.repositories["org/first"].fault = None
                hub.repositories["org/first"].released.set()

    commits = [hub.add(f"org/{name}", {**ADAPTER, "README.md": name.encode()}) for name in ("first", "second")]
    hub.fail("org/first", "stall", on=("file",), at=SIZE // 2)
    fetched = fetch_adapters(["org/first", "org/second"], progress=Releaser(), **options)
    assert [adapter.commit for adapter in fetched] == commits
    assert all((adapter.path / WEIGHTS).read_bytes() == ADAPTER[WEIGHTS] for adapter in fetched)


def test_a_failure_stops_the_others_and_what_came_is_kept(hub: StubHub, options: dict[str, Any]) -> None:
    names = [f"org/a{number}" for number in range(6)]
    for name in names:
        hub.add(name, {**ADAPTER, "README.md": name.encode()})
    hub.fail("org/a0", "other bytes", on=("file",), only="README.md")
    with pytest.raises(IntegrityError, match="org/a0"):
        fetch_adapters(names, **options)
    assert holds_only(options["cache_dir"], *ADAPTER.values(), *(name.encode() for name in names))
    hub.fail("org/a0", None)
    assert len({adapter.path for adapter in fetch_adapters(names, **options)}) == 6


def test_nothing_is_transferred_when_one_of_several_is_not_there(hub: StubHub, options: dict[str, Any]) -> None:
    hub.add(REPO, ADAPTER)
    with pytest.raises(AdapterNotFound):
        fetch_adapters([REPO, "org/missing"], **options)
    assert not [path for _, path in hub.requests if "/resolve/" in path]
