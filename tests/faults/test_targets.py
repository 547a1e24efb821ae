"""Outputs that are odd, or cannot be written: an error that says so and nothing touched, or the output, whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.commands import Command
from tests.faults.fork_server import ForkServer
from tests.faults.trials import Tally, check_manners, tree


def nothing(folder: Path) -> None:
    pass


def a_file(folder: Path) -> None:
    (folder / "out").write_text("precious")


def photos(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out/photo.jpg").write_text("precious")


def a_fifo(folder: Path) -> None:
    os.mkfifo(folder / "out")


def a_dangling_link(folder: Path) -> None:
    (folder / "out").symlink_to("nowhere")


def a_link_to_itself(folder: Path) -> None:
    (folder / "out").symlink_to("out")


def a_link_to_a_folder(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "out").symlink_to("elsewhere")


TARGETS: list[tuple[Callable[[Path], None], str, set[int]]] = [
    (a_file, "out", {2}),
    (photos, "out", {2}),
    (a_fifo, "out", {2}),
    (a_dangling_link, "out", {2}),
    (a_link_to_itself, "out", {2}),
    (a_link_to_a_folder, "out", {2}),
    (a_file, "out/below", {1, 2}),
    (a_fifo, "out/below", {1, 2}),
    (a_link_to_itself, "out/below", {1}),
    (nothing, ".", {2}),
    (nothing, "..", {2}),
    (nothing, "/dev/null", {2}),
    (nothing, "/proc/loracat/out", {1}),
    (nothing, "n" * 255, {1}),
    (nothing, "n" * 256, {1}),
    (nothing, "new/folders/out", {0}),
    (nothing, "two\nlines", {0}),
    (nothing, "\x1b[31mred", {0}),
    (nothing, "猫 é \u202e", {0}),
    (nothing, "[bold]*?", {0}),
    (nothing, "-dash", {0}),
]


@pytest.mark.parametrize(("make", "name", "codes"), TARGETS, ids=lambda value: ascii(getattr(value, "__name__", value)))
def test_an_odd_target_is_refused_untouched_or_written_whole(
    server: ForkServer,
    yard: Path,
    tally: Tally,
    export: Command,
    make: Callable[[Path], None],
    name: str,
    codes: set[int],
) -> None:
    folder = export.place(yard / "trial")
    make(folder)
    before = tree(folder)
    ended = server.run("export", f"--output={name}", *(("--force",) if make is not nothing else ()), cwd=folder)
    check_manners(ended, codes)
    assert "\x1b" not in ended.stdout + ended.stderr
    after = tree(folder)
    assert before.items() <= after.items()
    if make in (a_file, a_link_to_itself) and name == "out/below":
        assert ended.stderr == "error: out/below cannot be written: out is not a directory\n"
    if ended.code == 0:
        assert {path.name for path in (folder / name).iterdir()} >= {"adapter_config.json", "loracat.json"}
        assert not [path for path in after if "/." in f"/{path}"]
    else:
        assert after == before
    tally.add("odd targets", ended.code)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_must_not_be_written_is_named(server: ForkServer, yard: Path, export: Command) -> None:
    folder = export.place(yard / "trial")
    folder.chmod(0o555)
    try:
        ended = server.run("export", cwd=folder)
    finally:
        folder.chmod(0o755)
    check_manners(ended, {1})
    assert "Permission denied" in ended.stderr
