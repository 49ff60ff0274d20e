"""Runs on pairs: what a rank encodes, the loss beside one worked out by hand, ranks, caching, the pool, resumption."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from negative_runs import assert_goes_on_bit_for_bit, carry_out, fresh_encoder, negatives_settings, prepared, taken
from pair_tables import COLUMNS, make_pairs, write_pairs
from rank_parity import free_port, join_group
from torch.nn.parallel import DistributedDataParallel

from hncse_ray.config import OBJECTIVES, Settings
from hncse_ray.corpus import Corpus, prepare_corpus, rank_slice
from hncse_ray.encoder import SentenceEncoder, freeze_unused
from hncse_ray.negatives import IndexVersion, plan_index, share_anchors
from hncse_ray.negatives.in_process import InProcessSource
from hncse_ray.objectives import WHOLE
from hncse_ray.training import distributed
from hncse_ray.training.batch import local_batch
from hncse_ray.training.lookup import BatchNegatives
from hncse_ray.training.objective import Objective
from hncse_ray.training.repelled import columns_mask
from hncse_ray.training.shard import build_shard
from hncse_ray.training.step import LocalBatch, StepContext, train_step

Tree = dict[str, Any]
ROWS = make_pairs()
B, M, T = 11, 2, 0.05  # rows of a batch, which do not divide by two; neighbours of each; temperature
IDS = [0, 1, 3, 4, 5, 6, 9, 14, 15, 16, 24]  # with one question, one answer and one document twice, and rows without


@pytest.fixture(scope="module")
def pairs_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("table") / "pairs.jsonl", ROWS)


@pytest.fixture
def tree(small_run: Tree, cache_dir: str, pairs_path: Path) -> Tree:
    small_run["corpus"] = {"path": str(pairs_path), "cache_dir": cache_dir, **COLUMNS}
    return small_run


def corpus_of(settings: Settings, encoder: SentenceEncoder) -> Corpus:
    return prepare_corpus(
        settings.corpus,
        tokenize=encoder.token_rows,
        tokenizer_digest=encoder.tokenizer_digest(),
        max_length=settings.encoder.max_length,
    )


def found_for(corpus: Corpus, encoder: SentenceEncoder, *, use: str, seed: int = 3) -> BatchNegatives:
    """Neighbours of this rank's rows as they are selected, drawn at random."""
    rng = np.random.default_rng(seed)
    ids_Bm = rng.integers(40, len(corpus), (B, M))
    ids_Bm[5, 0] = ids_Bm[2, 1]
    mask_Bm = rng.random((B, M)) < 0.8
    ids_Bm[~mask_Bm] = -1
    barred_Bk = rng.permutation(ids_Bm, axis=0)
    vectors_bmD = None
    here = distributed.rank(), distributed.world_size()
    ids_bm, mask_bm, barred_bk = (rank_slice(of_all, *here) for of_all in (ids_Bm, mask_Bm, barred_Bk))
    if use == "stored":
        vectors_bmD = encoder.encode_rows(corpus.targets(range(len(corpus))), unit_norm=True)[ids_bm]
        vectors_bmD[~mask_bm] = 0
    return BatchNegatives(ids_bm, mask_bm, vectors_bmD, None, np.full(len(ids_bm), -1), None, barred_bk)


def step(
    settings: Settings, encoder: SentenceEncoder, batches: list[LocalBatch], model: Any = None
) -> tuple[float, torch.Tensor]:
    """Loss and gradient of one step."""
    objective = Objective(
        settings.objective, dimension=encoder.dimension, device=encoder.device, columns=settings.negatives.columns
    )
    context = StepContext(objective, seed=1, step=0, total_steps=10, chunk_size=settings.train.grad_cache_chunk_size)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.0)
    metrics, _ = train_step(model or encoder, optimizer, batches, context, max_grad_norm=1e9)
    return float(metrics["loss"]), gradient_of(encoder)


def gradient_of(encoder: SentenceEncoder) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])


# ------------------------------------------------------------------------------------------------ the batch


