"""Greedy answers and exact match."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from loracli.calibration.records import Record


def exact_matches(
    model: Any, tokenizer: Any, records: Sequence[Record], *, max_new_tokens: int = 64, batch_size: int = 64
) -> list[bool]:
    """Whether the greedy answer to each prompt is the record's completion, white space at the ends aside.

    Prompts of the same length are answered together, so that none is padded.

    Args:
        model: a transformers causal language model, in evaluation mode.
        tokenizer: its tokenizer.
        records: of prompt and completion.
    """
    prompts = [tokenizer(record.content["prompt"]).input_ids for record in records]
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(index)
    result = [False] * len(records)
    for length, indices in sorted(by_length.items()):
        for start in range(0, len(indices), batch_size):
            rows = indices[start : start + batch_size]
            input_ids = torch.tensor([prompts[i] for i in rows], device=next(model.parameters()).device)
            with torch.no_grad():
                answers = model.generate(
                    input_ids=input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    do_sample=False,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=pad,
                )
            for row, answer in zip(rows, answers, strict=True):
                text = tokenizer.decode(answer[length:], skip_special_tokens=True)
                result[row] = text.strip() == records[row].content["completion"].strip()
    return result
