"""All data of a fit: files, tokens, which records are held out, and the plan of micro-batches.

Held-out records are decided by their content and the seed, so that equal records never stand on both sides. Batches are
records sorted by length and packed under a token budget, so that little is padding.

Training scripts often save the tokenizer beside the adapter. Only the base model's is ever used, so where the two
differ, the adapter sees text in a form that it was not trained on. A download from the Hub leaves those files there,
so this is about local directories.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from loracli.calibration.records import (
    SHOWN_LINES,
    CalibrationFile,
    DataPaths,
    DataSource,
    Record,
    parse_sources,
    read_records,
)
from loracli.calibration.render import Example, RenderedFile, render_file
from loracli.calibration.shapes import SHAPES, Shape
from loracli.errors import CalibrationError, LoracatError, UsageError
from loracli.progress import SILENT, Progress
from loracli.recipe.record import FINGERPRINT, RecipeData
from loracli.system.display import count_text
from loracli.system.near import did_you_mean
from loracli.system.strict_json import read_object

MIN_HELD_OUT = 20  # below this, a paired interval says nothing
HOLDOUT = 0.2
_CROSSED_BELOW = round(MIN_HELD_OUT / HOLDOUT)  # records; from here on a fifth of them is enough to say something
_CROSSED_PARTS = 4


def _held_out_count(records: int, share: float) -> int:
    """`share` of the records, at least 20, at most half."""
    return min(max(math.ceil(share * records), MIN_HELD_OUT), records // 2)


def split_records(records: Sequence[Record], count: int, *, seed: int) -> tuple[list[Record], list[Record]]:
    """(kept, held out), each in file order.

    Records are ordered by a hash of seed and content, and whole groups of equal records are held out until there are
    `count`.
    """
    order = sorted({record.fingerprint for record in records}, key=lambda fingerprint: _key(seed, fingerprint))
    groups: dict[str, list[Record]] = {fingerprint: [] for fingerprint in order}
    for record in records:
        groups[record.fingerprint].append(record)
    chosen: set[str] = set()
    held = 0
    for fingerprint in order:
        if held >= count:
            break
        chosen.add(fingerprint)
        held += len(groups[fingerprint])
    return (
        [record for record in records if record.fingerprint not in chosen],
        [record for record in records if record.fingerprint in chosen],
    )


def _split_files(
    files: Sequence[Sequence[Record]], share: float, *, seed: int
) -> tuple[list[list[Record]], list[list[Record]]]:
    """(kept, held out) of each file, so that each stands on both sides as far as it has different records.

    `_held_out_count` of all records together, from each file by its size. A record that is held out of one file is held
    out of all.
    """
    total = sum(len(records) for records in files)
    count = _held_out_count(total, share)
    chosen: set[str] = set()
    for records in files:
        part = min(-(-count * len(records) // total), len(records) // 2)
        chosen |= {record.fingerprint for record in split_records(records, part, seed=seed)[1]}
    return (
        [[record for record in records if record.fingerprint not in chosen] for records in files],
        [[record for record in records if record.fingerprint in chosen] for records in files],
    )


def dealt(records: Sequence[Record], count: int, *, seed: int) -> list[list[Record]]:
    """The records in `count` parts, each in file order; equal records in the same one."""
    order = sorted({record.fingerprint for record in records}, key=lambda fingerprint: _key(seed, fingerprint))
    part_of = {fingerprint: place % count for place, fingerprint in enumerate(order)}
    return [[record for record in records if part_of[record.fingerprint] == part] for part in range(count)]


_Item = TypeVar("_Item")


def shuffled(items: Sequence[_Item], *, seed: int) -> list[_Item]:
    """The items in an order that depends on the seed alone, the same on every machine."""
    return [items[i] for i in sorted(range(len(items)), key=lambda i: _key(seed, str(i)))]


def _key(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}:{text}".encode()).digest()


_MAX_BYTES = 64 << 20
_SHOWN_TOKENS = 5
_TEMPLATE_FILE = "chat_template.jinja"
_CONFIG_FILE = "tokenizer_config.json"
_TOKENIZER_FILE = "tokenizer.json"
_ADDED_FILE = "added_tokens.json"

_IS_OTHER = "that differs from the base model's, which is the one used"
_IS_NEW = "and the base model's tokenizer has none; none is used"


def tokenizer_differences(folder: Path, tokenizer: Any) -> list[str]:
    """What an adapter's directory has otherwise than the base model's tokenizer, a sentence each.

    Args:
        folder: of the adapter; its tokenizer files are there or not.
        tokenizer: the base model's.
    """
    config = _json(folder / _CONFIG_FILE)
    found = []
    template = _text(folder / _TEMPLATE_FILE) or config.get("chat_template")
    ours = _default_template(tokenizer).strip()
    if isinstance(template, str) and template.strip() != ours:
        found.append(f"it comes with a chat template {_IS_OTHER if ours else _IS_NEW}")
    known = tokenizer.get_vocab()
    unknown = sorted(token for token in _added_tokens(folder, config) if token not in known)
    if unknown:
        more = f" and {len(unknown) - _SHOWN_TOKENS} more" if len(unknown) > _SHOWN_TOKENS else ""
        named = ", ".join(token[:40] for token in unknown[:_SHOWN_TOKENS])
        found.append(f"it comes with tokens that the base model's tokenizer does not have: {named}{more}")
    return found


def _default_template(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None) or ""
    return template if isinstance(template, str) else str(template.get("default", ""))


def _added_tokens(folder: Path, config: dict[str, Any]) -> set[str]:
    """The texts of added tokens, wherever a version of transformers kept them."""
    listed = _json(folder / _TOKENIZER_FILE).get("added_tokens")
    numbered = config.get("added_tokens_decoder")
    entries = list(listed) if isinstance(listed, list) else []
    entries += numbered.values() if isinstance(numbered, dict) else []
    texts = [entry.get("content") for entry in entries if isinstance(entry, dict)]
    return {text for text in (*texts, *_json(folder / _ADDED_FILE)) if isinstance(text, str)}


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is none, or none that can be read: it is only compared."""
    try:
        return read_object(path, _MAX_BYTES)
    except LoracatError:
        return {}


