from pathlib import Path

import pytest

from hncse_ray import load_settings
from hncse_ray.errors import ModelError
from hncse_ray.training.scoring import score_models


def test_no_model_is_opened_if_a_later_one_is_missing(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    tree = {
        "corpus": {"source": "python-docs"},
        "encoder": {"pooling": "mean"},
        "evaluation": {"suites": ["pairs"], "metric": "pairs/mrr", "pairs_dev": str(pairs_file)},
    }
    settings = load_settings(tree)
    opened: list[str] = []
    for groups in ([f"{tiny_model},{tmp_path / 'none'}"], [str(tiny_model), str(tmp_path / "none")]):
        with pytest.raises(ModelError, match="none: no such model folder"):
            score_models(
                groups,
                ["pairs"],
                settings,
                settings.encoder,
                tell=lambda *facts: None,
                open_encoder=lambda model, encoder: opened.append(model),
            )
    assert not opened
