"""What each reporter makes of a run's events."""

from __future__ import annotations

import io
import json
import logging
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hncse_ray.errors import counted
from hncse_ray.reporting import (
    Event,
    LineReporter,
    MetricsFile,
    Notice,
    Reporter,
    Reporters,
    RunFinished,
    RunStarted,
    StageProgress,
    TensorBoard,
    TerminalReporter,
    score_table,
)
from hncse_ray.reporting.events import CheckpointSaved, Evaluated, StepsLogged, Verdict
from hncse_ray.reporting.records import run_log
from hncse_ray.reporting.reporters import Pace, describe

METRIC = "pairs/recall@1"


def started(step: int = 0, total: int = 12) -> RunStarted:
    return RunStarted("small", step, total, 1300, 16, 2, "cpu", "fp32 (as set)", resumed=step > 0)


def logged(step: int, loss: float = 0.5) -> StepsLogged:
    return StepsLogged(step, {"loss": loss, "grad_norm": 1.5}, 1e-3, 1234.56)


def scored(step: int, score: float = 0.25, split: Any = "dev", best: bool = False) -> Evaluated:
    return Evaluated(step, split, {METRIC: score, "pairs/mrr": 0.5}, METRIC, best)


EVENTS: list[Event] = [
    StageProgress("tokenise", 10, None),
    StageProgress("tokenise", 20, None),
    started(),
    scored(0),
    logged(4, 0.75),
    scored(4, 0.875, best=True),
    CheckpointSaved(4, 0.25),
    Notice("passed over: a checkpoint"),
    RunFinished(12, 4, 1000.0, False),
]


def feed(reporter: Reporter, events: list[Event] = EVENTS) -> None:
    for event in events:
        reporter.on(event)
    reporter.close()


def test_several_reporters_hear_the_same_and_are_all_closed() -> None:
    class Heard:
        def __init__(self) -> None:
            self.events: list[Event] = []
            self.closed = 0

        def on(self, event: Event) -> None:
            self.events.append(event)

        def close(self) -> None:
            self.closed += 1

    heard = [Heard(), Heard()]
    feed(Reporters(iter(heard)))
    assert all(one.events == EVENTS and one.closed == 1 for one in heard)


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (StageProgress("encoding", 1000, 2000), "encoding 1,000 of 2,000"),
        (StageProgress("encoding", 1000, None), "encoding 1,000"),
        (
            started(),
            "run small starts: 12 steps of 16 from 1,300 sentences, 2 workers on cpu, fp32 (as set)",
        ),
        (
            started(8),
            "run small resumes at step 8: 12 steps of 16 from 1,300 sentences, 2 workers on cpu, fp32 (as set)",
        ),
        (logged(4), "step 4/12  loss 0.5000  1,234.6 sentences/s"),
        (
            replace(logged(4), model_flops_utilisation=0.1784),
            "step 4/12  loss 0.5000  1,234.6 sentences/s  17.8% of peak FLOP/s",
        ),
        (scored(4), "step 4  dev  pairs/recall@1 0.2500  pairs/mrr 0.5000"),
        (scored(4, best=True), "step 4  dev  pairs/recall@1 0.2500  pairs/mrr 0.5000  (best)"),
        (CheckpointSaved(4, 0.26), "step 4  checkpoint saved in 0.26 s"),
        (Notice("look out"), "look out"),
        (
            Verdict(8, 1.0, 0.0, "cloze/mrr", 0.512, 0.56, 0.03, 0.0664),
            "cloze/mrr on dev 0.512 -> 0.560 (+0.048, 95 % 0.030 to 0.066): the adapted model is exported",
        ),
        (
            Verdict(8, 0.75, 0.125, "cloze/mrr", 0.512, 0.56, -0.004, 0.1),
            "cloze/mrr on dev 0.512 -> 0.560 (+0.048, 95 % -0.004 to 0.100) with merge 0.75 and whitening 0.125:"
            " the adapted model is exported, though the difference may be luck",
        ),
        (
            Verdict(8, 0.5, 0.0, "stsb/spearman", 80.0, 78.5, -2.0, -1.0),
            "stsb/spearman on dev 80.00 -> 78.50 (-1.50, 95 % -2.00 to -1.00) with merge 0.5:"
            " the adapted model is exported, though it is worse",
        ),
        (
            Verdict(0, 0.0, 0.25, "cloze/mrr", 0.5, 0.52),
            "cloze/mrr on dev 0.500 -> 0.520 (+0.020) with whitening 0.25: the whitened base model is exported",
        ),
        (
            Verdict(8, 0.0, 0.0, "cloze/mrr", 0.5, 0.5),
            "cloze/mrr 0.500: nothing helped on dev: the base model is exported",
        ),
        (Verdict(8, 1.0, 0.0), "nothing was judged, as there is no dev set: the adapted model is exported"),
        (RunFinished(12, 8, 1.0, False), "finished after 12 steps; best on dev at step 8"),
        (RunFinished(10, 8, 1.0, True), "finished after 10 steps, stopped early; best on dev at step 8"),
    ],
)
def test_every_event_is_one_line(event: Event, text: str) -> None:
    assert describe(event, started()) == text


