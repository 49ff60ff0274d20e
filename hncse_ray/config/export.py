"""The settings of what is made of the weights once training is over."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from hncse_ray.config.base import Section

MERGES = (1.0, 0.75, 0.5, 0.25, 0.0)  # what `auto` tries; of equal scores the first
WHITENINGS = (0.0, 0.125, 0.25)


class ExportSettings(Section):
    """What is exported: the best weights as they are, mixed with those of the base, whitened.

    ``auto`` chooses by the dev metric, and exports the base where nothing is better than it.
    """

    merge: Literal["auto"] | float = Field(
        1.0, description="weight of the trained parameters, the base's have the rest; auto tries 1, 0.75, 0.5, 0.25, 0"
    )
    whiten: Literal["none", "auto"] | float = Field(
        "none", description="a last stage that scales the corpus's directions by their variance to -power;"
        " auto tries none, 0.125, 0.25"
    )  # fmt: skip

    @field_validator("merge", "whiten")
    @classmethod
    def _in_range(cls, value: str | float, info: ValidationInfo) -> str | float:
        low, high, words = (0, 1, "auto") if info.field_name == "merge" else (0.01, 0.5, "none, auto")
        if not isinstance(value, str) and not low <= value <= high:
            raise ValueError(f"{value:g} is neither {words} nor from {low} to {high}")
        return value

    @model_validator(mode="after")
    def _training_is_of_use(self) -> ExportSettings:
        if self.merge == 0 and self.whiten == "none":
            raise ValueError("merge 0 without whiten exports the base, whatever is trained")
        return self

    @property
    def chooses(self) -> bool:
        """Whether dev has a say."""
        return "auto" in (self.merge, self.whiten)

    @property
    def merges(self) -> tuple[float, ...]:
        """The weights to try."""
        return MERGES if self.merge == "auto" else (self.merge,)

    @property
    def whitenings(self) -> tuple[float, ...]:
        """The powers to try; 0 is none."""
        if self.whiten == "auto":
            return WHITENINGS
        return (0.0,) if self.whiten == "none" else (self.whiten,)
