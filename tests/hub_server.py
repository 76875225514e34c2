"""A local replacement of the Hugging Face Hub with repositories in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class Hub(ThreadingHTTPServer):
    """HTTP server of the Hub.

    Attributes:
        repositories: "owner/name" -> commits, newest last; each maps file names to contents.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, list[dict[str, bytes]]] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, name: str, number: int) -> str:
        """Return the hash of a commit, given by its number."""
        return hashlib.sha1(f"{name} {number}".encode()).hexdigest()

    def state(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return the hash and the files of a revision ("main" or a hash)."""
        for number in range(len(self.repositories.get(name, ())) - 1, -1, -1):
            commit = self.commit(name, number)
            if revision in ("main", commit):
                return commit, self.repositories[name][number]
        return None


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code: str) -> None:
        self.answer({"error": code}, 404, X_Error_Code=code)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            name, action, revision = match.groups()
            state = self.server.state(name, revision or "main")
            if state is None:
                return self.missing("RevisionNotFound" if name in self.server.repositories else "RepoNotFound")
            if action == "tree":
                return self.answer(
                    [{"type": "file", "path": k, "size": len(v), "oid": _etag(v)} for k, v in state[1].items()]
                )
            siblings = [{"rfilename": file} for file in state[1]]
            return self.answer({"id": name, "modelId": name, "sha": state[0], "siblings": siblings})
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name, revision, file = match.groups()
            state = self.server.state(name, revision)
            if state is None or file not in state[1]:
                return self.missing("EntryNotFound" if state else "RepoNotFound")
            content = state[1][file]
            return self.answer(content, X_Repo_Commit=state[0], ETag=f'"{_etag(content)}"')
        return self.missing("RepoNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request['organization']}/{request['name']}" if request.get("organization") else request["name"]
            self.server.repositories.setdefault(name, [{}])
            return self.answer({"url": f"{self.server.address}/{name}"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/([^/]+)", path):
            name, action, _ = match.groups()
            if action == "preupload":
                files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
                return self.answer({"files": [{**file, "shouldIgnore": False} for file in files]})
            lines = [json.loads(line) for line in body.splitlines() if line]
            added = {
                v["path"]: base64.b64decode(v["content"]) for v in (e["value"] for e in lines if e["key"] == "file")
            }
            states = self.server.repositories[name]
            states.append({**states[-1], **added})
            commit = self.server.commit(name, len(states) - 1)
            return self.answer({"commitUrl": f"{self.server.address}/{name}/commit/{commit}", "commitOid": commit})
        return self.missing("RepoNotFound")


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def hub() -> Iterator[Hub]:
    """Run the server inside the `with` block."""
    server = Hub()
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
