"""Fetching against a stub Hub with the real client: what is taken, what is pinned, what every failure becomes."""

from __future__ import annotations

import errno
import json
import logging
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from loracli.errors import (
    AccessDenied,
    AdapterNotFound,
    HubUnreachable,
    IncompatibleAdapters,
    InputError,
    IntegrityError,
    LoracatError,
    MalformedAdapter,
    OutOfResources,
    OutputExists,
    UnsupportedAdapter,
    UsageError,
)
from loracli.hub import transfer as hub_module
from loracli.hub.fetch import Fetched, fetch_adapter, fetch_base, fetch_base_of
from loracli.hub.references import parse_reference
from tests.adapters.conftest import Recorder
from tests.stub_hub import StubHub

REPO = "org/math"
CONFIG = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"}).encode()
ADAPTER = {"README.md": b"# math", "adapter_config.json": CONFIG, "adapter_model.safetensors": b"weights " * 5000}
BASE = {
    "config.json": b"{}",
    "generation_config.json": b"{ }",
    "tokenizer.json": b'{"t": 1}',
    "tokenizer_config.json": b'{"c": 1}',
    "model.safetensors": b"base weights",
}
NOT_WANTED = {
    "adapter_model.bin": b"pickle",
    "modeling_evil.py": b"import os",
    "optimizer.pt": b"pickle",
    "checkpoint-1/adapter_config.json": b"{}",
    "checkpoint-1/adapter_model.safetensors": b"older",
    "../../../evil.safetensors": b"evil",
    "/etc/evil": b"evil",
    "..\\evil.safetensors": b"evil",
    "\x1b[31mred.json": b"evil",
    "adapter_config.json.safetensors": b"evil",
}


def regular_files(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


# What is fetched.


def test_the_three_files_arrive_byte_by_byte_and_pinned(hub: StubHub, options: dict[str, Any]) -> None:
    commit = hub.add(REPO, ADAPTER)
    fetched = fetch_adapter(REPO, **options)
    assert fetched.commit == commit and fetched.reference == parse_reference(REPO)
    assert {name: (fetched.path / name).read_bytes() for name in ADAPTER} == ADAPTER
    assert [(file.name, file.size_bytes, file.cached) for file in fetched.files] == [
        (name, len(data), False) for name, data in ADAPTER.items()
    ]


def test_nothing_but_the_three_files_is_asked_for_or_written(
    hub: StubHub, options: dict[str, Any], tmp_path: Path
) -> None:
    commit = hub.add(REPO, {**NOT_WANTED, **ADAPTER})
    fetched = fetch_adapter(REPO, **options)
    assert regular_files(fetched.path) == set(ADAPTER)
    asked = {path.split(f"/{commit}/")[1] for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    assert asked <= set(ADAPTER)
    blobs = [file for file in tmp_path.rglob("*") if file.is_file() and not file.is_symlink() and "blobs" in file.parts]
    assert {file.read_bytes() for file in blobs} == set(ADAPTER.values())
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name or path.suffix in (".bin", ".py", ".pt")]


def test_a_readme_is_optional(hub: StubHub, options: dict[str, Any]) -> None:
    hub.add(REPO, {name: data for name, data in ADAPTER.items() if name != "README.md"})
    assert [file.name for file in fetch_adapter(REPO, **options).files] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_subfolder_is_fetched_without_its_neighbours(hub: StubHub, options: dict[str, Any]) -> None:
    inside = {f"runs/best/{name}": data for name, data in ADAPTER.items()}
    hub.add(REPO, {"adapter_config.json": b"top", "adapter_model.safetensors": b"top", **inside})
    fetched = fetch_adapter(f"hf://{REPO}/runs/best", **options)
    assert (fetched.path / "adapter_config.json").read_bytes() == CONFIG
    assert fetched.path.parts[-2:] == ("runs", "best")
    assert regular_files(fetched.path.parents[1]) == {f"runs/best/{name}" for name in ADAPTER}


def test_a_local_adapter_is_returned_where_it_is(tmp_path: Path) -> None:
    for name, data in {**ADAPTER, "optimizer.pt": b"x"}.items():
        (tmp_path / name).write_bytes(data)
    fetched = fetch_adapter(str(tmp_path))
    assert (fetched.path, fetched.commit) == (tmp_path, None)
    assert [(file.name, file.size_bytes) for file in fetched.files] == [(n, len(d)) for n, d in ADAPTER.items()]


def test_a_local_adapter_that_hides_a_hub_id_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / REPO).mkdir(parents=True)
    for name, data in ADAPTER.items():
        (tmp_path / REPO / name).write_bytes(data)
    progress = Recorder()
    assert fetch_adapter(REPO, progress=progress).commit is None
    assert f"hf://{REPO}" in progress.notes[0]


