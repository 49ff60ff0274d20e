"""Mining by blocks, with the source in the process instead of the pool: columns, rules, interruption, refusals."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pair_tables import COLUMNS, make_pairs, write_pairs
from waits import seconds, soon

from hncse_ray.cluster import mining as mine_module
from hncse_ray.cluster.mining import _build, _check_out, _fingerprint, _mine_blocks, _Parts
from hncse_ray.config import Settings, load_settings
from hncse_ray.corpus import Corpus, prepare_corpus
from hncse_ray.encoder import SentenceEncoder, load_encoder
from hncse_ray.errors import ClusterError, StorageError
from hncse_ray.negatives import Hits, SourceUnavailable, plan_index
from hncse_ray.negatives.in_process import InProcessSource
from hncse_ray.training.shard import build_shard

Tree = dict[str, Any]
ROWS, BLOCK = 300, 64  # five blocks, the last of 44 rows


class Progress:
    def __init__(self) -> None:
        self.done: list[int] = []

    def on(self, event: Any) -> None:
        assert event.total == ROWS
        self.done.append(event.done)


class Source:
    """The real one; ``fails`` and ``incomplete`` count down the searches that go wrong."""

    def __init__(self, inner: InProcessSource) -> None:
        self.inner = inner
        self.searched: list[int] = []
        self.fails: dict[int, int] = {}
        self.incomplete: dict[int, int] = {}

    def search(self, row_ids: np.ndarray, *, k: int, **how: Any) -> Hits:
        first = int(row_ids[0])
        self.searched.append(first)
        if self.fails.get(first, 0) > 0:
            self.fails[first] -= 1
            raise SourceUnavailable("every shard is gone")
        hits = self.inner.search(row_ids, k=k, **how)
        if self.incomplete.get(first, 0) > 0:
            self.incomplete[first] -= 1
            return Hits(hits.ids_Bk[:, ::-1], hits.scores_Bk[:, ::-1], hits.version, complete=False)
        return hits


class World:
    """A corpus, its vectors, and an index of them."""

    def __init__(self, model: Path, text: Path, cache: Path, **columns: Any) -> None:
        self.tree: Tree = {
            "run": {"seed": 3},
            "corpus": {"path": str(text), "cache_dir": str(cache), **columns},
            "encoder": {"model": str(model), "pooling": "mean", "max_length": 24, "precision": "fp32"},
            "negatives": {"max_score": None, "candidates": 20},
        }
        settings = self.settings()
        self.encoder: SentenceEncoder = load_encoder(model, settings.encoder)
        self.corpus: Corpus = prepare_corpus(
            settings.corpus,
            tokenize=self.encoder.token_rows,
            tokenizer_digest=self.encoder.tokenizer_digest(),
            max_length=24,
        )
        plan = plan_index("flat", rows=ROWS, dimension=self.encoder.dimension, memory_bytes=None)
        shard = build_shard(settings.negatives, settings.encoder, self.corpus, plan=plan)
        self.inner = InProcessSource(shard, corpus_digest=self.corpus.digest, rows=ROWS)
        _build(self.inner, self.encoder, settings)
        version = self.inner.status().version
        assert version is not None and version.step == 0
        self.vectors = self.inner.vectors(np.arange(ROWS), version=version).astype(np.float64)
        self.texts = self.corpus.texts(range(ROWS))

    def settings(self, *changes: str) -> Settings:
        return load_settings(self.tree, [f"negatives.{change}" for change in changes])

    def parts(self, out: Path, settings: Settings) -> AbstractContextManager[_Parts]:
        return _Parts.claimed(out, _fingerprint(settings, self.encoder, self.corpus), self.corpus)

    def mine(self, out: Path, *changes: str, source: Source | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the facts, and the columns of the file."""
        settings = self.settings(*changes)
        with self.parts(out, settings) as parts:
            _mine_blocks(source or Source(self.inner), parts, settings, Progress())  # type: ignore[arg-type]
            facts = parts.finish(settings.negatives.per_anchor)
        return facts, pq.read_table(out).to_pydict()


