"""Inputs of benchmarks that are made on the spot: adapters of any shapes with random factors, and tiny base models."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracli.adapters.names import format_tensor_name
from loracli.system.files import CONFIG_FILE, TENSOR_FILE
from loracli.system.tensor_file import write_tensors

Shapes = Mapping[str, tuple[int, int]]  # module -> (out, in)
LlamaShape = tuple[int, int, int, int, int, int]  # hidden, intermediate, layers, heads, their keys', vocabulary
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama_layer(hidden: int, intermediate: int, keys: int) -> dict[str, tuple[int, int]]:
    """The seven linear modules of a Llama's decoder layer, (out, in)."""
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }


def of_layers(layer: Shapes, layers: int) -> dict[str, tuple[int, int]]:
    """The modules of so many layers alike."""
    return {f"model.layers.{number}.{name}": shape for number in range(layers) for name, shape in layer.items()}


def write_adapter(
    folder: Path, shapes: Shapes, rank: int, *, seed: int, base_id: str, dtype: torch.dtype = torch.float32
) -> Path:
    """An adapter on these modules, scaling 2, with random factors: lora_A of deviation in ** -0.5, lora_B of 0.02."""
    generator = torch.Generator().manual_seed(seed)
    sizes: dict[str, tuple[int, int]] = {}
    for name, (out, width) in shapes.items():
        sizes[format_tensor_name(name, "lora_A")] = (rank, width)
        sizes[format_tensor_name(name, "lora_B")] = (out, rank)

    def drawn(name: str) -> Tensor:
        size = 0.02 if "lora_B" in name else sizes[name][1] ** -0.5
        return torch.randn(sizes[name], generator=generator).mul_(size).to(dtype)

    folder.mkdir(parents=True)
    write_tensors(folder / TENSOR_FILE, sizes, dtype, drawn)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_id,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in shapes}),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return folder


def write_llama_adapters(
    folder: Path, shape: LlamaShape, rank: int, *, count: int, base_id: str, dtype: torch.dtype = torch.float32
) -> tuple[str, ...]:
    """So many adapters on all linear modules of a Llama of that shape, as directories of a folder."""
    hidden, intermediate, layers, heads, keys, _ = shape
    modules = of_layers(llama_layer(hidden, intermediate, hidden // heads * keys), layers)
    folders = [folder / f"a{number}" for number in range(count)]
    for seed, path in enumerate(folders):
        write_adapter(path, modules, rank, seed=seed, base_id=base_id, dtype=dtype)
    return tuple(map(str, folders))


def llama_config(shape: LlamaShape, **more: Any) -> Any:
    """The config of a Llama of that shape; `more` are other fields of it."""
    from transformers import LlamaConfig

    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return LlamaConfig(**dict(zip((*names, "vocab_size"), shape, strict=True)), **more)


def write_llama(folder: Path, shape: LlamaShape, **more: Any) -> Path:
    """A Llama of that shape with random weights in float32."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(llama_config(shape, **more), dtype=torch.float32).save_pretrained(folder)
    return folder


def copy_tokenizer(base: Path, folder: Path) -> None:
    """The tokenizer of a base to another."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, folder)


def write_tiny_base(folder: Path, model_type: str = "llama", **changes: Any) -> Path:
    """A model of an architecture with random weights; `changes` are fields of its config beside `TINY`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **TINY | changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def write_peft_adapter(folder: Path, base: Path, *, targets: Sequence[str] | str, seed: int, **config: Any) -> Path:
    """An adapter as stock PEFT saves it, random in all that it trains but magnitudes; `config` are fields of
    LoraConfig."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    chosen = targets if isinstance(targets, str) else list(targets)
    adapted = get_peft_model(model, LoraConfig(target_modules=chosen, **config))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.normal_(0, 0.05)
    adapted.peft_config["default"].base_model_name_or_path = "tiny/base"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on tied embeddings
        adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def part_of_example(folder: Path, *, calibration: int, test: int) -> Path:
    """The example of `loracat demo`, with the first so many of its records."""
    from loracli.demo.run import example_folder

    shutil.copytree(example_folder(), folder)
    for name, count in (("calibration", calibration), ("test", test)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))
    return folder
