"""Files are whole or not there, past the cache or through it; results of a submitted job outlive it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from invoke import assert_refused, hncse
from safetensors.numpy import save_file

from hncse_ray.errors import StorageError
from hncse_ray.storage import (
    BLOCK,
    check_outlasts_job,
    check_writable,
    is_locked,
    leave_nothing,
    locked,
    replacing,
    write_folder,
    write_past_cache,
)

REPOSITORY = Path(__file__).parents[3]


def test_whoever_may_read_a_folder_may_read_its_files(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "1_Dense").mkdir()
        for path in (folder / "model.safetensors", folder / "1_Dense" / "model.safetensors"):
            save_file({"a": np.ones(1)}, path)

    write_folder(tmp_path / "model", write)
    (tmp_path / "plain").write_text("with the rights that the umask leaves")
    wanted = (tmp_path / "plain").stat().st_mode
    assert [path.stat().st_mode for path in (tmp_path / "model").rglob("*.safetensors")] == [wanted] * 2


@pytest.mark.parametrize("name", ["model", "m*", "[m]", "model.v2"])
def test_a_folder_that_is_written_leaves_others_of_like_names_alone(tmp_path: Path, name: str) -> None:
    others = [".model.backup", ".m.x", ".model.v2.12345678", ".model.old.12345678", f".{name}.1234567", f".{name}.lock"]
    for other in others:
        (tmp_path / other).mkdir()
    (tmp_path / f".{name}.12345678").mkdir(exist_ok=True)
    write_folder(tmp_path / name, lambda folder: (folder / "file").touch())
    kept = [other for other in others if other != f".{name}.12345678"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, name])


def test_a_folder_can_be_written_while_one_of_a_like_name_is(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        write_folder(tmp_path / "model", lambda inner: (inner / "file").touch())
        (folder / "file").touch()

    write_folder(tmp_path / "model.v2", write)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.v2"]


def test_a_lock_that_is_removed_while_one_waits_for_it_is_given_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, really, removed = tmp_path / "run/.lock", fcntl.flock, list[int]()

    def flock(lock: int, how: int) -> None:
        if not removed:  # between its opening and its locking the one who held it leaves nothing
            removed.append(1)
            assert leave_nothing(path.parent, (".lock",), [path.parent])
        really(lock, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(path, hint="Wait") as made:
        assert made == [path.parent] and is_locked(path)
        with pytest.raises(StorageError, match="is in use"), locked(path, hint="Wait"):
            pytest.fail("both have it")


def test_what_is_gone_or_claimed_again_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, really = tmp_path / "run/.lock", Path.rmdir
    with locked(path, hint="Wait") as made:
        shutil.rmtree(path.parent)
        assert not leave_nothing(path.parent, (".lock",), made)

    def rmdir(folder: Path) -> None:
        (folder / ".lock").touch()  # the next one is there just before
        really(folder)

    with locked(path, hint="Wait") as made:
        monkeypatch.setattr(Path, "rmdir", rmdir)
        assert leave_nothing(path.parent, (".lock",), made) and path.exists()


def test_a_file_system_without_locks_is_not_taken_for_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(lock: int, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(StorageError, match=r"run: cannot be locked \(Function not implemented\).*Choose another"),
        locked(tmp_path / "run/.lock", hint="Choose another"),
    ):
        pytest.fail("it is not locked")


def test_who_looks_at_a_lock_keeps_nobody_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ".lock"
    with path.open("w") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        monkeypatch.setattr(time, "sleep", lambda seconds: fcntl.flock(looking, fcntl.LOCK_UN))
        with locked(path, hint="Wait"):
            assert is_locked(path)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder that Ray unpacks, in which the command of a job runs, with the variable that Ray sets."""
    folder = tmp_path / "session/runtime_resources/working_dir_files/_ray_pkg_1"
    folder.mkdir(parents=True)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.chdir(folder)
    return folder


