"""Positives from structure: what each kind makes, who falls back, what the index drops, ranks, threads, resumption."""

from __future__ import annotations

import json
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from negative_runs import Run, assert_goes_on_bit_for_bit, carry_out, negatives_settings, prepared, taken
from passages import documents_section, make_documents
from rank_parity import free_port, join_group
from torch.nn.parallel import DistributedDataParallel
from waits import seconds

from hncse_ray.config import Settings, ViewKind, load_settings
from hncse_ray.corpus import rank_slice, row_hash, sentences_or_runs
from hncse_ray.errors import DataError, SettingsError
from hncse_ray.negatives import Hits
from hncse_ray.reading import titled
from hncse_ray.training import distributed
from hncse_ray.training.batch import local_batch
from hncse_ray.training.objective import Objective
from hncse_ray.training.step import LocalBatch, StepContext, _repelled, train_step
from hncse_ray.training.views import BatchViews, ViewMaker, Views, batch_views

Tree = dict[str, Any]
KINDS: tuple[ViewKind, ...] = ("title", "crop", "cloze", "neighbour", "keywords")
ALL = "views.mix={title: 1, crop: 1, cloze: 1, neighbour: 1, keywords: 1}"


@pytest.fixture
def tree(small_run: Tree, cache_dir: str, tmp_path: Path) -> Tree:
    small_run["corpus"] = documents_section(tmp_path, make_documents(), cache_dir)
    small_run["encoder"] |= {"max_length": 64}
    return small_run


def maker(run: Run, settings: Settings) -> ViewMaker:
    return ViewMaker(settings, run.corpus, run.encoder.token_rows)


def made(run: Run, settings: Settings, number: int = 0, ids: Any = None) -> Views:
    return maker(run, settings)(number, np.arange(len(run.corpus)) if ids is None else np.asarray(ids))


def pairs_of(run: Run, settings: Settings, kind: ViewKind, number: int = 0) -> dict[int, tuple[str, str]]:
    """The texts of all passages that a kind does for, by row."""
    make, rng = maker(run, settings), np.random.default_rng(number)
    passages = make._passages(np.arange(len(run.corpus)))
    found = {passage.id: make.pair(kind, passage, rng) for passage in passages}
    return {i: pair for i, pair in found.items() if pair is not None}


# ------------------------------------------------------------------------------------------------ kinds


def test_a_title_and_the_text_under_it(tree: Tree) -> None:
    run = prepared(settings := negatives_settings(tree, "views.mix={title: 1}"))
    titles, bodies = run.corpus.titles(range(len(run.corpus))), run.corpus.bodies(range(len(run.corpus)))
    assert None in titles
    expected = {i: (title, body) for i, (title, body) in enumerate(zip(titles, bodies, strict=True)) if title}
    assert pairs_of(run, settings, "title") == expected


@pytest.mark.parametrize("keep", [0, 1, 0.5])
@pytest.mark.parametrize("unit", ["title_and_passage", "passage"])
def test_a_sentence_and_its_passage_without_it(tree: Tree, keep: float, unit: str) -> None:
    changes = ["views.mix={cloze: 1}", f"views.cloze_keep={keep}", f"corpus.unit={unit}"]
    run = prepared(settings := negatives_settings(tree, *changes))
    pairs = pairs_of(run, settings, "cloze")
    bodies, titles = run.corpus.bodies(range(len(run.corpus))), run.corpus.titles(range(len(run.corpus)))
    assert pairs.keys() == {i for i, body in enumerate(bodies) if len(sentences_or_runs(body)) > 1}
    stays = 0
    for i, (sentence, rest) in pairs.items():
        sentences = sentences_or_runs(bodies[i])
        assert sentence in sentences
        title = titles[i] if unit == "title_and_passage" else None
        stays += rest == titled(title, bodies[i])
        assert rest in (titled(title, bodies[i]), titled(title, " ".join(s for s in sentences if s != sentence)))
    assert stays / len(pairs) == pytest.approx(keep, abs=0.15)


