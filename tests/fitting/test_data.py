"""Calibration data in a whole fit: weights mean what they say, and what was read is recorded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config, LlamaConfig

from loracli.adapters.adapter import read_adapter
from loracli.calibration.dataset import plan_batches
from loracli.calibration.render import Example
from loracli.calibration.shapes import Shape
from loracli.errors import UsageError
from loracli.fitting.engine import Engine
from loracli.fitting.journal import Meter
from loracli.fitting.mixing import make_diagonal, make_layout
from loracli.fitting.run import fit_mixing
from loracli.fitting.settings import FitSettings
from loracli.model.attach import attach
from loracli.model.loss import make_objective
from loracli.model.session import usable_length
from loracli.progress import SILENT
from loracli.recipe.recipe import load_recipe
from tests.heard import Heard
from tests.tiny import make_tokenizer, random_records, write_jsonl


def examples(count: int, weight: float = 1.0, seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for line in range(count):
        length = int(torch.randint(4, 20, (1,), generator=generator))
        ids = torch.randint(3, 259, (length,), generator=generator).tolist()
        found.append(Example(f"{seed}:{line}", tuple(ids), (False, False, *(True,) * (length - 2)), weight))
    return found


@pytest.mark.parametrize("own_head", [True, False])
@pytest.mark.parametrize("batch_tokens", [1, 50, 10_000])
def test_a_weight_of_2_is_the_objective_of_every_record_twice(
    tiny_base: Path, two_adapters: tuple[Path, Path], batch_tokens: int, own_head: bool
) -> None:
    """Value, gradient and held-out score, in float64, whatever the batches."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float64).eval().requires_grad_(False)
    adapters = [read_adapter(str(path)) for path in two_adapters]
    mixing = make_diagonal(make_layout(adapters), "module")
    once, heavy = examples(5), examples(4, 2.0, seed=1)
    light = [replace(example, weight=1.0) for example in heavy]
    theta = mixing.constant([0.7, 0.4])
    results = []
    with attach(model, adapters, mixing.layout.modules) as attached:
        for records in ([*once, *heavy], [*once, *light, *light]):
            batches = plan_batches(records, batch_tokens=batch_tokens)
            objective = make_objective(attached, batches[0])
            objective._own_head = own_head
            engine = Engine(objective, Meter(SILENT))
            scores = engine.score(mixing, theta, batches, records)
            results.append((*engine.mean_and_gradient(mixing, theta, batches, records), scores.nats_per_token))
    (value, gradient, score), (value_2, gradient_2, score_2) = results
    assert gradient.abs().max() > 1e-3
    assert value == pytest.approx(value_2, rel=1e-6) and score == pytest.approx(value, rel=1e-6)
    assert score_2 == pytest.approx(score, rel=1e-6)
    torch.testing.assert_close(gradient, gradient_2, rtol=1e-5, atol=1e-8)


QUICK = FitSettings(mixing="adapter", passes=3, holdout=0.2, control="none")


def fit(two_adapters: tuple[Path, Path], tiny_base: Path, data: Any, **options: Any) -> Any:
    settings = options.pop("settings", QUICK)
    return fit_mixing([str(p) for p in two_adapters], data, base=str(tiny_base), settings=settings, **options)


