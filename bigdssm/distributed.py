"""Rank, world size and collectives; the only module that uses torch.distributed.

All functions work without a process group (world size 1). Collectives take an optional `group` and are not
differentiable: the losses compute and reduce their gradients explicitly.
"""

import logging
import math
import re
import socket
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from bigdssm.errors import BigDSSMError, PeerError
from bigdssm.utils import timing

# torch 2.13 renamed all_gather_into_tensor to all_gather_single and warns; 2.10 has only the old name
warnings.filterwarnings("ignore", ".*all_gather_into_tensor.*", FutureWarning)
# DeepSpeed warns on its import that it computes on the CPU
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())

T = TypeVar("T")
Group = dist.ProcessGroup

# torch 2.13 renamed reduce_scatter_tensor; gloo supports it since the same release
_GLOO_REDUCE_SCATTER = hasattr(dist, "reduce_scatter_single")
_reduce_scatter = dist.reduce_scatter_single if _GLOO_REDUCE_SCATTER else dist.reduce_scatter_tensor

_CLOSED_BY_PEER = re.compile("connection (closed|reset) by peer", re.IGNORECASE)

_GLOO_BYTES = 4 << 20  # per reduce-scatter: gloo allocates two copies of its input

_background: WeakKeyDictionary[Group, Group] = WeakKeyDictionary()  # of a default group, for background threads


def is_distributed() -> bool:
    """Return whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def rank(group: Group | None = None) -> int:
    """Return this process's rank, 0 without a process group."""
    return dist.get_rank(group) if is_distributed() else 0


def world_size(group: Group | None = None) -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size(group) if is_distributed() else 1


def is_main() -> bool:
    """Return whether this process is rank 0."""
    return rank() == 0


def free_port() -> str:
    """Return an unused TCP port of this machine."""
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


def background_group() -> Group | None:
    """Return a gloo group of all ranks for background threads, None without other ranks. The first call is collective.

    A separate group, so that collectives of a background thread do not block those of the main thread.
    """
    if world_size() == 1:
        return None
    world = cast(Group, dist.group.WORLD)
    if world not in _background:
        _background[world] = dist.new_group(backend="gloo")
    return _background[world]


def broadcast_object(value: T) -> T:
    """Return the picklable `value` of rank 0 on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def any_rank(flag: bool) -> bool:
    """Return True on every rank if `flag` is True on any."""
    return bool(all_reduce(torch.tensor([int(flag)]), "max").item())


def raise_together(error: BigDSSMError | None, group: Group | None = None) -> None:
    """Raise on every rank if any rank passes an error: its own, or a PeerError that quotes the other rank's.

    Every rank must call it, with None if it succeeded, so that no rank waits for one that stopped.
    """
    messages = all_gather_object(None if error is None else str(error), group)
    if error is not None:
        raise error
    for other, message in enumerate(messages):
        if message is not None:
            raise PeerError(f"rank {other} stopped: {message}")


def computed_on_main(compute: Callable[[], T]) -> T:
    """Return the picklable result of `compute` on rank 0, on every rank. Raises its BigDSSMError on every rank."""
    result: T | None = None
    error: BigDSSMError | None = None
    if is_main():
        try:
            result = compute()
        except BigDSSMError as failed:
            error = failed
    raise_together(error)
    return cast(T, broadcast_object(result))


class SharedStore:
    """Key-value store of all ranks: the process group's store over a separate connection.

    A call blocks until the store responds, with the GIL released: use it in a daemon thread. Raises RuntimeError if the
    store is gone.
    """

    def __init__(self, name: str) -> None:
        """`name` is the prefix of all keys and must be new."""
        shared: Any = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"bigdssm/{name}", shared.clone())

    def write(self, key: str, value: str) -> None:
        """Set a value."""
        self._store.set(key, value)

    def write_once(self, key: str, value: str) -> None:
        """Set a value unless the key exists."""
        self._store.compare_set(key, "", value)

    def read(self, key: str) -> str | None:
        """Return a value, or None if the key does not exist."""
        return str(self._store.get(key).decode()) if self._store.check([key]) else None


def is_collective_failure(error: BaseException) -> bool:
    """Return whether a collective raised this error: another rank has left it, or its backend failed by itself."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def is_closed_by_peer(error: BaseException) -> bool:
    """Return whether a collective failed because the process of another rank closed the connection."""
    return is_collective_failure(error) and bool(_CLOSED_BY_PEER.search(str(error)))


