"""Does a sweep find the optimum where it is known? A grid of temperature and mixing weight is measured first.

A small BERT with random weights (2 layers of 64, the tokenizer of all-MiniLM-L6-v2) is trained by HNCSE-PM on a sample
of the quickstart's corpus and scored on the dev half of its pairs. Every grid point is a run; then sweeps of 20 trials
with several sampler seeds search the same ranges, without seeing the grid. All runs train with the same seed, in this
process. Finished runs are kept in the file and not repeated.

    python benchmarks/tune_optimum.py --out result.json
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from hardware import provenance
from small import NoStore, make_model

from hncse_ray import load_settings
from hncse_ray.config import Settings
from hncse_ray.corpus import Corpus
from hncse_ray.encoder import load_encoder
from hncse_ray.reporting import LineReporter
from hncse_ray.reporting.events import Evaluated, Event
from hncse_ray.training import EvaluationSets, TrainJob, fit, load_evaluation_sets
from hncse_ray.training.checks import prepare
from hncse_ray.tuning import SweepStudy, Values, apply_values, parse_space

TEMPERATURES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
WEIGHTS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
SPACE = {
    "parameters": {
        "objective.temperature": {"loguniform": [TEMPERATURES[0], TEMPERATURES[-1]]},
        "objective.w_neg": {"uniform": [WEIGHTS[0], WEIGHTS[-1]]},
    }
}
TRIALS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {"grid": {}, "sweeps": {}}
    results |= provenance(torch.device("cpu"), "optuna") | {"steps": args.steps, "trials": TRIALS}
    with tempfile.TemporaryDirectory() as scratch:
        train = Trainer(Path(scratch), args.steps)
        for temperature in TEMPERATURES:
            for weight in WEIGHTS:
                key = f"{temperature} {weight}"
                if key not in results["grid"]:
                    values = {"objective.temperature": temperature, "objective.w_neg": weight}
                    results["grid"][key] = max(v for step, v in train(values) if step > 0)
                    args.out.write_text(json.dumps(results, indent=1) + "\n")
                    print(f"grid {key}: {results['grid'][key]:.4f}", flush=True)
        best = max(results["grid"].values())
        for seed in args.seeds:
            if str(seed) not in results["sweeps"]:
                results["sweeps"][str(seed)] = sweep(train, Path(scratch) / f"sweep-{seed}", seed)
                args.out.write_text(json.dumps(results, indent=1) + "\n")
            found = results["sweeps"][str(seed)]
            print(f"seed {seed}: {found['score']:.4f} = {found['score'] / best:.4f} of the best grid point {best:.4f},"
                  f" {found['stopped']} of {TRIALS} stopped early", flush=True)  # fmt: skip
    near = sum(found["score"] >= 0.99 * best for found in results["sweeps"].values())
    print(f"within 1 % of the best grid point: {near} of {len(results['sweeps'])} seeds")


def sweep(train: "Trainer", folder: Path, seed: int) -> dict:
    """Run a sweep in this process: the study that `hncse tune` uses, without Ray around it."""
    folder.mkdir()
    study = SweepStudy(folder, parse_space(SPACE, "space"), seed=seed, stopping="asha", grace=20,
                       accepts=lambda values: None)  # fmt: skip
    for _ in range(TRIALS):
        task = study.next()
        scores = train(task.values, stop=lambda step, score, n=task.number: study.report(n, step, score))
        if scores[-1][0] < 0:
            study.stop(task.number, {})
        else:
            study.complete(task.number, {})
    done = [t for t in study.finished() if t.state.name == "COMPLETE"]
    winner = max(done, key=lambda t: t.value)
    return {"score": winner.value, "values": winner.params, "stopped": TRIALS - len(done)}


class Stopped(Exception):
    """A poor run is left."""


class Trainer:
    """Trains the small encoder with some values, in this process."""

    def __init__(self, folder: Path, steps: int) -> None:
        self._folder, model = folder, folder / "model"
        changes = {
            "objective.name": "positive_mixing",
            "objective.margin": 0.5,
            "encoder.model": str(model),
            "encoder.max_length": 32,
            "corpus.max_sentences": 4000,
            "negatives.source": "none",
            "train.max_steps": steps,
            "train.evaluate_every_steps": 20,
            "train.learning_rate": 2e-3,
            "evaluation.test": False,
            "evaluation.metric": "python-docs/mrr",
        }
        self._base = load_settings("quickstart", changes)
        make_model(model)
        encoder = load_encoder(self._base.encoder.model, self._base.encoder)
        self._corpus: Corpus = prepare(self._base, encoder, LineReporter())
        self._sets: EvaluationSets = load_evaluation_sets(self._base.evaluation, self._base.corpus)

    def __call__(self, values: Values, stop: Callable[..., bool] | None = None) -> list[tuple[int, float]]:
        """Return step and dev score of every evaluation; a last step of -1 says that it was stopped."""
        settings: Settings = apply_values(self._base, values)
        scores: list[tuple[int, float]] = []

        def note(event: Event) -> None:
            if isinstance(event, Evaluated) and event.split == "dev":
                score = event.scores[settings.evaluation.metric]
                scores.append((event.step, score))
                if stop is not None and stop(event.step, score) and event.step < settings.train.max_steps:
                    raise Stopped

        encoder = load_encoder(settings.encoder.model, settings.encoder)
        try:
            fit(TrainJob(settings, self._corpus, encoder, self._sets), NoStore(), note)
        except Stopped:
            scores.append((-1, 0.0))
        return scores


if __name__ == "__main__":
    main()
