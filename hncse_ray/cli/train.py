"""``hncse prepare`` and ``hncse train``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hncse_ray.cli.app import JsonOption, OverridesArgument, RecipeArgument, app, command, console_reporter
from hncse_ray.config import Settings, load_settings

if TYPE_CHECKING:
    from hncse_ray.corpus import Corpus


@app.command()
def prepare(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Prepare with so many Ray Data workers; same corpus.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare one that is there with its digests; if damaged, prepare it anew.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Read, clean and tokenise a recipe's corpus, and say what was dropped and why."""

    def run(console: Console) -> dict[str, Any]:
        settings = load_settings(recipe, overrides or ())
        from hncse_ray.encoder import load_encoder
        from hncse_ray.training.checks import prepare as prepare_corpus

        encoder = load_encoder(settings.encoder.model, settings.encoder)
        write_rows = None
        if workers is not None:
            from hncse_ray.cluster.preparing import ClusterRows

            write_rows = ClusterRows(workers, settings.encoder)
        with console_reporter(console) as reporter:
            corpus = prepare_corpus(settings, encoder, reporter, write_rows=write_rows, digests=check)
        _print_corpus(console, corpus)
        return {"path": str(corpus.path), "digest": corpus.digest, **asdict(corpus.report)}

    command(run, as_json)


@app.command()
def train(recipe: RecipeArgument, overrides: OverridesArgument = None, as_json: JsonOption = False) -> None:
    """Train an encoder; the same command again goes on where an interrupted run stopped."""

    def run(console: Console) -> dict[str, Any]:
        settings = load_settings(recipe, overrides or ())
        return run_training(settings, console)

    command(run, as_json, resumes=True)


def run_training(settings: Settings, console: Console) -> dict[str, Any]:
    """Train with progress on a console, print the scores, and return what ``--json`` prints."""
    from hncse_ray.cluster import train as run_train
    from hncse_ray.reporting import describe_verdict, duration_text, score_table

    if console.is_terminal:
        with console_reporter(console) as reporter:
            result = run_train(settings, reporter=reporter)
    else:  # the run's own lines go where the log goes
        result = run_train(settings)
    if any(result.after.values()):
        console.print(score_table(result.before, result.after, result.whitened_base))
    console.print(f"model: {result.model}  (best on dev at step {result.best_step} of {result.steps})", markup=False)
    if result.seconds:  # earlier versions did not count them
        phases = [f"{name} {duration_text(seconds)}" for name, seconds in result.seconds.items() if seconds >= 0.5]
        console.print(f"took {duration_text(sum(result.seconds.values()))}: {', '.join(phases)}", highlight=False)
    if result.report is not None:
        console.print(f"report: {result.report}", markup=False, highlight=False)
    if result.verdict is not None:
        style = "yellow" if result.verdict.is_base else None
        console.print(describe_verdict(result.verdict), style=style, markup=False, highlight=False)
    return asdict(result)


def _print_corpus(console: Console, corpus: Corpus) -> None:
    report = corpus.report
    table = Table(title=f"Corpus {corpus.digest[:12]}")
    table.add_column("lines")
    table.add_column("count", justify="right")
    of_documents = report.documents is not None
    table.add_row("documents read" if of_documents else "read", f"{report.read:,}")
    for reason, count in report.dropped.items():
        table.add_row(f"dropped: {reason.replace('_', ' ')}", f"{count:,}")
    table.add_row("passages kept" if of_documents else "kept", f"{report.rows:,}")
    if of_documents:
        table.add_row("of so many documents", f"{report.documents:,}")
    if report.without_positive is not None:
        table.add_row("of these without a positive", f"{report.without_positive:,}")
    console.print(table)
    row = "a passage" if of_documents else "an anchor" if corpus.has_pairs else "a sentence"
    size = f"{report.mean_tokens:.1f} tokens {row}"
    console.print(f"{size}, prepared in {report.seconds:.1f} s -> {corpus.path}", markup=False)
