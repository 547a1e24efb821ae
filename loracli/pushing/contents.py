"""What of a directory is uploaded: the files of its export, by name, and nothing else that lies beside them.

A file goes up only if the record names it, if it is a regular file, and if no text in it leads to this machine. Sizes
and digests are taken here, once; what is uploaded later has to have them.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracli.adapters.claims import read_front_matter
from loracli.composition.card import RECORD_DIGEST
from loracli.errors import InputError, IntegrityError
from loracli.fusing.workplace import FUSE_CERTIFICATE
from loracli.hub.references import is_hub_id
from loracli.hub.source import Listed
from loracli.recipe.recipe import decode_recipe
from loracli.system.files import CERTIFICATE_FILE, CONFIG_FILE, README_FILE, open_regular
from loracli.system.strict_json import read_object
from loracli.verifying.verify import MAX_RECORD_BYTES

_TEXT_FILES = (README_FILE, CONFIG_FILE, CERTIFICATE_FILE)
_BLOCK = 1 << 20
_ABSOLUTE = re.compile(r"/|~[/\\]|[A-Za-z]:[/\\]|\\\\")


@dataclass(frozen=True)
class LocalFile:
    """A file to upload.

    Args:
        name: in the directory, and in the repository.
        path: of it.
        size_bytes: of it.
        sha256: the Hub's digest of a large file.
        git_sha1: git's hash of the blob, the Hub's digest of any other.
    """

    name: str
    path: Path
    size_bytes: int
    sha256: str
    git_sha1: str

    def is_listed_as(self, listed: Listed | None) -> bool:
        """Whether the Hub lists these bytes."""
        return listed is not None and listed.digest in (self.sha256, self.git_sha1)


@dataclass(frozen=True)
class Contents:
    """What a directory has to upload.

    Args:
        files: to upload, sorted by name.
        left_out: names of everything else in the directory.
        base_id: the base model that the record names.
        licence: whether the card states one.
        weights_edited: whether they are others than a fit found, as the recipe in the record tells.
    """

    files: tuple[LocalFile, ...]
    left_out: tuple[str, ...]
    base_id: str
    licence: bool
    weights_edited: bool


def refuse_model(directory: Path) -> None:
    """Raises InputError for what `loracat fuse` wrote."""
    if (directory / FUSE_CERTIFICATE).is_file():
        raise InputError(
            f"{directory} is a fused model, and only adapters are pushed", hint="upload it with `hf upload`"
        )


def read_contents(directory: Path, *, secrets: tuple[str, ...] = (), edited_card: bool = False) -> Contents:
    """Looks through the directory of an export that has been verified.

    Args:
        directory: that `export_adapter` wrote.
        edited_card: whether the card may be another than the record has the hash of.
        secrets: text that must not be in any file that people read, such as the token.
    Raises:
        InputError: if it is no export, a file of it is missing or a symbolic link, its base has no name on a Hub, or a
            text in it leads to this machine; or its record lacks the hashes that tell of a change.
        MalformedAdapter: if the card's metadata cannot be read.
        IntegrityError: if a file has changed since it was verified.
    """
    record = _read_json(directory / CERTIFICATE_FILE)
    recorded: dict[str, str] = record["certificate"]["sha256"]
    texts: dict[str, str] = record.get("text_sha256", {})
    if RECORD_DIGEST not in record or not texts:
        raise InputError(
            f"{CERTIFICATE_FILE} has no hashes of itself and of {README_FILE}, so a change of them cannot be told",
            where=str(directory),
            hint="export it again; versions of loracat before this one wrote none",
        )
    names = _names(directory, recorded)
    base_id = str(record.get("recipe", record)["base"]["id"])
    if not is_hub_id(base_id):
        raise no_hub_base(base_id, directory)
    for name in _TEXT_FILES:
        _check_text(directory / name, secrets)
    _check_values(directory / CONFIG_FILE, _read_json(directory / CONFIG_FILE))
    _check_values(directory / CERTIFICATE_FILE, record)
    card = read_front_matter(directory / README_FILE)
    _check_card(directory, base_id, card)
    files = tuple(_measure(directory, name) for name in names)
    verified = {**texts, **recorded}
    if edited_card:
        verified.pop(README_FILE, None)
    changed = [file.name for file in files if verified.get(file.name, file.sha256) != file.sha256]
    if changed:
        raise IntegrityError(f"{changed[0]} has changed since it was verified", where=str(directory))
    left_out = tuple(sorted(entry.name for entry in directory.iterdir() if entry.name not in names))
    edited = "recipe" in record and decode_recipe(record["recipe"], "its recipe", Path()).mixing.edited
    return Contents(files, left_out, base_id, "license" in card, edited)


def no_hub_base(base_id: str, directory: Path) -> InputError:
    """The error for an adapter whose base nobody else could find."""
    return InputError(
        f"its base model {base_id!r} is not a repository on the Hub, so nobody could use the adapter",
        where=str(directory),
        hint="make it again with the base's Hub id: `loracat fit --base org/name`, or with `loracat export --method "
        "NAME --base org/name`",
    )


def _names(directory: Path, recorded: Iterable[str]) -> tuple[str, ...]:
    """The files of the export, sorted: those that every export has, and those that the record has hashes of."""
    names = tuple(sorted({*_TEXT_FILES, *recorded}))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise InputError(f"{directory} lacks {', '.join(missing)}", hint="export it again")
    for name in names:
        if (directory / name).is_symlink():
            raise InputError(
                f"{name} is a symbolic link, and what it leads to is not uploaded",
                where=str(directory),
                hint="put the file itself there, or export it again",
            )
    return names


def _read_json(path: Path) -> Any:
    """A document that the verification has read already."""
    return read_object(path, MAX_RECORD_BYTES)


def _check_text(path: Path, secrets: tuple[str, ...]) -> None:
    """Refuses a text with a secret, or with a path of the places that a command is typed in."""
    with open_regular(path) as file:
        text = file.read().decode("utf-8", errors="replace")
    # As a word of its own: a mistyped token can be so short that it stands in a hash.
    if any(re.search(rf"(?<![0-9A-Za-z]){re.escape(secret)}(?![0-9A-Za-z])", text) for secret in secrets):
        raise InputError(f"{path.name} holds the token", where=str(path), hint="take it out, and revoke that token")
    for place in (path.parent.resolve().parent, Path.cwd(), Path(os.path.expanduser("~"))):
        named = rf"(?:(?<![\w./-])|(?<=://)){re.escape(str(place))}(?![\w-])"
        if place.is_absolute() and place != Path(place.anchor) and re.search(named, text):
            what = f"{path.name} holds the path {place} of this machine"
            raise InputError(what, where=str(path), hint="take it out, or export it again")


def _check_values(path: Path, document: Any) -> None:
    """Refuses a JSON document with an absolute path in it."""
    found = next((text for text in _strings(document) if _ABSOLUTE.match(text)), None)
    if found is not None:
        raise InputError(
            f"{path.name} holds the path {found}, which is somebody's machine's",
            where=str(path),
            hint="export it again; of a base that is a directory, give the Hub id with --base org/name",
        )


def _strings(document: Any) -> Iterator[str]:
    """Every text that is a value in it."""
    rest = [document]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, (dict, list)):
            rest.extend(value.values() if isinstance(value, dict) else value)


def _check_card(directory: Path, base_id: str, card: dict[Any, Any]) -> None:
    named = card.get("base_model")
    if named not in (base_id, [base_id]):
        shown = repr(named) if isinstance(named, str) else "no single name"  # aliases can make a list endless
        raise InputError(
            f"the card's base_model is {shown}, and the record names {base_id!r}",
            where=str(directory / README_FILE),
            hint="the Hub shows an adapter beside the base that its card names: put it right, or export again",
        )


def _measure(directory: Path, name: str) -> LocalFile:
    path = directory / name
    with open_regular(path) as file:
        size = path.stat().st_size
        sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        while block := file.read(_BLOCK):
            sha256.update(block)
            blob.update(block)
    return LocalFile(name, path, size, sha256.hexdigest(), blob.hexdigest())