def texts_of(i: int) -> set[str]:
    return {ROWS[i]["question"], ROWS[i]["answer"] or ROWS[i]["question"]}


def repels(i: int, j: int, *, within_document: bool = False) -> bool:
    same_document = ROWS[i]["document"] is not None and ROWS[i]["document"] == ROWS[j]["document"]
    return texts_of(i).isdisjoint(texts_of(j)) and (within_document or not same_document)


def given_to(i: int) -> list[str]:
    return [*ROWS[i]["wrong"], *filter(None, [ROWS[i]["worse"]])]


def test_a_batch_of_pairs(tree: Tree) -> None:
    settings = negatives_settings(tree)
    encoder = fresh_encoder(settings)
    corpus = corpus_of(settings, encoder)
    assert len(corpus) == len(ROWS) and corpus.report.without_positive == sum(r["answer"] is None for r in ROWS)
    batch = local_batch(5, np.array(IDS), corpus, None, settings=settings)
    assert (batch.number, batch.sizes) == (5, (B,))
    questions = encoder.tokenize([ROWS[i]["question"] for i in IDS], 24)
    answers = encoder.tokenize([ROWS[i]["answer"] or ROWS[i]["question"] for i in IDS], 24)
    assert batch.targets is not None and batch.mask_bB is not None
    assert [row.tolist() for row in batch.rows] == [row.tolist() for row in questions]
    assert [row.tolist() for row in batch.targets] == [row.tolist() for row in answers]
    assert batch.mask_bB.tolist() == [[repels(i, j) for j in IDS] for i in IDS]
    assert (~batch.mask_bB).sum() > B + 6  # there is something to see
    within = settings.model_copy(update={"corpus": settings.corpus.model_copy(update={"repel_within_document": True})})
    mask_bB = local_batch(5, np.array(IDS), corpus, None, settings=within).mask_bB
    assert mask_bB is not None and (mask_bB != batch.mask_bB).any()
    assert mask_bB.tolist() == [[repels(i, j, within_document=True) for j in IDS] for i in IDS]


@pytest.mark.parametrize("columns", ["own", "all"])
def test_given_negatives_are_masked_where_an_anchor_must_not_be_contrasted_with_them(tree: Tree, columns: str) -> None:
    settings = negatives_settings(tree, f"negatives.columns={columns}")
    encoder = fresh_encoder(settings)
    corpus = corpus_of(settings, encoder)
    ids = np.arange(28)
    batch = local_batch(0, ids, corpus, None, settings=settings)
    n = batch.negatives
    assert n is not None and n.fresh_bm is not None and n.stored_bmD is None
    width = max(len(given_to(i)) for i in ids)

    def barred(i: int, text: str) -> bool:
        return any(not repels(i, k) and text in texts_of(k) for k in ids)

    expected = np.zeros((28, width), bool)
    for i in ids:
        for k, text in enumerate(given_to(i)):
            expected[i, k] = not barred(i, text)
            row = n.fresh_bm[i][k]
            assert (row is not None) == expected[i, k]
            assert row is None or row.tolist() == encoder.tokenize([text], 24)[0].tolist()
    np.testing.assert_array_equal(n.mask_bm, expected)
    assert expected.sum() < sum(len(given_to(i)) for i in ids)
    if columns == "own":
        assert n.columns is None
        return
    assert n.columns is not None
    found = columns_mask(n.columns, torch.from_numpy(n.mask_bm), WHOLE).numpy()
    texts = [text for j in ids for text in [*given_to(j), *[""] * (width - len(given_to(j)))]]
    barred_everywhere = np.array([[barred(i, text) for text in texts] for i in ids])
    np.testing.assert_array_equal(found, expected.ravel() & ~barred_everywhere)


# ------------------------------------------------------------------------------------------------ the step by hand


