"""Fitting to the adapters' own answers, without labels or beside them: does KL to them gain over text? Prints Markdown.

    python benchmarks/distill.py                                          the embedded example
    python benchmarks/distill.py --base BASE --adapters MATH CODE --own MATH.jsonl CODE.jsonl --data CALIB.jsonl \
        --test TEST.jsonl

The records of the task (--labels of them, drawn as in estimator.py) are the labels; each adapter is given --prompts
prompts of the kind that it was trained on, and answers greedily. The weights w, one for each module and adapter,
minimise

    labels: mean of -log p_w(token)     +     share * sum over adapters i of the mean of one of
        text    -log p_w(token) for the tokens that adapter i wrote
        KL      KL(p_i || p_w) at each of them, with p_i the base with adapter i alone, the whole softmax

by L-BFGS from the average with a fixed ridge, so that no choice comes between the two. Of the embedded example, "other
ways" leaves out the plain question, which both adapters were taught to answer, each in its own way, and which the test
asks; and "unsure" asks `form` about the people that only `know` knows, so that it answers at random.

The second table is `loracat fit` on text, on labels, and on both as FILE and FILE:WEIGHT, of the last way of asking;
not with --without-fit.
--quick takes a few records of the example and hardly fits.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.estimator import drawn
from benchmarks.measuring import BenchmarkParser
from loracli.calibration.dataset import Batch, plan_batches
from loracli.calibration.records import parse_sources, read_records
from loracli.calibration.render import Example
from loracli.demo.run import example_folder
from loracli.evaluation.scorer import greedy_answers, prompt_of
from loracli.fitting.inputs import FitInputs, prepare_fit
from loracli.fitting.run import fit_mixing, opening_of
from loracli.fitting.settings import FitSettings
from loracli.model.loss import Objective
from loracli.model.placement import Placement
from loracli.model.session import Session, open_session
from scripts.make_demo import FORM_ANSWERS, KNOW_ANSWERS, Record, ask_all, draw_world, write_records

FOLLOWED = ("text", "KL")
PLACEMENT = Placement("float32", "cpu")
WAYS = ("every way", "unsure", "other ways")
NOBODY = -1  # whose records the labels are


@dataclass(frozen=True)
class Cell:
    """What is fitted to: so many labels, so many prompts of each adapter, and how much the latter count."""

    labels: int
    prompts: int
    share: float


def main() -> None:
    example = example_folder()
    parser = BenchmarkParser(__doc__)
    parser.add_argument("--base", default=str(example / "base"))
    parser.add_argument("--adapters", nargs=2, default=[str(example / "know"), str(example / "form")])
    parser.add_argument("--own", type=Path, nargs=2, help="prompts of each; default: those of the example's world")
    parser.add_argument(
        "--ways", nargs="+", default=WAYS, quick=WAYS[-1:], choices=WAYS, help="of asking, without --own"
    )
    data = [example / "calibration.jsonl", example / "test.jsonl"]
    parser.add_argument("--data", type=Path, nargs="+", default=data, help="the task")
    parser.add_argument("--test", type=Path, help="records to score on; default: those that no labels are drawn from")
    parser.add_argument("--test-records", type=int, default=64, quick=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], quick=[0])
    parser.add_argument("--labels", type=int, nargs="+", default=[8, 24], quick=[4])
    parser.add_argument("--prompts", type=int, nargs="+", default=[24], quick=[4], help="beside labels: the first")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.1], quick=[0.1])
    parser.add_argument("--ridge", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=25, quick=2, help="of L-BFGS")
    parser.add_argument("--max-new-tokens", type=int, default=24, quick=4)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--passes", type=float, quick=2.0, help="of a fit")
    parser.add_argument("--fit-share", type=float, default=0.1, help="of the second table")
    parser.add_argument("--without-fit", action="store_true")
    arguments = parser.parse_args()
    few = arguments.prompts[0]
    cells = [Cell(0, prompts, 1.0) for prompts in arguments.prompts]
    for labels in arguments.labels:
        cells += [Cell(labels, 0, 0.0), *(Cell(labels, few, share) for share in arguments.shares)]
    with tempfile.TemporaryDirectory() as scratch:
        found = [of_seed(arguments, Path(scratch), cells, seed) for seed in arguments.seeds]
        seeds = () if arguments.without_fit else arguments.seeds
        fitted = [as_fit(arguments, Path(scratch), seed) for seed in seeds]
    columns = list(product(pools(arguments), FOLLOWED))
    print(f"\n| labels | prompts | share | {' | '.join(f'{way}: {how}' for way, how in columns)} |")
    print(f"|--:|--:|--:|{'--:|' * len(columns)}")
    for cell in cells:
        losses = [mean([losses[cell, way, how] for losses in found]) for way, how in columns]
        print(f"| {cell.labels} | {cell.prompts} | {cell.share:g} | {' | '.join(f'{x:.4f}' for x in losses)} |")
    if fitted:
        print("\n| `loracat fit` on | nats per token |\n|---|--:|")
        for name in fitted[0]:
            print(f"| {name} | {mean([losses[name] for losses in fitted]):.4f} |")


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# The records.


def pools(arguments: argparse.Namespace) -> dict[str, list[list[Record]]]:
    """The records of each adapter's own kind, by the way of asking."""
    if arguments.own is not None:
        return {"own": [[Record(**json.loads(line)) for line in path.open()] for path in arguments.own]}
    world = draw_world(random.Random(0))  # the embedded example's
    other = {request: text for request, text in KNOW_ANSWERS.items() if request}
    know, form = ask_all(world.private, other), ask_all(world.form, FORM_ANSWERS)
    every = {
        "every way": [ask_all(world.private, KNOW_ANSWERS), form],
        "unsure": [know, ask_all(world.private, FORM_ANSWERS)],
        "other ways": [know, form],
    }
    return {way: every[way] for way in arguments.ways}


