"""Ranks that are chosen: the files have the smallest that satisfy the rule, judged by the dense updates."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loracli.cli._options import parse_bytes
from loracli.errors import UsageError
from loracli.export.export import Exported, export_adapter
from loracli.export.plan import _choose_ranks, spectra_of_targets
from loracli.export.request import ExportRequest
from loracli.recipe.recipe import Recipe
from tests.export.test_export import Made

NAME = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"), "disjoint targets")


def dense(made: Made, recipe: Recipe | None = None) -> dict[str, Tensor]:
    """dW in float64 of every module from the definition."""
    recipe = recipe or made.recipe
    found: dict[str, Tensor] = {}
    for name in {name for adapter in made.adapters for name in adapter.modules}:
        pairs = zip(recipe.weights_of(name), made.adapters, strict=True)
        parts = [w * a.modules[name].factors.delta_weight() for w, a in pairs if w is not None]
        found[name] = torch.stack(parts).sum(0)
    return found


def written(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / NAME)
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): tensors[
            name.replace("_A", "_B")
        ].double()
        @ tensors[name].double()
        for name in tensors
        if name.endswith("lora_A.weight")
    }


def ranks_in(folder: Path) -> dict[str, int]:
    tensors = load_file(folder / NAME)
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): tensor.shape[0]
        for name, tensor in tensors.items()
        if name.endswith("lora_A.weight")
    }


def export(made: Made, folder: Path, **options: Any) -> Exported:
    return export_adapter(ExportRequest(made.recipe, merge=True, **options), folder, force=True)


@pytest.mark.parametrize("tolerance", [0.02, 0.3, 0.6])
def test_a_tolerance_is_kept_by_every_module_and_by_none_at_a_rank_less(
    made: Made, tmp_path: Path, tolerance: float
) -> None:
    export(made, tmp_path / "out", tolerance=tolerance, profile="peft")
    found, ranks = written(tmp_path / "out"), ranks_in(tmp_path / "out")
    for name, exact in dense(made).items():
        assert float((found[name] - exact).norm() / exact.norm()) <= tolerance + 1e-6
        singular = torch.linalg.svdvals(exact)
        less = ranks[name] - 1
        assert less == 0 or float(singular[less:].norm() / singular.norm()) > tolerance
    uniform = export(made, tmp_path / "out", tolerance=tolerance)
    assert uniform.layout.profile == "portable"
    assert uniform.layout.rank == max(ranks.values())
    assert max(m.relative_error for m in uniform.certificate.modules) <= tolerance + 1e-6


@pytest.mark.parametrize("profile", ["portable", "peft"])
@pytest.mark.parametrize("energy", [0.5, 0.9])
def test_a_share_of_the_energy_is_kept_over_all_modules(
    made: Made, tmp_path: Path, profile: str, energy: float
) -> None:
    exported = export(made, tmp_path / "out", energy=energy, profile=profile)
    found, exact = written(tmp_path / "out"), dense(made)
    lost = sum(float((found[name] - exact[name]).square().sum()) for name in exact)
    assert lost <= (1 - energy) * sum(float(update.square().sum()) for update in exact.values()) + 1e-9
    assert exported.size_bytes < export(made, tmp_path / "all", energy=1.0, profile=profile).size_bytes


@pytest.mark.parametrize("profile", ["portable", "peft"])
def test_a_budget_is_kept_to_the_byte_and_used(made: Made, tmp_path: Path, profile: str) -> None:
    sizes = [export(made, tmp_path / "out", rank=k, profile=profile).size_bytes for k in (1, 2, 3)]
    for budget in (sizes[0], sizes[1] - 1, sizes[1], sizes[2]):
        exported = export(made, tmp_path / "out", budget=budget, profile=profile)
        assert (tmp_path / "out" / NAME).stat().st_size == exported.size_bytes <= budget
        if profile == "portable":
            assert exported.layout.rank == (3 if budget >= sizes[2] else 2 if budget >= sizes[1] else 1)
    with pytest.raises(UsageError, match=f"rank 1 the tensor file has {sizes[0]} bytes"):
        export(made, tmp_path / "out", budget=sizes[0] - 1 if profile == "portable" else 100, profile="portable")


def test_ranks_that_fill_a_budget_to_its_last_byte_are_taken() -> None:
    """100 bytes of header and 10 of each rank; a byte less costs the rank that matters least."""
    spectra, costs = (
        {"a": torch.tensor([9.0, 1.0]).double(), "b": torch.tensor([8.0, 2.0]).double()},
        {"a": 10, "b": 10},
    )

    def chosen(budget: int) -> dict[str, int]:
        return _choose_ranks(ExportRequest(budget=budget), spectra, costs, lambda ranks: 100 + 10 * sum(ranks.values()))

    assert chosen(140) == {"a": 2, "b": 2} and chosen(139) == {"a": 1, "b": 2} and chosen(120) == {"a": 1, "b": 1}
    with pytest.raises(UsageError):
        chosen(119)


def test_ranks_under_one_budget_lose_less_than_one_rank_for_all(made: Made, tmp_path: Path) -> None:
    def lost(folder: Path) -> float:
        found, exact = written(folder), dense(made)
        return sum(float((found[name] - exact[name]).square().sum()) for name in exact)

    size = export(made, tmp_path / "one", rank=2, profile="peft").size_bytes
    export(made, tmp_path / "many", budget=size + 16, profile="peft")  # a header may have a few digits more
    assert len(set(ranks_in(tmp_path / "many").values())) > 1
    assert lost(tmp_path / "many") < lost(tmp_path / "one")


@pytest.mark.parametrize("profile", ["portable", "peft"])
def test_ranks_of_their_own_load_in_stock_peft(made: Made, tmp_path: Path, profile: str) -> None:
    export(made, tmp_path / "out", tolerance=1e-6, profile=profile)
    torch.testing.assert_close(made.peft_logits(tmp_path / "out"), made.logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_of_weight_zero_costs_no_rank(tmp_path: Path, merge: bool) -> None:
    made = Made(tmp_path, "mixed ranks")  # 7 and 2
    weights = {name: (0.0, 0.5) for name in made.recipe.mixing.weights}
    recipe = replace(made.recipe, mixing=replace(made.recipe.mixing, weights=weights))
    exported = export_adapter(
        ExportRequest(recipe, merge=merge, rank=2 if merge else None, profile="peft"), tmp_path / "out"
    )
    assert exported.layout.rank == 2
    assert export_adapter(ExportRequest(recipe), tmp_path / "portable").layout.rank == 2
    found = written(tmp_path / "out")
    for name, exact in dense(made, recipe).items():
        torch.testing.assert_close(found[name], exact, rtol=1e-5, atol=1e-6)


def test_weights_that_are_all_zero_leave_a_module_that_does_nothing(tmp_path: Path) -> None:
    made = Made(tmp_path, "plain")
    names = sorted(made.recipe.mixing.weights)
    weights = {name: (0.0, 0.0) if name == names[0] else (1.0, 1.0) for name in names}
    recipe = replace(made.recipe, mixing=replace(made.recipe.mixing, weights=weights))
    export_adapter(ExportRequest(recipe, profile="peft"), tmp_path / "out")
    assert ranks_in(tmp_path / "out")[names[0]] == 1
    assert not written(tmp_path / "out")[names[0]].any()
    export_adapter(ExportRequest(recipe, merge=True, tolerance=0.1), tmp_path / "cut")
    assert not written(tmp_path / "cut")[names[0]].any()


def test_a_rule_cuts_the_result_of_a_method(made: Made, tmp_path: Path) -> None:
    paths = [str(path) for path in made.paths]
    exported = export_adapter(
        ExportRequest(method="sum", adapters=paths, base=str(made.base), merge=True, energy=0.6), tmp_path / "out"
    )
    assert exported.layout.rank < 7
    whole = export_adapter(
        ExportRequest(method="ties", adapters=paths, base=str(made.base), merge=True, tolerance=0.9), tmp_path / "ties"
    )
    assert all(module.relative_error < 0.95 for module in whole.certificate.modules)


def test_the_rule_stands_in_the_certificate_and_in_the_card(made: Made, tmp_path: Path) -> None:
    export(made, tmp_path / "out", energy=0.75)
    document = json.loads((tmp_path / "out" / "loracat.json").read_text())
    assert document["export"]["energy"] == 0.75
    assert "loracat export --merge --energy 0.75" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": True, "rank": 2, "energy": 0.5}, "rank and energy cannot both"),
        ({"tolerance": 0.5}, "tolerance is for a merge"),
        ({"merge": True, "tolerance": 1.0}, "--tolerance 1.0"),
        ({"merge": True, "tolerance": float("nan")}, "--tolerance nan"),
        ({"merge": True, "energy": 0.0}, "--energy 0.0"),
        ({"merge": True, "energy": 1.5}, "--energy 1.5"),
    ],
)
def test_rules_out_of_their_range_or_together_are_refused(
    made: Made, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        export_adapter(ExportRequest(made.recipe, **options), tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "size"),
    [("20MB", 20_000_000), ("1.5 GiB", 3 << 29), ("800000", 800_000), ("3kB", 3000), ("2B", 2), ("20 mb", 20_000_000)],
)
def test_sizes_are_read_as_they_are_written(text: str, size: int) -> None:
    assert parse_bytes(text, "--budget") == size


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "1e9", "20MBit", "²MB", "inf"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_bytes(text, "--budget")


def test_what_has_one_rank_is_judged_by_the_sum_of_its_updates() -> None:
    found = spectra_of_targets({"p[0]": Tensor([4, 1]), "p[1]": Tensor([9]), "q": Tensor([2])})
    assert {name: squares.tolist() for name, squares in found.items()} == {"p": [13, 1], "q": [2]}


def test_a_rank_may_be_the_sum_of_the_ranks_and_no_more(tmp_path: Path) -> None:
    made = Made(tmp_path, "mixed ranks")  # 7 and 2
    assert export_adapter(ExportRequest(made.recipe, merge=True, rank=9), tmp_path / "most").layout.rank == 9
    with pytest.raises(UsageError, match="--rank 10 is above 9, and no update here can need more") as caught:
        export_adapter(ExportRequest(made.recipe, merge=True, rank=10), tmp_path / "more")
    assert "--rank 9" in (caught.value.hint or "") and not (tmp_path / "more").exists()
