"""An adapter for llama.cpp and what is built on it: one GGUF file, written with the gguf package.

    general.type adapter, adapter.type lora, general.architecture, adapter.lora.alpha
    <name>.lora_a    (r, in), of token_embd its transpose      <name>.lora_b    (out, r), rows in llama.cpp's order

The form is that of llama.cpp's convert_lora_to_gguf.py. src/llama-adapter.cpp takes alpha / rank of the tensor as the
scale, and 1 for alpha 0: so alpha is the rank where all modules have one, and 0 where they do not.

An update of a matrix has to be put where llama.cpp's converter (conversion/*.py) put the matrix itself, which the
base's config tells. The names come from the gguf package's own table. Llama and its kin rotate neighbouring pairs of a
head's rows where transformers rotates the two halves, so their converter reorders the rows of q_proj and k_proj:

    row (h, half, i) of transformers  ->  row (h, i, half) of llama.cpp        (conversion/llama.py, LlamaModel.permute)

and with dW = B A that is a reordering of the rows of B. What a converter splits, joins or changes otherwise is refused.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracli.adapters.adapter import LoraAdapter, kernels_of
from loracli.adapters.kinds import BaseModule, kind_of
from loracli.adapters.names import leaf
from loracli.errors import BaseModelMismatch, UsageError
from loracli.export.layout import Place
from loracli.hub.references import BaseClaim, Named
from loracli.model.base import plan_from_config
from loracli.model.reference import WAY_OUT
from loracli.progress import SILENT, Progress
from loracli.system.files import file_sha256, flush
from loracli.system.tensor_file import FLOAT_NAMES, TensorFile, open_tensor_file


@dataclass(frozen=True)
class Architecture:
    """What a converter does with a class of transformers' models.

    Args:
        name: `general.architecture`.
        permutes: whether it reorders the rows of q_proj and k_proj.
        keeps_embedding: whether it leaves the matrix of embed_tokens as it is.
        keeps_head: whether it has a matrix for an lm_head that is not tied.
    """

    name: str
    permutes: bool = False
    keeps_embedding: bool = True
    keeps_head: bool = True


# Read in llama.cpp of 2026-10, conversion/{llama,granite,smollm3,qwen,gemma}.py. Gemma's have no output matrix, scale
# the embedding or cut rows off it.
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", permutes=True),
    "MistralForCausalLM": Architecture("llama", permutes=True),
    "SmolLM3ForCausalLM": Architecture("smollm3", permutes=True),
    "GraniteForCausalLM": Architecture("granite", permutes=True),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "GemmaForCausalLM": Architecture("gemma", keeps_embedding=False, keeps_head=False),
    "Gemma2ForCausalLM": Architecture("gemma2", keeps_embedding=False, keeps_head=False),
    "Gemma3ForCausalLM": Architecture("gemma3", keeps_embedding=False, keeps_head=False),
}


@dataclass(frozen=True)
class LlamaCppBase:
    """A base model as llama.cpp has it.

    Args:
        architecture: what its converter does.
        layers: number of decoder layers.
        heads: number of attention heads.
        kv_heads: number of key and value heads.
        tied: whether the head is the embedding.
    """

    architecture: Architecture
    layers: int
    heads: int
    kv_heads: int
    tied: bool

    def check(self, modules: Mapping[str, BaseModule]) -> None:
        """Refuses a module whose update llama.cpp would not take, or not take as PEFT does.

        Raises:
            UsageError: with the module's name and the reason.
        """
        for name, module in sorted(modules.items()):
            if reason := self._obstacle(module):
                raise UsageError(
                    f"no GGUF can hold the update of {name}: {reason}",
                    hint="leave --gguf out, or leave that module out of the adapters",
                )

    def _obstacle(self, module: BaseModule) -> str | None:
        if module.kind == "embedding":
            if self.tied:
                return "the head is tied to it, and llama.cpp cannot adapt the one without the other"
            return None if self.architecture.keeps_embedding else "its converter changes the embedding"
        if (why := kind_of(module).gguf_obstacle) is not None:
            return why
        if leaf(module.name) == "lm_head" and (self.tied or not self.architecture.keeps_head):
            return "the head is tied to the embedding, and the GGUF has no matrix for it"
        heads = self._permuted_heads(module.name)
        if heads and module.out_features % (2 * heads):
            return f"its {module.out_features} rows are not {heads} heads of an even size"
        return None

    def _permuted_heads(self, module: str) -> int | None:
        """Into how many heads the rows of a module are cut for reordering, None where they stay."""
        if not self.architecture.permutes:
            return None
        return {"q_proj": self.heads, "k_proj": self.kv_heads}.get(leaf(module))

    def lora_b(self, module: str, lora_B: Tensor) -> Tensor:
        """lora_B (out, r) with its rows in llama.cpp's order."""
        heads = self._permuted_heads(module)
        if heads is None:
            return lora_B
        rows, rank = lora_B.shape
        return lora_B.reshape(heads, 2, rows // heads // 2, rank).swapaxes(1, 2).reshape(rows, rank)


def llama_cpp_base(model_class: str, config: Any) -> LlamaCppBase:
    """Of a base model.

    Args:
        model_class: transformers' class of it.
        config: transformers' config of it.
    Raises:
        BaseModelMismatch: if the class's converter is not known to rename and reorder only.
    """
    if model_class not in ARCHITECTURES:
        raise BaseModelMismatch(
            f"a GGUF adapter cannot be written for a {model_class}: only for {', '.join(ARCHITECTURES)}",
            hint="leave --gguf out and use llama.cpp's convert_lora_to_gguf.py on the export",
        )
    heads = int(config.num_attention_heads)
    return LlamaCppBase(
        architecture=ARCHITECTURES[model_class],
        layers=int(config.num_hidden_layers),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        tied=bool(config.tie_word_embeddings),
    )


def load_gguf() -> Any:
    """The gguf package.

    Raises:
        UsageError: if it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise UsageError("--gguf needs the package gguf", hint="pip install 'loracat[gguf]'") from None
    return gguf


def gguf_names(base: LlamaCppBase, modules: Mapping[str, BaseModule]) -> dict[str, str]:
    """GGUF's names of modules, `blk.0.attn_q.weight`.

    Raises:
        UsageError: if the architecture has no tensor of the kind, or cannot hold the update of one.
    """
    gguf = load_gguf()
    base.check(modules)
    number = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == base.architecture.name)
    table = gguf.get_tensor_name_map(number, base.layers)
    found = {name: table.get_name(f"{name}.weight", try_suffixes=(".weight",)) for name in modules}
    unknown = sorted(name for name, known in found.items() if known is None)
    if unknown:
        raise UsageError(
            f"no GGUF can hold the update of {unknown[0]}: {base.architecture.name} has no tensor of that name",
            hint="leave --gguf out, or leave that module out of the adapters",
        )
    return found


def write_gguf(
    path: Path, base: LlamaCppBase, names: Mapping[str, str], source: Path, places: Mapping[str, Place]
) -> str:
    """Writes the factors of an exported file as a new GGUF file and flushes it to the disk, one tensor at a time.

    Args:
        path: must not exist.
        base: how llama.cpp has the base model.
        names: GGUF's, of every module.
        source: the exported safetensors file.
        places: what is where in it.
    Returns:
        the sha256 of the file.
    """
    gguf = load_gguf()
    file = open_tensor_file(source)
    ranks = {place.factor_shape[0] for place in places.values() if place.side == "A"}
    writer = gguf.GGUFWriter(None, base.architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(ranks.pop()) if len(ranks) == 1 else 0.0)
    order = sorted(places, key=lambda name: (names[places[name].module], places[name].side))
    for name in order:
        place, dtype = places[name], file.dtypes[name]
        shape = place.factor_shape[::-1] if _flipped(place, names) else place.factor_shape
        raw = gguf.GGMLQuantizationType[FLOAT_NAMES[dtype]]
        size = torch.Size(shape).numel() * dtype.itemsize
        bits = torch.empty(0, dtype=torch.int16 if dtype.itemsize == 2 else torch.int32).numpy().dtype
        writer.add_tensor_info(f"{names[place.module]}.lora_{place.side.lower()}", shape, bits, size, raw_dtype=raw)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in _read(file, order):
            place = places[name]
            factor = place.factor_of(tensor)
            if place.side == "B":
                factor = base.lora_b(place.module, factor)
            elif _flipped(place, names):
                factor = factor.T
            _write(writer, factor)
        writer.flush()
    finally:
        writer.close()
    flush(path)
    return file_sha256(path)


def _read(file: TensorFile, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors one by one; what goes wrong with writing them is none of the reader's errors."""
    with file.reader() as reader:
        for name in names:
            yield name, reader.read(name)


def _flipped(place: Place, names: Mapping[str, str]) -> bool:
    """llama.cpp looks tokens up in lora_a of the embedding, so a token is a row there."""
    return place.side == "A" and names[place.module] == "token_embd.weight"


def _write(writer: Any, factor: Tensor) -> None:
    bits = factor.contiguous().view(torch.int16 if factor.dtype.itemsize == 2 else torch.int32)
    try:
        writer.write_tensor_data(bits.numpy())
    except OSError as error:
        if error.errno is None:  # numpy says how much it could write, not why
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def find_llama_cpp_base(
    base: Named | BaseClaim,
    adapters: Sequence[LoraAdapter],
    *,
    revision: str | None = None,
    config_sha256: str | None = None,
    progress: Progress = SILENT,
) -> LlamaCppBase:
    """How llama.cpp has a base model.

    Args:
        base: as `locate_base` takes it; of one on the Hub only config.json is fetched.
        adapters: that are composed.
        revision: of a base on the Hub.
        config_sha256: that the config has to have, None for any.
        progress: told of a download.
    Raises:
        UsageError: if an adapter changes a convolution, or the gguf package is not installed; others as of
            `plan_from_config`.
        BaseModelMismatch: if the config is another one, or its architecture cannot be had.
    """
    convolution = next(iter(kernels_of(adapters)), None)
    if convolution is not None:
        raise UsageError(
            f"no GGUF can hold the update of {convolution}, a convolution: llama.cpp has LoRA on matrices alone",
            hint="leave --gguf out, and run the export with PEFT",
        )
    load_gguf()
    plan, found = plan_from_config(base, revision=revision, progress=progress)
    if config_sha256 not in (None, found):
        raise BaseModelMismatch(
            f"the config.json of {plan.reference.id} is not the config of the base that the recipe was fitted on",
            hint=WAY_OUT,
        )
    return llama_cpp_base(type(plan.skeleton).__name__, plan.config)
