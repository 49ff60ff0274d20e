"""Which clusters are joined, and the process of a local Ray that starts while a command gets ready."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waits import seconds

from hncse_ray.cluster import ray_session, session
from hncse_ray.errors import ClusterError, HncseError


def test_the_address_of_a_job_server_is_not_one_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ClusterError, match="RAY_ADDRESS=http://127.0.0.1:8265: .*hncse submit"), ray_session():
        pytest.fail("it was joined")


_SAY = """
import json, os, sys
def say(**facts):
    try:
        os.write(1, (json.dumps(facts) + "\\n").encode())
    except BrokenPipeError:  # of a command that is over
        pass
"""


class Head:
    """Stands in for the program of a local Ray, which takes seconds to start, and for joining it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, begins: str) -> None:
        self._ended, program = folder / "ended", folder / "head.py"
        ends = f"open({str(self._ended)!r}, 'w').close()"
        program.write_text(f"{_SAY}{begins}\nsys.stdin.read()\n{ends}\n")
        self.joined: list[str] = []
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr(session, "_HEAD", program)
        monkeypatch.setattr(session, "_connect", lambda address, named: self.joined.append(address))
        monkeypatch.setattr(session, "_disconnect", lambda: self.joined.append("left"))

    @property
    def has_ended(self) -> bool:
        return self._ended.exists()


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Head:
    return Head(tmp_path, monkeypatch, "say(address='127.0.0.1:1')")


def test_ray_starts_meanwhile_and_ends_with_the_command(head: Head) -> None:
    with session.ray_meanwhile() as join_ray:
        assert head.joined == []
        join_ray()
        assert head.joined == ["127.0.0.1:1"] and not head.has_ended
    assert head.joined == ["127.0.0.1:1", "left"] and head.has_ended


def test_a_command_that_is_refused_joins_nothing_and_leaves_nothing(head: Head) -> None:
    with pytest.raises(HncseError, match="refused"), session.ray_meanwhile():
        raise HncseError("refused")
    assert head.joined == [] and head.has_ended


@pytest.mark.parametrize(
    ("begins", "told"),
    [("say(error='no node')", "no node"), ("sys.exit(1)", "its process ended")],
)
def test_a_ray_that_does_not_start_is_said_by_whoever_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begins: str, told: str
) -> None:
    Head(tmp_path, monkeypatch, begins)
    with pytest.raises(ClusterError, match=told), session.ray_meanwhile() as join_ray:
        join_ray()
    with session.ray_meanwhile():
        pass  # nobody waits: it is no matter


def test_a_command_that_is_terminated_leaves_its_contexts(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(address: str, named: bool) -> None:  # ray.init sets a handler too
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        head.joined.append(address)

    monkeypatch.setattr(session, "_connect", connect)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, session.ray_meanwhile() as join_ray:
        join_ray()
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143
    assert head.joined == ["127.0.0.1:1", "left"] and head.has_ended
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("passed_on", [SystemExit(1), KeyboardInterrupt()])
def test_a_command_that_is_terminated_in_a_call_of_rays_has_the_status_of_that(
    head: Head, passed_on: BaseException
) -> None:
    """`ray.get` makes another exit of it, and so does Ray Train."""
    with pytest.raises((SystemExit, KeyboardInterrupt)) as ended, session.ray_meanwhile() as join_ray:
        join_ray()
        try:
            signal.raise_signal(signal.SIGTERM)
        except SystemExit:
            raise passed_on from None
    assert isinstance(ended.value, SystemExit) and ended.value.code == 143
    with pytest.raises(type(passed_on)), session.ray_meanwhile():
        raise passed_on  # for a cause of its own


def test_a_ray_whose_process_is_killed_ends_the_command_at_once_and_is_said(tmp_path: Path) -> None:
    program = tmp_path / "head.py"
    program.write_text(f"{_SAY}say(address='127.0.0.1:1')\nos.kill(os.getpid(), 9)\n")
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom hncse_ray.cluster import session\n"
        "session._HEAD, session._connect = Path(sys.argv[1]), lambda address, named: None\n"
        "with session.ray_meanwhile() as join_ray:\n    join_ray()\n    time.sleep(600)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", code, str(program)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds(60), check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: the process of the local Ray was killed.") and ended.stderr.count("\n") == 1