def by_hand(
    settings: Settings, encoder: SentenceEncoder, corpus: Corpus, found: BatchNegatives | None
) -> tuple[float, torch.Tensor]:
    """InfoNCE as a double loop over texts, each encoded by itself; its gradient by autograd."""
    encoder.zero_grad()

    def embed(text: str) -> torch.Tensor:
        vector: torch.Tensor = encoder(encoder.features(encoder.tokenize([text], 24)))[0]
        return vector

    questions = [embed(ROWS[i]["question"]) for i in IDS]
    answers = [embed(ROWS[i]["answer"] or ROWS[i]["question"]) for i in IDS]
    given = [[embed(text) for text in given_to(i)] for i in IDS]

    def barred(i: int, text: str) -> bool:
        return any(not repels(IDS[i], k) and text in texts_of(k) for k in IDS)

    losses = []
    for i in range(B):
        columns = [answers[i]]
        columns += [answers[j] for j in range(B) if repels(IDS[i], IDS[j])]
        for j in range(B) if settings.negatives.columns == "all" else [i]:
            for vector, text in zip(given[j], given_to(IDS[j]), strict=True):
                if not barred(j, text) and not barred(i, text):
                    columns.append(vector)
            for n in range(M) if found is not None else ():
                assert found is not None
                hit, earlier = found.ids_bm[j, n], found.ids_bm.ravel()[: j * M + n]
                if not found.mask_bm[j, n]:
                    continue
                if settings.negatives.columns == "all" and (
                    hit in earlier or hit in found.barred_bk[i] or not repels(IDS[i], hit)
                ):
                    continue
                if found.vectors_bmD is None:
                    row = ROWS[found.ids_bm[j, n]]
                    columns.append(embed(row["answer"] or row["question"]))
                else:
                    columns.append(torch.from_numpy(found.vectors_bmD[j, n]))
        logits = torch.stack([questions[i] @ column for column in columns]) / T
        losses.append(torch.logsumexp(logits, 0) - logits[0])
    loss = torch.stack(losses).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), gradient_of(encoder)


@pytest.mark.parametrize("found", ["none", "stored", "fresh"])
@pytest.mark.parametrize("columns", ["own", "all"])
@pytest.mark.parametrize("chunk", ["null", "4"])
def test_loss_and_gradient_are_those_worked_out_by_hand(tree: Tree, found: str, columns: str, chunk: str) -> None:
    changes = [f"negatives.columns={columns}", f"train.grad_cache_chunk_size={chunk}", "encoder.dropout=0"]
    settings = negatives_settings(tree, *changes)
    encoder = fresh_encoder(settings)
    corpus = corpus_of(settings, encoder)
    neighbours = None if found == "none" else found_for(corpus, encoder, use=found)
    loss, gradient = step(settings, encoder, [local_batch(0, np.array(IDS), corpus, neighbours, settings=settings)])
    expected, by_autograd = by_hand(settings, encoder, corpus, neighbours)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert (gradient - by_autograd).norm() <= 1e-4 * by_autograd.norm()


def test_rows_without_a_positive_are_two_dropout_views(tree: Tree) -> None:
    settings = negatives_settings(tree)
    encoder = fresh_encoder(settings)
    corpus = corpus_of(settings, encoder)
    views: list[torch.Tensor] = []

    class Watched(Objective):
        def __call__(self, views_: Any, neighbours: Any = None, **how: Any) -> Any:
            views.extend(view.detach() for view in views_)
            return super().__call__(views_, neighbours, **how)

    objective = Watched(settings.objective, dimension=encoder.dimension, device=encoder.device)
    batch = local_batch(0, np.array(IDS), corpus, None, settings=settings)
    context = StepContext(objective, seed=1, step=0, total_steps=10, chunk_size=None)
    train_step(encoder, torch.optim.SGD(encoder.parameters(), lr=0.0), [batch], context, max_grad_norm=1.0)
    apart = (views[0] - views[1]).norm(dim=1)
    assert apart[IDS.index(6)] > 1e-3  # it has no answer


# ------------------------------------------------------------------------------------------------ ranks

NO_GIVEN = ("instance_smoothing", "distillation")  # which take no negatives that were given

