"""What an adapter and a base model are called, before anything is looked up, and where it would be.

How an adapter is named: `org/name`, `org/name@rev`, `hf://org/name@rev/sub/folder`, or a local directory.

Parsing looks at the disk, never at the network: a directory that holds `adapter_config.json` wins over a Hub id of the
same spelling, and the reference remembers that it did (`shadows_hub`). One that holds several adapters or a whole model
is refused, and not looked for on the Hub.

A claim is the name of a repository on the Hub or nothing. It is never looked for on the disk, where a folder of that
name may have come along with the adapter; a directory is what a user names with `--base`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from urllib.parse import unquote

from loracli.errors import AdapterNotFound, IncompatibleAdapters, UsageError
from loracli.system.files import CONFIG_FILE
from loracli.system.near import hints, holding, near_path

# How an adapter or a base model is named: text in one of the forms above, or the path of a local directory.
Named = str | os.PathLike[str]

URI_PREFIX = "hf://"
_FORMS = (
    f"write org/name, org/name@revision, hf://org/name@revision/sub/folder, or a directory that holds {CONFIG_FILE}"
)

WHOLE_MODEL = (
    "it looks like a whole model, which is named with --base; an adapter is what PEFT's save_pretrained writes before "
    "merge_and_unload"
)

_NAME = r"\w(?:[\w.-]{0,94}\w)?"
_RULES = r"(?!.*(?:--|\.\.))(?!.*\.git$)"
REPO_ID = re.compile(rf"{_RULES}{_NAME}/{_NAME}", re.ASCII)
_HUB_ID = re.compile(rf"{_RULES}(?:{_NAME}/)?{_NAME}", re.ASCII)
# What git forbids in a name, and what could leave the folder that a cache keeps it in.
_BAD_REVISION = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|//|^[/.-]|[/.]$")
_SPECIAL_REF = re.compile(r"refs/(?:pr/\d+|convert/\w+)(?=/|$)")
_OTHER_KINDS = ("datasets", "spaces", "kernels", "buckets")


@dataclass(frozen=True)
class Reference:
    """One adapter as it was named: a local directory or a Hub repository, exactly one of the two.

    Attributes:
        text: the reference as it was typed.
        path: the local directory.
        repo_id: the Hub repository, `org/name`.
        revision: branch, tag or commit on the Hub; None for its default branch.
        subfolder: folder inside the Hub repository; None for its top level.
        shadows_hub: the local directory is also spelt like a Hub id, so a reader may have meant the other.
    """

    text: str
    path: Path | None = None
    repo_id: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    shadows_hub: bool = False

    def __post_init__(self) -> None:
        if (self.path is None) == (self.repo_id is None):
            raise ValueError("a reference is either a local path or a Hub repository")

    @property
    def label(self) -> str:
        """What it goes by where there is little room: a local directory by its last name."""
        return self.text if self.path is None else self.path.name or self.text


def parse_reference(text: Named, *, revision: str | None = None) -> Reference:
    """Reads one reference.

    Args:
        text: any of the forms above. Text that starts with `.`, `/` or `~` is always a local directory, and so is a
            path.
        revision: branch, tag or commit for a Hub reference that names none itself.
    Raises:
        AdapterNotFound: the text is neither a directory that holds an adapter nor a well-formed Hub reference.
        UsageError: `revision` was given for a local directory, or is no revision that git could have.
    """
    if revision is not None and not is_revision(revision):
        raise UsageError(f"'{revision}' cannot be a branch, tag or commit")
    is_path, text = not isinstance(text, str), os.fspath(text)
    if not text.strip():
        raise AdapterNotFound("an adapter reference is empty", hint=_FORMS)
    if not text.isascii() and text != os.fsencode(text).decode(errors="replace"):
        raise UsageError(f"the name {text!r} is not UTF-8, as a recipe and a record are", hint="rename the directory")
    if text.startswith(URI_PREFIX) and not is_path:
        return _parse_uri(text, revision)
    if is_path or text.startswith((".", "/", "~")) or _holds_adapter(text):
        return _parse_local(text, revision)
    repo_id, at, own_revision = text.partition("@")
    if text.endswith(".jsonl") or not REPO_ID.fullmatch(repo_id) or os.path.isfile(text) or _meant(text):
        _refuse(text)
    if at and not is_revision(own_revision):
        raise AdapterNotFound(f"'{own_revision}' cannot be a branch, tag or commit", where=text, hint=_FORMS)
    return Reference(text, repo_id=repo_id, revision=own_revision or revision)


def _parse_local(text: str, revision: str | None) -> Reference:
    if not _holds_adapter(text):
        _refuse(text)
    shadows_hub = REPO_ID.fullmatch(text) is not None
    if revision is not None:
        way_out = f"{URI_PREFIX}{text}@{revision}" if shadows_hub else f"org/name@{revision}"
        raise UsageError(
            "a local directory has no revision", where=text, hint=f"name the Hub repository itself: {way_out}"
        )
    return Reference(text, path=Path(os.path.expanduser(text)), shadows_hub=shadows_hub)


def _parse_uri(text: str, revision: str | None) -> Reference:
    """`hf://[models/]org/name[@revision][/sub/folder]`, as huggingface_hub's own URIs."""
    body = text.removeprefix(URI_PREFIX).removeprefix("models/").rstrip("/")
    org, _, rest = body.partition("/")
    if org in _OTHER_KINDS:
        raise AdapterNotFound(f"an adapter is a model repository, not one of {org}", where=text, hint=_FORMS)
    head, _, tail = rest.partition("/")
    name, at, own_revision = head.partition("@")
    if at and (special := _SPECIAL_REF.match(rest.partition("@")[2])):  # the one kind of revision that holds slashes
        own_revision = special.group()
        tail = rest.partition("@")[2][special.end() + 1 :]
    own_revision = unquote(own_revision)
    if not REPO_ID.fullmatch(f"{org}/{name}") or (at and not is_revision(own_revision)):
        raise AdapterNotFound("not a reference to a Hub repository", where=text, hint=_FORMS)
    if tail and not is_folder(tail):
        raise AdapterNotFound(f"'{tail}' cannot be a folder of a repository", where=text, hint=_FORMS)
    return Reference(text, repo_id=f"{org}/{name}", revision=own_revision or revision, subfolder=tail or None)


