"""Data sets of the Hugging Face hub, which is asked once whether it is within reach before anything is fetched."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from hncse_ray.config import CorpusSettings
from hncse_ray.errors import DataError

_TIMEOUT_S = 3.0


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


def load_hub(settings: CorpusSettings) -> Any:
    """Load a data set of the Hugging Face hub, from its cache where the hub is out of reach.

    Raises:
        DataError: it is neither in the cache nor to be fetched, or has no such subset or split.
    """
    import datasets
    import huggingface_hub.constants

    name = settings.path[0]
    online = os.path.exists(name) or hub_is_reachable()
    with contextlib.ExitStack() as stack:
        if not online:
            # Without this the clients retry for minutes before they look into the cache.
            stack.enter_context(_constant(huggingface_hub.constants, "HF_HUB_OFFLINE", True))
            stack.enter_context(_constant(datasets.config, "HF_HUB_OFFLINE", True))
        try:
            return datasets.load_dataset(name, settings.subset, split=settings.split)
        except Exception as error:  # the library raises a dozen kinds; all are about this data set
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if online:
                what, hint = (
                    f"cannot be loaded ({reason})",
                    "Check corpus.path, corpus.subset and corpus.split",
                )
            else:
                what = "is not in the local cache, and the Hugging Face hub cannot be reached"
                hint = (
                    "Use a local file (corpus.source=auto corpus.path=FILE), the text that is already here"
                    " (corpus.source=python-docs), or set HF_HOME to a cache that holds the data set"
                )
            raise DataError(what, name, hint) from error


@contextlib.contextmanager
def _constant(module: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def hub_identity(rows: Any) -> str:
    """Name the revision where the data set knows it (its download URLs hold it), else its fingerprint."""
    info = rows.info
    checksums = json.dumps(info.download_checksums, sort_keys=True, default=str) if info.download_checksums else ""
    what = [info.dataset_name, info.config_name, str(info.version), str(rows.split), str(len(rows))]
    return " ".join(map(str, what)) + " " + hashlib.sha256((checksums or rows._fingerprint).encode()).hexdigest()
