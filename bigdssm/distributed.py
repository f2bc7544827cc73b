"""Rank, world size and the few collectives the project uses; the only module that touches torch.distributed.

Everything works without a process group, as a world of one. Collectives take an optional `group`; gradients are
the business of the callers (losses/ has autograd functions around these).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bigdssm.errors import BigDSSMError, PeerError

T = TypeVar("T")
Group = dist.ProcessGroup


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


def barrier() -> None:
    """Wait for every rank."""
    if is_distributed():
        dist.barrier()


def all_reduce(tensor: Tensor, op: str = "sum", group: Group | None = None) -> Tensor:
    """Reduce `tensor` in place over the ranks (`sum`, `max` or `min`) and return it."""
    if world_size(group) > 1:
        dist.all_reduce(tensor, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[op], group)
    return tensor


def all_gather_object(value: T, group: Group | None = None) -> list[T]:
    """Return every rank's picklable `value`, in rank order."""
    if world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


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


def raise_together(error: BigDSSMError | None) -> None:
    """Raise on every rank where any rank brings an error: the own one, or a PeerError that quotes the other's.

    A collective: every rank must call it, with None where all is well, so that no rank waits for one that stopped.
    """
    messages = all_gather_object(None if error is None else str(error))
    if error is not None:
        raise error
    for other, message in enumerate(messages):
        if message is not None:
            raise PeerError(f"rank {other} stopped: {message}")


def all_gather_rows(rows: Tensor, counts: Sequence[int], group: Group | None = None) -> Tensor:
    """Return the rows [n_k, …] of all ranks as [Σ n_k, …], in rank order; `counts[k]` is rank k's n_k."""
    if world_size(group) == 1:
        return rows
    longest = max(counts)
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
