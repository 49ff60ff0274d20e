"""Text to unique rows to token rows on disk, and from there to batches."""

from hncse_ray.corpus.batches import BatchPlan, RowLengths, batch_mask, pad_rows, rank_slice
from hncse_ray.corpus.corpus import Corpus, PrepareReport
from hncse_ray.corpus.order import Shuffled
from hncse_ray.corpus.prepare import WriteRows, prepare_corpus
from hncse_ray.corpus.python_code import scored_code_pairs
from hncse_ray.corpus.python_docs import docstring_sentences, documentation_pairs
from hncse_ray.corpus.rows import OwnTokens, Tokenize
from hncse_ray.corpus.sentences import sentences_or_runs, split_sentences
from hncse_ray.corpus.text import normalise, row_hash

__all__ = [
    "BatchPlan",
    "Corpus",
    "OwnTokens",
    "PrepareReport",
    "RowLengths",
    "Shuffled",
    "Tokenize",
    "WriteRows",
    "batch_mask",
    "docstring_sentences",
    "documentation_pairs",
    "normalise",
    "pad_rows",
    "prepare_corpus",
    "rank_slice",
    "row_hash",
    "scored_code_pairs",
    "sentences_or_runs",
    "split_sentences",
]
