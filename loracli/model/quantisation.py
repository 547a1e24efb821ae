"""Bases whose linear layers keep their weights in a few bits, and that are run as they are.

With adapters attached a frozen layer has to give two products, whatever it keeps:

    y = W x + b        dL/dx = W^T dL/dy        W = the numbers that its bits stand for

bitsandbytes keeps NF4, FP4 (QLoRA, arXiv 2305.14314) and int8 (LLM.int8, arXiv 2208.07339) so that W can be had for the
moment of a product, on a GPU and on a CPU. Here both products are computed with that W, in the dtype of x, and W is
dropped again. bitsandbytes' own forward takes other kernels for some shapes, rounds x to int8 by the largest numbers of
a whole batch, and has another gradient than its values: a token's loss would hang on the records beside it.

Other formats are refused by name before any weight is fetched.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loracli.errors import BaseModelMismatch, UsageError
from loracli.recipe.record import ON_LOADING, BaseForm
from loracli.system.near import did_you_mean

UNQUANTISED = "none"  # as a form: a base in full precision stays so, whatever a recipe says
_WAY_OUT = "give the unquantised model with --base"
_MAX_SKIPPED = 10_000
_BITS: Mapping[BaseForm, float] = {"nf4": 4.5, "fp4": 4.5, "int8": 8.0}  # a number, with the scales of its block


@dataclass(frozen=True)
class Quantisation:
    """How a base is quantised.

    Args:
        form: of the numbers of its linear layers.
        skipped: names of modules that are left as they are, None for the head alone.
        stored: whether its files are so; otherwise it is made so when it is loaded.
    """

    form: BaseForm
    skipped: tuple[str, ...] | None = None
    stored: bool = True

    def loading(self, dtype: torch.dtype) -> Any:
        """transformers' config of it, with the dtype of what is not quantised; nothing of a stranger's but the names in
        `skipped` is in it."""
        from transformers import BitsAndBytesConfig

        _import_bitsandbytes()
        return BitsAndBytesConfig(
            load_in_4bit=self.form != "int8",
            load_in_8bit=self.form == "int8",
            bnb_4bit_quant_type=self.form if self.form != "int8" else "nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=None if self.skipped is None else list(self.skipped),
        )

    @property
    def versions(self) -> dict[str, str]:
        """Of the package that computes with it, by its name."""
        return {"bitsandbytes": version("bitsandbytes")}

    @property
    def bytes_a_number(self) -> float:
        """Of a linear layer."""
        return _BITS[self.form] / 8


def has_bitsandbytes() -> bool:
    """Whether it is installed; it is not imported."""
    return find_spec("bitsandbytes") is not None


def check_quantise(form: str | None) -> None:
    """Whether a base can be quantised so on loading, here.

    Raises:
        UsageError: if not.
    """
    if form in (None, UNQUANTISED):
        return
    if form not in ON_LOADING:
        choices = (*ON_LOADING, UNQUANTISED)
        raise UsageError(f"--quantise {form} is not one of {', '.join(choices)}", hint=did_you_mean(form, choices))
    if not has_bitsandbytes():
        raise UsageError("--quantise needs the package bitsandbytes", hint="pip install 'loracat[bitsandbytes]'")


def read_quantisation(fields: Mapping[str, Any], name: str, *, quantise: str | None = None) -> Quantisation | None:
    """How the base of this config is quantised when it runs; None for full precision.

    Args:
        fields: of the config.json, or of transformers' config of it.
        name: of the base in errors.
        quantise: what it is to be made on loading, None or `none` for nothing.
    Raises:
        BaseModelMismatch: if it is quantised in a way that is not run here, by name.
        UsageError: if it is quantised otherwise than asked for, or the package is missing.
    """
    check_quantise(quantise)
    config = fields.get("quantization_config") or fields.get("compression_config") or _by_mlx(fields)
    if not config:
        return Quantisation(quantise, stored=False) if quantise in ON_LOADING else None
    if not isinstance(config, Mapping):
        config = config.to_dict() if hasattr(config, "to_dict") else {}
    found = _bitsandbytes(config, name)
    if quantise is not None and quantise != found.form:
        raise UsageError(
            f"the base model {name} is stored in {found.form}, which --quantise {quantise} does not change",
            hint=f"leave --quantise out, or {_WAY_OUT}",
        )
    if not has_bitsandbytes():
        raise UsageError(
            f"the base model {name} is quantised by bitsandbytes in {found.form}, and that package is not installed",
            hint=f"pip install 'loracat[bitsandbytes]'; or {_WAY_OUT}",
        )
    return found


def _bitsandbytes(config: Mapping[str, Any], name: str) -> Quantisation:
    method = config.get("quant_method") or _method_by_fields(config)

    def refused(why: str) -> BaseModelMismatch:
        return BaseModelMismatch(f"the base model {name} is quantised {why}", hint=_WAY_OUT)

    if method != "bitsandbytes":
        by = f"by {method[:40]!r}" if isinstance(method, str) else "in an unknown way"
        raise refused(
            f"{by}, which adapters are not attached to here; of quantised bases those of bitsandbytes are run"
        )
    if _loads(config, 4) == _loads(config, 8):
        raise refused("by bitsandbytes, and does not say whether in 4 or in 8 bits")
    skipped = config.get("llm_int8_skip_modules")
    names = isinstance(skipped, list) and len(skipped) <= _MAX_SKIPPED and all(isinstance(n, str) for n in skipped)
    if skipped is not None and not names:
        raise refused("with a list of skipped modules that does not hold names: llm_int8_skip_modules")
    form, storage = config.get("bnb_4bit_quant_type", "fp4"), config.get("bnb_4bit_quant_storage") or "uint8"
    if _loads(config, 8):
        form = "int8"
    elif str(storage).removeprefix("torch.") != "uint8":
        raise refused(f"by bitsandbytes with its bits kept as {str(storage)[:40]}; uint8 is read")
    if form not in get_args(BaseForm):
        raise refused(f"by bitsandbytes in {str(form)[:40]!r}; {', '.join(get_args(BaseForm))} are run")
    return Quantisation(form, None if skipped is None else tuple(skipped))


def _by_mlx(fields: Mapping[str, Any]) -> Any:
    """What MLX wrote at first, under a key of its own."""
    config = fields.get("quantization")
    return config if isinstance(config, Mapping) and "bits" in config else None


def _method_by_fields(config: Mapping[str, Any]) -> str | None:
    """The method of a config that does not name it."""
    if _loads(config, 4) or _loads(config, 8):
        return "bitsandbytes"
    by = {"compressed-tensors": {"config_groups"}, "mlx": {"group_size", "bits"}}
    return next((method for method, keys in by.items() if keys <= config.keys()), None)


def _loads(config: Mapping[str, Any], bits: int) -> bool:
    return config.get(f"load_in_{bits}bit") is True or config.get(f"_load_in_{bits}bit") is True


def is_quantised(module: nn.Module) -> bool:
    """Whether it is a linear layer whose weight stands for other numbers than it holds."""
    package = sys.modules.get("bitsandbytes")  # whoever has such a layer has imported it
    return package is not None and type(module) in (package.nn.Linear4bit, package.nn.Linear8bitLt)


def run_exactly(model: Any, dtype: torch.dtype) -> int:
    """Gives every quantised layer the two products above, and the rest of the model this dtype, as transformers leaves
    what is stored beside quantised layers in its own; returns how many of those there are."""
    layers = [module for module in model.modules() if is_quantised(module)]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    stored, packed = model.get_input_embeddings().weight.dtype, {id(layer.weight) for layer in layers}
    for parameter in model.parameters():
        if parameter.dtype == stored and id(parameter) not in packed:
            parameter.data = parameter.data.to(dtype)
    return len(layers)


def _forward(layer: Any, x: Tensor) -> Tensor:
    y: Tensor = _QuantisedLinear.apply(x, layer)  # type: ignore[no-untyped-call]
    return y


class _QuantisedLinear(torch.autograd.Function):
    """W x + b of a frozen layer, keeping neither x nor W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, _weight(layer, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        return grad_y @ _weight(ctx.layer, ctx.dtype), None


def _weight(layer: Any, dtype: torch.dtype) -> Tensor:
    """W (out, in), as bitsandbytes computes it."""
    weight, functional = layer.weight, sys.modules["bitsandbytes"].functional
    if weight.dtype == torch.int8:
        dense: Tensor = weight.data * (weight.SCB.to(weight.device)[:, None] / 127)
    else:
        dense = functional.dequantize_4bit(weight.data, weight.quant_state)
    return dense.to(dtype)


def import_peft() -> Any:
    """PEFT, which imports bitsandbytes wherever that is installed."""
    if has_bitsandbytes():
        _import_bitsandbytes()
    import peft

    return peft


def _import_bitsandbytes() -> None:
    """Its first import takes code from the Hub where the package `kernels` is installed and the CPU has bfloat16, and
    says so where it is not. That code has no use here, and is not taken."""
    there, log = "kernels" in sys.modules, logging.getLogger("bitsandbytes.backends.cpu.ops")
    before, level = sys.modules.get("kernels"), log.level
    sys.modules["kernels"] = None  # type: ignore[assignment]
    log.setLevel(logging.ERROR)
    try:
        import_module("bitsandbytes")
    finally:
        log.setLevel(level)
        del sys.modules["kernels"]
        if there:
            sys.modules["kernels"] = before  # type: ignore[assignment]
