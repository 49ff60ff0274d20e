"""``hncse evaluate``: geometry with lines and picture, pairs, comparisons; and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny import make_collection, make_sentences
from typer.testing import CliRunner

from hncse_ray.cli import app
from hncse_ray.config import EncoderSettings
from hncse_ray.encoder import load_encoder


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    load_encoder(tiny_model, EncoderSettings(model=str(tiny_model), pooling="mean")).save(folder, readme="# A model\n")
    return folder


@pytest.fixture(scope="module")
def senteval(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """STS-Benchmark's dev split, 20 pairs."""
    root = tmp_path_factory.mktemp("senteval")
    folder, s = root / "STS" / "STSBenchmark", make_sentences(40, seed=4)
    folder.mkdir(parents=True)
    rows = [f"g\tf\ty\t{i}\t{i / 4:.2f}\t{s[2 * i]}\t{s[2 * i + 1]}" for i in range(20)]
    (folder / "sts-dev.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return root


def evaluate(*args: object) -> Any:
    logging.getLogger("hncse_ray").handlers.clear()
    return CliRunner().invoke(app, ["evaluate", *(str(arg) for arg in args)])


def test_geometry_has_a_histogram_in_the_json_in_the_terminal_and_as_a_picture(
    model: Path, senteval: Path, tmp_path: Path
) -> None:
    plots = tmp_path / "new" / "plots"
    result = evaluate(model, "--suite", "geometry", "--senteval", senteval, "--plots", plots, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["test"] == {} and set(found["dev"]) == {
        "geometry/alignment",
        "geometry/uniformity",
        "geometry/anisotropy",
    }
    histogram = found["similarities"]
    assert len(histogram["bins"]) == len(histogram["positive"]) + 1 == len(histogram["negative"]) + 1 == 41
    assert sum(histogram["positive"]) == 4 and sum(histogram["negative"]) == 10_000
    assert "positives" in result.stderr and "10,000 pairs" in result.stderr
    assert (plots / "similarity.png").read_bytes().startswith(b"\x89PNG")


def test_two_models_side_by_side_have_one_each(model: Path, senteval: Path, tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    load_encoder(tiny_model, EncoderSettings(model=str(tiny_model), pooling="cls")).save(other, readme="# A model\n")
    result = evaluate(model, f"{other},{model}", "--suite", "geometry", "--senteval", senteval, "--json")
    assert result.exit_code == 0, result.stderr
    one, two = json.loads(result.stdout.splitlines()[-1])["groups"]
    assert len(one["similarities"]) == 1 and two["similarities"][1] == one["similarities"][0]
    assert two["similarities"][0] != one["similarities"][0]
    assert result.stderr.count("positives  ") == 2  # the model that comes twice is shown once


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--suite", "stsb", "--plots", "HERE/plots"], "Add --suite geometry"),
        (["--suite", "geometry", "--plots", "HERE/file/plots"], "cannot be written"),
        (["--suite", "geometry", "--plots", "/proc"], "/proc/similarity.png: cannot be written"),  # also for root
        (["--suite", "geometry", "--senteval", "HERE/none"], "no such folder"),
        (["--suite", "geometry"], "hncse data sts"),
        (["--suite", "pairs"], "--pairs: the suite pairs needs data"),
        (["--suite", "retrieval"], "--data: the suite retrieval needs data"),
        (["--data", "HERE/none"], "none: no such folder. A collection is a folder with corpus.jsonl"),
        (["--data", "HERE"], "has no dev.tsv and no test.tsv"),
        (["--suite", "geometry", "--workers", "2"], "hncse data sts"),  # said before Ray is started
    ],
)
def test_what_is_refused(model: Path, tmp_path: Path, args: list[str], said: str) -> None:
    (tmp_path / "file").write_text("x")
    result = evaluate(model, *(arg.replace("HERE", str(tmp_path)) for arg in args))
    assert isinstance(result.exception, SystemExit) and result.exit_code == 2
    assert result.stderr.count("error: ") == 1 and said in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture(scope="module")
def other(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, pooled otherwise."""
    folder = tmp_path_factory.mktemp("other")
    load_encoder(tiny_model, EncoderSettings(model=str(tiny_model), pooling="cls")).save(folder, readme="# A model\n")
    return folder


@pytest.mark.parametrize("suite", [[], ["--suite", "pairs"]])
def test_a_pairs_file_is_scored_and_two_models_are_compared_on_it(
    model: Path, other: Path, pairs_file: Path, suite: list[str]
) -> None:
    result = evaluate(model, other, *suite, "--pairs", pairs_file, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    names = [f"pairs/{metric}" for metric in ("recall@1", "recall@10", "mrr", "ndcg@10")]
    assert [list(group["runs"][0]["dev"]) for group in found["groups"]] == [names, names]
    assert [d["name"] for d in found["differences"]] == names
    for difference in found["differences"]:
        first, second = (group["runs"][0]["dev"][difference["name"]] for group in found["groups"])
        assert (difference["first"], difference["second"]) == pytest.approx((first, second))
        assert difference["p_value"] >= 2 / 1001
    assert "ndcg@10" in result.stderr and "paired bootstrap" in result.stderr
    assert "comparing on pairs" in result.stderr and "python-docs" not in result.stderr


def test_a_p_value_below_what_the_resamples_show_is_printed_as_such(model: Path, tmp_path: Path) -> None:
    """Every query is its own answer, which the one model always finds, and the other, blind to its input, never."""
    sentences = make_sentences(120, seed=3)
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("".join(f"{s}\t{s}\n" for s in sentences), encoding="utf-8")
    blind = tmp_path / "blind"
    shutil.copytree(model, blind)
    (weights,) = blind.rglob("*.safetensors")
    tensors = load_file(weights)
    for name, tensor in tensors.items():
        if "embeddings.LayerNorm" in name:
            tensor.fill_(float(name.endswith("bias")))
    save_file(tensors, weights, metadata={"format": "pt"})
    result = evaluate(blind, model, "--pairs", pairs)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("< 0.002") == 4 and "0.001" not in result.stdout


def test_collections_are_scored_and_two_models_are_compared_on_them(model: Path, other: Path, tmp_path: Path) -> None:
    one, two = make_collection(tmp_path / "one"), make_collection(tmp_path / "two", seed=5, splits=("test",))
    result = evaluate(model, other, "--data", one, "--data", two, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    names = [f"retrieval{of}/{metric}" for of in ("/one", "/two", "") for metric in ("ndcg@10", "mrr@10", "recall@100")]
    runs = [group["runs"][0] for group in found["groups"]]
    assert list(runs[0]["test"]) == names and len(runs[0]["dev"]) == 6
    assert [d["name"] for d in found["differences"]] == names
    for difference in found["differences"]:
        first, second = (run["test"][difference["name"]] for run in runs)
        assert (difference["first"], difference["second"]) == pytest.approx((first, second))
    for title in ("retrieval/one, dev", "retrieval/one, test", "retrieval/two, test", "retrieval, test"):
        assert title in result.stderr


def test_two_models_are_not_compared_where_nothing_can_be_drawn_again(model: Path, other: Path, senteval: Path) -> None:
    result = evaluate(model, other, "--suite", "geometry", "--senteval", senteval, "--json")
    assert json.loads(result.stdout.splitlines()[-1])["differences"] == []
    assert "comparing" not in result.stderr and "bootstrap" not in result.stderr


def test_no_workers_at_all(model: Path) -> None:
    result = evaluate(model, "--workers", 0)
    assert result.exit_code == 2 and "--workers" in result.stderr
