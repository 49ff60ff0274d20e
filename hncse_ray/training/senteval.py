"""The SentEval sets: where they are found on this machine, and fetching them from the hub.

It stands here since it needs both what evaluation reads and the cache and the hub, which are the corpus's.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hncse_ray.config import EvaluationSettings
from hncse_ray.corpus.cache import cache_folder
from hncse_ray.errors import DataError, StorageError, counted
from hncse_ray.evaluation import STS_TASKS, TRANSFER_TASKS
from hncse_ray.evaluation.sts import sts_files
from hncse_ray.evaluation.transfer import transfer_files
from hncse_ray.storage import write_folder
from hncse_ray.training.simcse_files import REPOSITORY, Tell, fetched, make_folder

ARCHIVE = "senteval.tar"
_NOTES = ("readme.txt", "00-readme.txt", "license.txt")  # taken along where they lie beside a set
_LARGEST = 64 * 2**20  # bytes; the largest file of the sets has 4 MB
_ELSEWHERE = (
    "If you have SentEval's data/downstream folder, name it in --senteval or evaluation.senteval_path, or set"
    " HNCSE_DATA to the folder that holds it under the name senteval"
)


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
            raise DataError("no such folder", settings.senteval_path or repr(settings.senteval_path), hint)
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
            what = f"is there already and lacks {counted(len(missing), 'file')} of the sets, such as {missing[0]}"
            raise StorageError(what, str(folder), "Remove it, or choose another --out")
    with fetched(ARCHIVE, elsewhere=_ELSEWHERE, tell=tell) as archive:
        make_folder(folder.absolute().parent)
        tell("unpacking", 0, None)
        members = _members(archive, files)
        write_folder(folder, lambda partial: _unpack(archive, members, partial))
    return Fetched(str(folder), (*STS_TASKS, *TRANSFER_TASKS), True, len(files))


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