# Pinning and the cache.


def test_a_branch_costs_one_request_to_resolve_and_then_its_commit_is_used(
    hub: StubHub, options: dict[str, Any]
) -> None:
    commit = hub.add(REPO, ADAPTER)
    fetch_adapter(REPO, **options)
    api = [path for _, path in hub.requests if path.startswith("/api/")]
    assert len(api) == 1
    assert all(f"/{commit}/" in path for _, path in hub.requests if path not in api)
    hub.requests.clear()
    again = fetch_adapter(REPO, **options)
    assert hub.count() == 1 and all(file.cached for file in again.files)


def test_a_cached_commit_costs_no_request(hub: StubHub, options: dict[str, Any]) -> None:
    commit = hub.add(REPO, ADAPTER)
    first = fetch_adapter(f"{REPO}@{commit}", **options)
    hub.requests.clear()
    again = fetch_adapter(f"{REPO}@{commit}", **options)
    assert hub.count() == 0
    assert (again.path, again.commit) == (first.path, commit)
    assert [file.name for file in again.files] == list(ADAPTER)


def test_a_branch_that_moved_is_followed_and_the_old_commit_stays_cached(hub: StubHub, options: dict[str, Any]) -> None:
    old = hub.add(REPO, ADAPTER)
    fetch_adapter(REPO, **options)
    new = hub.add(REPO, {**ADAPTER, "adapter_config.json": b'{"new": 1}'})
    fetched = fetch_adapter(REPO, **options)
    assert fetched.commit == new and (fetched.path / "adapter_config.json").read_bytes() == b'{"new": 1}'
    cached = {file.name: file.cached for file in fetched.files}
    assert cached == {"README.md": True, "adapter_config.json": False, "adapter_model.safetensors": True}
    hub.requests.clear()
    assert fetch_adapter(REPO, revision=old, **options).commit == old and hub.count() == 0


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/4", "feature/x"])
def test_tags_pull_requests_and_branches_resolve(hub: StubHub, options: dict[str, Any], revision: str) -> None:
    hub.add(REPO, {**ADAPTER, "README.md": b"main"})
    commit = hub.add(REPO, ADAPTER, revision=revision)
    assert fetch_adapter(f"{REPO}@{revision}", **options).commit == commit


def test_a_damaged_memory_of_a_branch_is_no_traceback(hub: StubHub, options: dict[str, Any], tmp_path: Path) -> None:
    commit = hub.add(REPO, ADAPTER)
    fetch_adapter(REPO, **options)
    [ref] = tmp_path.rglob("refs/main")
    ref.write_bytes(b"\xff" * 40)
    assert fetch_adapter(REPO, **options).commit == commit
    ref.write_bytes(b"\xff" * 40)
    hub.stop()
    with pytest.raises(HubUnreachable):
        fetch_adapter(REPO, **options)


def test_force_transfers_again(hub: StubHub, options: dict[str, Any]) -> None:
    commit = hub.add(REPO, ADAPTER)
    fetched = fetch_adapter(REPO, **options)
    blob = (fetched.path / "adapter_model.safetensors").resolve()
    blob.write_bytes(bytes(blob.stat().st_size))
    forced = fetch_adapter(f"{REPO}@{commit}", force=True, **options)
    assert not any(file.cached for file in forced.files)
    assert blob.read_bytes() == ADAPTER["adapter_model.safetensors"]


