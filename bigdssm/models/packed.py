"""Packed (unpadded) sequences: packing, attention within rows, query positions."""

import inspect
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

FLASH_WIDTHS = range(8, 257, 8)  # head widths that the kernel supports


class QueryPositions(NamedTuple):
    """Queries by row and position, in any order; a row may have none. A tuple: ZeRO-3 hooks search tuples only."""

    row: Tensor  # int64 [m]: row in the batch
    prefix_length: Tensor  # int64 [m]: number of history items before the query
    most: int = 0  # queries per row at most, a Python integer; 0: unknown


class SequenceBounds(NamedTuple):
    """Row bounds of a packed list (`cu_seqlens` and `max_seqlen` of FlashAttention)."""

    offsets: Tensor  # int32 [R + 1]: row i is [offsets[i], offsets[i + 1])
    longest: int  # a Python integer: no synchronization with the device


class RowGroup(NamedTuple):
    """Rows of similar length that are padded and attended over together when there is no kernel for packed rows."""

    rows: int
    longest: int


class Packed(NamedTuple):
    """A packed list feature of R rows. A tuple: ZeRO-3 hooks search tuples only."""

    values: Tensor  # int64 [P]
    row: Tensor  # int64 [P]
    position: Tensor  # int64 [P]: column in the padded list
    bounds: SequenceBounds
    groups: tuple[RowGroup, ...]  # longest first

    @property
    def num_rows(self) -> int:
        """Return R."""
        return self.bounds.offsets.shape[0] - 1

    @property
    def lengths(self) -> Tensor:
        """Return the number of values per row, int64 [R]."""
        return self.bounds.offsets.diff().long()

    @property
    def longest_first(self) -> Tensor:
        """Return the rows in the order of `groups`, int64 [R]."""
        return self.lengths.argsort(descending=True, stable=True)

    def slice_rows(self, rows: slice, cells: slice, groups: tuple[RowGroup, ...]) -> "Packed":
        """Return the rows in `rows`; `cells` is the range of their values."""
        bounds = SequenceBounds(self.bounds.offsets[rows.start : rows.stop + 1] - cells.start, groups[0].longest)
        return Packed(self.values[cells], self.row[cells] - rows.start, self.position[cells], bounds, groups)


Values = Tensor | Packed
"""One feature of one side: a tensor with one row per query or document, or a packed list of as many rows."""


class PackedLists(NamedTuple):
    """Names of the features whose lists are packed."""

    query: frozenset[str] = frozenset()
    doc: frozenset[str] = frozenset()


class Attention(Protocol):
    """softmax(q kᵀ · scale) v within each row; causal: position i attends over positions 0 to i of its row.

    window: position i attends over positions nearer than this to i.
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_bounds: SequenceBounds,
        key_bounds: SequenceBounds,
        scale: float,
        causal: bool = False,
        window: int | None = None,
    ) -> Tensor:
        """Return [A, h, W] for q [A, h, W] and k, v [B, h, W]."""


def pack(list_RT: Tensor, fill: int, num_filled: int, longest: int) -> Packed:
    """Pack a padded list. `num_filled` and `longest` are known on the host, so that the device is not read."""
    filled_RT = list_RT != fill
    offsets = torch.nn.functional.pad(filled_RT.sum(dim=1).cumsum(0), (1, 0)).int()
    # Each filled cell has its own target index; all padding goes to one extra cell at the end.
    flat = filled_RT.flatten()
    goes_to = torch.where(flat, flat.cumsum(0) - 1, num_filled)
    cell = torch.arange(list_RT.numel(), device=list_RT.device)
    taken = cell.new_zeros(num_filled + 1).scatter_(0, goes_to, cell)[:num_filled]
    width = list_RT.shape[1]
    bounds, groups = SequenceBounds(offsets, longest), (RowGroup(list_RT.shape[0], longest),)
    return Packed(list_RT.flatten()[taken], taken // width, taken % width, bounds, groups)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_bounds: SequenceBounds,
    key_bounds: SequenceBounds,
    scale: float,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """Attend by FlashAttention's variable-length kernel: on CUDA, in half precision, without dropout."""
    from torch.nn.attention.varlen import varlen_attn  # imports the compiler: 2 seconds

    reach = -1 if window is None else window - 1
    attended = varlen_attn(
        q, k, v, query_bounds.offsets, key_bounds.offsets, query_bounds.longest, key_bounds.longest,
        scale=scale, window_size=(reach, 0 if causal else reach),
    )  # fmt: skip
    assert isinstance(attended, Tensor)
    return attended


def flash_runs_on(device: torch.device) -> bool:
    """Return whether the device and this version of torch have the kernel; torch 2.10's has no window."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"scale", "window_size"} <= inspect.signature(varlen_attn).parameters.keys()
