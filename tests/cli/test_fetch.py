"""`loracat fetch` against a stub Hub; as a process of its own where a signal or the environment is the claim."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from loracli.recipe.record import RecipeAdapter, RecipeBase
from tests.cli.process import COMMAND, ROOT
from tests.cli.project import run
from tests.stub_hub import StubHub
from tests.test_recipe import make_recipe

CONFIG = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"}).encode()
ADAPTER = {"README.md": b"# math", "adapter_config.json": CONFIG, "adapter_model.safetensors": b"weights " * 500}
BASE = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"base weights"}
TOKEN = "hf_canary"
EACH = f"""
import sys
from loracli.cli import main
for name in sys.argv[1:]:
    sys.argv = ["loracat", "fetch", name, "--token", "{TOKEN}", "--json"]
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    print("ended", code, file=sys.stderr)
"""

Run = Callable[..., Any]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StubHub]:
    """The Hub that huggingface_hub talks to, an empty cache, and a token to look out for."""
    with StubHub() as server:
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf/hub"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.chdir(tmp_path)
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def variables(hub: StubHub, tmp_path: Path) -> dict[str, str]:
    """The environment of a process that talks to this Hub, and has the same cache."""
    home = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "LORACAT"))}
    home |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN}
    return home | {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": ROOT}


@pytest.fixture
def loracat(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `loracat fetch`; whatever it prints, no token and no escape sequence is in it."""

    def fetch(*words: str, offline: bool = False) -> Any:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        huggingface_hub.close_session()  # or it goes on as it was made
        done = run("fetch", *words)
        assert TOKEN not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr or "-vv" in words
        return done

    return fetch


def only_document(text: str) -> dict[str, Any]:
    """The one JSON document that the text is."""
    content: dict[str, Any] = json.loads(text)
    assert content["loracat"] == 1
    return content


def test_path_and_commit_go_to_stdout_and_talk_to_stderr(hub: StubHub, loracat: Run, tmp_path: Path) -> None:
    commit = hub.add("org/math", ADAPTER)
    done = loracat("org/math")
    path = tmp_path / "hf/hub/models--org--math/snapshots" / commit
    assert done.exit_code == 0
    assert f"path    {path}\n" in done.stdout and f"commit  {commit}\n" in done.stdout
    assert "loracat inspect org/math" in done.stderr and "loracat" not in done.stdout
    assert (path / "adapter_model.safetensors").read_bytes() == ADAPTER["adapter_model.safetensors"]


def test_quiet_prints_one_path_per_line_and_nothing_else(hub: StubHub, loracat: Run) -> None:
    commits = [hub.add("org/math", ADAPTER), hub.add("org/code", ADAPTER)]
    done = loracat("org/math", "org/code", "-q")
    assert [Path(line).name for line in done.stdout.splitlines()] == commits
    assert done.stderr == ""


def test_json_is_one_document_with_every_file(hub: StubHub, loracat: Run) -> None:
    commit = hub.add("org/math", ADAPTER)
    done = loracat("org/math@main", "--json")
    content = only_document(done.stdout)
    assert done.stderr == "" and content["base"] is None and content["dry_run"] is False
    [adapter] = content["adapters"]
    assert (adapter["reference"], adapter["commit"]) == ("org/math@main", commit)
    assert adapter["files"] == [{"name": n, "size_bytes": len(d), "cached": False} for n, d in ADAPTER.items()]


@pytest.mark.parametrize(
    ("fault", "code", "kind"),
    [("missing", 3, "AdapterNotFound"), ("gated", 4, "AccessDenied"), (503, 5, "HubUnreachable"), ("short", 7, None)],
)
def test_failures_end_with_their_code_in_words_and_in_json(
    hub: StubHub, loracat: Run, fault: str | int, code: int, kind: str | None
) -> None:
    hub.add("org/math", ADAPTER)
    hub.fail("org/math", fault)
    done = loracat("org/math")
    assert done.exit_code == code and done.stdout == ""
    assert done.stderr.startswith("error: org/math: ") and "\nhint: " in done.stderr
    done = loracat("org/math", "--json")
    error = only_document(done.stdout)["error"]
    assert done.exit_code == error["code"] == code and error["hint"]
    assert done.stderr.startswith("error: org/math: ") and done.stderr.count("\n") == 1
    assert error["kind"] == (kind or "IntegrityError")


