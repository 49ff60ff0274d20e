"""Errors that a user can act on: each says what was wrong, where, and what to do."""

from __future__ import annotations


def counted(count: float, noun: str) -> str:
    """Return how many of something there are: "1 shard", "2 shards"."""
    number = f"{count:,}" if isinstance(count, int) else f"{count:,g}"
    return f"{number} {noun}{'' if count == 1 else 's'}"


def first_line(error: BaseException) -> str:
    """Return the kind of an error of other code, and the first line of what it says."""
    said = next(iter(str(error).strip().splitlines()), "").rstrip(".")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


class HncseError(Exception):
    """An expected failure, shown to the user as one message without a traceback.

    Args:
        what: what was wrong, as a sentence without a full stop.
        where: the file, setting or place it concerns; empty where ``what`` already names it.
        hint: what to do about it.

    Attributes:
        on_all_ranks: whether every rank of a process group raises it, so that none waits for another.
    """

    on_all_ranks = False

    def __init__(self, what: str, where: str = "", hint: str = "") -> None:
        # Positional arguments only, all handed to Exception: the error survives pickling between processes.
        super().__init__(what, where, hint)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        # A name of blanks or control characters is quoted: unquoted it could not be seen, or would steer the terminal.
        plain = self.where.isprintable() and self.where.strip() == self.where
        place = f"{self.where if plain else repr(self.where)}: " if self.where else ""
        advice = f". {self.hint}" if self.hint else ""
        return f"{place}{self.what}{advice}"


class SettingsError(HncseError):
    """A recipe, an override or a combination of settings is not valid."""


class DataError(HncseError):
    """A corpus or an evaluation set cannot be read or used."""


class ModelError(HncseError):
    """An encoder cannot be found, loaded or saved."""


class ClusterError(HncseError):
    """The cluster is missing, unreachable, or too small for the request."""


class StorageError(HncseError):
    """A run folder cannot be used or written."""


class TrainingError(HncseError):
    """Training cannot go on: not a number, collapse, or another condition with a known cause."""
