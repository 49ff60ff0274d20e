"""What a person sees of a running sweep."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from hncse_ray.reporting.sweep import SweepLines, SweepTable, TrialUpdate, describe, sweep_table

VALUES = {"objective.name": "hybrid", "objective.temperature": 0.0512345}


def shown(*rows: TrialUpdate, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(sweep_table(list(rows)))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("update", "line"),
    [
        (TrialUpdate("3", "starting", VALUES), "trial 3 starts: objective.name=hybrid objective.temperature=0.05123"),
        (TrialUpdate("3", "running", VALUES, 20, 40, 0.70125), "trial 3  step 20/40  score 0.7013"),
        (TrialUpdate("3", "running", VALUES, 20, 0, 0.5), "trial 3  step 20  score 0.5000"),
        (
            TrialUpdate("3", "finished", VALUES, 40, 40, 0.75, True),
            "trial 3 finished  step 40/40  score 0.7500  (best)",
        ),
        (TrialUpdate("3", "stopped early", VALUES, 20, 40, 0.5), "trial 3 stopped early  step 20/40  score 0.5000"),
        (
            TrialUpdate("3", "failed", VALUES, reason="the loss is not a number"),
            "trial 3 failed: the loss is not a number",
        ),
    ],
)
def test_a_line_a_happening(update: TrialUpdate, line: str, caplog: pytest.LogCaptureFixture) -> None:
    assert describe(update) == line
    with caplog.at_level(logging.INFO, logger="hncse_ray"):
        SweepLines().on(update)
    assert caplog.messages == [line]


def test_the_table_names_settings_shortly_where_that_is_clear() -> None:
    text = shown(
        TrialUpdate("0", "finished", {"objective.temperature": 0.05, "train.epochs": 1}, 40, 40, 0.75, is_best=True),
        TrialUpdate(
            "1", "failed", {"objective.temperature": 0.1, "negatives.temperature": 2}, reason="[red]no[/red] loss"
        ),
    )
    assert "objective.temperature=0.05 epochs=1" in text
    assert "objective.temperature=0.1 negatives.temperature=2" in text
    assert "0.7500 *" in text and "[red]no[/red] loss" in text


def test_of_a_long_sweep_the_table_shows_what_is_at_work_and_the_best() -> None:
    console = Console(file=io.StringIO(), width=100, height=60, force_terminal=True)
    table = SweepTable(console)
    for number in range(50):
        table.on(TrialUpdate(str(number), "finished", {"a.b": number}, 40, 40, number / 100, is_best=True))
    table.on(TrialUpdate("50", "running", {"a.b": 50}, 20, 40, 0.001))
    table.tell("a remark")
    table.close()
    last = console.file.getvalue().rpartition("trials\n")[2]  # type: ignore[attr-defined]
    assert "b=50 " in last and "b=49 " in last and "b=21 " in last and "b=20 " not in last
    assert "21 more trials" in last
    assert last.count("*") == 1  # only one is the best
