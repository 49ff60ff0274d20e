import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,é"
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", *letters, *(f"##{c}" for c in letters)]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def tokenize_by(tokenizer):
    """Tokenise as an encoder without prompts does."""

    def token_rows(texts, max_length, *, side):
        encoded = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        return [np.asarray(ids, dtype=np.int32) for ids in encoded]

    return token_rows


@pytest.fixture(scope="session")
def tokenize(tokenizer):
    return tokenize_by(tokenizer)


@pytest.fixture
def prepare(tokenizer, tmp_path):
    default = tokenizer

    from hncse_ray.config import CorpusSettings
    from hncse_ray.corpus import prepare_corpus

    def run(
        *,
        max_length=16,
        seed=0,
        tokenizer_digest="tiny",
        progress=None,
        tokenizer=None,
        tokenize=None,
        digests=False,
        **settings,
    ):
        settings.setdefault("cache_dir", str(tmp_path / "cache"))
        return prepare_corpus(
            CorpusSettings(**settings),
            tokenize=tokenize or tokenize_by(tokenizer or default),
            tokenizer_digest=tokenizer_digest,
            max_length=max_length,
            seed=seed,
            progress=progress,
            digests=digests,
        )

    return run
