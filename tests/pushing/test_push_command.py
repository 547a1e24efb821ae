"""`loracat push` as it is typed: what goes to stdout, to stderr and into the document."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.recipe.record import EDITED, weights_digest
from tests.cli.project import run
from tests.cli.test_documents import check
from tests.export.test_export import Made
from tests.stub_hub_uploads import UploadHub
from tests.tiny import BASE_ID

REPO = "org/name"


def test_the_address_of_the_commit_goes_to_stdout_and_talk_to_stderr(hub: UploadHub, out: Path) -> None:
    (out / "notes.txt").write_text("mine")
    done = run("push", str(out), REPO, "-m", "Both skills\n\nMeasured on mine.")
    commit = hub.head(REPO).commit
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"{hub.url}/{REPO}/commit/{commit}"
    sha256 = hashlib.sha256((out / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert any(line.split()[::3] == ["adapter_model.safetensors", "new"] for line in lines), lines
    assert sha256[:12] in done.stdout
    assert "NOT checked: the composition" in done.stdout
    assert "not uploaded: notes.txt" in done.stderr and f"next: loracat fetch {REPO}@{commit}" in done.stderr
    assert "the card states no licence" in done.stderr
    assert hub.commits == ["Both skills"]
    again = run("push", str(out), REPO)
    assert f"already there: {REPO}, branch main holds the same bytes" in again.stdout
    assert again.stdout.startswith(lines[0]) and "next:" not in again.stderr


def test_quiet_prints_the_address_and_nothing_else(hub: UploadHub, out: Path) -> None:
    done = run("push", str(out), REPO, "-q")
    assert done.stdout == f"{hub.url}/{REPO}/commit/{hub.head(REPO).commit}\n"


def test_json_is_one_document_with_every_file(hub: UploadHub, out: Path) -> None:
    before = json.loads(run("push", str(out), REPO, "--json", "--dry-run").stdout)
    check(before, "push")
    assert before["dry_run"] and (before["commit"], before["url"], before["committed"]) == (None, None, False)
    done = run("push", str(out), REPO, "--json", "--private")
    found = json.loads(done.stdout)
    check(found, "push")
    commit = hub.head(REPO).commit
    assert (found["repo"], found["commit"], found["url"]) == (REPO, commit, f"{hub.url}/{REPO}/commit/{commit}")
    assert found["pull_request"] is None and found["private"] and found["created"] and found["committed"]
    for file in found["files"]:
        data = (out / file["name"]).read_bytes()
        assert (file["size_bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert len(found["files"]) == 4 and found["not_checked"] and found["licence"] is False
    (out / "README.md").unlink()
    done = run("push", str(out), REPO, "--json")
    error = json.loads(done.stdout)["error"]
    assert done.exit_code == error["code"] == 7 and error["problems"] == ["README.md is missing"]


def test_a_base_that_nobody_else_has_is_refused_with_the_way_out(
    hub: UploadHub, out: Path, made: Made, tmp_path: Path
) -> None:
    base = hub.repositories.pop(BASE_ID)
    done = run("push", str(out), REPO)
    assert done.exit_code == 3 and f"'{BASE_ID}' is not a repository on the Hub" in done.stderr
    assert "--base org/name" in done.stderr and REPO not in hub.repositories
    hub.repositories[BASE_ID] = base
    hub.fail(BASE_ID, "gated")
    assert run("push", str(out), REPO, "-q").exit_code == 0  # it is there, and this account may not download it
    mine = replace(made.recipe, base=replace(made.recipe.base, id="/home/alice/llama"))
    export_adapter(ExportRequest(mine), tmp_path / "mine")
    hub.requests.clear()
    done = run("push", str(tmp_path / "mine"), REPO)
    assert done.exit_code == 3 and "'/home/alice/llama' is not a repository on the Hub" in done.stderr
    assert hub.requests == []


def test_weights_that_were_edited_after_the_fit_are_told(hub: UploadHub, made: Made, tmp_path: Path) -> None:
    digest = weights_digest(made.recipe.mixing.weights)
    for name, found, edited in (("kept", digest, False), ("edited", "0" * 64, True)):
        recipe = replace(made.recipe, mixing=replace(made.recipe.mixing, weights_sha256=found))
        export_adapter(ExportRequest(recipe), tmp_path / name)
        done = run("push", str(tmp_path / name), f"org/{name}")
        assert done.exit_code == 0 and (EDITED in done.stderr) is edited
        told = json.loads(run("push", str(tmp_path / name), f"org/{name}", "--dry-run", "--json").stdout)
        check(told, "push")
        assert told["weights_edited"] is edited


def test_a_base_path_that_an_adapter_names_is_not_published(hub: UploadHub, made: Made, tmp_path: Path) -> None:
    named = tuple(replace(adapter, base_model="/home/alice/llama") for adapter in made.recipe.adapters)
    recipe = replace(made.recipe, adapters=named)
    recipe.save(tmp_path / "recipe.json")
    paths = [str(path) for path in made.paths]
    export_adapter(ExportRequest(tmp_path / "recipe.json", adapters=paths), tmp_path / "out")
    assert "alice" not in "".join((tmp_path / "out" / name).read_text() for name in ("README.md", "loracat.json"))
    again = ("verify", str(tmp_path / "out"), "--recipe", str(tmp_path / "recipe.json"), "--adapters", *paths, "-q")
    assert run(*again).stdout == "verified\n"
    # An export of an older version, which had it, is still what its recipe says.
    record = tmp_path / "out" / "loracat.json"
    fields = json.loads(record.read_text())
    fields["recipe"]["adapters"][0]["base_model"] = "/home/alice/llama"
    del fields["record_sha256"], fields["text_sha256"], fields["loracat_export"]
    record.write_text(json.dumps(fields))
    assert run(*again).stdout == "incomplete\n"
    pushed = run("push", str(tmp_path / "out"), REPO)
    assert pushed.exit_code == 3 and "export it again" in pushed.output
