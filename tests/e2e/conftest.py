from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
OF_THIS_MACHINE = ("HNCSE_DATA", "RAY_ADDRESS", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE")


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No hub, no proxy, no token, no data of this machine; and the logger as it was, which the command line sets up."""
    for name in (*PROXIES, *OF_THIS_MACHINE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HNCSE_CACHE", str(tmp_path / "cache"))
    logger = logging.getLogger("hncse_ray")
    before, threads = (list(logger.handlers), logger.propagate, logger.level), torch.get_num_threads()
    logger.handlers.clear()
    torch.set_num_threads(1)
    yield
    logger.handlers, logger.propagate, logger.level = before
    torch.set_num_threads(threads)
