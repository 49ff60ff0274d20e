"""The verdict of a run in words."""

from __future__ import annotations

from hncse_ray.reporting.events import Verdict


def describe_verdict(verdict: Verdict) -> str:
    """Return what is exported and why, as one line."""
    model = f"the {'adapted' if verdict.merge else 'whitened base' if verdict.whiten else 'base'} model is exported"
    if verdict.metric is None or verdict.base is None or verdict.chosen is None:
        return f"nothing was judged, as there is no dev set: {model}{_how(verdict)}"
    if verdict.is_base:
        return f"{verdict.metric} {_number(verdict.base)}: nothing helped on dev: {model}"
    return f"{verdict.metric} on dev {describe_gain(verdict)}{_how(verdict)}: {model}{_doubt(verdict)}"


def describe_gain(verdict: Verdict) -> str:
    """Return the scores of a verdict that was judged, their difference and its interval."""
    if verdict.base is None or verdict.chosen is None or verdict.difference is None:
        return ""
    numbers = f"{_number(verdict.base)} -> {_number(verdict.chosen)}"
    interval = ""
    if verdict.low is not None and verdict.high is not None:
        low, high = (_number(end, like=verdict.chosen) for end in (verdict.low, verdict.high))
        interval = f", 95 % {low} to {high}"
    return f"{numbers} ({_number(verdict.difference, like=verdict.chosen, sign='+')}{interval})"


def _how(verdict: Verdict) -> str:
    parts = [] if verdict.merge in (0, 1) else [f"merge {verdict.merge:g}"]
    parts += [f"whitening {verdict.whiten:g}"] if verdict.whiten else []
    return f" with {' and '.join(parts)}" if parts else ""


def _doubt(verdict: Verdict) -> str:
    if verdict.low is None or verdict.high is None or verdict.low > 0:
        return ""
    return ", though it is worse" if verdict.high < 0 else ", though the difference may be luck"


def _number(value: float, *, like: float | None = None, sign: str = "") -> str:
    """With the digits of the score's kind: Spearman is from -100 to 100, all else from 0 to 1."""
    digits = 2 if abs(value if like is None else like) >= 2 else 3
    return f"{value:{sign}.{digits}f}"
