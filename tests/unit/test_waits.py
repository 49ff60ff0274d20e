"""The bounds of all tests: seconds of a quiet machine, stretched by how slow this one is."""

from __future__ import annotations

import itertools
import time

import pytest
import waits
from waits import seconds, slowness, soon, within


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How slow the machine is found to be, each time that it is measured."""
    found = [3.0]
    monkeypatch.delenv("HNCSE_TEST_SLOWNESS")
    monkeypatch.setattr(waits, "_measure", lambda: found.pop(0) if len(found) > 1 else found[0])
    return found


def test_bounds_are_stretched_by_one_factor_measured_once(machine: list[float]) -> None:
    machine += [5.0]
    assert [seconds(2.0), seconds(1.0), slowness()] == [6.0, 3.0, 3.0]


def test_a_machine_that_became_slower_is_measured_before_a_wait_fails(machine: list[float]) -> None:
    machine += [1000.0]
    asked = itertools.count()
    assert soon(lambda: next(asked) > 5, within_s=0.001, every_s=0.01, what="the sixth question")
    assert slowness() == 1000.0


def test_what_does_not_come_fails_and_says_what(machine: list[float]) -> None:
    with pytest.raises(AssertionError, match=r"not within 0\.03 s: the state 7"):
        soon(lambda: False, within_s=0.01, every_s=0.001, what=lambda: f"the state {7}")


def test_what_takes_too_long_fails(machine: list[float]) -> None:
    machine[:] = [1.0]
    with within(30, "nothing"):
        pass
    with pytest.raises(AssertionError, match="the pause took"), within(0.01, "the pause"):
        time.sleep(0.05)


def test_a_real_measurement_is_never_below_one() -> None:
    assert waits._measure() >= 1.0


@pytest.mark.timeout(100)
def test_the_limit_of_a_test_is_stretched_too(request: pytest.FixtureRequest) -> None:
    marker = request.node.get_closest_marker("timeout")
    assert marker is not None and marker.args[0] >= 100
    assert marker.args[0] == pytest.approx(100 * slowness()) or slowness() > marker.args[0] / 100
