"""axe-core finds nothing serious on our pages, in a real browser; skipped where there is none."""

from __future__ import annotations

import html
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from left_runs import POOL, leave_run, leave_samples
from waits import seconds

from hncse_ray.reporting.run_page import write_run_page
from hncse_ray.reporting.runs_page import write_runs_page

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AXE = importlib.util.find_spec("axe_playwright_python")
ASK = """<script>axe.run().then(found => {
  const told = document.createElement("pre");
  told.id = "axe";
  told.textContent = JSON.stringify({
    passes: found.passes.length,
    violations: found.violations.map(v => [v.impact, v.id, v.nodes[0].html.slice(0, 200)]),
  });
  document.body.append(told);
})</script></body>"""

pytestmark = pytest.mark.skipif(BROWSER is None or AXE is None, reason="no Chromium, or no axe-playwright-python")


def violations(page: Path, *, dark: bool = False) -> list[list[str]]:
    """Return what axe-core finds on a page: impact, rule, and the first element."""
    assert BROWSER is not None and AXE is not None and AXE.submodule_search_locations is not None
    script = (Path(AXE.submodule_search_locations[0]) / "axe.min.js").read_text(encoding="utf-8")
    copy = page.with_name("axe.html")
    script = script.replace("</script>", "<\\/script>")
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script>{ASK}"))
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'browser'}"]
    flags += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--window-size=390,800"]
    flags += ["--virtual-time-budget=20000", "--dump-dom", copy.as_uri()]
    shown = subprocess.run([BROWSER, *flags], capture_output=True, text=True, timeout=seconds(60), check=True).stdout
    told = re.search(r'<pre id="axe">(.*?)</pre>', shown, re.S)
    assert told, "axe has not run"
    found = json.loads(html.unescape(told[1]))
    assert found["passes"] > 10
    return [each for each in found["violations"] if each[0] in ("serious", "critical")]


def test_a_finished_run_in_light_and_dark(tmp_path: Path) -> None:
    leave_run(tmp_path, extra=POOL)
    leave_samples(tmp_path)
    page = write_run_page(tmp_path)
    assert violations(page) == [] and violations(page, dark=True) == []


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    leave_run(tmp_path, finished=False)
    page = write_run_page(tmp_path)
    assert violations(page) == []
    text = page.read_text(encoding="utf-8").replace("</main>", '<p style="color: #999">pale</p><img src="x"></main>')
    page.write_text(text, encoding="utf-8")
    assert [rule for _, rule, _ in violations(page)] == ["color-contrast", "image-alt"]


def test_runs_side_by_side(tmp_path: Path) -> None:
    for name in ("one", "other"):
        leave_run(tmp_path / name, finished=name == "one")
    assert violations(write_runs_page([tmp_path / "one", tmp_path / "other"], tmp_path / "runs.html")) == []
