"""The corpus on another node: opened where it is seen, prepared once where it is not, compared in any case."""

from __future__ import annotations

import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from hncse_ray.cluster.node_corpus import NodeCorpus
from hncse_ray.config import Settings, load_settings
from hncse_ray.corpus import Corpus, prepare_corpus
from hncse_ray.encoder import load_encoder
from hncse_ray.errors import DataError


@pytest.fixture
def chosen(tiny_model: Path, corpus_file: Path, tmp_path: Path) -> Settings:
    source = shutil.copy(corpus_file, tmp_path / "sentences.txt")
    tree = {
        "corpus": {"path": str(source), "cache_dir": str(tmp_path / "driver")},
        "encoder": {"model": str(tiny_model), "pooling": "mean", "max_length": 24},
    }
    return load_settings(tree)


@pytest.fixture
def corpus(chosen: Settings) -> Corpus:
    encoder = load_encoder(chosen.encoder.model, chosen.encoder)
    return prepare_corpus(
        chosen.corpus, tokenize=encoder.token_rows, tokenizer_digest=encoder.tokenizer_digest(), max_length=24
    )


def elsewhere(corpus: Corpus, settings: Settings, cache: Path) -> NodeCorpus:
    """What a node opens that sees neither the driver's cache nor has the corpus in its own."""
    here = NodeCorpus.of(corpus, settings)
    return replace(here, path=str(cache / "none"), settings=here.settings.model_copy(update={"cache_dir": str(cache)}))


def test_where_it_is_seen_it_is_opened(corpus: Corpus, chosen: Settings) -> None:
    assert NodeCorpus.of(corpus, chosen).open().path == corpus.path


def test_where_it_is_not_it_is_prepared_once_and_is_the_same(corpus: Corpus, chosen: Settings, tmp_path: Path) -> None:
    node = elsewhere(corpus, chosen, tmp_path / "node")
    with ThreadPoolExecutor(3) as threads:
        opened = list(threads.map(lambda _: node.open(), range(3)))
    assert {found.path for found in opened} == {tmp_path / "node/corpora" / corpus.digest}
    assert len(list((tmp_path / "node/corpora").glob("[!.]*"))) == 1
    assert opened[0].texts(range(5)) == corpus.texts(range(5)) and len(opened[0]) == len(corpus)


def test_another_one_is_refused_and_the_node_is_named(corpus: Corpus, chosen: Settings, tmp_path: Path) -> None:
    with (tmp_path / "sentences.txt").open("a") as file:
        file.write("a sentence that the driver has not seen\n")
    with pytest.raises(DataError) as caught:
        elsewhere(corpus, chosen, tmp_path / "node").open()
    assert f"another one on node {socket.gethostname()}" in str(caught.value) and corpus.digest[:12] in str(
        caught.value
    )


def test_a_source_that_is_not_there_is_named_with_the_node(corpus: Corpus, chosen: Settings, tmp_path: Path) -> None:
    (tmp_path / "sentences.txt").unlink()
    with pytest.raises(DataError) as caught:
        elsewhere(corpus, chosen, tmp_path / "node").open()
    assert "sentences.txt" in str(caught.value) and socket.gethostname() in str(caught.value)
    assert "mount" in caught.value.hint
