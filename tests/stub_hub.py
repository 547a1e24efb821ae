"""A Hub on 127.0.0.1 that the real huggingface_hub client can talk to: repositories from dicts, faults on demand.

    with StubHub() as hub:
        commit = hub.add("org/name", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"..."})
        fetch_adapter("org/name", endpoint=hub.url, cache_dir=tmp_path)
        assert hub.count() == 1

It answers what a model download needs: repository info, the file tree, and files by HEAD and GET with ranges. As on
the real Hub, safetensors are large files, known by their sha256 and behind a redirect; others have their git hash.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

# Name of a fault: the answer's status and headers.
ANSWERS: dict[str, tuple[int, dict[str, str]]] = {
    "missing": (401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."}),
    "gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "You are not in the authorized list."}),
    "disabled": (403, {"X-Error-Message": "Access to this resource is disabled."}),
    "bad token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "no revision": (404, {"X-Error-Code": "RevisionNotFound"}),
    "no entry": (404, {"X-Error-Code": "EntryNotFound"}),
    "limited": (429, {"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}),
    "retry after": (429, {"Retry-After": "17"}),
}


@dataclass
class Repository:
    """Commits by sha, branches and tags by name.

    Attributes:
        fault: a name of ANSWERS or a status, given instead of an answer; `portal` for a page of HTML, `short` for files
            that end early, `no commit` for files without the header that names it; or a name of LISTING_FAULTS,
            HEADER_FAULTS or BODY_FAULTS.
        faulty: which requests the fault meets: `info`, `file`.
        at: the byte that a fault of BODY_FAULTS happens at.
        times: how many bodies it spoils; None for all.
        only: how the names of the files end that it spoils.
        released: lets a stalled body go on.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    fault: str | int | None = None
    faulty: tuple[str, ...] = ("info", "file")
    at: int = 0
    times: int | None = None
    only: str = ".safetensors"
    released: threading.Event = field(default_factory=threading.Event)

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.revisions.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


class StubHub:
    """The server; a context manager. `requests` holds every request as (method, path), `tokens` every token sent."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()
        self.renamed: dict[str, str] = {}  # old repository to new
        self.elsewhere = ""  # address of another host that large files are redirected to
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> StubHub:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """From here on the port refuses connections."""
        for repository in self.repositories.values():
            repository.released.set()
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def add(self, repo_id: str, files: dict[str, bytes], *, revision: str = "main") -> str:
        """A commit with these files, at the head of `revision`; its sha."""
        content = json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in files.items()})
        commit = hashlib.sha1((repo_id + content).encode()).hexdigest()
        repository = self.repositories.setdefault(repo_id, Repository())
        repository.commits[commit] = dict(files)
        repository.revisions[revision] = commit
        return commit

    def fail(
        self,
        repo_id: str,
        fault: str | int | None,
        *,
        on: tuple[str, ...] = ("info", "file"),
        at: int = 0,
        times: int | None = None,
        only: str = ".safetensors",
    ) -> None:
        """From here on the requests `on` the repository meet `fault`; None for no more."""
        repository = self.repositories.setdefault(repo_id, Repository())
        repository.fault, repository.faulty = fault, on
        repository.at, repository.times, repository.only = at, times, only

    def count(self, method: str | None = None) -> int:
        """How many requests came since the start or since `requests.clear()`."""
        return sum(method in (None, m) for m, _ in self.requests)


def etag_of(name: str, data: bytes) -> str:
    """sha256 for a large file, git's blob hash for any other."""
    if name.endswith(".safetensors"):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


# Faults of a listing: what becomes of the repository's info.


def _no_fault(content: dict[str, Any]) -> None:
    pass


def _without(*keys: str) -> Callable[[dict[str, Any]], None]:
    def spoil(info: dict[str, Any]) -> None:
        for sibling in info["siblings"]:
            for key in keys:
                sibling.pop(key, None)

    return spoil


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update({key: value})


LISTING_FAULTS: dict[str | int | None, Callable[[dict[str, Any]], object]] = {
    "no sizes": _without("size", "lfs"),
    "no hashes": _without("blobId", "lfs"),
    "evil hashes": lambda info: [sibling.update(blobId="../" * 9 + "etc/passwd") for sibling in info["siblings"]],
    "no sha": _set("sha", None),
    "evil sha": _set("sha", "../../../" + "a" * 31),
}

# Faults of a file's headers.

HEADER_FAULTS: dict[str | int | None, Callable[[dict[str, Any]], None]] = {
    "no etag": lambda headers: headers.pop("ETag"),
    "other commit": _set("X-Repo-Commit", "f" * 40),
}

# Faults of a file's body: HEAD once, when the status and the headers are sent, and blocks of bytes.

HEAD = b"HEAD"
Body = Iterator[bytes]


def _cut(repository: Repository, headers: dict[str, str], data: bytes) -> Body:
    """Ends the connection at a byte of the file, also of the parts that are asked for after."""
    first = int(headers.get("Content-Range", "bytes 0").split()[1].split("-")[0])
    yield HEAD
    yield data[: max(0, repository.at - first)]


def _other_bytes(repository: Repository, headers: dict[str, str], data: bytes) -> Body:
    yield HEAD
    yield data[: repository.at] + bytes(byte ^ 1 for byte in data[repository.at : repository.at + 1])
    yield data[repository.at + 1 :]


def _without_length(repository: Repository, headers: dict[str, str], data: bytes) -> Body:
    del headers["Content-Length"]
    yield HEAD
    yield data


def _longer(repository: Repository, headers: dict[str, str], data: bytes) -> Body:
    yield from _without_length(repository, headers, data + b".")


