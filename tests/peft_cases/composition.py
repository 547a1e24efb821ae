"""PEFT's test models, adapters that stock PEFT saved, exports of ours, and the dense formula that judges them.

The models have the architectures and the shapes of PEFT's tests (tests/test_decoder_models.py, test_custom_models.py),
made from configs instead of fetched. Adapters are made as there, with `init_lora_weights=False`, so that every factor
is random.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

from loracli.adapters.adapter import read_adapter
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.model.modules import base_modules
from loracli.recipe.record import RecipeMixing
from tests.export.test_export import make_recipe
from tests.tiny import BASE_ID

# Of what the adapters change, in norm: float32 rounding through two layers is ten times less, a wrong scale 10,000
# times more. PEFT's own tolerances come on top.
CLOSE = 1e-5

_TOKENS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
_GPT = {**_TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_PLAIN = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED = {**_PLAIN, "num_key_value_heads": 2, "pad_token_id": 0}

DECODERS: dict[str, Callable[[], Any]] = {
    "opt": lambda: OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    ),
    "gpt2": lambda: GPT2Config(**_GPT),
    "bloom": lambda: BloomConfig(**_TOKENS, hidden_size=32, n_layer=2, n_head=4),
    "gpt-neo": lambda: GPTNeoConfig(
        **_TOKENS,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
    ),
    "gpt-j": lambda: GPTJConfig(**_GPT, rotary_dim=4),
    "gpt-bigcode": lambda: GPTBigCodeConfig(**_GPT),
    "gpt-neox": lambda: GPTNeoXConfig(**_PLAIN),
    "llama": lambda: LlamaConfig(**_GROUPED),
    "mistral": lambda: MistralConfig(**_GROUPED),
    "phi": lambda: PhiConfig(**_GROUPED),
    "qwen2": lambda: Qwen2Config(**_GROUPED),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=8),
    "gemma": lambda: GemmaConfig(**_GROUPED, head_dim=8),
    "gemma2": lambda: Gemma2Config(**_GROUPED, head_dim=8, query_pre_attn_scalar=8),
    "gemma3": lambda: Gemma3TextConfig(**_GROUPED, head_dim=8, query_pre_attn_scalar=8),
}


class Perceptron(nn.Module):
    """PEFT's MLP: 10 inputs, 20 hidden, 2 outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(10, 20), nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.lin0(x.to(self.lin0.weight.dtype)))
        return torch.log_softmax(self.lin1(hidden), dim=-1)


class EmbeddingConv1D(nn.Module):
    """PEFT's EmbConv1D: an embedding and transformers' Conv1D, whose weight is stored (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.conv1d, self.lin0 = nn.Embedding(100, 5), Conv1D(1, 5), nn.Linear(10, 2)
        nn.init.normal_(self.conv1d.weight)  # Conv1D's own 0.02 lets nothing of the embedding through

    def forward(self, x: Tensor) -> Tensor:
        return torch.log_softmax(self.lin0(torch.relu(self.conv1d(self.emb(x))).flatten(1)), dim=-1)


def build(kind: str) -> Any:
    """The model with the same random weights each time."""
    torch.manual_seed(0)
    if kind == "mlp":
        return Perceptron().eval()
    if kind == "emb-conv1d":
        return EmbeddingConv1D().eval()
    return AutoModelForCausalLM.from_config(DECODERS[kind]()).eval()


def lora_config(kind: str, **fields: Any) -> LoraConfig:
    """As PEFT's tests of decoders have it, with the targets that PEFT chooses for the architecture."""
    chosen = {"r": 8, "lora_alpha": 32, "fan_in_fan_out": kind in ("gpt2", "emb-conv1d"), **fields}
    task = "CAUSAL_LM" if kind in DECODERS else None
    return LoraConfig(task_type=task, init_lora_weights=False, **chosen)


