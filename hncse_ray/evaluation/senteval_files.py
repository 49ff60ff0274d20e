"""The text files of a SentEval folder."""

from __future__ import annotations

from pathlib import Path

from hncse_ray import reading
from hncse_ray.errors import DataError

GET_THE_DATA = "It should be SentEval's data/downstream folder; name it in evaluation.senteval_path"


def read_lines(path: Path, encoding: str = "utf-8-sig") -> list[str]:
    """Return the lines of a file, blank ones too: a gold score and its pair share a line number.

    Raises:
        DataError: the file is missing, empty or not in the encoding.
    """
    try:
        lines = reading.read_lines(path, encoding=encoding)
    except DataError as error:
        raise DataError(error.what, error.where, GET_THE_DATA) from None
    if not any(lines):
        raise DataError("is empty", str(path), GET_THE_DATA)
    return lines
