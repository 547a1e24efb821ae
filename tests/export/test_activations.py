"""Cutting by activations: G is that of a model with the composition in its weights, and the export uses it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.pytorch_utils import Conv1D

from loracli.algebra.truncate import truncate_for
from loracli.comparison.moments import moments_of
from loracli.errors import UsageError
from loracli.export.export import export_adapter
from loracli.export.source import RecipeSource
from tests.export.test_export import Made
from tests.tiny import random_records, write_jsonl


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "records.jsonl", random_records(7, seed=3))


def inputs_of_modules(model: Any, names: tuple[str, ...], records: list[dict[str, str]], base: Path) -> dict[str, Any]:
    """What reaches each module, token by token over all records, from plain forward passes."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].flatten(0, 1))
        )
        for name in names
    ]
    for record in records:
        ids = tokenizer(record["prompt"] + record["completion"]).input_ids + [tokenizer.eos_token_id]
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("case", ["plain", "disjoint targets", "embeddings", "conv1d of two shapes", "head"])
def test_the_moments_are_those_of_a_model_with_the_update_in_its_weights(tmp_path: Path, data: Path, case: str) -> None:
    made = Made(tmp_path, case)
    source = RecipeSource(made.recipe, tuple(made.adapters))
    found = moments_of(source, data, base=str(made.base))
    assert tuple(sorted(found)) == source.names()
    model = made.load()
    for name in source.names():
        update, weight = source.compose(name).factors.delta_weight(), model.get_submodule(name).weight
        turned = isinstance(model.get_submodule(name), (nn.Embedding, Conv1D))
        with torch.no_grad():
            weight += (update.T if turned else update).to(weight)
    names = tuple(name for name in source.names() if name != "lm_head")  # which sees what is scored, no more
    seen = inputs_of_modules(model, names, random_records(7, seed=3), made.base)
    for name in names:
        lora_A = source.compose(name).factors.lora_A
        x = seen[name]
        z = lora_A.T[x] if isinstance(model.get_submodule(name), nn.Embedding) else x.double() @ lora_A.T
        torch.testing.assert_close(found[name], z.T @ z / len(z), rtol=1e-3, atol=1e-4 * float(found[name].abs().max()))


def test_an_export_cuts_every_module_by_its_moment(tmp_path: Path, data: Path) -> None:
    made = Made(tmp_path, "plain")
    source = RecipeSource(made.recipe, tuple(made.adapters))
    moments = moments_of(source, data, base=str(made.base))
    exported = export_adapter(
        made.recipe, tmp_path / "out", merge=True, rank=3, activation_aware=True, fit_data=data, base=str(made.base)
    )
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    plain = export_adapter(made.recipe, tmp_path / "plain", merge=True, rank=3)
    for module, other in zip(exported.certificate.modules, plain.certificate.modules, strict=True):
        exact = source.compose(module.name).factors
        wanted = truncate_for(exact, 3, moments[module.name]).factors.delta_weight()
        prefix = f"base_model.model.{module.name}.lora_"
        written = tensors[prefix + "B.weight"].double() @ tensors[prefix + "A.weight"].double()
        torch.testing.assert_close(written, wanted, rtol=0, atol=1e-5 * float(wanted.norm()))
        error = float((written - exact.delta_weight()).norm() / exact.delta_weight().norm())
        assert module.relative_error == pytest.approx(error, rel=1e-6)
        assert module.kept_energy == pytest.approx(1 - error**2, abs=1e-6)
        assert module.kept_energy < other.kept_energy
    document = json.loads((tmp_path / "out" / "loracat.json").read_text())
    assert document["export"]["activation_aware"] is True
    assert "--merge --activation-aware --fit-data FILE --rank 3" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_aware": True}, "--activation-aware is for --merge"),
        ({"activation_aware": True, "merge": True, "energy": 0.5}, "--activation-aware is for --merge to a rank"),
        ({"activation_aware": True, "merge": True}, "needs calibration records"),
        ({"fit_data": "records.jsonl", "merge": True}, "--fit-data has no use"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        export_adapter(tmp_path / "no-such-recipe.json", tmp_path / "out", **options)
