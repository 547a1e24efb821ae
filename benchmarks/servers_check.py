"""Holds the rules of `loracat lint` against the servers' own code, as far as it runs without a GPU.

    pip download --no-deps vllm==0.33.0 sglang==0.5.23 && unzip each wheel into a folder of its own
    python benchmarks/servers_check.py VLLM_DIR SGLANG_DIR [--mlx PYTHON]

Adapters that keep a rule and adapters that break one are given to vLLM's PEFTHelper and LoRAModel and to SGLang's
LoRAConfig, LoRAAdapter and `validate_new_adapter`, out of the wheels, with stand-ins for what they import and do not
need here. What they load is compared with the weights that stock PEFT makes of the same adapter, or of what it was
before it was damaged; PEFT has rows of its own. A row agrees if lint says what is seen: takes, differs or refuses.
With --mlx, a Python that has mlx-lm, mlx-lm loads the export of profile mlx, and its logits are compared with those of
PEFT on the portable one.

Restated and not run: that SGLang copies a tensor only into a buffer of its shape, and how vLLM names a model's modules.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.made_inputs import LINEAR, TINY, write_peft_adapter, write_tiny_base
from benchmarks.measuring import BenchmarkParser, left_out
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.serving.lint import lint_adapter, load_server

LAYERS = 3
HEADS, KV_HEADS, HEAD = TINY["num_attention_heads"], TINY["num_key_value_heads"], TINY["head_dim"]
TOLERANCE = 1e-5


# Adapters


def make_base(folder: Path) -> Path:
    return write_tiny_base(folder, num_hidden_layers=LAYERS, tie_word_embeddings=False, pad_token_id=None)


def make_adapter(
    folder: Path, base: Path, *, targets: Sequence[str] | str = ("q_proj", "v_proj"), **options: Any
) -> Path:
    settings = {"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM", **options}
    return write_peft_adapter(folder, base, targets=targets, seed=1, **settings)


def edited(source: Path, folder: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> Path:
    """A copy with another config or other tensors."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def renamed(tensors: dict[str, Tensor], old: str, new: str) -> None:
    for name in list(tensors):
        tensors[name.replace(old, new)] = tensors.pop(name)


def without(tensors: dict[str, Tensor], part: str) -> None:
    for name in [name for name in tensors if part in name]:
        del tensors[name]


