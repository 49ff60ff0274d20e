"""From a text source to a :class:`Corpus` on disk: once for each source, tokenizer and relevant setting."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import random
import shutil
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hncse_ray.config import CorpusSettings
from hncse_ray.corpus.cache import cache_folder
from hncse_ray.corpus.corpus import DATA_FILE, FORMAT_VERSION, REPORT_FILE, Corpus
from hncse_ray.corpus.sources import DROP_REASONS, read_sentences, source_identity
from hncse_ray.corpus.text import row_hash
from hncse_ray.errors import DataError

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int | None], None]
Row = tuple[str, int, npt.NDArray[np.int32]]  # text, hash, token ids

_BATCH = 4096  # sentences tokenised, and written, at a time
_FOREIGN_STALE_S = 7 * 24 * 3600.0  # a temporary folder of another host is removed after so long
_SCHEMA = pa.schema({"text": pa.string(), "hash": pa.int64(), "input_ids": pa.list_(pa.int32())})


def prepare_corpus(
    settings: CorpusSettings,
    *,
    tokenizer: Any,
    tokenizer_digest: str,
    max_length: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> Corpus:
    """Return the corpus of the settings: from the cache, or read, made unique, tokenised and saved.

    Safe with several processes at once: each writes a folder of its own, the first to finish places it.

    Args:
        settings: the source, its filters and the cache.
        tokenizer: a fast tokenizer of transformers.
        tokenizer_digest: what identifies the tokenizer's behaviour.
        max_length: tokens a row at most, special tokens included; longer sentences are truncated.
        seed: chooses the sample where ``settings.max_sentences`` asks for one.
        progress: called with (what is done, rows done, rows in all if known).

    Raises:
        DataError: the source cannot be read, nothing is left of it, or the cache cannot be written.
    """
    identity = source_identity(settings)
    sample = [settings.max_sentences, seed] if settings.max_sentences is not None else None
    relevant = [
        FORMAT_VERSION,
        identity,
        tokenizer_digest,
        max_length,
        settings.min_words,
        settings.max_chars,
        sample,
    ]
    digest = hashlib.sha256(json.dumps(relevant).encode()).hexdigest()
    corpora = cache_folder(settings.cache_dir) / "corpora"
    final = corpora / digest
    if (corpus := _open_if_whole(final)) is not None:
        return corpus
    try:
        corpora.mkdir(parents=True, exist_ok=True)
        _remove_stale(corpora)
        temporary = corpora / f".tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        temporary.mkdir()
    except OSError as error:
        raise DataError(
            f"cannot be written ({error.strerror or error})",
            str(corpora),
            "Set corpus.cache_dir or HNCSE_CACHE",
        ) from None
    try:
        facts = _write(temporary, settings, tokenizer, max_length, seed, progress)
        facts |= {
            "digest": digest,
            "format": FORMAT_VERSION,
            "source": identity,
            "tokenizer": tokenizer_digest,
        }
        facts |= {"max_length": max_length, "seed": seed, "settings": settings.model_dump(mode="json")}
        (temporary / REPORT_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        _put_in_place(temporary, final)
    except OSError as error:
        raise DataError(
            f"cannot be written ({error.strerror or error})",
            str(corpora),
            "Is the disk full? See corpus.cache_dir",
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Corpus.open(final)


def _open_if_whole(final: Path) -> Corpus | None:
    if not final.exists():
        return None
    try:
        return Corpus.open(final)
    except DataError as error:
        # Moved before it is removed: no other process meets it half gone.
        log.warning("%s; preparing it anew", error.what)
        aside = final.with_name(f".tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
        with contextlib.suppress(OSError):
            final.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        return None


def _put_in_place(temporary: Path, final: Path) -> None:
    try:
        temporary.rename(final)
    except OSError:
        # Another process was first. Its corpus is the same; if there is none, this is a true failure.
        if not (final / REPORT_FILE).is_file():
            raise


def _remove_stale(corpora: Path) -> None:
    """Remove what killed preparations left: folders of dead processes here, old ones of other hosts."""
    here = socket.gethostname()
    for folder in corpora.glob(".tmp-*"):
        # ValueError: a name that is not of this module's making.
        with contextlib.suppress(OSError, ValueError):
            host, pid, _ = folder.name.removeprefix(".tmp-").rsplit("-", 2)
            old = time.time() - folder.stat().st_mtime > _FOREIGN_STALE_S
            if (host == here and not _alive(int(pid))) or (host != here and old):
                shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's, so alive
    return True


def _write(
    folder: Path,
    settings: CorpusSettings,
    tokenizer: Any,
    max_length: int,
    seed: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """Write the rows of a corpus and return the facts of its report."""
    # The library's own writer: `datasets.Dataset.from_file` opens the result as it is.
    from datasets.arrow_writer import ArrowWriter
    from datasets.features import Features

    started = time.monotonic()
    counts: Counter[str] = Counter()
    rows = _unique_rows(read_sentences(settings, counts), counts, tokenizer, max_length, progress)
    if settings.max_sentences is not None:
        rows = _sample(rows, settings.max_sentences, seed, counts)
    written = tokens = 0
    with ArrowWriter(features=Features.from_arrow_schema(_SCHEMA), path=str(folder / DATA_FILE)) as writer:
        while batch := list(itertools.islice(rows, _BATCH)):
            writer.write_table(pa.table(list(zip(*batch, strict=True)), schema=_SCHEMA))
            written += len(batch)
            tokens += sum(len(ids) for *_, ids in batch)
        if not written:
            dropped = ", ".join(f"{reason} {counts[reason]}" for reason in DROP_REASONS if counts[reason])
            raise DataError(
                f"no sentence is left of {counts['read']} lines (dropped: {dropped or 'none'})",
                settings.place,
                "See corpus.min_words, corpus.max_chars and corpus.column",
            )
        writer.finalize()
    return {
        "rows": written,
        "read": counts.pop("read"),
        "dropped": dict(sorted(counts.items())),
        "seconds": round(time.monotonic() - started, 3),
        "mean_tokens": tokens / written,
        "bytes": (folder / DATA_FILE).stat().st_size,
    }


def tokenize(tokenizer: Any, texts: list[str], max_length: int) -> list[list[int]]:
    """Return the token ids of sentences, special tokens included; a fast tokenizer's threads share it."""
    encoded = tokenizer(
        texts,
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _unique_rows(
    texts: Iterator[str], counts: Counter[str], tokenizer: Any, max_length: int, progress: Progress | None
) -> Iterator[Row]:
    """Tokenise sentences and yield those that have a token of their own, the first of each token row."""
    seen: set[int] = set()
    special = tokenizer.num_special_tokens_to_add()
    while batch := list(itertools.islice(texts, _BATCH)):
        for text, tokens in zip(batch, tokenize(tokenizer, batch, max_length), strict=True):
            if len(tokens) <= special:
                counts["no_token"] += 1
                continue
            ids = np.asarray(tokens, dtype=np.int32)
            key = row_hash(ids)
            if key in seen:
                counts["duplicate"] += 1
            else:
                seen.add(key)
                yield text, key, ids
        if progress is not None:
            progress("preparing the corpus", len(seen), None)


def _sample(rows: Iterable[Row], size: int, seed: int, counts: Counter[str]) -> Iterator[Row]:
    """Yield a uniform random sample (Vitter's algorithm R), in the order of the source."""
    rng = random.Random(seed)
    kept: list[tuple[int, Row]] = []
    for i, row in enumerate(rows):
        if i < size:
            kept.append((i, row))
        elif (slot := rng.randrange(i + 1)) < size:
            kept[slot] = (i, row)
            counts["not_sampled"] += 1
        else:
            counts["not_sampled"] += 1
    yield from (row for _, row in sorted(kept, key=lambda entry: entry[0]))
