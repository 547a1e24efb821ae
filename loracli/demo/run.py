"""The demo: fit, export both ways, reload with stock PEFT, and score everything on questions that neither adapter can
answer, beside the baseline that a sceptic asks for: a new LoRA trained on the same calibration records, stopped early.

One adapter knows invented facts about people, and answers in plain words; the other answers in a form, and knows none
of them. The test asks for the facts in the form. It is calibrated on questions about other facts than the test asks.
"""

from __future__ import annotations

import copy
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from loracli.calibration.dataset import plan_batches
from loracli.calibration.records import CalibrationFile
from loracli.calibration.render import Example
from loracli.evaluation.metrics import TaskMetric
from loracli.evaluation.scorer import make_scorer
from loracli.evaluation.statistics import FIT, static_points
from loracli.export.export import Exported, export_adapter
from loracli.export.request import ExportRequest
from loracli.fitting.inputs import FitInputs, prepare_fit
from loracli.fitting.run import run_fit
from loracli.model.attach import attach
from loracli.model.base import load_base
from loracli.model.loss import Objective, make_objective
from loracli.model.placement import Placement
from loracli.model.quantisation import import_peft
from loracli.model.reference import BaseReference
from loracli.model.session import Opening, Session, open_session
from loracli.progress import SILENT, Progress
from loracli.recipe.recipe import Recipe

_STEPS = 120
_CHECK_EVERY = 10
_RATE = 2e-3
_VALIDATION_SHARE = 0.25


def _train_fresh_lora(model: Any, targets: Sequence[str], rank: int, examples: Sequence[Example], *, seed: int) -> Any:
    """A PEFT model with a new LoRA of the rank on `targets`, trained by AdamW on the examples.

    A quarter of the examples chooses the step to stop at.
    """
    peft = import_peft()
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), task_type="CAUSAL_LM")
    fresh = peft.get_peft_model(copy.deepcopy(model), config).eval()
    held = max(1, round(_VALIDATION_SHARE * len(examples)))
    training = plan_batches(examples[held:], batch_tokens=1 << 16)
    checks = plan_batches(examples[:held], batch_tokens=1 << 16)
    parameters = [p for p in fresh.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=0.0)
    with attach(fresh, (), ()) as attached:
        objective = make_objective(attached, checks[0])
        best, kept = float("inf"), peft.get_peft_model_state_dict(fresh)
        for step in range(_STEPS + 1):
            if step % _CHECK_EVERY == 0:
                loss = objective.score(checks, held).nats_per_token
                if loss < best:
                    best = loss
                    state = peft.get_peft_model_state_dict(fresh)
                    kept = {name: value.detach().clone() for name, value in state.items()}
            adam.zero_grad()
            for batch in training:
                (objective.nats(batch).sum() / sum(b.scored_tokens for b in training)).backward()  # type: ignore[no-untyped-call]
            adam.step()
    peft.set_peft_model_state_dict(fresh, kept)
    return fresh


_ADAPTERS = ("know", "form")
EXAMPLE = ("base", *_ADAPTERS, "calibration.jsonl", "test.jsonl")  # files and directories of the example
_MAX_NEW_TOKENS = 24
_PLACEMENT = Placement("float32", "cpu")
_MAX_LENGTH, _BATCH_TOKENS, _ANSWER_TOKENS = 128, 4096, 1024  # of the test


@dataclass(frozen=True)
class DemoRow:
    """One method on the test questions: nats per scored token, and how many greedy answers match exactly."""

    name: str
    nats_per_token: float
    correct: int
    questions: int


@dataclass(frozen=True)
class DemoResult:
    """What the demo made and measured."""

    recipe: Recipe
    concatenated: Exported
    merged: Exported
    rows: tuple[DemoRow, ...]
    seconds: float


def example_folder() -> Path:
    """The embedded example: base/, know/, form/, calibration.jsonl, test.jsonl."""
    return Path(str(files("loracli.demo") / "data"))


def run_demo(folder: Path, *, example: Path | None = None, progress: Progress = SILENT) -> DemoResult:
    """Runs the whole story in `folder`: copies the example there, so that the recipe finds its ingredients wherever the
    folder goes, and writes recipe.json, adapter-cat/ and adapter-merged/ beside it.

    Args:
        folder: exists, and has none of these.
        example: as `example_folder`, which is the default.
        progress: told what happens.
    """
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 for an attribute under its old name, which is nothing to the user.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        _copy_example(example or example_folder(), folder)
        return _run(folder, progress)


