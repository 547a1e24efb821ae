"""Where every factor goes: names and shapes in the file, for the profile that the readers take.

`portable` is the one layout that PEFT, vLLM, SGLang, llama.cpp's converter and TGI read alike: the same rank R in every
module, lora_alpha = R so that the scaling is 1 by every server's rule, no patterns, no rsLoRA, and leaf names as
targets, each present wherever the base has that leaf (zeros where no adapter changes it). SGLang takes alpha / r from
the config alone; llama.cpp takes the rank from the tensor; TGI drops a kind of module that one layer lacks: this layout
leaves them nothing to differ on.

`peft` keeps each module at its own rank through rank_pattern and alpha_pattern with escaped full names, which PEFT and
vLLM read.

`mlx` is what mlx-lm reads (mlx-lm 0.32, mlx_lm/tuner/utils.py and lora.py): another file, other names, transposed
factors, one rank and one scale for all.

    <path>.lora_a   (in, r)    the transpose of lora_A
    <path>.lora_b   (r, out)   the transpose of lora_B        y = W x + scale (x lora_a) lora_b

`keys` are whole module paths, which mlx-lm looks up in the model itself: those relative to a layer, as it writes them,
count layers from the last, and an export does not know how many there are. mlx-lm fills a key without tensors with
random numbers times zero, and raises on a tensor without a key.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor

from loracli.adapters.claims import CAUSAL_LM
from loracli.adapters.kinds import KINDS, READERS, BaseModule, Kind, ModuleKind, kind_of
from loracli.adapters.names import format_tensor_name, is_numbered, layer, leaf, target_of
from loracli.algebra.factors import Factors
from loracli.algebra.packing import Convolution
from loracli.errors import UsageError
from loracli.system.files import MLX_TENSOR_FILE, TENSOR_FILE


@dataclass(frozen=True)
class Place:
    """One tensor of an exported file.

    Args:
        module: whose update it is a factor of.
        side: lora_A (r, in), lora_B (out, r), or the bias of lora_B (out).
        factor_shape: of that factor.
        transposed: whether the file holds the transpose.
        kernel: size of the kernel that the file holds the factor as, (1, 1) for the B of a convolution; empty for a
            matrix.
    """

    module: str
    side: Literal["A", "B", "bias"]
    factor_shape: tuple[int, ...]
    transposed: bool = False
    kernel: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor in the file."""
        if self.kernel:
            rows, columns = self.factor_shape
            return rows, columns // math.prod(self.kernel), *self.kernel
        return self.factor_shape[::-1] if self.transposed else self.factor_shape

    def tensor_of(self, factors: Factors) -> Tensor:
        """The tensor as the file holds it."""
        if self.side == "bias":
            return factors.lora_B.new_zeros(self.factor_shape) if factors.bias is None else factors.bias
        factor = factors.lora_A if self.side == "A" else factors.lora_B
        if self.kernel:
            return factor.reshape(self.shape)
        return factor.T.contiguous() if self.transposed else factor

    def factor_of(self, tensor: Tensor) -> Tensor:
        """The factor that a tensor of the file is."""
        return tensor.T if self.transposed else tensor


ProfileName = Literal["portable", "peft", "mlx"]
PROFILES: tuple[ProfileName, ...] = get_args(ProfileName)


