"""Runs that the index teaches: what the teacher says, that it is learnt, and what happens where it is silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from negative_runs import carry_out, fresh_encoder, negatives_settings, prepared, stop_at, taken
from passages import documents_section, make_documents

from hncse_ray.config import load_settings
from hncse_ray.errors import SettingsError
from hncse_ray.negatives import SourceUnavailable
from hncse_ray.negatives.lexical import LexicalIndex
from hncse_ray.reporting.events import CheckpointSaved
from hncse_ray.training.objective_check import check_objective
from hncse_ray.training.views import ViewMaker

Tree = dict[str, Any]
TAUGHT = (
    "objective.name=distillation",
    "negatives.score=hybrid",
    "negatives.sampling=bands",
    "negatives.bands=[2,6]",
    "negatives.use=fresh",
    "negatives.columns=all",
    "encoder.dropout=0",
)


def settings_of(tree: Tree, *changes: str) -> Any:
    return negatives_settings(tree, *TAUGHT, *changes)


def scores_by_hand(run: Any, settings: Any, ids_B: np.ndarray) -> np.ndarray:
    """The scores of anchors with all rows, which are all different, under the first weights."""
    texts = run.corpus.target_texts(range(len(run.corpus)))
    encoder = fresh_encoder(settings)
    vectors = encoder.encode_rows(run.corpus.targets(range(len(texts))), unit_norm=True).astype(np.float64)
    anchors = encoder.encode_rows(run.corpus.token_rows(ids_B), unit_norm=True).astype(np.float64)
    index = LexicalIndex(texts, keys_nc=np.arange(len(texts))[:, None])
    words = np.stack([index.scores(text) for text in run.corpus.texts(ids_B)])
    others = words.copy()
    others[np.arange(len(ids_B)), ids_B] = 0
    most = others.max(axis=1, keepdims=True)
    cosines = anchors @ vectors.T
    by_words = 0.3 * np.minimum(1, words / np.maximum(most, 1e-9))
    return {"cosine": cosines, "hybrid": cosines + by_words, "lexical": by_words}[settings.negatives.score]


@pytest.mark.parametrize("columns", ["all", "own"])
@pytest.mark.parametrize("score", ["hybrid", "cosine", "lexical"])
def test_the_teacher_scores_every_column_exactly(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: str, score: str
) -> None:
    changes = [f"negatives.columns={columns}", f"negatives.score={score}", "train.max_steps=1"]
    settings = settings_of(tree, *changes)
    with taken(monkeypatch) as batches:
        run = carry_out(settings, tmp_path)
    batch, ids_B = batches[0][0], run.plan.batch(0)
    expected = scores_by_hand(run, settings, ids_B)
    B, m = batch.ids_bm.shape
    assert batch.mask_bm.all() and batch.teacher_bL is not None
    np.testing.assert_allclose(batch.teacher_bL[:, :B], expected[:, ids_B], atol=2e-6)
    of_negatives = expected[:, batch.ids_bm.ravel()]
    if columns == "own":
        of_negatives = np.take_along_axis(expected, batch.ids_bm, 1)
    np.testing.assert_allclose(batch.teacher_bL[:, B:], of_negatives, atol=2e-6)
    # One of each band of ranks: 1-2, 3-6, 7-12, among the rows outside the batch.
    expected[:, ids_B] = -9
    ranks = (expected[:, None, :] > np.take_along_axis(expected, batch.ids_bm, 1)[:, :, None] + 1e-7).sum(-1)
    if columns == "own":
        assert (ranks[:, 0] < 2).all() or score == "lexical"


def test_anchors_made_of_passages_are_scored_by_what_they_say(
    tree: Tree, tmp_path: Path, cache_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree["corpus"] = documents_section(tmp_path, make_documents(80), cache_dir)
    settings = settings_of(tree, "views.mix={title: 1, cloze: 2, dropout: 1}", "train.max_steps=1")
    with taken(monkeypatch) as batches:
        run = carry_out(settings, tmp_path / "run")
    batch, ids_B, encoder = batches[0][0], run.plan.batch(0), fresh_encoder(settings)
    maker = ViewMaker(settings, run.corpus, encoder.token_rows)
    views = maker(0, ids_B)
    everyone = np.arange(len(run.corpus))
    texts, documents = run.corpus.texts(everyone), run.corpus.documents
    assert {"title", "cloze"} <= set(views.kinds) and documents is not None
    index = LexicalIndex(texts, keys_nc=everyone[:, None])
    by_words = np.stack([index.scores(text) for text in views.texts]).astype(np.float64)
    most = np.where(documents[ids_B][:, None] == documents, 0, by_words).max(axis=1, keepdims=True)
    share = np.where(most > 0, np.minimum(1, by_words / np.maximum(most, 1e-9)), 0)
    sides = [encoder.encode_rows(rows, side=side, unit_norm=True).astype(np.float64)
             for rows, side in ((views.anchors, "query"), (run.corpus.token_rows(everyone), "document"))]  # fmt: skip
    expected = sides[0] @ sides[1].T + 0.3 * share
    columns = np.concatenate([ids_B, batch.ids_bm.ravel()])
    assert batch.teacher_bL is not None
    usable = columns >= 0
    np.testing.assert_allclose(batch.teacher_bL[:, usable], expected[:, columns[usable]], atol=2e-6)
    assert (batch.teacher_bL[:, ~usable] == -np.inf).all()


def test_the_teachers_order_is_learnt(tree: Tree, tmp_path: Path) -> None:
    changes = ["negatives.refresh_every_steps=null", "train.max_steps=40", "train.log_every_steps=10"]
    run = carry_out(settings_of(tree, *changes, "train.learning_rate=1e-3"), tmp_path)
    losses = [log.metrics["list_loss"] for log in run.logs]
    agreement = [log.metrics["teacher_agreement"] for log in run.logs]
    assert losses[-1] < 0.7 * losses[0] and agreement[-1] > agreement[0] + 0.1
    assert all(log.metrics["listed"] == 1 for log in run.logs)


@pytest.mark.parametrize(
    "changes",
    [
        ("objective.list_loss=margin_mse", "negatives.use=stored"),
        ("train.grad_cache_chunk_size=3", "train.accumulation_steps=2"),
        ("objective.contrast_weight=0.5", "negatives.columns=own", "negatives.score=lexical"),
        ("objective.dimensions=[16]", "negatives.score=cosine"),
    ],
)
def test_every_kind_of_lesson_trains(tree: Tree, tmp_path: Path, changes: tuple[str, ...]) -> None:
    run = carry_out(settings_of(tree, "train.max_steps=3", *changes), tmp_path)
    assert run.finished is not None
    assert all(np.isfinite(log.metrics["loss"]) and log.metrics["listed"] == 1 for log in run.logs)


def test_a_stopped_run_goes_on_with_the_same_losses(tree: Tree, tmp_path: Path) -> None:
    settings = settings_of(tree, "train.max_steps=10", "train.checkpoint_every_steps=4")

    def losses(run: Any) -> dict[int, float]:
        return {log.step: log.metrics["loss"] for log in run.logs}

    whole = losses(carry_out(settings, tmp_path / "whole"))
    first = losses(carry_out(settings, tmp_path / "parts", also=stop_at(CheckpointSaved, 4)))
    rest = losses(carry_out(settings, tmp_path / "parts"))
    assert first | rest == whole and min(rest) == 5


def test_where_the_index_is_silent_the_batch_alone_is_contrasted_and_it_is_counted(tree: Tree, tmp_path: Path) -> None:
    run = prepared(settings := settings_of(tree, "train.max_steps=4"))

    def before(method: str, number: int) -> None:
        if method == "scores" and number in (1, 2):
            raise SourceUnavailable("away")

    run.source.before = before
    carry_out(settings, tmp_path, run=run)
    listed = [log.metrics["listed"] for log in run.logs]
    assert 0 in listed and set(listed) <= {0, 1}
    assert [log.metrics["negatives/missing"] for log in run.logs] == [1 - share for share in listed]
    assert all(np.isfinite(log.metrics["loss"]) for log in run.logs)
    for log in run.logs:
        if log.metrics["listed"] == 0:
            assert log.metrics["loss"] > 0 and log.metrics["list_loss"] == 0


def test_without_an_index_there_is_no_teacher(tree: Tree) -> None:
    settings = settings_of(tree, "negatives.source=none")
    with pytest.raises(SettingsError, match=r"negatives\.source: .*learns from the index"):
        check_objective(settings, dimension=32, batch_size=8)
    check_objective(settings_of(tree), dimension=32, batch_size=8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("negatives.score=bm25", "negatives.score = 'bm25': input should be 'cosine', 'lexical' or 'hybrid'"),
        ("negatives.bands=[6,2]", "bands [6, 2] must rise, to less than candidates = 12"),
        ("negatives.bands=[2,12]", "bands [2, 12] must rise, to less than candidates = 12"),
        ("negatives.columns=none", "leaves objective 'distillation' without use"),
    ],
)
def test_what_cannot_be_is_said(tree: Tree, change: str, said: str) -> None:
    with pytest.raises(SettingsError) as error:
        settings_of(tree, change)
    assert said in str(error.value)


def test_a_function_of_the_users_is_taught_too(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_lessons.py").write_text(
        "def squares(z1, z2, negatives=None, *, negatives_mask=None, columns='own', columns_mask=None, teacher=None):\n"
        "    if teacher is None:\n"
        "        return (z1 * z2).sum(dim=1).mean(), {'heard': 0.0}\n"
        "    return (z1 @ z2.T - teacher[:, : len(z1)]).square().mean(), {'heard': 1.0}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = load_settings(
        settings_of(tree, "train.max_steps=2").model_dump(mode="json") | {"objective": {"name": "my_lessons:squares"}}
    )
    check_objective(settings, dimension=32, batch_size=8)
    run = carry_out(settings, tmp_path / "run")
    assert [log.metrics["heard"] for log in run.logs] == [1, 1]
