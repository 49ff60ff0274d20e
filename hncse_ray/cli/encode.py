"""``hncse encode``: vectors of a text file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hncse_ray.cli.app import (
    DeviceOption,
    JsonOption,
    ModelArgument,
    PoolingOption,
    PrecisionOption,
    RevisionOption,
    TrustOption,
    app,
    command,
    console_reporter,
    counter,
    encoder_tree,
)
from hncse_ray.config import load_settings
from hncse_ray.errors import DataError, StorageError, counted
from hncse_ray.storage import check_outlasts_job, check_writable, replacing


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

        from hncse_ray.encoder import load_encoder
        from hncse_ray.evaluation import unit_rows
        from hncse_ray.reading import kind_of, read_lines

        check_outlasts_job(out, "--out")
        if not out.parent.is_dir() or out.is_dir() or out.suffix != ".npy":
            raise StorageError("cannot be written: name a .npy file in an existing folder", str(out))
        check_writable(out, "Choose another --out")
        if texts != "-" and (kind := kind_of(texts)) != "text":
            raise DataError(f"is a table ({kind})", texts, "Write its texts to a text file, a sentence a line")
        lines = read_lines(None if texts == "-" else texts)
        if not lines:
            raise DataError("holds no text", "standard input" if texts == "-" else texts)
        options = encoder_tree(pooling, precision, revision, trust_remote_code)
        settings = load_settings({"corpus": {"source": "python-docs"}, "encoder": {"model": model} | options})
        encoder = load_encoder(model, settings.encoder, device=device)
        with console_reporter(console) as reporter:
            vectors = unit_rows(encoder.encode(lines, batch_size=batch_size, progress=counter(reporter, "encoding")))
        with replacing(out) as partial:
            np.save(partial, vectors)
        console.print(f"{counted(len(vectors), 'vector')} of {vectors.shape[1]} dimensions -> {out}", markup=False)
        return {"out": str(out), "rows": int(vectors.shape[0]), "dimension": int(vectors.shape[1])}

    command(run, as_json)
