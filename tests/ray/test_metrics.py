"""Ray exports the numbers of a run to Prometheus, and the dashboard and the documents ask for none that it does not."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import ray
from waits import soon

import hncse_ray
from hncse_ray.cluster.metrics import RayMetrics
from hncse_ray.config import load_settings
from hncse_ray.training import loop

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    yield
    ray.shutdown()


def exported() -> dict[str, set[str]]:
    """The metrics of runs that Ray's agent on this node shows to Prometheus, each with the runs it is of."""
    (node,) = ray.nodes()
    try:
        with urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    except OSError:
        return {}
    found: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^(ray_hncse_\w+)\{([^}]*)\}", text, re.M):
        found.setdefault(name, set()).update(re.findall(r'run="([^"]*)"', labels))
    return found


def asked(text: str) -> list[re.Pattern[str]]:
    """The names in an expression or a document: whole, or as what one of several may begin with."""
    patterns = re.findall(r'__name__=~"(ray_hncse_[^"]+)"', text)
    names = re.findall(r"ray_hncse_\w+", re.sub(r'__name__=~"[^"]+"', "", text))
    return [re.compile(name) for name in dict.fromkeys([*patterns, *names])]


def test_every_name_in_dashboard_and_documents_is_exported(
    session: None, small_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "peak_flops", lambda encoder: 1e12)  # as on a GPU
    small_run["cluster"] |= {"engine": "local"}
    small_run["negatives"] = {"source": "in_process", "refresh": "sync", "refresh_every_steps": 4}
    metrics = RayMetrics("small")
    hncse_ray.train(load_settings(small_run), reporter=metrics)
    soon(lambda: "ray_hncse_test_pairs_recall_1" in exported(), within_s=60, what=exported)
    found = exported()
    assert all(runs == {"small"} for runs in found.values())
    assert {"ray_hncse_loss", "ray_hncse_step", "ray_hncse_dev_pairs_recall_1"} <= set(found)
    dashboard = json.loads((ROOT / "deploy/grafana/hncse.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    expressions += [
        variable["query"]["query"] for variable in dashboard["templating"]["list"] if variable["name"] == "run"
    ]
    names = [name for expression in expressions for name in asked(expression)]
    assert len(names) > 20
    document = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    documented = [name for name in asked(document.partition("## Prometheus and Grafana")[2].partition("\n## ")[0])]
    assert len(documented) > 10
    assert [n.pattern for n in (*names, *documented) if not any(n.fullmatch(there) for there in found)] == []