def _text(path: Path) -> str | None:
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            return None
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


@dataclass(frozen=True)
class Dataset:
    """The records of a fit, checked.

    Args:
        files: the calibration files.
        eval_files: files of held-out records; none where records of `files` are held out.
        training: records to fit on and to choose with.
        held_out: records that are read once, at the end; with `parts` the training records once more.
        parts: of cross-fitting: each is held out of a fit of its own on the others, while the weights come from all
            records; none where records are set apart.
    """

    files: tuple[CalibrationFile, ...]
    eval_files: tuple[CalibrationFile, ...]
    training: tuple[Record, ...]
    held_out: tuple[Record, ...]
    parts: tuple[tuple[Record, ...], ...] = ()

    @property
    def held_out_name(self) -> str:
        """The files that the held-out records come from, each with its weight where it has one; with its folder where a
        calibration file has its name."""
        fitted = {file.source.name for file in self.files if self.eval_files}
        names = []
        for source in (file.source for file in self.eval_files or self.files):
            folder = f"{source.path.parent.name or '.'}/" if source.path and source.name in fitted else ""
            names.append(f"{folder}{source.name}" + ("" if source.weight == 1 else f":{source.weight:g}"))
        return ", ".join(names)


@dataclass(frozen=True)
class Examples:
    """A dataset as the model sees it: `data` is the account of the calibration files that a recipe keeps."""

    training: tuple[Example, ...]
    held_out: tuple[Example, ...]
    data: tuple[RecipeData, ...]


