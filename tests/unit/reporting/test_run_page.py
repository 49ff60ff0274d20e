"""The page of a run, from folders as runs leave them."""

from __future__ import annotations

import html
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from left_runs import METRIC, POOL, leave_run, leave_samples
from page_text import figures, loads, table

from hncse_ray.config import load_settings
from hncse_ray.errors import SettingsError, StorageError
from hncse_ray.reporting.run_page import write_run_page
from hncse_ray.storage import locked


def written(folder: Path) -> str:
    page = write_run_page(folder)
    assert page == folder / "report.html"
    return page.read_text(encoding="utf-8")


def points(page: str, figure: str) -> dict[str, tuple[list[float], list[float]]]:
    traces, _ = figures(page)[figure]
    return {trace["name"]: (trace["x"], trace["y"]) for trace in traces}


class TestFinishedRun:
    @pytest.fixture
    def page(self, tmp_path: Path) -> str:
        leave_run(tmp_path)
        return written(tmp_path)

    def test_it_needs_no_network(self, page: str) -> None:
        assert loads(page) == []

    def test_scores_before_and_after(self, page: str) -> None:
        assert table(page, 'id="scores"') == [
            ["score", "split", "before", "after", "gain"],
            [METRIC, "dev", "0.5000", "0.7500", "+0.2500"],
            [METRIC, "test", "0.6250", "0.5000", "-0.1250"],
            ["python-docs/mrr", "test", "–", "76.50", ""],
        ]
        assert "finished</b> after <b>20</b> steps" in page and "<b>240.5</b> rows a second" in page

    def test_the_curves_are_those_of_the_metrics_file(self, page: str) -> None:
        assert points(page, "scores") == {
            METRIC: ([0, 10, 20], [0.5, 0.75, 0.625]),
            "best: step 10": ([10], [0.75]),
        }
        assert re.search(r"border-radius: 50%[^<]*></i>best: step 10", page)  # as it is drawn
        assert points(page, "loss") == {"loss": ([10, 20], [1.0, 0.5])}
        assert points(page, "learning-rate") == {"learning rate": ([10, 20], [1e-4, 5e-5])}
        assert points(page, "speed") == {"speed": ([10, 20], [250.0, 250.0])}
        assert points(page, "uniformity") == {"uniformity": ([10, 20], [-2.0, -2.0])}
        assert points(page, "similarity-of-views").keys() == {"positive", "hardest negative of the batch"}

    def test_the_verdict_is_on_it(self, page: str) -> None:
        assert "0.500 -&gt; 0.750 (+0.250, 95 % 0.100 to 0.400) with merge 0.75" in page  # no number may be broken
        assert "python-docs/<wbr>recall@10" in page

    def test_without_a_pool_nothing_is_said_of_one(self, page: str) -> None:
        assert "Global negatives" not in page

    def test_the_settings_are_those_of_the_run(self, page: str, tmp_path: Path) -> None:
        text = page[page.index('<pre id="settings">') + len('<pre id="settings">') :]
        shown = yaml.safe_load(html.unescape(text[: text.index("</pre>")]))
        assert shown == yaml.safe_load((tmp_path / "settings.yaml").read_text())


def text_of(page: str, name: str) -> str:
    found = re.search(rf'id="{name}"[^>]*>(.*?)</(?:div|p|pre)>', page, re.S)
    assert found, name
    return html.unescape(re.sub(r"<[^>]+>", "", found[1]))


class TestAnswer:
    def test_it_is_the_gain_on_test(self, tmp_path: Path) -> None:
        leave_run(tmp_path)
        page = written(tmp_path)
        assert text_of(page, "answer") == "-0.1250"
        assert f"{METRIC} on test: 0.6250 → 0.5000" in re.sub("<wbr>", "", page)
        assert page.index('id="answer"') < page.index('id="scores"') < page.index('id="figure-loss"')

    def test_the_whitened_base_is_told_beside_it(self, tmp_path: Path) -> None:
        leave_run(tmp_path)
        assert 'id="control"' not in written(tmp_path)
        result = json.loads((tmp_path / "result.json").read_text())
        result |= {"whitened_base": {"dev": {METRIC: 0.5625}, "test": {METRIC: 0.6875}}, "whitened_base_power": 0.125}
        (tmp_path / "result.json").write_text(json.dumps(result))
        page = written(tmp_path)
        assert text_of(page, "control").endswith("without training: 0.6875")
        assert table(page, 'id="scores"') == [
            ["score", "split", "before", "whitened base", "after", "gain"],
            [METRIC, "dev", "0.5000", "0.5625", "0.7500", "+0.2500"],
            [METRIC, "test", "0.6250", "0.6875", "0.5000", "-0.1250"],
            ["python-docs/mrr", "test", "–", "–", "76.50", ""],
        ]

    def test_without_a_test_set_it_says_that_dev_flatters(self, tmp_path: Path) -> None:
        leave_run(tmp_path, finished=False)
        page = written(tmp_path)
        assert text_of(page, "answer") == "+0.2500" and "Dev has chosen the checkpoint" in page

    def test_without_scores_there_is_none(self, tmp_path: Path) -> None:
        leave_run(tmp_path, finished=False, steps=0)
        assert "Nothing has been scored" in text_of(written(tmp_path), "answer")


