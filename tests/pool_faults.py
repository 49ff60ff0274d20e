"""Tools of the tests that kill parts of the negative pool: processes of this test's own Ray, searches meanwhile."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.util import placement_group_table
from waits import seconds, soon

from hncse_ray.cluster import train
from hncse_ray.cluster.pool import PoolClient
from hncse_ray.config import Settings
from hncse_ray.negatives import Hits, SourceUnavailable
from hncse_ray.training.run_folder import working_folder

POOL = ("ShardActor", "PoolCoordinator")
TIMINGS = {"sentences_per_s", "data/waited"} | {
    f"negatives/{name}" for name in ("waited", "search_ms_p50", "search_ms_p99", "build_seconds", "build_rows_per_s")
}


@contextmanager
def nodes(*cpus: int) -> Iterator[Cluster]:
    """Be connected to a Ray of several nodes on this machine, the first of them the head."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus[0], "include_dashboard": False})
        try:
            for count in cpus[1:]:
                cluster.add_node(num_cpus=count)
            ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
            logging.getLogger("hncse_ray").setLevel(logging.INFO)  # as the command does: the run's log is looked at
            yield cluster
        finally:
            logging.getLogger("hncse_ray").setLevel(logging.NOTSET)
            ray.shutdown()
            cluster.shutdown()


def announce(cluster: Cluster, node_id: str, left_s: float) -> None:
    """Say what an autoscaler says of a spot instance that its cloud takes back."""
    accepted, why = ray._raylet.GcsClient(address=cluster.address).drain_node(
        node_id, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "spot", int((time.time() + left_s) * 1000)
    )
    assert accepted, why


def actors(*names: str) -> list[psutil.Process]:
    """The living processes below this one that run actors of these classes."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            title = " ".join(process.cmdline())
            is_one = re.match(rf"ray::(\S*:)?({'|'.join(names)})\b", title)  # while it starts, a name comes first
            if is_one and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def pid_of(handle: Any) -> int:
    """The process of an actor that lives now."""
    return int(ray._private.state.actors(handle._actor_id.hex())["Pid"])


def kill(handle: Any) -> None:
    os.kill(pid_of(handle), signal.SIGKILL)


def placement_groups() -> list[dict[str, Any]]:
    """Those that hold something."""
    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


def nothing_is_left() -> bool:
    """Wait until the pool, the workers and what was reserved for them are gone."""
    names = (*POOL, "EventQueue", "RayTrainWorker", "TrainController")
    soon(lambda: not actors(*names), within_s=20, what=lambda: f"the end of {actors(*names)}")
    soon(lambda: not placement_groups(), within_s=20, what=lambda: f"the release of {placement_groups()}")
    return True


class Searching:
    """Searches in a thread, each time once more if there is no answer, as training does; keeps what came of it."""

    def __init__(self, client: PoolClient, rows: np.ndarray, *, k: int, anchors: Any = None) -> None:
        self.answers: list[Hits] = []
        self.unavailable: list[str] = []
        self.errors: list[Exception] = []
        self.longest_s = 0.0
        self._client, self._rows, self._how = client, rows, {"k": k, "anchors": anchors}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Searching:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(seconds(30))
        assert not self._thread.is_alive(), "a search does not return"

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            started = time.monotonic()
            try:
                self.answers.append(self._search())
            except SourceUnavailable as error:
                self.unavailable.append(str(error))
            except Exception as error:
                self.errors.append(error)
            self.longest_s = max(self.longest_s, time.monotonic() - started)

    def _search(self) -> Hits:
        try:
            return self._client.search(self._rows, **self._how)
        except SourceUnavailable:
            return self._client.search(self._rows, **self._how)

    def next(self, *, within_s: float = 20) -> Hits:
        """Wait for an answer to a search that has begun after this call."""
        seen = len(self.answers) + 1
        soon(lambda: len(self.answers) > seen, within_s=within_s, what="an answer")
        return self.answers[-1]

    def since(self, condition: Callable[[Hits], bool], *, within_s: float, what: str) -> Hits:
        """Wait for an answer that fulfils a condition."""
        start = len(self.answers)
        return soon(lambda: next((a for a in self.answers[start:] if condition(a)), None), within_s=within_s, what=what)


class Training:
    """A run in a thread of this process, whose metrics can be watched, and whose workers can be slowed down."""

    def __init__(self, settings: Settings) -> None:
        self.folder = working_folder(settings)
        self._result: list[Any] = []
        self._settings = settings
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result.append(train(self._settings))
        except BaseException as error:
            self._result.append(error)

    def finish(self, *, within_s: float) -> Any:
        """Return what ``train`` returns."""
        self._thread.join(seconds(within_s))
        assert self._result, f"training has not ended within {seconds(within_s):.3g} s"
        if isinstance(self._result[0], BaseException):
            raise self._result[0]
        return self._result[0]

    def lines(self) -> list[dict[str, Any]]:
        """The logged steps so far."""
        with suppress(FileNotFoundError):
            text = (self.folder / "metrics.jsonl").read_text()
            rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
            return [row for row in rows if "loss" in row]
        return []

    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    def line(self, condition: Callable[[dict[str, Any]], bool], *, within_s: float, what: str) -> dict[str, Any]:
        """Wait for a step, logged from now on, that fulfils a condition."""
        start = max((row["step"] for row in self.lines()), default=0)

        def look() -> dict[str, Any] | None:
            rows = [row for row in self.lines() if row["step"] > start]
            found = next((row for row in rows if condition(row)), None)
            assert found or not self._result, f"training has ended ({self._result[0]}) before: {what}; {rows[-1:]}"
            return found

        return soon(look, within_s=within_s, what=what)

    @contextmanager
    def slowly(self) -> Iterator[None]:
        """Stop the workers for a second after every logged line: a step takes milliseconds, a restart seconds."""
        soon(lambda: self.lines() or self._result, within_s=180, what="a step")
        stop = threading.Event()

        def brake() -> None:
            seen = 0
            while not stop.wait(0.02):
                if (size := (self.folder / "metrics.jsonl").stat().st_size) == seen:
                    continue
                seen, workers = size, actors("RayTrainWorker")
                for number in (signal.SIGSTOP, signal.SIGCONT):
                    for worker in workers:
                        with suppress(psutil.Error):
                            worker.send_signal(number)
                    if number == signal.SIGSTOP:
                        stop.wait(1)

        thread = threading.Thread(target=brake, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(seconds(10))