def test_the_cache_serves_offline_and_says_so(hub: StubHub, loracat: Run) -> None:
    commit = hub.add("org/math", ADAPTER)
    loracat("org/math", "-q")
    hub.stop()
    done = loracat("org/math", offline=True)
    assert done.exit_code == 0 and commit in done.stdout
    assert f"offline: using the cached copy of org/math, commit {commit}" in done.stderr
    assert loracat("org/math").exit_code == 0
    assert loracat("org/code", offline=True).exit_code == 5


def test_the_base_model_comes_along_when_asked_for(hub: StubHub, loracat: Run) -> None:
    hub.add("org/math", ADAPTER)
    commit = hub.add("org/base", BASE)
    done = loracat("org/math", "--with-base", "--json")
    base = only_document(done.stdout)["base"]
    assert (base["id"], base["commit"]) == ("org/base", commit)
    assert {file["name"] for file in base["files"]} == set(BASE)


def test_a_dry_run_shows_each_file_and_downloads_none(hub: StubHub, loracat: Run, tmp_path: Path) -> None:
    hub.add("org/math", ADAPTER)
    done = loracat("org/math", "--dry-run")
    assert done.exit_code == 0
    assert ["adapter_model.safetensors", "4.0", "kB", "no"] in [line.split() for line in done.stdout.splitlines()]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_dry_run_tells_the_same_in_json_and_what_is_cached(hub: StubHub, loracat: Run) -> None:
    hub.add("org/math", ADAPTER)
    sizes = [{"name": name, "size_bytes": len(data)} for name, data in ADAPTER.items()]
    for cached in (False, True):
        content = only_document(loracat("org/math", "--dry-run", "--json").stdout)
        assert content["dry_run"] is True
        assert content["adapters"][0]["files"] == [{**file, "cached": cached} for file in sizes]
        if not cached:
            loracat("org/math", "-q")


def test_a_ceiling_ends_with_its_code_and_the_way_past_it(hub: StubHub, loracat: Run) -> None:
    hub.add("org/math", ADAPTER)
    size = sum(map(len, ADAPTER.values()))
    done = loracat("org/math", "--max-size", "1kB")
    assert done.exit_code == 6 and f"{size} bytes" in done.stderr and "1000 are allowed" in done.stderr
    assert loracat("org/math", "--max-size", str(size)).exit_code == 0
    assert loracat("org/math", "--max-size", "1 parsec").exit_code == 2


def test_a_damaged_copy_ends_with_its_code_once(hub: StubHub, loracat: Run) -> None:
    hub.add("org/math", ADAPTER)
    [path] = loracat("org/math", "-q").stdout.splitlines()
    weights = Path(path, "adapter_model.safetensors")
    weights.resolve().write_bytes(bytes(weights.stat().st_size))
    done = loracat("org/math", offline=True)
    assert done.exit_code == 7 and "it is removed; fetch again" in done.stderr
    assert loracat("org/math").exit_code == 0
    assert weights.read_bytes() == ADAPTER["adapter_model.safetensors"]


