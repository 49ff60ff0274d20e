"""The objective of a run: those that come with the package, each with its own settings, or the user's own.

Defaults are those of the papers; that of the temperature is unsupervised SimCSE's (arXiv 2104.08821).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Discriminator, Field, JsonValue, Tag, field_validator, model_validator

from hncse_ray.config.base import Section, as_tuple

_Temperature = Annotated[float, Field(gt=0, le=10, description="similarities are divided by it")]


class _Objective(Section):
    name: str
    dimensions: Annotated[tuple[Annotated[int, Field(ge=2, le=65_536)], ...] | None, BeforeValidator(as_tuple)] = Field(
        None, description="Matryoshka (arXiv 2205.13147): widths that are trained beside the full one"
    )

    @field_validator("dimensions")
    @classmethod
    def _given_once(cls, dimensions: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if dimensions is not None and len(set(dimensions)) < max(len(dimensions), 1):
            raise ValueError(f"{list(dimensions)} {'has a width twice' if dimensions else 'names no width'}")
        return dimensions


class InfoNCE(_Objective):
    """Unsupervised SimCSE, arXiv 2104.08821."""

    name: Literal["info_nce"] = "info_nce"
    temperature: _Temperature = 0.05


class _PositiveMixing(_Objective):
    margin: float = Field(0.1, ge=0, le=1, description="relative gap below which the positive is mixed")
    w_pos: float = Field(1.0, ge=0, le=2, description="weight of the positive in a mixed one")
    w_neg: float = Field(0.2, ge=0, le=2, description="weight of the hardest negative in it")


class _HardNegativeMixing(_Objective):
    k: int = Field(10, ge=2, le=1_048_575, description="hardest candidates that mixes are drawn from")
    n_mixes: int = Field(40, ge=1, le=65_536, description="mixed negatives of each anchor")
    alpha: float = Field(0.5, ge=0, le=1, description="share of the first of the two negatives in a mix")


class PositiveMixing(_PositiveMixing):
    """HNCSE-PM, arXiv 2411.12156."""

    name: Literal["positive_mixing"] = "positive_mixing"
    temperature: _Temperature = 0.05


class HardNegativeMixing(_HardNegativeMixing):
    """HNCSE-HNM, arXiv 2411.12156."""

    name: Literal["hard_negative_mixing"] = "hard_negative_mixing"
    temperature: _Temperature = 0.05


class Hybrid(_PositiveMixing, _HardNegativeMixing):
    """HNCSE, both mixings, arXiv 2411.12156."""

    name: Literal["hybrid"] = "hybrid"
    temperature: _Temperature = 0.05


class ThreeView(_Objective):
    """Three dropout passes: info_nce(z1, z2) + info_nce(z2, z3)."""

    name: Literal["three_view"] = "three_view"
    temperature: _Temperature = 0.05


class InstanceSmoothing(_Objective):
    """IS-CSE, arXiv 2305.07424."""

    name: Literal["instance_smoothing"] = "instance_smoothing"
    temperature: _Temperature = 0.05
    buffer_size: int = Field(1024, ge=2, le=1_048_576, description="past embeddings that are kept")
    group_size: int = Field(16, ge=1, le=1_048_575, description="neighbours that a positive is averaged with")
    attention_temperature: float = Field(
        2.0, gt=0, le=1000, description="of the average's weights: the larger, the more equal they are"
    )
    weight: float = Field(0.1, ge=0, le=10, description="weight of the smoothing loss")
    weight_start: float | None = Field(
        None, ge=0, le=10, description="if set, the weight rises on a cosine from here to `weight`"
    )

    @model_validator(mode="after")
    def _group_fits_buffer(self) -> InstanceSmoothing:
        if self.group_size > self.buffer_size - 1:
            raise ValueError(f"group_size {self.group_size} does not fit a buffer of {self.buffer_size}")
        return self


class Distillation(_Objective):
    """Anchors learn to rank a list of documents as a teacher does: the index, by `negatives.score`."""

    name: Literal["distillation"] = "distillation"
    temperature: _Temperature = 0.05
    teacher_temperature: float = Field(0.05, gt=0, le=10, description="the teacher's scores are divided by it")
    list_loss: Literal["kl", "margin_mse"] = Field(
        "kl",
        description="kl = divergence of the lists' softmax; margin_mse = of differences in a list, arXiv 2010.02666",
    )
    contrast_weight: float = Field(0.0, ge=0, le=100, description="weight of an info_nce with the own document")
    contrast_max_score: float | None = Field(
        0.6, gt=-1, le=100, description="documents that the teacher scores higher are not repelled; null = all are"
    )


class OwnObjective(_Objective):
    """A function of the user's, named as ``module:function``; docs/own-objective.md says what it is given."""

    name: str
    settings: dict[str, JsonValue] = Field({}, description="handed to the function as keywords")

    @field_validator("name")
    @classmethod
    def _names_a_function(cls, name: str) -> str:
        dotted = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
        if not re.fullmatch(f"{dotted}:{dotted}", name):
            raise ValueError(f"{name!r} is not MODULE:FUNCTION, such as my_losses:my_loss")
        return name


_BuiltIn = InfoNCE | PositiveMixing | HardNegativeMixing | Hybrid | ThreeView | InstanceSmoothing | Distillation
OBJECTIVES: dict[str, type[Section]] = {cls.model_fields["name"].default: cls for cls in get_args(_BuiltIn)}


def objective_class(name: Any) -> type[Section] | None:
    """The settings of the objective of this name; None if there is none."""
    if isinstance(name, str) and ":" in name:
        return OwnObjective
    return OBJECTIVES.get(name) if isinstance(name, str) else None


def _whose(objective: Any) -> str:
    name = objective.get("name") if isinstance(objective, Mapping) else getattr(objective, "name", None)
    return "own" if objective_class(name) is OwnObjective else "built-in"


ObjectiveSettings = Annotated[
    Annotated[_BuiltIn, Field(discriminator="name"), Tag("built-in")] | Annotated[OwnObjective, Tag("own")],
    Discriminator(_whose),
]
