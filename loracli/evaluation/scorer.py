"""The scores of a task metric, of whatever is attached to a model: every record asked as the loss sees it, its answer
generated greedily or its options weighed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loracli.calibration.dataset import plan_batches
from loracli.calibration.records import CalibrationFile, Record
from loracli.calibration.render import Example, plain_prompt, render_file
from loracli.errors import CalibrationError
from loracli.evaluation.metrics import (
    CHOICE,
    COMMAND,
    NUMERIC,
    Rule,
    TaskMetric,
    contains,
    is_exact,
    is_same_number,
    last_number,
    run_metric,
)
from loracli.progress import SILENT, Progress, begun

if TYPE_CHECKING:
    from loracli.model.loss import Objective


TASK = "answers"


def greedy_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    window: int,
    batch_tokens: int,
    ends: Sequence[int],
    pad: int,
    progress: Progress = SILENT,
) -> list[list[int]]:
    """The tokens that the model writes after each prompt, up to and without an end, and as far as its window goes.

    Prompts stand in batches by length, the shorter ones padded on the left and masked. Nothing is sampled, whatever the
    model's own generation config asks for.

    Args:
        model: a transformers causal language model, in evaluation mode.
        prompts: n of them, each at least one token.
        max_new_tokens: of an answer.
        window: tokens that the model takes, prompt and answer together; more than any prompt has.
        batch_tokens: of a batch, padding and answers included, where one prompt has no more by itself.
        ends: tokens that end an answer.
        pad: token to fill up with.
        progress: told how many are done.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    with begun(progress, TASK, len(prompts), "records"), _greedy(model, max_new_tokens, ends, pad) as config:
        for rows in _batches([len(prompt) for prompt in prompts], max_new_tokens, window, batch_tokens):
            config.max_new_tokens = min(max_new_tokens, window - len(prompts[rows[-1]]))
            for i, written in zip(rows, _written(model, [prompts[i] for i in rows], config), strict=True):
                answers[i] = written[: _end_of(written, ends)]
            progress.advance(TASK, len(rows))
    return answers


def told_answer(
    model: Any,
    prompt: Sequence[int],
    tell: Callable[[int], None],
    *,
    max_new_tokens: int,
    ends: Sequence[int],
    pad: int,
) -> tuple[list[int], bool]:
    """As `greedy_answers` of one prompt, each token told when it is chosen; and whether an end was reached, which is
    not told.

    Args:
        model, max_new_tokens, ends, pad: as there.
        prompt: at least one token.
        tell: gets each token.
    """
    with _greedy(model, max_new_tokens, ends, pad) as config:
        (written,) = _written(model, [prompt], config, _Told(tell, ends))
    end = _end_of(written, ends)
    return written[:end], end < len(written)


class _Told:
    """What transformers' generation hands the prompt to, and then every token.

    Args:
        tell: gets every token but the prompt's, and no end.
        ends: tokens that end an answer.
    """

    def __init__(self, tell: Callable[[int], None], ends: Sequence[int]) -> None:
        self._tell, self._ends, self._begun = tell, ends, False

    def put(self, value: Tensor) -> None:
        if self._begun and int(value) not in self._ends:
            self._tell(int(value))
        self._begun = True

    def end(self) -> None:
        """Nothing is held back."""


def _written(
    model: Any, prompts: Sequence[Sequence[int]], config: Any, streamer: _Told | None = None
) -> list[list[int]]:
    """What the model writes after each of these prompts, an end and what fills up behind it included."""
    device, pad = next(model.parameters()).device, config.pad_token_id
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        found = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config, streamer=streamer
        )
    written: list[list[int]] = found[:, longest:].tolist()
    return written


def _end_of(written: Sequence[int], ends: Sequence[int]) -> int:
    """How many tokens stand before the first end."""
    return next((place for place, token in enumerate(written) if token in ends), len(written))


def _batches(lengths: Sequence[int], max_new_tokens: int, window: int, batch_tokens: int) -> Iterator[list[int]]:
    """Places of prompts, by length; alone where the window ends the answer, so that it ends no other's."""
    rows: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        longest = lengths[i] + max_new_tokens
        if rows and (longest > window or (len(rows) + 1) * longest > batch_tokens):
            yield rows
            rows = []
        rows.append(i)
    if rows:
        yield rows