def test_a_run_at_work_is_told_from_one_that_died(tmp_path: Path) -> None:
    leave_run(tmp_path, finished=False)
    with locked(tmp_path / ".lock", hint=""):
        assert text_of(written(tmp_path), "state").startswith("Still going")
    assert "it was stopped, or it died" in text_of(written(tmp_path), "state")
    leave_run(tmp_path)
    assert 'id="state"' not in written(tmp_path)


def test_changed_settings_stand_beside_their_defaults(tmp_path: Path) -> None:
    leave_run(tmp_path)
    stored = tmp_path / "settings.yaml"
    base = yaml.safe_load(stored.read_text())
    changes = ["train.learning_rate=1e-4", "encoder.lora={r: 8}", "objective.temperature=0.1"]
    stored.write_text(load_settings(base, changes).to_yaml())
    head, *rows = table(written(tmp_path), 'id="changed"')
    assert head == ["setting", "here", "default"]
    shown = {row[0]: row[1:] for row in rows}
    assert shown["train.learning_rate"] == ["0.0001", "3e-05"] and shown["objective.temperature"] == ["0.1", "0.05"]
    assert shown["encoder.lora"][0].startswith("{r: 8") and shown["encoder.lora"][1] == "null"
    assert set(shown) == {"run.name", "corpus.source", "encoder.lora", "objective.temperature", "train.learning_rate",
                          "evaluation.suites", "evaluation.metric"}  # fmt: skip
    stored.write_text(stored.read_text() + "gone:\n  away: 3\n")
    assert dict((row[0], row[2]) for row in table(written(tmp_path), 'id="changed"')[1:])["gone.away"].startswith(
        "not known"
    )


def test_the_command_that_repeats_a_run_loads(tmp_path: Path) -> None:
    leave_run(tmp_path)
    program, command, recipe, *overrides = shlex.split(text_of(written(tmp_path), "repeat"))
    assert (program, command) == ("hncse", "train")
    again = load_settings(recipe, overrides)
    assert again.run.name == "small-again"
    assert again.train == load_settings(tmp_path / "settings.yaml").train


