"""Runs with global negatives, in one process: that they run, what they use, and what they say is wrong."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from negative_runs import FolderStore, carry_out, fresh_encoder, negatives_settings, prepared, stop_at, taken
from safetensors.numpy import load_file

from hncse_ray.config import OBJECTIVES
from hncse_ray.errors import DataError, StorageError, TrainingError
from hncse_ray.reporting.events import CheckpointSaved
from hncse_ray.training import loop
from hncse_ray.training.objective import Neighbours, Objective

Tree = dict[str, Any]
NO_MIXING = ("info_nce", "three_view", "distillation")
KINDS = [
    (objective, use, columns)
    for objective in OBJECTIVES
    for use in ("stored", "fresh")
    for columns in ("own", "all", "none")
    if not (objective == "instance_smoothing" and use == "fresh") and not (objective in NO_MIXING and columns == "none")
]


KINDS += [("own_losses:noisy", use, columns) for use in ("stored", "fresh") for columns in ("own", "all")]


def of_objective(name: str) -> list[str]:
    changes = [f"objective.name={name}", "objective.dimensions=[16]"]
    if ":" in name:
        changes.append("objective.settings.noise=0.2")
    if name in ("hybrid", "hard_negative_mixing"):
        changes.append("objective.k=5")
    if name == "instance_smoothing":
        changes += ["objective.group_size=4", "objective.weight=2"]
    return changes


# ------------------------------------------------------------------------------------------------ every kind runs


@pytest.mark.parametrize(("objective", "use", "columns"), KINDS)
def test_every_kind_of_run_trains_on_global_negatives(
    tree: Tree, tmp_path: Path, objective: str, use: str, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [f"negatives.use={use}", f"negatives.columns={columns}", "train.max_steps=3"]
    changes += ["negatives.refresh_every_steps=2", *of_objective(objective)]
    with taken(monkeypatch) as batches:
        run = carry_out(negatives_settings(tree, *changes), tmp_path)
    assert run.finished is not None and run.finished.step == 3
    assert all(np.isfinite(log.metrics["loss"]) for log in run.logs)
    assert run.series("missing") == [0, 0, 0] and run.series("failed_builds") == [0, 0, 0]
    assert run.series("index_step") == [0, 0, 2] and run.series("index_age_steps") == [1, 2, 1]
    assert run.series("shards_alive") == [1, 1, 1]
    m = 4 if objective == "instance_smoothing" else 3
    assert batches[0][0].ids_bm.shape == (8, m)
    assert (batches[0][0].vectors_bmD is None) == (use == "fresh")
    for log in run.logs:
        assert log.metrics["loss"] == pytest.approx((log.metrics["loss_at_32"] + log.metrics["loss_at_16"]) / 2)
        assert 0.5 < log.metrics["negatives/usable"] <= 1
        assert -1 < log.metrics["negatives/index_similarity"] < 1
        assert log.metrics["negatives/removed_itself"] == 8
        assert log.metrics["negatives/build_rows_per_s"] > 0 and log.metrics["negatives/search_ms_p50"] > 0
        if objective == "instance_smoothing":
            assert log.metrics["smoothing_active"] == 1
    assert run.source.calls["close"] == 1


def test_global_negatives_change_what_is_learnt(tree: Tree, tmp_path: Path) -> None:
    losses = {}
    for name, change in {
        "none": "negatives.source=none",
        "stored": "negatives.use=stored",
        "fresh": "negatives.use=fresh",
        "all": "negatives.columns=all",
        "more": "negatives.per_anchor=6",
    }.items():
        run = carry_out(negatives_settings(tree, "train.max_steps=2", change), tmp_path / name)
        losses[name] = run.logs[0].metrics["loss"]
    assert len(set(losses.values())) == 5
    assert losses["none"] < losses["stored"] < min(losses["more"], losses["all"])


def test_a_run_without_global_negatives_logs_nothing_of_them(tree: Tree, tmp_path: Path) -> None:
    run = carry_out(negatives_settings(tree, "negatives.source=none", "train.max_steps=2"), tmp_path)
    assert not any(name.startswith("negatives/") for log in run.logs for name in log.metrics)
    assert run.source.calls == {"publish": 0, "wait": 0, "status": 0}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_in_sync_every_step_uses_the_version_of_the_last_refresh(
    tree: Tree, tmp_path: Path, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [f"train.accumulation_steps={accumulation}", "negatives.prefetch_batches=5", "train.max_steps=13"]
    with taken(monkeypatch) as batches:
        run = carry_out(negatives_settings(tree, *changes, "negatives.refresh_every_steps=5"), tmp_path)
    used = {step: [batch.version.step for batch in found if batch.version] for step, found in batches.items()}
    assert used == {step: [step // 5 * 5] * accumulation for step in range(13)}
    assert list(run.source.published) == [0, 5, 10]
    keys = {found[0].version.key for found in batches.values() if found[0].version}
    assert len(keys) == 3


@pytest.mark.parametrize("method", ["publish", "wait"])
def test_making_an_index_does_not_count_as_training(
    tree: Tree, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = negatives_settings(tree, "train.max_steps=6", "negatives.refresh_every_steps=2")
    run, late, clock = prepared(settings), [0.0], time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + late[0])

    def hold_up(called: str, number: int) -> None:
        late[0] += 1e6 * (called == method)

    run.source.before = hold_up
    carry_out(settings, tmp_path, run=run)
    assert late[0] == 3e6 and run.finished is not None
    assert all(16 / log.sentences_per_s < 1e5 for log in run.logs)  # seconds
    assert 6 * 16 / run.finished.sentences_per_s < 1e5


def test_without_refreshing_one_version_serves_the_whole_run(tree: Tree, tmp_path: Path) -> None:
    run = carry_out(negatives_settings(tree, "negatives.refresh_every_steps=null", "train.max_steps=9"), tmp_path)
    assert list(run.source.published) == [0]
    assert run.series("index_age_steps") == list(range(1, 10))


# ------------------------------------------------------------------------------------------------ which neighbours


class Spying(Objective):
    """The real objective, which keeps what it was given; ``alone``: gradient can come by way of neighbours only."""

    alone = False
    seen: list[Neighbours] = []
    losses: list[torch.Tensor] = []

    def __call__(self, views: Any, neighbours: Any = None, **how: Any) -> Any:
        if neighbours.vectors_BmD.requires_grad:
            neighbours.vectors_BmD.retain_grad()
        self.seen.append(neighbours)
        if self.alone:
            loss, metrics = super().__call__([view.detach() for view in views], neighbours, **how)
            self.losses.append(loss)
            return loss if loss.requires_grad else loss + 0 * views[0].sum(), metrics
        return super().__call__(views, neighbours, **how)


@pytest.fixture
def spying(monkeypatch: pytest.MonkeyPatch) -> type[Spying]:
    monkeypatch.setattr(Spying, "seen", [])
    monkeypatch.setattr(Spying, "losses", [])
    monkeypatch.setattr(loop, "Objective", Spying)
    return Spying


def test_the_neighbours_are_the_nearest_rows_outside_the_batch(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = negatives_settings(tree, "train.max_steps=1", "negatives.candidates=20", "encoder.dropout=0")
    with taken(monkeypatch) as batches:
        run = carry_out(settings, tmp_path)
    ids_B, batch = run.plan.batch(0), batches[0][0]
    rows = run.corpus.token_rows(range(300))
    vectors = fresh_encoder(settings).encode_rows(rows, unit_norm=True).astype(np.float64)
    cosines = vectors[ids_B] @ vectors.T
    cosines[:, ids_B] = -2
    nearest = np.sort(cosines, axis=1)[:, ::-1][:, :3]
    assert batch.mask_bm.all() and not np.isin(batch.ids_bm, ids_B).any()
    np.testing.assert_allclose(np.take_along_axis(cosines, batch.ids_bm, 1), nearest, atol=1e-5)
    assert all(len(set(own)) == 3 for own in batch.ids_bm.tolist())


# There are fewer candidates than are wanted, so some slots stay empty; and some rows are near to several anchors.
SCARCE = ("negatives.columns=all", "negatives.per_anchor=8", "negatives.candidates=9", "negatives.skip_hardest=1",
          "train.max_steps=1")  # fmt: skip


@pytest.mark.parametrize("chunk", ["null", "3"])
@pytest.mark.parametrize("use", ["stored", "fresh"])
def test_the_objective_is_given_the_vectors_of_these_rows(
    tree: Tree, tmp_path: Path, use: str, chunk: str, spying: type[Spying], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [*SCARCE, f"negatives.use={use}", f"train.grad_cache_chunk_size={chunk}", "encoder.dropout=0"]
    settings = negatives_settings(tree, *changes)
    with taken(monkeypatch) as batches:
        run = carry_out(settings, tmp_path)
    batch, (given,) = batches[0][0], spying.seen
    usable = batch.mask_bm
    assert usable.any() and not usable.all()
    assert given.columns_mask is not None and torch.equal(given.mask_Bm, torch.from_numpy(usable))
    column_of = {int(i): c for c, i in reversed(list(enumerate(batch.ids_bm.ravel()))) if i >= 0}
    first = np.array([column_of.get(int(i)) == c for c, i in enumerate(batch.ids_bm.ravel())])
    assert first.sum() < usable.sum()
    assert given.columns_mask.tolist() == [first.tolist()] * len(usable)  # each row is a column once
    ids, vectors = batch.ids_bm[usable], given.vectors_BmD.detach().numpy()
    assert (batch.ids_bm[~usable] == -1).all() and (vectors[~usable] == 0).all()
    if use == "stored":
        np.testing.assert_array_equal(vectors[usable], run.source.inner.vectors(ids, version=batch.version))
    expected = fresh_encoder(settings).encode_rows(run.corpus.token_rows(ids), unit_norm=True)
    np.testing.assert_allclose(vectors[usable], expected, atol=2e-6)
    assert given.vectors_BmD.requires_grad == (use == "fresh")
    if use == "fresh":
        norms = given.vectors_BmD.grad.norm(dim=-1).numpy()
        np.testing.assert_array_equal(norms > 0, first.reshape(usable.shape))


@pytest.mark.parametrize("chunk", ["null", "3"])
@pytest.mark.parametrize("use", ["stored", "fresh"])
def test_gradient_reaches_the_encoder_through_fresh_negatives_only(
    tree: Tree, tmp_path: Path, use: str, chunk: str, spying: type[Spying], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spying, "alone", True)
    changes = [*SCARCE, f"negatives.use={use}", f"train.grad_cache_chunk_size={chunk}", "negatives.columns=own"]
    run = carry_out(negatives_settings(tree, *changes), tmp_path)
    gradient = torch.cat([p.grad.flatten() for p in run.encoder.parameters() if p.grad is not None])
    assert spying.losses[0].requires_grad == (use == "fresh")
    assert bool(gradient.norm() > 1e-3) == (use == "fresh")


# ------------------------------------------------------------------------------------------------ checkpoints


def test_a_checkpoint_holds_the_weights_of_the_index_in_sync_only(tree: Tree, tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "sync")
    run = carry_out(negatives_settings(tree), store.root)
    assert sorted(run.source.published) == [0, 6]
    for checkpoint, index in ((4, 0), (8, 6), (12, 6)):
        kept = load_file(store.checkpoint(checkpoint) / "index.safetensors")
        published = run.source.published[index]
        assert kept.keys() == published.keys()
        assert all(np.array_equal(kept[name], published[name]) for name in kept)
        present = load_file(store.checkpoint(checkpoint) / "encoder.safetensors")
        assert not all(np.array_equal(kept[name], present[name]) for name in kept)
    asynchronous = FolderStore(tmp_path / "async")
    carry_out(negatives_settings(tree, "negatives.refresh=async"), asynchronous.root)
    assert len(asynchronous.checkpoints()) == 3
    assert not list(asynchronous.root.rglob("index.safetensors"))


def test_another_corpus_is_refused_when_a_run_goes_on(tree: Tree, tmp_path: Path) -> None:
    settings = negatives_settings(tree)
    carry_out(settings, tmp_path, also=stop_at(CheckpointSaved, 4))
    changed = negatives_settings(tree, "corpus.max_sentences=299")
    run = prepared(changed)
    with pytest.raises(StorageError, match="another corpus"):
        carry_out(changed, tmp_path, run=run)
    assert not run.source.published
    assert carry_out(settings, tmp_path).finished is not None


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("objective", ["info_nce", "instance_smoothing"])
def test_rules_that_leave_nothing_end_the_run_after_fifty_batches(tree: Tree, tmp_path: Path, objective: str) -> None:
    changes = ["train.batch_size=2", "train.max_steps=60", "negatives.max_score=-0.99"]
    changes += ["negatives.refresh_every_steps=null", *of_objective(objective)]
    run = prepared(settings := negatives_settings(tree, *changes))
    with pytest.raises(TrainingError, match=r"50 batches in a row.*negatives\.max_score"):
        carry_out(settings, tmp_path, run=run)
    assert len(run.logs) == 49
    assert run.series("usable") == [0] * 49 and run.series("missing") == [0] * 49
    assert run.source.calls["close"] == 1


def test_rules_that_leave_something_now_and_then_are_no_mistake(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hncse_ray.training.negatives._UNUSED_BATCHES", 4)
    changes = ["train.batch_size=2", "negatives.candidates=3", "negatives.skip_hardest=2", "negatives.per_anchor=1"]
    probe = prepared(settings := negatives_settings(tree, *changes, "train.max_steps=12"))

    really = probe.source.search

    def search(row_ids: np.ndarray, *, k: int, **how: Any) -> Any:
        hits = really(row_ids, k=k, **how)
        if probe.source._looking_up.number % 4 != 3:
            hits.ids_Bk[:], hits.scores_Bk[:] = -1, -np.inf
        return hits

    probe.source.search = search  # type: ignore[method-assign]
    run = carry_out(settings, tmp_path, run=probe)
    assert run.finished is not None
    assert [usable > 0 for usable in run.series("usable")] == [False, False, False, True] * 3


def test_each_search_says_which_rows_come_next(tree: Tree, tmp_path: Path) -> None:
    run = prepared(settings := negatives_settings(tree, "train.max_steps=8"))
    asked, really = list[tuple[list[int], list[int]]](), run.source.search

    def search(row_ids: np.ndarray, *, k: int, ahead: np.ndarray, **how: Any) -> Any:
        asked.append((row_ids.tolist(), ahead.tolist()))
        return really(row_ids, k=k, **how)

    run.source.search = search  # type: ignore[method-assign]
    assert carry_out(settings, tmp_path, run=run).finished is not None
    following = list(itertools.pairwise(run.plan.batch(number).tolist() for number in range(12)))
    assert all(call in asked for call in following[:8]) and all(call in following for call in asked)


@pytest.mark.parametrize(
    ("objective", "wanted"), [("info_nce", "negatives.per_anchor"), ("instance_smoothing", "objective.group_size")]
)
def test_more_negatives_of_an_anchor_than_sentences_are_refused(
    tree: Tree, tmp_path: Path, objective: str, wanted: str
) -> None:
    changes = [f"objective.name={objective}", f"{wanted}=300", "negatives.candidates=400"]
    with pytest.raises(DataError, match=rf"300 sentences.*299 neighbours.*the 300 that.*\. Lower {wanted}"):
        carry_out(negatives_settings(tree, *changes), tmp_path)


def test_of_a_small_corpus_all_other_sentences_are_candidates(tree: Tree, tmp_path: Path) -> None:
    def losses(candidates: int) -> list[float]:
        changes = [f"negatives.candidates={candidates}", "negatives.max_score=null", "train.max_steps=2"]
        run = carry_out(negatives_settings(tree, *changes), tmp_path / str(candidates))
        assert run.series("missing") == [0, 0] and run.series("usable") == [1, 1]
        return [log.metrics["loss"] for log in run.logs]

    assert losses(299) == losses(400)


def test_a_band_that_a_small_corpus_does_not_reach_is_left_out(tree: Tree, tmp_path: Path) -> None:
    changes = ["negatives.candidates=400", "negatives.sampling=bands", "negatives.bands=[5,350]", "train.max_steps=1"]
    run = carry_out(negatives_settings(tree, *changes, "negatives.max_score=null"), tmp_path)
    assert run.series("usable") == [1]