def test_a_weight_common_to_all_files_changes_no_weight_and_no_loss(
    tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    files = [write_jsonl(tmp_path / f"{seed}.jsonl", random_records(30, seed=seed)) for seed in (0, 1)]
    held = write_jsonl(tmp_path / "held.jsonl", random_records(25, seed=2))
    for mixing in ("adapter", "layer"):
        settings = replace(QUICK, mixing=mixing, holdout=None)
        plain = fit(two_adapters, tiny_base, files, eval_data=held, settings=settings)
        equal = fit(two_adapters, tiny_base, [f"{f}:4" for f in files], eval_data=f"{held}:4", settings=settings)
        other = fit(two_adapters, tiny_base, [f"{files[0]}:4", files[1]], eval_data=held, settings=settings)
        assert equal.mixing.weights.keys() == plain.mixing.weights.keys()
        differences = []
        for group, weights in plain.mixing.weights.items():
            assert equal.mixing.weights[group] == pytest.approx(weights, abs=1e-6)
            differences += [abs(a - b) for a, b in zip(other.mixing.weights[group], weights, strict=True)]
        assert max(differences) > 1e-4
        assert equal.fit.training_nats_per_token == pytest.approx(plain.fit.training_nats_per_token, abs=1e-6)
        assert equal.held_out.row("fit").nats_per_token == pytest.approx(plain.held_out.row("fit").nats_per_token, 1e-6)
        assert equal.held_out.scored_tokens == plain.held_out.scored_tokens


def test_the_published_recipe_takes_weighted_files(
    tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    data = write_jsonl(tmp_path / "val.jsonl", random_records(50))
    paper = FitSettings(paper=True, holdout=0.2, control="none")
    plain, equal = (fit(two_adapters, tiny_base, d, settings=paper) for d in (data, f"{data}:0.5"))
    assert equal.fit.largest_move == pytest.approx(plain.fit.largest_move, rel=1e-6) and plain.fit.largest_move > 0
    for group, weights in plain.mixing.weights.items():
        pairs = zip(equal.mixing.weights[group], weights, strict=True)
        assert all(a == b or a == pytest.approx(b, rel=1e-6) for a, b in pairs)


def test_the_recipe_accounts_for_every_file_and_the_settings_of_the_data(
    tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [r | {"task": "pairs"} for r in random_records(40)])
    chats = tmp_path / "chats.jsonl"
    turns = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
    lines = [json.dumps({"conversations": turns * i, "task": "chats"}) for i in range(1, 21)]
    chats.write_text("\n".join([*lines, "oops"]))
    settings = replace(QUICK, holdout=None, skip_bad=True, allow_truncation=True)
    recipe = fit(two_adapters, tiny_base, [pairs, f"{chats}:2"], settings=settings)
    recipe.save(tmp_path / "recipe.json")
    loaded = load_recipe(tmp_path / "recipe.json")
    shapes: list[Shape] = ["prompt-completion", "sharegpt"]
    assert [(d.name, d.shape, d.weight, d.skipped, d.skipped_lines) for d in loaded.data] == [
        ("pairs.jsonl", shapes[0], 1.0, 0, ()),
        ("chats.jsonl", shapes[1], 2.0, 1, (21,)),
    ]
    assert [d.template_sha256 is None for d in loaded.data] == [True, False]
    assert sum(d.records for d in loaded.data) == loaded.held_out.records == 60
    recorded = loaded.fit.settings
    assert (recorded["format"], recorded["skip_bad"], recorded["allow_truncation"]) == (None, True, True)
    assert loaded.held_out.name == "pairs.jsonl, chats.jsonl:2"
    assert [task.task for task in loaded.held_out.tasks] == ["chats", "pairs"]
    assert sum(task.scored_tokens for task in loaded.held_out.tasks) == loaded.held_out.scored_tokens
    rows = [row.name for row in loaded.held_out.rows]
    assert all(list(task.nats_per_token) == rows for task in loaded.held_out.tasks)
    public = loaded.public()
    assert list(public.held_out.tasks[0].nats_per_token) == [row.name for row in public.held_out.rows]


def test_an_array_under_other_names_fits_as_its_jsonl_does_and_the_recipe_keeps_both(
    tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path]
) -> None:
    records = random_records(50)
    lines = write_jsonl(tmp_path / "lines.jsonl", records)
    array = tmp_path / "array.json"
    array.write_text(json.dumps([{"question": r["prompt"], "answer": r["completion"], "seen": 1} for r in records]))
    names = "prompt=question,completion=answer"
    settings = replace(QUICK, fields=names)
    recipe = fit(two_adapters, tiny_base, array, settings=settings)
    recipe.save(tmp_path / "recipe.json")
    loaded = load_recipe(tmp_path / "recipe.json")
    assert loaded.fit.settings["fields"] == names and loaded.data[0].unread == ("seen",)
    plain = fit(two_adapters, tiny_base, lines)
    assert plain.mixing == recipe.mixing and plain.data[0].record_sha256 == recipe.data[0].record_sha256
    with pytest.raises(UsageError, match="question is not one of text, prompt"):
        FitSettings(fields="question=prompt")


def test_an_adapter_with_a_template_of_its_own_is_warned_of(
    tmp_path: Path, tiny_base: Path, two_adapters: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl(tmp_path / "val.jsonl", random_records(50))
    own = Path(shutil.copytree(two_adapters[0], tmp_path / "own"))
    make_tokenizer(chat_template="other").save_pretrained(own)
    monkeypatch.chdir(tmp_path)  # which local adapters are named from
    listener = Heard()
    fit((own, two_adapters[1]), tiny_base, data, progress=listener)
    assert [warning for warning in listener.warnings if "chat template" in warning] == [
        "own: it comes with a chat template that differs from the base model's, which is the one used"
    ]


def test_the_longest_length_is_that_of_the_text_model() -> None:
    text = {"max_position_embeddings": 300}
    for config in (Gemma3Config(text_config=text), LlamaConfig(**text)):
        base: Any = SimpleNamespace(config=config)
        assert usable_length(base, 500) == 300
        assert usable_length(base, 200) == 200
