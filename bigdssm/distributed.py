"""Rank, world size and the few collectives the project uses; the only module that touches torch.distributed.

Everything works without a process group, as a world of one. Collectives take an optional `group` and carry no
gradients: the losses compute theirs by hand and reduce them.
"""

from __future__ import annotations

import logging
import math
import socket
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bigdssm.errors import BigDSSMError, PeerError
from bigdssm.utils import timing

# torch 2.13 calls it all_gather_single, and warns; 2.10 does not have that name
warnings.filterwarnings("ignore", ".*all_gather_into_tensor.*", FutureWarning)
# DeepSpeed warns on its import that it computes on the CPU
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())

T = TypeVar("T")
Group = dist.ProcessGroup

# torch 2.13 renamed reduce_scatter_tensor; gloo has it since the same release
_GLOO_REDUCE_SCATTER = hasattr(dist, "reduce_scatter_single")
_reduce_scatter = dist.reduce_scatter_single if _GLOO_REDUCE_SCATTER else dist.reduce_scatter_tensor

_GLOO_BYTES = 4 << 20  # reduced at once: it works on two copies of what it is given

_background: tuple[Group | None, Group] | None = None  # the whole group that there was, and one for threads


def is_distributed() -> bool:
    """Return True where a process group exists."""
    return dist.is_available() and dist.is_initialized()


def rank(group: Group | None = None) -> int:
    """Return this process's rank, 0 without a process group."""
    return dist.get_rank(group) if is_distributed() else 0


def world_size(group: Group | None = None) -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size(group) if is_distributed() else 1


def is_main() -> bool:
    """Return True on rank 0."""
    return rank() == 0


def shutdown() -> None:
    """Leave the process group. Without it a rank that ends last can die of the threads that the group still runs."""
    if is_distributed():
        dist.destroy_process_group()


def free_port() -> str:
    """Return a TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def barrier() -> None:
    """Wait for every rank."""
    if is_distributed():
        dist.barrier()


def all_reduce(tensor: Tensor, op: str = "sum", group: Group | None = None) -> Tensor:
    """Reduce `tensor` in place over the ranks (`sum`, `max` or `min`) and return it."""
    if world_size(group) > 1:
        with timing.span("communication"):
            dist.all_reduce(
                tensor, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[op], group
            )
    return tensor


def all_gather_object(value: T, group: Group | None = None) -> list[T]:
    """Return every rank's picklable `value`, in rank order."""
    if world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def gather_objects(value: T, group: Group | None = None) -> list[T]:
    """Return every rank's picklable `value`, in rank order, on rank 0; nothing on the others."""
    if world_size(group) == 1:
        return [value]
    values: list[Any] | None = [None] * world_size(group) if rank(group) == 0 else None
    dist.gather_object(value, values, dst=0, group=group)
    return values or []


def background_group() -> Group | None:
    """Return the group of all ranks that threads beside the main one talk over, None without other ranks.

    A collective when it is first asked for. What such a thread waits for does not hold up the main one's collectives.
    """
    global _background
    if world_size() == 1:
        return None
    whole = dist.group.WORLD
    if _background is None or _background[0] is not whole:
        _background = whole, dist.new_group(backend="gloo")
    return _background[1]


def broadcast_object(value: T, src: int = 0) -> T:
    """Return rank `src`'s picklable `value` on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=src)
    return box[0]


def any_rank(flag: bool) -> bool:
    """Return True on every rank when `flag` is True on any."""
    if world_size() == 1:
        return flag
    return bool(all_reduce(torch.tensor([int(flag)]), "max").item())


def raise_together(error: BigDSSMError | None, group: Group | None = None) -> None:
    """Raise on every rank where any rank brings an error: the own one, or a PeerError that quotes the other's.

    A collective: every rank must call it, with None where all is well, so that no rank waits for one that stopped.
    """
    messages = all_gather_object(None if error is None else str(error), group)
    if error is not None:
        raise error
    for other, message in enumerate(messages):
        if message is not None:
            raise PeerError(f"rank {other} stopped: {message}")


class Board:
    """Short notes that every rank may read, on the store of the process group, over a connection of its own.

    A call blocks for as long as the store does not answer, with the interpreter lock released: use it in a thread that
    nobody waits for. Raises RuntimeError where the store is gone.
    """

    def __init__(self, name: str) -> None:
        """`name` must be new: notes of the same name would be taken for this board's."""
        shared: Any = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"bigdssm/{name}", shared.clone())

    def write(self, key: str, note: str) -> None:
        """Set a note."""
        self._store.set(key, note)

    def write_once(self, key: str, note: str) -> None:
        """Set a note that the first writer keeps."""
        self._store.compare_set(key, "", note)

    def read(self, key: str) -> str | None:
        """Return a note, or None where there is none."""
        return str(self._store.get(key).decode()) if self._store.check([key]) else None


