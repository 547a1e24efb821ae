"""From cells to tables: JSON with every number, Markdown made of that JSON alone, and the blocks of pages that show it.

    <!-- table closed-book -->      what stands between the two is made from closed-book.json of the folder of tables;
    <!-- end of closed-book -->     whatever stands around them is written by hand and stays

`<!-- answers closed-book -->` opens a block that has a task's answers and losses alone, in one table.

Records of all seeds are pooled: an interval is the paired bootstrap over them, and says nothing of how much another
seed would change; what each seed gives stands beside it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper.cells import CAT, PAPER_ROW, Cell
from benchmarks.paper.tasks import DATAMIX, Part
from loracli.evaluation.statistics import intervals, mcnemar
from loracli.system.document import decode, encode
from loracli.system.files import write_atomically

_LEVEL = 0.05
_Z = 1.959964  # of a normal distribution: 95 % lie within
_SHOWN = {PAPER_ROW: "CAT as published", CAT: "**module** (CAT)", DATAMIX: "data mix", "fresh-lora": "fresh LoRA"}
_OPEN, _CLOSE = "<!-- {} {} -->", "<!-- end of {} -->"
_BLOCK = re.compile(r"<!-- (table|answers) ([\w-]+) -->\n(.*?)<!-- end of \2 -->\n", re.DOTALL)
Pair = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A row of a table, over all seeds.

    Args:
        calibration: what it was fitted on; nothing of what needs no data.
        row: its name.
        nats_per_token: total nats over total tokens.
        difference: of it to the best single adapter; `interval` is its 95 % bootstrap interval.
        right: share of the answers that are right, with its 95 % interval (Wilson 1927).
        p_value: that the best single adapter answers as many right: McNemar's exact test.
        kinds: share of the answers that are right, by kind of question; none where all are of one.
        seeds: of each seed, nats per token and the share that is right.
    """

    calibration: str
    row: str
    nats_per_token: float
    difference: float
    interval: Pair
    right: float
    right_interval: Pair
    p_value: float
    kinds: dict[str, float]
    seeds: tuple[Pair, ...]


@dataclass(frozen=True)
class Loss:
    """A row that `module` is clearly worse than, by its answers or, where these do not tell, its loss.

    Args:
        calibration: of `module`.
        row: the better one.
        right: shares of right answers, of `module` and of the row.
        p_value: that the answers of the two are as often right.
        difference: in nats per token, `module` minus the row; `interval` is its 95 % bootstrap interval.
    """

    calibration: str
    row: str
    right: Pair
    p_value: float
    difference: float
    interval: Pair


