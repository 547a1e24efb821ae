"""Rules of servers, each broken by an adapter that breaks it; what keeps them all; and adapters that mean harm."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loracli.errors import AdapterNotFound, MalformedAdapter, UsageError
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.serving.checks import CHECKS
from loracli.serving.lint import _SERVERS, ServerReport, Severity, lint_adapter, load_server
from tests.cli.project import run
from tests.conversion.test_convert import prepare_corda, prepare_lora_ga
from tests.conversion.training import reload, train
from tests.heard import Heard
from tests.mixtures import expert_layers
from tests.tiny import BASE_ID, logits, make_adapter, make_base

LAYER = "base_model.model.model.layers"
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": BASE_ID,
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
    "init_lora_weights": True,
}
MLX_CONFIG: dict[str, Any] = {
    "fine_tune_type": "lora",
    "num_layers": 3,
    "lora_parameters": {"rank": 8, "scale": 1.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]},
}
Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]


def factors(path: str, rank: int = 8, shape: tuple[int, int] = (32, 32)) -> dict[str, torch.Tensor]:
    return {
        f"{path}.lora_A.weight": torch.ones(rank, shape[1]),
        f"{path}.lora_B.weight": torch.ones(shape[0], rank),
    }


def write(folder: Path, change: Change = lambda config, tensors: None, *, mlx: bool = False) -> Path:
    """An adapter for q and v of a tiny Llama that keeps every rule, after a change."""
    config: dict[str, Any] = json.loads(json.dumps(MLX_CONFIG if mlx else CONFIG))
    tensors: dict[str, torch.Tensor] = {}
    for i in range(3):
        if mlx:
            tensors[f"model.layers.{i}.self_attn.q_proj.lora_a"] = torch.ones(32, 8)
            tensors[f"model.layers.{i}.self_attn.q_proj.lora_b"] = torch.ones(8, 32)
        else:
            tensors |= factors(f"{LAYER}.{i}.self_attn.q_proj") | factors(
                f"{LAYER}.{i}.self_attn.v_proj", shape=(16, 32)
            )
    change(config, tensors)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / ("adapters.safetensors" if mlx else "adapter_model.safetensors"))
    return folder


def report(path: Path, server: str, base: Path | None = None) -> ServerReport:
    [found] = lint_adapter(path, servers=[server], base=None if base is None else str(base)).servers
    return found


def setting(**fields: Any) -> Change:
    return lambda config, tensors: config.update(fields)


def lacking(field: str) -> Change:
    return lambda config, tensors: config.pop(field)


def adding(tensors: dict[str, torch.Tensor], **fields: Any) -> Change:
    return lambda config, found: (found.update(tensors), config.update(fields))


def dropping(part: str, **fields: Any) -> Change:
    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]
        config.update(fields)

    return change


def rank_600(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        tensors[name] = torch.ones(600, 32) if "lora_A" in name else torch.ones(tensors[name].shape[0], 600)
    config.update(r=600, lora_alpha=1200)


def prefixless(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("base_model.model.")] = tensors.pop(name)


def renamed(old: str, new: str) -> Change:
    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def nested(field: str) -> Change:
    return lambda config, tensors: config["lora_parameters"].pop(field)


MAGNITUDE = {f"{LAYER}.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(32)}
CONVOLUTION = {
    f"{LAYER}.0.conv.lora_A.weight": torch.ones(8, 4, 3, 3),
    f"{LAYER}.0.conv.lora_B.weight": torch.ones(4, 8, 1, 1),
}
HEAD = factors("base_model.model.lm_head", shape=(259, 32))
FOURTH_LAYER = factors(f"{LAYER}.3.self_attn.q_proj") | factors(f"{LAYER}.3.self_attn.v_proj", shape=(16, 32))
O_OF_ONE = factors(f"{LAYER}.1.self_attn.o_proj")
RANK_4 = factors(f"{LAYER}.1.self_attn.q_proj", rank=4)
EXPERTS = {
    f"{LAYER}.1.mlp.experts.lora_A.weight": torch.ones(4 * 8, 24),
    f"{LAYER}.1.mlp.experts.lora_B.weight": torch.ones(32, 4 * 8),
}
DOWN = {"target_parameters": ["mlp.experts.down_proj"]}
PISSA = setting(init_lora_weights="pissa_niter_4")
RSLORA = setting(use_rslora=True)

BROKEN: list[tuple[str, str, Change]] = [
    ("peft", "required-fields", lacking("peft_type")),
    *[
        ("peft", "values", setting(**{field: value}))
        for field, values in {
            "lora_alpha": [None, "8"],
            "lora_dropout": [None, "0.1", 2.0],
            "rank_pattern": [None],
            "alpha_pattern": [None],
            "bias": [None, "x"],
            "task_type": ["causal_lm", "X"],
            "init_lora_weights": ["True", "nope"],
            "peft_type": ["lora"],
            "r": [8.0],
        }.items()
        for value in values
    ],
    ("peft", "features", setting(use_dora=True)),
    ("peft", "features", setting(lora_bias=True)),
    ("peft", "features", setting(modules_to_save=["lm_head"])),
    ("peft", "features", setting(trainable_token_indices=[1])),
    ("peft", "initialisation", PISSA),
    ("peft", "corda", setting(init_lora_weights="corda")),
    ("peft", "prefix", prefixless),
    ("peft", "own-names", renamed("model.layers", "_orig_mod.model.layers")),
    ("peft", "pairs", dropping("1.self_attn.q_proj.lora_B")),
    ("peft", "ranks", adding(RANK_4)),
    ("peft", "targets", setting(target_modules=["q_proj"])),
    ("peft", "base", adding(FOURTH_LAYER)),
    ("peft", "expert-order", setting(lora_B_layout="grouped_by_expert")),
    ("vllm", "required-fields", lacking("target_modules")),
    ("vllm", "rank-positive", setting(r=0)),
    ("vllm", "rank-limit", rank_600),
    ("vllm", "rank-padding", setting(rank_pattern={"q_proj": 9})),
    ("vllm", "dora", setting(use_dora=True)),
    ("vllm", "lora-bias", setting(lora_bias=True)),
    ("vllm", "bias", setting(bias="lora_only")),
    ("vllm", "modules-to-save", setting(modules_to_save=["score", "lm_head"])),
    ("vllm", "initialisation", PISSA),
    ("vllm", "other-features", setting(alora_invocation_tokens=[1])),
    ("vllm", "tensor-names", adding(MAGNITUDE)),
    ("vllm", "pairs", dropping("1.self_attn.q_proj.lora_B")),
    ("vllm", "matrices", adding(CONVOLUTION)),
    ("vllm", "both-of-experts", adding(EXPERTS, **DOWN)),
    ("vllm", "expert-order", setting(lora_B_layout="grouped_by_expert")),
    ("vllm", "base", adding(FOURTH_LAYER)),
    ("sglang", "required-fields", lacking("r")),
    ("sglang", "peft-type", setting(peft_type="LOHA")),
    ("sglang", "dora", setting(use_dora=True)),
    ("sglang", "target-modules", setting(target_modules=".*q_proj")),
    ("sglang", "matrices", adding(CONVOLUTION)),
    ("sglang", "one-rank", adding(RANK_4, rank_pattern={"layers.1.self_attn.q_proj": 4})),
    ("sglang", "scaling", RSLORA),
    ("sglang", "initialisation", PISSA),
    ("sglang", "other-features", setting(layer_replication=[[0, 2]])),
    ("sglang", "lora-bias", setting(lora_bias=True)),
    ("sglang", "tensor-names", adding({"base_model.model.lm_head.weight": torch.ones(4, 4)})),
    ("sglang", "pairs", dropping("1.self_attn.q_proj.lora_B")),
    ("sglang", "targets", adding(O_OF_ONE)),
    ("sglang", "q-needs-v", dropping("v_proj")),
    ("sglang", "v-needs-q", dropping("q_proj")),
    ("sglang", "k-needs-q", adding(factors(f"{LAYER}.5.self_attn.k_proj"))),
    ("sglang", "up-needs-gate", adding(factors(f"{LAYER}.0.mlp.up_proj"))),
    ("sglang", "experts", adding(EXPERTS, **DOWN)),
    ("sglang", "base", adding(FOURTH_LAYER)),
    ("llamacpp", "required-fields", lacking("lora_alpha")),
    ("llamacpp", "alpha", setting(lora_alpha="16")),
    ("llamacpp", "tensor-names", adding(MAGNITUDE)),
    ("llamacpp", "pairs", dropping("1.self_attn.q_proj.lora_B")),
    ("llamacpp", "matrices", adding(CONVOLUTION)),
    ("llamacpp", "scaling", setting(alpha_pattern={"v_proj": 4})),
    ("llamacpp", "initialisation", PISSA),
    ("llamacpp", "other-features", setting(use_qalora=True)),
    ("llamacpp", "experts", adding(EXPERTS, **DOWN)),
    ("llamacpp", "base", adding(FOURTH_LAYER)),
    ("tgi", "tensor-names", adding(MAGNITUDE)),
    ("tgi", "own-names", renamed("model.layers", "_orig_mod.model.layers")),
    ("tgi", "pairs", dropping("1.self_attn.q_proj.lora_B")),
    ("tgi", "every-layer", dropping("1.self_attn.q_proj")),
    ("tgi", "one-rank", adding(RANK_4)),
    ("tgi", "scaling", setting(alpha_pattern={"v_proj": 4})),
    ("tgi", "dora", setting(use_dora=True)),
    ("tgi", "initialisation", PISSA),
    ("tgi", "other-features", setting(use_bdlora={"x": 1})),
    ("tgi", "fast-kernels", rank_600),
    ("tgi", "matrices", adding(CONVOLUTION)),
    ("tgi", "experts", adding(EXPERTS, **DOWN)),
    ("tgi", "base", adding(FOURTH_LAYER)),
    ("ollama", "alpha", setting(lora_alpha=16.5)),
    ("ollama", "tensor-names", prefixless),
    ("ollama", "modules", adding(HEAD)),
    ("ollama", "pairs", dropping("1.self_attn.q_proj.lora_B")),
    ("ollama", "orientation", rank_600),
    ("ollama", "row-order", setting()),
    ("ollama", "scaling", RSLORA),
    ("ollama", "initialisation", PISSA),
    ("ollama", "other-features", setting(use_qalora=True)),
    ("ollama", "experts", adding(EXPERTS, **DOWN)),
    ("ollama", "base", adding(FOURTH_LAYER)),
    ("mlx", "required-fields", nested("scale")),
    ("mlx", "kind", setting(fine_tune_type="loha")),
    ("mlx", "tensor-names", adding({"model.norm.weight": torch.ones(32)})),
    ("mlx", "pairs", dropping("1.self_attn.q_proj.lora_b")),
    ("mlx", "one-rank", adding({"model.layers.1.self_attn.q_proj.lora_a": torch.ones(32, 4)})),
    (
        "mlx",
        "keys",
        adding({f"model.layers.1.mlp.up_proj.lora_{s}": torch.ones(n) for s, n in (("a", (32, 8)), ("b", (8, 48)))}),
    ),
]
# Broken by other files or another base than the tiny Llama; each has a test of its own.
ELSEWHERE = {
    ("sglang", "one-file"),
    ("sglang", "added-tokens"),
    ("llamacpp", "tied-head"),
    ("mlx", "tied-head"),
    ("ollama", "architecture"),
}


@pytest.mark.parametrize(("server", "rule", "change"), BROKEN, ids=[f"{s}-{r}" for s, r, _ in BROKEN])
def test_an_adapter_that_breaks_a_rule_is_told_so_by_its_name(
    tmp_path: Path, tiny_base: Path, server: str, rule: str, change: Change
) -> None:
    found = report(write(tmp_path / "adapter", change, mlx=server == "mlx"), server, tiny_base)
    violation = next((v for v in found.violations if v.rule == rule), None)
    assert violation is not None, [v.rule for v in found.violations]
    assert violation.count >= 1
    [expected] = [r.severity for r in load_server(server).rules if r.name == rule]
    assert violation.severity == expected
    assert (found.verdict == "takes") == all(v.severity == "slow" for v in found.violations)
    assert (found.serve == ()) == (found.verdict == "refuses")
    assert "{" not in violation.remedy


def test_every_rule_is_broken_by_a_test() -> None:
    rules = {(server, rule.name) for server in _SERVERS for rule in load_server(server).rules}
    assert {(server, rule) for server, rule, _ in BROKEN} | ELSEWHERE == rules


@pytest.mark.parametrize("name", _SERVERS)
def test_rules_are_complete_and_their_parameters_are_those_of_the_check(name: str) -> None:
    server = load_server(name)
    assert server.id == name
    names = [rule.name for rule in server.rules]
    assert len(set(names)) == len(names)
    for rule in server.rules:
        assert rule.severity in get_args(Severity)
        assert rule.why and rule.remedy and rule.source
        inspect.signature(CHECKS[rule.check]).bind(None, None, **rule.parameters)


def test_every_check_is_used_by_a_rule() -> None:
    assert CHECKS.keys() == {rule.check for server in _SERVERS for rule in load_server(server).rules}


def test_what_keeps_the_rules_is_taken_by_all_with_the_command_that_serves_it(tmp_path: Path, tiny_base: Path) -> None:
    path = write(tmp_path / "adapter")
    found = lint_adapter(path, base=str(tiny_base))
    assert {server.id: server.verdict for server in found.servers} == {
        "peft": "takes",
        "vllm": "takes",
        "sglang": "takes",
        "llamacpp": "takes",
        "tgi": "takes",
        "ollama": "differs",  # the row order of q, which no safetensors can help
    }
    assert (found.rank, found.modules) == (8, 6)
    assert all(server.unclear == () for server in found.servers)
    mlx = report(write(tmp_path / "mlx", mlx=True), "mlx", tiny_base)
    assert (mlx.verdict, mlx.violations) == ("takes", ())
    [command] = found.servers[1].serve
    assert shlex.split(command) == [
        *("vllm", "serve", str(tiny_base), "--enable-lora", "--lora-modules", f"adapter={path}"),
        *("--max-lora-rank", "8"),
    ]


@pytest.mark.parametrize(
    ("rank", "served"), [(1, "1"), (9, "16"), (24, "32"), (129, "256"), (300, "320"), (512, "512")]
)
def test_vllm_gets_the_least_rank_that_it_has(tmp_path: Path, rank: int, served: str) -> None:
    path = write(tmp_path / "adapter", lambda c, t: (c.update(rank_pattern={"q_proj": rank}), c.update(r=1)))
    tensors = {
        name: t[:1] if "lora_A" in name else t[:, :1]
        for name, t in load_file(path / "adapter_model.safetensors").items()
    }
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / "adapter_model.safetensors")
    [command] = report(path, "vllm").serve
    assert command.endswith(f"--max-lora-rank {served}")


def test_scalings_are_those_of_stock_peft(tmp_path: Path, tiny_base: Path) -> None:
    path = make_adapter(
        tmp_path / "adapter",
        tiny_base,
        rank=6,
        alpha=9,
        use_rslora=True,
        rank_pattern={"v_proj": 3},
        alpha_pattern={"layers.1.self_attn.q_proj": 5},
    )
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), path)
    right = {n: m.scaling["default"] for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    theirs = {
        "sglang": lambda rank: 9 / 6,
        "tgi": lambda rank: 9 / 6**0.5,
        "llamacpp": lambda rank: 9 / rank,
    }
    assert len(right) == 6
    for server, formula in theirs.items():
        wanted = set()
        for name, scaling in right.items():
            given = formula(3 if name.endswith("v_proj") else 6)
            if abs(given - scaling) > 1e-9:
                wanted.add(f"{name} is scaled by {given:g} instead of {scaling:g}")
        [violation] = [v for v in report(path, server).violations if v.rule == "scaling"]
        assert set(violation.found) == wanted


@pytest.mark.parametrize(
    ("old", "new"),
    [(".weight", ".weight"), (".weight", ".default.weight"), (".weight", ".sft.weight")]
    + [("model.layers", "_orig_mod.model.layers"), ("self_attn.", "self_attn._fsdp_wrapped_module.")]
    + [("base_model.model.", ""), ("base_model.model.", 2 * "base_model.model."), (".lora_", ".base_layer.lora_")],
)
def test_a_name_is_taken_where_stock_peft_loads_the_tensor(tmp_path: Path, tiny_base: Path, old: str, new: str) -> None:
    path = write(tmp_path / "adapter", renamed(old, new))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = reload(tiny_base, path).state_dict()
    loaded = sum(float(tensor.abs().sum()) for name, tensor in state.items() if "lora_B" in name)
    assert (report(path, "peft").verdict == "takes") == (loaded > 0)


def test_an_adapter_of_lora_without_a_factor_is_called_so(tmp_path: Path) -> None:
    def heads(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors.clear()
        tensors["base_model.model.lm_head.weight"] = torch.ones(4, 4)

    path = write(tmp_path / "adapter", heads)
    assert ["no tensor is a factor by its name"] in [list(v.found) for v in report(path, "peft").violations]


@pytest.mark.parametrize(
    ("kind", "prepare"),
    [("eva", None), ("olora", None), ("pissa", None), ("pissa_niter_4", None)]
    + [("corda", prepare_corda), ("lora_ga", prepare_lora_ga)],
)
def test_an_initialisation_is_taken_where_stock_peft_loads_the_model_that_was_trained(
    tmp_path: Path, tiny_base: Path, kind: str, prepare: Any
) -> None:
    trained = train(tmp_path / "adapter", tiny_base, prepare=prepare, init_lora_weights=kind)
    verdict = report(trained.path, "peft").verdict
    if verdict == "refuses":
        with pytest.raises(ValueError, match="preprocess_corda"):
            reload(tiny_base, trained.path)
    else:
        wrong = (logits(reload(tiny_base, trained.path)) - trained.logits).abs().max()
        assert verdict == ("takes" if wrong < 2e-4 else "differs")
    for server in ("vllm", "sglang", "llamacpp", "tgi", "ollama"):
        assert ("initialisation" in {v.rule for v in report(trained.path, server).violations}) == (kind != "eva")


def test_a_rule_that_needs_the_base_is_not_checked_without_one(tmp_path: Path) -> None:
    found = report(write(tmp_path / "adapter"), "ollama")
    assert found.verdict == "takes"
    assert {line.partition(":")[0] for line in found.unclear} == {"row-order", "architecture", "base"}


@pytest.mark.parametrize("server", ["llamacpp", "mlx"])
def test_a_tied_head_is_refused(tmp_path: Path, server: str) -> None:
    base = make_base(tmp_path / "base", "llama-tied")
    head = {"lm_head.lora_a": torch.ones(32, 8), "lm_head.lora_b": torch.ones(8, 259)}
    path = write(tmp_path / "adapter", adding(head if server == "mlx" else HEAD), mlx=server == "mlx")
    assert "tied-head" in {v.rule for v in report(path, server, base).violations}


def test_ollama_reads_some_architectures_only(tmp_path: Path) -> None:
    found = report(write(tmp_path / "adapter"), "ollama", make_base(tmp_path / "base", "cohere"))
    assert "architecture" in {v.rule for v in found.violations}


def test_no_export_is_a_remedy_of_what_cannot_be_exported(tmp_path: Path) -> None:
    def spoil(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        config["use_rslora"] = True
        next(iter(tensors.values()))[0, 0] = torch.nan

    def of(path: Path) -> tuple[list[str], list[str]]:
        heard = Heard()
        found = lint_adapter(path, progress=heard)
        return [v.remedy for server in found.servers for v in server.violations], heard.warnings

    def scale(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        config["use_rslora"] = True

    remedies, warnings = of(write(tmp_path / "good", scale))
    assert not warnings and any("loracat export" in remedy for remedy in remedies)
    spoilt, warnings = of(write(tmp_path / "spoilt", spoil))
    assert len(warnings) == 1 and "loracat itself does not take" in warnings[0] and "not a number" in warnings[0]
    assert len(spoilt) == len(remedies) and not any("loracat export" in remedy for remedy in spoilt)
    assert any("cannot write it again" in remedy for remedy in spoilt)


@pytest.mark.parametrize(("name", "rule"), [("other.safetensors", "one-file"), ("added_tokens.json", "added-tokens")])
def test_files_beside_the_adapter_disturb_sglang(tmp_path: Path, name: str, rule: str) -> None:
    path = write(tmp_path / "adapter")
    (path / name).write_bytes(b"{}")
    assert [v.rule for v in report(path, "sglang").violations] == [rule]


# What loracat writes


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters that several servers misread, and what every profile makes of them."""
    folder = tmp_path_factory.mktemp("exports")
    base = make_base(folder / "base")
    make_adapter(folder / "one", base, use_rslora=True, rank=6)
    make_adapter(folder / "two", base, rank=8, rank_pattern={"v_proj": 3}, layers_to_transform=[0, 2])
    for profile in ("portable", "peft", "mlx"):
        adapters = [str(folder / "one"), str(folder / "two")]
        out = folder / profile
        export_adapter(
            ExportRequest(method="sum", adapters=adapters, base=str(base), profile=profile, gguf=profile == "portable"),
            out,
        )
    return folder


