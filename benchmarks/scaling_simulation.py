"""The costs of `scaling_costs.py` played event by event: trainers, look-ups ahead, shards, builds, a network.

What the closed formulas leave out happens here: every time varies, two look-ups meet at a shard, answers queue at the
first trainer's network card, weights go out through the card that queries leave by, the client sees a new version up to
0.25 s late. When to publish, skip or wait is decided by the package's own `decide`. The same seed gives the same run.

    python benchmarks/scaling_model.py         # runs the checks below, too
"""

import heapq
import json
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import scaling_costs as model
from scaling_costs import Costs, Device, Rules, Setup, Steady

from hncse_ray.negatives import RefreshFacts, RefreshRules, decide

_LOOKING = 2  # threads of Prefetch


@dataclass(frozen=True)
class Simulated:
    """What a run did, after its first third."""

    period_s: float
    look_up_s: float
    look_up_p99_s: float
    age_steps: float
    refresh_steps: float
    waiting: float
    overhead: float
    skipped: int
    seconds: float  # the whole run


class _Clock:
    def __init__(self) -> None:
        self.now, self._heap, self._count = 0.0, [], 0  # type: ignore[var-annotated]

    def at(self, time: float, what: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (max(time, self.now), self._count, what))

    def run(self, until: Callable[[], bool]) -> None:
        while self._heap and not until():
            self.now, _, what = heapq.heappop(self._heap)
            what()


class _Line:
    """One thing at a time, in the order asked for: a shard that searches, or one direction of a network card."""

    def __init__(self, clock: _Clock) -> None:
        self._clock, self._free = clock, 0.0

    def use(self, seconds: float, then: Callable[[], None]) -> None:
        self._free = max(self._free, self._clock.now) + seconds
        self._clock.at(self._free, then)


class _Machine:
    """Hardware that steps and a build share; alone, either has all of it."""

    def __init__(self, clock: _Clock, shares: dict[str, float]) -> None:
        self._clock, self._shares, self._since, self._turn = clock, shares, 0.0, 0
        self._left: dict[str, float] = {}
        self._then: dict[str, Callable[[], None]] = {}

    def begin(self, name: str, seconds: float, then: Callable[[], None]) -> None:
        self._advance()
        self._left[name], self._then[name] = seconds, then
        self._plan()

    def _rate(self, name: str) -> float:
        return self._shares[name] if len(self._left) > 1 else 1.0

    def _advance(self) -> None:
        passed = self._clock.now - self._since
        self._left = {name: left - passed * self._rate(name) for name, left in self._left.items()}
        self._since = self._clock.now

    def _plan(self) -> None:
        self._turn += 1
        if self._left:
            name = min(self._left, key=lambda n: self._left[n] / self._rate(n))
            turn = self._turn
            self._clock.at(self._clock.now + self._left[name] / self._rate(name), lambda: self._end(name, turn))

    def _end(self, name: str, turn: int) -> None:
        if turn == self._turn:  # else something began meanwhile, and it was planned anew
            self._advance()
            del self._left[name]
            then = self._then.pop(name)
            self._plan()
            then()


