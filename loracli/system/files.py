"""Files: names of those that make an adapter and an export, reading of regular files alone, with a ceiling, and outputs
that appear whole or not at all, with their bytes on the disk before their name is.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader, BufferedWriter
from pathlib import Path

from loracli.errors import LoracatError, MalformedAdapter, OutOfResources, OutputExists
from loracli.progress import Progress
from loracli.system.machine import DISK_FULL

CONFIG_FILE = "adapter_config.json"
README_FILE = "README.md"
TENSOR_FILE = "adapter_model.safetensors"
MLX_TENSOR_FILE = "adapters.safetensors"
PICKLE_FILE = "adapter_model.bin"  # opened by conversion/unpickle.py alone
TENSOR_FILES = (TENSOR_FILE, MLX_TENSOR_FILE)
GGUF_FILE = "adapter.gguf"
CORES_FILE = "loracat-refit.cores"


CERTIFICATE_FILE = "loracat.json"

# Ways out where an output is taken, for those who type a command and those who call a function.
ANOTHER_NAME = "choose another name"
REPLACE = "replace it: --force, in Python force=True"
OR_FORCE = f"{ANOTHER_NAME}, or {REPLACE}"

# What an export consists of; --force replaces a directory of these and nothing else.
EXPORTED_FILES = frozenset(
    {CONFIG_FILE, TENSOR_FILE, MLX_TENSOR_FILE, GGUF_FILE, CORES_FILE, CERTIFICATE_FILE, README_FILE}
)


# What a rename says when another process has given or taken one of its names.
_CHANGED = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT})
_TRIES = 100
_BLOCK = 1 << 20  # bytes that are copied at once


def same_file(first: Path, second: Path) -> bool:
    """Whether two paths lead to one file or directory: by links of any kind, or by names that differ and that a file
    system takes for one."""
    if os.path.realpath(first) == os.path.realpath(second):  # where links lead in a circle, resolve() raises
        return True
    try:
        return first.samefile(second)
    except OSError:  # one of them is not there
        return False


def holds(folder: Path, path: Path) -> bool:
    """Whether a path is the folder or lies below it, by whatever names."""
    place = Path(os.path.realpath(path))
    return any(same_file(folder, above) for above in (place, *place.parents))


class _NoRegularFile(OSError):
    """Raised for a directory, FIFO or device in place of a file."""


def _open_descriptor(path: Path) -> int:
    """The descriptor of a regular file, to be read. Opening anything else does not wait.

    Raises:
        _NoRegularFile: if it is something else.
        OSError: if it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _NoRegularFile(errno.EINVAL, "it is not a regular file")
    return descriptor


@contextmanager
def open_regular(path: Path, refused: Callable[[str], LoracatError] | None = None) -> Iterator[BufferedReader]:
    """Opens a file for reading bytes; a directory, FIFO or device is refused instead of read from.

    Args:
        path: of the file.
        refused: makes the caller's error of the reason why it cannot be opened; None for MalformedAdapter.
    Raises:
        MalformedAdapter, or what `refused` makes: if it cannot be opened.
        LoracatError: if the disk fails while it is read.
    """
    try:
        descriptor = _open_descriptor(path)
    except OSError as error:
        if refused is not None:
            raise refused(str(error.strerror)) from None
        reason = error.strerror if isinstance(error, _NoRegularFile) else f"it cannot be opened: {error.strerror}"
        raise MalformedAdapter(str(reason), where=str(path)) from None
    try:
        with open(descriptor, "rb") as file:
            yield file
    except OSError as error:
        if error.errno != errno.EIO or error.filename is not None:
            raise
        raise LoracatError(f"cannot be read: {error.strerror}", where=str(path)) from None


