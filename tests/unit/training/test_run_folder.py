"""Who may use a run's folder, and writing into it without halves."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from waits import seconds

from hncse_ray.config import Settings, load_settings
from hncse_ray.errors import StorageError
from hncse_ray.storage import write_atomically, write_folder
from hncse_ray.training.run_folder import claim_run

TREE = {"corpus": {"source": "text", "path": "sentences.txt"}}
RESULT = {"step": 12, "best_step": 8, "sentences_per_s": 10.0, "stopped_early": False}


def settings(storage: Path, *overrides: str) -> Settings:
    return load_settings(TREE, [f"run.storage_path={storage}", *overrides])


def refusal(chosen: Settings) -> str:
    with pytest.raises(StorageError) as caught, claim_run(chosen):
        pytest.fail("the folder was given")
    assert caught.value.hint
    return str(caught.value)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class TestClaiming:
    def test_a_new_folder_is_made_and_says_whose_it_is(self, tmp_path: Path) -> None:
        chosen = settings(tmp_path / "deep" / "runs")
        with claim_run(chosen) as folder:
            assert folder.path == tmp_path / "deep/runs/run"
            assert load_settings(folder.path / "settings.yaml") == chosen
            assert folder.finished() is None

    def test_an_empty_folder_is_taken(self, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        with claim_run(settings(tmp_path)) as folder:
            assert (folder.path / "settings.yaml").exists()

    def test_the_same_settings_may_come_back(self, tmp_path: Path) -> None:
        for _ in range(2):
            with claim_run(settings(tmp_path, "train.learning_rate=1e-4")) as folder:
                (folder.path / "checkpoints").mkdir(exist_ok=True)

    @pytest.mark.parametrize(
        ("override", "said"),
        [
            ("train.batch_size=32", "train.batch_size was 64, now 32"),
            ("run.seed=5", "run.seed was 0, now 5"),
            ("corpus.min_words=4", "corpus.min_words was 1, now 4"),
            ("objective.name=three_view", "objective.name was 'info_nce', now 'three_view'"),
            ("objective.name=hybrid", "objective.k was None, now 10"),
            ("corpus.path=[a, b]", "corpus.path was ['sentences.txt'], now ['a', 'b'] (and there is no a)"),
            ("corpus.path=*.txt", "corpus.path was ['sentences.txt'], now ['*.txt']."),
        ],
    )
    def test_other_settings_are_refused_and_the_key_is_named(self, tmp_path: Path, override: str, said: str) -> None:
        with claim_run(settings(tmp_path)) as folder:
            (folder.path / "checkpoints").mkdir()
        before = listing(tmp_path)
        assert said in refusal(settings(tmp_path, override))
        assert listing(tmp_path) == before

    @pytest.mark.parametrize(
        "override",
        ["cluster.num_workers=4", "cluster.use_gpu=false", "corpus.cache_dir=/x", "corpus.num_processes=2",
         "evaluation.batch_size=7"],
    )  # fmt: skip
    def test_what_does_not_change_the_results_may_change(self, tmp_path: Path, override: str) -> None:
        with claim_run(settings(tmp_path)):
            pass
        with claim_run(settings(tmp_path, override)) as folder:
            assert load_settings(folder.path / "settings.yaml") == settings(tmp_path)

    def test_a_moved_folder_is_still_the_same_run(self, tmp_path: Path) -> None:
        with claim_run(settings(tmp_path / "here")):
            pass
        (tmp_path / "here").rename(tmp_path / "there")
        with claim_run(settings(tmp_path / "there")) as folder:
            assert load_settings(folder.path / "settings.yaml") == settings(tmp_path / "here")

    def test_a_folder_with_other_peoples_files_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run/thesis.tex").write_text("precious")
        assert "is not empty and holds no run" in refusal(settings(tmp_path))

    def test_a_refused_folder_is_left_as_it_was(self, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run/thesis.tex").write_text("precious")
        (tmp_path / "run/.lock").write_text("4711")
        before = listing(tmp_path)
        refusal(settings(tmp_path))
        assert listing(tmp_path) == before

    def test_nothing_is_added_to_a_refused_folder(self, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run/thesis.tex").write_text("precious")
        refusal(settings(tmp_path))
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]

    @pytest.mark.parametrize("content", ["", "{", "- a\n- b\n", "just words", "\x00"])
    def test_settings_that_cannot_be_read_are_refused_and_named(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run/settings.yaml").write_text(content)
        assert str(tmp_path / "run") in refusal(settings(tmp_path))

    def test_a_folder_in_use_by_another_process_is_refused(self, tmp_path: Path) -> None:
        chosen = settings(tmp_path)
        with claim_run(chosen):
            pass
        code = (
            "import fcntl, sys; lock = open(sys.argv[1], 'w'); fcntl.flock(lock, fcntl.LOCK_EX);"
            "print('held', flush=True); sys.stdin.read()"
        )
        holder = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "run/.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert holder.stdin is not None and holder.stdout is not None
        try:
            assert holder.stdout.readline() == b"held\n"
            assert "is in use by another process" in refusal(chosen)
        finally:
            holder.communicate(timeout=seconds(30))
        with claim_run(chosen):  # free once its holder has ended
            pass

    def test_a_folder_is_held_while_the_context_lasts_and_no_longer(self, tmp_path: Path) -> None:
        with claim_run(settings(tmp_path)):
            assert "is in use" in refusal(settings(tmp_path))
        with pytest.raises(RuntimeError), claim_run(settings(tmp_path)):
            raise RuntimeError
        with claim_run(settings(tmp_path)):
            pass

    @pytest.mark.parametrize("place", ["file/runs", "file", "/proc/hncse"])
    def test_a_place_that_cannot_be_written_is_named(self, tmp_path: Path, place: str) -> None:
        (tmp_path / "file").write_text("a file")
        message = refusal(settings(tmp_path / place))
        assert str(tmp_path / place) in message and "run.storage_path" in message
        assert listing(tmp_path) == {"file": b"a file"}

    def test_a_file_of_the_runs_own_name_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "run").write_text("a file")
        assert str(tmp_path / "run") in refusal(settings(tmp_path))

    def test_the_result_is_read_back(self, tmp_path: Path) -> None:
        with claim_run(settings(tmp_path)) as folder:
            folder.write_result(RESULT | {"after": {"dev": {"pairs/mrr": 0.5}}})
            finished = folder.finished()
            assert finished is not None
            assert (finished.step, finished.best_step, finished.after) == (12, 8, {"dev": {"pairs/mrr": 0.5}})

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"step": 1}', '{"unknown": 1}', "3"])
    def test_a_damaged_result_is_named(self, tmp_path: Path, content: str) -> None:
        with claim_run(settings(tmp_path)) as folder:
            (folder.path / "result.json").write_text(content)
            with pytest.raises(StorageError, match=r"result\.json.*Delete it"):
                folder.finished()


class TestWritingAFolder:
    def fill(self, text: str):  # type: ignore[no-untyped-def]
        def write(folder: Path) -> None:
            (folder / "a.txt").write_text(text)
            (folder / "sub").mkdir()
            (folder / "sub/b.txt").write_text(text)

        return write

    def names(self, folder: Path) -> list[str]:
        return sorted(path.name for path in folder.iterdir())

    def test_it_is_made_with_its_parents(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "x/y/model", self.fill("new"))
        assert listing(tmp_path / "x/y") == {"model/a.txt": b"new", "model/sub/b.txt": b"new"}

    def test_the_old_one_is_replaced_whole(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "model", self.fill("old"))
        write_folder(tmp_path / "model", lambda folder: (folder / "c.txt").write_text("new"))
        assert listing(tmp_path) == {"model/c.txt": b"new"}
        assert self.names(tmp_path) == ["model"]

    @pytest.mark.parametrize(
        "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("writer failed"), ValueError("x")]
    )
    def test_a_failed_write_leaves_the_old_one_and_nothing_else(self, tmp_path: Path, error: Exception) -> None:
        write_folder(tmp_path / "model", self.fill("old"))

        def fail(folder: Path) -> None:
            self.fill("new")(folder)
            raise error

        with pytest.raises(StorageError, match=str(tmp_path / "model")) as caught:
            write_folder(tmp_path / "model", fail)
        assert str(error) in str(caught.value) and caught.value.hint
        assert listing(tmp_path) == {"model/a.txt": b"old", "model/sub/b.txt": b"old"}
        assert self.names(tmp_path) == ["model"]

    def test_a_failed_first_write_leaves_nothing(self, tmp_path: Path) -> None:
        def fail(folder: Path) -> None:
            self.fill("new")(folder)
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

        with pytest.raises(StorageError, match="quota"):
            write_folder(tmp_path / "model", fail)
        assert self.names(tmp_path) == []

    def test_the_old_one_is_there_while_the_new_one_is_written(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "model", self.fill("old"))

        def look(folder: Path) -> None:
            assert folder.parent == tmp_path and list(folder.iterdir()) == []
            assert (tmp_path / "model/a.txt").read_text() == "old"
            (folder / "a.txt").write_text("new")

        write_folder(tmp_path / "model", look)
        assert (tmp_path / "model/a.txt").read_text() == "new"

    def killed_while_writing(self, path: Path) -> None:
        def write(folder: Path) -> None:
            (folder / "half.txt").write_text("half")
            os._exit(9)

        child = os.fork()
        if child == 0:
            try:
                write_folder(path, write)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9

    def test_what_a_killed_writer_left_is_removed_by_the_next(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "model", self.fill("old"))
        write_folder(tmp_path / "model2", self.fill("another"))
        self.killed_while_writing(tmp_path / "model")
        assert (tmp_path / "model/a.txt").read_text() == "old"
        assert len(self.names(tmp_path)) == 3
        write_folder(tmp_path / "model", self.fill("new"))
        assert self.names(tmp_path) == ["model", "model2"]
        assert (tmp_path / "model/a.txt").read_text() == "new"

    def test_a_writer_killed_between_its_two_renames_loses_nothing(self, tmp_path: Path) -> None:
        """What such a kill leaves: the old folder aside, the new one whole but not in place. The next write fails."""
        write_folder(tmp_path / "model", self.fill("old"))
        (tmp_path / "model").rename(tmp_path / ".model.12345678.old")

        def fail(folder: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.raises(StorageError):
            write_folder(tmp_path / "model", fail)
        assert b"old" in listing(tmp_path).values()

    def test_a_rename_that_fails_leaves_the_old_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_folder(tmp_path / "model", self.fill("old"))
        really, renames = os.replace, []

        def second_fails(*paths: Path) -> None:
            renames.append(paths)
            if len(renames) == 2:
                raise OSError(errno.EIO, "Input/output error")
            really(*paths)

        monkeypatch.setattr(os, "replace", second_fails)
        with pytest.raises(StorageError, match="Input/output error"):
            write_folder(tmp_path / "model", self.fill("new"))
        assert listing(tmp_path) == {"model/a.txt": b"old", "model/sub/b.txt": b"old"}
        assert self.names(tmp_path) == ["model"]

    def test_a_place_that_cannot_be_written_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("a file")
        with pytest.raises(StorageError, match=str(tmp_path / "file/model")):
            write_folder(tmp_path / "file/model", self.fill("new"))
        assert listing(tmp_path) == {"file": b"a file"}


class TestWritingAFile:
    def test_it_is_replaced_whole(self, tmp_path: Path) -> None:
        for text in ("a longer first text", "née"):
            write_atomically(tmp_path / "result.json", text)
        assert listing(tmp_path) == {"result.json": "née".encode()}

    def test_a_full_disk_leaves_the_old_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_atomically(tmp_path / "result.json", "old")

        def full(*args: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(StorageError, match=r"result\.json.*No space left"):
            write_atomically(tmp_path / "result.json", "new")
        assert listing(tmp_path) == {"result.json": b"old"}

    def test_a_place_that_cannot_be_written_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="none/result.json"):
            write_atomically(tmp_path / "none/result.json", "text")
