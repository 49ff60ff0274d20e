"""Where prepared corpora and pairs are kept."""

from __future__ import annotations

import os
from pathlib import Path

from hncse_ray.errors import StorageError


def cache_folder(cache_dir: str | None) -> Path:
    """Return the cache: the setting ``corpus.cache_dir``, else ``$HNCSE_CACHE``, else ``~/.cache/hncse_ray``.

    Raises:
        StorageError: it is in a home directory that does not exist.
    """
    named = cache_dir or os.environ.get("HNCSE_CACHE") or "~/.cache/hncse_ray"
    folder = os.path.expanduser(named)
    if folder.startswith("~"):  # left as it is where the system knows no such home
        raise StorageError("there is no such home directory", named, "Set corpus.cache_dir or HNCSE_CACHE")
    return Path(folder).absolute()
