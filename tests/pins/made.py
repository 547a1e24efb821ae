"""Makes everything that is pinned, through the command line alone, in a folder of its own.

    python -m tests.pins.made FOLDER

writes `pins.json` and a text for each thing into FOLDER. It is run as a process of its own, so that nothing of the
tests around it (threads, seeds, variables) comes in. All weights of bases and adapters are small fractions from an
integer generator: the same bytes on every processor. Text says what only a run knows in fixed words: the version of
loracat, the speed, free memory, and the digests of texts that hold such words.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import struct
import sys
import tempfile
import warnings
from collections.abc import Iterable
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import huggingface_hub.constants
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import loracli
from loracli.cli import app
from loracli.demo.run import DemoResult, DemoRow
from loracli.recipe.recipe import load_recipe
from loracli.recipe.record import weights_digest
from tests.convolutions import adapt, model
from tests.mixtures import BOTH, ROUTERS
from tests.stub_hub_uploads import UploadHub
from tests.tiny import BASE_ID, make_adapter, make_base, random_records, write_jsonl

WEIGHTS = "adapter_model.safetensors"
PACKAGES = ("torch", "peft", "transformers", "safetensors", "gguf", "typer", "rich")
ENVIRONMENT = {"COLUMNS": "100", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
OF_A_RUN = (  # what only a run knows, and the word for it
    (r"over the records: about [^\n]*", "over the records: about <time>"),
    (r"(time +)at most about [^\n]*", r"\1at most about <time>"),
    (r"about \S+ \S+, with \S+ \S+ free on cpu", "<memory> on cpu"),
    (r'"(seconds|tokens_per_second|memory_bytes|free_bytes)": [\d.e+-]+', r'"\1": <measured>'),
    (rf"(?<![\w.]){re.escape(loracli.__version__)}(?![\w.])", "<version>"),
    (r'("record_sha256"): "[0-9a-f]{64}"', r'\1: "<digest of the above>"'),
    (r"on \d+ records: about [^\n]*", "on <records>: about <time>"),
    (r"http://127.0.0.1:\d+", "<hub>"),
)

FITTED = "-a a b -d calibration.jsonl --eval-data test.jsonl --base base"
FITS = {
    **{kind: f"--mixing {kind} --passes 2" for kind in ("adapter", "layer", "module", "rank", "core", "factors")},
    "auto": "--mixing auto --passes 6",
    "paper": "--paper",
    "folds": "--mixing adapter --passes 2 --cv 3",
    "metric": "--mixing adapter --passes 2 --select-by contains --max-new-tokens 4",
}
SAVED = "-a saved plain -d calibration.jsonl --eval-data test.jsonl --base base --passes 2 --modules-to-save pick:saved"
WITH_BASE = "--base base -d test.jsonl"
METHOD = "--base base --adapters a b --method"
EXPORTS = {
    "concatenated": "fixed.json",
    "concatenated-peft": "fixed.json --profile peft",
    "concatenated-mlx": "fixed.json --profile mlx",
    "concatenated-bfloat16": "fixed.json --dtype bfloat16",
    "merged": "fixed.json --merge --rank 3",
    "merged-peft": "fixed.json --merge --rank 3 --profile peft",
    "merged-mlx": "fixed.json --merge --rank 3 --profile mlx",
    "tolerance": "fixed.json --merge --tolerance 0.4 --profile peft",
    "energy": "fixed.json --merge --energy 0.8",
    "budget": "fixed.json --merge --budget 12KB",
    "activation-aware": "module.json --merge --rank 2 --activation-aware",
    "refit": "module.json --merge --rank 2 --refit --base base -d other.jsonl",
    "scored": f"module.json --merge --rank 2 {WITH_BASE}",
    "gguf": "fixed.json --gguf --base base",
    "adapter": "adapter.json",
    "rank": "rank.json",
    "core": "core.json",
    "core-merged": "core.json --merge --rank 2",
    "factors": "factors.json",
    "fitted-saved": "saved.json",
    "sum": f"{METHOD} sum",
    "uniform": f"{METHOD} uniform",
    "ties": f"{METHOD} ties --density 0.3 --merge --rank 3",
    "dare": f"{METHOD} dare --density 0.5 --seed 3 --merge --rank 3",
    "knots": f"{METHOD} knots --density 0.3 --merge --rank 3",
    "tsv": f"{METHOD} tsv --scale 0.8 --merge --rank 3",
    "task-arithmetic": f"{METHOD} task-arithmetic --fit-data other.jsonl",
    "experts": "--method sum --adapters experts-a experts-b --base mixtral",
    "experts-merged": "--method sum --adapters experts-a experts-b --base mixtral --merge --rank 2",
    "convolutions": "--method sum --adapters vision-a vision-b",
    "convolutions-merged": "--method sum --adapters vision-a vision-b --merge --rank 2",
    "conv1d": "--method sum --adapters gpt2-a gpt2-b --base gpt2",
    "lora-bias": "--method sum --base base --adapters biased a",
    "embeddings": "--method sum --base base --adapters embeddings a",
    "modules-to-save": "--method sum --base base --adapters saved plain --modules-to-save pick:saved",
}
EXACT = (  # nothing but products that are rounded once, so that the bytes are the same on every processor
    "concatenated", "concatenated-peft", "concatenated-mlx", "concatenated-bfloat16", "sum", "uniform", "experts",
    "convolutions", "conv1d", "lora-bias", "embeddings", "modules-to-save",
)  # fmt: skip
COMMANDS = {
    "fetch": "fetch ./a",
    "fetch-plan": "fetch ./a ./b --dry-run",
    "inspect": "inspect a b",
    "inspect-experts": "inspect experts-a experts-b",
    "inspect-convolutions": "inspect vision-a vision-b",
    "inspect-refused": "inspect a dora",
    "fit-plan": f"fit {FITTED} --dry-run --mixing auto --select-by exact -o new.json",
    "show": "show module.json",
    "show-auto": "show auto.json",
    "compare": f"compare module.json {WITH_BASE} --methods uniform,ties,tsv",
    "compare-guard": "compare module.json -d test.jsonl --base base --methods uniform --generate contains"
    " --max-new-tokens 4 --guard other.jsonl",
    "generate": "generate fixed.json --base base --prompt 'ab c' --max-new-tokens 6",
    "generate-directory": "generate out/embeddings --base base --prompt 'ab c' --max-new-tokens 6",
    "export-plan": "export fixed.json --dry-run -o planned",
    "fuse-plan": "fuse fixed.json --base base --dry-run",
    "fuse": "fuse fixed.json --base base -o fused --force",
    "verify": "verify out/concatenated --recipe fixed.json",
    "verify-merged": "verify out/merged --recipe fixed.json",
    "verify-ties": "verify out/ties --adapters a b",
    "verify-core": "verify out/core --recipe core.json",
    "verify-model": "verify fused --recipe fixed.json --base base",
    "lint": "lint out/merged",
    "lint-base": "lint out/experts --base mixtral",
    "report": "report module.json -o report.html --force",
    "convert": "convert dora --base base --rank 3 -o converted --force",
    "convert-pickle": "convert pickled --from-pickle -o unpickled --force",
}
FAILURES = {
    "fit-nothing": "fit",
    "fit-no-file": "fit -a a b -d missing.jsonl --base base",
    "fit-bad-line": "fit -a a b -d bad.jsonl --base base",
    "fit-taken": f"fit {FITTED} -o module.json",
    "show-no-recipe": "show missing.json",
    "show-no-recipe-at-all": "show calibration.jsonl",
    "export-no-method": "export --method tis --adapters a b",
    "export-two-rules": "export fixed.json --merge --rank 2 --tolerance 0.1",
    "export-rank-alone": "export fixed.json --rank 2",
    "export-taken": "export fixed.json -o out/merged",
    "export-refused": "export --method sum --adapters a dora",
    "export-saved": "export --method sum --adapters saved plain",
    "fuse-convolutions": "fuse --method sum --adapters vision-a vision-b -o fused-vision",
    "lint-refused": "lint dora",
    "verify-changed": "verify changed --recipe fixed.json",
    "verify-no-export": "verify a",
    "convert-plain": "convert a --base base -o never",
}


def fill(folder: Path, seed: int, size: float = 1.0) -> None:
    """Writes other weights into a safetensors file: sums of integers over a power of two, the same everywhere."""
    [path] = folder.glob("*.safetensors")
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(path)
    for name in sorted(tensors):
        tensor = tensors[name]
        drawn = torch.randint(-128, 129, (4, *tensor.shape), generator=generator).sum(0).double() / 512
        if tensor.dim() == 1 and not name.endswith("lora_B.bias"):
            drawn = 1 + drawn / 8
        tensors[name] = (size * drawn).to(tensor.dtype) if tensor.dim() > 1 else drawn.to(tensor.dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    config = folder / "adapter_config.json"
    if config.exists():  # what PEFT keeps as a set comes in any order
        fields = {k: sorted(v) if isinstance(v, list) else v for k, v in json.loads(config.read_text()).items()}
        config.write_text(json.dumps(fields, indent=2))


def ingredients() -> None:
    """Bases, adapters and data, in the current folder."""
    here = Path()
    for kind, name in (("llama", "base"), ("mixtral", "mixtral"), ("gpt2", "gpt2")):
        fill(make_base(here / name, kind), 1, 0.5)
    of_llama: dict[str, dict[str, Any]] = {
        "a": {"targets": ("q_proj", "v_proj"), "rank": 4},
        "b": {"targets": ("q_proj", "down_proj"), "rank": 2, "alpha": 6, "layers_to_transform": [0, 2]},
        "plain": {"targets": ("o_proj",), "use_rslora": True},
        "saved": {"targets": ("v_proj",), "rank": 2, "modules_to_save": ["norm"]},
        "biased": {"targets": ("q_proj",), "rank": 3, "lora_bias": True},
        "embeddings": {"targets": ("embed_tokens", "lm_head", "q_proj"), "rank": 2},
        "dora": {"targets": ("q_proj",), "rank": 2, "use_dora": True},
    }
    for seed, (name, options) in enumerate(of_llama.items(), start=2):
        fill(make_adapter(here / name, here / "base", **options), seed)
    router = f"{ROUTERS['mixtral']}.weight"
    experts: Any = {"targets": ("q_proj",), "parameters": (*BOTH, router), "rank": 2}
    fill(make_adapter(here / "experts-a", here / "mixtral", **experts), 20)
    fill(make_adapter(here / "experts-b", here / "mixtral", targets=(), parameters=BOTH[1:], rank=3, alpha=1), 21)
    for seed, name in enumerate("ab", start=30):
        conv1d: Any = {"targets": ("c_attn",), "fan_in_fan_out": True, "rank": seed - 28}
        fill(make_adapter(here / f"gpt2-{name}", here / "gpt2", **conv1d), seed)
        fill(adapt(here / f"vision-{name}", model(), r=2 * (seed - 28), lora_alpha=6), seed)
    shutil.copytree("b", "pickled")
    torch.save(load_file("pickled/adapter_model.safetensors"), "pickled/adapter_model.bin")
    Path("pickled", WEIGHTS).unlink()
    for seed, (name, count) in enumerate({"calibration": 40, "test": 24, "other": 16}.items()):
        write_jsonl(here / f"{name}.jsonl", random_records(count, seed=seed))
    Path("bad.jsonl").write_text('{"text": "a"}\n{"text": \n')


def fix_recipe() -> None:
    """fixed.json: the recipe of `module` with weights, results and versions that are the same on every processor."""

    def fixed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fixed(item) for key, item in value.items()}
        if isinstance(value, list):
            return [fixed(item) for item in value]
        return round(value, 1) if isinstance(value, float) else value

    recipe = json.loads(Path("module.json").read_text())
    recipe["fit"] |= {name: fixed(recipe["fit"][name]) for name in recipe["fit"] if name != "settings"}
    recipe["held_out"] = fixed(recipe["held_out"])
    for index, (name, weights) in enumerate(recipe["mixing"]["weights"].items()):
        recipe["mixing"]["weights"][name] = [w if w is None else (index + 3) / 8 - i for i, w in enumerate(weights)]
    recipe["mixing"]["weights_sha256"] = weights_digest(recipe["mixing"]["weights"])
    recipe["versions"] = dict.fromkeys(recipe["versions"], "1.0")
    Path("fixed.json").write_text(json.dumps(recipe, indent=2))


class Pins:
    """What was made so far.

    Attributes:
        digests: of every file of a thing, by the thing and the file.
        texts: what is shown of a thing when it differs.
        words: said for what only this run knows.
        recipes: that are pinned themselves, by their names.
        card: the lines of the first card.
    """

    def __init__(self, here: Path) -> None:
        self.digests: dict[str, dict[str, str]] = {}
        self.texts: dict[str, list[str]] = {}
        self.words: dict[str, str] = {str(here): "<here>"}
        self.recipes: list[tuple[str, Any]] = []
        self.card: set[str] = set()

    def said(self, text: str) -> str:
        for raw, word in self.words.items():
            text = text.replace(raw, word)
        for pattern, word in OF_A_RUN:
            text = re.sub(pattern, word, text)
        return text

    def add(self, thing: str, part: str, text: str, shown: str | None = None) -> None:
        """A text, of which something shorter may be shown."""
        text = self.said(text)
        self.digests.setdefault(thing, {})[part] = sha256(text.encode()).hexdigest()
        shown = text if shown is None else self.said(shown)
        shown = re.sub(r"[0-9a-f]{40,}", lambda digest: digest[0][:12], shown).rstrip()
        self.texts.setdefault(thing, []).append(f"===== {part}\n{shown}\n")

    def add_file(self, thing: str, path: Path, part: str) -> None:
        raw = path.read_bytes()
        if b"\0" in raw:
            self.digests.setdefault(thing, {})[part] = sha256(raw).hexdigest()
            lines = tensors_of(path) if path.suffix == ".safetensors" else [f"{len(raw)} bytes"]
            self.texts.setdefault(thing, []).append(f"===== {part}\n" + "".join(f"{line}\n" for line in lines))
            return
        text = raw.decode()
        if path.suffix == ".json":
            shown: str | None = self.shortened(text)
        else:  # of a card what the first one does not say
            shown = "\n".join(line for line in text.splitlines() if line not in self.card) if self.card else None
            self.card = self.card or set(text.splitlines())
        self.add(thing, part, text, shown)
        if self.said(text) != text:  # other files name its digest
            digest = sha256(raw).hexdigest()
            self.words |= {digest: f"<sha256 of {path}>", digest[:12]: f"<sha256 of {path}>"}

    def shortened(self, text: str) -> str:
        """A JSON document in which a recipe that is pinned itself is but named."""
        document = json.loads(text)
        if isinstance(document, dict) and "loracat_recipe" not in document:
            for name, recipe in self.recipes:
                if document.get("recipe") == recipe:
                    document["recipe"] = f"<that of {name}>"
        return laid_out(document)

    def run(self, thing: str, words: str, *, again: str | None = "", ok: bool = True) -> None:
        """A command with what it prints for people, and as JSON with the options that it takes to do it again."""
        for mode, more in (("", ""), (" --json", again)) if again is not None else ((" --json", ""),):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                done = CliRunner().invoke(app, shlex.split(words + more + mode), env=ENVIRONMENT)
            if done.exception is not None and not isinstance(done.exception, SystemExit):
                raise done.exception
            if ok and done.exit_code not in (0, 3):
                raise RuntimeError(f"{words}{mode} ended with {done.exit_code}: {done.stderr}{done.stdout}")
            part, errors = f"$ loracat {words}{mode}", f"exit code {done.exit_code}\n{done.stderr}-----\n"
            # Beside a document the same is said as beside the lines for people.
            shown = f"exit code {done.exit_code}\n-----\n{self.shortened(done.stdout)}" if mode else None
            self.add(thing, part, errors + done.stdout, shown)


def laid_out(value: Any, indent: str = "") -> str:
    """JSON in few lines: what fits in one stands in one, floats have four digits, long lists of objects three of them.

    The digest is that of all of it.
    """
    if isinstance(value, list) and len(value) > 4 and isinstance(value[0], dict):
        value = [*value[:3], f"and {len(value) - 3} more"]
    if isinstance(value, float):
        return f"{value:#.4g}"
    if not isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    pairs: Any = value.items() if isinstance(value, dict) else ((None, item) for item in value)
    inner = [("" if key is None else f"{json.dumps(key)}: ") + laid_out(item, f"{indent} ") for key, item in pairs]
    first, last = "{}" if isinstance(value, dict) else "[]"
    line = first + ", ".join(inner) + last
    if "\n" not in line and len(indent) + len(line) <= 118:
        return line
    return f"{first}\n" + ",\n".join(f"{indent} {item}" for item in inner) + f"\n{indent}{last}"


def tensors_of(path: Path) -> list[str]:
    """Metadata of a safetensors file, and the tensors in its order."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    metadata = header.pop("__metadata__", None)
    return [
        json.dumps(metadata),
        *(
            f"{name.removeprefix('base_model.model.')} {entry['dtype']} {entry['shape']}"
            for name, entry in header.items()
        ),
    ]


