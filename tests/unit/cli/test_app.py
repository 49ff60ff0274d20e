"""What all commands share: what the file system, the user's home and the terminal can refuse is one message."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from invoke import assert_refused, hncse

from hncse_ray.cli.app import app, command
from hncse_ray.corpus.cache import cache_folder
from hncse_ray.errors import StorageError


def test_a_user_without_a_home_is_told_before_anything_is_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("HNCSE_CACHE", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54_321)  # an account that the system does not know, as in containers
    for args in (("train", "quickstart"), ("evaluate", "x"), ("encode", "x", "-", "--out", "v.npy"), ("report", "x")):
        assert_refused(hncse(*args), "HOME: this user has no home directory", "Set HOME to a folder")
    with pytest.raises(StorageError, match="no such home directory.*HNCSE_CACHE"):
        cache_folder(None)
    assert list(tmp_path.iterdir()) == []


def test_the_home_of_nobody_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a sentence of some words\n")
    result = hncse("encode", "x", "~no-such-user/a.txt", "--out", "v.npy")
    assert_refused(result, "~no-such-user/a.txt: no such file")
    with pytest.raises(StorageError, match=r"~no-such-user/cache: there is no such home directory"):
        cache_folder("~no-such-user/cache")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("args", [("report", "a" * 5000), ("train", "a" * 5000), ("tune", "--resume", "a/" * 3000)])
def test_a_name_that_the_file_system_does_not_take_is_named(args: tuple[str, ...]) -> None:
    assert_refused(hncse(*args), "a" if args[0] == "tune" else "a" * 5000, "File name too long")


@pytest.mark.parametrize("command", ["search", "mine"])
def test_a_corpus_that_is_nowhere(command: str) -> None:
    for corpus in ("articels", "mobile library"):
        assert_refused(hncse(command, "m", corpus), f"'{corpus}': is no file, no folder and no recipe", "Paths are")


def test_a_fault_that_is_about_no_path_keeps_its_traceback() -> None:
    def run(console: object) -> dict[str, object]:
        raise ConnectionResetError("by peer")

    with pytest.raises(ConnectionResetError):
        command(run, as_json=False)


def test_names_that_cannot_be_seen_are_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, shown in (("\n", "'\\n'"), ("\x1b[2J", "'\\x1b[2J'"), ("a\udce9", "'a\\udce9'")):
        assert_refused(hncse("report", name), f"{shown}: no such")


def test_what_a_stream_cannot_take_is_written_as_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))

    def run(console: object) -> dict[str, object]:
        console.print("é 北京 \udce9", markup=False)  # type: ignore[attr-defined]
        return {}

    command(run, as_json=False)
    sys.stdout.flush()
    assert raw.getvalue().rstrip() == b"\xe9 \\u5317\\u4eac \\udce9"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device here")
@pytest.mark.parametrize("arguments", ["recipes", "recipes --json", "--help", "train --help"])
def test_a_standard_output_that_is_full_is_said(arguments: str) -> None:
    command = f"{sys.executable} -m hncse_ray.cli {arguments} > /dev/full"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    said = "error: a file or standard output cannot be written (No space left on device)"
    assert done.stderr.splitlines()[-1] == said and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", ["recipes", "recipes --json", "--help", "settings --markdown"])
def test_nobody_who_reads_on_ends_a_command_as_other_tools(arguments: str) -> None:
    command = [sys.executable, "-m", "hncse_ray.cli", *arguments.split()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 141 and "Traceback" not in said and "Exception ignored" not in said


def test_nobody_who_reads_on_ends_a_command_that_works_in_several_threads() -> None:
    code = """
import logging, threading, time
from hncse_ray.cli.app import app, command

def say():
    while True:
        logging.getLogger("hncse_ray.test").info("a line")
        time.sleep(0.01)

@app.command()
def work():
    threading.Thread(target=say, daemon=True).start()
    command(lambda console: time.sleep(600), False)

app(["work"])
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "a line\n"
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_command_does_its_work_with_streams_that_are_closed(closed: str) -> None:
    command = f"{sys.executable} -m hncse_ray.cli recipes {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
    assert ("quickstart" in done.stdout) == (">&-" not in closed.split())


@pytest.mark.parametrize("name", [command.name or command.callback.__name__ for command in app.registered_commands])
def test_help_shows_what_is_optional_and_repeated_once(name: str) -> None:
    usage = hncse(name, "--help").stdout.splitlines()[0]
    assert usage.startswith(f"Usage: root {name} [OPTIONS") and "[[" not in usage and "...}" not in usage


def test_a_folder_that_is_gone_and_a_standard_input_that_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    command(lambda console: {"read": sys.stdin.read()}, as_json=False)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert_refused(hncse("train", "quickstart"), "the present folder is gone", "Change to another")
