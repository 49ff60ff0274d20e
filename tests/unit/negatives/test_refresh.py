import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hncse_ray.negatives.refresh import RefreshDecision, RefreshFacts, RefreshRules, decide


def ask(mode, step, published, served, *, building=False, available=True, every=100, limit=300):
    facts = RefreshFacts(step, published, served, building, available)
    return decide(facts, rules=RefreshRules(every, mode, limit))


BUSY = {"building": True}
SKIPPED = (
    "step 200: refresh skipped, the index of step 100 is still being built;"
    " raise negatives.refresh_every_steps or add shards"
)
TABLE = [
    # mode, step, published, served, other facts, publish, wait, notice
    # the pool does not answer
    ("async", 200, 100, 100, {"available": False}, False, False, ""),
    ("sync", 200, None, None, {"available": False}, False, False, ""),
    ("async", 900, 100, 100, {"available": False, "building": True}, False, False, ""),
    # the first one
    ("async", 0, None, None, {}, True, False, ""),
    ("sync", 0, None, None, {}, True, True, ""),
    ("sync", 0, None, None, {"every": None, "limit": None}, True, True, ""),
    # resumed: the pool is new, or serves what a process before has published
    ("async", 500, None, None, {}, True, False, ""),
    ("sync", 500, None, None, {}, True, True, ""),
    ("async", 550, None, 500, BUSY, True, False, ""),
    (
        "async",
        550,
        None,
        200,
        {},
        True,
        True,
        "step 550: the index is 350 steps old (limit 300); waiting for a new one",
    ),
    # resumed in sync with the version of the checkpoint restored: nothing before the next multiple
    ("sync", 450, 400, 400, {}, False, False, ""),
    ("sync", 450, 400, None, BUSY, False, True, "step 450: waiting for the index of step 400"),
    ("sync", 500, 400, 400, {}, True, True, ""),
    # one index and no more, but its build has failed: tried again at every 100th step
    ("async", 99, 0, None, {"every": None, "limit": None}, False, False, ""),
    ("async", 100, 0, None, {"every": None, "limit": None}, True, False, ""),
    ("sync", 200, 100, None, {"every": None, "limit": None}, True, True, ""),
    ("async", 100, 0, None, {"every": None, "limit": None, "building": True}, False, False, ""),
    ("async", 100, 0, 0, {"every": None, "limit": None}, False, False, ""),
    # due
    ("async", 100, 0, 0, {}, True, False, ""),
    ("async", 100, 0, None, {}, True, False, ""),
    ("async", 101, 0, 0, {}, False, False, ""),
    ("async", 100, 100, 0, {}, False, False, ""),
    ("async", 100, 100, 0, BUSY, False, False, ""),
    ("async", 100, 50, 50, {}, True, False, ""),
    ("async", 150, 60, 50, {}, False, False, ""),
    ("async", 200, 100, 0, BUSY, False, False, SKIPPED),
    ("async", 200, 100, None, BUSY, False, False, SKIPPED),
    ("sync", 100, 0, 0, {}, True, True, ""),
    ("sync", 100, 0, 0, BUSY, True, True, ""),
    ("sync", 99, 0, 0, {}, False, False, ""),
    # a shard rebuilds the version that is served: sync need not wait for it
    ("sync", 150, 100, 100, BUSY, False, False, ""),
    # a failed build is not repeated before the next multiple
    ("sync", 101, 100, 0, {}, False, False, ""),
    ("async", 101, 100, 0, {}, False, False, ""),
    # never after the first
    ("async", 100, 0, 0, {"every": None}, False, False, ""),
    ("sync", 5000, 0, 0, {"every": None, "limit": None}, False, False, ""),
    # too old
    ("async", 400, 100, 100, {"every": None}, False, False, ""),
    (
        "async",
        431,
        400,
        100,
        BUSY,
        False,
        True,
        "step 431: the index is 331 steps old (limit 300); waiting for the one being built",
    ),
    ("async", 431, 130, 100, {}, True, True, "step 431: the index is 331 steps old (limit 300); waiting for a new one"),
    # its successor has failed: not tried again before the next multiple
    ("async", 431, 400, 100, {}, False, False, ""),
    (
        "async",
        500,
        400,
        100,
        BUSY,
        False,
        True,
        "step 500: the index is 400 steps old (limit 300); waiting for the one being built",
    ),
    ("async", 500, 400, 100, {}, True, False, ""),
    ("async", 431, 400, 100, {"limit": None}, False, False, ""),
    (
        "sync",
        301,
        0,
        0,
        {"every": 1000},
        True,
        True,
        "step 301: the index is 301 steps old (limit 300); waiting for a new one",
    ),
    # the one being built would be too old as well
    (
        "async",
        431,
        100,
        100,
        BUSY,
        True,
        True,
        "step 431: the index is 331 steps old (limit 300); waiting for a new one",
    ),
    # nothing has been served yet: no age, no limit
    ("async", 431, 0, None, BUSY, False, False, ""),
    # the pool came back with a version of a later step, or training was set back
    (
        "async",
        350,
        300,
        500,
        {},
        True,
        False,
        "step 350: the index is of a later step, 500; publishing the weights again",
    ),
    (
        "sync",
        350,
        300,
        500,
        {},
        True,
        True,
        "step 350: the index is of a later step, 500; publishing the weights again",
    ),
    (
        "sync",
        350,
        None,
        500,
        {},
        True,
        True,
        "step 350: the index is of a later step, 500; publishing the weights again",
    ),
    (
        "async",
        350,
        500,
        500,
        {},
        True,
        False,
        "step 350: the index is of a later step, 500; publishing the weights again",
    ),
    ("async", 351, 350, 500, BUSY, False, False, ""),
    ("sync", 351, 350, 500, BUSY, False, True, "step 351: waiting for the index of step 350"),
    ("async", 350, 500, 300, BUSY, True, False, ""),
    ("sync", 350, 500, 300, {}, True, True, ""),
]