@dataclass(frozen=True)
class Layout:
    """How a composition is laid out in a file.

    Args:
        profile: which rules.
        ranks: of every module in the file, including those that are all zeros; of a parameter that of all its experts,
            of a convolution that of all its groups.
        rank: `r` and `lora_alpha` of the config.
        targets: `target_modules`, or MLX's `keys`.
        reason: why it is not portable, None if it is.
        lora_bias: whether every linear layer has a bias on lora_B.
        modules_to_save: modules that replace the base's.
        kinds: of the modules in the file.
        experts: how many of them a parameter has, by its path.
        convolutions: their groups and kernels, by the convolution's path.
        task_type: `task_type` of the config, None without one: PEFT then wraps any model.
    """

    profile: ProfileName
    ranks: Mapping[str, int]
    rank: int
    targets: tuple[str, ...]
    kinds: Mapping[str, ModuleKind]
    reason: str | None = None
    lora_bias: bool = False
    modules_to_save: tuple[str, ...] = ()
    experts: Mapping[str, int] = field(default_factory=dict)
    convolutions: Mapping[str, Convolution] = field(default_factory=dict)
    task_type: str | None = CAUSAL_LM

    def kind(self, name: str) -> Kind:
        """The kind of a module in the file."""
        return KINDS[self.kinds[name]]

    def count(self, name: str) -> int:
        """How many updates one pair of tensors holds."""
        known = self.convolutions.get(name)
        return self.experts.get(name, 1) if known is None else known.groups

    def updates_of(self, target: str) -> tuple[str, ...]:
        """The names of the updates that one pair of tensors holds: of experts or groups, else the module's own."""
        return self.kind(target).updates(target, self.count(target))

    @property
    def readers(self) -> str:
        """Who reads a layout that is not portable."""
        if self.lora_bias or self.modules_to_save:
            return READERS[0]
        return min((self.kind(name).readers for name in self.ranks), key=READERS.index)

    def config(self, base: str, modules: Mapping[str, BaseModule]) -> dict[str, Any]:
        """`adapter_config.json`, with long-standing keys only: older readers refuse others."""
        if self.profile == "mlx":
            return _mlx_config(base, self.targets, self.rank)
        parameters = {name: path for name in self.ranks if (path := self.kind(name).target_parameter(name)) is not None}
        ranks = {parameters.get(name, name): self._peft_rank(name) for name in self.ranks}
        odd = {} if self.profile == "portable" else {n: r for n, r in ranks.items() if r != self.rank}
        patterns: dict[str, int] = {"^" + re.escape(name): rank for name, rank in sorted(odd.items())}
        newer: dict[str, Any] = {"lora_bias": True} if self.lora_bias else {}
        if parameters:
            newer["target_parameters"] = sorted(parameters.values())
        if self.experts:
            newer["peft_version"] = "0.20.0"  # whose order of factors this is; older PEFT has another
        return {
            "base_model_name_or_path": base,
            "bias": "none",
            "fan_in_fan_out": any(kind_of(modules[name]).fan_in_fan_out for name in self.ranks),
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": self.rank,
            **newer,
            "lora_dropout": 0.0,
            "modules_to_save": list(self.modules_to_save) or None,
            "peft_type": "LORA",
            "r": self.rank,
            "rank_pattern": patterns,
            "alpha_pattern": patterns,
            "target_modules": list(self.targets),
            "task_type": self.task_type,
            "use_rslora": False,
        }

    def _peft_rank(self, name: str) -> int:
        return self.kind(name).peft_rank(self.ranks[name], self.count(name))

    @property
    def alone(self) -> tuple[str, ...]:
        """Modules that lack the one that SGLang stacks them with, as `q_proj without v_proj`.

        It refuses the first of these and leaves the others out (sglang 0.5.23, srt/lora/lora.py, normalize_qkv_proj
        and normalize_gate_up_proj).
        """
        found = {leaf(name) for name in self.ranks}
        stacked = {"q_proj": "v_proj", "v_proj": "q_proj", "k_proj": "q_proj", "up_proj": "gate_proj"}
        return tuple(f"{one} without {other}" for one, other in stacked.items() if one in found and other not in found)

    @property
    def tensor_file(self) -> str:
        """The file that the tensors go into."""
        return MLX_TENSOR_FILE if self.profile == "mlx" else TENSOR_FILE

    def places(self, modules: Mapping[str, BaseModule]) -> dict[str, Place]:
        """Every tensor of the file, by name."""
        found: dict[str, Place] = {}
        for name, rank in self.ranks.items():
            kind = self.kind(name)
            shape_A, shape_B = kind.shapes(modules[name], rank, self.count(name))
            if self.profile == "mlx":
                found[f"{name}.lora_a"] = Place(name, "A", shape_A, transposed=True)
                found[f"{name}.lora_b"] = Place(name, "B", shape_B, transposed=True)
                continue
            owner = kind.owner(name, tuple(self.experts))
            name_A, name_B = (format_tensor_name(owner, part) for part in kind.parts)
            kernel = self.convolutions[name].kernel if name in self.convolutions else ()
            found[name_A] = Place(name, "A", shape_A, kernel=kernel)
            found[name_B] = Place(name, "B", shape_B, kernel=(1,) * len(kernel))
            if self.lora_bias:
                found[format_tensor_name(owner, "lora_bias")] = Place(name, "bias", shape_B[:1])
        return found


