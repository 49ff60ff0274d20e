"""Whatever is typed, a command does its work or ends with status 2 and one message; it never ends in a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st
from invoke import hncse
from odd_input import overrides, texts, try_out

EXAMPLES = [25, pytest.param(600, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
# What would take long if it were valid: other sources than the small corpus, many processes.
LONG = ("corpus.source", "corpus.num_processes")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that commands are run in, without a hub and without a cluster."""
    for name, value in (("HF_HUB_OFFLINE", "1"), ("HNCSE_CACHE", str(tmp_path / "cache"))):
        monkeypatch.setenv(name, value)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "HNCSE_DATA"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").write_text("a file, where a folder is wanted\n")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def recipe(small_run: dict[str, Any], place: Path) -> str:
    (place / "small.yaml").write_text(yaml.safe_dump(small_run))
    return "small.yaml"


def run(*args: object) -> int:
    """Run a command; see that it works or ends with one message."""
    result = hncse(*args)
    ended = result.exception is None or isinstance(result.exception, SystemExit)
    assert ended, f"{args}: {type(result.exception).__name__}: {result.exception}"
    assert "Traceback" not in result.output + result.stderr
    assert result.exit_code in (0, 2), (args, result.exit_code)
    messages = [line for line in result.stderr.splitlines() if line.startswith(("error: ", "Error: ", "Usage: "))]
    if result.exit_code == 2 and not any(line.startswith("Usage: ") for line in messages):
        assert len(messages) == 1 and len(messages[0]) > 12, (args, result.stderr)
    return int(result.exit_code)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_the_settings_of_a_command(examples: int, recipe: str) -> None:
    ended = []

    def check(given: list[str]) -> None:
        given = [g for g in given if not g.lstrip().startswith((*LONG, "-")) and not g.startswith("corpus=")]
        ended.append(run("prepare", recipe, *given))
        # What a run or a sweep is refused for in any case comes last, so that none is started.
        assert run("train", recipe, *given, "run.name=x", "run.storage_path=file/runs") == 2
        assert run("tune", recipe, *given, "run.name=x", "--space", "info_nce", "--out", "file/sweep") == 2

    try_out(check, examples, st.lists(overrides(), max_size=2))
    assert 0 in ended and 2 in ended


@pytest.mark.parametrize("examples", EXAMPLES)
def test_the_arguments_of_a_command(examples: int, recipe: str, tiny_model: Path, pairs_file: Path) -> None:
    model = st.one_of(st.just(str(tiny_model)), texts())
    number = st.one_of(st.sampled_from(["0", "1", "3", "-1", "nan", "1e3", "9" * 30, "9" * 5000]), texts())
    suites = st.sampled_from(["sts", "transfer", "geometry", "pairs", "stsb", "full", "retrieval", "Pairs", ""])
    address = st.sampled_from(["http://127.0.0.1:1", "127.0.0.1:99999", "http://", "http://[", "a b", "ray://x:y", ""])
    batch = (st.just("--batch-size"), number)
    fixed = ["--pairs", str(pairs_file), "--pooling", "mean"]
    one = st.one_of(
        st.tuples(st.just("evaluate"), model, *map(st.just, fixed)),
        st.tuples(st.just("evaluate"), model, model, *map(st.just, fixed)),
        st.tuples(st.just("evaluate"), model, st.just("--suite"), suites, st.just("--pairs"), texts()),
        st.tuples(st.just("evaluate"), model, st.just("--suite"), suites, st.just("--data"), texts()),
        st.tuples(st.just("evaluate"), model, st.just("--pooling"), texts(), st.just("--plots"), texts()),
        st.tuples(st.just("encode"), model, texts(), st.just("--out"), texts()),
        st.tuples(st.just("encode"), model, st.just("file"), st.just("--out"), texts(), *batch),
        st.tuples(st.just("search"), model, st.sampled_from([recipe, "quikstart"]), texts(), st.just("--top"), number),
        st.tuples(st.just("mine"), model, texts(), overrides(), st.just("--out"), st.just("file/x.parquet")),
        st.tuples(st.just("tune"), texts(), texts(), st.just("--space"), texts(), st.just("--trials"), number),
        st.tuples(*map(st.just, ("tune", recipe, "--space", "hybrid", "--out", "file/x")),
                  st.sampled_from(["--trials", "--seeds", "--top", "--grace-steps", "--max-concurrent", "--metric",
                                   "--stopping"]), number),
        st.tuples(st.just("tune"), st.just("--resume"), texts()),
        st.tuples(st.sampled_from(["train", "prepare", "report"]), texts().filter(lambda text: text != "quickstart")),
        st.tuples(st.just("push"), texts(), texts()),
        st.tuples(st.just("submit"), st.just("--address"), address, st.just("--working-dir"), texts(), texts()),
        st.tuples(st.just("submit"), st.just("--address"), address, st.just("--cpus"), number, st.just("train")),
        st.lists(texts(), min_size=1, max_size=3).map(tuple),
    )  # fmt: skip
    ended = []

    def check(given: tuple[str, ...]) -> None:
        ended.append(run(*given))

    try_out(check, examples, one)
    assert 0 in ended and 2 in ended
