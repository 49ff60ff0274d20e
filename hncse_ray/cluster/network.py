"""The network interface that workers talk over when they are on several nodes.

Gloo takes the interface that the host's own name resolves to, which is often the loopback; NCCL takes the first that
is up, which may be a container bridge. Ray knows the address that the nodes reach each other by.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.torch import TorchConfig

logger = logging.getLogger(__name__)


def interface_of(address: str, interfaces: Mapping[str, Sequence[str]]) -> str | None:
    """Name the interface that has an address; None if none has, or if it is the loopback.

    Args:
        address: IPv4 or IPv6.
        interfaces: addresses by interface; an IPv6 address may carry its zone, as in ``fe80::1%eth0``.
    """
    if address.startswith("127.") or address == "::1":
        return None
    return next((name for name, has in interfaces.items() if address in (a.partition("%")[0] for a in has)), None)


def socket_variables(interface: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return what to set so that Gloo and NCCL use an interface; what is set already stays."""
    wanted = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}  # "=": not by prefix
    return {name: value for name, value in wanted.items() if name not in environment}


def _use_interface_of_node() -> None:
    """Point Gloo and NCCL of this process to the interface of its Ray node."""
    import psutil  # comes with Ray

    address = ray.util.get_node_ip_address()
    interfaces = {name: [a.address for a in has] for name, has in psutil.net_if_addrs().items()}
    interface = interface_of(address, interfaces)
    if interface is None:
        logger.warning("no network interface has this node's address %s; Gloo and NCCL choose one themselves", address)
        return
    os.environ.update(socket_variables(interface, os.environ))


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Ray Train's process group, made after the interface was chosen."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if len(set(worker_group.execute(_node_id))) > 1:
            worker_group.execute(_use_interface_of_node)
        super().on_start(worker_group, backend_config)


def _node_id() -> str:
    return ray.get_runtime_context().get_node_id()


@dataclass
class NodeTorchConfig(TorchConfig):
    """Ray Train's process group over the interface that the nodes reach each other by."""

    @property
    def backend_cls(self) -> type:
        return _Backend
