"""Joining a Ray cluster, or a local Ray that is started for as long as a command runs. Ray is imported when joined."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from hncse_ray import PROCESS_VARIABLES
from hncse_ray.errors import ClusterError

logger = logging.getLogger(__name__)

_HEAD = Path(__file__).with_name("head.py")


def is_connected() -> bool:
    """Say whether this process has a Ray already, without importing it."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def named_cluster() -> str | None:
    """Return the address of the cluster that ``RAY_ADDRESS`` names, once it has answered; None = start one here.

    For those who work before they connect, so that they learn at once if they cannot.

    Raises:
        ClusterError: nothing answers there, or nothing that can be joined.
    """
    address = os.environ.get("RAY_ADDRESS")
    if is_connected() or not address or address == "local":
        return None
    from hncse_ray.cluster.address import find_head

    return find_head(address, named=f"RAY_ADDRESS={address}")


@contextmanager
def ray_session() -> Iterator[None]:
    """Be connected to Ray: to the cluster named by ``RAY_ADDRESS``, else to one started here, ended afterwards.

    A cluster started here has token authentication on, and its dashboard on the loopback interface. If this process
    is connected already, that connection is used and left as it is.

    Raises:
        ClusterError: the named cluster cannot be reached, or none can be started.
    """
    with ray_meanwhile() as join_ray:
        join_ray()
        yield


@contextmanager
def ray_meanwhile() -> Iterator[Callable[[], None]]:
    """Have Ray started while a command gets ready for it: :func:`ray_session` in two steps.

    Yields:
        Waits until there is Ray, and joins it; raises ClusterError if none can be started.

    Raises:
        ClusterError: the named cluster cannot be reached.
    """
    if is_connected():
        yield lambda: None
        return
    # Ray Train's controller asks the workers for news every so often; 2 s by default, which the end of a run waits for.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Runs report through their own channel; Ray's usage pings and console banners add nothing.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A thread whose answer comes after the end would start another Ray by asking again.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    address = named_cluster()
    with _leaving_on_sigterm() as leave_on_sigterm, ExitStack() as stack:
        started = None if address else stack.enter_context(_local_head())

        def join() -> None:
            _connect(started() if started else str(address), named=address is not None)
            leave_on_sigterm()  # ray.init has set a handler of its own, which aborts
            stack.callback(_disconnect)

        yield join


@contextmanager
def _local_head() -> Iterator[Callable[[], str]]:
    """Have a Ray of this machine in a process of its own; it ends with this context, and with this process.

    Yields:
        Waits until it is there, and returns its address; raises ClusterError if it does not start.
    """
    # If that process is killed, Ray's agents learn it from a GCS that no longer answers: after more than a minute
    # by default, after seconds so. A local GCS never comes back.
    patience = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5", "RAY_gcs_server_request_timeout_seconds": "10"}
    head = subprocess.Popen(
        [sys.executable, "-P", str(_HEAD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=patience | os.environ,
        start_new_session=True,  # Ctrl-C is this process's affair
    )
    assert head.stdin is not None and head.stdout is not None
    says, wanted = head.stdout, True

    def address() -> str:
        said = json.loads(says.readline() or b'{"error": "its process ended"}')
        if "error" in said:
            raise ClusterError(f"a local Ray could not be started ({said['error']})")
        threading.Thread(target=watch, daemon=True).start()
        return str(said["address"])

    def watch() -> None:
        head.wait()
        if wanted:  # Ray would wait a minute for it, and then end this process in the same way, with status 1
            hint = "Is memory short? A run goes on with the same command"
            sys.stderr.write(f"error: {ClusterError('the process of the local Ray was killed', hint=hint)}\n")
            sys.stderr.flush()
            os._exit(2)

    try:
        yield address
    finally:
        wanted = False
        head.stdin.close()
        head.wait()
        says.close()


def _connect(address: str, *, named: bool) -> None:
    import ray
    from ray._raylet import Config

    environment = None
    if named:
        # Where this is a job with an environment of its own, both are joined; a variable of both is the same.
        os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
        environment = {"env_vars": PROCESS_VARIABLES}
    elif "RAY_AUTH_MODE" not in os.environ:  # as Ray does for a cluster that a process starts itself
        os.environ["RAY_AUTH_MODE"] = "token"
        Config.initialize("")
    try:
        ray.init(address=address, runtime_env=environment, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ClusterError(f"the Ray cluster at {address} could not be reached ({error})",
                           hint="Check RAY_ADDRESS and the token (RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH)"
                           if named else "") from error  # fmt: skip
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        logger.warning("this Ray cluster has no token authentication: whoever reaches its ports can run code on it;"
                       " start it with RAY_AUTH_MODE=token")  # fmt: skip


def _disconnect() -> None:
    import ray

    ray.shutdown()


@contextmanager
def _leaving_on_sigterm() -> Iterator[Callable[[], None]]:
    """Have a command that is terminated leave its contexts and end with status 143; yield what sees to it again."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    terminated = False

    def leave(number: int, frame: Any) -> None:
        nonlocal terminated
        terminated = True
        sys.exit(128 + number)

    def see_to_it() -> Any:
        return signal.signal(signal.SIGTERM, leave)

    before = see_to_it()
    try:
        yield see_to_it
    except (SystemExit, KeyboardInterrupt) as error:
        if terminated:  # Ray's calls pass an exit on with status 1, and Ray Train's `fit` with 0
            raise SystemExit(128 + signal.SIGTERM) from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