@pytest.fixture(scope="module")
def world(tiny_model: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield World(tiny_model, corpus_file, tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mine_module, "_BLOCK_ROWS", BLOCK)
    monkeypatch.setattr(mine_module, "_RETRY_S", 0.005)


def cosines(world: World) -> np.ndarray:
    found = world.vectors @ world.vectors.T
    np.fill_diagonal(found, -2)
    return found


# ------------------------------------------------------------------------------------------------ what is in the file


def test_stopped_after_its_last_block_it_joins_the_blocks_and_encodes_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, out = world.settings(), tmp_path / "mined.parquet"
    with world.parts(out, settings) as parts:
        _mine_blocks(Source(world.inner), parts, settings, Progress())  # type: ignore[arg-type]
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr(mine_module, "ray_session", lambda: pytest.fail("Ray is started"))
    report = mine_module.mine(settings, out)
    assert pq.read_table(out).num_rows == report.rows == ROWS and not parts.folder.exists()


@pytest.mark.parametrize(
    ("m", "names"),
    [
        (1, ["anchor", "positive", "negative"]),
        (4, ["anchor", "positive", "negative_1", "negative_2", "negative_3", "negative_4"]),
    ],
)
def test_the_file_holds_the_nearest_rows_in_the_columns_of_sentence_transformers(
    world: World, tmp_path: Path, m: int, names: list[str]
) -> None:
    facts, columns = world.mine(tmp_path / "mined.parquet", f"per_anchor={m}")
    assert list(columns) == names
    assert columns["anchor"] == columns["positive"] == world.texts
    negatives = np.array([[world.texts.index(text) for text in columns[name]] for name in names[2:]]).T
    found = np.take_along_axis(cosines(world), negatives, 1)
    expected = np.sort(cosines(world), axis=1)[:, ::-1][:, :m]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (facts["rows"], facts["without"]) == (ROWS, 0)
    assert facts["mean_similarity"] == pytest.approx(expected.mean(), abs=1e-6)
    assert facts["removed"]["itself"] == ROWS and facts["removed"]["in_batch"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["mined.parquet"]


def test_negatives_obey_the_rules(world: World, tmp_path: Path) -> None:
    limit = float(np.quantile(cosines(world).max(axis=1), 0.3))
    changes = [f"max_score={limit}", "skip_hardest=2", "per_anchor=2", "candidates=40"]
    facts, columns = world.mine(tmp_path / "mined.parquet", *changes)
    anchors = np.array([world.texts.index(text) for text in columns["anchor"]])
    allowed = np.where(cosines(world) <= np.float32(limit), cosines(world), -2)[anchors]
    expected = np.sort(allowed, axis=1)[:, ::-1][:, 2:4]
    for n, name in enumerate(("negative_1", "negative_2")):
        ids = [world.texts.index(text) for text in columns[name]]
        np.testing.assert_allclose(allowed[np.arange(len(ids)), ids], expected[:, n], atol=1e-6)
    assert facts["removed"]["max_score"] > 0 and facts["removed"]["skip_hardest"] > 0
    assert len(anchors) == facts["rows"] > 100


def test_the_margin_is_measured_from_the_sentence_itself(world: World, tmp_path: Path) -> None:
    limit = float(np.quantile(cosines(world).max(axis=1), 0.3))
    by_margin = world.mine(tmp_path / "a.parquet", f"relative_margin={1 - limit}", "per_anchor=2")[1]
    by_score = world.mine(tmp_path / "b.parquet", f"max_score={limit}", "per_anchor=2")[1]
    assert by_margin == by_score


def test_rows_without_enough_negatives_are_left_out_and_counted(world: World, tmp_path: Path) -> None:
    tenth = np.sort(cosines(world), axis=1)[:, -10]  # of 12 neighbours looked up, 3 to score at most the limit
    limit = float(np.median(tenth))
    facts, columns = world.mine(tmp_path / "mined.parquet", "per_anchor=3", "candidates=12", f"max_score={limit}")
    kept = {text for text, score in zip(world.texts, tenth, strict=True) if score <= limit}
    assert set(columns["anchor"]) == kept and 100 < len(kept) < 200
    assert (facts["rows"], facts["without"]) == (len(kept), ROWS - len(kept))
    assert columns["anchor"] == [text for text in world.texts if text in kept]  # in the order of the corpus
    assert all(text for name in columns for text in columns[name])


def test_a_corpus_where_nothing_is_left_makes_an_empty_file(world: World, tmp_path: Path) -> None:
    facts, columns = world.mine(tmp_path / "mined.parquet", "max_score=-0.99")
    assert (facts["rows"], facts["without"], facts["mean_similarity"]) == (0, ROWS, 0)
    assert columns == {"anchor": [], "positive": [], "negative": []}


def test_random_choices_hang_on_the_seed_alone(world: World, tmp_path: Path) -> None:
    changes = ["sampling=uniform", "per_anchor=2"]
    first, second = (world.mine(tmp_path / f"{name}.parquet", *changes)[1] for name in "ab")
    top = world.mine(tmp_path / "top.parquet", "per_anchor=2")[1]
    assert first == second != top


# ------------------------------------------------------------------------------------------------ interruption


def test_an_interrupted_run_goes_on_where_it_stopped_and_makes_the_same_file(world: World, tmp_path: Path) -> None:
    changes = ["sampling=uniform", "per_anchor=2", "build_timeout_s=0.05"]
    whole_facts, whole = world.mine(tmp_path / "whole.parquet", *changes)
    source = Source(world.inner)
    source.fails = {128: 1_000_000}
    out = tmp_path / "mined.parquet"
    with pytest.raises(ClusterError, match="every shard is gone.*goes on where it stopped"):
        world.mine(out, *changes, source=source)
    assert not out.exists()
    with world.parts(out, world.settings(*changes)) as parts:
        left = parts.blocks()
    assert 128 in left and 1 <= len(left) < 5
    again = Source(world.inner)
    facts, columns = world.mine(out, *changes, source=again)
    assert sorted(again.searched) == left
    assert columns == whole and facts == whole_facts
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole.parquet", "mined.parquet"}


def test_a_block_counts_only_when_its_facts_are_there(world: World, tmp_path: Path) -> None:
    settings, out = world.settings(), tmp_path / "mined.parquet"
    with world.parts(out, settings) as parts:
        _mine_blocks(Source(world.inner), parts, settings, Progress())  # type: ignore[arg-type]
        assert parts.blocks() == []
        parts._facts(64).unlink()
        parts._table(64).write_bytes(b"half a table")
    source = Source(world.inner)
    _, columns = world.mine(out, source=source)
    assert source.searched == [64]
    assert columns == world.mine(tmp_path / "other.parquet")[1]


def test_progress_counts_what_was_done_before(world: World, tmp_path: Path) -> None:
    settings, progress = world.settings(), Progress()
    with world.parts(tmp_path / "mined.parquet", settings) as parts:
        _mine_blocks(Source(world.inner), parts, settings, progress)  # type: ignore[arg-type]
        assert progress.done == sorted(progress.done) and progress.done[-1] == ROWS
        parts._facts(256).unlink()  # 44 rows
        progress = Progress()
        _mine_blocks(Source(world.inner), parts, settings, progress)  # type: ignore[arg-type]
        assert progress.done == [ROWS]


@pytest.mark.parametrize(
    "change", ["per_anchor=2", "candidates=21", "max_score=0.9", "sampling=uniform", "skip_hardest=1"]
)
def test_the_parts_of_another_job_are_refused(world: World, tmp_path: Path, change: str) -> None:
    out = tmp_path / "mined.parquet"
    for changes in ((), ("timeout_s=3", "encode_batch_size=5")):  # these change nothing of the outcome
        with world.parts(out, world.settings(*changes)):
            pass
    refused = pytest.raises(StorageError, match="another model, corpus or selection.*--out")
    with refused, world.parts(out, world.settings(change)):
        pass


@pytest.mark.parametrize(
    ("section", "change"), [("encoder", {"pooling": "cls"}), ("corpus", {"repel_within_document": True})]
)
def test_so_are_those_of_other_vectors_or_other_limits(
    world: World, tmp_path: Path, section: str, change: dict[str, Any]
) -> None:
    """The weights, and the prepared corpus, are the same."""
    out, tree = tmp_path / "mined.parquet", world.tree | {"corpus": world.tree["corpus"] | {"document_column": "d"}}
    other = load_settings(tree | {section: tree[section] | change})
    with world.parts(out, load_settings(tree)):
        pass
    with pytest.raises(StorageError, match="another model"), world.parts(out, other):
        pass


def test_one_command_at_a_time_makes_a_file(world: World, tmp_path: Path) -> None:
    """Two would write the same blocks, and the first to end would take the other's away."""
    out = tmp_path / "mined.parquet"
    with world.parts(out, world.settings()):
        with pytest.raises(StorageError, match=r"\.mined\.parquet\.parts: is in use by another process.*--out"):
            world.mine(out)
        assert not out.exists()
    facts, columns = world.mine(out)
    assert facts["rows"] == len(columns["anchor"]) > 0
    with pytest.raises(StorageError, match="exists already"):  # made while this one was prepared
        world.mine(out)


def test_the_parts_of_another_model_are_refused(world: World, tmp_path: Path) -> None:
    out = tmp_path / "mined.parquet"
    with world.parts(out, world.settings()):
        pass
    other = load_encoder(world.tree["encoder"]["model"], world.settings().encoder)
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1e-3
    fingerprint = _fingerprint(world.settings(), other, world.corpus)
    with pytest.raises(StorageError, match="another model"), _Parts.claimed(out, fingerprint, world.corpus):
        pass


# ------------------------------------------------------------------------------------------------ a source in trouble


def test_a_shard_that_comes_back_is_waited_for_and_half_answers_are_not_used(world: World, tmp_path: Path) -> None:
    expected = world.mine(tmp_path / "expected.parquet")
    source = Source(world.inner)
    source.fails, source.incomplete = {0: 3, 192: 1}, {64: 2, 192: 2}
    assert world.mine(tmp_path / "mined.parquet", source=source) == expected
    assert [source.searched.count(first) for first in range(0, ROWS, BLOCK)] == [4, 3, 1, 4, 1]


def test_a_command_that_ends_does_not_wait_for_a_shard_that_is_lost(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mine_module, "_RETRY_S", 3600)
    source = Source(world.inner)
    source.fails = {64: 1_000_000}

    def save(parts: _Parts, first: int, *what: Any) -> None:
        soon(lambda: 64 in source.searched, within_s=60, what="the search that waits")
        raise StorageError("is full", "disk")

    monkeypatch.setattr(_Parts, "save", save)
    with pytest.raises(StorageError, match="is full"):
        world.mine(tmp_path / "mined.parquet", source=source)
    assert source.searched.count(64) <= 2


def test_a_source_that_stays_incomplete_ends_the_run(world: World, tmp_path: Path) -> None:
    source = Source(world.inner)
    source.incomplete = {64: 1_000_000}
    started = time.monotonic()
    with pytest.raises(ClusterError, match="a shard is being brought back"):
        world.mine(tmp_path / "mined.parquet", "build_timeout_s=0.05", source=source)
    assert time.monotonic() - started < seconds(20)


def test_an_index_that_cannot_be_made_is_said(world: World) -> None:
    class Broken:
        def publish(self, weights: Any, *, step: int, key: str) -> bool:
            return True

        def wait(self, timeout_s: float) -> None: ...

        def status(self) -> Any:
            return InProcessSource(None, corpus_digest="", rows=0).status()  # type: ignore[arg-type]

    with pytest.raises(ClusterError, match="it took too long.*build_timeout_s"):
        _build(Broken(), world.encoder, world.settings())  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ the file


def test_a_file_that_is_there_or_cannot_be_is_refused(tmp_path: Path) -> None:
    _check_out(tmp_path / "mined.parquet")
    (tmp_path / "there.parquet").touch()
    for out, message in (
        (tmp_path / "there.parquet", "exists already"),
        (tmp_path / "mined.csv", r"name a \.parquet file"),
        (tmp_path / "nowhere" / "mined.parquet", "in an existing folder"),
    ):
        with pytest.raises(StorageError, match=message):
            _check_out(out)


@pytest.mark.parametrize("m", [1, 3])
def test_sentence_transformers_takes_the_columns_as_they_are(
    world: World, tmp_path: Path, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    datasets = pytest.importorskip("datasets")
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    world.mine(tmp_path / "mined.parquet", f"per_anchor={m}")
    data = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "mined.parquet"), cache_dir=str(tmp_path / "hf"), split="train"
    )
    assert len(data) == ROWS and len(data.column_names) == 2 + m
    modules = st.models if hasattr(st, "models") else st.sentence_transformer.modules
    transformer = modules.Transformer(world.tree["encoder"]["model"])
    model = st.SentenceTransformer(modules=[transformer, modules.Pooling(32)], device="cpu")
    batch = data[:6]
    features = [
        model.preprocess(batch[name]) if hasattr(model, "preprocess") else model.tokenize(batch[name])
        for name in data.column_names
    ]
    loss = MultipleNegativesRankingLoss(model)(features, labels=None)
    loss.backward()
    assert torch.isfinite(loss) and loss > 0
    # Its logits are the cosines of each anchor with all positives and all negatives, and the label is the diagonal.
    model.eval()
    z = [torch.nn.functional.normalize(model(f)["sentence_embedding"], dim=-1) for f in features]
    logits = 20 * z[0] @ torch.cat(z[1:]).T
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(6))
    assert MultipleNegativesRankingLoss(model)(features, labels=None).item() == pytest.approx(expected.item(), rel=1e-4)