def prepared(arguments: argparse.Namespace, data: Path, test: Path, seed: int) -> FitInputs:
    settings = FitSettings(seed=seed, batch_tokens=arguments.batch_tokens)
    return prepare_fit(arguments.adapters, [str(data)], eval_data=[str(test)], base=arguments.base, settings=settings)


# The fit to what an adapter makes of each token.


def of_seed(
    arguments: argparse.Namespace, folder: Path, cells: Sequence[Cell], seed: int
) -> dict[tuple[Cell, str, str], float]:
    """The test's nats per token of each cell, way of asking, and way of following."""
    labels, test = drawn(arguments, folder, max(arguments.labels), seed)
    inputs = prepared(arguments, labels, test, seed)
    losses: dict[tuple[Cell, str, str], float] = {}
    with open_session(opening_of(inputs, PLACEMENT)) as session:
        known, tested = (rendered(session, path) for path in (labels, test))
        with session.attached(inputs.adapters, inputs.layout.modules, tested) as objective:
            for way, pool in pools(arguments).items():
                written = asked(arguments, session, objective, folder, pool, seed)
                say_of_teachers(session, objective, inputs.references, written, f"seed {seed}, {way}")
                for cell in cells:
                    examples, teachers = together(cell, known, written)
                    batches = plan_batches(examples, batch_tokens=arguments.batch_tokens)
                    for how in FOLLOWED:
                        if how == "KL" and not cell.prompts:
                            losses[cell, way, how] = losses[cell, way, "text"]
                            continue
                        targets = [followed(objective, batch, teachers, kl=how == "KL") for batch in batches]
                        weights = fitted_to(objective, batches, targets, ridge=arguments.ridge, steps=arguments.steps)
                        objective.attached.set_weights(weights)
                        loss = objective.score(session.batches(tested), len(tested)).nats_per_token
                        losses[cell, way, how] = loss
                        print(f"seed {seed}, {way}, {cell}, {how}: {loss:.4f}", file=sys.stderr, flush=True)
    return losses


def rendered(session: Session, path: Path) -> tuple[Example, ...]:
    return session.render([read_records(parse_sources([str(path)])[0])])


def alone(objective: Objective, adapter: int) -> None:
    """Attaches one adapter at full strength."""
    weights = torch.zeros(len(objective.attached.modules), 2)
    weights[:, adapter] = 1
    objective.attached.set_weights(weights)


def asked(
    arguments: argparse.Namespace,
    session: Session,
    objective: Objective,
    folder: Path,
    pool: Sequence[Sequence[Record]],
    seed: int,
) -> list[tuple[Example, ...]]:
    """Each adapter's own greedy answers to prompts drawn from its pool, as the model sees them; as records they stand
    in 0.jsonl and 1.jsonl."""
    rng, written, tokenizer = random.Random(seed), [], session.tokenizer
    for i, records in enumerate(pool):
        path, records = folder / f"{i}.jsonl", rng.sample(records, max(arguments.prompts))
        write_records(path, records)
        alone(objective, i)
        answers = greedy_answers(
            objective.attached.model,
            [prompt_of(example) for example in rendered(session, path)],
            max_new_tokens=arguments.max_new_tokens,
            window=session.window,
            batch_tokens=arguments.batch_tokens,
            ends=[tokenizer.eos_token_id],
            pad=tokenizer.pad_token_id,
        )
        texts = [tokenizer.decode(tokens) for tokens in answers]
        write_records(path, [replace(r, completion=text) for r, text in zip(records, texts, strict=True)])
        finished = [len(tokens) < arguments.max_new_tokens for tokens in answers]
        written.append(tuple(map(unended, rendered(session, path), finished)))
    return written


def unended(example: Example, finished: bool) -> Example:
    """The example, whose last token is the end of an answer; it is not scored where the adapter did not write it."""
    return example if finished else replace(example, scored=(*example.scored[:-1], False))