class _Run:
    """One run, from its first step to its last."""

    def __init__(self, costs: Costs, rules: Rules, steps: int, seed: int, jitter: float) -> None:
        self.costs, self.rules, self.steps, self.jitter = costs, rules, steps, jitter
        self.random, self.clock = random.Random(seed), _Clock()
        self.refresh_rules = RefreshRules(rules.refresh_every, "sync" if rules.sync else "async", None)
        share = 0.5 if rules.shared is None else rules.shared
        self.trainers = _Machine(self.clock, {"step": 1 - share, "build": share})
        self.sending, self.receiving = _Line(self.clock), _Line(self.clock)
        self.shards = [_Line(self.clock) for _ in range(costs.shards)]
        self.encoding = False  # the shards build; before that the weights are on their way
        self.building, self.published, self.served = False, None, None  # type: ignore[var-annotated]
        self.seen_building, self.seen_served = False, None  # type: ignore[var-annotated]
        self.on_version: list[Callable[[], None]] = []
        self.answers: dict[int, float | None] = {}  # None: still being looked up
        self.input = _Line(self.clock)  # one thread, a step ahead
        self.to_make: set[int] = set()  # batches whose look-up has not ended
        self.made_batches: set[int] = set()
        self.versions: dict[int, int] = {}
        self.waiting_for: tuple[int, Callable[[], None]] | None = None
        self.queue: deque[int] = deque()
        self.looking = 0
        self.step = 0
        self.begun = -1  # the last batch that the input thread was told to make
        self.started: list[float] = []
        self.ages: list[int | None] = []
        self.waited: list[bool] = []
        self.look_ups: list[float] = []
        self.made: list[int] = []
        self.skipped = 0

    def vary(self, seconds: float, spread: float = 1.0) -> float:
        """A time around its mean, with a tail."""
        sigma = self.jitter * spread
        return seconds * math.exp(self.random.gauss(0, sigma) - sigma * sigma / 2) if sigma else seconds

    def run(self) -> None:
        self.clock.at(0.0, self.before_step)
        self.clock.run(lambda: self.step >= self.steps)

    # ---- trainers

    def before_step(self) -> None:
        facts = RefreshFacts(self.step, self.published, self.seen_served, self.seen_building, True)
        decision = decide(facts, rules=self.refresh_rules)
        self.skipped += "skipped" in decision.notice
        first = self.served is None  # every run waits for its first version here, to begin evenly
        if decision.publish and not self.seen_building:
            self.publish(self.step)
        if (decision.wait or first) and self.building:
            self.on_version.append(self.after_wait)
        else:
            self.take()

    def after_wait(self) -> None:
        for begun in (self.answers, self.queue, self.to_make, self.made_batches):
            begun.clear()
        self.begun = -1
        self.take()

    def take(self) -> None:
        number, ahead = self.step, self.step + 1 + self.rules.prefetch
        if self.rules.sync:
            ahead = min(ahead, (number // self.rules.refresh_every + 1) * self.rules.refresh_every)
        self.started.append(self.clock.now)
        for batch in range(number, ahead):
            if batch not in self.answers:
                self.answers[batch] = None
                self.queue.append(batch)
        self.look()
        if self.begun < number:
            self.begin_input(number)
        self.waited.append(number not in self.made_batches)
        if number in self.made_batches:
            self.compute()
        else:
            self.waiting_for = (number, self.compute)

    def begin_input(self, number: int) -> None:
        self.begun = number
        if self.answers.get(number) is None:
            self.to_make.add(number)
        else:
            self.make(number)

    def make(self, number: int) -> None:
        def made() -> None:
            self.made_batches.add(number)
            if self.waiting_for is not None and self.waiting_for[0] == number:
                (_, go_on), self.waiting_for = self.waiting_for, None
                go_on()

        self.input.use(self.vary(self.costs.input_s, 0.5), made)

    def compute(self) -> None:
        del self.answers[self.step]
        self.made_batches.discard(self.step)
        self.begin_input(self.step + 1)
        self.ages.append(self.step - self.versions.pop(self.step))
        self.trainers.begin("step", self.vary(self.costs.step_s, 0.5), self.after_step)

    def after_step(self) -> None:
        self.step += 1
        self.before_step()

    # ---- look-ups

    def look(self) -> None:
        while self.looking < _LOOKING and self.queue:
            self.looking += 1
            self.look_up(self.queue.popleft(), self.clock.now)

    def look_up(self, batch: int, began: float) -> None:
        c, version, left = self.costs, self.seen_served, [self.costs.shards]
        slow = model.BUILDING_SLOWS_SEARCH if self.encoding else 1.0

        def search() -> None:
            for node in range(c.nodes):
                here = range(node, c.shards, c.nodes)
                self.sending.use(c.query_bytes / c.nic, lambda here=here: [at_shard(s) for s in here])  # type: ignore[misc]

        def at_shard(s: int) -> None:
            self.shards[s].use(self.vary(slow * c.search_s), answered)

        def answered() -> None:
            self.receiving.use(c.answer_bytes / c.nic, merged)

        def merged() -> None:
            left[0] -= 1
            if not left[0]:
                self.receiving.use(c.stored_bytes / c.nic, done)

        def done() -> None:
            self.look_ups.append(self.clock.now - began)
            self.looking -= 1
            if batch in self.answers:
                self.answers[batch], self.versions[batch] = self.clock.now, version
                if batch in self.to_make:
                    self.to_make.discard(batch)
                    self.make(batch)
            self.look()

        overhead = self.vary(c.overhead_s)
        self.clock.at(self.clock.now + overhead, lambda: self.receiving.use(c.gather_bytes / c.nic, search))

    # ---- builds

    def publish(self, step: int) -> None:
        c, left = self.costs, [self.costs.nodes]
        self.published, self.building, self.seen_building = step, True, True
        slowest = max(self.vary(c.build_s, 0.25) for _ in range(c.shards))

        def send(chunks: float) -> None:
            if chunks > 0:
                size = min(1.0, chunks) * model.CHUNK_BYTES
                self.sending.use(size / c.nic, lambda: send(chunks - 1))
            else:
                sent()

        def sent() -> None:
            left[0] -= 1
            if left[0]:
                return
            self.encoding = True
            if self.rules.shared is None:
                self.clock.at(self.clock.now + slowest, ready)
            else:
                self.trainers.begin("build", slowest, ready)

        def ready() -> None:
            self.encoding, self.building, self.served = False, False, step
            self.made.append(step)
            waiting, self.on_version = self.on_version, []
            delay = 0.0 if waiting else self.random.uniform(0, model.POLL_S)
            self.clock.at(self.clock.now + delay, lambda: seen(waiting))

        def seen(waiting: list[Callable[[], None]]) -> None:
            self.seen_building, self.seen_served = False, step
            for go_on in waiting:
                go_on()

        for _ in range(c.nodes):
            send(c.weight_bytes / model.CHUNK_BYTES)


def simulate(costs: Costs, rules: Rules, *, steps: int, seed: int = 0, jitter: float = 0.2) -> Simulated:
    """Play a run.

    Args:
        costs: what each thing takes, in the mean.
        rules: refresh interval and mode, look-ahead, shared hardware or not.
        steps: how many.
        seed: of all that varies.
        jitter: how much look-ups and searches vary (standard deviation of the logarithm); steps half, builds a quarter.
    """
    run = _Run(costs, rules, steps, seed, jitter)
    run.run()
    first = next((i for i in run.made if i >= steps // 3), 0)  # whole cycles from here
    last = run.made[-1] if run.made[-1] > first else len(run.started) - 1
    took = run.started[last] - run.started[first]
    looked = sorted(run.look_ups[len(run.look_ups) // 3 :])
    between = [b - a for a, b in zip(run.made, run.made[1:], strict=False) if a >= first]
    period = took / (last - first)
    ages = [age for age in run.ages[first:last] if age is not None]
    return Simulated(
        period_s=period,
        look_up_s=sum(looked) / len(looked),
        look_up_p99_s=looked[int(0.99 * (len(looked) - 1))],
        age_steps=sum(ages) / len(ages),
        refresh_steps=sum(between) / len(between) if between else math.inf,
        waiting=sum(run.waited[first:last]) / (last - first),
        overhead=1 - costs.step_s / period,
        skipped=run.skipped,
        seconds=run.clock.now,
    )


# ---- checks


def cases() -> dict[str, tuple[Costs, Rules]]:
    """One for each thing that can be the narrowest."""
    base = Costs(
        step_s=0.1, input_s=0.0003, search_s=0.02, overhead_s=0.02, shards=4, nodes=4, nic=1.25e9, query_bytes=1.6e6,
        answer_bytes=2e5, gather_bytes=1.6e6, stored_bytes=1.6e6, weight_bytes=4.4e8, build_s=6.0,
    )  # fmt: skip
    return {
        "own GPUs, build within the interval": (base, Rules(refresh_every=100)),
        "own GPUs, build of 2.5 intervals": (replace(base, build_s=25.0), Rules(refresh_every=100)),
        "sync": (base, Rules(refresh_every=100, sync=True)),
        "trainers' GPUs shared": (replace(base, build_s=3.0, nodes=1), Rules(refresh_every=100, shared=0.5)),
        "search too slow": (replace(base, search_s=0.12), Rules(refresh_every=100)),
        "search near the limit": (replace(base, search_s=0.085, overhead_s=0.06), Rules(refresh_every=100)),
        "look-up long, one batch ahead": (replace(base, overhead_s=0.16), Rules(refresh_every=100, prefetch=1)),
        "input thread too slow": (replace(base, input_s=0.13), Rules(refresh_every=100)),
        "network full of queries": (replace(base, shards=32, nodes=32, nic=3e8), Rules(refresh_every=150)),
    }


def against_formulas(steps: int = 3000, seed: int = 0) -> list[dict[str, Any]]:
    """Formulas and simulation side by side: with times that do not vary, and with times that do."""
    lines = []
    for name, (costs, rules) in cases().items():
        formula = model.steady(costs, rules)
        line: dict[str, Any] = {"case": name, "formula": vars(formula)}
        for what, jitter in (("even", 0.0), ("varying", 0.2)):
            seen = simulate(costs, rules, steps=steps, seed=seed, jitter=jitter)
            line[what] = vars(seen) | difference(formula, seen)
        lines.append(line)
    return lines


def difference(formula: Steady, seen: Simulated) -> dict[str, float]:
    """How far the simulation is from the formulas, in parts of the formulas; of shares, the difference."""
    return {
        "period_off": seen.period_s / formula.period_s - 1,
        "age_off": seen.age_steps / formula.age_steps - 1,
        "waiting_off": seen.waiting - formula.waiting,
    }


def show_checks(lines: list[dict[str, Any]]) -> None:
    print("\nformula | simulation, even times | simulation, varying times")
    print(f"{'':<38} {'period, s':<24} {'age, steps':<23} {'interval':<17} steps that wait")
    for x in lines:
        f, e, v = x["formula"], x["even"], x["varying"]
        parts = [f"{y['period_s']:.4f}" for y in (f, e, v)], [f"{y['age_steps']:.1f}" for y in (f, e, v)]
        more = [f"{y['refresh_steps']:.0f}" for y in (f, e, v)], [f"{y['waiting']:.3f}" for y in (f, e, v)]
        cells = [" | ".join(part) for part in (*parts, *more)]
        print(f"{x['case']:<38} {cells[0]:<24} {cells[1]:<23} {cells[2]:<17} {cells[3]}")


def against_measured(cpu: Device, results: Path) -> dict[str, Any]:
    """What the model says of runs that were made here, with its constants from other runs than these."""
    serving = json.loads((results / "pool_serving_cpu.json").read_text())
    pool_steps = json.loads((results / "pool_steps_cpu.json").read_text())
    steps, stored = pool_steps["median_step_s"], pool_steps["ratio"]["stored over none"]["median"]
    million = Setup(rows=1_000_000, encoder=model.MINILM, device=cpu, trainers=1, batch=64, shards=2, shards_per_node=2)
    plan = model.index_of(million)
    at_rest, shards_mb = 2 * plan.bytes_at_rest / 1e6, serving["memory_mb"]["ray::RandomShard"]
    # Two shards of one thread each: each has half of the two cores that the device stands for.
    search = 2 * model.search_s(plan, 64, cpu)
    quick = replace(million, rows=6000, shards=1, shards_per_node=1, tokens=19.0)  # LOG.md: mean width 19
    costs = model.costs_of(quick)
    rules = Rules(refresh_every=20, sync=True, shared=0.5)
    played = simulate(replace(costs, nic=math.inf), rules, steps=40)
    with_measured = simulate(replace(costs, nic=math.inf, step_s=steps["stored"], build_s=31.0), rules, steps=40)
    return {
        "search of 64 in a million rows, 2 shards, s": both(search, serving["pool_s"]["median"]),
        "memory of the 2 shards, MB (plan_index, without the processes themselves)": both(at_rest, shards_mb),
        "quickstart: one build of 6,000 rows, s": both(costs.build_s, 31.0),
        "quickstart: a step of 64, s": both(costs.step_s, steps["stored"]),
        "quickstart: 40 steps and two builds, s, from the model's constants": both(played.seconds, 234.0),
        "the same from the measured step and build": both(with_measured.seconds, 234.0),
        "a step with stored negatives over one without": both(1 + costs.search_s / costs.step_s, stored),
        "a build as a part of an epoch's compute": both(
            (costs.build_s / 6000) / (costs.step_s / 64), (31.0 / 6000) / (steps["stored"] / 64)
        ),
    }


def both(predicted: float, measured: float) -> dict[str, float]:
    return {"model": predicted, "measured": measured, "model_over_measured": predicted / measured}
