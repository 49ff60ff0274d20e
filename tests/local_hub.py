"""A Hugging Face hub on this machine: the few endpoints that pushing a model and fetching a data set use."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LocalHub:
    """What the hub holds and was asked.

    Args:
        token: the one it knows.
        status: answer everything that changes something with this status instead.
        files: content of a data set by name.
        sha256: the checksum it names for each file, in place of the right one.
        cut_at: break every download off after so many bytes.
    """

    def __init__(
        self,
        *,
        token: str = "hf_right",
        status: int | None = None,
        files: dict[str, bytes] | None = None,
        sha256: str | None = None,
        cut_at: int | None = None,
    ) -> None:
        self.token, self.status, self.sha256, self.cut_at = token, status, sha256, cut_at
        self.files = files or {}
        self.asked: list[str] = []
        self.ranges: list[str | None] = []
        self.created: list[dict[str, Any]] = []
        self.committed: dict[str, bytes] = {}
        self.url = ""


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value: object, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def do_POST(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.asked.append(f"POST {path}")
        if path.endswith("/api/validate-yaml"):
            return self.answer_json({"errors": [], "warnings": []})
        if "/paths-info/" in path:
            return self.answer_json([self.described(name) for name in hub.files if name in body.decode()])
        if hub.status is not None:
            return self.answer_json({"error": "refused"}, hub.status)
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.answer_json({"error": "Invalid credentials"}, 401)
        if path == "/api/repos/create":
            hub.created.append(json.loads(body))
            return self.answer_json({"url": "{url}/{organization}/{name}".format(url=hub.url, **hub.created[-1])})
        if "/preupload/" in path:
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer_json({"files": modes})
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.committed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = hub.url + path.removeprefix("/api/models").replace("/commit/main", f"/commit/{COMMIT}")
            return self.answer_json({"commitUrl": url, "commitOid": COMMIT, "success": True})
        return self.answer_json({"error": "no such endpoint"}, 404)

    def described(self, name: str) -> dict[str, Any]:
        content = self.hub.files[name]
        sha256 = self.hub.sha256 or hashlib.sha256(content).hexdigest()
        lfs = {"oid": sha256, "size": len(content), "pointerSize": 130}
        return {"type": "file", "path": name, "size": len(content), "oid": "0" * 40, "lfs": lfs}

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        hub.asked.append(f"{self.command} {path}")
        if path.startswith("/api/datasets/"):
            if path.endswith(f"/tree/{COMMIT}"):
                return self.answer_json([self.described(name) for name in hub.files])
            if "/tree/" in path:  # there are no folders
                return self.answer(404, headers={"X-Error-Code": "EntryNotFound"})
            files = [{"rfilename": name} for name in hub.files]
            return self.answer_json({"id": "/".join(path.split("/")[3:5]), "sha": COMMIT, "siblings": files})
        name = path.partition("/resolve/")[2].partition("/")[2]
        if name not in hub.files:
            return self.answer(404, headers={"X-Error-Code": "EntryNotFound"})
        content, facts = hub.files[name], self.described(name)
        headers = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{facts["lfs"]["oid"]}"',
            "X-Linked-Etag": f'"{facts["lfs"]["oid"]}"',
            "X-Linked-Size": str(len(content)),
            "Accept-Ranges": "bytes",
        }
        if self.command == "HEAD":
            return self.answer(200, content, headers)
        wanted = self.headers.get("Range")
        hub.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if hub.cut_at is not None:
            self.send_response(206 if wanted else 200)
            for key, value in {**headers, "Content-Length": str(len(content) - start)}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content[start : hub.cut_at])
            self.wfile.flush()
            self.connection.close()
            return None
        return self.answer(206 if wanted else 200, content[start:], headers)


@contextmanager
def serve(hub: LocalHub) -> Iterator[LocalHub]:
    """Serve a hub on a free port of the loopback interface."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
