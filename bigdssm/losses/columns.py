"""All that a loss gathers: the document columns of all ranks (W, ids, biases), cut into tiles, and the known positives.

W is the last and largest gather. It goes on while masks are planned and while tiles of this rank's own columns, which
need no other rank's, are worked on.

A column's *slot* is its place in the gathered buffers: rank k's columns stand at k · longest, so ranks with fewer
columns leave slots unused and nothing is copied together after the gather. Tiles never span two ranks.

Shape legend: n columns of this rank, N slots (world_size · longest), D vector size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
    pairs: Tensor | None  # [M, 2] (query id, slot of its positive, −1 at weight 0) of all ranks; None without query_ids
    known: Tensor | None  # [P, 2] (query id, document id) of further known positives of all ranks
    beta: Tensor | None  # [N] float64
    neg_bias: Tensor | None  # [N] float64
    acc: torch.dtype
    _wide: dict[int, Tensor] = field(default_factory=dict)

    def ready(self, tile_index: int) -> Tile:
        """Return tile `tile_index`, after its vectors have arrived."""
        if tile_index == self.num_own_tiles:
            self.gathered.wait()
        return self.tiles[tile_index]

    def vectors(self, tile: Tile) -> Tensor:
        """Return a tile's vectors [width, D] in the dtype of the products; widened once, as every strip asks again."""
        if tile.start not in self._wide:
            self._wide[tile.start] = self.gathered.buffer[tile.start : tile.stop].to(self.acc)
        return self._wide[tile.start]


def gather_columns(x: LossInputs, facts: Facts, width: int, group: Group | None) -> Columns:
    """Gather ids and biases, and start the gather of W; `width` is the tiles' number of columns."""
    device, longest = x.W.device, facts.longest
    own_start = facts.rank * longest
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
    pairs = known = None
    if x.query_ids is not None:
        slot = torch.where(x.weight > 0, x.positive + own_start, -1)
        pairs = _gather_rows(torch.stack([x.query_ids, slot], 1), facts.num_queries, group)
    if x.known is not None:
        known = _gather_rows(x.known, facts.num_known, group)
    doc_keys = _gather_vector(x.doc_ids, longest, group)
    beta = _gather_vector(None if x.beta is None else x.beta.detach().double(), longest, group)
    neg_bias = _gather_vector(None if x.neg_bias is None else x.neg_bias.double(), longest, group)
    return Columns(
        gathered=distributed.all_gather_padded(x.W.detach(), longest, group, async_op=True),
        tiles=tiles,
        num_own_tiles=len(own),
        own_start=own_start,
        num_slots=facts.world_size * longest,
        num_columns=sum(facts.num_columns),
        valid=torch.cat(valid),
        doc_keys=doc_keys,
        pairs=pairs,
        known=known,
        beta=beta,
        neg_bias=neg_bias,
        acc=x.acc,
    )


def _gather_vector(vector: Tensor | None, longest: int, group: Group | None) -> Tensor | None:
    if vector is None:
        return None
    return distributed.all_gather_padded(vector, longest, group).wait()


def _gather_rows(rows: Tensor, counts: list[int], group: Group | None) -> Tensor:
    longest = max(counts)
    padded = distributed.all_gather_padded(rows, longest, group).wait()
    return torch.cat([padded[k * longest : k * longest + count] for k, count in enumerate(counts)])
