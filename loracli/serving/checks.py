"""The checks that rules name: each looks at an adapter's files and says what it finds, one line for each thing.

A rule's parameters are the keyword arguments. Nothing found is no violation; `Unclear` is raised where only the base
model could tell and none is given, or a pattern is more than can be matched safely.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from loracli.adapters.claims import TASKS
from loracli.adapters.names import PREFIX, BasePlace, format_tensor_name, leaf, parse_tensor_name
from loracli.adapters.patterns import ModulePatterns, PatternError
from loracli.adapters.targets import Targets, read_targets
from loracli.algebra.factors import lora_scaling
from loracli.errors import BaseModelMismatch, InputError
from loracli.serving.adapter_files import AdapterFiles, BaseFacts, Pair

Check = Callable[..., Iterator[str]]

_FORMS = {
    "lora": r".+\.lora_[AB]\.weight",
    "embedding": r".+\.lora_embedding_[AB]",
    "base-layer": r".+\.base_layer\.weight",
    "base-embedding": r".+\.(embed_tokens|lm_head)\.base_layer\.weight",
    "classifier": r".+\.(score|classifier)\.(weight|bias)",
    "norm": r".*(_layernorm|\.norm).*",
    "default-lora": r".+\.lora_[AB]\.default\.weight",
    "any": r".+",
    "mlx": r".+\.(lora_[ab]|m)",
}


class Unclear(Exception):
    """Raised with the reason why it cannot be told whether a rule holds."""


def _field(config: Mapping[str, Any], name: str) -> Any:
    """A field, or `outer.inner`."""
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _number(value: Any) -> float | None:
    """A number as a float; None for anything else, and for a whole number beyond a float's range."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if fits else None


def _required(files: AdapterFiles, base: BaseFacts | None, *, fields: Sequence[str]) -> Iterator[str]:
    """Fields that are there."""
    for name in fields:
        if _field(files.config, name) is None:
            yield f"the field {name} is missing"


def _of_type(files: AdapterFiles, base: BaseFacts | None, *, field: str, type: str) -> Iterator[str]:
    """A field that is of a type if it is there."""
    value = _field(files.config, field)
    strings = isinstance(value, list) and all(isinstance(item, str) for item in value)
    fits = {
        "natural": isinstance(value, int) and not isinstance(value, bool) and value >= 0,
        "positive": isinstance(value, int) and not isinstance(value, bool) and value > 0,
        "number": _number(value) is not None,
        "names": strings,
        "names-or-all": strings or value in ("all", "all-linear"),
    }
    if value is not None and not fits[type]:
        yield f"the field {field} is {_short(value)}"


_INITIALISATION = re.compile(
    r"|pissa(_niter_\d+)?|corda.*|loftq|eva|orthogonal|lora_ga|(?i:gaussian|olora|mica)", re.DOTALL
)
# By field: with which values PEFT makes its config and layers. Those of other fields it takes or does not look at.
_PEFT_VALUES: dict[str, Callable[[Any], bool]] = {
    "peft_type": lambda value: value is None or (isinstance(value, str) and value == value.upper()),  # or it is missing
    "r": lambda value: type(value) is int and value > 0,
    "lora_alpha": lambda value: _number(value) is not None,
    "lora_dropout": lambda value: (number := _number(value)) is not None and 0 <= number <= 1,
    "rank_pattern": lambda value: isinstance(value, dict),
    "alpha_pattern": lambda value: isinstance(value, dict),
    "bias": lambda value: value in ("none", "all", "lora_only"),
    "task_type": lambda value: value is None or value in TASKS,
    "init_lora_weights": lambda value: not isinstance(value, str) or _INITIALISATION.fullmatch(value) is not None,
}


def _peft_values(files: AdapterFiles, base: BaseFacts | None) -> Iterator[str]:
    """Fields that have values with which PEFT makes its config and its layers."""
    if files.config.get("peft_type") != "LORA" and _PEFT_VALUES["peft_type"](files.config.get("peft_type")):
        return  # another method's, with fields of its own
    for field, fits in _PEFT_VALUES.items():
        if field in files.config and not fits(files.config[field]):
            yield f"the field {field} is {_short(files.config[field])}"


