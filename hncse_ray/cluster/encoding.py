"""Encoding shared out over actors: the batches of one process, so its vectors too, whatever the number of actors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from hncse_ray.cluster.placement import check_workers, survey
from hncse_ray.cluster.resources import largest_share
from hncse_ray.cluster.session import ray_session
from hncse_ray.config import EncoderSettings, Side
from hncse_ray.encoder import Progress, SentenceEncoder, length_batches, load_encoder
from hncse_ray.errors import ClusterError, HncseError, counted, first_line

_START_TIMEOUT_S = 300.0
_IN_FLIGHT = 2  # batches handed to an actor at a time: it has the next when it is done with one


class EncodingActor:
    """Embeds batches of token rows; holds the model that it was last asked for.

    Args:
        threads: compute threads.
    """

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._held: tuple[str, EncoderSettings] | None = None
        self._encoder: SentenceEncoder | None = None

    def ready(self) -> bool:
        """Answer."""
        return True

    def encode(
        self, model: str, settings: EncoderSettings, rows: Sequence[np.ndarray], side: Side | None
    ) -> np.ndarray:
        """Embed one batch; ``[B, D]`` float32.

        Raises:
            ModelError: the model cannot be loaded here.
        """
        if self._held != (model, settings) or self._encoder is None:
            self._encoder = load_encoder(model, settings)
            self._held = (model, settings)
        return self._encoder.encode_rows(rows, side=side)


class EncodingPool:
    """Actors that encode, from the first model that is opened until the context ends, however it ends.

    Args:
        workers: how many; they share the cluster's CPUs.
    """

    def __init__(self, workers: int) -> None:
        self._workers, self._actors = workers, ()
        self._stack = ExitStack()

    def __enter__(self) -> EncodingPool:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def open(self, model: str, settings: EncoderSettings) -> PooledEncoder:
        """Return an encoder whose batches are embedded by the actors.

        Raises:
            ModelError: there is no such model.
            ClusterError: the cluster is missing or too small, or the actors do not come up.
        """
        encoder = load_encoder(model, settings)  # first: without a model no Ray is needed
        if not self._actors:
            self._start()
        return PooledEncoder(encoder, model, settings, self._actors)

    def _start(self) -> None:
        self._stack.enter_context(ray_session())
        cpus = check_workers(self._workers)
        nodes = [node.resources for node in survey().alive]
        share = int(largest_share(self._workers, int(cpus // self._workers), nodes))
        remote = ray.remote(EncodingActor).options(num_cpus=share)
        actors = []
        self._stack.callback(lambda: [ray.kill(actor) for actor in actors])
        for _ in range(self._workers):
            actors.append(remote.remote(share))
        try:
            ray.get([actor.ready.remote() for actor in actors], timeout=_START_TIMEOUT_S)
        except GetTimeoutError as error:
            asked = f"{counted(self._workers, 'worker')} x {counted(share, 'CPU')}"
            raise ClusterError(f"{asked} did not become free on the cluster", "--workers",
                               "Wait for other jobs to end, or ask for fewer") from error  # fmt: skip
        except RayError as error:
            raise ClusterError(f"the workers did not come up ({first_line(error)})", "--workers") from error
        self._actors = tuple(actors)


class PooledEncoder:
    """The ``encode`` of a SentenceEncoder, computed by actors; see :meth:`EncodingPool.open`."""

    def __init__(self, encoder: SentenceEncoder, model: str, settings: EncoderSettings, actors: Sequence[Any]) -> None:
        self._encoder, self._model, self._actors = encoder, model, actors
        self._settings = ray.put(settings)

    def encode(
        self,
        texts: Sequence[str],
        *,
        side: Side | None = None,
        batch_size: int = 128,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Embed N texts as :meth:`SentenceEncoder.encode` does.

        Raises:
            HncseError: an actor cannot load the model.
            ClusterError: an actor was lost.
        """
        rows = self._encoder.tokenize(texts, side=side)
        out_ND = np.zeros((len(rows), self._encoder.dimension), dtype=np.float32)
        batches = length_batches(rows, batch_size)
        running: dict[Any, tuple[Any, np.ndarray]] = {}

        def hand_out(actor: Any) -> None:
            index = next(batches, None)
            if index is not None:
                call = actor.encode.remote(self._model, self._settings, [rows[i] for i in index], side)
                running[call] = (actor, index)

        for actor in itertools.chain.from_iterable([self._actors] * _IN_FLIGHT):
            hand_out(actor)
        done = 0
        while running:
            (call,), _ = ray.wait(list(running), num_returns=1)
            actor, index = running.pop(call)
            out_ND[index] = self._result(call)
            hand_out(actor)
            done += len(index)
            if progress is not None:
                progress(done, len(rows))
        return out_ND

    def _result(self, call: Any) -> np.ndarray:
        try:
            return ray.get(call)
        except RayTaskError as error:
            if isinstance(error.cause, HncseError):
                raise error.cause from error
            raise
        except RayActorError as error:
            raise ClusterError(f"a worker was lost ({first_line(error)})", "--workers",
                               "Each holds the model: ask for fewer if memory is short") from error  # fmt: skip
