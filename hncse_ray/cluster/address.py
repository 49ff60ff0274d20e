"""Whether a Ray answers at an address, asked before Ray is: its own tries last up to 14 minutes, and blame the address.

A cluster has two that matter here: its head, HOST:6379, which programs join (``RAY_ADDRESS``), and its job server,
http://HOST:8265, which takes jobs.
"""

from __future__ import annotations

import socket
from http.client import BadStatusLine, RemoteDisconnected
from urllib.parse import urlsplit

import grpc
import requests
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.exceptions import AuthenticationError
from requests.utils import get_environ_proxies, select_proxy

from hncse_ray.errors import ClusterError

TOKEN_HINT = "Set RAY_AUTH_TOKEN_PATH to the file with the cluster's token, or RAY_AUTH_TOKEN to the token itself"
_ANSWER_S = 5.0
_PORTS = {"http": 80, "https": 443, "ray": 10001}


def find_head(address: str, *, named: str) -> str:
    """Return the address of a head to join, once it has answered.

    Args:
        address: ``HOST:PORT``, ``ray://HOST:PORT``, or ``auto`` for the one that was started on this machine.
        named: what says so, for messages, such as ``RAY_ADDRESS=auto``.

    Raises:
        ClusterError: nothing answers there, what answers is no head, or it does not accept the token.
    """
    if address == "auto":
        try:
            address = canonicalize_bootstrap_address_or_die("auto")
        except (ConnectionError, ValueError) as error:
            raise ClusterError("no Ray runs on this machine", named, "Name HOST:6379 of a head") from error
    scheme, host, port = _parts(address, named, default_port=6379)
    if scheme.startswith("http"):
        raise ClusterError("it names the job server, which takes jobs but cannot be joined", named,
                           "Submit the command with `hncse submit`, or name HOST:6379 of the head")  # fmt: skip
    _see_that_something_listens(host, port, named)
    code = _ask_for_cluster_id(host, port)
    if scheme == "ray" and code == grpc.StatusCode.UNIMPLEMENTED:  # Ray Client's server does not know it
        return address
    if code == grpc.StatusCode.UNAUTHENTICATED:
        raise ClusterError("the Ray cluster asks for a token, and none was found or not the right one", named,
                           f"Set RAY_AUTH_MODE=token. {TOKEN_HINT}")  # fmt: skip
    if code != grpc.StatusCode.OK:
        raise ClusterError(f"what answers there is not the head of a Ray cluster ({code.name})", named,
                           "Name HOST:6379 of the head")  # fmt: skip
    return address


def find_job_server(address: str) -> str:
    """Return the address to submit jobs to, once a Ray has answered there: a URL, or a head that knows it.

    Args:
        address: a URL of a job server, ``HOST:PORT`` of either, ``ray://HOST:PORT`` or ``auto``.

    Raises:
        ClusterError: nothing answers there, or what answers is no Ray.
    """
    scheme, host, port = _parts(address, address, default_port=8265)
    if address == "auto" or scheme == "ray":
        return find_head(address, named=address)
    if not scheme and _ask_for_cluster_id(host, port) in (grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED):
        return find_head(address, named=address)
    url = address.rstrip("/") if scheme else f"http://{host}:{port}"
    _see_a_job_server(url, host, port)
    return url


def proxy_hint(url: str) -> str:
    """Say through which proxy requests to a URL go; empty if they go directly."""
    proxy = select_proxy(url, get_environ_proxies(url))
    if not proxy:
        return ""
    through = urlsplit(proxy if "://" in proxy else f"//{proxy}").netloc.rpartition("@")[2]  # without a password
    return (f"Requests to it go through the proxy {through} that the environment names (HTTP_PROXY, HTTPS_PROXY);"
            f" set NO_PROXY={urlsplit(url).hostname} to go without")  # fmt: skip


def _parts(address: str, named: str, *, default_port: int) -> tuple[str, str, int]:
    """Return scheme, host and port."""
    try:
        url = urlsplit(address if "://" in address else f"//{address}")
        host, port = url.hostname, url.port
    except ValueError:
        url, host, port = urlsplit(""), None, None
    if url.scheme not in ("", *_PORTS) or not host:
        raise ClusterError("is not an address", named, "Write http://HOST:8265 for a job server, HOST:6379 for a head")
    return url.scheme, host, port or _PORTS.get(url.scheme, default_port)


def _see_that_something_listens(host: str, port: int, named: str) -> None:
    try:
        socket.create_connection((host, port), timeout=_ANSWER_S).close()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ClusterError(f"nothing answers there ({reason})", named,
                           "Is the cluster up, and the tunnel to it, if there is one?") from error  # fmt: skip


def _ask_for_cluster_id(host: str, port: int) -> grpc.StatusCode:
    """Ask for the id of the cluster, as all who join a head begin, and return how that ended."""
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    channel = init_grpc_channel(target, options=[("grpc.enable_http_proxy", 0)])
    try:
        NodeInfoGcsServiceStub(channel).GetClusterId(GetClusterIdRequest(), timeout=_ANSWER_S)
    except grpc.RpcError as error:
        return error.code()
    except AuthenticationError:  # there is no token, or it cannot be read
        return grpc.StatusCode.UNAUTHENTICATED
    finally:
        channel.close()
    return grpc.StatusCode.OK


def _see_a_job_server(url: str, host: str, port: int) -> None:
    """Ask for Ray's version, without a token: what asks for one is a Ray too."""
    proxy = proxy_hint(url)
    hint = proxy or "The address is that of the dashboard, port 8265 by default"
    if not proxy:
        _see_that_something_listens(host, port, url)
    try:
        answer = requests.get(f"{url}/api/version", timeout=_ANSWER_S)
        is_ray = answer.status_code == 401 or "ray_version" in answer.json()
        found = f"HTTP status {answer.status_code}"
    except (requests.RequestException, TypeError) as error:
        is_ray, found = False, _root(error)
    if not is_ray:
        raise ClusterError(f"no Ray job server answers there ({found})", url, hint)


def _root(error: BaseException) -> str:
    """Return the first cause of an error of requests, which wraps each a few times."""
    if isinstance(error, (requests.JSONDecodeError, TypeError)):
        return "what answers is no JSON of Ray's"
    while inner := error.__cause__ or error.__context__:
        error = inner
    if isinstance(error, BadStatusLine) and not isinstance(error, RemoteDisconnected):
        return "what answers does not speak HTTP"
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