def test_a_cached_file_of_another_size_than_listed_is_an_integrity_error(hub: StubHub, options: dict[str, Any]) -> None:
    hub.add(REPO, ADAPTER)
    fetched = fetch_adapter(REPO, **options)
    (fetched.path / "adapter_model.safetensors").resolve().write_bytes(b"cut")
    with pytest.raises(IntegrityError, match="has 3 bytes"):
        fetch_adapter(REPO, **options)
    assert fetch_adapter(REPO, force=True, **options).commit


def test_a_dry_run_writes_nothing_and_tells_sizes_and_what_is_cached(
    hub: StubHub, options: dict[str, Any], tmp_path: Path
) -> None:
    hub.add(REPO, ADAPTER)
    before = regular_files(tmp_path)
    planned = fetch_adapter(REPO, dry_run=True, **options)
    assert regular_files(tmp_path) == before and not planned.path.exists()
    assert not [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert [(file.name, file.size_bytes, file.cached) for file in planned.files] == [
        (name, len(data), False) for name, data in ADAPTER.items()
    ]
    fetched = fetch_adapter(REPO, **options)
    planned_again = fetch_adapter(REPO, dry_run=True, **options)
    assert planned.path == fetched.path == planned_again.path
    assert all(file.cached for file in planned_again.files)


# Without the Hub.


def test_the_cached_copy_is_used_and_said_aloud_when_the_hub_is_down(hub: StubHub, options: dict[str, Any]) -> None:
    commit = hub.add(REPO, ADAPTER)
    first = fetch_adapter(REPO, **options)
    hub.stop()
    progress = Recorder()
    again = fetch_adapter(REPO, progress=progress, **options)
    assert (again.path, again.commit) == (first.path, commit)
    assert progress.notes == [f"the Hub does not answer: using the cached copy of {REPO}, commit {commit}"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_the_cached_copy_is_used_when_the_hub_fails(hub: StubHub, options: dict[str, Any], status: int) -> None:
    commit = hub.add(REPO, ADAPTER)
    fetch_adapter(REPO, **options)
    hub.fail(REPO, status)
    assert fetch_adapter(REPO, **options).commit == commit


def test_offline_mode_reads_the_cache_and_asks_nobody(
    hub: StubHub, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add(REPO, ADAPTER)
    tagged = hub.add(REPO, {**ADAPTER, "README.md": b"tagged"}, revision="feature/x")
    fetch_adapter(REPO, **options)
    fetch_adapter(f"{REPO}@feature/x", **options)
    hub.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    progress = Recorder()
    assert fetch_adapter(REPO, progress=progress, **options).commit == commit
    assert fetch_adapter(f"{REPO}@feature/x", **options).commit == tagged
    assert fetch_adapter(f"{REPO}@{tagged}", **options).commit == tagged
    assert all(file.cached for file in fetch_adapter(REPO, dry_run=True, **options).files)
    assert hub.count() == 0
    assert progress.notes == [f"offline: using the cached copy of {REPO}, commit {commit}"]


def test_huggingface_hub_itself_finds_offline_what_was_fetched(
    hub: StubHub, options: dict[str, Any], tmp_path: Path
) -> None:
    hub.add(REPO, ADAPTER)
    fetched = fetch_adapter(REPO, **options)
    place = huggingface_hub.hf_hub_download(
        REPO, "adapter_config.json", cache_dir=tmp_path / "cache", local_files_only=True
    )
    assert Path(place).parent == fetched.path


def test_offline_and_not_cached_is_unreachable(
    hub: StubHub, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, ADAPTER)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachable, match="offline, and not in the cache") as caught:
        fetch_adapter(REPO, **options)
    assert caught.value.exit_code == 5 and "HF_HUB_OFFLINE" in (caught.value.hint or "")


def test_a_copy_that_was_cut_short_is_not_taken_for_whole(hub: StubHub, options: dict[str, Any]) -> None:
    commit = hub.add(REPO, ADAPTER)
    fetched = fetch_adapter(REPO, **options)
    (fetched.path / "adapter_model.safetensors").unlink()
    hub.requests.clear()
    assert regular_files(fetch_adapter(f"{REPO}@{commit}", **options).path) == set(ADAPTER)
    assert hub.count() > 0
    (fetched.path / "adapter_model.safetensors").unlink()
    hub.stop()
    with pytest.raises(HubUnreachable):
        fetch_adapter(REPO, **options)


def test_force_does_not_fall_back_on_the_cache(hub: StubHub, options: dict[str, Any]) -> None:
    hub.add(REPO, ADAPTER)
    fetch_adapter(REPO, **options)
    hub.stop()
    with pytest.raises(HubUnreachable):
        fetch_adapter(REPO, force=True, **options)


# A local directory as the destination.


def test_a_local_dir_receives_plain_files_in_the_repositorys_structure(hub: StubHub, tmp_path: Path) -> None:
    commit = hub.add(REPO, {**ADAPTER, **{f"sub/{name}": data for name, data in ADAPTER.items()}})
    fetched = fetch_adapter(REPO, endpoint=hub.url, local_dir=tmp_path / "out")
    assert (fetched.path, fetched.commit) == (tmp_path / "out", commit)
    assert all((tmp_path / "out" / name).read_bytes() == data for name, data in ADAPTER.items())
    assert not any((tmp_path / "out" / name).is_symlink() for name in ADAPTER)
    inner = fetch_adapter(f"hf://{REPO}/sub", endpoint=hub.url, local_dir=tmp_path / "out")
    assert inner.path == tmp_path / "out/sub"
    again = fetch_adapter(REPO, endpoint=hub.url, local_dir=tmp_path / "out")
    assert all(file.cached for file in again.files)
    assert fetch_adapter(str(tmp_path / "out")).commit is None
    planned = fetch_adapter(REPO, endpoint=hub.url, local_dir=tmp_path / "new", dry_run=True)
    assert planned.path == tmp_path / "new" and not planned.path.exists()


def test_other_files_in_the_local_dir_are_replaced_only_by_force(hub: StubHub, tmp_path: Path) -> None:
    hub.add(REPO, ADAPTER)
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_bytes(ADAPTER["README.md"])
    (out / "adapter_model.safetensors").write_bytes(b"mine")
    for dry_run in (True, False):
        with pytest.raises(OutputExists) as caught:
            fetch_adapter(REPO, endpoint=hub.url, local_dir=out, dry_run=dry_run)
        assert caught.value.exit_code == 2 and "--force" in (caught.value.hint or "")
        assert caught.value.where == str(out / "adapter_model.safetensors")
        assert regular_files(out) == {"README.md", "adapter_model.safetensors"}
    assert (out / "adapter_model.safetensors").read_bytes() == b"mine"
    fetch_adapter(REPO, endpoint=hub.url, local_dir=out, force=True)
    assert (out / "adapter_model.safetensors").read_bytes() == ADAPTER["adapter_model.safetensors"]


def test_options_that_exclude_each_other_are_refused_before_any_request(
    hub: StubHub, options: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="cannot be given together"):
        fetch_adapter(REPO, local_dir=tmp_path / "out", **options)
    for name, data in ADAPTER.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match="used where it is"):
        fetch_adapter(str(tmp_path), local_dir=tmp_path / "out")
    with pytest.raises(UsageError, match="no revision"):
        fetch_adapter(parse_reference(str(tmp_path)), revision="v1")
    assert hub.count() == 0


# Repositories and directories that hold no adapter.


def test_an_adapter_only_as_pickle_is_refused_by_name(hub: StubHub, options: dict[str, Any], tmp_path: Path) -> None:
    files = {"adapter_config.json": CONFIG, "adapter_model.bin": b"pickle"}
    hub.add(REPO, files)
    with pytest.raises(UnsupportedAdapter, match=r"adapter_model\.bin, a pickle file") as caught:
        fetch_adapter(REPO, **options)
    assert f"loracat convert {REPO} --from-pickle" in (caught.value.hint or "")
    with pytest.raises(UnsupportedAdapter) as caught:
        fetch_adapter(REPO, revision="main", **options)
    assert f"loracat convert {REPO}@main --from-pickle" in (caught.value.hint or "")
    assert not (tmp_path / "cache").exists()
    (tmp_path / "local").mkdir()
    for name, data in files.items():
        (tmp_path / "local" / name).write_bytes(data)
    with pytest.raises(UnsupportedAdapter, match="pickle"):
        fetch_adapter(str(tmp_path / "local"))


def test_the_pickle_is_fetched_only_where_it_is_asked_for(
    hub: StubHub, options: dict[str, Any], tmp_path: Path
) -> None:
    files = {"adapter_config.json": CONFIG, "adapter_model.bin": b"pickle", "README.md": b"#", "optimizer.pt": b"x"}
    commit = hub.add(REPO, files)
    fetched = fetch_adapter(REPO, from_pickle=True, **options)
    assert [file.name for file in fetched.files] == ["adapter_config.json", "adapter_model.bin"]
    assert regular_files(fetched.path) == {"adapter_config.json", "adapter_model.bin"}
    requests = hub.count()
    assert fetch_adapter(f"{REPO}@{commit}", from_pickle=True, **options).files[1].cached and hub.count() == requests
    with pytest.raises(UnsupportedAdapter, match="pickle"):  # the cached copy is no adapter either
        fetch_adapter(f"{REPO}@{commit}", **options)
    with pytest.raises(OutOfResources, match="at most 3 are allowed") as caught:
        fetch_adapter(REPO, from_pickle=True, max_bytes=3, **{**options, "cache_dir": tmp_path / "other"})
    assert "download it by itself" in str(caught.value.hint)
    hub.add("org/both", {**files, "adapter_model.safetensors": b"weights"})
    with pytest.raises(UsageError, match=r"it has adapter_model\.safetensors, which needs no --from-pickle"):
        fetch_adapter("org/both", from_pickle=True, **options)
    hub.add("org/neither", {"adapter_config.json": CONFIG})
    with pytest.raises(AdapterNotFound, match=r"no adapter_model\.safetensors in it"):
        fetch_adapter("org/neither", from_pickle=True, **options)


def test_a_repository_without_an_adapter_says_what_it_holds_instead(hub: StubHub, options: dict[str, Any]) -> None:
    hub.add("org/model", BASE)
    with pytest.raises(AdapterNotFound, match=r"this is a whole model, not an adapter: .* no adapter_config") as caught:
        fetch_adapter("org/model", **options)
    assert "as the base of adapters: --base org/model;" in (caught.value.hint or "")
    hub.add("org/runs", {f"run-{i}/{name}": data for i in range(7) for name, data in ADAPTER.items()})
    with pytest.raises(AdapterNotFound) as caught:
        fetch_adapter("org/runs", **options)
    assert "hf://org/runs/run-0, " in (caught.value.hint or "") and "and 2 more" in (caught.value.hint or "")
    with pytest.raises(AdapterNotFound, match="no folder 'run-9'"):
        fetch_adapter("hf://org/runs/run-9", **options)
    hub.add("org/half", {"adapter_config.json": CONFIG})
    with pytest.raises(AdapterNotFound, match=r"no adapter_model\.safetensors"):
        fetch_adapter("org/half", **options)


# Base models.


def test_a_base_is_config_tokenizer_and_safetensors_of_the_top_level(hub: StubHub, options: dict[str, Any]) -> None:
    extra = {"pytorch_model.bin": b"x", "model.gguf": b"x", "modeling_x.py": b"x", "onnx/model.safetensors": b"x"}
    commit = hub.add("org/base", {**extra, **{k: v for k, v in NOT_WANTED.items() if "adapter" not in k}, **BASE})
    fetched = fetch_base("org/base", **options)
    assert fetched.commit == commit and regular_files(fetched.path) == set(BASE)
    hub.requests.clear()
    assert fetch_base("org/base", revision=commit, **options) == fetch_base("org/base", revision=commit, **options)
    assert hub.count() == 0


def test_the_config_of_a_base_comes_without_its_weights(
    hub: StubHub, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add("org/base", BASE)
    fetched = fetch_base("org/base", config_alone=True, **options)
    assert fetched.commit == commit and regular_files(fetched.path) == {"config.json"}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetch_base("org/base", config_alone=True, **options).path == fetched.path
    with pytest.raises(HubUnreachable):
        fetch_base("org/base", **options)  # the config alone is no base


def test_a_base_in_shards_comes_whole_and_without_copies_of_the_weights(hub: StubHub, options: dict[str, Any]) -> None:
    shards = {f"model-0000{i}-of-00003.safetensors": b"shard %d" % i for i in (1, 2, 3)}
    files = {**BASE, **shards, "model.safetensors.index.json": b"{}", "consolidated.safetensors": b"all of it"}
    del files["model.safetensors"]
    commit = hub.add("org/base", files)
    fetched = fetch_base("org/base", **options)
    assert regular_files(fetched.path) == set(files) - {"consolidated.safetensors"}
    hub.requests.clear()
    fetch_base("org/base", revision=commit, **options)
    assert hub.count() == 0
    (fetched.path / "model-00003-of-00003.safetensors").unlink()
    fetch_base("org/base", revision=commit, **options)
    assert hub.count() > 0 and regular_files(fetched.path) == set(files) - {"consolidated.safetensors"}


def test_a_base_is_read_offline_from_the_cache(
    hub: StubHub, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add("org/base", BASE)
    fetch_base("org/base", **options)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetch_base("org/base", **options).commit == commit


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({**BASE, "adapter_config.json": b"{}"}, "an adapter, not a base model"),
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, r"pickle files \(pytorch_model.bin\)"),
        ({"config.json": b"{}"}, "no weights"),
        ({"model.safetensors": b"x"}, "no config.json"),
    ],
)
def test_what_is_no_base_is_refused(
    hub: StubHub, options: dict[str, Any], files: dict[str, bytes], reason: str
) -> None:
    hub.add("org/base", files)
    with pytest.raises(InputError, match=reason):
        fetch_base("org/base", **options)


