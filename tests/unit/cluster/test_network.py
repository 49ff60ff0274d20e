"""Which interface Gloo and NCCL are pointed to."""

from __future__ import annotations

import pytest

from hncse_ray.cluster.network import interface_of, socket_variables

INTERFACES = {
    "lo": ["127.0.0.1", "::1", "00:00:00:00:00:00"],
    "docker0": ["172.17.0.1"],
    "eth0": ["02:42:ac:11:00:02", "10.0.3.7", "fe80::42%eth0"],
    "eth01": ["10.0.3.70"],
}


@pytest.mark.parametrize(
    ("address", "interface"),
    [
        ("10.0.3.7", "eth0"),
        ("10.0.3.70", "eth01"),
        ("172.17.0.1", "docker0"),
        ("fe80::42", "eth0"),
        ("127.0.0.1", None),
        ("::1", None),
        ("54.1.2.3", None),  # the public address of a cloud's node is on no interface
    ],
)
def test_the_interface_is_that_with_the_nodes_address(address: str, interface: str | None) -> None:
    assert interface_of(address, INTERFACES) == interface


def test_what_is_set_already_stays_and_nccl_is_given_the_whole_name() -> None:
    assert socket_variables("eth0", {}) == {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "=eth0"}
    assert socket_variables("eth0", {"NCCL_SOCKET_IFNAME": "ib0"}) == {"GLOO_SOCKET_IFNAME": "eth0"}
