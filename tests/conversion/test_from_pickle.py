"""`convert --from-pickle`: the tensors of adapter_model.bin and nothing else of it, within limits, whole or not."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from loracli.adapters.adapter import read_adapter
from loracli.conversion import from_pickle, unpickle
from loracli.conversion.from_pickle import convert_pickle
from loracli.errors import LoracatError, MalformedAdapter, OutputExists, UsageError
from tests.cli.project import run, tree
from tests.conversion.training import train
from tests.faults.fork_server import ForkServer
from tests.hostile.canary import Canary
from tests.tiny import logits, make_adapter

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    with ForkServer(tmp_path_factory.mktemp("streams")) as running:
        yield running


@pytest.fixture
def forked(server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program runs in a fork of a process that has imported it, with the limits that it gives itself."""

    def run_forked(words: list[str], said: IO[bytes], seconds: float) -> int:
        assert words[:4] == [sys.executable, "-P", "-m", "loracli.conversion.unpickle"]
        ended = server.run(*words[4:], program=Path(unpickle.__file__), cwd=tmp_path, seconds=seconds)
        said.write(ended.stdout.encode())
        return ended.code

    monkeypatch.setattr(from_pickle, "_run", run_forked)


@pytest.fixture
def folder(tmp_path: Path, tiny_base: Path) -> Path:
    """An adapter with both files; a test takes the safetensors away."""
    return make_adapter(tmp_path / "adapter", tiny_base)


def pickled(folder: Path, content: Any = None, **options: Any) -> Tensors:
    """Puts the adapter's tensors, or other content, into a pickle file alone; returns the tensors."""
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors if content is None else content(tensors), folder / "adapter_model.bin", **options)
    return tensors


def views(tensors: Tensors) -> Tensors:
    """The same values: turned, in the middle of a large storage shared by all, and as parameters."""
    together = torch.cat([torch.zeros(1000), *(tensor.flatten() for tensor in tensors.values())])
    found, place = {}, 1000
    for name, tensor in tensors.items():
        part = together[place : place + tensor.numel()].view(tensor.shape)
        found[name] = nn.Parameter(part.T.contiguous().T) if "lora_B" in name else part
        place += tensor.numel()
    return found


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("content", "options"),
    [
        (None, {}),
        (None, {"_use_new_zipfile_serialization": False}),
        (views, {}),
        (lambda tensors: collections.OrderedDict((n, t.bfloat16()) for n, t in tensors.items()), {}),
        (lambda tensors: {n.replace(".weight", ".default.weight"): t for n, t in tensors.items()}, {}),
    ],
    ids=["zip", "legacy", "views", "bfloat16", "old names"],
)
def test_the_tensors_are_those_of_the_pickle_and_stock_peft_computes_the_same(
    tmp_path: Path, folder: Path, tiny_base: Path, content: Callable[[Tensors], Tensors] | None, options: dict[str, Any]
) -> None:
    right = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), folder)
    config, kept = (folder / "adapter_config.json").read_bytes(), pickled(folder, content, **options)
    made = convert_pickle(str(folder), tmp_path / "out")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    wanted = kept if content is None else content(kept)
    assert written.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor), name
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == config
    assert made.size_bytes == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    for name, module in read_adapter(str(tmp_path / "out")).modules.items():
        update = right.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        close = {"atol": 0.02, "rtol": 0.02} if module.factors.dtype == torch.bfloat16 else {}
        torch.testing.assert_close(module.factors.delta_weight().float(), update, **close)
    if content is None:
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path / "out")
        assert torch.equal(logits(loaded), logits(right))


@pytest.mark.usefixtures("forked")
def test_a_pickle_that_runs_code_is_refused_and_runs_none(tmp_path: Path, folder: Path, canary: Canary) -> None:
    def with_attack(tensors: Tensors) -> dict[str, Any]:
        return {**tensors, "x": Attack(canary.path)}

    for options in ({}, {"_use_new_zipfile_serialization": False}):
        again = tmp_path / f"again{len(options)}"
        again.mkdir()
        for path in folder.iterdir():
            (again / path.name).write_bytes(path.read_bytes())
        pickled(again, with_attack, **options)
        before = tree(tmp_path)
        with pytest.raises(MalformedAdapter, match=r"adapter_model\.bin: it calls posix\.mkdir, and only tensors are"):
            convert_pickle(str(again), tmp_path / "out")
        assert not canary.sang() and tree(tmp_path) == before
    (again / "adapter_model.bin").write_bytes(canary.pickle())  # no file of torch.save at all
    with pytest.raises(MalformedAdapter):
        convert_pickle(str(again), tmp_path / "out")
    assert not canary.sang()


