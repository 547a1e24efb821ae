"""The card of an export: metadata that the Hub reads, a licence only if all agree, and commands that make it again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml

from loracli.adapters.claims import _MAX_FRONT_MATTER, _MAX_README_BYTES, read_front_matter
from loracli.algebra.methods.method import MethodOptions
from loracli.errors import MalformedAdapter
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from tests.cli.project import run
from tests.export.test_export import Made
from tests.stub_hub import StubHub
from tests.tiny import BASE_ID, random_records, write_jsonl

MERGES = "a0: &a0 {k: v}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 9))


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """Metadata, as a library of the Hub reads it, and text."""
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.fixture
def adapters(tmp_path: Path, two_adapters: tuple[Path, Path]) -> list[Path]:
    """Copies to write READMEs into."""
    for path in two_adapters:
        shutil.copytree(path, tmp_path / path.name)
        (tmp_path / path.name / "README.md").unlink(missing_ok=True)
    return [tmp_path / path.name for path in two_adapters]


@pytest.mark.parametrize(
    ("readmes", "cells"),
    [
        (["---\nlicense: mit\n---\n# x", "---\r\nlicense: 'MIT'\r\ntags: [a]\r\n---\r\n"], ["mit", "mit"]),
        (["---\nlicense: mit\n---\n", "---\nlicense: apache-2.0\n---\n"], ["mit", "apache-2.0"]),
        (["---\nlicense: mit\n---\n", None], ["mit", "not stated"]),
        (["---\nlicense: mit\n---\n", "license: mit"], ["mit", "not stated"]),
        (["---\nlicense: other\n---\n"] * 2, ["not stated", "not stated"]),
        (["---\nlicense: [mit]\n---\n"] * 2, ["not stated", "not stated"]),
        (['---\nlicense: "mit\\ninjected: yes"\n---\n'] * 2, ["not stated", "not stated"]),
        (["---\nlicense: mit\n---\n", f"---\n{MERGES}license: mit\n---\n"], ["mit", "mit"]),
        (["---\nlicense: mit\n---\n", f"---\nlicense: mit\nx: {'[' * 2000}\n---\n"], ["mit", "not stated"]),
        (["---\nlicense: mit\n---\n", "---\nlicense: !!python/object/apply:os.abort []\n---\n"], ["mit", "not stated"]),
    ],
    ids=["agree", "differ", "one", "text", "other", "list", "injected", "bomb", "nested", "object"],
)
def test_a_licence_is_stated_if_all_ingredients_state_the_same(
    adapters: list[Path], tmp_path: Path, readmes: list[str | None], cells: list[str]
) -> None:
    """A bomb of merge keys, nine to the power of eight of them, would never end."""
    for path, text in zip(adapters, readmes, strict=True):
        if text is not None:
            (path / "README.md").write_bytes(text.encode())
    export_adapter(ExportRequest(method="uniform", adapters=[str(path) for path in adapters]), tmp_path / "out")
    front, text = card_of(tmp_path / "out")
    assert [line.split(" | ")[1] for line in text.splitlines() if " | local | " in line] == cells
    agreed = cells[0] if cells[0] == cells[1] != "not stated" else None
    assert front.get("license") == agreed and "injected" not in front
    assert ("No licence is stated" in text) == (agreed is None)


def test_metadata_is_read_within_limits_and_as_text(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: no\ndate: 2024-13-99\nnumber: 1_000\n---\ntext")
    assert read_front_matter(path) == {"license": "no", "date": "2024-13-99", "number": "1_000"}
    for text in ("no metadata", "---\n---\n", "text\n---\nlicense: mit\n---\n", "---\nlicense: mit\n"):
        path.write_text(text)
        assert read_front_matter(path) == {}
    for data, said in (
        (b"---\n" + b"#" * _MAX_FRONT_MATTER + b"\n---\n", "characters of metadata"),
        (b"#" * (_MAX_README_BYTES + 1), "is larger"),
        (b"---\n\xff\n---\n", "not UTF-8"),
        (b"---\n- a\n---\n", "not a mapping"),
        (b"---\n{a: }}\n---\n", "not valid YAML"),
        (b"---\n? [a]\n: b\n---\n", "not valid YAML"),
    ):
        path.write_bytes(data)
        with pytest.raises(MalformedAdapter, match=said):
            read_front_matter(path)


def test_the_metadata_put_an_adapter_beside_its_base(adapters: list[Path], tmp_path: Path) -> None:
    for profile, library in (("peft", "peft"), ("mlx", "mlx")):
        export_adapter(
            ExportRequest(method="sum", adapters=[str(path) for path in adapters], profile=profile), tmp_path / profile
        )
        front, _ = card_of(tmp_path / profile)
        assert front == {
            "base_model": BASE_ID,
            "base_model_relation": "adapter",
            "library_name": library,
            "pipeline_tag": "text-generation",
            "tags": ["lora", "transformers", "loracat", "merge", f"base_model:adapter:{BASE_ID}"],
        }


def test_a_card_says_that_no_guard_is_kept_and_the_command_that_runs_one(
    adapters: list[Path], tmp_path: Path, tiny_base: Path
) -> None:
    """The command runs as it stands, once the files that it leaves open are named."""
    out, records = tmp_path / "out", str(write_jsonl(tmp_path / "records.jsonl", random_records(6, seed=1)))
    options, given = MethodOptions(density=0.5), [str(path) for path in adapters]
    export_adapter(ExportRequest(method="ties", method_options=options, adapters=given), out)
    said = "No check of records that must not get worse is kept for this composition; this makes one:\n`loracat "
    command = card_of(out)[1].split(said)[1].split("`.\n")[0]
    assert command.endswith("--methods ties --density 0.5 --scale 1 --data FILE --guard GENERAL")
    words = [records if word in ("FILE", "GENERAL") else word for word in command.split()]
    words = [word.replace("path/to", str(tmp_path)) for word in words]
    done = run(*words, "--base", str(tiny_base))
    assert done.exit_code == 0 and "what must not get worse" in done.stdout, done.stderr


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StubHub]:
    with StubHub() as server:
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def repeat(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Types what the card says to type, in a folder that holds what was published; `loracat` in this process."""
    lines = text.split("## Make it again\n\n```bash\n")[1].split("\n```")[0].splitlines()
    monkeypatch.chdir(folder)
    for line in lines:
        if line.startswith("loracat "):
            done = run(*line.split()[1:], "-o", "again")
            assert done.exit_code == 0, done.stderr
        else:
            shell = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
            subprocess.run(line, shell=True, check=True, cwd=folder, env={**os.environ, "PATH": shell})


