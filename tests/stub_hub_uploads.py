"""The stub Hub with what an upload asks of it: repositories, branches, large files, commits, pull requests.

    with UploadHub() as hub:
        push_adapter(PushRequest(folder, "org/name"), token=hub.token, endpoint=hub.url)
        assert hub.head("org/name").files["README.md"] == (folder / "README.md").read_bytes()

As on the real Hub a commit names large files by their sha256, which have to be stored before it, and is refused with
412 if the branch does not stand at its parent any more. Only `token` may write, and only for `owners`.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from tests.stub_hub import Repository, StubHub, _Handler, etag_of

EMPTY = {".gitattributes": b"*.safetensors filter=lfs\n"}  # what a new repository holds


class Branch(NamedTuple):
    """Where a branch stands."""

    commit: str
    files: dict[str, bytes]


class UploadHub(StubHub):
    """The server.

    Attributes:
        token: that may write.
        owners: that it may make repositories of.
        private: repositories that are.
        all_public: makes none that is, whatever is asked for.
        large: large files that were stored, by sha256.
        commits: the messages of all commits that were made here, in order.
        refuse: by the name of a step (`create`, `branch`, `validate`, `preupload`, `batch`, `store`, `commit`) the
            status that it ends with; of `store`, 0 breaks the connection off. `answer` makes a commit and says nothing.
        before: called with nothing before a step is answered, by the name of the step.
        damage: names of files that a commit stores with other bytes, or with None not at all.
    """

    def __init__(self) -> None:
        super().__init__()
        self._server.RequestHandlerClass = _UploadHandler
        self.token = "hf_canary_that_may_write"
        self.owners = ("org",)
        self.private: set[str] = set()
        self.all_public = False
        self.large: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.refuse: dict[str, int] = {}
        self.before: dict[str, Callable[[], object]] = {}
        self.damage: dict[str, bytes | None] = {}
        self.received: list[bytes] = []  # every byte that came, but the token

    def head(self, repo_id: str, revision: str = "main") -> Branch:
        """What a branch or a commit holds."""
        found = self.repositories[repo_id].files(revision)
        assert found is not None
        return Branch(*found)


class _UploadHandler(_Handler):
    def do_POST(self) -> None:
        self._write()

    def do_PUT(self) -> None:
        self._write()

    def _json(self, content: Any) -> None:
        if isinstance(content, dict) and "siblings" in content:
            content["private"] = content["id"] in self._hub.private
        super()._json(content)

    @property
    def _hub(self) -> UploadHub:
        hub: UploadHub = self.server.hub  # type: ignore[attr-defined]
        return hub

    def _write(self) -> None:
        hub, address = self._hub, urlsplit(self.path)
        hub.requests.append((self.command, self.path))
        hub.received += [
            self.path.encode(),
            *(v.encode() for k, v in self.headers.items() if k.lower() != "authorization"),
        ]
        parts = [unquote(part) for part in address.path.strip("/").split("/")]
        if parts[0] == "store":
            self._store(parts[1])
            return
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.received.append(data)
        hub.tokens.add(self.headers.get("Authorization"))
        step = self._step(parts)
        if step in hub.before:
            hub.before.pop(step)()
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._fail(401 if self.headers.get("Authorization") is None else 403)
        elif step in hub.refuse:
            self._fail(hub.refuse[step])
        elif step == "commit":
            self._commit("/".join(parts[2:4]), parts[5], data, pull="create_pr=1" in address.query)
        else:
            body = json.loads(data)
            getattr(self, f"_{step}")(parts, body)

    @staticmethod
    def _step(parts: list[str]) -> str:
        if parts[-3:] == ["lfs", "objects", "batch"]:
            return "batch"
        named = {"create": "create", "validate-yaml": "validate"}
        return named.get(parts[-1]) or parts[4]

    def _create(self, parts: list[str], body: dict[str, Any]) -> None:
        hub, repo_id = self._hub, f"{body['organization']}/{body['name']}"
        if body["organization"] not in hub.owners:
            self._fail(403)
        elif repo_id in hub.repositories:
            self._fail(409)
        else:
            hub.add(repo_id, EMPTY)
            if not hub.all_public and (body.get("private") or body.get("visibility") == "private"):
                hub.private.add(repo_id)
            self._json({"url": f"{hub.url}/{repo_id}"})

    def _branch(self, parts: list[str], body: dict[str, Any]) -> None:
        self._repository("/".join(parts[2:4])).revisions[parts[5]] = body["startingPoint"]
        self._json({})

    def _validate(self, parts: list[str], body: dict[str, Any]) -> None:
        self._json({"errors": [], "warnings": [{"message": "words of the server"}]})

    def _preupload(self, parts: list[str], body: dict[str, Any]) -> None:
        found = self._repository("/".join(parts[2:4])).files(parts[5])
        if found is None:
            self._fail("no revision")
            return
        files = []
        for file in body["files"]:
            name, there = file["path"], found[1]
            mode = "lfs" if name.endswith(".safetensors") else "regular"
            oid = etag_of(name, there[name]) if name in there else None
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files})

    def _batch(self, parts: list[str], body: dict[str, Any]) -> None:
        objects = []
        for item in body["objects"]:
            action = {"upload": {"href": f"{self._hub.url}/store/{item['oid']}"}}
            objects.append({**item, **({} if item["oid"] in self._hub.large else {"actions": action})})
        self._json({"transfer": "basic", "objects": objects})

    def _store(self, oid: str) -> None:
        """Large files come here, without a token."""
        assert self.headers.get("Authorization") is None
        size, status = int(self.headers["Content-Length"]), self._hub.refuse.get("store")
        data = self.rfile.read(size if status is None else size // 2)
        if status == 0:
            self.connection.close()
            return
        if status is not None:
            self.rfile.read(size - len(data))
            self._fail(status)
            return
        assert hashlib.sha256(data).hexdigest() == oid
        self._hub.large[oid] = data
        self._hub.received.append(data)
        self._send(200, {}, b"")

    def _commit(self, repo_id: str, revision: str, data: bytes, *, pull: bool) -> None:
        hub, repository = self._hub, self._repository(repo_id)
        [header, *operations] = [json.loads(line) for line in data.splitlines()]
        commit, before = repository.files(revision) or ("", {})
        if header["value"]["parentCommit"] != commit:
            self._fail(412)
            return
        files = dict(before)
        for operation in operations:
            name, value = operation["value"]["path"], operation["value"]
            whole = operation["key"] == "file"
            files[name] = base64.b64decode(value["content"]) if whole else hub.large[value["oid"]]
        for name, other in hub.damage.items():
            files.pop(name)
            if other is not None:
                files[name] = other
        content = json.dumps([commit, *(f"{name} {hashlib.sha256(data).hexdigest()}" for name, data in files.items())])
        made = hashlib.sha1(content.encode()).hexdigest()
        repository.commits[made] = files
        number = len([name for name in repository.revisions if name.startswith("refs/pr/")]) + 1
        repository.revisions[f"refs/pr/{number}" if pull else revision] = made
        hub.commits.append(header["value"]["summary"])
        if "answer" in hub.refuse:
            self.connection.close()
            return
        answer = {"success": True, "commitOid": made, "commitUrl": f"{hub.url}/{repo_id}/commit/{made}"}
        self._json({**answer, **({"pullRequestUrl": f"{hub.url}/{repo_id}/discussions/{number}"} if pull else {})})

    def _repository(self, repo_id: str) -> Repository:
        return self._hub.repositories[repo_id]
