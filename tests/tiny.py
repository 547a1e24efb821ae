"""Tiny base models with a real tokenizer, and adapters with random factors, made from configs in a moment."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    FalconMambaConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3MoeConfig,
)

BASE_ID = "tiny/base"
_MADE = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)

_SMALL = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "head_dim": 8,
}

_FEW = {name: _SMALL[name] for name in ("vocab_size", "hidden_size", "bos_token_id", "eos_token_id", "pad_token_id")}

CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_SMALL, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**_SMALL, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**_SMALL),
    "gemma2": lambda: Gemma2Config(**_SMALL, final_logit_softcapping=0.5, query_pre_attn_scalar=8),
    "gemma3": lambda: Gemma3TextConfig(**_SMALL, query_pre_attn_scalar=8),
    "granite": lambda: GraniteConfig(**_SMALL, logits_scaling=3.0),
    "cohere": lambda: CohereConfig(**_SMALL, logit_scale=0.3),
    "neox": lambda: GPTNeoXConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "bert": lambda: BertConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    ),
    "mixtral": lambda: MixtralConfig(**_SMALL | {"num_hidden_layers": 2}, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **_SMALL | {"num_hidden_layers": 2}, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2
    ),
    "square-moe": lambda: Qwen3MoeConfig(  # gate_up_proj of an expert is (32, 32)
        **_SMALL | {"num_hidden_layers": 2}, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2
    ),
    "many-experts": lambda: Qwen3MoeConfig(
        **_SMALL | {"num_hidden_layers": 2}, moe_intermediate_size=24, num_experts=24, num_experts_per_tok=2
    ),
    "gpt-oss": lambda: GptOssConfig(
        **_SMALL | {"num_hidden_layers": 2, "intermediate_size": 24}, num_local_experts=4, num_experts_per_tok=2
    ),
    "falcon": lambda: FalconConfig(
        **_FEW, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True
    ),
    # A layer's weight is read without calling the layer: dt_proj; dense and dense_4h_to_h.
    "mamba": lambda: MambaConfig(**_FEW, num_hidden_layers=2, state_size=8),
    "falcon-mamba": lambda: FalconMambaConfig(**_FEW, num_hidden_layers=2, state_size=8),
    "jamba": lambda: JambaConfig(
        **_SMALL | {"num_hidden_layers": 2}, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=8
    ),
    "bloom-slow": lambda: BloomConfig(**_FEW, n_layer=2, n_head=4, pretraining_tp=2, slow_but_exact=True),
    "shallow": lambda: LlamaConfig(**_SMALL | {"num_hidden_layers": 1}),
    # With a tower for pictures.
    "gemma3-vision": lambda: Gemma3Config(
        text_config={**_SMALL, "num_hidden_layers": 2, "query_pre_attn_scalar": 8},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        image_token_index=258,
        boi_token_index=257,
        eoi_token_index=256,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
}


def make_base(folder: Path, kind: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Saves a tiny model of the architecture, with weights large enough that its answers depend on the input."""
    config = CONFIGS[kind]()
    return _once(folder, lambda made: _save_base(made, config, seed, dtype), config, seed, dtype)


def _save_base(folder: Path, config: PretrainedConfig, seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() in (2, 3):
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def _once(folder: Path, make: Callable[[Path], object], *what: object) -> Path:
    """A copy of what was made of the same before: most tests want the same few. Sets the seed of random numbers."""
    kept = Path(_MADE.name, hashlib.sha256(repr(what).encode()).hexdigest())
    if not kept.exists():
        make(part := kept.with_suffix(".part"))
        part.rename(kept)
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    torch.manual_seed(int(kept.name[:8], 16))
    return folder


def make_tokenizer(*, add_bos: bool = True, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: <pad> <s> </s> and 256 bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{letter: i + 3 for i, letter in enumerate(letters)}}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def make_adapter(
    folder: Path,
    base: Path,
    *,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    parameters: Sequence[str] = (),
    rank: int = 4,
    alpha: float = 8,
    seed: int = 0,
    size: float = 0.3,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Saves an adapter with random factors through stock PEFT; `config` are further fields of LoraConfig."""
    wanted = targets if isinstance(targets, str) else list(targets)
    config = {"r": rank, "lora_alpha": alpha, "task_type": "CAUSAL_LM", "target_modules": wanted} | config
    config["target_parameters"] = list(parameters) or None
    of_base = [
        (path.name, hashlib.sha256(path.read_bytes()).digest()) for path in sorted(base.iterdir()) if path.is_file()
    ]
    return _once(
        folder, lambda made: _save_adapter(made, base, seed, size, dtype, config), of_base, seed, size, dtype, config
    )


def _save_adapter(folder: Path, base: Path, seed: int, size: float, dtype: torch.dtype, config: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    lora = LoraConfig(**config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT's advice on tied embeddings and on Conv1D
        peft_model = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, size)
    peft_model.to(dtype)
    peft_model.peft_config["default"].base_model_name_or_path = BASE_ID
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*have invalid shape: .*lora_B.bias")  # PEFT 0.21 takes a bias for a shard
        peft_model.save_pretrained(folder, save_embedding_layers=False)


def write_jsonl(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def random_records(count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Prompts and completions of random letters, of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def word(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return "".join(chr(97 + int(c)) for c in torch.randint(26, (length,), generator=generator))

    return [{"prompt": word(3, 20), "completion": word(2, 12)} for _ in range(count)]


def logits(model: Any, seed: int = 0) -> torch.Tensor:
    """The model's logits on fixed random tokens, (2, 9, vocab)."""
    ids = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids).logits
    return result
