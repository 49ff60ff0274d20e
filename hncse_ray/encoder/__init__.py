"""Backbone, pooling and head; bulk encoding; models on disk in the layout of sentence-transformers."""

from hncse_ray.encoder.encoder import Progress, SentenceEncoder, length_batches, tokenizer_digest
from hncse_ray.encoder.layout import has_dropout, length_limit, load_encoder, save_encoder
from hncse_ray.encoder.precision import autocast_dtype
from hncse_ray.encoder.resolve import resolve_model
from hncse_ray.encoder.source_card import SourceCard, hub_name, read_source_card
from hncse_ray.encoder.usage import usage

__all__ = [
    "Progress",
    "SentenceEncoder",
    "SourceCard",
    "autocast_dtype",
    "has_dropout",
    "hub_name",
    "length_batches",
    "length_limit",
    "load_encoder",
    "read_source_card",
    "resolve_model",
    "save_encoder",
    "tokenizer_digest",
    "usage",
]