@contextmanager
def _greedy(model: Any, max_new_tokens: int, ends: Sequence[int], pad: int) -> Iterator[Any]:
    """A generation config of our own; the model's is away for the time being, as generate fills ours up from it."""
    from transformers import GenerationConfig

    own = model.generation_config
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(ends) or None, pad_token_id=pad
    )
    # generate hands the head a view, the last position of each prompt. In bfloat16 on a CPU torch 2.13 then copies a
    # frozen head's weight for every prompt, and where there is no room for that, does without oneDNN for good.
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:]))
    model.generation_config = config
    try:
        yield config
    finally:
        model.generation_config = own
        hook.remove()


_UNCUT = 1 << 20  # tokens: a record is judged whole, whatever part of it the loss sees

# What an attached model scores on each record, (n,) in float64, higher is better.
Scorer = Callable[["Objective"], Tensor]


@dataclass(frozen=True)
class _Question:
    """A record as it is asked.

    Args:
        record: whole.
        prompt: tokens before its last answer, as the loss has them before the scored ones.
        end: the token that ends its answer, None where that is no special token.
    """

    record: Record
    prompt: tuple[int, ...]
    end: int | None


def check_answerable(metric: TaskMetric, records: Iterable[Record]) -> None:
    """Raises CalibrationError for the first record to which no answer could be right: a text, or one whose reference
    has no number, or is none of its choices, where the metric goes by these."""
    for record in records:
        if "text" in record.content:
            raise CalibrationError(
                f"{record.place}: texts without prompts have no answers",
                hint="use prompt and completion, or messages",
            )
        reference = _reference_of(record.content)
        if metric.name == NUMERIC and last_number(reference) is None:
            raise CalibrationError(
                f"{record.place}: its answer has no number, so none is right by {NUMERIC}",
                hint="judge texts by exact or contains, or leave the record out",
            )
        if metric.name == CHOICE and reference not in record.choices:
            reason = "its answer is none of its choices" if record.choices else "no choices"
            raise CalibrationError(
                f"{record.place}: {reason}",
                hint='give each record 2 to 26 different texts as "choices": ["...", "..."], its answer among them',
            )


def make_scorer(
    metric: TaskMetric,
    files: Sequence[CalibrationFile],
    places: Sequence[str],
    tokenizer: Any,
    *,
    max_length: int,
    window: int,
    batch_tokens: int,
    progress: Progress = SILENT,
) -> Scorer:
    """What gives the metric of some records.

    Args:
        metric: which.
        files: that hold the records.
        places: of n records, in the order of the scores.
        tokenizer: the base model's.
        max_length: tokens that a prompt may have.
        window: tokens that the base takes, prompt and answer together.
        batch_tokens: of a micro-batch of the loss; a batch of answers has four times as many.
        progress: told how many answers there are.
    Raises:
        CalibrationError: if a record has no prompt, a prompt is too long, or as `check_answerable`.
    """
    wanted = dict.fromkeys(places)
    wanted_records = [record for file in files for record in file.records if record.place in wanted]
    check_answerable(metric, wanted_records)
    _check_prompts(wanted_records, tokenizer)
    if metric.name == CHOICE:
        return _choices(files, wanted, tokenizer, window, batch_tokens)
    most = min(max_length, window - 1)
    questions = [found for file in files for found in _questions(file, wanted, tokenizer, most)]
    by_place = {question.record.place: question for question in questions}
    asked = [by_place[place] for place in places]
    return partial(_answered, metric, asked, tokenizer, window, 4 * batch_tokens, progress)


def _reference_of(content: dict[str, Any]) -> str:
    """The text that a record has as its last answer."""
    return str(content["messages"][-1]["content"] if "messages" in content else content["completion"])


def prompt_of(example: Example) -> tuple[int, ...]:
    """The tokens before the last run of scored ones."""
    end = max(place for place, flag in enumerate(example.scored) if flag)
    start = next(place for place in range(end, -1, -1) if not example.scored[place]) + 1
    return example.input_ids[:start]


def _check_prompts(records: Sequence[Record], tokenizer: Any) -> None:
    """Raises CalibrationError for a record that nothing stands before, so that there is no answer."""
    empty = next((record.place for record in records if record.content.get("prompt") == ""), None)
    if empty is not None and not plain_prompt(tokenizer, ""):
        raise CalibrationError(
            f"{empty}: the prompt is empty, and the base's tokenizer puts nothing before a text, so there is no answer",
            hint="write a prompt, or leave the record out",
        )