@pytest.mark.parametrize("name", ["./base", "/etc", "a/b/c", "org/na me", ""])
def test_what_cannot_be_a_repository_is_refused_as_a_base(options: dict[str, Any], name: str) -> None:
    with pytest.raises(InputError, match="cannot be the name"):
        fetch_base(name, **options)
    with pytest.raises(InputError, match="cannot be a branch"):
        fetch_base("org/base", revision="../../up", **options)


def test_the_base_that_all_adapters_name_is_fetched(hub: StubHub, options: dict[str, Any]) -> None:
    commit = hub.add("org/base", BASE)
    hub.add(REPO, ADAPTER)
    hub.add("org/code", ADAPTER)
    adapters = [fetch_adapter(REPO, **options), fetch_adapter("org/code", **options)]
    assert fetch_base_of(adapters, **options).commit == commit


def test_adapters_that_do_not_agree_on_a_base_are_refused(hub: StubHub, options: dict[str, Any]) -> None:
    def adapter_with(config: bytes) -> Fetched:
        hub.add("org/other", {**ADAPTER, "adapter_config.json": config})
        return fetch_adapter("org/other", **options)

    hub.add(REPO, ADAPTER)
    adapter = fetch_adapter(REPO, **options)
    with pytest.raises(IncompatibleAdapters, match="org/math names org/base, org/other names org/else"):
        fetch_base_of([adapter, adapter_with(b'{"base_model_name_or_path": "org/else"}')], **options)
    pinned = [adapter_with(b'{"base_model_name_or_path": "org/base", "revision": "v%d"}' % i) for i in (1, 2)]
    pinned = [replace(fetched, reference=parse_reference(f"org/v{i}")) for i, fetched in enumerate(pinned, start=1)]
    with pytest.raises(IncompatibleAdapters, match="org/v1 names org/base@v1, org/v2 names org/base@v2"):
        fetch_base_of([adapter, *pinned], **options)
    hub.add("org/base", {**BASE, "config.json": b"v1"}, revision="v1")
    assert (fetch_base_of([adapter, pinned[0]], **options).path / "config.json").read_bytes() == b"v1"
    with pytest.raises(IncompatibleAdapters, match="no adapter names its base"):
        fetch_base_of([adapter_with(b"{}")], **options)
    with pytest.raises(IncompatibleAdapters, match="not a name on the Hub"):
        fetch_base_of([adapter_with(b'{"base_model_name_or_path": "/home/author/base"}')], **options)
    with pytest.raises(MalformedAdapter, match="not valid JSON"):
        fetch_base_of([adapter_with(b"{")], **options)
    for name in (b"7", b'"org/base\\nerror: fake"', b"[]"):
        with pytest.raises(MalformedAdapter, match="not printable text"):
            fetch_base_of([adapter_with(b'{"base_model_name_or_path": %s}' % name)], **options)


