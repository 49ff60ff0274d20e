"""Offline mining: hard negatives for every row of a corpus, found by the pool's shards in parallel."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hncse_ray.cluster.placement import place_pool, survey
from hncse_ray.cluster.pool import PoolClient, negative_pool
from hncse_ray.cluster.session import named_cluster, ray_session
from hncse_ray.config import Settings
from hncse_ray.corpus import Corpus
from hncse_ray.encoder import SentenceEncoder, load_encoder
from hncse_ray.errors import ClusterError, ModelError, StorageError
from hncse_ray.negatives import (
    Hits,
    NegativeSource,
    SelectionRules,
    SourceUnavailable,
    WordQuery,
    select,
    weights_digest,
)
from hncse_ray.reporting import LineReporter, Reporter, StageProgress
from hncse_ray.storage import check_outlasts_job, check_writable, locked, write_atomically
from hncse_ray.training.checks import prepare
from hncse_ray.training.lookup import own_scores
from hncse_ray.training.negatives import check_candidates
from hncse_ray.training.publish import to_arrays

_BLOCK_ROWS, _IN_FLIGHT = 2048, 4
_RETRY_S = 1.0
_ANSWER_S = 600.0  # the least that a search may take: no step waits for it, and the anchors of pairs are encoded first


@dataclass(frozen=True)
class MineReport:
    """What mining left.

    Attributes:
        out: the Parquet file: ``anchor``, ``positive``, ``negative`` (or ``negative_1`` to ``negative_m``).
        rows: its rows.
        without: rows of the corpus for which fewer than m negatives were left; they are not in the file.
        removed: hits that each selection rule removed.
        mean_similarity: mean cosine of the chosen negatives to their anchors.
        seconds: wall time, encoding included.
    """

    out: str
    rows: int
    without: int
    removed: dict[str, int]
    mean_similarity: float
    seconds: float


def mine(settings: Settings, out: Path, *, reporter: Reporter | None = None) -> MineReport:
    """Find hard negatives for every sentence of a corpus, by the settings' selection rules.

    With pairs, the negatives of a row are the positives of others that its own text is near to. The positive of an
    unlabelled sentence is the sentence itself: sentence-transformers' losses then contrast two dropout passes of it,
    as SimCSE does (arXiv 2104.08821). Interrupted, the same call goes on where it stopped.

    Args:
        settings: ``corpus``, ``encoder`` and ``negatives`` are used.
        out: the Parquet file to write.
        reporter: receives the progress.

    Raises:
        HncseError: bad settings, data, model or cluster; or the file cannot be written, or exists.
    """
    started = time.monotonic()
    reporter = reporter or LineReporter()
    _check_out(out)
    named_cluster()
    encoder = load_encoder(settings.encoder.model, settings.encoder)
    if settings.encoder.max_length > (limit := encoder.length_limit):
        raise ModelError(f"it takes {limit} tokens at most", settings.encoder.model, "Lower encoder.max_length")
    corpus = prepare(settings, encoder, reporter)
    check_candidates(settings, corpus)
    with _Parts.claimed(out, _fingerprint(settings, encoder, corpus), corpus) as parts:
        if parts.blocks():
            _mine_with_pool(settings, encoder, parts, reporter)
        facts = parts.finish(settings.negatives.per_anchor)
    return MineReport(out=str(out), seconds=time.monotonic() - started, **facts)


def _mine_with_pool(settings: Settings, encoder: SentenceEncoder, parts: _Parts, reporter: Reporter) -> None:
    """Have the shards of a pool encode the corpus, and mine the blocks that are not done."""
    corpus = parts.corpus
    with ray_session():
        plan = place_pool(settings, survey(), rows=len(corpus), dimension=encoder.dimension)
        reporter.on(StageProgress(plan.describe(), 0, None))
        with negative_pool(settings, plan, corpus, parts.folder / "index") as handles:
            handles.wait_until_ready()
            client = PoolClient(handles, timeout_s=max(_ANSWER_S, settings.negatives.timeout_s))
            try:
                reporter.on(StageProgress(f"encoding {len(corpus):,} {corpus.rows_are}", 0, None))
                _build(client, encoder, settings)
                _mine_blocks(client, parts, settings, reporter)
            finally:
                client.close()


class _Parts:
    """The blocks that are done, beside the file that they will make, and what job they belong to."""

    def __init__(self, out: Path, corpus: Corpus) -> None:
        self.out, self.corpus = out, corpus
        self.folder = out.with_name(f".{out.name}.parts")

    @classmethod
    @contextmanager
    def claimed(cls, out: Path, fingerprint: str, corpus: Corpus) -> Iterator[_Parts]:
        """Hold what is done of a file for as long as the context lasts: two commands would write the same blocks.

        Raises:
            StorageError: another process holds it, it is of another job, the file is there, or it cannot be written.
        """
        parts = cls(out, corpus)
        with locked(parts.folder / ".lock", hint="Choose another --out"):
            _check_out(out)
            job = parts.folder / "job.json"
            if job.exists() and json.loads(job.read_text(encoding="utf-8"))["fingerprint"] != fingerprint:
                raise StorageError("holds the unfinished work of another model, corpus or selection",
                                   str(parts.folder), "Delete it, or choose another --out")  # fmt: skip
            write_atomically(job, json.dumps({"fingerprint": fingerprint}))
            yield parts

    def blocks(self) -> list[int]:
        """Return the first rows of the blocks that are not done."""
        return [first for first in range(0, len(self.corpus), _BLOCK_ROWS) if not self._facts(first).exists()]

    def ids(self, first: int) -> np.ndarray:
        return np.arange(first, min(first + _BLOCK_ROWS, len(self.corpus)))

    def save(self, first: int, columns: dict[str, list[str]], facts: dict[str, object]) -> None:
        """Keep a block; the facts are written last and make it count."""
        try:
            pq.write_table(pa.table(columns), self._table(first))
        except OSError as error:
            raise StorageError(f"cannot be written ({error})", str(self.folder), "Is the disk full?") from error
        write_atomically(self._facts(first), json.dumps(facts))

    def finish(self, per_anchor: int) -> dict[str, object]:
        """Join the blocks into the file, and return what is known of all of them."""
        partial = self.folder / "whole.parquet"
        facts = []
        schema = pa.schema([(name, pa.string()) for name in _columns(per_anchor)])
        try:
            with pq.ParquetWriter(partial, schema) as writer:
                for first in range(0, len(self.corpus), _BLOCK_ROWS):
                    facts.append(json.loads(self._facts(first).read_text(encoding="utf-8")))
                    writer.write_table(pq.read_table(self._table(first)).cast(schema))
            partial.replace(self.out)
        except OSError as error:
            raise StorageError(f"cannot be written ({error})", str(self.out), "Is the disk full?") from error
        shutil.rmtree(self.folder, ignore_errors=True)
        removed: Counter[str] = Counter()
        for block in facts:
            removed.update(block["removed"])
        chosen = sum(block["chosen"] for block in facts)
        return {
            "rows": sum(block["rows"] for block in facts),
            "without": sum(block["without"] for block in facts),
            "removed": dict(removed),
            "mean_similarity": sum(block["similarity"] for block in facts) / max(1, chosen),
        }

    def _table(self, first: int) -> Path:
        return self.folder / f"{first:012d}.parquet"

    def _facts(self, first: int) -> Path:
        return self.folder / f"{first:012d}.json"


def _build(source: NegativeSource, encoder: SentenceEncoder, settings: Settings) -> None:
    try:
        source.publish(to_arrays(encoder.weights()), step=0, key=uuid.uuid4().hex)
        source.wait(settings.negatives.build_timeout_s)
        status = source.status()
    except SourceUnavailable as error:
        raise ClusterError(str(error), "negatives") from error
    if status.version is None:
        raise ClusterError(f"the index could not be made ({status.last_failure or 'it took too long'})", "negatives",
                           "See negatives.build_timeout_s, and the shards' logs in Ray's dashboard")  # fmt: skip


def _mine_blocks(source: NegativeSource, parts: _Parts, settings: Settings, reporter: Reporter) -> None:
    total = len(parts.corpus)
    waiting = iter(parts.blocks())
    done = total - sum(len(parts.ids(first)) for first in parts.blocks())
    over = threading.Event()
    with ThreadPoolExecutor(_IN_FLIGHT) as threads:
        running: set[Future[int]] = set()
        try:
            while True:
                for first in itertools.islice(waiting, _IN_FLIGHT - len(running)):
                    running.add(threads.submit(_mine_block, source, parts, settings, first, over))
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                done += sum(future.result() for future in finished)
                reporter.on(StageProgress("mining", done, total))
        finally:
            over.set()  # or one that waits for a lost shard would go on, and keep Ctrl-C waiting
            threads.shutdown(cancel_futures=True)


def _mine_block(source: NegativeSource, parts: _Parts, settings: Settings, first: int, over: threading.Event) -> int:
    negatives, corpus, ids_B = settings.negatives, parts.corpus, parts.ids(first)
    hits = _search(source, ids_B, corpus, settings, over)
    positive_B = np.ones(len(ids_B), np.float32)  # a row that is its own positive
    if corpus.has_pairs:
        own_B, last_B = own_scores(hits.ids_Bk, hits.scores_Bk, corpus.target_hashes, ids_B)
        positive_B = np.where(np.isfinite(own_B), own_B, last_B)
    selection = select(
        hits.ids_Bk,
        hits.scores_Bk,
        row_ids_B=ids_B,
        contents=corpus.contents,
        documents=corpus.kept_apart(settings.corpus),
        positive_score=positive_B,
        rules=SelectionRules.of(negatives, per_anchor=negatives.per_anchor, exclude_batch=False),
        seed=(settings.run.seed, first),
    )
    full_B = selection.mask_Bm.all(axis=1)
    anchors, positives = corpus.texts(ids_B[full_B]), corpus.target_texts(ids_B[full_B])
    chosen = [corpus.target_texts(column) for column in selection.ids_Bm[full_B].T]
    columns = dict(zip(_columns(negatives.per_anchor), [anchors, positives, *chosen], strict=True))
    facts = {
        "rows": int(full_B.sum()),
        "without": int((~full_B).sum()),
        "removed": selection.removed,
        "similarity": float(selection.scores_Bm[full_B].sum()),
        "chosen": int(selection.mask_Bm[full_B].sum()),
    }
    parts.save(first, columns, facts)
    return len(ids_B)


def _search(
    source: NegativeSource, ids_B: np.ndarray, corpus: Corpus, settings: Settings, over: threading.Event
) -> Hits:
    """Ask until every row is answered, as a shard that was lost comes back, or until the command is over."""
    anchors = corpus.token_rows(ids_B) if corpus.has_pairs else None
    words = WordQuery.of(settings.negatives, lambda: corpus.texts(ids_B))
    deadline = time.monotonic() + settings.negatives.build_timeout_s
    while True:
        try:
            hits = source.search(ids_B, k=settings.negatives.candidates + 1, anchors=anchors, words=words)
            if hits.complete:
                return hits
            reason = "a shard is being brought back"
        except SourceUnavailable as error:
            reason = str(error)
        if over.is_set() or time.monotonic() > deadline:
            raise ClusterError(f"the pool does not answer any more ({reason})", "negatives",
                               "Start the same command again: it goes on where it stopped")  # fmt: skip
        over.wait(_RETRY_S)


def _columns(per_anchor: int) -> list[str]:
    """Return the columns in the order in which sentence-transformers' trainer reads them."""
    numbered = [f"negative_{n + 1}" for n in range(per_anchor)]
    return ["anchor", "positive", *(["negative"] if per_anchor == 1 else numbered)]


def _fingerprint(settings: Settings, encoder: SentenceEncoder, corpus: Corpus) -> str:
    weights = weights_digest(to_arrays(encoder.weights()))
    rules = settings.negatives.model_dump(
        include={
            "per_anchor", "candidates", "max_score", "relative_margin", "skip_hardest", "sampling",
            "sampling_temperature", "bands", "score", "lexical_weight", "index", "nprobe",
        }
    )  # fmt: skip
    used = [settings.encoder.pooling, settings.encoder.head, settings.encoder.precision]
    apart = settings.corpus.repel_within_document
    text = json.dumps([weights, used, corpus.digest, apart, rules, settings.run.seed], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _check_out(out: Path) -> None:
    check_outlasts_job(out, "--out")
    if out.suffix != ".parquet" or not out.parent.is_dir():
        raise StorageError("cannot be written: name a .parquet file in an existing folder", str(out))
    if out.exists():
        raise StorageError("exists already", str(out), "Delete it, or choose another --out")
    check_writable(out, "Choose another --out")
