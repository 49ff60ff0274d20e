"""A tiny real encoder and sentences for it."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = (
    "the a one some every river mountain city garden old young quiet bright dark small large man woman child teacher "
    "doctor walks runs sleeps reads writes sings builds breaks opens closes near under over behind beside with without "
    "slowly quickly often never always today house book letter song bridge door window stone tree water light"
).split()


def make_sentences(count: int, seed: int = 0) -> list[str]:
    """Return distinct sentences of 4 to 20 words."""
    generator = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(generator.choices(WORDS, k=generator.randint(4, 20))) + "."] = None
    return list(found)


def make_tokenizer(*, padding: int = 0, lowercase: bool = True, max_length: int = 64) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer; ``padding`` is the id of its padding token."""
    vocabulary = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *WORDS]
    vocabulary.insert(padding, "[PAD]")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, vocabulary.index(token)) for token in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=max_length,
    )


def make_model(folder: Path, *, width: int = 32, layers: int = 2, dropout: float = 0.1) -> Path:
    """Save a tiny BERT with random weights and a word-level tokenizer."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
