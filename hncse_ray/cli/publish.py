"""``hncse push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hncse_ray.cli.app import JsonOption, app, command


@app.command()
def push(
    model: Annotated[Path, typer.Argument(help="The folder of an exported model, such as runs/NAME/model.")],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Upload an exported model with its card; the token is HF_TOKEN, or that of `hf auth login`."""

    def run(console: Console) -> dict[str, Any]:
        from hncse_ray.encoder.publish import publish

        url = publish(model, repo_id, private=private)
        console.print(f"{model} -> {url}", markup=False)
        return {"model": str(model), "url": url}

    command(run, as_json)
