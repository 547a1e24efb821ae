"""Safetensors of an adapter whose weights are only in `adapter_model.bin`, a pickle file.

The file is opened by another process (conversion/unpickle.py), with limits on its memory, its time and what it writes,
without the token, and this one believes nothing of what comes back: the safetensors file that it leaves is checked as
any stranger's is, together with the config.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import torch

from loracli._version import __version__
from loracli.adapters.adapter import LoraAdapter, open_adapter
from loracli.adapters.config import MAX_CONFIG_BYTES, read_config
from loracli.conversion.read import read_trained
from loracli.conversion.unpickle import MOST_WORDS, NO_ROOM, REFUSED
from loracli.errors import InputError, IntegrityError, MalformedAdapter
from loracli.hub.fetch import Fetched, fetch_adapter
from loracli.hub.references import Named
from loracli.progress import SILENT, Bar, Progress, amount_text, begun, drawn, takes_bar
from loracli.system.display import count_text, path_text, repr_line
from loracli.system.files import (
    CERTIFICATE_FILE,
    CONFIG_FILE,
    PICKLE_FILE,
    TENSOR_FILE,
    check_free,
    file_sha256,
    flush,
    open_regular,
    whole_directory,
    write_file,
)

_TASK = "unpickle"
# What opening a file of `size` bytes may take, in all: a view can repeat numbers, as two tied matrices do.
_MOST_DATA = 4  # times its size, in all tensors
_MORE_DATA = 1 << 20
_MOST_MEMORY = 3  # times its size: mapped or read, and one tensor beside
_MORE_MEMORY = 1 << 30
_SECONDS = 60  # of processor time, and one for each
_BYTES_PER_SECOND = 10 << 20
_WAIT = 4  # seconds by the clock for each of them: other work may be on the machine
_KEPT = ("PATH", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TMPDIR", "HOME", "LANG", "LC_ALL")
_HINT = "ask its author for safetensors"


@dataclass(frozen=True)
class Unpickled:
    """What was written.

    Args:
        path: the directory.
        adapter: as it was read there.
        size_bytes: of the tensor file.
        pickle_sha256: of the file that they come from.
        needs_conversion: whether it is an adapter that only `loracat convert` takes, such as DoRA.
    """

    path: Path
    adapter: LoraAdapter = field(repr=False)
    size_bytes: int
    pickle_sha256: str
    needs_conversion: bool

    def __repr__(self) -> str:
        modules = count_text(len(self.adapter.targets), "module")
        unfinished = "to be converted" if self.needs_conversion else ""
        return repr_line(self, path_text(self.path), modules, amount_text(self.size_bytes, "B"), unfinished)


@takes_bar
def convert_pickle(
    adapter: Named, output: str | Path, *, force: bool = False, progress: Progress | Bar = SILENT
) -> Unpickled:
    """Writes config and tensors of an adapter that has only `adapter_model.bin` as a directory with safetensors.

    The tensors keep their names, dtypes and values, and the config its bytes.

    Args:
        adapter: a reference or a directory.
        output: the directory to make.
        force: replace an existing adapter directory.
        progress: told how far it is.
    Raises:
        OutputExists: if `output` is taken, before any work.
        UsageError: if the adapter has safetensors already.
        MalformedAdapter: if the file is no pickle of tensors alone, or takes more than its size explains.
        InputError: of the kind that fits, if the adapter is rejected for another reason.
        IntegrityError: if the file changes meanwhile.
    """
    progress = drawn(progress)
    check_free(Path(output), force=force)
    fetched = fetch_adapter(adapter, from_pickle=True, progress=progress)
    source = fetched.path / PICKLE_FILE
    read_config(fetched.path / CONFIG_FILE, convertible=True)
    with open_regular(fetched.path / CONFIG_FILE) as file:
        config = file.read(MAX_CONFIG_BYTES)
    with open_regular(source) as file:
        size = os.fstat(file.fileno()).st_size
    digest = file_sha256(source)
    with begun(progress, _TASK, None, "B"), whole_directory(Path(output), force=force) as folder:
        target = folder / TENSOR_FILE
        _unpickle(source, target, size)
        if file_sha256(source) != digest:
            raise IntegrityError("has changed since it was opened", where=str(source), hint="run it again")
        write_file(folder / CONFIG_FILE, config)
        written, needs_conversion = _checked(fetched, folder, source)
        flush(target)
        write_file(folder / CERTIFICATE_FILE, _record(fetched, written, digest))
        size_bytes = target.stat().st_size
    return Unpickled(Path(output), written, size_bytes, digest, needs_conversion)


def _unpickle(source: Path, target: Path, size: int) -> None:
    """Runs the other process, and says why it failed.

    Raises:
        MalformedAdapter: if it refuses the file, or does not end well.
    """
    seconds = _SECONDS + size // _BYTES_PER_SECOND
    limits = {
        "memory": _MOST_MEMORY * size + _MORE_MEMORY,
        "seconds": seconds,
        "data": _MOST_DATA * size + _MORE_DATA,
    }
    words = [sys.executable, "-P", "-m", "loracli.conversion.unpickle"]
    words += [str(source.resolve()), str(target.resolve()), json.dumps(limits)]
    with TemporaryFile() as said:
        code = _run(words, said, _WAIT * seconds)
        if code == 0 and [entry.name for entry in target.parent.iterdir()] == [target.name]:
            return
        if code == NO_ROOM:
            raise OSError(errno.ENOSPC, "no space left")
        reason = _reason(said) if code == REFUSED else None
    raise MalformedAdapter(
        reason or "opening it took more time or memory than its size explains, or ended the process that did it",
        where=str(source),
        hint=_HINT,
    )


def _run(words: list[str], said: IO[bytes], seconds: float) -> int | None:
    """The exit code of a process; None if it has to be killed for the time it takes.

    It has no token, no terminal, and no thread beside its own. `said` is a file and no pipe, so that it cannot send
    more than a limit lets it write.
    """
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    kept |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
    kept |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=said,
        stderr=subprocess.DEVNULL,
        env=kept,
        start_new_session=True,  # Ctrl-C is for this process, which ends that one
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        process.kill()
        process.wait()


def _reason(said: IO[bytes]) -> str | None:
    """The one line that the process wrote, if it is one."""
    said.seek(0)
    try:
        text: Any = json.loads(said.read(16 * MOST_WORDS))
    except ValueError:
        return None
    return text[:MOST_WORDS] if isinstance(text, str) else None


def _checked(fetched: Fetched, folder: Path, source: Path) -> tuple[LoraAdapter, bool]:
    """What was written, read as any adapter, and whether only a conversion reads it; errors name the pickle file."""
    config = read_config(folder / CONFIG_FILE, convertible=True)
    needs_conversion = config.use_dora or config.initialisation is not None
    copied = replace(fetched, path=folder)
    try:
        written = read_trained(copied)[0] if needs_conversion else open_adapter(copied)
    except InputError as error:
        if error.where is not None and error.where.startswith(str(folder)):
            error.where = str(source)
        raise
    return written, needs_conversion


def _record(fetched: Fetched, written: LoraAdapter, digest: str) -> bytes:
    """`loracat.json`: where the tensors come from; no path of this machine."""
    reference = fetched.reference
    document = {
        "conversion": {"from": PICKLE_FILE, "sha256": digest},
        "origin": {"repo_id": reference.repo_id, "subfolder": reference.subfolder, "commit": fetched.commit},
        "certificate": {"sha256": dict(written.sha256)},
        "versions": {"loracat": __version__, "torch": torch.__version__},
    }
    return (json.dumps(document, indent=2) + "\n").encode()
