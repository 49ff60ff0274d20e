"""The text files of a SentEval folder."""

from __future__ import annotations

from pathlib import Path

from hncse_ray.errors import DataError

GET_THE_DATA = "It should be SentEval's data/downstream folder; name it in evaluation.senteval_path"


def read_lines(path: Path, encoding: str = "utf-8-sig") -> list[str]:
    """Lines split at line feeds only: a U+0085 or U+2028 inside a sentence does not shift the rows.

    Raises:
        DataError: the file is missing, empty or not in the encoding.
    """
    try:
        text = path.read_bytes().decode(encoding)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", str(path), GET_THE_DATA) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError("is not UTF-8", f"{path}:{line}", "Fetch it again or convert it") from None
    if not text.strip("\r\n"):
        raise DataError("is empty", str(path), GET_THE_DATA)
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
