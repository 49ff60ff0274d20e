"""Servers of S3 and of Google's storage for tests, and a way to cut one off.

They are moto's ``moto_server``, from where HNCSE_MOTO_SERVER says, and ``gcp-storage-emulator``, from where
HNCSE_GCS_EMULATOR says. They need environments of their own, as moto does not go together with the pinned
python-dateutil. Without them the tests that need them are skipped.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from waits import seconds, soon

BUCKET = "tests"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Gate:
    """Forwards a port to another while it is open; while it is closed, nobody listens and no connection lives."""

    def __init__(self, target: int) -> None:
        self.port, self.target = free_port(), target
        self._listener: socket.socket | None = None
        self._connections: list[socket.socket] = []

    def open(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def close(self) -> None:
        assert self._listener is not None
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._connections.clear()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near = listener.accept()[0]
                far = socket.create_connection(("127.0.0.1", self.target))
                self._connections += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._forward, args=pair, daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def s3_server(folder: Path) -> Iterator[Gate]:
    """Run a server with one empty bucket, and point this process and its children to a gate before it."""
    program = os.environ.get("HNCSE_MOTO_SERVER")
    if not program:
        pytest.skip("no S3 server: install moto[server] in an environment of its own and set HNCSE_MOTO_SERVER")
    port = free_port()
    make = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
    with _serving([program, "-H", "127.0.0.1", "-p", str(port)], folder / "moto.log", make):
        gate = Gate(port)
        gate.open()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{gate.port}",
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
            }.items():
                patch.setenv(name, value)
            yield gate
        gate.close()


@contextmanager
def gcs_server(folder: Path) -> Iterator[Gate]:
    """Run a server with one empty bucket, and point this process and its children to a gate before it.

    Google's client must have an account to sign with, so there is one of nobody.
    """
    program = os.environ.get("HNCSE_GCS_EMULATOR")
    if not program:
        pytest.skip("no server of Google's storage: install gcp-storage-emulator and set HNCSE_GCS_EMULATOR")
    port = free_port()
    key = subprocess.run(["openssl", "genrsa", "2048"], capture_output=True, text=True, check=True).stdout
    account = {"type": "service_account", "project_id": "tests", "private_key_id": "1", "private_key": key}
    account |= {"client_email": "nobody@tests.invalid", "client_id": "1", "token_uri": "http://127.0.0.1:1/token"}
    (folder / "account.json").write_text(json.dumps(account))
    arguments = ["start", "--host", "127.0.0.1", "--port", str(port), "--in-memory", "--default-bucket", BUCKET]
    ready = urllib.request.Request(f"http://127.0.0.1:{port}/storage/v1/b/{BUCKET}")
    with _serving([program, *arguments], folder / "gcs.log", ready):
        gate = Gate(port)
        gate.open()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", f"http://127.0.0.1:{gate.port}")
            patch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(folder / "account.json"))
            yield gate
        gate.close()


def _answers(request: urllib.request.Request) -> bool:
    try:
        urllib.request.urlopen(request, timeout=seconds(10)).read()
    except OSError:
        return False
    return True


@contextmanager
def _serving(command: list[str], log: Path, first: urllib.request.Request) -> Iterator[None]:
    """Run a server, from when it has answered the first request."""
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        soon(lambda: _answers(first), within_s=90, what=f"an answer of {command[0]}, see {log}")
        yield
    finally:
        server.terminate()
        server.wait(timeout=seconds(30))
