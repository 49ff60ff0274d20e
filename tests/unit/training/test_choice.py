"""What a run exports: merged, whitened, or the base; judged on documents that it was not trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from negative_runs import FolderStore, Stopped
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tiny import make_sentences, make_topics

from hncse_ray.config import Settings, load_settings
from hncse_ray.corpus import Corpus, prepare_corpus
from hncse_ray.encoder import load_encoder
from hncse_ray.evaluation import compare_retrieval
from hncse_ray.reporting import Event, MetricsFile, RunFinished, StageProgress, Verdict, describe_verdict
from hncse_ray.reporting.events import StepsLogged
from hncse_ray.reporting.run_page import write_run_page
from hncse_ray.training import EvaluationSets, TrainJob, control, fit, load_evaluation_sets, loop
from hncse_ray.training.control import whitened_base
from hncse_ray.training.encoding import KnownEncode
from hncse_ray.training.evaluator import Measured
from hncse_ray.training.label_free import hold_out, label_free_sets
from hncse_ray.training.merging import merged

Tree = dict[str, Any]
AUTO = "export={merge: auto, whiten: auto}"
TEXTS = make_sentences(10, seed=9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_topics(tmp_path_factory.mktemp("documents") / "texts")


@pytest.fixture
def documents(tree: Tree, folder: Path) -> Tree:
    """A run on a folder of documents, judged by whether sentences find their own."""
    tree["corpus"]["path"] = str(folder)
    tree["encoder"]["max_length"] = 60
    tree["evaluation"] = {"suites": ["cloze"], "metric": "cloze/mrr"}
    return tree


def corpus_of(settings: Settings) -> Corpus:
    encoder = load_encoder(settings.encoder.model, settings.encoder)
    digest = encoder.tokenizer_digest()
    return prepare_corpus(settings.corpus, tokenize=encoder.token_rows, tokenizer_digest=digest, max_length=60)


def run(
    settings: Settings, root: Path, *, sets: EvaluationSets | None = None, stop_at: int | None = None
) -> tuple[RunFinished | None, list[Event]]:
    encoder = load_encoder(settings.encoder.model, settings.encoder, seed=settings.run.seed)
    sets = sets or load_evaluation_sets(settings.evaluation, settings.corpus)
    root.mkdir(exist_ok=True)
    events: list[Event] = []
    metrics = MetricsFile(root / "metrics.jsonl")

    def emit(event: Event) -> None:
        events.append(event)
        metrics.on(event)
        if isinstance(event, StepsLogged) and event.step == stop_at:
            raise Stopped

    try:
        return fit(TrainJob(settings, corpus_of(settings), encoder, sets), FolderStore(root), emit), events
    except Stopped:
        return None, events


def finished(settings: Settings, root: Path, **how: Any) -> tuple[RunFinished, Verdict]:
    found, events = run(settings, root, **how)
    assert found is not None and found.verdict is not None
    assert [event for event in events if isinstance(event, Verdict)] == [found.verdict]
    return found, found.verdict


class ScriptedSets(EvaluationSets):
    """Gives dev scores from a list; what is chosen can then be foretold. They must all be asked for."""

    def __init__(self, dev: Sequence[float]) -> None:
        super().__init__({})
        object.__setattr__(self, "dev", list(dev))

    def measure(self, encode: object, split: str, metric: str = "") -> Measured:
        return Measured({"pairs/mrr": self.dev.pop(0)} if split == "dev" else {}, {})


# ------------------------------------------------------------------------------------------------ judged by the corpus


@pytest.mark.parametrize(("suite", "metric"), [("cloze", "mrr"), ("pseudo-relevance", "ndcg@10")])
def test_a_folder_of_documents_is_judged_by_itself(documents: Tree, tmp_path: Path, suite: str, metric: str) -> None:
    documents["evaluation"] = {"suites": [suite], "metric": f"{suite}/{metric}"}
    if suite == "pseudo-relevance":
        del documents["evaluation"]  # the default
    settings = load_settings(documents)
    found, verdict = finished(settings, tmp_path)
    assert {name.partition("/")[0] for name in found.before["dev"]} == {suite}
    assert verdict.metric == f"{suite}/{metric}" and verdict.base == found.before["dev"][verdict.metric]
    assert verdict.chosen == found.after["dev"][verdict.metric]

    corpus = corpus_of(settings)
    gaps = hold_out(settings, corpus)
    assert gaps is not None and len(gaps.rows) == 18  # a fifth of 90
    encodes = [load_encoder(model, settings.encoder).encode for model in (settings.encoder.model, tmp_path / "model")]
    sets = label_free_sets(settings, corpus, gaps, encodes[0])
    again = {d.name: d for d in compare_retrieval(*encodes, sets)}[verdict.metric]
    assert (verdict.base, verdict.chosen) == pytest.approx((again.first, again.second), abs=1e-6)
    if not verdict.is_base:
        assert (verdict.low, verdict.high) == pytest.approx((again.low, again.high), abs=0.02)


def test_held_out_rows_are_not_trained_on(documents: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(documents, ["train.max_steps=10", "train.evaluate_every_steps=10"])
    corpus, trained, real = corpus_of(settings), set[int](), loop.local_batch

    def local_batch(number: int, ids_B: np.ndarray, *args: Any, **how: Any) -> Any:
        trained.update(ids_B.tolist())
        return real(number, ids_B, *args, **how)

    monkeypatch.setattr(loop, "local_batch", local_batch)
    run(settings, tmp_path)
    gaps = hold_out(settings, corpus)
    assert gaps is not None and len(corpus) == 90
    assert trained == set(range(90)) - set(gaps.rows.tolist())


def test_the_verdict_is_told_everywhere(documents: Tree, tmp_path: Path) -> None:
    settings = load_settings(documents, [AUTO])
    found, verdict = finished(settings, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (told,) = [row["verdict"] for row in rows if "verdict" in row]
    assert told["base"] == verdict.base and told["merge"] == verdict.merge and "difference" in told
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"Verdict: {describe_verdict(verdict)}." in card
    (tmp_path / "settings.yaml").write_text(settings.to_yaml())
    (tmp_path / "result.json").write_text(json.dumps(asdict(found)))
    assert str(verdict.metric) in write_run_page(tmp_path).read_text()
    assert RunFinished.read(json.loads((tmp_path / "result.json").read_text())) == found


def test_a_stopped_run_chooses_the_same(documents: Tree, tmp_path: Path) -> None:
    settings = load_settings(documents, [AUTO])
    expected, _ = finished(settings, tmp_path / "whole")
    for stop in (7, 12):
        run(settings, tmp_path / "stopped", stop_at=stop)
    found, verdict = finished(settings, tmp_path / "stopped")
    assert (verdict, found.before, found.after) == (expected.verdict, expected.before, expected.after)
    assert verdict.low is not None or verdict.is_base
    for path in sorted((tmp_path / "whole" / "model").rglob("*.safetensors")):
        mine = load_file(tmp_path / "stopped" / "model" / path.relative_to(tmp_path / "whole" / "model"))
        assert all(torch.equal(value, mine[name]) for name, value in load_file(path).items())


# ------------------------------------------------------------------------------------------------ what dev chooses

# scores before, at steps 4, 8 and 12; of merges 0.75, 0.5, 0.25; of whitenings 0.125, 0.25; what is then exported
SCRIPTS: dict[str, tuple[Sequence[float], str, tuple[float, float, float]]] = {
    "a merge and a whitening": ([0.3, 0.5, 0.4, 0.2, 0.6, 0.55, 0.1, 0.7, 0.65], AUTO, (0.75, 0.125, 0.7)),
    "the trained weights": ([0.3, 0.5, 0.4, 0.2, 0.5, 0.45, 0.1, 0.5, 0.2], AUTO, (1, 0, 0.5)),
    "a merge alone": ([0.3, 0.5, 0.4, 0.2, 0.5, 0.45, 0.6], "export={merge: auto}", (0.25, 0, 0.6)),
    "nothing better: the base": ([0.3, 0.2, 0.2, 0.2, 0.3, 0.3], AUTO, (0, 0, 0.3)),
    "nothing but whitening is better": ([0.3, 0.2, 0.2, 0.2, 0.31, 0.1], AUTO, (0, 0.125, 0.31)),
    "a merge that is asked for is worse, and the rest too": (
        [0.3, 0.5, 0.4, 0.2, 0.1, 0.2, 0.2], "export={merge: 0.5, whiten: auto}", (0, 0, 0.3),
    ),
    "a merge that is asked for is worse": ([0.3, 0.5, 0.4, 0.2, 0.1], "export={merge: 0.5}", (0.5, 0, 0.1)),
    "a whitening that is asked for ruins all": (
        [0.3, 0.5, 0.4, 0.2, 0.1, 0.1, 0.1, 0.2], "export={merge: auto, whiten: 0.5}", (0, 0, 0.3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SCRIPTS)
def test_dev_chooses(case: str, tree: Tree, tmp_path: Path) -> None:
    script, how, (merge, whiten, score) = SCRIPTS[case]
    settings = load_settings(tree, [how, "evaluation.metric=pairs/mrr"])
    sets = ScriptedSets(script)
    found, verdict = finished(settings, tmp_path, sets=sets)
    assert sets.dev == []
    assert (verdict.merge, verdict.whiten, verdict.chosen, verdict.base) == (merge, whiten, score, 0.3)
    assert found.after["dev"] == {"pairs/mrr": score} and verdict.tried == len(script) - 4
    exported = load_encoder(tmp_path / "model")
    base = load_file(Path(settings.encoder.model) / "model.safetensors")
    checkpoint = tmp_path / f"checkpoints/step_{found.best_step:09d}/encoder.safetensors"
    best = load_file(checkpoint) if found.best_step else {}
    trained = {name.removeprefix("model.0.model."): value for name, value in best.items()} or base
    wanted = merged(base, {name: trained[name] for name in base}, merge)
    for name, value in exported.backbone.state_dict().items():
        torch.testing.assert_close(value, wanted[name], atol=1e-7, rtol=0)
    kinds = [type(stage).__name__ for stage in exported.model]
    assert kinds[2:] == (["Dense", "Normalize"] if whiten else [])
    assert ("the base model is exported" in describe_verdict(verdict)) == verdict.is_base == (score == 0.3)


def test_how_many_are_scored_is_told(documents: Tree, tmp_path: Path) -> None:
    _, events = run(load_settings(documents, [AUTO, "train.learning_rate=1e-4"]), tmp_path)
    stages = [event for event in events if isinstance(event, StageProgress)]
    first, second, *_, last = [event.stage for event in stages if event.total is None]
    assert (first, second, last) == (
        "finding what the held-out sentences should find", "scoring dev", "writing the model",
    )  # fmt: skip
    stages = [event for event in stages if event.total is not None]
    (stage,) = {event.stage for event in stages}
    assert stage == f"scoring {stages[0].total} candidates for export on dev"
    assert (stages[-1].done, stages[-1].total) in ((2, 2), (5, 5))  # two where no step was better than the base


# ------------------------------------------------------------------------------------------------ the exported model


@pytest.mark.parametrize(
    "changes",
    [
        ["encoder.head=tanh"],
        ["encoder.head=tanh", "encoder.head_in_training_only=false"],
        ["encoder.lora={r: 4}"],
        ["encoder.prompts={query: 'the ', document: 'a book '}"],
    ],
)
def test_it_is_what_was_scored(documents: Tree, tmp_path: Path, changes: list[str]) -> None:
    if "lora" in changes[0]:
        pytest.importorskip("peft", reason="peft is not installed (the extra lora)")
    settings = load_settings(documents, ["export={merge: 0.5, whiten: 0.25}", *changes])
    found, verdict = finished(settings, tmp_path)
    assert (verdict.merge, verdict.whiten) == (0.5 if found.best_step else 0, 0.25)
    exported = load_encoder(tmp_path / "model")
    theirs = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    np.testing.assert_allclose(theirs.encode(TEXTS), exported.encode(TEXTS), atol=1e-5)
    assert [type(stage).__name__ for stage in theirs][-2:] == ["Dense", "Normalize"]
    corpus = corpus_of(settings)
    gaps = hold_out(settings, corpus)
    assert gaps is not None

    class OnSides:
        def __call__(self, texts: list[str]) -> np.ndarray:
            return exported.encode(texts)

        def on_side(self, side: Any) -> Any:
            return lambda texts: exported.encode(texts, side=side)

    (data,) = label_free_sets(settings, corpus, gaps, OnSides()).values()
    scores = EvaluationSets({("cloze", "dev"): data}).score(OnSides(), "dev")
    assert scores == pytest.approx(found.after["dev"], abs=0.03)


def test_without_a_dev_set_nothing_is_judged_and_the_settings_hold(tree: Tree, tmp_path: Path) -> None:
    settings = load_settings(tree, ["evaluation.suites=[]", "export={merge: 0.5, whiten: 0.25}"])
    _, verdict = finished(settings, tmp_path)
    assert (verdict.metric, verdict.merge, verdict.whiten, verdict.tried) == (None, 0.5, 0.25, 0)
    assert "nothing was judged" in describe_verdict(verdict)
    base = load_file(Path(settings.encoder.model) / "model.safetensors")
    last = load_file(tmp_path / "checkpoints/step_000000012/encoder.safetensors")
    for name, value in load_encoder(tmp_path / "model").backbone.state_dict().items():
        torch.testing.assert_close(value, base[name].lerp(last[f"model.0.model.{name}"], 0.5), atol=1e-7, rtol=0)


def test_the_base_whitened_on_the_corpus_is_the_control_of_every_run_that_is_tested(
    documents: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_ROWS_PER_DIMENSION", 10)  # as the choice has it
    settings = load_settings(documents, [])
    found, _ = finished(settings, tmp_path / "one")
    assert found.whitened_base_power in (0.125, 0.25) and found.whitened_base.keys() == {"dev", "test"}
    # The same as the choice finds for an untrained model: its whitening is scored on dev too.
    still = load_settings(documents, ["train.learning_rate=1e-12", f"export.whiten={found.whitened_base_power}"])
    untrained, verdict = finished(still, tmp_path / "two")
    assert verdict.whiten == found.whitened_base_power and untrained.whitened_base == found.whitened_base
    assert untrained.after["dev"] == pytest.approx(found.whitened_base["dev"], abs=1e-6)
    assert found.whitened_base["dev"] != found.before["dev"]
    trial, _ = finished(load_settings(documents, ["evaluation.test=false"]), tmp_path / "three")
    assert trial.whitened_base == {} and trial.whitened_base_power == 0


def test_a_corpus_without_a_spread_has_no_control(documents: Tree) -> None:
    class Alike:
        """An encoder to which all texts are one."""

        def __call__(self, texts: list[str]) -> np.ndarray[Any, Any]:
            return np.ones((len(texts), 4), np.float32)

        def on_side(self, side: str) -> Alike:
            return self

    settings = load_settings(documents, [])
    untouched = KnownEncode(Alike())  # type: ignore[arg-type]
    found = whitened_base(untouched, corpus_of(settings), settings, dimension=4, measure=lambda encode, split: 1 / 0)
    assert found == (0.0, {})
