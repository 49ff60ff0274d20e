"""Where prepared corpora and pairs are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(cache_dir: str | None) -> Path:
    """Return the cache: the setting ``corpus.cache_dir``, else ``$HNCSE_CACHE``, else ``~/.cache/hncse_ray``."""
    return Path(cache_dir or os.environ.get("HNCSE_CACHE") or "~/.cache/hncse_ray").expanduser().absolute()