def save_adapter(folder: Path, model: nn.Module, config: LoraConfig, seed: int, dtype: Any = torch.float32) -> Path:
    """An adapter of the model as stock PEFT saves it."""
    torch.manual_seed(seed)
    peft_model = get_peft_model(copy.deepcopy(model), config).to(dtype)
    peft_model.peft_config["default"].base_model_name_or_path = BASE_ID
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def export(folder: Path, model: nn.Module, adapters: Sequence[Path], weights: Sequence[float], **options: Any) -> Path:
    """Our export of the adapters, one weight for each."""
    read = [read_adapter(str(path)) for path in adapters]
    mixing = RecipeMixing("adapter", {"*": tuple(weights)}, len(weights))
    recipe = make_recipe(folder.parent, read, base_modules(model, read))
    return export_adapter(ExportRequest(replace(recipe, mixing=mixing), **options), folder).path


def load(model: nn.Module, adapters: Mapping[str, Path]) -> Any:
    """Stock PEFT with all the adapters; the first is active."""
    (first, path), *others = adapters.items()
    peft_model = PeftModel.from_pretrained(copy.deepcopy(model), path, adapter_name=first)
    for name, path in others:
        peft_model.load_adapter(path, name)
    return peft_model.eval()


def changes(model: nn.Module, adapter: Path) -> dict[str, Tensor]:
    """What one adapter adds to each parameter of the model, by stock PEFT's merge in float64; zeros left out."""
    base = copy.deepcopy(model).double()
    merged = PeftModel.from_pretrained(copy.deepcopy(base), adapter).merge_and_unload()
    before = dict(base.named_parameters())
    found = {name: (p - before[name]).detach() for name, p in merged.named_parameters()}
    return {name: change for name, change in found.items() if change.any()}


def weighted(parts: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """sum_i w_i dW_i by parameter, float64."""
    names = {name for part in parts for name in part}
    return {n: sum(w * p[n] for w, p in zip(weights, parts, strict=True) if n in p) for n in sorted(names)}  # type: ignore[misc]


def dense(model: nn.Module, change: Mapping[str, Tensor]) -> Any:
    """The plain model in float64 with the change added to its parameters."""
    result = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if name in change:
                parameter += change[name]
    return result


def outputs(model: Any, **options: Any) -> Tensor:
    """On fixed inputs: logits (4, 9, vocab) of a decoder, (4, 2) of PEFT's own models."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.no_grad():
        if isinstance(inner, Perceptron):
            result: Tensor = model(torch.arange(40.0).view(4, 10) / 10, **options)
        elif isinstance(inner, EmbeddingConv1D):
            result = model(torch.arange(40).view(4, 10), **options)
        else:
            ids = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(0))
            result = model(input_ids=ids, **options).logits
    return result


def assert_same(found: Tensor, expected: Tensor, unchanged: Tensor, *, tolerance: float) -> None:
    """Within PEFT's tolerance, and within `CLOSE` of the change that the adapters make."""
    found, expected = found.double(), expected.double()
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    change = float((expected - unchanged.double()).norm())
    assert change > 0.01, "the adapters change nothing, so nothing is tested"
    assert float((found - expected).norm()) <= CLOSE * change


def delta_weights(peft_model: Any, adapter: str) -> dict[str, Tensor]:
    """By parameter, dW as PEFT computes it from the loaded adapter, in the base's own orientation."""
    layers = {n: m for n, m in peft_model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    return {
        f"{name}.weight": layer.get_delta_weight(adapter).detach()
        for name, layer in layers.items()
        if adapter in layer.lora_A or adapter in layer.lora_embedding_A
    }


def assert_update(
    peft_model: Any, adapter: str, expected: Mapping[str, Tensor], *, tolerance: float, close: float = 1e-6
) -> None:
    """Every dW of a loaded adapter is the expected one, and exactly zero where nothing is expected."""
    found = delta_weights(peft_model, adapter)
    assert expected.keys() <= found.keys()
    for name, change in found.items():
        if name not in expected:
            assert not change.any()
            continue
        torch.testing.assert_close(change.double(), expected[name], atol=tolerance, rtol=tolerance)
        assert float((change.double() - expected[name]).norm()) <= close * float(expected[name].norm())