@pytest.mark.parametrize(("mode", "step", "published", "served", "others", "publish", "wait", "notice"), TABLE)
def test_table(mode, step, published, served, others, publish, wait, notice):
    assert ask(mode, step, published, served, **others) == RefreshDecision(publish, wait, notice)


@pytest.mark.parametrize("changes", [{"every": 0}, {"limit": 0}, {"every": -5}, {"mode": "later"}])
def test_wrong_rules(changes):
    with pytest.raises(ValueError, match="must be"):
        ask(changes.get("mode", "async"), 0, None, None, **{k: v for k, v in changes.items() if k != "mode"})


def test_every_small_case_keeps_the_promises():
    steps = [None, *range(7)]
    numbers = [None, 1, 2, 3]
    cases = itertools.product(range(7), steps, steps, [False, True], numbers, ["async", "sync"], numbers)
    for step, published, served, building, every, mode, limit in cases:
        decision = ask(mode, step, published, served, building=building, every=every, limit=limit)
        case = (step, published, served, building, every, mode, limit, decision)
        too_old = served is not None and limit is not None and step - served > limit
        assert not (mode == "sync" and decision.publish and not decision.wait), case
        # a build that has failed is made up for at the next refresh, or once it would be too old itself
        failed = not building and published is not None and published <= step and step - published <= (limit or 0)
        assert decision.wait or not too_old or failed, case
        assert mode == "sync" or too_old or not decision.wait, case
        # there is something to wait for
        assert not decision.wait or decision.publish or building, case
        # weights are handed over once a step, unless what is served must not be used and nothing is being built
        again = published == step and decision.publish
        assert not again or (not building and (too_old or served > step)), case
        # what is awaited is not too old itself
        assert not (too_old and not decision.publish and step - published > limit), case
        assert not (published is None and not decision.publish), case
        assert "\n" not in decision.notice and (not decision.notice or decision.notice.startswith(f"step {step}: "))


class Pool:
    """A pool that takes `build_steps()` training steps to build a version, or fails to."""

    def __init__(self, build_steps, *, fails=lambda: False, served=None):
        self.build_steps, self.fails, self.served = build_steps, fails, served
        self.published, self.ready_at = None, None

    def facts(self, step):
        if self.ready_at is not None and step >= self.ready_at:
            self.finish()
        return RefreshFacts(step, self.published, self.served, self.ready_at is not None, True)

    def publish(self, step):
        self.published, self.ready_at = step, step + self.build_steps()

    def finish(self):
        if self.ready_at is not None and not self.fails():
            self.served = self.published
        self.ready_at = None