def ranks_of_targets(ranks: Mapping[str, int]) -> dict[str, int]:
    """Of modules as they are, and of a parameter or convolution the largest of its experts or groups, which all of them
    are filled up to."""
    found: dict[str, int] = {}
    for name, rank in ranks.items():
        found[target_of(name)] = max(rank, found.get(target_of(name), 0))
    return found


@dataclass(frozen=True)
class _Composed:
    """What is to be laid out: the base's modules, and of the changed ones the ranks and kinds, in their order."""

    modules: Sequence[BaseModule]
    ranks: Mapping[str, int]
    kinds: Mapping[str, ModuleKind]
    lora_bias: str | None
    saved: tuple[str, ...]
    task_type: str | None

    def of(self, kind: ModuleKind) -> list[str]:
        """The changed modules of a kind, sorted."""
        return sorted(name for name, own in self.kinds.items() if own == kind)


def _saved(composed: _Composed) -> str | None:
    return f"it replaces {composed.saved[0]} as one of its modules_to_save" if composed.saved else None


def _mlx_task(composed: _Composed) -> str | None:
    if composed.task_type in (None, CAUSAL_LM):
        return None
    return f"its task type is {composed.task_type}, and mlx-lm runs causal language models alone"


def _mlx_convolution(composed: _Composed) -> str | None:
    return next((f"{name} is a convolution, on which MLX has no LoRA" for name in composed.of("convolution")), None)


# Where MLX's models have the names of transformers': its loaders rename what lies elsewhere.
_SAME_NAME = re.compile(r"(model\.layers\.\d+\.[A-Za-z0-9_.]+|lm_head)")


def _mlx_module(composed: _Composed) -> str | None:
    for name in sorted(composed.ranks):
        kind = composed.kinds[name]
        if kind == "linear" and ".experts." in name:  # a layer of an expert
            kind = "experts"
        if (why := KINDS[kind].mlx_obstacle(name)) is not None:
            return why
        if not _SAME_NAME.fullmatch(name):
            return f"{name} may go by another name in MLX, which knows model.layers.<i>.<...> and lm_head"
    return None


def _portable_convolution(composed: _Composed) -> str | None:
    return next(
        (f"it changes the convolution {name}, which PEFT alone reads" for name in composed.of("convolution")), None
    )


def _portable_module(composed: _Composed) -> str | None:
    """Why leaf names as targets would not mean the same everywhere."""
    first: dict[str, BaseModule] = {}
    leaves = {leaf(name) for name in composed.ranks}
    for module in composed.modules:
        if leaf(module.name) not in leaves:
            continue
        if (why := kind_of(module).portable_obstacle(module.name)) is not None:
            return why
        other = first.setdefault(leaf(module.name), module)
        if (other.kind, other.in_features, other.out_features) != (
            module.kind,
            module.in_features,
            module.out_features,
        ):
            return f"{leaf(module.name)} names modules of different shapes, {other.name} and {module.name}"
    return None


# Why a layout cannot hold a composition: whose layout, and what is asked for a reason. The first reason is given.
_OBSTACLES: tuple[tuple[ProfileName, Callable[[_Composed], str | None]], ...] = (
    ("mlx", _saved),
    ("mlx", lambda composed: f"{composed.lora_bias} has lora_bias" if composed.lora_bias else None),
    ("mlx", _mlx_task),
    ("mlx", _mlx_convolution),
    ("mlx", _mlx_module),
    ("portable", _portable_convolution),
    ("portable", lambda composed: f"{why}, which PEFT alone reads" if (why := _saved(composed)) else None),
    ("portable", lambda composed: "an adapter has lora_bias, which PEFT alone reads" if composed.lora_bias else None),
    ("portable", _portable_module),
)


def _obstacle(profile: ProfileName, composed: _Composed) -> str | None:
    reasons = (obstacle(composed) for reader, obstacle in _OBSTACLES if reader == profile)
    return next((reason for reason in reasons if reason is not None), None)