def _refuse(text: str) -> NoReturn:
    """Says why `text` is no reference, as precisely as the disk allows."""
    path = os.path.expanduser(text)
    if text.endswith(".jsonl"):
        hint = f"a command that takes data takes them with --data; for an adapter {_FORMS}"
        raise AdapterNotFound("a data file is not an adapter", where=text, hint=hint)
    if os.path.isdir(path):
        hint = _meant(path) or _FORMS
        if is_repo_id(text):
            hint += f"; {URI_PREFIX}{text} is the Hub's"
        raise AdapterNotFound(f"the directory holds no {CONFIG_FILE}", where=text, hint=hint)
    if os.path.isfile(path):
        raise AdapterNotFound(
            "a file is not an adapter", where=text, hint=f"name the directory that holds {CONFIG_FILE}"
        )
    several = [part for part in re.split(r"[,\s]+", text) if part]
    if len(several) > 1 and ("," in text or all(map(_holds_adapter, several))):
        spaced = f"separate adapters by spaces, without quotes: {' '.join(several)}"
        raise AdapterNotFound("one name holds several adapters", where=text, hint=spaced)
    near = hints(near_adapter(text), _FORMS)
    if text.startswith((".", "/", "~")):
        raise AdapterNotFound("no such directory", where=text, hint=near)
    raise AdapterNotFound("neither a local directory nor a Hub repository's name", where=text, hint=near)


def near_adapter(text: str) -> str | None:
    """Asks for an adapter's directory here that is called nearly so; None without one."""
    return near_path(text, holding(CONFIG_FILE))


def _meant(path: str) -> str | None:
    """What a directory without an adapter of its own holds in its place: adapters one level down, as a trainer's output
    has them in `checkpoint-*` folders, or a whole model; None for neither."""
    try:
        inside = sorted(name for name in os.listdir(path) if _holds_adapter(os.path.join(path, name)))
    except OSError:
        inside = []
    if inside:
        inside.sort(key=lambda name: [int(p) if i % 2 else p for i, p in enumerate(re.split("([0-9]+)", name))])
        return f"it has adapters inside: {', '.join(os.path.join(path, name) for name in inside[:5])}"
    return whole_model_hint(path)


