"""What is passed on of a base model's card, and what is a name on the hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from hncse_ray.encoder import SourceCard, hub_name, read_source_card


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\nlanguage: en\n---\n# x", SourceCard({"license": "mit"}, ("en",))),
        ("---\nlicense: [mit, apache-2.0]\nlanguage: [en, de]\n---\n",
         SourceCard({"license": ["mit", "apache-2.0"]}, ("en", "de"))),
        ("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n",
         SourceCard({"license": "other", "license_name": "own", "license_link": "LICENSE"})),
        ("---\nlicense_name: own\n---\n", SourceCard()),
        ("---\nlicense: 3\nlanguage: {a: b}\n---\n", SourceCard()),
        ("---\nlicense: [mit\n---\n", SourceCard()),
        ("---\nlicense: mit\n", SourceCard()),
        ("# no front matter", SourceCard()),
        ("", SourceCard()),
    ],
)  # fmt: skip
def test_licence_and_languages(tmp_path: Path, card: str, expected: SourceCard) -> None:
    (tmp_path / "README.md").write_text(card)
    assert read_source_card(str(tmp_path)) == expected


def test_no_card_and_no_model_are_no_errors(tmp_path: Path) -> None:
    assert read_source_card(str(tmp_path)) == read_source_card(str(tmp_path / "none")) == SourceCard()


def test_names_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert hub_name("bert-base-uncased") == "bert-base-uncased" and hub_name("org/other") == "org/other"
    assert [hub_name(m) for m in ("org/model", str(tmp_path), "package:a/b", "./x", "runs/a/model")] == [None] * 5
