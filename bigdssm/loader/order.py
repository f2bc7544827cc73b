"""The order of rows and of a mixture: a pure function of (seed, step), independent of the numbers of ranks and workers.

An epoch permutes the blocks and concatenates them; each of L lanes (virtual data-parallel workers) covers an equal
range of the rows (a block may be shared by two lanes). A lane is read in windows of window_blocks blocks, the rows of a
window in the order of a hash of their row ids, and contributes rows_global / L rows to every step. Rank k reads the
lanes l ≡ k mod world size; only this assignment depends on the world size.

Permutations sort 64-bit hashes, ties by position. A Feistel permutation would give single blocks without a sort, but
lane boundaries need the running sum of rows over the permuted blocks anyway, so the plan of an epoch is O(blocks)
either way: about 0.1 s and 12 MB for 10⁹ rows. The order must not change after a release: a resumed run would read
other rows (the tests compare golden hashes).

At the end of an epoch, lane l has n_l rows (all lanes together: every row exactly once), and continues with its next
epoch within a step if n_l is not a multiple of rows_global / L. No row is dropped. After steps_per_epoch =
ceil(N / rows_global) steps every row was read.

In a mixture, the steps of a lane are divided into rounds of ROUND_STEPS. In each round every source has exactly as many
steps as its weight requires, in the order of a counter hash, so that the number of a source's earlier steps follows
without counting from the beginning. In its i-th step in a lane, a source contributes the rows of that lane in step i of
its own `Order`: each source has separate epochs. Lanes draw independently, so a step has rows of several sources.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bigdssm.dataset.partition import ROUND_STEPS
from bigdssm.errors import ConfigError, DataError
from bigdssm.features.ragged import offsets_of
from bigdssm.utils.hashing import derive_key, mix64

WINDOW_BLOCKS = 16


@dataclass(frozen=True)
class Window:
    """The blocks that a lane loads together: fragments [first, last) of blocks, and the order of their rows."""

    key: tuple[int, int, int]  # epoch, lane, index of the window in the lane
    start: int  # position in the lane of the window's first row
    blocks: np.ndarray  # int64 [fragments]
    first: np.ndarray  # int64 [fragments]: first row of the block that belongs to the lane
    last: np.ndarray  # int64 [fragments]
    row_ids: np.ndarray  # int64 [rows], fragment after fragment
    order: np.ndarray  # int64 [rows]: indices into row_ids, in the lane's order


@dataclass(frozen=True)
class _Epoch:
    key: int
    blocks: np.ndarray  # int64 [B]: permuted block numbers
    starts: np.ndarray  # int64 [B + 1]: position of the first row per block


class Order:
    """The plan of a split whose blocks have `rows` rows (int [B])."""

    def __init__(
        self, rows: np.ndarray, *, rows_global: int, lanes: int, seed: int = 0,
        window_blocks: int = WINDOW_BLOCKS, first_block: int = 0, first_row: int = 0,
    ) -> None:  # fmt: skip
        """`first_block` and `first_row` are offsets of the block numbers and row ids; they do not affect the order.

        Raises ConfigError: rows_global is not a multiple of lanes; DataError: too few rows.
        """
        if lanes < 1 or rows_global < 1 or rows_global % lanes:
            raise ConfigError(f"rows_global={rows_global} must be a positive multiple of lanes={lanes}")
        if window_blocks < 1:
            raise ConfigError(f"window_blocks={window_blocks} must be at least 1")
        self.rows, self.first_row = rows, offsets_of(rows)
        self.num_rows = int(self.first_row[-1])
        if self.num_rows < lanes:
            raise DataError(f"the split has {self.num_rows} rows, at least {lanes} are needed (one for every lane)")
        self.rows_global, self.lanes, self.seed = rows_global, lanes, seed
        self.window_blocks = window_blocks
        self.rows_per_lane_step = rows_global // lanes
        self.steps_per_epoch = -(-self.num_rows // rows_global)  # rounded up
        self._first_block, self._first_row_id = first_block, first_row
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def source_step(self, step: int, lane: int) -> "tuple[Order, int]":
        """Return (self, `step`), as `MixedOrder.source_step` does for several sources."""
        return self, step

    def lane_rows(self, lane: int) -> int:
        """Return the number of a lane's rows in an epoch."""
        return self._lane_start(lane + 1) - self._lane_start(lane)

    def ranges(self, step: int, lane: int) -> Iterator[tuple[int, int, int]]:
        """Yield (epoch, first, last): the ranges of positions in `lane` that it contributes to a global step."""
        per_epoch, remaining = self.lane_rows(lane), self.rows_per_lane_step
        epoch, first = divmod(step * remaining, per_epoch)
        while remaining:
            last = min(per_epoch, first + remaining)
            yield epoch, first, last
            remaining -= last - first
            epoch, first = epoch + 1, 0

    def window(self, epoch: int, lane: int, position: int) -> Window:
        """Return the window of `lane` that contains `position`."""
        plan = self._epoch(epoch)
        begin, end = self._lane_start(lane), self._lane_start(lane + 1)
        lane_block = int(np.searchsorted(plan.starts, begin, "right")) - 1
        block = int(np.searchsorted(plan.starts, begin + position, "right")) - 1
        number = (block - lane_block) // self.window_blocks
        lo = lane_block + number * self.window_blocks
        hi = min(lo + self.window_blocks, int(np.searchsorted(plan.starts, end, "left")))
        blocks, starts = plan.blocks[lo:hi], plan.starts[lo : hi + 1]
        first = np.maximum(begin - starts[:-1], 0)
        last = np.minimum(end, starts[1:]) - starts[:-1]
        base = self.first_row[blocks]
        lengths = last - first
        offsets = offsets_of(lengths)
        row_ids = np.repeat(base + first - offsets[:-1], lengths) + np.arange(offsets[-1])
        order = np.argsort(mix64(row_ids, derive_key(plan.key, 1)), kind="stable")
        arrays = blocks + self._first_block, first, last, row_ids + self._first_row_id
        return Window((epoch, lane, number), max(int(starts[0]) - begin, 0), *arrays, order)

    def row_ids(self, step: int, lanes: range | None = None) -> np.ndarray:
        """Return the row ids of a global step, lane after lane, int64, without reading a row."""
        out = []
        for lane in range(self.lanes) if lanes is None else lanes:
            for epoch, first, last in self.ranges(step, lane):
                while first < last:
                    window = self.window(epoch, lane, first)
                    upto = min(last, window.start + len(window.order))
                    out.append(window.row_ids[window.order[first - window.start : upto - window.start]])
                    first = upto
        return np.concatenate(out)

    def _lane_start(self, lane: int) -> int:
        return lane * self.num_rows // self.lanes

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            key = derive_key(self.seed, epoch)
            blocks = np.argsort(mix64(np.arange(len(self.rows)), derive_key(key, 0)), kind="stable")
            self._epochs[epoch] = _Epoch(key, blocks, offsets_of(self.rows[blocks]))
            while len(self._epochs) > 2:  # lanes drift apart by one row per epoch: at most two epochs are in use
                self._epochs.popitem(last=False)
        return self._epochs[epoch]


