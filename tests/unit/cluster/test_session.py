"""Which clusters are joined, and Ray that starts while a command gets ready."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hncse_ray.cluster import ray_session, session
from hncse_ray.errors import ClusterError, HncseError


def test_the_address_of_a_job_server_is_not_one_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ClusterError, match="RAY_ADDRESS=http://127.0.0.1:8265: .*hncse submit"), ray_session():
        pytest.fail("it was joined")


class Sessions:
    """Stands in for Ray, which takes seconds to start: what is begun and ended, and by which thread."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure, self.told = failure, list[tuple[str, int]]()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self.told.append(("begun", threading.get_ident()))
        if self.failure is not None:
            raise self.failure
        yield
        self.told.append(("ended", threading.get_ident()))


def test_what_is_refused_at_once_starts_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "ray_session", sessions := Sessions())
    with pytest.raises(HncseError, match="refused"), session.ray_meanwhile():
        raise HncseError("refused")
    assert sessions.told == []


def test_ray_is_held_by_the_thread_that_started_it_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "ray_session", sessions := Sessions())
    with session.ray_meanwhile() as join_ray:
        join_ray()
        assert [what for what, _ in sessions.told] == ["begun"]
    assert [what for what, _ in sessions.told] == ["begun", "ended"]
    assert len({thread for _, thread in sessions.told} - {threading.get_ident()}) == 1


def test_a_ray_that_does_not_start_is_said_by_whoever_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "ray_session", Sessions(ClusterError("no node")))
    with pytest.raises(ClusterError, match="no node"), session.ray_meanwhile() as join_ray:
        join_ray()
    with session.ray_meanwhile():
        pass  # nobody waits: it is no matter


def test_a_command_that_is_terminated_leaves_its_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "ray_session", sessions := Sessions())
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit), session.ray_meanwhile() as join_ray:
        join_ray()
        signal.raise_signal(signal.SIGTERM)
    assert [what for what, _ in sessions.told] == ["begun", "ended"]
    assert signal.getsignal(signal.SIGTERM) is before
