"""Where a fused model is made, so that it appears whole or not at all and nothing is lost when the work is stopped; and
which files of the base come along.

    .NAME.fusing/        beside the output: its files as they are finished, and becomes the output by rename
    .NAME.fusing.json    what it is made of, and the sha256 of each finished file and of the base's file it came from

A file enters the second only when it is on the disk. One that a resumed run takes over is hashed again first.

What comes along of the base beside its weights: every file as it is, except weights in other formats, adapters, and
the card; and the two that the fusion itself may change, the config and the index of the shards.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from loracli.errors import (
    BaseModelMismatch,
    InputError,
    LoracatError,
    OutOfResources,
    OutputExists,
    StateMismatch,
    UsageError,
)
from loracli.fusing.plan import FusionPlan
from loracli.fusing.quantised import Quantisation
from loracli.fusing.stream import Hashes
from loracli.model.checkpoint import INDEX_FILE, Checkpoint
from loracli.progress import Progress, amount_text
from loracli.system.document import dtype_name
from loracli.system.files import (
    ANOTHER_NAME,
    check_free,
    file_sha256,
    flush,
    holds,
    locked_directory,
    put_in_place,
    repair,
    translate_disk_errors,
    write_atomically,
)
from loracli.system.strict_json import read_object

FUSE_CERTIFICATE = "loracat-fuse.json"
_MAX_STATE_BYTES = 64 << 20  # of that, and of what is known of an interrupted fusion


def _holds_fused_model(path: Path) -> bool:
    """Whether a directory holds what its certificate lists and nothing else, or nothing at all."""
    names = {entry.name for entry in path.iterdir()}
    if not names:
        return True
    try:
        listed = read_object(path / FUSE_CERTIFICATE, _MAX_STATE_BYTES)["certificate"]["files"]
    except (LoracatError, KeyError, TypeError):
        return False
    return isinstance(listed, dict) and names <= {*listed, FUSE_CERTIFICATE}


def check_model_free(output: Path, *, force: bool) -> None:
    """Raises OutputExists if the output is taken, or is no fused model that --force could replace."""
    check_free(output, force=force, replaceable=_holds_fused_model, noun="a fused model")


class Workplace:
    """The folder of one fusion. Made by `open_workplace`."""

    def __init__(self, output: Path, identity: Mapping[str, str], *, force: bool) -> None:
        self.output, self._force = output, force
        self.folder = output.with_name(f".{output.name}.fusing")
        self._state = output.with_name(f".{output.name}.fusing.json")
        self._identity = dict(identity)
        self._finished: dict[str, Any] = {}

    @property
    def begun(self) -> bool:
        """Whether any file is finished, so that there is something to lose."""
        return bool(self._finished)

    def finished(self, name: str, base: Path) -> Hashes | None:
        """The hashes of a file that an earlier run finished, None unless it and the base's file still have them."""
        known = self._finished.get(name)
        path = self.folder / name
        if not isinstance(known, dict) or path.is_symlink() or not path.is_file():
            return None
        found = Hashes(base=file_sha256(base), fused=file_sha256(path))
        return found if asdict(found) == known else None

    def finish(self, name: str, hashes: Hashes) -> None:
        """A file is complete and on the disk."""
        flush(self.folder)
        self._finished[name] = asdict(hashes)
        self._write_state()

    def done(self) -> bool:
        """Whether an earlier run was stopped after its last step, with the output in place."""
        known = self._finished.get(FUSE_CERTIFICATE)
        path = self.output / FUSE_CERTIFICATE
        return isinstance(known, str) and path.is_file() and file_sha256(path) == known

    def complete(self, certificate_sha256: str) -> None:
        """Everything is in the folder: it becomes the output.

        Raises:
            OutputExists: if the output has been taken meanwhile.
        """
        check_model_free(self.output, force=self._force)
        self._finished[FUSE_CERTIFICATE] = certificate_sha256
        self._write_state()
        put_in_place(self.folder, self.output, replace=self._force)
        self.drop()

    def drop(self) -> None:
        """Removes what is left of this fusion."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._state.unlink(missing_ok=True)  # last: without it the folder would be taken for somebody else's

    def load(self, *, resume: bool, progress: Progress) -> None:
        """Takes over what an earlier run left, or drops it.

        Raises:
            OutputExists: if the folder holds something and no state of ours is beside it.
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
        if found is None and any(self.folder.iterdir()):
            raise OutputExists(
                f"{self.folder} is in the way: it holds something, and {self._state.name} beside it does not say "
                "that it is an interrupted fusion",
                hint=f"move it, or {ANOTHER_NAME}",
            )
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
                hint="free some space, or name a directory on another disk",
            )

    def _read_state(self) -> dict[str, Any] | None:
        try:
            fields = read_object(self._state, _MAX_STATE_BYTES)
        except LoracatError:
            return None
        return fields if all(isinstance(fields.get(name), dict) for name in ("identity", "finished")) else None

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
    place = Workplace(output, identity, force=force)
    with translate_disk_errors(output), locked_directory(place.folder, output):
        repair(output)
        place.load(resume=resume, progress=progress)
        try:
            if not place.done():
                check_model_free(output, force=force)
            yield place
        except (InputError, UsageError, KeyboardInterrupt, SystemExit) as error:
            if isinstance(error, (InputError, UsageError)) and not (isinstance(error, OutputExists) and place.begun):
                place.drop()  # the same would happen again
            else:
                error.add_note(f"what is done is kept in {place.folder}: --resume goes on from there")
                progress.warn(error.__notes__[-1])
            raise
        finally:
            repair(output)


