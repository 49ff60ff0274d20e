"""Jobs on a cluster that runs elsewhere: submitted to its job server, followed to the end, stopped if asked."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import requests
from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, _dir_travel, _get_excludes
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobStatus, JobSubmissionClient

from hncse_ray.cluster.address import TOKEN_HINT, find_job_server, proxy_hint
from hncse_ray.errors import ClusterError, SettingsError, StorageError

logger = logging.getLogger(__name__)
for _chatty in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk",
                "_private.runtime_env.packaging", "_private.runtime_env.working_dir"):  # fmt: skip
    logging.getLogger(f"ray.{_chatty}").setLevel(logging.ERROR)
_quiet = logging.Logger(f"{__name__}.quiet", logging.CRITICAL)

# On top of what .gitignore, .rayignore and Ray itself leave out.
EXCLUDES = (".git", ".venv", "venv", "/runs", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "node_modules")
_SECRET = re.compile(r"token|secret|passw|credential|(^|_)key($|_)|authorization", re.IGNORECASE)
# A job that is stopped gets what Ctrl-C would give it, and time to put its workers away; Ray's way is SIGTERM and 3 s.
_STOPPING = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "30"}
_BODY_LIMIT = re.compile(r"Maximum request body size (\d+)")
_FAILURES = (RuntimeError, RayError, requests.RequestException)
_NEWS_S = 20.0  # without a line of log for so long, the job's state is asked for
_LOST_S = 180.0
_AGENT_S = 120.0  # a head that was just started answers before it takes jobs
_NO_AGENT = (
    "Try again in a minute: its agent may still be starting. Beside another Ray the head needs ports of its own, also "
    "--dashboard-agent-listen-port"
)
_STOP_S = 60.0


@dataclass(frozen=True)
class JobRequest:
    """What is to run, and with what.

    Attributes:
        command: of ``hncse``, with its arguments.
        working_dir: the folder that the job starts in, uploaded.
        environment: names of variables whose values here the job gets too.
        cpus: reserved for the command's own process, for those that work in it.
        gpus: the same.
        files: what the command reads, by paths that are relative to the working folder.
    """

    command: tuple[str, ...]
    working_dir: Path = Path()
    environment: tuple[str, ...] = ()
    cpus: float = 0
    gpus: float = 0
    files: tuple[str, ...] = ()

    @property
    def entrypoint(self) -> str:
        """The shell command. As a module it runs wherever the package is, with or without the scripts in jobs/."""
        return shlex.join(["python", "-m", "hncse_ray.cli", *self.command])


@dataclass(frozen=True)
class JobOutcome:
    """How a job stands.

    Attributes:
        status: ``PENDING``, ``RUNNING``, ``SUCCEEDED``, ``FAILED`` or ``STOPPED``.
        exit_code: for the shell; None while it runs.
        message: why it failed, if it failed before its command could say so itself.
    """

    status: str
    exit_code: int | None
    message: str = ""


class Job:
    """A job that was submitted."""

    def __init__(self, client: JobSubmissionClient, job_id: str) -> None:
        self._client = client
        self.id = job_id

    @property
    def address(self) -> str:
        """The job server, as a URL."""
        return str(self._client.get_address())

    def outcome(self) -> JobOutcome:
        """Ask how it stands."""
        details = self._client.get_job_info(self.id)
        status, code = details.status, details.driver_exit_code
        if not status.is_terminal():
            return JobOutcome(str(status), None)
        if status == JobStatus.SUCCEEDED:
            return JobOutcome(str(status), 0)
        message = (details.message or "").strip() if code is None else ""
        return JobOutcome(str(status), code if code is not None and 0 < code < 256 else 1, message)

    def follow(self, write: Callable[[str], object]) -> JobOutcome:
        """Hand the job's log on until it ends, through lost connections.

        Raises:
            ClusterError: the cluster has not been reached for minutes.
        """
        return asyncio.run(self._follow(write))

    def stop(self) -> JobOutcome:
        """Stop the job, and wait until it is.

        Raises:
            ClusterError: it goes on, or the cluster cannot be reached.
        """
        try:
            self._client.stop_job(self.id)
            end = time.monotonic() + _STOP_S
            while (outcome := self.outcome()).exit_code is None:
                if time.monotonic() > end:
                    raise ClusterError(f"the job has not stopped within {_STOP_S:g} s", self.id, self.hint())
                time.sleep(0.5)
        except _FAILURES as error:
            raise ClusterError(f"the job could not be stopped ({error})", self.id, self.hint()) from error
        return outcome

    def hint(self) -> str:
        """Say how to see the job again, and how to stop it."""
        job = f"{self.id} --address {self.address}"
        return f"See it with `ray job logs --follow {job}`, stop it with `ray job stop {job}`"

    async def _follow(self, write: Callable[[str], object]) -> JobOutcome:
        written, last, pause, ends = 0, time.monotonic(), 1.0, 0
        while True:
            position, is_whole = 0, False  # each connection gives the log from its start
            try:
                async for text in self._news():
                    last, pause = time.monotonic(), 1.0
                    if text is None:
                        is_whole = True
                    elif new := text[max(0, written - position) :]:
                        write(new)
                    position += len(text or "")
                    written = max(written, position)
                outcome = await self._ask()
                ends += outcome.exit_code is not None
                if ends and (is_whole or ends > 2):
                    return outcome
            except (*_FAILURES, OSError, TimeoutError, aiohttp.ClientError) as error:
                logger.warning("lost touch with the job (%s); trying again", error)
                if time.monotonic() - last > _LOST_S:
                    proxy = "; Ray asks for logs without a proxy" if proxy_hint(self.address) else ""
                    raise ClusterError(f"the cluster has not answered for minutes{proxy}; the job may still run",
                                       self.id, self.hint()) from error  # fmt: skip
            await asyncio.sleep(pause)
            pause = min(2 * pause, 15.0)

    async def _news(self) -> AsyncIterator[str | None]:
        """Pieces of the log of one connection; None at the end, if it was the log that ended.

        A connection that is silent for long may be broken, as after a tunnel was; another one then tells.
        """
        log = self._client.tail_job_logs(self.id)
        pending: asyncio.Future[str] | None = None
        silences = 0
        try:
            while silences < 3:
                pending = pending or asyncio.ensure_future(anext(log))
                done, _ = await asyncio.wait([pending], timeout=_NEWS_S)
                if done:
                    text, pending, silences = pending.result(), None, 0
                    yield text
                else:
                    silences = 3 if (await self._ask()).exit_code is not None else silences + 1
                    yield ""
        except StopAsyncIteration:
            yield None
        finally:
            if pending is not None:
                pending.cancel()

    async def _ask(self) -> JobOutcome:
        return await asyncio.wait_for(asyncio.to_thread(self.outcome), _NEWS_S)


def submit_job(request: JobRequest, *, address: str | None = None) -> Job:
    """Submit a job; Ray's own variables say with which token (``RAY_AUTH_TOKEN``, ``RAY_AUTH_TOKEN_PATH``).

    Args:
        request: what is to run.
        address: the job server, such as ``http://127.0.0.1:8265``; default: ``RAY_API_SERVER_ADDRESS``, else
            ``RAY_ADDRESS``.

    Raises:
        SettingsError: a variable is not set, or should not travel.
        StorageError: the working folder is not there, too large, or uploaded without a file that the command reads.
        ClusterError: the cluster is not reached, or does not accept the job.
    """
    variables = _environment(request.environment)
    if not request.working_dir.is_dir():
        hint = "Name the folder to upload with --working-dir"
        raise StorageError("is not a folder", str(request.working_dir), hint)
    _check_files(request.working_dir, request.files)
    client = _connect(address)
    _check_size(request.working_dir)
    end = time.monotonic() + _AGENT_S
    while True:
        try:
            job_id = client.submit_job(
                entrypoint=request.entrypoint,
                runtime_env={
                    "working_dir": str(request.working_dir),
                    "excludes": list(EXCLUDES),
                    "env_vars": _STOPPING | variables,
                },
                entrypoint_num_cpus=request.cpus or None,
                entrypoint_num_gpus=request.gpus or None,
            )
            return Job(client, job_id)
        except (*_FAILURES, ValueError) as error:
            if "No available agent" in str(error) and time.monotonic() < end:
                logger.info("the head is not ready for jobs yet; trying again")
                time.sleep(3)
                continue
            if limit := _BODY_LIMIT.search(str(error)):  # how large it is once packed is known only now
                taken = f"the {int(limit[1]) / 2**20:,.0f} MiB that the job server takes"
                raise _too_large(request.working_dir, f"the packed folder is larger than {taken}") from error
            reason = str(error).strip().splitlines()[-1]
            url = str(client.get_address())
            hint = _NO_AGENT if "No available agent" in reason else proxy_hint(url)
            raise ClusterError(f"the cluster did not take the job ({reason})", url, hint) from error


def _environment(names: Sequence[str]) -> dict[str, str]:
    for name in names:
        if _SECRET.search(name):
            raise SettingsError("looks like a secret, and whoever sees the dashboard can read a job's environment",
                                f"--env {name}", "Give secrets to the nodes of the cluster instead")  # fmt: skip
        if name not in os.environ:
            raise SettingsError("is not set here", f"--env {name}", "Name a variable, and set it before")
    return {name: os.environ[name] for name in names}


def _check_files(folder: Path, names: Sequence[str]) -> None:
    """Refuse files and folders that are here and would not be where the job is."""
    here = [os.path.normpath(name) for name in names if not os.path.isabs(name) and (folder / name).exists()]
    uploaded = {os.path.relpath(path, folder) for path in _sizes(folder)} if here else set()
    for name in here:
        if name != "." and not any(path == name or path.startswith(f"{name}{os.sep}") for path in uploaded):
            raise StorageError(
                "is not uploaded, and the job would not find it",
                name,
                f"Copy it to another place in {os.path.abspath(folder)}: runs, caches and what .gitignore and"
                " .rayignore name are left out",
            )


def _check_size(folder: Path) -> None:
    """Refuse a folder larger than Ray takes, before it is packed."""
    if (size := sum(_sizes(folder).values())) >= GCS_STORAGE_MAX_SIZE:
        limit = GCS_STORAGE_MAX_SIZE / 2**20
        raise _too_large(folder, f"{size / 2**20:,.0f} MiB are too large to upload, Ray takes {limit:,.0f}")


def _too_large(folder: Path, what: str) -> StorageError:
    sizes = _sizes(folder)
    largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:3]
    return StorageError(
        f"{what}; the largest files are"
        f" {', '.join(f'{p.relative_to(folder)} ({sizes[p] / 2**20:,.0f})' for p in largest)}",
        f"--working-dir {folder}",
        "List what the job does not need in .rayignore, and put data where all nodes see it",
    )


def _sizes(folder: Path) -> dict[Path, int]:
    """Return the files that are uploaded, with their bytes, by Ray's own rules of what belongs to a folder."""
    sizes: dict[Path, int] = {}

    def count(path: Path) -> None:
        if path.is_file():
            sizes[path] = path.stat().st_size

    _dir_travel(folder, [_get_excludes(folder, list(EXCLUDES))], count, include_gitignore=True, logger=_quiet)
    return sizes


