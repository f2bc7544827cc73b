"""All that a loss gathers: the document columns of all ranks (W, ids, biases), cut into tiles.

W is the last and largest gather. It goes on while masks are planned and while tiles of this rank's own columns, which
need no other rank's, are worked on.

A column's index is its place in the gathered buffers: rank k's columns stand at k · longest, so ranks with fewer
columns leave indices unused and nothing is copied together after the gather. Tiles never span two ranks.

Shape legend: n columns of this rank, N of all ranks with those unused (world_size · longest), D vector size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group, PaddedRows
from bigdssm.losses.inputs import GlobalSizes, LossInputs

TILE_WIDTH = 1024  # columns: wide enough for the products, and a tile of scores stays in the cache


@dataclass(frozen=True)
class Tile:
    """Columns [start, stop)."""

    start: int
    stop: int
    own: bool  # of this rank

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.stop - self.start

    @property
    def columns(self) -> slice:
        """The columns."""
        return slice(self.start, self.stop)


@dataclass
class Columns:
    """All ranks' columns; W arrives in the background, so own tiles come first and `arriving` waits for the others."""

    gathered: PaddedRows
    tiles: list[Tile]
    own_start: int
    valid: Tensor  # [columns in use] their indices, ascending
    doc_ids: Tensor | None  # [N], None where each column is its own document
    beta: Tensor | None  # [N] float64
    neg_bias: Tensor | None  # [N] float64
    copies: Tensor | None  # [N] float64: how often a column counts as a negative, None where each counts once
    acc: torch.dtype
    _wide: dict[int, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """N."""
        return self.gathered.buffer.shape[0]

    @property
    def widest(self) -> int:
        """Columns of the widest tile."""
        return max((tile.width for tile in self.tiles), default=0)

    def counts(self) -> Tensor:
        """Return float64 [N]: how often a column counts as a negative, 0 where never and at unused indices."""
        counts = self.copies
        if counts is None:
            counts = torch.zeros(self.total, dtype=torch.float64, device=self.valid.device)
            counts.index_fill_(0, self.valid, 1.0)
        return counts if self.neg_bias is None else counts.masked_fill(self.neg_bias == -math.inf, 0.0)

    def arriving(self) -> Iterator[tuple[Tile, Tensor]]:
        """Yield each tile with its vectors [width, D] in the dtype of the products, after these have arrived."""
        for tile in self.tiles:
            if not tile.own:
                self.gathered.wait()
            if tile.start not in self._wide:  # widened once, as every block of rows asks again
                self._wide[tile.start] = self.gathered.buffer[tile.columns].to(self.acc)
            yield tile, self._wide[tile.start]


def gather_columns(
    x: LossInputs, sizes: GlobalSizes, copies_n: Tensor | None, width: int | None, group: Group | None
) -> Columns:
    """Gather ids and biases, and start the gather of W; `width` is the tiles' number of columns."""
    longest, width = sizes.longest, width or TILE_WIDTH
    tiles = []
    for owner in sorted(range(sizes.world_size), key=lambda owner: owner != sizes.rank):
        first, last = owner * longest, owner * longest + sizes.num_columns[owner]
        tiles += [Tile(k, min(k + width, last), owner == sizes.rank) for k in range(first, last, width)]

    def gathered(vector: Tensor | None) -> Tensor | None:
        return None if vector is None else distributed.all_gather_padded(vector, longest, group).wait()

    in_use = [torch.arange(k * longest, k * longest + count) for k, count in enumerate(sizes.num_columns)]
    return Columns(
        tiles=tiles,
        own_start=sizes.rank * longest,
        valid=torch.cat(in_use).to(x.W.device),
        doc_ids=gathered(x.doc_ids),
        beta=gathered(None if x.beta is None else x.beta.detach().double()),
        neg_bias=gathered(None if x.neg_bias is None else x.neg_bias.double()),
        copies=gathered(copies_n),
        gathered=distributed.all_gather_padded(x.W.detach(), longest, group, async_op=True),
        acc=x.acc,
    )
