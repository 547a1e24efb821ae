"""docs/recipes.md is true: every command runs as it stands, in its order, and what it writes is what the page says."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.cli.project import run
from tests.tiny import BASE_ID, logits, make_adapter, make_base, random_records, write_jsonl

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
# What stands above a block, the language, and its lines.
BLOCKS = re.findall(r"^(?:<!-- ([^\n]*) -->\n)?```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE = "org/base-model"
CHECKPOINTS = [f"run/checkpoint-{step}" for step in (100, 200, 300)]
ADAPTERS = ["formal", "brief", "kind", "sft", "dpo", "chat", "toxic", *CHECKPOINTS]


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a reader has typed the whole page."""
    folder = tmp_path_factory.mktemp("recipes")
    before = os.getcwd()
    os.chdir(folder)
    try:
        _prepare(folder)
        for mark, language, text in BLOCKS:
            _follow(mark, language, text)
    finally:
        os.chdir(before)
    return folder


def _prepare(folder: Path) -> None:
    """What the page takes for granted: base, adapters, the model that SFT was merged into, and records."""
    base = make_base(folder / BASE)
    first = make_adapter(folder / "trained", base, rank=16, alpha=32)
    config = (first / CONFIG).read_text().replace(BASE_ID, BASE)
    for seed, name in enumerate(ADAPTERS):
        shutil.copytree(first, folder / name)
        draw = torch.Generator().manual_seed(seed)
        tensors = {key: 0.3 * torch.randn(t.shape, generator=draw) for key, t in load_file(first / TENSORS).items()}
        save_file(tensors, folder / name / TENSORS, {"format": "pt"})
        (folder / name / CONFIG).write_text(config.replace(BASE, "./base-sft") if name == "dpo" else config)
    assert run("fuse", "./sft", "--base", BASE, "-o", "base-sft").exit_code == 0
    write_jsonl(folder / "val.jsonl", random_records(24))
    write_jsonl(folder / "test.jsonl", random_records(24, seed=1))


def _follow(mark: str, language: str, text: str) -> None:
    """Does with one block what a reader does with it."""
    if mark.endswith(", edited"):
        Path(mark.removesuffix(", edited")).write_text(text)
    elif mark.startswith("printed by: loracat "):
        result = run(*shlex.split(mark.removeprefix("printed by: loracat ")))
        printed = [line.strip().removeprefix("$ ") for line in result.stdout.splitlines()]
        assert [line for line in text.splitlines() if line not in printed] == []
    elif language == "text":
        command, *shown = text.splitlines()
        result = run(*shlex.split(command.removeprefix("$ loracat ")))
        said = (result.stdout + result.stderr).splitlines()
        assert [line for line in shown if line not in (*said, "...")] == []
    elif mark != "not run":
        assert (mark, language) == ("", "bash")
        for line in text.splitlines():
            words = shlex.split(line)
            assert words.pop(0) == "loracat"
            target = words[words.index(">") + 1] if ">" in words else None
            result = run(*(words if target is None else words[:-2]))
            assert result.exit_code == 0, (line, result.stderr)
            if target is not None:
                assert re.fullmatch(r"# .*(\n.+|\n)+", result.stdout)
                Path(target).write_text(result.stdout)


def updates(folder: Path) -> dict[str, torch.Tensor]:
    """s B A of every module, in float64."""
    config = json.loads((folder / CONFIG).read_text())
    tensors = {name: tensor.double() for name, tensor in load_file(folder / TENSORS).items()}
    scaling = config["lora_alpha"] / config["r"]
    return {
        name: scaling * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        for name in tensors
        if "lora_A" in name
    }


def rank_of(folder: Path) -> int:
    return int(json.loads((folder / CONFIG).read_text())["r"])


def test_only_the_blocks_for_other_programs_are_not_run_here() -> None:
    assert [text for mark, _, text in BLOCKS if mark == "not run"] == [
        "python convert_hf_to_gguf.py formal-model --outfile formal-model.gguf\nlms import formal-model.gguf\n"
    ]
    assert {language for _, language, _ in BLOCKS} == {"bash", "text", "toml"}