def _compressed(repository: Repository, headers: dict[str, str], data: bytes) -> Body:
    content = gzip.compress(data)
    headers |= {"Content-Encoding": "gzip", "Content-Length": str(len(content))}
    yield HEAD
    yield content


def _bomb(repository: Repository, headers: dict[str, str], data: bytes) -> Body:
    yield from _compressed(repository, headers, data + bytes(24 << 20))


def _drip(repository: Repository, headers: dict[str, str], data: bytes) -> Body:
    yield HEAD
    for start in range(0, len(data), 2000):
        time.sleep(0.005)
        yield data[start : start + 2000]


def _stall(repository: Repository, headers: dict[str, str], data: bytes) -> Body:
    yield HEAD
    yield data[: repository.at]
    repository.released.wait(30)


BODY_FAULTS: dict[str | int | None, Callable[[Repository, dict[str, str], bytes], Body]] = {
    "cut": _cut,
    "other bytes": _other_bytes,
    "no length": _without_length,
    "longer": _longer,
    "gzip": _compressed,
    "bomb": _bomb,
    "drip": _drip,
    "stall": _stall,
}


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        hub: StubHub = self.server.hub  # type: ignore[attr-defined]
        hub.requests.append((self.command, self.path))
        hub.tokens.add(self.headers.get("Authorization"))
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        is_info = parts[:2] == ["api", "models"]
        repo_id, rest = "/".join(parts[2:4] if is_info else parts[:2]), parts[4:] if is_info else parts[2:]
        if repo_id in hub.renamed:
            self._send(307, {"Location": self.path.replace(repo_id, hub.renamed[repo_id], 1)}, b"")
            return
        repository = hub.repositories.get(repo_id, Repository(fault="missing"))
        if repository.fault is not None and ("info" if is_info else "file") in repository.faulty:
            if self._fail(repository.fault):
                return
        found = repository.files(rest[1] if len(rest) > 1 else "main")
        if found is None:
            self._fail("no revision")
        elif is_info:
            info = _info(repo_id, *found)
            LISTING_FAULTS.get(repository.fault, _no_fault)(info)
            self._json(_tree(*found) if rest[:1] == ["tree"] else info)
        else:
            self._file(*found, "/".join(rest[2:]), repository.fault, redirect=rest[0] == "resolve", body=body)

    def _fail(self, fault: str | int) -> bool:
        """Answers with the fault, unless it is one that belongs into a file's answer."""
        if fault == "portal":
            self._send(200, {"Content-Type": "text/html"}, b"<html>Please accept our terms</html>")
        elif isinstance(fault, int):
            told = f"\x1b[31mwords of the server on {self.headers.get('Authorization')}"
            self._send(fault, {"X-Error-Message": told}, json.dumps({"error": told}).encode())
        elif fault in ANSWERS:
            self._send(*ANSWERS[fault], b"{}")
        elif fault == "hangs up":
            self.close_connection = True
        else:
            return False
        return True

    def _file(
        self, commit: str, files: dict[str, bytes], name: str, fault: str | int | None, *, redirect: bool, body: bool
    ) -> None:
        if name not in files:
            self._fail("no entry")
            return
        data, etag = files[name], f'"{etag_of(name, files[name])}"'
        headers = {"ETag": etag, "Content-Length": str(len(data))}
        if fault != "no commit":
            headers["X-Repo-Commit"] = commit
        HEADER_FAULTS.get(fault, _no_fault)(headers)
        if redirect and name.endswith(".safetensors"):
            location = self.server.hub.elsewhere + self.path.replace("/resolve/", "/large/", 1)  # type: ignore[attr-defined]
            linked = {"X-Linked-ETag": etag, "X-Linked-Size": str(len(data)), "Location": location}
            self._send(302, {**headers, **linked, "Content-Length": "0"}, b"")
            return
        status, asked = 200, self.headers.get("Range")
        if asked:
            first = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            status, data = 206, data[first:]
        if fault == "short" and body:
            data = data[: len(data) // 2]
        headers["Content-Length"] = str(len(data))
        if body and self._spoil(fault, status, headers, data):
            return
        self._send(status, headers, data if body else b"")

    def _spoil(self, fault: str | int | None, status: int, headers: dict[str, str], data: bytes) -> bool:
        """Sends a body of BODY_FAULTS instead of `data`; False if there is none to send any more."""
        repository = self.server.hub.repositories["/".join(self.path.split("/")[1:3])]  # type: ignore[attr-defined]
        if fault not in BODY_FAULTS or repository.times == 0 or not self.path.endswith(repository.only):
            return False
        if repository.times is not None:
            repository.times -= 1
        for change in BODY_FAULTS[fault](repository, headers, data):
            if change is HEAD:
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.end_headers()
            else:
                self.wfile.write(change)
                self.wfile.flush()
        self.close_connection = True
        return True

    def _json(self, content: Any) -> None:
        warning = f"topic {secrets.token_hex(4)}; words of the server"  # the client logs each topic once
        self._send(200, {"Content-Type": "application/json", "X-HF-Warning": warning}, json.dumps(content).encode())

    def _send(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _info(repo_id: str, commit: str, files: dict[str, bytes]) -> dict[str, Any]:
    siblings = []
    for name, data in files.items():
        large = {"size": len(data), "sha256": etag_of(name, data), "pointerSize": 134}
        lfs = {"lfs": large} if name.endswith(".safetensors") else {}
        siblings.append({"rfilename": name, "size": len(data), "blobId": etag_of(name, data), **lfs})
    return {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings, "private": False, "tags": []}


def _tree(commit: str, files: dict[str, bytes]) -> list[dict[str, Any]]:
    return [
        {"type": "file", "path": name, "size": len(data), "oid": etag_of(name, data)} for name, data in files.items()
    ]
