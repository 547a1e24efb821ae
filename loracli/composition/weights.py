"""Weights by hand: a number for each adapter, or a table that says which modules get how much of each.

    dW_l = sum_i w_li s_i B_li A_li        w_li as it was given

A file in TOML or JSON has a table for each adapter, by its reference, the last names of its directory, its repository,
or its place as "#2":

    ["./math"]
    default = 0.7              # every module that nothing below names; that alone is `math = 0.7` without a table
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

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any

from loracli.adapters.adapter import LoraAdapter
from loracli.adapters.names import layer
from loracli.errors import RecipeError, SettingsError, UsageError
from loracli.hub.references import URI_PREFIX
from loracli.recipe.recipe import Recipe
from loracli.recipe.record import INLINE_KINDS
from loracli.system.display import count_text
from loracli.system.document import MAX_PROBLEMS
from loracli.system.escaping import shell_word
from loracli.system.files import read_regular
from loracli.system.near import did_you_mean
from loracli.system.strict_json import StrictJsonError, parse_json
from loracli.system.toml import TomlError, parse_toml

# As they are given: one number for each adapter, the file with their tables, or the tables themselves.
Weights = Sequence[float] | str | Path | Mapping[str, Mapping[str, float] | float]
# Of every module, the experts of a parameter as one: a weight for each adapter, None where it changes nothing there.
ModuleWeights = Mapping[str, tuple[float | None, ...]]

MOST = 1e6  # a weight: far beyond what any update is worth, and a typing error rather than a choice
_MAX_BYTES = 16 << 20
_MAX_KEYS = 1000  # of a table, beside names of modules: each of them is held against every module
_MAX_KEY = 1000  # characters of one
_MANY = 2000  # module names, of which none is searched for a near one
_QUOTED = 100  # characters of a key in a message
_DEFAULT = "default"
_ENVELOPES = ("loracat", "loracat_export")  # documents that have the tables as their object `weights`
# A module is of a kind by the components of its path, as transformers and its predecessors call them: whatever has
# attention in its name; the names of feed-forward blocks, and of their layers where those have no block around them, as
# in BART (fc1), ALBERT (ffn_output) and BERT (intermediate.dense and an output.dense that is not the attention's).
_KINDS: dict[str, re.Pattern[str]] = {
    "experts": re.compile(r"(^|\.)experts(\.|$)"),
    "attention": re.compile(r"attn|attention", re.IGNORECASE),
    "mlp": re.compile(
        r"(^|\.)(mlps?|shared_mlp|feed_forward[12]?|ffns?[12]?|ffn_output|ff|fc[12]|shared_experts?|block_sparse_moe|"
        r"DenseReluDense|(intermediate|output)(_query)?\.dense)(\.|$)"
    ),
}
_WAYS = "one number for each adapter, --weights 0.7 0.3, or a file as `loracat show --weights` prints it"
_KEYS = "a table for each adapter, with default, attention, mlp, experts, layers as 0-7, or patterns of module names"


def parse_words(words: Sequence[str]) -> tuple[float, ...] | Path:
    """What `--weights` names: numbers, apart or with commas between them, or one file.

    Raises:
        UsageError: if they are neither.
    """
    parts = [part.strip() for word in words for part in word.split(",")]
    wrong = next((part for part in parts if not _is_number(part)), None)
    if wrong is None:
        return tuple(map(float, parts))
    if len(words) == 1 and Path(words[0]).suffix in (".toml", ".json"):
        return Path(words[0])
    if len(words) == 1 and len(parts) == 1:
        raise UsageError(f"--weights {wrong!r} is neither a number nor a file ending in .toml or .json", hint=_WAYS)
    if any(Path(part).suffix in (".toml", ".json") for part in parts):
        raise UsageError("--weights takes numbers or one file, not both", hint=_WAYS)
    raise UsageError(f"--weights: {wrong!r} is not a number", hint=_WAYS)


def weights_of_modules(given: Weights, adapters: Sequence[LoraAdapter]) -> dict[str, tuple[float | None, ...]]:
    """The weights of every module that the adapters change, by its target.

    Args:
        given: as `Weights`.
        adapters: N of them, by the names that the weights have for modules.
    Raises:
        UsageError: if there is not one number for each adapter, none is beside 0, or a file cannot be read.
        SettingsError: with everything in the tables that cannot be honoured.
    """
    targets = [sorted(adapter.targets) for adapter in adapters]
    if isinstance(given, (str, Path)):
        columns = _columns(_read(Path(given)), f"the weights in {given}", adapters, targets)
    elif isinstance(given, Mapping):
        columns = _columns(given, "the weights", adapters, targets)
    else:
        numbers = _checked(given, len(adapters))
        columns = [dict.fromkeys(own, number) for own, number in zip(targets, numbers, strict=True)]
    if not any(weight for column in columns for weight in column.values()):
        raise UsageError("every weight is 0, which leaves nothing of the adapters", hint=_WAYS)
    names = sorted({name for own in targets for name in own})
    return {name: tuple(column.get(name) for column in columns) for name in names}


def equal_weights(weights: ModuleWeights) -> tuple[float, ...] | None:
    """One weight for each adapter where it is the same in every module, else None."""
    columns = [{weight for weight in column if weight is not None} for column in zip(*weights.values(), strict=True)]
    return tuple(column.pop() for column in columns) if all(len(column) == 1 for column in columns) else None


def weight_tables(labels: Sequence[str], weights: ModuleWeights) -> dict[str, dict[str, float]]:
    """The tables, by the labels of N adapters, that `weights_of_modules` reads back to the last digit."""
    tables: dict[str, dict[str, float]] = {}
    for place, label in enumerate(labels):
        own = {name: weight for name, row in weights.items() if (weight := row[place]) is not None}
        tables[label] = _as_default(own)
    return tables


def recipe_tables(recipe: Recipe) -> dict[str, dict[str, float]]:
    """The weights of a recipe as tables, by the labels of its adapters.

    Raises:
        RecipeError: if its mixing has no weight for each adapter and module, or one that no table may have.
    """
    mixing, labels = recipe.mixing, recipe.labels()
    if mixing.kind not in INLINE_KINDS:
        raise RecipeError(
            f"the mixing {mixing.kind!r} of the recipe has no weight for each module and adapter",
            hint=f"export the recipe as it is, or fit one of {', '.join(INLINE_KINDS)}: loracat fit --mixing module",
        )
    tables: dict[str, dict[str, float]] = {}
    for place, adapter in enumerate(recipe.adapters):
        own = {group: weight for group, row in mixing.weights.items() if (weight := row[place]) is not None}
        large = next((group for group, weight in own.items() if abs(weight) > MOST), None)
        if large is not None:
            raise RecipeError(f"the recipe's weight for {large} is beyond {MOST:g}", hint="fit again")
        table = _as_default(own)
        if mixing.kind == "layer" and _DEFAULT not in table:
            table = {key: weight for group, weight in own.items() for key in _layer_keys(group, recipe)}
        tables[labels[adapter.reference]] = table
    return tables


def _as_default(own: Mapping[str, float]) -> dict[str, float]:
    return {_DEFAULT: next(iter(own.values()))} if len(set(own.values())) == 1 else dict(own)


def _layer_keys(group: str, recipe: Recipe) -> list[str]:
    """What names the modules of a group of the mixing `layer`: its number where no other group has it."""
    number = _number(group)
    numbers = Counter(_number(other) for other in recipe.mixing.weights)
    if number is not None and numbers[number] == 1:
        return [str(number)]
    names = [module.name for module in recipe.modules if layer(module.name) == group]
    return [*([group] if group in names else []), *([f"{group}.*"] if names != [group] else [])]


def toml_text(tables: Mapping[str, Mapping[str, float]], command: Sequence[str]) -> str:
    """Tables as a file for `--weights`, headed by the command that takes it."""
    lines = [f"# {' '.join(map(shell_word, command))} --weights THIS-FILE"]
    for label, table in tables.items():
        lines += ["", f"[{_quoted(label)}]", *(f"{_quoted(key)} = {weight!r}" for key, weight in table.items())]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A key of TOML: bare where it may be, else a string with the code of every character beyond ASCII's printable."""
    if text.isascii() and text.replace("_", "").replace("-", "").isalnum():
        return text
    escaped = (
        c if c.isascii() and c.isprintable() else f"\\U{ord(c):08x}"
        for c in text.replace("\\", "\\\\").replace('"', '\\"')
    )
    return f'"{"".join(escaped)}"'


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text  # which Python's own numbers may have


