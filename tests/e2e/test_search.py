"""`hncse search`: an index that is kept, made anew when it should be, and queries as they are typed."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from invoke import assert_refused, hncse
from safetensors.torch import load_file, save_file
from tiny import make_sentences
from waits import seconds

SENTENCES = make_sentences(30, seed=5)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(SENTENCES) + "\n")
    return path


def hits(result: Any) -> dict[str, dict[str, list[dict[str, Any]]]]:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def found(result: Any) -> dict[str, dict[str, list[str]]]:
    """The texts alone."""
    return {query: {model: [hit["text"] for hit in its] for model, its in by_model.items()}
            for query, by_model in hits(result).items()}  # fmt: skip


def _take_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background


def indexes(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "search").glob("[!.]*"))


def test_the_second_search_takes_the_index_that_is_kept(tiny_model: Path, texts: Path, tmp_path: Path) -> None:
    first = hncse("search", tiny_model, texts, SENTENCES[3], "--json")
    assert found(first)[SENTENCES[3]][str(tiny_model)][0] == SENTENCES[3]
    assert "encoding 30 texts" in first.stderr
    (folder,) = indexes(tmp_path)
    made = {path.name: path.read_bytes() for path in folder.iterdir()}
    second = hncse("search", tiny_model, texts, SENTENCES[3], SENTENCES[4], "--json")
    assert "encoding" not in second.stderr and "anew" not in second.stderr
    assert found(second)[SENTENCES[3]] == found(first)[SENTENCES[3]]
    assert found(second)[SENTENCES[4]][str(tiny_model)][0] == SENTENCES[4]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == made


def test_an_index_of_other_files_or_another_model_is_made_anew(tiny_model: Path, texts: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    hncse("search", model, texts, "a river")
    texts.write_text(texts.read_text() + "the river sings of a bridge near the old city.\n")
    again = hncse("search", model, texts, "the river sings of a bridge near the old city.", "--json")
    assert "made anew: the corpus changed" in again.stderr
    assert next(iter(found(again).values()))[str(model)][0].startswith("the river sings")
    tensors = load_file(model / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"] *= -1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert "made anew: the model changed" in hncse("search", model, texts, "a river").output
    assert len(indexes(tmp_path)) == 1


@pytest.mark.parametrize("name", ["vectors.npy", "texts.json", "manifest.json"])
@pytest.mark.parametrize(
    "harm", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-9] + b"\0" * 9)]
)
def test_a_damaged_index_is_made_anew(tiny_model: Path, texts: Path, tmp_path: Path, name: str, harm: Any) -> None:
    before = found(hncse("search", tiny_model, texts, "a river", "--json"))
    harm(indexes(tmp_path)[0] / name)
    after = hncse("search", tiny_model, texts, "a river", "--json")
    assert "made anew: it is damaged" in after.stderr and found(after) == before
    assert "anew" not in hncse("search", tiny_model, texts, "a river", "--json").stderr


def test_an_index_that_cannot_be_kept_is_used_all_the_same(tiny_model: Path, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "search").write_text("a file")
    result = hncse("search", tiny_model, texts, SENTENCES[0], "--json")
    assert "is not kept" in result.stderr and found(result)[SENTENCES[0]][str(tiny_model)][0] == SENTENCES[0]


def test_a_hit_names_its_document_and_cosine_and_a_long_text_is_cut_in_the_table_alone(
    tiny_model: Path, texts: Path, tmp_path: Path
) -> None:
    folder, long = tmp_path / "notes", " ".join(SENTENCES[:12])
    (folder / "old").mkdir(parents=True)
    (folder / "old" / "a.txt").write_text(long)
    (folder / "b.txt").write_text(SENTENCES[20])
    args = ("search", tiny_model, folder, long)
    (of_model,) = hits(hncse(*args, "--json"))[long].values()
    assert [hit["document"] for hit in of_model] == ["old/a.txt", "b.txt"]
    assert of_model[0]["text"] == long and of_model[0]["cosine"] == pytest.approx(1, abs=1e-3)
    shown = " ".join(hncse(*args).stdout.partition("┏")[2].replace("│", " ").split())
    assert f"1.000 old/a.txt {SENTENCES[0]}" in shown and f"{of_model[1]['cosine']:.3f} b.txt {SENTENCES[20]}" in shown
    assert "... " in shown and SENTENCES[11] not in shown
    (folder / "b.txt").rename(folder / "c.txt")
    assert [hit["document"] for hit in hits(hncse(*args, "--json"))[long][str(tiny_model)]] == ["old/a.txt", "c.txt"]
    ((plain,),) = hits(hncse("search", tiny_model, texts, SENTENCES[0], "--top", 1, "--json"))[SENTENCES[0]].values()
    assert plain == {"text": SENTENCES[0], "cosine": pytest.approx(1, abs=1e-3)}


def test_settings_and_recipes_as_other_commands_take_them(
    tiny_model: Path, texts: Path, tmp_path: Path, small_run: dict[str, Any]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_run))
    result = hncse("search", tiny_model, recipe, f"corpus.path={texts}", SENTENCES[1], "x=1 is no setting", "--json")
    assert list(found(result)) == [SENTENCES[1], "x=1 is no setting"]
    assert found(result)[SENTENCES[1]][str(tiny_model)][0] == SENTENCES[1]
    few = hncse("search", tiny_model, texts, "corpus.max_sentences=7", "a river", "--top", 20, "--json")
    assert len(found(few)["a river"][str(tiny_model)]) == 7
    assert_refused(hncse("search", tiny_model, texts, "corpus.pth=x", "a river"), "did you mean 'corpus.path'?")
    for _ in ("made", "kept"):
        sampled = hncse("search", tiny_model, texts, "a river", "--limit", 5, "--top", 9, "--json")
        assert "searching 5 texts of 30" in sampled.stderr and len(found(sampled)["a river"][str(tiny_model)]) == 5


def test_without_a_query_lines_are_asked_for(tiny_model: Path, texts: Path) -> None:
    result = hncse("search", tiny_model, texts, stdin=f"{SENTENCES[2]}\n\n  \n{SENTENCES[5]}\n")
    assert result.exit_code == 0 and result.stdout.count("nearest to") == 2
    assert list(found(hncse("search", tiny_model, texts, "--json", stdin=f"{SENTENCES[2]}\n"))) == [SENTENCES[2]]
    assert found(hncse("search", tiny_model, texts, "--json", stdin="")) == {}


@pytest.mark.parametrize("end", ["\x04", "\x03"])
def test_a_prompt_ends_well_with_ctrl_d_and_ctrl_c(tiny_model: Path, texts: Path, end: str) -> None:
    hncse("search", tiny_model, texts, "a river")
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-m", "hncse_ray.cli", "search", str(tiny_model), str(texts)], stdin=theirs,
                          stdout=theirs, stderr=theirs, start_new_session=True, close_fds=True,
                          preexec_fn=_take_interrupts) as process:  # fmt: skip
        os.close(theirs)
        seen = b""
        while b"Ctrl-D ends" not in seen:
            seen += os.read(ours, 4096)
        os.write(ours, b"a river\n")
        while seen.count(b"Ctrl-D ends") < 2:
            seen += os.read(ours, 4096)
        if end == "\x04":
            os.write(ours, end.encode())
        else:
            process.send_signal(signal.SIGINT)
        assert process.wait(seconds(60)) == 0
    os.close(ours)
    assert b"nearest to: a river" in seen and b"Traceback" not in seen
