"""Commands that talk to the hub, with a hub on this machine: pushing a model, fetching the SentEval sets."""

from __future__ import annotations

import io
import json
import logging
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from local_hub import LocalHub, serve
from tiny import make_sentences
from typer.testing import CliRunner
from waits import seconds

from hncse_ray.cli import app
from hncse_ray.config import EncoderSettings, EvaluationSettings, load_settings
from hncse_ray.encoder import load_encoder
from hncse_ray.evaluation.sts import sts_files
from hncse_ray.evaluation.transfer import transfer_files
from hncse_ray.storage import locked
from hncse_ray.training.senteval import senteval_folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LocalHub]]:
    """Start a hub, and make it the hub."""
    running = []

    def start(**facts: Any) -> LocalHub:
        context = serve(LocalHub(**facts))
        running.append(context)
        one = context.__enter__()
        monkeypatch.setenv("HF_ENDPOINT", one.url)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", one.url)  # read once, at import
        return one

    yield start
    for context in running:
        context.__exit__(None, None, None)


def hncse(*args: object) -> Any:
    logging.getLogger("hncse_ray").handlers.clear()
    return CliRunner().invoke(app, [str(arg) for arg in args])


def assert_refused(result: Any, *said: object) -> None:
    assert isinstance(result.exception, SystemExit), f"{result.exception!r}"
    assert result.exit_code == 2 and result.stderr.count("error: ") == 1
    assert "Traceback" not in result.output + result.stderr
    for text in said:
        assert str(text) in result.stderr


# ------------------------------------------------------------------------------------------------ push


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    settings = EncoderSettings(model=str(tiny_model), pooling="mean", head="tanh", head_in_training_only=False)
    encoder = load_encoder(tiny_model, settings)
    encoder.save(folder, readme="---\nlicense: mit\n---\n# a model\n")
    (folder / "settings.yaml").write_text("corpus: {path: /home/someone}\n")
    (folder / "optimizer.pt").write_bytes(b"not to be sent")
    return folder