_PURPOSE = 0x6D6978  # separates these hashes from those of an order


class MixedOrder:
    """The plan of a mixture: an `Order` per source, and the source of each step and lane."""

    def __init__(self, orders: Sequence[Order], steps_per_round: Sequence[int], seed: int) -> None:
        """`orders` have the same lanes, rows_global and window; `steps_per_round` sums to ROUND_STEPS."""
        first = orders[0]
        self.orders, self.steps_per_round = tuple(orders), tuple(steps_per_round)
        self.seed = seed
        self.rows_global = first.rows_global
        self.lanes = first.lanes
        self.window_blocks = first.window_blocks
        self.rows_per_lane_step = first.rows_per_lane_step
        self.num_rows = sum(order.num_rows for order in orders)
        self.steps_per_epoch = -(-self.num_rows // self.rows_global)
        self._rounds: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def source_step(self, step: int, lane: int) -> tuple[Order, int]:
        """Return the source order of a lane's rows in a global step, and the step of that order."""
        number, index = divmod(step, ROUND_STEPS)
        sources, before = self._round(number, lane)
        source = int(sources[index])
        return self.orders[source], number * self.steps_per_round[source] + int(before[index])

    def row_ids(self, step: int, lanes: range | None = None) -> np.ndarray:
        """Return the row ids of a global step, lane after lane, int64."""
        out = []
        for lane in range(self.lanes) if lanes is None else lanes:
            order, source_step_number = self.source_step(step, lane)
            out.append(order.row_ids(source_step_number, range(lane, lane + 1)))
        return np.concatenate(out)

    def _round(self, number: int, lane: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a round's sources, int64 [ROUND_STEPS], and per step the source's number of earlier steps in it."""
        key = (number, lane)
        if key not in self._rounds:
            hashes = mix64(np.arange(ROUND_STEPS), derive_key(self.seed, _PURPOSE, number, lane))
            sources = np.repeat(np.arange(len(self.orders)), self.steps_per_round)[np.argsort(hashes, kind="stable")]
            before = np.empty(ROUND_STEPS, np.int64)
            for source in range(len(self.orders)):
                mask = sources == source
                before[mask] = np.arange(np.count_nonzero(mask))
            self._rounds[key] = sources, before
            while len(self._rounds) > self.lanes:
                self._rounds.popitem(last=False)
        return self._rounds[key]
