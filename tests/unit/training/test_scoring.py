import json
from pathlib import Path

import pytest
from invoke import assert_refused, hncse

import hncse_ray
from hncse_ray import load_settings
from hncse_ray.errors import ModelError, SettingsError
from hncse_ray.training.scoring import score_models, split_seeds


def test_no_model_is_opened_if_a_later_one_is_missing(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    tree = {
        "corpus": {"source": "python-docs"},
        "encoder": {"pooling": "mean"},
        "evaluation": {"suites": ["pairs"], "metric": "pairs/mrr", "pairs_dev": str(pairs_file)},
    }
    settings = load_settings(tree)
    opened: list[str] = []
    none, empty = str(tmp_path / "none"), str(tmp_path)
    for groups in ([f"{tiny_model},{none}"], [str(tiny_model), none], [str(tiny_model), empty]):
        with pytest.raises(ModelError, match="none: no such model folder|is not a model"):
            score_models(
                groups,
                ["pairs"],
                settings,
                settings.encoder,
                tell=lambda *facts: None,
                open_encoder=lambda model, encoder: opened.append(model),
            )
    assert not opened


def test_seeds_are_parted_at_commas_but_for_folders_that_are_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "a,b", "x,1", "x,2"):
        (tmp_path / name).mkdir()
    assert split_seeds("a") == ("a",)
    assert split_seeds("b,a") == ("b", "a")
    assert split_seeds("a,b") == ("a,b",)
    assert split_seeds("b,a,b") == ("b", "a,b")
    assert split_seeds("x,1,x,2,owner/name") == ("x,1", "x,2", "owner/name")
    assert split_seeds(f"{tmp_path}/x,2,y") == (f"{tmp_path}/x,2", "y")


@pytest.mark.parametrize("group", ["", ",", "a,", ",a", "a,,b"])
def test_a_model_without_a_name_is_refused(group: str) -> None:
    with pytest.raises(SettingsError, match="a model without a name"):
        split_seeds(group)
    assert_refused(hncse("evaluate", "x", group), "a model without a name", "Name a folder")


def test_evaluating_from_python_gives_what_the_command_gives(tiny_model: Path, pairs_file: Path) -> None:
    board = hncse_ray.evaluate(tiny_model, "pairs", pairs=pairs_file, encoder={"pooling": "mean"}, device="cpu")
    ((runs,),) = [group.runs for group in board.groups]
    told = hncse("evaluate", tiny_model, "--pairs", pairs_file, "--pooling", "mean", "--device", "cpu", "--json")
    found = json.loads(told.stdout.splitlines()[-1])
    assert {split: runs[split] for split in ("dev", "test")} == {split: found[split] for split in ("dev", "test")}
    assert "pairs/mrr" in runs["dev"]
    with pytest.raises(SettingsError, match="pairs needs data"):
        hncse_ray.evaluate(str(tiny_model), ["pairs"])
    for odd, said in (
        ([], "models: no model is named"),
        (None, "models: None is no name"),
        ([3], "models: 3 is no name"),
    ):
        with pytest.raises(SettingsError, match=said):
            hncse_ray.evaluate(odd)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="encoder = 'mean'"):
        hncse_ray.evaluate(tiny_model, encoder="mean")  # type: ignore[arg-type]
