"""The run's corpus on a node that may not be the driver's."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from hncse_ray.config import CorpusSettings, EncoderSettings, Settings
from hncse_ray.corpus import Corpus, prepare_corpus
from hncse_ray.corpus.cache import cache_folder
from hncse_ray.encoder import load_encoder
from hncse_ray.errors import DataError, StorageError
from hncse_ray.storage import locked


@dataclass(frozen=True)
class NodeCorpus:
    """What a process on any node opens the corpus with.

    Attributes:
        path: its folder on the driver's node.
        digest: which corpus it is, by its source's content, the tokenizer and the settings.
        settings: how to prepare it where that folder is not to be seen.
        encoder: whose tokenizer.
        seed: of the run.
    """

    path: str
    digest: str
    settings: CorpusSettings
    encoder: EncoderSettings
    seed: int

    @classmethod
    def of(cls, corpus: Corpus, settings: Settings) -> NodeCorpus:
        """Describe the driver's corpus."""
        return cls(str(corpus.path.absolute()), corpus.digest, settings.corpus, settings.encoder, settings.run.seed)

    def open(self) -> Corpus:
        """Open it, prepared anew from the source if this node does not have it; several processes do that once.

        Raises:
            DataError: the source cannot be read here, or is another one.
        """
        try:
            corpus = Corpus.open(self.path)
            if corpus.digest == self.digest:
                return corpus
        except DataError:
            pass  # not on this node, or not whole: prepared below
        try:
            corpus = self._prepare()
        except (DataError, StorageError) as error:
            raise DataError(f"{error.what}, on node {socket.gethostname()}", error.where,
                            "Every node needs the corpus: put its source, or corpus.cache_dir, on a mount that all"
                            " of them have") from error  # fmt: skip
        if corpus.digest != self.digest:
            raise DataError(
                f"is another one on node {socket.gethostname()} (digest {corpus.digest[:12]}, not {self.digest[:12]})",
                f"corpus {' '.join(self.settings.path) or self.settings.source}",
                "Every node needs the same source, and the same versions of the packages that it is read from",
            )
        return corpus

    def _prepare(self) -> Corpus:
        corpora = cache_folder(self.settings.cache_dir) / "corpora"
        with locked(corpora / f".{self.digest}.lock", hint="Set corpus.cache_dir or HNCSE_CACHE", wait=True):
            encoder = load_encoder(self.encoder.model, self.encoder)
            return prepare_corpus(
                self.settings,
                tokenize=encoder.token_rows,
                tokenizer_digest=encoder.tokenizer_digest(),
                max_length=self.encoder.max_length,
                seed=self.seed,
            )
