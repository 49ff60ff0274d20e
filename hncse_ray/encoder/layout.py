"""Encoders on disk, in the folder layout of sentence-transformers.

``modules.json`` names the stages: Transformer, Pooling, then (where inference uses it) Dense, then Normalize.
``first_last_mean`` and ``last_two_mean`` are a WeightedLayerPooling before the Pooling. The module types are
written under the names that every sentence-transformers from 2.0 on understands.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from hncse_ray.config import EncoderSettings, Pooling
from hncse_ray.encoder.dropout import replace_dropout
from hncse_ray.encoder.encoder import SentenceEncoder
from hncse_ray.encoder.precision import autocast_dtype
from hncse_ray.encoder.resolve import resolve_model
from hncse_ray.encoder.usage import model_readme
from hncse_ray.errors import ModelError

logger = logging.getLogger(__name__)

_TYPES = "sentence_transformers.models"
# The names under which model families keep their dropout rates.
_DROPOUT_KEYS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "hidden_dropout",
    "dropout_rate", "embedding_dropout", "mlp_dropout", "activation_dropout",
)  # fmt: skip
_HEAD_INIT_STD = 0.02  # BERT's initializer_range, which the published SimCSE code applies to its head


def load_encoder(
    model: str | Path, settings: EncoderSettings | None = None, *, device: str | torch.device = "cpu", seed: int = 0
) -> SentenceEncoder:
    """Load an encoder, ready to encode.

    Args:
        model: see :func:`hncse_ray.encoder.resolve.resolve_model`.
        settings: pooling, head, dropout and precision; None = all as the model's folder says.
        device: where to put the weights.
        seed: of a new head's initial weights.

    Raises:
        ModelError: the model is missing, incomplete, or not an encoder; or its pooling is not known.
    """
    settings = settings or EncoderSettings(model=str(model))
    folder = resolve_model(model)
    device = torch.device(device)
    stored = _StoredStages.read(folder)
    pooling = stored.pooling if settings.pooling == "auto" else settings.pooling
    if pooling is None:
        raise ModelError(
            "the folder does not say how its token states are pooled",
            str(model),
            "Set encoder.pooling, e.g. mean or cls",
        )
    backbone = _load_backbone(folder, settings, str(model))
    replace_dropout(backbone)
    tokenizer = _load_tokenizer(folder, backbone, settings, str(model))
    head = stored.load_head(folder)
    if head is None and settings.head == "tanh":
        head = _new_head(int(backbone.config.hidden_size), seed)
    keeps_head = stored.dense_path is not None
    encoder = SentenceEncoder(
        backbone,
        tokenizer,
        pooling=pooling,
        head=head,
        head_in_training_only=settings.head_in_training_only and not keeps_head,
        autocast=autocast_dtype(settings.precision, device)[0],
    )
    limit = length_limit(encoder)
    encoder.max_length = min(settings.inference_max_length or stored.max_length or limit, limit)
    return encoder.to(device).eval()


def save_encoder(encoder: SentenceEncoder, folder: Path, *, readme: str | None = None) -> None:
    """Write an encoder so that ``SentenceTransformer(folder)`` and :func:`load_encoder` give its vectors.

    Args:
        encoder: what to save; a head used in training only is left out.
        folder: an existing, empty folder; the caller makes the write atomic.
        readme: the text of README.md; default: how to load the model.
    """
    width = encoder.dimension
    backbone_config = encoder.backbone.config
    layered = encoder.pooling in ("first_last_mean", "last_two_mean")
    backbone_config.output_hidden_states = layered
    with _no_bars():
        encoder.backbone.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": encoder.max_length, "do_lower_case": False})
    stages: list[tuple[str, str]] = [("Transformer", "")]
    if layered:
        stages.append(("WeightedLayerPooling", _write_layer_weights(encoder, folder)))
    mode = "cls" if encoder.pooling in ("cls", "cls_before_head") else "mean"
    _stage_folder(
        folder,
        "1_Pooling",
        {
            "word_embedding_dimension": width,
            "pooling_mode_cls_token": mode == "cls",
            "pooling_mode_mean_tokens": mode == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    )
    stages.append(("Pooling", "1_Pooling"))
    if encoder.head is not None and not encoder.head_in_training_only:
        dense = {
            "in_features": width,
            "out_features": width,
            "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh",
        }
        _stage_folder(folder, "2_Dense", dense)
        weights = {f"linear.{name}": value.cpu().contiguous() for name, value in encoder.head.state_dict().items()}
        save_file(weights, folder / "2_Dense" / "model.safetensors")
        stages.append(("Dense", "2_Dense"))
    (folder / "3_Normalize").mkdir()
    stages.append(("Normalize", "3_Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"{_TYPES}.{kind}"} for i, (kind, path) in enumerate(stages)
    ]
    _write_json(folder / "modules.json", modules)
    _write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})
    (folder / "README.md").write_text(readme or model_readme(encoder), encoding="utf-8")


class _StoredStages:
    """What a folder's modules.json says about pooling and head; nothing where there is no such file."""

    def __init__(self, pooling: Pooling | None, dense_path: str | None, max_length: int | None) -> None:
        self.pooling = pooling
        self.dense_path = dense_path
        self.max_length = max_length

    @classmethod
    def read(cls, folder: Path) -> _StoredStages:
        if not (folder / "modules.json").is_file():
            return cls(None, None, None)
        stages = {m["type"].rpartition(".")[2]: m["path"] for m in _read_json(folder / "modules.json")}
        unknown = set(stages) - {"Transformer", "Pooling", "Dense", "Normalize", "WeightedLayerPooling"}
        if unknown:
            raise ModelError(f"has a stage that is not supported: {', '.join(sorted(unknown))}", str(folder))
        config = _read_json(folder / stages["Pooling"] / "config.json") if "Pooling" in stages else {}
        active = {key.removeprefix("pooling_mode_") for key, value in config.items() if value is True} | {
            str(config.get("pooling_mode"))
        }
        pooling: Pooling | None = "mean" if active & {"mean_tokens", "mean"} else None
        if active & {"cls_token", "cls"}:
            pooling = "cls"
        if "WeightedLayerPooling" in stages:
            pooling = _layered_pooling(folder / stages["WeightedLayerPooling"])
        length = None
        if (folder / "sentence_bert_config.json").is_file():
            length = _read_json(folder / "sentence_bert_config.json").get("max_seq_length")
        return cls(pooling, stages.get("Dense"), length)

    def load_head(self, folder: Path) -> nn.Linear | None:
        if self.dense_path is None:
            return None
        stage = folder / self.dense_path
        config = _read_json(stage / "config.json")
        square = config["in_features"] == config["out_features"]
        if not square or not str(config["activation_function"]).endswith("Tanh") or not config.get("bias", True):
            raise ModelError("its Dense stage is not a square layer with bias and tanh", str(stage))
        if not (stage / "model.safetensors").is_file():
            raise ModelError("its Dense stage has no safetensors weights", str(stage))
        head = nn.Linear(config["in_features"], config["out_features"])
        weights = load_file(stage / "model.safetensors")
        head.load_state_dict({name.removeprefix("linear."): value for name, value in weights.items()})
        return head


