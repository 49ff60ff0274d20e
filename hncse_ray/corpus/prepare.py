"""From a text source to a :class:`Corpus` on disk: once for each source, tokenizer and relevant setting."""

from __future__ import annotations

import contextlib
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hncse_ray.config import CorpusSettings, Side
from hncse_ray.corpus.cache import cache_folder
from hncse_ray.corpus.corpus import Corpus
from hncse_ray.corpus.files import (
    FORMAT_VERSION,
    MANIFEST,
    NUMBERS,
    numbers_name,
    record_batches,
    row_schema,
    write_manifest,
    write_shards,
)
from hncse_ray.corpus.sampling import sample
from hncse_ray.corpus.sources import DROP_REASONS, Example, Shape, read_examples, shape_of, source_identity
from hncse_ray.corpus.text import name_hash, row_hash
from hncse_ray.errors import DataError

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int | None], None]
TokenRow = npt.NDArray[np.int32]
Row = tuple[Any, ...]  # one value for each column of the schema

_BATCH = 4096  # rows tokenised at a time
_FOREIGN_STALE_S = 7 * 24 * 3600.0  # a temporary folder of another host is removed after so long


class Tokenize(Protocol):
    """Turns texts into token rows, those of a text without tokens empty; see ``SentenceEncoder.token_rows``."""

    def __call__(self, texts: Sequence[str], max_length: int, *, side: Side | None) -> list[TokenRow]:
        """Return a row of each text, of at most ``max_length`` tokens, with the prompt of its side."""
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

    Raises:
        DataError: the source cannot be read, nothing is left of it, or the cache cannot be written.
    """
    identity = source_identity(settings, sentences)
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
    if (corpus := _open_if_whole(final, tokenizer_digest)) is not None:
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
        facts: dict[str, Any] = {"digest": digest, "source": identity, "tokenizer": tokenizer_digest}
        facts |= {"max_length": max_length, "seed": seed, "settings": settings.model_dump(mode="json")}
        _write(temporary, settings, tokenize, max_length, seed, sentences, progress, facts)
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


def _open_if_whole(final: Path, tokenizer_digest: str) -> Corpus | None:
    if not final.exists():
        return None
    try:
        corpus = Corpus.open(final)
        if corpus.digest != final.name:
            other = "" if corpus.tokenizer == tokenizer_digest else ", of another tokenizer"
            raise DataError(f"holds another corpus{other}", str(final))
        corpus.check()
        return corpus
    except DataError as error:
        # Moved before it is removed: no other process meets it half gone.
        log.warning("%s %s; preparing it anew", final, error.what)
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
        if not (final / MANIFEST).is_file():
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
    tokenize: Tokenize,
    max_length: int,
    seed: int,
    sentences: Sequence[str] | None,
    progress: Progress | None,
    facts: dict[str, Any],
) -> None:
    """Write the rows of a corpus, and its manifest with these facts."""
    started = time.monotonic()
    counts: Counter[str] = Counter()
    shape = shape_of(settings)
    schema = row_schema(
        pairs=shape.pairs, negatives=shape.negatives, documents=shape.documents, passages=shape.passages
    )
    prepared = _prepared(read_examples(settings, counts, sentences), shape, tokenize, max_length)
    rows = _unique_rows(prepared, shape, counts, progress)
    if settings.max_sentences is not None:
        by_document = schema.get_field_index("document") if shape.passages else None
        rows = sample(rows, settings.max_sentences, seed, counts, by_document)
    shards = list(write_shards(folder, record_batches(rows, schema), schema))
    if not shards:
        raise _nothing_left(settings, shape, counts)
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
    write_manifest(folder, schema, shards, facts)


def _nothing_left(settings: CorpusSettings, shape: Shape, counts: Counter[str]) -> DataError:
    dropped = ", ".join(f"{reason} {counts[reason]}" for reason in DROP_REASONS if counts[reason])
    rows_of, hint = ("sentence", "lines"), "See corpus.min_words, corpus.max_chars and corpus.column"
    if shape.passages:
        rows_of, hint = ("passage", "documents"), "See corpus.min_words and corpus.column"
    what = f"no {rows_of[0]} is left of {counts['read']} {rows_of[1]} (dropped: {dropped or 'none'})"
    return DataError(what, settings.place, hint)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """The token rows of an example, None where the model sees nothing of a text."""

    example: Example
    ids: TokenRow | None
    positive_ids: TokenRow | None
    negative_ids: list[TokenRow]


def _prepared(
    examples: Iterator[Example], shape: Shape, tokenize: Tokenize, max_length: int
) -> Iterator[list[_Prepared]]:
    """Tokenise examples, a batch at a time."""
    side: Side | None = "query" if shape.pairs else "document" if shape.passages else None
    own = _Own(tokenize, max_length)
    while batch := list(itertools.islice(examples, _BATCH)):
        rows = own([example.text for example in batch], side)
        others = iter(own([text for e in batch for text in (e.positive, *e.negatives) if text is not None], "document"))
        found = []
        for example, ids in zip(batch, rows, strict=True):
            positive_ids = None if example.positive is None else next(others)
            negatives = [row for row in itertools.islice(others, len(example.negatives)) if row is not None]
            found.append(_Prepared(example, ids, positive_ids, negatives))
        yield found


class _Own:
    """Tokenises texts of a side; None for those without a token of their own, beside prompt and special tokens."""

    def __init__(self, tokenize: Tokenize, max_length: int) -> None:
        self._tokenize, self._max_length = tokenize, max_length
        self._nothing: dict[Side | None, TokenRow] = {}

    def __call__(self, texts: list[str], side: Side | None) -> list[TokenRow | None]:
        if not texts:
            return []
        if side not in self._nothing:
            (self._nothing[side],) = self._tokenize([""], self._max_length, side=side)
            if len(self._nothing[side]) >= self._max_length:
                raise DataError("the prompt leaves no token for the text", f"encoder.max_length = {self._max_length}",
                                "Raise it, or see encoder.prompts")  # fmt: skip
        rows = self._tokenize(texts, self._max_length, side=side)
        return [None if np.array_equal(row, self._nothing[side]) else row for row in rows]


def _unique_rows(
    batches: Iterator[list[_Prepared]], shape: Shape, counts: Counter[str], progress: Progress | None
) -> Iterator[Row]:
    """Yield the rows that have a token of their own, the first of those that are the same to the model."""
    seen: set[int] = set()
    for batch in batches:
        for prepared in batch:
            if prepared.ids is None:
                counts["no_token"] += 1
                continue
            anchor = row_hash(prepared.ids)
            target = anchor if prepared.positive_ids is None else row_hash(prepared.positive_ids)
            key, negatives = anchor, [row_hash(ids) for ids in prepared.negative_ids]
            if shape.pairs:
                key = hash((anchor, target, *negatives))
            if key in seen:
                counts["duplicate"] += 1
                continue
            seen.add(key)
            row: Row = (prepared.example.text, anchor, prepared.ids)
            if shape.pairs:
                # A positive of the same tokens is none: there are only the sentence's own two views.
                given = target != anchor
                row += (prepared.example.positive, prepared.positive_ids, target) if given else (None, None, anchor)
            if shape.negatives:
                row += (prepared.negative_ids, negatives)
            if shape.documents:
                row += (name_hash(prepared.example.document or f"\0{key}"),)  # a document of its own
            if shape.passages:
                row += (prepared.example.title, prepared.example.body)
            yield row
        if progress is not None:
            progress("preparing the corpus", len(seen), None)