def _questions(file: CalibrationFile, wanted: dict[str, None], tokenizer: Any, most: int) -> list[_Question]:
    records = tuple(record for record in file.records if record.place in wanted)
    if not records:
        return []
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    questions = []
    rendered = _rendered(replace(file, records=tuple(map(_asked, records))), tokenizer)
    for record, example in zip(records, rendered, strict=True):
        prompt, last = prompt_of(example), example.input_ids[len(example.scored) - 1]
        if not 0 < len(prompt) <= most:
            raise CalibrationError(
                f"{record.place}: the prompt has {len(prompt)} tokens; an answer needs 1 to {most}",
                hint="raise --max-length as far as the base goes, or leave the record out",
            )
        questions.append(_Question(record, prompt, last if last in special else None))
    return questions


def _asked(record: Record) -> Record:
    """The record with its last answer alone scored where another answer comes right before it, as a template may write
    nothing between the two."""
    *_, before, _ = record.content.get("messages", (None, None))
    follows = before is not None and before["role"] == "assistant"
    return _answering(record, _reference_of(record.content)) if follows else record


def _rendered(file: CalibrationFile, tokenizer: Any) -> tuple[Example, ...]:
    return render_file(file, tokenizer, max_length=_UNCUT, whole=True).examples


def _answered(
    metric: TaskMetric,
    questions: Sequence[_Question],
    tokenizer: Any,
    window: int,
    batch_tokens: int,
    progress: Progress,
    objective: Objective,
) -> Tensor:
    ends = {question.end for question in questions} | {tokenizer.eos_token_id}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    answers = greedy_answers(
        objective.attached.model,
        [question.prompt for question in questions],
        max_new_tokens=metric.max_new_tokens,
        window=window,
        batch_tokens=batch_tokens,
        ends=sorted(end for end in ends if end is not None),
        pad=0 if pad is None else pad,
        progress=progress,
    )
    outputs = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    references = [_reference_of(question.record.content) for question in questions]
    if metric.name == COMMAND:
        values = run_metric(
            metric.command or "",
            [
                {
                    "line": question.record.line,
                    "prompt": tokenizer.decode(question.prompt),
                    "reference": reference,
                    "output": output,
                    "task": question.record.task,
                }
                for question, reference, output in zip(questions, references, outputs, strict=True)
            ],
        )
        return torch.tensor(values, dtype=torch.float64)
    by_number = partial(is_same_number, tolerance=metric.tolerance)
    rules: dict[str, Rule] = {"exact": is_exact, "contains": contains, NUMERIC: by_number}
    right = [rules[metric.name](output, reference) for output, reference in zip(outputs, references, strict=True)]
    return torch.tensor(right, dtype=torch.float64)


def _choices(
    files: Sequence[CalibrationFile], wanted: dict[str, None], tokenizer: Any, window: int, batch_tokens: int
) -> Scorer:
    """Every option of every record as an example of its own."""
    examples: list[Example] = []
    options: dict[str, list[str]] = {}  # by place
    right: dict[str, str] = {}
    for file in files:
        records = [record for record in file.records if record.place in wanted]
        for record in records:
            right[record.place] = _reference_of(record.content)
            options[record.place] = list(record.choices)
        each = tuple(_answering(record, option) for record in records for option in record.choices)
        if each:
            examples += _rendered(replace(file, records=each), tokenizer)
    for example in examples:
        if len(example.input_ids) > window:
            reason = f"with one of its choices it has {len(example.input_ids)} tokens; the base takes {window}"
            raise CalibrationError(f"{example.place}: {reason}", hint="leave the record out")
    batches = plan_batches(examples, batch_tokens=batch_tokens)

    def score(objective: Objective) -> Tensor:
        nats = iter(objective.score(batches, len(examples)).nats.tolist())
        values = {}
        for place, texts in options.items():
            costs = [next(nats) for _ in texts]
            values[place] = float(texts[costs.index(min(costs))] == right[place])
        return torch.tensor([values[place] for place in wanted], dtype=torch.float64)

    return score


def _answering(record: Record, text: str) -> Record:
    """The record with another last answer, and nothing else scored."""
    content = dict(record.content)
    if "messages" not in content:
        return replace(record, content={**content, "completion": text})
    *before, last = content["messages"]
    messages = [*before, {**last, "content": text}]
    return replace(record, content={**content, "messages": messages, "scored": [len(before)]})
