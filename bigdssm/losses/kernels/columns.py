"""All that a loss gathers: the document columns of all ranks, W with their ids and biases, the known positives; and
tile sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group, LocalRows, PackedRows
from bigdssm.losses.inputs import GlobalSizes, LossInputs, add_biases
from bigdssm.losses.masks import Numbers

CACHED_WIDTH = 1024  # columns of a tile: wide enough for the products
CACHED_ROWS = 512  # of the passes that hold one tile
CACHED_PAIR_ROWS = 512
_STRIP_BYTES = 16 << 20  # of scores that a block of rows has against all columns, where all are held
_MEMORY_SHARE = 32  # a device's scores take one part in so many of its memory
_MEMORY_BYTES = 64 << 30  # of a device that does not say
_EVEN_ROWS = 128  # what products on a device are cut into


def tile_width(device: torch.device, num_columns: int) -> int:
    """Return the columns of a tile."""
    return CACHED_WIDTH if device.type == "cpu" else max(1, num_columns)


def strip_rows(device: torch.device, num_columns: int, element_size: int) -> int:
    """Return how many rows are held at once against all columns, at so many bytes an entry."""
    if device.type == "cpu":
        return max(32, min(1024, _STRIP_BYTES // (max(1, num_columns) * element_size)))
    rows = _score_bytes(device) // (max(1, num_columns) * element_size)
    return max(1, rows - rows % _EVEN_ROWS if rows > _EVEN_ROWS else rows)


def block_rows(device: torch.device, width: int, element_size: int, cached: int = CACHED_ROWS) -> int:
    """Return how many rows are held at once against a tile; `cached`: on a CPU."""
    return cached if device.type == "cpu" else strip_rows(device, width, element_size)


def _score_bytes(device: torch.device) -> int:
    backend = torch.get_device_module(device)
    says = hasattr(backend, "get_device_properties") and backend.is_available()
    memory = int(backend.get_device_properties(device).total_memory) if says else _MEMORY_BYTES
    return memory // _MEMORY_SHARE


@dataclass(frozen=True)
class Tile:
    """Columns [start, stop)."""

    start: int
    stop: int

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
    """All ranks' columns."""

    W: Tensor  # [N, D]
    tiles: list[Tile]
    own_start: int
    valid: Tensor  # [columns in use] their indices, ascending
    doc_ids: Tensor | None  # [N], None where each column is its own document
    beta: Tensor | None  # [N] float64
    neg_bias: Tensor | None  # [N] float64
    copies: Tensor | None  # [N] float64: how often a column counts as a negative, None where each counts once
    operand: torch.dtype  # of the products
    _wide: dict[int, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """N."""
        return self.W.shape[0]

    @property
    def widest(self) -> int:
        """Columns of the widest tile."""
        return max((tile.width for tile in self.tiles), default=0)

    @cached_property
    def docs(self) -> Numbers:
        """The documents of the columns in use; without ids a column is its own, of its index as id."""
        return Numbers(self.valid if self.doc_ids is None else self.doc_ids[self.valid])

    def counts(self) -> Tensor:
        """Return float64 [N]: how often a column counts as a negative, 0 where never and at unused indices."""
        counts = self.copies
        if counts is None:
            counts = torch.zeros(self.total, dtype=torch.float64, device=self.valid.device)
            counts.index_fill_(0, self.valid, 1.0)
        return counts if self.neg_bias is None else counts.masked_fill(self.neg_bias == -math.inf, 0.0)

    def bias(self, *biases: Tensor | None) -> Tensor | None:
        """Return the sum of those that are there, −inf at unused indices; None where it would be 0 everywhere."""
        total = add_biases(*biases)
        if len(self.valid) == self.total:
            return total
        unused = torch.full((self.total,), -math.inf, dtype=torch.float64, device=self.valid.device)
        return unused.index_copy_(
            0, self.valid, unused.new_zeros(len(self.valid)) if total is None else total[self.valid]
        )

    def vectors(self) -> Iterator[tuple[Tile, Tensor]]:
        """Yield each tile with its vectors [width, D] in the dtype of the products."""
        for tile in self.tiles:
            if tile.start not in self._wide:  # widened once, as every block of rows asks again
                self._wide[tile.start] = self.W[tile.columns].to(self.operand)
            yield tile, self._wide[tile.start]


@dataclass
class Arriving:
    """What was sent: on its way, and how to read it."""

    packed: PackedRows | LocalRows
    x: LossInputs
    sizes: GlobalSizes
    names: list[str]
    width: int | None

    def wait(self) -> tuple[Columns, Tensor | None]:
        """Wait for the gather to end; return the columns, and each rank's pairs [world_size, pairs, 2], where sent."""
        found: dict[str, Tensor] = dict(zip(self.names, self.packed.wait(), strict=True))
        W, pairs = found.pop("W"), found.pop("pairs", None)
        if pairs is not None:
            pairs = pairs.reshape(self.sizes.world_size, self.sizes.longest * pairs.shape[1], 2)
        total = W.shape[0]
        width = self.width or tile_width(W.device, total)
        biases = {name: found[name].double() for name in ("beta", "neg_bias", "copies") if name in found}
        columns = Columns(
            W=W,
            tiles=[Tile(k, min(k + width, total)) for k in range(0, total, width)],
            own_start=self.sizes.rank * self.sizes.longest,
            valid=_in_use(self.sizes, W.device),
            doc_ids=found["doc_ids"].contiguous() if "doc_ids" in found else None,
            beta=biases.get("beta"),
            neg_bias=biases.get("neg_bias"),
            copies=biases.get("copies"),
            operand=self.x.operand,
        )
        return columns, pairs


def gather_columns(
    x: LossInputs, sizes: GlobalSizes, copies_n: Tensor | None, pairs: Tensor | None, width: int | None,
    group: Group | None,
) -> Arriving:  # fmt: skip
    """Send this rank's columns, and the pairs it tells; `width` is the tiles' number of columns.

    Biases travel in the dtype of scores, which takes no more of them: beside an id and pairs two fill a row of bytes.
    """
    values = {
        "W": x.W.detach(),
        "doc_ids": x.doc_ids,
        "beta": None if x.beta is None else x.beta.detach().to(x.acc),
        "neg_bias": None if x.neg_bias is None else x.neg_bias.to(x.acc),
        "copies": None if copies_n is None else copies_n.to(x.acc),
    }
    given = {name: value for name, value in values.items() if value is not None}
    if pairs is not None:
        # so many beside each column that the most any rank tells find a place
        each = -(-max(sizes.num_known) // max(1, sizes.longest))
        told = pairs.new_zeros((sizes.longest * each, 2))
        told[: len(pairs)] = pairs[: len(told)]
        given["pairs"] = told.view(sizes.longest, each, 2)
    return Arriving(
        distributed.all_gather_packed(list(given.values()), sizes.longest, group), x, sizes, list(given), width
    )


def _in_use(sizes: GlobalSizes, device: torch.device) -> Tensor:
    """Return the indices of all ranks' columns, ascending."""
    longest, counts = sizes.longest, sizes.num_columns
    at = torch.arange(sum(counts), device=device)
    if min(counts) == longest:
        return at
    ends = torch.cumsum(sizes.column_counts, 0)
    owner = torch.searchsorted(ends, at, right=True)
    return at + (torch.arange(len(counts), device=device) * longest - (ends - sizes.column_counts))[owner]
