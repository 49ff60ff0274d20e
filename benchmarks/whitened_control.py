"""What of the quickstart's gain is had without training, by whitening the untouched model on the same corpus?

The vectors of the quickstart's corpus give a mean and a covariance; every vector is centred and its principal
directions are scaled by a power of their variances: 0 does nothing, -0.5 makes all variances equal (Su et al. 2021,
arXiv 2103.15316), and less whitens in part. The pairs are those that the quickstart is scored on.

    python benchmarks/whitened_control.py --powers 0 -0.125 -0.25 -0.5 --out result.json
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from hardware import provenance
from numpy.typing import NDArray

from hncse_ray import load_settings
from hncse_ray.encoder import SentenceEncoder, load_encoder
from hncse_ray.evaluation import evaluate_retrieval
from hncse_ray.reporting import LineReporter
from hncse_ray.training import load_evaluation_sets
from hncse_ray.training.checks import prepare
from hncse_ray.training.whitening import Spread


def main() -> None:
    parser = argparse.ArgumentParser(description="The quickstart's pairs with a model that is whitened, not trained.")
    parser.add_argument("--powers", type=float, nargs="+", default=[0, -0.125, -0.25, -0.5])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    settings = load_settings("quickstart")
    encoder = load_encoder(settings.encoder.model, settings.encoder)
    corpus = prepare(settings, encoder, LineReporter())
    known = encoder.encode(corpus.texts(range(len(corpus))))
    spread = Spread.of(known)
    sets = load_evaluation_sets(settings.evaluation, settings.corpus).sets
    scores = {}
    for power in args.powers:

        def encode(texts: list[str], power: float = power) -> NDArray[np.float64]:
            return spread.whitened(remember(encoder, texts), -power)

        plain = power == 0
        scores[power] = {
            split: evaluate_retrieval((lambda texts: remember(encoder, texts)) if plain else encode, data)
            for (suite, split), data in sets.items()
            if suite == "python-docs"
        }
        print(power, {split: {m: round(v, 4) for m, v in found.items()} for split, found in scores[power].items()})
    if args.out:
        facts = provenance(torch.device("cpu"), "sentence-transformers")
        result = {"question": "What does whitening without training gain?", **facts, "sentences": len(corpus)}
        args.out.write_text(json.dumps(result | {"scores": scores}, indent=2) + "\n", encoding="utf-8")


_known: dict[str, NDArray[np.float32]] = {}


def remember(encoder: SentenceEncoder, texts: list[str]) -> NDArray[np.float32]:
    """Embed each text once, whatever is done with its vector."""
    if new := [text for text in dict.fromkeys(texts) if text not in _known]:
        _known.update(zip(new, encoder.encode(new), strict=True))
    return np.stack([_known[text] for text in texts])


if __name__ == "__main__":
    main()