def _copy_example(example: Path, folder: Path) -> None:
    for name in EXAMPLE:
        if (example / name).is_dir():
            shutil.copytree(example / name, folder / name)
        else:
            shutil.copy(example / name, folder / name)


def _run(folder: Path, progress: Progress) -> DemoResult:
    started = time.monotonic()
    inputs = prepare_fit(
        [str(folder / name) for name in _ADAPTERS],
        folder / "calibration.jsonl",
        eval_data=folder / "test.jsonl",
        base=str(folder / "base"),
        placement=_PLACEMENT,
        folder=folder,
    )
    recipe = run_fit(inputs, placement=_PLACEMENT, progress=progress)
    recipe.save(folder / "recipe.json")
    concatenated = export_adapter(ExportRequest(folder / "recipe.json"), folder / "adapter-cat", progress=progress)
    merged = export_adapter(
        ExportRequest(folder / "recipe.json", merge=True), folder / "adapter-merged", progress=progress
    )

    opening = Opening(inputs.base, inputs.adapters, _BATCH_TOKENS, _MAX_LENGTH, placement=_PLACEMENT)
    with open_session(opening) as session:
        test = _Test(session, inputs.data.eval_files[0])
        rows = _score_attached(session, inputs, recipe, test, progress)
        for name, exported in (("exported", concatenated), ("exported, merged", merged)):
            progress.note(f"scoring {name}, loaded by PEFT")
            rows.append(test.row_of(name, _load_with_peft(inputs.base, exported.path)))
        progress.note("training a fresh LoRA on the same calibration records")
        calibration = session.render(inputs.data.files)
        targets = sorted({name.rpartition(".")[2] for name in inputs.layout.modules})
        fresh = _train_fresh_lora(session.base.model, targets, max(inputs.adapters[0].ranks), calibration, seed=0)
        rows.append(test.row_of("fresh LoRA", fresh))
    return DemoResult(recipe, concatenated, merged, tuple(rows), time.monotonic() - started)


class _Test:
    """The test questions, tokenised once."""

    def __init__(self, session: Session, file: CalibrationFile) -> None:
        self.examples = session.render([file])
        self._batches = session.batches(self.examples)
        exact = TaskMetric("exact", max_new_tokens=_MAX_NEW_TOKENS)
        places = [example.place for example in self.examples]
        self._right = make_scorer(
            exact,
            [file],
            places,
            session.tokenizer,
            max_length=_MAX_LENGTH,
            window=session.window,
            batch_tokens=_ANSWER_TOKENS,
        )

    def row(self, name: str, objective: Objective) -> DemoRow:
        """What is attached at the moment."""
        questions = len(self.examples)
        loss = objective.score(self._batches, questions).nats_per_token
        return DemoRow(name, loss, int(self._right(objective).sum()), questions)

    def row_of(self, name: str, model: Any) -> DemoRow:
        """A model that carries its adapter itself."""
        with attach(model, (), ()) as plain:
            return self.row(name, make_objective(plain, self._batches[0]))


def _score_attached(
    session: Session, inputs: FitInputs, recipe: Recipe, test: _Test, progress: Progress
) -> list[DemoRow]:
    """Every mixing of the attached model: base, each alone, uniform, sum, fit."""
    modules = inputs.layout.modules
    names = dict(zip(inputs.references, _ADAPTERS, strict=True))
    points = {
        names.get(name, name): torch.tensor(point).expand(len(modules), -1)
        for name, point in static_points(inputs.references).items()
    }
    points[FIT] = torch.tensor([[w or 0.0 for w in recipe.weights_of(module)] for module in modules])
    rows = []
    with session.attached(inputs.adapters, modules, test.examples) as objective:
        for name, weights in points.items():
            progress.note(f"scoring {name}")
            objective.attached.set_weights(weights)
            rows.append(test.row(name, objective))
    return rows


def _load_with_peft(base: BaseReference, adapter: Path) -> Any:
    model = load_base(base, dtype="float32", device="cpu").model
    return import_peft().PeftModel.from_pretrained(model, adapter).eval()
