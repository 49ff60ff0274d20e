"""Reading a value as its setting means it: in YAML and in overrides all values are text until a type is known.

A setting that is text takes what was written, so ``run.name: 1.10`` is ``1.10``; a number is read from decimal digits;
``null`` and its like mean no value where that is allowed, and are words where not.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from decimal import Decimal
from functools import cache
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel, JsonValue
from pydantic_core import PydanticCustomError

from hncse_ray.errors import SettingsError
from hncse_ray.recipe import YAML_NULLS, Plain, parse_yaml

_TRUTHS = {"true": True, "false": False}
_SWITCHES = _TRUTHS | {"yes": True, "on": True, "no": False, "off": False}
_NUMBER = re.compile(r"[+-]?(?:(?:0|[1-9][0-9]*(?:_[0-9]+)*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")
_MOST_DIGITS = 40  # of a whole number: beyond the bound of every setting, and still quickly written out


class Typed(str):
    """The value of an override as it was typed: whether it is text or YAML, its setting decides."""


def read_value(value: Any, annotation: Any) -> Any:
    """Return a value as a type takes it; one that does not fit is left for pydantic to refuse.

    Args:
        value: from YAML (text, :class:`~hncse_ray.recipe.Plain` where unquoted, lists, mappings), an override, Python.
        annotation: the type of its setting.

    Raises:
        PydanticCustomError: it is not a number, is missing, or holds what no text can hold.
    """
    return read_kinds(value, kinds_of(annotation))


def read_kinds(value: Any, kinds: frozenset[Any]) -> Any:
    """Do the same for the types and words of :func:`kinds_of`."""
    if Any in kinds:
        return value
    if isinstance(value, Typed):
        value = _as_typed(value, kinds)
    if isinstance(value, Mapping | list | tuple):
        return _read_items(value, kinds)
    if JsonValue in kinds:
        return _as_yaml(value) if isinstance(value, Plain) else value
    if value is None or (isinstance(value, Plain) and value.is_nothing):
        if type(None) in kinds and value not in kinds:
            return None
        if any(map(is_section, kinds)):
            return {}  # a heading with nothing below it: all as by default
        if not value:
            raise PydanticCustomError("no_value", "it has no value; leave it out for its default")
    if not isinstance(value, str):
        return value
    lists = [kind for kind in kinds if get_origin(kind) in (list, tuple)]  # one value stands for a list of one
    return _read_text(str(value), kinds.union(*(kinds_of(get_args(kind)[0]) for kind in lists)))


def _read_text(text: str, kinds: frozenset[Any]) -> Any:
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise PydanticCustomError("no_text", "it is not valid UTF-8 text, or holds a NUL")
    if text in kinds:  # one of the words that a setting may be
        return text
    if int in kinds or float in kinds:
        if not _NUMBER.fullmatch(text):
            noun = "number" if float in kinds else "integer"
            raise PydanticCustomError("number", "input should be a valid {noun}, in decimal digits", {"noun": noun})
        return _number(text, whole=float not in kinds)
    if bool in kinds or True in kinds:
        return _SWITCHES.get(text.lower(), text)
    return text


def _as_yaml(text: Plain) -> Any:
    """What YAML takes a text for of whose setting nothing is known."""
    if text in YAML_NULLS:
        return None
    return _number(text, whole=True) if _NUMBER.fullmatch(text) else _TRUTHS.get(text.lower(), str(text))


def _number(text: str, *, whole: bool) -> int | float:
    number = Decimal(text)
    if whole and number.adjusted() < _MOST_DIGITS and number == number.to_integral_value():
        return int(number)
    return float(text)


def _read_items(value: Mapping[str, Any] | list[Any] | tuple[Any, ...], kinds: frozenset[Any]) -> Any:
    """Read what a list or a mapping holds; sections read their own settings."""
    for kind in kinds:
        origin, inner = get_origin(kind), get_args(kind)
        if kind is JsonValue:
            origin, inner = (dict, (str, kind)) if isinstance(value, Mapping) else (list, (kind,))
        if isinstance(value, Mapping) and origin is dict:
            return {key: read_value(item, inner[1]) for key, item in value.items()}
        if not isinstance(value, Mapping) and origin in (list, tuple):
            return [read_value(item, inner[0]) for item in value]
    return value


def _as_typed(typed: Typed, kinds: frozenset[Any]) -> Any:
    """Read the value of an override, where a value in quotes is what is between them."""
    collections, quoted = {get_origin(kind) for kind in kinds}, typed[:1] in ("'", '"')
    is_list = typed[:1] == "[" and bool(collections & {list, tuple} or JsonValue in kinds)
    is_mapping = dict in collections or JsonValue in kinds or any(map(is_section, kinds))
    if quoted or is_list or is_mapping:
        try:
            value = parse_yaml(typed, typed)
        except SettingsError:  # it only begins like YAML
            value = None
        if isinstance(value, (str,) * quoted + (list,) * is_list + (dict,) * is_mapping):
            return value
    return Plain(typed)


def is_section(kind: Any) -> TypeGuard[type[BaseModel]]:
    """Whether a type is a section of settings."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


@cache
def kinds_of(annotation: Any) -> frozenset[Any]:
    """Return the types and words that a type is made of: ``int`` and ``NoneType`` of ``int | None``."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return kinds_of(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return frozenset().union(*map(kinds_of, get_args(annotation)))
    if origin is Literal:
        return frozenset(get_args(annotation))
    return frozenset([annotation])
