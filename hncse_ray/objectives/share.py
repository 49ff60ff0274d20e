"""The rows of a global batch that one process holds, and how it learns of the others'."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Share:
    """Rows of a global batch: here all of them, in a subclass those of one process of several.

    An objective is given its own rows alone. It compares these to the columns that all have gathered, and the loss of
    the batch is the sum of what the processes make of their rows, divided by the rows of the batch. All processes must
    call the methods in the same order, and push gradient through the same of them.

    Attributes:
        start: number of the first own row in the batch.
        processes: how many share the batch.
    """

    start: int = 0
    processes: int = 1

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows ``[B, ...]`` of all, in order; a row's gradient is the sum of what flows to it anywhere."""
        return rows

    def add(self, value: Tensor) -> Tensor:
        """Return the sum over all processes, whose gradient is that of the own value."""
        return value


WHOLE = Share()
"""All rows, in one process."""
