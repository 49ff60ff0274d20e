"""Search spaces: what a sweep varies, read from YAML, checked against the settings, sampled define-by-run.

A space names settings and the values they may take::

    parameters:
      objective.name:
        categorical: [info_nce, hybrid]
      objective.temperature:
        loguniform: [0.02, 0.2]
      objective.k:
        int: [2, 20]
        step: 2
        when: {objective.name: hybrid}
    first:
      - {objective.name: hybrid, objective.temperature: 0.05, objective.k: 10}

``when`` makes a parameter conditional on values of others; ``first`` are points to try before any is sampled.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, TypeVar

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import ConfigDict, Field, ValidationError

from hncse_ray.config import Section, Settings, load_settings, read_setting, setting_kinds
from hncse_ray.errors import SettingsError

Value = None | bool | int | float | str
Values = dict[str, Value]

# A trial's name, place and share of the cluster are the sweep's business; how it is scored must be the same for all.
_FIXED = ("run.", "cluster.", "evaluation.", "corpus.cache_dir", "corpus.num_processes")
_KINDS = {"uniform": "uniform", "loguniform": "loguniform", "int": "whole", "categorical": "categorical"}
_MOST_BRANCHES = 10_000
_MOST = 2**53  # whole numbers above it are not exact in a sampler's floats


class _Spec(Section):
    """One parameter as the file gives it: exactly one of the four distributions; choices are read as its setting."""

    model_config = ConfigDict(strict=True)

    uniform: list[float] | None = None
    loguniform: list[float] | None = None
    whole: list[Annotated[int, Field(ge=-_MOST, le=_MOST)]] | None = Field(None, alias="int")
    categorical: list[Any] | None = None
    step: float | None = None
    when: dict[str, Any] = {}


class _File(Section):
    model_config = ConfigDict(strict=True)

    parameters: dict[str, _Spec]
    first: list[dict[str, Any]] = []


@dataclass(frozen=True)
class Parameter:
    """A setting that a sweep varies.

    Attributes:
        key: its path, such as ``objective.temperature``.
        distribution: the values it may take.
        when: by the path of another parameter, the values of that one with which this one exists.
    """

    key: str
    distribution: BaseDistribution
    when: Mapping[str, tuple[Value, ...]]

    def is_active(self, values: Mapping[str, Value]) -> bool:
        """Whether the parameter exists beside these values of the parameters it depends on."""
        return all(key in values and values[key] in choices for key, choices in self.when.items())

    def suggest(self, trial: optuna.Trial) -> Value:
        """Let the sampler choose a value."""
        match self.distribution:
            case CategoricalDistribution() as d:
                return trial.suggest_categorical(self.key, d.choices)
            case IntDistribution() as d:
                return trial.suggest_int(self.key, d.low, d.high, step=d.step)
            case FloatDistribution() as d:
                value = trial.suggest_float(self.key, d.low, d.high, step=d.step, log=d.log)
                return value if d.step is None else _on_grid(value, d.low, d.step)
        raise AssertionError(self.distribution)

    def to_tree(self) -> dict[str, Any]:
        """Return it as a search space's file gives it."""
        match self.distribution:
            case CategoricalDistribution() as d:
                tree: dict[str, Any] = {"categorical": list(d.choices)}
            case IntDistribution() as d:
                tree = {"int": [d.low, d.high], "step": d.step}
            case FloatDistribution() as d:
                tree = {"loguniform" if d.log else "uniform": [d.low, d.high]}
                tree |= {} if d.step is None else {"step": d.step}
        return tree | ({"when": {key: list(choices) for key, choices in self.when.items()}} if self.when else {})

    def choices(self, most: int) -> list[Value] | None:
        """All values it may take; None if there are more than ``most``, as in a range without steps."""
        match self.distribution:
            case CategoricalDistribution() as d:
                found: list[Value] = list(d.choices)
            case IntDistribution() as d:
                found = list(range(d.low, d.high + 1, d.step)[: most + 1])
            case FloatDistribution(low=low, high=high, step=float(step)):
                found = [_on_grid(low + i * step, low, step) for i in range(min(most, round((high - low) / step)) + 1)]
            case _:
                return None
        return found if len(found) <= most else None

    def ends(self) -> tuple[Value, ...]:
        """The values at the edge of what is allowed; all of them for a categorical one."""
        match self.distribution:
            case CategoricalDistribution() as d:
                return d.choices
            case IntDistribution() | FloatDistribution() as d:
                return (d.low, d.high)
        raise AssertionError(self.distribution)


