"""Runs that are kept at a URL: who may use it, what travels when, and what another machine finds there."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from object_stores import BUCKET, Gate, s3_server
from waits import seconds, soon

from hncse_ray.config import Settings, load_settings
from hncse_ray.errors import StorageError
from hncse_ray.storage import Lease, LeaseLost, Remote, send_folder, whole_folders
from hncse_ray.training import remote_run
from hncse_ray.training.remote_run import (
    MirrorPlan,
    RemoteRunFolder,
    RunMirror,
    bring_run,
    claim_run,
    working_folder,
)

RESULT = {"step": 12, "best_step": 8, "sentences_per_s": 10.0, "stopped_early": False}


def settings(tmp_path: Path, *overrides: str, machine: str = "a", url: str = "") -> Settings:
    """The same run on machines with caches of their own."""
    tree = {
        "run": {"storage_path": url or f"file://{tmp_path}/store"},
        "corpus": {"path": "sentences.txt", "cache_dir": str(tmp_path / machine)},
    }
    return load_settings(tree, overrides)


def refusal(chosen: Settings) -> str:
    with pytest.raises(StorageError) as caught, claim_run(chosen):
        pytest.fail("the run was given")
    assert caught.value.hint and chosen.run_dir in str(caught.value)
    return str(caught.value)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def checkpoint(work: Path, step: int, text: str = "weights") -> Path:
    folder = work / "checkpoints" / f"step_{step:09d}"
    folder.mkdir(parents=True)
    (folder / "encoder.safetensors").write_text(f"{text} {step}")
    (folder / "state.json").write_text(str(step))
    with (work / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step}) + "\n")
    return folder


class TestClaiming:
    def test_a_new_run_says_at_the_url_whose_it_is_and_holds_it(self, tmp_path: Path) -> None:
        chosen = settings(tmp_path)
        with claim_run(chosen) as folder:
            assert folder.place == chosen.run_dir and folder.path == working_folder(chosen)
            assert load_settings(tmp_path / "store/run/settings.yaml") == chosen
            assert len(list((tmp_path / "store/run").glob("lease.*.json"))) == 1
            (folder.path / "checkpoints").mkdir()
        assert set(listing(tmp_path / "store/run")) == {"settings.yaml"}

    def test_a_local_folder_is_claimed_as_ever(self, tmp_path: Path) -> None:
        with claim_run(settings(tmp_path, url=str(tmp_path / "runs"))) as folder:
            assert folder.path == tmp_path / "runs/run" and not isinstance(folder, RemoteRunFolder)

    def test_other_settings_are_refused_on_any_machine(self, tmp_path: Path) -> None:
        with claim_run(settings(tmp_path)) as folder:
            (folder.path / "checkpoints").mkdir()
        before = listing(tmp_path / "store")
        for machine in "ab":
            said = refusal(settings(tmp_path, "train.batch_size=32", machine=machine))
            assert "train.batch_size was 64, now 32" in said
        assert listing(tmp_path / "store") == before

    def test_a_place_with_other_peoples_files_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "store/run").mkdir(parents=True)
        (tmp_path / "store/run/thesis.tex").write_text("precious")
        assert "is not empty and holds no run (there is thesis.tex)" in refusal(settings(tmp_path))
        assert listing(tmp_path / "store") == {"run/thesis.tex": b"precious"}

    def test_settings_that_cannot_be_read_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "store/run").mkdir(parents=True)
        (tmp_path / "store/run/settings.yaml").write_text("{")
        assert "cannot be read" in refusal(settings(tmp_path))

    def test_it_is_held_while_the_context_lasts(self, tmp_path: Path) -> None:
        with claim_run(settings(tmp_path)):
            assert "is in use by another process" in refusal(settings(tmp_path))
        with claim_run(settings(tmp_path)):
            pass

    def test_a_run_refused_before_anything_was_put_into_it_leaves_nothing(self, tmp_path: Path) -> None:
        chosen = settings(tmp_path)
        with pytest.raises(RuntimeError), claim_run(chosen):
            raise RuntimeError
        assert listing(tmp_path / "store") == {} and not working_folder(chosen).exists()

    def test_a_finished_run_is_finished_on_every_machine(self, tmp_path: Path) -> None:
        with claim_run(settings(tmp_path)) as folder:
            (folder.path / "log.txt").write_text("a line\n")
            folder.write_result(RESULT)
        with claim_run(settings(tmp_path, machine="b")) as folder:
            found = folder.finished()
            assert found is not None and (found.step, found.best_step) == (12, 8)
            assert (folder.path / "log.txt").read_text() == "a line\n"

    def test_a_damaged_result_is_named_by_its_url(self, tmp_path: Path) -> None:
        with claim_run(settings(tmp_path)) as folder:
            (folder.path / "checkpoints").mkdir()
        (tmp_path / "store/run/result.json").write_text("{")
        with claim_run(settings(tmp_path)) as folder, pytest.raises(StorageError, match="file://.*result.json.*Delete"):
            folder.finished()

    def test_what_is_left_here_of_a_run_that_was_removed_there_is_put_aside(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        chosen = settings(tmp_path)
        with claim_run(chosen) as folder:
            checkpoint(folder.path, 4)
            folder.write_result(RESULT)
        for path in (tmp_path / "store/run").iterdir():
            path.unlink()
        with caplog.at_level(logging.WARNING), claim_run(chosen) as folder:
            assert folder.finished() is None and not list(folder.path.glob("checkpoints/*"))
            checkpoint(folder.path, 1)
        aside = working_folder(chosen).with_name(working_folder(chosen).name + ".aside")
        assert str(aside) in caplog.text and (aside / "checkpoints/step_000000004").is_dir()

    def test_a_result_that_could_not_be_stored_is_stored_by_the_next_command(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chosen = settings(tmp_path)
        monkeypatch.setattr(remote_run, "PATIENCE_S", 0.1)
        with pytest.raises(StorageError) as caught, claim_run(chosen) as folder:
            (folder.path / "model").mkdir()
            (folder.path / "model/weights").write_text("w")
            with monkeypatch.context() as patch:
                patch.setattr(Remote, "upload", lambda *args: (_ for _ in ()).throw(StorageError("away", "file://")))
                folder.write_result(RESULT)
        assert "away" in str(caught.value) and str(working_folder(chosen)) in str(caught.value)
        assert "result.json" not in Remote(chosen.run_dir).names()
        with claim_run(chosen) as folder:
            assert folder.finished() is not None
        with claim_run(settings(tmp_path, machine="b")) as folder:
            assert folder.finished() is not None
        assert (tmp_path / "store/run/model/weights").read_text() == "w"


class TestTravelling:
    @pytest.fixture
    def remote(self, tmp_path: Path) -> Remote:
        return Remote(f"file://{tmp_path}/store/run")

    def mirror(self, remote: Remote, work: Path, said: list[str] | None = None) -> RunMirror:
        remote.write("lease.me.json", b"")
        return RunMirror(MirrorPlan(Lease(remote, "me"), keep=2), work, (said if said is not None else []).append)

    def test_another_machine_finds_checkpoints_records_and_model(self, remote: Remote, tmp_path: Path) -> None:
        here, there = tmp_path / "here", tmp_path / "there"
        (here / "tensorboard").mkdir(parents=True)
        (here / "tensorboard/events").write_text("scalars")
        (here / "model").mkdir()
        (here / "model/model.safetensors").write_text("best")
        mirror = self.mirror(remote, here)
        for step in (4, 8, 12):
            newest = checkpoint(here, step)
            mirror.send_checkpoint(newest)
            soon(lambda name=newest.name: name in whole_folders(remote, "checkpoints"), within_s=30, what="the copy")
        mirror.finish(newest, here / "model")
        assert whole_folders(remote, "checkpoints") == ["step_000000012", "step_000000008"]
        bring_run(remote, there, pytest.fail)
        assert listing(there / "checkpoints/step_000000012") == listing(newest)
        assert (there / "metrics.jsonl").read_text() == (here / "metrics.jsonl").read_text()
        assert (there / "tensorboard/events").read_text() == "scalars"
        assert remote.read("model/model.safetensors") == b"best"

    def test_a_run_that_pauses_has_its_checkpoint_there_and_no_model_yet(self, remote: Remote, tmp_path: Path) -> None:
        mirror = self.mirror(remote, tmp_path / "here")
        newest = checkpoint(tmp_path / "here", 4)
        mirror.send_checkpoint(newest)
        mirror.finish(newest, None)
        assert whole_folders(remote, "checkpoints") == ["step_000000004"]
        assert remote.read("metrics.jsonl") == (tmp_path / "here/metrics.jsonl").read_bytes()
        assert not [name for name in remote.names() if name.startswith("model")]

    def test_a_new_run_brings_nothing(self, remote: Remote, tmp_path: Path) -> None:
        bring_run(remote, tmp_path / "there", pytest.fail)
        assert list((tmp_path / "there/checkpoints").iterdir()) == []

    def test_a_damaged_one_is_passed_over_for_the_one_before_and_it_is_said(
        self, remote: Remote, tmp_path: Path
    ) -> None:
        for step in (4, 8):
            send_folder(remote, f"checkpoints/step_{step:09d}", checkpoint(tmp_path / "here", step))
        remote.write("checkpoints/step_000000008/encoder.safetensors", b"weights 9")
        said: list[str] = []
        bring_run(remote, tmp_path / "there", said.append)
        assert [path.name for path in (tmp_path / "there/checkpoints").iterdir()] == ["step_000000004"]
        assert len(said) == 1 and "encoder.safetensors differs" in said[0] and "step_000000008" in said[0]

    def test_a_name_in_the_bucket_that_leads_elsewhere_is_not_followed(self, remote: Remote, tmp_path: Path) -> None:
        work = tmp_path / "there"
        checkpoint(work, 8)
        before = listing(tmp_path)
        remote.write("checkpoints/...manifest.json", b'{"files": {}}')  # of the folder ".."
        store = listing(tmp_path).keys() - before.keys()
        bring_run(remote, work, pytest.fail)
        assert {name: data for name, data in listing(tmp_path).items() if name not in store} == before | {
            "there/.fetch.lock": b""
        }

    def test_what_is_here_and_newer_stays(self, remote: Remote, tmp_path: Path) -> None:
        send_folder(remote, "checkpoints/step_000000004", checkpoint(tmp_path / "here", 4))
        checkpoint(tmp_path / "there", 8)
        before = (tmp_path / "there/metrics.jsonl").read_bytes()
        bring_run(remote, tmp_path / "there", pytest.fail)
        names = sorted(path.name for path in (tmp_path / "there/checkpoints").iterdir())
        assert names == ["step_000000004", "step_000000008"]
        assert (tmp_path / "there/metrics.jsonl").read_bytes() == before

    def test_a_local_one_that_was_damaged_is_fetched_again(self, remote: Remote, tmp_path: Path) -> None:
        here = checkpoint(tmp_path / "here", 4)
        send_folder(remote, "checkpoints/step_000000004", here)
        before = listing(here)
        (here / "encoder.safetensors").write_text("weight")
        bring_run(remote, tmp_path / "here", pytest.fail)
        assert listing(here) == before

    def test_those_of_a_course_that_was_not_taken_are_removed(self, remote: Remote, tmp_path: Path) -> None:
        here = tmp_path / "here"
        for step in (4, 8, 12):
            send_folder(remote, f"checkpoints/step_{step:09d}", checkpoint(here, step))
        mirror = self.mirror(remote, here)
        mirror.send_checkpoint(here / "checkpoints/step_000000008")
        mirror._uploader.finish(seconds(30))
        assert whole_folders(remote, "checkpoints") == ["step_000000008", "step_000000004"]

    def test_one_who_was_taken_over_overwrites_nothing(self, remote: Remote, tmp_path: Path) -> None:
        newest = checkpoint(tmp_path / "here", 4)
        mirror = self.mirror(remote, tmp_path / "here")
        remote.delete("lease.me.json")
        mirror.send_checkpoint(newest)
        with pytest.raises(LeaseLost):
            mirror.finish(newest, tmp_path / "model")
        assert remote.names() == []


class TestAcrossAnOutageOfS3:
    @pytest.fixture(scope="class")
    def gate(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
        with s3_server(tmp_path_factory.mktemp("s3")) as gate:
            yield gate

    def test_a_checkpoint_made_while_it_is_away_is_there_in_the_end(self, gate: Gate, tmp_path: Path) -> None:
        remote, here, said = Remote(f"s3://{BUCKET}/outage/run"), tmp_path / "here", list[str]()
        remote.write("lease.me.json", b"")
        mirror = RunMirror(MirrorPlan(Lease(remote, "me"), keep=2), here, said.append)
        mirror.send_checkpoint(checkpoint(here, 4))
        soon(lambda: whole_folders(remote, "checkpoints"), within_s=60, what="the copy")
        gate.close()
        started = time.monotonic()
        for step in (8, 12):
            newest = checkpoint(here, step)
            mirror.send_checkpoint(newest)
        assert time.monotonic() - started < seconds(1)
        soon(lambda: said, within_s=60, what="the news of the failure")
        gate.open()
        (here / "model").mkdir()
        (here / "model/w").write_text("w")
        mirror.finish(newest, here / "model")
        assert whole_folders(remote, "checkpoints")[0] == "step_000000012"
        assert remote.read("model/w") == b"w"
        assert len([text for text in said if "tried again" in text]) == 1

    def test_a_run_killed_here_is_taken_up_there(self, gate: Gate, tmp_path: Path) -> None:
        """Its lease is that of a dead process on another machine, or rather in another cache."""
        url = f"s3://{BUCKET}/killed"
        code = (
            "import sys, time; from pathlib import Path; from hncse_ray.config import load_settings;"
            "from hncse_ray.training.remote_run import claim_run\n"
            "with claim_run(load_settings(sys.argv[1])) as folder:\n"
            "    (folder.path / 'log.txt').write_text('x'); print('held', flush=True); time.sleep(600)"
        )
        recipe = tmp_path / "a.yaml"
        recipe.write_text(settings(tmp_path, machine="a", url=url).to_yaml())
        holder = subprocess.Popen([sys.executable, "-c", code, str(recipe)], stdout=subprocess.PIPE, env=os.environ)
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        assert "is in use by another process" in refusal(settings(tmp_path, machine="a", url=url))
        assert "is in use by another process on" in refusal(settings(tmp_path, machine="b", url=url))
        holder.kill()
        holder.wait()
        with claim_run(settings(tmp_path, machine="a", url=url)) as folder:  # the same cache: at once
            assert (folder.path / "settings.yaml").exists()
