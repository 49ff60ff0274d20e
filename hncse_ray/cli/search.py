"""``hncse search``: the texts that are nearest to a query, by an index that is kept."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hncse_ray.cli.app import (
    CorpusArgument,
    DeviceOption,
    JsonOption,
    ModelArgument,
    PrecisionOption,
    RevisionOption,
    TrustOption,
    app,
    command,
    console_reporter,
    corpus_tree,
    counter,
    encoder_tree,
)
from hncse_ray.config import Settings, load_settings
from hncse_ray.errors import DataError, StorageError, counted

if TYPE_CHECKING:
    from hncse_ray.encoder import SentenceEncoder
    from hncse_ray.evaluation.saved_index import Hit, SavedIndex
    from hncse_ray.reporting import Reporter

logger = logging.getLogger("hncse_ray.search")

_LINES, _CHARACTERS = 4, 300  # of a text that the table shows

_OVERRIDE = re.compile(rf"(?:{'|'.join(Settings.model_fields)})\.[\w.]+=")


@app.command()
def search(
    model: ModelArgument,
    corpus: CorpusArgument,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="What to look for; none: asked for, line by line. And settings of the corpus, as section.key=value.",
            metavar="QUERY|KEY=VALUE",
        ),
    ] = None,
    compare: Annotated[str | None, typer.Option(help="Another model, shown beside the first.")] = None,
    top: Annotated[int, typer.Option(min=1, max=2**31 - 1, help="Texts shown for a query.")] = 3,
    limit: Annotated[int, typer.Option(min=1, max=2**31 - 1, help="Search a random sample of so many texts.")] = 5000,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "fp32",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show the texts of a corpus that are nearest to some queries by cosine, for one model or two side by side.

    Of a document the best passage is shown.
    Their vectors are kept in the cache folder: the second search of the same model and corpus begins at once.
    """

    def run(console: Console) -> dict[str, Any]:
        overrides = [word for word in words or () if _OVERRIDE.match(word)]
        queries = [word for word in words or () if not _OVERRIDE.match(word)]
        settings = load_settings(corpus_tree(corpus, model), overrides)
        _check(queries)
        from hncse_ray.encoder import choose_device, load_encoder

        where, options = choose_device(device), encoder_tree("auto", precision, revision, trust_remote_code)
        trees = {name: {"corpus": {"source": "python-docs"}, "encoder": {"model": name} | options}
                 for name in (compare, model) if name is not None}  # fmt: skip
        encoders = {name: load_encoder(name, load_settings(tree).encoder, device=where) for name, tree in trees.items()}
        with console_reporter(console) as reporter:
            texts = _Texts(settings, encoders[model], limit, reporter)
            searched = {name: _Searched(encoder, _index(encoder, options, texts)) for name, encoder in encoders.items()}
        if limit < (rows := searched[model].index.rows):
            logger.warning(f"searching {counted(limit, 'text')} of {rows:,}; --limit sets how many")
        found: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for asked in [queries] if queries else _asked(console):
            new = {query: {name: its[i] for name, its in _nearest(searched, asked, top).items()}
                   for i, query in enumerate(asked)}  # fmt: skip
            for query, by_model in new.items():
                console.print(_table(query, by_model))
            found |= {query: {name: list(map(_facts, hits)) for name, hits in by_model.items()}
                      for query, by_model in new.items()}  # fmt: skip
        return found

    command(run, as_json)


@dataclass(frozen=True)
class _Searched:
    """A model and what it searches."""

    encoder: SentenceEncoder
    index: SavedIndex


def _check(queries: Sequence[str]) -> None:
    from hncse_ray.reading import is_blank

    if blank := [number for number, query in enumerate(queries, start=1) if is_blank(query)]:
        raise DataError("is empty, or of characters that cannot be seen", f"query {blank[0]}", "Say what to look for")


class _Texts:
    """The texts of a corpus that are searched, read when they are first needed.

    Args:
        settings: of the corpus.
        encoder: whose tokens decide which texts are the same.
        limit: texts at most.
        reporter: told how far the work is.
    """

    def __init__(self, settings: Settings, encoder: SentenceEncoder, limit: int, reporter: Reporter) -> None:
        self.settings, self.limit, self.reporter = settings, limit, reporter
        self._encoder = encoder

    def digests(self) -> dict[str, str]:
        """What they depend on that may change under the same settings."""
        from hncse_ray.corpus.documents import document_files, reads_documents
        from hncse_ray.corpus.sources import source_identity

        corpus = self.settings.corpus
        # The identity is of contents alone, and a hit names its file.
        source = source_identity(corpus) + (json.dumps(document_files(corpus)) if reads_documents(corpus) else "")
        return {"corpus": hashlib.sha256(source.encode()).hexdigest(), "tokenizer": self._encoder.tokenizer_digest()}

    @cached_property
    def all(self) -> tuple[list[str], list[str] | None, int]:
        """Each once; what the document of each is called, where they are passages; and of how many rows they are."""
        import numpy as np

        from hncse_ray.corpus.documents import document_labels
        from hncse_ray.training.checks import prepare as prepare_corpus

        prepared = prepare_corpus(self.settings, self._encoder, self.reporter)
        chosen = np.random.default_rng(self.settings.run.seed).permutation(len(prepared))[: self.limit]
        texts = prepared.target_texts(chosen)  # of pairs what is looked for
        if not prepared.has_passages or prepared.documents is None:
            return list(dict.fromkeys(texts)), None, len(prepared)
        documents = prepared.documents[chosen].tolist()
        labels = document_labels(self.settings.corpus, documents)
        return texts, [labels[document] for document in documents], len(prepared)