def test_a_long_run_has_a_small_page_with_its_peaks(tmp_path: Path) -> None:
    leave_run(tmp_path, finished=False, steps=0)
    rows = [
        {"step": i, **POOL, "loss": 9.0 if i == 7777 else 1 / i, "uniformity": -2 - i % 7} for i in range(1, 10_001)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = written(tmp_path)
    assert len(page) < 1_000_000
    x, y = points(page, "loss")["loss"]
    assert len(x) <= 700 and (x[0], x[-1]) == (1, 10_000) and y[x.index(7777)] == 9.0


def test_a_figure_says_what_it_shows(tmp_path: Path) -> None:
    leave_run(tmp_path)
    (label,) = re.findall(r'<svg id="figure-loss"[^>]* aria-label="([^"]*)"', written(tmp_path))
    assert label == "by optimiser step. loss: 1 at 10, 0.5 at 20, least 0.5, most 1"


@pytest.mark.parametrize(("finished", "told"), [(True, "before the end"), (False, "yet")])
def test_a_run_that_had_no_index_says_so(tmp_path: Path, finished: bool, told: str) -> None:
    leave_run(tmp_path, finished=finished, extra={"negatives/missing": 1.0, "negatives/failed_builds": 0.0})
    page = written(tmp_path)
    assert f"<li>no index was ready {told}</li>" in page and "alive" not in page


def test_global_negatives(tmp_path: Path) -> None:
    leave_run(tmp_path, extra=POOL)
    page = written(tmp_path)
    assert points(page, "age-of-the-index") == {"age": ([10, 20], [20.0, 20.0])}
    shares = points(page, "batches-and-slots")
    assert len(shares) == 4 and shares["batches waited for"][1] == [0.25, 0.25]
    assert points(page, "similarity-of-the-selected")["to the present anchors"][1] == [0.5, 0.5]
    assert points(page, "look-up")["99th percentile"][1] == [90.0, 90.0]
    assert points(page, "removed-by-the-rules").keys() == {"itself"}, "rules that removed nothing are left out"
    for text in ("index of step <b>80</b>", "<b>2</b> shards alive", "1,234 rows a second", "<b>0</b> builds given up"):
        assert text in page


class TestUnfinishedRun:
    def test_it_shows_the_best_so_far(self, tmp_path: Path) -> None:
        leave_run(tmp_path, finished=False)
        page = written(tmp_path)
        assert "not finished</b>: the last step on record is <b>20</b>" in page
        assert table(page, 'id="scores"') == [
            ["score", "split", "before", "best so far", "gain"],
            [METRIC, "dev", "0.5000", "0.7500", "+0.2500"],
            ["python-docs/mrr", "dev", "0.2500", "0.2500", "+0.0000"],
        ]
        assert "best so far: step 10" in points(page, "scores")

    @pytest.mark.parametrize("tail", ['{"step": 30, "lo', "\x00\x00", "[1]", "{}", "\xff\xfe"])
    def test_a_last_line_cut_short_is_passed_over(self, tmp_path: Path, tail: str) -> None:
        leave_run(tmp_path, finished=False)
        with (tmp_path / "metrics.jsonl").open("ab") as file:
            file.write(tail.encode("latin-1"))
        assert points(written(tmp_path), "loss") == {"loss": ([10, 20], [1.0, 0.5])}

    @pytest.mark.parametrize("steps", [0, 1])
    def test_before_the_first_step(self, tmp_path: Path, steps: int) -> None:
        leave_run(tmp_path, finished=False, steps=steps)
        if not steps:
            (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        page = written(tmp_path)
        assert figures(page).keys() == ({"scores"} if steps else set())
        assert ("No step has been logged yet." in page) == (not steps)

    def test_numbers_that_are_none_are_gaps(self, tmp_path: Path) -> None:
        leave_run(tmp_path, finished=False)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 30, "loss": NaN}\n')
        assert points(written(tmp_path), "loss") == {"loss": ([10, 20, 30], [1.0, 0.5, None])}


def test_markup_in_settings_is_text(tmp_path: Path) -> None:
    leave_run(tmp_path)
    tree: dict[str, Any] = yaml.safe_load((tmp_path / "settings.yaml").read_text())
    tree["run"]["name"] = tree["encoder"]["model"] = "<img src=x onerror=alert(1)></pre><script>"
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(tree))
    page = written(tmp_path)
    assert "<img" not in page and loads(page) == []


class TestUnreadable:
    def test_a_damaged_line_in_the_middle(self, tmp_path: Path) -> None:
        leave_run(tmp_path)
        path = tmp_path / "metrics.jsonl"
        path.write_text("{broken\n" + path.read_text())
        with pytest.raises(StorageError, match="line 1 is not a row of a step"):
            write_run_page(tmp_path)
        assert not (tmp_path / "report.html").exists()

    @pytest.mark.parametrize(
        ("text", "why"), [("{", "Expecting"), ("[]", "another version"), ('{"x": 1}', "another version")]
    )
    def test_a_damaged_result_or_one_of_another_version(self, tmp_path: Path, text: str, why: str) -> None:
        leave_run(tmp_path)
        (tmp_path / "result.json").write_text(text)
        with pytest.raises(StorageError, match=rf"result.json: cannot be read \(.*{why}"):
            write_run_page(tmp_path)

    @pytest.mark.parametrize("text", ["", "- a", "a: [", "a: 1\na: 2"])
    def test_damaged_settings(self, tmp_path: Path, text: str) -> None:
        leave_run(tmp_path)
        (tmp_path / "settings.yaml").write_text(text)
        with pytest.raises(SettingsError, match="settings.yaml"):
            write_run_page(tmp_path)

    def test_settings_without_their_sections(self, tmp_path: Path) -> None:
        leave_run(tmp_path)
        (tmp_path / "settings.yaml").write_text("run: null\nother: 1\n")
        assert "Run ?" in written(tmp_path)