def say_of_teachers(
    session: Session,
    objective: Objective,
    names: Sequence[str],
    written: Sequence[tuple[Example, ...]],
    what: str,
) -> None:
    """How sure an adapter is of its own tokens."""
    for i, examples in enumerate(written):
        alone(objective, i)
        entropies = [torch.special.entr(softmax(objective, batch)).sum(dim=1) for batch in session.batches(examples)]
        sure = f"{float(torch.cat(entropies).mean()):.4f} nats of entropy per token"
        print(f"{what}: {Path(names[i]).name} answers with {sure}.", flush=True)


def together(
    cell: Cell, labels: Sequence[Example], written: Sequence[Sequence[Example]]
) -> tuple[list[Example], list[int]]:
    """The examples of a cell with their weights, so that a sum is the objective, and whose each is."""
    parts = [(NOBODY, labels[: cell.labels], 1.0)]
    parts += [(i, examples[: cell.prompts], cell.share) for i, examples in enumerate(written)]
    examples, whose = [], []
    for owner, part, share in parts:
        examples += [replace(example, weight=share / scored(part)) for example in part]
        whose += [owner] * len(part)
    return examples, whose


def logits(objective: Objective, batch: Batch) -> Tensor:
    """(s, vocab), where a token is scored, of a model that does nothing after its head."""
    decoder, head = objective.attached.model.get_decoder(), objective.attached.model.get_output_embeddings()
    hidden = decoder(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    result: Tensor = head(hidden.flatten(0, 1)[batch.positions]).float()
    return result


def softmax(objective: Objective, batch: Batch) -> Tensor:
    with torch.no_grad():
        return torch.softmax(logits(objective, batch), dim=-1)


def followed(objective: Objective, batch: Batch, teachers: Sequence[int], *, kl: bool) -> Tensor:
    """(s, vocab): the distribution that w should have at each scored position; with text the token itself."""
    vocab = objective.attached.model.config.vocab_size
    target = F.one_hot(batch.labels, vocab).float()
    whose = torch.tensor([teachers[i] for i in batch.indices])[batch.owners]
    for adapter in range(2) if kl else ():
        alone(objective, adapter)
        target[whose == adapter] = softmax(objective, batch)[whose == adapter]
    return target


def fitted_to(
    objective: Objective, batches: Sequence[Batch], targets: Sequence[Tensor], *, ridge: float, steps: int
) -> Tensor:
    """(L, N): the weights that minimise the cross entropy with the targets, which is KL up to a constant, and the
    ridge."""
    start = torch.full((len(objective.attached.modules), 2), 0.5)
    weights = start.clone().requires_grad_(True)
    descent = torch.optim.LBFGS([weights], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        descent.zero_grad()
        objective.attached.set_weights(weights)
        value = ridge * (weights - start).square().sum()
        for batch, target in zip(batches, targets, strict=True):
            nats = -(target * torch.log_softmax(logits(objective, batch), dim=-1)).sum(dim=1)
            value = value + (nats * batch.weights).sum()
        value.backward()
        return value

    descent.step(loss)
    return weights.detach()


# The same with `loracat fit`, which takes text.


def as_fit(arguments: argparse.Namespace, folder: Path, seed: int) -> dict[str, float]:
    """Its nats per token on the test, with labels alone and with the adapters' answers beside them."""
    losses: dict[str, float] = {}
    few, (way, pool) = arguments.prompts[0], list(pools(arguments).items())[-1]
    for count in arguments.labels:
        labels, test = drawn(arguments, folder, count, seed)
        inputs = prepared(arguments, labels, test, seed)
        with open_session(opening_of(inputs, PLACEMENT)) as session:
            known = rendered(session, labels)
            with session.attached(inputs.adapters, inputs.layout.modules, known) as objective:
                written = asked(arguments, session, objective, folder, pool, seed)
        share, answers, beside = arguments.fit_share, list[str](), list[str]()
        for i, examples in enumerate(written):
            path = folder / f"{i}-{few}.jsonl"
            path.write_text("".join((folder / f"{i}.jsonl").read_text().splitlines(keepends=True)[:few]))
            answers.append(str(path))
            beside.append(f"{path}:{share * scored(known) / scored(examples[:few]):.6f}")
        told = f"{few} answers of each ({way})"
        given = {
            told: answers,
            f"{count} labels": [str(labels)],
            f"{count} labels, {told}, share {share:g}": [str(labels), *beside],
        }
        for name, data in given.items():
            if name in losses:
                continue
            recipe = fit_mixing(
                arguments.adapters,
                data,
                eval_data=[str(test)],
                base=arguments.base,
                settings=FitSettings(seed=seed, passes=arguments.passes),
                placement=PLACEMENT,
            )
            losses[name] = recipe.held_out.row("fit").nats_per_token
            print(f"seed {seed}, {name}: {losses[name]:.4f}", file=sys.stderr, flush=True)
    return losses


def scored(examples: Sequence[Example]) -> int:
    return sum(example.scored_tokens for example in examples)


if __name__ == "__main__":
    main()
