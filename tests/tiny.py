"""A tiny real encoder, sentences and a search collection for it, and the settings of a small run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

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


def make_collection(folder: Path, *, splits: tuple[str, ...] = ("dev", "test"), seed: int = 0) -> Path:
    """Write 60 documents, half of them with a title, and 8 queries a split: some words of each of two documents."""
    documents = make_sentences(60, seed=seed + 100)
    generator = random.Random(seed)
    rows = [{"_id": f"d{i}", "title": "" if i % 2 else f"title {i}", "text": text} for i, text in enumerate(documents)]
    queries, judgements = [], {split: ["query-id\tcorpus-id\tscore"] for split in splits}
    for number, split in enumerate(split for split in splits for _ in range(8)):
        right = generator.sample(range(60), 2)
        words = [word for i in right for word in documents[i].rstrip(".").split()[::2]]
        queries.append({"_id": f"q{number}", "text": " ".join(words)})
        judgements[split] += [f"q{number}\td{right[0]}\t2", f"q{number}\td{right[1]}\t1", f"q{number}\td{number}\t0"]
        if number in right:
            judgements[split].pop()
    (folder / "qrels").mkdir(parents=True)
    for name, lines in (("corpus", rows), ("queries", queries)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    for split, judged in judgements.items():
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(judged) + "\n", encoding="utf-8")
    return folder


def make_topics(folder: Path, count: int = 90, *, seed: int = 0) -> Path:
    """Write documents of four sentences, each about five words of its own."""
    generator = random.Random(seed)
    folder.mkdir(parents=True)
    for number in range(count):
        words = generator.sample(WORDS, 5)
        sentences = [" ".join(generator.choices([*words, *words, *WORDS], k=9)).capitalize() for _ in range(4)]
        (folder / f"{number:03d}.txt").write_text(". ".join(sentences) + ".", encoding="utf-8")
    return folder


def make_tokenizer(
    *, padding: int = 0, lowercase: bool = True, max_length: int = 64, decoder: bool = False
) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer whose padding has a certain id; of a decoder with an end token only."""
    vocabulary = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *WORDS]
    vocabulary.insert(padding, "[PAD]")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP]" if decoder else "[CLS] $A [SEP]",
        special_tokens=[(token, vocabulary.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    named = {"eos_token": "[SEP]"} if decoder else {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=max_length,
        **named,
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


def small_settings(model: Path | str, corpus: Path | str, pairs: Path | str, folder: Path) -> dict[str, Any]:
    """Return the settings of a run that takes a second: 12 steps of 16 sentences."""
    return {
        "run": {"name": "small", "storage_path": str(folder / "runs"), "seed": 3},
        "corpus": {"path": str(corpus), "cache_dir": str(folder / "cache")},
        "encoder": {"model": str(model), "pooling": "mean", "max_length": 24, "precision": "fp32"},
        "objective": {"name": "hybrid"},
        "train": {
            "batch_size": 16,
            "learning_rate": 1e-3,
            "max_steps": 12,
            "log_every_steps": 1,
            "evaluate_every_steps": 4,
            "checkpoint_every_steps": 4,
        },
        "evaluation": {
            "suites": ["pairs"],
            "metric": "pairs/recall@1",
            "pairs_dev": str(pairs),
            "pairs_test": str(pairs),
        },
    }
