"""Weights by hand: numbers on the command line, or a file that says which modules get how much of each adapter.

    dW_l = sum_i w_li s_i B_li A_li        w_li as it was typed

A file has a table for each adapter, by its reference, the name of its directory, or its place as "#2":

    ["./math"]
    default = 0.7              # every module that nothing below names
    attention = 0.8            # a kind: attention, mlp or experts
    "0-7" = 0.5                # layers 0 to 7
    "8-11 mlp" = 0.9           # a kind in some layers
    "*.down_proj" = 1.2        # a pattern of module names: * and ? stand for anything
    "model.layers.3.mlp.up_proj" = -0.4

The narrower key decides: a module's name, then a pattern, a kind in some layers, layers, a kind, the default. Two keys
of one narrowness that give a module different weights contradict each other. Patterns are globs and never compiled to
regular expressions.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from loracli.adapters.names import layer, target_of
from loracli.errors import SettingsError, UsageError
from loracli.system.strict_json import StrictJsonError, parse_json

MOST = 1e6  # a weight: far beyond what any update is worth, and a typing error rather than a choice
MAX_BYTES = 4 << 20
DEFAULT = "default"
# A module is of a kind by the components of its path, as transformers and its predecessors call them.
KINDS: dict[str, frozenset[str]] = {
    "experts": frozenset({"experts"}),
    "attention": frozenset(
        {"self_attn", "attn", "attention", "self_attention", "cross_attn", "linear_attn", "SelfAttention"}
    ),
    "mlp": frozenset({"mlp", "feed_forward", "ffn", "block_sparse_moe", "shared_expert", "DenseReluDense"}),
}
_EXAMPLE = "--weights 0.7 0.3, or a file as `loracat show --weights` prints it"


@dataclass(frozen=True)
class _Key:
    """What a key of a file names: which modules, and how narrowly (the larger, the narrower)."""

    text: str
    narrowness: int
    takes: Callable[[str], bool]


def parse_weights(
    words: Sequence[str], adapters: Sequence[Collection[str]], modules: Sequence[Collection[str]]
) -> dict[str, tuple[float | None, ...]]:
    """The weights of every module, one for each adapter, None where it does not change the module.

    Args:
        words: numbers, apart or with commas between them, or the path of one file.
        adapters: of N adapters, what each may be called.
        modules: of N adapters, the modules that each changes, the experts of a parameter as one.
    Raises:
        UsageError: if the words are neither numbers nor a file that can be read.
        SettingsError: with everything in a file that cannot be honoured.
    """
    names = sorted({target_of(name) for own in modules for name in own})
    numbers = _numbers(words, len(adapters))
    if numbers is not None:
        columns = [dict.fromkeys(own, number) for own, number in zip(_targets(modules), numbers, strict=True)]
    else:
        columns = _columns(Path(words[0]), adapters, _targets(modules))
    return {name: tuple(column.get(name) for column in columns) for name in names}


def format_weights(labels: Sequence[str], weights: Mapping[str, Sequence[float | None]]) -> str:
    """The weights of modules as a file that `parse_weights` reads back to the last digit.

    Args:
        labels: of N adapters, what each is called.
        weights: of every module, one for each adapter.
    """
    lines = ["# loracat export --adapters " + " ".join(labels) + " --weights THIS-FILE"]
    for place, label in enumerate(labels):
        own = {name: w for name, row in weights.items() if (w := row[place]) is not None}
        lines += ["", f"[{json.dumps(label)}]"]
        if len(set(own.values())) == 1:
            lines.append(f"{DEFAULT} = {next(iter(own.values()))!r}")
        else:
            lines += [f"{json.dumps(name)} = {weight!r}" for name, weight in own.items()]
    return "\n".join(lines) + "\n"


def _targets(modules: Sequence[Collection[str]]) -> list[list[str]]:
    return [sorted({target_of(name) for name in own}) for own in modules]


def _numbers(words: Sequence[str], adapters: int) -> list[float] | None:
    """The numbers that the words are; None if they name a file."""
    parts = [part.strip() for word in words for part in word.split(",")]
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        if len(words) == 1:
            return None
        wrong = next(part for part in parts if not _is_number(part))
        raise UsageError(f"--weights: {wrong!r} is no number", hint=f"one for each adapter: {_EXAMPLE}") from None
    for number in numbers:
        if (problem := _unfit(number)) is not None:
            raise UsageError(f"--weights: {problem}", hint=f"one for each adapter: {_EXAMPLE}")
    if len(numbers) != adapters:
        raise UsageError(
            f"--weights has {len(numbers)} numbers for {adapters} adapters", hint="give one for each, in their order"
        )
    return numbers


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _unfit(number: float) -> str | None:
    if not math.isfinite(number):
        return f"{number} is no weight"
    return f"{number:g} is beyond {MOST:g}; an adapter at full strength has 1" if abs(number) > MOST else None


def _columns(
    path: Path, adapters: Sequence[Collection[str]], modules: Sequence[Sequence[str]]
) -> list[dict[str, float]]:
    """The weights that a file gives to the modules of each adapter."""
    tables = _read(path)
    problems: list[str] = []
    columns: list[dict[str, float]] = [{} for _ in adapters]
    filled: set[int] = set()
    for name, table in tables.items():
        place = _place_of(name, adapters, problems)
        if place is None:
            continue
        if place in filled:
            problems.append(f"[{name}]: a second table of one adapter")
        elif not isinstance(table, dict):
            problems.append(f"{name}: expected a table of an adapter, [{name}]")
        else:
            columns[place] = _column(name, table, modules[place], problems)
        filled.add(place)
    for place, called in enumerate(adapters):
        if place not in filled:
            problems.append(f"no table for the adapter {_called(place, called)}")
    if problems:
        raise SettingsError(
            f"the weights in {path} cannot be honoured",
            problems=tuple(problems),
            hint="a table for each adapter, with default, attention, mlp, experts, layers as 0-7, or patterns of names",
        )
    return columns


def _read(path: Path) -> dict[str, Any]:
    if path.suffix not in (".toml", ".json"):
        raise UsageError(
            f"--weights {path} is neither numbers nor a file ending in .toml or .json",
            hint=f"one number for each adapter: {_EXAMPLE}",
        )
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"--weights {path} cannot be read: {error.strerror}", hint=_EXAMPLE) from None
    if len(data) > MAX_BYTES:
        raise UsageError(f"--weights {path} is larger than {MAX_BYTES >> 20} MiB")
    try:
        document = tomllib.loads(data.decode()) if path.suffix == ".toml" else parse_json(data)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError, StrictJsonError) as error:
        kind = path.suffix[1:].upper()
        raise UsageError(f"--weights {path} is not valid {kind}: {error}", hint=f"mend it, or {_EXAMPLE}") from None
    if not isinstance(document, dict) or not document:
        raise UsageError(f"--weights {path} has no table of an adapter", hint=_EXAMPLE)
    return document


def _place_of(name: str, adapters: Sequence[Collection[str]], problems: list[str]) -> int | None:
    places = [place for place, called in enumerate(adapters) if name in called or name == f"#{place + 1}"]
    if len(places) == 1:
        return places[0]
    known = ", ".join(_called(place, called) for place, called in enumerate(adapters))
    problems.append(f"[{name}]: names {'several' if places else 'none'} of the adapters, which are {known}")
    return None


def _called(place: int, called: Collection[str]) -> str:
    return f"{next(iter(called))} (#{place + 1})"


def _column(adapter: str, table: Mapping[str, Any], modules: Sequence[str], problems: list[str]) -> dict[str, float]:
    """The weight of each module of one adapter."""
    chosen: dict[str, tuple[int, str, float]] = {}  # narrowness, key and weight that decide, by module
    names, layers = set(modules), {number for name in modules if (number := _number(name)) is not None}
    for text, value in table.items():
        where = f"[{adapter}] {text}"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            problems.append(f"{where}: expected a number")
            continue
        weight = float(value) if abs(value) < 1e300 else math.inf
        if (problem := _unfit(weight)) is not None:
            problems.append(f"{where}: {problem}")
            continue
        key = _parse_key(text, names, layers)
        if isinstance(key, str):
            problems.append(f"{where}: {key}")
            continue
        taken = [name for name in modules if key.takes(name)]
        if not taken:
            problems.append(f"{where}: no module of the adapter; {_near(text, names)}")
        for name in taken:
            before = chosen.get(name)
            if before is not None and before[0] == key.narrowness and before[2] != weight:
                problems.append(f"{where}: {before[1]} gives {name} another weight; make one of them narrower")
                break
            if before is None or before[0] <= key.narrowness:
                chosen[name] = (key.narrowness, text, weight)
    lacking = [name for name in modules if name not in chosen]
    if lacking and not any(problem.startswith(f"[{adapter}]") for problem in problems):
        problems.append(
            f"[{adapter}]: no weight for {lacking[0]}"
            + (f" and {len(lacking) - 1} more modules" if len(lacking) > 1 else "")
            + f"; add {DEFAULT} = 0 to leave them out"
        )
    return {name: weight for name, (_, _, weight) in chosen.items()}


def _parse_key(text: str, names: Collection[str], layers: Collection[int]) -> _Key | str:
    """What a key names, or why it names nothing."""
    if text == DEFAULT:
        return _Key(text, 0, lambda name: True)
    if text in names:
        return _Key(text, 5, lambda name: name == text)
    if text in KINDS:
        return _Key(text, 1, lambda name: kind_of(name) == text)
    numbers, _, kind = text.partition(" ")
    first, dash, last = numbers.partition("-")
    if first.isdecimal() and (last.isdecimal() or not dash) and len(numbers) < 20:
        low, high = int(first), int(last or first)
        if kind and kind not in KINDS:
            return f"{kind!r} is none of {', '.join(KINDS)}"
        if low > high or high > max(layers, default=-1):
            there = f"layers {min(layers)} to {max(layers)}" if layers else "no numbered layers"
            return f"the adapter has {there}"
        return _Key(text, 3 if kind else 2, lambda name: _in(low, high, name) and kind in ("", kind_of(name)))
    if "*" in text or "?" in text:
        return _Key(text, 4, lambda name: matches(text, name))
    return f"no module of the adapter; {_near(text, names)}"


def _near(text: str, names: Collection[str]) -> str:
    endings = sorted({name.rpartition(".")[2] for name in names})
    found = get_close_matches(text, names, n=2, cutoff=0.5) or get_close_matches(text.rpartition(".")[2], endings, n=3)
    return f"near: {', '.join(found)}" if found else f"its modules end in {', '.join(endings[:12])}"


def kind_of(module: str) -> str | None:
    """`experts`, `attention` or `mlp`, the first of which a component of the module's path is one; None of none."""
    parts = set(module.split("."))
    return next((kind for kind, words in KINDS.items() if parts & words), None)


def _number(module: str) -> int | None:
    """The number of the decoder layer that a module belongs to."""
    last = layer(module).rpartition(".")[2]
    return int(last) if last.isdecimal() and len(last) < 10 else None


def _in(low: int, high: int, module: str) -> bool:
    number = _number(module)
    return number is not None and low <= number <= high


def matches(pattern: str, name: str) -> bool:
    """Whether a glob stands for a whole name: * for any characters, ? for one.

    Two pointers and the place of the last star: at most len(pattern) * len(name) steps, whatever the pattern.
    """
    i = j = mark = 0
    star = -1
    while j < len(name):
        if i < len(pattern) and (pattern[i] == "?" or (pattern[i] == name[j] and pattern[i] != "*")):
            i, j = i + 1, j + 1
        elif i < len(pattern) and pattern[i] == "*":
            star, mark, i = i, j, i + 1
        elif star >= 0:
            mark += 1
            i, j = star + 1, mark
        else:
            return False
    return all(character == "*" for character in pattern[i:])
