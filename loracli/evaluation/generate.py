"""Greedy answers of a model, whatever is attached to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from loracli.progress import SILENT, Progress

TASK = "answers"


def greedy_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_tokens: int,
    ends: Sequence[int],
    pad: int,
    progress: Progress = SILENT,
) -> list[list[int]]:
    """The tokens that the model writes after each prompt, up to and without an end.

    Prompts stand in batches by length, the shorter ones padded on the left and masked. Nothing is sampled, whatever the
    model's own generation config asks for.

    Args:
        model: a transformers causal language model, in evaluation mode.
        prompts: n of them, each at least one token.
        max_new_tokens: of an answer.
        batch_tokens: of a batch, padding and answers included, where one prompt has no more by itself.
        ends: tokens that end an answer.
        pad: token to fill up with.
        progress: told how many are done.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    device = next(model.parameters()).device
    progress.begin(TASK, len(prompts), "records")
    try:
        with _greedy(model, max_new_tokens, ends, pad) as config:
            for rows in _batches([len(prompt) for prompt in prompts], max_new_tokens, batch_tokens):
                longest = max(len(prompts[i]) for i in rows)
                missing = [longest - len(prompts[i]) for i in rows]
                ids = torch.tensor([[pad] * m + list(prompts[i]) for m, i in zip(missing, rows, strict=True)])
                mask = torch.tensor([[0] * m + [1] * (longest - m) for m in missing])
                with torch.no_grad():
                    found = model.generate(
                        input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
                    )
                for i, answer in zip(rows, found[:, longest:].tolist(), strict=True):
                    end = next((place for place, token in enumerate(answer) if token in ends), len(answer))
                    answers[i] = answer[:end]
                progress.advance(TASK, len(rows))
    finally:
        progress.finish(TASK)
    return answers


def _batches(lengths: Sequence[int], max_new_tokens: int, batch_tokens: int) -> Iterator[list[int]]:
    """Places of prompts, by length."""
    rows: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if rows and (len(rows) + 1) * (lengths[i] + max_new_tokens) > batch_tokens:
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
    model.generation_config = config
    try:
        yield config
    finally:
        model.generation_config = own
