"""What a run keeps to be looked at: whose neighbours, which cosines, what became of each hit; also after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from negative_runs import Stopped, carry_out, fresh_encoder, negatives_settings, prepared
from tiny import make_collection

from hncse_ray.encoder import load_encoder
from hncse_ray.evaluation import encode_unit, paired_set
from hncse_ray.negatives import FATES, SourceUnavailable
from hncse_ray.reporting import Event, RunStarted
from hncse_ray.reporting.events import Sampled, StepsLogged
from hncse_ray.reporting.reporters import SamplesFile
from hncse_ray.training import EvaluationSets, load_evaluation_sets
from hncse_ray.training.evaluator import Measured
from hncse_ray.training.objective import Neighbours
from hncse_ray.training.sample import Sample, shortened, similarities
from hncse_ray.training.step import Seen

Tree = dict[str, Any]
METRIC = "retrieval/ndcg@10"


def kept(run: Any) -> dict[str, list[Sampled]]:
    found: dict[str, list[Sampled]] = {}
    for event in run.events:
        if isinstance(event, Sampled):
            found.setdefault(event.kind, []).append(event)
    return found


class Rising(EvaluationSets):
    """Real sets by which each step is better than the one before, whatever the tiny model does."""

    def measure(self, encode: object, split: str, metric: str = "") -> Measured:
        object.__setattr__(self, "asked", getattr(self, "asked", 0) + 1)
        return Measured({METRIC: self.asked / 100}, {})


def test_a_long_text_is_cut_after_a_word() -> None:
    assert shortened("two  lines\nhere") == "two lines here"
    words = "magnetohydrodynamics " * 30
    cut = shortened(words)
    assert len(cut) <= 300 and cut.endswith(" magnetohydrodynamics…")
    assert shortened("字" * 400) == "字" * 299 + "…"  # a script without spaces


def test_neighbours_are_those_of_the_base_and_of_what_is_exported(tree: Tree, tmp_path: Path) -> None:
    collection = make_collection(tmp_path / "collection")
    changes = ["evaluation.suites=[retrieval]", f"evaluation.collection=[{collection}]", "train.max_steps=10"]
    changes += [
        f"evaluation.metric={METRIC}",
        "train.learning_rate=3e-3",
        "export.merge=1",
        "export.whiten=none",
    ]
    settings = negatives_settings(tree, *changes)
    sets = Rising(load_evaluation_sets(settings.evaluation, settings.corpus).sets)
    run = carry_out(settings, tmp_path / "run", sets=sets)
    found = kept(run)
    (event,) = found["sentences"]
    texts, facts = event.facts["texts"], event.facts
    assert event.step == 10
    exported = load_encoder(str(tmp_path / "run" / "model"), settings.encoder)
    encoders = {"before": fresh_encoder(settings), "after": exported}
    for name, encoder in encoders.items():
        vectors_nD = encode_unit(encoder.encode, texts)
        for i, near in enumerate(facts[name]["neighbours"]):
            cosines = vectors_nD @ vectors_nD[i]
            cosines[i] = -2
            assert len(near) == 10
            assert [cosine for _, cosine in near] == pytest.approx(np.sort(cosines)[::-1][:10], abs=2e-3)
            assert all(abs(cosines[at] - cosine) < 2e-3 for at, cosine in near)
    assert facts["before"]["neighbours"] != facts["after"]["neighbours"]
    queries = [json.loads(line)["text"] for line in (collection / "queries.jsonl").read_text().splitlines()]
    assert set(facts["queries"]) <= set(queries) and len(facts["queries"]) == 8
    assert all(facts["right"]) and len(facts["after"]["query_neighbours"]) == 8
    assert np.array(facts["after"]["map"]).shape == (len(texts), 2) and 0 < facts["after"]["explained"] <= 1


def test_queries_that_are_made_of_the_corpus_are_not_shown_as_those_of_a_user() -> None:
    data = paired_set(["a query"], ["its answer"])

    class Rows:
        target_side = None

        def __len__(self) -> int:
            return 3

        def target_texts(self, rows: np.ndarray) -> list[str]:
            return [f"text {row}" for row in rows]

    def drawn(name: str) -> Sample:
        return Sample.draw(Rows(), EvaluationSets({(name, "dev"): data}), seed=0)  # type: ignore[arg-type]

    assert drawn("pairs").queries == ("a query",) and drawn("pairs").right == ((3,),)
    assert drawn("cloze").queries == drawn("pseudo-relevance").queries == ()


def test_mined_hits_tell_what_the_rules_do(tree: Tree, tmp_path: Path) -> None:
    run = carry_out(negatives_settings(tree, "train.max_steps=4", "negatives.skip_hardest=2"), tmp_path)
    (event,) = kept(run)["negatives"]
    assert event.facts["index_step"] == 0 and len(event.facts["anchors"]) == 8  # the rows of a batch
    for anchor in event.facts["anchors"]:
        fates = [hit["fate"] for hit in anchor["hits"]]
        assert anchor["target"] is None and fates.count("taken") == 3 and fates.count("skip_hardest") == 2
        assert set(fates) <= set(FATES) and anchor["anchor"] not in [hit["text"] for hit in anchor["hits"]]
        cosines = [hit["cosine"] for hit in anchor["hits"]]
        assert cosines == sorted(cosines, reverse=True)


def test_an_index_that_does_not_answer_at_the_end_is_no_failure(tree: Tree, tmp_path: Path) -> None:
    def fail_at_the_end(method: str, what: int) -> None:
        if method == "search" and what == 3 and ended:
            raise SourceUnavailable("away")
        ended.extend([what] if method == "search" and what == 3 else [])

    ended: list[int] = []
    settings = negatives_settings(tree, "train.max_steps=4")
    run = prepared(settings)
    run.source.before = fail_at_the_end
    carry_out(settings, tmp_path, run=run)
    assert run.finished is not None and ended and "negatives" not in kept(run)


def test_cosines_are_counted_of_positives_of_who_repels_whom_and_of_usable_negatives() -> None:
    z1_bD = torch.eye(4)[:3]
    z2_bD = torch.tensor([[1.0, 0, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 0, 1]])
    mask_bb = torch.tensor([[False, True, False], [True, False, True], [False, True, False]])
    negatives = Neighbours(
        -z1_bD[:, None].repeat(1, 2, 1), torch.tensor([[True, False], [False, False], [True, True]]), None
    )
    found = similarities(Seen(z1_bD, z2_bD, mask_bb, negatives))

    def cosines(name: str) -> list[float]:
        return [round(low, 2) for low, count in zip(found["bins"], found[name], strict=False) for _ in range(count)]

    assert cosines("positive") == [0.0, 0.8, 0.95]
    assert cosines("in batch") == [0.0, 0.0, 0.0, 0.6]
    assert cosines("global") == [-1.0, -1.0, -1.0]
    assert "global" not in similarities(Seen(z1_bD, z2_bD, None, None))


def test_of_a_large_batch_some_rows_are_looked_at() -> None:
    z_bD = torch.nn.functional.normalize(torch.randn(3000, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    negatives = Neighbours(z_bD[:, None], torch.ones(3000, 1, dtype=torch.bool), None)
    mask_bb = ~torch.eye(3000, dtype=torch.bool)
    mask_bb[0, -1] = mask_bb[-1, 0] = False  # the first and the last are among them
    counts = {name: sum(counts) for name, counts in similarities(Seen(z_bD, z_bD, mask_bb, negatives)).items()}
    assert counts["positive"] == counts["global"] == 1024 and counts["in batch"] == 1024 * 1023 - 2


def test_a_resumed_run_keeps_the_same(tree: Tree, tmp_path: Path) -> None:
    settings = negatives_settings(tree, "train.max_steps=10")
    files = {name: SamplesFile(tmp_path / f"{name}.jsonl") for name in ("straight", "stopped")}
    carry_out(settings, tmp_path / "a", also=files["straight"].on)

    def stop(event: Event) -> None:
        files["stopped"].on(event)
        if isinstance(event, StepsLogged) and event.step == 6:
            raise Stopped

    carry_out(settings, tmp_path / "b", also=stop)
    carry_out(settings, tmp_path / "b", also=files["stopped"].on)
    straight, stopped = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in files
    )
    assert straight == stopped
    assert [row["step"] for row in straight if "similarities" in row] == [1, 2, 3, 4, 5, 7, 8, 9, 10]
    SamplesFile(tmp_path / "straight.jsonl").on(RunStarted("small", 8, 10, 1, 1, 1, "cpu", "", resumed=True))
    rows = [json.loads(line) for line in (tmp_path / "straight.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 8 and not any("sentences" in row or "negatives" in row for row in rows)


def test_the_trials_of_a_sweep_are_not_looked_at(tree: Tree, tmp_path: Path) -> None:
    assert kept(carry_out(negatives_settings(tree, "train.max_steps=2", "evaluation.test=false"), tmp_path)) == {}