def test_two_runs_of_words_of_a_passage(tree: Tree) -> None:
    changes = ["views.mix={crop: 1}", "views.crop_least=0.2", "views.crop_most=0.6"]
    run = prepared(settings := negatives_settings(tree, *changes))
    bodies, pairs = run.corpus.bodies(range(len(run.corpus))), pairs_of(run, settings, "crop")
    for i, crops in pairs.items():
        for crop in crops:
            assert f" {crop} " in f" {bodies[i]} "
            words = len(bodies[i].split())
            assert max(3, 0.2 * words - 0.5) <= len(crop.split()) <= max(3, 0.6 * words + 0.5)
    shares = [len(crop.split()) / len(bodies[i].split()) for i in pairs for crop in pairs[i] if len(bodies[i]) > 100]
    assert min(shares) < 0.3 and max(shares) > 0.5 and any(a != b for a, b in pairs.values())


def test_text_without_blanks_is_cropped_by_characters(tree: Tree, tmp_path: Path) -> None:
    make = maker(run := prepared(negatives_settings(tree)), negatives_settings(tree))
    passage = replace(make._passages(np.array([0]))[0], body="今天天气很好我们去公园散步然后回家吃饭")
    pair = make.pair("crop", passage, np.random.default_rng(0))
    assert pair is not None and all(3 <= len(crop) < 12 and crop in passage.body for crop in pair)
    assert make.pair("crop", replace(passage, body="好天气"), np.random.default_rng(0)) is None
    assert len(run.corpus) > 100


def test_a_prompt_of_queries_that_leaves_no_token_is_refused(tree: Tree) -> None:
    changes = ["views.mix={title: 1}", "encoder.max_length=8", "encoder.prompts={query: the a one some every river}"]
    run = prepared(settings := negatives_settings(tree, *changes))
    with pytest.raises(DataError, match="encoder.max_length = 8: the prompt leaves no token"):
        made(run, settings)


def test_a_passage_and_the_next_of_its_document_or_the_one_before(tree: Tree) -> None:
    run = prepared(settings := negatives_settings(tree, "views.mix={neighbour: 1}"))
    texts, bodies = run.corpus.texts(range(len(run.corpus))), run.corpus.bodies(range(len(run.corpus)))
    documents = run.corpus.documents
    assert documents is not None
    views, expected = made(run, settings), {}
    for i, document in enumerate(documents):
        if i + 1 < len(documents) and documents[i + 1] == document:
            expected[i] = i + 1
        elif i and documents[i - 1] == document:
            expected[i] = i - 1
    assert {i: int(t) for i, t in enumerate(views.target_ids_b) if i != t} == expected
    assert pairs_of(run, settings, "neighbour") == {i: (bodies[i], texts[j]) for i, j in expected.items()}
    assert views.kinds == tuple("neighbour" if i in expected else "dropout" for i in range(len(documents)))


def test_the_rarest_words_of_a_passage_in_their_order(tree: Tree) -> None:
    changes = ["views.mix={keywords: 1}", "views.keywords_least=3", "views.keywords_most=5"]
    run = prepared(settings := negatives_settings(tree, *changes))
    texts, pairs = run.corpus.texts(range(len(run.corpus))), pairs_of(run, settings, "keywords")
    rows_of = Counter(word for text in texts for word in set(text.lower().replace(".", " ").split()) if len(word) > 1)
    sizes = set()
    for i, (query, text) in pairs.items():
        words, chosen = [w for w in texts[i].lower().replace(".", " ").split() if len(w) > 1], query.lower().split()
        assert text == texts[i] and len(set(chosen)) == len(chosen)
        assert [words.index(word) for word in chosen] == sorted(words.index(word) for word in chosen)
        left = set(words) - set(chosen)
        assert not left or max(rows_of[word] for word in chosen) <= min(rows_of[word] for word in left)
        sizes.add(len(chosen))
    assert sizes == {3, 4, 5}


# ------------------------------------------------------------------------------------------------ the mixture


def test_kinds_are_drawn_by_their_weights_and_rows_that_do_not_do_fall_to_the_next(tree: Tree) -> None:
    run = prepared(settings := negatives_settings(tree, "views.mix={title: 3, cloze: 1}"))
    possible = {kind: set(pairs_of(run, settings, kind)) for kind in ("title", "cloze")}
    drawn: Counter[str] = Counter()
    first: Counter[str] = Counter()
    for number in range(20):
        views = made(run, settings, number)
        for i, kind in enumerate(views.kinds):
            assert (kind == "dropout") == (i not in possible["title"] | possible["cloze"])
            assert kind == "dropout" or i in possible[kind]
            if i in possible["title"] & possible["cloze"]:
                drawn[kind] += 1
        first.update(views.impossible)
        neither = set(range(len(run.corpus))) - possible["title"] - possible["cloze"]
        assert min(views.impossible.values()) >= len(neither) > 0  # both kinds were tried
    assert drawn["title"] / drawn.total() == pytest.approx(0.75, abs=0.04)
    assert drawn.keys() == {"title", "cloze"}