# What is written, its rank, and the weights of what it is the exact sum of.
SUMS: list[tuple[str, int, dict[str, float]]] = [
    ("formal-portable", 16, {"formal": 1}),
    ("formal-50MB", 16, {"formal": 1}),
    ("style", 48, {"formal": 0.5, "brief": 0.3, "kind": 0.2}),
    ("clean", 32, {"chat": 1, "toxic": -1}),
    ("undo", 16, {"sft": -1}),
    ("aligned", 32, {"sft": 1, "dpo": 1}),
    ("formal-gguf", 16, {"formal": 1}),
]


@pytest.mark.parametrize(("written", "rank", "weights"), SUMS, ids=[name for name, _, _ in SUMS])
def test_an_exact_recipe_writes_the_weighted_sum(
    followed: Path, written: str, rank: int, weights: dict[str, float]
) -> None:
    assert rank_of(followed / written) == rank
    parts = {name: updates(followed / name) for name in weights}
    found = updates(followed / written)
    assert len(found) == 6
    for module, update in found.items():
        expected = sum(weight * parts[name][module] for name, weight in weights.items())
        torch.testing.assert_close(update, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("written", "rank", "weights"),
    [
        ("formal-8", 8, {"formal": 1.0}),
        ("style-16", 16, {"formal": 0.5, "brief": 0.3, "kind": 0.2}),
        ("averaged", 16, dict(zip(CHECKPOINTS, (0.2, 0.3, 0.5), strict=True))),
    ],
)
def test_a_merged_recipe_writes_the_best_approximation_of_its_rank(
    followed: Path, written: str, rank: int, weights: dict[str, float]
) -> None:
    assert rank_of(followed / written) == rank
    parts = {name: updates(followed / name) for name in weights}
    for module, update in updates(followed / written).items():
        exact: Any = sum(weight * parts[name][module] for name, weight in weights.items())
        left = torch.linalg.svdvals(exact)[rank:].norm()
        assert float((update - exact).norm()) == pytest.approx(float(left), rel=1e-4, abs=1e-4)


def test_the_budget_bounds_the_file(followed: Path) -> None:
    assert (followed / "formal-50MB" / TENSORS).stat().st_size <= 50_000_000


def test_the_sum_on_the_first_base_is_the_second_adapter_on_the_merged_model(followed: Path) -> None:
    """Both as stock PEFT loads them."""
    first, merged = (AutoModelForCausalLM.from_pretrained(followed / name) for name in (BASE, "base-sft"))
    one_after_the_other = logits(PeftModel.from_pretrained(merged, followed / "dpo"))
    as_one = logits(PeftModel.from_pretrained(first, followed / "aligned"))
    torch.testing.assert_close(as_one, one_after_the_other, rtol=1e-4, atol=1e-4)
    assert json.loads((followed / "aligned" / CONFIG).read_text())["base_model_name_or_path"] == BASE


def test_an_undone_merge_is_the_base_again(followed: Path) -> None:
    base, again, tuned = (load_file(followed / name / "model.safetensors") for name in (BASE, "base-again", "base-sft"))
    assert base.keys() == again.keys()
    for name, tensor in base.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-6)
    assert any(not torch.equal(tensor, tuned[name]) for name, tensor in base.items())


def test_edited_weights_are_those_of_the_file(followed: Path) -> None:
    formal, brief = updates(followed / "formal"), updates(followed / "brief")
    for module, update in updates(followed / "edited").items():
        weight = 0.6 if ".0." in module or ".1." in module else 1.2
        torch.testing.assert_close(update, weight * formal[module] + 1.1 * brief[module], rtol=0, atol=1e-5)


def test_files_for_other_programs_are_there(followed: Path) -> None:
    assert (followed / "formal-gguf" / "adapter.gguf").read_bytes()[:4] == b"GGUF"
    assert (followed / "formal-mlx" / "adapters.safetensors").is_file()
    model = load_file(followed / "formal-model" / "model.safetensors")
    base = load_file(followed / BASE / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    [update] = [u for module, u in updates(followed / "formal").items() if "layers.0.self_attn.q_proj" in module]
    torch.testing.assert_close(model[name].double(), base[name].double() + update, rtol=0, atol=1e-5)
