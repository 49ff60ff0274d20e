"""Data sets of the Hugging Face hub, which is asked once whether it is within reach before anything is fetched."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hncse_ray.config import CorpusSettings
from hncse_ray.corpus.cache import cache_folder
from hncse_ray.errors import DataError, HncseError
from hncse_ray.reading import content_identity
from hncse_ray.storage import write_atomically

_TIMEOUT_S = 3.0
_SHARD_ROWS = 2**18  # of a slice


def hub_endpoint() -> str:
    """Return the hub's address: ``HF_ENDPOINT``, else the public one."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def hub_is_reachable() -> bool:
    """Return whether a connection to the hub opens within a few seconds.

    The hub's own client retries for minutes on a network that swallows packets. A machine behind a proxy is taken
    to reach it; ``HF_HUB_OFFLINE`` means no.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    url = urlsplit(hub_endpoint())
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        with socket.create_connection((url.hostname or "", port), timeout=_TIMEOUT_S):
            return True
    except OSError:
        return False


def hub_rows(settings: CorpusSettings) -> Any:
    """Return the rows of a data set of the Hugging Face hub, to be fetched while they are read, in shards.

    A slice of a split is fetched as a whole first, since only then its rows can be counted.

    Raises:
        DataError: it is neither in the library's cache nor to be fetched, or has no such subset or split.
    """
    builder = _builder(settings)
    with hub_trouble(settings):
        if "[" not in settings.split:
            return builder.as_streaming_dataset(split=settings.split)
        builder.download_and_prepare()
        rows = builder.as_dataset(split=settings.split)
        return rows.to_iterable_dataset(num_shards=-(-len(rows) // _SHARD_ROWS) or 1)


@contextlib.contextmanager
def hub_trouble(settings: CorpusSettings) -> Iterator[None]:
    """Turn what goes wrong with a data set into a DataError that names it."""
    try:
        yield
    except HncseError:
        raise
    except Exception as error:  # the library raises a dozen kinds; all are about this data set
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "Check corpus.path, corpus.subset and corpus.split, and HF_TOKEN if not everybody may read it"
        raise DataError(f"cannot be loaded ({reason})", settings.path[0], hint) from error


def hub_identity(settings: CorpusSettings) -> str:
    """Return what the content of a data set is: its commit, or a hash of files that are here.

    Where the hub is out of reach it is what it was when the hub was last asked, so that a prepared corpus is found.

    Raises:
        DataError: see :func:`hub_rows`.
    """
    name = settings.path[0]
    asked = json.dumps([name, settings.subset, settings.split])
    known = cache_folder(settings.cache_dir) / "hub" / hashlib.sha256(asked.encode()).hexdigest()
    is_here = os.path.exists(name)
    is_online = not is_here and hub_is_reachable()
    try:
        builder = _builder(settings)
    except DataError:
        if is_here or is_online or not known.is_file():
            raise
        return known.read_text(encoding="utf-8")
    what = [builder.dataset_name, builder.config.name, settings.split, _content(builder, settings.split)]
    identity = " ".join(map(str, what))
    if is_online:
        try:
            known.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot be written ({error.strerror or error})", str(known.parent),
                            "Set corpus.cache_dir or HNCSE_CACHE") from None  # fmt: skip
        write_atomically(known, identity)
    return identity


def _content(builder: Any, split: str) -> str:
    found = builder.config.data_files or {}
    own = [files for name, files in found.items() if str(name) in split] or list(found.values())
    paths = [file for files in own for file in files]
    if not paths or not all(map(os.path.isfile, paths)):  # on the hub, or in the library's cache: the commit
        return f"{builder.config.version} {builder.hash}"
    return hashlib.sha256(b"".join(content_identity(Path(path)) for path in paths)).hexdigest()


def _builder(settings: CorpusSettings) -> Any:
    import datasets
    import huggingface_hub.constants

    name = settings.path[0]
    with contextlib.ExitStack() as stack, hub_trouble(settings):
        if os.path.exists(name) or hub_is_reachable():
            return datasets.load_dataset_builder(name, settings.subset)
        # Without this the clients retry for minutes before they look into the cache.
        stack.enter_context(_constant(huggingface_hub.constants, "HF_HUB_OFFLINE", True))
        stack.enter_context(_constant(datasets.config, "HF_HUB_OFFLINE", True))
        try:
            return datasets.load_dataset_builder(name, settings.subset)
        except Exception as error:  # as in hub_trouble
            hint = (
                "Use a local file (corpus.source=auto corpus.path=FILE), the text that is already here"
                " (corpus.source=python-docs), or set HF_HOME to a cache that holds the data set"
            )
            what = "is not in the local cache, and the Hugging Face hub cannot be reached"
            raise DataError(what, name, hint) from error


@contextlib.contextmanager
def _constant(module: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