def test_a_recipe_is_fetched_and_names_nothing_to_inspect(hub: StubHub, loracat: Run, tmp_path: Path) -> None:
    commits = [hub.add("org/math", ADAPTER), hub.add("org/base", BASE)]
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in ADAPTER.items() if name != "README.md"}
    adapter = RecipeAdapter("org/math", "org/math", None, commits[0], hashes, 8, 16.0, False, "float32", "org/base")
    base = RecipeBase("org/base", commits[1], hashlib.sha256(BASE["config.json"]).hexdigest())
    (tmp_path / "recipe.json").write_text(replace(make_recipe(tmp_path, adapter), base=base).to_json())
    done = loracat("recipe.json", "--with-base")
    assert done.exit_code == 0 and done.stderr == "" and all(commit in done.stdout for commit in commits)
    content = only_document(loracat("recipe.json", "--with-base", "--json").stdout)
    assert [content["adapters"][0]["commit"], content["base"]["commit"]] == commits


def test_the_token_is_in_no_output_even_where_the_client_tells_everything(
    hub: StubHub, variables: dict[str, str], tmp_path: Path
) -> None:
    """Nor in a file; whether the transfer succeeds or fails, one after the other in a process."""
    faults = {"org/whole": None, "org/other": "other bytes", "org/token": "bad token", "org/limit": 429}
    for name, fault in faults.items():
        hub.add(name, ADAPTER)
        hub.fail(name, fault)
    process = subprocess.run(
        [*COMMAND[:1], "-c", EACH, *faults], cwd=tmp_path, env=variables | {"HF_DEBUG": "1", "HF_TOKEN": ""},
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    said = process.stderr.split("ended ")
    assert [text.split()[0] for text in said[1:]] == ["0", "7", "4", "5"], process.stderr
    assert all("<TOKEN>" in text for text in said[:-1]) and hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in process.stdout + process.stderr and "\x1b" not in process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 416])
def test_a_hub_that_repeats_the_token_is_not_repeated(hub: StubHub, loracat: Run, status: int) -> None:
    hub.add("org/name", ADAPTER)
    hub.fail("org/name", status, on=("info",))
    done = loracat("org/name", "-vv")
    assert "Bearer hf_canary" in {str(token) for token in hub.tokens}
    assert "Traceback" in done.stderr and "words of the server" not in done.stderr


def test_ctrl_c_ends_several_transfers_that_have_stopped_sending(
    hub: StubHub, loracat: Run, variables: dict[str, str], tmp_path: Path
) -> None:
    names = ["org/math", "org/code"]
    for name in names:
        hub.add(name, ADAPTER)
        hub.fail(name, "stall", on=("file",), at=100)
    command = [*COMMAND, "fetch", *names]
    process = subprocess.Popen(command, cwd=tmp_path, env=variables, stderr=subprocess.PIPE, text=True)
    while sum("/large/" in path for _, path in hub.requests) < len(names):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 130 and talk == "interrupted\n"
    for name in names:
        hub.fail(name, None)
    assert loracat(*names).exit_code == 0


def test_options_that_cannot_go_together_are_usage_errors(loracat: Run) -> None:
    assert loracat("org/math", "org/code", "--local-dir", "out").exit_code == 2
    done = loracat("org/math", "--cache-dir", "a", "--local-dir", "b", "--json")
    assert done.exit_code == 2 and only_document(done.stdout)["error"]["kind"] == "UsageError"


def test_names_from_a_hostile_repository_are_harmless(hub: StubHub, loracat: Run) -> None:
    names = ("\x1b]8;;http://x\x07click", "a\nerror: fake", "[bold]:smile:[/nope]")
    hub.add("org/evil", {f"{name}/adapter_config.json": b"{}" for name in names})
    done = loracat("org/evil")
    assert done.exit_code == 3 and "fake" not in done.stderr and "click" not in done.stderr
    assert "hf://org/evil/[bold]:smile:[/nope]" in done.stderr
    hub.add("org/weights", {"config.json": b"{}", "\x1b[31m.bin": b""})
    hub.add("org/math", ADAPTER | {"adapter_config.json": b'{"base_model_name_or_path": "org/weights"}'})
    assert "\\x1b[31m.bin" in loracat("org/math", "--with-base").stderr
