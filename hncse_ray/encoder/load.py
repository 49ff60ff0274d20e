"""Loading an encoder by sentence-transformers, changed as the settings ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling, WeightedLayerPooling
from sentence_transformers.util import batch_to_device
from torch import nn
from transformers import AutoConfig

from hncse_ray.config import EncoderSettings
from hncse_ray.encoder.adapters import add_adapters
from hncse_ray.encoder.encoder import SentenceEncoder
from hncse_ray.encoder.hardware import choose_device, keep_large_blocks
from hncse_ray.encoder.head import HEAD, add_head
from hncse_ray.encoder.layers import use_fast_layers
from hncse_ray.encoder.quiet import quiet
from hncse_ray.encoder.resolve import check_weights, resolve_model
from hncse_ray.errors import ModelError, counted, first_line

_LAYER_MEANS = {"first_last_mean": (0, -1), "last_two_mean": (-2, -1)}
_CAUSAL_POOLING = ("lasttoken", "weightedmean")


def load_encoder(
    model: str | Path, settings: EncoderSettings | None = None, *, device: str | torch.device = "cpu", seed: int = 0
) -> SentenceEncoder:
    """Load an encoder, ready to encode.

    Example::

        encoder = hncse_ray.load_encoder("runs/mine/model")
        vectors = encoder.encode(["A query."], side="query")  # [1, D]; the side decides the prompt

    Args:
        model: a folder, a name on the hub, or ``package:NAME/FOLDER``.
        settings: pooling, prompts, head, dropout and precision; None = all as the model's folder says.
        device: where to put the weights; see :func:`hncse_ray.encoder.choose_device`.
        seed: of a new head's initial weights.

    Raises:
        ModelError: the model is missing, incomplete, or not an encoder of text, or the settings do not fit it.
    """
    if not isinstance(settings, EncoderSettings | None):
        raise TypeError(
            f"settings is of type {type(settings).__name__}; give EncoderSettings, such as settings.encoder"
        )
    device, name = choose_device(device), str(model)
    folder = resolve_model(model, revision=settings.revision if settings else None)
    settings = settings or EncoderSettings(model=name)
    loaded = _load(folder, settings, name)
    backbone: Any = loaded.transformers_model
    _check_stages(loaded, backbone, name)
    _check_complete(loaded, backbone, name)
    _set_prompts(loaded, settings, name)
    _set_pooling(loaded, settings.pooling, told=(folder / "modules.json").is_file(), name=name)
    if settings.head == "tanh":
        if HEAD in loaded._modules:
            raise ModelError("has a head already, which encoder.head=tanh would replace by a new one", name,
                             "Set encoder.head=none: its own is trained and exported")  # fmt: skip
        add_head(loaded, training_only=settings.head_in_training_only, seed=seed)
    if settings.lora is not None:
        add_adapters(loaded, settings.lora, seed=seed, name=name)
    use_fast_layers(loaded)
    if device.type == "cpu":
        keep_large_blocks()
    if settings.gradient_checkpointing:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
    return SentenceEncoder(
        loaded.to(device),
        name=name,
        max_length=settings.inference_max_length,
        precision=settings.precision,
        inference_precision=settings.inference_precision,
    )


def has_dropout(encoder: SentenceEncoder) -> bool:
    """Return whether two passes of a sentence in training mode can differ at all."""
    features = encoder.features(encoder.tokenize(["Does this sentence get the same vector twice?"]))
    was_training = encoder.training
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        encoder.train()
        first, second = encoder(features), encoder(features)
        encoder.train(was_training)
    return not torch.equal(first, second)


def _load(folder: Path, settings: EncoderSettings, name: str) -> SentenceTransformer:
    check_weights(folder, name)
    config: dict[str, Any] = {} if settings.dropout is None else _dropout_config(folder, settings, name)
    try:
        with quiet():
            return SentenceTransformer(
                str(folder),
                device="cpu",
                trust_remote_code=settings.trust_remote_code,
                local_files_only=True,
                model_kwargs={"use_safetensors": True, "dtype": torch.float32},
                config_kwargs=config,
            )
    except Exception as error:  # the two libraries raise a dozen types, which mean the same to a user
        hint = "Fetch or copy it anew"
        if "trust_remote_code" in str(error) and not settings.trust_remote_code:
            hint = "It comes with code of its own: read it, then set encoder.trust_remote_code=true"
        elif (folder / "modules.json").is_file():
            hint = "Its JSON files must be whole, and every stage in modules.json have a folder and a known class"
        raise ModelError(f"cannot be loaded ({first_line(error)})", name, hint) from error


def _dropout_config(folder: Path, settings: EncoderSettings, name: str) -> dict[str, float | None]:
    """Return the dropout rates of a model's configuration, all set to ``encoder.dropout``."""
    path = folder / "modules.json"
    try:
        stages = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else [{"path": ""}]
        config = AutoConfig.from_pretrained(
            folder / stages[0]["path"], trust_remote_code=settings.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"its configuration cannot be used ({first_line(error)})", name) from error
    rates = {
        key: settings.dropout
        for key, value in config.to_dict().items()
        if ("drop" in key and "layer" not in key) and isinstance(value, int | float) and not isinstance(value, bool)
    }
    if not rates:
        raise ModelError(f"{config.model_type!r} has no dropout that could be set", name, "Unset encoder.dropout")
    return rates