def all_gather_padded(rows: Tensor, longest: int, group: Group | None = None) -> Tensor:
    """Return the rows [n_k ≤ longest, …] of all ranks as [world_size · longest, …].

    Rank k's rows start at k · longest; padding rows are zero.
    """
    if world_size(group) == 1:
        return rows
    local = rows.detach()
    if rows.shape[0] < longest or not rows.is_contiguous():
        local = rows.new_zeros((longest, *rows.shape[1:]))
        local[: rows.shape[0]] = rows
    buffer = local.new_empty((world_size(group) * longest, *rows.shape[1:]))
    with timing.span("communication"):
        dist.all_gather_into_tensor(buffer, local, group=group)
    return buffer


def all_gather_rows(rows: Tensor, counts: Sequence[int], group: Group | None = None) -> Tensor:
    """Return the rows [n_k, …] of all ranks as [Σ n_k, …], in rank order; `counts[k]` is rank k's n_k."""
    if world_size(group) == 1:
        return rows
    longest = max(counts)
    buffer = all_gather_padded(rows, longest, group)
    return torch.cat([buffer[k * longest : k * longest + count] for k, count in enumerate(counts)])


@dataclass
class PackedRows:
    """The rows of several tensors of all ranks; call `wait` before they are read: the gather may be in progress."""

    values: list[Tensor]  # [world_size · longest, …]; rank k's rows start at k · longest
    work: Any = None

    def wait(self) -> list[Tensor]:
        """Wait for the gather and return the tensors."""
        if self.work is not None:
            with timing.span("communication"):
                self.work.wait()
        return self.values


def all_gather_packed(values: Sequence[Tensor], longest: int, group: Group | None = None) -> PackedRows:
    """Gather the rows [n_k ≤ longest, …] of several tensors of any dtypes in one asynchronous collective.

    The values of a row are adjacent, in order of decreasing alignment (16 bytes if a value is wider than 8 bytes, else
    its element size): matrix products on CPU and GPU accept the resulting views without a copy. Padding rows are zero.
    """
    if world_size(group) == 1:
        return PackedRows(list(values))
    sizes = [value.element_size() * math.prod(value.shape[1:]) for value in values]
    multiples = [16 if size > 8 else value.element_size() for size, value in zip(sizes, values, strict=True)]
    offsets, width = [0] * len(values), 0
    for k in sorted(range(len(values)), key=lambda k: -multiples[k]):
        offsets[k] = _round_up(width, multiples[k])
        width = offsets[k] + sizes[k]

    def views(rows: Tensor) -> list[Tensor]:
        """Return one view of packed rows per tensor."""
        columns = [rows[:, offset : offset + size] for offset, size in zip(offsets, sizes, strict=True)]
        return [
            column.view(value.dtype).view(len(rows), *value.shape[1:])
            for column, value in zip(columns, values, strict=True)
        ]

    local = torch.zeros((longest, _round_up(width, 16)), dtype=torch.uint8, device=values[0].device)
    for value, view in zip(values, views(local), strict=True):
        view[: value.shape[0]] = value
    buffer = local.new_empty((world_size(group) * longest, local.shape[1]))
    with timing.span("communication"):
        work = dist.all_gather_into_tensor(buffer, local, group=group, async_op=True)
    return PackedRows(views(buffer), work)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def reduce_scatter_rows(buffer: Tensor, group: Group | None = None) -> Tensor:
    """Sum a buffer [world_size · longest, …] over the ranks and return this rank's rows [longest, …].

    Falls back to an all-reduce (twice the traffic) if the backend has no reduce-scatter.
    """
    if world_size(group) == 1:
        return buffer
    longest = buffer.shape[0] // world_size(group)
    if dist.get_backend(group) == "gloo" and not _GLOO_REDUCE_SCATTER:
        return all_reduce(buffer, "sum", group).narrow(0, rank(group) * longest, longest)
    local = buffer.new_empty((longest, *buffer.shape[1:]))
    by_rank, chunk_rows = buffer.unflatten(0, (world_size(group), longest)), longest
    if dist.get_backend(group) == "gloo":
        chunk_rows = max(1, _GLOO_BYTES * longest // max(1, buffer.nbytes))
    with timing.span("communication"):
        for first in range(0, longest, max(1, chunk_rows)):
            chunk = slice(first, first + chunk_rows)
            _reduce_scatter(local[chunk], by_rank[:, chunk].flatten(0, 1), group=group)
    return local


def all_to_all_rows(rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """Send the first `sent[0]` rows to rank 0, the next `sent[1]` to rank 1, …; return those received, in rank order.

    received: the number of rows from each rank.
    """
    if world_size() == 1:
        return rows
    buffer = rows.new_empty((sum(received), *rows.shape[1:]))
    with timing.span("communication"):
        dist.all_to_all_single(buffer, rows.contiguous(), list(received), list(sent))
    return buffer