def test_the_base_is_not_known_after_a_dry_run(hub: StubHub, options: dict[str, Any]) -> None:
    hub.add(REPO, ADAPTER)
    with pytest.raises(UsageError, match="not known"):
        fetch_base_of([fetch_adapter(REPO, dry_run=True, **options)], **options)


# Failures.


@pytest.mark.parametrize(
    ("fault", "on", "kind", "message", "hint"),
    [
        ("missing", "info", AdapterNotFound, "no such repository on the Hub, or a private one", "hf auth login"),
        ("gated", "info", AccessDenied, "gated", "/org/math, then log in"),
        ("gated", "file", AccessDenied, "gated", "/org/math, then log in"),
        ("bad token", "info", AccessDenied, "denies access (401)", "HF_TOKEN"),
        ("bad token", "file", AccessDenied, "denies access (401)", "HF_TOKEN"),
        (403, "info", AccessDenied, "denies access (403)", "HF_TOKEN"),
        (404, "info", AdapterNotFound, "does not have it", "spelling"),
        ("disabled", "info", AdapterNotFound, "disabled", "/org/math"),
        ("no revision", "info", AdapterNotFound, "no revision", "/org/math"),
        ("no entry", "file", AdapterNotFound, "not there", "/org/math"),
        ("no commit", "file", HubUnreachable, "without file metadata", "HF_ENDPOINT"),
        ("portal", "info", HubUnreachable, "does not answer", "HF_ENDPOINT"),
        (429, "info", HubUnreachable, "429", "wait"),
        (500, "info", HubUnreachable, "the Hub fails (500)", "later"),
        (503, "info", HubUnreachable, "the Hub fails (503)", "later"),
        ("short", "file", IntegrityError, "another size", "again"),
    ],
)
def test_every_failure_of_the_hub_becomes_an_error_with_place_and_way_out(
    hub: StubHub,
    options: dict[str, Any],
    capfd: pytest.CaptureFixture[str],
    fault: str | int,
    on: str,
    kind: type[LoracatError],
    message: str,
    hint: str,
) -> None:
    hub.add(REPO, ADAPTER)
    hub.fail(REPO, fault, on=(on,))
    with pytest.raises(kind) as caught:
        fetch_adapter(REPO, token="hf_canary", **options)
    assert type(caught.value) is kind and caught.value.where == REPO
    assert message in caught.value.what and hint in (caught.value.hint or "")
    assert "\x1b" not in str(caught.value) and "canary" not in f"{caught.value} {caught.value.hint}"
    assert capfd.readouterr() == ("", "")


