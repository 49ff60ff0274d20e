"""The sets of a run: how they are found, what is said when they are not, and how they are scored."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from tiny import make_collection, make_sentences

from hncse_ray.config import CorpusSettings, EncoderSettings, EvaluationSettings
from hncse_ray.encoder import SentenceEncoder, load_encoder
from hncse_ray.errors import DataError
from hncse_ray.evaluation import evaluate_retrieval, paired_set, read_collection, read_pairs
from hncse_ray.training import EvaluationSets, load_evaluation_sets
from hncse_ray.training.encoding import ShardedEncode

PAIRS = ("recall@1", "recall@10", "mrr", "ndcg@10")
CORPUS = CorpusSettings(source="text", path=("unused.txt",))


@pytest.fixture
def encoder(tiny_model: Path) -> SentenceEncoder:
    return load_encoder(tiny_model, EncoderSettings(model=str(tiny_model), pooling="mean"))


@pytest.fixture
def senteval(tmp_path: Path) -> Path:
    """STS-Benchmark as SentEval lays it out, 12 pairs in dev and 8 in test."""
    folder = tmp_path / "senteval" / "STS" / "STSBenchmark"
    folder.mkdir(parents=True)
    sentences = make_sentences(60, seed=4)
    for split, count in (("train", 4), ("dev", 12), ("test", 8)):
        rows = [
            f"main-captions\tMSRvid\t2012test\t{i:04}\t{i * 5 / count:.2f}\t{sentences[2 * i]}\t{sentences[2 * i + 1]}"
            for i in range(count)
        ]
        (folder / f"sts-{split}.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return tmp_path / "senteval"


def load(**settings: object) -> EvaluationSets:
    return load_evaluation_sets(EvaluationSettings.model_validate(settings), CORPUS)


def load_pairs(dev: Path, test: Path | None = None) -> EvaluationSets:
    return load(suites="pairs", metric="pairs/mrr", pairs_dev=str(dev), pairs_test=None if test is None else str(test))


def failure(**settings: object) -> DataError:
    with pytest.raises(DataError) as caught:
        load(**settings)
    return caught.value


def test_pairs_are_scored_as_retrieval(pairs_file: Path, encoder: SentenceEncoder, tmp_path: Path) -> None:
    test_file = tmp_path / "test.jsonl"
    rows = [{"query": s, "answer": t} for s, t in zip(make_sentences(9, 1), make_sentences(9, 2), strict=True)]
    test_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = load_pairs(pairs_file, test_file)
    for split, path in (("dev", pairs_file), ("test", test_file)):
        expected = evaluate_retrieval(encoder.encode, paired_set(*read_pairs(path)))
        scores = sets.score(encoder.encode, split)
        assert list(scores) == [f"pairs/{name}" for name in PAIRS]
        assert scores == {f"pairs/{name}": expected[name] for name in PAIRS}


def test_without_a_test_file_the_test_split_has_no_scores(pairs_file: Path, encoder: SentenceEncoder) -> None:
    assert load_pairs(pairs_file).score(encoder.encode, "test") == {}


def test_stsb_is_read_from_the_folder_of_the_settings(senteval: Path, encoder: SentenceEncoder) -> None:
    sets = load(senteval_path=str(senteval))
    dev, test = (sets.score(encoder.encode, split) for split in ("dev", "test"))
    assert list(dev) == list(test) == ["stsb/spearman"]
    assert -100 <= dev["stsb/spearman"] <= 100 and dev != test


def test_stsb_is_read_from_the_folder_of_the_environment(senteval: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HNCSE_DATA", str(senteval.parent))
    assert load().sets == load(senteval_path=str(senteval)).sets


def test_the_setting_wins_over_the_environment(senteval: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HNCSE_DATA", "/nowhere")
    assert load(senteval_path=str(senteval)).sets


def test_several_suites_are_scored_side_by_side(senteval: Path, pairs_file: Path, encoder: SentenceEncoder) -> None:
    sets = load(suites=["stsb", "pairs"], senteval_path=str(senteval), pairs_dev=str(pairs_file))
    assert list(sets.score(encoder.encode, "dev")) == [
        "stsb/spearman", *(f"pairs/{name}" for name in PAIRS),
    ]  # fmt: skip
    assert list(sets.score(encoder.encode, "test")) == ["stsb/spearman"]


COLLECTION = ("ndcg@10", "mrr@10", "recall@100")


def load_collections(*folders: Path, **settings: object) -> EvaluationSets:
    names = [str(folder) for folder in folders]
    return load(suites="retrieval", metric="retrieval/ndcg@10", collection=names, **settings)


def test_a_collection_is_scored(encoder: SentenceEncoder, tmp_path: Path) -> None:
    folder = make_collection(tmp_path / "tiny")
    sets = load_collections(folder)
    for split, data in read_collection(folder, ("dev", "test")).items():
        expected = evaluate_retrieval(encoder.encode, data)
        assert sets.score(encoder.encode, split) == {f"retrieval/{name}": expected[name] for name in COLLECTION}
    assert not load_collections(folder, test=False).score(encoder.encode, "test")


def test_several_collections_are_scored_by_name_and_by_their_mean(encoder: SentenceEncoder, tmp_path: Path) -> None:
    one, two = make_collection(tmp_path / "one"), make_collection(tmp_path / "two", seed=5)
    scores = load_collections(one, two).score(encoder.encode, "test")
    assert set(scores) == {
        f"{of}/{name}" for of in ("retrieval", "retrieval/one", "retrieval/two") for name in COLLECTION
    }
    for name in COLLECTION:
        mean = (scores[f"retrieval/one/{name}"] + scores[f"retrieval/two/{name}"]) / 2
        assert scores[f"retrieval/{name}"] == pytest.approx(mean)
    assert scores["retrieval/one/ndcg@10"] != scores["retrieval/two/ndcg@10"]


def test_collections_of_one_name_are_refused(tmp_path: Path) -> None:
    one, two = make_collection(tmp_path / "a" / "same"), make_collection(tmp_path / "b" / "same")
    with pytest.raises(DataError, match="two collections are called 'same'"):
        load_collections(one, two)


def test_a_run_needs_something_to_choose_by(tmp_path: Path) -> None:
    folder = make_collection(tmp_path / "tiny", splits=("test",))
    with pytest.raises(DataError, match=r"has no qrels/dev\.tsv, which chooses"):
        load_collections(folder)


def test_two_encoders_are_compared_on_test_or_else_on_dev(pairs_file: Path, encoder: SentenceEncoder) -> None:
    for sets, split in ((load_pairs(pairs_file), "dev"), (load_pairs(pairs_file, pairs_file), "test")):
        found = sets.compare(encoder.encode, lambda texts: -encoder.encode(texts)[:, ::2], "pairs")
        assert {d.name: d.first for d in found} == pytest.approx(sets.score(encoder.encode, split))


def test_two_encoders_are_compared_on_stsb(senteval: Path, encoder: SentenceEncoder) -> None:
    sets = load(senteval_path=str(senteval))
    (d,) = sets.compare(encoder.encode, lambda texts: encoder.encode(texts)[:, ::2], "stsb")
    assert d.name == "stsb/spearman" and d.first == pytest.approx(sets.score(encoder.encode, "test")[d.name])


def test_no_suites_give_no_scores(encoder: SentenceEncoder) -> None:
    assert load(suites=[]).score(encoder.encode, "dev") == {}


def test_sets_travel_to_the_workers(pairs_file: Path) -> None:
    sets = load_pairs(pairs_file)
    assert pickle.loads(pickle.dumps(sets)) == sets


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_sharded_encoding_gives_the_vectors_and_scores_of_the_encoder(
    senteval: Path, pairs_file: Path, encoder: SentenceEncoder, batch_size: int
) -> None:
    sharded = ShardedEncode(encoder, batch_size)
    texts = make_sentences(23, seed=9)
    np.testing.assert_array_equal(sharded(texts), encoder.encode(texts, batch_size=batch_size))
    sets = load(suites=["stsb", "pairs"], senteval_path=str(senteval), pairs_dev=str(pairs_file))
    assert sets.score(sharded, "dev") == pytest.approx(sets.score(encoder.encode, "dev"), abs=1e-3)


def test_scoring_leaves_training_mode_on(pairs_file: Path, encoder: SentenceEncoder) -> None:
    encoder.train()
    sets = load_pairs(pairs_file)
    sharded = ShardedEncode(encoder, 16)
    assert sets.score(sharded, "dev") == sets.score(sharded, "dev")
    assert encoder.training


class TestMissingData:
    def test_nothing_names_the_senteval_folder(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.delenv("HNCSE_DATA", raising=False)
        monkeypatch.setenv("HNCSE_CACHE", str(tmp_path))
        error = failure()
        assert "evaluation.senteval_path" in str(error) and "$HNCSE_DATA" in str(error)
        assert "hncse data sts" in error.hint

    def test_what_was_fetched_is_found_where_nothing_else_is(
        self, senteval: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("HNCSE_CACHE", str(senteval.parent))
        for data in (None, str(tmp_path / "without")):
            monkeypatch.delenv("HNCSE_DATA", raising=False)
            if data is not None:
                monkeypatch.setenv("HNCSE_DATA", data)
            assert load().sets == load(senteval_path=str(senteval)).sets

    def test_the_folder_is_not_there(self, tmp_path: Path) -> None:
        error = failure(senteval_path=str(tmp_path / "none"))
        assert str(tmp_path / "none") in str(error) and "evaluation.senteval_path" in error.hint

    def test_the_folder_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        assert str(tmp_path / "file") in str(failure(senteval_path=str(tmp_path / "file")))

    def test_the_folder_lacks_the_set(self, tmp_path: Path) -> None:
        error = failure(senteval_path=str(tmp_path))
        assert "STSBenchmark" in str(error) and error.hint

    def test_the_folder_lacks_a_split(self, senteval: Path) -> None:
        (senteval / "STS/STSBenchmark/sts-test.csv").unlink()
        error = failure(senteval_path=str(senteval))
        assert "sts-test.csv" in str(error) and error.hint

    @pytest.mark.parametrize("which", ["pairs_dev", "pairs_test"])
    def test_a_pairs_file_is_not_there(self, pairs_file: Path, tmp_path: Path, which: str) -> None:
        files = {"pairs_dev": str(pairs_file), "pairs_test": str(pairs_file)} | {which: str(tmp_path / "none.tsv")}
        error = failure(suites="pairs", metric="pairs/mrr", **files)
        assert str(tmp_path / "none.tsv") in str(error)

    def test_a_broken_pairs_file_names_the_line(self, tmp_path: Path) -> None:
        (tmp_path / "pairs.tsv").write_text("one\ttwo\nonly one\n")
        error = failure(suites="pairs", metric="pairs/mrr", pairs_dev=str(tmp_path / "pairs.tsv"))
        assert "pairs.tsv:2" in str(error) and error.hint


def test_functions_are_found_by_their_summaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, verbs in (("one_package", ("count", "sort")), ("two_package", ("merge", "split", "join"))):
        (tmp_path / f"{package}.py").write_text(
            "".join(f'def {v}(x):\n    """{v.title()} all the rows of a table."""\n    return x.{v}()\n' for v in verbs)
        )
    monkeypatch.syspath_prepend(tmp_path)
    corpus = CorpusSettings(source="python-code", cache_dir=str(tmp_path))
    chosen = {
        "suites": "python-code",
        "metric": "python-code/mrr",
        "code_dev": "one_package",
        "code_test": "two_package",
    }
    sets = load_evaluation_sets(EvaluationSettings.model_validate(chosen), corpus).sets
    dev, test = sets["python-code", "dev"], sets["python-code", "test"]
    assert dev.queries == ("Count all the rows of a table.", "Sort all the rows of a table.")
    assert dev.candidates == ("def count(x):\n    return x.count()", "def sort(x):\n    return x.sort()")
    assert len(test.candidates) == 3 and dev.sides and dev.grades == ({0: 1}, {1: 1})
    alone = EvaluationSettings.model_validate(chosen | {"test": False, "code_pairs": 2})
    assert list(load_evaluation_sets(alone, corpus).sets) == [("python-code", "dev")]
