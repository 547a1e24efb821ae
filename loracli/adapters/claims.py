"""What adapters say of themselves in words: the task, the base model, the licence; and what holds for several of them.

The task is what a model with an adapter computes, `task_type` of its config. PEFT wraps a model by its task, and takes
no other name of one than its own.

Of the base, names are all there is to go by: what the user asked for is done, shapes are checked, and each adapter that
names another one is said.

The licence stands in the metadata at the head of a README.md, as the Hub has it: YAML between two lines of three
dashes. The README of an adapter is as untrusted as its weights. Every scalar is read as text and no tag is honoured, so
that no date, number or merge key is built; size is limited before anything is parsed. Aliases share what they name, so
what they multiply is endless only where somebody writes it out. How deep brackets are nested is limited too: the parser
looks at every open one for each token. A composition may state the licence that all of its ingredients state.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from loracli.errors import IncompatibleAdapters, MalformedAdapter, UnsupportedAdapter, UsageError
from loracli.hub.references import distinct_bases, is_hub_id
from loracli.progress import Progress
from loracli.system.escaping import shell_word
from loracli.system.files import README_FILE, open_regular

if TYPE_CHECKING:
    from loracli.adapters.adapter import LoraAdapter

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
        if option is None:
            way_out = f"compose them first, with loracat export and --task-type {known}, and go on with that"
        raise IncompatibleAdapters(f"the adapters have different task types: {said}", hint=way_out)
    return next(iter(named.values())) if named and len(named) == len(tasks) else None


def check_language_models(
    adapters: Sequence[LoraAdapter],
    work: str,
    *,
    way_out: str = "compose it from the files: loracat export --method NAME --adapters ...",
) -> None:
    """Raises UnsupportedAdapter for one of another task than causal language models, which alone `work` runs."""
    for adapter in adapters:
        task = (adapter.config.task_type or CAUSAL_LM).upper()
        if task in TASKS and task != CAUSAL_LM:
            raise UnsupportedAdapter(
                f"{adapter.reference} has the task_type {task}, and {work} takes those of causal language models alone",
                hint=f"{way_out}; or, if it was trained as a causal language model, write {CAUSAL_LM} into its "
                "adapter_config.json",
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


# What the names of quantised copies end in: unsloth/NAME-unsloth-bnb-4bit, mlx-community/NAME-8bit, TheBloke/NAME-GPTQ.
_QUANTISED = re.compile(r"((-unsloth)?(-bnb)?-[48]bit|-gptq|-awq)$")


@dataclass(frozen=True)
class OtherBase:
    """What one adapter names.

    Args:
        adapter: its reference.
        model: the base that it names.
        copy_of: the base, or what another adapter names, if by the names that is the same model and one of the two is
            quantised; None otherwise.
        harmless: whether it is such a copy of the base itself.
    """

    adapter: str
    model: str
    copy_of: str | None
    harmless: bool

    def __str__(self) -> str:
        said = "" if self.copy_of is None else f", by its name the same model as {self.copy_of}, quantised"
        return f"{self.adapter} names {self.model}{said}"


def other_bases(
    base: str, claims: Mapping[str, str | None], *, directory: bool = False, saved_as: str | None = None
) -> tuple[OtherBase, ...]:
    """The adapters that name another base than this one, in their order. A path, which only its author has, is no name.

    A directory may be called anything: adapters that name a model of its last name mean it, and so do adapters that all
    name one model where nothing says what is in the directory, which a path that an adapter names does.

    Args:
        base: a Hub id, or the name of a directory.
        claims: what each adapter names, by its reference.
        directory: whether `base` is only that.
        saved_as: the Hub id that a directory's config names, None without one.
    """
    stated = {adapter: model for adapter, model in claims.items() if model and is_hub_id(model)}
    own = [name for name in (base, saved_as) if name]
    named = not directory or saved_as is not None or _is_named(base, claims.values())
    taken = not named and len({_plain(model) for model in stated.values()}) == 1
    found = []
    for adapter, model in stated.items():
        quantised = _is_quantised(model)
        meant = directory and (_last(model) == _last(base) or (taken and not quantised))
        if meant or model.lower() in (name.lower() for name in own):
            continue
        same = [
            name
            for name in (*own, *(stated.values() if quantised else ()))
            if _plain(name) == _plain(model) and name != model
        ]
        copies = [name for name in same if quantised != _is_quantised(name)] or ([base] if taken else [])
        copy_of = copies[0] if copies else None
        found.append(OtherBase(adapter, model, copy_of, taken or copy_of in own))
    return tuple(found)


def hub_name(folder: str, claims: Iterable[str | None]) -> str | None:
    """The Hub id that a directory is taken for: the one that adapters name, if it is one alone and none of them names
    a path that ends as the directory does.

    Args:
        folder: the last name of the directory.
        claims: what each adapter names.
    """
    given = [model for model in claims if model]
    found = distinct_bases(model for model in given if is_hub_id(model))
    return found[0] if len(found) == 1 and not _is_named(folder, given) else None


def _is_named(folder: str, claims: Iterable[str | None]) -> bool:
    """Whether an adapter names a path that ends as the directory does."""
    return any(model and not is_hub_id(model) and _last(model) == _last(folder) for model in claims)


@dataclass(frozen=True)
class WayOut:
    """What to do where adapters name different base models.

    Args:
        hint: the sentence.
        base: what to give with `--base` if the names are those of a base and of a model that adapters were merged into
            it for, None where that cannot be.
    """

    hint: str
    base: str | None = None


def way_out_of(claims: Mapping[str, str | None]) -> WayOut:
    """The way out where adapters name different base models.

    Of two names, one may be that of a model which the adapters of the other were merged into: an adapter that DPO
    trained on the model that SFT left. With W_1 = W_0 + dW_1, what it gives is W_1 + dW_2 = W_0 + dW_1 + dW_2, so the
    sum at weights 1 is exact on the first base. Which is the first, names tell alone: a Hub id before a path, `llama`
    before `llama-sft`, else the one that stands first.

    Args:
        claims: what each adapter names, by its reference.
    """
    general = "name the right base model with --base"
    models = distinct_bases(claims.values())
    if len(models) != 2:
        return WayOut(general)
    first, second = sorted(models, key=lambda model: not is_hub_id(model))
    if _plain(first) == _plain(second):
        same = second if _is_quantised(first) and is_hub_id(second) else first
        return WayOut(f"if these are one model by two names, add --base {shell_word(same)}; if not, {general}")
    if is_hub_id(first) == is_hub_id(second) and _last(first).startswith(_last(second)):
        first, second = second, first
    merged = [adapter for adapter, model in claims.items() if distinct_bases((first, model)) == (first,) and model]
    them = merged[0] if len(merged) == 1 else "the adapters that name it"
    return WayOut(
        f"if {second} is {first} with {them} merged in (DPO after SFT), the sum of the updates is for {first}: "
        f"add --base {shell_word(first)}; if not, {general}",
        first,
    )


def say_other_bases(base: str, others: Sequence[OtherBase], progress: Progress) -> None:
    """One warning for all that name another model, and one note for those that name a quantised copy of the base."""
    said = {harmless: "; ".join(str(o) for o in others if o.harmless == harmless) for harmless in (False, True)}
    if said[False]:
        progress.warn(f"adapters of other bases than {base}: {said[False]}; only shapes are checked")
    if said[True]:
        progress.note(f"the base is {base}; {said[True]}")


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def _plain(name: str) -> str:
    """The last part of a name without what quantised copies end in."""
    return _QUANTISED.sub("", _last(name))


def _is_quantised(name: str) -> bool:
    return _plain(name) != _last(name)


_MAX_README_BYTES = 1 << 20
_MAX_FRONT_MATTER = 32 << 10  # characters
_MAX_OPEN = 100  # brackets at once, of any kind, those in text counted along
_BLOCK = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t\r]*$", re.DOTALL | re.MULTILINE)


def read_front_matter(path: Path) -> dict[Any, Any]:
    """The metadata of a README.md, strings in mappings and lists; empty where there is none.

    Raises:
        MalformedAdapter: if it is too large, not UTF-8, or not the YAML of a mapping.
    """
    with open_regular(path) as file:
        data = file.read(_MAX_README_BYTES + 1)
    if len(data) > _MAX_README_BYTES:
        raise _malformed(path, f"is larger than {_MAX_README_BYTES} bytes")
    try:
        block = _BLOCK.match(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise _malformed(path, "is not UTF-8") from None
    if block is None:
        return {}
    if len(block[1]) > _MAX_FRONT_MATTER:
        raise _malformed(path, f"has more than {_MAX_FRONT_MATTER} characters of metadata")
    if _most_open(block[1]) > _MAX_OPEN:
        raise _malformed(path, f"has metadata with more than {_MAX_OPEN} open brackets")
    try:
        found = yaml.load(block[1], Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError):
        raise _malformed(path, "has metadata that is not valid YAML") from None
    if found is not None and not isinstance(found, dict):
        raise _malformed(path, "has metadata that is not a mapping")
    return found or {}


def _most_open(block: str) -> int:
    steps = (1 if bracket in "[{" else -1 for bracket in re.findall(r"[\[\]{}]", block))
    return max(accumulate(steps), default=0)


def _malformed(path: Path, what: str) -> MalformedAdapter:
    return MalformedAdapter(what, where=str(path), hint="put right what stands between the dashes at its head")


_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_NAMES_NONE = ("other", "unknown")  # two adapters that both say so need not mean the same


def stated_licences(adapters: Sequence[LoraAdapter]) -> tuple[str | None, ...]:
    """The Hub's identifier of the licence that each adapter's README.md states, None where it states none that can be
    read as one."""
    return tuple(_stated(adapter) for adapter in adapters)


def agreed_licence(licences: Sequence[str | None]) -> str | None:
    """The licence that all of them are, None if any differs or is not stated."""
    return licences[0] if len(set(licences)) == 1 else None


def _stated(adapter: LoraAdapter) -> str | None:
    path = adapter.path / README_FILE
    if not os.path.lexists(path):
        return None
    try:
        found = read_front_matter(path).get("license")
    except MalformedAdapter:
        return None
    stated = found.strip().lower() if isinstance(found, str) else ""
    return stated if _IDENTIFIER.fullmatch(stated) and stated not in _NAMES_NONE else None