def test_dropout_in_the_mixture_is_two_views_of_the_row(tree: Tree) -> None:
    run = prepared(settings := negatives_settings(tree, "views.mix={title: 1, dropout: 1}"))
    views = made(run, settings)
    share = np.mean([kind == "dropout" for kind in views.kinds])
    assert 0.4 < share < 0.8
    rows = run.corpus.token_rows(range(len(run.corpus)))
    for i in np.flatnonzero(~views.paired_b):
        assert views.anchors[i] is views.targets[i] and np.array_equal(views.anchors[i], rows[i])


def test_views_hang_on_seed_number_and_row_alone(tree: Tree) -> None:
    run = prepared(settings := negatives_settings(tree, ALL))
    everyone, some = made(run, settings, 7), made(run, settings, 7, ids := [40, 3, 77, 12])
    for place, i in enumerate(ids):
        assert some.kinds[place] == everyone.kinds[i]
        assert np.array_equal(some.anchors[place], everyone.anchors[i])
        assert np.array_equal(some.targets[place], everyone.targets[i])
        assert some.target_ids_b[place] == everyone.target_ids_b[i]
    np.testing.assert_array_equal(some.hashes_b2, everyone.hashes_b2[ids])
    for other in (made(run, settings, 8), made(run, negatives_settings(tree, ALL, "run.seed=4"), 7)):
        assert sum(np.array_equal(a, b) for a, b in zip(other.anchors, everyone.anchors, strict=True)) < 70


def test_anchors_are_queries_and_positives_documents_cut_to_the_length_of_training(tree: Tree) -> None:
    changes = ["views.mix={title: 1}", "encoder.max_length=9", "corpus.passage_words=100"]
    changes += ["encoder.prompts={query: 'the one ', document: 'every garden '}"]
    run = prepared(settings := negatives_settings(tree, *changes))
    views, pairs = made(run, settings), pairs_of(run, settings, "title")
    for i, (title, body) in pairs.items():
        assert views.anchors[i].tolist() == run.encoder.tokenize([title], 9, side="query")[0].tolist()
        assert views.targets[i].tolist() == run.encoder.tokenize([body], 9, side="document")[0].tolist()
        assert views.hashes_b2[i].tolist() == [row_hash(views.anchors[i]), row_hash(views.targets[i])]
    assert max(map(len, views.targets)) == 9
    texts = run.corpus.texts([0])
    assert run.corpus.token_rows([0])[0].tolist() == run.encoder.tokenize(texts, 9, side="document")[0].tolist()


def test_a_pair_that_the_model_cannot_tell_apart_is_none(tree: Tree, tmp_path: Path, cache_dir: str) -> None:
    rows = [
        {"id": "1", "title": "river stone", "text": "River Stone"},
        {"id": "2", "title": "\u200d!", "text": "a tree"},
    ]
    rows += [{"id": "3", "title": "old tree", "text": "a tree walks"}]
    tree["corpus"] = documents_section(tmp_path, rows, cache_dir)
    run = prepared(settings := negatives_settings(tree, "views.mix={title: 1}", "train.batch_size=2"))
    views = made(run, settings)
    assert (views.kinds[0], views.kinds[2]) == ("dropout", "title") and views.impossible["title"] >= 1


# ------------------------------------------------------------------------------------------------ batches