def test_a_missing_revision_is_named(hub: StubHub, options: dict[str, Any]) -> None:
    hub.add(REPO, ADAPTER)
    with pytest.raises(AdapterNotFound, match="no revision 'v9'"):
        fetch_adapter(f"{REPO}@v9", **options)


def test_a_missing_repository_named_like_a_directory_points_at_it(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/math").mkdir(parents=True)
    with pytest.raises(AdapterNotFound) as caught:
        fetch_adapter("runs/math", **options)
    assert "the directory runs/math is here" in (caught.value.hint or "")


def test_a_hub_that_is_down_is_unreachable(hub: StubHub, options: dict[str, Any]) -> None:
    hub.stop()
    with pytest.raises(HubUnreachable, match="does not answer"):
        fetch_adapter(REPO, **options)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OutOfResources),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), OutOfResources),
        (PermissionError(errno.EACCES, "Permission denied", "/cache/x"), LoracatError),
        (TimeoutError("timed out"), HubUnreachable),
        (ConnectionResetError("reset"), HubUnreachable),
        (RuntimeError("CAS Client Error: error sending request"), HubUnreachable),
        (RuntimeError("I/O error: No space left on device (os error 28)"), OutOfResources),
    ],
)
def test_failures_of_disk_and_line_become_errors_of_ours(
    hub: StubHub, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[LoracatError]
) -> None:
    def fail(**kwargs: Any) -> None:
        raise error

    hub.add(REPO, ADAPTER)
    monkeypatch.setattr(hub_module, "hf_hub_download", fail)
    with pytest.raises(kind) as caught:
        fetch_adapter(REPO, **options)
    assert type(caught.value) is kind