def read_dataset(
    data: DataPaths,
    eval_data: DataPaths | None,
    *,
    holdout: float | None,
    seed: int,
    shape: str | None = None,
    fields: str | None = None,
    skip_bad: bool = False,
    progress: Progress = SILENT,
) -> Dataset:
    """Reads all files and divides their records.

    Args:
        data: calibration files, each `FILE`, `FILE:WEIGHT`, or `-` for standard input, and `@ADAPTER` behind it.
        eval_data: held-out records likewise; None to hold out some of each calibration file.
        holdout: the share of it; None for a fifth, or with fewer than 100 records in all for every record in its turn.
        seed: of the division.
        shape: of all records; None to see it from each file.
        fields: other names of what is read, as `prompt=question,completion=answer`.
        skip_bad: leave out bad lines.
        progress: told of what is not read and of what may flatter the fit.
    Raises:
        UsageError: if a file is given twice, or there is no such shape, or `holdout` is 0 without `eval_data` or not
            with it.
        CalibrationError: if a file is rejected, or has too few records to hold some out.
    """
    known = check_shape(shape)
    sources = parse_sources(data, owned=True)
    eval_sources = () if eval_data is None else parse_sources(eval_data)
    if sum(source.path is None for source in (*sources, *eval_sources)) > 1:
        raise UsageError("standard input can be read once", hint="give the held-out records as a file")
    if holdout == 0 and eval_data is None:
        raise UsageError("--holdout 0 leaves nothing to score on", hint="give held-out records with --eval-data")
    if holdout and eval_data is not None:
        raise UsageError(
            "--holdout is a share of --data, of which nothing is held out with --eval-data",
            hint="leave one of them out",
        )

    def read(source: DataSource) -> CalibrationFile:
        return read_records(source, shape=known, fields=fields, skip_bad=skip_bad, progress=progress)

    files, eval_files = (tuple(read(source) for source in group) for group in (sources, eval_sources))
    if eval_files:
        training = [record for file in files for record in file.records]
        held_out = [record for file in eval_files for record in file.records]
        _warn_of_common(training, eval_files, progress)
    else:
        every = [record for file in files for record in file.records]
        if holdout is None and len(every) < _CROSSED_BELOW:
            return _crossed(files, every, seed, progress)
        if holdout is not None and holdout > 0.5:
            progress.warn(f"--holdout {holdout:g}: half of the records is the most")
        training, held_out = _divide(files, HOLDOUT if holdout is None else holdout, seed)
    different = warn_of_copies(held_out, "held-out", progress)
    if different < MIN_HELD_OUT:
        few = f"{count_text(different, 'record')} {'is' if different == 1 else 'are'}"
        progress.warn(f"only {few} held out: too few for a verdict (at least {MIN_HELD_OUT})")
    return Dataset(files, eval_files, tuple(training), tuple(held_out))


def _crossed(files: tuple[CalibrationFile, ...], every: Sequence[Record], seed: int, progress: Progress) -> Dataset:
    """Every record held out once, each of up to four parts from a fit on the others.

    Raises:
        CalibrationError: if all records are equal.
    """
    different = len({record.fingerprint for record in every})
    if different < 2:
        raise CalibrationError(
            f"{files[0].source} has {_different(every)}, too few to hold some out",
            hint="give held-out records with --eval-data",
        )
    warn_of_copies(every, "calibration", progress)
    if different < MIN_HELD_OUT:
        progress.warn(f"only {different} records in all: too few for a verdict (at least {MIN_HELD_OUT})")
    parts = dealt(every, min(_CROSSED_PARTS, different), seed=seed + 2)
    return Dataset(files, (), tuple(every), tuple(every), tuple(tuple(part) for part in parts))


def check_shape(shape: str | None) -> Shape | None:
    """The shape of that name; raises UsageError if there is none."""
    if shape is None:
        return None
    for known in SHAPES:
        if shape == known:
            return known
    raise UsageError(f"--format {shape} is not one of {', '.join(SHAPES)}", hint=did_you_mean(shape, SHAPES))


