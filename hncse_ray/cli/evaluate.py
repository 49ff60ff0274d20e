"""``hncse evaluate``."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hncse_ray.cli.app import JsonOption, PoolingOption, app, command, console_reporter
from hncse_ray.config import load_settings

if TYPE_CHECKING:
    from hncse_ray.training.scoring import Scoreboard


@app.command()
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(help="Models side by side; several joined by commas are seeds of one.", metavar="MODEL..."),
    ],
    suite: Annotated[
        list[str] | None,
        typer.Option(help="sts, transfer, geometry, python-docs, pairs, stsb, or full; may be repeated."),
    ] = None,
    pairs: Annotated[str | None, typer.Option(help="For suite pairs: a file of query and answer.")] = None,
    senteval: Annotated[str | None, typer.Option(help="The SentEval folder; default $HNCSE_DATA/senteval.")] = None,
    pooling: PoolingOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Score models on dev and test sets; two models are also compared by a paired bootstrap."""

    def run(console: Console) -> dict[str, Any]:
        from hncse_ray.reporting import StageProgress
        from hncse_ray.training.scoring import FULL, TEST_SUITES, score_models

        asked = [FULL if name == "full" else (name,) for name in suite or ["python-docs"]]
        suites = list(dict.fromkeys(itertools.chain(*asked)))
        chosen = [s for s in suites if s not in TEST_SUITES]
        evaluation: dict[str, Any] = {"suites": chosen, "senteval_path": senteval, "pairs_dev": pairs}
        if chosen:
            evaluation["metric"] = f"{chosen[0]}/{'spearman' if chosen[0] == 'stsb' else 'recall@10'}"
        tree = {"corpus": {"source": "python-docs"}, "encoder": {"pooling": pooling}, "evaluation": evaluation}
        settings = load_settings(tree)
        with console_reporter(console) as reporter:
            board = score_models(
                models,
                suites,
                settings,
                settings.encoder,
                tell=lambda stage, done, total: reporter.on(StageProgress(stage, done, total)),
            )
        _print_scoreboard(console, board)
        if len(models) == 1 and len(board.groups[0].models) == 1:
            return {"model": models[0], **board.groups[0].runs[0]}
        return asdict(board)

    command(run, as_json)


def _print_scoreboard(console: Console, board: Scoreboard) -> None:
    """One table a suite and split with a model a row; then what the bootstrap says."""
    from hncse_ray.reporting import scoreboard_table

    for split in ("dev", "test"):
        rows = {group.name: group.summary(split) for group in board.groups}
        names = list(next(iter(rows.values())))
        for suite in dict.fromkeys(name.partition("/")[0] for name in names):
            columns = {name: name.partition("/")[2] for name in names if name.startswith(f"{suite}/")}
            console.print(scoreboard_table(f"{suite}, {split}", rows, columns))
    if board.differences:
        table = Table(title="second model - first model, paired bootstrap")
        for column in ("score", "difference", "95 % interval", "p"):
            table.add_column(column, justify="left" if column == "score" else "right")
        for d in board.differences:
            digits = 2 if abs(d.first) >= 2 else 4
            interval = f"{d.low:+.{digits}f} to {d.high:+.{digits}f}"
            table.add_row(d.name, f"{d.second - d.first:+.{digits}f}", interval, f"{d.p_value:.3f}")
        console.print(table)
