"""A refit regains what a cut lost where it can, and leaves the cut alone where it cannot."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from loracli.adapters.names import CORES_FILE
from loracli.algebra.truncate import truncate, truncate_for
from loracli.calibration.dataset import read_dataset
from loracli.comparison.moments import moments_of
from loracli.errors import CalibrationError, IntegrityError, UsageError
from loracli.export.export import Exported, export_adapter
from loracli.export.method import export_method
from loracli.export.refit import read_cores
from loracli.export.source import RecipeSource
from loracli.fitting.attach import attach
from loracli.fitting.mixing import make_layout
from loracli.recipe import RecipeMixing
from loracli.verifying.verify import verify_directory
from tests.export.test_export import Made
from tests.tiny import write_jsonl

WEIGHTS = "adapter_model.safetensors"
RANK = 2


class Planted(Made):
    """A composition, and printable records that the model with it generated itself."""

    def __init__(self, folder: Path, *, records: int = 200, case: str = "plain") -> None:
        super().__init__(folder, case)
        weights = {name: (0.7, 0.7) for name in self.recipe.mixing.weights}
        mixing = RecipeMixing("module", weights, self.recipe.mixing.numbers)
        self.recipe = replace(self.recipe, mixing=mixing)
        self.data = write_jsonl(folder / "records.jsonl", [{"text": text} for text in self.sampled(records)])

    def sampled(self, count: int, *, length: int = 20) -> list[str]:
        """Texts drawn letter by letter, of printable letters alone, as the tokenizer reads them back."""
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        letters = torch.tensor([tokenizer.convert_tokens_to_ids(chr(code)) for code in range(33, 127)])
        generator = torch.Generator().manual_seed(5)
        model, modules = self.load(), make_layout(self.adapters).modules
        with attach(model, self.adapters, modules) as attached, torch.no_grad():
            attached.set_weights(torch.full((len(modules), 2), 0.7))
            ids = torch.full((count, 1), tokenizer.bos_token_id)
            for _ in range(length):
                p = torch.softmax(model(input_ids=ids).logits[:, -1, letters].double(), dim=-1)
                ids = torch.cat([ids, letters[torch.multinomial(p, 1, generator=generator)]], dim=1)
        return [tokenizer.decode(row[1:]) for row in ids]

    def refitted(self, output: Path, **options: Any) -> Exported:
        chosen = {"merge": True, "rank": RANK, "refit": True, "refit_data": self.data, "base": str(self.base)}
        return export_adapter(self.recipe, output, **{**chosen, **options})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return Planted(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def out(made: Planted, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Exported]:
    folder = tmp_path_factory.mktemp("refit") / "out"
    return folder, made.refitted(folder)
def test_x(made,out):
    print(json.dumps(asdict(out[1].refit),indent=1))
