import contextlib
import copy
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from mapped import mapped
from waits import seconds, soon

from hncse_ray.config import CorpusSettings
from hncse_ray.corpus import Corpus, files, prepare_corpus, row_hash
from hncse_ray.corpus import prepare as prepare_module
from hncse_ray.corpus.sampling import sample
from hncse_ray.errors import DataError

LINES = [f"{i} the cat sat on mat number {i}" for i in range(50)]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(LINES), encoding="utf-8")
    return str(path)


def folders(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache" / "corpora").iterdir())


def test_rows_tokens_hashes_and_lengths(prepare, text_file, tokenizer):
    corpus = prepare(path=text_file, max_length=9)
    ids = np.random.default_rng(0).permutation(50)
    expected = tokenizer([LINES[i] for i in ids], truncation=True, max_length=9)["input_ids"]
    assert corpus.texts(ids) == [LINES[i] for i in ids]
    assert [row.tolist() for row in corpus.token_rows(ids)] == expected
    assert corpus.lengths[ids].tolist() == [len(row) for row in expected]
    assert corpus.lengths.max() == 9
    assert corpus.hashes.tolist() == [row_hash(row) for row in corpus.token_rows(range(50))]
    assert (corpus.lengths.dtype, corpus.hashes.dtype) == (np.int32, np.int64)
    assert len(corpus) == corpus.report.rows == 50
    assert corpus.report.mean_tokens == pytest.approx(corpus.lengths.mean())


def test_rows_are_found_over_many_chunks(prepare, text_file, monkeypatch, tokenizer):
    monkeypatch.setattr(files, "SHARD_ROWS", 14)
    monkeypatch.setattr(files, "BATCH_ROWS", 7)
    corpus = prepare(path=text_file)
    assert len(list(corpus.path.glob("rows-*.arrow"))) == 4
    ids = [0, 6, 7, 13, 14, 48, 49, 7]
    assert corpus.texts(ids) == [LINES[i] for i in ids]
    expected = tokenizer([LINES[i] for i in ids], truncation=True, max_length=16)["input_ids"]
    assert [row.tolist() for row in corpus.token_rows(ids)] == expected
    assert corpus.lengths.tolist() == [len(row) for row in corpus.token_rows(range(50))]


def test_token_rows_are_views_that_cannot_be_written(prepare, text_file):
    row = prepare(path=text_file).token_rows([3])[0]
    assert not row.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        row[0] = 1


@pytest.mark.parametrize("ids", [[50], [-1], [0, 99]])
def test_a_row_that_is_not_there(prepare, text_file, ids):
    with pytest.raises(IndexError, match="50 rows"):
        prepare(path=text_file).token_rows(ids)


def test_duplicates_go_also_across_unicode_forms_and_files(prepare, tmp_path):
    (tmp_path / "a.txt").write_text("caf\u00e9 au lait\nplain old text\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("cafe\u0301  au lait\nfine new text\n", encoding="utf-8")
    corpus = prepare(path=(f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"))
    assert corpus.texts(range(3)) == ["caf\u00e9 au lait", "plain old text", "fine new text"]
    assert corpus.report.dropped == {"duplicate": 1}
    assert corpus.report.read == 4


def test_rows_are_unique_by_what_the_model_sees(prepare, tmp_path):
    lines = ["The cat sat", "the CAT sat", "sat on the cat a", "sat on the cat b", "sat on the"]
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    cut = prepare(path=f"{tmp_path}/a.txt", max_length=6)
    assert cut.texts(range(len(cut))) == [lines[0], lines[2]]  # [CLS] sat o ##n the [SEP] is all that is left of three
    assert cut.report.dropped == {"duplicate": 3}
    assert len(set(cut.hashes.tolist())) == 2
    whole = prepare(path=f"{tmp_path}/a.txt", max_length=16)
    assert whole.texts(range(len(whole))) == [lines[0], *lines[2:]]


@pytest.mark.parametrize("special", [True, False])
def test_rows_without_a_token_of_their_own_are_dropped_and_counted(prepare, tmp_path, tokenizer, special):
    from tokenizers import normalizers, processors

    bare = copy.deepcopy(tokenizer)
    strip = [normalizers.Replace("~", ""), normalizers.Lowercase()]
    bare.backend_tokenizer.normalizer = normalizers.Sequence(strip)
    if not special:
        bare.backend_tokenizer.post_processor = processors.Sequence([])
    (tmp_path / "a.txt").write_text("the cat sat\n~~~\n~ ~\n\u200b\n\n", encoding="utf-8")
    corpus = prepare(path=f"{tmp_path}/a.txt", tokenizer=bare)
    assert corpus.report.dropped == {"empty": 2, "no_token": 2}
    assert corpus.texts([0]) == ["the cat sat"] and corpus.lengths.min() > 2 * special
    (tmp_path / "b.txt").write_text("~~~\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"b.txt: no sentence is left of 1 line \(dropped: no_token 1\)"):
        prepare(path=f"{tmp_path}/b.txt", tokenizer=bare)


def test_chinese_and_japanese_lines_are_kept(prepare, tmp_path):
    (tmp_path / "a.txt").write_text("\u6211\u559c\u6b22\u8bfb\u4e66\n\u732b\u304c\u5ea7\u308b\n", encoding="utf-8")
    report = prepare(path=f"{tmp_path}/a.txt").report
    assert report.read == 2 and "too_short" not in report.dropped


def test_a_corpus_of_an_earlier_format_is_not_read(prepare, text_file):
    path = prepare(path=text_file).path
    facts = json.loads((path / "corpus.json").read_text()) | {"format": 1}
    (path / "corpus.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match="has format 1, not 4"):
        Corpus.open(path)


def test_second_use_reads_and_tokenises_nothing(prepare, text_file, monkeypatch):
    first = prepare(path=text_file)
    module = sys.modules["hncse_ray.corpus.prepare"]
    monkeypatch.setattr(module, "read_examples", lambda *_: pytest.fail("read twice"))
    second = prepare(path=text_file, tokenize=lambda *_, **__: pytest.fail("tokenised twice"))
    assert second.path == first.path
    assert second.report == first.report
    with pytest.raises(pytest.fail.Exception, match="read twice"):
        prepare(path=text_file, max_length=15)  # the spy works


def test_the_digest_follows_what_matters_alone(prepare, text_file, tmp_path):
    first = prepare(path=text_file).digest
    assert prepare(path=text_file, num_processes=1).digest == first
    assert prepare(path=text_file, seed=5).digest == first
    copy = tmp_path / "other-name.txt"
    copy.write_bytes(Path(text_file).read_bytes())
    assert prepare(path=str(copy)).digest == first
    changed = [
        prepare(path=text_file, max_length=15),
        prepare(path=text_file, tokenizer_digest="another"),
        prepare(path=text_file, min_words=4),
        prepare(path=text_file, max_chars=50),
        prepare(path=text_file, max_sentences=10),
        prepare(path=text_file, max_sentences=10, seed=1),
    ]
    copy.write_text("a new sentence here\n", encoding="utf-8")
    changed.append(prepare(path=str(copy)))
    assert len({first, *(corpus.digest for corpus in changed)}) == 8


def test_a_sample_is_uniform_reproducible_and_in_order(prepare, text_file, tmp_path):
    a = prepare(path=text_file, max_sentences=10)
    again = prepare(path=text_file, max_sentences=10, cache_dir=str(tmp_path / "cache2"))
    other = prepare(path=text_file, max_sentences=10, seed=1)
    texts = a.texts(range(10))
    assert texts == again.texts(range(10)) != other.texts(range(10))
    order = [LINES.index(text) for text in texts]
    assert order == sorted(set(order))
    assert max(order) >= 10
    assert a.report.dropped == {"not_sampled": 40}
    hits = np.zeros(20)
    for seed in range(2000):
        for row, _ in sample(((i, 0) for i in range(20)), 5, seed, Counter()):
            hits[row] += 1
    assert np.abs(hits / 2000 - 0.25).max() < 0.05


def test_report_is_on_disk_and_progress_is_told(prepare, text_file):
    told = []
    corpus = prepare(path=text_file, progress=lambda *event: told.append(event))
    facts = json.loads((corpus.path / "corpus.json").read_text())
    assert facts["digest"] == corpus.digest == corpus.path.name
    assert facts["rows"] == 50
    assert facts["settings"]["path"] == [text_file]
    assert told[-1] == ("preparing the corpus", 50, None)


def test_the_datasets_library_opens_it(prepare, text_file):
    import datasets

    rows = datasets.Dataset.from_file(str(prepare(path=text_file).path / "rows-00000.arrow"))
    assert rows[7]["text"] == LINES[7]


def test_nothing_left_tells_the_counts(prepare, tmp_path):
    (tmp_path / "short.txt").write_text("one\ntwo words\n\n")
    with pytest.raises(DataError, match=r"short.txt: no sentence is left of 3 lines \(dropped: empty 1, too_short 2\)"):
        prepare(path=f"{tmp_path}/short.txt", min_words=3)
    (tmp_path / "latin.txt").write_text("caf\u00e9 au lait\n" * 3, encoding="latin-1")
    with pytest.raises(DataError, match=r"left of 3 lines \(dropped: undecodable 3\)\. Text is UTF-8: convert it"):
        prepare(path=f"{tmp_path}/latin.txt")
    assert folders(tmp_path) == []


def test_cache_folder_order(prepare, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HNCSE_CACHE", str(tmp_path / "from-env"))
    assert prepare(path=text_file, cache_dir=None).path.is_relative_to(tmp_path / "from-env")
    assert prepare(path=text_file).path.is_relative_to(tmp_path / "cache")
    monkeypatch.delenv("HNCSE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert prepare(path=text_file, cache_dir=None).path.is_relative_to(tmp_path / "home/.cache/hncse_ray")


def test_a_cache_that_cannot_be_written(prepare, text_file, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot be written.*HNCSE_CACHE"):
        prepare(path=text_file, cache_dir=str(tmp_path / "file"))


def test_a_corpus_pickles_as_its_path(prepare, text_file):
    corpus = prepare(path=text_file)
    data = pickle.dumps(corpus)
    assert len(data) < 1000
    assert pickle.loads(data).texts([3]) == [LINES[3]]


def test_around_scattered_rows_nothing_is_read(prepare, text_file):
    corpus = prepare(path=text_file)
    assert corpus.texts([3]) == [LINES[3]]
    names = {"rows-00000.arrow", "hash.i8", "length.i4"}
    assert mapped(corpus.path) == {(name, False) for name in names}
    scattered = corpus.scattered()
    assert scattered.texts([3]) == [LINES[3]]
    assert mapped(corpus.path) == {(name, how) for name in names for how in (False, True)}


def damage_json(path):
    (path / "corpus.json").write_text((path / "corpus.json").read_text()[:-20])


def damage_fields(path):
    (path / "corpus.json").write_text("{}")


def damage_rows(path):
    facts = json.loads((path / "corpus.json").read_text()) | {"rows": 49}
    (path / "corpus.json").write_text(json.dumps(facts))


def truncate(path):
    os.truncate(path / "rows-00000.arrow", 3000)


def remove_json(path):
    (path / "corpus.json").unlink()


def remove_data(path):
    (path / "rows-00000.arrow").unlink()


@pytest.mark.parametrize("damage", [damage_json, damage_fields, damage_rows, truncate, remove_json, remove_data])
def test_damage_is_seen_on_opening_and_mended_by_preparing(prepare, text_file, tmp_path, damage):
    path = prepare(path=text_file).path
    damage(path)
    with pytest.raises(DataError, match=path.name):
        Corpus.open(path)
    assert prepare(path=text_file).texts([1]) == [LINES[1]]
    assert folders(tmp_path) == [path.name]


@contextlib.contextmanager
def too_many_files_open():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_corpus_that_cannot_be_read_now_is_not_taken_for_a_damaged_one(tmp_path, tokenize):
    settings = CorpusSettings(source="memory", cache_dir=str(tmp_path))
    how = {"tokenize": tokenize, "tokenizer_digest": "x", "max_length": 16, "sentences": ["one", "two"]}
    path = prepare_corpus(settings, **how).path
    made = path.stat().st_ino
    with too_many_files_open(), pytest.raises(DataError, match=r"cannot be read \(Too many open files\)"):
        prepare_corpus(settings, **how)
    assert prepare_corpus(settings, **how).path.stat().st_ino == made


def test_what_is_damaged_is_named(prepare, text_file):
    path = prepare(path=text_file).path
    os.truncate(path / "hash.i8", 392)
    with pytest.raises(DataError, match=r"hash\.i8 has 392 bytes, not 400"):
        Corpus.open(path)
    (path / "hash.i8").unlink()
    with pytest.raises(DataError, match=r"hash\.i8 is missing"):
        Corpus.open(path)


@pytest.mark.parametrize("name", ["rows-00001.arrow", "hash.i8", "length.i4"])
def test_a_changed_byte_is_seen_by_the_digests_and_mended_by_preparing(prepare, text_file, monkeypatch, caplog, name):
    monkeypatch.setattr(files, "SHARD_ROWS", 20)
    monkeypatch.setattr(files, "BATCH_ROWS", 20)
    corpus = prepare(path=text_file)
    corpus.check(digests=True)
    content = bytearray((corpus.path / name).read_bytes())
    at = content.index(b"25 the cat") if name.endswith("arrow") else 25 * int(name[-1])
    content[at] ^= 1
    (corpus.path / name).write_bytes(content)
    damaged = Corpus.open(corpus.path)
    damaged.check()  # the first and the last row of each shard are as they were
    with pytest.raises(DataError, match=r"rows 20 to 39 in rows-00001\.arrow or hash.* are not what was written"):
        damaged.check(digests=True)
    assert prepare(path=text_file, digests=True).texts([25]) == [LINES[25]]
    assert "preparing it anew" in caplog.text
    Corpus.open(corpus.path).check(digests=True)


def test_a_shard_of_another_corpus_is_seen_and_mended_by_preparing(prepare, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SHARD_ROWS", 20)
    monkeypatch.setattr(files, "BATCH_ROWS", 20)
    path = prepare(path=text_file).path
    shard = path / "rows-00001.arrow"
    shard.write_bytes((path / "rows-00000.arrow").read_bytes().ljust(shard.stat().st_size, b"\0"))
    facts = json.loads((path / "corpus.json").read_text())
    facts["shards"][1]["bytes"] = shard.stat().st_size
    (path / "corpus.json").write_text(json.dumps(facts))
    corpus = Corpus.open(path)
    assert corpus.texts([0]) == [LINES[0]]
    with pytest.raises(DataError, match=rf"{path.name}: is a damaged corpus: rows-00001\.arrow is of another one"):
        corpus.token_rows([21])
    assert prepare(path=text_file).texts([21]) == [LINES[21]]


def test_a_folder_with_the_corpus_of_another_tokenizer_is_not_taken(prepare, text_file, tmp_path, caplog):
    right, wrong = prepare(path=text_file).path, prepare(path=text_file, tokenizer_digest="another").path
    shutil.rmtree(right)
    wrong.rename(right)
    assert prepare(path=text_file).tokenizer == "tiny"
    assert "holds another corpus, of another tokenizer" in caplog.text


def _prepare_elsewhere(path, cache, whole, gate, slow, results):
    module = sys.modules.get("hncse_ray.corpus.prepare") or __import__("hncse_ray.corpus.prepare", fromlist=["x"])

    def tokenize(*arguments, **how):
        gate.wait(seconds(30))
        time.sleep(slow)
        return whole(*arguments, **how)

    corpus = module.prepare_corpus(
        CorpusSettings(path=path, cache_dir=cache),
        tokenize=tokenize,
        tokenizer_digest="tiny",
        max_length=16,
    )
    results.put((corpus.digest, corpus.texts([5])))


@pytest.fixture
def processes():
    return multiprocessing.get_context("fork")


def test_two_processes_at_once_both_end_well(prepare, text_file, tmp_path, tokenize, processes):
    gate, results = processes.Barrier(2), processes.Queue()
    arguments = (text_file, str(tmp_path / "cache"), tokenize, gate, 0.1, results)
    both = [processes.Process(target=_prepare_elsewhere, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    found = [results.get(timeout=seconds(30)) for _ in both]
    for process in both:
        process.join(seconds(30))
    assert [process.exitcode for process in both] == [0, 0]
    assert found[0] == found[1] == (prepare(path=text_file).digest, [LINES[5]])
    assert folders(tmp_path) == [found[0][0]]


def test_a_killed_preparation_leaves_nothing_that_is_taken_for_whole(prepare, text_file, tmp_path, tokenize, processes):
    gate, results = processes.Event(), processes.Queue()
    gate.set()
    arguments = (text_file, str(tmp_path / "cache"), tokenize, gate, 60, results)
    process = processes.Process(target=_prepare_elsewhere, args=arguments)
    process.start()
    soon(lambda: list(tmp_path.glob("cache/corpora/.tmp-*")), within_s=20, what="a folder in the making")
    os.kill(process.pid, signal.SIGKILL)
    process.join(seconds(10))
    (left,) = folders(tmp_path)
    assert left.startswith(".tmp-")
    corpus = prepare(path=text_file)
    assert len(corpus) == 50
    assert folders(tmp_path) == [corpus.digest]


def test_the_folder_of_a_process_at_work_is_left_alone(prepare, text_file, tmp_path):
    busy = tmp_path / "cache" / "corpora" / f".tmp-{socket.gethostname()}-{os.getppid()}-0"
    foreign = tmp_path / "cache" / "corpora" / ".tmp-other-host-1-0"
    old = tmp_path / "cache" / "corpora" / ".tmp-other-host-2-0"
    odd = tmp_path / "cache" / "corpora" / ".tmp-odd"
    for folder in (busy, foreign, old, odd):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    corpus = prepare(path=text_file)
    assert folders(tmp_path) == sorted([busy.name, foreign.name, odd.name, corpus.digest])


def test_so_is_that_of_a_container_whose_processes_have_other_numbers(text_file, tmp_path, tokenize):
    """As another container sees it that has this host's name."""
    (tmp_path / "cache").mkdir()
    settings = CorpusSettings(path=text_file, cache_dir=str(tmp_path / "cache"))

    def tokenise(texts, max_length, *, side):
        (working,) = (tmp_path / "cache/corpora").glob(".tmp-*")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepare_module, "_alive", lambda pid: False)
            prepare_module._remove_stale(working.parent)
        assert working.is_dir()
        return tokenize(texts, max_length, side=side)

    corpus = prepare_corpus(settings, tokenize=tokenise, tokenizer_digest="x", max_length=16)
    assert folders(tmp_path) == [corpus.digest]
    left = corpus.path.rename(corpus.path.with_name(f".tmp-{socket.gethostname()}-{2**22 + 1}-0"))
    prepare_corpus(settings, tokenize=tokenize, tokenizer_digest="x", max_length=16)
    assert not left.exists()


@pytest.mark.skipif("HNCSE_DATA" not in os.environ, reason="needs HNCSE_DATA")
def test_real_sentences(prepare, tmp_path, tokenizer):
    import gzip
    import itertools

    with gzip.open(Path(os.environ["HNCSE_DATA"]) / "wiki1m_sample.txt.gz", "rb") as stream:
        lines = list(itertools.islice(stream, 20_000))
    (tmp_path / "wiki.txt").write_bytes(b"".join(lines))
    corpus = prepare(path=f"{tmp_path}/wiki.txt", max_length=32)
    assert 19_900 < len(corpus) <= 20_000
    ids = np.random.default_rng(0).integers(0, len(corpus), 500)
    expected = tokenizer(corpus.texts(ids), truncation=True, max_length=32)["input_ids"]
    assert [row.tolist() for row in corpus.token_rows(ids)] == expected
