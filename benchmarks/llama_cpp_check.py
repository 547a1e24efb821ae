"""Holds `--gguf` against llama.cpp's own converter, and against llama.cpp itself.

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python && tar xzf llama_cpp_python-*.tar.gz
    python benchmarks/llama_cpp_check.py llama_cpp_python-*/vendor/llama.cpp
    python benchmarks/llama_cpp_check.py .../llama.cpp --run PYTHON --base SmolLM2-135M-Instruct --adapters math code

For each architecture that `--gguf` writes, a tiny base with random weights, two adapters on all linear layers and their
average in two profiles: every tensor of adapter.gguf is compared with what convert_lora_to_gguf.py makes of the same
directory, to the last bit. With --run, a Python that has llama-cpp-python, sentencepiece, torch and transformers:
convert_hf_to_gguf.py converts the base to float32, llama.cpp loads it with adapter.gguf, and the logits after a prompt
are compared with those of stock PEFT, beside those of the base alone. Prints Markdown.

--quick takes two of the architectures, and without a checkout of llama.cpp writes the files and reads them alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.made_inputs import LINEAR, write_peft_adapter, write_tiny_base
from benchmarks.measuring import BenchmarkParser, left_out
from loracli.export.export import export_adapter
from loracli.export.gguf import ARCHITECTURES
from loracli.export.request import ExportRequest

if TYPE_CHECKING:
    from gguf import GGUFReader

MODEL_TYPES = {"Gemma3ForCausalLM": "gemma3_text"}
PROMPT = "Write a Python function that returns the sum of two numbers."
LOGITS = """
import json, sys, numpy as np, llama_cpp
base, lora, tokens, out = sys.argv[1:]
model = llama_cpp.Llama(base, lora_path=lora or None, logits_all=True, n_ctx=256, verbose=False, n_threads=1)
model.eval(json.loads(tokens))
np.save(out, np.array(model.scores[: model.n_tokens], dtype=np.float64))
"""


def make_base(folder: Path, model_class: str) -> Path:
    write_tiny_base(folder, MODEL_TYPES.get(model_class, model_class.removesuffix("ForCausalLM").lower()))
    [found] = json.loads((folder / "config.json").read_text())["architectures"]
    assert found == model_class, found
    return folder


def converted(llama_cpp: Path, adapter: Path, base: Path, output: Path) -> Path:
    command = [sys.executable, llama_cpp / "convert_lora_to_gguf.py", adapter, "--base", base, "--outtype", "f32"]
    subprocess.run([*map(str, command), "--outfile", str(output)], check=True, capture_output=True)
    return output


def compared(left: GGUFReader, right: GGUFReader) -> tuple[list[str], bool]:
    """The names of the tensors that differ, and whether alpha is the same."""
    tensors: list[dict[str, Any]] = [{t.name: t for t in reader.tensors} for reader in (left, right)]
    different = sorted(tensors[0].keys() ^ tensors[1].keys())
    for name in tensors[0].keys() & tensors[1].keys():
        one, other = (by_name[name] for by_name in tensors)
        if one.tensor_type != other.tensor_type or list(one.shape) != list(other.shape):
            different.append(name)
        elif not np.array_equal(one.data, other.data):
            different.append(name)
    alphas = [reader.fields["adapter.lora.alpha"].parts[-1][0] for reader in (left, right)]
    return different, bool(alphas[0] == alphas[1])


def converter_rows(llama_cpp: Path | None, folder: Path, classes: Sequence[str]) -> bool:
    from gguf import GGUFReader

    print("| base | profile | tensors | that differ | alpha |")
    print("|---|---|--:|--:|---|")
    right = True
    for model_class in classes:
        place = folder / model_class
        base = make_base(place / "base", model_class)
        adapters = [
            str(write_peft_adapter(place / "a", base, targets=LINEAR, seed=1, r=4, lora_alpha=8)),
            str(write_peft_adapter(place / "b", base, targets=("q_proj", "v_proj"), seed=2, r=2, lora_alpha=4)),
        ]
        for profile in ("portable", "peft"):
            output = place / profile
            export_adapter(
                ExportRequest(method="uniform", adapters=adapters, profile=profile, gguf=True, base=str(base)), output
            )
            ours = GGUFReader(output / "adapter.gguf")
            said, same = "not compared", "not compared"
            if llama_cpp:
                theirs = GGUFReader(converted(llama_cpp, output, base, place / f"{profile}.gguf"))
                different, alpha = compared(ours, theirs)
                said = f"{len(different)}" + (f", {different[0]} first" if different else "")
                same = "the same" if alpha else "another"
                right &= not different
            print(f"| {model_class} | {profile} | {len(ours.tensors)} | {said} | {same} |", flush=True)
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
    export_adapter(
        ExportRequest(method="uniform", adapters=adapters, gguf=True, base=str(base), dtype="float32"), exported
    )
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
    parser = BenchmarkParser(__doc__)
    parser.add_argument("llama_cpp", type=Path, quick=None, help="a checkout of llama.cpp")
    parser.add_argument("--run", metavar="PYTHON", help="a Python that has llama-cpp-python and sentencepiece")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--adapters", nargs="+")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if find_spec("gguf") is None:
        left_out("everything: the gguf package is not installed (`pip install .[gguf]`)")
        return 0 if arguments.quick else 1
    llama_cpp = arguments.llama_cpp and arguments.llama_cpp.resolve()
    if llama_cpp is None:
        left_out("llama.cpp's converter, as no checkout of it was given")
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classes = list(ARCHITECTURES)[: 2 if arguments.quick else None]
        right = converter_rows(llama_cpp, Path(place), classes)
        if arguments.run:
            run_rows(llama_cpp, arguments.run, arguments.base, arguments.adapters, Path(place))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