@dataclass(frozen=True)
class SearchSpace:
    """Parameters, each after those it depends on, and points to try first."""

    parameters: tuple[Parameter, ...]
    first: tuple[Values, ...] = ()

    def to_tree(self) -> dict[str, Any]:
        """Return the space as its file gives it; :func:`parse_space` reads that back."""
        return {"parameters": {p.key: p.to_tree() for p in self.parameters}, "first": [dict(p) for p in self.first]}

    def suggest(self, trial: optuna.Trial) -> Values:
        """Sample the values of one trial, define-by-run: a parameter whose condition fails is not asked for."""
        values: Values = {}
        for parameter in self.parameters:
            if parameter.is_active(values):
                values[parameter.key] = parameter.suggest(trial)
        return values

    def combinations(self, most: int) -> list[Values] | None:
        """Return all combinations of values; None if there are more than ``most``, as of a parameter without steps."""
        combinations: list[Values] = [{}]
        for parameter in self.parameters:
            choices = parameter.choices(most)
            if choices is None:
                return None
            combinations = list(itertools.chain.from_iterable(
                [values | {parameter.key: choice} for choice in choices]
                if parameter.is_active(values) else [values] for values in combinations
            ))  # fmt: skip
            if len(combinations) > most:
                return None
        return combinations

    def check(self, base: Settings) -> None:
        """See that every parameter is a setting, at both ends of its range, wherever it is active.

        Args:
            base: the settings that the sampled values are put into.

        Raises:
            SettingsError: it is not, or a point to try first lies outside the space.
        """
        for values, key in self.extremes(base):
            try:
                apply_values(base, values)
            except SettingsError as error:
                raise SettingsError(error.what, f"parameters.{key}" if key else "parameters",
                                    error.hint or _hint(values)) from None  # fmt: skip
        for number, point in enumerate(self.first):
            where = f"first[{number}]"
            self._check_point(point, where)
            try:
                apply_values(base, point)
            except SettingsError as error:
                raise SettingsError(error.what, where, error.hint) from None

    def extremes(self, base: Settings) -> Iterator[tuple[Values, str]]:
        """Yield values with one parameter at an end of its range, for every branch of the conditions.

        The others that are active are left as ``base`` has them, so each of these should be valid alone.
        """
        for branch in self._branches():
            active = [p for p in self.parameters if p.is_active(branch)]
            yield branch, ""
            for parameter in active:
                if parameter.key not in branch:
                    yield from ((branch | {parameter.key: end}, parameter.key) for end in parameter.ends())

    def _branches(self) -> list[Values]:
        """All combinations of the values that conditions ask about."""
        asked = {key for parameter in self.parameters for key in parameter.when}
        branches: list[Values] = [{}]
        for parameter in self.parameters:
            if parameter.key in asked:
                branches = list(itertools.chain.from_iterable(
                    [branch | {parameter.key: end} for end in parameter.ends()]
                    if parameter.is_active(branch) else [branch] for branch in branches
                ))  # fmt: skip
            if len(branches) > _MOST_BRANCHES:
                raise SettingsError(f"its conditions make more than {_MOST_BRANCHES} branches", "parameters")
        return branches

    def _check_point(self, point: Mapping[str, Value], where: str) -> None:
        known = {p.key: p for p in self.parameters}
        for key, value in point.items():
            if key not in known:
                raise SettingsError(f"{key!r} is not a parameter of the space{_near(key, known)}", where)
            if not _contains(known[key].distribution, value):
                raise SettingsError(f"{key} = {value!r} lies outside the space", where, _allowed(known[key]))
            if not known[key].is_active(point):
                condition = ", ".join(f"{k} in {list(v)}" for k, v in known[key].when.items())
                raise SettingsError(f"{key} exists only where {condition}", where)


def parse_space(tree: Mapping[str, Any], where: str) -> SearchSpace:
    """Build a space from a YAML tree.

    Args:
        tree: ``parameters`` and, if there are any, ``first``; see the module.
        where: the file, named in errors.

    Raises:
        SettingsError: what is wrong, and with which parameter.
    """
    try:
        file = _File.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        known = f"; known are {', '.join([*_KINDS, 'step', 'when'])}" if first["type"] == "extra_forbidden" else ""
        raise SettingsError(f"{path}: {first['msg'].lower()}{known}", where) from None
    if not file.parameters:
        raise SettingsError("varies nothing: parameters is empty", where)
    try:
        choices = {key: _choices(key, spec.categorical) for key, spec in file.parameters.items()}
        parameters = [_parameter(key, spec, choices) for key, spec in file.parameters.items()]
        points = ({key: read_setting(key, value) for key, value in point.items()} for point in file.first)
        return SearchSpace(tuple(_in_order(parameters)), tuple(points))
    except SettingsError as error:
        raise SettingsError(f"{error.where}: {error.what}", where, error.hint) from None


def apply_values(base: Settings, values: Mapping[str, Value], **fixed: Value) -> Settings:
    """Return ``base`` with the values of a trial.

    Raises:
        SettingsError: they do not fit together.
    """
    return load_settings(base.model_dump(mode="json"), dict(values) | fixed)


def _choices(key: str, given: list[Any] | None) -> list[Value] | None:
    """Read the choices of a categorical parameter, or of a condition, as their setting says."""
    if given is None:
        return None
    choices = [read_setting(key, value) for value in given]
    for choice in choices:
        if not isinstance(choice, Value):
            raise SettingsError(f"the choice {choice!r} is not a single value", key)
    return choices