@dataclass(frozen=True)
class Table:
    """What one task says.

    Args:
        name: of the task.
        asks: what is asked.
        command: that makes it.
        base: of all.
        made_by: commits, versions and machines of the cells.
        seeds: of data, adapters and fits.
        records: of all seeds together; `tokens` are their scored ones.
        best: the best single adapter by loss; `best_right` by answers.
        losses: where `module` loses.
        lines: the rows.
        left_out: why a row is not there.
    """

    name: str
    asks: str
    command: str
    base: str
    made_by: dict[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    records: int
    tokens: int
    best: str
    best_right: str
    losses: tuple[Loss, ...]
    lines: tuple[Line, ...]
    left_out: dict[str, str]


@dataclass(frozen=True)
class Parts:
    """What an experiment says: one table or several.

    Args:
        name: of the experiment.
        asks: what is asked.
        command: that makes it.
        made_by: commits, versions and machines.
        parts: the tables.
    """

    name: str
    asks: str
    command: str
    made_by: dict[str, tuple[str, ...]]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class _Pooled:
    """A row's records of all seeds."""

    nats: torch.Tensor
    tokens: torch.Tensor
    right: torch.Tensor
    seeds: tuple[Pair, ...]

    @property
    def nats_per_token(self) -> float:
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def share(self) -> float:
        return float(self.right.mean())


Key = tuple[str, str]  # calibration and row


def make_table(
    found: Mapping[str, Sequence[Sequence[Cell]]],
    skills: Sequence[str],
    *,
    seeds: Sequence[int],
    kinds: Sequence[str],
    about: Mapping[str, str],
) -> Table:
    """The table of a task.

    Args:
        found: by what is calibrated on ("" for what needs nothing), of each seed the cells.
        skills: the rows that are a single adapter.
        seeds: in the order of `found`.
        kinds: of question, of each record of all seeds.
        about: name, asks, command and base of the task.
    """
    pooled, left_out, cells = _pool(found, len(seeds))
    best = min(skills, key=lambda name: pooled["", name].nats_per_token)
    best_right = max(skills, key=lambda name: pooled["", name].share)
    alone, answers = pooled["", best], pooled["", best_right]
    to_best = _intervals(pooled, alone)
    lines = tuple(
        Line(
            *key,
            row.nats_per_token,
            row.nats_per_token - alone.nats_per_token,
            interval,
            row.share,
            wilson(float(row.right.sum()), len(row.right)),
            mcnemar(row.right == 1, answers.right == 1),
            _by_kind(row.right, kinds),
            row.seeds,
        )
        for (key, row), interval in zip(pooled.items(), to_best, strict=True)
    )
    return Table(
        **about,
        made_by=together([cell.made_by for cell in cells]),
        seeds=tuple(seeds),
        records=len(alone.nats),
        tokens=int(alone.tokens.sum()),
        best=best,
        best_right=best_right,
        losses=_losses(pooled),
        lines=lines,
        left_out=left_out,
    )


def together(made_by: Sequence[Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
    """The commits, versions and machines of all that a table shows, each once."""
    return {name: tuple(dict.fromkeys(one[name] for one in made_by)) for name in ("commit", "versions", "machine")}


def _pool(
    found: Mapping[str, Sequence[Sequence[Cell]]], seeds: int
) -> tuple[dict[Key, _Pooled], dict[str, str], list[Cell]]:
    """Rows that every seed has; why others are not there; all cells."""
    pooled: dict[Key, _Pooled] = {}
    left_out: dict[str, str] = {}
    every = [cell for those in found.values() for cells in those for cell in cells]
    for calibration, by_seed in found.items():
        rows = [{cell.row: cell for cell in cells} for cells in by_seed]
        for name in dict.fromkeys(name for one in rows for name in one):
            cells = [one[name] for one in rows if name in one and one[name].nats]
            if len(cells) < seeds:
                reasons = [one[name].note for one in rows if name in one and not one[name].nats]
                left_out[name] = reasons[0] if reasons else f"{len(cells)} of {seeds} seeds are done"
                continue
            nats, tokens, right = (
                torch.tensor([v for cell in cells for v in getattr(cell, part)], dtype=torch.float64)
                for part in ("nats", "tokens", "right")
            )
            own = tuple((sum(c.nats) / sum(c.tokens), sum(c.right) / len(c.right)) for c in cells)
            pooled[calibration, name] = _Pooled(nats, tokens, right, own)
    return pooled, left_out, every


def _intervals(pooled: Mapping[Key, _Pooled], other: _Pooled) -> list[Pair]:
    return intervals(torch.stack([row.nats - other.nats for row in pooled.values()]), other.tokens)


def _losses(pooled: Mapping[Key, _Pooled]) -> tuple[Loss, ...]:
    """Of `module` on each calibration, against what needs no data and what is calibrated on the same."""
    losses = []
    for (calibration, name), own in pooled.items():
        if name != CAT:
            continue
        for (key, row), interval in zip(pooled.items(), _intervals(pooled, own), strict=True):
            if key[0] not in ("", calibration):
                continue
            p, difference = mcnemar(own.right == 1, row.right == 1), own.nats_per_token - row.nats_per_token
            more_right = p < _LEVEL and row.share > own.share
            if more_right or (p >= _LEVEL and interval[1] < 0):
                ends = (-interval[1], -interval[0])
                losses.append(Loss(calibration, key[1], (own.share, row.share), p, difference, ends))
    return tuple(losses)


def _by_kind(right: torch.Tensor, kinds: Sequence[str]) -> dict[str, float]:
    names = sorted(set(kinds))
    if len(names) < 2:
        return {}
    return {name: float(right[[place for place, kind in enumerate(kinds) if kind == name]].mean()) for name in names}


def wilson(right: float, records: int) -> Pair:
    """The 95 % interval of a share (Wilson 1927), which stays within 0 and 1.

    (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)
    """
    p, z2 = right / records, _Z**2 / records
    middle, half = p + z2 / 2, _Z * math.sqrt(p * (1 - p) / records + z2 / (4 * records))
    return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))


def markdown(table: Table | Parts) -> str:
    """A table as Markdown, where `module` loses first."""
    return _of_task(table) if isinstance(table, Table) else _of_experiment(table)


def _of_experiment(table: Parts) -> str:
    said = [f"{table.asks}\n", f"```bash\n{table.command}\n```\n"]
    for part in table.parts:
        said += [f"{part.title}\n", *_grid(part.heads, part.rows), ""]
    return "\n".join([*said, _made_by(table)]) + "\n"


def _of_task(table: Table) -> str:
    said = [f"{table.asks}\n"]
    if any(line.row == CAT for line in table.lines):
        if table.losses:
            said += ["`module` is clearly worse, by its answers or, where these are alike, by its loss, than:\n"]
            said += [*(_loss_line(loss) for loss in table.losses), ""]
        else:
            said += ["`module` is clearly worse than no other row here.\n"]
    said.append(f"```bash\n{table.command}\n```\n")
    many = len(table.seeds) > 1
    names = ", ".join(map(str, table.seeds))
    said.append(
        f"{table.records} test records, {table.tokens} scored tokens; base {table.base}; {'seeds' if many else 'seed'} "
        f"{names}. Difference: to `{table.best}`; McNemar: against `{table.best_right}`.\n"
    )
    for calibration in dict.fromkeys(line.calibration for line in table.lines):
        lines = [line for line in table.lines if line.calibration == calibration]
        if calibration:
            said.append(f"Calibrated on {calibration}:\n")
        said += [*_rows(lines, table.seeds), ""]
    said += [f"Left out: {row}: {reason}\n" for row, reason in table.left_out.items()]
    return "\n".join([*said, _made_by(table)]) + "\n"


def answers(table: Table) -> str:
    """A task in one table: of each way the share of right answers and the loss, by what it was calibrated on."""
    calibrations = list(dict.fromkeys(line.calibration for line in table.lines))
    found = {(line.calibration, line.row): line for line in table.lines}
    rows = []
    for row in dict.fromkeys(line.row for line in table.lines):
        lines = [found.get((calibration, row)) for calibration in calibrations]
        rows.append([_name(row), *(f"{line.right:.1%}, {line.nats_per_token:.4f}" if line else "" for line in lines)])
    worse: dict[str, list[str]] = {}
    for loss in table.losses:
        worse.setdefault(loss.calibration, []).append(_name(loss.row))
    seeds = f"{'seeds' if len(table.seeds) > 1 else 'seed'} {', '.join(map(str, table.seeds))}"
    return "\n".join(
        [
            f"{table.asks}\n",
            *(f"Calibrated on {of}, `module` is clearly worse than {', '.join(rows)}.\n" for of, rows in worse.items()),
            *_grid(["right, nats per token", *(calibration or "no records" for calibration in calibrations)], rows),
            "",
            f"{table.records} test records, {table.base}, {seeds}, commit {', '.join(table.made_by['commit'])}; "
            f"[intervals and p-values](results/{table.name}.md).\n",
            f"```bash\n{table.command}\n```\n",
        ]
    )


def _made_by(table: Table | Parts) -> str:
    made = table.made_by
    return f"Commit {', '.join(made['commit'])}; {'; '.join(made['versions'])}; {'; '.join(made['machine'])}."


def _grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(heads)} |", f"|---|{'--:|' * (len(heads) - 1)}", *(f"| {' | '.join(r)} |" for r in rows)]


