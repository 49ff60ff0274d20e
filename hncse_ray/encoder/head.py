"""The head of SimCSE: a dense layer with tanh after pooling, as a stage of a SentenceTransformer."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from torch import nn

HEAD = "head"  # what the stage is called
_INIT_STD = 0.02  # BERT's initializer_range, which the published SimCSE code applies to its head


class TrainingHead(Dense):
    """A dense layer with tanh that works in training only and is left out of what is saved.

    Source: SimCSE (arXiv 2104.08821, section 6.3), where [CLS] vectors pass it in training and not at test time.

    Attributes:
        always: work outside of training too, as for an index that must see what the objective sees.
    """

    always = False

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Replace ``sentence_embedding`` ``[B, D]``."""
        return super().forward(features) if self.training or self.always else features


def add_head(model: SentenceTransformer, *, training_only: bool, seed: int) -> None:
    """Put a new head behind the pooling, before a closing Normalize.

    Args:
        model: gets the stage.
        training_only: leave it out at inference and export (SimCSE without supervision); else it is a Dense stage.
        seed: of its weights.
    """
    stages = list(model._modules.items())
    place = len(stages) - isinstance(stages[-1][1], Normalize)
    with model.truncate_embeddings(None):
        width = int(model.get_embedding_dimension() or 0)
    head = (TrainingHead if training_only else Dense)(width, width, activation_function=nn.Tanh())
    nn.init.normal_(head.linear.weight, std=_INIT_STD, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.linear.bias)
    model._modules = dict([*stages[:place], (HEAD, head.to(model.device)), *stages[place:]])