@pytest.mark.parametrize("bug", [ValueError, TypeError, NotImplementedError])
def test_a_bug_in_the_client_keeps_its_traceback(
    hub: StubHub, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, bug: type[Exception]
) -> None:
    def fail(**kwargs: Any) -> None:
        raise bug("a bug")

    hub.add(REPO, ADAPTER)
    monkeypatch.setattr(hub_module, "hf_hub_download", fail)
    with pytest.raises(bug, match="a bug"):
        fetch_adapter(REPO, **options)


def test_the_token_reaches_the_hub_and_an_empty_one_is_none(hub: StubHub, options: dict[str, Any]) -> None:
    hub.add(REPO, ADAPTER)
    fetch_adapter(REPO, token="hf_canary", **options)
    assert hub.tokens == {"Bearer hf_canary"}
    hub.tokens.clear()
    fetch_adapter(REPO, token="", **options)
    assert hub.tokens == {None}


@pytest.mark.parametrize("token", ["hf_canary\n", "hf_canary x", "hf_canaryé", "hf_canary\x00"])
def test_a_malformed_token_is_refused_without_being_quoted(hub: StubHub, options: dict[str, Any], token: str) -> None:
    with pytest.raises(UsageError) as caught:
        fetch_adapter(REPO, token=token, **options)
    assert "canary" not in f"{caught.value} {caught.value.hint}" and hub.count() == 0


