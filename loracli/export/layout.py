"""Where every factor goes: names and shapes in the file, for the profile that the readers take.

The layout that mlx-lm reads (mlx-lm 0.32, mlx_lm/tuner/utils.py and lora.py).

    <path>.lora_a   (in, r)    the transpose of lora_A
    <path>.lora_b   (r, out)   the transpose of lora_B        y = W x + scale (x lora_a) lora_b

One rank and one scale for all. `keys` are whole module paths, which mlx-lm looks up in the model itself: those relative
to a layer, as it writes them, count layers from the last, and an export does not know how many there are. mlx-lm fills
a key without tensors with random numbers times zero, and raises on a tensor without a key.

`portable` is the one layout that PEFT, vLLM, SGLang, llama.cpp's converter and TGI read alike: the same rank R in every
module, lora_alpha = R so that the scaling is 1 by every server's rule, no patterns, no rsLoRA, and leaf names as
targets, each present wherever the base has that leaf (zeros where no adapter changes it). SGLang takes alpha / r from
the config alone; llama.cpp takes the rank from the tensor; TGI drops a kind of module that one layer lacks: this layout
leaves them nothing to differ on.

`peft` keeps each module at its own rank through rank_pattern and alpha_pattern with escaped full names, which PEFT and
vLLM read.

`mlx` is what mlx-lm reads: another file, other names, transposed factors, one rank (export/layout.py).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor

from loracli.adapters.base_module import BaseModule
from loracli.adapters.experts import module_of_parameter
from loracli.adapters.names import format_tensor_name, is_numbered, layer, leaf, numbered_name, target_of
from loracli.adapters.tasks import CAUSAL_LM
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


# Where MLX's models have the names of transformers': its loaders rename what lies elsewhere.
_SAME_NAME = re.compile(r"(model\.layers\.\d+\.[A-Za-z0-9_.]+|lm_head)")


def mlx_config(base: str, keys: Sequence[str], rank: int) -> dict[str, Any]:
    """`adapter_config.json`; the scale is folded into the factors."""
    layers = {layer(key) for key in keys if key.startswith("model.layers.")}
    return {
        "fine_tune_type": "lora",
        "lora_parameters": {"dropout": 0.0, "keys": list(keys), "rank": rank, "scale": 1.0},
        "model": base,
        "num_layers": len(layers),
    }


def mlx_obstacle(modules: Sequence[BaseModule], ranks: Mapping[str, int]) -> str | None:
    """Why MLX cannot hold a composition, naming the module, or None."""
    kinds = {module.name: module.kind for module in modules}
    for name in sorted(ranks):
        if kinds[name] == "embedding":
            return f"{name} is an embedding, whose update MLX gives to a tied head as well, and PEFT does not"
        if kinds[name] == "conv1d":
            return f"{name} is a Conv1D, which goes by another name in MLX"
        if kinds[name] == "parameter":
            return f"{name} is not a linear layer of the base but a module with a matrix of its own"
        if kinds[name] == "experts" or ".experts." in name:
            return f"{name} belongs to an expert, and MLX stacks experts into one layer"
        if not _SAME_NAME.fullmatch(name):
            return f"{name} may go by another name in MLX, which knows model.layers.<i>.<...> and lm_head"
    return None


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
        experts: how many of them a parameter has, by its path.
        convolutions: their groups and kernels, by the convolution's path.
        task_type: `task_type` of the config, None without one: PEFT then wraps any model.
        parameters: modules of whose classes PEFT adapts the weight alone, as one of the target_parameters.
    """

    profile: ProfileName
    ranks: Mapping[str, int]
    rank: int
    targets: tuple[str, ...]
    reason: str | None = None
    lora_bias: bool = False
    modules_to_save: tuple[str, ...] = ()
    experts: Mapping[str, int] = field(default_factory=dict)
    convolutions: Mapping[str, Convolution] = field(default_factory=dict)
    task_type: str | None = CAUSAL_LM
    parameters: tuple[str, ...] = ()

    @property
    def readers(self) -> str:
        """Who reads a layout that is not portable."""
        if self.lora_bias or self.modules_to_save or self.convolutions:
            return "PEFT"
        if self.parameters:
            return "PEFT"
        return "PEFT, and for some models vLLM" if self.experts else "PEFT and vLLM"

    def config(self, base: str, modules: Mapping[str, BaseModule]) -> dict[str, Any]:
        """`adapter_config.json`, with long-standing keys only: older readers refuse others."""
        if self.profile == "mlx":
            return mlx_config(base, self.targets, self.rank)
        ranks = _config_ranks(self.ranks, self.convolutions)
        ranks = {f"{name}.weight" if name in self.parameters else name: rank for name, rank in ranks.items()}
        odd = {} if self.profile == "portable" else {n: r for n, r in ranks.items() if r != self.rank}
        patterns: dict[str, int] = {"^" + re.escape(name): rank for name, rank in sorted(odd.items())}
        newer: dict[str, Any] = {"lora_bias": True} if self.lora_bias else {}
        if self.experts or self.parameters:
            newer["target_parameters"] = sorted([*self.experts, *(f"{name}.weight" for name in self.parameters)])
        if self.experts:
            newer["peft_version"] = "0.20.0"  # whose order of factors this is; older PEFT has another
        return {
            "base_model_name_or_path": base,
            "bias": "none",
            "fan_in_fan_out": any(modules[name].kind == "conv1d" for name in self.ranks),
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
        mlx = self.profile == "mlx"
        found: dict[str, Place] = {}
        of_one: dict[str, list[str]] = {}  # parameters with experts, by their module
        for name in self.experts:
            of_one.setdefault(name.rpartition(".")[0], []).append(name)
        for name, rank in self.ranks.items():
            module = modules[name]
            if name in self.experts:
                found |= self._places_of_experts(module, of_one[name.rpartition(".")[0]])
                continue
            if name in self.convolutions:
                found |= self._places_of_groups(module)
                continue
            embedding = module.kind == "embedding"
            if mlx:
                names = f"{name}.lora_a", f"{name}.lora_b"
            else:
                names = (
                    format_tensor_name(name, "lora_embedding_A" if embedding else "lora_A"),
                    format_tensor_name(name, "lora_embedding_B" if embedding else "lora_B"),
                )
            found[names[0]] = Place(name, "A", (rank, module.in_features), transposed=mlx)
            found[names[1]] = Place(name, "B", (module.out_features, rank), transposed=mlx)
            if self.lora_bias:
                found[format_tensor_name(name, "lora_bias")] = Place(name, "bias", (module.out_features,))
        return found

    def _places_of_experts(self, parameter: BaseModule, beside: Sequence[str]) -> dict[str, Place]:
        """`beside` are the parameters of the same module that are in the file, this one among them."""
        name, rank = parameter.name, self.ranks[parameter.name]
        rows, module = self.experts[name] * rank, module_of_parameter(name, beside)
        return {
            format_tensor_name(module, "lora_A"): Place(name, "A", (rows, parameter.in_features)),
            format_tensor_name(module, "lora_B"): Place(name, "B", (parameter.out_features, rows)),
        }

    def _places_of_groups(self, convolution: BaseModule) -> dict[str, Place]:
        name, rank, known = convolution.name, self.ranks[convolution.name], self.convolutions[convolution.name]
        rows, out = known.groups * rank, known.groups * convolution.out_features
        one = (1,) * len(known.kernel)
        found = {
            format_tensor_name(name, "lora_A"): Place(name, "A", (rows, convolution.in_features), kernel=known.kernel),
            format_tensor_name(name, "lora_B"): Place(name, "B", (out, rank), kernel=one),
        }
        if self.lora_bias:
            found[format_tensor_name(name, "lora_bias")] = Place(name, "bias", (out,))
        return found

    def updates_of(self, target: str) -> tuple[str, ...]:
        """The names of the updates that one pair of tensors holds: of experts or groups, else the module's own."""
        known = self.convolutions.get(target)
        count = self.experts.get(target, 1) if known is None else known.groups
        several = target in self.experts or count > 1
        return tuple(numbered_name(target, number) for number in range(count)) if several else (target,)


def _config_ranks(ranks: Mapping[str, int], convolutions: Mapping[str, Convolution]) -> dict[str, int]:
    """PEFT's `r` of each module, which for a convolution counts the rows of all groups."""
    return {name: rank * (convolutions[name].groups if name in convolutions else 1) for name, rank in ranks.items()}


def ranks_of_targets(ranks: Mapping[str, int]) -> dict[str, int]:
    """Of modules as they are, and of a parameter or convolution the largest of its experts or groups, which all of them
    are filled up to."""
    found: dict[str, int] = {}
    for name, rank in ranks.items():
        found[target_of(name)] = max(rank, found.get(target_of(name), 0))
    return found


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
    kinds = {module.name: module.kind for module in modules}
    embedding = next((name for name in sorted(ranks) if kinds[name] == "embedding"), None)
    if lora_bias and embedding:
        raise UsageError(
            f"{lora_bias} has lora_bias, which PEFT does not support beside an adapted embedding ({embedding})",
            hint="compose it with adapters that leave embeddings alone",
        )
    if profile == "mlx":
        unheld = mlx_obstacle(modules, ranks)
        if convolutions:
            unheld = f"{min(convolutions)} is a convolution, on which MLX has no LoRA"
        if task_type not in (None, CAUSAL_LM):
            unheld = f"its task type is {task_type}, and mlx-lm runs causal language models alone"
        if lora_bias:
            unheld = f"{lora_bias} has lora_bias"
        if saved:
            unheld = f"it replaces {saved[0]} as one of its modules_to_save"
        if unheld:
            raise UsageError(f"the mlx profile is impossible: {unheld}", hint="leave that out, or use --profile peft")
        uniform = rank or max(ranks.values())
        return Layout("mlx", dict.fromkeys(sorted(ranks), uniform), uniform, tuple(sorted(ranks)))
    parameters = tuple(name for name in sorted(ranks) if kinds[name] == "parameter")
    obstacle = portable_obstacle(modules, ranks)
    if lora_bias:
        obstacle = "an adapter has lora_bias, which PEFT alone reads"
    if saved:
        obstacle = f"it replaces {saved[0]} as one of its modules_to_save, which PEFT alone reads"
    if convolutions:
        obstacle = f"it changes the convolution {min(convolutions)}, which PEFT alone reads"
    if lora_bias and (experts or parameters):
        what = f"adapted experts, and {min(experts)} has some" if experts else f"the adapted parameter {parameters[0]}"
        raise UsageError(
            f"{lora_bias} has lora_bias, which PEFT does not support beside {what}",
            hint="compose it with adapters that leave experts and routers alone",
        )
    if profile == "portable" and obstacle:
        raise UsageError(f"the portable profile is impossible: {obstacle}", hint="use --profile peft")
    if profile == "peft" or obstacle:
        targets = tuple(sorted(ranks.keys() - experts.keys() - set(parameters)))
        largest = max(_config_ranks(ranks, convolutions).values())
        return Layout(
            "peft",
            ranks,
            largest,
            targets,
            obstacle,
            bool(lora_bias),
            saved,
            experts,
            convolutions,
            task_type,
            parameters,
        )
    leaves = tuple(sorted({leaf(name) for name in ranks}))
    names = [module.name for module in modules]
    uniform = rank or max(ranks.values())
    return Layout("portable", {name: uniform for name in sorted(names)}, uniform, leaves, task_type=task_type)


def portable_obstacle(modules: Sequence[BaseModule], ranks: Mapping[str, int]) -> str | None:
    """Why leaf names as targets would not mean the same everywhere, or None."""
    first: dict[str, BaseModule] = {}
    leaves = {leaf(name) for name in ranks}
    for module in modules:
        if leaf(module.name) not in leaves:
            continue
        if module.kind == "experts":
            return f"it changes the experts of {module.name}, which lie in one parameter"
        if module.kind == "parameter":
            return f"the base's {module.name} has a targeted name and is adapted as a parameter"
        if module.kind == "other":
            return f"the base's {module.name} has a targeted name and is not a linear layer or embedding"
        other = first.setdefault(leaf(module.name), module)
        if (other.kind, other.in_features, other.out_features) != (
            module.kind,
            module.in_features,
            module.out_features,
        ):
            return f"{leaf(module.name)} names modules of different shapes, {other.name} and {module.name}"
    return None