def file_sha256(path: Path) -> str:
    """Of a regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a regular file that has at most `most` of them.

    Raises:
        OSError: if it is something else, has more, or cannot be read; `strerror` says which.
    """
    with open(_open_descriptor(path), "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most} bytes")
    return data


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file beside `path`, flushes it to the disk, and renames it over `path`."""
    with replaced_file(path) as temporary:
        write_file(temporary, data)


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """The name of a new file to write and flush, which is renamed over `path` at the end, or vanishes if anything
    fails."""
    with translate_disk_errors(path), _temporary_directory(path) as folder:
        yield folder / path.name
        os.replace(folder / path.name, path)
        flush(path.parent)


@contextmanager
def whole_directory(path: Path, *, force: bool) -> Iterator[Path]:
    """An empty directory to fill, which becomes `path` by rename at the end, or vanishes if anything fails.

    With `force` an existing directory is moved aside, replaced and removed; a run that was killed between those steps
    is repaired by the next one.

    Raises:
        OutputExists: before anything is written, if `path` exists and `force` is not set; at the end, if another
            process has made it meanwhile.
    """
    with translate_disk_errors(path):
        repair(path)
        check_free(path, force=force)
        with _temporary_directory(path) as temporary:
            try:
                yield temporary
                check_free(path, force=force)
                put_in_place(temporary, path, replace=force)
            finally:
                if path.exists():
                    shutil.rmtree(_aside(path), ignore_errors=True)
                else:
                    repair(path)


@contextmanager
def _temporary_directory(path: Path) -> Iterator[Path]:
    """A new directory beside `path`, removed at the end if it is still there.

    It is locked while this process lives, so that those which killed processes have left are known, and removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_temporaries(path.parent, path.name)
    descriptor = None
    while descriptor is None:  # again, if another process took the new directory for one that was left
        folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        folder.mkdir()
        descriptor = _open_locked(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def remove_temporaries(folder: Path, name: str | None = None) -> None:
    """Removes what killed processes have left of an output of this name, or of any name, in a folder."""
    pattern = "*" if name is None else glob.escape(name)
    for left in folder.glob(f".{pattern}.{'[0-9a-f]' * 8}.tmp"):
        if left.is_symlink() or not left.is_dir():
            continue
        descriptor = _open_locked(left, needed=True)
        if descriptor is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(descriptor)


@contextmanager
def locked_directory(folder: Path, output: Path, *, elsewhere: str = ANOTHER_NAME) -> Iterator[None]:
    """The folder, made if it is not there, for this process alone; if it is empty at the end, it is removed.

    Args:
        folder: that is locked.
        output: what is made with it, for the errors.
        elsewhere: what else their hints say.

    Raises:
        OutputExists: if the name is taken by something else than a directory; a link to one is something else.
        LoracatError: if another process has it, which is then writing `output`.
    """
    with translate_disk_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = _open_locked(folder)
        except OSError:
            if not os.path.lexists(folder) or (folder.is_dir() and not folder.is_symlink()):
                raise
            kind = "a symbolic link" if folder.is_symlink() else "not a directory"
            raise OutputExists(
                f"{folder}, where {output} would be made, is {kind}", hint=f"move it, or {elsewhere}"
            ) from None
    if descriptor is None:
        raise LoracatError(f"another process is writing {output}", hint=f"wait for it, or {elsewhere}")
    try:
        yield
    finally:
        with suppress(OSError):  # it is not empty, or has got another name
            folder.rmdir()
        os.close(descriptor)


def _open_locked(folder: Path, *, needed: bool = False) -> int | None:
    """The descriptor of a directory that is locked until it is closed; None if another process has it, or removed it.

    A file system without locks locks nothing: a descriptor all the same, or, if the lock is `needed`, None.

    Raises:
        OSError: if it is no directory itself: no link is followed.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.lstat(folder)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        if not needed:
            return descriptor
    os.close(descriptor)
    return None


def put_in_place(folder: Path, path: Path, *, replace: bool = True) -> None:
    """Gives a filled directory its name; what had the name before is moved aside, to `_aside`, and removed.

    Of two processes that replace one directory, each does so in its turn.

    Raises:
        OutputExists: if the name has been taken meanwhile; with `replace`, if it still changes after a second.
    """
    flush(folder)
    for _ in range(_TRIES if replace else 1):
        try:
            if replace and path.exists():
                os.rename(path, _aside(path))
            os.rename(folder, path)
            break
        except OSError as error:
            if error.errno not in _CHANGED:
                raise
        repair(path)
        time.sleep(0.01)
    else:
        raise OutputExists(f"another process has changed {path} meanwhile", hint="run the same command again")
    flush(path.parent)
    shutil.rmtree(_aside(path), ignore_errors=True)


def _holds_export(path: Path) -> bool:
    """Whether a directory holds an export and nothing else, or nothing at all."""
    names = {entry.name for entry in path.iterdir()}
    return not names or (CERTIFICATE_FILE in names and names <= EXPORTED_FILES)


def check_free(
    path: Path, *, force: bool, replaceable: Callable[[Path], bool] = _holds_export, noun: str = "an export"
) -> None:
    """Raises OutputExists, which says what is there, if `path` is taken and `force` is not set, or if it is something
    that --force should not remove: a directory that is not `replaceable`, which only `noun` of loracat is."""
    if not os.path.lexists(path):
        return
    if path.name in ("", ".."):
        raise OutputExists(f"{path} is a directory that cannot be replaced", hint=ANOTHER_NAME)
    with suppress(FileNotFoundError):  # another process has just moved it away
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise OutputExists(f"{path} exists and is not a directory", hint=ANOTHER_NAME)
        if not replaceable(path):
            raise OutputExists(
                f"{path} exists and is a directory that holds something else than {noun} of loracat, which is never "
                "replaced",
                hint=ANOTHER_NAME,
            )
        if not force:
            what = f"holds {noun} of loracat" if any(path.iterdir()) else "is an empty directory"
            raise OutputExists(f"{path} exists and {what}", hint=OR_FORCE)


@contextmanager
def told_in_dry_run(dry_run: bool, what: str, progress: Progress) -> Iterator[None]:
    """Where nothing is written an output that is in the way is only told of: `what` would be refused."""
    try:
        yield
    except OutputExists as error:
        if not dry_run:
            raise
        progress.warn(f"{error}: {what} itself would be refused; {error.hint}")


def write_file(path: Path, data: bytes) -> None:
    """Writes a new file with the mode that the umask gives, and flushes it to the disk."""
    with _new_file(path) as file:
        file.write(data)


def copy_file(source: Path, path: Path) -> str:
    """Writes a new file as `write_file` does, with the bytes of a regular one, block by block; their sha256."""
    digest = hashlib.sha256()
    with open_regular(source) as file, _new_file(path) as copy:
        while block := file.read(_BLOCK):
            copy.write(block)
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _new_file(path: Path) -> Iterator[BufferedWriter]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with open(descriptor, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def flush(path: Path) -> None:
    """Flushes a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def translate_disk_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system says about `path` into our errors."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise OutOfResources(
                f"no space left to write {path}", hint="free some space and run the same command again"
            ) from None
        reason = f"{error.filename} is not a directory" if isinstance(error, FileExistsError) else error.strerror
        raise LoracatError(f"{path} cannot be written: {reason}") from None


def repair(path: Path) -> None:
    """Finishes a replacement that was cut short: what was moved aside comes back if nothing took its place."""
    old = _aside(path)
    try:
        if old.exists() and not os.path.lexists(path):
            os.rename(old, path)
        elif old.exists():
            shutil.rmtree(old)
    except OSError as error:  # another process has been faster, at the one or the other
        if error.errno not in _CHANGED:
            raise


def _aside(path: Path) -> Path:
    """Where a replaced directory is until it is removed: a name that nobody else gives, for what has it is removed."""
    return path.with_name(f".{path.name}.loracat-old")
