"""One, two and four ranks on the same global batch: the same loss and the same gradient, for every objective."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rank_parity import BATCH, BUFFER, CASES, SENTENCES, Found, errors, facts, free_port, gradients, join_group
from tiny import make_sentences
from torch.nn.parallel import DistributedDataParallel

from hncse_ray.config import OBJECTIVES, EncoderSettings, load_settings
from hncse_ray.corpus import batch_mask, rank_slice
from hncse_ray.encoder import freeze_unused, load_encoder
from hncse_ray.errors import ModelError
from hncse_ray.evaluation import StsPair, StsPairs, evaluate_retrieval, paired_set, spearman
from hncse_ray.training.distributed import gather_rows
from hncse_ray.training.encoding import ShardedEncode
from hncse_ray.training.objective import Objective
from hncse_ray.training.repelled import ColumnFacts
from hncse_ray.training.step import LocalBatch, StepContext, StepNegatives, train_step

M = 3
# name of the case -> objective, fresh or stored, columns, chunk size, accumulated batches, which slots are usable
GLOBAL: dict[str, tuple[str, str, str, int | None, int, str]] = {
    "info_nce, stored": ("info_nce", "stored", "own", None, 1, "most"),
    "info_nce, fresh": ("info_nce", "fresh", "own", None, 1, "most"),
    "info_nce, fresh, all": ("info_nce", "fresh", "all", None, 1, "most"),
    "info_nce, fresh, all, cached": ("info_nce", "fresh", "all", 2, 1, "most"),
    "info_nce, fresh, few": ("info_nce", "fresh", "own", None, 1, "few"),
    "info_nce, fresh, few, cached": ("info_nce", "fresh", "own", 2, 1, "few"),
    "info_nce, fresh, none": ("info_nce", "fresh", "own", None, 1, "none"),
    "info_nce, fresh, none, cached": ("info_nce", "fresh", "own", 2, 1, "none"),
    "positive_mixing, fresh, only mixed": ("positive_mixing", "fresh", "none", None, 1, "most"),
    "hard_negative_mixing, fresh, cached": ("hard_negative_mixing", "fresh", "own", 3, 1, "most"),
    "hybrid, stored, all, cached": ("hybrid", "stored", "all", 2, 1, "most"),
    "hybrid, fresh, all, accumulated": ("hybrid", "fresh", "all", None, 2, "most"),
    "distillation, fresh, all": ("distillation", "fresh", "all", None, 1, "most"),
    "distillation, fresh, all, cached": ("distillation", "fresh", "all", 2, 1, "most"),
    "distillation, stored, accumulated": ("distillation", "stored", "own", 3, 2, "few"),
    "instance_smoothing, stored": ("instance_smoothing", "stored", "own", None, 1, "most"),
    **{f"{name}, twins": (name, "fresh", "own", None, 1, "most") for name in OBJECTIVES},
    **{f"{name}, twins, cached": (name, "fresh", "own", 2, 1, "most") for name in OBJECTIVES},
    "own, stored": ("own_losses:noisy", "stored", "own", None, 1, "most"),
    "own, fresh, all, cached": ("own_losses:noisy", "fresh", "all", 2, 2, "most"),
    "own, twins": ("own_losses:noisy", "fresh", "own", None, 1, "most"),
    "own rows": ("own_losses:in_rows", "stored", "own", None, 1, "most"),
    "own rows, cached": ("own_losses:in_rows", "stored", "own", 2, 2, "most"),
}
# The same with their embeddings cut to these widths too.
WIDTHS = (20, 9)
GLOBAL |= {
    f"{case}, cut": GLOBAL[case]
    for case in (
        "info_nce, fresh, few, cached",
        "hybrid, fresh, all, accumulated",
        "hybrid, stored, all, cached",
        "positive_mixing, fresh, only mixed",
        "hard_negative_mixing, fresh, cached",
        "instance_smoothing, stored",
        "own, fresh, all, cached",
        "instance_smoothing, twins, cached",
    )
}
TWINS = [2, 7, 16]  # in batches with twins these rows are the first one again, on each rank of two and three of four


def step_negatives(
    number: int, rank: int, world: int, vectors_ND: np.ndarray, *, use: str, columns: str, slots: str
) -> StepNegatives:
    """Neighbours as the loop would hand them over; drawn alike on every rank, whatever their use."""
    rng = np.random.default_rng([number, 5])
    ids_Bm = rng.integers(len(SENTENCES), size=(BATCH, M))
    mask_Bm = rng.random((BATCH, M)) < {"most": 0.8, "few": 1.0, "none": 0.0}[slots]
    if slots == "few":
        mask_Bm[3:] = False  # the later ranks have none, and so have later chunks of the first
    mask_Bm[0] = slots == "most"
    teacher_BL = rng.random((BATCH, BATCH + M * (BATCH if columns == "all" else 1))).astype(np.float32)
    barred_BM = np.where(rng.random((BATCH, M)) < 0.3, ids_Bm[::-1], -1)

    def own(of_all: np.ndarray) -> np.ndarray:
        return rank_slice(of_all, rank, world)

    ids_bm, mask_bm = own(np.where(mask_Bm, ids_Bm, -1)), own(mask_Bm)
    facts = None
    if columns == "all":
        anchors = own(np.arange(number * BATCH, (number + 1) * BATCH))
        documents = np.arange(len(SENTENCES)) // 3
        facts = ColumnFacts(ids_bm, ids_bm[..., None], documents[ids_bm], anchors, anchors[:, None],
                            documents[anchors], own(barred_BM))  # fmt: skip
    if use == "stored":
        return StepNegatives(mask_bm, own(vectors_ND[ids_Bm] * mask_Bm[..., None]), None, own(teacher_BL), facts)
    chosen = [[int(i) for i in row] for row in ids_bm]
    return StepNegatives(mask_bm, None, chosen, own(teacher_BL), facts)  # type: ignore[arg-type]


def global_gradients(model: str, rank: int, world: int) -> Found:
    """Loss and flattened gradient of one step with global negatives, in each case, on this rank."""
    found = {}
    for case, (name, use, columns, chunk, accumulation, slots) in GLOBAL.items():
        overrides = [f"objective.name={name}", "encoder.dropout=0", "encoder.pooling=mean"]
        overrides += [f"encoder.model={model}", "encoder.precision=fp32"]
        if name == "instance_smoothing":
            overrides += [f"objective.buffer_size={BUFFER}", "objective.group_size=4", "objective.weight=2"]
        if name == "own_losses:noisy":
            overrides.append("objective.settings.noise=0.2")
        if case.endswith(", cut"):
            overrides.append(f"objective.dimensions={list(WIDTHS)}")
        settings = load_settings({"corpus": {"source": "python-docs"}}, overrides)
        encoder = load_encoder(model, settings.encoder)
        freeze_unused(encoder)
        wrapped = encoder if world == 1 else DistributedDataParallel(encoder, broadcast_buffers=False)
        objective = Objective(settings.objective, dimension=encoder.dimension, device=encoder.device, columns=columns)
        rows, batches = encoder.tokenize(SENTENCES), []
        vectors_ND = encoder.encode_rows(rows, unit_norm=True)
        for number in range(accumulation):
            ids = np.arange(number * BATCH, (number + 1) * BATCH)
            if "twins" in case:
                ids[TWINS] = ids[0]
            sizes = tuple(len(rank_slice(ids, r, world)) for r in range(world))
            n = step_negatives(number, rank, world, vectors_ND, use=use, columns=columns, slots=slots)
            if n.fresh_bm is not None:
                tokens = [[rows[i] if i >= 0 else None for i in own] for own in n.fresh_bm]
                n = replace(n, fresh_bm=tokens)
            start = sum(sizes[:rank])
            mask = batch_mask(ids, own=slice(start, start + sizes[rank]))
            batches.append(LocalBatch(number, [rows[i] for i in rank_slice(ids, rank, world)], sizes, n, mask))
        context = StepContext(objective=objective, seed=1, step=0, total_steps=10, chunk_size=chunk)
        optimizer = torch.optim.SGD(encoder.parameters(), lr=0.0)
        metrics, _ = train_step(wrapped, optimizer, batches, context, max_grad_norm=1e9)
        flat = torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])
        found[case] = (float(metrics["loss"]), flat, facts(metrics, objective))
    return found


def sharded_vectors(model: str | Path) -> np.ndarray:
    settings = load_settings({"corpus": {"source": "python-docs"}, "encoder": {"pooling": "mean"}})
    return ShardedEncode(load_encoder(model, settings.encoder), batch_size=5)(SENTENCES)


def sharded_scores(model: str | Path) -> dict[str, float]:
    """Scores of sentences and parts of them, as a run would score its sets."""
    settings = load_settings({"corpus": {"source": "python-docs"}, "encoder": {"pooling": "mean"}})
    encode = ShardedEncode(load_encoder(model, settings.encoder), batch_size=3)
    whole = make_sentences(40, seed=7)
    parts = [" ".join(sentence.split()[::3]) for sentence in whole]
    pairs = tuple(StsPair(w, p, i % 6) for i, (w, p) in enumerate(zip(whole, parts, strict=True)))
    return {
        "spearman": spearman(encode, StsPairs("pairs", pairs)),
        **evaluate_retrieval(encode, paired_set(whole, parts)),
    }


def broken_on_the_last_rank(model: str, broken: bool) -> None:
    encoder = load_encoder(model, EncoderSettings(model=model, pooling="mean"))
    if broken:
        with torch.no_grad():
            next(encoder.parameters()).fill_(torch.nan)
    ShardedEncode(encoder, batch_size=5)(SENTENCES)


def work(rank: int, world: int, port: int, model: str, out: str) -> None:
    join_group(rank, world, port)
    found: dict[str, object] = {"gradients": gradients(model, rank, world), "vectors": sharded_vectors(model)}
    found["scores"] = sharded_scores(model)
    found["global"] = global_gradients(model, rank, world)
    gathered = gather_rows(torch.full((rank, 2), float(rank)), tuple(range(world)))
    found["gathered"] = gathered[:, 0].tolist()
    try:
        broken_on_the_last_rank(model, rank == world - 1)
    except ModelError as error:
        found["encoding error"] = str(error)
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Found:
    return gradients(str(tiny_model), 0, 1)


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    out = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (request.param, free_port(), str(tiny_model), str(out)), nprocs=request.param)
    return [torch.load(out / f"{r}.pt", weights_only=False) for r in range(request.param)]


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_those_of_one_process(case: str, ranks: list[dict], reference: Found) -> None:
    assert reference[case][1].norm() > 1e-3
    for found in ranks:
        error = errors(found["gradients"], reference)[case]
        assert error["loss"] <= 1e-5 and error["gradient"] <= 1e-5


@pytest.mark.parametrize("case", [*CASES, *GLOBAL])
def test_every_rank_reports_and_remembers_what_one_process_does(
    case: str, ranks: list[dict], reference: Found, global_reference: Found
) -> None:
    kind, expected = ("gradients", reference) if case in CASES else ("global", global_reference)
    for found in ranks:
        assert found[kind][case][2] == pytest.approx(expected[case][2], rel=1e-4, abs=1e-6)


@pytest.fixture(scope="module")
def global_reference(tiny_model: Path) -> Found:
    return global_gradients(str(tiny_model), 0, 1)


@pytest.mark.parametrize("case", GLOBAL)
def test_with_global_negatives_too(case: str, ranks: list[dict], global_reference: Found) -> None:
    assert global_reference[case][1].norm() > 1e-3
    for found in ranks:
        error = errors(found["global"], {case: global_reference[case]})[case]
        assert error["loss"] <= 1e-5 and error["gradient"] <= 1e-5


CACHED = [
    "distillation, fresh, all",
    "info_nce, fresh, all",
    "info_nce, fresh, few",
    "info_nce, fresh, none",
    *(f"{o}, twins" for o in OBJECTIVES),
]


@pytest.mark.parametrize("case", CACHED)
def test_gradient_caching_changes_nothing_of_global_negatives(case: str, global_reference: Found) -> None:
    cached = global_reference[f"{case}, cached"]
    error = errors({case: cached}, {case: global_reference[case]})[case]
    assert error["loss"] <= 1e-5 and error["gradient"] <= 1e-5


def test_the_cases_with_global_negatives_differ_as_they_should(global_reference: Found) -> None:
    """Else the comparisons above would say little."""
    loss = {case: found[0] for case, found in global_reference.items()}
    fresh, stored = global_reference["info_nce, fresh"], global_reference["info_nce, stored"]
    assert fresh[0] == pytest.approx(stored[0], rel=1e-5)
    assert (fresh[1] - stored[1]).norm() > 0.1 * stored[1].norm()
    names = ("info_nce, fresh", "info_nce, fresh, all", "info_nce, fresh, few", "info_nce, fresh, none", "own, stored")
    assert len({round(loss[name], 3) for name in names}) == 5
    for name in loss:
        assert name.endswith(", cut") or abs(loss[name] - loss.get(f"{name}, cut", 0)) > 1e-3


def test_gradient_caching_changes_nothing(reference: Found) -> None:
    error = errors({"hybrid": reference["hybrid, cached"]}, {"hybrid": reference["hybrid"]})["hybrid"]
    assert error["loss"] <= 1e-5 and error["gradient"] <= 1e-5


def test_sharded_encoding_gives_the_vectors_of_one_process(ranks: list[dict], tiny_model: Path) -> None:
    alone = sharded_vectors(tiny_model)
    for found in ranks:
        np.testing.assert_allclose(found["vectors"], alone, atol=1e-6)
        np.testing.assert_array_equal(found["vectors"], ranks[0]["vectors"])


def test_sharded_evaluation_gives_the_scores_of_one_process(ranks: list[dict], tiny_model: Path) -> None:
    """The ranks compute with one thread each, the process alone with three."""
    torch.set_num_threads(3)
    alone = sharded_scores(tiny_model)
    assert 0.1 < alone["mrr"] < 0.9
    for found in ranks:
        assert found["scores"] == pytest.approx(alone, rel=0, abs=1e-9)


def test_gathering_takes_ranks_of_any_size_even_none(ranks: list[dict]) -> None:
    expected = [float(r) for r in range(len(ranks)) for _ in range(r)]
    assert all(found["gathered"] == expected for found in ranks)


def test_vectors_that_one_rank_refuses_are_refused_by_all(ranks: list[dict]) -> None:
    """None of them waits in the sum over ranks for one that does not come."""
    assert all("its vectors are not numbers" in found["encoding error"] for found in ranks)