def test_several_may_write_a_file_at_once_and_it_is_always_whole(tmp_path: Path) -> None:
    path = tmp_path / "v.npy"
    path.write_text("old")
    with replacing(path) as first:
        first.write_text("fir")
        with replacing(path) as second:
            assert first.suffix == second.suffix == ".npy" and first != second and path.read_text() == "old"
            second.write_text("second")
        assert path.read_text() == "second"
        first.write_text("first")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_of_a_file_that_is_not_finished_nothing_is_left(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "v.npy"
    path.write_text("old")
    expected = StorageError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught, replacing(path, "Free some") as partial:
        partial.write_text("ha")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    if isinstance(error, OSError):
        assert str(caught.value) == f"{path}: cannot be written (No space left on device). Free some"
    with pytest.raises(StorageError, match="cannot be written"), replacing(path / "below"):
        (path / "below").write_text("x")


def test_whether_a_file_can_be_written_is_seen_before_it_is(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "file", "")
    assert list((tmp_path / "new").iterdir()) == []
    for path, said in ((tmp_path / "new", "is a folder, not a file"), (Path("/proc/file"), "cannot be written")):
        with pytest.raises(StorageError, match=said):
            check_writable(path, "Choose another")


@pytest.mark.parametrize("path", ["runs", "./runs", "../runs", "~/runs", "file://runs"])
def test_a_relative_place_in_a_job_is_refused(job: Path, path: str) -> None:
    with pytest.raises(StorageError, match=f"^run.storage_path={re.escape(path)}: .*removed.*absolute path"):
        check_outlasts_job(path, "run.storage_path")


def test_others_are_not(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError):
        check_outlasts_job(job / "runs", "run.storage_path")
    for path in ("/mnt/runs", "s3://bucket/runs", "file:///mnt/runs"):
        check_outlasts_job(path, "run.storage_path")
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    check_outlasts_job("runs", "run.storage_path")


def test_every_command_that_leaves_something_refuses_it(
    job: Path, tiny_model: Path, corpus_file: Path, pairs_file: Path
) -> None:
    run = [f"encoder.model={tiny_model}", f"corpus.path={corpus_file}", "corpus.source=text"]
    for command in (
        ["train", "quickstart", *run],
        ["tune", "quickstart", *run, "--space", "info_nce"],
        ["tune", "quickstart", *run, "--space", "info_nce", "--out", "sweep"],
        ["mine", tiny_model, corpus_file, "--out", "x.parquet"],
        ["encode", tiny_model, corpus_file, "--out", "x.npy"],
        ["evaluate", tiny_model, "--suite", "geometry", "--plots", "plots"],
        ["data", "sts", "--out", "senteval"],
    ):
        assert_refused(hncse(*command), "the folder of a submitted job", "Give an absolute path")
    assert list(job.iterdir()) == []


def test_the_documentation_submits_no_run_that_is_lost() -> None:
    submitted = re.compile(r"(?:hncse submit|ray job submit)[^`\n]*(?: train |/train\.py )(?:[^`\n]|\\\n)*")
    found = 0
    for path in [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md"), *(REPOSITORY / "jobs").glob("*.py")]:
        for command in submitted.findall(path.read_text()):
            found += 1
            assert re.search(r"run\.storage_path=(/|\$PWD|s3://|gs://|URL|\.\.\.)", command), (path.name, command)
    assert found >= 6


@pytest.mark.parametrize("shift", [0, 1])  # 1: an address that no disk reads from
@pytest.mark.parametrize("blocks", [1, 300])
def test_what_is_written_past_the_cache_is_there(tmp_path: Path, blocks: int, shift: int) -> None:
    memory = mmap.mmap(-1, (blocks + 1) * BLOCK)
    memory[:] = bytes(i * i % 251 for i in range(len(memory)))
    content, size = memoryview(memory)[shift : shift + blocks * BLOCK], blocks * BLOCK - 100
    write_past_cache(tmp_path / "file", content, size=size)
    assert (tmp_path / "file").read_bytes() == bytes(content[:size])
    with pytest.raises(FileExistsError):
        write_past_cache(tmp_path / "file", content, size=size)
