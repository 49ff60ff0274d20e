"""What all sections of the settings have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from hncse_ray.config.values import read_value

MOST = 2**31 - 1  # of what is only counted: every library takes it
LONGEST_S = 10_000_000  # that anything is waited for, 115 days


def as_tuple(value: object) -> object:
    """Let one value stand for a list of one."""
    return (value,) if isinstance(value, str | int) else value


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the settings of a tree by their paths, without their sections."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def changes(old: Mapping[str, Any], new: Mapping[str, Any], *, free: tuple[str, ...]) -> dict[str, str]:
    """Say of each setting how it differs between two trees; not of those whose paths begin with one of ``free``."""
    before, now = leaves(old), leaves(new)
    return {
        key: f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(free)
    }


StrTuple = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]


class Section(BaseModel):
    """Base of all settings: immutable, unknown keys refused, values read as the type of their setting says."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read_values(cls, tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        read, errors = dict(tree), []
        for key, field in ((field.alias or name, field) for name, field in cls.model_fields.items()):
            if key not in tree:
                continue
            try:
                read[key] = read_value(tree[key], field.annotation)
            except PydanticCustomError as error:
                errors.append(InitErrorDetails(type=error, loc=(key,), input=tree[key]))
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return read