def _check_stages(model: SentenceTransformer, backbone: Any, name: str) -> None:
    if not isinstance(model[0], Transformer):
        raise ModelError(f"its first stage is a {type(model[0]).__name__}, not a transformer", name)
    config = model[0].config
    if getattr(config, "is_encoder_decoder", False) and backbone.get_decoder() is not None:
        raise ModelError(f"{config.model_type!r} has a decoder beside its encoder, which is not supported", name)
    tokenizer = model.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError("its tokenizer has no fast version (tokenizer.json)", name)
    if tokenizer.pad_token_id is None:
        end = getattr(tokenizer, "eos_token", None) or getattr(tokenizer, "unk_token", None)
        raise ModelError("its tokenizer has no padding token", name,
                         f"Set pad_token in its tokenizer_config.json, such as to {end!r}")  # fmt: skip
    if len(tokenizer) - len(set(tokenizer.all_special_ids)) < 2:  # transformers makes an empty one where it finds none
        raise ModelError("its tokenizer knows no word", name, "A tokenizer.json is missing in its folder, or empty")
    embedded = backbone.get_input_embeddings().num_embeddings
    if len(tokenizer) > embedded:
        raise ModelError(
            f"its tokenizer has {len(tokenizer)} entries but the model embeds {embedded}: they do not belong together",
            name,
        )
    for stage in model:
        if isinstance(stage, WeightedLayerPooling):
            stage.requires_grad_(False)  # a mean over certain layers, not something to learn


def _check_complete(model: SentenceTransformer, backbone: Any, name: str) -> None:
    """Refuse a model without some of the weights that its vectors depend on: transformers draws them at random."""
    drawn = {
        key: value for key, value in backbone.named_parameters() if not getattr(value, "_is_hf_initialized", False)
    }
    used = _used(model) if drawn else set()
    if lacking := sorted(key for key, value in drawn.items() if value in used):
        raise ModelError(f"its weights lack {counted(len(lacking), 'tensor')}, first {lacking[0]!r}", name,
                         "Its config.json is of another model, or its weights are not whole")  # fmt: skip


def _set_prompts(model: SentenceTransformer, settings: EncoderSettings, name: str) -> None:
    known = ", ".join(sorted(model.prompts))  # `query` and `document` are always among them
    if unknown := sorted(set(settings.prompts) - set(model.prompts)):
        raise ModelError(f"encoder.prompts names {unknown[0]!r}, which nothing asks for", name, f"Known are {known}")
    model.prompts |= settings.prompts
    if settings.default_prompt is not None:
        if settings.default_prompt not in model.prompts:
            raise ModelError(f"encoder.default_prompt is {settings.default_prompt!r}, which is none of its prompts",
                             name, f"It has {known}")  # fmt: skip
        model.default_prompt_name = settings.default_prompt


def _set_pooling(model: SentenceTransformer, pooling: str, *, told: bool, name: str) -> None:
    """Pool as asked for, or as the folder says; where it says nothing, as the kind of attention asks for.

    Args:
        model: gets the stage.
        pooling: the setting ``encoder.pooling``.
        told: whether the folder says how to pool.
        name: of the model, for errors.
    """
    stages = list(model._modules.items())
    pools = [(i, stage) for i, (_, stage) in enumerate(stages) if isinstance(stage, Pooling)]
    if len(pools) != 1:
        if pooling != "auto":
            raise ModelError(f"has {len(pools)} Pooling stages, so encoder.pooling cannot be set", name)
        return
    ((place, stage),) = pools
    causal = _is_causal(model)
    if pooling == "auto" and not told and causal:
        pooling = "lasttoken"
    used = stage.pooling_mode if pooling == "auto" else pooling
    if causal and ("cls" in used if pooling == "auto" else used not in _CAUSAL_POOLING):
        raise ModelError(f"its attention is causal: a token sees only those before it, so pooling {used!r} would miss"
                         " the text", name, "Set encoder.pooling=lasttoken")  # fmt: skip
    if pooling == "auto":
        return
    config: Any = model.config
    mode = "mean" if pooling in _LAYER_MEANS else pooling
    new: list[tuple[str, nn.Module]] = [
        (stages[place][0], Pooling(stage.embedding_dimension, mode, include_prompt=stage.include_prompt))
    ]
    if pooling in _LAYER_MEANS:
        config.output_hidden_states = True
        weights = torch.zeros(int(config.num_hidden_layers) + 1)
        weights[list(_LAYER_MEANS[pooling])] = 1
        new.insert(0, ("layers", WeightedLayerPooling(
            stage.embedding_dimension, num_hidden_layers=len(weights) - 1, layer_start=0,
            layer_weights=nn.Parameter(weights, requires_grad=False),
        )))  # fmt: skip
    model._modules = dict([*stages[:place], *new, *stages[place + 1 :]])


@torch.no_grad()
def _is_causal(model: SentenceTransformer) -> bool:
    """Return whether the first token's state ignores what follows it."""
    model.eval()
    token = int(model.tokenizer.pad_token_id)
    ids = torch.tensor([[token, token, token], [token, token, (token + 1) % len(model.tokenizer)]])
    states = model[0]({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["token_embeddings"]
    return bool(torch.allclose(states[0, 0], states[1, 0], atol=1e-6))


def freeze_unused(encoder: SentenceEncoder) -> None:
    """Freeze weights that no embedding depends on, such as BERT's pooler: several ranks would wait for their gradient.

    They stay in the model, so that what is saved is complete.
    """
    encoder.keep_head()
    used = _used(encoder.model)
    encoder.keep_head(False)
    for parameter in encoder.parameters():
        parameter.requires_grad_(parameter in used)


def _used(model: SentenceTransformer) -> set[nn.Parameter]:
    """Return the trainable weights that an embedding depends on."""
    features = batch_to_device(model.preprocess(["Which weights does this sentence pass?"]), model.device)
    model(features)["sentence_embedding"].sum().backward()
    used = {parameter for parameter in model.parameters() if parameter.grad is not None}
    model.zero_grad()
    return used