def _parameter(key: str, spec: _Spec, choices: Mapping[str, list[Value] | None]) -> Parameter:
    if key.startswith(_FIXED):
        raise SettingsError("is the same for all trials of a sweep and cannot be varied", key)
    given = [kind for kind, field in _KINDS.items() if getattr(spec, field) is not None]
    if len(given) != 1:
        raise SettingsError(f"has {len(given) or 'no'} distributions" if given else "has no distribution", key,
                            f"Give one of {', '.join(_KINDS)}")  # fmt: skip
    when = {}
    for other, wanted in spec.when.items():
        if other not in choices:
            raise SettingsError(f"its condition asks for {other!r}, which is not a parameter{_near(other, choices)}",
                                key)  # fmt: skip
        known = choices[other]
        if known is None:
            raise SettingsError(f"its condition asks for {other}, which is not categorical", key)
        when[other] = tuple(_choices(other, wanted if isinstance(wanted, list) else [wanted]) or ())
        for choice in when[other]:
            if choice not in known:
                raise SettingsError(f"its condition asks for {other} = {choice!r}, which is no choice of it", key,
                                    f"Choose from {known}")  # fmt: skip
    return Parameter(key, _distribution(key, spec, given[0], choices[key]), when)


def _distribution(key: str, spec: _Spec, kind: str, choices: list[Value] | None) -> BaseDistribution:
    if choices is not None:
        if spec.step is not None:
            raise SettingsError("a categorical parameter has no step", key)
        if not choices or len(set(choices)) < len(choices):
            raise SettingsError("its choices are empty or given twice", key)
        return CategoricalDistribution(choices)
    ends = getattr(spec, _KINDS[kind])
    if len(ends) != 2:
        raise SettingsError(f"{kind} takes [low, high], not {ends}", key)
    if kind == "loguniform" and spec.step is not None:
        raise SettingsError("loguniform takes no step", key, "Use uniform, or categorical with the values wanted")
    low, high = ends
    if not low < high:
        raise SettingsError(f"its range [{low:g}, {high:g}] is empty", key, "The first must be smaller")
    kinds = setting_kinds(key)
    if kind != "int" and int in kinds and float not in kinds:
        raise SettingsError(f"is an integer, and {kind} draws fractions", key, "Use int, or categorical")
    if spec.step is not None:
        step, width = _exact(spec.step), _exact(high) - _exact(low)
        if not 0 < step <= width:
            raise SettingsError(f"step {spec.step:g} does not fit the range [{low:g}, {high:g}]", key)
        if kind == "int" and step % 1:
            raise SettingsError(f"step {spec.step:g} of an int parameter is not whole", key)
        high = type(high)(_exact(low) + width // step * step)
    if kind == "int":
        return IntDistribution(low, high, step=int(spec.step or 1))
    if kind == "loguniform" and low <= 0:
        raise SettingsError(f"loguniform from {low:g}: zero and less have no logarithm", key)
    return FloatDistribution(low, high, log=kind == "loguniform", step=spec.step)


def _exact(number: float) -> Decimal:
    """A number as it is written: 0.9 is three times 0.3, which it is not in binary."""
    return Decimal(str(number))


def _on_grid(value: float, low: float, step: float) -> float:
    """The number on the grid that a sampled one stands for, without the rounding of binary fractions."""
    return float(_exact(low) + round((value - low) / step) * _exact(step))


def _in_order(parameters: list[Parameter]) -> Iterator[Parameter]:
    """Yield each parameter after those its condition asks for."""
    done: set[str] = set()
    waiting = parameters
    while waiting:
        ready = [p for p in waiting if p.when.keys() <= done]
        if not ready:
            raise SettingsError("its condition depends on itself", waiting[0].key)
        yield from ready
        done |= {p.key for p in ready}
        waiting = [p for p in waiting if p.key not in done]


def _contains(distribution: BaseDistribution, value: Value) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return any(value == choice and type(value) is type(choice) for choice in distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not distribution.low <= value <= distribution.high
    ):
        return False
    if isinstance(distribution, IntDistribution) and value != int(value):
        return False
    if distribution.step is None:
        return True
    steps = (value - distribution.low) / distribution.step
    return abs(steps - round(steps)) < 1e-8


def _allowed(parameter: Parameter) -> str:
    match parameter.distribution:
        case CategoricalDistribution() as d:
            return f"Choose from {list(d.choices)}"
        case IntDistribution() | FloatDistribution() as d:
            step = f" in steps of {d.step:g}" if d.step not in (None, 1) else ""
            return f"It goes from {d.low:g} to {d.high:g}{step}"
    raise AssertionError(parameter)


_T = TypeVar("_T")


def _hint(values: Mapping[str, Value]) -> str:
    return "Tried: " + ", ".join(f"{key} = {value!r}" for key, value in values.items())


def _near(key: str, known: Mapping[str, _T]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
