"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) by peft."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from hncse_ray.config import LoraSettings
from hncse_ray.encoder.head import HEAD
from hncse_ray.errors import ModelError


def add_adapters(model: SentenceTransformer, settings: LoraSettings, *, seed: int, name: str) -> None:
    """Put adapters beside a transformer's linear layers and freeze all else of the model, but for a new head.

    Args:
        model: gets them; the vectors stay the same until they are trained.
        settings: their size, and beside which layers.
        seed: of their initial weights.
        name: of the model, for errors.

    Raises:
        ModelError: peft is not installed, or the model has no such layers.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModelError("encoder.lora needs peft", name, "pip install 'hncse-ray[lora]'")
    from peft import LoraConfig, get_peft_model

    for stage_name, stage in model.named_children():  # a Dense stage of the model's own, say
        if stage_name != HEAD:
            stage.requires_grad_(False)
    transformer: Any = model[0]
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # a number that only divides
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules) or "all-linear",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's own use of transformers
        torch.manual_seed(seed)
        try:
            transformer.model = get_peft_model(transformer.model, config)
        except ValueError as error:  # peft's word for modules that are not there, or are of a kind that it cannot adapt
            layers = {n.rpartition(".")[2] for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)}
            raise ModelError(f"encoder.lora.target_modules: {str(error).partition('. ')[0].rstrip('.')}", name,
                             f"Its linear layers are {', '.join(sorted(layers))}") from error  # fmt: skip


def has_adapters(model: SentenceTransformer) -> bool:
    """Return whether only adapters of a model are trained."""
    return hasattr(model[0].model, "peft_config")
