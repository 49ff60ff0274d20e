"""The command line in this process, and what a refusal looks like."""

from __future__ import annotations

import logging
from typing import Any

from typer.testing import CliRunner

from hncse_ray.cli import app


def hncse(*args: object, stdin: bytes | str | None = None) -> Any:
    """Run a command and return what it printed, and how it ended."""
    logging.getLogger("hncse_ray").handlers.clear()  # those of a call before write to its streams
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


def assert_refused(result: Any, *said: object) -> None:
    """See that a command ended with status 2 and one message, which says all of ``said``."""
    assert isinstance(result.exception, SystemExit), f"{type(result.exception).__name__}: {result.exception}"
    assert result.exit_code == 2
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.output + result.stderr
    for text in said:
        assert str(text) in result.stderr
