"""A corpus prepared in pieces, in any order and some of them twice, has the bytes of one that one process prepared."""

import gzip
import json
import random
from pathlib import Path

import local_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import web

from hncse_ray.config import CorpusSettings
from hncse_ray.corpus import Corpus, files, hub, parts, prepare_corpus, runs
from hncse_ray.corpus.rows import RowMaker
from hncse_ray.corpus.runs import read_chunks, write_dropped, write_in_pieces, write_laid_out, write_run
from hncse_ray.errors import DataError


def tokenize(texts, max_length, *, side):
    """A token for each letter of the first words, whatever their case; none for a tilde."""
    prompt = [] if side is None else [1]
    return [
        np.array([*prompt, *(ord(c) for c in text.lower() if c not in "~ ")][:max_length], np.int32) for text in texts
    ]


class Shuffled:
    """Makes the pieces in this process, in another order, and one of every three again."""

    def _all(self, work, arguments):
        order = random.Random(0).sample(range(len(arguments)), len(arguments))
        done = {i: work(*arguments[i]) for i in [*order, *order[::3]]}
        return [done[i] for i in range(len(arguments))]

    def write_runs(self, folder, job, parts):
        chunks = [chunk for number, part in enumerate(parts) for chunk in read_chunks(job, number, part)]
        assert len(chunks) > 1
        make = RowMaker(job.shape, tokenize, job.max_length)
        found = self._all(write_run, [(folder, chunk, make, job.schema) for chunk in chunks])
        yield from random.Random(1).sample(found, len(found))

    def write_dropped(self, folder, runs, ranges):
        return self._all(write_dropped, [(folder, runs, number, ranges) for number in range(ranges)])

    def write_shards(self, folder, layout, schema):
        return self._all(write_laid_out, [(folder, layout, schema, number) for number in range(layout.shards)])


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    for module, sizes in (
        (files, {"SHARD_ROWS": 12, "BATCH_ROWS": 4}),
        (parts, {"PART_BYTES": 60, "PART_ROWS": 7}),
        (runs, {"CHUNK_ROWS": 5, "RANGE_ROWS": 9}),
    ):
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)


def prepare_by(tmp_path, write_rows, **settings) -> Corpus:
    cache = tmp_path / ("one" if write_rows is None else "pieces")
    return prepare_corpus(
        CorpusSettings(cache_dir=str(cache), **settings),
        tokenize=tokenize,
        tokenizer_digest="letters",
        max_length=12,
        write_rows=write_rows,
    )


def in_pieces(folder, job, counts, tell):
    return write_in_pieces(folder, job, counts, tell, workers=Shuffled())


def assert_same(tmp_path: Path, **settings) -> Corpus:
    one, pieces = (prepare_by(tmp_path, write_rows, **settings) for write_rows in (None, in_pieces))
    names = [sorted(file.name for file in corpus.path.iterdir()) for corpus in (one, pieces)]
    assert names[0] == names[1]
    for name in names[0]:
        contents = [(corpus.path / name).read_bytes() for corpus in (one, pieces)]
        if name == files.MANIFEST:
            facts = [json.loads(content) for content in contents]
            for fact in facts:
                assert fact.pop("seconds") >= 0 and fact["settings"].pop("cache_dir")
            assert facts[0] == facts[1]
        else:
            assert contents[0] == contents[1], name
    return pieces


WORDS = ["The cat sat", "the CAT sat", "on the mat", "~", "", "  a  ", "x" * 40, "a dog ran off", "zero\u200b width"]


def lines(count, seed=0):
    rng = random.Random(seed)
    return [
        f"{rng.choice(WORDS)} {rng.randrange(9)}" if rng.random() < 0.8 else rng.choice(WORDS) for _ in range(count)
    ]