def render_dataset(
    dataset: Dataset,
    tokenizer: Any,
    *,
    max_length: int,
    allow_truncation: bool = False,
    skip_bad: bool = False,
    progress: Progress = SILENT,
) -> Examples:
    """Tokenises every file once, as `render_file` does, and divides the examples as the records are divided.

    Raises:
        CalibrationError: if a file cannot be rendered, or nothing is left to fit on or to score.
    """

    def render(file: CalibrationFile) -> RenderedFile:
        return render_file(
            file,
            tokenizer,
            max_length=max_length,
            allow_truncation=allow_truncation,
            skip_bad=skip_bad,
            whole=True,
            progress=progress,
        )

    rendered, rendered_eval = (tuple(map(render, files)) for files in (dataset.files, dataset.eval_files))
    places = {record.place for record in dataset.training}
    training = [_some(file, places, inside=True) for file in rendered]
    held_out = [file.examples for file in rendered_eval] or [
        _some(file, places, inside=bool(dataset.parts)) for file in rendered
    ]
    for examples, what in ((training, "to fit on"), (held_out, "to score the fit on")):
        if not any(examples):
            raise CalibrationError(f"no record is left {what}", hint="give more records, or raise --max-length")
    _warn_of_alike(dataset, [example for examples in (*training, *held_out) for example in examples], progress)
    return Examples(
        training=tuple(example for examples in training for example in examples),
        held_out=tuple(example for examples in held_out for example in examples),
        data=tuple(_account(file, examples) for file, examples in zip(rendered, training, strict=True)),
    )


def _divide(files: Sequence[CalibrationFile], holdout: float, seed: int) -> tuple[list[Record], list[Record]]:
    kept, held = _split_files([file.records for file in files], holdout, seed=seed)
    for file, *sides in zip(files, kept, held, strict=True):
        if not all(sides):
            raise CalibrationError(
                f"{file.source} has {_different(file.records)}, too few to hold some out",
                hint="give held-out records with --eval-data",
            )
    return [record for side in kept for record in side], [record for side in held for record in side]


def _different(records: Sequence[Record]) -> str:
    """Says how many different records there are, where they cannot be divided."""
    different = len({record.fingerprint for record in records})
    if 1 == different < len(records):
        return f"{count_text(len(records), 'record')}, all the same"
    return count_text(different, "record" if different == 1 else "different record")


def warn_of_copies(records: Sequence[Record], what: str, progress: Progress) -> int:
    """How many records are different; said where some are copies, which tell nothing new."""
    different = len({record.fingerprint for record in records})
    if different < len(records):
        counted = "copies count as one in intervals and in what is claimed"
        progress.warn(f"of {len(records)} {what} records {different} are different: {counted}")
    return different


def _warn_of_common(training: Sequence[Record], eval_files: Sequence[CalibrationFile], progress: Progress) -> None:
    known = {record.fingerprint for record in training}
    for file in eval_files:
        common = sum(record.fingerprint in known for record in file.records)
        if common:
            progress.warn(
                f"{common} records of {file.source} stand in the calibration data too; the table flatters the fit"
            )


