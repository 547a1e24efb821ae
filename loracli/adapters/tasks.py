"""Tasks: what a model with an adapter computes, as `task_type` of its config says, and the classes that load it.

PEFT wraps a model by its task, and takes no other name of one than its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from loracli.adapters.adapter import LoraAdapter
from loracli.errors import IncompatibleAdapters, UnsupportedAdapter, UsageError

CAUSAL_LM = "CAUSAL_LM"
# How the names of transformers' class for the base and of PEFT's for both end (peft/auto.py).
_ENDS: dict[str, tuple[str, str]] = {
    CAUSAL_LM: ("ForCausalLM", "ForCausalLM"),
    "SEQ_2_SEQ_LM": ("ForSeq2SeqLM", "ForSeq2SeqLM"),
    "SEQ_CLS": ("ForSequenceClassification", "ForSequenceClassification"),
    "TOKEN_CLS": ("ForTokenClassification", "ForTokenClassification"),
    "QUESTION_ANS": ("ForQuestionAnswering", "ForQuestionAnswering"),
    "FEATURE_EXTRACTION": ("", "ForFeatureExtraction"),
}
TASKS = tuple(_ENDS)
_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")  # of transformers' classifiers, by labels


def model_class(task: str | None) -> str:
    """The name of transformers' class for the base of a task; without one that of a causal language model."""
    return f"AutoModel{_ENDS[task or CAUSAL_LM][0]}"


def checked_task(asked: str) -> str:
    """A task that the user named.

    Raises:
        UsageError: if PEFT has none of that name.
    """
    if asked.upper() not in TASKS:
        raise UsageError(f"--task-type {asked} is not one of {', '.join(TASKS)}")
    return asked.upper()


def agreed_task(adapters: Sequence[LoraAdapter], *, option: str | None = None) -> str | None:
    """The task that all adapters state; None, with which PEFT wraps any model, if one of them states none.

    Args:
        adapters: that are composed.
        option: of the command that chooses one, None without; for the error.
    Raises:
        UnsupportedAdapter: if one states a task that PEFT does not know.
        IncompatibleAdapters: if they state different ones.
    """
    stated = {adapter.reference: adapter.config.task_type for adapter in adapters}
    tasks = {name: None if task is None else task.upper() for name, task in stated.items()}
    known = next((task for task in tasks.values() if task in TASKS), CAUSAL_LM)
    way_out = f"write the right one of {', '.join(TASKS)} into its adapter_config.json"
    if option is not None:
        way_out = f"say which one the result has, as {option} {known}"
    for name, task in tasks.items():
        if task is not None and task not in TASKS:
            raise UnsupportedAdapter(f"{name} has the task_type {stated[name]}, which PEFT does not know", hint=way_out)
    named = {name: task for name, task in tasks.items() if task is not None}
    if len(set(named.values())) > 1:
        said = ", ".join(f"{name} is for {task}" for name, task in named.items())
        raise IncompatibleAdapters(f"the adapters have different task types: {said}", hint=way_out)
    return next(iter(named.values())) if named and len(named) == len(tasks) else None


def check_language_models(adapters: Sequence[LoraAdapter], work: str) -> None:
    """Raises UnsupportedAdapter for one of another task than causal language models, which alone `work` runs."""
    for adapter in adapters:
        task = (adapter.config.task_type or CAUSAL_LM).upper()
        if task in TASKS and task != CAUSAL_LM:
            raise UnsupportedAdapter(
                f"{adapter.reference} has the task_type {task}, and {work} takes those of causal language models alone",
                hint="compose it from the files: loracat export --method NAME --adapters ...; or, if it was trained as "
                f"a causal language model, write {CAUSAL_LM} into its adapter_config.json",
            )


def head_size(saved: Mapping[str, tuple[int, ...]]) -> int | None:
    """How many labels a classifier has that was saved whole, by the shapes of such parameters; None without one."""
    sizes = {shape[0] for name, shape in saved.items() if f".{name}".endswith(tuple(f".{head}" for head in _HEADS))}
    return sizes.pop() if len(sizes) == 1 else None


def loading_lines(task: str | None, adapter: str, base: str | None, *, named: bool, labels: int | None) -> list[str]:
    """Python that loads base and adapter with PEFT: imports, and one expression, the last line.

    Args:
        task: `task_type` of the adapter's config.
        adapter: its directory.
        base: a Hub id or directory to load the base from, None where that is not known.
        named: whether the adapter's own config leads to the base, as a Hub id does and a directory's name does not.
        labels: of a classifier that the adapter brings, None without one.
    """
    words = "" if labels is None else f", num_labels={labels}"
    if task is not None and named:
        name = f"AutoPeftModel{_ENDS[task][1]}"
        return [f"from peft import {name}", f"{name}.from_pretrained({_quoted(adapter)}{words})"]
    imports, loaded = ["from peft import PeftModel"], "base_model"
    if task is not None:
        imports.append(f"from transformers import {model_class(task)}")
        place = "BASE" if base is None else _quoted(base)
        loaded = f"{model_class(task)}.from_pretrained({place}{words})"
    return [*imports, f"PeftModel.from_pretrained({loaded}, {_quoted(adapter)})"]


def _quoted(text: str) -> str:
    """As a string of Python, whatever is in it: JSON's escapes are among Python's."""
    return json.dumps(text)