def _features_with_tensors(files: AdapterFiles, base: BaseFacts | None) -> Iterator[str]:
    """A feature that is on and has its tensors: magnitudes and biases of every layer, and some of what was saved whole.
    Which of modules_to_save the base has is not asked: PEFT names the heads of all classifiers there."""
    config, tensors = files.config, files.tensors
    layers = [name for name, pair in files.pairs.items() if not (pair.experts or pair.parameter)]
    for field, part in (("use_dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias")):
        for name in layers if config.get(field) is True else ():
            embedding = files.pairs[name].embedding and field == "lora_bias"
            if not embedding and not any(f"{PREFIX}{name}.{part}{end}" in tensors for end in ("", ".weight")):
                yield f"{field} is on, and {name} has no {part}"
    saved = config.get("modules_to_save")
    names = [name for name in saved if isinstance(name, str)] if isinstance(saved, list) else []
    if names and not any(f".{name}." in f".{tensor}" for name in names for tensor in tensors if ".lora_" not in tensor):
        yield f"no tensor is of one of the modules_to_save, {_short(names)}"
    if config.get("trainable_token_indices") and not any("trainable_tokens" in tensor for tensor in tensors):
        yield "no tensor is of the trainable_token_indices"


def _off(files: AdapterFiles, base: BaseFacts | None, *, fields: Sequence[str]) -> Iterator[str]:
    """Fields that are absent, null, false or empty."""
    for name in fields:
        value = _field(files.config, name)
        if value not in (None, False, [], {}):
            yield f"the field {name} is {_short(value)}"


def _one_of(files: AdapterFiles, base: BaseFacts | None, *, field: str, values: Sequence[Any]) -> Iterator[str]:
    """A field that has one of some values if it is there; text in any case."""
    value = _field(files.config, field)
    same = value.lower() if isinstance(value, str) else value
    if value is not None and not any(type(same) is type(v) and same == v for v in values):
        yield f"the field {field} is {_short(value)}"


def _none_of(files: AdapterFiles, base: BaseFacts | None, *, field: str, beginnings: Sequence[str]) -> Iterator[str]:
    """A field that is no text that begins as some do."""
    value = _field(files.config, field)
    if isinstance(value, str) and value.startswith(tuple(beginnings)):
        yield f"the field {field} is {_short(value)}"


def _subset(files: AdapterFiles, base: BaseFacts | None, *, field: str, of: Sequence[str]) -> Iterator[str]:
    """A list that has some names only."""
    value = _field(files.config, field)
    others = [v for v in value if v not in of] if isinstance(value, list) else [value] if value else []
    if others:
        yield f"the field {field} names {', '.join(map(_short, others[:5]))}"


def _tensor_names(
    files: AdapterFiles, base: BaseFacts | None, *, forms: Sequence[str], prefix: str = ""
) -> Iterator[str]:
    """Tensors whose names are of some forms, behind a prefix."""
    pattern = re.compile("|".join(f"({_FORMS[form]})" for form in forms))
    for name in sorted(files.tensors):
        if not name.startswith(prefix) or not pattern.fullmatch(name):
            yield f"the tensor {name}"


def _own_names(files: AdapterFiles, base: BaseFacts | None) -> Iterator[str]:
    """Tensors behind PEFT's prefix by their own names, and not by others that loracat reads as the same."""
    for name in sorted(files.tensors):
        try:
            read = parse_tensor_name(name, where=files.tensor_file)
        except InputError:  # another feature's
            continue
        own = format_tensor_name(read.module, read.part)
        plain = re.sub(r"\.default(?=$|\.\w+$)", "", name)
        if name.startswith(PREFIX) and own not in (name, plain, plain.removesuffix(".weight")):
            yield f"the tensor {name}"


def _pairs(files: AdapterFiles, base: BaseFacts | None) -> Iterator[str]:
    """Both factors of every module, of one rank, and of a LoRA any at all."""
    if not files.pairs and files.config.get("peft_type") == "LORA":
        yield "no tensor is a factor by its name"
    for name, pair in files.pairs.items():
        if pair.a is None or pair.b is None:
            yield f"{name} has one factor of two"
            continue
        rank, other = (pair.a or (0,))[0], (pair.b[1:2] or pair.b or (0,))[0]
        grouped = pair.is_convolution and other > 0 and rank % other == 0
        if rank != other and not grouped:
            yield f"{name} has factors of rank {rank} and {other}"


def _matrices(files: AdapterFiles, base: BaseFacts | None, *, dimensions: int = 2) -> Iterator[str]:
    """Factors that are matrices."""
    for name, pair in files.pairs.items():
        for shape in (pair.a, pair.b):
            if shape is not None and not 2 <= len(shape) <= dimensions:
                yield f"{name} has a factor of shape {list(shape)}"


