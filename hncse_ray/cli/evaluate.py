"""``hncse evaluate``."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hncse_ray.cli.app import (
    DeviceOption,
    JsonOption,
    PoolingOption,
    PrecisionOption,
    RevisionOption,
    TrustOption,
    app,
    command,
    console_reporter,
    encoder_tree,
)
from hncse_ray.errors import SettingsError
from hncse_ray.storage import check_outlasts_job, check_writable

if TYPE_CHECKING:
    from hncse_ray.reporting.similarity import Similarities
    from hncse_ray.training.scoring import Scoreboard

_LONGEST_LABEL = 20
_HEADINGS = {"STSBenchmark": "STS-B", "SICKRelatedness": "SICK-R", "MRPC_F1": "MRPC F1"}


@app.command()
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(help="Models side by side; several joined by commas are seeds of one.", metavar="MODEL"),
    ],
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="sts, transfer, geometry, python-docs, python-code, pairs, retrieval, stsb, or full; may be repeated."
        ),
    ] = None,
    pairs: Annotated[str | None, typer.Option(help="A file of query and answer; adds suite pairs.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="A folder with corpus, queries and qrels; adds suite retrieval; may be repeated."),
    ] = None,
    senteval: Annotated[
        str | None, typer.Option(help="The SentEval folder; default $HNCSE_DATA/senteval, or what `data sts` fetched.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Encode with so many Ray actors; same scores.")
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="With suite geometry: a folder for similarity.png.")] = None,
    pooling: PoolingOption = "auto",
    device: DeviceOption = "auto",
    precision: PrecisionOption = "fp32",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score models on dev and test sets; two models are also compared by a paired bootstrap."""

    def run(console: Console) -> dict[str, Any]:
        from hncse_ray.reporting import StageProgress
        from hncse_ray.training.scoring import OpenEncoder, chosen_suites
        from hncse_ray.training.scoring import evaluate as score

        suites = chosen_suites(suite or [], pairs=pairs, collection=data or [])
        if (picture := None if plots is None else plots / "similarity.png") is not None:
            check_outlasts_job(picture.parent, "--plots")
            if "geometry" not in suites:
                raise SettingsError("draws what the suite geometry finds", "--plots", "Add --suite geometry")
            check_writable(picture, "Choose another --plots")
        if workers is not None and device not in ("auto", "cpu"):
            raise SettingsError("shares the work out over CPUs", "--workers", "Leave it out to encode on a GPU")
        open_encoder: OpenEncoder | None = None
        with ExitStack() as stack:
            if workers is not None:
                from hncse_ray.cluster.encoding import EncodingPool

                open_encoder = stack.enter_context(EncodingPool(workers)).open
            reporter = stack.enter_context(console_reporter(console))
            board = score(
                models,
                suites,
                pairs=pairs,
                collection=data or [],
                senteval=senteval,
                encoder=encoder_tree(pooling, precision, revision, trust_remote_code),
                device=device,
                tell=lambda stage, done, total: reporter.on(StageProgress(stage, done, total)),
                open_encoder=open_encoder,
            )
        _print_scoreboard(console, board)
        similarities = _similarities(board)
        _print_similarities(console, similarities)
        if picture is not None:
            from hncse_ray.reporting.similarity import plot_similarities

            plot_similarities(picture, similarities)
            console.print(f"cosines of positives and negatives -> {picture}", markup=False)
        return _as_json(board)

    command(run, as_json)


def _as_json(board: Scoreboard) -> dict[str, Any]:
    """What ``--json`` prints: the scores of a single model by themselves."""
    (first, *others), differences = board.groups, board.differences
    if others or differences or len(first.models) > 1:
        return asdict(board)
    found: dict[str, Any] = {"model": first.models[0], **first.runs[0]}
    return found | ({"similarities": asdict(first.similarities[0])} if first.similarities else {})


def _similarities(board: Scoreboard) -> dict[str, Similarities]:
    """The cosines of positives and negatives by model."""
    from hncse_ray.reporting.similarity import Similarities

    return {
        model: Similarities(found.bins, found.positive, found.negative)
        for group in board.groups
        for model, found in zip(group.models, group.similarities, strict=False)  # none without the suite
    }


def _print_similarities(console: Console, by_model: dict[str, Similarities]) -> None:
    from hncse_ray.reporting.similarity import similarity_lines

    for model, found in by_model.items():
        console.print(
            f"cosines of STS-B dev pairs (positives: gold 4 or more; negatives: random), {model}", markup=False
        )
        for line in similarity_lines(found):
            console.print(f"  {line}", markup=False, highlight=False)


def _print_scoreboard(console: Console, board: Scoreboard) -> None:
    """One table a suite and split with a model a row; then what the bootstrap says."""
    from hncse_ray.reporting import scoreboard_table

    labels = [group.name for group in board.groups]
    if max(map(len, labels)) > _LONGEST_LABEL:  # or a table of nine columns has no width left for its scores
        labels = [str(number) for number in range(1, len(labels) + 1)]
        for label, group in zip(labels, board.groups, strict=True):
            console.print(f"{label} = {', '.join(group.models)}", markup=False, highlight=False, soft_wrap=True)
    for split in ("dev", "test"):
        rows = {label: group.summary(split) for label, group in zip(labels, board.groups, strict=True)}
        names = list(next(iter(rows.values())))
        for suite in dict.fromkeys(name.rpartition("/")[0] for name in names):  # with its set, where it has several
            metrics = {name: name.rpartition("/")[2] for name in names if name.rpartition("/")[0] == suite}
            columns = {name: _HEADINGS.get(metric, metric) for name, metric in metrics.items()}
            console.print(scoreboard_table(f"{suite}, {split}", rows, columns))
    if board.differences:
        table = Table(title="second model - first model, paired bootstrap")
        for column in ("score", "of", "difference", "95 % interval", "p"):
            table.add_column(column, justify="left" if column == "score" else "right")
        for d in board.differences:
            digits = 2 if abs(d.first) >= 2 else 4
            interval = f"{d.low:+.{digits}f} to {d.high:+.{digits}f}"
            p_value = f"< {d.resolution:.3f}" if d.p_value <= d.resolution else f"{d.p_value:.3f}"
            table.add_row(d.name, f"{d.items:,}", f"{d.second - d.first:+.{digits}f}", interval, p_value)
        console.print(table)
