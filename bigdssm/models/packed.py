"""Rows of different lengths end to end, without padding: packing, attention within rows, query positions."""

from __future__ import annotations

import inspect
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


class QueryPositions(NamedTuple):
    """Queries by their places, in any order; a row may have none. A tuple: ZeRO-3 looks for tensors in tuples only."""

    row: Tensor  # int64 [m]: the query's row among the batch's R
    seen: Tensor  # int64 [m]: how many of the row's history items lie before the query, 0 for none


FLASH_WIDTHS = range(8, 257, 8)  # of a head, that the kernel takes


class SequenceBounds(NamedTuple):
    """Where each row begins and ends."""

    offsets: Tensor  # int32 [R + 1]: row i is [offsets[i], offsets[i + 1])
    longest: int  # on the host, which is never asked to wait for it


class RowGroup(NamedTuple):
    """Rows of like length: those that are attended over at once where no kernel attends within packed rows."""

    rows: int
    longest: int  # of them; both on the host


class Packed(NamedTuple):
    """A list of R rows, laid end to end. A tuple: ZeRO-3 looks for tensors in tuples only."""

    values: Tensor  # int64 [P]
    row: Tensor  # int64 [P]: of each value
    place: Tensor  # int64 [P]: its column in the padded list
    spans: SequenceBounds
    groups: tuple[RowGroup, ...]  # of its rows, the longest ones first

    @property
    def num_rows(self) -> int:
        """Return R."""
        return self.spans.offsets.shape[0] - 1

    @property
    def lengths(self) -> Tensor:
        """Return how many values each row has, int64 [R]."""
        return self.spans.offsets.diff().long()

    @property
    def longest_first(self) -> Tensor:
        """Return the rows in the order of `groups`, int64 [R]: the device's, as the groups are the host's."""
        return self.lengths.argsort(descending=True, stable=True)

    def if_full(self) -> Tensor | Packed:
        """Return the list as a tensor, int64 [R, T], where no row would have to be padded for it."""
        full = len(self.values) == self.num_rows * self.spans.longest
        return self.values.view(self.num_rows, -1) if full else self

    def part(self, rows: slice, cells: slice, groups: tuple[RowGroup, ...]) -> Packed:
        """Return the rows [start, stop), whose values are the cells [start, stop)."""
        spans = SequenceBounds(self.spans.offsets[rows.start : rows.stop + 1] - cells.start, groups[0].longest)
        return Packed(self.values[cells], self.row[cells] - rows.start, self.place[cells], spans, groups)


Values = Tensor | Packed
"""One feature of one side: a tensor with one row per query or document, or a list of as many rows that is packed."""


class PackedLists(NamedTuple):
    """Which lists are packed, by feature."""

    query: frozenset[str] = frozenset()
    doc: frozenset[str] = frozenset()


class Attention(Protocol):
    """softmax(q kᵀ · scale) v within each row; causal: the i-th of a row's places sees its first i + 1."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        at: SequenceBounds,
        over: SequenceBounds,
        scale: float,
        causal: bool = False,
    ) -> Tensor:
        """Return [A, h, W] for q [A, h, W] and k, v [B, h, W], whose rows lie at `at` and `over`."""


def pack(list_RT: Tensor, fill: int, num_filled: int, longest: int) -> Packed:
    """Return a padded list packed; `fill` pads it, num_filled and longest are the host's: the device is not read."""
    filled_RT = list_RT != fill
    offsets = torch.nn.functional.pad(filled_RT.sum(dim=1).cumsum(0), (1, 0)).int()
    # Each cell that holds something goes to its own place, all others to one behind the last.
    flat = filled_RT.flatten()
    goes_to = torch.where(flat, flat.cumsum(0) - 1, num_filled)
    cell = torch.arange(list_RT.numel(), device=list_RT.device)
    taken = cell.new_zeros(num_filled + 1).scatter_(0, goes_to, cell)[:num_filled]
    width = list_RT.shape[1]
    spans, groups = SequenceBounds(offsets, longest), (RowGroup(list_RT.shape[0], longest),)
    return Packed(list_RT.flatten()[taken], taken // width, taken % width, spans, groups)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, at: SequenceBounds, over: SequenceBounds, scale: float, causal: bool = False
) -> Tensor:
    """Attend by FlashAttention's kernel for rows of different lengths: on CUDA, in half precision, without dropout."""
    window = (-1, 0) if causal else (-1, -1)
    attended = varlen_attn(
        q, k, v, at.offsets, over.offsets, at.longest, over.longest, scale=scale, window_size=window
    )  # fmt: skip
    assert isinstance(attended, Tensor)
    return attended


def flash_runs_on(device: torch.device) -> bool:
    """Return whether a device, and this torch, have the kernel of `flash_attention`; 2.10's takes no window."""
    known = {"scale", "window_size"} <= inspect.signature(varlen_attn).parameters.keys()
    return known and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