def test_a_portable_export_is_taken_by_all_that_read_peft_and_as_gguf(exports: Path) -> None:
    found = lint_adapter(exports / "portable", base=str(exports / "base"))
    assert {server.id for server in found.servers} == set(_SERVERS) - {"mlx"}
    assert found.taken
    commands = {server.id: server.serve for server in found.servers}
    assert commands["llamacpp"] == (f"llama-server -m BASE.gguf --lora {exports}/portable/adapter.gguf",)
    assert f"{exports}/portable/adapter.gguf" in commands["ollama"][0]


def test_a_gguf_that_the_certificate_does_not_know_is_not_trusted(exports: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "adapter")
    (path / "adapter.gguf").write_bytes(b"GGUF")
    assert report(path, "llamacpp").serve[0].startswith("python convert_lora_to_gguf.py")
    (path / "loracat.json").write_bytes((exports / "portable" / "loracat.json").read_bytes())
    assert report(path, "llamacpp").serve[0].startswith("python convert_lora_to_gguf.py")


def test_a_peft_export_is_for_peft_and_vllm(exports: Path) -> None:
    found = lint_adapter(exports / "peft", base=str(exports / "base"))
    assert {s.id for s in found.servers if s.verdict == "takes"} == {"peft", "vllm"}


# PEFT looks for the keys of patterns among modules alone, and says so even where it has used them for a parameter.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
def test_experts_are_for_peft_and_with_a_doubt_for_vllm(tmp_path: Path) -> None:
    base = make_base(tmp_path / "mixtral", "mixtral")
    parameters = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    more = {"rank_pattern": {"down_proj": 6}, "alpha_pattern": {"down_proj": 12}}
    path = make_adapter(tmp_path / "a", base, targets=(), parameters=parameters, **more)
    found = lint_adapter(path, base=str(base))
    assert found.rank == 6, "of an expert, not the rows of all"
    verdicts = {server.id: server.verdict for server in found.servers}
    assert verdicts == {"peft": "takes", "vllm": "takes", "sglang": "refuses", "llamacpp": "refuses",
                        "tgi": "differs", "ollama": "refuses"}  # fmt: skip
    unclear = next(server.unclear for server in found.servers if server.id == "vllm")
    assert any("is_3d_moe_weight" in doubt for doubt in unclear)