def make_cases(folder: Path, base: Path) -> dict[str, Path]:
    """Adapters by what is special about them."""
    made = {
        "plain": make_adapter(folder / "plain", base),
        "all linear layers": make_adapter(folder / "linear", base, targets=LINEAR),
        "ranks and alphas of their own": make_adapter(
            folder / "patterns",
            base,
            targets=("q_proj", "v_proj", "down_proj"),
            rank_pattern={"v_proj": 4},
            alpha_pattern={"model.layers.1.self_attn.q_proj": 5},
        ),
        "alpha of one module": make_adapter(folder / "alphas", base, alpha_pattern={"v_proj": 4}),
        "rsLoRA": make_adapter(folder / "rslora", base, use_rslora=True),
        "DoRA": make_adapter(folder / "dora", base, use_dora=True),
        "lora_bias": make_adapter(folder / "bias", base, lora_bias=True),
        "a whole module": make_adapter(folder / "whole", base, modules_to_save=["lm_head"]),
        "PiSSA": make_adapter(folder / "pissa", base, init_lora_weights="pissa"),
        "gaussian initialisation": make_adapter(folder / "gauss", base, init_lora_weights="gaussian"),
        "targets by a pattern": make_adapter(folder / "regex", base, targets=r".*\.(q|v)_proj"),
        "q without v": make_adapter(folder / "q", base, targets=("q_proj",)),
        "v without q": make_adapter(folder / "v", base, targets=("v_proj",)),
        "k alone": make_adapter(folder / "k", base, targets=("k_proj",)),
        "up without gate": make_adapter(folder / "up", base, targets=("up_proj",)),
        "gate without up": make_adapter(folder / "gate", base, targets=("gate_proj",)),
        "one layer only": make_adapter(folder / "layer", base, layers_to_transform=[1]),
        "head": make_adapter(folder / "head", base, targets=("q_proj", "v_proj", "lm_head")),
        "embedding": make_adapter(folder / "embedding", base, targets=("q_proj", "v_proj", "embed_tokens")),
        "rank 600": make_adapter(folder / "rank", base, r=600, lora_alpha=600),
        "bfloat16": edited(
            folder / "plain",
            folder / "bf16",
            lambda c, t: t.update({name: tensor.bfloat16() for name, tensor in t.items()}),
        ),
        "no lora_alpha": edited(folder / "plain", folder / "noalpha", lambda c, t: c.pop("lora_alpha")),
        "no peft_type": edited(folder / "plain", folder / "notype", lambda c, t: c.pop("peft_type")),
        "r of 0": edited(folder / "plain", folder / "r0", lambda c, t: c.update(r=0)),
        "aLoRA": edited(folder / "plain", folder / "alora", lambda c, t: c.update(alora_invocation_tokens=[5, 6])),
        "trained biases": edited(folder / "plain", folder / "biases", lambda c, t: c.update(bias="all")),
        "adapter's name in the names": edited(
            folder / "plain", folder / "default", lambda c, t: renamed(t, ".weight", ".default.weight")
        ),
        "no prefix": edited(folder / "plain", folder / "prefix", lambda c, t: renamed(t, "base_model.model.", "")),
        "a norm beside the factors": edited(
            folder / "plain",
            folder / "norm",
            lambda c, t: t.update({"base_model.model.model.norm.weight": torch.full((32,), 2.0)}),
        ),
        "no lora_B": edited(
            folder / "plain", folder / "half", lambda c, t: without(t, "layers.1.self_attn.v_proj.lora_B")
        ),
        "other rank than r": edited(folder / "plain", folder / "r16", lambda c, t: c.update(r=16, lora_alpha=32)),
        "untargeted module": edited(
            folder / "linear", folder / "target", lambda c, t: c.update(target_modules=["q_proj", "v_proj"])
        ),
    }
    (edited(folder / "plain", folder / "tokens", lambda c, t: None) / "added_tokens.json").write_text('{"<x>": 64}')
    made["added tokens"] = folder / "tokens"
    made["two tensor files"] = edited(folder / "plain", folder / "two", lambda c, t: None)
    other = {name: 2 * tensor for name, tensor in load_file(folder / "plain" / "adapter_model.safetensors").items()}
    save_file(other, folder / "two" / "backup.safetensors")
    sources = [str(made["ranks and alphas of their own"]), str(made["rsLoRA"])]
    for profile in ("portable", "peft"):
        path = folder / f"export-{profile}"
        export_adapter(ExportRequest(method="sum", adapters=sources, base=str(base), profile=profile), path)
        made[f"our export, {profile}"] = path
    for dtype in ("float32", "bfloat16"):
        path = folder / f"export-merged-{dtype}"
        export_adapter(
            ExportRequest(method="sum", adapters=sources, base=str(base), merge=True, rank=8, dtype=dtype), path
        )
        made[f"our export, compressed, {dtype}"] = path
    return made


# Damaged adapters: what they were before is what they mean.
MEANT = {
    "no prefix": "plain",
    "no lora_B": "plain",
    "adapter's name in the names": "plain",
    "untargeted module": "all linear layers",
}


class Unmergeable(Exception):
    """Raised if an adapter loads and is no change of weights."""


def peft_change(base: Path, adapter: Path) -> dict[str, Tensor]:
    """What stock PEFT adds to every parameter of the base, where it adds anything."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    before = {name: tensor.double().clone() for name, tensor in model.state_dict().items()}
    loaded = PeftModel.from_pretrained(model, adapter)
    try:
        merged = loaded.merge_and_unload()
    except Exception as error:
        raise Unmergeable from error
    change = {name: tensor.double() - before.get(name, 0) for name, tensor in merged.state_dict().items()}
    return {name: delta for name, delta in change.items() if delta.abs().max() > 1e-7}


# The servers' own code


class PEFT:
    def __init__(self, base: Path) -> None:
        self.base = base

    def change(self, adapter: Path) -> dict[str, Tensor]:
        return peft_change(self.base, adapter)


def definitions(path: Path, names: list[str], scope: dict[str, Any], *, of_class: str | None = None) -> dict[str, Any]:
    """Functions and assignments of a file, run without the rest of it."""
    body = ast.parse(path.read_text()).body
    if of_class is not None:
        body = next(node.body for node in body if isinstance(node, ast.ClassDef) and node.name == of_class)
    wanted = []
    for node in body:
        found = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = [target.id for target in targets if isinstance(target, ast.Name)]
        if set(found) & set(names):
            wanted.append(node)
    module = ast.Module(body=wanted, type_ignores=[])
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module(body=future + module.body, type_ignores=[]), str(path), "exec"), scope)
    return scope


def stand_in(name: str, **content: Any) -> None:
    """A module of a name, and its packages."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        package = sys.modules.setdefault(".".join(parts[:depth]), types.ModuleType(".".join(parts[:depth])))
        package.__path__ = []
    module = types.ModuleType(name)
    module.__dict__.update(content)
    sys.modules[name] = module


