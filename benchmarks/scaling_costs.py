"""What encoding, building, searching, gathering and a step cost, and how a run goes that pays them: closed formulas.

Constants are those measured on a CPU (`benchmarks/results/`, `LOG.md`); a GPU's are the caller's. Memory is that of
`plan_index`. See docs/scaling.md and `scaling_model.py`.
"""

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from hncse_ray.negatives import IndexPlan, plan_index
from hncse_ray.negatives.index_plan import training_rows

CHUNK_BYTES = 5e6  # in which Ray sends an object: those that go to several nodes at once take turns
POLL_S = 0.25  # a client looks at the pool's state so often
BUILDING_SLOWS_SEARCH = 1.9  # LOG.md, pool_build: p99 57 ms against 30 ms
# Bytes that choosing the best takes for each score, at the bandwidth that is reached: results/gpu_index_h200.json,
# where a million rows more cost 64 queries 1.33 ms and 512 queries 8.7, less the products and the reading of vectors.
SELECT_BYTES = 35
# LOG.md, "Where a step goes": forward 41.5 %, AdamW 5.0 %, which now takes 17 ms where it took 109.
FORWARD_SHARE = 0.415 / (1 - 0.05 * (1 - 17 / 109))
GPU_STEP_OVER_FORWARD = 3.0  # the usual count: the backward pass computes twice the forward; not measured
PREPARE_S_A_ROW = 222 / 1e6  # README: one million sentences in 222 s, one process, under other load
# Of a hit of a shard's answer, merged and selected among: results/data_plane_cpu.json, the part lookup, 0.034 s for the
# 33 hits that 64 shards give for each of 512 anchors.
MERGE_S = 0.034 / (64 * 512 * 33)
# Of a batch's rows of all trainers, of a trainer's own, and of the tokens of views that are made of texts:
# results/data_plane_cpu.json, the part input.
GLOBAL_ROW_S, OWN_ROW_S, VIEW_TOKEN_S = 0.23e-6, 1.7e-6, 3.0e-6
SHARD_BYTES = 16  # of main memory a row, whatever the index: a shard orders its own rows; the corpus itself is mapped
_KMEANS_ROUNDS, _PQ_ROUNDS, _PQ_ROWS = 10, 25, 65_536  # faiss 1.15's defaults


@dataclass(frozen=True)
class Encoder:
    """A transformer: parameters of its layers compute, all parameters travel."""

    layer_parameters: float
    parameters: float
    dimension: int

    @property
    def flops_a_token(self) -> float:
        """Of a forward pass; attention's own products are left out, a few percent for sentences."""
        return 2 * self.layer_parameters


MINILM = Encoder(10.65e6, 22.6e6, 384)
BERT_BASE = Encoder(86e6, 110e6, 768)


@dataclass(frozen=True)
class Device:
    """What a shard or a trainer computes on; all rates as reached, not as advertised.

    Attributes:
        flops: of the encoder's passes, a second.
        search_flops: of the products of a search, a second.
        bandwidth: bytes a second that a search reads; inf where the products are all that counts.
        memory: bytes free for both versions of a shard's index; None: not bounded.
        host_flops: of the CPU beside it, which trains the IVF kinds.
        step_over_forward: what forward, backward and optimiser take, in forward passes.
        on_gpu: where the vectors live.
    """

    flops: float
    search_flops: float
    bandwidth: float
    memory: float | None
    host_flops: float
    step_over_forward: float
    on_gpu: bool


@dataclass(frozen=True)
class Setup:
    """A run: who trains on what, and what the pool is made of. Bytes a second; `batch` is the global one."""

    rows: int
    encoder: Encoder
    device: Device
    tokens: float = 25.0
    trainers: int = 8
    batch: int = 512
    shards: int = 1
    shards_per_node: int = 1
    candidates: int = 32
    per_anchor: int = 1
    index: str = "flat"
    views: bool = False  # made of passages' texts at every step
    nic: float = 1.25e9
    trainer_link: float = 10e9  # between trainers, for the gradient
    overhead_s: float = 0.02  # a look-up that costs nothing else
    call_s: float = 0.0002  # one call of an actor, in the client


@dataclass(frozen=True)
class Rules:
    """The settings of `negatives` that decide about time."""

    refresh_every: int = 100
    prefetch: int = 2
    sync: bool = False
    shared: float | None = None  # part of the trainers' hardware that a build takes beside a step; None: its own


@dataclass(frozen=True)
class Costs:
    """What one of each thing takes; the formulas and the simulation start from the same."""

    step_s: float
    input_s: float  # one batch of one trainer, in the thread that makes them a step ahead
    search_s: float  # one batch on one shard
    overhead_s: float
    shards: int
    nodes: int
    nic: float
    query_bytes: float  # to each pool node
    answer_bytes: float  # from each shard
    gather_bytes: float  # the batch's own vectors, before the search
    stored_bytes: float  # the neighbours' vectors, after it
    weight_bytes: float  # to each pool node, once a version
    build_s: float  # one shard


