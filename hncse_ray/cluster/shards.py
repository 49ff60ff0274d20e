"""The shard actors of a pool: placed and started, or taken over from the run before, and ended."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hncse_ray.cluster.node_corpus import NodeCorpus
from hncse_ray.cluster.resources import PoolPlan
from hncse_ray.cluster.shard_actor import ShardActor, ShardSpec, of_a_shard
from hncse_ray.config import Settings
from hncse_ray.corpus import Corpus
from hncse_ray.errors import ClusterError, counted
from hncse_ray.negatives.index_plan import size_text

logger = logging.getLogger(__name__)

_PLACEMENT_NEWS_S = 10.0
_ANSWER_S = 5.0
_GROUPS = {"search": 2, "build": 1, "control": 1}  # threads of a shard


@dataclass(frozen=True)
class Shards:
    """The shards of a pool: what they are made from, their names, and where they are."""

    specs: tuple[ShardSpec, ...]
    plan: PoolPlan
    names: tuple[str, ...]
    actors: tuple[Any, ...]
    group: Any

    def rest(self) -> bool:
        """Drop all versions but those of untouched weights; say whether all shards are there, and build nothing."""
        try:
            calls = [a.rest.options(concurrency_group="build").remote() for a in self.actors]
            ray.get(calls, timeout=_ANSWER_S)
        except RayError:  # or they do not answer in time
            return False
        return True

    def end(self) -> None:
        """End the actors, and give back what they were placed on."""
        for actor in self.actors:
            ray.kill(actor, no_restart=True)
        remove_placement_group(self.group)


class KeptShards:
    """The shards of one pool, kept between the runs of a process, as of a sweep's trials.

    The next pool takes them over if its shards would be made from the same things, with the index of untouched weights
    if they still hold it. Those of a run that failed are not kept.
    """

    def __init__(self) -> None:
        self._kept: Shards | None = None

    def take(self, specs: tuple[ShardSpec, ...], plan: PoolPlan) -> Shards | None:
        """Hand out the kept shards if they will do; else end them."""
        kept, self._kept = self._kept, None
        if kept is None or ((kept.specs, kept.plan) == (specs, plan) and kept.rest()):
            return kept
        kept.end()
        return None

    def keep(self, shards: Shards) -> None:
        """Put shards aside for the next pool."""
        self._kept = shards

    def end(self) -> None:
        """End what is kept."""
        if self._kept is not None:
            self._kept.end()
            self._kept = None


@contextmanager
def shard_actors(settings: Settings, plan: PoolPlan, corpus: Corpus, kept: KeptShards | None) -> Iterator[Shards]:
    """Have the shards of a run's pool; on leaving they are gone, or kept if the run has not failed.

    Raises:
        ClusterError: the resources are not free.
    """
    specs = tuple(
        ShardSpec(
            negatives=of_a_shard(settings.negatives),
            encoder=settings.encoder,
            corpus=NodeCorpus.of(corpus, settings),
            plan=plan.index,
            number=number,
            count=plan.num_shards,
            threads=plan.threads,
            use_gpu=plan.gpus > 0,
        )
        for number in range(plan.num_shards)
    )
    shards = (None if kept is None else kept.take(specs, plan)) or _start(specs, plan, settings)
    leave = shards.end if kept is None else partial(kept.keep, shards)
    try:
        yield shards
    except Exception:
        shards.end()
        raise
    except BaseException:  # the run is stopped: by Ray Tune, or by Ctrl-C
        leave()
        raise
    leave()


def _start(specs: tuple[ShardSpec, ...], plan: PoolPlan, settings: Settings) -> Shards:
    pool = f"hncse-{settings.run.name}-{uuid.uuid4().hex[:8]}"
    names = tuple(f"{pool}-shard-{spec.number}" for spec in specs)
    bundles, labels = [plan.each()] * plan.num_shards, [plan.labels] * plan.num_shards
    group = placement_group(bundles, strategy=plan.strategy, bundle_label_selector=labels)
    actors: list[Any] = []
    try:
        wait_until_placed(group, _request(plan), settings.cluster.start_timeout_s)
        for spec, name in zip(specs, names, strict=True):
            actor = ray.remote(concurrency_groups=_GROUPS)(ShardActor).options(
                name=name,
                num_cpus=plan.cpus,
                num_gpus=plan.gpus,
                memory=plan.memory or None,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=spec.number),
                max_restarts=-1,
            )
            actors.append(actor.remote(spec))
    except BaseException:
        Shards(specs, plan, names, tuple(actors), group).end()
        raise
    return Shards(specs, plan, names, tuple(actors), group)


def wait_until_placed(group: Any, what: str, timeout_s: float) -> None:
    """Wait until a placement group is placed, saying so now and then: an autoscaler takes minutes to start nodes.

    Raises:
        ClusterError: it is not, after ``timeout_s``.
    """
    end = time.monotonic() + timeout_s
    while not group.wait(min(_PLACEMENT_NEWS_S, max(0.1, end - time.monotonic()))):
        left = end - time.monotonic()
        if left <= 0:
            raise ClusterError(f"{what} could not be placed on the cluster within {timeout_s:g} s",
                               "negatives", "Wait for other jobs to end, ask for less, or raise"
                               " cluster.start_timeout_s if nodes take longer to start")  # fmt: skip
        logger.info("waiting until the negative pool fits on the cluster, %s; %.0f s more at most", what, left)


def _request(plan: PoolPlan) -> str:
    each = [counted(plan.cpus, "CPU")] * bool(plan.cpus) + [counted(plan.gpus, "GPU")] * bool(plan.gpus)
    each += [f"{size_text(plan.memory)} of memory"] * bool(plan.memory)
    return f"{counted(plan.num_shards, 'shard')} x {' + '.join(each)}"
