"""`adapter_config.json`: the fields that say what the tensors mean, and the features that are refused by name.

The scaling of a module comes from here; which modules there are comes from the tensor names, never from a pattern in a
config. PEFT itself drops keys that it does not know with a warning, so an adapter of a newer feature would load as
something else: every key here is either known, or refused unless it is off.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracli.adapters.experts import LORA_B_LAYOUTS
from loracli.adapters.patterns import lookup, parse_pattern
from loracli.algebra.factors import lora_scaling
from loracli.errors import MalformedAdapter, UnsupportedAdapter
from loracli.system.strict_json import StrictJsonError, parse_json
from loracli.system.tensor_file import open_regular

MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 1 << 14
MAX_SAVED = 256  # names in modules_to_save; each is held against every tensor's
MAX_PARAMETERS = 4096  # names in target_parameters

# Fields that choose modules or concern training and loading only: the tensors already say what came of them.
_WITHOUT_EFFECT = frozenset(
    "auto_mapping base_model_name_or_path ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode "
    "init_lora_weights layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core peft_type peft_version "
    "qalora_group_size r rank_pattern alpha_pattern revision runtime_config target_modules task_type use_rslora "
    "bias loftq_config lora_bias modules_to_save target_parameters lora_B_layout "
    "merge_weights".split()  # the last: of PEFT before 0.3
)

# Initialisations that leave the base model as it is. The others subtract from it what they put into the factors.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")

# Of those others, the ones that `loracat convert` can put right, by how PEFT's names begin.
_SUBTRACTING_INITIALISATIONS = ("pissa", "olora", "corda", "lora_ga")
_CONVERTIBLE_FIELDS = frozenset({"use_dora", "corda_config", "lora_ga_config"})
_LOFTQ = "it belongs to the quantised base of its training; on that very base, and no other, set the field to true"
_PEFT_CONVERTS = "convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
CONVERT = "make a plain LoRA of it: loracat convert ADAPTER --base MODEL"

# Features that change what the tensors mean, with the way out. "Off" is null, false, empty or absent.
_REFUSED = {
    "use_dora": ("DoRA", CONVERT),
    "layer_replication": ("layer_replication", "train the adapter on the base model's own layers"),
    "trainable_token_indices": ("trainable tokens", "train the adapter without trainable_token_indices"),
    "alora_invocation_tokens": ("aLoRA", "an activated LoRA depends on the prompt and cannot be added to another"),
    "use_qalora": ("QALoRA", "train the adapter without use_qalora"),
    "use_bdlora": ("BD-LoRA", "train the adapter without use_bdlora"),
    "megatron_config": ("Megatron layers", "convert the adapter to ordinary layers first"),
}


@dataclass(frozen=True)
class AdapterConfig:
    """What `adapter_config.json` says about the tensors beside it.

    Args:
        base_model: the base model that the adapter names, or None.
        base_revision: the revision it names, or None.
        rank: `r`.
        lora_alpha: `lora_alpha`.
        use_rslora: whether the scaling is lora_alpha / sqrt(r).
        rank_pattern: ranks of single modules, by PEFT's pattern; in file order.
        alpha_pattern: the same for lora_alpha.
        fan_in_fan_out: whether the base stores its weights as (in, out), as GPT-2's Conv1D does.
        whole_names: last names of which the adapter was put on every module that the base has.
        lora_dropout: the dropout of training; never used here.
        task_type: `CAUSAL_LM`, another, or None.
        lora_bias: whether every lora_B of a linear layer has a bias.
        modules_to_save: ends of the names of modules that were saved whole.
        target_parameters: ends of the paths of parameters that were adapted, as those of experts are.
        peft_version: that wrote it, (0, 18, 1); None if it does not say.
        lora_B_layout: how lora_B of experts lies, by unsloth's key; None if it does not say.
        made_by_unsloth: whether unsloth wrote it.
        use_dora: whether magnitudes belong to it; only where it is read to be converted.
        initialisation: that was subtracted from the base, `pissa` or another; only where it is read to be converted.
    """

    base_model: str | None
    base_revision: str | None
    rank: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    fan_in_fan_out: bool
    whole_names: frozenset[str]
    lora_dropout: float
    task_type: str | None
    lora_bias: bool = False
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    peft_version: tuple[int, ...] | None = None
    lora_B_layout: str | None = None
    made_by_unsloth: bool = False
    use_dora: bool = False
    initialisation: str | None = None

    def rank_of(self, module: str) -> int:
        """The rank that the config gives `module`."""
        return lookup(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """s of `module`, after `rank_pattern`, `alpha_pattern` and rsLoRA."""
        alpha = lookup(self.alpha_pattern, module, self.lora_alpha)
        return lora_scaling(alpha, self.rank_of(module), use_rslora=self.use_rslora)


def read_config(path: Path, *, convertible: bool = False) -> AdapterConfig:
    """Reads and checks an `adapter_config.json`.

    Args:
        path: the file.
        convertible: let pass what `loracat convert` makes a plain LoRA of: DoRA, and initialisations that were
            subtracted from the base.
    Raises:
        MalformedAdapter: if the file is damaged or a field has an impossible value.
        UnsupportedAdapter: if it uses a feature that cannot be honoured, by the feature's name.
    """
    fields = read_fields(path)
    _refuse_features(fields, str(path), convertible=convertible)
    return _Fields(fields, str(path)).config()


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of an `adapter_config.json`, unchecked.

    Raises:
        MalformedAdapter: if the file is damaged, or too large.
    """
    where = str(path)
    with open_regular(path) as file:
        data = file.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise MalformedAdapter(f"is larger than {MAX_CONFIG_BYTES} bytes", where=where)
    try:
        fields = parse_json(data)
    except StrictJsonError as error:
        raise MalformedAdapter(str(error), where=where) from None
    if not isinstance(fields, dict):
        raise MalformedAdapter("is not a JSON object", where=where)
    return fields


