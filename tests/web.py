"""A web server for tests: files in memory, and the ways in which servers fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Web:
    """What a server holds and was asked.

    Attributes:
        files: content by path.
        versions: the ETag by path; the content's hash by default.
        ranges: whether it gives a part of a file.
        breaks: after how many bytes it breaks off each of the next answers that would be longer.
        status: what it answers instead.
        headers: what it says beside.
        silent_s: how long it waits before each answer.
        asked: the path and the range of each request.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    breaks: list[int] = field(default_factory=list)
    status: int | None = None
    headers: dict[str, str | None] = field(default_factory=dict)
    silent_s: float = 0.0
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    web: Web

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        web, wanted = self.web, self.headers.get("Range")
        web.asked.append((self.path, wanted))
        time.sleep(web.silent_s)
        content = web.files.get(self.path)
        if content is None or web.status is not None:
            return self.send_error(web.status or 404)
        first, last = 0, len(content) - 1
        if web.ranges and wanted:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(end or last), last)
            if first >= len(content):
                return self.send_error(416)
        self.send_response(206 if web.ranges and wanted else 200)
        told: dict[str, str | None] = {
            "Content-Length": str(last + 1 - first),
            "Content-Range": f"bytes {first}-{last}/{len(content)}" if web.ranges and wanted else None,
            "ETag": web.versions.get(self.path, str(hash(content))),
        }
        for name, value in (told | web.headers).items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        part = content[first : last + 1]
        if web.breaks and web.breaks[0] < len(part):
            part = part[: web.breaks.pop(0)]
            self.close_connection = True
        self.wfile.write(part)
        return None


@contextmanager
def serve(web: Web) -> Iterator[Web]:
    """Serve files on a free port of the loopback interface."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"web": web}))
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # who has read enough hangs up
    web.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
