"""Pairs by the commands: prepared, trained on with two workers and the pool, mined; what is exported finds answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from invoke import hncse
from pair_tables import COLUMNS, make_pairs, write_pairs
from sentence_transformers import SentenceTransformer


@pytest.fixture
def recipe(small_run: dict[str, Any], tmp_path: Path) -> Path:
    table = write_pairs(tmp_path / "pairs.jsonl", make_pairs(80))
    small_run["corpus"] |= {"path": str(table), **COLUMNS}
    small_run["objective"] = {"name": "info_nce"}
    small_run["encoder"]["prompts"] = {"query": "the one ", "document": "every "}
    small_run["negatives"] = {"max_score": None, "candidates": 20}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_run))
    return path


def test_the_tokens_of_a_corpus_of_pairs_are_said_to_be_those_of_its_anchors(recipe: Path) -> None:
    prepared = hncse("prepare", recipe)
    assert prepared.exit_code == 0, prepared.output
    assert " tokens an anchor, prepared in " in prepared.stdout


def test_a_table_and_a_command_train_a_retriever(recipe: Path, tmp_path: Path) -> None:
    prepared = hncse("prepare", recipe, "--json")
    assert prepared.exit_code == 0, prepared.output
    facts = json.loads(prepared.stdout)
    assert facts["rows"] == 80 and facts["without_positive"] == sum(row["answer"] is None for row in make_pairs(80))
    changes = ["negatives.source=pool", "negatives.use=fresh", "negatives.refresh=sync", "cluster.num_workers=2"]
    trained = hncse("train", recipe, *changes, "--json")
    assert trained.exit_code == 0, trained.output
    result = json.loads(trained.stdout)
    assert (
        result["steps"] == 12 and result["after"]["dev"]["pairs/recall@1"] >= result["before"]["dev"]["pairs/recall@1"]
    )
    assert {"starting", "training", "scoring", "export"} <= result["seconds"].keys() and "took " in trained.stderr
    logged = [json.loads(line) for line in (tmp_path / "runs/small/metrics.jsonl").read_text().splitlines()]
    assert any("negatives/removed_same_document" in json.dumps(line) for line in logged)
    assert Path(result["report"]) == tmp_path / "runs/small/report.html" and Path(result["report"]).is_file()
    card = (Path(result["model"]) / "README.md").read_text()
    assert "unlabelled" not in card and "encode_query" in card
    model = SentenceTransformer(result["model"], device="cpu")
    assert model.prompts["query"] == "the one " and model.prompts["document"] == "every "
    out = tmp_path / "mined.parquet"
    mined = hncse("mine", result["model"], recipe, "negatives.per_anchor=2", "negatives.max_score=null", "--out", out)
    assert mined.exit_code == 0, mined.output
    columns = pq.read_table(out).to_pydict()
    questions = {row["question"]: row["answer"] for row in make_pairs(80)}
    assert set(columns["anchor"]) <= questions.keys() and columns["anchor"] != columns["positive"]