def whole_model_hint(path: str | Path) -> str | None:
    """What to do with a whole model where an adapter or a recipe is read; None for a directory that is none."""
    return WHOLE_MODEL if os.path.isfile(os.path.join(path, "config.json")) and not _holds_adapter(str(path)) else None


def _holds_adapter(text: str) -> bool:
    return os.path.isfile(os.path.join(os.path.expanduser(text), CONFIG_FILE))


def is_repo_id(text: str) -> bool:
    """Whether `text` could name a repository on the Hub, `org/name`."""
    return REPO_ID.fullmatch(text) is not None


def is_hub_id(text: str) -> bool:
    """Whether `text` could name a model on the Hub: `org/name`, or one of the old ones without an organisation."""
    return _HUB_ID.fullmatch(text) is not None


def is_revision(text: str) -> bool:
    """Whether `text` could name a branch, tag or commit; if so it is also harmless as a path inside a cache."""
    return bool(text) and text.isprintable() and _BAD_REVISION.search(text) is None


def is_folder(text: str) -> bool:
    """Whether `text` could name a folder inside a repository."""
    parts = text.split("/")
    return "\\" not in text and text.isprintable() and all(part not in ("", ".", "..") for part in parts)


@dataclass(frozen=True)
class BaseClaim:
    """What an adapter's config, a recipe or a record names; None for what it does not name."""

    base_model: str | None
    revision: str | None


def distinct_bases(names: Iterable[str | None]) -> tuple[str, ...]:
    """The base models that are named, each as it is spelt first: the Hub takes a name in any capitals, a path may be
    another in others."""
    first: dict[str, str] = {}
    for name in names:
        if name:
            first.setdefault(name.lower() if is_hub_id(name) else name, name)
    return tuple(first.values())


def agreed_base(claims: Mapping[str, BaseClaim], *, way_out: str) -> BaseClaim:
    """The one base model, and revision if any, that all adapters which name one agree on, as the first spells it.

    Args:
        claims: by the adapter's reference.
        way_out: what the user can do, for the error.
    Raises:
        IncompatibleAdapters: if they name different models or revisions, none, or what is no name on the Hub.
    """
    named = {text: claim for text, claim in claims.items() if claim.base_model}
    models = distinct_bases(claim.base_model for claim in named.values())
    revisions = {claim.revision for claim in named.values() if claim.revision}
    if not models:
        raise IncompatibleAdapters("no adapter names its base model", hint=way_out)
    if len(models) > 1 or len(revisions) > 1:
        said = ", ".join(
            f"{text} names {'@'.join(filter(None, (claim.base_model, claim.revision)))}"
            for text, claim in named.items()
        )
        raise IncompatibleAdapters(f"the adapters name different base models: {said}", hint=way_out)
    claim = BaseClaim(models[0], next(iter(revisions), None))
    if (reason := not_on_the_hub(claim)) is not None:
        raise IncompatibleAdapters(f"the adapters name {reason}", hint=way_out)
    return claim


def not_on_the_hub(claim: BaseClaim) -> str | None:
    """What a claim names that no repository on the Hub goes by; None if one could."""
    if claim.base_model is None or not is_hub_id(claim.base_model):
        return f"the base model {claim.base_model}, which is not a name on the Hub"
    if claim.revision is not None and not is_revision(claim.revision):
        return f"the revision {claim.revision} of the base model, which cannot be a branch, tag or commit"
    return None


@dataclass(frozen=True)
class Surroundings:
    """What is asked and what is kept.

    Args:
        endpoint: the address of the Hub or of a mirror.
        cache: the directory of downloads, which other tools share.
        offline: whether nothing is asked at all.
    """

    endpoint: str
    cache: Path
    offline: bool


def surroundings() -> Surroundings:
    """As huggingface_hub reads them. It is imported here and not above: completion asks at a keystroke."""
    from huggingface_hub import constants

    return Surroundings(constants.ENDPOINT, Path(constants.HF_HUB_CACHE), bool(constants.HF_HUB_OFFLINE))
