"""One headless Chromium for many pages, spoken to by its DevTools protocol over a pipe; no driver is needed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe")


class Browser:
    """A tab.

    Args:
        reading: what the browser writes to.
        writing: what it reads from.
    """

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing, self._number, self._rest = reading, writing, 0, b""
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **params: Any) -> Any:
        """Call a method of the protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        answer = self._next(lambda told: told.get("id") == self._number)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def show(self, url: str, *, width: int, dark: bool) -> None:
        """Load a page at a width, in light or dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        self._next(lambda told: told.get("method") == "Page.loadEventFired")

    def run(self, script: str) -> Any:
        """Return the value of an expression on the page, or that of its promise."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def _next(self, wanted: Any) -> dict[str, Any]:
        while True:
            while b"\0" not in self._rest:
                read = os.read(self._reading, 1 << 20)
                assert read, "the browser has ended"
                self._rest += read
            line, self._rest = self._rest.split(b"\0", 1)
            told: dict[str, Any] = json.loads(line)
            if wanted(told):
                return told


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Have a browser for as long as the context lasts.

    Args:
        folder: for its profile.
    """
    assert CHROMIUM is not None
    theirs_in, writing = os.pipe()
    reading, theirs_out = os.pipe()
    # The browser speaks on 3 and 4, which may be any of these four here.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (theirs_in, theirs_out)]

    def place() -> None:
        os.dup2(ends[0], 3)
        os.dup2(ends[1], 4)

    command = [CHROMIUM, *_FLAGS, f"--user-data-dir={folder}"]
    process = subprocess.Popen(command, close_fds=False, preexec_fn=place, stderr=subprocess.DEVNULL)
    for end in (theirs_in, theirs_out, *ends):
        os.close(end)
    try:
        yield Browser(reading, writing)
    finally:
        os.close(writing)  # it ends by itself
        process.wait()
        os.close(reading)