def test_an_mlx_export_is_for_mlx(exports: Path) -> None:
    found = lint_adapter(exports / "mlx", base=str(exports / "base"))
    assert [(server.id, server.verdict) for server in found.servers] == [("mlx", "takes")]
    [violation] = report(exports / "mlx", "vllm").violations
    assert (violation.rule, violation.severity) == ("layout", "refused")


def test_the_remedy_of_a_misread_adapter_makes_one_that_is_taken(
    exports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(exports)
    [violation] = [v for v in report(Path("one"), "sglang").violations if v.rule == "scaling"]
    done = run(*shlex.split(violation.remedy.partition(": loracat ")[2]))
    assert done.exit_code == 0, done.stderr
    assert report(exports / "one-portable", "sglang", exports / "base").verdict == "takes"


# The command


def test_the_command_ends_with_0_or_3_and_prints_one_document(tmp_path: Path, tiny_base: Path) -> None:
    path = write(tmp_path / "adapter", RSLORA)
    good = run("lint", str(path), "--for", "vllm,peft", "--base", str(tiny_base))
    assert good.exit_code == 0
    assert "vLLM (>=0.33) takes it" in good.stdout and "\n  vllm serve" in good.stdout
    bad = run("lint", str(path), "--for", "vllm,sglang", "--json")
    assert bad.exit_code == 3
    document = json.loads(bad.stdout)
    assert (document["layout"], document["taken"]) == ("peft", False)
    assert [server["verdict"] for server in document["servers"]] == ["takes", "differs"]
    violation = document["servers"][1]["violations"][0]
    assert (violation["rule"], violation["severity"], violation["count"]) == ("scaling", "misread", 6)
    assert "0.5.23" in violation["source"]
    quiet = run("lint", str(path), "--for", "vllm,sglang", "--quiet")
    assert quiet.stdout == "vllm takes\nsglang differs\n"


def test_adapters_that_loracat_refuses_are_looked_at(tmp_path: Path, tiny_base: Path) -> None:
    path = make_adapter(tmp_path / "dora", tiny_base, use_dora=True)
    found = run("lint", str(path), "--for", "vllm")
    assert found.exit_code == 3
    assert "refused  dora: the field use_dora is true" in found.stdout


def test_no_such_server_or_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--for triton"):
        lint_adapter(write(tmp_path / "adapter"), servers=["triton"])
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(AdapterNotFound):
            lint_adapter(path)


# Adapters that mean harm


def test_nothing_of_a_stranger_comes_unquoted_into_a_command(tmp_path: Path) -> None:
    path = write(tmp_path / "a b; $(touch x)'", setting(base_model_name_or_path="x; rm -rf /"))
    for server in lint_adapter(path).servers:
        for command in (*server.serve, *(v.remedy for v in server.violations)):
            assert "rm -rf" not in command
            if server.id != "peft":
                assert any(str(path) in word for word in shlex.split(command)) or str(path) not in command
                assert all(not word.startswith("$(") for word in shlex.split(command))


def test_a_pattern_of_a_stranger_is_not_run(tmp_path: Path) -> None:  # it would run for ages
    evil = "([a-z_.0-9]+)+!"
    path = write(tmp_path / "adapter", setting(rank_pattern={evil: 4}, alpha_pattern={evil: 1}, target_modules=evil))
    found = report(path, "peft")
    assert {line.partition(":")[0] for line in found.unclear} >= {"ranks", "targets"}


@pytest.mark.parametrize(("named", "shown"), [("org/name", "org/name"), ("org/-rf", "BASE"), ("org/name.git", "BASE")])
def test_only_a_name_that_the_hub_can_have_stands_in_a_command(tmp_path: Path, named: str, shown: str) -> None:
    [command] = report(write(tmp_path / "adapter", setting(base_model_name_or_path=named)), "sglang").serve
    assert shlex.split(command)[4] == shown


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = write(tmp_path / "adapter", adding({"base_model.model.\x1b[31mevil": torch.ones(2, 2)}, bias="\x1b[0m"))
    assert run("lint", str(path)).exit_code == 3  # run() looks for escapes


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "adapter_config.json").write_text("[]"),
        lambda path: (path / "adapter_config.json").write_text('{"r": 1, "r": 2}'),
        lambda path: (path / "adapter_config.json").write_text('{"x": "' + "x" * (1 << 20) + '"}'),
        lambda path: (path / "adapter_config.json").write_text('{"x": ' + "[" * 5000 + "]" * 5000 + "}"),
        lambda path: (path / "adapter_model.safetensors").write_bytes(b"\xff" * 8 + b"{}"),
        lambda path: (path / "adapter_model.safetensors").write_bytes(b""),
        lambda path: os.truncate(
            path / "adapter_model.safetensors", (path / "adapter_model.safetensors").stat().st_size - 1
        ),
        lambda path: (path / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]"),
        lambda path: (path / "adapter_model.safetensors").write_bytes(
            (len(b'{"x":{"dtype":"F32","shape":[-1]}}')).to_bytes(8, "little") + b'{"x":{"dtype":"F32","shape":[-1]}}'
        ),
    ],
)
def test_damaged_files_are_rejected(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    path = write(tmp_path / "adapter")
    damage(path)
    with pytest.raises(MalformedAdapter):
        lint_adapter(path)


@pytest.mark.parametrize("field", ["data_offsets", "shape", "dtype"])
def test_a_file_that_the_safetensors_library_does_not_open_is_rejected(tmp_path: Path, field: str) -> None:
    path = write(tmp_path / "adapter")
    file = path / "adapter_model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first, second = sorted(header.keys() - {"__metadata__"})[:2]
    header[first][field] = {**header[second], "shape": [8, 33], "dtype": "F32x"}[field]  # its data twice
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(SafetensorError):
        load_file(file)
    with pytest.raises(MalformedAdapter, match="cannot be read"):
        lint_adapter(path)


@pytest.mark.parametrize("server", ["peft", "vllm", "llamacpp"])
@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (((0,), (0,)), r"has the shape \[0\] and no values"),
        (((0, 32), (32, 0)), r"has the shape \[0, 32\] and no values"),
        (((128,), (128,)), r"has the shape \[128\] and is not a matrix"),
    ],
    ids=["zero-3", "rank 0", "fsdp"],
)
def test_factors_that_no_program_loads_are_refused_for_what_they_are(
    tmp_path: Path, tiny_base: Path, server: str, shapes: tuple[tuple[int, ...], ...], said: str
) -> None:
    """Stock PEFT raises for each of them too."""
    name = f"{LAYER}.1.self_attn.q_proj.lora_"
    spoilt = {f"{name}{side}.weight": torch.ones(shape) for side, shape in zip("AB", shapes, strict=True)}
    path = write(tmp_path / "adapter", adding(spoilt, rank_pattern={"layers.1.self_attn.q_proj": shapes[0][0]}))
    with pytest.raises(MalformedAdapter, match=said) as caught:
        lint_adapter(path, servers=[server])
    assert "gather" in str(caught.value.hint)
    with pytest.raises((ValueError, RuntimeError)):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), path)


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    path = write(tmp_path / "adapter")
    (path / "adapter_config.json").unlink()
    os.mkfifo(path / "adapter_config.json")
    with pytest.raises(MalformedAdapter):
        lint_adapter(path)


