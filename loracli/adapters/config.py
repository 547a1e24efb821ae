"""`adapter_config.json`: the fields that say what the tensors mean, and the features that are refused by name.

The scaling of a module comes from here; which modules there are comes from the tensor names, never from a pattern in a
config. PEFT itself drops keys that it does not know with a warning, so an adapter of a newer feature would load as
something else: every key here is either known, or refused unless it is off.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from loracli.adapters.patterns import ModulePatterns, PatternError
from loracli.adapters.stored import LORA_B_LAYOUTS
from loracli.adapters.targets import Targets, read_targets
from loracli.algebra.factors import lora_scaling
from loracli.errors import MalformedAdapter, UnsupportedAdapter
from loracli.system.strict_json import read_object

Value = TypeVar("Value")

MAX_CONFIG_BYTES = 1 << 20
_MAX_RANK = 1 << 14
_MAX_SAVED = 256  # names in modules_to_save; each is held against every tensor's
MAX_PARAMETERS = 4096  # names in target_parameters

# Fields that choose modules or concern training and loading only: the tensors already say what came of them.
_WITHOUT_EFFECT = frozenset(
    "auto_mapping base_model_name_or_path ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode "
    "init_lora_weights layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core peft_type peft_version "
    "qalora_group_size r rank_pattern alpha_pattern revision runtime_config target_modules task_type use_rslora "
    "bias loftq_config lora_bias modules_to_save target_parameters lora_B_layout "
    "corda_config lora_ga_config "  # init_lora_weights says whether they count
    "merge_weights "  # of PEFT before 0.3
    "nvfp4_merge_aware "  # of axolotl: to which four bits the merged weights go
    "swift_type lora_dtype lorap_lr_ratio lorap_emb_lr lr_ratio model_key_mapping".split()  # of ms-swift
)

# Initialisations that leave the base model as it is, in any capitals. The others subtract from it what they put into
# the factors.
_PLAIN_INITIALISATIONS = frozenset({"gaussian", "orthogonal", "eva", "mica"})

# Of those others, the ones that `loracat convert` can put right, by how PEFT's names begin.
_SUBTRACTING_INITIALISATIONS = ("pissa", "olora", "corda", "lora_ga")
_CONVERTIBLE_FIELDS = frozenset({"use_dora"})
_LOFTQ = "it belongs to the quantised base of its training; on that very base, and no other, set the field to true"
_UNKNOWN_INITIALISATION = "PEFT has none of that name; if the base was left as it is, set the field to true"
_CONVERT = "make a plain LoRA of it: loracat convert ADAPTER --base MODEL"
_NO_LORA = "train a LoRA in its place, or leave it out"

# Features that change what the tensors mean, with the way out. "Off" is null, false, an empty list or object,
# or absent, as PEFT writes it; 0 and "" are not.
_REFUSED = {
    "use_dora": ("DoRA", _CONVERT),
    "layer_replication": ("layer_replication", "train the adapter on the base model's own layers"),
    "trainable_token_indices": ("trainable tokens", "train the adapter without trainable_token_indices"),
    "alora_invocation_tokens": ("aLoRA", "an activated LoRA depends on the prompt and cannot be added to another"),
    "use_qalora": ("QALoRA", "train the adapter without use_qalora"),
    "use_bdlora": ("BD-LoRA", "train the adapter without use_bdlora"),
    "megatron_config": ("Megatron layers", "convert the adapter to ordinary layers first"),
    "enable_lora": (
        "a fused layer of q, k and v that is adapted in parts, as by PEFT before 0.3,",
        "train the adapter again with a PEFT of today, which adapts the whole layer",
    ),
    "use_merged_linear": (
        "a merged linear layer of ms-swift",
        "train the adapter without use_merged_linear; ms-swift cannot save it for PEFT either",
    ),
    "use_qa_lora": ("QA-LoRA of ms-swift", "train the adapter without use_qa_lora"),
    "kasa_config": (
        "KaSA, which cuts the base's weights and has a diagonal between the factors,",
        "train an ordinary LoRA",
    ),
    "velora_config": (
        "VeLoRA",
        "its update is that of a plain LoRA: leave out the field velora_config and the tensors lora_velora_embed",
    ),
    "monteclora_config": (
        "MonteCLoRA",
        "merged it is a plain LoRA: leave out the field monteclora_config and the tensors lora_monteclora_sampler",
    ),
    "arrow_config": (
        "Arrow, which chooses among adapters for each token,",
        "compose the adapters that it chooses among",
    ),
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
        rank_pattern: ranks of single modules, by PEFT's patterns.
        alpha_pattern: the same for lora_alpha.
        fan_in_fan_out: whether the base stores its weights as (in, out), as GPT-2's Conv1D does.
        whole_names: last names of which the adapter was put on every module that the base has.
        lora_dropout: the dropout of training; never used here.
        task_type: `CAUSAL_LM`, another, or None.
        lora_bias: whether every lora_B of a linear layer has a bias.
        modules_to_save: ends of the names of modules that were saved whole, where the base has such.
        ensure_weight_tying: whether what ties to such a module follows it.
        target_parameters: ends of the paths of parameters that were adapted, as those of experts are.
        peft_version: that wrote it, (0, 18, 1); None if it does not say.
        lora_B_layout: how lora_B of experts lies, by unsloth's key; None if it does not say.
        made_by_unsloth: whether unsloth wrote it.
        use_dora: whether magnitudes belong to it; only where it is read to be converted.
        initialisation: that was subtracted from the base, `pissa` or another; only where it is read to be converted.
        targets: which modules PEFT puts LoRA on.
        doubts: what could be read in another way, in a sentence each.
    """

    base_model: str | None
    base_revision: str | None
    rank: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: ModulePatterns[int]
    alpha_pattern: ModulePatterns[float]
    fan_in_fan_out: bool
    whole_names: frozenset[str]
    lora_dropout: float
    task_type: str | None
    lora_bias: bool = False
    modules_to_save: tuple[str, ...] = ()
    ensure_weight_tying: bool = False
    target_parameters: tuple[str, ...] = ()
    peft_version: tuple[int, ...] | None = None
    lora_B_layout: str | None = None
    made_by_unsloth: bool = False
    use_dora: bool = False
    initialisation: str | None = None
    targets: Targets = Targets()
    doubts: tuple[str, ...] = ()

    def rank_of(self, module: str) -> int:
        """The rank that the config gives `module`."""
        return self.rank_pattern.get(module, self.rank)

    def scaling_of(self, module: str) -> float:
        """s of `module`, after `rank_pattern`, `alpha_pattern` and rsLoRA."""
        alpha = self.alpha_pattern.get(module, self.lora_alpha)
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
    return _PeftFields(fields, str(path)).config()


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of an `adapter_config.json`, unchecked.

    Raises:
        MalformedAdapter: if the file is damaged, or too large.
    """
    return read_object(path, MAX_CONFIG_BYTES)


def refuse_mlx_vlm(fields: dict[str, Any], where: str) -> None:
    """Raises UnsupportedAdapter for the config of mlx-vlm, which has rank and alpha at its top."""
    if fields.keys() >= {"rank", "alpha"} and fields.keys().isdisjoint({"peft_type", "r", "lora_parameters"}):
        raise UnsupportedAdapter(
            "is a config of mlx-vlm (rank, alpha, dropout), whose scaling differs from version to version",
            where=where,
            hint="train the adapter with mlx-lm or PEFT",
        )


def _refuse_features(fields: dict[str, Any], where: str, *, convertible: bool) -> None:
    peft_type = fields.get("peft_type")
    refuse_mlx_vlm(fields, where)
    if peft_type != "LORA":
        shown = repr(peft_type) if "peft_type" in fields else "missing"
        raise UnsupportedAdapter(f"peft_type is {shown}; only LORA can be composed", where=where, hint=_NO_LORA)
    for key, (feature, way_out) in _REFUSED.items():
        if _is_on(fields.get(key)) and not (convertible and key in _CONVERTIBLE_FIELDS):
            raise UnsupportedAdapter(f"{feature} is not supported (field {key!r})", where=where, hint=way_out)
    if fields.get("bias", "none") not in ("none", "lora_only", "all"):  # whether biases were trained, the tensors tell
        raise UnsupportedAdapter(
            f"bias is {fields['bias']!r}, which PEFT does not know",
            where=where,
            hint='train the adapter with bias="none"',
        )
    initialisation = fields.get("init_lora_weights", True)
    if not _is_plain(initialisation) and not (convertible and _is_subtracting(initialisation)):
        loftq = isinstance(initialisation, str) and initialisation.lower() == "loftq"
        assumed = loftq or _is_subtracting(initialisation)
        raise UnsupportedAdapter(
            f"init_lora_weights is {initialisation!r}"
            + (": such an adapter assumes a changed base model" if assumed else ""),
            where=where,
            hint=_CONVERT if _is_subtracting(initialisation) else _LOFTQ if loftq else _UNKNOWN_INITIALISATION,
        )
    for key, value in fields.items():
        if key not in _WITHOUT_EFFECT and key not in _REFUSED and _is_on(value):
            raise UnsupportedAdapter(
                f"the field {key!r} is not known to loracat and is not off",
                where=where,
                hint="neither PEFT nor a trainer that loracat knows has it; remove it if it changes nothing of the "
                "update",
            )


def _is_plain(initialisation: Any) -> bool:
    known = isinstance(initialisation, str) and initialisation.lower() in _PLAIN_INITIALISATIONS
    return known or initialisation is None or isinstance(initialisation, bool)


def _is_subtracting(initialisation: Any) -> bool:
    return isinstance(initialisation, str) and _initialisation_name(initialisation).startswith(
        _SUBTRACTING_INITIALISATIONS
    )


def _initialisation_name(initialisation: str) -> str:
    """As PEFT spells it; ms-swift has hyphens."""
    return initialisation.lower().replace("-", "_")


def _is_on(value: Any) -> bool:
    return value is not None and value is not False and value != {} and value != []


class Fields:
    """Checked access to the fields of one config; what is wrong raises MalformedAdapter."""

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        self._fields, self.where = fields, where

    def bad(self, field: str, value: Any, expected: str) -> MalformedAdapter:
        """The error that says what a field holds, and what it should."""
        absent = value is None and field.isidentifier() and field not in self._fields
        shown = "missing" if absent else repr(value)
        return MalformedAdapter(f"the field {field} is {shown}; expected {expected}", where=self.where)

    def rank(self, field: str, value: Any) -> int:
        """The value as a rank; `field` names it in an error."""
        if type(value) is not int or not 1 <= value <= _MAX_RANK:
            raise self.bad(field, value, f"a whole number from 1 to {_MAX_RANK}")
        return value

    def number(self, field: str, value: Any) -> float:
        """The value as a number that no scaling overflows."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e9:
            raise self.bad(field, value, "a number")
        return float(value)

    def flag(self, field: str) -> bool:
        """A field that is true, false or absent."""
        value = self._fields.get(field)
        if value is not None and not isinstance(value, bool):
            raise self.bad(field, value, "true or false")
        return bool(value)

    def text(self, field: str) -> str | None:
        """A field of one line of text; None where it is empty or absent."""
        value = self._fields.get(field)
        if value is not None and not (isinstance(value, str) and value.isprintable()):
            raise self.bad(field, value, "text on one line")
        return value or None