class TestPush:
    def test_a_model_and_its_card_arrive(
        self, hub: Callable[..., LocalHub], model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = hub()
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        result = hncse("push", model, "me/mine", "--private", "--json")
        assert result.exit_code == 0, result.stderr
        found = json.loads(result.stdout.splitlines()[-1])
        assert found == {"model": str(model), "url": f"{one.url}/me/mine"}
        assert one.created[0]["name"] == "mine" and one.created[0]["organization"] == "me"
        assert one.created[0].get("private") is True or one.created[0].get("visibility") == "private"
        sent = {str(p.relative_to(model)) for p in model.rglob("*") if p.is_file()} - {"settings.yaml", "optimizer.pt"}
        assert set(one.committed) == sent
        assert {"model.safetensors", "1_Pooling/config.json", "2_Dense/model.safetensors"} <= sent
        assert not any(str(model.parent).encode() in content for content in one.committed.values())
        assert all(content == (model / name).read_bytes() for name, content in one.committed.items())
        assert "hf_right" not in result.stdout + result.stderr

    @pytest.mark.parametrize(("status", "said"), [(401, "does not know the token"), (403, "may not write there")])
    def test_the_hub_refuses(
        self, hub: Callable[..., LocalHub], model: Path, monkeypatch: pytest.MonkeyPatch, status: int, said: str
    ) -> None:
        one = hub(status=status)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        result = hncse("push", model, "me/mine")
        assert_refused(result, "me/mine", said, "copy the folder")
        assert not one.committed and "hf_secret" not in result.stdout + result.stderr

    def test_a_wrong_token(self, hub: Callable[..., LocalHub], model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hub()
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        assert_refused(hncse("push", model, "me/mine"), "does not know the token", "hf auth login")

    def test_no_token(self, hub: Callable[..., LocalHub], model: Path) -> None:
        one = hub()
        assert_refused(hncse("push", model, "me/mine"), "there is none", "HF_TOKEN", "copy the folder")
        assert not one.asked

    def test_no_hub(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        started = time.monotonic()
        assert_refused(hncse("push", model, "me/mine"), "cannot be reached", "nothing was uploaded", "copy the folder")
        assert time.monotonic() - started < seconds(10)

    def test_no_name(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        assert_refused(hncse("push", model, "me/mine/too"), "me/mine/too", "OWNER/NAME")

    @pytest.mark.parametrize(
        ("damage", "said"),
        [
            (lambda m: (m / "README.md").unlink(), "no README.md"),
            (lambda m: (m / "README.md").write_text("no card"), "is no model card"),
            (lambda m: (m / "README.md").write_text("---\nlicense: [mit\n---\n"), "README.md: cannot be read"),
            (lambda m: (m / "modules.json").unlink(), "no modules.json"),
            (lambda m: (m / "model.safetensors").unlink(), "no *.safetensors"),
            (lambda m: (m / "model.safetensors").write_bytes(b"x" * 50), "model.safetensors: cannot be read"),
        ],
    )
    def test_no_exported_model(
        self, hub: Callable[..., LocalHub], model: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, said: str
    ) -> None:
        one = hub()
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        damage(model)
        assert_refused(hncse("push", model, "me/mine"), said)
        assert_refused(hncse("push", model / "none", "me/mine"), "no such model folder")
        assert not one.asked


# ------------------------------------------------------------------------------------------------ data sts

NAMES = sorted({name for files in (*sts_files().values(), *transfer_files().values()) for name in files})


def archive(*more: tuple[str, bytes], without: str = "", prefix: str = "./") -> bytes:
    """A tar archive with all expected files, one line each; STS-Benchmark's can be scored."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in NAMES:
            content = f"content of {name}\n".encode()
            if "STSBenchmark" in name:
                s = make_sentences(24, seed=len(name))
                rows = [f"g\tf\ty\t{i}\t{i * 5 / 12:.2f}\t{s[2 * i]}\t{s[2 * i + 1]}" for i in range(12)]
                content = ("\n".join(rows) + "\n").encode()
            if name != without:
                add(tar, prefix + name, content)
        for name, content in (*more, ("./STS/STSBenchmark/LICENSE.txt", b"terms\n"), ("./other/file.txt", b"x")):
            add(tar, name, content)
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def tree(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()}


class TestDataSts:
    @pytest.mark.parametrize("prefix", ["./", "senteval/downstream/"])
    def test_the_sets_arrive_and_are_found(
        self, hub: Callable[..., LocalHub], model: Path, tmp_path: Path, prefix: str
    ) -> None:
        one = hub(files={"senteval.tar": archive(prefix=prefix)})
        result = hncse("data", "sts", "--json")
        assert result.exit_code == 0, result.stderr
        found = json.loads(result.stdout.splitlines()[-1])
        folder = tmp_path / "cache" / "senteval"
        assert found["folder"] == str(folder) and found["fetched"] and found["files"] == len(NAMES) == 69
        assert tree(folder) == {*NAMES, "STS/STSBenchmark/LICENSE.txt"}
        assert (folder / NAMES[0]).read_text() == f"content of {NAMES[0]}\n"
        assert tree(tmp_path / "cache" / "downloads") == {".senteval.tar.lock"}  # no archive, nothing half-made

        assert senteval_folder(EvaluationSettings()) == str(folder)
        scored = hncse("evaluate", model, "--suite", "stsb", "--json")
        assert scored.exit_code == 0, scored.stderr
        assert "stsb/spearman" in json.loads(scored.stdout.splitlines()[-1])["test"]

        asked = len(one.asked)
        again = hncse("data", "sts")
        assert again.exit_code == 0 and "there already" in again.stdout and len(one.asked) == asked

    def test_another_folder(self, hub: Callable[..., LocalHub], tmp_path: Path) -> None:
        hub(files={"senteval.tar": archive()})
        result = hncse("data", "sts", "--out", tmp_path / "new" / "sets")
        assert result.exit_code == 0 and "--senteval" in result.stdout
        assert set(NAMES) <= tree(tmp_path / "new" / "sets")

    def test_a_download_that_was_cut_goes_on(self, hub: Callable[..., LocalHub], tmp_path: Path) -> None:
        content = archive(("STS/filler.bin", bytes(3_000_000)))
        one = hub(files={"senteval.tar": content}, cut_at=1_000_000)
        assert_refused(hncse("data", "sts"), "could not be fetched", "goes on where it stopped", "--senteval")
        assert not (tmp_path / "cache" / "senteval").exists()
        assert one.ranges == ["bytes=0-"]
        one.cut_at = None
        one.ranges.clear()
        assert hncse("data", "sts").exit_code == 0
        assert one.ranges == ["bytes=1000000-"]

    def test_a_wrong_checksum(self, hub: Callable[..., LocalHub], tmp_path: Path) -> None:
        hub(files={"senteval.tar": archive()}, sha256="1" * 64)
        assert_refused(hncse("data", "sts"), "SHA-256", "111111111111...", "try again")
        assert tree(tmp_path / "cache") == {"downloads/.senteval.tar.lock"}

    def test_one_command_at_a_time_fetches_a_file(self, hub: Callable[..., LocalHub], tmp_path: Path) -> None:
        """Two would append to the same download."""
        one = hub(files={"senteval.tar": archive()})
        with locked(tmp_path / "cache" / "downloads" / ".senteval.tar.lock", hint=""):
            assert_refused(hncse("data", "sts"), "downloads: is in use by another process", "wait until")
        assert not one.ranges and hncse("data", "sts").exit_code == 0

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (archive(without=NAMES[3]), f"lacks 1 of 69 files, first {NAMES[3]}"),
            (archive(("../../evil.txt", b"x")), "leads out of it"),
            (archive(("/tmp/evil.txt", b"x")), "leads out of it"),
            (b"no archive at all" * 100, "is no tar archive"),
        ],
    )
    def test_an_archive_that_is_not_what_it_should_be(
        self, hub: Callable[..., LocalHub], tmp_path: Path, content: bytes, said: str
    ) -> None:
        hub(files={"senteval.tar": content})
        assert_refused(hncse("data", "sts"), said, "--senteval")
        assert not (tmp_path / "cache" / "senteval").exists() and not list(tmp_path.rglob("evil.txt"))

    def test_a_link_in_the_archive_is_not_followed(self, hub: Callable[..., LocalHub], tmp_path: Path) -> None:
        buffer = io.BytesIO(archive(without=NAMES[0]))
        with tarfile.open(fileobj=buffer, mode="a") as tar:
            link = tarfile.TarInfo(f"./{NAMES[0]}")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
            tar.addfile(link)
        hub(files={"senteval.tar": buffer.getvalue()})
        assert_refused(hncse("data", "sts"), f"first {NAMES[0]}")

    def test_no_hub(self, tmp_path: Path) -> None:
        started = time.monotonic()
        assert_refused(hncse("data", "sts"), "cannot be reached", "--senteval", "HNCSE_DATA")
        assert time.monotonic() - started < seconds(10) and not (tmp_path / "cache").exists()

    def test_no_archive_on_the_hub(self, hub: Callable[..., LocalHub], tmp_path: Path) -> None:
        hub(files={"other.tar": b"x"})
        assert_refused(hncse("data", "sts"), "no such file", "--senteval")

    def test_a_folder_with_something_else(self, hub: Callable[..., LocalHub], tmp_path: Path) -> None:
        one = hub(files={"senteval.tar": archive()})
        (tmp_path / "own").mkdir()
        (tmp_path / "own" / "thesis.tex").write_text("precious")
        assert_refused(hncse("data", "sts", "--out", tmp_path / "own"), "is there already", "another --out")
        assert tree(tmp_path / "own") == {"thesis.tex"} and not one.asked
        (tmp_path / "file").write_text("x")
        assert_refused(hncse("data", "sts", "--out", tmp_path / "file"), "is there already")
        assert_refused(hncse("data", "sts", "--out", tmp_path / "file" / "sets"), "cannot be written")


# ------------------------------------------------------------------------------------------------ data wiki1m

SENTENCES = "wiki1m_for_simcse.txt"


class TestDataWiki1m:
    def test_the_sentences_arrive_where_the_recipes_look(
        self, hub: Callable[..., LocalHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        one = hub(files={SENTENCES: b"One sentence.\nAnother.\n"})
        result = hncse("data", "wiki1m", "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout.splitlines()[-1]) == {"path": SENTENCES, "fetched": True}
        assert load_settings("simcse_bert_base").corpus.path == (SENTENCES,)
        assert (tmp_path / SENTENCES).read_bytes() == b"One sentence.\nAnother.\n"
        assert tree(tmp_path / "cache" / "downloads") == {f".{SENTENCES}.lock"}
        asked = len(one.asked)
        again = hncse("data", "wiki1m")
        assert again.exit_code == 0 and "there already" in again.stdout and len(one.asked) == asked

    def test_what_goes_wrong_leaves_nothing(
        self, hub: Callable[..., LocalHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert_refused(hncse("data", "wiki1m"), "cannot be reached", SENTENCES, "corpus.path=FILE")
        hub(files={SENTENCES: b"x"}, sha256="1" * 64)
        assert_refused(hncse("data", "wiki1m"), "SHA-256")
        (tmp_path / "folder").mkdir()
        assert_refused(hncse("data", "wiki1m", "--out", tmp_path / "folder"), "is no file")
        assert not (tmp_path / SENTENCES).exists()
