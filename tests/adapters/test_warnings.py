"""What whoever uses an adapter is told of it: by every command, and of nothing that is as it should be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loracli.adapters.adapter import LoraAdapter, read_adapter
from loracli.adapters.compatible import inspect_adapters
from loracli.adapters.targets import read_targets
from loracli.comparison.inputs import prepare_comparison
from loracli.conversion.read import read_convertible
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.fitting.inputs import prepare_fit
from loracli.fitting.run import fit_mixing
from loracli.fitting.settings import FitSettings
from loracli.fusing.composition import FuseRequest, compose_on_base
from loracli.progress import Progress
from loracli.serving.lint import lint_adapter
from loracli.verifying.verify import verify_directory
from tests.heard import Heard
from tests.tiny import logits, make_adapter, make_base, random_records, write_jsonl

WEIGHTS = "adapter_model.safetensors"
Zeroed = Callable[[str], bool]


def zeroed(adapter: Path, folder: Path, which: Zeroed) -> Path:
    """A copy of the adapter whose tensors of those names are zero."""
    shutil.copytree(adapter, folder)
    tensors = load_file(adapter / WEIGHTS)
    save_file({n: torch.zeros_like(t) if which(n) else t for n, t in tensors.items()}, folder / WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory, two_adapters: tuple[Path, Path]) -> Path:
    """An adapter as it is before its training."""
    return zeroed(two_adapters[0], tmp_path_factory.mktemp("idle") / "idle", lambda name: "lora_B" in name)


COMMANDS: dict[str, Callable[[Path, Path, Path, Progress], object]] = {
    "inspect": lambda idle, base, data, progress: inspect_adapters([str(idle)], progress=progress),
    "lint": lambda idle, base, data, progress: lint_adapter(idle, progress=progress),
    "fit": lambda idle, base, data, progress: prepare_fit([str(idle)], str(data), base=str(base), progress=progress),
    "compare": lambda idle, base, data, progress: prepare_comparison(
        str(data), adapters=[str(idle)], base=str(base), progress=progress
    ),
    "fuse": lambda idle, base, data, progress: compose_on_base(
        FuseRequest(str(idle), base=str(base)), progress=progress
    ),
    "convert": lambda idle, base, data, progress: read_convertible(str(idle), progress=progress),
    "export --method": lambda idle, base, data, progress: export_adapter(
        ExportRequest(method="sum", adapters=[str(idle)], base=str(base)), data.parent / "out", progress=progress
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_warns_of_an_adapter_that_changes_nothing(
    tmp_path: Path, idle: Path, tiny_base: Path, command: str
) -> None:
    progress = Heard()
    data = write_jsonl(tmp_path / "val.jsonl", random_records(24))
    COMMANDS[command](idle, tiny_base, data, progress)
    assert [said for said in progress.warnings if f"{idle}: changes nothing" in said]


def test_a_recipe_and_what_is_exported_of_it_are_warned_of_too(tmp_path: Path, idle: Path, tiny_base: Path) -> None:
    progress = Heard()
    data = write_jsonl(tmp_path / "val.jsonl", random_records(24))
    settings = FitSettings(mixing="adapter", passes=2, holdout=0.4, control="none")
    recipe = fit_mixing([str(idle)], data, base=str(tiny_base), settings=settings)
    export_adapter(ExportRequest(recipe), tmp_path / "out", progress=progress)
    assert [said for said in progress.warnings if "changes nothing" in said]
    progress.warnings.clear()
    verify_directory(tmp_path / "out", progress=progress)
    assert [said for said in progress.warnings if "changes nothing" in said]


@pytest.mark.parametrize(
    ("which", "warned"),
    [
        (lambda name: "lora_A" in name, True),
        (lambda name: ("lora_A" if "q_proj" in name else "lora_B") in name, True),
        (lambda name: "lora_B" in name and "layers.0.self_attn.q_proj" not in name, False),
        (lambda name: "lora_B" in name and "v_proj" in name, False),
        (lambda name: False, False),
    ],
    ids=["A", "one of both in each", "all but one module", "one kind", "none"],
)
def test_only_what_is_zero_in_every_module_is_warned_of(
    tmp_path: Path, two_adapters: tuple[Path, Path], tiny_base: Path, which: Zeroed, warned: bool
) -> None:
    """By stock PEFT: with such an adapter the base's logits are the same."""
    adapter = zeroed(two_adapters[0], tmp_path / "a", which)
    assert bool(read_adapter(str(adapter)).warnings) is warned
    base = logits(AutoModelForCausalLM.from_pretrained(tiny_base))
    with_it = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), adapter))
    assert torch.equal(base, with_it) is warned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zeros_below_zero_are_zeros_for_lint_as_for_all_others(
    tmp_path: Path, two_adapters: tuple[Path, Path], dtype: torch.dtype
) -> None:
    folder = zeroed(two_adapters[0], tmp_path / "a", lambda name: False)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}
    last = max(name for name in tensors if "lora_B" in name)
    for smallest in (0.0, torch.finfo(dtype).tiny):
        changed = {name: torch.full_like(t, -0.0) if "lora_B" in name else t for name, t in tensors.items()}
        changed[last].view(-1)[-1] -= smallest
        save_file(changed, folder / WEIGHTS)
        progress = Heard()
        lint_adapter(folder, progress=progress)
        said = [warning for warning in progress.warnings if "changes nothing" in warning]
        assert bool(said) is bool(read_adapter(str(folder)).warnings) is (not smallest)