def _load_backbone(folder: Path, settings: EncoderSettings, name: str) -> PreTrainedModel:
    if not (folder / "config.json").is_file():
        raise ModelError("the folder has no config.json, so it is not a transformers model", name)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"its config.json cannot be used ({_first_line(error)})", name) from error
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
        raise ModelError(f"{config.model_type!r} is not a bidirectional encoder", name)
    _set_dropout(config, settings.dropout, name)
    try:
        with _no_bars():
            backbone, info = AutoModel.from_pretrained(
                folder,
                config=config,
                attn_implementation="sdpa",
                use_safetensors=True,
                dtype=torch.float32,
                trust_remote_code=settings.trust_remote_code,
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises a dozen types for a broken folder; each means the same to a user
        hint = ""
        if (folder / "pytorch_model.bin").exists() and not list(folder.glob("*.safetensors")):
            hint = "Only pytorch_model.bin is there, a pickle: convert it to safetensors first"
        raise ModelError(f"its weights cannot be loaded ({_first_line(error)})", name, hint) from error
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ModelError(
            f"its weights lack {len(missing)} tensors of a {config.model_type}, first {missing[0]!r}", name
        )
    loaded: PreTrainedModel = backbone
    return loaded


def _load_tokenizer(
    folder: Path, backbone: PreTrainedModel, settings: EncoderSettings, name: str
) -> PreTrainedTokenizerFast:
    files = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model")
    if not any((folder / file).is_file() for file in files):
        raise ModelError(
            "the folder has no tokenizer", name, f"It needs tokenizer.json (or one of {', '.join(files[1:])})"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    except Exception as error:  # as above: broken files surface as many types
        raise ModelError(f"its tokenizer cannot be loaded ({_first_line(error)})", name) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError("its tokenizer has no fast version (tokenizer.json)", name)
    if tokenizer.pad_token_id is None:
        raise ModelError("its tokenizer has no padding token", name)
    embedded = int(backbone.config.vocab_size)
    if len(tokenizer) > embedded:
        raise ModelError(
            f"its tokenizer has {len(tokenizer)} entries but the model embeds {embedded}: they do not belong together",
            name,
        )
    return tokenizer


def _set_dropout(config: PreTrainedConfig, rate: float | None, name: str) -> None:
    keys = [key for key in _DROPOUT_KEYS if isinstance(getattr(config, key, None), float | int)]
    if rate is not None:
        if not keys:
            raise ModelError(
                f"{config.model_type!r} has no dropout setting that is known here", name, "Unset encoder.dropout"
            )
        for key in keys:
            setattr(config, key, rate)


def has_dropout(encoder: SentenceEncoder) -> bool:
    """Return whether two passes of a sentence in training mode can differ at all."""
    config: Any = encoder.backbone.config
    return any((getattr(config, key, 0) or 0) > 0 for key in _DROPOUT_KEYS)


def length_limit(encoder: SentenceEncoder) -> int:
    """Return how many tokens a text may have for the model's position embeddings and its tokenizer."""
    config: Any = encoder.backbone.config
    positions = int(getattr(config, "max_position_embeddings", 512))
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= 2  # these count positions from the padding index on
    return min(positions, int(encoder.tokenizer.model_max_length))


def _new_head(width: int, seed: int) -> nn.Linear:
    head = nn.Linear(width, width)
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(head.weight, std=_HEAD_INIT_STD, generator=generator)
    nn.init.zeros_(head.bias)
    return head


def _layered_pooling(stage: Path) -> Pooling:
    config = _read_json(stage / "config.json")
    weights = load_file(stage / "model.safetensors")["layer_weights"]
    used = [int(config["layer_start"]) + i for i, w in enumerate(weights.tolist()) if w != 0]
    last = int(config["num_hidden_layers"])
    if used == [0, last]:
        return "first_last_mean"
    if used == [last - 1, last]:
        return "last_two_mean"
    raise ModelError(f"its WeightedLayerPooling over layers {used} is not supported", str(stage))


def _write_layer_weights(encoder: SentenceEncoder, folder: Path) -> str:
    last = int(encoder.backbone.config.num_hidden_layers)
    used = {"first_last_mean": {0, last}, "last_two_mean": {last - 1, last}}[encoder.pooling]
    stage = "1_WeightedLayerPooling"
    _stage_folder(
        folder, stage, {"word_embedding_dimension": encoder.dimension, "layer_start": 0, "num_hidden_layers": last}
    )
    weights = torch.tensor([float(layer in used) for layer in range(last + 1)])
    save_file({"layer_weights": weights}, folder / stage / "model.safetensors")
    return stage


def _stage_folder(folder: Path, name: str, config: dict[str, Any]) -> None:
    (folder / name).mkdir()
    _write_json(folder / name / "config.json", config)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot be read ({error})", str(path)) from error


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep the bars of transformers, which last a blink for local files, out of the user's terminal."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
