"""Runs that are kept at a URL: who may use it, what travels when, and what another machine finds there."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from object_stores import BUCKET, Gate, s3_server
from waits import seconds, soon

from hncse_ray.config import Settings, load_settings
from hncse_ray.errors import StorageError
from hncse_ray.storage import write_folder
from hncse_ray.storage.lease import Lease
from hncse_ray.storage.remote import Remote
from hncse_ray.storage.sending import LeaseLost
from hncse_ray.training import run_folder
from hncse_ray.training import store as store_module
from hncse_ray.training.checkpoint import Snapshot, TrainState
from hncse_ray.training.host_copy import HostCopier
from hncse_ray.training.run_folder import RunFolder, claim_run, working_folder
from hncse_ray.training.store import FolderStore, fetch_run, stored_checkpoints

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


def checkpoint(step: int, text: str = "seed: 1") -> Callable[[Path], None]:
    """Write a whole checkpoint."""
    weights, moments = torch.full((9,), float(step)), torch.zeros(3)
    copier = HostCopier(torch.optim.SGD([weights]))
    copies = {"encoder": copier.copy({"w": weights}), "training": copier.copy({"m": moments})}
    return Snapshot(copies, {}, {"state": asdict(TrainState(step=step)), "progress": {}}, text).write


def save(store: FolderStore, work: Path, step: int, text: str = "seed: 1") -> Path:
    with (work / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step}) + "\n")
    store.save(step, checkpoint(step, text))
    return work / f"checkpoints/step_{step:09d}"


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
            assert folder.path == tmp_path / "runs/run" and folder.lease is None

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

    def test_one_who_was_taken_over_and_fails_leaves_the_settings_of_the_other(self, tmp_path: Path) -> None:
        with ExitStack() as other:
            with pytest.raises(RuntimeError), claim_run(settings(tmp_path)) as folder:
                assert folder.lease is not None
                (tmp_path / "store/run" / folder.lease.name).unlink()
                theirs = other.enter_context(claim_run(settings(tmp_path, machine="b")))
                (theirs.path / "log.txt").write_text("theirs\n")
                raise RuntimeError
            assert (tmp_path / "store/run/settings.yaml").exists()
        with claim_run(settings(tmp_path, machine="c")) as folder:
            assert (folder.path / "log.txt").read_text() == "theirs\n"

    def test_a_finished_run_is_finished_on_every_machine(self, tmp_path: Path) -> None:
        with claim_run(settings(tmp_path)) as folder:
            (folder.path / "log.txt").write_text("a line\n")
            folder.write_result(RESULT)
        with claim_run(settings(tmp_path, machine="b")) as folder:
            found = folder.finished()
            assert found is not None and (found.step, found.best_step) == (12, 8)
            assert (folder.path / "log.txt").read_text() == "a line\n"

    def test_one_who_was_taken_over_leaves_the_log_of_the_other_alone(self, tmp_path: Path) -> None:
        log = tmp_path / "store/run/log.txt"
        with claim_run(settings(tmp_path)) as folder:
            assert folder.lease is not None
            (folder.path / "log.txt").write_text("mine, and longer")
            (tmp_path / "store/run" / folder.lease.name).unlink()
            log.write_text("theirs")
        assert log.read_text() == "theirs"

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
            write_folder(folder.checkpoints / "step_000000004", checkpoint(4))
            folder.write_result(RESULT)
        shutil.rmtree(tmp_path / "store/run")
        with caplog.at_level(logging.WARNING), claim_run(chosen) as folder:
            assert folder.finished() is None and not list(folder.path.glob("checkpoints/*"))
            write_folder(folder.checkpoints / "step_000000001", checkpoint(1))
        aside = working_folder(chosen).with_name(working_folder(chosen).name + ".aside")
        assert str(aside) in caplog.text and (aside / "checkpoints/step_000000004").is_dir()

    def test_a_result_that_could_not_be_stored_is_stored_by_the_next_command(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chosen = settings(tmp_path)
        monkeypatch.setattr(run_folder, "PATIENCE_S", 0.1)
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

    def at(self, remote: Remote, work: Path) -> RunFolder:
        """The folder of a node, and a lease at the URL."""
        lease = Lease(remote, "lease.me.json")
        remote.write(lease.name, b"")
        work.mkdir(exist_ok=True)
        return RunFolder(work, lease)

    def send(self, remote: Remote, work: Path, *steps: int, text: str = "seed: 1") -> None:
        for step in steps:
            with FolderStore(self.at(remote, work), lambda text: None) as store:
                save(store, work, step, text)

    def steps(self, work: Path) -> list[int]:
        return sorted(int(path.name[5:]) for path in (work / "checkpoints").glob("*"))

    def test_another_machine_finds_checkpoints_records_and_model(self, remote: Remote, tmp_path: Path) -> None:
        here, there = tmp_path / "here", tmp_path / "there"
        (here / "tensorboard").mkdir(parents=True)
        (here / "tensorboard/events").write_text("scalars")
        with FolderStore(self.at(remote, here), pytest.fail) as store:
            for step in (4, 8, 12):
                newest = save(store, here, step)
                soon(lambda: newest.name in stored_checkpoints(remote), within_s=30, what="the copy")  # noqa: B023
            assert remote.names("model") == []
            store.export(lambda folder: (folder / "model.safetensors").write_text("best"))  # type: ignore[arg-type, return-value]
        assert stored_checkpoints(remote) == ["step_000000012", "step_000000008"]
        fetch_run(self.at(remote, there), pytest.fail)
        assert listing(there / "checkpoints") == {f"{newest.name}/{n}": data for n, data in listing(newest).items()}
        assert (there / "metrics.jsonl").read_text() == (here / "metrics.jsonl").read_text()
        assert (there / "tensorboard/events").read_text() == "scalars"
        assert remote.read("model/model.safetensors") == b"best"

    def test_what_is_there_already_is_not_sent_again(
        self, remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.send(remote, tmp_path / "here", 4)
        fetch_run(self.at(remote, tmp_path / "there"), pytest.fail)
        sent, really = list[str](), Remote.upload
        monkeypatch.setattr(Remote, "upload", lambda self, file, name: (sent.append(name), really(self, file, name)))
        with FolderStore(self.at(remote, tmp_path / "there"), pytest.fail):
            pass
        assert sent == ["metrics.jsonl"] and stored_checkpoints(remote) == ["step_000000004"]

    def test_of_a_fetch_that_breaks_off_no_part_is_left_out_the_next_time(
        self, remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here, there, really, failures = tmp_path / "here", tmp_path / "there", Remote.download, ["once"]
        (here / "tensorboard").mkdir(parents=True)
        (here / "tensorboard/events").write_text("scalars")
        self.send(remote, here, 4)

        def break_off(self: Remote, name: str, file: Path) -> None:
            if name == "tensorboard/events" and failures:
                raise StorageError(failures.pop(), self.url)
            really(self, name, file)

        monkeypatch.setattr(Remote, "download", break_off)
        monkeypatch.setattr("hncse_ray.storage.sending._FIRST_PAUSE_S", 0.01)
        fetch_run(self.at(remote, there), pytest.fail)
        assert not failures and (there / "tensorboard/events").read_text() == "scalars" and self.steps(there) == [4]

    def test_a_new_run_brings_nothing(self, remote: Remote, tmp_path: Path) -> None:
        fetch_run(self.at(remote, tmp_path / "there"), pytest.fail)
        assert self.steps(tmp_path / "there") == []

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("encoder.safetensors", b"weights 9", "encoder.safetensors differs"),
            ("state.json", b"{", "incomplete"),
            ("state.json", b'{"files": {"../../x": [1, "x"]}}', "incomplete"),
            ("more.txt", b"x", "holds what was not written by it"),
            ("sub/more.txt", b"x", "holds what was not written by it"),
            ("settings.yaml", None, "there is no settings.yaml"),
        ],
    )
    def test_a_damaged_one_is_passed_over_for_the_one_before_and_it_is_said(
        self, remote: Remote, tmp_path: Path, name: str, content: bytes | None, said: str
    ) -> None:
        self.send(remote, tmp_path / "here", 4, 8)
        if content is None:
            remote.delete(f"checkpoints/step_000000008/{name}")
        else:
            remote.write(f"checkpoints/step_000000008/{name}", content)
        heard: list[str] = []
        fetch_run(self.at(remote, tmp_path / "there"), heard.append)
        assert self.steps(tmp_path / "there") == [4]
        assert len(heard) == 1 and said in heard[0] and "run/checkpoints/step_000000008" in heard[0]

    def test_one_that_was_sent_by_half_is_not_there(
        self, remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here, really = tmp_path / "here", Remote.upload
        self.send(remote, here, 4, 8)

        def break_off(self: Remote, file: Path, name: str) -> None:
            if file.name == "training.safetensors":
                raise StorageError("the connection is gone", self.url)
            really(self, file, name)

        monkeypatch.setattr(Remote, "upload", break_off)
        monkeypatch.setattr(store_module, "PATIENCE_S", 0.3)
        for step, left in ((8, [4]), (12, [4])):  # over a whole one, and a new one
            with pytest.raises(StorageError, match="could not be stored"):
                self.send(remote, here, step, text="another")
            assert stored_checkpoints(remote) == [f"step_{number:09d}" for number in left]
        monkeypatch.setattr(Remote, "upload", really)
        self.send(remote, here, 12)
        assert stored_checkpoints(remote) == ["step_000000012", "step_000000004"]
        assert not [name for name in remote.names() if "step_000000008" in name]  # nor is its half there for ever

    @pytest.mark.parametrize("name", ["", ".", "..", "step_", "step_x", "step_1x", "a/step_1"])
    def test_a_name_in_the_bucket_that_leads_elsewhere_is_not_followed(
        self, remote: Remote, tmp_path: Path, name: str
    ) -> None:
        self.send(remote, tmp_path / "here", 8)
        remote.write(f"checkpoints/{name}/state.json", b"{}")
        before = listing(tmp_path)
        assert stored_checkpoints(remote) == ["step_000000008"]
        fetch_run(self.at(remote, tmp_path / "here"), pytest.fail)
        assert listing(tmp_path) == before | {"here/.fetch.lock": b""}

    def test_what_is_here_and_newer_stays(self, remote: Remote, tmp_path: Path) -> None:
        self.send(remote, tmp_path / "here", 4)
        there = tmp_path / "there"
        with FolderStore(RunFolder(there), pytest.fail) as store:
            there.mkdir()
            save(store, there, 8)
        before = (there / "metrics.jsonl").read_bytes()
        fetch_run(self.at(remote, there), pytest.fail)
        assert self.steps(there) == [4, 8] and (there / "metrics.jsonl").read_bytes() == before

    @pytest.mark.parametrize("how", ["damaged", "of another course"])
    def test_a_local_one_that_differs_is_fetched_again(self, remote: Remote, tmp_path: Path, how: str) -> None:
        here = tmp_path / "here"
        self.send(remote, here, 4)
        before = listing(here / "checkpoints")
        if how == "damaged":
            (here / "checkpoints/step_000000004/encoder.safetensors").write_text("weight")
        else:
            write_folder(here / "checkpoints/step_000000004", checkpoint(4, "another"))
        assert listing(here / "checkpoints") != before
        fetch_run(self.at(remote, here), pytest.fail)
        assert listing(here / "checkpoints") == before

    def test_those_of_a_course_that_was_not_taken_are_removed(self, remote: Remote, tmp_path: Path) -> None:
        here = tmp_path / "here"
        self.send(remote, here, 4, 8, 12)
        self.send(remote, here, 10)
        assert stored_checkpoints(remote) == ["step_000000010", "step_000000008"] and self.steps(here) == [8, 10]
        assert not [name for name in remote.names() if "step_000000012" in name or "step_000000004" in name]

    def test_one_that_is_being_sent_stays_until_it_is_there(
        self, remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here, begun, free, really = tmp_path / "here", threading.Event(), threading.Event(), Remote.upload

        def slowly(self: Remote, file: Path, name: str) -> None:
            if "step_000000004" in name:
                begun.set()
                assert free.wait(seconds(60))
            really(self, file, name)

        monkeypatch.setattr(Remote, "upload", slowly)
        with FolderStore(self.at(remote, here), pytest.fail) as store:
            save(store, here, 4)
            assert begun.wait(seconds(60))
            for step in (8, 12, 16):
                save(store, here, step)
            assert self.steps(here) == [4, 12, 16]
            free.set()
        assert stored_checkpoints(remote) == ["step_000000016", "step_000000004"]  # of those that waited the latest

    def test_nodes_may_share_a_cache(self, remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The first rank of another node is done with a checkpoint while that of the run still writes it."""
        work = tmp_path / "shared"
        with monkeypatch.context() as patch:
            patch.setattr(store_module, "rank", lambda: 1)
            other = FolderStore(self.at(remote, work), pytest.fail)

        def write(folder: Path) -> None:
            other.save(4, None)
            checkpoint(4)(folder)

        with FolderStore(self.at(remote, work), pytest.fail) as store:
            store.save(4, write)
        assert self.steps(work) == [4] and stored_checkpoints(remote) == ["step_000000004"]

    def test_what_a_killed_writer_left_is_removed(self, remote: Remote, tmp_path: Path) -> None:
        for how in ("by the next checkpoint", "by a fetch"):
            half = tmp_path / "here/checkpoints/.step_000000002.12345678"
            half.mkdir(parents=True)
            if how == "by a fetch":
                fetch_run(self.at(remote, tmp_path / "here"), pytest.fail)
            else:
                self.send(remote, tmp_path / "here", 4)
            assert not half.exists(), how

    def test_one_who_is_taken_over_between_two_files_sends_the_second_no_more(
        self, remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here, really = tmp_path / "here", Remote.upload

        def upload(self: Remote, file: Path, name: str) -> None:
            really(self, file, name)
            if name.endswith("/encoder.safetensors"):
                self.delete("lease.me.json")

        monkeypatch.setattr(Remote, "upload", upload)
        with pytest.raises(LeaseLost):
            self.send(remote, here, 4)
        assert remote.names("checkpoints") == ["checkpoints/step_000000004/encoder.safetensors"]

    def test_one_who_was_taken_over_overwrites_nothing(self, remote: Remote, tmp_path: Path) -> None:
        here = tmp_path / "here"
        with pytest.raises(LeaseLost), FolderStore(self.at(remote, here), pytest.fail) as store:
            remote.delete("lease.me.json")
            save(store, here, 4)
        assert remote.names() == [] and self.steps(here) == [4]


class TestAcrossAnOutageOfS3:
    @pytest.fixture(scope="class")
    def gate(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
        with s3_server(tmp_path_factory.mktemp("s3")) as gate:
            yield gate

    def test_a_checkpoint_made_while_it_is_away_is_there_in_the_end(self, gate: Gate, tmp_path: Path) -> None:
        remote, here, said = Remote(f"s3://{BUCKET}/outage/run"), tmp_path / "here", list[str]()
        remote.write("lease.me.json", b"")
        here.mkdir()
        with FolderStore(RunFolder(here, Lease(remote, "lease.me.json")), said.append) as store:
            save(store, here, 4)
            soon(lambda: stored_checkpoints(remote), within_s=60, what="the copy")
            gate.close()
            started = time.monotonic()
            for step in (8, 12):
                save(store, here, step)
            assert time.monotonic() - started < seconds(1)
            soon(lambda: said, within_s=60, what="the news of the failure")
            gate.open()
            store.export(lambda folder: (folder / "w").write_text("w"))  # type: ignore[arg-type, return-value]
        assert stored_checkpoints(remote)[0] == "step_000000012"
        assert remote.read("model/w") == b"w"
        assert len([text for text in said if "tried again" in text]) == 1

    def test_a_run_killed_here_is_taken_up_there(self, gate: Gate, tmp_path: Path) -> None:
        """Its lease is that of a dead process on another machine, or rather in another cache."""
        url = f"s3://{BUCKET}/killed"
        code = (
            "import sys, time; from pathlib import Path; from hncse_ray.config import load_settings;"
            "from hncse_ray.training.run_folder import claim_run\n"
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