def _rank_limit(files: AdapterFiles, base: BaseFacts | None, *, at_most: int) -> Iterator[str]:
    """Ranks up to a limit."""
    if files.largest_rank > at_most:
        yield f"rank {files.largest_rank}; at most {at_most}"


def _rank_in(files: AdapterFiles, base: BaseFacts | None, *, values: Sequence[int]) -> Iterator[str]:
    """A largest rank that needs no filling up."""
    larger = [value for value in values if value >= files.largest_rank]
    if larger and min(larger) != files.largest_rank:
        yield f"rank {files.largest_rank} is served in buffers of rank {min(larger)}"


def _rank_of(files: AdapterFiles, base: BaseFacts | None, *, field: str) -> Iterator[str]:
    """All factors of the one rank that a field says."""
    said = _field(files.config, field)
    for name, pair in files.pairs.items():
        if pair.rank is not None and pair.rank != said:
            yield f"{name} has rank {pair.rank}, and {field} is {_short(said)}"


def _rank_by_patterns(files: AdapterFiles, base: BaseFacts | None) -> Iterator[str]:
    """Factors of the rank that `r` and `rank_pattern` give their module."""
    ranks = _pattern(files, "rank_pattern")
    for name, pair in files.pairs.items():
        said = ranks.get(files.tied.get(name) or _patterned(name, pair), files.config.get("r", 8))
        if pair.rank is not None and pair.rank != said:
            yield f"{name} has rank {pair.rank}, and the config says {_short(said)}"


def _one_rank(files: AdapterFiles, base: BaseFacts | None) -> Iterator[str]:
    """The same rank in every module of a kind, over the layers."""
    found: dict[str, set[int]] = defaultdict(set)
    for name, pair in files.pairs.items():
        if pair.rank is not None:
            found[leaf(name)].add(pair.rank)
    for kind, ranks in found.items():
        if len(ranks) > 1:
            yield f"{kind} has ranks {', '.join(map(str, sorted(ranks)))} in different layers"


def _scaling(files: AdapterFiles, base: BaseFacts | None, *, formula: str) -> Iterator[str]:
    """The scaling that PEFT gives each module, by the server's own formula.

    `config` is lora_alpha / r, `config-rslora` knows rsLoRA, `tensor` is lora_alpha / rank of the tensor, and 1 for 0.
    """
    rank, alpha = _number(files.config.get("r", 8)), _number(files.config.get("lora_alpha", 8))
    if not rank or rank < 1 or alpha is None:
        return  # other rules say so
    rslora = files.config.get("use_rslora") is True
    ranks, alphas = _pattern(files, "rank_pattern"), _pattern(files, "alpha_pattern")
    for name, pair in files.pairs.items():
        if pair.rank is None:
            continue
        key = _patterned(name, pair)
        own_rank, own_alpha = _number(ranks.get(key, rank)), _number(alphas.get(key, alpha))
        if not own_rank or own_rank < 1 or own_alpha is None:
            continue
        right = lora_scaling(own_alpha, int(own_rank), use_rslora=rslora)
        theirs = {
            "config": alpha / rank,
            "config-rslora": lora_scaling(alpha, int(rank), use_rslora=rslora),
            "tensor": alpha / pair.rank if alpha and pair.rank else 1.0,
        }[formula]
        if abs(theirs - right) > 1e-6 * max(abs(theirs), abs(right)):
            yield f"{name} is scaled by {theirs:g} instead of {right:g}"


def _targets(files: AdapterFiles, base: BaseFacts | None, *, together: Sequence[Sequence[str]] = ()) -> Iterator[str]:
    """Modules that PEFT puts LoRA on, target_parameters aside. With `together` those that target_modules names by their
    last names, where one of such a list stands for all of its names; no other field counts then."""
    targets = read_targets(files.config)
    if together and isinstance(targets.modules, frozenset):
        known = {leaf(name) for name in targets.modules}
        known |= {name for group in together if known & set(group) for name in group}
        targets = Targets(frozenset(known))
    elif together:
        if targets.modules is not None or targets.unread:
            raise Unclear("target_modules is a regular expression of a stranger, which is not run")
        return
    for name, pair in files.pairs.items():
        if pair.experts or pair.parameter or (name in files.tied and not together):
            continue
        if (obstacle := targets.obstacle(name)) is not None:
            yield f"{obstacle} {name}"
    if targets.unread is not None:
        raise Unclear(targets.unread)
    if files.config.get("target_modules") is None and not files.config.get("target_parameters"):
        raise Unclear("target_modules is not set, and PEFT's own list for the architecture decides")


