"""The document columns of all ranks: one gather of W (and of ids and biases), cut into tiles.

A column's *slot* is its place in the gathered buffers: rank k's columns stand at k · longest, so ranks with fewer
columns leave slots unused and nothing is copied together after the gather. Tiles never span two ranks.

Shape legend: n columns of this rank, N slots (world_size · longest), D vector size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group, PaddedRows
from bigdssm.losses.inputs import Facts, LossInputs


@dataclass(frozen=True)
class Tile:
    """Slots [start, stop); `at` counts the columns of the tiles before it."""

    start: int
    stop: int
    at: int

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.stop - self.start


@dataclass
class Columns:
    """All ranks' columns; W arrives in the background, so own tiles come first and `ready` waits before the others."""

    gathered: PaddedRows
    tiles: list[Tile]
    num_own_tiles: int
    own_start: int
    num_slots: int
    num_columns: int
    valid: Tensor  # [num_columns] the slots in use, ascending
    doc_keys: Tensor | None  # [N] document ids, None where each column is its own document
    beta: Tensor | None  # [N] float64
    neg_bias: Tensor | None  # [N] float64
    acc: torch.dtype

    def ready(self, tile_index: int) -> Tile:
        """Return tile `tile_index`, after its vectors have arrived."""
        if tile_index == self.num_own_tiles:
            self.gathered.wait()
        return self.tiles[tile_index]

    def vectors(self, tile: Tile) -> Tensor:
        """Return a tile's vectors [width, D] in the dtype of the products."""
        return self.gathered.buffer[tile.start : tile.stop].to(self.acc)


def gather_columns(x: LossInputs, facts: Facts, width: int, group: Group | None) -> Columns:
    """Start the gather of W and gather ids and biases; `width` is the tiles' number of columns."""
    device, longest = x.W.device, facts.longest
    gathered = distributed.all_gather_padded(x.W.detach(), longest, group, async_op=True)
    own: list[tuple[int, int]] = []
    others: list[tuple[int, int]] = []
    for owner, count in enumerate(facts.num_columns):
        start = owner * longest
        pieces = [(start + lo, start + min(lo + width, count)) for lo in range(0, count, width)]
        (own if owner == facts.rank else others).extend(pieces)
    tiles, at = [], 0
    for start, stop in own + others:
        tiles.append(Tile(start, stop, at))
        at += stop - start
    valid = [torch.arange(k * longest, k * longest + count, device=device) for k, count in enumerate(facts.num_columns)]
    return Columns(
        gathered=gathered,
        tiles=tiles,
        num_own_tiles=len(own),
        own_start=facts.rank * longest,
        num_slots=facts.world_size * longest,
        num_columns=sum(facts.num_columns),
        valid=torch.cat(valid),
        doc_keys=_gather_vector(x.doc_ids, longest, group),
        beta=_gather_vector(None if x.beta is None else x.beta.detach().double(), longest, group),
        neg_bias=_gather_vector(None if x.neg_bias is None else x.neg_bias.double(), longest, group),
        acc=x.acc,
    )


def _gather_vector(vector: Tensor | None, longest: int, group: Group | None) -> Tensor | None:
    if vector is None:
        return None
    return distributed.all_gather_padded(vector, longest, group).wait()
