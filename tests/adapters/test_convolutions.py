"""Updates of convolutions are read as stock PEFT runs them, those of a grouped one group by group."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loracli import ConvertRequest, FuseRequest, compare_adapters, convert_adapter, fit_mixing, fuse_model
from loracli.adapters.adapter import LoraAdapter, kernels_of, open_adapter, read_adapter
from loracli.adapters.compatible import _problems_of, inspect_adapters
from loracli.errors import IntegrityError, MalformedAdapter, UnsupportedAdapter
from tests.convolutions import ALL, GROUPS, Adapted, adapt, biases, close, config_of, deltas, images, load, model
from tests.tiny import make_adapter, make_base

FIELDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 6, "lora_alpha": 5, "use_rslora": True},
    "patterns": {"r": 3, "rank_pattern": {"second": 8}, "alpha_pattern": {"second": 3, "first": 7}},
    "biases": {"r": 2, "lora_alpha": 3, "lora_bias": True},
    "convolutions alone": {"r": 2, "targets": ("first", "second")},
}
# Channels in and out, kernel, groups, of each kind of convolution.
SHAPES: list[tuple[type[nn.Module], tuple[int, int, Any], int]] = [
    (nn.Conv1d, (4, 6, 3), 1),
    (nn.Conv1d, (4, 8, 2), 4),
    (nn.Conv2d, (6, 9, 1), 3),
    (nn.Conv2d, (4, 4, 3), 4),
    (nn.Conv2d, (2, 3, (2, 1)), 1),
    (nn.Conv3d, (2, 4, (1, 2, 3)), 2),
]


def rebuilt(adapter: LoraAdapter, name: str) -> Tensor:
    """dW of a convolution or linear layer, put together from the updates that were read."""
    updates = adapter.targets[name]
    flat = torch.cat([update.factors.delta_weight() for update in updates])
    kernel = updates[0].kernel
    return flat.reshape(flat.shape[0], -1, *kernel) if kernel else flat


@pytest.mark.parametrize("case", FIELDS)
def test_updates_are_those_of_the_dense_formula_and_of_stock_pefts_forward(tmp_path: Path, case: str) -> None:
    path = adapt(tmp_path / "a", model(), seed=3, **FIELDS[case])
    adapter, expected = read_adapter(str(path)), deltas(path)
    assert adapter.targets.keys() == expected.keys()
    for name, delta in expected.items():
        close(rebuilt(adapter, name), delta)
    shifts = biases(path) if "lora_bias" in FIELDS[case] else {}
    for name, shift in shifts.items():
        close(torch.cat([update.factors.delta_bias() for update in adapter.targets[name]]), shift)
    x = images()
    assert float((load(path)(x) - model()(x)).abs().max()) > 0.05
    close(load(path)(x), Adapted(model(), expected, shifts)(x))


def test_pefts_own_delta_of_a_grouped_convolution_leaves_the_groups_out(tmp_path: Path) -> None:
    """Why the forward is the reference: with one group get_delta_weight agrees, with two it fails."""
    path = adapt(tmp_path / "a", model(), r=4)
    layers = load(path).base_model.model
    close(layers.first.get_delta_weight("default").detach(), rebuilt(read_adapter(str(path)), "first"))
    with pytest.raises(RuntimeError, match="to have 2 channels, but got 4"):
        layers.second.get_delta_weight("default")


@pytest.mark.parametrize(("kind", "shape", "groups"), SHAPES)
@pytest.mark.parametrize("rank", [1, 3])
def test_convolutions_of_any_dimension_kernel_and_number_of_groups(
    tmp_path: Path, kind: type[nn.Module], shape: tuple[int, int, Any], groups: int, rank: int
) -> None:
    base = nn.Sequential(kind(*shape, groups=groups)).double()
    path = adapt(tmp_path / "a", base, ("0",), r=rank * groups, lora_alpha=2)
    adapter = read_adapter(str(path))
    close(rebuilt(adapter, "0"), deltas(path, base)["0"])
    assert adapter.ranks == (rank,)
    assert list(adapter.modules) == (["0"] if groups == 1 else [f"0[{group}]" for group in range(groups)])
    assert kernels_of([adapter]) == {"0": base[0].kernel_size}


def test_a_group_is_read_from_its_own_rows_of_the_file(tmp_path: Path) -> None:
    """What stays in the file is what is loaded; a state dict saved as it is holds the same."""
    path = adapt(tmp_path / "a", model(), r=4, lora_bias=True)
    opened, loaded = open_adapter(str(path)), read_adapter(str(path))
    tensors = load_file(path / "adapter_model.safetensors")
    raw = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
    save_file({n.replace("B.bias", "B.default.bias"): t for n, t in raw.items()}, path / "adapter_model.safetensors")
    raw_names = read_adapter(str(path))
    assert loaded.modules.keys() == opened.modules.keys() == raw_names.modules.keys()
    for name, module in loaded.modules.items():
        stored, again = opened.modules[name].factors, raw_names.modules[name].factors
        assert (stored.rank, stored.in_features, stored.out_features) == (
            module.factors.rank,
            *module.factors.lora_A.shape[1:],
            *module.factors.lora_B.shape[:1],
        )
        for part in ("lora_A", "lora_B", "bias"):
            assert torch.equal(getattr(again, part), getattr(module.factors, part))
        assert module.factors.lora_A.untyped_storage().nbytes() == module.factors.lora_A.nbytes
    with pytest.raises(IntegrityError, match="has changed since it was checked"):
        opened.modules["second[1]"].factors.lora_A  # noqa: B018


def test_inspect_tells_of_them_without_a_base(tmp_path: Path) -> None:
    paths = [adapt(tmp_path / name, model(), seed=seed, r=4) for name, seed in (("a", 0), ("b", 1))]
    found = inspect_adapters([str(path) for path in paths])
    first, _ = found.adapters
    assert (first.modules, first.leaves, first.ranks) == (3, tuple(sorted(ALL)), (2, 4))
    tensors = load_file(paths[0] / "adapter_model.safetensors").values()
    assert first.parameters == sum(tensor.numel() for tensor in tensors)
    own, other = (torch.cat([delta.flatten() for delta in deltas(path).values()]) for path in paths)
    assert first.norm == pytest.approx(float(own.norm()))
    [overlap] = found.overlaps
    assert overlap.cosine == pytest.approx(float(own @ other / own.norm() / other.norm()))
    assert found.problems == ()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (nn.Conv2d(4, 6, (1, 2)), r"^0 has different numbers of groups: 2 in .*a, 1 in .*b$"),
        (
            nn.Conv2d(4, 6, (2, 1), groups=GROUPS),
            r"^0\[0\] is \(out, in, kernel\) = \(3, 4, 1, 2\) in .* \(3, 4, 2, 1\)",
        ),
        (nn.Conv2d(4, 8, (1, 2), groups=GROUPS), r"^0\[0\] is \(out, in, kernel\) = .* and \(4, 4, 1, 2\) in .*b$"),
    ],
    ids=["groups", "kernel", "channels"],
)
def test_convolutions_that_differ_are_no_composition(tmp_path: Path, other: nn.Module, said: str) -> None:
    ours = adapt(tmp_path / "a", nn.Sequential(nn.Conv2d(4, 6, (1, 2), groups=GROUPS)), ("0",), r=2)
    theirs = adapt(tmp_path / "b", nn.Sequential(other), ("0",), r=2)
    problems = _problems_of([read_adapter(str(ours)), read_adapter(str(theirs))])
    assert problems
    assert all(line[:2] in ("0 ", "0[") for line in problems)
    assert re.search(said, problems[0]), problems[0]


@pytest.mark.parametrize(
    ("lora_A", "lora_B", "said"),
    [
        ((4, 3, 3, 3), (4, 4), "neither matrices nor the kernels"),
        ((4, 3), (4, 4, 1, 1), "neither matrices nor the kernels"),
        ((4, 3, 3, 3), (4, 4, 1), "neither matrices nor the kernels"),
        ((4, 3, 3, 3), (4, 4, 3, 1), "neither matrices nor the kernels"),
        ((4, 3, 3, 3), (4, 3, 1, 1), "neither matrices nor the kernels"),
        ((4, 3, 3, 3), (4, 8, 1, 1), "neither matrices nor the kernels"),
        ((4, 3, 1, 1, 1, 1), (4, 4, 1, 1, 1, 1), "neither matrices nor the kernels"),
        ((4, 3, 3, 3), (4, 2, 1, 1), "has 2 groups, .* do not divide its channels"),
        ((4, 4, 3, 3), (5, 2, 1, 1), "has 2 groups, .* do not divide its channels"),
        ((8, 4, 3, 3), (4, 8, 1, 1), "has rank 8 in the tensors and 4 in adapter_config.json"),
        ((4,), (4, 4), "lora_A.weight' is not a matrix"),
    ],
)
def test_factors_of_no_convolution_are_refused(
    tmp_path: Path, lora_A: tuple[int, ...], lora_B: tuple[int, ...], said: str
) -> None:
    path = adapt(tmp_path / "a", model(), ("first",), r=4)
    name = "base_model.model.first.lora_{}.weight"
    save_file(
        {name.format("A"): torch.ones(lora_A), name.format("B"): torch.ones(lora_B)}, path / "adapter_model.safetensors"
    )
    with pytest.raises(MalformedAdapter, match=said):
        read_adapter(str(path))


def test_a_kernel_is_no_factor_of_experts(tmp_path: Path) -> None:
    path = adapt(tmp_path / "a", model(), ("first",), r=4)
    config = config_of(path) | {"target_parameters": ["first.weight"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(
        MalformedAdapter, match="first.lora_A.weight' is of one of the target_parameters and not a matrix"
    ):
        read_adapter(str(path))


def test_what_runs_a_base_model_refuses_them_by_name(tmp_path: Path) -> None:
    base, data = make_base(tmp_path / "base"), tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"text": "{number}"}}\n' for number in range(9)))
    paths = [str(adapt(tmp_path / "a", model(), r=4)), str(make_adapter(tmp_path / "b", base))]
    match = r"a changes the convolution first, and only linear layers, embeddings and experts are run in a base model"
    with pytest.raises(UnsupportedAdapter, match=match) as refused:
        fit_mixing(paths, data, base=str(base))
    assert "loracat export --method" in str(refused.value.hint)
    with pytest.raises(UnsupportedAdapter, match=match):
        compare_adapters(adapters=paths, data=data, base=str(base))
    with pytest.raises(UnsupportedAdapter, match=match):
        fuse_model(FuseRequest(adapters=paths, method="sum", base=str(base)), tmp_path / "fused")
    with pytest.raises(UnsupportedAdapter, match="'first' is a convolution, and only adapters of linear layers"):
        convert_adapter(ConvertRequest(paths[0], base=str(base)), tmp_path / "converted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "base", "data.jsonl"]
