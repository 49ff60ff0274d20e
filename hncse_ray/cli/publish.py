"""``hncse push``: uploading an exported model to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hncse_ray.cli.app import JsonOption, app, command
from hncse_ray.errors import ModelError

# What a model needs and no more: settings.yaml names folders of this machine; the card has the settings without.
_UPLOADED = ["README.md", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.safetensors"]
_NEEDED = ("README.md", "config.json", "modules.json", "tokenizer_config.json", "*.safetensors")
_INSTEAD = "Or copy the folder: sentence-transformers and hncse_ray load it from any place"
_REFUSALS = {
    401: ("the hub does not know the token", "Run `hf auth login` again"),
    403: ("the token may not write there", "Use a token with write access, or another OWNER/NAME"),
}


@app.command()
def push(
    model: Annotated[Path, typer.Argument(help="The folder of an exported model, such as runs/NAME/model.")],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Upload an exported model with its card; the token is HF_TOKEN, or that of `hf auth login`."""

    def run(console: Console) -> dict[str, Any]:
        _check_exported(model)
        url = _upload(model, repo_id, private=private)
        console.print(f"{model} -> {url}", markup=False)
        return {"model": str(model), "url": url}

    command(run, as_json)


def _check_exported(folder: Path) -> None:
    """See that a folder holds a whole exported model, in which nothing is damaged."""
    import yaml
    from huggingface_hub import metadata_load
    from safetensors import SafetensorError, safe_open

    hint = "Name the folder that a run has exported, such as runs/NAME/model"
    if not folder.is_dir():
        raise ModelError("no such model folder", str(folder), hint)
    if missing := [name for name in _NEEDED if not list(folder.glob(name))]:
        raise ModelError(f"is no exported model: it has no {', no '.join(missing)}", str(folder), hint)
    path = folder
    try:
        for path in sorted(folder.rglob("*.safetensors")):
            with safe_open(path, framework="pt"):
                pass
        path = folder / "README.md"
        if metadata_load(path) is None:
            raise ModelError("is no model card: it does not begin with YAML between two lines of ---", str(path), hint)
    except (OSError, ValueError, SafetensorError, yaml.YAMLError) as error:
        raise ModelError(f"cannot be read ({' '.join(str(error).split())})", str(path),
                         "Export the model again") from error  # fmt: skip


def _upload(folder: Path, repo_id: str, *, private: bool) -> str:
    """Upload a folder; the repository is made if it is not there. Return its address."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    from hncse_ray.corpus.hub import hub_endpoint, hub_is_reachable

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ModelError("is no name that the hub could have", repo_id, "Write OWNER/NAME") from error
    if get_token() is None:
        raise ModelError("the hub asks for a token, and there is none", repo_id,
                         f"Set HF_TOKEN, or run `hf auth login`. {_INSTEAD}")  # fmt: skip
    if not hub_is_reachable():
        raise ModelError("the Hugging Face hub cannot be reached, so nothing was uploaded", repo_id, _INSTEAD)
    api = HfApi(endpoint=hub_endpoint())
    try:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # Not SentenceTransformer.push_to_hub: it uploads all that lies in a folder.
        api.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=_UPLOADED, commit_message="Model trained with hncse_ray"
        )
    except Exception as error:  # the hub's client, its HTTP and its storage library each have exceptions of their own
        first = (str(error).strip().splitlines() or [""])[0]
        otherwise = (f"could not be uploaded ({type(error).__name__}: {first})", "Try again")
        status = getattr(getattr(error, "response", None), "status_code", None)
        what, hint = _REFUSALS.get(status or 0, otherwise)
        raise ModelError(what, repo_id, f"{hint}. {_INSTEAD}") from error
    return f"{hub_endpoint()}/{name}"
