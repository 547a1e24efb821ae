"""Weighted sums of two adapters, by PEFT's `add_weighted_adapter` and by our export, beside float64. Prints Markdown.

    python benchmarks/peft_identity.py

The identity test: with weights 1 and 0 the first adapter has to come back as itself. Every way is put into one model,
loaded by stock PEFT, and run in float32 by PEFT's live forward. The number is

    |y - y_exact| / |y_exact - y_base|

the error of the output over the change that it should have. For weights 1 and 0 y_exact is PEFT's forward of the first
adapter alone, in float64; for others it is the plain model in float64 with W + sum_i w_i dW_i. PEFT's combinations stay
in memory; they are also saved and loaded again, and marked where that fails or gives something else. Our exports are
always read from their files. What either refuses is shown in its own words, and what PEFT does with arguments that
cannot be meant.

Models are small and random, and so are factors, magnitudes (DoRA) and biases: an algebraic error does not depend on
training.
"""

from __future__ import annotations

import copy
import platform
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import loracli
from benchmarks.measuring import BenchmarkParser
from loracli.adapters.adapter import read_adapter
from loracli.algebra.methods.linear import SUM
from loracli.composition.base_table import BaseTable, modules_of
from loracli.composition.composition import from_method
from loracli.errors import LoracatError
from loracli.export.export import write_export
from loracli.export.request import ExportRequest

BASE_ID = "small/random"
WIDTH, HIDDEN, RANK, ALPHA = 64, 96, 8, 16
COMBINATIONS = ("cat", "linear", "svd")
OURS = ("loracat", "loracat --merge")
SAME = 1e-5  # an output that is loaded again may differ from the live one by rounding


class Network(nn.Module):
    """A first layer of some kind, then a linear one."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.last = first, nn.LazyLinear(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.relu(self.first(x)).flatten(1))
        return result


def numbers() -> Tensor:
    return torch.randn(32, WIDTH)


def images() -> Tensor:
    return torch.randn(32, 8, 6, 6)


def tokens() -> Tensor:
    return torch.randint(100, (32, 4))


@dataclass(frozen=True)
class Case:
    """One row.

    Args:
        name: of the row.
        first: makes the first layer, which is adapted, as is the last one with `last`.
        inputs: makes a batch.
        both: fields of both adapters' configs.
        second: fields of the second alone.
        weights: of the two.
        last: whether the last layer is adapted too.
        rank: of `svd` and `--merge`; None is what each takes by itself.
    """

    name: str
    first: Callable[[], nn.Module] = lambda: nn.Linear(WIDTH, HIDDEN)
    inputs: Callable[[], Tensor] = numbers
    both: dict[str, Any] = field(default_factory=dict)
    second: dict[str, Any] = field(default_factory=dict)
    weights: tuple[float, float] = (1.0, 0.0)
    last: bool = False
    rank: int | None = None

    @property
    def identity(self) -> bool:
        return self.weights == (1.0, 0.0)

    def config(self, which: int) -> LoraConfig:
        targets = ["first", "last"] if self.last else ["first"]
        fields = {"r": RANK, "lora_alpha": ALPHA, **self.both, **(self.second if which else {})}
        return LoraConfig(target_modules=targets, **fields)


CASES = [
    Case("plain", last=True),
    Case("rsLoRA", both={"use_rslora": True}),
    Case("`lora_bias`", both={"lora_bias": True}),
    Case("DoRA", both={"use_dora": True}),
    Case("Conv2d 3x3", lambda: nn.Conv2d(8, 16, 3), images),
    Case("Conv2d 3x3, two groups", lambda: nn.Conv2d(8, 16, 3, groups=2), images),
    Case("`rank_pattern`", last=True, both={"rank_pattern": {"first": 4}}),
    Case("embedding", lambda: nn.Embedding(100, HIDDEN), tokens),
    Case("Conv1D", lambda: Conv1D(HIDDEN, WIDTH), both={"fan_in_fan_out": True}),
    Case("alphas 16 and 64, .7 and .3", second={"lora_alpha": 64}, weights=(0.7, 0.3)),
    Case("the same, `svd` and `--merge` at rank 16", second={"lora_alpha": 64}, weights=(0.7, 0.3), rank=16),
]


class Bench:
    """A case with its model, its two adapters on disk, and what is exact."""

    def __init__(self, case: Case, folder: Path) -> None:
        torch.manual_seed(0)
        self.case, self.folder = case, folder
        self.inputs = case.inputs()
        self.model = Network(case.first()).eval()
        self.model(self.inputs)  # the last layer takes its shape
        self.paths = [self._save_adapter(which) for which in (0, 1)]
        self.base = self._outputs(copy.deepcopy(self.model).double())
        self.exact = self._exact()
        self.notes: list[str] = []

    def _save_adapter(self, which: int) -> Path:
        torch.manual_seed(which + 1)
        made = get_peft_model(copy.deepcopy(self.model), self.case.config(which))
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "lora_magnitude" in name:
                    parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.3))
                elif "lora_" in name:
                    parameter.normal_(0.0, 0.1)
        made.peft_config["default"].base_model_name_or_path = BASE_ID
        path = self.folder / "ab"[which]
        made.save_pretrained(path, save_embedding_layers=False)
        return path

    def _outputs(self, model: nn.Module) -> Tensor:
        double = next(model.parameters()).dtype == torch.float64
        inputs = self.inputs.double() if double and self.inputs.is_floating_point() else self.inputs
        with torch.no_grad():
            result: Tensor = model.eval()(inputs)
        return result.double()

    def _exact(self) -> Tensor:
        plain = copy.deepcopy(self.model).double()
        if self.case.identity:
            return self._outputs(PeftModel.from_pretrained(plain, self.paths[0]).double())
        result = copy.deepcopy(plain)
        for weight, path in zip(self.case.weights, self.paths, strict=True):
            merged = PeftModel.from_pretrained(copy.deepcopy(plain), path).double().merge_and_unload()
            with torch.no_grad():
                for sum_, one, none in zip(*(m.parameters() for m in (result, merged, plain)), strict=True):
                    sum_ += weight * (one - none)
        return self._outputs(result)

    def _live(self) -> Any:
        model = PeftModel.from_pretrained(copy.deepcopy(self.model), self.paths[0], adapter_name="a")
        model.load_adapter(self.paths[1], "b")
        return model

    def _error(self, outputs: Tensor) -> str:
        error = float((outputs - self.exact).norm() / (self.exact - self.base).norm())
        return f"{error:.2f}" if error > 1e-3 else f"{error:.0e}"

    def _refused(self, who: str, error: Exception) -> str:
        words = " ".join(str(error).replace(f"{self.folder}/", "").split())
        self.notes.append(f"{self.case.name}, {who}: {textwrap.shorten(words, 200, placeholder=' ...')}")
        return "refused" if isinstance(error, (LoracatError, ValueError)) else "fails"

    def peft(self, combination: str) -> str:
        """What PEFT's combiner gives, as a cell."""
        model = self._live()
        rank = {"svd_rank": self.case.rank} if combination == "svd" else {}
        try:
            model.add_weighted_adapter(["a", "b"], list(self.case.weights), "sum", combination_type=combination, **rank)
            model.set_adapter("sum")
            live = self._outputs(model)
        except (RuntimeError, ValueError) as error:
            return self._refused(f"`{combination}`", error)
        return self._error(live) + self._loaded_again(model, live, combination)

    def _loaded_again(self, model: Any, live: Tensor, combination: str) -> str:
        saved = self.folder / f"saved-{combination}"
        model.save_pretrained(saved, selected_adapters=["sum"], save_embedding_layers=False)
        try:
            again = self._outputs(PeftModel.from_pretrained(copy.deepcopy(self.model), saved / "sum"))
        except (RuntimeError, ValueError) as error:
            self._refused(f"`{combination}` loaded again", error)
            return ", cannot be loaded again"
        same = float((again - live).norm()) <= SAME * float(live.norm())
        return "" if same else f", loaded again {self._error(again)}"

    def ours(self, *, merge: bool) -> str:
        """What our export gives when stock PEFT loads it, as a cell."""
        out = self.folder / f"ours-{merge}"
        try:
            read = tuple(read_adapter(str(path)) for path in self.paths)
            table = BaseTable(BASE_ID, modules_of(read))
            composition = from_method(SUM, read, table, weights=self.case.weights)
            write_export(composition, out, ExportRequest(merge=merge, rank=self.case.rank if merge else None))
        except LoracatError as error:
            return self._refused("loracat", error)
        model = self._live()
        model.load_adapter(out, "ours")
        model.set_adapter("ours")
        return self._error(self._outputs(model))


