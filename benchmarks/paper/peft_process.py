"""PEFT's `add_weighted_adapter`, from adapters on disk to adapters on disk, in a process that does nothing else.

    python -c "from benchmarks.paper.peft_process import main; main()" REQUEST

`REQUEST` is JSON: `base`, a directory; `adapters`, N directories; `calls`, the arguments of `add_weighted_adapter` for
each adapter that is wanted, with N `weights`; `out`, a folder. Call i is written to `out`/i/combined. What PEFT refuses
ends the process with its words. Nothing of loracat is imported, so that time and memory are PEFT's and torch's alone.

A user of PEFT does just this: the base has to be in memory, since adapters are combined on it, and is loaded once for
all calls. It has the dtype of its files. PEFT loads adapters in float32 whatever they are in, and combines in float32
but for `cat`: that is put into factors which were made for the base, in the base's dtype.

Draws are seeded for each call, so that a row does not depend on the calls before it.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

COMBINED = "combined"


def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    model = loaded(request["base"], request["adapters"])
    for number, call in enumerate(request["calls"]):
        combine(model, call, Path(request["out"]) / str(number))


def loaded(base: str, adapters: list[str]) -> Any:
    """The base in the dtype of its files, with the adapters named `a0`, `a1` and on."""
    first, *others = adapters
    plain = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model = PeftModel.from_pretrained(plain, first, adapter_name="a0")
    for number, adapter in enumerate(others, start=1):
        model.load_adapter(adapter, f"a{number}")
    return model


def combine(model: Any, call: dict[str, Any], folder: Path) -> None:
    """Adds one adapter, writes it to a folder, and takes it away again."""
    torch.manual_seed(0)  # which `dare_linear` and `dare_ties` draw from
    names = [f"a{number}" for number in range(len(call["weights"]))]
    try:
        model.add_weighted_adapter(names, adapter_name=COMBINED, **call)
    except ValueError as error:
        sys.exit(" ".join(str(error).split()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on tied embeddings
        model.save_pretrained(folder, selected_adapters=[COMBINED], save_embedding_layers=False)
    model.delete_adapter(COMBINED)