def _index(encoder: SentenceEncoder, options: dict[str, Any], texts: _Texts) -> SavedIndex:
    """Return the index of a model over texts: the one that is kept, or a new one, which is then kept."""
    from hncse_ray.corpus.cache import cache_folder
    from hncse_ray.encoder.resolve import resolve_model
    from hncse_ray.evaluation import unit_rows
    from hncse_ray.evaluation.saved_index import Outdated, SavedIndex, folder_digest, read_index

    name, settings = encoder.name, texts.settings
    made_of = {"model": folder_digest(resolve_model(name, revision=options["revision"])), **texts.digests()}
    asked = [os.path.abspath(name) if os.path.exists(name) else name, options, settings.encoder.max_length,
             settings.corpus.model_dump(mode="json", exclude={"cache_dir", "num_processes"}),
             settings.run.seed, texts.limit]  # fmt: skip
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]
    folder = cache_folder(settings.corpus.cache_dir) / "search" / key
    try:
        if (kept := read_index(folder, made_of)) is not None:
            return kept
    except Outdated as reason:
        logger.warning("the index of %s is made anew: %s", name, reason)
    searched, documents, rows = texts.all
    progress = counter(texts.reporter, f"encoding {counted(len(searched), 'text')} with {name}")
    vectors = unit_rows(encoder.encode(searched, side="document", progress=progress))
    index = SavedIndex(searched, vectors, documents, rows)
    try:
        index.write(folder, made_of)
    except StorageError as error:
        logger.warning("the index of %s is not kept: %s", name, error)
    return index


def _nearest(searched: dict[str, _Searched], queries: Sequence[str], top: int) -> dict[str, list[list[Hit]]]:
    from hncse_ray.evaluation import unit_rows

    return {name: its.index.nearest(unit_rows(its.encoder.encode(queries, side="query")), top)
            for name, its in searched.items()}  # fmt: skip


def _asked(console: Console) -> Iterator[list[str]]:
    """Ask for queries, one a line, until there are no more or Ctrl-C ends it."""
    from hncse_ray.reading import is_blank

    talks = sys.stdin.isatty()
    try:
        while True:
            if talks:
                console.print("query (Ctrl-D ends): ", end="", style="bold", markup=False)
            if not (line := sys.stdin.readline()):
                break
            if not is_blank(line):
                yield [line.strip()]
    except KeyboardInterrupt:
        pass  # the usual way out of a prompt
    if talks:
        console.print()


def _facts(hit: Hit) -> dict[str, Any]:
    facts = {"text": hit.text, "cosine": round(hit.cosine, 4)}
    return facts if hit.document is None else facts | {"document": hit.document, "more_passages": hit.more_passages}


def _table(query: str, by_model: dict[str, list[Hit]]) -> Table:
    table = Table(title=escape(f"nearest to: {query}"), show_lines=True, expand=True)
    for name in by_model:
        table.add_column(escape(name), ratio=1)
    for row in zip(*by_model.values(), strict=True):
        table.add_row(*map(_shown, row))
    return table


def _shown(hit: Hit) -> Text:
    head = f"{hit.cosine:.3f}" if hit.document is None else f"{hit.cosine:.3f}  {hit.document}"
    more = f"  +{counted(hit.more_passages, 'more passage')}" if hit.more_passages else ""
    return Text.assemble((head, "bold"), (more, "dim"), "\n", _beginning(hit.text))


def _beginning(text: str) -> str:
    """The first lines of a text, cut at a word: a function may have hundreds, and a passage be one long line."""
    lines = text.splitlines()
    shown, more = "\n".join(lines[:_LINES]), len(lines) - _LINES
    if len(shown) > _CHARACTERS:
        words = re.sub(r"\s+\S{0,40}$", "", shown[: _CHARACTERS + 1])  # some scripts have no blanks between words
        shown = f"{words[:_CHARACTERS]}..."
    return f"{shown}\n... {counted(more, 'more line')}" if more > 0 else shown
