"""Objectives that a user wrote: found by name, given what their signature asks for, their results checked."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hncse_ray.errors import SettingsError
from hncse_ray.objectives import WHOLE
from hncse_ray.objectives.similarity import Metrics, as_metric, means, of_rows

_RESERVED = ("loss", "grad_norm", "uniformity")


class OwnFunction:
    """A function `(z1, z2, negatives=None, *, ...) -> (loss, metrics)` of the user's, called as the others are.

    Args:
        name: `module:function`; the module is looked for in the working directory too, and there first.
        settings: keywords of every call.
        given: further keywords that a run has; the function gets those that its signature names.

    Raises:
        SettingsError: it cannot be imported, or cannot be called so.
    """

    def __init__(self, name: str, settings: Mapping[str, Any], *, given: Sequence[str]) -> None:
        self.where = f"objective.name = {name}"
        self.function, self._module = _find(name, self.where)
        self._settings = dict(settings)
        self.takes = self._check_signature(given)
        self._metrics: set[str] | None = None

    def __call__(self, z1: Tensor, z2: Tensor, **given: Any) -> tuple[Tensor, Metrics]:
        """Compute loss and metrics; `positive_similarity` is added where the function does not report it.

        Args:
            z1: anchors, unit-norm rows [B, D].
            z2: positives, unit-norm rows [B, D].
            given: of the keywords that :attr:`takes` names.

        Raises:
            SettingsError: what the function returns is no loss, or not the metrics that it returned before.
        """
        loss, metrics = self._checked(self.function(z1, z2, **self._settings, **given))
        found = {name: _scalar(value, z1) for name, value in metrics.items()}
        if self._metrics is not None and self._metrics != set(found):
            raise self._error(f"its metrics were {sorted(self._metrics)}, now they are {sorted(found)}",
                              "Return the same ones at every step")  # fmt: skip
        self._metrics = set(found)
        if "positive_similarity" not in found:
            share = given.get("share", WHOLE)
            found |= means(share, {"positive_similarity": of_rows((z1 * z2).sum(dim=1))})
        return loss, found

    def place_of(self, error: BaseException) -> str:
        """Say where in the user's file an error of a call came from."""
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == self._module.__file__]
        frame = (own or list(frames))[-1]
        return f"{os.path.basename(frame.filename)}, line {frame.lineno}"

    def _error(self, what: str, hint: str = "") -> SettingsError:
        return SettingsError(what, self.where, hint or "docs/own-objective.md shows how one is written")

    def _check_signature(self, given: Sequence[str]) -> frozenset[str]:
        """See that the function can be called with the views, its settings and what a run gives; name the latter."""
        try:
            signature = inspect.signature(self.function)
        except (TypeError, ValueError):
            raise self._error("its signature cannot be read") from None
        parameters = list(signature.parameters.values())
        in_order = [p for p in parameters if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
        if len(in_order) < 2 and not any(p.kind is Parameter.VAR_POSITIONAL for p in parameters):
            raise self._error(f"its signature is {signature}, so it cannot take (z1, z2)")
        named = {p.name: p for p in parameters if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)}
        named = {name: p for name, p in named.items() if p not in in_order[:2]}
        takes = frozenset(given) & named.keys()
        open_ended = any(p.kind is Parameter.VAR_KEYWORD for p in parameters)
        settings = [name for name in named if name not in given]
        for name in self._settings:
            if name in given:
                raise SettingsError("is given by the run and is no setting", f"objective.settings.{name}")
            if name not in named and not open_ended:
                near = difflib.get_close_matches(name, settings, n=1)
                hint = f"Did you mean {near[0]!r}?" if near else f"It takes {', '.join(settings) or 'no settings'}"
                raise SettingsError(f"{self.where.rpartition(' ')[2]} takes no {name!r}",
                                    f"objective.settings.{name}", hint)  # fmt: skip
        for name in settings:
            if named[name].default is Parameter.empty and name not in self._settings:
                raise self._error(f"it needs {name!r}", f"Set objective.settings.{name}, or give it a default")
        try:
            signature.bind(None, None, **self._settings, **dict.fromkeys(takes))
        except TypeError as error:
            raise self._error(f"its signature is {signature}: {error}") from None
        return takes

    def _checked(self, result: Any) -> tuple[Tensor, Mapping[str, Any]]:
        if not (isinstance(result, tuple) and len(result) == 2):
            raise self._error(f"it returns {_described(result)}, not (loss, metrics)")
        loss, metrics = result
        if not (isinstance(loss, Tensor) and loss.ndim == 0 and loss.is_floating_point()):
            raise self._error(f"its loss is {_described(loss)}, not a scalar tensor of floating point",
                              "Take the mean over the rows, say")  # fmt: skip
        if not isinstance(metrics, Mapping):
            raise self._error(f"its metrics are {_described(metrics)}, not a mapping from names to numbers")
        for name, value in metrics.items():
            if not isinstance(name, str) or name in _RESERVED or name.startswith(("negatives/", "loss_at_")):
                raise self._error(f"its metrics have the name {name!r}, which a run uses itself or cannot write")
            number = isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0)
            if not number:
                raise self._error(f"its metric {name!r} is {_described(value)}, not a number")
        return loss, metrics


def _find(name: str, where: str) -> tuple[Callable[..., Any], ModuleType]:
    """Import the module of `module:function`, and return the function with it."""
    module_name, _, path = name.partition(":")
    # As `python -m` has it, and as Ray's workers have it: the command `hncse` alone would not look there.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise SettingsError(f"{module_name} cannot be imported: {error}", where) from error
        raise SettingsError(
            f"there is no module {error.name!r}",
            where,
            f"Start the command in the folder with it (this is {os.getcwd()}), or install it; on a cluster,"
            " `hncse submit --working-dir FOLDER` sends it along",
        ) from None
    except (Exception, SystemExit) as error:  # whatever the user's file does when it is read
        raise SettingsError(f"{module_name} cannot be imported: {_in_a_line(error)}", where) from error
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            known = [name for name, value in vars(found).items() if callable(value) and not name.startswith("_")]
            near = difflib.get_close_matches(part, known, n=1)
            raise SettingsError(f"{module.__file__ or module_name} has no {path!r}", where,
                                f"Did you mean {near[0]!r}?" if near else "")  # fmt: skip
        found = getattr(found, part)
    if not callable(found):
        raise SettingsError(f"it is {_described(found)}, not a function", where)
    return found, module


def _in_a_line(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    file, line = (error.filename, error.lineno) if isinstance(error, SyntaxError) else (frame.filename, frame.lineno)
    return f"{type(error).__name__} in {file}, line {line}: {' '.join(str(error).split())}"


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and {value.dtype}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return f"of type {type(value).__name__}"


def _scalar(value: Any, like: Tensor) -> Tensor:
    return as_metric(torch.as_tensor(value, device=like.device))
