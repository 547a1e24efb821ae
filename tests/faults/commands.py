"""The commands that faults are tried on: small ones, each with the bytes that it writes when it is left alone."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.faults.fork_server import Ended, ForkServer
from tests.faults.trials import check_manners, tree

ADAPTERS = ("../project/first", "../project/second")
FIT = (
    *("fit", "-a", *ADAPTERS, "-d", "../project/val.jsonl", "--base", "../project/base"),
    *("--passes", "2", "--holdout", "0.2", "--batch-tokens", "256", "--dtype", "float32", "--device", "cpu"),
)


@dataclass(frozen=True)
class Command:
    """A command that runs in an empty folder beside the project.

    Args:
        name: of it.
        words: of its command line.
        prepared: a folder whose content is there before, or None.
        again: words to add when it is repeated after it was stopped.
        ignored: names of what a library keeps for itself below the folder.
        grows: its output is a cache, which fills file by file.
    """

    name: str
    words: tuple[str, ...]
    prepared: Path | None = None
    again: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    grows: bool = False

    def place(self, folder: Path) -> Path:
        """A fresh folder for a trial."""
        shutil.rmtree(folder, ignore_errors=True)
        if self.prepared is None:
            folder.mkdir()
        else:
            shutil.copytree(self.prepared, folder)
        return folder

    def written(self, folder: Path) -> dict[str, bytes | None]:
        """What is there, without what a library keeps for itself."""
        found = tree(folder)
        return {name: data for name, data in found.items() if not any(part in name for part in self.ignored)}

    def golden(self, server: ForkServer, folder: Path, *, seen: Path | None = None) -> dict[str, bytes | None]:
        """What it writes when it is left alone; `seen` is the folder as this process sees it."""
        self.place(seen or folder)
        ended = server.run(*self.words, cwd=folder)
        assert ended.code == 0, ended
        return self.written(seen or folder)

    def check_whole(self, folder: Path, golden: dict[str, bytes | None]) -> None:
        """Everything under a name of its own is as it was before, or as it is in the end."""
        before = {} if self.prepared is None else tree(self.prepared)
        found = {name: data for name, data in self.written(folder).items() if not _is_temporary(name)}
        for top in {name.partition("/")[0] for name in found}:
            part, was, will = (
                {name: data for name, data in names.items() if name.partition("/")[0] == top}
                for names in (found, before, golden)
            )
            if part != was and not (part.items() <= will.items() if self.grows else part == will):
                raise AssertionError(f"{top} is torn: {dict(part.items() ^ will.items()).keys()}")

    def check_done(self, folder: Path, golden: dict[str, bytes | None], *, unremovable: bool = False) -> None:
        """Everything is there, and nothing else; but for what could not be removed, and for notes in a cache."""
        found = self.written(folder)
        if unremovable:
            found = {name: data for name, data in found.items() if not _is_temporary(name)}
        if self.grows:
            found, golden = (
                {name: data for name, data in names.items() if "/snapshots/" in name} for names in (found, golden)
            )
        assert found == golden

    def repeat(
        self, server: ForkServer, folder: Path, golden: dict[str, bytes | None], *, seen: Path | None = None
    ) -> None:
        """Runs it again where it was disturbed: it ends in the same bytes, and nothing else is left."""
        ended: Ended = server.run(*self.words, *self.again, cwd=folder)
        if ended.code == 2 and "exists" in ended.stderr:  # it had been disturbed after its last step
            ended = server.run(*self.words, "--force", cwd=folder)
        check_manners(ended, {0})
        assert self.written(seen or folder) == golden


def _is_temporary(name: str) -> bool:
    """Whether this is, or is in, what nobody takes for an output: hidden, or the state of a fit."""
    return any(part.startswith(".") or part.endswith(".state") for part in name.split("/"))
