"""Adapters as mlx-lm trains them: the same update, stored transposed and with its scaling given outright.

    adapters.safetensors      <module>.lora_a (in, r), <module>.lora_b (r, out)
    adapter_config.json       fine_tune_type, lora_parameters: rank, scale

    dW = scale lora_b^T lora_a^T        so lora_A = lora_a^T (r, in), lora_B = lora_b^T (out, r), s = scale

One rank and one scale for all modules (mlx_lm/tuner/lora.py, LoRALinear.fuse). The config holds the whole training run
beside these; what is not about the update is not looked at. mlx-lm names modules as transformers does for most models;
where it does not, the base model will lack them, and that is said.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from loracli.adapters.config import AdapterConfig, Fields, read_fields, refuse_mlx_vlm
from loracli.adapters.names import leaf
from loracli.adapters.patterns import ModulePatterns
from loracli.algebra.factors import Factors
from loracli.errors import MalformedAdapter, UnsupportedAdapter
from loracli.system.files import CONFIG_FILE, MLX_TENSOR_FILE, TENSOR_FILE
from loracli.system.tensor_file import TensorFile, open_tensor_file

_NAME = re.compile(r"(?P<module>[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*)\.(?P<part>lora_[ab])")
# An MLX embedding shares its update with the head of a tied base, which the file does not tell.
_EMBEDDINGS = frozenset({"embed_tokens", "embed_in", "wte", "wpe", "tok_embeddings", "word_embeddings", "embedding"})
_EXPERTS = frozenset({"switch_mlp", "switch_glu"})


def is_mlx(folder: Path) -> bool:
    """Whether the directory has mlx-lm's weights and not PEFT's."""
    return not (folder / TENSOR_FILE).is_file() and (folder / MLX_TENSOR_FILE).is_file()


def read_mlx(folder: Path) -> tuple[AdapterConfig, dict[str, Factors], TensorFile]:
    """The config, the factors of every module in PEFT's orientation, and the file that they are in.

    Raises:
        MalformedAdapter: if a file is damaged, or tensors and config contradict each other.
        UnsupportedAdapter: if it is no LoRA of linear layers.
    """
    config, scale = _read_config(folder / CONFIG_FILE)
    path = folder / MLX_TENSOR_FILE
    file = open_tensor_file(path, check_names=lambda names: _pairs(names, str(path)))
    factors = {}
    with file.reader() as reader:
        for module, pair in sorted(_pairs(file.shapes, str(path)).items()):
            lora_a, lora_b = (reader.read(pair[part]) for part in ("lora_a", "lora_b"))
            if not lora_a.shape[1] == lora_b.shape[0] == config.rank:
                raise MalformedAdapter(
                    f"{module!r} has lora_a {tuple(lora_a.shape)} and lora_b {tuple(lora_b.shape)}; {CONFIG_FILE} has "
                    f"rank {config.rank}",
                    where=str(path),
                )
            common = torch.promote_types(lora_a.dtype, lora_b.dtype)
            factors[module] = Factors(
                lora_a.to(common).T.contiguous(), lora_b.to(common).T.contiguous(), scale
            )  # (r, in), (out, r)
    return config, factors, file


def _read_config(path: Path) -> tuple[AdapterConfig, float]:
    """The config as far as it is about the update, and the scaling."""
    fields = read_fields(path)
    kind = fields.get("fine_tune_type", "lora")
    if kind != "lora":
        raise UnsupportedAdapter(
            f"fine_tune_type is {kind!r}; of MLX's adapters only lora can be composed",
            where=str(path),
            hint="train it with --fine-tune-type lora",
        )
    refuse_mlx_vlm(fields, str(path))
    checked = Fields(fields, str(path))
    parameters = fields.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise checked.bad("lora_parameters", parameters, "an object")
    rank = checked.rank("lora_parameters.rank", parameters.get("rank"))
    scaling = checked.number("lora_parameters.scale", parameters.get("scale"))
    if scaling == 0:
        raise UnsupportedAdapter(
            "the field lora_parameters.scale is 0, and with it the whole update",
            where=str(path),
            hint="set it to the scale of the training",
        )
    config = AdapterConfig(
        base_model=checked.text("model") or checked.text("base_model_name_or_path"),
        base_revision=None,
        rank=rank,
        lora_alpha=scaling * rank,
        use_rslora=False,
        rank_pattern=ModulePatterns({}),
        alpha_pattern=ModulePatterns({}),
        fan_in_fan_out=False,
        whole_names=frozenset(),  # MLX adapts the last num_layers layers
        lora_dropout=checked.number("lora_parameters.dropout", parameters.get("dropout") or 0.0),
        task_type="CAUSAL_LM",
        doubts=_doubts(checked, parameters.get("alpha"), rank, scaling),
    )
    return config, scaling


def _doubts(checked: Fields, alpha: Any, rank: int, scale: float) -> tuple[str, ...]:
    """mlx-lm of April to June 2024 had the scaling scale * alpha / rank; after that it wrote alpha and did not use it,
    and no config tells which of the two it was."""
    if alpha is None or checked.number("lora_parameters.alpha", alpha) == rank:
        return ()
    other = scale * float(alpha) / rank
    return (
        f"the scaling was taken to be scale = {scale:g}, and alpha = {float(alpha):g} was not read; mlx-lm of April to "
        f"June 2024 meant scale * alpha / rank = {other:g}: if the adapter is of that time, set scale to {other:g} and "
        f"alpha to {rank} in lora_parameters",
    )


def _pairs(names: Iterable[str], where: str) -> dict[str, dict[str, str]]:
    """Tensor names by module and part; every module has both."""
    pairs: dict[str, dict[str, str]] = {}
    for name in sorted(names):
        match = _NAME.fullmatch(name)
        if match is None:
            if name.endswith(".m"):
                raise UnsupportedAdapter(
                    f"the tensor {name!r} belongs to DoRA", where=where, hint="train it with --fine-tune-type lora"
                )
            raise MalformedAdapter(
                f"{name!r} is not a tensor name of an MLX LoRA file",
                where=where,
                hint="expected names like model.layers.0.self_attn.q_proj.lora_a, as mlx-lm writes them",
            )
        module = match["module"]
        if not _EXPERTS.isdisjoint(module.split(".")):
            raise UnsupportedAdapter(
                f"the tensor {name!r} belongs to LoRA on experts", where=where, hint="train it on other keys"
            )
        if leaf(module) in _EMBEDDINGS:
            raise UnsupportedAdapter(
                f"the tensor {name!r} belongs to an embedding, whose update MLX also gives to the head of a tied base",
                where=where,
                hint="leave embeddings out of the keys of lora_parameters",
            )
        pairs.setdefault(module, {})[match["part"]] = name
    if not pairs:
        raise MalformedAdapter("holds no LoRA factors", where=where)
    for module, pair in pairs.items():
        missing = {"lora_a", "lora_b"} - pair.keys()
        if missing:
            raise MalformedAdapter(f"lacks '{module}.{missing.pop()}'", where=where)
    return pairs