@pytest.mark.parametrize(
    "config",
    [
        {key: value for key in CONFIG}
        for value in (None, True, -1, 1.5, 10**400, "text", [], [1, None], {}, {"a": {"b": []}}, [["x"]])
    ],
)
def test_nonsense_in_every_field_is_a_report_and_no_crash(
    tmp_path: Path, tiny_base: Path, config: dict[str, Any]
) -> None:
    nonsense = {**config, "rank_pattern": config["r"], "alpha_pattern": {"q_proj": config["r"]}}
    path = write(tmp_path / "adapter", lambda c, t: (c.clear(), c.update(nonsense)))
    lint_adapter(path, base=str(tiny_base))
    mlx = write(tmp_path / "mlx", lambda c, t: (c.clear(), c.update(lora_parameters=config["r"])), mlx=True)
    lint_adapter(mlx, base=str(tiny_base))


def spelt(peft: Path, folder: Path, before: str, after: str) -> Path:
    shutil.copytree(peft, folder)
    tensors = {n.replace(before, after): t for n, t in load_file(folder / "adapter_model.safetensors").items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_names_that_peft_translates_are_no_violation_for_it(tmp_path: Path) -> None:
    """Gemma 3 as transformers before 4.52 had it; a server without these tables has no such module."""
    base = make_base(tmp_path / "base", "gemma3-vision")
    new = make_adapter(tmp_path / "new", base, targets=r".*language_model.*\.(q_proj|v_proj)")
    old = spelt(new, tmp_path / "old", "model.model.language_model.", "model.language_model.model.")
    assert report(old, "peft", base).verdict == report(new, "peft", base).verdict == "takes"
    assert {v.rule for v in report(old, "llamacpp", base).violations} >= {"base"}
    wrong = spelt(new, tmp_path / "wrong", "model.model.language_model.", "model.language_model.decoder.")
    assert report(wrong, "peft", base).verdict == "refuses"


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
def test_layers_of_experts_and_routers_are_held_against_a_base_that_has_parameters(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "mixtral")
    parts = {"w1": (48, 32), "w3": (48, 32), "w2": (32, 48)}
    whole = report(expert_layers(tmp_path / "whole", parts, "block_sparse_moe.experts"), "peft", base)
    assert whole.verdict == "takes" and any("become the parameters of a Mixtral" in doubt for doubt in whole.unclear)
    some = report(expert_layers(tmp_path / "some", parts, "block_sparse_moe.experts", experts=(0, 2)), "peft", base)
    assert some.verdict == "refuses"
    assert "experts.gate_up_proj is made of 8 layers of experts, and 4 are there" in str(some.violations)
    router = make_adapter(tmp_path / "router", base, parameters=("mlp.gate.weight",), rank_pattern={"gate.weight": 2})
    assert report(router, "peft", base).verdict == "takes"
    for server in ("vllm", "llamacpp"):
        assert any("puts LoRA on model.layers.0.mlp.gate" in doubt for doubt in report(router, server, base).unclear)


@pytest.mark.parametrize(("server", "rule", "change"), [one for one in BROKEN if one[1] in ("values", "features")])
def test_a_value_is_refused_where_stock_peft_fails_or_lacks_tensors(
    tmp_path: Path, tiny_base: Path, server: str, rule: str, change: Change
) -> None:
    path, base = write(tmp_path / "a", change), AutoModelForCausalLM.from_pretrained(tiny_base)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            PeftModel.from_pretrained(base, path)
        except Exception:  # which one differs by the field
            return
    assert any("missing adapter keys" in str(warning.message) for warning in said)


@pytest.mark.parametrize("value", [True, False, "Gaussian", "OLoRA", "eva", "orthogonal", "pissa", "MiCA"])
def test_initialisations_that_stock_peft_knows_are_values(tmp_path: Path, tiny_base: Path, value: object) -> None:
    path = write(tmp_path / "a", setting(init_lora_weights=value))
    assert "values" not in [one.rule for one in report(path, "peft").violations]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # eva without its own config
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), path)