def _companions(files: AdapterFiles, base: BaseFacts | None, *, leaf: str, needs: str) -> Iterator[str]:
    """A module that stands beside another wherever that is."""
    for name in files.pairs:
        parent, _, last = name.rpartition(".")
        if last == leaf and f"{parent}.{needs}" not in files.pairs:
            yield f"{name} without {needs}"


def _no_experts(files: AdapterFiles, base: BaseFacts | None) -> Iterator[str]:
    """No update of the experts of a parameter; of the one matrix of a module it is not known."""
    found = [name for name, pair in files.pairs.items() if pair.experts is not None]
    if not found:
        _doubt_parameters(files)
    yield from (f"the {files.pairs[name].experts} experts of {name}" for name in found)


def _both_of_experts(files: AdapterFiles, base: BaseFacts | None) -> Iterator[str]:
    """Updates of two parameters of experts, or of none; whether vLLM has such a model, nothing tells, nor whether it
    takes the one matrix of a module."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, pair in files.pairs.items():
        if pair.experts is not None:
            found[name.rpartition(".")[0]].append(name)
    alone = [names[0] for names in found.values() if len(names) == 1]
    if found and not alone:
        raise Unclear("whether vLLM's model of the base keeps all experts in one tensor (is_3d_moe_weight)")
    if not alone:
        _doubt_parameters(files)
    yield from (f"{name} alone" for name in alone)


def _doubt_parameters(files: AdapterFiles) -> None:
    name = next((name for name, pair in files.pairs.items() if pair.parameter), None)
    if name is not None:
        raise Unclear(f"whether the server puts LoRA on {name}, whose weight is one of the target_parameters")


def _every_layer(files: AdapterFiles, base: BaseFacts | None) -> Iterator[str]:
    """A kind of module in all layers or in none; without the base all layers are as many as the adapter knows."""
    found: dict[str, set[int]] = defaultdict(set)
    for name in files.pairs:
        parts = name.split(".")
        number = next((part for part in parts if part.isdecimal() and len(part) < 6), None)
        if number is not None:
            found[".".join("*" if part == number else part for part in parts)].add(int(number))
    known = max((max(layers) for layers in found.values()), default=-1) + 1
    count = max(known, base.layers if base else 0)
    for kind, layers in sorted(found.items()):
        if len(layers) < count:
            missing = next(i for i in range(count) if i not in layers)
            yield f"{kind} is in {len(layers)} of {count} layers, and not in layer {missing}"


def _leaves(files: AdapterFiles, base: BaseFacts | None, *, known: Sequence[str]) -> Iterator[str]:
    """Modules of some last names only."""
    for name in files.pairs:
        if leaf(name) not in known:
            yield name


def _upright(files: AdapterFiles, base: BaseFacts | None) -> Iterator[str]:
    """A rank below both widths, so that the orientation of a factor can be told from its shape."""
    for name, pair in files.pairs.items():
        if pair.rank and pair.a and pair.b and pair.rank > min(pair.a[-1], pair.b[0]):
            yield f"{name} has rank {pair.rank}, above its width {min(pair.a[-1], pair.b[0])}"


def _only_tensor_file(files: AdapterFiles, base: BaseFacts | None) -> Iterator[str]:
    """No other safetensors file in the directory."""
    for name in sorted(files.names):
        if name.endswith(".safetensors") and name != files.tensor_file:
            yield f"the file {name}"


def _absent_file(files: AdapterFiles, base: BaseFacts | None, *, file: str) -> Iterator[str]:
    """A file that is better not there."""
    if file in files.names:
        yield f"the file {file}"


def _mlx_keys(files: AdapterFiles, base: BaseFacts | None) -> Iterator[str]:
    """Every module under `lora_parameters.keys`, as a whole path or as one within a layer."""
    keys = _field(files.config, "lora_parameters.keys")
    if keys is None:
        return
    known = {key for key in keys if isinstance(key, str)} if isinstance(keys, list) else set()
    for name in files.pairs:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        within = None if number is None else ".".join(parts[number + 1 :])
        if name not in known and within not in known:
            yield f"{name} is under no key"


def _in_base(files: AdapterFiles, base: BaseFacts | None, *, renames: bool = False) -> Iterator[str]:
    """Modules that the base has, of its shapes; with `renames` also by the tables that transformers has for names of
    other versions."""
    facts = _needed(base, "whether the base has these modules in these shapes")
    found, experts = [], defaultdict[str, list[BasePlace]](list)
    replication = files.config.get("layer_replication") if renames else None
    for adapted, pair in files.pairs.items():
        if pair.is_convolution:
            continue
        name = _replicated(adapted, replication)
        place = _place(facts, name, pair) if renames else BasePlace(name)
        if place is None or place.target not in facts.modules:
            found.append(f"the base has no {name}")
            continue
        out, width = facts.modules[place.target]
        if place.expert is not None:
            experts[place.target].append(place)
        own = out // place.parts, width
        if pair.a and pair.b and (pair.b[0], pair.a[-1]) != own:
            found.append(f"{name} is (out, in) = {(pair.b[0], pair.a[-1])}, in the base {own}")
    for parameter, places in experts.items():
        wanted = facts.experts[parameter] * places[0].parts
        if len(places) != wanted:
            found.append(f"{parameter} is made of {wanted} layers of experts, and {len(places)} are there")
    if not found:
        kernel = next((name for name, pair in files.pairs.items() if pair.is_convolution), None)
        if kernel is not None:
            raise Unclear(f"whether the base has a convolution {kernel} of this shape")
        if experts:
            raise Unclear(f"whether the layers of experts become the parameters of a {facts.model_class}")
    yield from found


def _replicated(name: str, replication: Any) -> str:
    """The module whose numbers one has in a layer that PEFT's `layer_replication`, [[from, below], ...], made."""
    layer = next((part for part in name.split(".") if part.isdecimal()), None)
    if not isinstance(replication, list) or layer is None or len(layer) > 9:
        return name
    number = int(layer)
    for span in replication:
        match span:
            case [int(start), int(end)] if number < end - start:
                return name.replace(f".{layer}.", f".{start + number}.", 1)
            case [int(start), int(end)]:
                number -= end - start
    return name


