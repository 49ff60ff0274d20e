"""Positives that a corpus of passages makes of itself."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from hncse_ray.config.base import MOST, Section

ViewKind = Literal["dropout", "title", "crop", "cloze", "neighbour", "keywords"]
_HEAVIEST = 1e6


class ViewMix(Section):
    """How often each kind of positive is drawn, as weights. None = two dropout passes of each row, as in SimCSE."""

    dropout: float = Field(0, ge=0, le=_HEAVIEST, description="the passage twice, as without any kind")
    title: float = Field(0, ge=0, le=_HEAVIEST, description="a title and the passage under it")
    crop: float = Field(0, ge=0, le=_HEAVIEST, description="two random crops of a passage (Contriever)")
    cloze: float = Field(0, ge=0, le=_HEAVIEST, description="a sentence and its passage without it (ICT)")
    neighbour: float = Field(0, ge=0, le=_HEAVIEST, description="a passage and the next of its document")
    keywords: float = Field(0, ge=0, le=_HEAVIEST, description="the rarest words of a passage, and the passage")

    @property
    def asked_for(self) -> dict[ViewKind, float]:
        """The kinds that are drawn at all, and their weights."""
        kinds: tuple[ViewKind, ...] = get_args(ViewKind)
        return {kind: weight for kind in kinds if (weight := getattr(self, kind)) > 0}


class ViewsSettings(Section):
    """What an anchor and its positive are where a corpus of passages gives no pairs.

    crop: Izacard et al. 2021, arXiv 2112.09118; cloze: the inverse cloze task, Lee et al. 2019, arXiv 1906.00300.
    """

    mix: ViewMix = Field(ViewMix(), description="how often each kind is drawn")
    crop_least: float = Field(0.1, gt=0, lt=1, description="the shortest crop, as a share of the passage")
    crop_most: float = Field(0.5, gt=0, lt=1, description="the longest crop")
    cloze_keep: float = Field(0.1, ge=0, le=1, description="share of passages that the sentence stays in")
    keywords_least: int = Field(4, ge=1, le=100, description="the fewest words of a keyword query")
    keywords_most: int = Field(10, ge=1, le=100, description="the most words of it")
    agreement: int | None = Field(
        None,
        ge=2,
        le=50,
        description="a pair is used if its passage is among so many nearest to the anchor in the index",
    )
    agreement_after_steps: int = Field(0, ge=0, le=MOST, description="steps in which all pairs are used")

    @property
    def active(self) -> bool:
        """Whether any positive is more than a dropout pass."""
        return bool(self.mix.asked_for.keys() - {"dropout"})

    @model_validator(mode="after")
    def _ranges_are_ranges(self) -> ViewsSettings:
        if self.crop_least > self.crop_most:
            raise ValueError(f"crop_least {self.crop_least:g} is more than crop_most {self.crop_most:g}")
        if self.keywords_least > self.keywords_most:
            raise ValueError(f"keywords_least {self.keywords_least} is more than keywords_most {self.keywords_most}")
        if self.agreement is not None and not self.active:
            raise ValueError("agreement is for pairs, and mix asks for none; set such as mix={title: 1}")
        return self
