"""Jobs submitted to a real head with token authentication: run, refused, failed and stopped."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from commands import marked
from waits import seconds, soon, within

import hncse_ray

pytestmark = pytest.mark.timeout(400)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


@dataclass(frozen=True)
class Head:
    """A cluster of one node, and its job server."""

    address: str
    joined: str
    token: str
    home: Path

    def environment(self, **changes: str) -> dict[str, str]:
        """What a client needs, and no more: neither another token of this machine nor another cluster."""
        left_out = ("RAY_", *hncse_ray.PROCESS_VARIABLES)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
        return kept | {"HOME": str(self.home), "RAY_AUTH_TOKEN": self.token} | changes

    def list(self, what: str) -> list[dict[str, Any]]:
        answer = requests.get(
            f"{self.address}/api/v0/{what}", headers={"Authorization": f"Bearer {self.token}"}, timeout=seconds(20)
        )
        answer.raise_for_status()
        return answer.json()["data"]["result"]["result"]

    def is_idle(self) -> bool:
        """Whether nothing of a run is left: the one actor that Ray Train keeps for all of a cluster is not."""
        left = [a for a in self.list("actors") if a["state"] != "DEAD"]
        ours = [a for a in left if a["class_name"] != "_AutoscalingCoordinatorActor"]
        return not ours and all(g["state"] == "REMOVED" for g in self.list("placement_groups"))


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """``ray start --head`` with a token, everything on the loopback interface and on ports of its own."""
    folder = Path(tempfile.mkdtemp(prefix="hncse", dir="/tmp"))  # short: it holds Unix sockets
    port, dashboard, client, agent = free_ports(4)
    mark, token = secrets.token_hex(8), secrets.token_hex(32)
    head = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", token, folder)
    log = (folder / "head.log").open("w")
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2",
         "--node-ip-address=127.0.0.1", f"--port={port}", "--dashboard-host=127.0.0.1",
         f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
         f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder / 'ray'}", "--disable-usage-stats"],
        stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        env=head.environment(
            HNCSE_TEST_MARK=mark, RAY_AUTH_MODE="token", PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        ),
    )  # fmt: skip
    try:

        def is_up() -> bool:
            assert process.poll() is None, (folder / "head.log").read_text()
            try:
                return len(head.list("nodes")) == 1
            except (requests.RequestException, KeyError):
                return False

        soon(is_up, within_s=120, what=(folder / "head.log").read_text)
        yield head
    finally:
        for left in marked(mark):  # at once: an orderly end takes Ray half a minute
            left.kill()
        process.wait(seconds(20))
        log.close()
        soon(lambda: not marked(mark), within_s=20, what="the end of the head")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def recipe(small_run: dict[str, Any], tmp_path: Path) -> Path:
    """A folder with a recipe and nothing else: the package is the installed one."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "small.yaml").write_text(yaml.safe_dump(small_run))
    return folder / "small.yaml"


def submit(head: Head, recipe: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "hncse_ray.cli", "submit", "--address", head.address, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=recipe.parent,
        env=head.environment(**environment),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )  # fmt: skip


def test_a_submitted_run_leaves_its_model_and_nothing_else(head: Head, recipe: Path, tmp_path: Path) -> None:
    process = submit(head, recipe, "--json", "train", "small.yaml", "--json")
    out, log = process.communicate(timeout=seconds(300))
    assert process.returncode == 0, log
    facts = json.loads(out)
    assert facts["status"] == "SUCCEEDED" and facts["exit_code"] == 0
    assert "has no token authentication" not in log
    result = json.loads(next(line for line in reversed(log.splitlines()) if line.startswith("{")))
    assert result["steps"] == 12 and Path(result["model"]) == tmp_path / "runs" / "small" / "model"
    assert (tmp_path / "runs" / "small" / "model" / "model.safetensors").is_file()
    soon(head.is_idle, within_s=30, what=lambda: (head.list("actors"), head.list("placement_groups")))


