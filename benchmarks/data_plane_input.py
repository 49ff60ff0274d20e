"""The part ``input`` of data_plane.py: what the threads that make batches ahead take of a CPU.

Of each global batch B every trainer draws all row ids and compares what they hold; of its own B/W rows it reads the
tokens and lays them out for two views. Made-up rows in the system's cache, W by its number alone; seconds are fitted,
each size counting alike, by ``a global row x B + an own row x B/W``. Pinning is not in it where there is no GPU.

Where views are made of passages, another thread cuts and tokenises the own rows' texts: measured with the recipe
``adapt`` on documents of twelve Wikipedia sentences.
"""

import gzip
import os
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import corpus_scale
import numpy as np

from hncse_ray.config import load_settings
from hncse_ray.corpus import Corpus, prepare_corpus
from hncse_ray.encoder import load_encoder
from hncse_ray.training import batch as batches
from hncse_ray.training.schedule import plan_batches
from hncse_ray.training.step import lay_out
from hncse_ray.training.views import ViewMaker

ROWS, MEASURED = 2**20, 128  # batches: two windows of the plan, each of which is made with its first
DOCUMENTS = 1500
SIZES = ((512, 1), (512, 8), (4096, 1), (4096, 8))  # B, W


def input_thread(model: str) -> dict[str, Any]:
    """Seconds of CPU a batch for each size, and what they are made of."""
    found: dict[str, Any] = {"rows": ROWS, "model": model, "batches": MEASURED, "sizes": []}
    with tempfile.TemporaryDirectory() as folder:
        corpus_scale.write(Path(folder), ROWS)
        corpus = Corpus.open(folder).scattered()
        found["mean_tokens"] = float(corpus.lengths.mean())
        for size, ranks in SIZES:
            settings = load_settings(
                "quickstart", [f"encoder.model={model}", f"train.batch_size={size}", "objective.name=info_nce"]
            )
            found["sizes"].append({"B": size, "W": ranks} | of_a_batch(corpus, settings, ranks))
            print("input", found["sizes"][-1], flush=True)
    factors = np.array([[line["B"], line["B"] / line["W"]] for line in found["sizes"]])
    seconds = np.array([line["cpu_s"] for line in found["sizes"]])
    fitted = np.linalg.lstsq(factors / seconds[:, None], np.ones(len(seconds)), rcond=None)[0].tolist()
    found["fitted"] = dict(zip(("a_global_row", "an_own_row"), fitted, strict=True))
    return found | {"views": of_views(model)}


def of_views(model: str) -> dict[str, float]:
    """Seconds of CPU, of all the tokenizer's threads, for the two views of an own row and for each token of them."""
    with (
        tempfile.TemporaryDirectory() as folder,
        gzip.open(Path(os.environ["HNCSE_DATA"]) / "wiki1m_sample.txt.gz", "rt", encoding="utf-8") as stream,
    ):
        documents = Path(folder) / "documents"
        documents.mkdir()
        for number in range(DOCUMENTS):
            text = " ".join(line.strip() for line in islice(stream, 12))
            (documents / f"{number}.txt").write_text(f"Document {number}\n\n{text}\n", encoding="utf-8")
        settings = load_settings(
            "adapt", [f"corpus.path={documents}", f"corpus.cache_dir={folder}/cache", f"encoder.model={model}"]
        )
        encoder = load_encoder(model, settings.encoder)
        corpus = prepare_corpus(
            settings.corpus,
            tokenize=encoder.token_rows,
            tokenizer_digest=encoder.tokenizer_digest(),
            max_length=settings.encoder.max_length,
        )
        plan = plan_batches(settings, corpus.view_lengths)
        make = ViewMaker(settings, corpus, encoder.token_rows)
        make.begin()
        cpu_s, tokens, rows = [], 0, 0
        for number in range(plan.batches_per_epoch):
            ids = plan.batch(number)
            started = time.process_time()
            views = make(number, ids)
            cpu_s.append(time.process_time() - started)
            tokens += sum(map(len, [*views.anchors, *views.targets]))
            rows += len(ids)
    return {"rows": rows, "tokens": tokens / rows, "an_own_row": sum(cpu_s) / rows, "a_token": sum(cpu_s) / tokens}


def of_a_batch(corpus: Corpus, settings: Any, ranks: int) -> dict[str, float]:
    """Which rows, in the mean over batches; reading and comparing, and laying out, as medians; and their sum."""
    batches.world_size = lambda: ranks  # type: ignore[attr-defined]  # no other rank is asked
    encoder = load_encoder(settings.encoder.model, settings.encoder)
    plan = plan_batches(settings, corpus.view_lengths)
    parts: dict[str, list[float]] = {"drawn": [], "read": [], "laid_out": []}
    for number in range(MEASURED):
        marks = [time.thread_time()]
        ids_B = plan.batch(number)
        marks.append(time.thread_time())
        batch = batches.local_batch(number, ids_B, corpus, None, settings=settings)
        marks.append(time.thread_time())
        lay_out(batch, encoder, views=2, chunk_size=None)
        marks.append(time.thread_time())
        for part, started, ended in zip(parts.values(), marks, marks[1:], strict=False):
            part.append(ended - started)
    typical = {"drawn": statistics.mean(parts["drawn"])}
    typical |= {name: statistics.median(parts[name]) for name in ("read", "laid_out")}
    return typical | {"cpu_s": sum(typical.values())}
