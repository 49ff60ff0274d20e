"""The command line: ``hncse prepare | train | encode | evaluate | mine | search``.

Every expected failure is one message on standard error and exit status 2. With ``--json`` the last line on
standard output is one JSON object, and everything meant for people goes to standard error.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from hncse_ray.config import EncoderSettings, Settings, load_settings
from hncse_ray.errors import HncseError, StorageError

if TYPE_CHECKING:
    from hncse_ray.corpus import Corpus
    from hncse_ray.reporting import Reporter
    from hncse_ray.training.scoring import Scoreboard

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train sentence encoders by contrast, without labels, on a laptop or on a Ray cluster.",
)

RecipeArgument = Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe that comes with hncse_ray.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="Settings to change, as section.key=value.", metavar="[KEY=VALUE]...")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of standard output.")]
PoolingOption = Annotated[str, typer.Option(help="How to pool a model whose folder does not say: mean, cls, ...")]
ModelArgument = Annotated[str, typer.Argument(help="A model folder, a hub name, or package:NAME/FOLDER.")]

Result = TypeVar("Result")


@app.command()
def prepare(recipe: RecipeArgument, overrides: OverridesArgument = None, as_json: JsonOption = False) -> None:
    """Read, clean and tokenise a recipe's corpus, and say what was dropped and why."""

    def run(console: Console) -> dict[str, Any]:
        settings = load_settings(recipe, overrides or ())
        from hncse_ray.cluster import prepare as prepare_corpus
        from hncse_ray.encoder import load_encoder

        encoder = load_encoder(settings.encoder.model, settings.encoder)
        with _reporter(console) as reporter:
            corpus = prepare_corpus(settings, encoder, reporter)
        _print_corpus(console, corpus)
        return {"path": str(corpus.path), "digest": corpus.digest, **asdict(corpus.report)}

    _command(run, as_json)


@app.command()
def train(recipe: RecipeArgument, overrides: OverridesArgument = None, as_json: JsonOption = False) -> None:
    """Train an encoder; the same command again goes on where an interrupted run stopped."""

    def run(console: Console) -> dict[str, Any]:
        settings = load_settings(recipe, overrides or ())
        return run_training(settings, console)

    _command(run, as_json)


@app.command()
def encode(
    model: ModelArgument,
    texts: Annotated[str, typer.Argument(help="A text file, one sentence a line (.gz too), or - for standard input.")],
    out: Annotated[Path, typer.Option(help="Where to write the vectors: .npy, [N, D] float32, unit norm.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Sentences in one forward pass.")] = 128,
    pooling: PoolingOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Embed the lines of a text file."""

    def run(console: Console) -> dict[str, Any]:
        import numpy as np

        from hncse_ray.corpus import read_lines
        from hncse_ray.encoder import load_encoder

        if not out.parent.is_dir() or out.is_dir() or out.suffix != ".npy":
            raise StorageError("cannot be written: name a .npy file in an existing folder", str(out))
        lines = read_lines(None if texts == "-" else texts)
        if not lines:
            raise HncseError("holds no text", texts)
        encoder = load_encoder(model, _encoder_settings(model, pooling))
        with _reporter(console) as reporter:
            vectors = encoder.encode(lines, batch_size=batch_size, progress=_counter(reporter, "encoding"))
        partial = out.with_name(f".{out.name}.partial.npy")
        try:
            np.save(partial, vectors)
            partial.replace(out)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise StorageError(f"cannot be written ({error.strerror})", str(out)) from error
        console.print(f"{vectors.shape[0]:,} vectors of {vectors.shape[1]} dimensions -> {out}", markup=False)
        return {"out": str(out), "rows": int(vectors.shape[0]), "dimension": int(vectors.shape[1])}

    _command(run, as_json)


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
        with _reporter(console) as reporter:
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

    _command(run, as_json)


@app.command()
def mine(
    model: ModelArgument,
    corpus: Annotated[str, typer.Argument(help="A text, JSONL, CSV or Parquet file, or a recipe for its corpus.")],
    overrides: OverridesArgument = None,
    out: Annotated[Path, typer.Option(help="The .parquet file to write.")] = Path("triplets.parquet"),
    as_json: JsonOption = False,
) -> None:
    """Find hard negatives for every sentence, as a file that sentence-transformers trains from.

    Selection and pool are set by negatives.*, such as negatives.per_anchor=4 negatives.num_shards=2.
    """

    def run(console: Console) -> dict[str, Any]:
        settings = load_settings(_mining_tree(model, corpus), overrides or ())
        from hncse_ray.cluster import mine as run_mine

        with _reporter(console) as reporter:
            report = run_mine(settings, out, reporter=reporter)
        table = Table(title="Hard negatives")
        table.add_column("of the hits")
        table.add_column("count", justify="right")
        for rule, count in report.removed.items():
            table.add_row(f"removed: {rule.replace('_', ' ')}", f"{count:,}")
        console.print(table)
        console.print(
            f"{report.rows:,} rows, mean similarity of negatives {report.mean_similarity:.3f};"
            f" {report.without:,} sentences had too few; {report.seconds:.0f} s -> {report.out}",
            markup=False,
        )
        return asdict(report)

    _command(run, as_json)


@app.command()
def search(
    model: ModelArgument,
    recipe: RecipeArgument,
    queries: Annotated[list[str], typer.Argument(help="What to look for.", metavar="QUERY...")],
    compare: Annotated[str | None, typer.Option(help="Another model, shown beside the first.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Sentences shown for a query.")] = 3,
    limit: Annotated[int, typer.Option(min=1, help="Search a random sample of so many sentences.")] = 5000,
    as_json: JsonOption = False,
) -> None:
    """Show the sentences of a recipe's corpus that are nearest to some queries, for one model or two side by side."""

    def run(console: Console) -> dict[str, Any]:
        settings = load_settings(recipe)
        import numpy as np

        from hncse_ray.cluster import prepare as prepare_corpus
        from hncse_ray.encoder import load_encoder

        names = [name for name in (compare, model) if name is not None]
        encoders = [load_encoder(name) for name in names]
        found: dict[str, dict[str, list[str]]] = {query: {} for query in queries}
        with _reporter(console) as reporter:
            base = load_encoder(settings.encoder.model, settings.encoder)
            corpus = prepare_corpus(settings, base, reporter)
            chosen = np.random.default_rng(settings.run.seed).permutation(len(corpus))[:limit]
            sentences = corpus.texts(chosen)
            for name, encoder in zip(names, encoders, strict=True):
                progress = _counter(reporter, f"encoding {len(sentences):,} sentences with {name}")
                vectors_ND = encoder.encode(sentences, progress=progress)
                scores_QN = encoder.encode(queries) @ vectors_ND.T
                for query, scores_N in zip(queries, scores_QN, strict=True):
                    found[query][name] = [sentences[i] for i in np.argsort(-scores_N)[:top]]
        for query, by_model in found.items():
            table = Table(title=escape(f"nearest to: {query}"), show_lines=True, expand=True)
            for name in names:
                table.add_column(escape(name), ratio=1)
            for row in zip(*by_model.values(), strict=True):
                table.add_row(*map(escape, row))
            console.print(table)
        return found

    _command(run, as_json)


def run_training(settings: Settings, console: Console) -> dict[str, Any]:
    """Train with progress on a console, print the scores, and return what ``--json`` prints."""
    from hncse_ray.cluster import train as run_train
    from hncse_ray.reporting import score_table

    if console.is_terminal:
        with _reporter(console) as reporter:
            result = run_train(settings, reporter=reporter)
    else:  # the run's own lines go where the log goes
        result = run_train(settings)
    console.print(score_table(result.before, result.after))
    console.print(f"model: {result.model}  (best on dev at step {result.best_step} of {result.steps})", markup=False)
    if result.best_step == 0:
        console.print("no evaluation beat the model you started from, so the model is that one", style="yellow")
    return asdict(result)


def _command(run: Callable[[Console], dict[str, Any]], as_json: bool) -> None:
    """Run a command body; turn its result into JSON and its expected failures into exit status 2."""
    console = Console(stderr=as_json, soft_wrap=True)
    _configure_logging(console)
    try:
        result = run(console)
    except HncseError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command again goes on from the last checkpoint", style="yellow")
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(result))