def _refuse_bias_beside(composed: _Composed, kinds: Sequence[ModuleKind], apart: str) -> None:
    """No layout holds a bias of lora_B beside modules of these kinds."""
    found = next((KINDS[kind].unbiased.format(name) for kind in kinds for name in composed.of(kind)), None)
    if composed.lora_bias and found is not None:
        raise UsageError(
            f"{composed.lora_bias} has lora_bias, which PEFT does not support beside {found}",
            hint=f"compose it with adapters that leave {apart} alone",
        )


def choose_layout(
    modules: Sequence[BaseModule],
    ranks: Mapping[str, int],
    profile: ProfileName | None,
    *,
    rank: int | None,
    lora_bias: str | None = None,
    saved: tuple[str, ...] = (),
    kernels: Mapping[str, tuple[int, ...]] | None = None,
    task_type: str | None = CAUSAL_LM,
) -> Layout:
    """The layout for a composition.

    Args:
        modules: every module of the base that goes by the last name of a changed one.
        ranks: of the modules that the composition changes, of each expert and each group by itself.
        profile: asked for; None is portable where possible.
        rank: `r` of a layout with one rank; None is the largest of `ranks`.
        lora_bias: the ingredient that has biases on lora_B, None without one.
        saved: modules that replace the base's.
        kernels: sizes of the kernels of convolutions that the composition changes, by path.
        task_type: of the composition, None without one.
    Raises:
        UsageError: if portable or mlx was asked for and cannot be, with the reason, or no layout can hold this.
    """
    counts = Counter(target_of(name) for name in ranks if is_numbered(name))
    ranks = ranks_of_targets(ranks)
    found = {name: kernel for name, kernel in (kernels or {}).items() if name in ranks}
    convolutions = {name: Convolution(counts.get(name, 1), kernel) for name, kernel in sorted(found.items())}
    experts = {name: count for name, count in counts.items() if name not in convolutions}
    kinds = _kinds(modules, experts, convolutions)
    composed = _Composed(modules, ranks, {name: kinds[name] for name in ranks}, lora_bias, saved, task_type)
    _refuse_bias_beside(composed, ("embedding",), "embeddings")
    if profile == "mlx":
        if unheld := _obstacle("mlx", composed):
            raise UsageError(f"the mlx profile is impossible: {unheld}", hint="leave that out, or use --profile peft")
        uniform = rank or max(ranks.values())
        return Layout("mlx", dict.fromkeys(sorted(ranks), uniform), uniform, tuple(sorted(ranks)), kinds)
    obstacle = _obstacle("portable", composed)
    _refuse_bias_beside(composed, ("experts", "parameter"), "experts and routers")
    if profile == "portable" and obstacle:
        raise UsageError(f"the portable profile is impossible: {obstacle}", hint="use --profile peft")
    if profile == "peft" or obstacle:
        targets = tuple(name for name in sorted(ranks) if KINDS[kinds[name]].target_parameter(name) is None)
        largest = max(KINDS[kinds[name]].peft_rank(own, counts.get(name, 1)) for name, own in ranks.items())
        composition = (obstacle, bool(lora_bias), saved, experts, convolutions, task_type)
        return Layout("peft", ranks, largest, targets, kinds, *composition)
    leaves = tuple(sorted({leaf(name) for name in ranks}))
    uniform = rank or max(ranks.values())
    padded = {name: uniform for name in sorted(module.name for module in modules)}
    return Layout("portable", padded, uniform, leaves, kinds, task_type=task_type)


def _kinds(
    modules: Sequence[BaseModule], experts: Mapping[str, int], convolutions: Mapping[str, Convolution]
) -> dict[str, ModuleKind]:
    """By name; what several updates share is what the updates say, whatever a record calls it."""
    found: dict[str, ModuleKind] = {m.name: "linear" if kind_of(m).packing else m.kind for m in modules}
    return found | dict.fromkeys(experts, "experts") | dict.fromkeys(convolutions, "convolution")


def _mlx_config(base: str, keys: Sequence[str], rank: int) -> dict[str, Any]:
    """`adapter_config.json`; the scale is folded into the factors."""
    layers = {layer(key) for key in keys if key.startswith("model.layers.")}
    return {
        "fine_tune_type": "lora",
        "lora_parameters": {"dropout": 0.0, "keys": list(keys), "rank": rank, "scale": 1.0},
        "model": base,
        "num_layers": len(layers),
    }
