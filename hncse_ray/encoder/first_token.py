"""With cls pooling, the last layer for the first token of each packed row alone.

Its keys and values are of all tokens, but what follows its attention, two thirds of its weights, treats every token
apart and is asked for one of them: an eighth of a training step of six layers (benchmarks/LOG.md).
"""

from __future__ import annotations

import threading
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_FORWARD = threading.local()  # where the rows of a thread's forward begin: an index is made by several threads


def drop_unpooled_tokens(model: SentenceTransformer) -> list[RemovableHandle]:
    """Have the last layer drop all tokens of packed rows that are not pooled, behind its attention.

    It must be built as BERT's is, where ``attention.output`` gets what was attended to and the layer's input. Whether
    the model gives the same vectors then must be tried.

    Returns:
        What takes it back; nothing where nothing was done.
    """
    pools = [(stage.pooling_mode, stage.include_prompt) for stage in model if isinstance(stage, Pooling)]
    attentions = [part for name, part in model[0].named_modules() if name.endswith(".attention")]
    output = getattr(attentions[-1], "output", None) if attentions else None
    if pools != [("cls", True)] or not isinstance(output, nn.Module):
        return []
    return [
        attentions[-1].register_forward_pre_hook(_note_starts, with_kwargs=True),
        output.register_forward_pre_hook(_drop),
        model[0].register_forward_hook(_hand_to_pooling),
    ]


def _note_starts(_: nn.Module, __: Any, options: dict[str, Any]) -> None:
    bounds = options.get("cu_seq_lens_q")
    _FORWARD.starts = None if bounds is None else bounds[:-1]


def _drop(_: nn.Module, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return states if _FORWARD.starts is None else tuple(x.index_select(1, _FORWARD.starts) for x in states)


def _hand_to_pooling(_: nn.Module, __: Any, features: dict[str, Any]) -> None:
    if "cu_seq_lens_q" in features:
        features["cls_token_embeddings"] = features["token_embeddings"][0].float()