def _configure_logging(console: Console) -> None:
    """Show warnings, and where no progress bar can be drawn also the lines of progress."""
    logger = logging.getLogger("hncse_ray")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not logger.handlers:
        handler: logging.Handler
        if console.is_terminal:
            handler = RichHandler(console=console, show_time=False, show_path=False, level=logging.WARNING)
            # The lines of a run are for its log file: here its bars show the same.
            handler.addFilter(lambda record: record.name != "hncse_ray.reporting.reporters")
        else:
            handler = logging.StreamHandler(console.file)
            handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


@contextmanager
def _reporter(console: Console) -> Iterator[Reporter]:
    """Show progress while the context lasts: bars in a terminal, lines elsewhere."""
    from hncse_ray.reporting import LineReporter, TerminalReporter

    reporter = TerminalReporter(console) if console.is_terminal else LineReporter()
    try:
        yield reporter
    finally:
        reporter.close()


def _mining_tree(model: str, corpus: str) -> dict[str, Any]:
    """Settings of a mining job: a file is read as its name says, anything else is a recipe."""
    sources = {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}
    path, max_length = Path(corpus), 128
    if path.suffix in ("", ".yaml", ".yml") and not (path.suffix == "" and path.is_file()):
        recipe = load_settings(corpus)
        tree, max_length = {"corpus": recipe.corpus.model_dump()}, recipe.encoder.max_length
    else:
        tree = {"corpus": {"source": sources.get(path.suffix, "text"), "path": corpus}}
    return tree | {"encoder": {"model": model, "max_length": max_length}, "negatives": {"source": "pool"}}


def _encoder_settings(model: str, pooling: str) -> EncoderSettings:
    tree = {"corpus": {"source": "python-docs"}, "encoder": {"model": model, "pooling": pooling}}
    return load_settings(tree).encoder


def _counter(reporter: Reporter, stage: str) -> Callable[[int, int], None]:
    """Return a callback that reports how far a stage is."""
    from hncse_ray.reporting import StageProgress

    return lambda done, total: reporter.on(StageProgress(stage, done, total))


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


def _print_corpus(console: Console, corpus: Corpus) -> None:
    report = corpus.report
    table = Table(title=f"Corpus {corpus.digest[:12]}")
    table.add_column("lines")
    table.add_column("count", justify="right")
    table.add_row("read", f"{report.read:,}")
    for reason, count in report.dropped.items():
        table.add_row(f"dropped: {reason.replace('_', ' ')}", f"{count:,}")
    table.add_row("kept", f"{report.rows:,}")
    console.print(table)
    console.print(
        f"{report.mean_tokens:.1f} tokens a sentence, prepared in {report.seconds:.1f} s -> {corpus.path}", markup=False
    )


if __name__ == "__main__":
    app()