def _place(facts: BaseFacts, name: str, pair: Pair) -> BasePlace | None:
    try:
        return facts.names.by_tables(name, name if pair.experts is not None else f"{name}.weight")
    except BaseModelMismatch:
        return None


def _untied_head(files: AdapterFiles, base: BaseFacts | None) -> Iterator[str]:
    """No update of a head that is the embedding."""
    heads = [name for name in files.pairs if leaf(name) == "lm_head"]
    if heads and _needed(base, "whether the base's head is its embedding").tied:
        yield f"{heads[0]} is tied to the embedding"


def _base_class(files: AdapterFiles, base: BaseFacts | None, *, classes: Sequence[str]) -> Iterator[str]:
    """A base of some classes of transformers' models."""
    found = _needed(base, "whether the base's architecture is one of those that are read").model_class
    if found not in classes:
        yield f"the base is a {found}"


def _leaves_of_class(
    files: AdapterFiles, base: BaseFacts | None, *, leaves: Sequence[str], classes: Sequence[str]
) -> Iterator[str]:
    """No update of modules of some last names in a base of some classes."""
    found = [name for name in files.pairs if leaf(name) in leaves]
    if found and _needed(base, f"whether the base is one of {', '.join(classes)}").model_class in classes:
        yield from found


CHECKS: dict[str, Check] = {
    check.__name__.removeprefix("_").replace("_", "-"): check
    for check in (
        _required,
        _peft_values,
        _features_with_tensors,
        _of_type,
        _off,
        _one_of,
        _none_of,
        _subset,
        _tensor_names,
        _own_names,
        _pairs,
        _matrices,
        _rank_limit,
        _rank_in,
        _rank_of,
        _rank_by_patterns,
        _one_rank,
        _scaling,
        _targets,
        _companions,
        _no_experts,
        _both_of_experts,
        _every_layer,
        _leaves,
        _upright,
        _only_tensor_file,
        _absent_file,
        _mlx_keys,
        _in_base,
        _untied_head,
        _base_class,
        _leaves_of_class,
    )
}


def _needed(base: BaseFacts | None, what: str) -> BaseFacts:
    if base is None:
        raise Unclear(f"{what}: give --base")
    return base


def _pattern(files: AdapterFiles, field: str) -> ModulePatterns[Any]:
    """`rank_pattern` or `alpha_pattern`."""
    patterns = files.patterns[field]
    if isinstance(patterns, PatternError):
        raise Unclear(f"{field} has a regular expression of a stranger, which is not run: {patterns}")
    return patterns


def _patterned(name: str, pair: Pair) -> str:
    """What patterns go by: the module's path, or that of its weight among the target_parameters."""
    return f"{name}.weight" if pair.parameter else name


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
