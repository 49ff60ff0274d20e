"""How a shard of the index is made of an encoder and a corpus."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hncse_ray.config import EncoderSettings, NegativesSettings, Settings
from hncse_ray.corpus import Corpus
from hncse_ray.corpus.cache import cache_folder
from hncse_ray.encoder import load_encoder
from hncse_ray.errors import StorageError
from hncse_ray.negatives import IndexPlan, plan_index
from hncse_ray.negatives.in_process import InProcessSource
from hncse_ray.negatives.lexical import LexicalIndex
from hncse_ray.negatives.shard import IndexShard
from hncse_ray.training.publish import from_arrays

_ENCODE_BATCH = (128, 1024)  # rows encoded at a time on CPUs, and on a GPU
_PART_BESIDE_TRAINER = 0.5  # of its GPU, for an index in the trainer's process
_READ_ROWS = 1024  # whose texts are in memory at a time
_GPU_WORKING_BYTES = 1e9  # what encoding and searching take of a GPU beside model and index, at the least


def build_shard(
    negatives: NegativesSettings,
    encoder: EncoderSettings,
    corpus: Corpus,
    *,
    plan: IndexPlan,
    number: int = 0,
    count: int = 1,
    threads: int = 1,
    device: torch.device | None = None,
    cache_dir: str | None = None,
) -> IndexShard:
    """Load an encoder of its own for a shard; its weights are replaced at every build. It indexes the rows' targets.

    The encoder works as in training but for dropout: with the head, if the objective sees vectors behind it, and in
    bf16 where training computes in it. Anchors to search with are queries.

    Args:
        negatives: batch size of encoding, and where the index may spill to disk.
        encoder: which encoder.
        corpus: all rows; the shard takes its part.
        plan: the shard's index.
        number: which shard.
        count: how many shards there are.
        threads: CPU threads of one search.
        device: of the encoder, and of the index if it was planned for a GPU; default: the CPU.
        cache_dir: the setting ``corpus.cache_dir``.

    Raises:
        ModelError: the encoder cannot be loaded.
        ClusterError: the index does not fit beside it on the GPU.
        StorageError: there is no place on disk for the index.
    """
    device = device or torch.device("cpu")
    model = load_encoder(encoder.model, encoder, device=device)
    model.keep_head()
    model.inference_autocast = model.autocast
    if plan.on_gpu:
        free, total = torch.cuda.mem_get_info(device)
        taken = torch.cuda.memory_reserved(device)
        plan = plan_for_gpu(negatives, plan, free_bytes=free, total_bytes=total, taken_bytes=taken)

    def keys(ids: NDArray[np.int64]) -> NDArray[np.int64]:
        documents = [] if corpus.documents is None else [corpus.documents[ids][:, None]]
        return np.concatenate([corpus.contents(ids), *documents], axis=1)

    def read_words() -> LexicalIndex:
        parts = (np.arange(at, min(at + _READ_ROWS, len(corpus))) for at in range(0, len(corpus), _READ_ROWS))
        texts = (text for ids in parts for text in corpus.target_texts(ids))
        own = keys(np.arange(number, len(corpus), count))
        return LexicalIndex(texts, keys_nc=own, number=number, count=count)

    return IndexShard(
        number=number,
        count=count,
        lengths=corpus.target_lengths,
        encode=lambda ids: model.encode_rows(corpus.targets(ids), side=corpus.target_side, unit_norm=True),
        load_weights=lambda weights: model.load_weights(from_arrays(weights)),
        encode_anchors=lambda rows: model.encode_rows(rows, side="query", unit_norm=True),
        read_words=read_words,
        keys=keys,
        plan=plan,
        device=device if plan.on_gpu else torch.device("cpu"),
        batch_size=negatives.encode_batch_size or _ENCODE_BATCH[device.type == "cuda"],
        encode_ahead=1 + (device.type == "cuda"),
        threads=threads,
        folder=_index_folder(negatives, cache_dir) if plan.bytes_on_disk else None,
    )


def plan_for_gpu(
    negatives: NegativesSettings, plan: IndexPlan, *, free_bytes: float, total_bytes: float, taken_bytes: float
) -> IndexPlan:
    """Plan a shard's index for the GPU that it is on, whose memory nobody else could know.

    Args:
        negatives: which index, and the part of the GPU that is the shard's.
        plan: of the largest shard, its memory not yet bounded.
        free_bytes: of the GPU, its encoder loaded.
        total_bytes: of the GPU.
        taken_bytes: by this process.

    Raises:
        ClusterError: it does not fit; the message does the sum.
    """
    part = min(1.0, negatives.gpus_per_shard) or _PART_BESIDE_TRAINER
    return plan_index(
        negatives.index,
        rows=plan.rows,
        dimension=plan.dimension,
        memory_bytes=max(0.0, min(free_bytes, part * total_bytes - taken_bytes) - _GPU_WORKING_BYTES),
        nprobe=negatives.nprobe,
        on_gpu=True,
    )


def _index_folder(negatives: NegativesSettings, cache_dir: str | None) -> Path:
    folder = Path(negatives.index_dir).expanduser() if negatives.index_dir else cache_folder(cache_dir) / "index"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot be written ({error.strerror})", str(folder), "Set negatives.index_dir") from error
    return folder


def in_process_source(
    settings: Settings, corpus: Corpus, *, plan: IndexPlan, threads: int, device: torch.device
) -> InProcessSource:
    """Make a source of global negatives in this process: one shard with all rows, beside the trainer.

    Args:
        settings: of the run.
        corpus: its rows.
        plan: the index.
        threads: CPU threads of one search.
        device: of the trainer, and of the encoder that makes the vectors.

    Raises:
        HncseError: see :func:`build_shard`.
    """
    shard = build_shard(
        settings.negatives,
        settings.encoder,
        corpus,
        plan=plan,
        threads=threads,
        device=device,
        cache_dir=settings.corpus.cache_dir,
    )
    return InProcessSource(shard, corpus_digest=corpus.digest, rows=len(corpus))