# ------------------------------------------------------------------------------------------------ pairs


def test_pairs_are_mined_with_their_positives(tiny_model: Path, tmp_path: Path) -> None:
    rows = make_pairs(ROWS)
    world = World(tiny_model, write_pairs(tmp_path / "pairs.jsonl", rows), tmp_path / "cache", **COLUMNS)
    every = ("per_anchor=2", f"candidates={ROWS - 1}")
    facts, columns = world.mine(tmp_path / "mined.parquet", *every)
    assert list(columns) == ["anchor", "positive", "negative_1", "negative_2"] and facts["rows"] == ROWS
    margin = world.mine(tmp_path / "margin.parquet", *every, "relative_margin=0.1")[1]
    limits, by_text = {}, {}
    targets = [row["answer"] or row["question"] for row in rows]
    questions = world.encoder.encode([row["question"] for row in rows], batch_size=1).astype(np.float64)
    questions /= np.linalg.norm(questions, axis=1, keepdims=True)
    assert columns["anchor"] == [row["question"] for row in rows] and columns["positive"] == targets
    assert facts["removed"]["same_document"] > 0 and facts["removed"]["same_content"] > 0
    for i, row in enumerate(rows):
        held = {row["question"], targets[i]}
        allowed = np.array([
            held.isdisjoint({other["question"], target})
            and (row["document"] is None or other["document"] != row["document"])
            for other, target in zip(rows, targets, strict=True)
        ])  # fmt: skip
        scores = world.vectors @ questions[i]
        nearest = np.sort(np.where(allowed, scores, -2))[::-1][:2]
        chosen = [columns[name][i] for name in ("negative_1", "negative_2")]
        found = [max(scores[[t == text for t in targets]]) for text in chosen]
        np.testing.assert_allclose(found, nearest, atol=1e-6)
        limits[row["question"], targets[i]] = 0.9 * scores[i]
        by_text |= {(row["question"], target): score for target, score in zip(targets, scores, strict=True)}
    assert 100 < len(margin["anchor"]) < ROWS
    for anchor, positive, *negatives in zip(*margin.values(), strict=True):
        assert all(by_text[anchor, text] <= limits[anchor, positive] + 1e-6 for text in negatives)
