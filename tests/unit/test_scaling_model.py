"""The cost model of docs/scaling.md: its limits, its directions, and that a simulation does what it says."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import scaling_model
import scaling_simulation
from scaling_costs import (
    BERT_BASE,
    MINILM,
    Costs,
    Device,
    Rules,
    Setup,
    build_all_s,
    busiest_s,
    costs_of,
    encode_s,
    finish_s,
    index_of,
    input_s,
    look_up_s,
    measured_cpu,
    period_s,
    search_s,
    steady,
    step_s,
)
from scaling_model import best, least_memory, needed
from scaling_simulation import cases, simulate

from hncse_ray.errors import ClusterError
from hncse_ray.negatives import plan_index

ROOT = Path(__file__).parents[2]
GPU = Device(2e13, 2e13, 1.5e11, 1.9e10, 5e11, 3.0, on_gpu=True)
SETUP = Setup(rows=10**6, encoder=BERT_BASE, device=GPU)
EVEN = Costs(
    step_s=0.1,
    input_s=0.004,
    search_s=0.02,
    overhead_s=0.02,
    shards=2,
    nodes=2,
    nic=1.25e9,
    query_bytes=1e5,
    answer_bytes=1e5,
    gather_bytes=1e5,
    stored_bytes=1e5,
    weight_bytes=4e7,
    build_s=5.0,
)


def test_encoding_is_rows_times_tokens_times_the_layers_operations() -> None:
    assert encode_s(SETUP, 10**6) == pytest.approx(10**6 * 25 * 2 * 86e6 / 2e13)
    assert encode_s(SETUP, 2000) == pytest.approx(2 * encode_s(SETUP, 1000))


def test_memory_is_the_planners_and_so_is_the_refusal() -> None:
    plan = index_of(replace(SETUP, shards=3, index="ivf_pq"))
    assert plan == plan_index("ivf_pq", rows=333334, dimension=768, memory_bytes=1.9e10, on_gpu=True)
    with pytest.raises(ClusterError, match="does not fit"):
        index_of(replace(SETUP, rows=10**8))
    least = least_memory(replace(SETUP, rows=10**8))
    assert least is not None
    index_of(replace(SETUP, rows=10**8, shards=least))
    with pytest.raises(ClusterError):
        index_of(replace(SETUP, rows=10**8, shards=least - 1))


def test_a_corpus_that_no_pool_holds_has_no_answer() -> None:
    assert least_memory(replace(SETUP, rows=10**12)) is None
    assert best(replace(SETUP, rows=10**12), 1000) is None


def test_the_exact_kinds_have_nothing_to_finish_and_ivf_trains_on_the_cpu() -> None:
    flat, ivf = (plan_index(kind, rows=10**6, dimension=768, memory_bytes=None) for kind in ("flat", "ivf_pq"))
    assert finish_s(flat, GPU) == 0
    assert finish_s(ivf, replace(GPU, host_flops=1e11)) > finish_s(ivf, replace(GPU, host_flops=math.inf)) > 0


def test_a_search_reads_for_few_queries_multiplies_for_many_and_chooses_for_all() -> None:
    plan = plan_index("flat", rows=10**6, dimension=768, memory_bytes=None, on_gpu=True)
    assert search_s(plan, 1, GPU) == pytest.approx(10**6 * (768 * 2 + 35) / 1.5e11)
    assert search_s(plan, 4096, GPU) == pytest.approx(4096 * 10**6 * (2 * 768 / 2e13 + 35 / 1.5e11))
    assert search_s(plan, 4096, replace(GPU, bandwidth=math.inf)) == pytest.approx(2 * 4096 * 10**6 * 768 / 2e13)
    ivf = plan_index("ivf_pq", rows=10**6, dimension=768, memory_bytes=None, on_gpu=True)
    assert search_s(ivf, 512, GPU) < search_s(plan, 512, GPU) / 10


def test_a_step_is_compute_or_the_exchange_of_gradients() -> None:
    alone = replace(SETUP, trainers=1, batch=64)
    assert step_s(alone) == pytest.approx(3 * 2 * 64 * 25 * 172e6 / 2e13)
    assert step_s(replace(SETUP, trainer_link=1e9)) > 0.7  # 2 x 7/8 x 440 MB at 1 GB/s
    assert step_s(replace(SETUP, trainer_link=1e15)) == pytest.approx(step_s(alone))


def test_more_shards_build_faster_until_the_weights_fill_the_network() -> None:
    times = [build_all_s(costs_of(replace(SETUP, rows=10**8, index="ivf_pq", shards=n))) for n in (8, 32, 128, 2048)]
    assert times[0] > times[1] > times[2]
    assert times[3] > times[2]  # 2,048 copies of the weights through one card


def test_a_look_up_grows_with_everything_that_is_sent() -> None:
    for name in ("query_bytes", "answer_bytes", "gather_bytes", "stored_bytes", "search_s", "overhead_s"):
        assert look_up_s(replace(EVEN, **{name: 2 * getattr(EVEN, name)})) > look_up_s(EVEN), name
    assert look_up_s(replace(EVEN, nic=math.inf)) == pytest.approx(0.04)


def test_the_input_of_a_batch_is_its_rows_of_all_trainers_and_a_trainers_own() -> None:
    alone, of_eight = (input_s(replace(SETUP, batch=4096, trainers=n)) for n in (1, 8))
    assert of_eight < alone < 8 * of_eight  # which rows meet is drawn by each for all
    of_texts = replace(SETUP, views=True)
    assert input_s(of_texts) == pytest.approx(input_s(replace(of_texts, tokens=50)) / 2)  # the tokenizer's time
    assert input_s(of_texts) > 5 * input_s(SETUP)


def test_where_the_input_is_slower_than_a_step_more_gpus_are_no_help() -> None:
    device = replace(GPU, flops=1e18, search_flops=1e18, bandwidth=math.inf)
    quick = replace(SETUP, device=device, batch=8192, candidates=1, overhead_s=0, nic=math.inf, trainer_link=math.inf)
    assert step_s(quick) < input_s(quick)
    answer = needed(quick, 10**6)
    assert answer is not None and answer.period_over_step == pytest.approx(1)  # the pool is not what slows it


def test_the_period_is_the_step_until_one_of_five_things_is_slower() -> None:
    rules = Rules()
    assert period_s(EVEN, rules) == EVEN.step_s
    assert period_s(replace(EVEN, search_s=0.3), rules) == pytest.approx(0.3)  # one shard, one batch after another
    assert period_s(replace(EVEN, input_s=0.3), rules) == pytest.approx(0.3)  # one thread
    slow = replace(EVEN, overhead_s=1.0, search_s=0.0, nic=math.inf)
    assert period_s(slow, rules) == pytest.approx(0.5)  # two threads
    assert period_s(slow, replace(rules, prefetch=64)) == pytest.approx(0.5)  # which more look-ahead does not help
    assert period_s(replace(slow, overhead_s=0.16), Rules(prefetch=1)) == pytest.approx((0.16 + 0.004 + 0.1) / 2)
    thin = replace(EVEN, nic=1e6)
    assert period_s(thin, rules) >= busiest_s(thin) >= 2 * EVEN.query_bytes / 1e6


def test_the_age_is_that_of_the_build_and_half_an_interval() -> None:
    free = replace(EVEN, build_s=0.0, weight_bytes=1.0)
    assert steady(free, Rules(100)).age_steps == pytest.approx(2 + 2 + 99 / 2)  # ahead, and the news of it
    assert steady(EVEN, Rules(100, sync=True)).age_steps == 99 / 2
    ages = [steady(replace(EVEN, build_s=s), Rules(100)).age_steps for s in (1, 5, 9, 15, 40)]
    assert ages == sorted(ages)


def test_an_interval_shorter_than_a_build_becomes_a_multiple() -> None:
    assert steady(replace(EVEN, build_s=9.0), Rules(100)).refresh_steps == 100
    assert steady(replace(EVEN, build_s=11.0), Rules(100)).refresh_steps == 200
    assert steady(replace(EVEN, build_s=33.0), Rules(100)).refresh_steps == 400


def test_shared_hardware_pays_for_the_build_whoever_waits() -> None:
    rules, local = Rules(100, shared=0.5), replace(EVEN, nodes=1, weight_bytes=1.0)
    assert steady(local, rules).period_s == pytest.approx((100 * 0.1 + 5) / 100, rel=0.01)
    assert steady(local, Rules(100)).period_s == pytest.approx(0.1)
    slower = steady(local, replace(rules, shared=0.4))  # the same work, later done
    assert slower.period_s == pytest.approx(steady(local, rules).period_s, rel=0.01)
    assert slower.age_steps > steady(local, rules).age_steps


@pytest.mark.parametrize("name", list(cases()))
def test_the_simulation_agrees_with_the_formulas(name: str) -> None:
    costs, rules = cases()[name]
    formula = steady(costs, rules)
    even = simulate(costs, rules, steps=2000, jitter=0.0)
    assert even.period_s == pytest.approx(formula.period_s, rel=0.02)
    assert even.age_steps == pytest.approx(formula.age_steps, rel=0.05)
    assert even.refresh_steps == pytest.approx(formula.refresh_steps)
    assert even.waiting == pytest.approx(formula.waiting, abs=0.02)
    varying = simulate(costs, rules, steps=2000, jitter=0.2)
    assert varying.period_s == pytest.approx(formula.period_s, rel=0.08)
    assert varying.age_steps == pytest.approx(formula.age_steps, rel=0.08)


def test_skipped_refreshes_are_those_of_the_packages_own_rules() -> None:
    seen = simulate(replace(EVEN, build_s=25.0), Rules(100), steps=1000, jitter=0.0)
    assert seen.refresh_steps == 300
    # the first version is waited for; then two of three are skipped: 100, (200, 300), 400, (500, 600), 700, (800, 900)
    assert seen.skipped == 6
    assert simulate(EVEN, Rules(100), steps=1000, jitter=0.0).skipped == 0


def test_the_same_seed_is_the_same_run() -> None:
    runs = [simulate(EVEN, Rules(50), steps=300, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_fewer_steps_between_versions_take_more_gpus() -> None:
    setup = replace(SETUP, rows=10**7, index="ivf_pq")
    answers = [needed(setup, every) for every in (3000, 10_000, 100_000)]
    gpus = [answer.gpus for answer in answers if answer is not None]
    assert None not in gpus and gpus == sorted(gpus, reverse=True) and gpus[0] > gpus[-1]  # type: ignore[type-var]
    hopeless = needed(setup, 10)
    assert hopeless is not None and hopeless.gpus is None
    assert hopeless.decided_by == "too slow to build" and hopeless.shortest_steps > 10


def test_an_answer_holds_builds_and_answers() -> None:
    setup = replace(SETUP, rows=10**8)
    answer = best(setup, 20_000)
    assert answer is not None and answer.gpus is not None
    costs = costs_of(replace(setup, index=answer.index, shards=answer.gpus))
    assert build_all_s(costs) <= 20_000 * step_s(setup)
    assert period_s(costs, Rules(20_000)) <= 1.1 * step_s(setup)
    assert answer.gpus >= answer.memory_gpus


def test_constants_come_from_the_committed_results_and_land_near_other_measurements() -> None:
    results = ROOT / "benchmarks" / "results"
    device, facts = measured_cpu(results)
    assert device.flops == pytest.approx(facts["forward tokens/s"] * MINILM.flops_a_token)
    compared = scaling_simulation.against_measured(device, results)
    off = {name: pair["model_over_measured"] for name, pair in compared.items()}
    assert 0.7 < off.pop("search of 64 in a million rows, 2 shards, s") < 1.6
    assert all(0.45 < ratio < 1.3 for ratio in off.values()), off


def test_the_tables_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = scaling_model.table(SETUP, [10**6, 10**12], [10_000])
    scaling_model.show("a GPU", lines)
    assert lines[0]["gpus"] == 2 and lines[1]["index"] is None
    assert "does not fit" in capsys.readouterr().out
