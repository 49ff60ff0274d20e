"""From a text source to a :class:`Corpus` on disk: once for each source, tokenizer and relevant setting."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import os
import shutil
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from hncse_ray.config import CorpusSettings
from hncse_ray.corpus.cache import cache_folder
from hncse_ray.corpus.corpus import Corpus
from hncse_ray.corpus.files import (
    FORMAT_VERSION,
    MANIFEST,
    NUMBERS,
    ShardFacts,
    Unreadable,
    numbers_name,
    record_batches,
    row_schema,
    write_manifest,
    write_shards,
)
from hncse_ray.corpus.rows import Row, RowMaker, Tokenize
from hncse_ray.corpus.sampling import sample
from hncse_ray.corpus.sources import DROP_REASONS, Shape, read_examples, shape_of, source_identity
from hncse_ray.errors import DataError, counted
from hncse_ray.storage import is_locked

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int | None], None]
Tell = Callable[[int], None]

_BATCH = 4096  # rows tokenised at a time
_FOREIGN_STALE_S = 7 * 24 * 3600.0  # a temporary folder of another host is removed after so long


@dataclass(frozen=True)
class Job:
    """What the rows of a corpus are made from, and how: the same for every process that has a part in it.

    Attributes:
        settings: the source, and its filters.
        tokenizer: the digest of its tokenizer.
        max_length: tokens a row at most.
        seed: chooses the sample.
    """

    settings: CorpusSettings
    tokenizer: str
    max_length: int
    seed: int

    @cached_property
    def shape(self) -> Shape:
        """What rows have."""
        return shape_of(self.settings)

    @property
    def schema(self) -> pa.Schema:
        """Their columns."""
        return row_schema(**asdict(self.shape))

    @property
    def document_column(self) -> int | None:
        """The column of the documents that are sampled as a whole; None where rows are sampled."""
        return self.schema.get_field_index("document") if self.shape.passages else None


class WriteRows(Protocol):
    """Writes the unique rows of a source into a folder, in their order, and counts what is dropped."""

    def __call__(self, folder: Path, job: Job, counts: Counter[str], tell: Tell) -> list[ShardFacts]:
        """Return the shards written; ``counts`` gains ``read`` and the rows dropped by reason, ``tell`` hears rows."""
        ...


def prepare_corpus(
    settings: CorpusSettings,
    *,
    tokenize: Tokenize,
    tokenizer_digest: str,
    max_length: int,
    seed: int = 0,
    sentences: Sequence[str] | None = None,
    progress: Progress | None = None,
    write_rows: WriteRows | None = None,
    digests: bool = False,
) -> Corpus:
    """Return the corpus of the settings: from the cache, or read, made unique, tokenised and saved.

    Safe with several processes at once: each writes a folder of its own, the first to finish moves it there.

    Args:
        settings: the source, its filters and the cache.
        tokenize: makes token rows; sentences are of no side, those that have positives are queries, and positives,
            negatives and passages are documents.
        tokenizer_digest: what identifies its behaviour.
        max_length: tokens a row at most, special tokens included; longer sentences are truncated.
        seed: chooses the sample where ``settings.max_sentences`` asks for one.
        sentences: what is read where ``settings.source`` is ``memory``.
        progress: called with (what is done, rows done, rows in all if known).
        write_rows: reads, tokenises and writes; default: this process alone. The corpus is the same.
        digests: whether a corpus that is found is compared with its digests, which reads all of it.

    Raises:
        DataError: the source cannot be read, nothing is left of it, or the cache cannot be written.
    """
    identity = source_identity(settings, sentences)
    size, filters = settings.max_sentences, [settings.min_words, settings.max_chars]
    sampled = None if size is None else [size, seed]
    relevant = [FORMAT_VERSION, identity, tokenizer_digest, max_length, *filters, sampled]
    digest = hashlib.sha256(json.dumps(relevant).encode()).hexdigest()
    corpora = cache_folder(settings.cache_dir) / "corpora"
    final = corpora / digest
    if (corpus := _open_if_whole(final, tokenizer_digest, digests=digests)) is not None:
        return corpus
    try:
        corpora.mkdir(parents=True, exist_ok=True)
        _remove_stale(corpora)
        temporary = _temporary(corpora)
        temporary.mkdir()
    except OSError as error:
        what = f"cannot be written ({error.strerror or error})"
        raise DataError(what, str(corpora), "Set corpus.cache_dir or HNCSE_CACHE") from None
    try:
        with _shown_at_work(temporary):
            facts: dict[str, Any] = {"digest": digest, "source": identity, "tokenizer": tokenizer_digest}
            facts |= {"max_length": max_length, "seed": seed, "settings": settings.model_dump(mode="json")}
            job = Job(settings, tokenizer_digest, max_length, seed)
            write_rows = write_rows or _InProcess(tokenize, sentences)
            _write(temporary, job, write_rows, progress, facts)
            # Of files here the identity is a hash of what was read a moment before; what is elsewhere is asked again.
            if settings.is_elsewhere and source_identity(settings) != identity:
                raise DataError("changed while it was read", settings.place, "Begin again")
            _put_in_place(temporary, final)
    except OSError as error:
        what = f"cannot be written ({error.strerror or error})"
        raise DataError(what, str(corpora), "Is the disk full? See corpus.cache_dir") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Corpus.open(final)


def _open_if_whole(final: Path, tokenizer_digest: str, *, digests: bool) -> Corpus | None:
    if not os.path.exists(final):
        return None
    try:
        corpus = Corpus.open(final)
        if corpus.digest != final.name:
            other = "" if corpus.tokenizer == tokenizer_digest else ", of another tokenizer"
            raise DataError(f"holds another corpus{other}", str(final))
        corpus.check(digests=digests)
        return corpus
    except Unreadable:  # nothing is wrong with it
        raise
    except DataError as error:
        # Moved before it is removed: no other process meets it half gone.
        log.warning("%s %s; preparing it anew", final, error.what)
        aside = _temporary(final.parent)
        with contextlib.suppress(OSError):
            final.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        return None


def _temporary(corpora: Path) -> Path:
    """Return a new name that :func:`_remove_stale` knows this process by."""
    return corpora / f".tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _put_in_place(temporary: Path, final: Path) -> None:
    try:
        temporary.rename(final)
    except OSError:
        # Another process was first. Its corpus is the same; if there is none, this is a true failure.
        if not (final / MANIFEST).is_file():
            raise


@contextlib.contextmanager
def _shown_at_work(folder: Path) -> Iterator[None]:
    """Hold a folder's lock meanwhile, where its file system has locks for folders."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_stale(corpora: Path) -> None:
    """Remove what killed preparations left: folders of dead processes here, old ones of other hosts."""
    here = socket.gethostname()
    for folder in corpora.glob(".tmp-*"):
        # ValueError: a name that is not of this module's making.
        with contextlib.suppress(OSError, ValueError):
            host, pid, _ = folder.name.removeprefix(".tmp-").rsplit("-", 2)
            old = time.time() - folder.stat().st_mtime > _FOREIGN_STALE_S
            # In a container processes of this host may have other numbers.
            is_dead = host == here and not _alive(int(pid)) and not is_locked(folder)
            if is_dead or (host != here and old):
                shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's, so alive
    return True


