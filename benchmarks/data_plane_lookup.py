"""One rank of the part ``lookup`` of data_plane.py; of this checkout, or of bc9c010's by PYTHONPATH.

The pool's client asks stand-ins in its own process, which answer with recorded bytes: what Ray itself takes for a call
is not in the figures, but is counted in calls. All else is the package's: batches, client, merging, selection, what
the ranks tell each other (by gloo and its store).
"""

import json
import os
import pickle
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hncse_ray.cluster import pool
from hncse_ray.cluster.coordinator import PoolState
from hncse_ray.config import load_settings
from hncse_ray.corpus import BatchPlan
from hncse_ray.negatives import IndexVersion, SourceStatus
from hncse_ray.training import distributed, negatives
from hncse_ray.training.checkpoint import TrainState

ROWS = 1_000_000
VERSION = IndexVersion(0, "0" * 32, "0" * 64, ROWS)


class Method:
    """A remote method whose result is bytes that were made before."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.calls = answer, 0

    def options(self, **_: Any) -> "Method":
        return self

    def remote(self, *arguments: Any) -> bytes:
        self.calls += 1
        return self.answer(*arguments)


class Shard:
    """Answers with recorded vectors, and with hits of its own rows."""

    recorded: dict[tuple[int, int], bytes] = {}

    def __init__(self, number: int, args: Any) -> None:
        rng = np.random.default_rng(number)

        def vectors(version: Any, ids: Any) -> bytes:
            key = (args.dim, len(ids))
            if key not in self.recorded:
                found = rng.standard_normal((len(ids), args.dim), dtype=np.float32)
                self.recorded[key] = pickle.dumps(found / np.linalg.norm(found, axis=1, keepdims=True), protocol=5)
            return self.recorded[key]

        hits: dict[int, bytes] = {}

        def search(version: Any, queries: Any, k: int, words: Any = None, ahead: Any = None) -> Any:
            if len(queries) not in hits:
                scores = -np.sort(-rng.random((len(queries), k), dtype=np.float32), axis=1)
                ids = rng.integers(0, ROWS // args.shards, (len(queries), k)) * args.shards + number
                hits[len(queries)] = pickle.dumps((scores, ids), protocol=5)
            return hits[len(queries)] if ahead is None else (hits[len(queries)], vectors(version, ahead))

        self.vectors, self.search = Method(vectors), Method(search)


class Corpus:
    """What a look-up asks of a corpus of different sentences."""

    has_pairs = has_passages = False

    def __init__(self) -> None:
        self.hashes = self.target_hashes = np.random.default_rng(0).permutation(ROWS).astype(np.int64)

    def __len__(self) -> int:
        return ROWS

    def contents(self, ids: Any) -> Any:
        return self.hashes[ids][..., None]

    def kept_apart(self, settings: Any) -> None:
        return None

    def target_texts(self, ids: Any) -> list[str]:
        return []


def read(answer: Any) -> Any:
    """What was recorded, of an answer that has parts of them all."""
    return tuple(map(pickle.loads, answer)) if isinstance(answer, tuple) else pickle.loads(answer)


def work(rank: int, args: Any, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{args.port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=args.ranks)
    shards = tuple(Shard(number, args) for number in range(args.shards))
    state = PoolState(SourceStatus(VERSION, shards=args.shards, shards_alive=args.shards), tuple(range(args.shards)))
    answers = {"state": pickle.dumps(state), "publish": pickle.dumps(True), "wait": pickle.dumps(True)}
    coordinator = SimpleNamespace(**{n: Method(lambda *_, a=a: a) for n, a in answers.items()})
    pool.ray = SimpleNamespace(put=lambda x: x, wait=lambda *_, **__: None, get=lambda b, timeout=None: read(b))
    is_old = hasattr(distributed, "broadcast")
    settings = load_settings(
        {"corpus": {"source": "python-docs"}},
        ["negatives.source=pool", f"train.batch_size={args.batch}", f"negatives.candidates={args.k}",
         f"negatives.per_anchor={args.m}", "negatives.max_score=null", "negatives.refresh_every_steps=null",
         "negatives.timeout_s=600", "objective.name=info_nce"],
    )  # fmt: skip
    plan = BatchPlan(np.ones(ROWS, np.int32), batch_size=args.batch, seed=0, bucket_by_length=False, min_batch=2)
    source = None
    if rank == 0 or not is_old:
        source = pool.PoolClient(pool.PoolHandles(coordinator, shards), timeout_s=60)
    known = negatives.GlobalNegatives(
        settings, corpus=Corpus(), plan=plan, dimension=args.dim, source=source, notify=print
    )  # type: ignore[arg-type]
    state_of_run = TrainState(step=1)

    def take(number: int) -> Any:
        if is_old:
            known.refresh(state_of_run, dict)
            return known.take([number], state_of_run)[0]
        return known.take([number], state_of_run, lambda: SimpleNamespace(wait=dict))[0][0]

    def settle() -> None:  # as in a run, where a step is longer than a look-up
        if known._prefetch is not None:
            for future in list(known._prefetch._futures.values()):
                future.exception(600)
        dist.barrier()

    sent = Counter[str]()
    for number in range(2):  # the answers are recorded, and the epoch is planned
        take(number)
    settle()
    calls = sum(shard.vectors.calls + shard.search.calls for shard in shards)
    started = time.process_time()
    for number in range(2, 2 + args.rounds):  # each has one more batch looked up, in a thread
        found = take(number)
        settle()
    cpu_s = (time.process_time() - started) / args.rounds
    calls = sum(shard.vectors.calls + shard.search.calls for shard in shards) - calls
    mask = found.mask_Bm if is_old else found.mask_bm
    assert mask.all(), "no negatives came"
    count_bytes(sent, is_old)
    take(2 + args.rounds)
    facts = {"cpu_s": cpu_s, "calls_to_a_shard": calls / args.rounds / args.shards,
             "sent_bytes": sent["bytes"] * (args.ranks - 1), "anchors": len(mask)}  # fmt: skip
    (Path(folder) / f"{rank}.json").write_text(json.dumps(facts))
    dist.barrier()
    os._exit(0)  # the client's threads look at a state that nobody keeps


def count_bytes(sent: Counter[str], is_old: bool) -> None:
    """Add up what this rank tells the others from now on."""
    if is_old:
        really = dist.broadcast_object_list

        def broadcast(values: list[Any], **how: Any) -> None:
            sent["bytes"] += len(pickle.dumps(values[0]))
            really(values, **how)

        dist.broadcast_object_list = broadcast
        return
    board = distributed._Board
    tell = board.tell

    def told(self: Any, outcome: object) -> None:
        sent["bytes"] += len(pickle.dumps((False, pickle.dumps(outcome))))
        tell(self, outcome)

    board.tell = told


def main() -> None:
    """Take {"shards": S, ...} and a folder, and leave each rank's figures there."""
    args, folder = SimpleNamespace(**json.loads(sys.argv[1])), sys.argv[2]
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        args.port = chosen.getsockname()[1]
    mp.start_processes(work, (args, folder), nprocs=args.ranks, start_method="fork")


if __name__ == "__main__":
    main()
