"""What a person sees in an interactive terminal: a bar while training, and the table of scores afterwards."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from hncse_ray.reporting.events import (
    Evaluated,
    Event,
    Notice,
    RunFinished,
    RunStarted,
    StageProgress,
    StepsLogged,
)
from hncse_ray.reporting.reporters import Pace, describe


class _TimeLeft(TimeRemainingColumn):
    """The time left of a stage by its speed of the last half minute; of training as the log says."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["left"], style="progress.remaining") if task.fields["left"] else super().render(task)


class TerminalReporter:
    """Bars for the stages of a command and for training; evaluations and notices scroll by above them."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            _TimeLeft(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._facts: dict[str, str] = {}
        self._pace, self._renews_index = Pace(), False

    def on(self, event: Event) -> None:
        """Move a bar, or print the event above the bars."""
        console = self._progress.console
        if isinstance(event, StageProgress):
            if event.stage not in self._tasks:
                self._end_stages()
            self._bar(event.stage, event.done, event.total)
        elif isinstance(event, RunStarted):
            self._end_stages()
            self._pace.begin(event)
            console.print(describe(event), highlight=False, markup=False)
            self._renews_index = event.renews_index
            self._bar("training", event.step, event.total_steps)
        elif isinstance(event, StepsLogged):
            self._end_stages()
            self._facts |= {"loss": f"{event.metrics['loss']:.4f}", "speed": f"{event.sentences_per_s:,.0f}/s"}
            index_step = event.metrics.get("negatives/index_step")
            if self._renews_index and index_step is not None:
                self._facts["index"] = f"{index_step:.0f}"
            self._bar("training", event.step, left=self._pace.left(event.step))
        elif isinstance(event, Evaluated):
            self._end_stages()
            if event.split == "dev" and event.metric in event.scores:
                self._facts["dev"] = f"{event.scores[event.metric]:.4f}"
            console.print(describe(event), highlight=False, markup=False)
        elif isinstance(event, Notice):
            console.print(event.text, style="yellow", markup=False)
        elif isinstance(event, RunFinished):
            self._end_stages()
            self._bar("training", event.step)

    def close(self) -> None:
        """Leave the bars as they stand."""
        self._progress.stop()

    def _end_stages(self) -> None:
        """Take away the bars of stages whose length was never known: they cannot fill."""
        for name, task in list(self._tasks.items()):
            if self._progress.tasks[self._progress.task_ids.index(task)].total is None:
                self._progress.remove_task(task)
                del self._tasks[name]

    def _bar(self, name: str, done: int, total: int | None = None, left: str = "") -> None:
        if name not in self._tasks:
            self._progress.start()
            self._tasks[name] = self._progress.add_task(name, total=total, facts="", left="")
        facts = "  ".join(f"{key} {value}" for key, value in self._facts.items()) if name == "training" else ""
        self._progress.update(self._tasks[name], completed=done, facts=facts, left=left)
        if total is not None:
            self._progress.update(self._tasks[name], total=total)


def scoreboard_table(
    title: str, rows: Mapping[str, Mapping[str, tuple[float, float]]], columns: Mapping[str, str]
) -> Table:
    """Return scores with a model a row, as papers print them.

    Args:
        title: above the table.
        rows: by model, mean and standard deviation of each score.
        columns: the scores to show, and their headings.
    """
    table = Table(title=title)
    table.add_column("model", overflow="fold")
    for heading in columns.values():
        table.add_column(heading, justify="right")
    for model, scores in rows.items():
        cells = []
        for name in columns:
            mean, spread = scores[name]
            digits = 2 if abs(mean) >= 2 else 4
            cells.append(f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread else ""))
        table.add_row(escape(model), *cells)
    return table


def score_table(
    before: Mapping[str, Mapping[str, float]],
    after: Mapping[str, Mapping[str, float]],
    whitened_base: Mapping[str, Mapping[str, float]] | None = None,
) -> Table:
    """Return scores before and after training, a row for each metric and split; beside them the control's, if known."""
    table = Table(title="Scores before and after training")
    table.add_column("metric", overflow="fold")
    table.add_column("split")
    for name in ("before", *(["whitened\nbase"] if whitened_base else []), "after", "gain"):
        table.add_column(name, justify="right")
    for split, scores in after.items():
        for metric, value in scores.items():
            olds = [of.get(split, {}).get(metric) for of in (before, *([whitened_base] if whitened_base else []))]
            old = olds[0]
            gain = f"{value - old:+.4f}" if old is not None else ""
            style = "" if old is None else "green" if value > old else "red" if value < old else ""
            table.add_row(
                metric,
                split,
                *("" if each is None else f"{each:.4f}" for each in olds),
                f"{value:.4f}",
                f"[{style}]{gain}[/]" if style else gain,
            )
    return table
