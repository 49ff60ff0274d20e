"""How a shard of the index is made of an encoder and a corpus."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from hncse_ray.config import EncoderSettings, NegativesSettings
from hncse_ray.corpus import Corpus
from hncse_ray.encoder import load_encoder
from hncse_ray.negatives import IndexPlan, Weights
from hncse_ray.negatives.shard import IndexShard

_ENCODE_BATCH = (128, 1024)  # rows encoded at a time on CPUs, and on a GPU


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
    folder: Path | None = None,
) -> IndexShard:
    """Load an encoder of its own for a shard; its weights are replaced at every build.

    The encoder works as in training but for dropout: with the head, if the objective sees vectors behind it, and in
    bf16 where training computes in it.

    Args:
        negatives: batch size of encoding.
        encoder: which encoder.
        corpus: all rows; the shard takes its part.
        plan: the shard's index.
        number: which shard.
        count: how many shards there are.
        threads: CPU threads of one search.
        device: of the encoder, and of the index if it was planned for a GPU; default: the CPU.
        folder: where index kinds that spill to disk may do so.

    Raises:
        ModelError: the encoder cannot be loaded.
    """
    device = device or torch.device("cpu")
    model = load_encoder(encoder.model, encoder, device=device)
    model.keep_head()
    model.inference_autocast = model.autocast

    def load_weights(weights: Weights) -> None:
        model.load_weights({name: torch.tensor(np.asarray(array)) for name, array in weights.items()})

    return IndexShard(
        number=number,
        count=count,
        lengths=corpus.lengths,
        encode=lambda ids: model.encode_rows(corpus.token_rows(ids), unit_norm=True),
        load_weights=load_weights,
        plan=plan,
        device=device if plan.on_gpu else torch.device("cpu"),
        batch_size=negatives.encode_batch_size or _ENCODE_BATCH[device.type == "cuda"],
        encode_ahead=1 + (device.type == "cuda"),
        threads=threads,
        folder=folder,
    )