def main() -> None:
    parser = BenchmarkParser(__doc__)
    parser.add_argument("--cases", type=int, default=len(CASES), quick=3, help="the first so many rows")
    cases = CASES[: parser.parse_args().cases]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # PEFT's advice on grouped convolutions, which is part of what is measured
    print(
        f"loracat {loracli.__version__}, PEFT {peft.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}\n"
    )
    print(f"| | {' | '.join(f'PEFT `{name}`' for name in COMBINATIONS)} | {' | '.join(f'`{n}`' for n in OURS)} |")
    print(f"|---|{'---|' * (len(COMBINATIONS) + len(OURS))}")
    notes: list[str] = []
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(case, Path(folder))
            cells = [bench.peft(name) for name in COMBINATIONS] + [bench.ours(merge=merge) for merge in (False, True)]
        print(f"| {case.name} | {' | '.join(cells)} |", flush=True)
        notes += bench.notes
    print("\nIn their own words:\n")
    for note in unique(notes):
        print(f"- {note}")
    print("\nOther inputs, PEFT:\n")
    for line in other_inputs():
        print(f"- {line}")


def other_inputs() -> Iterator[str]:
    """What PEFT does with arguments that cannot be meant."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(12, 6))
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(plain), config, adapter_name="a")
    model.add_adapter("b", config)
    layer = model.base_model.model[0]

    model.add_weighted_adapter(["a", "b"], [1.0], "short", combination_type="cat")
    left_out = torch.allclose(layer.get_delta_weight("short"), layer.get_delta_weight("a"))
    yield f"one weight for two adapters: accepted, the second adapter is {'left out' if left_out else 'added'}"

    before = layer.get_delta_weight("a").clone()
    model.add_weighted_adapter(["a", "b"], [2.0, 2.0], "a", combination_type="cat")
    changed = not torch.equal(layer.get_delta_weight("a"), before)
    yield f"the name of an adapter that is there: accepted, it is {'replaced' if changed else 'left as it was'}"

    with tempfile.TemporaryDirectory() as folder:
        try:
            model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "wide", combination_type="svd", svd_rank=8)
            model.save_pretrained(folder, selected_adapters=["wide"])
            PeftModel.from_pretrained(copy.deepcopy(plain), f"{folder}/wide")
            outcome = "loads again"
        except RuntimeError as error:
            outcome = textwrap.shorten(" ".join(str(error).split()), 200, placeholder=" ...")
        yield f"`svd_rank` 8 on a layer of 12 by 6, saved and loaded: {outcome}"


def unique(lines: Sequence[str]) -> list[str]:
    """Each line once, in order."""
    return list(dict.fromkeys(lines))


if __name__ == "__main__":
    main()
