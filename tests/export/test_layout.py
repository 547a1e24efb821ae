"""Of several obstacles to a layout the same one is always said, and each is said where it stands alone."""

from __future__ import annotations

import pytest

from loracli.adapters.kinds import BaseModule
from loracli.errors import UsageError
from loracli.export.layout import ProfileName, choose_layout

Q, V, CONV = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.conv"
SAVED = {"saved": ("lm_head",)}
BIAS = {"lora_bias": "biased"}
TASK = {"task_type": "SEQ_CLS"}
KERNEL = {"kernels": {CONV: (3, 3)}}

# Each line leaves out what the line above says.
OBSTACLES = [
    ("mlx", SAVED | BIAS | TASK | KERNEL, "it replaces lm_head as one of its modules_to_save"),
    ("mlx", BIAS | TASK | KERNEL, "biased has lora_bias"),
    ("mlx", TASK | KERNEL, "its task type is SEQ_CLS, and mlx-lm runs causal language models alone"),
    ("mlx", KERNEL, f"{CONV} is a convolution, on which MLX has no LoRA"),
    ("mlx", {}, f"{Q} is a Conv1D, which goes by another name in MLX"),
    ("portable", SAVED | BIAS | KERNEL, f"it changes the convolution {CONV}, which PEFT alone reads"),
    ("portable", SAVED | BIAS, "it replaces lm_head as one of its modules_to_save, which PEFT alone reads"),
    ("portable", BIAS, "an adapter has lora_bias, which PEFT alone reads"),
    ("portable", {}, f"q_proj names modules of different shapes, {Q} and {V}"),
]


@pytest.mark.parametrize(("profile", "given", "said"), OBSTACLES, ids=lambda value: value if value == "mlx" else "")
def test_of_several_obstacles_the_first_is_said(profile: ProfileName, given: dict[str, object], said: str) -> None:
    modules = [BaseModule(Q, "conv1d", 8, 8), BaseModule(V, "linear", 8, 16)]
    ranks = {Q: 2, V: 1}
    if "kernels" in given:
        modules.append(BaseModule(CONV, "convolution", 72, 8))
        ranks[CONV] = 3
    with pytest.raises(UsageError) as caught:
        choose_layout(modules, ranks, profile, rank=None, **given)  # type: ignore[arg-type]
    assert caught.value.what == f"the {profile} profile is impossible: {said}"
    layout = choose_layout(modules, ranks, None, rank=None, **given)  # type: ignore[arg-type]
    assert layout.profile == "peft" and layout.rank == max(ranks.values())
    alone = {"saved", "lora_bias", "kernels"} & given.keys()
    assert layout.readers == ("PEFT" if alone else "PEFT and vLLM")
    if profile == "portable":
        assert layout.reason == said


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("model.embed_tokens", "embedding", "an adapted embedding, and model.embed_tokens is one"),
        ("mlp.experts.down_proj", "experts", "adapted experts, and mlp.experts.down_proj has some"),
        ("mlp.gate", "parameter", "the adapted parameter mlp.gate"),
    ],
)
@pytest.mark.parametrize("profile", [None, "peft", "portable"])
def test_lora_bias_beside_what_peft_gives_none_is_refused_for_every_reader(
    name: str, kind: str, said: str, profile: ProfileName | None
) -> None:
    module = BaseModule(name, kind, 8, 8, 2 if kind == "experts" else 0)  # type: ignore[arg-type]
    ranks = {f"{name}[0]": 1, f"{name}[1]": 1} if kind == "experts" else {name: 1}
    with pytest.raises(UsageError, match="biased has lora_bias, which PEFT does not support beside") as caught:
        choose_layout([module], ranks, profile, rank=None, lora_bias="biased")
    assert caught.value.what.endswith(said)