def fingerprint() -> dict[str, str]:
    """Versions, and the digest of results whose last bits differ between processors and builds of torch."""
    found: dict[str, str] = {name: version(name) for name in PACKAGES}
    for dtype in (torch.float64, torch.float32):
        drawn = torch.randint(-512, 512, (2, 48, 32), generator=torch.Generator().manual_seed(0)).to(dtype) / 256
        m, n = drawn
        results: list[Tensor] = [
            m @ n.T,
            m.exp(),
            torch.softmax(m, -1),
            torch.rsqrt(1 + n * n),
            m.norm()[None],
            m.sum(0),
        ]
        results += [*torch.linalg.svd(m), *torch.linalg.qr(n), *torch.linalg.eigh(m.T @ m)]
        digest = sha256(b"".join(result.contiguous().numpy().tobytes() for result in results))
        found[str(dtype).removeprefix("torch.")] = digest.hexdigest()
    return found


def helps() -> Iterable[tuple[str, str]]:
    root: Any = typer.main.get_command(app)
    for words in ([], *([name] for name in root.commands)):
        done = CliRunner().invoke(app, [*words, "--help"], env=ENVIRONMENT)
        yield " ".join(["help", *words]), done.stdout


def make(here: Path) -> Pins:
    """Everything, in the current folder, which is empty."""
    pins = Pins(here)
    for thing, text in helps():
        pins.add(thing, "--help", text)
    ingredients()
    for name, words in {**{name: f"{FITTED} {words}" for name, words in FITS.items()}, "saved": SAVED}.items():
        pins.run(f"fit {name}", f"fit {words} -o {name}.json", again=" --force" if name == "module" else None)
        for path in sorted(Path().glob(f"{name}.*")):
            pins.add_file(f"fit {name}", path, path.name)
        pins.recipes.append((f"{name}.json", json.loads(Path(f"{name}.json").read_text())))
    fix_recipe()
    pins.add_file("fixed recipe", Path("fixed.json"), "fixed.json")
    pins.recipes.append(("fixed.json", json.loads(Path("fixed.json").read_text())))
    for name, words in EXPORTS.items():
        pins.run(f"export {name}", f"export {words} -o out/{name}", again=" --force")
        for path in sorted(Path("out", name).rglob("*")):
            pins.add_file(f"export {name}", path, path.relative_to(f"out/{name}").as_posix())
    shutil.copytree("out/concatenated", "changed")
    config = Path("changed/adapter_config.json")
    config.write_text(config.read_text().replace('"lora_alpha": ', '"lora_alpha": 1'))
    for name, words in COMMANDS.items():
        pins.run(f"command {name}", words)
        output = {"fuse": "fused", "convert": "converted", "convert-pickle": "unpickled"}.get(name)
        for path in sorted(Path(output).iterdir()) if output else ():
            pins.add_file(f"command {name}", path, path.name)
    pins.add("command report", "report.html", Path("report.html").read_text(), "")
    pins.run(
        "command compare-fits",
        f"compare -a a b {WITH_BASE} --methods module,core,paper --fit-data other.jsonl --passes 2",
        again=None,
    )
    for name, words in FAILURES.items():
        pins.run(f"failure {name}", words, again=None, ok=False)
    environment = json.loads(CliRunner().invoke(app, ["env", "--json"]).stdout)["env"]
    pins.add("command env", "keys", "\n".join(environment))  # the values are the machine's
    recipe: Any = load_recipe("module.json")
    nothing: Any = None
    shown = DemoResult(recipe, nothing, nothing, (DemoRow("fit", 0.5, 3, 4),), 1.5)
    with patch("loracli.demo.run.run_demo", lambda *_, **__: shown):
        pins.run("command demo", "demo")
    push(pins)
    return pins


