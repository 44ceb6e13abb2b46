"""A stand-in for the Hugging Face Hub on the loopback: what a push needs of it, and no more."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub(ThreadingHTTPServer):
    """Keeps what is pushed.

    Attributes:
        repositories: Name -> what was asked for when it was made.
        files: Path -> content, of all commits.
        tokens: Every token that was shown.
        refuses: The status that answers everything, None for none.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.refuses: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.path.startswith("/stored"):
            self.server.tokens.add(self.headers["Authorization"])
        if self.server.refuses:
            return self._say({"error": "no such right"}, self.server.refuses)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.repositories[name] = asked
            return self._say({"url": f"{self.server.url}/{name}"})
        if self.path == "/api/validate-yaml":
            return self._say({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            return self._say({"files": [_mode(file["path"]) for file in json.loads(body)["files"]]})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [self._place(found) for found in json.loads(body)["objects"]]
            return self._say({"transfer": "basic", "objects": objects})
        return self._commit([json.loads(line) for line in body.splitlines()])

    def do_PUT(self) -> None:
        size = int(self.headers["Content-Length"])
        self.server.stored[self.path.rpartition("/")[2]] = self.rfile.read(size)
        self._say({})

    def _place(self, found: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.server.url}/stored/{found['oid']}"
        return {**found, "actions": {"upload": {"href": href}}}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.stored[value["oid"]]
        repository = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
        url = f"{self.server.url}/{repository}/commit/{'0' * 40}"
        self._say({"commitUrl": url, "commitOid": "0" * 40, "success": True})

    def _say(self, answer: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def _mode(path: str) -> dict[str, Any]:
    is_large = path.endswith((".safetensors", ".pt", ".onnx"))
    return {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}


@contextmanager
def stand_in() -> Iterator[Hub]:
    """One that runs inside the block."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