def simulate(pool, rules, *, start=0, stop=1000):
    """Train; return for each step the version that it was taken with, and the steps with a publication or a wait."""
    versions, published, waited, notices = {}, [], [], []
    for step in range(start, stop):
        decision = decide(pool.facts(step), rules=rules)
        if decision.publish:
            pool.publish(step)
            published.append(step)
        if decision.wait:
            pool.finish()
            waited.append(step)
        if decision.notice:
            notices.append(decision.notice)
        versions[step] = pool.served
    return versions, published, waited, notices


@pytest.mark.parametrize("limit", [1, 2, 30, 100, 150, 1000])
@pytest.mark.parametrize("every", [None, 1, 7, 100])
@pytest.mark.parametrize("build", [0, 1, 5, 60, 99, 100, 101, 140, 400, 5000])
@pytest.mark.parametrize("mode", ["async", "sync"])
def test_no_step_is_taken_with_an_index_older_than_the_limit(mode, build, every, limit):
    versions, _, _, _ = simulate(Pool(lambda: build), RefreshRules(every, mode, limit))
    ages = [step - version for step, version in versions.items() if version is not None]
    assert all(0 <= age <= limit for age in ages)
    if mode == "sync":
        assert len(ages) == 1000


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    mode=st.sampled_from(["async", "sync"]),
    every=st.one_of(st.none(), st.integers(1, 60)),
    limit=st.integers(1, 90),
    start=st.integers(0, 300),
    served=st.one_of(st.none(), st.integers(0, 400)),
)
def test_nor_when_builds_differ_and_the_pool_lived_before(seed, mode, every, limit, start, served):
    rng = random.Random(seed)
    pool = Pool(lambda: rng.randrange(100), served=served)
    versions, _, _, _ = simulate(pool, RefreshRules(every, mode, limit), start=start, stop=start + 400)
    assert all(version is None or step - version <= limit for step, version in versions.items())
    if mode == "sync":
        assert all(version is not None and version <= step for step, version in versions.items())


def test_sync_serves_the_last_multiple_at_every_step_however_long_builds_take():
    for build in (0, 3, 1000):
        versions, published, waited, notices = simulate(Pool(lambda n=build: n), RefreshRules(100, "sync", 300))
        assert versions == {step: step // 100 * 100 for step in range(1000)}
        assert published == waited == list(range(0, 1000, 100))
        assert notices == []


def test_async_never_waits_while_builds_keep_up():
    versions, published, waited, notices = simulate(Pool(lambda: 40), RefreshRules(100, "async", 150))
    assert published == list(range(0, 1000, 100)) and not waited and not notices
    assert [versions[step] for step in (0, 39, 40, 139, 140, 999)] == [None, None, 0, 0, 100, 900]


def test_async_skips_and_says_so_where_builds_are_slower_than_the_refresh():
    _, published, waited, notices = simulate(Pool(lambda: 150), RefreshRules(100, "async", None))
    assert published == [0, 200, 400, 600, 800] and not waited
    assert [notice.split(":")[0] for notice in notices] == [f"step {step}" for step in (100, 300, 500, 700, 900)]


def test_after_a_resume_the_refreshes_fall_on_the_same_steps():
    for mode in ("async", "sync"):
        rules = RefreshRules(100, mode, None)
        _, whole, _, _ = simulate(Pool(lambda: 20), rules)
        _, resumed, _, _ = simulate(Pool(lambda: 20, served=400), rules, start=437)
        assert resumed == [437, *(step for step in whole if step > 437)]


def test_failing_builds_are_tried_again_at_the_next_refresh_and_never_at_every_step():
    pool = Pool(lambda: 10, fails=lambda: pool.published > 0)
    _, published, waited, notices = simulate(pool, RefreshRules(100, "async", 250), stop=256)
    assert published == [0, 100, 200] and not waited and not notices
    _, published, waited, notices = simulate(pool, RefreshRules(None, "async", 20), start=256, stop=340)
    assert waited == published == [256, 277, 298, 319] and len(notices) == 4
