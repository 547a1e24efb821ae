"""Holds `--gguf` against llama.cpp's own converter, and against llama.cpp itself.

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python && tar xzf llama_cpp_python-*.tar.gz
    python benchmarks/llama_cpp_check.py llama_cpp_python-*/vendor/llama.cpp
    python benchmarks/llama_cpp_check.py .../llama.cpp --run PYTHON --base SmolLM2-135M-Instruct --adapters math code

For each architecture that `--gguf` writes, a tiny base with random weights, two adapters on all linear layers and their
average in two profiles: every tensor of adapter.gguf is compared with what convert_lora_to_gguf.py makes of the same
directory, to the last bit. With --run, a Python that has llama-cpp-python, sentencepiece, torch and transformers:
convert_hf_to_gguf.py converts the base to float32, llama.cpp loads it with adapter.gguf, and the logits after a prompt
are compared with those of stock PEFT, beside those of the base alone. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from loracli.export.gguf import ARCHITECTURES
from loracli.export.method import export_method

SMALL = {
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
MODEL_TYPES = {"Gemma3ForCausalLM": "gemma3_text"}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPT = "Write a Python function that returns the sum of two numbers."
LOGITS = """
import json, sys, numpy as np, llama_cpp
base, lora, tokens, out = sys.argv[1:]
model = llama_cpp.Llama(base, lora_path=lora or None, logits_all=True, n_ctx=256, verbose=False, n_threads=1)
model.eval(json.loads(tokens))
np.save(out, np.array(model.scores[: model.n_tokens], dtype=np.float64))
"""


def make_base(folder: Path, model_class: str) -> Path:
    model_type = MODEL_TYPES.get(model_class, model_class.removesuffix("ForCausalLM").lower())
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SMALL))
    assert type(model).__name__ == model_class, type(model)
    model.save_pretrained(folder)
    return folder


def make_adapter(folder: Path, base: Path, *, rank: int, targets: list[str], seed: int) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.05)
    adapted.peft_config["default"].base_model_name_or_path = "tiny/base"
    adapted.save_pretrained(folder)
    return folder


def converted(llama_cpp: Path, adapter: Path, base: Path, output: Path) -> Path:
    command = [sys.executable, llama_cpp / "convert_lora_to_gguf.py", adapter, "--base", base, "--outtype", "f32"]
    subprocess.run([*map(str, command), "--outfile", str(output)], check=True, capture_output=True)
    return output


def compared(ours: Path, theirs: Path) -> tuple[int, list[str], bool]:
    """How many tensors there are, the names of those that differ, and whether alpha is the same."""
    from gguf import GGUFReader

    left, right = GGUFReader(ours), GGUFReader(theirs)
    tensors: list[dict[str, Any]] = [{t.name: t for t in reader.tensors} for reader in (left, right)]
    different = sorted(tensors[0].keys() ^ tensors[1].keys())
    for name in tensors[0].keys() & tensors[1].keys():
        one, other = (by_name[name] for by_name in tensors)
        if one.tensor_type != other.tensor_type or list(one.shape) != list(other.shape):
            different.append(name)
        elif not np.array_equal(one.data, other.data):
            different.append(name)
    alphas = [reader.fields["adapter.lora.alpha"].parts[-1][0] for reader in (left, right)]
    return len(tensors[0]), different, bool(alphas[0] == alphas[1])


def converter_rows(llama_cpp: Path, folder: Path) -> bool:
    print("| base | profile | tensors | that differ | alpha |")
    print("|---|---|--:|--:|---|")
    right = True
    for model_class in ARCHITECTURES:
        place = folder / model_class
        base = make_base(place / "base", model_class)
        adapters = [
            str(make_adapter(place / "a", base, rank=4, targets=LINEAR, seed=1)),
            str(make_adapter(place / "b", base, rank=2, targets=["q_proj", "v_proj"], seed=2)),
        ]
        for profile in ("portable", "peft"):
            output = place / profile
            export_method("uniform", output, adapters=adapters, profile=profile, gguf=True, base=str(base))
            theirs = converted(llama_cpp, output, base, place / f"{profile}.gguf")
            count, different, alpha = compared(output / "adapter.gguf", theirs)
            said = f"{len(different)}" + (f", {different[0]} first" if different else "")
            same = "the same" if alpha else "another"
            print(f"| {model_class} | {profile} | {count} | {said} | {same} |", flush=True)
            right &= not different
    return right


def logits_of_llama_cpp(python: str, base: Path, lora: str, tokens: list[int], output: Path) -> np.ndarray:
    # not this process's: two builds of OpenMP in one process may hang
    subprocess.run([python, "-c", LOGITS, str(base), lora, json.dumps(tokens), str(output)], check=True, timeout=600)
    return np.load(output)


def run_rows(llama_cpp: Path, python: str, base: Path, adapters: list[str], folder: Path) -> None:
    tokens = AutoTokenizer.from_pretrained(base)(PROMPT).input_ids
    gguf = folder / "base.gguf"
    command = [python, str(llama_cpp / "convert_hf_to_gguf.py"), str(base), "--outtype", "f32"]
    subprocess.run([*command, "--outfile", str(gguf)], check=True, capture_output=True)
    exported = folder / "exported"
    export_method("uniform", exported, adapters=adapters, gguf=True, base=str(base), dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.inference_mode():
        bare = model(torch.tensor([tokens])).logits[0].double().numpy()
        adapted = PeftModel.from_pretrained(model, exported)(torch.tensor([tokens])).logits[0].double().numpy()
    print(
        "\n| llama.cpp with | largest logit difference to PEFT's adapted model | to the bare base | same next token |"
    )
    print("|---|--:|--:|--:|")
    for name, lora in (("the base", ""), ("the base and adapter.gguf", str(exported / "adapter.gguf"))):
        found = logits_of_llama_cpp(python, gguf, lora, tokens, folder / "logits.npy")
        same = float((found.argmax(axis=1) == adapted.argmax(axis=1)).mean())
        distances = [float(np.abs(found - other).max()) for other in (adapted, bare)]
        print(f"| {name} | {distances[0]:.4f} | {distances[1]:.4f} | {same:.0%} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama_cpp", type=Path, help="a checkout of llama.cpp")
    parser.add_argument("--run", metavar="PYTHON", help="a Python that has llama-cpp-python and sentencepiece")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--adapters", nargs="+")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        right = converter_rows(arguments.llama_cpp.resolve(), Path(place))
        if arguments.run:
            run_rows(arguments.llama_cpp.resolve(), arguments.run, arguments.base, arguments.adapters, Path(place))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
