"""Commands in processes of their own, whose descendants can be told by a mark in their environment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import psutil
from waits import seconds, soon


def marked(mark: str, titled: str = "") -> list[psutil.Process]:
    """Return the processes with a mark in their environment; those that end meanwhile are left out."""
    found = []
    for process in psutil.process_iter():
        try:
            is_one = process.environ().get("HNCSE_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE
            if is_one and titled in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


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

    def finish(self, within_s: float = 300) -> dict:
        """Wait for a good end and return what the command printed."""
        out, err = self.ended(within_s)
        assert self.process.returncode == 0, err
        return json.loads(out.splitlines()[-1])

    def ended(self, within_s: float) -> tuple[str, str]:
        """Wait until the command has ended, and return what it wrote to standard output and error."""
        return self.process.communicate(timeout=seconds(within_s))

    def processes(self, titled: str = "") -> list[psutil.Process]:
        """Everything that the command started and that is still there, or what of it has this in its command line."""
        return marked(self.mark, titled)

    def is_gone(self) -> bool:
        """Wait until no process of this command is left; Ray's agents take some seconds to notice a kill."""
        return soon(lambda: not self.processes(), within_s=40, what=self.processes)