def test_rows_are_called_what_they_are_and_an_index_is_named_where_there_are_several() -> None:
    alone = replace(started(), num_workers=1, rows_are="passages")
    assert "1,300 passages, 1 worker on cpu" in describe(alone)
    metrics = {"loss": 0.5, "negatives/index_step": 0.0, "negatives/missing": 0.25}
    event = StepsLogged(4, metrics, 1e-3, 99.0)
    missing = "  (25% of batches without neighbours)"
    assert describe(event, alone) == f"step 4/12  loss 0.5000  99.0 passages/s{missing}"
    assert describe(event, replace(alone, renews_index=True)).endswith(f"  index of step 0{missing}")
    assert [counted(n, "CPU") for n in (0.5, 1, 2.0, 1234567)] == ["0.5 CPUs", "1 CPU", "2 CPUs", "1,234,567 CPUs"]


def test_the_log_begins_with_what_was_said_before_it_had_a_file(tmp_path: Path) -> None:
    news = logging.getLogger("hncse_ray.test")
    with run_log(tmp_path) as begin:
        news.warning("early")
        assert not list(tmp_path.iterdir())
        begin()
        news.warning("late")
    news.warning("over")
    assert [line.split()[-1] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["early", "late"]
    with pytest.raises(OSError), run_log(tmp_path / "refused"):
        news.warning("never")
        raise OSError
    assert not (tmp_path / "refused").exists()


class TestTimeLeft:
    @pytest.mark.parametrize(
        ("elapsed", "step", "expected"),
        [(10.0, 10, "0:10"), (600.0, 10, "10:00"), (36000.0, 10, "10:00:00"), (75.0, 19, "0:04"), (20.0, 20, "0:00")],
    )
    def test_it_follows_the_pace_since_the_first_line(self, elapsed: float, step: int, expected: str) -> None:
        now = [500.0]
        pace = Pace(lambda: now[0])
        pace.begin(started(total=20))
        now[0] += 240  # the first scores and the first index
        assert pace.left(0) == ""
        now[0] += elapsed
        assert pace.left(step) == expected

    def test_a_resumed_run_counts_from_where_it_was_taken_up(self) -> None:
        now = [0.0]
        pace = Pace(lambda: now[0])
        for step, seconds in ((10, 5), (20, 100)):
            now[0] += seconds
            pace.left(step)
        pace.begin(started(step=90, total=100))
        now[0] += 300
        assert pace.left(92) == ""
        now[0] += 6
        assert pace.left(95) == "0:10"

    def test_a_terminal_shows_what_the_log_shows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [0.0]
        monkeypatch.setattr("hncse_ray.reporting.terminal.Pace", lambda: Pace(lambda: now[0]))
        console = Console(file=io.StringIO(), force_terminal=True, width=160)
        reporter = TerminalReporter(console)
        reporter.on(started(total=20))
        for step, seconds in ((5, 300), (10, 65), (15, 65)):
            now[0] += seconds
            reporter.on(logged(step))
        reporter.close()
        assert "1:05" in console.file.getvalue()  # type: ignore[attr-defined]


class TestLineReporter:
    @pytest.fixture(autouse=True)
    def heard(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(logging.getLogger("hncse_ray"), "propagate", True)  # the command line turns it off

    def test_one_line_an_event_and_one_a_stage(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, logger="hncse_ray"):
            feed(LineReporter())
        lines = [record.getMessage() for record in caplog.records]
        assert lines[0] == "tokenise"
        assert lines[1].startswith("run small starts")
        assert lines[2].startswith("step 0  dev")
        assert lines[3].startswith("step 4/12  loss 0.7500") and "left" not in lines[3]
        assert lines[4].endswith("(best)")
        assert lines[5:] == [
            "step 4  checkpoint saved in 0.25 s",
            "passed over: a checkpoint",
            "finished after 12 steps; best on dev at step 4",
        ]

    def test_a_stage_is_told_again_after_steps(self, caplog: pytest.LogCaptureFixture) -> None:
        stage = StageProgress("scoring dev", 0, None)
        with caplog.at_level(logging.INFO, logger="hncse_ray"):
            feed(LineReporter(), [started(), stage, scored(0), logged(4), stage, stage, scored(4)])
        assert [r.getMessage() for r in caplog.records].count("scoring dev") == 2

    def test_only_a_notice_is_a_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, logger="hncse_ray"):
            feed(LineReporter())
        assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == ["passed over: a checkpoint"]


class TestMetricsFile:
    def rows(self, path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text().splitlines()]

    def test_a_row_for_each_log_and_evaluation(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        feed(MetricsFile(path))
        assert self.rows(path) == [
            {"step": 0, "split": "dev", METRIC: 0.25, "pairs/mrr": 0.5, "is_best": False},
            {"step": 4, "loss": 0.75, "grad_norm": 1.5, "learning_rate": 1e-3, "sentences_per_s": 1234.56},
            {"step": 4, "split": "dev", METRIC: 0.875, "pairs/mrr": 0.5, "is_best": True},
        ]

    def test_rows_are_there_before_it_is_closed(self, tmp_path: Path) -> None:
        MetricsFile(tmp_path / "metrics.jsonl").on(logged(1))
        assert len(self.rows(tmp_path / "metrics.jsonl")) == 1

    def steps(self, path: Path) -> list[int]:
        return [row["step"] for row in self.rows(path)]

    @pytest.mark.parametrize(
        ("step", "left"), [(0, []), (4, [0, 1, 4, 4]), (6, [0, 1, 4, 4, 6]), (99, [0, 1, 4, 4, 6])]
    )
    def test_rows_beyond_the_step_that_is_taken_up_are_dropped(
        self, tmp_path: Path, step: int, left: list[int]
    ) -> None:
        path = tmp_path / "metrics.jsonl"
        feed(MetricsFile(path), [started(), scored(0), logged(1), logged(4), scored(4), logged(6)])
        reporter = MetricsFile(path)
        reporter.on(started(step))
        assert self.steps(path) == left
        reporter.on(logged(100))
        assert self.steps(path) == [*left, 100]
        assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]

    @pytest.mark.parametrize("tail", ['{"step": 5, "lo', "\x00\x00\x00", '{"step": 5', "{"])
    def test_a_last_line_cut_short_is_dropped(self, tmp_path: Path, tail: str) -> None:
        path = tmp_path / "metrics.jsonl"
        feed(MetricsFile(path), [started(), logged(1), logged(4)])
        with path.open("a") as file:
            file.write(tail)
        reporter = MetricsFile(path)
        reporter.on(started(4))
        reporter.on(logged(5))
        assert self.steps(path) == [1, 4, 5]

    def test_a_last_line_without_its_line_feed_is_kept_apart(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        feed(MetricsFile(path), [started(), logged(1)])
        path.write_text(path.read_text().rstrip("\n"))
        feed(MetricsFile(path), [started(1), logged(2)])
        assert self.steps(path) == [1, 2]


class TestTensorBoard:
    def test_a_writer_that_never_closes_ends_no_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr("hncse_ray.reporting.reporters._CLOSE_S", 0.05)
        reporter, held = TensorBoard(tmp_path), threading.Event()
        reporter.on(started())
        close = reporter._writer.close
        reporter._writer.close = held.wait
        reporter.close()
        assert "does not close" in caplog.text
        held.set()
        close()

    # TensorBoard's names take no @.
    def scalars(self, folder: Path) -> dict[str, list[tuple[int, float]]]:
        accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        accumulator = accumulators.EventAccumulator(str(folder))
        accumulator.Reload()
        return {
            name: [(event.step, event.value) for event in accumulator.Scalars(name)]
            for name in accumulator.Tags()["scalars"]
        }

    def test_scalars_can_be_read_back(self, tmp_path: Path) -> None:
        feed(TensorBoard(tmp_path), [*EVENTS, logged(8, 0.25), scored(4, 0.5, "test")])
        found = self.scalars(tmp_path)
        assert found["train/loss"] == [(4, 0.75), (8, 0.25)]
        assert found["train/grad_norm"] == [(4, 1.5), (8, 1.5)]
        assert found["train/learning_rate"] == [(4, pytest.approx(1e-3)), (8, pytest.approx(1e-3))]
        assert found["train/sentences_per_s"][0] == (4, pytest.approx(1234.56))
        assert found["dev/pairs/recall_1"] == [(0, 0.25), (4, 0.875)]
        assert found["test/pairs/recall_1"] == [(4, 0.5)]

    @pytest.mark.parametrize("step", [4, 0])
    def test_a_run_that_is_taken_up_shows_each_step_once(self, tmp_path: Path, step: int) -> None:
        feed(TensorBoard(tmp_path), [started(), scored(0, 0.125), logged(4, 0.75), logged(6, 9.0)])
        time.sleep(1.1)  # the names of its files hold the second
        again = [scored(0, 0.125), logged(4, 0.75)] if step == 0 else []
        feed(TensorBoard(tmp_path), [started(step), *again, logged(6, 0.5), logged(8, 0.25)])
        found = self.scalars(tmp_path)
        assert found["train/loss"] == [(4, 0.75), (6, 0.5), (8, 0.25)]
        assert found["dev/pairs/recall_1"] == [(0, 0.125)]

    def test_without_a_run_nothing_is_written(self, tmp_path: Path) -> None:
        feed(TensorBoard(tmp_path / "none"), [StageProgress("tokenise", 1, None), Notice("x")])
        assert not (tmp_path / "none").exists()


class TestTerminalReporter:
    def shown(self, events: list[Event]) -> str:
        console = Console(record=True, force_terminal=True, file=io.StringIO(), width=160)
        reporter = TerminalReporter(console)
        for event in events:
            reporter.on(event)
        reporter.close()
        return console.export_text()

    def test_loss_dev_score_and_notices_are_seen(self) -> None:
        text = self.shown([*EVENTS, logged(8, 0.3125)])
        assert "run small starts" in text
        assert "training" in text and "8/12" in text
        assert "loss 0.3125" in text and "dev 0.8750" in text and "speed 1,235/s" in text
        assert "step 4  dev  pairs/recall@1 0.8750" in text and "(best)" in text
        assert "passed over: a checkpoint" in text
        assert "tokenise" in text

    def test_a_stage_of_unknown_length_goes_when_it_is_over(self) -> None:
        text = self.shown([started(), StageProgress("scoring dev", 0, None), scored(4), logged(5)])
        assert 0 < text.rindex("scoring dev") < text.rindex("training")  # it was drawn below

    def test_the_bar_ends_where_the_run_ended(self) -> None:
        assert "9/12" in self.shown([started(), logged(4), RunFinished(9, 4, 1.0, True)])

    def test_test_scores_do_not_take_the_place_of_the_dev_score(self) -> None:
        text = self.shown([started(), scored(4, 0.875), scored(4, 0.125, "test"), logged(5)])
        assert "dev 0.8750" in text.splitlines()[-1]

    @pytest.mark.parametrize("text", ["/runs/[draft]/step_8 is damaged", "at [/data/runs]", "[bold", "[red]x[/]"])
    def test_brackets_are_no_markup(self, text: str) -> None:
        assert text in self.shown([started(), Notice(text)])

    def test_nothing_is_shown_before_the_first_event(self) -> None:
        assert self.shown([]) == ""


def table_text(*scores: dict[str, dict[str, float]]) -> list[list[str]]:
    console = Console(file=io.StringIO(), record=True, width=120)
    console.print(score_table(*scores))
    lines = console.export_text().splitlines()
    return [[cell.strip() for cell in line.strip("│┃ ").split("│")] for line in lines if "│" in line]


def test_the_table_shows_gains_and_losses() -> None:
    rows = table_text(
        {"dev": {METRIC: 0.5, "pairs/mrr": 0.5}, "test": {METRIC: 0.5}},
        {"dev": {METRIC: 0.625, "pairs/mrr": 0.25}, "test": {METRIC: 0.5}},
    )
    assert rows == [
        [METRIC, "dev", "0.5000", "0.6250", "+0.1250"],
        ["pairs/mrr", "dev", "0.5000", "0.2500", "-0.2500"],
        [METRIC, "test", "0.5000", "0.5000", "+0.0000"],
    ]


def test_the_table_has_the_control_between_before_and_after() -> None:
    rows = table_text(
        {"dev": {METRIC: 0.5}}, {"dev": {METRIC: 0.625}, "test": {METRIC: 0.75}}, {"dev": {METRIC: 0.5625}}
    )
    assert rows == [
        [METRIC, "dev", "0.5000", "0.5625", "0.6250", "+0.1250"],
        [METRIC, "test", "", "", "0.7500"],
    ]


def test_the_table_takes_scores_that_have_no_before() -> None:
    rows = table_text({}, {"dev": {METRIC: 0.625}, "test": {}})
    assert [cell for cell in rows[0] if cell] == [METRIC, "dev", "0.6250"]
    assert len(rows) == 1