TASKS_OF: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "SEQ_CLS": ("BertForSequenceClassification", {"num_hidden_layers": 1, "num_attention_heads": 2}, ["dense"]),
    "SEQ_2_SEQ_LM": (
        "T5ForConditionalGeneration",
        {"num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 32},
        ["q", "wo"],
    ),
}


@pytest.mark.parametrize("task", TASKS_OF)
def test_the_base_is_that_of_the_adapters_task(tmp_path: Path, task: str) -> None:
    name, size, targets = TASKS_OF[task]
    found = getattr(transformers, name)
    size = size | ({"d_model": 16} if "d_kv" in size else {"hidden_size": 16, "intermediate_size": 32})
    found._from_config(found.config_class(vocab_size=20, **size)).save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=targets, task_type=task, init_lora_weights=False)
    get_peft_model(found.from_pretrained(tmp_path / "base"), config).save_pretrained(tmp_path / "a")
    assert report(tmp_path / "a", "peft", tmp_path / "base").violations == ()


def test_replicated_layers_and_positions_of_another_class_are_in_the_base(tmp_path: Path, tiny_base: Path) -> None:
    path = make_adapter(tmp_path / "replicated", tiny_base, layer_replication=[[0, 2], [1, 3]])
    assert any(".3." in name for name in load_file(path / "adapter_model.safetensors"))
    assert report(path, "peft", tiny_base).violations == ()
    small: dict[str, Any] = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_attention_heads": 2}
    config = transformers.OPTConfig(vocab_size=20, num_hidden_layers=1, max_position_embeddings=8, **small)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "opt")
    path = make_adapter(tmp_path / "positions", tmp_path / "opt", targets=("embed_positions", "q_proj"))
    assert report(path, "peft", tmp_path / "opt").violations == ()