@pytest.mark.parametrize("sample", [{}, {"max_sentences": 20}])
def test_text_of_any_line_ends(tmp_path, sample):
    (tmp_path / "a.txt").write_bytes(
        b"\xef\xbb\xbf" + "\r\n".join(lines(90)).encode() + b"\n\xff\xfe bad\n\xef\xbb\xbfb"
    )
    (tmp_path / "b.txt").write_text("\r".join(lines(40, seed=1)), newline="")
    (tmp_path / "c.txt").write_text("\n".join([*lines(40, seed=2), "\u00e9" * 100, "caf\u00e9", "cafe\u0301", ""]))
    found = assert_same(tmp_path, path=tuple(f"{tmp_path}/{name}.txt" for name in "abc"), max_chars=50, **sample)
    assert {"duplicate", "empty", "no_token", "too_long", "undecodable"} <= found.report.dropped.keys()
    assert len(found) == 20 if sample else len(found) > 24  # several shards


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "tsv"])
def test_pairs_with_negatives_and_documents(tmp_path, kind):
    rng = random.Random(3)
    rows = [
        {"q": q, "a": rng.choice([a, q, None]), "n": rng.choice([[], [a, q], None]), "d": rng.choice(["x", "y", None])}
        for q, a in zip(lines(60), lines(60, seed=4), strict=True)
    ]
    rows[-1]["d"] = "x"
    path = tmp_path / f"pairs.{kind}"
    settings = {"column": "q", "positive_column": "a", "document_column": "d", "negative_columns": ("n",)}
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        path.write_text("q\ta\td\n" + "\n".join(f"{r['q']}\t{r['a'] or ''}\t{r['d'] or ''}" for r in rows))
        del settings["negative_columns"]
    found = assert_same(tmp_path, path=str(path), **settings)
    assert 0 < found.report.without_positive < len(found) and found.report.dropped["duplicate"]


@pytest.mark.parametrize("sample", [{}, {"max_sentences": 7}])
def test_documents_are_one_part_and_sampled_as_a_whole(tmp_path, sample):
    for number in range(12):
        (tmp_path / f"{number}.md").write_text(f"# Title {number % 5}\n\n{'. '.join(lines(9, seed=number))}.\n")
    found = assert_same(tmp_path, path=str(tmp_path), passage_words=10, near_duplicates=0.99, **sample)
    assert found.has_passages and found.report.documents > 1


@pytest.fixture(params=["web", "whole", "s3", "gs"])
def put(request, remote_at):
    """Put a file where it has a URL: on a server that gives parts or none, or in a bucket."""
    if request.param not in ("web", "whole"):
        remote = remote_at(request.param)
        yield lambda file: remote.upload(file, file.name) or f"{remote.url}/{file.name}"
        return
    with web.serve(web.Web(ranges=request.param == "web")) as server:

        def put(file):
            server.files[f"/{file.name}"] = file.read_bytes()
            return f"{server.url}/{file.name}"

        yield put


def test_files_at_urls_are_read_as_files_here(tmp_path, put):
    here = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.csv.gz", "d.parquet")]
    rows = [[{"text": line} for line in lines(60, seed=seed)] for seed in range(4)]
    here[0].write_text("\n".join(row["text"] for row in rows[0]))
    here[1].write_text("\n".join(map(json.dumps, rows[1])))
    here[2].write_bytes(gzip.compress("\n".join(["text", *(row["text"] for row in rows[2])]).encode()))
    pq.write_table(pa.Table.from_pylist(rows[3]), here[3], row_group_size=3)
    urls = [put(file) for file in here]
    expected = prepare_by(tmp_path / "here", None, path=tuple(map(str, here)))
    found = assert_same(tmp_path, path=tuple(urls))
    for file in expected.path.iterdir():
        assert file.name == files.MANIFEST or file.read_bytes() == (found.path / file.name).read_bytes()
    assert prepare_by(tmp_path, None, path=tuple(urls)).digest == found.digest
    here[0].write_text(here[0].read_text().replace("a dog", "A cow"))
    put(here[0])
    assert prepare_by(tmp_path, None, path=tuple(urls)).digest != found.digest


def test_a_source_that_changes_behind_the_reader_is_refused(tmp_path):
    with web.serve(web.Web({"/a.txt": "\n".join(lines(60)).encode()})) as server:

        def change_it(folder, job, counts, tell):
            shards = in_pieces(folder, job, counts, tell)
            server.versions["/a.txt"] = "another"
            return shards

        with pytest.raises(DataError, match="changed while it was read"):
            prepare_by(tmp_path, change_it, path=f"{server.url}/a.txt")
    assert list((tmp_path / "pieces/corpora").iterdir()) == []


