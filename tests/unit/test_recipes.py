"""Every recipe loads, and says what its paper and its published script say."""

import pytest

from hncse_ray.config import load_settings
from hncse_ray.recipe import shipped_folder

RECIPES = sorted(path.stem for path in shipped_folder("recipes").glob("*.yaml"))

BACKBONES = {  # model, batch size, learning rate: SimCSE's README, whose values IS-CSE keeps
    "bert_base": ("bert-base-uncased", 64, 3e-5),
    "bert_large": ("bert-large-uncased", 64, 1e-5),
    "roberta_base": ("roberta-base", 512, 1e-5),
    "roberta_large": ("roberta-large", 512, 3e-5),
}
SMOOTHING = {"buffer_size": 1024, "group_size": 16, "attention_temperature": 2.0}
CONSTANT = {"weight": 0.1, "weight_start": None}
RAMP = {"weight": 0.05, "weight_start": 0.005}
POSITIVE = {"margin": 0.1, "w_pos": 1.0, "w_neg": 0.2}
HARD_NEGATIVE = {"k": 10, "n_mixes": 40, "alpha": 0.5}
PAPERS = {  # backbone, arXiv id, objective
    **{f"simcse_{backbone}": (backbone, "2104.08821", {"name": "info_nce"}) for backbone in BACKBONES},
    **{
        f"iscse_{backbone}": (
            backbone,
            "2305.07424",
            {"name": "instance_smoothing"} | SMOOTHING | (RAMP if "large" in backbone else CONSTANT),
        )
        for backbone in BACKBONES
    },
    "hncse_pm_bert_base": ("bert_base", "2411.12156", {"name": "positive_mixing"} | POSITIVE),
    "hncse_hnm_bert_base": ("bert_base", "2411.12156", {"name": "hard_negative_mixing"} | HARD_NEGATIVE),
    "hncse_hybrid_bert_base": ("bert_base", "2411.12156", {"name": "hybrid"} | POSITIVE | HARD_NEGATIVE),
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_loads_and_survives_a_round_trip(name: str) -> None:
    settings = load_settings(name)
    text = settings.to_yaml()
    assert settings.run.name == name.replace(".yaml", "")
    assert load_settings(shipped_folder("recipes") / f"{name}.yaml").to_yaml() == text


@pytest.mark.parametrize("name", PAPERS)
def test_paper_recipes_hold_the_published_values(name: str) -> None:
    settings = load_settings(name)
    backbone, _, objective = PAPERS[name]
    model, batch_size, learning_rate = BACKBONES[backbone]
    assert settings.objective.model_dump() == {"dimensions": None, "temperature": 0.05} | objective
    assert settings.corpus.source == "auto"
    assert settings.corpus.path == ("wiki1m_for_simcse.txt",)
    assert settings.corpus.min_words == 1 and settings.corpus.max_sentences is None
    encoder = settings.encoder
    assert (encoder.model, encoder.pooling, encoder.max_length) == (model, "cls", 32)
    assert encoder.head == "tanh" and encoder.head_in_training_only and encoder.dropout is None
    train = settings.train
    assert (train.batch_size, train.learning_rate) == (batch_size, learning_rate)
    assert (train.epochs, train.max_steps, train.accumulation_steps) == (1, None, 1)
    assert (train.schedule, train.warmup_steps) == ("linear", 0)
    assert (train.weight_decay, train.max_grad_norm) == (0, 1)
    assert train.evaluate_every_steps == 125
    assert not train.bucket_by_length and train.early_stopping_evaluations is None
    assert settings.negatives.source == "none"
    assert (settings.evaluation.suites, settings.evaluation.metric) == (("stsb",), "stsb/spearman")


@pytest.mark.parametrize("name", PAPERS)
def test_paper_recipes_say_what_they_are_and_how_to_run_them(name: str) -> None:
    text = (shipped_folder("recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    comment = text[: text.index("\nrun:")]
    assert all(line.startswith("#") for line in comment.splitlines() if line)
    assert f"arXiv {PAPERS[name][1]}" in comment
    assert f"hncse train {name} corpus.path=wiki1m_for_simcse.txt" in comment


def test_a_recipe_takes_overrides() -> None:
    settings = load_settings("iscse_bert_base", ["corpus.path=mine.txt", "objective.name=info_nce"])
    assert settings.corpus.path == ("mine.txt",)
    assert settings.objective.model_dump() == {"name": "info_nce", "dimensions": None, "temperature": 0.05}
