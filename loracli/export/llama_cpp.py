"""How llama.cpp names and lays out the matrices of a base model, as far as an adapter for it has to know.

An adapter's update of a matrix has to be put where llama.cpp's converter (conversion/*.py) put the matrix itself. The
names come from the gguf package's own table. Llama and its kin rotate neighbouring pairs of a head's rows where
transformers rotates the two halves, so their converter reorders the rows of q_proj and k_proj:

    row (h, half, i) of transformers  ->  row (h, i, half) of llama.cpp        (conversion/llama.py, LlamaModel.permute)

and with dW = B A that is a reordering of the rows of B. What a converter splits, joins or changes otherwise is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from loracli.adapters.names import leaf
from loracli.errors import BaseModelMismatch, UsageError
from loracli.recipe.recipe import BaseModule


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
        if module.kind != "linear":
            return f"it is no linear layer but {module.kind}, which the converter transposes"
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
