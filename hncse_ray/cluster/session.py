"""Joining a Ray cluster, or starting one in this process for as long as a command runs."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray

from hncse_ray import PROCESS_VARIABLES
from hncse_ray.cluster.address import find_head
from hncse_ray.errors import ClusterError

logger = logging.getLogger(__name__)

_GRACE_S = 1.0  # a run that is refused by then needs no Ray


def named_cluster() -> str | None:
    """Return the address of the cluster that ``RAY_ADDRESS`` names, once it has answered; None = start one here.

    For those who work before they connect, so that they learn at once if they cannot.

    Raises:
        ClusterError: nothing answers there, or nothing that can be joined.
    """
    address = os.environ.get("RAY_ADDRESS")
    if ray.is_initialized() or not address or address == "local":
        return None
    return find_head(address, named=f"RAY_ADDRESS={address}")


@contextmanager
def ray_session() -> Iterator[None]:
    """Be connected to Ray: to the cluster named by ``RAY_ADDRESS``, else to one started here, ended afterwards.

    A cluster started here has token authentication on, and its dashboard on the loopback interface. If this process
    is connected already, that connection is used and left as it is.

    Raises:
        ClusterError: the named cluster cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    address = named_cluster()
    if address is None:
        # If this process is killed, Ray's agents learn it from a GCS that no longer answers: after more than a minute
        # by default, after seconds so. A local GCS never comes back.
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
        os.environ.setdefault("RAY_gcs_server_request_timeout_seconds", "10")
    # Ray Train's controller asks the workers for news every so often; 2 s by default, which the end of a run waits for.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Runs report through their own channel; Ray's usage pings and console banners add nothing.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if address:
            # Where this is a job with an environment of its own, both are joined; a variable of both is the same.
            os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
            environment = {"env_vars": PROCESS_VARIABLES}
            ray.init(address=address, runtime_env=environment, logging_level=logging.ERROR, log_to_driver=False)
        else:
            ray.init(
                address="local",
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        place = f"the Ray cluster at {address}" if address else "a local Ray"
        raise ClusterError(
            f"{place} could not be {'reached' if address else 'started'} ({error})",
            hint="Check RAY_ADDRESS and the token (RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH)" if address else "",
        ) from error
    try:
        if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
            logger.warning("this Ray cluster has no token authentication: whoever reaches its ports can run code on it;"
                           " start it with RAY_AUTH_MODE=token")  # fmt: skip
        yield
    finally:
        ray.shutdown()


@contextmanager
def ray_meanwhile() -> Iterator[Callable[[], None]]:
    """Start or join Ray in a thread, as :func:`ray_session` does, while a command gets ready for it.

    Yields:
        Waits until there is Ray; raises what :func:`ray_session` does.

    Raises:
        ClusterError: the named cluster cannot be reached.
    """
    if ray.is_initialized():
        yield lambda: None
        return
    named_cluster()
    wanted, there, over = (threading.Event() for _ in range(3))
    failure: list[BaseException] = []

    def hold() -> None:  # to the end: the system ends Ray's processes with the thread that started them
        wanted.wait(_GRACE_S)
        if over.is_set():
            return
        try:
            with ray_session():
                there.set()
                over.wait()
        except BaseException as error:
            failure.append(error)
        finally:
            there.set()

    def join() -> None:
        wanted.set()
        there.wait()
        if failure:
            raise failure[0]

    thread = threading.Thread(target=hold, name="ray", daemon=True)
    thread.start()
    try:
        with _leaving_on_sigterm():
            yield join
    finally:
        over.set()
        wanted.set()
        thread.join()


@contextmanager
def _leaving_on_sigterm() -> Iterator[None]:
    """Have a command that is terminated leave its contexts; Ray sees to that only if the main thread starts it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
