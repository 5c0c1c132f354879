"""The part of the Hugging Face Hub that an upload speaks to, on a port of this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_" + hashlib.sha256(b"a token of nobody").hexdigest()[:34]


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Hub:
    """What it knows, and whom it lets do what.

    Attributes:
        repositories: Name with owner -> what is there.
        account: What it says of the owner of `TOKEN`.
        refuses: Paths of requests, as patterns, that are answered with an error.
        asked: Method and path of each request.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    account: dict[str, Any] = field(default_factory=lambda: {"name": "me", "orgs": [{"name": "us"}], "role": "write"})
    refuses: str | None = None
    asked: list[str] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    address: str = ""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def _answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        self.hub.asked.append(f"{self.command} {path}")
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.hub.refuses is not None and re.search(self.hub.refuses, path):
            self._answer({"error": f"{path} is refused, as the test wants"}, 403)
        elif path.startswith("/blobs/"):
            self._take_blob(path, body)
        elif not known:
            said = "Invalid credentials in Authorization header"
            self._answer({"error": said}, 401, X_Error_Message=said)
        elif path == "/api/whoami-v2":
            role = {"auth": {"accessToken": {"role": self.hub.account["role"]}}}
            self._answer({"type": "user", **self.hub.account, **role})
        elif path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            self._batch(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(\w+)(?:/.*)?)?", path):
            self._of_repository(found[1], found[2], body)
        else:
            self._answer({"error": "there is nothing"}, 404, X_Error_Code="RepoNotFound")

    do_GET = do_POST = do_PUT = _handle

    def _take_blob(self, path: str, body: bytes) -> None:
        if self.command == "PUT":
            assert hashlib.sha256(body).hexdigest() == path.rpartition("/")[2]
            self.hub.blobs[path.rpartition("/")[2]] = body
        self._answer({})

    def _validate(self, content: str) -> None:
        """Refuse a base model that can be none, as the Hub does."""
        found = re.search(r"^base_model: (.*)$", content, re.MULTILINE)
        if found and not re.fullmatch(r'"?[\w.-]+(/[\w.-]+)?"?', found[1]):
            self._answer({"errors": [{"message": '"base_model" is not valid'}], "warnings": []}, 400)
        else:
            self._answer({"errors": [], "warnings": []})

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or self.hub.account['name']}/{wanted['name']}"
        address = f"{self.hub.address}/{name}"
        if name in self.hub.repositories:
            self._answer({"error": "You already created this model repo", "url": address}, 409)
            return
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repositories[name] = Repository(private)
        self._answer({"url": address, "name": name})

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.address}/blobs/{each['oid']}"}}}
            for each in wanted["objects"]
        ]
        self._answer({"transfer": "basic", "objects": objects})

    def _of_repository(self, name: str, what: str | None, body: bytes) -> None:
        there = self.hub.repositories.get(name)
        if there is None:
            self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif what == "preupload":
            files = [
                {"path": each["path"], "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular"}
                for each in json.loads(body)["files"]
            ]
            self._answer({"files": [{**each, "shouldIgnore": False} for each in files]})
        elif what == "tree":
            self._answer(
                [
                    {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for path, content in there.files.items()
                ]
            )
        elif what == "commit":
            self._commit(there, body)
            self._answer({"commitUrl": f"{self.hub.address}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self._answer({"id": name, "private": there.private, "sha": "0" * 40, "siblings": []})

    def _commit(self, there: Repository, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                there.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                there.files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del there.files[value["path"]]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Yield a hub that answers at its `address`."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
