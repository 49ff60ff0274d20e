"""An exported model in mteb, unchanged: its score of pairs is the one found here. Runs where mteb is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import make_sentences

from hncse_ray.config import EncoderSettings
from hncse_ray.encoder import load_encoder
from hncse_ray.evaluation import StsPair, StsPairs, spearman

mteb = pytest.importorskip("mteb", reason="mteb is not installed (the extra of that name)")

SENTENCES = make_sentences(60, seed=12)
PAIRS = [(SENTENCES[2 * i], SENTENCES[2 * i + 1], i % 6) for i in range(30)]


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    load_encoder(tiny_model, EncoderSettings(model=str(tiny_model), pooling="mean")).save(folder, readme="# A model\n")
    return folder


def test_pairs_get_the_score_that_they_get_here(model: Path) -> None:
    import datasets
    from mteb.mocks import MockSTSTask
    from sentence_transformers import SentenceTransformer

    class OwnPairs(MockSTSTask):
        min_score, max_score = 0, 5

        def load_data(self, **kwargs: object) -> None:
            first, second, gold = zip(*PAIRS, strict=True)
            columns = {"sentence1": list(first), "sentence2": list(second), "score": [float(g) for g in gold]}
            self.dataset = datasets.DatasetDict({"test": datasets.Dataset.from_dict(columns)})
            self.data_loaded = True

    transformer = SentenceTransformer(str(model), device="cpu")
    results = mteb.evaluate(transformer, tasks=[OwnPairs()], cache=None)
    theirs = results.task_results[0].scores["test"][0]["cosine_spearman"]
    pairs = StsPairs("own", tuple(StsPair(*pair) for pair in PAIRS))
    assert 100 * theirs == pytest.approx(spearman(load_encoder(model).encode, pairs), abs=1e-6)


def test_it_takes_part_in_mteb_s_own_trial_tasks(model: Path) -> None:
    from mteb.mocks import MockClassificationTask, MockRetrievalTask, MockSTSTask
    from sentence_transformers import SentenceTransformer

    tasks = [MockSTSTask(), MockRetrievalTask(), MockClassificationTask()]
    results = mteb.evaluate(SentenceTransformer(str(model), device="cpu"), tasks=tasks, cache=None)
    assert len(results.task_results) == len(tasks) and not results.exceptions
