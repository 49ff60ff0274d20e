"""What a person sees of a running sweep: one live table in a terminal, lines in a log."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hncse_ray.errors import counted

logger = logging.getLogger(__name__)

TrialState = Literal["starting", "running", "finished", "stopped early", "failed"]
_STYLES = {"running": "cyan", "finished": "green", "stopped early": "dim", "failed": "red"}
_SHOWN = 30  # rows of the live table: what is at work, the best, and the newest


@dataclass(frozen=True)
class TrialUpdate:
    """How a trial stands.

    Attributes:
        name: its number, or trial and seed.
        state: what it is doing.
        values: the settings it differs in.
        step: optimiser steps taken at the last dev score.
        total_steps: steps of a whole run; 0 = not known.
        score: the last dev score while it runs, the best when it is over; None before the first.
        is_best: it is the best that is finished so far.
        reason: why it failed.
    """

    name: str
    state: TrialState
    values: Mapping[str, Any]
    step: int = 0
    total_steps: int = 0
    score: float | None = None
    is_best: bool = False
    reason: str = ""


class SweepReporter(Protocol):
    """Receives what happens in a sweep."""

    def on(self, update: TrialUpdate) -> None:
        """Take note of how a trial stands."""

    def tell(self, text: str) -> None:
        """Take note of something about the whole sweep."""

    def close(self) -> None:
        """The sweep is over."""


class SweepLines:
    """A line of log for each thing that happens."""

    def on(self, update: TrialUpdate) -> None:
        """Write a line."""
        logger.info("%s", describe(update))

    def tell(self, text: str) -> None:
        """Write a line."""
        logger.info("%s", text)

    def close(self) -> None:
        """Nothing to close."""


class SweepTable:
    """One live table: a trial a row. Remarks scroll by above it."""

    def __init__(self, console: Console) -> None:
        self._rows: dict[str, TrialUpdate] = {}
        self._console = console
        self._live: Live | None = None

    def on(self, update: TrialUpdate) -> None:
        """Change a row."""
        if update.is_best:
            self._rows = {name: replace(row, is_best=False) for name, row in self._rows.items()}
        self._rows[update.name] = update
        if self._live is None:
            self._live = Live(console=self._console, refresh_per_second=2)
            self._live.start()
        self._live.update(self._render())

    def tell(self, text: str) -> None:
        """Print above the table."""
        self._console.print(text, style="yellow", markup=False, highlight=False)

    def close(self) -> None:
        """Leave the table as it stands."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _render(self) -> Group:
        rows = list(self._rows.values())
        shown = rows
        if len(rows) > _SHOWN:
            at_work = [row for row in rows if row.state in ("starting", "running")]
            others = sorted((row for row in rows if row not in at_work), key=lambda row: -(row.score or float("-inf")))
            kept = {row.name for row in [*at_work, *others[: max(0, _SHOWN - len(at_work))]]}
            shown = [row for row in rows if row.name in kept]
        parts: list[Table | Text] = [sweep_table(shown)]
        if len(shown) < len(rows):
            parts.append(Text(f"{counted(len(rows) - len(shown), 'more trial')} that scored no better", style="dim"))
        return Group(*parts)


def sweep_table(rows: list[TrialUpdate]) -> Table:
    """Return trials as a table: number, state, steps, score, and the settings in which they differ."""
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    sections = {key: key.rpartition(".")[2] for key in keys}
    short = {key: name if list(sections.values()).count(name) == 1 else key for key, name in sections.items()}
    table = Table(title="trials")
    for heading in ("trial", "state", "steps", "score"):
        table.add_column(heading, justify="left" if heading == "state" else "right", no_wrap=True)
    table.add_column("settings", overflow="fold")
    for row in rows:
        steps = f"{row.step}/{row.total_steps}" if row.total_steps else str(row.step)
        settings = " ".join(f"{short[key]}={_brief(value)}" for key, value in row.values.items())
        score = "" if row.score is None else f"{row.score:.4f}"
        table.add_row(
            row.name,
            Text(row.state, style=_STYLES.get(row.state, "")),
            steps,
            Text(score + (" *" if row.is_best else "  "), style="bold" if row.is_best else ""),
            escape(f"{settings}  {row.reason}".strip()),
        )
    return table


def describe(update: TrialUpdate) -> str:
    """Return an update as one line of text."""
    values = " ".join(f"{key}={_brief(value)}" for key, value in update.values.items())
    score = "" if update.score is None else f"  score {update.score:.4f}"
    steps = f"step {update.step}" + (f"/{update.total_steps}" if update.total_steps else "")
    match update.state:
        case "starting":
            return f"trial {update.name} starts: {values}"
        case "running":
            return f"trial {update.name}  {steps}{score}"
        case "failed":
            return f"trial {update.name} failed: {update.reason}"
        case _:
            return f"trial {update.name} {update.state}  {steps}{score}{'  (best)' if update.is_best else ''}"


def _brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
