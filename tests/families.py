"""Tiny models with random weights, of many architectures that transformers knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import make_tokenizer
from transformers import AutoConfig, AutoModel, T5EncoderModel

LIMIT = 40  # tokens of a text
_BASE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": LIMIT,
}
_DECODER = _BASE | {"num_key_value_heads": 1, "head_dim": 16, "attention_dropout": 0.1, "pad_token_id": 0}
_ROBERTA = {"max_position_embeddings": LIMIT + 4}

# By name: model type, and what its configuration needs beside _BASE.
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "roberta-pad0": ("roberta", _ROBERTA | {"pad_token_id": 0}),
    "roberta-pad1": ("roberta", _ROBERTA | {"pad_token_id": 1}),
    "roberta-pad3": ("roberta", _ROBERTA | {"pad_token_id": 3}),
    "xlm-roberta": ("xlm-roberta", _ROBERTA | {"pad_token_id": 1}),
    "camembert": ("camembert", _ROBERTA | {"pad_token_id": 1}),
    "mpnet": ("mpnet", _ROBERTA | {"pad_token_id": 1}),
    "deberta": ("deberta", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "deberta-v2": ("deberta-v2", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "distilbert": ("distilbert", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}),
    "electra": ("electra", {"embedding_size": 16}),
    "albert": ("albert", {"embedding_size": 16, "hidden_dropout_prob": 0.1}),
    "mobilebert": ("mobilebert", {"embedding_size": 32, "intra_bottleneck_size": 32, "hidden_dropout_prob": 0.1}),
    "convbert": ("convbert", {"embedding_size": 16, "head_ratio": 2, "conv_kernel_size": 3}),
    "longformer": ("longformer", _ROBERTA | {"pad_token_id": 1, "attention_window": 8}),
    "big_bird": ("big_bird", {"attention_type": "original_full"}),
    "roformer": ("roformer", {"embedding_size": 32}),
    "rembert": ("rembert", {"input_embedding_size": 16, "hidden_dropout_prob": 0.1}),
    "modernbert": ("modernbert", {"embedding_dropout": 0.1, "mlp_dropout": 0.1, "local_attention": 16}),
    "nomic_bert": ("nomic_bert", {"hidden_dropout_prob": 0.1}),
    "xmod": ("xmod", _ROBERTA | {"pad_token_id": 1, "languages": ["en_XX"], "default_language": "en_XX"}),
    "data2vec-text": ("data2vec-text", _ROBERTA | {"pad_token_id": 1}),
    "t5": ("t5", {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}),
}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", _DECODER),
    "llama": ("llama", _DECODER),
    "gemma3": ("gemma3_text", _DECODER | {"sliding_window": 16, "query_pre_attn_scalar": 16}),
    "mistral": ("mistral", _DECODER | {"sliding_window": 16}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": LIMIT}),
}
FAMILIES = ENCODERS | DECODERS


def make_family(name: str, folder: Path) -> Path:
    """Save a tiny model of a family, a transformers folder without stages."""
    kind, extra = FAMILIES[name]
    padding = extra.get("pad_token_id", 0)
    tokenizer = make_tokenizer(padding=padding, max_length=LIMIT, decoder=name in DECODERS)
    torch.manual_seed(0)
    wanted = {"vocab_size": len(tokenizer)} | _BASE | extra
    config = AutoConfig.for_model(kind, **wanted)
    config.pad_token_id = tokenizer.pad_token_id
    model = T5EncoderModel(config) if kind == "t5" else AutoModel.from_config(config)
    with torch.no_grad():  # weights of 0.02 would leave all vectors nearly alike
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