def is_peer_failure(error: BaseException) -> bool:
    """Return True where an error is what a collective raises when another rank has left it."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


@dataclass
class PaddedRows:
    """The rows of all ranks in one buffer [world_size · longest, …]; rank k's rows start at k · longest.

    `wait` must be called before any are read: the gather may still be under way.
    """

    buffer: Tensor
    longest: int
    work: Any = None

    def wait(self) -> Tensor:
        """Wait for the gather to end and return the buffer."""
        if self.work is not None:
            with timing.span("communication"):
                self.work.wait()
            self.work = None
        return self.buffer


def all_gather_padded(rows: Tensor, longest: int, group: Group | None = None, async_op: bool = False) -> PaddedRows:
    """Gather the rows [n_k ≤ longest, …] of all ranks in one collective; padding rows are zero.

    With `async_op` the collective runs in the background.
    """
    if world_size(group) == 1:
        return PaddedRows(rows, longest)
    own = rows.detach()
    if rows.shape[0] < longest or not rows.is_contiguous():
        own = rows.new_zeros((longest, *rows.shape[1:]))
        own[: rows.shape[0]] = rows
    buffer = own.new_empty((world_size(group) * longest, *rows.shape[1:]))
    with timing.span("communication"):
        work = dist.all_gather_into_tensor(buffer, own, group=group, async_op=async_op)
    return PaddedRows(buffer, longest, work if async_op else None)


def all_gather_rows(rows: Tensor, counts: Sequence[int], group: Group | None = None) -> Tensor:
    """Return the rows [n_k, …] of all ranks as [Σ n_k, …], in rank order; `counts[k]` is rank k's n_k."""
    if world_size(group) == 1:
        return rows
    longest = max(counts)
    buffer = all_gather_padded(rows, longest, group).wait()
    return torch.cat([buffer[k * longest : k * longest + count] for k, count in enumerate(counts)])


@dataclass
class PackedRows:
    """Several values of each row of all ranks in one buffer of bytes; rank k's rows start at k · longest."""

    gathered: PaddedRows
    parts: list[tuple[int, tuple[int, ...], torch.dtype]]  # offset in a row, shape and dtype of a row's value

    def wait(self) -> list[Tensor]:
        """Wait for the gather to end and return the values as views [world_size · longest, …] of the buffer."""
        return self.views(self.gathered.wait())

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Return the values of the rows of a buffer."""
        views = []
        for at, shape, dtype in self.parts:
            part = buffer[:, at : at + math.prod(shape) * dtype.itemsize]
            views.append(part.view(dtype).view(buffer.shape[0], *shape))
        return views


@dataclass
class OwnRows:
    """The values of a world of one."""

    values: list[Tensor]

    def wait(self) -> list[Tensor]:
        """Return the values."""
        return self.values


def all_gather_packed(values: Sequence[Tensor], longest: int, group: Group | None = None) -> PackedRows | OwnRows:
    """Gather the rows [n_k ≤ longest, …] of several tensors of any dtypes in one collective, in the background.

    The values of a row lie side by side, each at a multiple of 16 bytes where it is wider than 8, those that need least
    last: the views that come back are what products, on a device too, take as they are. Padding rows are zero.
    """
    if world_size(group) == 1:
        return OwnRows(list(values))
    sizes = [value.element_size() * math.prod(value.shape[1:]) for value in values]
    multiples = [16 if size > 8 else value.element_size() for size, value in zip(sizes, values, strict=True)]
    places, width = [0] * len(values), 0
    for k in sorted(range(len(values)), key=lambda k: -multiples[k]):
        places[k] = _up(width, multiples[k])
        width = places[k] + sizes[k]
    parts = [(place, tuple(value.shape[1:]), value.dtype) for place, value in zip(places, values, strict=True)]
    own = torch.zeros((longest, _up(width, 16)), dtype=torch.uint8, device=values[0].device)
    packed = PackedRows(PaddedRows(own, longest), parts)
    for value, view in zip(values, packed.views(own), strict=True):
        view[: value.shape[0]] = value
    return PackedRows(all_gather_padded(own, longest, group, async_op=True), parts)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def reduce_scatter_rows(buffer: Tensor, group: Group | None = None) -> Tensor:
    """Sum a buffer [world_size · longest, …] over the ranks and return this rank's part [longest, …].

    Falls back to an all-reduce (twice the traffic) where the backend has no reduce-scatter.
    """
    if world_size(group) == 1:
        return buffer
    longest = buffer.shape[0] // world_size(group)
    if dist.get_backend(group) == "gloo" and not _GLOO_REDUCE_SCATTER:
        return all_reduce(buffer, "sum", group).narrow(0, rank(group) * longest, longest)
    own = buffer.new_empty((longest, *buffer.shape[1:]))
    of_ranks, at_once = buffer.unflatten(0, (world_size(group), longest)), longest
    if dist.get_backend(group) == "gloo":
        at_once = max(1, _GLOO_BYTES * longest // max(1, buffer.nbytes))
    with timing.span("communication"):
        for first in range(0, longest, max(1, at_once)):
            part = slice(first, first + at_once)
            _reduce_scatter(own[part], of_ranks[:, part].flatten(0, 1), group=group)
    return own


def exchange_rows(buffer: Tensor, group: Group | None = None) -> Tensor:
    """Return what every rank has for this one, [world_size · longest, …] in rank order.

    `buffer` of the same shape holds what this rank has for each: `longest` rows for rank 0, as many for rank 1, ….
    """
    if world_size(group) == 1:
        return buffer
    received = torch.empty_like(buffer)
    with timing.span("communication"):
        dist.all_to_all_single(received, buffer.contiguous(), group=group)
    return received