class Attack:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self._path),)


@pytest.fixture
def canary(tmp_path: Path) -> Canary:
    return Canary(tmp_path / "it-sang")


def deflated(folder: Path) -> None:
    """A pickle of 160 MB of zeros in a file of 160 kB."""
    content = pickle.dumps({"x": "0" * (160 << 20)}, protocol=2)
    with zipfile.ZipFile(folder / "adapter_model.bin", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/version", "3\n")


def array_of_a_terabyte(folder: Path) -> None:
    """`bytearray(1 << 40)`, which `weights_only` allows."""
    program = b"cbuiltins\nbytearray\n\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"\x85R."
    with zipfile.ZipFile(folder / "adapter_model.bin", "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + program)
        file.writestr("archive/version", "3\n")


def expanded(folder: Path) -> None:
    torch.save({"x": torch.zeros(1).expand(10**6, 10**6)}, folder / "adapter_model.bin")


def repeated(folder: Path) -> None:
    whole = torch.zeros(1 << 20)
    torch.save({f"x{number}": whole[:] for number in range(99)}, folder / "adapter_model.bin")


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("bomb", [deflated, array_of_a_terabyte, expanded, repeated])
def test_a_file_that_unfolds_to_more_than_its_size_explains_is_refused(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, bomb: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(from_pickle, "_MORE_MEMORY", 96 << 20)
    (folder / "adapter_model.safetensors").unlink()
    bomb(folder)
    before = tree(tmp_path)
    with pytest.raises(MalformedAdapter, match="its size|more time or memory than its size explains") as caught:
        convert_pickle(str(folder), tmp_path / "out")
    assert caught.value.hint == "ask its author for safetensors" and caught.value.exit_code == 3
    assert tree(tmp_path) == before


def test_a_process_that_does_not_end_is_ended(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pickled(folder)
    monkeypatch.setattr(from_pickle, "_SECONDS", 0)
    with pytest.raises(MalformedAdapter, match="took more time or memory than its size explains"):
        convert_pickle(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_process_has_its_limits_and_no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Memory beyond what is mapped, seconds beyond those that are used, bytes of a file, no core."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    program = (
        "import json, os, resource as r; from loracli.conversion import unpickle as u; before = u._address_space(); "
        "u._limit({'memory': 1 << 30, 'seconds': 77, 'data': 1 << 20}); "
        "limits = [r.getrlimit(x) for x in (r.RLIMIT_CORE, r.RLIMIT_CPU, r.RLIMIT_FSIZE, r.RLIMIT_AS)]; "
        "print(json.dumps([limits, before, 'HF_TOKEN' in os.environ]))"
    )
    with (tmp_path / "said").open("w+b") as said:
        assert from_pickle._run([sys.executable, "-P", "-c", program], said, 600) == 0
    limits, before, has_token = json.loads((tmp_path / "said").read_text())
    assert all(soft == hard for soft, hard in limits) and not has_token
    core, seconds, file, memory = (soft for soft, _ in limits)
    assert core == 0 and 77 <= seconds < 77 + 60 and file == (1 << 20) + (64 << 20)
    assert 0 <= memory - before - (1 << 30) < 1 << 30


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"x": 3}, "'x' is a int and not a tensor"),
        ({"x": {"y": torch.ones(2)}}, "'x' is a dict and not a tensor"),
        ({3: torch.ones(2)}, "it names a tensor 3"),
        ({"__metadata__": torch.ones(2)}, "it names a tensor '__metadata__'"),
        ({"\ud800": torch.ones(2)}, "it names a tensor"),
        ([torch.ones(2)], "it holds one list and no tensors by name"),
        ({}, "it holds no tensors"),
        ({"x": torch.ones(2).to_sparse()}, "'x' is not an ordinary tensor, but torch.sparse_coo on cpu"),
        ({"x": torch.ones(2, device="meta")}, "'x' is not an ordinary tensor, but torch.strided on meta"),
        ({"x": torch.ones(2, dtype=torch.int64)}, "'x' has the dtype int64"),
        ({"x": torch.ones(2, dtype=torch.complex64)}, "'x' has the dtype complex64"),
    ],
    ids=lambda value: "" if not isinstance(value, str) else value[:40],
)
def test_what_is_no_ordinary_tensor_is_refused_by_name(tmp_path: Path, content: Any, said: str) -> None:
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(unpickle.Refused, match=said.replace(".", r"\.")):
        unpickle._checked(unpickle._opened(tmp_path / "x.bin"), 1 << 20)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, folder: Path, legacy: bool, share: float) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    made = io.BytesIO()
    torch.save(tensors, made, _use_new_zipfile_serialization=not legacy)
    (tmp_path / "x.bin").write_bytes(made.getvalue()[: int(share * len(made.getvalue()))])
    with pytest.raises(unpickle.Refused, match="damaged|something else than tensors|its size"):
        unpickle._checked(unpickle._opened(tmp_path / "x.bin"), 1 << 20)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (lambda t: {n: v * float("nan") for n, v in t.items()}, "MalformedAdapter", "infinite or not a number"),
        (lambda t: {**t, "../../x.lora_A.weight": torch.ones(2, 2)}, "MalformedAdapter", "x"),
        (lambda t: {n: v[:1] if "lora_A" in n else v[:, :1] for n, v in t.items()}, "MalformedAdapter", "has rank 1"),
    ],
    ids=["nan", "path", "rank"],
)
def test_what_comes_out_is_checked_as_any_adapter(
    tmp_path: Path, folder: Path, change: Callable[[Tensors], Tensors], kind: str, said: str
) -> None:
    pickled(folder, change)
    before = tree(tmp_path)
    with pytest.raises(LoracatError, match=said) as caught:
        convert_pickle(str(folder), tmp_path / "out")
    assert type(caught.value).__name__ == kind and caught.value.exit_code == 3
    assert str(folder) in str(caught.value) and ".tmp" not in str(caught.value)
    assert tree(tmp_path) == before