def load(name: str, path: Path) -> Any:
    """A file as a module of a name, so that its own imports find it."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Silent:
    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class VLLM:
    """PEFTHelper, the parser of names, LoRALayerWeights and LoRAModel of a wheel."""

    def __init__(self, folder: Path) -> None:
        lora = folder / "vllm" / "lora"
        stand_in("vllm.logger", init_logger=lambda name: Silent())
        stand_in("vllm.config.lora", LoRAConfig=object)
        stand_in("vllm.utils.torch_utils", PIN_MEMORY=False)
        stand_in("vllm.model_executor.models.utils", WeightsMapper=object, PPMissingLayer=type("Missing", (), {}))
        names = ["parse_fine_tuned_lora_name", "is_base_embedding_weights", "get_lora_id", "_GLOBAL_LORA_ID"]
        stand_in("vllm.lora.utils", **definitions(lora / "utils.py", names, {}))
        self.helper = load("vllm.lora.peft_helper", lora / "peft_helper.py").PEFTHelper
        load("vllm.lora.lora_weights", lora / "lora_weights.py")
        self.model = load("vllm.lora.lora_model", lora / "lora_model.py").LoRAModel
        scope: dict[str, Any] = {"Literal": __import__("typing").Literal}
        allowed = definitions(folder / "vllm" / "config" / "lora.py", ["MaxLoRARanks"], scope)["MaxLoRARanks"]
        self.ranks: tuple[int, ...] = allowed.__args__

    def change(self, adapter: Path) -> dict[str, Tensor]:
        """What it adds to every weight; raises what it raises."""
        helper = self.helper.from_local_dir(str(adapter), None)
        helper.validate_legal(types.SimpleNamespace(max_lora_rank=max(self.ranks)))
        known = {*LINEAR, "lm_head", "embed_tokens"}
        model = self.model.from_local_checkpoint(
            str(adapter), known, peft_helper=helper, device="cpu", dtype=torch.float32, model_vocab_size=64
        )
        found = {}
        for name, weights in model.loras.items():
            weights.optimize()
            where = name if name.startswith(("model.", "lm_head")) else None  # elsewhere the model has no module
            if where is not None:
                delta = weights.lora_b.double() @ weights.lora_a.double()
                found[f"{name}.weight"] = delta.T if name.endswith("embed_tokens") else delta
        return found


class SGLang:
    """LoRAConfig, LoRAAdapter, validate_new_adapter and the normalisation of names of a wheel."""

    def __init__(self, folder: Path) -> None:
        srt = folder / "sglang" / "srt"
        anything = type("Anything", (), {})
        scope: dict[str, Any] = {"re": re, "torch": torch, "Optional": object, "logger": Silent()}
        layers = (
            definitions(srt / "layers" / "utils" / "common.py", ["get_layer_id"], dict(scope))
            if (srt / "layers" / "utils" / "common.py").exists()
            else definitions(srt / "layers" / "utils.py", ["get_layer_id"], dict(scope))
        )
        stand_in("sglang.srt.configs.load_config", LoadConfig=anything)
        stand_in("sglang.srt.layers.utils", get_layer_id=layers["get_layer_id"])
        stand_in("sglang.srt.lora.backend.base_backend", BaseLoRABackend=anything)
        stand_in("sglang.srt.model_loader.loader", DefaultModelLoader=anything)
        stand_in("sglang.srt.utils.hf_transformers_utils", AutoConfig=anything)
        names = ["get_normalized_target_modules", "get_target_module_name", "get_stacked_multiply"]
        self.names = definitions(srt / "lora" / "utils.py", names, dict(scope))
        stand_in("sglang.srt.lora.utils", **{name: self.names[name] for name in names})
        self.config = load("sglang.srt.lora.lora_config", srt / "lora" / "lora_config.py").LoRAConfig
        self.adapter = load("sglang.srt.lora.lora", srt / "lora" / "lora.py").LoRAAdapter
        manager = definitions(
            srt / "lora" / "lora_manager.py", ["validate_new_adapter"], dict(scope), of_class="LoRAManager"
        )
        self.validate = manager["validate_new_adapter"]

    def change(self, adapter: Path) -> dict[str, Tensor]:
        """What it adds to every weight; raises what it raises."""
        base = types.SimpleNamespace(
            num_hidden_layers=LAYERS, vocab_size=64, architectures=["LlamaForCausalLM"], model_type="llama"
        )
        config = self.config(str(adapter), base_vocab_size=base.vocab_size)
        targets = self.names["get_normalized_target_modules"](config.target_modules)
        server = types.SimpleNamespace(
            attn_dp_enabled=False, lora_refs={}, num_pinned_loras=0, max_loras_per_batch=8, memory_pool=None
        )
        reference = types.SimpleNamespace(lora_name="x", lora_path=str(adapter), pinned=False)
        self.validate(server, config, reference)
        loaded = self.adapter("x", config, base, None, None)
        for file in sorted(adapter.glob("*.safetensors")):  # DefaultModelLoader takes all of them
            for name, tensor in load_file(file).items():
                loaded._process_weight(name, tensor)
        loaded._normalize_weights()
        found: dict[str, Tensor] = {}
        for layer in loaded.layers:
            self._take(layer.weights, targets, config.r, loaded.scaling, found)
        self._take(loaded.embedding_layers, targets, config.r, loaded.scaling, found)
        return found

    def _take(self, weights: Any, targets: Any, rank: int, scaling: float, found: dict[str, Tensor]) -> None:
        buffers: dict[tuple[str, str], Tensor] = {}
        for name, tensor in weights.items():
            try:
                target = self.names["get_target_module_name"](name, targets)
            except ValueError:
                continue  # skipped with a warning
            module = name.removeprefix("base_model.model.").partition(".lora_")[0]
            side = "A" if "lora_A" in name or "lora_embedding_A" in name else "B"
            rows = rank * self.names["get_stacked_multiply"](target)
            if (tensor.shape[0] if side == "A" else tensor.shape[-1]) != (rows if side == "A" else rank):
                raise AssertionError(f"LoRA buffer does not match weight shape {tuple(tensor.shape)}")
            buffers[module, side] = tensor.double()
        parts = {
            "qkv_proj": (("q_proj", HEADS * HEAD), ("k_proj", KV_HEADS * HEAD), ("v_proj", KV_HEADS * HEAD)),
            "gate_up_proj": (("gate_proj", 48), ("up_proj", 48)),
        }
        for (module, side), lora_a in buffers.items():
            if side != "A":
                continue
            lora_b = buffers[module, "B"]
            last = module.rpartition(".")[2]
            if last not in parts:
                delta = scaling * lora_b @ lora_a
                found[f"{module}.weight"] = delta.T if last == "embed_tokens" else delta
                continue
            sizes = [size for _, size in parts[last]]
            if sum(sizes) != lora_b.shape[0]:  # k was zeros of v's shape: the same, with grouped queries
                raise AssertionError(f"{last} has {lora_b.shape[0]} rows")
            for index, (name, piece) in enumerate(zip([n for n, _ in parts[last]], lora_b.split(sizes), strict=True)):
                block = lora_a[index * rank : (index + 1) * rank]
                found[f"{module.removesuffix(last)}{name}.weight"] = scaling * piece @ block


# The table


@dataclass(frozen=True)
class Row:
    case: str
    server: str
    rules: str
    ours: str
    theirs: str
    detail: str

    @property
    def agree(self) -> bool:
        return self.ours == self.theirs or (self.theirs == "loads" and self.ours != "refuses")


def theirs(server: Any, adapter: Path, right: dict[str, Tensor] | None) -> tuple[str, str]:
    """What a server does: refuses, takes, or takes it for something else than PEFT."""
    try:
        found = server.change(adapter)
    except Unmergeable:
        return "loads", "it is no change of weights"
    except Exception as error:
        return "refuses", f"{type(error).__name__}: {str(error).splitlines()[0][:60] if str(error) else ''}"
    if right is None:
        return "loads", "PEFT makes no weights of it to compare with"
    worst = 0.0
    for name in right.keys() | found.keys():
        expected, seen = right.get(name), found.get(name)
        size = float((expected if expected is not None else seen).norm())  # type: ignore[union-attr]
        difference = (expected if expected is not None else 0) - (seen if seen is not None else 0)
        worst = max(worst, float(torch.as_tensor(difference).norm()) / size if size else 0.0)
    same = worst < TOLERANCE
    return ("takes" if same else "differs"), f"relative difference {worst:.1e}"


def rows(cases: dict[str, Path], base: Path, servers: dict[str, Any]) -> list[Row]:
    result = []
    for case, adapter in cases.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                right = peft_change(base, cases[MEANT.get(case, case)])
            except Exception:
                right = None
        for name, server in servers.items():
            [report] = lint_adapter(adapter, servers=[name], base=str(base)).servers
            broken = ", ".join(v.rule for v in report.violations if v.severity != "slow") or "none"
            seen, detail = theirs(server, adapter, right)
            result.append(Row(case, report.name, broken, report.verdict, seen, detail))
    return result


MLX = """
import json, sys
from pathlib import Path
import mlx.core as mx
from mlx_lm.utils import load_model
from mlx_lm.tuner.utils import load_adapters
base, adapter = map(Path, sys.argv[1:])
model, _ = load_model(base)
ids = mx.array([json.loads(sys.stdin.read())])
before = model(ids).tolist()
print(json.dumps([before, load_adapters(model, str(adapter))(ids).tolist()]))
"""


def mlx_row(python: str, folder: Path, base: Path, sources: list[str]) -> str:
    """Logits of mlx-lm with an export of profile mlx beside those of PEFT with a portable one."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = [3, 17, 40, 8, 61, 22]
    for profile in ("mlx", "portable"):
        export_adapter(
            ExportRequest(method="sum", adapters=sources, base=str(base), profile=profile),
            folder / f"for-mlx-{profile}",
        )
    words = [python, "-c", MLX, str(base), str(folder / "for-mlx-mlx")]
    done = subprocess.run(words, input=json.dumps(ids), capture_output=True, text=True, check=True)
    before, after = (torch.tensor(values) for values in json.loads(done.stdout.splitlines()[-1]))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "for-mlx-portable").eval()
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids])).logits
    moved = float((after - before).abs().max())
    assert math.isfinite(moved) and moved > 1e-3
    return (
        f"mlx-lm: the adapter moves a logit by up to {moved:.3f}; from PEFT's logits it is "
        f"{float((after - wanted).abs().max()):.1e} away"
    )


