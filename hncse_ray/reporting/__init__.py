"""Events of a run and what is made of them: terminal, log lines, metrics file, TensorBoard."""

from hncse_ray.reporting.events import Event, Notice, RunFinished, RunStarted, StageProgress, Verdict
from hncse_ray.reporting.reporters import (
    LineReporter,
    MetricsFile,
    Reporter,
    Reporters,
    TensorBoard,
    duration_text,
)
from hncse_ray.reporting.terminal import TerminalReporter, score_table, scoreboard_table
from hncse_ray.reporting.verdict import describe_verdict

__all__ = [
    "Event",
    "LineReporter",
    "MetricsFile",
    "Notice",
    "Reporter",
    "Reporters",
    "RunFinished",
    "RunStarted",
    "StageProgress",
    "TensorBoard",
    "TerminalReporter",
    "Verdict",
    "describe_verdict",
    "duration_text",
    "score_table",
    "scoreboard_table",
]
