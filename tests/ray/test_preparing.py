"""A corpus prepared by Ray Data on a real Ray: the bytes of one process, and nothing left, however it ends."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from invoke import assert_refused, hncse
from pool_faults import actors
from tiny import make_sentences
from waits import soon
from web import Web, serve

from hncse_ray.cluster.preparing import ClusterRows
from hncse_ray.config import load_settings
from hncse_ray.corpus import Corpus, prepare_corpus
from hncse_ray.encoder import load_encoder

pytestmark = pytest.mark.timeout(600)
WORKER = "MapWorker"


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        yield
        ray.shutdown()


def nothing_is_left(cache: Path) -> bool:
    soon(lambda: not actors(WORKER), within_s=20, what="end of the workers")
    return not list((cache / "corpora").glob(".tmp-*"))


def contents(corpus: Corpus) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in corpus.path.iterdir() if file.name != "corpus.json"}


def test_a_worker_that_is_killed_is_replaced_and_the_corpus_by_url_is_that_of_files_in_one_process(
    tiny_model: Path, tmp_path: Path
) -> None:
    parts = 12
    server = Web()
    for number in range(parts):  # each has rows of those before
        sentences = make_sentences(2000, seed=number // 2)
        text = "\n".join([*sentences, f"number {number}", "", "\ufffd"])
        (tmp_path / f"{number:02d}.txt").write_text(text)
        server.files[f"/{number:02d}.txt"] = text.encode()
    settings = load_settings({
        "corpus": {"path": f"{tmp_path}/*.txt"},
        "encoder": {"model": str(tiny_model), "pooling": "mean", "max_length": 24},
    })  # fmt: skip
    encoder = load_encoder(str(tiny_model), settings.encoder)
    killed: list[int] = []

    def kill_one(stage: str, rows: int, total: int | None) -> None:
        if not killed and (found := actors(WORKER)):
            assert rows < 2000 * (parts - 4)  # this one has work, and there is more
            killed.append(found[0].pid)
            found[0].kill()

    with serve(server):
        urls = tuple(server.url + name for name in server.files)
        made = [
            prepare_corpus(
                settings.corpus.model_copy(update={"cache_dir": str(tmp_path / name), "path": path}),
                tokenize=encoder.token_rows,
                tokenizer_digest=encoder.tokenizer_digest(),
                max_length=24,
                write_rows=write_rows,
                progress=progress,
            )
            for name, path, write_rows, progress in (
                ("one", settings.corpus.path, None, None),
                ("two", urls, ClusterRows(2, settings.encoder), kill_one),
            )
        ]
    assert killed and contents(made[0]) == contents(made[1])
    assert made[0].report.dropped == made[1].report.dropped and made[0].report.dropped["duplicate"] > 2000
    assert nothing_is_left(tmp_path / "two") and ray.is_initialized()


def test_what_a_worker_finds_wrong_is_told_in_one_message(tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"sentence": "a text of some words"}\n')
    settings = (f"corpus.path={source}", f"corpus.cache_dir={tmp_path}/cache", f"encoder.model={tiny_model}")
    result = hncse("prepare", "quickstart", "corpus.source=auto", *settings, "encoder.pooling=mean", "--workers", "2")
    assert_refused(result, f"{source}: has no column 'text', on node", "It has: sentence")
    assert nothing_is_left(tmp_path / "cache")