@pytest.mark.parametrize("split", ["train", "train[5:95]"])
def test_a_data_set_of_the_hub_is_shared_out_by_its_shards(tmp_path, monkeypatch, split):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(hub, "_SHARD_ROWS", 20)
    for number in range(4):
        (tmp_path / "set").mkdir(exist_ok=True)
        rows = pa.table({"text": lines(25, seed=number), "other": range(25)})
        pq.write_table(rows, tmp_path / "set" / f"train-{number:05d}-of-00004.parquet")
    settings = {"source": "hub", "path": str(tmp_path / "set"), "split": split}
    assert len(parts.parts_of(CorpusSettings(**settings))) == 4 + ("[" in split)
    found = assert_same(tmp_path, **settings)
    assert found.report.read == (90 if "[" in split else 100)
    rows = pa.table({"text": lines(25, seed=9), "other": range(25)})
    pq.write_table(rows, tmp_path / "set" / "train-00003-of-00004.parquet")
    assert prepare_by(tmp_path, None, **settings).digest != found.digest


def test_a_data_set_is_read_from_the_hub_and_its_corpus_found_when_that_is_gone(tmp_path, monkeypatch):
    buffers = [pa.BufferOutputStream() for _ in range(2)]
    for number, buffer in enumerate(buffers):
        pq.write_table(pa.table({"text": lines(40, seed=number)}), buffer)
    files_there = {f"train-0000{i}-of-00002.parquet": b.getvalue().to_pybytes() for i, b in enumerate(buffers)}
    settings = {"source": "hub", "path": "org/set"}
    for constant in ("huggingface_hub.constants.HF_HUB_CACHE", "datasets.config.HF_DATASETS_CACHE"):
        monkeypatch.setattr(constant, str(tmp_path / "hf"))
    with local_hub.serve(local_hub.LocalHub(files=files_there)) as one:
        monkeypatch.setenv("HF_ENDPOINT", one.url)
        for constant in ("huggingface_hub.constants.ENDPOINT", "datasets.config.HF_ENDPOINT"):
            monkeypatch.setattr(constant, one.url)
        template = f"{one.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        found = assert_same(tmp_path, **settings)
        assert found.report.read == 80
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert prepare_by(tmp_path, None, **settings).digest == found.digest
    with pytest.raises(DataError, match="the Hugging Face hub cannot be reached"):
        prepare_by(tmp_path, None, **settings, min_words=2)
    with pytest.raises(DataError, match="the Hugging Face hub cannot be reached"):
        prepare_by(tmp_path, None, **settings, split="test")


def test_nothing_in_a_column_and_nothing_left_are_told_as_by_one_process(tmp_path):
    empty, short = tmp_path / "empty.tsv", tmp_path / "short.txt"
    empty.write_text("text\ta\n" + "\n".join(f"{line}\t" for line in lines(20)))
    short.write_text("\n".join(["one"] * 50))
    for settings in ({"path": str(empty), "positive_column": "a"}, {"path": str(short), "min_words": 2}):
        told = []
        for write_rows in (None, in_pieces):
            with pytest.raises(DataError) as caught:
                prepare_by(tmp_path, write_rows, **settings)
            told.append(str(caught.value))
        assert told[0] == told[1]
        assert list((tmp_path / "pieces/corpora").iterdir()) == []


def test_a_run_that_is_not_whole_does_not_have_its_name(tmp_path):
    job = runs.Job(CorpusSettings(path=str(tmp_path / "a.txt")), "letters", 12, 0)
    (tmp_path / "a.txt").write_text("\n".join(lines(5)))
    (chunk, *_) = read_chunks(job, 0, parts.parts_of(job.settings)[0])
    with pytest.raises(pa.ArrowException):  # its rows do not fit
        write_run(tmp_path, chunk, RowMaker(job.shape, tokenize, 12), pa.schema({"text": pa.int64()}))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
