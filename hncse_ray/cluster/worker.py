"""One worker of a run: it opens what the driver has found whole, trains its part and keeps the records."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch

from hncse_ray.cluster.metrics import RayMetrics
from hncse_ray.cluster.pool import LONGEST_POLL_S, POLL_S, PoolClient
from hncse_ray.cluster.preemption import watch_nodes
from hncse_ray.config import Settings
from hncse_ray.encoder import load_encoder
from hncse_ray.errors import HncseError, StorageError
from hncse_ray.negatives import NegativeSource
from hncse_ray.reporting import Event, Notice, RunFinished
from hncse_ray.reporting.records import run_records
from hncse_ray.training import TrainJob, fit
from hncse_ray.training.distributed import raise_together, rank, world_size
from hncse_ray.training.run_folder import RunFolder, working_folder
from hncse_ray.training.shard import in_process_source
from hncse_ray.training.store import FolderStore, fetch_run


def train_worker(config: dict[str, Any]) -> RunFinished | HncseError | None:
    """Run one rank, to the end or (None) to a pause.

    An expected failure is returned, not raised, since trying again would not help; but for one that this rank alone has
    met, which the others wait for: Ray Train must end them.
    """
    torch.set_num_threads(config["threads"])
    settings = Settings.model_validate(config["settings"])
    events, lease = config["events"], config["lease"]
    folder = RunFolder(Path(config["folder"]) if lease is None else working_folder(settings), lease)

    def notify(text: str) -> None:
        events.put.remote(Notice(text))

    try:
        job, failure = None, None
        try:
            fetch_run(folder, notify)
            if lease is None:
                check_mark(folder.path, config["mark"])
            job = _build_job(settings, config, notify)
        except HncseError as error:
            failure = error
        raise_together(failure)
        assert job is not None
        if rank() == 0:
            config["starts"].note()
        with (
            watch_nodes(notify, config["missing"], settings.cluster.min_workers) as nodes,
            FolderStore(folder, notify, is_first_on_node=_is_first_on_node(), requested=nodes.requested) as store,
            run_records(folder.path, RayMetrics(settings.run.name)) as files,
        ):

            def emit(event: Event) -> None:
                files.on(event)
                events.put.remote(event)

            return fit(job, store, emit)
    except HncseError as error:
        if world_size() > 1 and not error.on_all_ranks:
            raise
        return error


def mark_folder(folder: Path) -> str:
    """Mark the folder of a run that this process holds, so that workers can tell whether they see the same one."""
    mark = uuid.uuid4().hex
    (folder / ".lock").write_text(mark)
    return mark


def check_mark(folder: Path, mark: str) -> None:
    """Make sure that this node sees the run's folder: the path may be none here, or one of another disk.

    Raises:
        StorageError: it does not.
    """
    try:
        if (folder / ".lock").read_text() == mark:
            return
    except (OSError, ValueError):
        pass  # the same: not the folder that was marked
    raise StorageError(f"is not seen by node {socket.gethostname()}", str(folder),
                       "Put run.storage_path on a mount that every node has, or give a URL such as s3://bucket/folder",
                       )  # fmt: skip


def _is_first_on_node() -> bool:
    return ray.train.get_context().get_local_rank() == 0


def _build_job(settings: Settings, config: dict[str, Any], notify: Callable[[str], None]) -> TrainJob:
    device = ray.train.torch.get_device()
    encoder = load_encoder(settings.encoder.model, settings.encoder, device=device, seed=settings.run.seed)
    corpus = config["corpus"].open()
    source: NegativeSource | None = None
    if config["pool"] is not None:
        if rank() == 0 and config["starts"].last() is None:  # the shards come up while the first workers do
            config["pool"].wait_until_ready(notify)
        poll_s = POLL_S if rank() == 0 else min(LONGEST_POLL_S, POLL_S * world_size())
        source = PoolClient(config["pool"], timeout_s=settings.negatives.timeout_s, poll_s=poll_s)
    elif config["index"] is not None:
        source = in_process_source(settings, corpus, plan=config["index"], threads=config["threads"], device=device)
    return TrainJob(settings, corpus, encoder, ray.get(config["sets"]), source)
