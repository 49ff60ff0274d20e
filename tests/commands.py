"""Commands in processes of their own, whose descendants can be told by a mark in their environment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil


class Command:
    """``hncse ...`` in a process of its own, started in a folder."""

    def __init__(self, *arguments: str, cwd: Path | None = None) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hncse_ray.cli", *arguments, "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env=os.environ | {"HNCSE_TEST_MARK": self.mark},
            start_new_session=True,
            preexec_fn=lambda: signal.signal(
                signal.SIGINT, signal.SIG_DFL
            ),  # ignored where tests run in the background
        )

    def finish(self, seconds: float = 300) -> dict:
        """Wait for a good end and return what the command printed."""
        out, err = self.process.communicate(timeout=seconds)
        assert self.process.returncode == 0, err
        return json.loads(out.splitlines()[-1])

    def processes(self) -> list[psutil.Process]:
        """Everything that the command started and that is still there."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("HNCSE_TEST_MARK") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def is_gone(self) -> bool:
        """Wait until no process of this command is left; Ray's agents take some seconds to notice a kill."""
        return wait_for(lambda: not self.processes(), seconds=40)


def wait_for(condition: Callable[[], object], seconds: float = 240) -> bool:
    """Wait until a condition holds; False if it does not in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False
