"""The SentEval sets: where they are found on this machine, and fetching them from the hub.

It stands here since it needs both what evaluation reads and the cache and the hub, which are the corpus's.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hncse_ray.config import EvaluationSettings
from hncse_ray.corpus.cache import cache_folder
from hncse_ray.corpus.hub import hub_endpoint, hub_is_reachable
from hncse_ray.errors import DataError, StorageError
from hncse_ray.evaluation import STS_TASKS, TRANSFER_TASKS
from hncse_ray.evaluation.sts import sts_files
from hncse_ray.evaluation.transfer import transfer_files
from hncse_ray.storage import write_folder

logger = logging.getLogger(__name__)

# The archive that SimCSE's authors keep (arXiv 2104.08821), at the commit that has not changed since 2021.
REPOSITORY, ARCHIVE = "princeton-nlp/datasets-for-simcse", "senteval.tar"
_REVISION = "e145e8bb659b2aa2669f32ef79cb4cdef6c58fef"
_NOTES = ("readme.txt", "00-readme.txt", "license.txt")  # taken along where they lie beside a set
_LARGEST = 64 * 2**20  # bytes; the largest file of the sets has 4 MB
_ELSEWHERE = (
    "If you have SentEval's data/downstream folder, name it in --senteval or evaluation.senteval_path, or set"
    " HNCSE_DATA to the folder that holds it under the name senteval"
)

Tell = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Fetched:
    """What ``hncse data sts`` leaves.

    Attributes:
        folder: where the sets are.
        tasks: those it holds.
        fetched: False if they were there already.
        files: how many files they have.
    """

    folder: str
    tasks: tuple[str, ...]
    fetched: bool
    files: int


def default_folder() -> Path:
    """Return where fetched sets are kept, and looked for if nothing else names them."""
    return cache_folder(None) / "senteval"


def senteval_folder(settings: EvaluationSettings) -> str:
    """Return the SentEval folder: of the settings, below ``$HNCSE_DATA``, or the one that was fetched.

    Raises:
        DataError: there is none.
    """
    hint = (
        "Fetch the sets with `hncse data sts`, set evaluation.senteval_path (a SentEval data folder), or choose other"
        " evaluation.suites"
    )
    data = os.environ.get("HNCSE_DATA")
    if settings.senteval_path is not None:
        if not os.path.isdir(settings.senteval_path):
            raise DataError("no such folder", settings.senteval_path, hint)
        return settings.senteval_path
    places = [*([Path(data) / "senteval"] if data else []), default_folder()]
    for place in places:
        if place.is_dir():
            return str(place)
    if data:
        raise DataError("no such folder", str(places[0]), hint)
    raise DataError(
        f"the suite needs the SentEval data, and neither the setting nor $HNCSE_DATA names them; nor are they in"
        f" {default_folder()}",
        "evaluation.senteval_path",
        hint,
    )


def fetch_senteval(out: Path | None = None, *, tell: Tell = lambda stage, done, total: None) -> Fetched:
    """Fetch the STS and transfer sets from the hub, unless they are there; interrupted, go on with the download.

    Args:
        out: the folder to make; default: where evaluation finds it.
        tell: called with a stage and how far it is.

    Raises:
        DataError: the hub cannot be reached, or does not give the archive that it promises.
        StorageError: the folder holds something else, or cannot be written.
    """
    folder = out or default_folder()
    files = {name for names in (*sts_files().values(), *transfer_files().values()) for name in names}
    if folder.exists():
        missing = sorted(name for name in files if not (folder / name).is_file())
        if not missing:
            return Fetched(str(folder), (*STS_TASKS, *TRANSFER_TASKS), False, len(files))
        if not folder.is_dir() or any(folder.iterdir()):
            raise StorageError(f"is there already and lacks {len(missing)} files of the sets, such as {missing[0]}",
                               str(folder), "Remove it, or choose another --out")  # fmt: skip
    if not hub_is_reachable():
        raise DataError("the Hugging Face hub cannot be reached, so the sets cannot be fetched", REPOSITORY, _ELSEWHERE)
    downloads = cache_folder(None) / "downloads"
    _make(downloads)
    _make(folder.absolute().parent)
    archive = _download(downloads, tell)
    tell("unpacking", 0, None)
    members = _members(archive, files)
    write_folder(folder, lambda partial: _unpack(archive, members, partial))
    shutil.rmtree(downloads, ignore_errors=True)
    return Fetched(str(folder), (*STS_TASKS, *TRANSFER_TASKS), True, len(files))


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot be written ({error.strerror})", str(folder), "Choose another --out") from error


def _download(folder: Path, tell: Tell) -> Path:
    """Fetch the archive, going on where an earlier attempt stopped, and compare it with the hub's checksum.

    huggingface_hub itself begins again in each process, so the rest is asked for here.
    """
    from huggingface_hub import HfApi, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    where = f"{REPOSITORY}/{ARCHIVE}"
    try:
        found = HfApi(endpoint=hub_endpoint()).get_paths_info(
            REPOSITORY, [ARCHIVE], repo_type="dataset", revision=_REVISION
        )
        lfs = getattr(found[0], "lfs", None) if found else None
        if lfs is None:
            raise DataError("the hub has no such file, or no checksum of it", where, _ELSEWHERE)
        partial = folder / f"{ARCHIVE}.{lfs.sha256[:16]}"
        have = partial.stat().st_size if partial.exists() else 0
        if have < lfs.size:
            url = f"{hub_endpoint()}/datasets/{REPOSITORY}/resolve/{_REVISION}/{ARCHIVE}"
            headers = build_hf_headers() | {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
            with get_session().stream("GET", url, headers=headers) as response:
                hf_raise_for_status(response)
                have = have if response.status_code == 206 else 0  # else it begins at the beginning
                with partial.open("ab" if have else "wb") as file:
                    for part in response.iter_bytes():
                        have += file.write(part)
                        tell(f"fetching {ARCHIVE} of {REPOSITORY}, KB", have // 1024, lfs.size // 1024)
    except DataError:
        raise
    except Exception as error:  # the hub's client and its HTTP library each have exceptions of their own
        first = (str(error).strip().splitlines() or [""])[0]
        raise DataError(f"could not be fetched ({type(error).__name__}: {first})", where,
                        f"Try again: it goes on where it stopped. {_ELSEWHERE}") from error  # fmt: skip
    with partial.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != lfs.sha256:
        partial.unlink()
        raise DataError(f"its SHA-256 is {digest[:12]}... and not the hub's {lfs.sha256[:12]}...", where,
                        "It was removed; try again")  # fmt: skip
    return partial


def _members(archive: Path, files: set[str]) -> dict[str, str]:
    """Map members of the archive to the files that they become: expected names only, each once, all of them there.

    What is written is named by this table and not by the archive, so nothing lands outside the folder.
    """
    folders = {str(PurePosixPath(name).parent) for name in files}
    found: dict[str, str] = {}
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts
                if ".." in parts or member.name.startswith("/"):
                    raise DataError(f"holds the name {member.name!r}, which leads out of it", str(archive), _ELSEWHERE)
                if not member.isreg() or member.size > _LARGEST:
                    continue
                # The sets lie at the top of the archive or below a folder or two.
                for skipped in range(min(3, len(parts))):
                    name = "/".join(parts[skipped:])
                    is_note = parts[-1].lower() in _NOTES and str(PurePosixPath(name).parent) in folders
                    if name in files or is_note:
                        found.setdefault(name, member.name)
                        break
    except (OSError, tarfile.TarError, EOFError) as error:
        raise DataError(f"is no tar archive ({error})", str(archive), _ELSEWHERE) from error
    if missing := sorted(files - found.keys()):
        raise DataError(f"lacks {len(missing)} of {len(files)} files, first {missing[0]}", f"{REPOSITORY}/{ARCHIVE}",
                        _ELSEWHERE)  # fmt: skip
    return {member: name for name, member in found.items()}


def _unpack(archive: Path, members: dict[str, str], folder: Path) -> None:
    with tarfile.open(archive, "r:*") as tar:
        for member in tar:
            name = members.get(member.name)
            if name is None or not member.isreg():
                continue
            source = tar.extractfile(member)
            assert source is not None
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target)
