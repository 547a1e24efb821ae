"""Outputs appear whole or not at all, whatever happens on the way."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loracli.errors import LoracatError, OutOfResources, OutputExists
from loracli.system.files import (
    check_free,
    locked_directory,
    translate_disk_errors,
    whole_directory,
    write_atomically,
    write_file,
)


class Stop(BaseException):
    """What no `except Exception` catches, as Ctrl-C and SIGTERM."""


def fill(folder: Path, text: str = "new") -> None:
    (folder / "adapter_config.json").write_text(text)
    (folder / "adapter_model.safetensors").write_text(text)
    (folder / "loracat.json").write_text(text)


def an_adapter(path: Path, text: str = "old") -> Path:
    path.mkdir(parents=True)
    fill(path, text)
    return path


def content(path: Path) -> str:
    return (path / "adapter_config.json").read_text()


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# Directories.


def test_a_directory_appears_with_its_files_and_nothing_beside_it(tmp_path: Path) -> None:
    with whole_directory(tmp_path / "a" / "out", force=False) as folder:
        assert not (tmp_path / "a" / "out").exists()
        fill(folder)
    assert names(tmp_path / "a") == ["out"]
    assert names(tmp_path / "a" / "out") == ["adapter_config.json", "adapter_model.safetensors", "loracat.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, Stop])
@pytest.mark.parametrize("force", [False, True])
def test_a_failure_in_the_body_leaves_nothing_behind(tmp_path: Path, error: type[BaseException], force: bool) -> None:
    with pytest.raises(error), whole_directory(tmp_path / "out", force=force) as folder:
        fill(folder)
        raise error
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stop])
def test_a_failure_in_the_body_keeps_what_force_would_replace(tmp_path: Path, error: type[BaseException]) -> None:
    an_adapter(tmp_path / "out")
    with pytest.raises(error), whole_directory(tmp_path / "out", force=True) as folder:
        fill(folder)
        raise error
    assert names(tmp_path) == ["out"] and content(tmp_path / "out") == "old"


def test_an_existing_output_is_refused_before_the_body_runs(tmp_path: Path) -> None:
    an_adapter(tmp_path / "out")
    with pytest.raises(OutputExists), whole_directory(tmp_path / "out", force=False):
        raise AssertionError("the body ran")
    assert names(tmp_path) == ["out"] and content(tmp_path / "out") == "old"


def test_force_replaces_every_file_of_an_adapter(tmp_path: Path) -> None:
    an_adapter(tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("of the old one")
    with whole_directory(tmp_path / "out", force=True) as folder:
        assert content(tmp_path / "out") == "old"
        fill(folder)
    assert names(tmp_path) == ["out"] and content(tmp_path / "out") == "new"
    assert not (tmp_path / "out" / "README.md").exists()


def test_force_fills_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with whole_directory(tmp_path / "out", force=True) as folder:
        fill(folder)
    assert names(tmp_path) == ["out"] and content(tmp_path / "out") == "new"


@pytest.mark.parametrize("step", [1, 2])
def test_a_rename_that_fails_leaves_the_old_adapter_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Old aside is the first rename, new in the second."""
    an_adapter(tmp_path / "out")
    real, calls = os.rename, []

    def rename(source: Path, target: Path) -> None:
        calls.append((source, target))
        if len(calls) == step:
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(LoracatError), whole_directory(tmp_path / "out", force=True) as folder:
        fill(folder)
    assert names(tmp_path) == ["out"] and content(tmp_path / "out") == "old"


@pytest.mark.parametrize("force", [False, True])
def test_a_replacement_killed_between_its_renames_is_repaired(tmp_path: Path, force: bool) -> None:
    an_adapter(tmp_path / ".out.loracat-old")
    if force:
        with whole_directory(tmp_path / "out", force=True) as folder:
            assert content(tmp_path / "out") == "old"  # back in its place while the new one is made
            fill(folder)
    else:
        with pytest.raises(OutputExists), whole_directory(tmp_path / "out", force=False):
            raise AssertionError("the body ran")
    assert names(tmp_path) == ["out"]
    assert content(tmp_path / "out") == ("new" if force else "old")


def test_a_replacement_killed_before_its_cleaning_up_is_cleaned_up(tmp_path: Path) -> None:
    an_adapter(tmp_path / "out", "new")
    an_adapter(tmp_path / ".out.loracat-old", "old")
    with pytest.raises(OutputExists), whole_directory(tmp_path / "out", force=False):
        raise AssertionError("the body ran")
    assert names(tmp_path) == ["out"] and content(tmp_path / "out") == "new"


def test_of_several_that_replace_one_directory_each_does_so_in_its_turn(tmp_path: Path) -> None:
    def replace_it(which: int) -> None:
        for turn in range(25):
            with whole_directory(tmp_path / "out", force=True) as folder:
                fill(folder, f"{which} {turn}")

    an_adapter(tmp_path / "out")
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(replace_it, which) for which in range(4)]:
            done.result()
    assert names(tmp_path) == ["out"]
    assert len({(tmp_path / "out" / name).read_text() for name in names(tmp_path / "out")}) == 1
    assert content(tmp_path / "out").endswith("24")


