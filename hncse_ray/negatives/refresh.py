"""When to hand the encoder's weights to the pool: a pure decision, asked for before every step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hncse_ray.errors import counted

MODES = ("async", "sync")
_RETRY_STEPS = 100


@dataclass(frozen=True)
class RefreshRules:
    """How fresh the index is kept.

    Args:
        every_steps: publish at the multiples of this step, so that a resumed run refreshes at the same steps;
            None: only at the start, where `max_staleness_steps` asks for it, and at every 100th step for as long as
            no version could be made.
        mode: `async`: training goes on while a version is built; `sync`: it waits, and is reproducible.
        max_staleness_steps: a served version older than this makes training wait; None: no limit.

    Raises:
        ValueError: a number is below 1 or the mode is unknown.
    """

    every_steps: int | None
    mode: Literal["async", "sync"]
    max_staleness_steps: int | None

    def __post_init__(self) -> None:
        for name in ("every_steps", "max_staleness_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}, must be at least 1")
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}, must be one of {', '.join(MODES)}")


@dataclass(frozen=True)
class RefreshFacts:
    """What is known before a step.

    Args:
        step: optimiser steps taken.
        published_step: step of the weights last handed to the pool; None: none yet in this process.
        served_step: step of the version that is served; None: none is.
        building: a version is being built, or waits to be: True from the moment its weights are handed over.
        available: the pool answers at all.
    """

    step: int
    published_step: int | None
    served_step: int | None
    building: bool
    available: bool


@dataclass(frozen=True)
class RefreshDecision:
    """What to do before the step.

    Args:
        publish: hand over the weights; they go before whatever is being built.
        wait: train on only when the newest version handed over (with `publish`: this one) is served, or its
            build has failed.
        notice: one line for the user, or empty.
    """

    publish: bool
    wait: bool
    notice: str


def decide(facts: RefreshFacts, *, rules: RefreshRules) -> RefreshDecision:
    """Decide whether to publish the weights before this step, and whether training waits.

    The first rule that applies decides:

    1. The pool does not answer: nothing; its client says so.
    2. Nothing has been published, or only weights of a later step (training was set back): publish.
    3. A refresh is due in `sync`: publish and wait, whatever is being built.
    4. The served version is too old: wait for the one being built; if that would be too old as well (after a
       restart), or there is none and the weights last published are too old, publish and wait.
    5. A refresh is due in `async`: publish; or skip it, with a notice, while a version is being built.
    6. A version is being built: nothing, but `sync` waits unless the weights last published are served (a pool
       that came back, or was restored, builds them).
    7. The served version is of a later step (the pool came back with it): publish.

    Publishing implies waiting in `sync`, and in either mode where the served version is too old. A build that
    has failed is not repeated at once, the version before it stays: the next refresh or rule 4 replaces it. Until
    then a version that is too old is not used, and training goes on without one.
    """
    step, published, served = facts.step, facts.published_step, facts.served_step
    if not facts.available:
        return RefreshDecision(publish=False, wait=False, notice="")
    sync = rules.mode == "sync"
    every = rules.every_steps
    if every is None and served is None and not facts.building:
        every = _RETRY_STEPS  # the first build has failed, and no other is planned
    due = every is not None and step % every == 0 and step != published
    too_old = _too_old(facts, limit=rules.max_staleness_steps)

    if published is None or published > step or (due and sync):
        notice = f"step {step}: {too_old}; waiting for a new one" if too_old else _from_later(facts)
        return RefreshDecision(publish=True, wait=sync or bool(too_old), notice=notice)
    recent = not _too_old(replace(facts, served_step=published), limit=rules.max_staleness_steps)
    if too_old and (facts.building or not recent):
        ahead = facts.building and recent
        awaited = "the one being built" if ahead else "a new one"
        return RefreshDecision(publish=not ahead, wait=True, notice=f"step {step}: {too_old}; waiting for {awaited}")
    if due and facts.building:
        notice = (
            f"step {step}: refresh skipped, the index of step {published} is still being built;"
            " raise negatives.refresh_every_steps or add shards"
        )
        return RefreshDecision(publish=False, wait=False, notice=notice)
    if facts.building:
        wait = sync and served != published
        notice = f"step {step}: waiting for the index of step {published}" if wait else ""
        return RefreshDecision(publish=False, wait=wait, notice=notice)
    publish = due or (served is not None and served > step)
    return RefreshDecision(publish=publish, wait=publish and sync, notice=_from_later(facts))


def _too_old(facts: RefreshFacts, *, limit: int | None) -> str:
    """Say by how much the served version is over the limit; empty if it is not."""
    if facts.served_step is None or limit is None or (age := facts.step - facts.served_step) <= limit:
        return ""
    return f"the index is {counted(age, 'step')} old (limit {limit})"


def _from_later(facts: RefreshFacts) -> str:
    """Say that the served version is of a later step; empty if it is not."""
    if facts.served_step is None or facts.served_step <= facts.step:
        return ""
    return f"step {facts.step}: the index is of a later step, {facts.served_step}; publishing the weights again"