@dataclass(frozen=True)
class Steady:
    """How a run goes once it goes evenly."""

    period_s: float  # from step to step
    look_up_s: float
    age_steps: float  # mean, of the version behind a step's neighbours
    refresh_steps: float  # between two versions; more than asked for where refreshes are skipped
    waiting: float  # share of steps that find no answer ready
    overhead: float  # share of the time that the steps themselves do not take


# ---- the parts


def encode_s(setup: Setup, rows: float) -> float:
    """Seconds that one shard encodes so many rows."""
    return rows * setup.tokens * setup.encoder.flops_a_token / setup.device.flops


def finish_s(plan: IndexPlan, device: Device) -> float:
    """Seconds from the last vector to an index: nothing for the exact kinds; training (on the CPU) and adding else."""
    if not plan.nlist:
        return 0.0
    assign = 2.0 * plan.dimension * plan.nlist
    train = _KMEANS_ROUNDS * training_rows(plan.rows, plan.nlist) * assign
    books = 256 * 2.0 * plan.dimension if plan.pq_bytes else 0.0
    train += _PQ_ROUNDS * min(_PQ_ROWS, training_rows(plan.rows, plan.nlist)) * books
    return train / device.host_flops + plan.rows * (assign + books) / device.search_flops


def index_of(setup: Setup) -> IndexPlan:
    """The index of the largest shard, as the pool would plan it; raises where it does not fit."""
    return plan_index(
        setup.index,  # type: ignore[arg-type]
        rows=-(-setup.rows // setup.shards),
        dimension=setup.encoder.dimension,
        memory_bytes=setup.device.memory,
        on_gpu=setup.device.on_gpu,
    )


def search_s(plan: IndexPlan, queries: int, device: Device) -> float:
    """Seconds that one shard takes for a batch: products, or reading the vectors, whichever takes longer.

    An exact index on a GPU then has to choose among the scores of all rows; on a CPU faiss's own time includes that.
    """
    choosing = 0.0
    if not plan.nlist:
        width = 2 if plan.on_gpu else 4
        products, reading = 2.0 * queries * plan.rows * plan.dimension, plan.rows * plan.dimension * width
        choosing = queries * plan.rows * SELECT_BYTES / device.bandwidth  # 0 on a CPU
    else:
        seen = queries * plan.rows * plan.nprobe / plan.nlist
        width = (plan.pq_bytes or 4 * plan.dimension) + 8
        products = 2.0 * queries * plan.nlist * plan.dimension + (0 if plan.pq_bytes else 2.0 * seen * plan.dimension)
        reading = seen * width
    return max(products / device.search_flops, reading / device.bandwidth) + choosing


def merge_s(setup: Setup) -> float:
    """Seconds that a trainer takes to merge the answers for its anchors and to select among them."""
    return MERGE_S * setup.shards * setup.batch / setup.trainers * (setup.candidates + 1)


def step_s(setup: Setup) -> float:
    """Seconds of a training step: two views of the batch, the gradient's exchange hidden behind the backward pass."""
    forward = 2 * setup.batch / setup.trainers * setup.tokens * setup.encoder.flops_a_token / setup.device.flops
    compute = forward * setup.device.step_over_forward
    exchange = 2 * (setup.trainers - 1) / setup.trainers * 4 * setup.encoder.parameters / setup.trainer_link
    return max(compute, forward + exchange)


def input_s(setup: Setup) -> float:
    """Seconds of one core that a trainer takes for its part of a batch, beside the step.

    One thread draws, reads and lays out; where views are made of texts, another makes them. The slower one counts.
    """
    own = setup.batch / setup.trainers
    views = VIEW_TOKEN_S * 2 * setup.tokens * own if setup.views else 0.0
    return max(GLOBAL_ROW_S * setup.batch + OWN_ROW_S * own, views)


@lru_cache(maxsize=10_000)
def costs_of(setup: Setup) -> Costs:
    """All of them, for one run."""
    plan, width = index_of(setup), 4 * setup.encoder.dimension
    return Costs(
        step_s=step_s(setup),
        input_s=input_s(setup),
        search_s=search_s(plan, setup.batch, setup.device),
        # Two calls: search, with the vectors of the next batch's rows, and the vectors of what is selected.
        overhead_s=setup.overhead_s + 2 * setup.shards * setup.call_s + merge_s(setup),
        shards=setup.shards,
        nodes=-(-setup.shards // setup.shards_per_node),
        nic=setup.nic,
        query_bytes=setup.batch * width,
        answer_bytes=setup.batch * (setup.candidates + 1) * 12,  # float32 score, int64 id
        gather_bytes=setup.batch * width,
        stored_bytes=setup.batch * setup.per_anchor * width,
        weight_bytes=2 * setup.encoder.parameters,  # bf16
        build_s=encode_s(setup, plan.rows) + finish_s(plan, setup.device),
    )


# ---- the whole


def look_up_s(costs: Costs, *, slower: float = 1.0) -> float:
    """Seconds from asking for a batch's neighbours to having them, nobody else asking."""
    sent = costs.gather_bytes + costs.nodes * costs.query_bytes + costs.shards * costs.answer_bytes + costs.stored_bytes
    return costs.overhead_s + sent / costs.nic + slower * costs.search_s


def busiest_s(costs: Costs, *, slower: float = 1.0) -> float:
    """Seconds of the busiest thing that all look-ups share: a shard, or the first trainer's network card."""
    inward = costs.gather_bytes + costs.shards * costs.answer_bytes + costs.stored_bytes
    return max(slower * costs.search_s, inward / costs.nic, costs.nodes * costs.query_bytes / costs.nic)


def period_s(costs: Costs, rules: Rules, *, step: float | None = None, slower: float = 1.0) -> float:
    """Seconds from step to step: the step's own, or what keeps its rows or their neighbours from being there."""
    own, look_up = step or costs.step_s, look_up_s(costs, slower=slower)
    ahead = (look_up + costs.input_s + own) / (rules.prefetch + 1)  # asked for `prefetch` steps ago
    # Two threads ask, and one makes the batches.
    return max(own, costs.input_s, ahead, look_up / 2, busiest_s(costs, slower=slower))


def build_all_s(costs: Costs) -> float:
    """Seconds from publishing to the version, on hardware of its own: one node sends the weights to all others."""
    return costs.nodes * costs.weight_bytes / costs.nic + costs.build_s


def steady(costs: Costs, rules: Rules) -> Steady:
    """The closed formulas. They hold for times that do not vary."""
    every, look_up, plain = rules.refresh_every, look_up_s(costs), period_s(costs, rules)
    if rules.sync:
        # The first look-up after a build has none ahead of it, nor has its batch.
        cycle = every * plain + build_all_s(costs) + look_up + costs.input_s
        late = 1.0 if plain > costs.step_s else 1 / every
        return Steady(cycle / every, look_up, (every - 1) / 2, every, late, 1 - every * costs.step_s / cycle)
    # First the weights go out, through the card that the queries leave by; they take turns, chunk by look-up.
    queries, weights = (costs.nodes * size / costs.nic for size in (costs.query_bytes, costs.weight_bytes))
    chunk = min(CHUNK_BYTES, costs.weight_bytes)
    sending = max(plain, queries * (1 + chunk / (2 * costs.query_bytes)))
    sending_s = weights / (1 - queries / sending)
    # Then the shards build: searches are slower, and steps too where the hardware is shared.
    own, build = costs.step_s, costs.build_s
    if rules.shared is not None:
        own, build = costs.step_s / (1 - rules.shared), costs.build_s / rules.shared
    building = period_s(costs, rules, step=own, slower=BUILDING_SLOWS_SEARCH)
    late = sending_s / sending + build / building + POLL_S / 2 / plain  # steps until the version is used
    between = every * math.ceil(late / every)
    took = sending_s + build + (between - sending_s / sending - build / building) * plain
    phases = [
        (sending_s / sending, sending > costs.step_s),
        (build / building, building > own),
        (between - sending_s / sending - build / building, plain > costs.step_s),
    ]
    waiting = min(1.0, sum(steps for steps, waits in phases if waits) / between)
    age = rules.prefetch + math.ceil(late) + (between - 1) / 2
    return Steady(took / between, look_up, age, between, waiting, 1 - between * costs.step_s / took)


def host_bytes(rows: int, shards: int) -> dict[str, float]:
    """Main memory that grows with the corpus, in each process, whatever the index."""
    return {"shard": SHARD_BYTES * rows / shards}


# ---- constants


def measured_cpu(results: Path) -> tuple[Device, dict[str, float]]:
    """The machine of `benchmarks/results/`, two cores, and the figures it comes from."""
    throughput = json.loads((results / "training_throughput_cpu.json").read_text())["contestants"]["hncse_ray, fp32"]
    serving = json.loads((results / "pool_serving_cpu.json").read_text())
    steps = json.loads((results / "pool_steps_cpu.json").read_text())
    trained = 2 * throughput["sentences_per_s"] * throughput["padded_tokens"]  # tokens of two views
    forward = trained / FORWARD_SHARE
    faiss_s = min(timing["median"] for timing in serving["faiss"].values())
    search = 2.0 * serving["batch"] * serving["rows"] * serving["dimension"] / faiss_s
    flops = forward * MINILM.flops_a_token
    facts = {
        "trained tokens/s": trained,
        "forward tokens/s": forward,
        "forward GFLOP/s": flops / 1e9,
        "search GFLOP/s (FAISS with BLAS)": search / 1e9,
        "step s, none": steps["median_step_s"]["none"],
        "step s, stored": steps["median_step_s"]["stored"],
    }
    return Device(flops, search, math.inf, None, search, 1 / FORWARD_SHARE, on_gpu=False), facts