def test_a_bias_and_modules_that_were_saved_whole_are_a_change(tmp_path: Path, tiny_base: Path) -> None:
    def read(name: str, which: Zeroed, **config: object) -> LoraAdapter:
        made = make_adapter(tmp_path / f"{name}-trained", tiny_base, **config)
        return read_adapter(str(zeroed(made, tmp_path / name, which)))

    assert read("bias", lambda n: n.endswith("lora_B.weight"), lora_bias=True).warnings == ()
    assert "changes nothing" in read("none", lambda n: "lora_B" in n, lora_bias=True).warnings[0]
    (said,) = read("saved", lambda n: "lora_B" in n, modules_to_save=["lm_head"]).warnings
    assert "only its modules_to_save" in said


LEFT_OUT = [
    ("target_modules", ["q_proj"], "target_modules does not name model.layers.0.self_attn.v_proj and 2 more"),
    ("target_modules", r".*\.q_proj", "target_modules does not name model.layers.0.self_attn.v_proj and 2 more"),
    ("target_modules", r"(?=model).*", None),  # an expression that is not read
    ("layers_to_transform", [1], "layers_to_transform leaves out model.layers.0.self_attn.q_proj and 3 more"),
    ("layers_to_transform", 2, "layers_to_transform leaves out model.layers.0.self_attn.q_proj and 3 more"),
    ("layers_to_transform", [], None),
    ("layers_to_transform", [0, 1, 2], None),
    ("exclude_modules", ["0.self_attn.q_proj"], "exclude_modules names model.layers.0.self_attn.q_proj,"),
    ("exclude_modules", ["proj", "self_attn"], None),
    ("exclude_modules", r"model\.layers\.[12]\..*", "exclude_modules names model.layers.1.self_attn.q_proj and 3 more"),
    ("exclude_modules", r"layers\.[12]\..*", None),
]


@pytest.mark.parametrize(("field", "value", "said"), LEFT_OUT)
def test_modules_that_peft_leaves_out_are_warned_of(
    tmp_path: Path, tiny_base: Path, field: str, value: object, said: str | None
) -> None:
    folder = make_adapter(tmp_path / "a", tiny_base, targets=("q_proj", "v_proj"))
    path, adapter = folder / "adapter_config.json", read_adapter(str(folder))
    assert adapter.warnings == ()
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    heard, config = Heard(), LoraConfig.from_pretrained(folder)
    left_out = [name for name in adapter.modules if not check_target_module_exists(config, name)]
    inspect_adapters([str(folder)], progress=heard)
    rule = [line for one in lint_adapter(folder, servers=["peft"]).servers[0].violations for line in one.found]
    if said is None:
        assert left_out == [] and heard.warnings == [] and rule == []
        return
    assert said in heard.warnings[0] and "so PEFT leaves out what is composed here" in heard.warnings[0]
    assert len(left_out) == 1 + int((heard.warnings[0].partition(" and ")[2] or "0").split()[0])
    assert all(line.rpartition(" ")[2] in left_out for line in rule) and rule


NAMES = "h.0.q x.h.1.q x.h.1.experts.0.q x.blocks.3.h.1.q x.y.0.1.q q x.h.q 0.q x.1 a.3.q".split()


@pytest.mark.parametrize("layers", [[0], 1, [1, 3], None])
@pytest.mark.parametrize("pattern", [None, [], "", "h", "blocks", ["blocks", "h"], ["x.h"], "experts"])
@pytest.mark.parametrize("targets", [["q"], ["h.0.q", "q"], ["q", "x.h.1.q"]])
def test_layers_are_told_as_peft_tells_them(layers: object, pattern: object, targets: list[str]) -> None:
    fields = {"target_modules": targets, "layers_to_transform": layers, "layers_pattern": pattern}
    config, ours = SimpleNamespace(**fields), read_targets(fields)
    for name in NAMES:
        assert (ours.obstacle(name) is None) is bool(check_target_module_exists(config, name)), name


@pytest.mark.parametrize(("field", "more"), [("modules_to_save", {}), ("layers_pattern", {"layers_to_transform": [7]})])
def test_no_module_is_held_against_thousands_of_names(field: str, more: dict[str, object]) -> None:
    names = [f"q{number}" for number in range(257)] + ["h"]
    ours = read_targets({"target_modules": ["q"], field: names, **more})
    assert ours.obstacle("x.h.1.q") is None and "more than 256 names" in str(ours.unread)
    fewer = read_targets({"target_modules": ["q"], field: names[-256:], **more})
    assert fewer.obstacle("x.h.1.q") is not None and fewer.unread is None


def test_a_head_that_ensure_weight_tying_ties_is_read_as_peft_loads_it(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama-tied")
    folder = make_adapter(
        tmp_path / "a",
        base,
        targets=("embed_tokens", "q_proj"),
        rank=4,
        ensure_weight_tying=True,
        rank_pattern={"embed_tokens": 3},
        alpha_pattern={"lm_head": 5},
    )
    adapter = read_adapter(str(folder))
    assert adapter.warnings == () and adapter.modules["lm_head"].factors.rank == 3
    assert lint_adapter(folder, servers=["peft"], base=base).servers[0].violations == ()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    for name, module in adapter.modules.items():
        theirs = loaded.base_model.model.get_submodule(name).get_delta_weight("default")
        factors, turned = module.factors, module.kind == "embedding"
        ours = factors.scaling * factors.lora_B.double() @ factors.lora_A.double()
        assert torch.allclose((ours.T if turned else ours).float(), theirs, atol=1e-6), name