def _write(folder: Path, job: Job, write_rows: WriteRows, progress: Progress | None, facts: dict[str, Any]) -> None:
    """Write the rows of a corpus, and its manifest with these facts."""
    started = time.monotonic()
    counts: Counter[str] = Counter()
    shape = job.shape
    shards = write_rows(
        folder, job, counts, lambda rows: progress("preparing the corpus", rows, None) if progress else None
    )
    if not shards:
        raise _nothing_left(job.settings, shape, counts)
    documents = np.fromfile(folder / numbers_name("document"), NUMBERS["document"]) if shape.passages else None
    written = sum(shard.rows for shard in shards)
    facts = facts | {
        "rows": written,
        "read": counts.pop("read"),
        "dropped": dict(sorted(counts.items())),
        "seconds": round(time.monotonic() - started, 3),
        "mean_tokens": sum(shard.tokens for shard in shards) / written,
        "without_positive": sum(shard.without_positive for shard in shards) if shape.pairs else None,
        # Those of one stand together.
        "documents": None if documents is None else 1 + int(np.count_nonzero(np.diff(documents))),
    }
    write_manifest(folder, job.schema, shards, facts)


@dataclass(frozen=True)
class _InProcess:
    """Writes rows one by one, and remembers what they are unique by."""

    tokenize: Tokenize
    sentences: Sequence[str] | None

    def __call__(self, folder: Path, job: Job, counts: Counter[str], tell: Tell) -> list[ShardFacts]:
        rows: Iterator[Row] = self._unique_rows(job, counts, tell)
        if job.settings.max_sentences is not None:
            rows = sample(rows, job.settings.max_sentences, job.seed, counts, job.document_column)
        return list(write_shards(folder, record_batches(rows, job.schema), job.schema))

    def _unique_rows(self, job: Job, counts: Counter[str], tell: Tell) -> Iterator[Row]:
        """Yield the first of the rows that are the same to the model."""
        make = RowMaker(job.shape, self.tokenize, job.max_length)
        examples = read_examples(job.settings, counts, self.sentences)
        seen: set[int] = set()
        while batch := list(itertools.islice(examples, _BATCH)):
            for key, row in make(batch, counts):
                if key in seen:
                    counts["duplicate"] += 1
                else:
                    seen.add(key)
                    yield row
            tell(len(seen))


def _nothing_left(settings: CorpusSettings, shape: Shape, counts: Counter[str]) -> DataError:
    dropped = ", ".join(f"{reason} {counts[reason]}" for reason in DROP_REASONS if counts[reason])
    rows_of, hint = ("sentence", "line"), "See corpus.min_words, corpus.max_chars and corpus.column"
    if shape.passages:
        rows_of, hint = ("passage", "document"), "See corpus.min_words and corpus.column"
    if counts["undecodable"] * 2 >= counts["read"] > 0:
        hint = "Text is UTF-8: convert it, for example with iconv"
    what = f"no {rows_of[0]} is left of {counted(counts['read'], rows_of[1])} (dropped: {dropped or 'none'})"
    return DataError(what, settings.place, hint)
