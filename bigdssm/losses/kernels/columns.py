"""The gather of a loss: document columns of all ranks with ids, biases and known positives; and tile sizes."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group
from bigdssm.losses.ids import FactorizedIds
from bigdssm.losses.inputs import GlobalSizes, LossInputs, add_biases

CACHED_WIDTH = 1024  # columns of a tile on a CPU, for efficient products
CACHED_ROWS = 512  # rows of a block on a CPU, in passes that hold one tile
CACHED_PAIR_ROWS = 512
_STRIP_BYTES = 16 << 20  # scores of a block of rows against all columns on a CPU
_MEMORY_SHARE = 32  # scores on a device take 1 / _MEMORY_SHARE of its memory
_MEMORY_BYTES = 64 << 30  # default for a device of unknown memory
_EVEN_ROWS = 128  # rows are a multiple of it on a device


def strip_rows(device: torch.device, num_columns: int, element_size: int) -> int:
    """Return the number of rows of a block that is scored against all columns, at `element_size` bytes per entry."""
    if device.type == "cpu":
        return max(32, min(1024, _STRIP_BYTES // (max(1, num_columns) * element_size)))
    backend = torch.get_device_module(device)
    has_properties = hasattr(backend, "get_device_properties") and backend.is_available()
    memory = int(backend.get_device_properties(device).total_memory) if has_properties else _MEMORY_BYTES
    rows = memory // _MEMORY_SHARE // (max(1, num_columns) * element_size)
    return max(1, rows - rows % _EVEN_ROWS if rows > _EVEN_ROWS else rows)


def block_rows(device: torch.device, width: int, element_size: int, cached: int = CACHED_ROWS) -> int:
    """Return the number of rows of a block that is scored against one tile; `cached` is the number on a CPU."""
    return cached if device.type == "cpu" else strip_rows(device, width, element_size)


@dataclass
class Columns:
    """The gathered columns of all ranks."""

    W: Tensor  # [N, D]
    tiles: list[slice]
    local_start: int  # index of this rank's first column
    valid: Tensor  # [number of columns in use] ascending indices of the columns that are not padding
    doc_ids: Tensor | None  # [N], None if each column is a distinct document
    beta: Tensor | None  # [N] float64
    neg_bias: Tensor | None  # [N] float64
    since: Tensor | None  # [N] float64: time from which a document is available, None: all are
    counts: Tensor | None  # [N] float64: multiplicity of a column as a negative, None if 1 for all
    operand: torch.dtype  # dtype of matrix operands
    _wide: dict[int, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """N."""
        return self.W.shape[0]

    @property
    def widest(self) -> int:
        """Columns of the widest tile."""
        return max((tile.stop - tile.start for tile in self.tiles), default=0)

    @cached_property
    def docs(self) -> FactorizedIds:
        """The documents of the columns in use; without ids, the column index is the document id."""
        return FactorizedIds(self.valid if self.doc_ids is None else self.doc_ids[self.valid])

    def negative_counts(self) -> Tensor:
        """Return float64 [N]: the multiplicity of each column as a negative, 0 if excluded or padding."""
        counts = self.counts
        if counts is None:
            counts = torch.zeros(self.total, dtype=torch.float64, device=self.valid.device)
            counts.index_fill_(0, self.valid, 1.0)
        return counts if self.neg_bias is None else counts.masked_fill(self.neg_bias == -math.inf, 0.0)

    def bias(self, *biases: Tensor | None) -> Tensor | None:
        """Return the sum of the biases that are not None, −inf for padding; None if it would be 0 everywhere."""
        total = add_biases(*biases)
        if len(self.valid) == self.total:
            return total
        unused = torch.full((self.total,), -math.inf, dtype=torch.float64, device=self.valid.device)
        return unused.index_copy_(
            0, self.valid, unused.new_zeros(len(self.valid)) if total is None else total[self.valid]
        )

    def vectors(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield each tile with its vectors [width, D] in the operand dtype."""
        for tile in self.tiles:
            if tile.start not in self._wide:  # converted once and reused by every block of rows
                self._wide[tile.start] = self.W[tile].to(self.operand)
            yield tile, self._wide[tile.start]


def gather_columns(
    x: LossInputs, sizes: GlobalSizes, counts_n: Tensor | None, pairs: Tensor | None, width: int | None,
    group: Group | None,
) -> Callable[[], tuple[Columns, Tensor | None]]:  # fmt: skip
    """Start the gather of this rank's columns and known pairs; `width` is the number of columns of a tile.

    Biases are sent in the dtype of scores, since scores have no more precision. Returns a function that waits for the
    gather, and returns the columns, and the pairs of each rank [world_size, pairs, 2], if sent.
    """
    values = {
        "W": x.W.detach(),
        "doc_ids": x.doc_ids,
        "beta": None if x.beta is None else x.beta.detach().to(x.acc),
        "neg_bias": None if x.neg_bias is None else x.neg_bias.to(x.acc),
        "counts": None if counts_n is None else counts_n.to(x.acc),
        "since": x.since,
    }
    sent = {name: value for name, value in values.items() if value is not None}
    longest, device = sizes.longest, x.W.device
    if pairs is not None:
        # packed with the columns: as many pairs per column as the rank with most pairs needs
        each = -(-max(sizes.num_known) // max(1, longest))
        padded = pairs.new_zeros((longest * each, 2))
        padded[: len(pairs)] = pairs[: len(padded)]
        sent["pairs"] = padded.view(longest, each, 2)
    pending = distributed.all_gather_packed(list(sent.values()), longest, group)

    def wait() -> tuple[Columns, Tensor | None]:
        received: dict[str, Tensor] = dict(zip(sent, pending.wait(), strict=True))
        W, all_pairs = received.pop("W"), received.pop("pairs", None)
        if all_pairs is not None:
            all_pairs = all_pairs.reshape(sizes.world_size, longest * all_pairs.shape[1], 2)
        total = W.shape[0]
        tile = width or (CACHED_WIDTH if device.type == "cpu" else max(1, total))
        # the columns of all ranks that are not padding
        valid = torch.arange(sum(sizes.num_columns), device=device)
        if min(sizes.num_columns) < longest:
            ends = torch.cumsum(sizes.column_counts, 0)
            owner = torch.searchsorted(ends, valid, right=True)
            starts = torch.arange(sizes.world_size, device=device) * longest
            valid = valid + (starts - (ends - sizes.column_counts))[owner]
        biases = {name: received[name].double() for name in ("beta", "neg_bias", "counts") if name in received}
        columns = Columns(
            W=W,
            tiles=[slice(k, min(k + tile, total)) for k in range(0, total, tile)],
            local_start=sizes.rank * longest,
            valid=valid,
            doc_ids=received["doc_ids"].contiguous() if "doc_ids" in received else None,
            beta=biases.get("beta"),
            neg_bias=biases.get("neg_bias"),
            since=received.get("since"),
            counts=biases.get("counts"),
            operand=x.operand,
        )
        return columns, all_pairs

    return wait