def _refuse_features(fields: dict[str, Any], where: str, *, convertible: bool) -> None:
    peft_type = fields.get("peft_type")
    if peft_type != "LORA":
        raise UnsupportedAdapter(f"peft_type is {peft_type!r}; only LORA can be composed", where=where)
    for key, (feature, way_out) in _REFUSED.items():
        if _is_on(fields.get(key)) and not (convertible and key in _CONVERTIBLE_FIELDS):
            raise UnsupportedAdapter(f"{feature} is not supported (field {key!r})", where=where, hint=way_out)
    if fields.get("bias", "none") != "none":
        raise UnsupportedAdapter(
            f"bias is {fields['bias']!r}: trained biases are not supported",
            where=where,
            hint='train the adapter with bias="none"',
        )
    initialisation = fields.get("init_lora_weights", True)
    plain = any(initialisation is known or initialisation == known for known in _PLAIN_INITIALISATIONS)
    if not plain and not (convertible and _is_subtracting(initialisation)):
        raise UnsupportedAdapter(
            f"init_lora_weights is {initialisation!r}: such an adapter assumes a changed base model",
            where=where,
            hint=CONVERT
            if _is_subtracting(initialisation)
            else _LOFTQ
            if initialisation == "loftq"
            else _PEFT_CONVERTS,
        )
    known = _WITHOUT_EFFECT | _CONVERTIBLE_FIELDS if convertible else _WITHOUT_EFFECT
    for key, value in fields.items():
        if key not in known and key not in _REFUSED and _is_on(value):
            raise UnsupportedAdapter(
                f"the field {key!r} is not known to loracat and is not off",
                where=where,
                hint="a newer PEFT may give it a meaning that changes the adapter; remove it if it has none",
            )


def _is_subtracting(initialisation: Any) -> bool:
    return isinstance(initialisation, str) and initialisation.lower().startswith(_SUBTRACTING_INITIALISATIONS)


def _is_on(value: Any) -> bool:
    return value is not None and value is not False and value != {} and value != []