def test_the_batch_of_a_step_holds_the_views_and_rows_that_share_a_text_do_not_repel(
    tree: Tree, tmp_path: Path, cache_dir: str
) -> None:
    documents = make_documents()
    documents[3]["title"] = documents[10]["title"] = "the bright river"  # of two documents
    tree["corpus"] = documents_section(tmp_path, documents, cache_dir)
    run = prepared(settings := negatives_settings(tree, "views.mix={title: 1}"))
    titles = run.corpus.titles(range(len(run.corpus)))
    ids = np.array([titles.index("the bright river"), len(titles) - 1 - titles[::-1].index("the bright river"), 0, 1])
    assert run.corpus.documents is not None and run.corpus.documents[ids[0]] != run.corpus.documents[ids[1]]
    views = made(run, settings, 0, ids)
    batch = local_batch(0, ids, run.corpus, None, settings=settings, views=views)
    assert batch.rows == views.anchors and batch.targets == views.targets
    mask = repelled(batch)
    assert mask is not None and not mask[0, 1] and mask[0, 2]
    without = repelled(local_batch(0, ids, run.corpus, None, settings=settings))
    assert without is None or without[0, 1]


def repelled(batch: LocalBatch) -> np.ndarray | None:
    """Which rows repel each other, as a step finds it."""
    mask, _ = _repelled(batch, distributed.RankShare.of(batch.sizes), torch.device("cpu"))
    return None if mask is None else mask.numpy()


def test_views_are_made_ahead_in_one_thread_and_no_more_than_asked_for(tree: Tree) -> None:
    run = prepared(settings := negatives_settings(tree, ALL))
    begun: list[tuple[int, str]] = []
    make, hold = maker(run, settings), threading.Event()

    def watched(number: int, ids_B: np.ndarray) -> Views:
        begun.append((number, threading.current_thread().name))
        assert number < 5 or hold.wait(seconds(30))
        return make(number, ids_B)

    with BatchViews(watched, run.plan, kinds=KINDS, ahead=3) as views:
        (first,) = views.take([0], [None])
        assert np.array_equal(first.hashes_b2, make(0, run.plan.batch(0)).hashes_b2)
        assert views.of(2) is views.of(2) and max(n for n, _ in begun) <= 3
        assert [v.kinds for v in views.take([1, 2], [None, None])] == [make(n, run.plan.batch(n)).kinds for n in (1, 2)]
        hold.set()
        views.of(5)
        assert sorted(n for n, _ in begun) == [0, 1, 2, 3, 4, 5]  # each once
        assert len({name for _, name in begun}) == 1 and begun[0][1] != threading.current_thread().name
        facts = views.metrics([views.window()])
        assert sum(value for name, value in facts.items() if name.endswith(("dropout", "_kept"))) == 8
        assert facts.keys() == {"views/dropout", *(f"views/{k}_{f}" for k in KINDS for f in FATES)}
        assert sum(views.metrics([views.window()]).values()) == 0


FATES = ("kept", "dropped", "impossible")


def views_step(tree: Tree, world: int) -> tuple[float, torch.Tensor]:
    """Loss and gradient of one step on views, over all ranks."""
    settings = negatives_settings(tree, ALL, "encoder.dropout=0", "train.batch_size=13")
    run = prepared(settings)
    with batch_views(settings, run.corpus, run.plan, run.encoder) as ahead:
        (views,) = ahead.take([2], [rank_slice(np.arange(13), distributed.rank(), distributed.world_size()) % 4 == 0])
    batch = local_batch(2, run.plan.batch(2), run.corpus, None, settings=settings, views=views)
    objective = Objective(settings.objective, dimension=run.encoder.dimension, device=run.encoder.device)
    context = StepContext(objective, seed=1, step=0, total_steps=10, chunk_size=None)
    model: Any = run.encoder
    if world > 1:
        model = DistributedDataParallel(run.encoder, broadcast_buffers=False, find_unused_parameters=True)
    optimizer = torch.optim.SGD(run.encoder.parameters(), lr=0.0)
    metrics, _ = train_step(model, optimizer, [batch], context, max_grad_norm=1e9)
    return float(metrics["loss"]), torch.cat([p.grad.flatten() for p in run.encoder.parameters() if p.grad is not None])


