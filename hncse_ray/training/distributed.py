"""What ranks tell each other: gathered rows with gradient, the first rank's word, failures.

Every function is the identity, or local, where no process group is initialised.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from hncse_ray.encoder import SentenceEncoder
from hncse_ray.errors import HncseError
from hncse_ray.objectives import Share

Value = TypeVar("Value")
Decision = TypeVar("Decision")

_MOST_BY_STORE = 1 << 16  # bytes; what is larger is broadcast once the others are there
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 2e-4, 0.1  # between two looks, a tenth of the wait so far


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.sizes = sizes
        padded = _padded(rows, max(sizes))
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        parts = [_padded(part, max(ctx.sizes)) for part in torch.split(grad_outputs[0], ctx.sizes)]
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts)
        return own[: ctx.sizes[rank()]], None


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


def _padded(rows: Tensor, size: int) -> Tensor:
    if len(rows) == size:
        return rows.contiguous()
    padded = rows.new_zeros((size, *rows.shape[1:]))
    padded[: len(rows)] = rows
    return padded


def gather_rows(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """Concatenate every rank's rows in rank order, with gradient: what flows to a row on any rank is added up.

    All ranks must push gradient through it, or none.

    Args:
        rows: ``[b, ...]``, this rank's rows.
        sizes: b of every rank; they may differ.

    Returns:
        ``[sum(sizes), ...]``.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows, tuple(sizes))  # type: ignore[no-untyped-call]
    return gathered


@dataclass(frozen=True)
class RankShare(Share):
    """This rank's rows of a global batch.

    Summed over the ranks (DDP's mean times their number) the parameters' gradient is that of one process with the whole
    batch: each computes the loss of its own rows, and what it finds for the columns of others goes back to these.

    Attributes:
        sizes: rows of every rank.
    """

    sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, sizes: tuple[int, ...]) -> RankShare:
        """Return the share of this rank."""
        return cls(start=sum(sizes[: rank()]), processes=world_size(), sizes=sizes)

    def gather(self, rows: Tensor) -> Tensor:
        """See :func:`gather_rows`."""
        return gather_rows(rows, self.sizes)

    def add(self, value: Tensor) -> Tensor:
        """Add the values of all ranks up; gradient is that of the own."""
        if world_size() == 1:
            return value
        total: Tensor = _AddUp.apply(value)  # type: ignore[no-untyped-call]
        return total


def from_first(work: Callable[[], Value]) -> Value:
    """Do on the first rank what it does or decides alone, and return the outcome on every rank.

    The others wait by the process group's store, for as long as the work takes: in a collective they would outlast its
    limit. ``work`` must not communicate with them itself.

    Raises:
        HncseError: of ``work``, on every rank.
        RuntimeError: on the other ranks, if ``work`` has failed for an unknown cause.
    """
    if world_size() == 1:
        return work()
    board = _Board()
    if rank() != 0:
        return cast(Value, board.hear())
    try:
        value = work()
    except HncseError as error:
        error.on_all_ranks = True
        board.tell(error)
        raise
    except BaseException as error:
        board.tell(RuntimeError(f"the first rank has failed ({type(error).__name__}: {error})"))
        raise
    board.tell(value)
    return value


def decide_together(value: Value, decide: Callable[[list[Value]], Decision]) -> Decision:
    """Hand every rank's value to the first, in rank order, and return on all what it makes of them.

    It waits, as :func:`from_first` does, for the slowest.
    """
    if world_size() == 1:
        return decide([value])
    board = _Board()
    if rank() != 0:
        board.put(value)
    return from_first(lambda: decide([value, *board.collect()]))


def gather_values(value: Value) -> list[Value]:
    """Return every rank's value on all, in rank order; see :func:`decide_together`."""
    return decide_together(value, list)


def raise_together(error: HncseError | None) -> None:
    """Raise on every rank if any rank has an error, so that none waits for ever for another.

    Raises:
        HncseError: the error of the lowest rank that has one.
    """
    first = next((e for e in gather_values(error) if e is not None), None)
    if first is not None:
        first.on_all_ranks = True
        raise first


def agree_on_precision(encoder: SentenceEncoder) -> None:
    """Have all ranks train in one precision, fp32 where the hardware of any chooses it: their vectors are gathered."""
    if len(set(gather_values(encoder.autocast))) > 1:
        encoder.autocast, encoder.precision = None, "fp32 (the hardware of some workers has no bf16)"