CONFIG = "config.json"
_MAX_CONFIG_BYTES = 16 << 20

_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|pkl|pickle|ckpt|gguf|ggml|h5|msgpack|npz|onnx|onnx_data|tflite|ot|mlmodel)"
    r"|.*\.index\.json|adapter_config\.json",
    re.IGNORECASE,
)
_OURS = frozenset({"README.md", "loracat.json", FUSE_CERTIFICATE, CONFIG, INDEX_FILE})
_FOLDED = frozenset(name.casefold() for name in _OURS)


def other_files(checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """Names of the files that come along, and of what is left behind, both sorted; hidden files are neither.

    A link comes along where it leads within the directory or, in the Hub's cache, to a blob of the repository or of the
    store that repositories share; any other could lead to what is no part of the base.
    """
    folder = checkpoint.folder.resolve()
    repositories = [above.parent for above in folder.parents if above.name == "snapshots"]
    homes = [folder, *(place / "blobs" for repository in repositories for place in (repository, repository.parent))]
    taken: list[str] = []
    left: list[str] = []
    for entry in sorted(checkpoint.folder.iterdir()):
        name = entry.name
        if name.startswith(".") or name in _OURS or name in checkpoint.shards:
            continue
        ours = name.casefold() in _FOLDED  # where case does not count, it would be the same file
        own = entry.is_file() and any(holds(home, entry) for home in homes)
        (taken if own and not ours and not _WEIGHTS.fullmatch(name) else left).append(name)
    return taken, left


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of the base's config.

    Raises:
        BaseModelMismatch: if it is damaged.
    """
    path = folder / CONFIG
    return read_object(
        path,
        _MAX_CONFIG_BYTES,
        lambda reason: BaseModelMismatch(f"the base model's config cannot be read: {reason}", where=str(path)),
    )


def config_bytes(
    folder: Path, *, untied: bool, dtype: torch.dtype | None, quantisation: Quantisation | None = None
) -> bytes:
    """The base's config: as it is, or saying that matrices are not tied, or that the weights have another dtype, and
    that they are quantised no longer."""
    if not untied and dtype is None:
        return (folder / CONFIG).read_bytes()
    fields = read_config(folder)
    if quantisation is not None:
        for key in ("quantization_config", "compression_config"):
            fields.pop(key, None)
    parts = [fields, *(value for key, value in fields.items() if key == "text_config" and isinstance(value, dict))]
    for part in parts:
        if untied and (part is fields or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
        if dtype is not None:
            _set_dtype(part, dtype_name(dtype))
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def _set_dtype(fields: dict[str, Any], name: str) -> None:
    """Under the key that is there; transformers 5 writes `dtype`, earlier ones `torch_dtype`."""
    for key in [key for key in ("dtype", "torch_dtype") if key in fields] or ["dtype"]:
        fields[key] = name


def index_bytes(checkpoint: Checkpoint, plan: FusionPlan) -> bytes | None:
    """The index of the shards: the base's own bytes where the names and sizes of tensors stay, None for one file."""
    if checkpoint.index is None:
        return None
    tensors = [tensor for shard in plan.shards for tensor in shard.tensors]
    if all(not tensor.added and tensor.size == tensor.source.size for tensor in tensors):
        return (checkpoint.folder / INDEX_FILE).read_bytes()
    names = {tensor.name: shard.name for shard in plan.shards for tensor in shard.tensors}
    content = {
        "metadata": {"total_size": sum(tensor.size for tensor in tensors)},
        "weight_map": dict(sorted(names.items())),
    }
    return (json.dumps(content, indent=2) + "\n").encode()
