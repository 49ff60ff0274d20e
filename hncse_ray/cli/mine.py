"""``hncse mine``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hncse_ray.cli.app import (
    CorpusArgument,
    JsonOption,
    ModelArgument,
    OverridesArgument,
    PrecisionOption,
    RevisionOption,
    TrustOption,
    app,
    command,
    console_reporter,
    corpus_tree,
)
from hncse_ray.config import load_settings
from hncse_ray.errors import SettingsError, counted


@app.command()
def mine(
    model: ModelArgument,
    corpus: CorpusArgument,
    overrides: OverridesArgument = None,
    out: Annotated[Path, typer.Option(help="The .parquet file to write.")] = Path("triplets.parquet"),
    device: Annotated[
        str, typer.Option(help="auto (GPUs where there are some), cpu or cuda; Ray chooses which GPUs.")
    ] = "auto",
    precision: PrecisionOption = "auto",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find hard negatives for every sentence, as a file that sentence-transformers trains from.

    Selection and pool are set by negatives.*, such as negatives.per_anchor=4 negatives.num_shards=2.
    """

    def run(console: Console) -> dict[str, Any]:
        tree = corpus_tree(corpus, model) | {"negatives": {"source": "pool"}}
        tree["encoder"] |= {"precision": precision, "revision": revision, "trust_remote_code": trust_remote_code}
        if device not in ("auto", "cpu", "cuda"):
            raise SettingsError(f"{device!r} is not auto, cpu or cuda", "--device", "Ray chooses which GPU")
        if device != "auto":
            tree["negatives"]["gpus_per_shard"] = int(device == "cuda")
        settings = load_settings(tree, overrides or ())
        from hncse_ray.cluster import mine as run_mine

        with console_reporter(console) as reporter:
            report = run_mine(settings, out, reporter=reporter)
        table = Table(title="Hard negatives")
        table.add_column("of the hits")
        table.add_column("count", justify="right")
        for rule, count in report.removed.items():
            table.add_row(f"removed: {rule.replace('_', ' ')}", f"{count:,}")
        console.print(table)
        console.print(
            f"{counted(report.rows, 'row')}, mean similarity of negatives {report.mean_similarity:.3f};"
            f" {counted(report.without, 'row')} had too few; {report.seconds:.0f} s -> {report.out}",
            markup=False,
        )
        return asdict(report)

    command(run, as_json, resumes=True)
