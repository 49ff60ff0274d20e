"""The program of a local Ray: start it, say where it is, and end it when whoever asked for it closes stdin or is gone.

It is a process of its own, since starting Ray keeps Python's lock for seconds, in which a command could not go on with
its imports (Ray 2.60 waits for its node in C++). It is run by its path, so that it imports Ray and nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import select
import sys
from contextlib import suppress

import ray


def main() -> None:
    """Keep a Ray for as long as it is wanted; one line of JSON on stdout has its address, or why there is none."""
    asked_by = os.getppid()
    if _is_over(asked_by):
        return
    try:
        ray.init(
            address="local",
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except Exception as error:
        return _say({"error": str(error)})
    _say({"address": ray.get_runtime_context().gcs_address})
    while not _is_over(asked_by, within_s=1.0):
        pass
    ray.shutdown()


def _is_over(asked_by: int, within_s: float = 0.0) -> bool:
    # A killed command may have forked: its children would keep the pipe open.
    return bool(select.select([sys.stdin], [], [], within_s)[0]) or os.getppid() != asked_by


def _say(facts: dict[str, str]) -> None:
    with suppress(BrokenPipeError):  # whoever asked is gone, which is noticed next
        os.write(sys.stdout.fileno(), f"{json.dumps(facts)}\n".encode())


if __name__ == "__main__":
    main()
