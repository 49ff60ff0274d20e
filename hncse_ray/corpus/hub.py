"""Is the Hugging Face hub within reach? Asked once, with a short time limit, before anything is fetched."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

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