def test_a_name_that_keeps_changing_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if target == tmp_path / "out" and source.name.endswith(".tmp"):
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        real(source, target)

    an_adapter(tmp_path / "out")
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OutputExists, match="another process"), whole_directory(tmp_path / "out", force=True) as folder:
        fill(folder)
    assert names(tmp_path) == ["out"] and content(tmp_path / "out") == "old"


@pytest.mark.parametrize("there", [False, True])
def test_a_copy_that_somebody_else_has_moved_aside_is_left_alone(tmp_path: Path, there: bool) -> None:
    an_adapter(tmp_path / ".out.old", "somebody's")
    if there:
        an_adapter(tmp_path / "out")
    with whole_directory(tmp_path / "out", force=True) as folder:
        fill(folder)
    assert names(tmp_path) == [".out.old", "out"]
    assert (content(tmp_path / ".out.old"), content(tmp_path / "out")) == ("somebody's", "new")


def a_folder_of_photos(path: Path) -> None:
    path.mkdir()
    (path / "photo.jpg").write_text("precious")


def a_file(path: Path) -> None:
    path.write_text("precious")


def a_link_to_an_adapter(path: Path) -> None:
    path.symlink_to(an_adapter(path.with_name("elsewhere")))


def a_dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


@pytest.mark.parametrize(
    "make", [a_folder_of_photos, a_file, a_link_to_an_adapter, a_dangling_link], ids=lambda f: f.__name__
)
def test_force_never_removes_what_is_no_adapter_directory(tmp_path: Path, make: object) -> None:
    make(tmp_path / "out")  # type: ignore[operator]
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(OutputExists):
        check_free(tmp_path / "out", force=True)
    with pytest.raises(OutputExists), whole_directory(tmp_path / "out", force=True):
        raise AssertionError("the body ran")
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_a_directory_without_a_name_of_its_own_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    an_adapter(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "adapter_config.json").write_text("{}")
    for force in (False, True):
        with pytest.raises(OutputExists):
            check_free(Path(name), force=force)


def test_a_free_name_is_free(tmp_path: Path) -> None:
    check_free(tmp_path / "out", force=False)
    check_free(tmp_path / "missing" / "out", force=True)
    assert names(tmp_path) == []


# Several processes, dead or alive.


def test_what_killed_processes_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    for name in (".out.0123abcd.tmp", ".recipe.json.89abcdef.tmp"):
        an_adapter(tmp_path / name)
    for name in (".out.0123abcd.tmp.mine", ".other.0123abcd.tmp", ".out.notours.tmp"):
        (tmp_path / name).mkdir()
    with whole_directory(tmp_path / "out", force=False) as folder:
        fill(folder)
    write_atomically(tmp_path / "recipe.json", b"x")
    kept = [".other.0123abcd.tmp", ".out.0123abcd.tmp.mine", ".out.notours.tmp"]
    assert names(tmp_path) == [*kept, "out", "recipe.json"]


@pytest.mark.parametrize("name", ["out[1]", "out*", "?"])
def test_a_name_is_no_pattern_of_what_to_remove(tmp_path: Path, name: str) -> None:
    (tmp_path / ".out1.0123abcd.tmp").mkdir()
    (tmp_path / f".{name}.0123abcd.tmp").mkdir()
    write_atomically(tmp_path / name, b"x")
    assert names(tmp_path) == sorted([".out1.0123abcd.tmp", name])


def test_what_another_is_at_work_in_stays(tmp_path: Path) -> None:
    with whole_directory(tmp_path / "out", force=False) as first:
        fill(first, "first")
        with pytest.raises(ValueError), whole_directory(tmp_path / "out", force=False):
            raise ValueError
        assert content(first) == "first"
    assert names(tmp_path) == ["out"] and content(tmp_path / "out") == "first"


def test_of_two_without_force_the_one_that_ends_first_wins(tmp_path: Path) -> None:
    with pytest.raises(OutputExists), whole_directory(tmp_path / "out", force=False) as slow:
        fill(slow, "slow")
        with whole_directory(tmp_path / "out", force=False) as quick:
            fill(quick, "quick")
    assert names(tmp_path) == ["out"] and content(tmp_path / "out") == "quick"


def test_of_two_with_force_the_one_that_ends_last_wins(tmp_path: Path) -> None:
    an_adapter(tmp_path / "out")
    with whole_directory(tmp_path / "out", force=True) as slow:
        fill(slow, "slow")
        with whole_directory(tmp_path / "out", force=True) as quick:
            fill(quick, "quick")
        assert content(tmp_path / "out") == "quick"
    assert names(tmp_path) == ["out"] and content(tmp_path / "out") == "slow"