def test_the_command_names_itself_writes_whole_and_replaces_its_own_alone(
    tmp_path: Path, folder: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = pickled(folder)
    refused = run("inspect", "./adapter")
    assert refused.exit_code == 3
    words = refused.stderr.partition("in a process of its own: loracat ")[2].split()
    assert words == ["convert", "./adapter", "--from-pickle"]
    made = run(*words)
    assert made.exit_code == 0 and "next: loracat inspect adapter-converted" in made.stderr
    assert run("inspect", "adapter-converted").exit_code == 0
    before = tree(tmp_path / "adapter-converted")
    assert run(*words).exit_code == 2
    document = json.loads(run(*words, "--force", "--json").stdout)
    assert tree(tmp_path / "adapter-converted") == before  # the same bytes
    assert (document["relative_error"], document["rank"], len(document["modules"])) == (0.0, 4, len(kept) // 2)
    assert run("verify", "adapter-converted").exit_code == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("x")
    with pytest.raises(OutputExists):
        convert_pickle("./adapter", "mine", force=True)
    with pytest.raises(UsageError, match=r"has adapter_model\.safetensors, which needs no --from-pickle"):
        convert_pickle("./adapter-converted", "out")
    beside = run(*words, "--rank", "4", "-o", "out")
    assert beside.exit_code == 2 and "--rank is for another conversion" in beside.stderr


@pytest.mark.usefixtures("forked")
def test_an_adapter_that_needs_its_base_is_converted_in_two_steps(tmp_path: Path, tiny_base: Path) -> None:
    dora = train(tmp_path / "dora", tiny_base, use_dora=True)
    right = run("convert", str(dora.path), "--base", str(tiny_base), "--rank", "3", "-o", str(tmp_path / "right"))
    assert right.exit_code == 0
    pickled(dora.path)
    made = convert_pickle(str(dora.path), tmp_path / "safe")
    assert made.needs_conversion
    words = ("convert", str(tmp_path / "safe"), "--base", str(tiny_base), "--rank", "3", "-o", str(tmp_path / "out"))
    assert run(*words).exit_code == 0
    file = "adapter_model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "right" / file).read_bytes()


def test_the_program_says_its_reason_in_one_line(tmp_path: Path) -> None:
    torch.save({"x" * 1000: 3}, tmp_path / "x.bin")
    limits = json.dumps({"memory": 1 << 30, "seconds": 60, "data": 1 << 20})
    words = [sys.executable, "-P", "-m", "loracli.conversion.unpickle", str(tmp_path / "x.bin"), str(tmp_path / "y")]
    done = subprocess.run([*words, limits], capture_output=True, text=True, check=False)
    assert done.returncode == unpickle.REFUSED and not (tmp_path / "y").exists()
    assert len(json.loads(done.stdout)) <= unpickle.MOST_WORDS
