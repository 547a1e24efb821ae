"""Where a fused model is made, so that it appears whole or not at all and nothing is lost when the work is stopped.

    .NAME.fusing/        beside the output: its files as they are finished, and becomes the output by rename
    .NAME.fusing.json    what it is made of, and the sha256 of each finished file and of the base's file it came from

A file enters the second only when it is on the disk. One that a resumed run takes over is hashed again first.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loracli.errors import InputError, OutOfResources, StateMismatch, UsageError
from loracli.fusing.stream import Hashes
from loracli.progress import Progress, amount_text
from loracli.system.files import (
    check_free,
    flush_directory,
    locked_directory,
    put_in_place,
    repair,
    translate_disk_errors,
    write_atomically,
)
from loracli.system.strict_json import StrictJsonError, parse_json
from loracli.system.tensor_file import file_sha256

FUSE_CERTIFICATE = "loracat-fuse.json"


def holds_fused_model(path: Path) -> bool:
    """Whether a directory holds what its certificate lists and nothing else, or nothing at all."""
    names = {entry.name for entry in path.iterdir()}
    if not names:
        return True
    try:
        listed = parse_json((path / FUSE_CERTIFICATE).read_bytes())["certificate"]["files"]
    except (OSError, StrictJsonError, KeyError, TypeError):
        return False
    return isinstance(listed, dict) and names <= {*listed, FUSE_CERTIFICATE}


def check_model_free(output: Path, *, force: bool) -> None:
    """Raises OutputExists if the output is taken, or is no fused model that --force could replace."""
    check_free(output, force=force, replaceable=holds_fused_model, noun="a fused model")


class Workplace:
    """The folder of one fusion. Made by `open_workplace`."""

    def __init__(self, output: Path, identity: Mapping[str, str]) -> None:
        self.output = output
        self.folder = output.with_name(f".{output.name}.fusing")
        self._state = output.with_name(f".{output.name}.fusing.json")
        self._identity = dict(identity)
        self._finished: dict[str, Any] = {}

    def finished(self, name: str, base: Path) -> Hashes | None:
        """The hashes of a file that an earlier run finished, None unless it and the base's file still have them."""
        known = self._finished.get(name)
        path = self.folder / name
        if not isinstance(known, dict) or not path.is_file():
            return None
        found = Hashes(base=file_sha256(base), fused=file_sha256(path))
        return found if asdict(found) == known else None

    def finish(self, name: str, hashes: Hashes) -> None:
        """A file is complete and on the disk."""
        flush_directory(self.folder)
        self._finished[name] = asdict(hashes)
        self._write_state()

    def done(self) -> bool:
        """Whether an earlier run was stopped after its last step, with the output in place."""
        known = self._finished.get(FUSE_CERTIFICATE)
        path = self.output / FUSE_CERTIFICATE
        return isinstance(known, str) and path.is_file() and file_sha256(path) == known

    def complete(self, certificate_sha256: str) -> None:
        """Everything is in the folder: it becomes the output."""
        self._finished[FUSE_CERTIFICATE] = certificate_sha256
        self._write_state()
        put_in_place(self.folder, self.output)
        self.drop()

    def drop(self) -> None:
        """Removes what is left of this fusion."""
        self._state.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def load(self, *, resume: bool, progress: Progress) -> None:
        """Takes over what an earlier run left, or drops it.

        Raises:
            StateMismatch: with `resume`, if it was begun with other inputs or options; names them.
        """
        found = self._read_state()
        if resume and found is not None:
            known = found["identity"]
            changed = sorted(k for k in {*known, *self._identity} if known.get(k) != self._identity.get(k))
            if changed:
                raise StateMismatch(
                    f"the interrupted fusion in {self.folder} was begun with something else: {', '.join(changed)}",
                    hint="restore what has changed, or leave out --resume to start over",
                )
            self._finished = found["finished"]
            progress.note(f"going on from {self.folder}")
            return
        if resume:
            progress.warn(f"there is no interrupted fusion in {self.folder}: starting over")
        elif found is not None:
            progress.warn(f"the interrupted fusion in {self.folder} is dropped: --resume would have gone on with it")
        self._write_state()
        for entry in self.folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def room_for(self, size: int) -> None:
        """Raises OutOfResources unless `size` more bytes can be written."""
        free = shutil.disk_usage(self.folder).free
        if size > free:
            if not any(self.folder.iterdir()):
                self.drop()
            raise OutOfResources(
                f"{self.output} needs {size} bytes more ({amount_text(size, 'B')}) and {free} are free "
                f"({amount_text(free, 'B')})",
                hint="free some space, or name a directory on another disk with -o",
            )

    def _read_state(self) -> dict[str, Any] | None:
        try:
            fields = parse_json(self._state.read_bytes())
        except (OSError, StrictJsonError):
            return None
        if not isinstance(fields, dict) or not all(
            isinstance(fields.get(name), dict) for name in ("identity", "finished")
        ):
            return None
        return fields

    def _write_state(self) -> None:
        content = {"identity": self._identity, "finished": self._finished}
        write_atomically(self._state, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


@contextmanager
def open_workplace(
    output: Path, identity: Mapping[str, str], *, force: bool, resume: bool, progress: Progress
) -> Iterator[Workplace]:
    """The folder to make a model in; what an interruption leaves there stays for `resume`.

    Raises:
        OutputExists: if the output is in the way.
        LoracatError: if another process is at work there.
        StateMismatch: as `Workplace.load`.
    """
    place = Workplace(output, identity)
    with translate_disk_errors(output), locked_directory(place.folder, output):
        repair(output)
        place.load(resume=resume, progress=progress)
        try:
            if not place.done():
                check_model_free(output, force=force)
            yield place
        except (InputError, UsageError):  # the same would happen again
            place.drop()
            raise
        except (KeyboardInterrupt, SystemExit):
            progress.note(f"what is done is kept in {place.folder}: --resume goes on from there")
            raise
        finally:
            repair(output)