def push(pins: Pins) -> None:
    """Of what `push` says, as all of it before the commit, whose name is drawn."""
    with UploadHub() as hub, patch.multiple(
        huggingface_hub.constants,
        ENDPOINT=hub.url,
        HF_HUB_OFFLINE=False,
        HUGGINGFACE_CO_URL_TEMPLATE=f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        HF_HUB_CACHE=str(Path("cache").absolute()),
    ), patch.dict(os.environ, {"HF_TOKEN": hub.token}):  # fmt: skip
        hub.add(BASE_ID, {"config.json": b"{}"})
        pins.run("command push", "push out/concatenated org/name --dry-run")


def write(folder: Path) -> None:
    """pins.json and texts/, anew."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        here = Path(name).resolve()
        before = Path.cwd()
        os.chdir(here)
        try:
            # It is built anew for every command otherwise, which takes as long as most of them.
            with patch("typer.testing._get_command", functools.cache(typer.main.get_command)):
                pins = make(here)
        finally:
            os.chdir(before)
    shutil.rmtree(folder / "texts", ignore_errors=True)
    (folder / "texts").mkdir(parents=True)
    for thing, parts in pins.texts.items():
        (folder / "texts" / f"{thing.replace(' ', '-')}.txt").write_text("\n".join(parts), encoding="utf-8")
    document = {"fingerprint": fingerprint(), "things": pins.digests}
    (folder / "pins.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]).absolute())