def main() -> int:
    parser = BenchmarkParser(__doc__)
    parser.add_argument("vllm", type=Path, quick=None, help="an unpacked wheel of vLLM")
    parser.add_argument("sglang", type=Path, quick=None, help="an unpacked wheel of SGLang")
    parser.add_argument("--mlx", metavar="PYTHON", help="a Python that has mlx-lm")
    arguments = parser.parse_args()
    servers: dict[str, Any] = {}
    for name, server, wheel in (("vllm", VLLM, arguments.vllm), ("sglang", SGLang, arguments.sglang)):
        if wheel is None:
            left_out(f"{name}, as no unpacked wheel of it was given")
        else:
            servers[name] = server(wheel)
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(place)
        base = make_base(folder / "base")
        servers["peft"] = PEFT(base)
        cases = make_cases(folder, base)
        found = rows(cases, base, servers)
        print("| adapter | server | rules that lint says it breaks | ours | theirs | what they do | agree |")
        print("|---|---|---|---|---|---|---|")
        for row in found:
            agree = "yes" if row.agree else "NO"
            detail = row.detail.replace("|", "/")
            print(f"| {row.case} | {row.server} | {row.rules} | {row.ours} | {row.theirs} | {detail} | {agree} |")
        ranks = "vllm" not in servers or servers["vllm"].ranks == load_server("vllm").ranks
        said = f"; vLLM's ranks are ours: {ranks}" if "vllm" in servers else ""
        print(f"\n{sum(row.agree for row in found)} of {len(found)} rows agree{said}")
        if arguments.mlx:
            sources = [str(cases["ranks and alphas of their own"]), str(cases["rsLoRA"])]
            print(mlx_row(arguments.mlx, folder, base, sources))
    return 0 if ranks and all(row.agree for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
