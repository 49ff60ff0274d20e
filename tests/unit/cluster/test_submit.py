"""What is refused before a cluster is asked, and what a job's end means for the shell."""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from hncse_ray.cluster import submit
from hncse_ray.cluster.submit import Job, JobRequest, submit_job
from hncse_ray.errors import ClusterError, SettingsError, StorageError


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def test_arguments_reach_the_command_as_they_are() -> None:
    words = ["train", "my recipe.yaml", "run.name=a b", "corpus.path=[a;b]", "--json"]
    assert shlex.split(JobRequest(tuple(words)).entrypoint) == ["python", "-m", "hncse_ray.cli", *words]


def test_without_an_address_or_with_a_wrong_one_it_says_what_to_give() -> None:
    with pytest.raises(ClusterError, match=r"no cluster is named\. Give --address"):
        submit_job(JobRequest(("train",)))
    for wrong in ("ftp://x:1", "http://", "x:port"):
        with pytest.raises(ClusterError, match="is not an address"):
            submit_job(JobRequest(("train",)), address=wrong)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("address", ["http://127.0.0.1:{}", "127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_nothing_there_is_said_at_once(address: str) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, not listening: refused
        with pytest.raises(ClusterError, match="nothing answers there"):
            submit_job(JobRequest(("train",)), address=address.format(held.getsockname()[1]))


@pytest.mark.parametrize(
    "name", ["RAY_AUTH_TOKEN", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "DB_PASSWORD", "API_KEY"]
)
def test_secrets_do_not_travel_in_a_jobs_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "s3cret")
    with pytest.raises(SettingsError, match="looks like a secret") as caught:
        submit_job(JobRequest(("train",), environment=(name,)), address="http://127.0.0.1:1")
    assert "s3cret" not in str(caught.value)


def test_variables_are_passed_by_name_and_must_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HNCSE_DATA", "/data")
    monkeypatch.setenv("MONKEY", "yes")  # a key in a word is none
    assert submit._environment(["HNCSE_DATA", "MONKEY"]) == {"HNCSE_DATA": "/data", "MONKEY": "yes"}
    with pytest.raises(SettingsError, match="--env HNCSE_NOT: is not set here"):
        submit._environment(["HNCSE_NOT"])


def test_a_folder_that_is_too_large_once_packed_is_named_with_its_largest_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Server:
        """Refuses what it is sent, as Ray 2.60's does."""

        def submit_job(self, **job: Any) -> str:
            raise RuntimeError("Request failed with status code 413: Maximum request body size 104857600 exceeded, x.")

    monkeypatch.setattr(submit, "_connect", lambda address: Server())
    (tmp_path / "small.txt").write_bytes(b"x")
    (tmp_path / "large.bin").write_bytes(b"x" * 3 * 2**20)
    with pytest.raises(StorageError, match=r"larger than the 100 MiB .*largest files are large\.bin \(3\)") as caught:
        submit_job(JobRequest(("train",), working_dir=tmp_path))
    assert ".rayignore" in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_folder_is_measured_without_what_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "GCS_STORAGE_MAX_SIZE", 10_000)
    for name in (".venv/lib.so", ".git/pack", "runs/a/model", "data/corpus.txt", "ignored.bin", "sub/.mypy_cache/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 9_000)
    (tmp_path / ".gitignore").write_text("*.bin\n")
    submit._check_size(tmp_path)
    (tmp_path / "sub" / "runs.py").write_bytes(b"x" * 900)
    (tmp_path / "sub" / "runs").mkdir()
    (tmp_path / "sub" / "runs" / "kept.txt").write_bytes(b"x" * 900)
    with pytest.raises(StorageError, match=r"too large to upload.*data/corpus\.txt") as caught:
        submit._check_size(tmp_path)
    assert ".rayignore" in str(caught.value)
    (tmp_path / ".rayignore").write_text("data\n")
    submit._check_size(tmp_path)
    with pytest.raises(StorageError, match="is not a folder"):  # said without a cluster
        submit.submit_job(submit.JobRequest(("train",), tmp_path / "none"))


@pytest.mark.parametrize("name", ["runs/sweep/best.yaml", "./runs/sweep", "kept/ignored.yaml", "../elsewhere.yaml"])
def test_a_file_that_the_job_would_not_find_is_refused_before_a_cluster_is_asked(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "here"
    for file in ("runs/sweep/best.yaml", "kept/ignored.yaml", "kept/recipe.yaml", "../elsewhere.yaml"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("run: {}\n")
    (folder / ".gitignore").write_text("ignored.yaml\n")
    with pytest.raises(StorageError, match=r"is not uploaded, and the job would not find it\. Copy it") as caught:
        submit_job(JobRequest(("train", name), folder, files=(name,)))
    assert os.path.normpath(name) in str(caught.value)
    there = (".", "kept", "./kept/recipe.yaml", "quickstart", str(tmp_path / "elsewhere.yaml"))
    with pytest.raises(ClusterError, match="no cluster is named"):
        submit_job(JobRequest(("train",), folder, files=there))


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", 1, 1),
        ("FAILED", -9, 1),
        ("FAILED", None, 1),
        ("STOPPED", None, 1),
        ("RUNNING", None, None),
    ],
)
def test_the_exit_status_is_the_jobs(status: str, code: int | None, expected: int | None) -> None:
    class Client:
        def get_job_info(self, job_id: str) -> Any:
            return SimpleNamespace(status=JobStatus(status), driver_exit_code=code, message="a log\nof lines")

    outcome = Job(Client(), "raysubmit_x").outcome()  # type: ignore[arg-type]
    assert (outcome.status, outcome.exit_code) == (status, expected)
    assert bool(outcome.message) == (code is None and status in ("FAILED", "STOPPED"))


class Log:
    """A job server whose connections break after some pieces of the log."""

    def __init__(self, *connections: list[str | Exception]) -> None:
        self.connections = list(connections)
        self.running = True

    async def tail_job_logs(self, job_id: str) -> Any:
        for piece in self.connections.pop(0):
            if isinstance(piece, Exception):
                raise piece
            yield piece
        self.running = bool(self.connections)

    def get_job_info(self, job_id: str) -> Any:
        status = JobStatus.RUNNING if self.running else JobStatus.SUCCEEDED
        return SimpleNamespace(status=status, driver_exit_code=None if self.running else 0, message="")

    def get_address(self) -> str:
        return "http://127.0.0.1:8265"


def test_a_broken_connection_neither_loses_nor_repeats_a_line() -> None:
    log = Log(["one\n", "two\n", RuntimeError("closed")], ["one\ntwo\nth", "ree\n"], ["one\ntwo\nthree\nfour\n"])
    written: list[str] = []
    outcome = Job(log, "raysubmit_x").follow(written.append)  # type: ignore[arg-type]
    assert "".join(written) == "one\ntwo\nthree\nfour\n" and outcome.exit_code == 0


def test_a_connection_that_fell_silent_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_NEWS_S", 0.2)

    class Silent(Log):
        async def tail_job_logs(self, job_id: str) -> Any:
            pieces = self.connections.pop(0)
            for piece in pieces:
                yield piece
            if self.connections:
                await asyncio.sleep(60)
            self.running = False

    written: list[str] = []
    job = Job(Silent(["one\n"], ["one\ntwo\n", "three\n"]), "raysubmit_x")  # type: ignore[arg-type]
    assert job.follow(written.append).exit_code == 0 and "".join(written) == "one\ntwo\nthree\n"


def test_a_cluster_that_is_gone_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_LOST_S", 1.0)
    log = Log(*[[ConnectionError("no route")] for _ in range(9)])
    with pytest.raises(ClusterError, match="has not answered for minutes.*ray job logs --follow raysubmit_x"):
        Job(log, "raysubmit_x").follow(print)  # type: ignore[arg-type]
