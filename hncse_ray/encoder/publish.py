"""Uploading an exported model to the Hugging Face hub."""

from __future__ import annotations

import logging
from pathlib import Path

import yaml
from safetensors import SafetensorError, safe_open

from hncse_ray.corpus.hub import hub_endpoint, hub_is_reachable
from hncse_ray.encoder.source_card import front_matter
from hncse_ray.errors import ModelError

logger = logging.getLogger(__name__)

# All of an exported model but settings.yaml, which names folders of this machine; the card has the settings without.
_UPLOADED = ("README.md", "*.json", "*.txt", "*.model", "*.safetensors")
_NEEDED = ("README.md", "config.json", "modules.json", "tokenizer_config.json")
_INSTEAD = "Or copy the folder: sentence-transformers and hncse_ray load it from any place"


def check_exported(folder: Path) -> None:
    """See that a folder holds a whole exported model.

    Raises:
        ModelError: it does not, or something in it is damaged.
    """
    hint = "Name the folder that a run has exported, such as runs/NAME/model"
    if not folder.is_dir():
        raise ModelError("no such model folder", str(folder), hint)
    if missing := [name for name in _NEEDED if not (folder / name).is_file()]:
        raise ModelError(f"is no exported model: it has no {', no '.join(missing)}", str(folder), hint)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError("is no exported model: it has no safetensors weights", str(folder), hint)
    for path in weights:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot be read ({error})", str(path), "Export the model again") from error
    try:
        front_matter(folder / "README.md")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ModelError(f"is no model card ({' '.join(str(error).split())})", str(folder / "README.md"),
                         "It begins with YAML between two lines of ---; export the model again") from error  # fmt: skip


def publish(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Upload an exported model; the repository is made if it is not there.

    The token is where huggingface_hub keeps it: ``HF_TOKEN``, or what ``hf auth login`` has stored.

    Args:
        folder: an exported model.
        repo_id: ``OWNER/NAME`` on the hub.
        private: make a new repository private.

    Returns:
        The address of the repository.

    Raises:
        ModelError: no exported model, no such name, no token, or the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    check_exported(folder)
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
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            allow_patterns=list(_UPLOADED),
            commit_message="Model trained with hncse_ray",
        )
    except Exception as error:  # the hub's client, its HTTP and its storage library each have exceptions of their own
        raise _refusal(repo_id, error) from error
    return f"{hub_endpoint()}/{repository.repo_id}"


def _refusal(repo_id: str, error: Exception) -> ModelError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return ModelError("the hub does not know the token", repo_id, f"Run `hf auth login` again. {_INSTEAD}")
    if status == 403:
        return ModelError("the token may not write there", repo_id,
                          f"Use a token with write access, or another OWNER/NAME. {_INSTEAD}")  # fmt: skip
    first = (str(error).strip().splitlines() or [""])[0]
    return ModelError(f"could not be uploaded ({type(error).__name__}: {first})", repo_id,
                      f"Try again. {_INSTEAD}")  # fmt: skip