def tokens_sha256(examples: Iterable[Example]) -> str:
    """Of what the model sees of some records, in their order: tokens, and which are scored."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.input_ids).to_bytes(8, "little"))
        digest.update(array("q", example.input_ids).tobytes() + bytes(example.scored))
    return digest.hexdigest()


def _warn_of_alike(dataset: Dataset, examples: Sequence[Example], progress: Progress) -> None:
    """Of records on both sides that are told apart by their content, and not by the model: of other shapes, say, or cut
    where they begin to differ."""
    sides: dict[tuple[tuple[int, ...], tuple[bool, ...]], dict[int, set[str]]] = {}  # fingerprints on each, by tokens
    records = {
        record.place: (side, record.fingerprint)
        for side, those in enumerate(dataset.parts or (dataset.training, dataset.held_out))
        for record in those
    }
    for example in examples:
        side, fingerprint = records[example.place]
        sides.setdefault((example.input_ids, example.scored), {}).setdefault(side, set()).add(fingerprint)
    alike = sum(len(found) > 1 and len(set.union(*found.values())) > 1 for found in sides.values())
    if alike:
        progress.warn(
            f"{count_text(alike, 'record')} that are fitted to are the same to the model as held-out ones, in another "
            "shape or cut: the table flatters the fit; give all in one shape, or raise --max-length"
        )


def _some(file: RenderedFile, places: set[str], *, inside: bool) -> tuple[Example, ...]:
    return tuple(example for example in file.examples if (example.place in places) is inside)


def _account(rendered: RenderedFile, training: Sequence[Example]) -> RecipeData:
    file = rendered.file
    places = {example.place for example in training}
    kept = [record.fingerprint[:FINGERPRINT] for record in file.records if record.place in places]
    return RecipeData(
        name=file.source.name,
        sha256=file.sha256,
        shape=file.shape,
        weight=file.source.weight,
        records=len(training),
        scored_tokens=sum(example.scored_tokens for example in training),
        skipped=len(rendered.skipped),
        skipped_lines=rendered.skipped[:SHOWN_LINES],
        dropped=rendered.dropped,
        cut=rendered.cut,
        template_sha256=rendered.template_sha256,
        record_sha256="".join(kept),
        unread=file.ignored_keys,
    )


@dataclass(frozen=True, eq=False)
class Batch:
    """Some records side by side, padded on the right.

    The padding needs no attention mask: in a causal model no position sees what stands right of it.

    Args:
        indices: b positions of the records in the list that the plan was made from.
        input_ids: (b, t).
        positions: (s,) places in the flattened (b * t) where the next token is scored.
        labels: (s,) those next tokens.
        owners: (s,) row of each, 0 to b - 1.
        weights: (s,) how many times each counts, float64; None where all count once.
    """

    indices: tuple[int, ...]
    input_ids: Tensor
    positions: Tensor
    labels: Tensor
    owners: Tensor
    weights: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens that the model processes, padding included."""
        return self.input_ids.numel()

    @property
    def scored_tokens(self) -> float:
        """Scored tokens, each as many times as it counts: what a sum of the batch's nats is divided by."""
        return self.labels.numel() if self.weights is None else float(self.weights.sum())

    def first_records(self, count: int) -> Batch:
        """The first of the records by themselves, padded as here."""
        kept = int((self.owners < count).sum())  # of s, in the order of the records
        weights = None if self.weights is None else self.weights[:kept]
        first = (self.positions[:kept], self.labels[:kept], self.owners[:kept], weights)
        return Batch(self.indices[:count], self.input_ids[:count], *first)


def plan_batches(examples: Sequence[Example], *, batch_tokens: int) -> list[Batch]:
    """Packs examples into batches of at most `batch_tokens` tokens with padding, shortest first; a longer one stands
    alone."""
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].input_ids), i))
    groups: list[list[int]] = []
    for index in order:
        length = len(examples[index].input_ids)  # the longest so far, as the order is ascending
        if groups and length * (len(groups[-1]) + 1) <= batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return [make_batch(examples, group) for group in groups]


def make_batch(examples: Sequence[Example], indices: Iterable[int]) -> Batch:
    """One batch of the examples at `indices`."""
    rows = tuple(indices)
    width = max(len(examples[i].input_ids) for i in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)  # (b, t); what stands in the padding is never seen
    positions, labels, owners, weights = [], [], [], []
    for row, index in enumerate(rows):
        example = examples[index]
        input_ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
        for place, flag in enumerate(example.scored):
            if flag:  # token `place` is predicted at the position before it
                positions.append(row * width + place - 1)
                labels.append(example.input_ids[place])
                owners.append(row)
                weights.append(example.weight)
    weighted = torch.tensor(weights, dtype=torch.float64) if any(weight != 1 for weight in weights) else None
    return Batch(rows, input_ids, torch.tensor(positions), torch.tensor(labels), torch.tensor(owners), weighted)
