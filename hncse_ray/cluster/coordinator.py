"""The pool's coordinator: owns the versions of the index and looks after its shards.

A plain class that becomes an actor in :mod:`hncse_ray.cluster.pool`. It does not import transformers, so that it is
up soon when it is restarted.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError
from safetensors.numpy import load_file, save_file

from hncse_ray.errors import first_line
from hncse_ray.negatives import BuildReport, IndexVersion, SourceStatus, Weights
from hncse_ray.storage import write_atomically

logger = logging.getLogger(__name__)

_PING_S, _PING_TIMEOUT_S = 0.5, 5.0
_REBUILD_PAUSE_S = 2.0
_GRACE_S = 1.0  # the version before stays so long: until clients have heard of the new one
# A shard that dies while it builds is waited for: Ray restarts it, which takes seconds to a minute. One that was away
# before the build began may never come back, as its node may be gone.
_PATIENCE_S, _PATIENCE_WITH_THE_LOST_S = 120.0, 30.0


@dataclass(frozen=True)
class PoolState:
    """What a client needs to know to ask the shards itself."""

    status: SourceStatus
    serving: tuple[int, ...]


class ShardLost(Exception):
    """A shard does not come back; the version is made without it."""


class PoolCoordinator:
    """Owns the versions: keeps published weights, has all shards build, commits, and brings lost shards back.

    A version is served once every shard has built it, but for shards that are lost: those build it when they come back.
    A build that fails or takes too long leaves the version before. Shards build from the object of the rank that has
    published it, which is gone with that rank, and come back from the file that is written meanwhile. A restart of the
    coordinator itself goes on from that file too.

    Args:
        shards: the names of the shard actors.
        folder: keeps the weights of the served version, and which it is.
        corpus_digest: of the corpus.
        rows: of the corpus.
        build_timeout_s: a build that takes longer is given up, and the shards that hang are restarted.
    """

    def __init__(
        self, shards: Sequence[str], *, folder: str, corpus_digest: str, rows: int, build_timeout_s: float
    ) -> None:
        self._shards, self._folder = [ray.get_actor(name) for name in shards], Path(folder)
        self._corpus_digest, self._rows, self._build_timeout_s = corpus_digest, rows, build_timeout_s
        self._weights: dict[IndexVersion, Any] = {}  # references: a publisher's while a version is made, later our own
        self._files: dict[IndexVersion, Path] = {}
        self._reading = asyncio.Lock()
        self._holding: dict[int, list[IndexVersion]] | None = None  # None = not yet asked
        self._commits = 0
        self._making: IndexVersion | None = None
        self._repairs: dict[int, asyncio.Task] = {}
        self._tasks: set[asyncio.Task] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._status = SourceStatus(shards=len(shards))
        self._recover()

    async def publish(self, weights: Sequence[Any], step: int, key: str) -> bool:
        """Begin to make the version of weights, given as one reference to them; False if another is being made."""
        self._watch()
        if not self._idle.is_set():
            return False
        version = IndexVersion(step, key, self._corpus_digest, self._rows)
        if version == self._status.version:
            return True
        self._idle.clear()
        self._status, self._making = replace(self._status, building=True), version
        (self._weights[version],) = weights
        self._spawn(self._make(version))
        return True

    async def wait(self, timeout_s: float) -> bool:
        """Return whether no version is being made, at the latest after ``timeout_s``."""
        self._watch()
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        await self._look()
        return True

    async def state(self) -> PoolState:
        """Return how the pool stands."""
        self._watch()
        if self._holding is None:
            await self._look()
        version = self._status.version
        serving = tuple(i for i, held in sorted((self._holding or {}).items()) if version in held)
        return PoolState(replace(self._status, shards_alive=len(serving)), serving)

    # ---- building

    async def _make(self, version: IndexVersion) -> None:
        """Have every shard build a version; commit, or give it up."""
        started = time.monotonic()
        file = self._files[version] = self._folder / f"{uuid.uuid4().hex}.safetensors"
        try:
            saving = self._spawn(asyncio.to_thread(_save_weights, file, self._weights[version]))
            outcomes = await self._build_all(version, started + self._build_timeout_s)
            await saving
            reports = {i: outcome for i, outcome in outcomes.items() if isinstance(outcome, BuildReport)}
            failures = [outcome for outcome in outcomes.values() if isinstance(outcome, BaseException)]
            failures.sort(key=lambda failure: isinstance(failure, ShardLost))
            if failures and (not reports or not isinstance(failures[0], ShardLost)):
                raise BaseExceptionGroup("shards failed", failures)
            await asyncio.to_thread(self._commit, version, file)
        except Exception as error:  # whatever it was, the version before stays, and the run's log says why
            logger.warning("the index of step %d was given up", version.step, exc_info=error)
            failed = self._status.failed_builds + 1
            self._status = replace(self._status, failed_builds=failed, last_failure=_reason(error))
        else:
            encode_s = max(r.encode_seconds for r in reports.values())
            # Clients learn of the version and of those that hold it at once, or they would find nobody in between.
            self._commits += 1
            self._holding = {i: [*(self._holding or {}).get(i, []), version] for i in reports}
            self._status = replace(
                self._status,
                version=version,
                build_seconds=time.monotonic() - started,
                rows_per_s=sum(r.rows for r in reports.values()) / encode_s if encode_s else 0.0,
            )
        finally:
            self._weights = {}  # a shard that comes back gets what the file holds
            self._status, self._making = replace(self._status, building=False), None
            await asyncio.to_thread(self._drop_unserved)
            await self._look()
            self._idle.set()
            await asyncio.sleep(_GRACE_S)
            await self._retire()

    async def _build_all(self, version: IndexVersion, deadline: float) -> dict[int, BuildReport | BaseException]:
        if self._holding is None:
            await self._look()  # otherwise as last seen: a shard that hangs would have the others wait for its answer
        present, builds = self._holding or {}, []
        for i in range(len(self._shards)):
            lost = bool(present) and i not in present
            builds.append(self._build(i, version, deadline, _PATIENCE_WITH_THE_LOST_S if lost else _PATIENCE_S))
        return dict(enumerate(await asyncio.gather(*builds, return_exceptions=True)))

    async def _build(self, number: int, version: IndexVersion, deadline: float, patience_s: float) -> BuildReport:
        """Have one shard build; tried again if it died on the way, as Ray restarts it."""
        shard, seen = self._shards[number], time.monotonic()
        while True:
            # A call to an actor that waits to be restarted may wait with it: first see whether it is there.
            if await self._versions(number) is None:
                if time.monotonic() > deadline:
                    ray.kill(shard, no_restart=False)
                    raise TimeoutError(f"shard {number} was not ready after {self._build_timeout_s:g} s")
                if time.monotonic() > seen + patience_s:
                    raise ShardLost(f"shard {number} does not come back")
                await asyncio.sleep(_PING_S)
                continue
            seen, left = time.monotonic(), deadline - time.monotonic()
            try:
                weights = await self._weights_of(version)
                call = shard.build.options(concurrency_group="build").remote(version, weights)
                return await asyncio.wait_for(_result(call), max(left, 0.01))
            except TimeoutError:
                ray.kill(shard, no_restart=False)
                raise TimeoutError(f"shard {number} was not ready after {self._build_timeout_s:g} s") from None
            except (ActorUnavailableError, ActorDiedError):
                await asyncio.sleep(_PING_S)

    async def _weights_of(self, version: IndexVersion) -> Any:
        """Return a reference to a version's weights, read from its file if their publisher's is given up."""
        async with self._reading:
            if version not in self._weights:
                self._weights[version] = await asyncio.to_thread(lambda: ray.put(load_file(self._files[version])))
            return self._weights[version]

    def _commit(self, version: IndexVersion, file: Path) -> None:
        content = {"version": asdict(version), "file": file.name}
        write_atomically(self._folder / "served.json", json.dumps(content))

    def _drop_unserved(self) -> None:
        """Delete all weights but those of the served version: of the one before, or of a build that was given up."""
        self._files = {version: file for version, file in self._files.items() if version == self._status.version}
        try:
            for file in self._folder.glob("*.safetensors*"):
                if file not in self._files.values():
                    file.unlink(missing_ok=True)
        except OSError as error:  # tried again after the next build
            logger.warning("old weights of the index could not be deleted (%s)", error)

    def _recover(self) -> None:
        """Resume what this actor has committed before it was killed; what an earlier run left is not used."""
        served = self._folder / "served.json"
        if not ray.get_runtime_context().was_current_actor_reconstructed:
            shutil.rmtree(self._folder, ignore_errors=True)
        if not served.exists():
            return
        try:
            content = json.loads(served.read_text(encoding="utf-8"))
            version = IndexVersion(**content["version"])
            self._files[version] = self._folder / content["file"]
        except (OSError, ValueError, KeyError, TypeError):
            logger.warning("%s cannot be read; the next refresh makes a new index", served, exc_info=True)
            return
        self._status = replace(self._status, version=version)
        self._drop_unserved()

    # ---- watching over the shards

    def _watch(self) -> None:
        """Begin to look after the shards; an actor has its event loop only once it is called."""
        if not self._tasks:
            self._spawn(self._keep_looking())

    async def _keep_looking(self) -> None:
        while True:
            await self._look()
            await asyncio.sleep(_PING_S)

    async def _look(self) -> None:
        """Ask every shard what it holds; have those that lack the served version build it again."""
        commits = self._commits
        held = await asyncio.gather(*map(self._versions, range(len(self._shards))))
        if commits != self._commits:
            return  # answers of before the commit
        self._holding = {i: versions for i, versions in enumerate(held) if versions is not None}
        version = self._status.version
        for number, versions in self._holding.items():
            repair = self._repairs.get(number)
            if version is not None and version not in versions and (repair is None or repair.done()):
                self._repairs[number] = self._spawn(self._repair(number, version))

    async def _versions(self, number: int) -> list[IndexVersion] | None:
        try:
            call = self._shards[number].versions.options(concurrency_group="control").remote()
            return await asyncio.wait_for(_result(call), _PING_TIMEOUT_S)
        except (RayError, TimeoutError):
            return None

    async def _repair(self, number: int, version: IndexVersion) -> None:
        try:
            await self._build(number, version, time.monotonic() + self._build_timeout_s, _PATIENCE_S)
        except Exception as error:  # tried again at the next look; the others go on serving
            logger.warning("shard %d could not be brought back", number, exc_info=error)
            await asyncio.sleep(_REBUILD_PAUSE_S)

    async def _retire(self) -> None:
        """Have all shards drop what is neither served nor being made."""
        keep = [version for version in (self._status.version, self._making) if version is not None]
        calls = [s.retire.options(concurrency_group="control").remote(keep) for s in self._shards]
        await asyncio.gather(*(asyncio.wait_for(_result(c), _PING_TIMEOUT_S) for c in calls), return_exceptions=True)

    def _spawn(self, work: Any) -> asyncio.Task:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _result(call: Any) -> Any:
    return asyncio.wrap_future(call.future())


def _save_weights(file: Path, reference: Any) -> None:
    weights: Weights = ray.get(reference)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    save_file({name: np.ascontiguousarray(array) for name, array in weights.items()}, partial)
    partial.replace(file)


def _reason(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(dict.fromkeys(map(_reason, error.exceptions)))
    return first_line(getattr(error, "cause", None) or error)