class _PeftFields(Fields):
    """Those of PEFT's config."""

    def config(self) -> AdapterConfig:
        return AdapterConfig(
            base_model=self.text("base_model_name_or_path"),
            base_revision=self.text("revision"),
            rank=self.rank("r", self._fields.get("r")),
            lora_alpha=self._alpha("lora_alpha", self._fields.get("lora_alpha")),
            use_rslora=self.flag("use_rslora"),
            rank_pattern=self._patterns("rank_pattern", self.rank),
            alpha_pattern=self._patterns("alpha_pattern", self._alpha),
            fan_in_fan_out=self.flag("fan_in_fan_out"),
            whole_names=self._whole_names(),
            lora_dropout=self.number("lora_dropout", self._fields.get("lora_dropout") or 0.0),
            task_type=self.text("task_type"),
            lora_bias=self.flag("lora_bias"),
            modules_to_save=self._names("modules_to_save", _MAX_SAVED),
            ensure_weight_tying=self.flag("ensure_weight_tying"),
            target_parameters=self._target_parameters(),
            peft_version=self._peft_version(),
            lora_B_layout=self._lora_B_layout(),
            made_by_unsloth=self._made_by_unsloth(),
            use_dora=_is_on(self._fields.get("use_dora")),
            initialisation=self._initialisation(),
            targets=read_targets(self._fields),
        )

    def _alpha(self, field: str, value: Any) -> float:
        alpha = self.number(field, value)
        if alpha == 0:
            raise UnsupportedAdapter(
                f"the field {field} is 0, and with it the update of each module that it is for",
                where=self.where,
                hint="set it to the lora_alpha of the training: some converters write 0 and leave the number to you",
            )
        return alpha

    def _initialisation(self) -> str | None:
        value = self._fields.get("init_lora_weights")
        return _initialisation_name(str(value)) if _is_subtracting(value) else None

    def _whole_names(self) -> frozenset[str]:
        """PEFT adapts every module whose name is, or ends in a dot and, a name of the list."""
        targets = read_targets(self._fields)
        narrowed = any(_is_on(self._fields.get(key)) for key in ("layers_to_transform", "exclude_modules"))
        names = targets.modules if isinstance(targets.modules, frozenset) and not narrowed else ()
        return frozenset(name for name in names if "." not in name)

    def _target_parameters(self) -> tuple[str, ...]:
        names = self._names("target_parameters", MAX_PARAMETERS)
        for key, feature in (("lora_bias", "lora_bias"), ("use_dora", "DoRA")):
            if names and self.flag(key):
                raise UnsupportedAdapter(
                    f"target_parameters with {feature} is not supported",
                    where=self.where,
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
            raise self.bad("lora_B_layout", value, f"one of {', '.join(LORA_B_LAYOUTS)}")
        return value

    def _made_by_unsloth(self) -> bool:
        mapping = self._fields.get("auto_mapping")
        return isinstance(mapping, dict) and mapping.get("unsloth_fixed") is True

    def _names(self, field: str, most: int) -> tuple[str, ...]:
        names = self._fields.get(field) or []
        if not isinstance(names, list) or not all(isinstance(n, str) and n.isprintable() and n for n in names):
            raise self.bad(field, names, "a list of names")
        if len(names) > most:
            raise MalformedAdapter(f"{field} has more than {most} names", where=self.where)
        return tuple(names)

    def _patterns(self, field: str, checked: Callable[[str, Any], Value]) -> ModulePatterns[Value]:
        values = self._fields.get(field) or {}
        if not isinstance(values, dict):
            raise self.bad(field, values, "an object")
        try:
            return ModulePatterns({key: checked(f"{field}[{key!r}]", value) for key, value in values.items()})
        except PatternError as error:
            raise UnsupportedAdapter(
                f"{field} {error}" if error.key is None else f"{field} has the key {error.key!r}, {error}",
                where=self.where,
                hint="read are names of modules, with ^ $ \\. . | ( ) [ ] and a repeated character such as .* or \\d+; "
                "write the names out",
            ) from None