def test_a_malformed_token_of_the_environment_is_refused_without_being_quoted(
    hub: StubHub, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, ADAPTER)
    monkeypatch.setenv("HF_TOKEN", "hf_canaryé")
    with pytest.raises(AccessDenied, match="no token has") as caught:
        fetch_adapter(REPO, **options)
    assert "canary" not in "".join(traceback.format_exception(caught.value))


# Progress and quiet.


def test_progress_receives_every_byte_and_nothing_is_drawn(
    hub: StubHub, options: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    hub.add(REPO, ADAPTER)
    progress = Recorder()
    fetch_adapter(REPO, progress=progress, **options)
    sizes = {f"{REPO}/{name}": len(data) for name, data in ADAPTER.items()}
    assert progress.totals == progress.done == sizes and not progress.open
    assert capfd.readouterr() == ("", "")


def test_what_the_server_says_in_words_is_not_repeated(
    hub: StubHub, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    hub.add(REPO, ADAPTER)
    huggingface_hub.HfApi(endpoint=hub.url).model_info(REPO)
    assert "words of the server" in caplog.text  # it does say something, and the client would show it
    caplog.clear()
    fetch_adapter(REPO, **options)
    assert not caplog.records


def test_the_clients_log_level_is_left_as_it_was(hub: StubHub, options: dict[str, Any]) -> None:
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    with pytest.raises(AdapterNotFound):
        fetch_adapter(REPO, **options)
    assert logger.level == before