class _Fields:
    """Checked access to the fields of one config."""

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        self._fields, self._where = fields, where

    def config(self) -> AdapterConfig:
        return AdapterConfig(
            base_model=self._text("base_model_name_or_path"),
            base_revision=self._text("revision"),
            rank=self._rank("r", self._fields.get("r")),
            lora_alpha=self._number("lora_alpha", self._fields.get("lora_alpha")),
            use_rslora=self._flag("use_rslora"),
            rank_pattern={k: self._rank(f"rank_pattern[{k!r}]", v) for k, v in self._pattern("rank_pattern").items()},
            alpha_pattern={
                k: self._number(f"alpha_pattern[{k!r}]", v) for k, v in self._pattern("alpha_pattern").items()
            },
            fan_in_fan_out=self._flag("fan_in_fan_out"),
            whole_names=self._whole_names(),
            lora_dropout=self._number("lora_dropout", self._fields.get("lora_dropout") or 0.0),
            task_type=self._text("task_type"),
            lora_bias=self._flag("lora_bias"),
            modules_to_save=self._modules_to_save(),
            target_parameters=self._target_parameters(),
            peft_version=self._peft_version(),
            lora_B_layout=self._lora_B_layout(),
            made_by_unsloth=self._made_by_unsloth(),
            use_dora=_is_on(self._fields.get("use_dora")),
            initialisation=self._initialisation(),
        )

    def _bad(self, field: str, value: Any, expected: str) -> MalformedAdapter:
        return MalformedAdapter(f"the field {field} is {value!r}; expected {expected}", where=self._where)

    def _rank(self, field: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value <= MAX_RANK:
            raise self._bad(field, value, f"a whole number from 1 to {MAX_RANK}")
        return value

    def _number(self, field: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e9:
            raise self._bad(field, value, "a number")
        return float(value)

    def _flag(self, field: str) -> bool:
        value = self._fields.get(field)
        if value is not None and not isinstance(value, bool):
            raise self._bad(field, value, "true or false")
        return bool(value)

    def _text(self, field: str) -> str | None:
        value = self._fields.get(field)
        if value is not None and not (isinstance(value, str) and value.isprintable()):
            raise self._bad(field, value, "text on one line")
        return value or None

    def _initialisation(self) -> str | None:
        value = self._fields.get("init_lora_weights")
        return str(value).lower() if _is_subtracting(value) else None

    def _whole_names(self) -> frozenset[str]:
        """PEFT adapts every module whose name is, or ends in a dot and, a name of the list."""
        targets = self._fields.get("target_modules")
        narrowed = any(_is_on(self._fields.get(key)) for key in ("layers_to_transform", "exclude_modules"))
        if narrowed or not isinstance(targets, list):
            return frozenset()
        return frozenset(name for name in targets if isinstance(name, str) and "." not in name)

    def _modules_to_save(self) -> tuple[str, ...]:
        names = self._names("modules_to_save", MAX_SAVED)
        if names and self._flag("ensure_weight_tying"):
            raise UnsupportedAdapter(
                "modules_to_save with ensure_weight_tying is not supported",
                where=self._where,
                hint="name embeddings and head in modules_to_save, and save without ensure_weight_tying",
            )
        return names

    def _target_parameters(self) -> tuple[str, ...]:
        names = self._names("target_parameters", MAX_PARAMETERS)
        for key, feature in (("lora_bias", "lora_bias"), ("use_dora", "DoRA")):
            if names and self._flag(key):
                raise UnsupportedAdapter(
                    f"target_parameters with {feature} is not supported",
                    where=self._where,
                    hint=f"PEFT itself has no {feature} on parameters: train the adapter without it",
                )
        return names

    def _peft_version(self) -> tuple[int, ...] | None:
        value = self._fields.get("peft_version")
        numbers = re.match(r"(\d{1,6})\.(\d{1,6})", value, re.ASCII) if isinstance(value, str) else None
        return None if numbers is None else (int(numbers[1]), int(numbers[2]))

    def _lora_B_layout(self) -> str | None:
        value = self._fields.get("lora_B_layout")
        if value is not None and value not in LORA_B_LAYOUTS:
            raise self._bad("lora_B_layout", value, f"one of {', '.join(LORA_B_LAYOUTS)}")
        return value

    def _made_by_unsloth(self) -> bool:
        mapping = self._fields.get("auto_mapping")
        return isinstance(mapping, dict) and mapping.get("unsloth_fixed") is True

    def _names(self, field: str, most: int) -> tuple[str, ...]:
        names = self._fields.get(field) or []
        if not isinstance(names, list) or not all(isinstance(n, str) and n.isprintable() and n for n in names):
            raise self._bad(field, names, "a list of names")
        if len(names) > most:
            raise MalformedAdapter(f"{field} has more than {most} names", where=self._where)
        return tuple(names)

    def _pattern(self, field: str) -> dict[str, Any]:
        value = self._fields.get(field) or {}
        if not isinstance(value, dict):
            raise self._bad(field, value, "an object")
        for key in value:
            if parse_pattern(key) is None:
                raise UnsupportedAdapter(
                    f"{field} has the key {key!r}, a regular expression",
                    where=self._where,
                    hint="only module names, with ^ in front or \\. for a dot, are read; write the names out",
                )
        return value
