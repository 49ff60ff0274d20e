"""Backbone, pooling and head; bulk encoding; models on disk in the layout of sentence-transformers."""

from hncse_ray.encoder.encoder import SentenceEncoder, length_batches, tokenizer_digest
from hncse_ray.encoder.layout import has_dropout, length_limit, load_encoder, save_encoder
from hncse_ray.encoder.precision import autocast_dtype
from hncse_ray.encoder.resolve import resolve_model

__all__ = [
    "SentenceEncoder",
    "autocast_dtype",
    "has_dropout",
    "length_batches",
    "length_limit",
    "load_encoder",
    "resolve_model",
    "save_encoder",
    "tokenizer_digest",
]