def work(rank: int, world: int, port: int, tree: Tree, out: str) -> None:
    join_group(rank, world, port)
    torch.save(views_step(tree, world), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_train_on_the_views_of_one_process(tree: Tree, tmp_path: Path) -> None:
    loss, gradient = views_step(tree, 1)
    mp.spawn(work, (2, free_port(), tree, str(tmp_path)), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert found[0] == pytest.approx(loss, rel=1e-5)
        assert (found[1] - gradient).norm() <= 1e-5 * gradient.norm()


# ------------------------------------------------------------------------------------------------ the index


def own_cosines(run: Run, views: Views, batch: Any) -> tuple[np.ndarray, np.ndarray]:
    """The cosines of anchors and all passages in the index's version, and those with their own."""
    vectors = run.source.inner.vectors(np.arange(len(run.corpus)), version=batch.version).astype(np.float64)
    anchors = np.stack([run.encoder.encode_rows([row], side="query", unit_norm=True)[0] for row in views.anchors])
    cosines = anchors.astype(np.float64) @ vectors.T
    return cosines, np.take_along_axis(cosines, views.target_ids_b[:, None], 1)[:, 0]


@pytest.mark.parametrize("agreement", [2, 5])
def test_a_pair_is_used_if_the_index_finds_its_passage(
    tree: Tree, tmp_path: Path, agreement: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [ALL, f"views.agreement={agreement}", "train.max_steps=1", "encoder.dropout=0", "train.batch_size=40"]
    settings = negatives_settings(tree, *changes, "train.learning_rate=1e-9")
    with taken(monkeypatch) as batches:
        run = carry_out(settings, tmp_path)
    batch, views = batches[0][0], made(run, settings, 0, run.plan.batch(0))
    cosines, own = own_cosines(run, views, batch)
    sure = np.array([(row > o - 1e-5).sum() - 1 == (row > o + 1e-5).sum() for row, o in zip(cosines, own, strict=True)])
    nearer = (cosines > own[:, None] + 1e-5).sum(axis=1)
    assert batch.dropped_b is not None and sure.sum() > 30
    np.testing.assert_array_equal(batch.dropped_b[sure], (views.paired_b & (nearer >= agreement))[sure])
    assert batch.dropped_b.any() and (views.paired_b & ~batch.dropped_b).any()
    # What is dropped is trained on as a dropout view, and its neighbours are those of its passage.
    final = views.without(batch.dropped_b)
    for i in np.flatnonzero(batch.dropped_b):
        assert final.kinds[i] == "dropout" and final.anchors[i] is final.targets[i]
    vectors = run.source.inner.vectors(np.arange(len(run.corpus)), version=batch.version)
    for i in np.flatnonzero(batch.dropped_b)[:10]:
        cosines_N = vectors[run.plan.batch(0)[i]] @ vectors[batch.ids_bm[i]].T
        np.testing.assert_allclose(np.sort(cosines_N)[::-1], cosines_N, atol=1e-6)
    logged = run.logs[0].metrics
    for kind in KINDS:
        of_kind = np.array([k == kind for k in views.kinds])
        assert logged[f"views/{kind}_dropped"] == (of_kind & batch.dropped_b).sum()
        assert logged[f"views/{kind}_kept"] == (of_kind & ~batch.dropped_b).sum()
        assert logged[f"views/{kind}_impossible"] == views.impossible[kind]
    assert logged["views/dropout"] == (~views.paired_b).sum() + batch.dropped_b.sum()


def planted(folder: Path, cache_dir: str) -> dict[str, Any]:
    """Documents whose title is their text in another order, but for some that have the title of another."""
    documents = [d for d in make_documents(80) if d["text"].count(".") == 1]
    for d in documents:
        d["title"] = " ".join(reversed(d["text"].rstrip(".").split()))
    for i in range(0, len(documents) - 1, 3):
        documents[i]["title"] = documents[i + 1]["title"]
    return documents_section(folder, documents, cache_dir)


def test_a_title_of_another_document_is_not_used(
    tree: Tree, tmp_path: Path, cache_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree["corpus"] = planted(tmp_path, cache_dir) | {"unit": "passage"}
    changes = ["views.mix={title: 1}", "views.agreement=2", "train.max_steps=3", "train.batch_size=4"]
    settings = negatives_settings(tree, *changes, "negatives.candidates=6", "negatives.per_anchor=1")
    with taken(monkeypatch) as batches:
        run = carry_out(settings, tmp_path / "run")
    wrong = {i for i in range(0, len(run.corpus) - 1, 3)}
    for step, (batch,) in batches.items():
        assert batch.dropped_b is not None
        assert batch.dropped_b.tolist() == [int(i) in wrong for i in run.plan.batch(step)]
    assert sum(log.metrics["views/title_dropped"] for log in run.logs) > 1
    late = ["views.agreement_after_steps=2", "train.learning_rate=1e-9"]
    with taken(monkeypatch) as batches:
        run = carry_out(negatives_settings(tree, *changes, *late, "negatives.candidates=6"), tmp_path / "late")
    assert [batch.dropped_b is None for (batch,) in batches.values()] == [True, True, False]


def test_an_answer_without_some_shard_drops_no_pair_that_it_could_not_find(tree: Tree, tmp_path: Path) -> None:
    tree["corpus"] = planted(tmp_path, tree["corpus"]["cache_dir"]) | {"unit": "passage"}
    changes = ["views.mix={title: 1}", "views.agreement=2", "train.max_steps=2", "train.batch_size=4"]
    settings = negatives_settings(tree, *changes, "negatives.candidates=6", "negatives.per_anchor=1")
    run = prepared(settings)
    really = run.source.search

    def search(row_ids: np.ndarray, *, k: int, **how: Any) -> Hits:
        hits = really(row_ids, k=k, **how)
        gone = hits.ids_Bk % 2 == 1  # the rows of one of two shards
        hits.ids_Bk[gone], hits.scores_Bk[gone] = -1, -np.inf
        order = np.argsort(hits.ids_Bk < 0, axis=1, kind="stable")
        ids, scores = (np.take_along_axis(a, order, 1) for a in (hits.ids_Bk, hits.scores_Bk))
        return replace(hits, ids_Bk=ids, scores_Bk=scores, complete=False)

    run.source.search = search  # type: ignore[method-assign]
    carry_out(settings, tmp_path / "run", run=run)
    kept, dropped = (sum(log.metrics[f"views/title_{fate}"] for log in run.logs) for fate in ("kept", "dropped"))
    odd = sum(int(i) % 2 for step in range(2) for i in run.plan.batch(step))
    assert kept >= odd > 0 and kept + dropped == 8
    assert run.finished is not None and run.series("partial") == [1, 1]


@pytest.mark.parametrize(
    "changes",
    [
        ("negatives.source=none",),
        ("views.agreement=6", "negatives.mask_reciprocal=3", "negatives.prefetch_batches=5"),
        ("views.agreement=3", "negatives.use=fresh", "train.grad_cache_chunk_size=3", "train.accumulation_steps=2"),
    ],
)
def test_an_interrupted_run_goes_on_bit_for_bit(tree: Tree, tmp_path: Path, changes: tuple[str, ...]) -> None:
    assert_goes_on_bit_for_bit(negatives_settings(tree, ALL, *changes), tmp_path)


@pytest.mark.parametrize("agreement", [None, 4])
def test_smoothing_groups_of_views_are_near_the_passages(
    tree: Tree, tmp_path: Path, agreement: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [ALL, f"views.agreement={'null' if agreement is None else agreement}", "train.max_steps=1"]
    changes += ["objective.name=instance_smoothing", "objective.group_size=3", "train.learning_rate=1e-9"]
    with taken(monkeypatch) as batches:
        run = carry_out(negatives_settings(tree, *changes), tmp_path)
    batch, ids_B, documents = batches[0][0], run.plan.batch(0), run.corpus.documents
    assert documents is not None and (batch.dropped_b is not None) == (agreement is not None)
    vectors = run.source.inner.vectors(np.arange(len(run.corpus)), version=batch.version).astype(np.float64)
    cosines = np.where(documents[ids_B][:, None] != documents, vectors[ids_B] @ vectors.T, -2)
    nearest = np.sort(cosines, axis=1)[:, ::-1][:, :3]
    np.testing.assert_allclose(np.take_along_axis(cosines, batch.ids_bm, 1), nearest, atol=1e-5)


def test_training_on_titles_finds_passages_by_their_titles(tree: Tree, tmp_path: Path) -> None:
    changes = ["views.mix={title: 1}", "negatives.source=none", "train.max_steps=60", "train.log_every_steps=10"]
    run = carry_out(negatives_settings(tree, *changes, "train.batch_size=16"), tmp_path)
    assert run.logs[-1].metrics["contrastive_accuracy"] > run.logs[0].metrics["contrastive_accuracy"] + 0.2


# ------------------------------------------------------------------------------------------------ masks in the batch


@pytest.mark.parametrize("by", ["mask_batch", "mask_reciprocal"])
def test_a_near_duplicate_in_the_batch_is_not_repelled(
    tree: Tree, tmp_path: Path, cache_dir: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [d for d in make_documents(60) if d["text"].count(".") == 1]
    twin = documents[5] | {"id": "twin", "text": documents[5]["text"].replace(".", " stone.")}
    tree["corpus"] = documents_section(tmp_path, [*documents, twin], cache_dir)
    everything = len(documents) + 1
    asked = {"mask_batch": ["negatives.mask_batch=true", "negatives.max_score=0.985"],
             "mask_reciprocal": ["negatives.mask_reciprocal=1"]}[by]  # fmt: skip
    changes = [f"train.batch_size={everything}", "train.max_steps=1", "encoder.dropout=0", "negatives.candidates=5"]
    masks, losses = {}, {}
    for name, more in {"without": [], "with": asked}.items():
        settings = negatives_settings(tree, *changes, *more, "negatives.columns=none", "objective.name=hybrid",
                                      "objective.k=3")  # fmt: skip
        with taken(monkeypatch) as batches:
            run = carry_out(settings, tmp_path / name)
        ids = run.plan.batch(0)
        masks[name] = repelled(local_batch(0, ids, run.corpus, batches[0][0], settings=settings))
        losses[name] = run.logs[0].metrics["loss"]
    masked = run.series("masked_in_batch")[0]
    i, j = (int(np.flatnonzero(ids == row)[0]) for row in (5, everything - 1))
    mask = masks["with"]
    assert masks["without"] is None and mask is not None
    assert not mask[i, j] and not mask[j, i] and (mask == mask.T).all() and not mask.diagonal().any()
    assert (~mask).sum() == everything + 2 * masked and masked < everything
    assert losses["with"] < losses["without"]


# ------------------------------------------------------------------------------------------------ settings

MISTAKES = {
    "views.mix={title: 1} corpus.source=auto corpus.positive_column=answer": "leave one of them out",
    "views.mix={neighbour: 1} corpus.repel_within_document=true": "repel_within_document repels them",
    "views.mix={title: 1} views.agreement=5 negatives.source=none": "agreement asks the index.*negatives.source",
    "negatives.mask_batch=true negatives.max_score=0.9 negatives.source=none": "mask_batch asks the index",
    "negatives.mask_batch=true": "mask_batch has no limit",
    "negatives.mask_reciprocal=13": "mask_reciprocal 13 is more than the 12 candidates",
    "views.mix={title: 1} views.agreement=13": r"agreement = 13 is more than negatives\.candidates = 12",
    "views.agreement=4": "agreement is for pairs",
    "views.mix={title: 1} views.agreement=51": "50",
    "views.mix={title: -1}": "title",
    "views.mix={titles: 1}": "titles",
    "views.crop_least=0.6": "crop_least 0.6 is more than crop_most 0.5",
    "views.keywords_least=11": "keywords_least 11 is more than keywords_most 10",
}


@pytest.mark.parametrize("changes", MISTAKES)
def test_settings_that_do_not_fit_are_refused(tree: Tree, changes: str) -> None:
    with pytest.raises(SettingsError, match=MISTAKES[changes]):
        load_settings(tree, [*negatives_base(), *_split(changes)])


def negatives_base() -> tuple[str, ...]:
    return ("negatives.source=in_process", "negatives.candidates=12", "negatives.max_score=null")


def _split(changes: str) -> list[str]:
    """Overrides at the blanks outside braces."""
    found, depth = [""], 0
    for character in changes:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == " " and not depth:
            found.append("")
        else:
            found[-1] += character
    return found


def test_the_mixture_is_read_back_as_it_was(tree: Tree) -> None:
    settings = negatives_settings(tree, "views.mix={title: 0.4, cloze: 0.6}")
    assert settings.views.mix.asked_for == {"title": 0.4, "cloze": 0.6} and settings.views.active
    assert Settings.model_validate(json.loads(settings.model_dump_json())) == settings
    assert (
        not negatives_settings(tree).views.active
        and not negatives_settings(tree, "views.mix={dropout: 1}").views.active
    )