# name of the case -> objective, neighbours, columns, chunk size, accumulated batches
CASES: dict[str, tuple[str, str, str, int | None, int]] = {
    **{f"{name}": (name, "none", "own", None, 1) for name in OBJECTIVES if name not in NO_GIVEN},
    **{f"{name}, cached": (name, "fresh", "all", 2, 1) for name in ("info_nce", "hybrid", "three_view")},
    "info_nce, stored": ("info_nce", "stored", "own", None, 1),
    "hybrid, fresh, accumulated": ("hybrid", "fresh", "own", None, 2),
    "hybrid, only mixed": ("hybrid", "none", "none", None, 1),
    "own": ("own_losses:noisy", "none", "all", None, 1),
}


def case_settings(tree: Tree, case: str) -> Settings:
    name, _, columns, chunk, _ = CASES[case]
    changes = [f"objective.name={name}", f"negatives.columns={columns}", "encoder.dropout=0"]
    changes += ["objective.settings.noise=0.2"] if ":" in name else []
    changes += ["objective.k=4"] if name in ("hybrid", "hard_negative_mixing") else []
    return negatives_settings(tree, *changes, f"train.grad_cache_chunk_size={'null' if chunk is None else chunk}")


def steps_of_all_cases(tree: Tree, world: int) -> dict[str, tuple[float, torch.Tensor]]:
    results = {}
    for case, (_, use, _, _, accumulation) in CASES.items():
        settings = case_settings(tree, case)
        encoder = fresh_encoder(settings)
        freeze_unused(encoder)
        corpus = corpus_of(settings, encoder)
        batches = []
        for number in range(accumulation):
            found = None if use == "none" else found_for(corpus, encoder, use=use, seed=number)
            ids = (np.array(IDS) + number * 24) % len(corpus)
            batches.append(local_batch(number, ids, corpus, found, settings=settings))
        model = encoder if world == 1 else DistributedDataParallel(encoder, broadcast_buffers=False)
        results[case] = step(settings, encoder, batches, model)
    return results