def _is_weight(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_numbers(given: Weights | None, adapters: int) -> None:
    """Raises UsageError unless there is one number for each of N adapters, where numbers are given: it is told before
    anything is opened."""
    if isinstance(given, Sequence) and not isinstance(given, str):
        _checked(given, adapters)


def _checked(numbers: Sequence[float], adapters: int) -> list[float]:
    for number in numbers:
        if (problem := _unfit(number)) is not None:
            raise UsageError(f"--weights: {problem}", hint=_WAYS)
    if len(numbers) != adapters:
        raise UsageError(
            f"--weights has {count_text(len(numbers), 'number')} for {count_text(adapters, 'adapter')}: "
            f"{', '.join(f'{number:g}' for number in numbers) or 'none'}",
            hint="give one for each adapter, in their order; a comma separates two numbers, and 0.3 has a point",
        )
    return [float(number) for number in numbers]


def _unfit(number: object) -> str | None:
    """Why this is not a weight; None if it is one."""
    if not isinstance(number, (int, float)) or isinstance(number, bool):
        return "expected a number" + ("; quote a name that has dots" if isinstance(number, dict) else "")
    if isinstance(number, float) and not math.isfinite(number):
        return f"{number} is not a weight"
    shown = f"{number:g}" if abs(number) < 1e300 else "a number of that size"
    return f"{shown} is beyond {MOST:g}; an adapter at full strength has 1" if abs(number) > MOST else None


def _read(path: Path) -> Mapping[str, Any]:
    """The tables of a file.

    Raises:
        UsageError: if it cannot be read or has none.
    """
    if path.suffix not in (".toml", ".json"):
        raise UsageError(f"--weights {str(path)!r} is not a file ending in .toml or .json", hint=_WAYS)
    try:
        data = read_regular(path, _MAX_BYTES)
        document = parse_toml(data) if path.suffix == ".toml" else parse_json(data)
    except OSError as error:
        raise UsageError(f"--weights {path} cannot be read: {error.strerror}", hint=_WAYS) from None
    except (TomlError, StrictJsonError) as error:
        kind = path.suffix[1:].upper()
        raise UsageError(f"--weights {path} cannot be read as {kind}: {error}", hint=f"fix {path}") from None
    if isinstance(document, dict) and any(isinstance(document.get(key), int) for key in _ENVELOPES):
        document = document.get("weights")
    if not isinstance(document, dict) or not document:
        raise UsageError(f"--weights {path} has no table of an adapter", hint=_KEYS)
    return document


def _columns(
    tables: Mapping[str, Any], what: str, adapters: Sequence[LoraAdapter], targets: Sequence[Sequence[str]]
) -> list[dict[str, float]]:
    """The weight of each module, adapter by adapter."""
    problems: list[str] = []
    found: list[dict[str, float] | None] = [None] * len(adapters)
    for name, given in tables.items():
        shown, table = name[:_QUOTED], {_DEFAULT: given} if _is_weight(given) else given
        places = [place for place, adapter in enumerate(adapters) if goes_by(name, place, adapter)]
        if len(places) != 1:
            known = ", ".join(_called(place, adapter) for place, adapter in enumerate(adapters))
            problems.append(f"[{shown}]: names {'several' if places else 'none'} of the adapters, which are {known}")
        elif found[places[0]] is not None:
            problems.append(f"[{shown}]: a second table of one adapter")
        elif not isinstance(table, Mapping):
            problems.append(f"{shown}: expected a number, or a table of an adapter, [{shown}]")
            found[places[0]] = {}
        else:
            found[places[0]] = _column(shown, table, targets[places[0]], problems)
        if len(problems) >= MAX_PROBLEMS:
            break
    else:
        lacking = [_called(place, adapters[place]) for place, column in enumerate(found) if column is None]
        problems += [f"no table for the adapter {called}" for called in lacking]
    if problems:
        raise SettingsError(f"{what} cannot be honoured", problems=tuple(problems[:MAX_PROBLEMS]), hint=_KEYS)
    return [column or {} for column in found]


def goes_by(name: str, place: int, adapter: LoraAdapter) -> bool:
    """Whether an adapter may be called so: its place, its reference, its repository, or the end of its path."""
    if name in (f"#{place + 1}", adapter.reference):
        return True
    if adapter.source.repo_id is None:
        parts = PurePosixPath(name).parts
        return bool(parts) and adapter.path.resolve().parts[-len(parts) :] == parts
    folder = f"/{adapter.source.subfolder}" if adapter.source.subfolder else ""
    pinned = (adapter.source.repo_id, f"{adapter.source.repo_id}@{adapter.commit}")
    return name.removeprefix(URI_PREFIX) in {f"{one}{folder}" for one in pinned}


def _called(place: int, adapter: LoraAdapter) -> str:
    return f"{adapter.reference} (#{place + 1})"


@dataclass(frozen=True)
class _Key:
    """What a key of a table names: which modules, and how narrowly (the larger, the narrower)."""

    narrowness: int
    takes: Callable[[str], bool]


def _column(adapter: str, table: Mapping[str, Any], modules: Sequence[str], problems: list[str]) -> dict[str, float]:
    """The weight of each module of one adapter."""
    chosen: dict[str, tuple[int, str, float]] = {}  # narrowness, key and weight that decide, by module
    names, layers = set(modules), {number for name in modules if (number := _number(name)) is not None}
    before = len(problems)
    wide = sum(text not in names for text in table)
    if wide > _MAX_KEYS:
        problems.append(f"[{adapter}]: {wide} keys are not names of its modules, and at most {_MAX_KEYS} may be")
        return {}
    keys: dict[str, _Key] = {}
    for text, weight in table.items():
        if len(problems) >= MAX_PROBLEMS:
            break
        key = _unfit(weight) or _parse_key(text, names, layers)
        if isinstance(key, str):
            problems.append(f"[{adapter}] {text[:_QUOTED]}: {key}")
        else:
            keys[text] = key
    # The narrowest first, so that a key is not held against another where a narrower one decides.
    for text, key in sorted(keys.items(), key=lambda item: -item[1].narrowness):
        if len(problems) >= MAX_PROBLEMS:
            break
        taken = [text] if text in names else [name for name in modules if key.takes(name)]
        problem = _choose(text, key.narrowness, float(table[text]), taken, chosen)
        if not taken and text != _DEFAULT:
            problem = f"no module of the adapter; {_near(text, names)}"
        if problem is not None:
            problems.append(f"[{adapter}] {text[:_QUOTED]}: {problem}")
    lacking = [name for name in modules if name not in chosen]
    if lacking and len(problems) == before:
        more = f" and {len(lacking) - 1} more modules" if len(lacking) > 1 else ""
        problems.append(f"[{adapter}]: no weight for {lacking[0]}{more}; add {_DEFAULT} = 0 to leave them out")
    return {name: weight for name, (_, _, weight) in chosen.items()}


def _choose(
    text: str, narrowness: int, weight: float, taken: Sequence[str], chosen: dict[str, tuple[int, str, float]]
) -> str | None:
    """Gives a weight to the modules that no narrower key has; says with which key of one narrowness it contradicts
    itself, None with none."""
    for name in taken:
        before, other, given = chosen.get(name, (-1, "", weight))
        if before == narrowness and given != weight:
            return f"{other[:_QUOTED]} gives {name} another weight; make one of them narrower"
        if before <= narrowness:
            chosen[name] = (narrowness, text, weight)
    return None


def _parse_key(text: str, names: Collection[str], layers: Collection[int]) -> _Key | str:
    """What a key names, or why it names nothing."""
    if text in names:
        return _Key(5, lambda name: name == text)
    if text == _DEFAULT:
        return _Key(0, lambda name: True)
    if text in _KINDS:
        return _Key(1, lambda name: _kind_of(name) == text)
    if len(text) > _MAX_KEY:
        return f"longer than {_MAX_KEY} characters"
    numbers, _, kind = text.partition(" ")
    first, dash, last = numbers.partition("-")
    if all(part.isascii() and part.isdecimal() for part in (first, last if dash else first)) and len(numbers) < 20:
        low, high = int(first), int(last or first)
        if kind and kind not in _KINDS:
            return f"{kind!r} is none of {', '.join(_KINDS)}"
        if low > high or high > max(layers, default=-1):
            there = f"layers {min(layers)} to {max(layers)}" if layers else "no numbered layers"
            return f"the adapter has {there}"
        return _Key(3 if kind else 2, lambda name: _in(low, high, name) and kind in ("", _kind_of(name)))
    if "*" in text or "?" in text:
        return _Key(4, lambda name: _matches(text, name))
    return f"no module of the adapter; {_near(text, names)}"


def _near(text: str, names: Collection[str]) -> str:
    """What may have been meant by a key that names no module."""
    kind = text.rpartition(" ")[2]
    if kind in _KINDS:
        other = next((_kind_of(name) for name in names if _KINDS[kind].search(name)), None)
        if other is not None:
            return f"those with {kind} in their path are {other}, which go by the key {other}"
    elif (word := did_you_mean(text, (_DEFAULT, *_KINDS))) is not None:
        return word
    endings = sorted({name.rpartition(".")[2] for name in names})
    found = get_close_matches(text, names, n=2, cutoff=0.5) if len(names) <= _MANY else []
    found = found or [f"*.{ending}" for ending in get_close_matches(text.rpartition(".")[2], endings[:_MANY], n=3)]
    return f"near: {', '.join(found)}" if found else f"its modules end in {', '.join(endings[:12])}"


def _kind_of(module: str) -> str | None:
    """`experts`, `attention` or `mlp`, the first of which is in the module's path; None of none."""
    return next((kind for kind, words in _KINDS.items() if words.search(module)), None)


def _number(module: str) -> int | None:
    """The number of the decoder layer that a module belongs to."""
    last = layer(module).rpartition(".")[2]
    return int(last) if last.isdecimal() and len(last) < 10 else None


def _in(low: int, high: int, module: str) -> bool:
    number = _number(module)
    return number is not None and low <= number <= high


def _matches(pattern: str, name: str) -> bool:
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
