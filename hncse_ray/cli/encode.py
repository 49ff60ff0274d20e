"""``hncse encode`` and ``hncse search``: using a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hncse_ray.cli.app import (
    DeviceOption,
    JsonOption,
    ModelArgument,
    PoolingOption,
    PrecisionOption,
    RecipeArgument,
    RevisionOption,
    TrustOption,
    app,
    command,
    console_reporter,
    counter,
    encoder_tree,
)
from hncse_ray.config import load_settings
from hncse_ray.errors import DataError, StorageError
from hncse_ray.storage import check_outlasts_job


@app.command()
def encode(
    model: ModelArgument,
    texts: Annotated[str, typer.Argument(help="A text file, one sentence a line (.gz too), or - for standard input.")],
    out: Annotated[Path, typer.Option(help="Where to write the vectors: .npy, [N, D] float32, unit norm.")],
    batch_size: Annotated[int, typer.Option(min=1, max=65_536, help="Sentences in one forward pass.")] = 128,
    pooling: PoolingOption = "auto",
    device: DeviceOption = "auto",
    precision: PrecisionOption = "fp32",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Embed the lines of a text file."""

    def run(console: Console) -> dict[str, Any]:
        import numpy as np

        from hncse_ray.encoder import choose_device, load_encoder
        from hncse_ray.evaluation import unit_rows
        from hncse_ray.reading import kind_of, read_lines

        check_outlasts_job(out, "--out")
        if not out.parent.is_dir() or out.is_dir() or out.suffix != ".npy":
            raise StorageError("cannot be written: name a .npy file in an existing folder", str(out))
        if texts != "-" and (kind := kind_of(texts)) != "text":
            raise DataError(f"is a table ({kind})", texts, "Write its texts to a text file, a sentence a line")
        lines = read_lines(None if texts == "-" else texts)
        if not lines:
            raise DataError("holds no text", texts)
        options = encoder_tree(pooling, precision, revision, trust_remote_code)
        settings = load_settings({"corpus": {"source": "python-docs"}, "encoder": {"model": model} | options})
        encoder = load_encoder(model, settings.encoder, device=choose_device(device))
        with console_reporter(console) as reporter:
            vectors = unit_rows(encoder.encode(lines, batch_size=batch_size, progress=counter(reporter, "encoding")))
        partial = out.with_name(f".{out.name}.partial.npy")
        try:
            np.save(partial, vectors)
            partial.replace(out)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise StorageError(f"cannot be written ({error.strerror})", str(out)) from error
        console.print(f"{vectors.shape[0]:,} vectors of {vectors.shape[1]} dimensions -> {out}", markup=False)
        return {"out": str(out), "rows": int(vectors.shape[0]), "dimension": int(vectors.shape[1])}

    command(run, as_json)


@app.command()
def search(
    model: ModelArgument,
    recipe: RecipeArgument,
    queries: Annotated[list[str], typer.Argument(help="What to look for.", metavar="QUERY...")],
    compare: Annotated[str | None, typer.Option(help="Another model, shown beside the first.")] = None,
    top: Annotated[int, typer.Option(min=1, max=2**31 - 1, help="Sentences shown for a query.")] = 3,
    limit: Annotated[
        int, typer.Option(min=1, max=2**31 - 1, help="Search a random sample of so many sentences.")
    ] = 5000,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "fp32",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show the sentences of a recipe's corpus that are nearest to some queries, for one model or two side by side."""

    def run(console: Console) -> dict[str, Any]:
        settings = load_settings(recipe)
        import numpy as np

        from hncse_ray.reading import is_blank

        if blank := [number for number, query in enumerate(queries, start=1) if is_blank(query)]:
            raise DataError(
                "is empty, or of characters that cannot be seen", f"query {blank[0]}", "Say what to look for"
            )

        from hncse_ray.cluster import prepare as prepare_corpus
        from hncse_ray.encoder import choose_device, load_encoder
        from hncse_ray.evaluation import unit_rows

        names = [name for name in (compare, model) if name is not None]
        options = encoder_tree("auto", precision, revision, trust_remote_code)
        trees = [{"corpus": {"source": "python-docs"}, "encoder": {"model": name} | options} for name in names]
        where = choose_device(device)
        encoders = [load_encoder(name, load_settings(tree).encoder, device=where)
                    for name, tree in zip(names, trees, strict=True)]  # fmt: skip
        found: dict[str, dict[str, list[str]]] = {query: {} for query in queries}
        with console_reporter(console) as reporter:
            base = load_encoder(settings.encoder.model, settings.encoder)
            corpus = prepare_corpus(settings, base, reporter)
            chosen = np.random.default_rng(settings.run.seed).permutation(len(corpus))[:limit]
            sentences = list(dict.fromkeys(corpus.target_texts(chosen)))  # of pairs what is looked for, once
            for name, encoder in zip(names, encoders, strict=True):
                progress = counter(reporter, f"encoding {len(sentences):,} sentences with {name}")
                vectors_ND = unit_rows(encoder.encode(sentences, side="document", progress=progress))
                scores_QN = unit_rows(encoder.encode(queries, side="query")) @ vectors_ND.T
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

    command(run, as_json)