def work(rank: int, world: int, port: int, tree: Tree, out: str) -> None:
    join_group(rank, world, port)
    torch.save(steps_of_all_cases(tree, world), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_compute_what_one_process_does(tree: Tree, tmp_path: Path) -> None:
    reference = steps_of_all_cases(tree, 1)  # and the corpus is prepared
    mp.spawn(work, (2, free_port(), tree, str(tmp_path)), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for case, (loss, gradient) in reference.items():
            assert gradient.norm() > 1e-3, case
            assert found[case][0] == pytest.approx(loss, rel=1e-5), case
            assert (found[case][1] - gradient).norm() <= 1e-5 * gradient.norm(), case
    assert len({round(loss, 3) for loss, _ in reference.values()}) == len(CASES)


# ------------------------------------------------------------------------------------------------ whole runs


KINDS = [
    (objective, source, use, columns)
    for objective in OBJECTIVES
    for source, use in (("none", "stored"), ("in_process", "stored"), ("in_process", "fresh"))
    for columns in ("own", "all", "none")
    if not (objective == "instance_smoothing" and (use == "fresh" or columns != "own"))
    and not (objective in ("info_nce", "three_view", "distillation") and columns == "none")
]


@pytest.mark.parametrize(("objective", "source", "use", "columns"), KINDS)
def test_every_kind_of_run_trains_on_pairs(
    tree: Tree, tmp_path: Path, objective: str, source: str, use: str, columns: str
) -> None:
    changes = [f"objective.name={objective}", f"negatives.source={source}", f"negatives.use={use}"]
    changes += [f"negatives.columns={columns}", "train.max_steps=2", "negatives.candidates=20"]
    if objective in NO_GIVEN:
        changes.append("corpus.negative_columns=[]")
    if objective == "instance_smoothing":
        changes.append("objective.group_size=4")
    elif objective in ("hybrid", "hard_negative_mixing"):
        changes.append("objective.k=5")
    run = carry_out(negatives_settings(tree, *changes), tmp_path)
    assert run.finished is not None and run.finished.step == 2
    assert all(np.isfinite(log.metrics["loss"]) for log in run.logs)
    assert ("negatives/usable" in run.logs[0].metrics) == (source != "none")
    if source != "none":
        assert {"negatives/removed_same_document", "negatives/removed_same_content"} <= run.logs[0].metrics.keys()
        assert sum(run.series("removed_same_document")) > 0


def test_pairs_and_given_negatives_change_what_is_learnt(tree: Tree, tmp_path: Path) -> None:
    losses = {}
    for name, changes in {
        "pairs": ["corpus.negative_columns=[]"],
        "given": [],
        "one column": ["corpus.negative_columns=worse"],
        "all": ["negatives.columns=all"],
        "within": ["corpus.repel_within_document=true"],
        "sentences": ["corpus.positive_column=null", "corpus.negative_columns=[]"],
    }.items():
        changes += ["negatives.source=none", "train.max_steps=1", "train.batch_size=16", "encoder.dropout=0"]
        settings = negatives_settings(tree, *changes)
        losses[name] = carry_out(settings, tmp_path / name).logs[0].metrics["loss"]
    assert len({round(loss, 5) for loss in losses.values()}) == len(losses)
    assert losses["pairs"] < losses["one column"] < losses["given"] < losses["all"]


def test_training_on_pairs_finds_answers(tree: Tree, tmp_path: Path) -> None:
    settings = negatives_settings(tree, "negatives.source=none", "train.max_steps=60", "train.log_every_steps=10",
                                  "train.batch_size=16")  # fmt: skip
    run = carry_out(settings, tmp_path)
    assert run.logs[-1].metrics["contrastive_accuracy"] > run.logs[0].metrics["contrastive_accuracy"] + 0.2


@pytest.mark.parametrize("use", ["stored", "fresh"])
def test_the_pool_holds_targets_and_negatives_are_targets_of_the_hits(
    tree: Tree, tmp_path: Path, use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [
        f"negatives.use={use}",
        "train.max_steps=1",
        "negatives.candidates=30",
        "encoder.dropout=0",
        "run.seed=1",
    ]
    settings = negatives_settings(tree, *changes, "encoder.prompts={query: 'the one ', document: 'every '}")
    with taken(monkeypatch) as batches:
        run = carry_out(settings, tmp_path)
    encoder, corpus, batch = fresh_encoder(settings), run.corpus, batches[0][0]
    texts = [ROWS[i]["answer"] for i in range(len(ROWS))]
    vectors = np.stack([
        encoder.encode_rows(encoder.tokenize([text or row["question"]], 24, side="document" if text else "query"),
                            unit_norm=True)[0]
        for text, row in zip(texts, ROWS, strict=True)
    ]).astype(np.float64)  # fmt: skip
    assert isinstance(inner := run.source.inner, InProcessSource) and batch.version is not None
    np.testing.assert_allclose(inner.vectors(np.arange(len(ROWS)), version=batch.version), vectors, atol=2e-6)
    ids_B = run.plan.batch(0)
    outside = [all(texts_of(hit).isdisjoint(texts_of(other)) for other in ids_B) for hit in range(len(ROWS))]
    allowed = np.array([[outside[hit] and repels(i, hit) for hit in range(len(ROWS))] for i in ids_B])
    questions = encoder.tokenize([ROWS[i]["question"] for i in ids_B], 24, side="query")
    anchors = np.concatenate([encoder.encode_rows([row], unit_norm=True) for row in questions]).astype(np.float64)
    cosines = np.where(allowed, anchors @ vectors.T, -2)
    nearest = np.sort(cosines, axis=1)[:, ::-1][:, :3]
    assert batch.mask_bm.all()
    np.testing.assert_allclose(np.take_along_axis(cosines, batch.ids_bm, 1), nearest, atol=1e-5)
    assert_own_ranks(batch.ranks_b, anchors @ vectors.T, ids_B, k=31)
    found = batch.ranks_b >= 0
    assert found.any() and not found.all()
    assert run.series("own_found") == [found.mean()] and run.series("own_first") == [(batch.ranks_b == 0).mean()]
    step_batch = local_batch(0, ids_B, corpus, batch, settings=settings)
    assert step_batch.negatives is not None and step_batch.negatives.fresh_bm is not None
    if use == "fresh":
        rows = step_batch.negatives.fresh_bm[0][:3]
        expected = corpus.targets(batch.ids_bm[0])
        assert [row.tolist() for row in rows if row is not None] == [row.tolist() for row in expected]
    else:
        assert len(step_batch.negatives.fresh_bm[0]) == step_batch.negatives.mask_bm.shape[1] - 3


def test_a_smoothing_group_is_near_the_positive_and_not_near_the_anchor(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["objective.name=instance_smoothing", "objective.group_size=3", "corpus.negative_columns=[]"]
    changes += ["train.max_steps=1", "negatives.candidates=60", "encoder.dropout=0", "corpus.document_column=null"]
    with taken(monkeypatch) as batches:
        run = carry_out(negatives_settings(tree, *changes), tmp_path)
    batch, ids_B = batches[0][0], run.plan.batch(0)
    assert batch.version is not None and batch.mask_bm.all()
    vectors = run.source.inner.vectors(np.arange(len(ROWS)), version=batch.version).astype(np.float64)
    allowed = np.array([[repels(i, hit, within_document=True) for hit in range(len(ROWS))] for i in ids_B])
    cosines = np.where(allowed, vectors[ids_B] @ vectors.T, -2)
    nearest = np.sort(cosines, axis=1)[:, ::-1][:, :3]
    np.testing.assert_allclose(np.take_along_axis(cosines, batch.ids_bm, 1), nearest, atol=1e-5)
    assert "negatives/own_found" not in run.logs[0].metrics


def assert_own_ranks(ranks_B: np.ndarray, cosines_BN: np.ndarray, ids_B: np.ndarray, *, k: int) -> None:
    """As many rows are nearer than the own target, but for those that cannot be told apart."""
    for rank, cosines_N, own in zip(ranks_B, cosines_BN, ids_B, strict=True):
        nearer, as_near = ((cosines_N > cosines_N[own] + gap).sum() for gap in (1e-5, -1e-5))
        assert nearer <= rank < as_near if rank >= 0 else as_near > k


@pytest.mark.parametrize("count", [2, 3, 5])
def test_anchors_get_the_same_vectors_however_many_shards_embed_them(tree: Tree, count: int) -> None:
    settings = negatives_settings(tree)
    encoder = fresh_encoder(settings)
    corpus = corpus_of(settings, encoder)
    anchors = corpus.token_rows(range(100))
    weights = {name: tensor.numpy() for name, tensor in encoder.weights().items()}

    def embedded(shards: int) -> np.ndarray:
        vectors = []
        for number, blocks in enumerate(share_anchors(len(anchors), shards)):
            plan = plan_index("flat", rows=-(-len(corpus) // shards), dimension=encoder.dimension, memory_bytes=None)
            shard = build_shard(settings.negatives, settings.encoder, corpus, plan=plan, number=number, count=shards)
            shard.build(IndexVersion(0, "weights", corpus.digest, len(corpus)), weights)
            vectors.append(shard.embed([[anchors[i] for i in block] for block in blocks]))
        return np.concatenate(vectors)

    alone = embedded(1)
    np.testing.assert_array_equal(embedded(count), alone)
    np.testing.assert_allclose(alone, encoder.encode_rows(anchors, side="query", unit_norm=True), atol=2e-6)


def test_anchors_and_rows_are_embedded_side_by_side_without_dropout(tree: Tree) -> None:
    settings = negatives_settings(tree, "encoder.dropout=0.5", "negatives.encode_batch_size=2")
    encoder = fresh_encoder(settings)
    corpus = corpus_of(settings, encoder)
    plan = plan_index("flat", rows=len(corpus), dimension=encoder.dimension, memory_bytes=None)
    shard = build_shard(settings.negatives, settings.encoder, corpus, plan=plan)
    weights = {name: tensor.numpy() for name, tensor in encoder.weights().items()}
    versions = [IndexVersion(step, "weights", corpus.digest, len(corpus)) for step in range(5)]
    shard.build(versions[0], weights)
    everyone, block = np.arange(len(corpus)), [corpus.token_rows(range(16))]
    expected, rounds = shard.embed(block), 0
    with ThreadPoolExecutor(1) as builder:
        builds = [builder.submit(shard.build, version, weights) for version in versions[1:]]
        while not all(build.done() for build in builds):
            np.testing.assert_array_equal(shard.embed(block), expected)
            rounds += 1
    assert rounds > 10
    for version in versions[1:]:
        np.testing.assert_array_equal(shard.vectors(version, everyone), shard.vectors(versions[0], everyone))


@pytest.mark.parametrize(
    "changes",
    [
        ("negatives.source=none",),
        ("negatives.use=fresh", "negatives.columns=all"),
        ("negatives.use=stored", "objective.name=hybrid", "objective.k=5", "train.grad_cache_chunk_size=3"),
    ],
)
def test_an_interrupted_run_goes_on_bit_for_bit(tree: Tree, tmp_path: Path, changes: tuple[str, ...]) -> None:
    assert_goes_on_bit_for_bit(negatives_settings(tree, *changes), tmp_path)


def test_prompts_that_are_not_pooled_are_left_out_of_both_sides(tree: Tree) -> None:
    """The pooling leaves as many tokens out on both sides: the vectors are those of `encode`."""
    settings = negatives_settings(tree, "encoder.prompts={query: 'the one ', document: 'every garden '}",
                                  "encoder.dropout=0")  # fmt: skip
    encoder = fresh_encoder(settings)
    for stage in encoder.model:
        if hasattr(stage, "include_prompt"):
            stage.include_prompt = False
    assert encoder.unpooled_prompt("query") == encoder.unpooled_prompt("document") == 3
    corpus = corpus_of(settings, encoder)
    seen: list[torch.Tensor] = []

    class Watched(Objective):
        def __call__(self, views: Any, neighbours: Any = None, **how: Any) -> Any:
            seen.extend(view.detach() for view in views)
            return super().__call__(views, neighbours, **how)

    objective = Watched(settings.objective, dimension=encoder.dimension, device=encoder.device)
    batch = replace(local_batch(0, np.array([0, 1, 2]), corpus, None, settings=settings), mask_bB=None)
    context = StepContext(objective, seed=1, step=0, total_steps=10, chunk_size=None)
    train_step(encoder, torch.optim.SGD(encoder.parameters(), lr=0.0), [batch], context, max_grad_norm=1.0)
    for view, column, side in ((seen[0], "question", "query"), (seen[1], "answer", "document")):
        vectors = encoder.encode([ROWS[i][column] for i in range(3)], side=side)
        expected = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        np.testing.assert_allclose(view.numpy(), expected, atol=1e-5)


def test_the_corpus_is_prepared_with_the_prompts_of_the_model(tree: Tree) -> None:
    settings = negatives_settings(tree, "encoder.prompts={query: 'the one ', document: 'every garden '}")
    encoder = fresh_encoder(settings)
    corpus = corpus_of(settings, encoder)
    questions = encoder.tokenize([ROWS[0]["question"]], 24, side="query")
    answers = encoder.tokenize([ROWS[0]["answer"]], 24, side="document")
    assert corpus.token_rows([0])[0].tolist() == questions[0].tolist()
    assert corpus.targets([0])[0].tolist() == answers[0].tolist()
    tree["corpus"] = {name: tree["corpus"][name] for name in ("path", "cache_dir", "column")}
    default = ["encoder.prompts={query: 'the one '}", "encoder.default_prompt=query"]
    settings = negatives_settings(tree, *default)
    encoder = fresh_encoder(settings)
    rows = corpus_of(settings, encoder).token_rows([0])
    assert rows[0].tolist() == encoder.tokenize([ROWS[0]["question"]], 24)[0].tolist() == questions[0].tolist()


def test_a_run_s_batches_are_bucketed_by_the_longer_side(tree: Tree) -> None:
    run = prepared(negatives_settings(tree))
    longest = np.maximum(run.corpus.lengths, run.corpus.target_lengths)
    np.testing.assert_array_equal(run.plan._lengths, longest)
