"""axe-core finds nothing serious on our pages, in a real browser; skipped where there is none."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser, browser
from left_runs import POOL, leave_run, leave_samples, leave_sweep

from hncse_ray.cluster.sweep_report import write_sweep_report
from hncse_ray.reporting.run_page import write_run_page
from hncse_ray.reporting.runs_page import write_runs_page
from hncse_ray.storage import locked

ROOT = Path(__file__).parents[2]
AXE = importlib.util.find_spec("axe_playwright_python")
SITE = ("index", "adapt", "settings")
PAGES = ("finished", "going", "died", "runs", "sweep", *SITE)
LOOKS = [(390, False), (390, True), (1280, False), (1280, True)]  # how wide, and whether dark

pytestmark = pytest.mark.skipif(CHROMIUM is None or AXE is None, reason="no Chromium, or no axe-playwright-python")


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The addresses of our pages by name, those of the site too."""
    folder = tmp_path_factory.mktemp("pages")
    for name in ("finished", "going", "died"):
        leave_run(folder / name, finished=name == "finished", extra=POOL)
    leave_samples(folder / "finished")
    with locked(folder / "going" / ".lock", hint=""):
        found = {name: write_run_page(folder / name) for name in ("finished", "going", "died")}
    found["runs"] = write_runs_page([folder / "finished", folder / "died"], folder / "runs.html")
    leave_sweep(folder / "sweep")
    found["sweep"] = write_sweep_report(folder / "sweep")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--no-directory-urls", "--site-dir", folder / "site"]
    subprocess.run(command, cwd=ROOT, check=True)
    found |= {name: folder / "site" / f"{name}.html" for name in SITE}
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}"
        yield {name: f"{root}/{path.relative_to(folder)}" for name, path in found.items()}
        server.shutdown()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def violations(tab: Browser) -> list[tuple[str, str]]:
    """Return the rules that the page breaks, each with the first element that does."""
    assert AXE is not None and AXE.submodule_search_locations is not None
    tab.run((Path(AXE.submodule_search_locations[0]) / "axe.min.js").read_text(encoding="utf-8") + "\n;0")
    found: dict[str, Any] = tab.run(
        "axe.run().then(found => ({passes: found.passes.length, violations: found.violations.map("
        "v => [v.impact, v.id, v.nodes[0].html.slice(0, 200)])}))"
    )
    assert found["passes"] > 10
    return [(rule, element) for impact, rule, element in found["violations"] if impact in ("serious", "critical")]


@pytest.mark.parametrize(
    ("name", "width", "dark"),
    # The settings are long: axe takes seconds for them, and two looks have both widths and both schemes.
    [(name, *look) for name in PAGES for look in (LOOKS if name != "settings" else LOOKS[1:3])],
)
def test_nothing_serious_is_found_and_nothing_is_cut_off(
    tab: Browser, pages: dict[str, str], name: str, width: int, dark: bool
) -> None:
    tab.show(pages[name], width=width, dark=dark)
    ground = tab.run("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", ground)[0]) < 128) == dark
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert violations(tab) == []


def test_what_is_wrong_is_found(tab: Browser, pages: dict[str, str]) -> None:
    tab.show(pages["died"], width=390, dark=False)
    tab.run(
        "document.querySelector('main').insertAdjacentHTML('beforeend', '<p style=\"color: #999\">pale</p><img src>')"
    )
    assert [rule for rule, _ in violations(tab)] == ["color-contrast", "image-alt"]
