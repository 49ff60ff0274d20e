"""The files that SimCSE's authors keep on the hub (arXiv 2104.08821): fetched, and compared with its checksum."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hncse_ray.corpus.cache import cache_folder
from hncse_ray.corpus.hub import hub_endpoint, hub_is_reachable
from hncse_ray.errors import DataError, StorageError
from hncse_ray.storage import locked, replacing

REPOSITORY = "princeton-nlp/datasets-for-simcse"
REVISION = "e145e8bb659b2aa2669f32ef79cb4cdef6c58fef"  # has not changed since 2021
SENTENCES = "wiki1m_for_simcse.txt"
_ELSEWHERE = "Get the file from where the hub can be reached, or train on sentences of your own: corpus.path=FILE"

Tell = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Wiki1m:
    """What ``hncse data wiki1m`` leaves: the file, and whether it was fetched just now."""

    path: str
    fetched: bool


def fetch_wiki1m(out: Path, *, tell: Tell = lambda stage, done, total: None) -> Wiki1m:
    """Fetch the million sentences of English Wikipedia that SimCSE and its followers train on, unless they are there.

    Args:
        out: the file to make.
        tell: called with a stage and how far it is.

    Raises:
        DataError: see :func:`fetch_file`.
        StorageError: the file cannot be written.
    """
    if out.is_file():
        return Wiki1m(str(out), False)
    if out.exists():
        raise StorageError("is no file", str(out), "Choose another --out")
    with fetched(SENTENCES, elsewhere=_ELSEWHERE, tell=tell) as file:
        make_folder(out.absolute().parent)
        with replacing(out, "Choose another --out") as partial:
            shutil.copyfile(file, partial)
    return Wiki1m(str(out), True)


@contextmanager
def fetched(name: str, *, elsewhere: str, tell: Tell = lambda stage, done, total: None) -> Iterator[Path]:
    """Fetch a file into the cache, going on where an earlier attempt stopped, and compare it with the hub's checksum.

    It is removed when the context ends well: by then it is where it should be. Meanwhile it is this process's alone.

    Args:
        name: of the file.
        elsewhere: what to do without the hub.
        tell: called with a stage and how far it is.

    Raises:
        DataError: the hub cannot be reached, or does not give the file that it promises.
        StorageError: the cache cannot be written, or another process fetches the file.
    """
    if not hub_is_reachable():
        raise DataError("the Hugging Face hub cannot be reached, so it cannot be fetched", f"{REPOSITORY}/{name}",
                        elsewhere)  # fmt: skip
    folder = cache_folder(None) / "downloads"
    with locked(folder / f".{name}.lock", hint="Set HNCSE_CACHE"):
        file = _fetch(name, folder, elsewhere, tell)
        yield file
        file.unlink()


def _fetch(name: str, folder: Path, elsewhere: str, tell: Tell) -> Path:
    """Have the whole file in a folder; huggingface_hub itself begins again in each process, so it is asked for here."""
    from huggingface_hub import HfApi, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    where = f"{REPOSITORY}/{name}"
    try:
        found = HfApi(endpoint=hub_endpoint()).get_paths_info(
            REPOSITORY, [name], repo_type="dataset", revision=REVISION
        )
        lfs = getattr(found[0], "lfs", None) if found else None
        if lfs is None:
            raise DataError("the hub has no such file, or no checksum of it", where, elsewhere)
        partial = folder / f"{name}.{lfs.sha256[:16]}"
        have = partial.stat().st_size if partial.exists() else 0
        if have < lfs.size:
            url = f"{hub_endpoint()}/datasets/{REPOSITORY}/resolve/{REVISION}/{name}"
            headers = build_hf_headers() | {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
            with get_session().stream("GET", url, headers=headers) as response:
                hf_raise_for_status(response)
                have = have if response.status_code == 206 else 0  # else it begins at the beginning
                with partial.open("ab" if have else "wb") as file:
                    for part in response.iter_bytes():
                        have += file.write(part)
                        tell(f"fetching {name} of {REPOSITORY}, KB", have // 1024, lfs.size // 1024)
    except DataError:
        raise
    except Exception as error:  # the hub's client and its HTTP library each have exceptions of their own
        first = (str(error).strip().splitlines() or [""])[0]
        raise DataError(f"could not be fetched ({type(error).__name__}: {first})", where,
                        f"Try again: it goes on where it stopped. {elsewhere}") from error  # fmt: skip
    with partial.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != lfs.sha256:
        partial.unlink()
        raise DataError(f"its SHA-256 is {digest[:12]}... and not the hub's {lfs.sha256[:12]}...", where,
                        "It was removed; try again")  # fmt: skip
    return partial


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        StorageError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot be written ({error.strerror})", str(folder), "Choose another --out") from error