def test_the_commands_of_a_card_make_the_same_weights_from_the_hub(
    hub: StubHub, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits, named = [], []
    for number, (path, adapter) in enumerate(zip(made.paths, made.recipe.adapters, strict=True)):
        repo_id, folder = f"org/skill{number}", "deep/er" if number else ""
        files = {f"{folder}/{f.name}".lstrip("/"): f.read_bytes() for f in path.iterdir() if f.is_file()}
        commits.append(hub.add(repo_id, files))
        reference = f"hf://{repo_id}/{folder}" if folder else repo_id
        named.append(
            replace(adapter, reference=reference, repo_id=repo_id, subfolder=folder or None, commit=commits[-1])
        )
    fitted, best = made.recipe.held_out.rows
    rows = (fitted, replace(best, name="org/skill0"))
    held_out = replace(made.recipe.held_out, best_ingredient="org/skill0", rows=rows)
    recipe = replace(made.recipe, adapters=tuple(named), held_out=held_out)
    export_adapter(ExportRequest(recipe, merge=True, rank=3, dtype="bfloat16"), tmp_path / "fitted")
    export_adapter(
        ExportRequest(method="ties", adapters=["org/skill0", "hf://org/skill1/deep/er"], merge=True), tmp_path / "ties"
    )
    for name in ("fitted", "ties"):
        _, text = card_of(tmp_path / name)
        link = f"https://huggingface.co/org/skill1/tree/{commits[1]}/deep/er"
        assert f"[`hf://org/skill1/deep/er`]({link})" in text
        for repo_id in ("org/skill0", "org/skill1"):  # another commit since
            hub.add(repo_id, {"adapter_config.json": b"{}"})
        repeat(text, tmp_path / name, monkeypatch)
        one, again = (tmp_path / name / sub / "adapter_model.safetensors" for sub in (".", "again"))
        assert one.read_bytes() == again.read_bytes()
        record = json.loads((tmp_path / name / "again" / "loracat.json").read_text())
        assert record["certificate"] == json.loads((tmp_path / name / "loracat.json").read_text())["certificate"]


def test_the_command_names_the_base_where_an_adapter_does_not(
    adapters: list[Path], tmp_path: Path, tiny_base: Path
) -> None:
    config = adapters[0] / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "/home/alice/llama"}))
    export_adapter(
        ExportRequest(method="sum", adapters=[str(path) for path in adapters], base=str(tiny_base)), tmp_path / "out"
    )
    front, text = card_of(tmp_path / "out")
    assert f" --adapters path/to/first path/to/second --base {front['base_model']}\n" in text
    assert "alice" not in "".join((tmp_path / "out" / name).read_text() for name in ("README.md", "loracat.json"))


def test_local_ingredients_are_named_by_a_path_to_fill_in(adapters: list[Path], tmp_path: Path, made: Made) -> None:
    export_adapter(ExportRequest(method="sum", adapters=[str(path) for path in adapters]), tmp_path / "sum")
    assert "\nloracat export --method sum --adapters path/to/first path/to/second\n" in card_of(tmp_path / "sum")[1]
    export_adapter(ExportRequest(made.recipe), tmp_path / "fitted")
    assert (
        "\nloracat export recipe.json --adapters path/to/adapter0 path/to/adapter1\n" in card_of(tmp_path / "fitted")[1]
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"), "mixed ranks")
