"""An export goes up in one commit and comes back the same bytes; what is not it, or not allowed, changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub.utils import _http, are_progress_bars_disabled

from loracli.errors import (
    AccessDenied,
    HubUnreachable,
    InputError,
    IntegrityError,
    LoracatError,
    UsageError,
    VerificationError,
)
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.hub.fetch import fetch_adapter
from loracli.progress import Silent
from tests.export.test_export import Made
from tests.pushing.conftest import Push
from tests.stub_hub_uploads import EMPTY, UploadHub
from tests.tiny import BASE_ID
from tests.verifying.test_verify_adapter import change

FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "loracat.json"}
REPO = "org/name"


class Told(Silent):
    """Bytes by task, of what was begun and finished."""

    def __init__(self) -> None:
        self.totals: dict[str, int | None] = {}
        self.done: dict[str, int] = {}

    def begin(self, task: str, total: int | None, unit: str) -> None:
        if unit == "B":
            self.totals[task] = total

    def advance(self, task: str, amount: int, status: str = "") -> None:
        self.done[task] = self.done.get(task, 0) + amount


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def writes(hub: UploadHub) -> list[tuple[str, str]]:
    """The requests that could change something."""
    return [(method, path) for method, path in hub.requests if method not in ("GET", "HEAD")]


def test_an_export_goes_up_in_one_commit_and_is_fetched_as_the_same_bytes(
    hub: UploadHub, push: Push, out: Path
) -> None:
    told = Told()
    found = push(progress=told, message="Both skills")
    assert found.committed and found.created and found.private is False
    assert hub.commits == ["Both skills"]
    assert hub.head(REPO) == (found.commit, EMPTY | contents(out))
    assert found.url == f"{hub.url}/{REPO}/commit/{found.commit}" and found.pull_request is None
    for file in found.files:
        data = (out / file.name).read_bytes()
        assert (file.size_bytes, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert file.state == "new" and told.totals[file.name] == len(data)
    assert {file.name for file in found.files} == FILES
    assert told.done["adapter_model.safetensors"] == told.totals["adapter_model.safetensors"]
    fetched = fetch_adapter(f"{REPO}@{found.commit}")
    assert contents(fetched.path) == {name: data for name, data in contents(out).items() if name != "loracat.json"}


def test_nothing_of_this_machine_goes_up(
    hub: UploadHub, push: Push, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    canaries = {"HOME": str(tmp_path / "canary-home"), "USER": "canary-user", "LOGNAME": "canary-user"}
    for name, value in canaries.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "gethostname", lambda: "canary-host")
    push()
    everything = b"\n".join([*hub.received, *hub.head(REPO).files.values()])  # small files come in base64
    assert b"loracat_recipe" in everything and len(hub.large) == 1
    words = [*canaries.values(), "canary-host", socket.getfqdn(), os.uname().nodename, hub.token]
    words += [str(tmp_path.parent.parent), str(Path.cwd())]
    assert [word for word in words if word.encode() in everything] == []


def test_only_the_files_of_the_export_go_up_and_the_rest_is_named(hub: UploadHub, push: Push, out: Path) -> None:
    (out / "notes.txt").write_text("private")
    (out / "adapter_model.bin").write_bytes(b"pickle")
    (out / "adapter.gguf").write_bytes(b"not of this export: the record has no hash of it")
    (out / "checkpoint").mkdir()
    (out / ".env").write_text("secret")
    found = push()
    assert found.left_out == (".env", "adapter.gguf", "adapter_model.bin", "checkpoint", "notes.txt")
    assert hub.head(REPO).files.keys() == FILES | EMPTY.keys()


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"profile": "mlx"}, {"adapters.safetensors"}),
        ({"profile": "portable", "gguf": True}, {"adapter_model.safetensors", "adapter.gguf"}),
    ],
)
def test_other_layouts_go_up_whole(
    hub: UploadHub, push: Push, made: Made, tmp_path: Path, options: dict[str, Any], weights: set[str]
) -> None:
    folder, paths = tmp_path / "other", [str(path) for path in made.paths]
    export_adapter(ExportRequest(method="sum", adapters=paths, base=str(made.base), **options), folder)
    found = push(folder)
    names = FILES - {"adapter_model.safetensors"} | weights
    assert {file.name for file in found.files} == names == contents(folder).keys()
    assert hub.head(REPO).files == EMPTY | contents(folder)


def test_the_same_bytes_are_not_committed_twice(hub: UploadHub, push: Push) -> None:
    first = push()
    hub.requests.clear()
    again = push()
    assert (again.committed, again.commit, again.url) == (False, first.commit, first.url)
    assert {file.state for file in again.files} == {"same"} and not again.created
    assert len(hub.commits) == 1 and writes(hub) == []


def test_a_large_file_that_the_hub_has_is_not_sent_again_and_nothing_is_drawn(
    hub: UploadHub, push: Push, capfd: pytest.CaptureFixture[str]
) -> None:
    push()
    hub.requests.clear()
    assert push(repo_id="org/second").committed
    assert not any("/store/" in path for _, path in hub.requests)
    assert capfd.readouterr() == ("", "")
    assert not are_progress_bars_disabled()


def test_a_second_push_replaces_what_changed_and_no_file_of_anybody_else(hub: UploadHub, push: Push, out: Path) -> None:
    hub.add(REPO, {"LICENSE": b"mine", "adapter.gguf": b"of an earlier export", "README.md": b"old"})
    found = push()
    theirs = {"LICENSE": b"mine", "adapter.gguf": b"of an earlier export"}
    assert found.left_there == ("adapter.gguf",) and not found.created
    assert {file.name: file.state for file in found.files}["README.md"] == "changed"
    assert hub.head(REPO).files == theirs | contents(out)
    assert not push().committed
    with (out / "README.md").open("a") as card:
        card.write("\nWords of the author.\n")
    hub.requests.clear()
    with pytest.raises(VerificationError) as caught:
        push()
    assert "--edited-card" in caught.value.problems[0] and hub.requests == []
    found = push(edited_card=True)
    assert [file.name for file in found.files if file.state != "same"] == ["README.md"]
    assert "README.md" in [item.what for item in found.verification.not_checked]
    assert not any("/store/" in path for _, path in hub.requests)
    assert hub.head(REPO).files == theirs | contents(out)


def test_private_is_for_new_repositories(hub: UploadHub, push: Push) -> None:
    assert push(private=True).private is True and hub.private == {REPO}
    assert push(private=True).private is True
    hub.add("org/public", {"README.md": b""})
    hub.requests.clear()
    with pytest.raises(UsageError, match="org/public is there and public"):
        push(repo_id="org/public", private=True)
    assert writes(hub) == []


def test_a_repository_that_was_to_be_private_and_is_not_gets_nothing(hub: UploadHub, push: Push) -> None:
    hub.all_public = True
    with pytest.raises(AccessDenied, match="has made the repository public; nothing was uploaded"):
        push(private=True)
    assert hub.commits == [] and hub.large == {}


def test_a_branch_is_made_and_the_default_one_is_left_alone(hub: UploadHub, push: Push, out: Path) -> None:
    new = push(revision="v2/cat")
    assert hub.head(REPO).files == EMPTY and hub.head(REPO, "v2/cat") == (new.commit, EMPTY | contents(out))
    same = push().commit
    assert push(revision="v3", dry_run=True).commit is None and "v3" not in hub.repositories[REPO].revisions
    found = push(revision="v3")
    assert (found.committed, found.commit) == (False, same) and hub.head(REPO, "v3").commit == same
    old = hub.add("org/old", {"README.md": b"old"})
    found = push(repo_id="org/old", revision="v2")
    assert hub.head("org/old").commit == old and hub.head("org/old", "v2").commit == found.commit
    assert fetch_adapter("org/old@v2").commit == found.commit
    with pytest.raises(UsageError, match="is a commit"):
        push(revision=old)


def test_a_pull_request_leaves_the_branch_alone(hub: UploadHub, push: Push, out: Path) -> None:
    with pytest.raises(InputError, match="no such repository"):
        push(create_pr=True)
    before = hub.add(REPO, {"README.md": b"old"})
    with pytest.raises(InputError, match="no branch 'v2'"):
        push(create_pr=True, revision="v2")
    assert writes(hub) == []
    found = push(create_pr=True)
    assert hub.head(REPO).commit == before and hub.head(REPO, "refs/pr/1") == (found.commit, contents(out))
    assert found.pull_request == f"{hub.url}/{REPO}/discussions/1"


def test_a_dry_run_writes_nothing(hub: UploadHub, push: Push) -> None:
    found = push(dry_run=True)
    assert (found.commit, found.committed, found.created, found.private) == (None, False, True, None)
    assert writes(hub) == [] and REPO not in hub.repositories
    assert {file.name for file in found.files} == FILES


def test_a_push_that_meets_another_changes_nothing(hub: UploadHub, push: Push) -> None:
    hub.add(REPO, {"README.md": b"old"})
    hub.before["commit"] = lambda: hub.add(REPO, {"README.md": b"of somebody else"})
    with pytest.raises(LoracatError, match="somebody else has pushed") as caught:
        push()
    assert caught.value.exit_code == 1 and hub.commits == []
    assert hub.head(REPO).files == {"README.md": b"of somebody else"}
    assert push().committed


@pytest.mark.parametrize(
    ("step", "status", "kind", "said"),
    [
        ("create", 403, AccessDenied, "may not create it"),
        ("create", 404, InputError, "no user or organisation 'org'"),
        ("create", 409, AccessDenied, "it is there already"),
        ("preupload", 401, AccessDenied, "not accept the token|shows no such repository"),
        ("preupload", 403, AccessDenied, "may not write to it"),
        ("batch", 403, AccessDenied, "may not write to it"),
        ("store", 403, HubUnreachable, "breaks off"),
        ("validate", 400, InputError, "metadata of the card"),
        ("commit", 403, AccessDenied, "may not write to it"),
        ("commit", 422, InputError, "refuses it"),
        ("commit", 500, HubUnreachable, "the Hub fails"),
    ],
)
def test_a_refusal_at_any_step_commits_nothing_and_a_later_push_succeeds(
    hub: UploadHub, push: Push, out: Path, step: str, status: int, kind: type[LoracatError], said: str
) -> None:
    hub.refuse[step] = status
    with pytest.raises(kind, match=said) as caught:
        push()
    assert caught.value.hint and "words of the server" not in str(caught.value) and hub.token not in str(caught.value)
    if kind is AccessDenied:
        assert "hf auth login" in caught.value.hint
    assert hub.commits == []
    hub.refuse.clear()
    assert push().committed and hub.head(REPO).files == EMPTY | contents(out)


def test_an_upload_that_breaks_off_commits_nothing_and_a_later_push_succeeds(
    hub: UploadHub, push: Push, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # five tries
    told = Told()
    hub.refuse["store"] = 0
    with pytest.raises(HubUnreachable, match="breaks off"):
        push(progress=told)
    assert hub.commits == [] and hub.large == {} and hub.head(REPO).files == EMPTY
    name = "adapter_model.safetensors"
    assert told.done[name] <= (out / name).stat().st_size  # what is sent again is not counted again
    hub.refuse.clear()
    assert push().committed and hub.head(REPO).files == EMPTY | contents(out)


def test_a_commit_whose_answer_was_lost_is_found_there(hub: UploadHub, push: Push, out: Path) -> None:
    hub.refuse["answer"] = 0
    with pytest.raises(HubUnreachable, match="breaks off"):
        push()
    hub.refuse.clear()
    found = push()
    assert (found.committed, found.commit) == (False, hub.head(REPO).commit) and len(hub.commits) == 1


def test_a_file_that_changes_after_it_was_verified_does_not_go_up(hub: UploadHub, push: Push, out: Path) -> None:
    hub.before["create"] = lambda: flip(out)
    with pytest.raises(IntegrityError, match="adapter_model.safetensors has changed since"):
        push()
    assert hub.commits == [] and hub.large == {}


def test_without_a_token_a_network_or_a_hub_nothing_begins(
    hub: UploadHub, push: Push, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AccessDenied, match="may not create it") as caught:
        push(token="hf_that_only_reads")
    assert "hf auth login" in str(caught.value.hint) and hub.commits == []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    with pytest.raises(HubUnreachable, match="offline"):
        push()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("loracli.pushing.push.get_token", lambda: None)
    with pytest.raises(AccessDenied, match="needs a Hub token") as caught:
        push()
    assert "hf auth login" in str(caught.value.hint) and hub.requests == []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.stop()
    with pytest.raises(HubUnreachable, match="does not answer"):
        push(token=hub.token)


@pytest.mark.parametrize(("other", "said"), [(b"other", "has other bytes"), (None, "is not there")])
def test_what_the_hub_holds_is_compared_with_what_was_pushed(
    hub: UploadHub, push: Push, other: bytes | None, said: str
) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        hub.damage = {name: other}
        with pytest.raises(VerificationError) as caught:
            push()
        assert caught.value.exit_code == 7 and caught.value.problems == (f"{name} {said}",)


def flip(out: Path) -> None:
    data = bytearray((out / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "adapter_model.safetensors").write_bytes(data)


def link(out: Path) -> None:
    (out / "README.md").rename(out.parent / "elsewhere.md")
    (out / "README.md").symlink_to(out.parent / "elsewhere.md")


def add_to_card(out: Path, text: str) -> None:
    with (out / "README.md").open("a") as card:
        card.write(text)


def base_in_card(out: Path) -> None:
    card = out / "README.md"
    card.write_text(card.read_text().replace(f'base_model: "{BASE_ID}"', "base_model: else/where"))


def endless_base_in_card(out: Path) -> None:
    """Seven levels of eight are two million names, written out."""
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, 8)]
    names = "\n".join(["a0: &a0 x", *levels, "base_model: *a7"])
    card = out / "README.md"
    card.write_text(card.read_text().replace(f'base_model: "{BASE_ID}"', names))


def path_of_author(fields: dict[str, Any]) -> None:
    fields["recipe"]["adapters"][0]["base_model"] = "/home/alice/llama"


@pytest.mark.parametrize(
    ("damage", "code", "said"),
    [
        (flip, 7, "not what its record says"),
        (lambda out: change(out / "adapter_config.json", lambda f: f.update(lora_alpha=3)), 7, "not what its record"),
        (lambda out: change(out / "loracat.json", lambda f: f.pop("certificate")), 7, "the record is damaged"),
        (lambda out: (out / "loracat.json").write_text("[]"), 7, "the record is damaged"),
        (lambda out: (out / "loracat.json").unlink(), 3, "was not written by loracat"),
        (lambda out: change(out / "loracat.json", lambda f: f.update(conversion={})), 3, "loracat convert"),
        (lambda out: (out / "loracat-fuse.json").write_text("{}"), 3, "is a fused model"),
        (link, 7, "not what its record says"),
        (lambda out: (out / "README.md").unlink(), 7, "not what its record says"),
        (base_in_card, 3, "the card's base_model is 'else/where'"),
        (lambda out: (out / "README.md").write_text("---\n- a\n---\n"), 3, "is not a mapping"),
        (endless_base_in_card, 3, "the card's base_model is no single name, and"),
        (lambda out: add_to_card(out, f"see {Path.cwd()}/recipe.json"), 3, "holds the path"),
        (lambda out: add_to_card(out, f"see `{out.parent}`"), 3, "holds the path"),
        (lambda out: add_to_card(out, f"see file://{out.parent}/recipe.json"), 3, "holds the path"),
        (lambda out: add_to_card(out, f"see {Path.home()}/recipe.json"), 3, "holds the path"),
        (lambda out: add_to_card(out, "token: hf_canary_that_may_write"), 3, "holds the token"),
        (lambda out: change(out / "loracat.json", path_of_author), 3, "holds the path /home/alice/llama"),
    ],
)
def test_what_must_not_go_up_is_refused_before_any_request(
    hub: UploadHub,
    push: Push,
    out: Path,
    damage: Callable[[Path], object],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")  # neither the current folder nor above the export
    damage(out)
    with pytest.raises(LoracatError, match=said) as caught:
        push(edited_card=True)
    assert caught.value.exit_code == code and (caught.value.hint or code == 7) and hub.requests == []
    assert hub.token not in str(caught.value)


@pytest.mark.parametrize("also", [(), ("loracat_export", "versions")])
def test_a_record_without_hashes_is_not_pushed(hub: UploadHub, push: Push, out: Path, also: tuple[str, ...]) -> None:
    add_to_card(out, "It beats everything.")
    record = out / "loracat.json"
    fields = json.loads(record.read_text())
    for key in ("record_sha256", "text_sha256", *also):
        del fields[key]
    record.write_text(json.dumps(fields))
    with pytest.raises(InputError if also else IntegrityError, match="export it again|text_sha256: missing|no hashes"):
        push()
    assert hub.requests == []


def test_what_a_directory_holds_is_refused_without_a_token(
    hub: UploadHub, push: Push, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("loracli.pushing.push.get_token", lambda: None)
    add_to_card(out, f"see {Path.home()}/recipe.json")
    with pytest.raises(InputError, match="holds the path"):
        push(edited_card=True)
    flip(out)
    with pytest.raises(VerificationError):
        push()
    assert hub.requests == []


def test_a_text_that_stands_inside_a_hash_is_no_token_in_a_file(hub: UploadHub, push: Push, out: Path) -> None:
    [digest, *_] = json.loads((out / "loracat.json").read_text())["certificate"]["sha256"].values()
    assert push(token=digest[5:9], dry_run=True).files


@pytest.mark.parametrize("repo_id", ["name", "org/name/more", "../name", "org/na me", "org/name@v2"])
def test_a_name_that_no_repository_has_is_refused(hub: UploadHub, push: Push, repo_id: str) -> None:
    with pytest.raises(UsageError, match="is not the name of a Hub repository"):
        push(repo_id=repo_id)
    assert hub.requests == []
