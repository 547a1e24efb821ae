"""What an initialisation takes from a weight: the same as PEFT's own code takes, and how far float32 may be off."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from loracli.conversion.source import _initial_update


def taken_by_peft(weight: Tensor, kind: str, rank: int, alpha: float) -> Tensor:
    """W - W_res, from stock PEFT's layer."""
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight.data = weight.clone()
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], init_lora_weights=kind)  # type: ignore[arg-type]
    return weight.double() - get_peft_model(model, config).base_model.model[0].base_layer.weight.detach().double()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24)])
@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_it_is_what_peft_takes(kind: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    for rank, alpha in ((1, 1.0), (5, 12.0), (24, 24.0)):
        found = _initial_update(kind, weight, rank, alpha / rank)
        assert found is not None
        difference = float((found.factors.delta_weight() - taken_by_peft(weight, kind, rank, alpha)).norm())
        assert difference < 1e-5 * float(weight.norm()) * alpha / rank


def test_what_needs_chance_or_data_is_not_computed() -> None:
    for kind in ("pissa_niter_4", "corda", "lora_ga"):
        assert _initial_update(kind, torch.randn(6, 6), 2, 1.0) is None


@pytest.mark.parametrize("gap", [1.0, 1e-2, 1e-4])
def test_the_uncertainty_of_pissa_follows_the_gap_of_the_singular_values(gap: float) -> None:
    """float32 against float64 on a weight with a known gap at the edge: below the bound, and not far below."""
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64)).Q
    s = torch.cat([torch.linspace(4, 2, 8), torch.linspace(2 - gap, 0.5, 56)]).double()
    weight = ((u * s) @ v.T).float()
    found = _initial_update("pissa", weight, 8, 1.0)
    assert found is not None
    difference = float((found.factors.delta_weight() - taken_by_peft(weight, "pissa", 8, 8.0)).norm())
    assert difference < 4 * found.uncertainty
    assert found.uncertainty == pytest.approx(1.19e-7 * 4 * 8**0.5 * (1 + (4 - gap) / gap), rel=0.05)


def test_the_uncertainty_of_olora_follows_the_condition_of_the_first_columns() -> None:
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    sure = _initial_update("olora", weight, 4, 1.0)
    weight[:, 3] = weight[:, 2] + 1e-5 * weight[:, 3]
    unsure = _initial_update("olora", weight, 4, 1.0)
    assert sure is not None and unsure is not None
    assert sure.uncertainty < 1e-4 and unsure.uncertainty > 1e-2


def test_a_rank_that_the_weight_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="no rank 7"):
        _initial_update("pissa", torch.randn(6, 9), 7, 1.0)
