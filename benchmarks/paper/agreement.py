"""When does it pay to calibrate on the skills' own records? What can be known beforehand, beside what came out.

At the average of the adapters, each skill's own records have a gradient: one number for each module and adapter, which
says whether they want that weight larger or smaller.

    cosine      between the gradients of two skills, the mean over pairs
    agreeing    the share of weights on which the gradients of all skills have one sign

Where skills pull in opposite directions, a fit on their records settles a quarrel that the composite may not have. It
pays where `module`, calibrated on the skills' own records, has clearly less loss than the average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from benchmarks.paper.cells import CAT, Cell, Stage
from benchmarks.paper.tasks import Part, Unit
from benchmarks.paper.training import rendered
from loracli.adapters.adapter import read_adapter
from loracli.calibration.dataset import plan_batches
from loracli.evaluation.sentences import interval_text
from loracli.evaluation.statistics import paired_interval
from loracli.fitting.engine import Engine
from loracli.fitting.journal import Meter
from loracli.fitting.mixing import make_layout, make_mixing
from loracli.model.attach import attach
from loracli.model.loss import make_objective
from loracli.progress import SILENT

NAME = "agreement"
ASKS = (
    "Can one tell beforehand whether calibrating on the skills' own records pays? Each skill's records have a gradient "
    "at the average of the adapters: the cosine between those of two skills, and the share of weights on which all "
    "have one sign, beside what `module` calibrated on these records costs less than the average."
)
RECORDS, BATCH_TOKENS = 40, 1024  # the first records of what the adapter of each skill was trained on


def unit_of(stage: Stage, pace: float, tokenizer: Any) -> Unit:
    """The gradients of a task with a seed.

    Args:
        stage: the one without calibration.
        pace: tokens a second, forward and backward.
        tokenizer: of the base.
    """
    tokens = sum(len(e.input_ids) for one in stage.adapters for e in rendered(one.files, tokenizer)[:RECORDS])
    made_of = {"adapters": [adapter.key for adapter in stage.adapters], "base": [stage.base.sha256, stage.base.dtype]}
    return Unit(f"{stage.task.name}-{stage.seed}", made_of, tokens / pace, partial(measured, stage))


def measured(stage: Stage) -> dict[str, float]:
    """Cosine and share of one sign, of the gradients at the average."""
    base = stage.base.load()
    adapters = [read_adapter(str(adapter.path)) for adapter in stage.adapters]
    layout = make_layout(adapters)
    own = [rendered(adapter.files, base.tokenizer)[:RECORDS] for adapter in stage.adapters]
    gradients = []
    with attach(base.model, adapters, layout.modules) as attached:
        mixing = make_mixing(attached, layout, CAT)
        theta = mixing.constant([1 / len(adapters)] * len(adapters))
        objective = make_objective(attached, plan_batches(own[0], batch_tokens=BATCH_TOKENS)[0])
        engine = Engine(objective, Meter(SILENT))
        for examples in own:
            batches = plan_batches(examples, batch_tokens=BATCH_TOKENS)
            gradients.append(engine.mean_and_gradient(mixing, theta, batches, examples)[1])
    return agreement(torch.stack(gradients))


def agreement(gradients: Tensor) -> dict[str, float]:
    """Of the gradients of K skills, (K, weights)."""
    unit = torch.nn.functional.normalize(gradients.double(), dim=1)
    cosines = [float(unit[one] @ unit[other]) for one, other in combinations(range(len(unit)), 2)]
    signs = gradients.sign()
    return {
        "cosine": sum(cosines) / len(cosines),
        "agreeing": float((signs == signs[0]).all(dim=0).double().mean()),
        "weights": gradients.shape[1],
    }


def parts(found: Mapping[str, Mapping[str, float]], cells: Mapping[str, Sequence[Cell]]) -> tuple[Part, ...]:
    """The table, and how often the sign of the cosine says what came out.

    Args:
        found: by task and seed, what `measured` gave.
        cells: by task and seed, those of what needs no data and of what is calibrated on the skills' own records.
    """
    rows, told, paid = [], 0, 0
    for name, one in found.items():
        by_row = {cell.row: cell for cell in cells[name]}
        module, average = by_row[CAT], by_row["uniform"]
        nats, other, tokens = (
            torch.tensor(v, dtype=torch.float64) for v in (module.nats, average.nats, average.tokens)
        )
        interval = paired_interval(nats - other, tokens)
        pays = interval[1] < 0
        paid += pays
        told += pays == (one["cosine"] > 0)
        rows.append(
            (
                name,
                f"{one['cosine']:+.3f}",
                f"{one['agreeing']:.0%}",
                f"{float((nats - other).sum() / tokens.sum()):+.4f}",
                interval_text(interval),
                "yes" if pays else "no",
            )
        )
    heads = ("task and seed", "cosine", "agreeing", "module minus uniform", "95 % interval", "pays")
    said = f"It paid in {paid} of {len(rows)}; that the cosine is above 0 told so in {told} of {len(rows)}:"
    return (Part(said, heads, tuple(rows)),)
