"""What answers at an address is found out in seconds: nothing, something that is no Ray, a proxy between."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import pytest
from invoke import assert_refused, hncse

from hncse_ray.cluster import ray_session
from hncse_ray.cluster.submit import JobRequest, submit_job
from hncse_ray.errors import ClusterError

pytestmark = pytest.mark.timeout(60)  # Ray's own tries last from 34 s to 14 minutes
PROXIES = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy")


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", *PROXIES):
        monkeypatch.delenv(name, raising=False)


class Page(BaseHTTPRequestHandler):
    """Answers every question with the same page."""

    status, body = 200, b"<html>hello</html>"

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args: object) -> None:
        pass


def serve(page: type[Page]) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture(params=["nothing", "silence", "a web page", "JSON", "a list", "noise", "gRPC"])
def other(request: pytest.FixtureRequest) -> Iterator[str]:
    """HOST:PORT of something that is no Ray."""
    kind = request.param
    if kind in ("nothing", "silence", "noise"):
        with socket.socket() as held:
            held.bind(("127.0.0.1", 0))
            if kind != "nothing":
                held.listen()
            if kind == "noise":
                threading.Thread(target=greet, args=(held,), daemon=True).start()
            yield f"127.0.0.1:{held.getsockname()[1]}"
    elif kind == "gRPC":
        server = grpc.server(ThreadPoolExecutor(1))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(None)
    else:
        body = {"a web page": Page.body, "JSON": b'{"version": "2"}', "a list": b"[1]"}[kind]
        with serve(type("Other", (Page,), {"body": body})) as http:
            yield f"127.0.0.1:{http.server_port}"
            http.shutdown()


def greet(listener: socket.socket) -> None:
    try:
        while True:
            listener.accept()[0].sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
    except OSError:
        return


def test_joining_what_is_no_ray_is_refused(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", other)
    with pytest.raises(ClusterError) as caught, ray_session():
        pytest.fail("it was joined")
    assert str(caught.value).startswith(f"RAY_ADDRESS={other}: ") and caught.value.hint
    assert "nothing answers there" in str(caught.value) or "is not the head of a Ray" in str(caught.value)


@pytest.mark.parametrize("scheme", ["", "http://"])
def test_submitting_to_what_is_no_ray_is_refused(other: str, scheme: str) -> None:
    with pytest.raises(ClusterError) as caught:
        submit_job(JobRequest(("train",)), address=scheme + other)
    assert other in caught.value.where and caught.value.hint
    assert "nothing answers there" in str(caught.value) or "no Ray job server answers there (" in str(caught.value)
    assert str(caught.value).isprintable()  # and no bytes of another protocol


def test_commands_that_join_a_cluster_ask_before_they_work(
    tiny_model: Path, corpus_file: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, out = tmp_path / "cache", tmp_path / "x.parquet"
    monkeypatch.setenv("HNCSE_CACHE", str(cache))
    run = [f"encoder.model={tiny_model}", f"corpus.path={corpus_file}", f"run.storage_path={tmp_path}/runs"]
    run += ["corpus.source=text"]
    commands = [
        ["train", "quickstart", *run],
        ["tune", "quickstart", *run, "--space", "info_nce", "--trials", "1", "--out", tmp_path / "sweep"],
        ["mine", tiny_model, corpus_file, "--out", out],
        ["evaluate", tiny_model, "--suite", "pairs", "--pairs", pairs_file, "--pooling", "mean", "--workers", "1"],
    ]
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{held.getsockname()[1]}")
        for command in commands:
            assert_refused(hncse(*command), "RAY_ADDRESS=127.0.0.1:", "nothing answers there (Connection refused)")
    assert not out.exists() and not cache.exists() and not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "127.0.0.1:x", "127.0.0.1:99999", "[::1", "ftp://x:1", "a b", "\u00fc" * 99]
)
def test_an_address_that_makes_no_sense_is_named(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError, match="RAY_ADDRESS=") as caught, ray_session():
        pytest.fail("it was joined")
    assert caught.value.hint


class TestProxies:
    """The environment names a proxy, and it is not the address that is to blame."""

    @pytest.mark.parametrize("status", [403, 407, 502, 200])
    def test_one_that_does_not_let_through_is_named(self, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
        with serve(type("Proxy", (Page,), {"status": status})) as proxy:
            monkeypatch.setenv("HTTP_PROXY", f"http://user:s3cret@127.0.0.1:{proxy.server_port}")
            monkeypatch.setenv("http_proxy", f"http://user:s3cret@127.0.0.1:{proxy.server_port}")
            with pytest.raises(ClusterError) as caught:
                submit_job(JobRequest(("train",)), address="http://cluster.example:8265")
            said = str(caught.value)
            assert f"the proxy 127.0.0.1:{proxy.server_port}" in said and "NO_PROXY=cluster.example" in said
            assert "s3cret" not in said
            proxy.shutdown()

    @pytest.mark.parametrize("address", ["https://cluster.example:8265", "127.0.0.1:{}", "http://127.0.0.1:{}"])
    def test_one_that_is_away_is_named(self, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.socket() as held, socket.socket() as dead:
            held.bind(("127.0.0.1", 0))
            dead.bind(("127.0.0.1", 0))
            for name in PROXIES[:4]:
                monkeypatch.setenv(name, f"http://127.0.0.1:{dead.getsockname()[1]}")
            with pytest.raises(ClusterError) as caught:
                submit_job(JobRequest(("train",)), address=address.format(held.getsockname()[1]))
            assert f"the proxy 127.0.0.1:{dead.getsockname()[1]}" in str(caught.value)
            assert "Connection refused" in str(caught.value)

    def test_what_goes_without_one_does_not_mention_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        with serve(Page) as page, pytest.raises(ClusterError) as caught:
            submit_job(JobRequest(("train",)), address=f"http://127.0.0.1:{page.server_port}")
        assert "proxy" not in str(caught.value)
        page.shutdown()