def test_an_objective_in_the_uploaded_folder_is_found_by_the_job_and_its_workers(
    head: Head, recipe: Path, tmp_path: Path
) -> None:
    """And the workers begin with the variables that torch reads when it is loaded, the job's own as they are."""
    code = (
        "from pathlib import Path\n\ndef loss(z1, z2, *, margin):\n"
        "    given = Path('/proc/self/environ').read_text().split('\\0')\n"
        "    told = {'GOMP_SPINCOUNT=1000', 'PYTORCH_ALLOC_CONF=pinned_use_background_threads:False'} <= set(given)\n"
        "    return (1 - margin - (z1 * z2).sum(1)).mean(), {'margin': margin, 'told': float(told)}\n"
    )
    (recipe.parent / "losses_of_the_job.py").write_text(code)
    own = "objective={name: losses_of_the_job:loss, settings: {margin: 0.5}}"
    variable = {"PYTORCH_ALLOC_CONF": "pinned_use_background_threads:False"}
    process = submit(head, recipe, "--env", *variable, "train", "small.yaml", own, **variable)
    out, err = process.communicate(timeout=seconds(300))
    assert process.returncode == 0, out + err
    metrics = (tmp_path / "runs" / "small" / "metrics.jsonl").read_text()
    assert metrics.count('"margin": 0.5') == metrics.count('"told": 1.0') == 12
    soon(head.is_idle, within_s=30, what=lambda: (head.list("actors"), head.list("placement_groups")))


def test_the_exit_status_and_the_message_of_the_job_come_through(head: Head, recipe: Path) -> None:
    """Submitted by the address of the head, which knows that of its job server."""
    process = submit(head, recipe, "--address", head.joined, "train", "small.yaml", "corpus.path=/only/there.txt")
    out, err = process.communicate(timeout=seconds(120))
    assert process.returncode == 2, err
    assert "/only/there.txt: no such file" in out and "FAILED" in out and "Traceback" not in out + err


@pytest.mark.parametrize("token", ["", "0" * 64])
def test_without_the_right_token_a_cluster_is_not_joined(head: Head, recipe: Path, token: str) -> None:
    environment = head.environment(RAY_AUTH_TOKEN=token, RAY_ADDRESS=head.joined)
    if token:
        environment["RAY_AUTH_MODE"] = "token"
    command = [sys.executable, "-m", "hncse_ray.cli", "train", "small.yaml"]
    with within(40, "the refusal"):
        ended = subprocess.run(command, cwd=recipe.parent, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and "asks for a token" in ended.stderr and "Traceback" not in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr


@pytest.mark.parametrize(
    ("token", "message"), [("", "asks for a token, and none was found"), ("0" * 64, "does not accept the token")]
)
def test_without_the_right_token_nothing_is_submitted(head: Head, recipe: Path, token: str, message: str) -> None:
    jobs = len(head.list("jobs"))
    process = submit(head, recipe, "train", "small.yaml", RAY_AUTH_TOKEN=token)
    with within(20, "the refusal"):
        out, err = process.communicate(timeout=seconds(60))
    assert process.returncode == 2
    assert message in err and "Traceback" not in err and len(err.strip().splitlines()) == 1
    assert not out and len(head.list("jobs")) == jobs
    assert head.token not in err


@pytest.mark.slow
def test_a_job_that_is_not_waited_for_runs_on_and_interrupt_stops_it_if_asked(head: Head, recipe: Path) -> None:
    long = "train.max_steps=100000"
    process = submit(head, recipe, "--stop-on-interrupt", "train", "small.yaml", long)
    metrics = recipe.parent.parent / "runs" / "small" / "metrics.jsonl"
    soon(lambda: metrics.exists() and '"loss"' in metrics.read_text(), within_s=200, what="steps")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=seconds(90))
    assert process.returncode == 130, err
    assert "STOPPED" in out and "Traceback" not in out + err
    job = out.split()[1]  # it was given the time to put its workers away, as by Ctrl-C
    log = requests.get(
        f"{head.address}/api/jobs/{job}/logs", headers={"Authorization": f"Bearer {head.token}"}, timeout=seconds(20)
    )
    assert "stopped; the same command again goes on where it stopped" in log.json()["logs"]
    soon(head.is_idle, within_s=60, what=lambda: (head.list("actors"), head.list("placement_groups")))

    process = submit(head, recipe, "train", "small.yaml", long, "run.name=other")
    soon((metrics.parents[1] / "other" / "settings.yaml").exists, within_s=120, what="the other run's folder")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=seconds(30))
    assert process.returncode == 130 and "the job runs on" in err and "ray job stop" in err
    running = [job for job in head.list("jobs") if job["status"] == "RUNNING"]
    assert len(running) == 1 and running[0]["submission_id"] in err

    process = submit(head, recipe, "--no-wait", "prepare", "small.yaml")
    out, err = process.communicate(timeout=seconds(60))
    assert process.returncode == 0 and out.startswith("raysubmit_") and len(out.split()) == 1, err