def _connect(address: str | None) -> JobSubmissionClient:
    asked = address
    if asked is None:
        asked = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if not asked:
        raise ClusterError("no cluster is named", "",
                           "Give --address http://127.0.0.1:8265, or set RAY_API_SERVER_ADDRESS; `ray dashboard"
                           " cluster.yaml` or `kubectl port-forward` make a tunnel to it")  # fmt: skip
    asked = find_job_server(asked)
    if (url := urlsplit(asked)).scheme == "http" and not _is_here(url.hostname or ""):
        logger.warning("the token and the job travel unencrypted to %s; a tunnel would protect them", url.hostname)
    os.environ["RAY_API_SERVER_ADDRESS"] = asked  # Ray prefers it to the argument
    try:
        return JobSubmissionClient(asked)
    except AuthenticationError as error:
        raise ClusterError(_refusal(error.message), asked,
                           TOKEN_HINT) from None  # fmt: skip
    except (*_FAILURES, ValueError, ConnectionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ClusterError(f"no Ray job server answers ({reason})", asked, proxy_hint(asked)) from error


def _refusal(message: str) -> str:
    """Tell the ways apart in which Ray has no token, before or after it has asked the cluster."""
    first = message.strip().splitlines()[0]
    if "cannot be opened" in first:
        return "the token cannot be read (RAY_AUTH_TOKEN_PATH)"
    if "required" in first or "couldn't find" in first:
        return "the Ray cluster asks for a token, and none was found"
    return "the Ray cluster does not accept the token"


def _is_here(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")