def test_the_page_names_what_the_run_trained_on(tmp_path: Path) -> None:
    leave_run(tmp_path / "run")
    assert "on python-docs, from" in re.sub(r"<wbr>|&#8203;|\u200b", "", written(tmp_path / "run"))
    settings = load_settings({"corpus": {"path": ["notes/my <texts>", "more.jsonl"]}, "evaluation": {"suites": []}})
    (tmp_path / "run" / "settings.yaml").write_text(settings.to_yaml(), encoding="utf-8")
    assert "on my &lt;texts&gt;, more.jsonl, from" in re.sub(r"<wbr>|&#8203;|\u200b", "", written(tmp_path / "run"))


# ------------------------------------------------------------------------------------------------ what people look at


class TestSamples:
    @pytest.fixture
    def page(self, tmp_path: Path) -> str:
        leave_run(tmp_path)
        leave_samples(tmp_path)
        return written(tmp_path)

    def test_neighbours_before_and_after_stand_side_by_side(self, page: str) -> None:
        assert "On average 7.5 of a sentence's ten nearest" in page
        moved = page[page.index('id="moved"') : page.index("A map of the sample")]
        assert moved.count("<section>") == 1 and "How to sort a list." in moved
        assert "Return &lt;b&gt;sorted&lt;/b&gt; values.</span> <small>0.90</small>" in moved
        assert "Open a file.</span> <small>0.70, <b>new</b></small>" in moved
        queries = page[page.index('id="queries"') : page.index('id="moved"')]
        assert queries.count("<b>right</b>") == 2 and "sort a list" in queries

    def test_anchors_show_what_the_rules_do(self, page: str) -> None:
        anchors = page[page.index('id="anchors"') : page.index("<h2>Training")]
        assert "dropped: max_score" in anchors and "<b>taken as a negative</b>" in anchors and "0.950" in anchors
        assert "index of step 8" in page and page.index('id="answer"') < page.index('id="anchors"')

    @pytest.mark.parametrize("contrast", [0.0, 0.5])
    def test_neighbours_that_are_ranked_are_not_called_negatives(self, tmp_path: Path, contrast: float) -> None:
        leave_run(tmp_path, extra=POOL | {"teacher_agreement": 0.5})
        leave_samples(tmp_path)
        stored = tmp_path / "settings.yaml"
        changes = ["objective={name: distillation}", f"objective.contrast_weight={contrast}", "negatives.source=pool",
                   "negatives.columns=all", "negatives.score=hybrid", "negatives.max_score=null",
                   "negatives.per_anchor=6"]  # fmt: skip
        stored.write_text(load_settings(yaml.safe_load(stored.read_text()), changes).to_yaml())
        page = written(tmp_path)
        found = re.sub(r"<[^>]+>", "", page[page.index("<h2>What the index finds") : page.index("<h2>Training")])
        for text in ("cosine and BM25 together", "one of the 6 that were drawn", "Left over: near"):
            assert text in found
        assert "<b>on the list</b></td>" in page
        assert "as a negative" not in found and "false negative" not in found and "max_score, or" not in found
        assert (
            "Global negatives" not in page and points(page, "agreement-with-the-teacher")["agreement"][1] == [0.5] * 2
        )
        assert points(page, "similarity-of-views").keys() == {"own document", "nearest other of the batch"}
        assert points(page, "cosines-1").keys() == {"own documents", "in the batch"}
        assert (
            ("plane" in figures(page))
            == ("is repelled from" in found)
            == ('id="expected"' not in page)
            == bool(contrast)
        )

    def test_the_advice_fits_what_the_run_has_set_and_does(self, tmp_path: Path) -> None:
        leave_run(tmp_path)
        leave_samples(tmp_path)
        stored = tmp_path / "settings.yaml"
        base = yaml.safe_load(stored.read_text())
        for changes, advice in (
            ([], "lower negatives.max_score"),
            (["negatives.max_score=null"], "set negatives.max_score"),
            (["objective={name: instance_smoothing}"], "lower objective.group_size"),
            (["objective={name: my_losses:loss}"], "handed to your objective"),
        ):
            stored.write_text(load_settings(base, changes).to_yaml())
            page = written(tmp_path)
            assert advice in text_of(page, "use") and "BM25" not in page
            assert ("taken as a negative" in page) == ("false negative" in page) == ("negatives.max_score" in advice)

    def test_cosines_at_the_start_in_the_middle_and_at_the_end(self, page: str) -> None:
        assert {name for name in figures(page) if name.startswith("cosines")} == {
            "cosines-1",
            "cosines-10",
            "cosines-20",
        }
        assert points(page, "cosines-1")["positives"] == ([-0.75, -0.25, 0.25, 0.75], [0.0, 0.0, 0.0, 1.0])
        assert points(page, "cosines-1")["in the batch"][1] == [0.0, 0.5, 0.5, 0.0]

    def test_the_map_after_is_turned_onto_the_map_before(self, page: str) -> None:
        (old,), (new,) = (points(page, f"map-{name}").values() for name in ("before", "after"))
        assert new[0] == pytest.approx(old[0], abs=2e-3) and new[1] == pytest.approx(old[1], abs=2e-3)
        (_, before), (_, after) = figures(page)["map-before"], figures(page)["map-after"]
        for axis in ("xaxis", "yaxis"):  # one scale, else a collapse is not seen
            assert before[axis]["range"] == after[axis]["range"]

    def test_a_map_by_umap_without_its_package_names_the_extra(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        leave_run(tmp_path)
        leave_samples(tmp_path)
        monkeypatch.setitem(sys.modules, "umap", None)  # what an import that fails leaves
        with pytest.raises(SettingsError, match=r"--map umap: UMAP is not installed.*hncse-ray\[umap\]"):
            write_run_page(tmp_path, projection="umap")
        assert not (tmp_path / "report.html").exists()

    @pytest.mark.slow  # umap compiles itself for half a minute
    def test_a_map_by_umap_brings_the_nearest_together(self, tmp_path: Path) -> None:
        pytest.importorskip("umap", reason="the extra umap is not installed")
        n, k = 40, 10
        rng = np.random.default_rng(0)
        near = [[[int(at), 0.9] for at in rng.permutation([j for j in range(n) if j % 2 == i % 2 and j != i])[:k]]
                for i in range(n)]  # fmt: skip
        facts = {"neighbours": near, "query_neighbours": [], "explained": 0.5}
        start_n2 = rng.normal(size=(n, 2))
        start_n2 = np.round(start_n2 - start_n2.mean(axis=0), 3)  # as a run keeps it
        sides = {"before": facts | {"map": start_n2.tolist()}, "after": facts | {"map": start_n2[:, ::-1].tolist()}}
        sentences = {"texts": [f"text {i}" for i in range(n)], "queries": [], "right": []} | sides
        leave_run(tmp_path)
        leave_samples(tmp_path, sentences=sentences)
        pages = [write_run_page(tmp_path, projection="umap").read_text(encoding="utf-8") for _ in range(2)]
        assert "UMAP of the ten nearest" in pages[0] and "of the variance" not in pages[0]
        ((before,), (after,)) = (points(pages[0], name).values() for name in ("map-before", "map-after"))
        assert np.allclose(before, after, atol=2e-3)  # what has not changed
        for name in ("map-before", "map-after"):
            (first,), (again,) = (points(page, name).values() for page in pages)
            assert first == again
            at_n2 = np.array(first).T
            apart_nn = np.linalg.norm(at_n2[:, None] - at_n2, axis=-1) + np.diag([np.inf] * n)
            same = apart_nn.argsort(axis=1)[:, :5] % 2 == np.arange(n)[:, None] % 2
            assert same.mean() > 0.95

    def test_alignment_against_uniformity(self, page: str) -> None:
        assert points(page, "plane")["batches"] == ([-2.0, -2.0], pytest.approx([0.2, 0.2]))

    def test_without_samples_it_says_so(self, tmp_path: Path) -> None:
        leave_run(tmp_path)
        assert "has kept none" in text_of(written(tmp_path), "no-sentences")
        leave_run(tmp_path, finished=False)
        (tmp_path / "result.json").unlink()
        assert "when the run has ended" in text_of(written(tmp_path), "no-sentences")

    def test_samples_of_another_version_are_told(self, tmp_path: Path) -> None:
        leave_run(tmp_path)
        leave_samples(tmp_path, sentences={"other": 1})
        with pytest.raises(StorageError, match=r"samples.jsonl: holds samples of another version"):
            write_run_page(tmp_path)

    def test_seconds_by_phase(self, tmp_path: Path) -> None:
        leave_run(tmp_path)
        seconds = {"training": 60.0, "starting": 8.0, "export": 0.03, "scoring": 0.0}
        result = json.loads((tmp_path / "result.json").read_text()) | {"seconds": seconds}
        (tmp_path / "result.json").write_text(json.dumps(result))
        page = written(tmp_path)
        assert table(page, 'id="phases"') == [
            ["training", "1 min 00 s", ""],
            ["starting", "8.0 s", ""],
            ["export", "0.03 s", ""],
        ]
        assert "width: 100.0%" in page and "width: 13.3%" in page