def _loss_line(loss: Loss) -> str:
    (own, other), (low, high) = loss.right, loss.interval
    return (
        f"- {_name(loss.row)}, calibrated on {loss.calibration}: right {own:.1%} beside {other:.1%} (McNemar's p "
        f"{loss.p_value:.2g}); {loss.difference:+.4f} nats per token, {low:+.4f} to {high:+.4f}"
    )


def _rows(lines: Sequence[Line], seeds: Sequence[int]) -> list[str]:
    kinds = list(lines[0].kinds)
    many = seeds if len(seeds) > 1 else ()
    heads = ["", "nats per token", "difference", "95 % interval", "right", "95 % interval", "McNemar's p"]
    heads += [f"right: {kind}" for kind in kinds] + [f"seed {seed}" for seed in many]
    rows = []
    for line in lines:
        low, high = line.right_interval
        cells = [
            _name(line.row),
            f"{line.nats_per_token:.4f}",
            f"{line.difference:+.4f}",
            f"{line.interval[0]:+.4f} to {line.interval[1]:+.4f}",
            f"{line.right:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"{line.p_value:.2g}",
        ]
        cells += [f"{line.kinds[kind]:.1%}" for kind in kinds]
        cells += [f"{nats:.4f}, {right:.1%}" for nats, right in (line.seeds if many else ())]
        rows.append(cells)
    return _grid(heads, rows)


def _name(row: str) -> str:
    return _SHOWN.get(row, row)


def write_table(folder: Path, table: Table | Parts) -> None:
    """The JSON of a table, its page, and its blocks in the page that is called as the folder is, where there is one.

    A page that is there keeps all but its blocks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{table.name}.json", (json.dumps(encode(table), indent=1) + "\n").encode())
    page = folder / f"{table.name}.md"
    title = table.name.replace("-", " ").capitalize()
    text = page.read_text("utf-8") if page.exists() else f"# {title}\n\n{_block('table', table.name, '')}"
    write_atomically(page, refreshed(text, folder, only=table.name).encode())
    above = folder.with_name(f"{folder.name}.md")
    if above.exists():
        write_atomically(above, refreshed(above.read_text("utf-8"), folder, only=table.name).encode())


def refreshed(text: str, folder: Path, *, only: str | None = None) -> str:
    """A page whose every block is what the JSON of its table says.

    Args:
        text: of the page.
        folder: of the tables.
        only: the name of a table, to leave the blocks of others as they are; None for every block.
    """

    def block(found: re.Match[str]) -> str:
        kind, name, _ = found.groups()
        if only not in (None, name):
            return found[0]
        table = read_table(folder / f"{name}.json")
        brief = kind == "answers" and isinstance(table, Table)
        return _block(kind, name, answers(table) if brief else markdown(table))

    return _BLOCK.sub(block, text)


def _block(kind: str, name: str, content: str) -> str:
    return f"{_OPEN.format(kind, name)}\n{content}{_CLOSE.format(name)}\n"


def read_table(path: Path) -> Table | Parts:
    """A table from its JSON; an experiment has parts.

    Raises:
        ValueError: if the file is not one.
    """
    problems: list[str] = []
    document: Any = json.loads(path.read_text("utf-8"))
    table: Table | Parts = decode(Parts if "parts" in document else Table, document, "", problems)
    if problems:
        raise ValueError(f"{path}: {problems[0]}")
    return table