def test_an_output_that_appears_between_two_renames_is_kept_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    an_adapter(tmp_path / "out")
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        real(source, target)
        if target.name == ".out.loracat-old":
            an_adapter(tmp_path / "out", "another's")

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OutputExists, match="meanwhile"), whole_directory(tmp_path / "out", force=True) as folder:
        fill(folder)
    assert names(tmp_path) == ["out"] and content(tmp_path / "out") == "another's"


def test_a_locked_directory_is_for_one_and_goes_when_it_is_empty(tmp_path: Path) -> None:
    with locked_directory(tmp_path / "a" / "state", Path("recipe.json")):
        with pytest.raises(LoracatError, match=r"another process is writing recipe\.json"):
            with locked_directory(tmp_path / "a" / "state", Path("recipe.json")):
                raise AssertionError("both have it")
        assert names(tmp_path / "a") == ["state"]
    assert names(tmp_path / "a") == []
    with locked_directory(tmp_path / "a" / "state", Path("recipe.json")):
        (tmp_path / "a" / "state" / "step").write_text("kept")
    assert names(tmp_path / "a" / "state") == ["step"]


@pytest.mark.parametrize("target", ["precious", "missing", "a file"])
def test_a_locked_directory_is_no_link_and_no_file(tmp_path: Path, target: str) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "photo").write_text("kept")
    place = tmp_path / ".out.fusing"
    place.write_text("kept") if target == "a file" else place.symlink_to(tmp_path / target)
    kind = "not a directory" if target == "a file" else "a symbolic link"
    with pytest.raises(OutputExists, match=rf"\.out\.fusing, where out would be made, is {kind}"):
        with locked_directory(place, Path("out")):
            raise AssertionError("it was entered")
    assert os.path.lexists(place) and (tmp_path / "precious" / "photo").read_text() == "kept"
    assert names(tmp_path) == [".out.fusing", "precious"]


def test_a_file_system_without_locks_is_written_to_and_nothing_there_is_taken_for_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    (tmp_path / ".out.0123abcd.tmp").mkdir()
    with locked_directory(tmp_path / "state", Path("x")), whole_directory(tmp_path / "out", force=False) as folder:
        fill(folder)
    assert names(tmp_path) == [".out.0123abcd.tmp", "out"]


# Files.


def test_a_file_is_written_whole_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "recipe.json"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two" and names(path.parent) == ["recipe.json"]


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_write_that_fails_keeps_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    (tmp_path / "recipe.json").write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OutOfResources, match="no space left"):
        write_atomically(tmp_path / "recipe.json", b"new")
    assert (tmp_path / "recipe.json").read_bytes() == b"old" and names(tmp_path) == ["recipe.json"]


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def replaced(source: Path, target: Path) -> None:
        order.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_atomically(tmp_path / "recipe.json", b"x")
    assert order == ["file", "name", "folder"]


def test_the_mode_is_what_the_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_new_file_never_replaces_or_follows_anything(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"old")
    (tmp_path / "link").symlink_to("elsewhere")
    for name in ("there", "link"):
        with pytest.raises(FileExistsError):
            write_file(tmp_path / name, b"new")
    assert (tmp_path / "there").read_bytes() == b"old" and not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_out_of_resources(tmp_path: Path, code: int) -> None:
    with pytest.raises(OutOfResources) as caught, translate_disk_errors(tmp_path / "out"):
        raise OSError(code, "full")
    assert caught.value.exit_code == 6 and str(tmp_path / "out") in str(caught.value)


def test_a_directory_on_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(OutOfResources), whole_directory(tmp_path / "out", force=False) as folder:
        fill(folder)
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_a_parent_that_is_a_file_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LoracatError, match="cannot be written"):
        write_atomically(tmp_path / "file" / "recipe.json", b"x")
    with (
        pytest.raises(LoracatError, match="cannot be written"),
        whole_directory(tmp_path / "file" / "out", force=False),
    ):
        raise AssertionError("the body ran")
    assert names(tmp_path) == ["file"]


def test_the_helper_of_these_tests_sees_leftovers(tmp_path: Path) -> None:
    (tmp_path / ".out.123.tmp").mkdir()
    assert names(tmp_path) == [".out.123.tmp"]
    shutil.rmtree(tmp_path / ".out.123.tmp")


@pytest.mark.parametrize(
    ("files", "said", "way_out"),
    [
        (["loracat.json", "adapter_config.json"], "exists and holds an export of loracat", "--force"),
        ([], "exists and is an empty directory", "--force"),
        (["notes.txt"], "holds something else than an export of loracat, which is never replaced", "another name"),
        (None, "exists and is not a directory", "another name"),
    ],
)
def test_who_meets_an_output_hears_what_it_is_and_the_ways_out_that_work(
    tmp_path: Path, files: list[str] | None, said: str, way_out: str
) -> None:
    out = tmp_path / "out"
    if files is None:
        out.write_text("precious")
    else:
        out.mkdir()
        for name in files:
            (out / name).write_text("precious")
    with pytest.raises(OutputExists, match=said) as caught:
        check_free(out, force=False)
    assert way_out in str(caught.value.hint) and ("--force" in str(caught.value.hint)) == (way_out == "--force")