class Swap:
    """What the ranks' threads tell each other of one thing: each hands over a value, and gets those of all.

    It goes by the store of the process group, beside whatever the ranks' main threads do, and so is for small things.

    Args:
        name: of the thing; each only once.
        timeout_s: how long to wait for the others.
        over: whether nobody waits for the outcome any more.
    """

    def __init__(self, name: str, *, timeout_s: float, over: Callable[[], bool] = lambda: False) -> None:
        self._name, self._timeout_s, self._over = f"swap/{name}", timeout_s, over
        self._told = False

    def __call__(self, value: Value) -> list[Value]:
        """Return the values of all, in rank order.

        Raises:
            TimeoutError: another has none, or hands none over.
        """
        if world_size() == 1:
            return [value]
        self._tell(value)
        names = [f"{self._name}/{other}" for other in range(world_size())]
        waiting = _Waiting()
        while not _store().check(names):
            if self._over() or waiting.seconds > self._timeout_s:
                raise TimeoutError(f"another rank has not answered within {self._timeout_s:g} s")
            waiting.pause()
        values = [pickle.loads(_store().get(name)) for name in names]
        self._end()
        if any(isinstance(value, _GivenUp) for value in values):
            raise TimeoutError("another rank has no answer")
        return cast(list[Value], values)

    def give_up(self) -> None:
        """Tell the others that this rank has nothing to hand over."""
        if world_size() > 1 and not self._told:
            self._tell(_GivenUp())
            self._end()

    def _end(self) -> None:
        """Leave nothing in the store, once nobody reads any more."""
        if _store().add(f"{self._name}/heard", 1) == world_size():
            for name in (*map(str, range(world_size())), "heard"):
                _store().delete_key(f"{self._name}/{name}")

    def _tell(self, value: object) -> None:
        self._told = True
        _store().set(f"{self._name}/{rank()}", pickle.dumps(value))


class _GivenUp:
    """Stands for a value that will not come."""


class _Waiting:
    """Ever longer pauses."""

    def __init__(self) -> None:
        self._begun = time.monotonic()

    @property
    def seconds(self) -> float:
        """So far."""
        return time.monotonic() - self._begun

    def pause(self) -> None:
        time.sleep(min(_LONGEST_PAUSE_S, max(_SHORTEST_PAUSE_S, 0.1 * self.seconds)))


def _store() -> Any:
    group = dist.group.WORLD
    assert group is not None
    return group.get_group_store()


class _Board:
    """One message of the first rank to the others, or of these to it, by the store of the process group.

    Unlike a collective it has no limit of time, and what ends with an error is heard of at once; a first rank that is
    gone ends the wait, as the store is gone with it. The ranks make their boards in the same order.
    """

    def __init__(self) -> None:
        self._store = _store()
        self._name = f"board/{self._store.add(f'boards/{rank()}', 1)}"

    def tell(self, outcome: object) -> None:
        """Tell the others a value, or the error that they are to raise; on the first rank."""
        content = pickle.dumps(outcome)
        is_large = len(content) > _MOST_BY_STORE
        message = pickle.dumps((is_large, len(content) if is_large else content))
        self._store.set(self._name, message)
        if is_large:  # the others are there at once: this collective takes as long as the bytes do
            dist.broadcast(torch.frombuffer(bytearray(content), dtype=torch.uint8).to(_device()), src=0)

    def hear(self) -> object:
        """Return or raise what the first rank tells; on the others."""
        self._wait_for(self._name)
        is_large, content = pickle.loads(self._store.get(self._name))
        if self._store.add(f"{self._name}/heard", 1) == world_size() - 1:
            self._delete(self._name, f"{self._name}/heard")
        if is_large:
            received = torch.empty(content, dtype=torch.uint8, device=_device())
            dist.broadcast(received, src=0)
            content = received.cpu().numpy().tobytes()
        outcome = pickle.loads(content)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def put(self, value: object) -> None:
        """Hand a value to the first rank; on the others."""
        self._store.set(f"{self._name}/{rank()}", pickle.dumps(value))

    def collect(self) -> list[Any]:
        """Return what the others have put, in rank order; on the first rank."""
        names = [f"{self._name}/{other}" for other in range(1, world_size())]
        self._wait_for(*names)
        values = [pickle.loads(self._store.get(name)) for name in names]
        self._delete(*names)
        return values

    def _wait_for(self, *names: str) -> None:
        waiting = _Waiting()
        while not self._store.check(list(names)):
            waiting.pause()

    def _delete(self, *names: str) -> None:
        for name in names:
            self._store.delete_key(name)


def _device() -> torch.device:
    """Return where collectives take their tensors from."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
