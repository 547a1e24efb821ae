"""Kinds of modules, one class each: what the rest asks of a kind; and the base's modules as a recipe names them.

A kind is added by writing a class here and putting its name into `ModuleKind`. What needs torch stands in two tables by
kind: how several updates become one pair of tensors (algebra/packing.py), and how adapters act in a model
(model/attach.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Protocol

from loracli.adapters.names import Part, module_of_parameter, numbered_name
from loracli.system.document import Matches, added

ModuleKind = Literal["linear", "conv1d", "embedding", "parameter", "experts", "convolution", "other"]
MAX_EXPERTS = 1 << 14  # of a parameter; for each there is an update, if only of zeros
READERS = ("PEFT", "PEFT, and for some models vLLM", "PEFT and vLLM")  # of what is not portable, the fewest first


@dataclass(frozen=True)
class BaseModule:
    """A module of the base model that a targeted leaf name matches; `other` kinds cannot carry an adapter.

    The kind `experts` is a parameter with a matrix for each expert; the sizes are those of one, as its factors have
    them, and `experts` is how many there are (0 in recipes before schema 4). `parameter` is a module of another class
    with a matrix as its weight, as a mixture's router is.
    """

    name: Annotated[str, Matches(re.compile(r"[\w.-]{1,1000}"), "the name of a module")]
    kind: ModuleKind
    in_features: int
    out_features: int
    experts: int = added(4, 0)


class Kind:
    """What the rest asks of a kind; the answers here are those of most kinds.

    Attributes:
        name: in recipes and messages.
        parts: of lora_A and lora_B in PEFT's tensor names.
        biased: whether PEFT has a lora_bias for it.
        carriers: kinds of the base's modules that carry such an update.
        matrix: the kind whose updates are the same matrices; a parameter may be the weight of a linear layer.
        transposed: whether the base's weight is (in, out), so that it changes by (s B A)^T.
        fan_in_fan_out: whether PEFT calls it that.
        packing: how PEFT keeps several updates in one pair of tensors; None where each has its own.
        of_experts: whether an update is that of one expert, which meets the tokens that are routed to it alone.
        padded: whether the portable layout fills it up with zeros where no adapter changes it.
        readers: of a layout that is not portable.
        gguf_obstacle: why llama.cpp has no place for it, None if it may have one.
        unbiased: how an error says what PEFT has no lora_bias beside, with the name for `{}`.
    """

    __slots__ = ()

    name: ClassVar[ModuleKind]
    parts: ClassVar[tuple[Part, Part]] = ("lora_A", "lora_B")
    biased: ClassVar[bool] = False
    carriers: ClassVar[frozenset[ModuleKind]] = frozenset()
    transposed: ClassVar[bool] = False
    fan_in_fan_out: ClassVar[bool] = False
    packing: ClassVar[Literal["experts", "groups"] | None] = None
    of_experts: ClassVar[bool] = False
    padded: ClassVar[bool] = True
    readers: ClassVar[str] = READERS[-1]
    unbiased: ClassVar[str] = ""

    @property
    def matrix(self) -> ModuleKind:
        return self.name

    @property
    def gguf_obstacle(self) -> str | None:
        return f"it is not a linear layer but {self.name}, which the converter transposes"

    def mlx_obstacle(self, module: str) -> str | None:
        """Why MLX has no place for a module's update, None if it may have one."""
        return None

    def portable_obstacle(self, module: str) -> str | None:
        """Why a module of this kind with a targeted leaf name makes a layout that not all read alike."""
        return None

    def parameter(self, target: str) -> str:
        """The path of the base's parameter that is changed."""
        return f"{target}.weight"

    def target_parameter(self, target: str) -> str | None:
        """How PEFT's target_parameters name it; None of what target_modules name."""
        return None

    def owner(self, target: str, beside: tuple[str, ...]) -> str:
        """The module by which the tensors of a target go; `beside` are all parameters with experts in the file."""
        return target

    def updates(self, target: str, count: int) -> tuple[str, ...]:
        """The names of the updates that one pair of tensors holds."""
        return (target,)

    def peft_rank(self, rank: int, count: int) -> int:
        """PEFT's `r` for `count` updates of a rank in one pair of tensors."""
        return rank

    def shapes(self, module: BaseModule, rank: int, count: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of the matrices lora_A and lora_B that hold `count` updates of a rank; kernels are flat."""
        return (rank, module.in_features), (module.out_features, rank)


class _Linear(Kind):
    """nn.Linear: W (out, in) changes by s B A; of an adapter, Conv1D too."""

    __slots__ = ()
    name = "linear"
    biased = True
    carriers = frozenset({"linear", "conv1d"})
    gguf_obstacle = None


class _Conv1D(Kind):
    """transformers' Conv1D, a linear layer with W (in, out)."""

    __slots__ = ()
    name = "conv1d"
    biased = transposed = fan_in_fan_out = True

    def mlx_obstacle(self, module: str) -> str:
        return f"{module} is a Conv1D, which goes by another name in MLX"


class _Embedding(Kind):
    """nn.Embedding: "in" is the vocabulary, "out" the width, W (vocabulary, width)."""

    __slots__ = ()
    name = "embedding"
    parts = ("lora_embedding_A", "lora_embedding_B")
    carriers = frozenset({"embedding"})
    transposed = True
    gguf_obstacle = None  # of most architectures
    unbiased = "an adapted embedding, and {} is one"

    def mlx_obstacle(self, module: str) -> str:
        return f"{module} is an embedding, whose update MLX gives to a tied head as well, and PEFT does not"


class _Parameter(Kind):
    """The weight (out, in) of a module of another class, as a mixture's router is."""

    __slots__ = ()
    name = "parameter"
    matrix = "linear"
    carriers = frozenset({"parameter"})
    padded = False
    readers = READERS[0]
    gguf_obstacle = "it is not a linear layer but a module with a matrix of its own, which the converter does not name"
    unbiased = "the adapted parameter {}"

    def mlx_obstacle(self, module: str) -> str:
        return f"{module} is not a linear layer of the base but a module with a matrix of its own"

    def portable_obstacle(self, module: str) -> str:
        return f"the base's {module} has a targeted name and is adapted as a parameter"

    def target_parameter(self, target: str) -> str:
        return self.parameter(target)


class _Experts(Kind):
    """A parameter W (E, ., .) with a matrix for each expert, of which an adapter changes all or none."""

    __slots__ = ()
    name = "experts"
    carriers = frozenset({"experts"})
    packing = "experts"
    of_experts = True
    padded = False
    readers = READERS[1]
    unbiased = "adapted experts, and {} has some"

    def mlx_obstacle(self, module: str) -> str:
        return f"{module} belongs to an expert, and MLX stacks experts into one layer"

    def portable_obstacle(self, module: str) -> str:
        return f"it changes the experts of {module}, which lie in one parameter"

    def parameter(self, target: str) -> str:
        return target

    def target_parameter(self, target: str) -> str:
        return target

    def owner(self, target: str, beside: tuple[str, ...]) -> str:
        return module_of_parameter(target, beside)

    def updates(self, target: str, count: int) -> tuple[str, ...]:
        return tuple(numbered_name(target, expert) for expert in range(count))

    def shapes(self, module: BaseModule, rank: int, count: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return (count * rank, module.in_features), (module.out_features, rank * count)


class _Convolution(Kind):
    """nn.Conv1d, nn.Conv2d, nn.Conv3d: "in" is channels times kernel, "out" the channels of a group."""

    __slots__ = ()
    name = "convolution"
    biased = True
    packing = "groups"
    readers = READERS[0]

    def updates(self, target: str, count: int) -> tuple[str, ...]:
        return (target,) if count == 1 else tuple(numbered_name(target, group) for group in range(count))

    def peft_rank(self, rank: int, count: int) -> int:
        return count * rank

    def shapes(self, module: BaseModule, rank: int, count: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return (count * rank, module.in_features), (count * module.out_features, rank)


class _Other(Kind):
    """What carries no adapter."""

    __slots__ = ()
    name = "other"

    def portable_obstacle(self, module: str) -> str:
        return f"the base's {module} has a targeted name and is not a linear layer or embedding"


KINDS: dict[ModuleKind, Kind] = {
    kind.name: kind for kind in (_Linear(), _Conv1D(), _Embedding(), _Parameter(), _Experts(), _Convolution(), _Other())
}


class _OfKind(Protocol):
    @property
    def kind(self) -> ModuleKind: ...


def kind_of(module: _OfKind) -> Kind:
    """The kind of a module of the base or of an adapter."""
    return KINDS[module.kind]
