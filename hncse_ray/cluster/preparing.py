"""A corpus prepared by workers on a cluster: the pieces of :mod:`hncse_ray.corpus.runs`, handed out by Ray Data.

Ray Data hands on texts to those who tokenise, and counts of what was done. Token rows go to files and meet their
duplicates there, by sorted keys: each is read once more, and none is held by an actor as in Ray Data's own shuffle.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayError

from hncse_ray.cluster.placement import check_workers
from hncse_ray.cluster.session import ray_session
from hncse_ray.config import EncoderSettings
from hncse_ray.corpus.files import ShardFacts
from hncse_ray.corpus.prepare import Job, Tell
from hncse_ray.corpus.rows import RowMaker
from hncse_ray.corpus.runs import (
    Chunk,
    Layout,
    Run,
    read_chunks,
    write_dropped,
    write_in_pieces,
    write_laid_out,
    write_run,
)
from hncse_ray.corpus.sources import Part
from hncse_ray.errors import ClusterError, DataError, HncseError, counted, first_line

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 1  # of what is handed on at a time: a block of one row, so that no worker has many while others wait
_Row = dict[str, Any]


@dataclass(frozen=True)
class ClusterRows:
    """Writes the rows of a corpus by workers, with the bytes that one process would write.

    Attributes:
        workers: how many; each takes a CPU.
        encoder: whose tokenizer.
    """

    workers: int
    encoder: EncoderSettings

    def __call__(self, folder: Path, job: Job, counts: Counter[str], tell: Tell) -> list[ShardFacts]:
        """See :class:`~hncse_ray.corpus.prepare.WriteRows`.

        Raises:
            DataError: the source cannot be read, also by one node alone, or a node does not see the folder.
            ClusterError: the cluster is missing or too small, or was lost.
        """
        with ray_session(), _data_context():
            check_workers(self.workers)
            try:
                return write_in_pieces(folder, job, counts, tell, workers=_RayWorkers(self.workers, self.encoder))
            except RayError as error:
                raise _expected(error) or _lost(error) from error


@dataclass(frozen=True)
class _RayWorkers:
    """Makes the pieces by Ray Data. What a process that dies was making is made again."""

    workers: int
    encoder: EncoderSettings

    def write_runs(self, folder: Path, job: Job, parts: Sequence[Part]) -> Iterator[Run]:
        if len(parts) < self.workers:
            logger.info("the source is read in %s, by as many workers", counted(len(parts), "part"))
        items = [{"piece": pickle.dumps((number, part))} for number, part in enumerate(parts)]
        read = ray.data.from_items(items, override_num_blocks=len(items)).flat_map(
            _ReadPart(job),
            # Reading is a small part of the work, and must go on while tokenisers have all CPUs.
            num_cpus=0,
            compute=ray.data.TaskPoolStrategy(size=self.workers),
        )
        tokenised = read.map(
            _TokeniseChunk,
            fn_constructor_args=(folder, job, self.encoder),
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=self.workers),
        )
        for row in tokenised.iter_rows():
            run: Run = pickle.loads(row["piece"])
            yield run

    def write_dropped(self, folder: Path, runs: Sequence[Run], ranges: int) -> list[int]:
        shared = ray.put(list(runs))
        return self._each(ranges, lambda number: write_dropped(folder, ray.get(shared), number, ranges))

    def write_shards(self, folder: Path, layout: Layout, schema: pa.Schema) -> list[ShardFacts]:
        shared = ray.put(layout)
        return self._each(layout.shards, lambda number: write_laid_out(folder, ray.get(shared), schema, number))

    def _each(self, count: int, make: Callable[[int], Any]) -> list[Any]:
        """Make pieces by their numbers."""

        def one(row: _Row) -> _Row:
            with _on_this_node():
                return row | {"piece": pickle.dumps(make(int(row["number"])))}

        if not count:
            return []
        numbers = ray.data.from_items([{"number": number} for number in range(count)], override_num_blocks=count)
        made = numbers.map(one, num_cpus=1, compute=ray.data.TaskPoolStrategy(size=self.workers))
        found = {int(row["number"]): pickle.loads(row["piece"]) for row in made.iter_rows()}
        return [found[number] for number in range(count)]


@dataclass(frozen=True)
class _ReadPart:
    job: Job

    def __call__(self, row: _Row) -> Iterator[_Row]:
        number, part = pickle.loads(row["piece"])
        with _on_this_node():
            for chunk in read_chunks(self.job, number, part):
                yield {"piece": pickle.dumps(chunk)}


class _TokeniseChunk:
    def __init__(self, folder: Path, job: Job, settings: EncoderSettings) -> None:
        from hncse_ray.encoder import load_encoder  # imports torch, which only those who tokenise need

        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker has one CPU
        self._folder, self._schema = folder, job.schema
        with _on_this_node():
            encoder = load_encoder(settings.model, settings)
            if encoder.tokenizer_digest() != job.tokenizer:
                raise DataError("has another tokenizer than on the driver's node", settings.model,
                                "Every node needs the same files, and the same versions of packages")  # fmt: skip
        self._make = RowMaker(job.shape, encoder.token_rows, job.max_length)

    def __call__(self, row: _Row) -> _Row:
        chunk: Chunk = pickle.loads(row["piece"])
        with _on_this_node():
            if not self._folder.is_dir():
                raise DataError("is not to be seen", str(self._folder),
                                "Put corpus.cache_dir or HNCSE_CACHE on a mount that all nodes have")  # fmt: skip
            return {"piece": pickle.dumps(write_run(self._folder, chunk, self._make, self._schema))}


@contextmanager
def _on_this_node() -> Iterator[None]:
    """Name the node in what goes wrong on it."""
    try:
        yield
    except HncseError as error:
        raise type(error)(f"{error.what}, on node {socket.gethostname()}", error.where, error.hint) from None
    except OSError as error:
        what = f"cannot be written or read ({error.strerror or error}), on node {socket.gethostname()}"
        raise DataError(what, str(error.filename or "a file"), "Is the disk full? See corpus.cache_dir") from error


@contextmanager
def _data_context() -> Iterator[None]:
    """Have Ray Data hand out small blocks, tell of errors as they are, and print nothing."""
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = _BLOCK_BYTES
    context.raise_original_map_exception = True
    context.max_errored_blocks = 0
    context.enable_progress_bars = context.print_on_execution_start = False
    context.enable_auto_log_stats = False
    data_logger = logging.getLogger("ray.data")
    before = data_logger.level
    data_logger.setLevel(logging.CRITICAL)  # what matters is raised
    try:
        with ray.data.DataContext.current(context), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pieces that are fewer than workers
            yield
    finally:
        data_logger.setLevel(before)


def _expected(error: BaseException) -> HncseError | None:
    """Return the error that a worker raised for the user, if it did."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, HncseError):
        found = getattr(found, "cause", None) or found.__cause__
    return found


def _lost(error: RayError) -> ClusterError:
    return ClusterError(f"the workers that prepare the corpus were lost ({first_line(error)})", "--workers",
                        "The same command again begins anew; ask for fewer workers if memory is short")  # fmt: skip
