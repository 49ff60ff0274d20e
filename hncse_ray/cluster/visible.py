"""Whether the nodes of a cluster see the run's folder: a path may be there on each, and be another on each."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Mapping
from pathlib import Path

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hncse_ray.cluster.placement import matches
from hncse_ray.errors import StorageError

_TIMEOUT_S = 60.0
_HINT = "Put run.storage_path on a mount that every node has, or give a URL such as s3://bucket/folder"


def check_visible(folder: Path, labels: Mapping[str, str]) -> None:
    """Make sure that every node that workers may be on sees a folder of this one, by a file that is put there.

    Args:
        folder: the run's folder.
        labels: which nodes workers may be on.

    Raises:
        StorageError: some do not; the message names them.
    """
    here = ray.get_runtime_context().get_node_id()
    others = {
        node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != here and node["Resources"].get("CPU") and matches(node["Labels"], labels)
    }
    if not others:
        return
    probe, token = folder.absolute() / f".probe-{uuid.uuid4().hex[:8]}", uuid.uuid4().hex
    try:
        probe.write_text(token, encoding="utf-8")
        calls = {node: _look_on(node).remote(str(probe)) for node in others}
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=_TIMEOUT_S)
        seen = {others[node]: _answer(call) for node, call in calls.items()}
    except OSError as error:
        raise StorageError(f"cannot be written ({error.strerror})", str(folder), "Is the disk full?") from error
    finally:
        probe.unlink(missing_ok=True)
    if (refusal := explain(str(folder), seen, token)) is not None:
        raise refusal


def explain(folder: str, seen: Mapping[str, str | None], token: str) -> StorageError | None:
    """Return the refusal of a folder that some nodes do not see; None if all do.

    Args:
        folder: the run's folder.
        seen: what each node read, by its name; ``""`` if there is no such file, None if it did not answer.
        token: what was written.
    """
    if silent := sorted(node for node, text in seen.items() if text is None):
        return StorageError(f"cannot be looked for on {_join(silent)}: no answer in {_TIMEOUT_S:g} s", folder, _HINT)
    if blind := sorted(node for node, text in seen.items() if text != token):
        return StorageError(f"is not seen by {len(blind)} of {len(seen) + 1} nodes: {_join(blind)}", folder, _HINT)
    return None


def not_visible(folder: Path) -> StorageError:
    """Return the refusal of a worker that does not see the run's folder: of a node that joined later, perhaps."""
    return StorageError(f"is not seen by node {socket.gethostname()}", str(folder), _HINT)


def _join(names: list[str], limit: int = 5) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _look_on(node: str):  # noqa: ANN202
    here = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(_read).options(num_cpus=0, scheduling_strategy=here, max_retries=0)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _answer(call: ray.ObjectRef) -> str | None:
    try:
        return ray.get(call, timeout=0)
    except (RayError, GetTimeoutError):
        return None
