"""Read the rows of some lanes, step by step, in a loader process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from bigdssm.dataset.blocks import BadRow, read_blocks
from bigdssm.dataset.dataset import Dataset, empty_batch
from bigdssm.dataset.rows import Rows
from bigdssm.features.ragged import offsets_of
from bigdssm.loader.mixed_order import MixedOrder
from bigdssm.loader.order import Order, Window


@dataclass
class LaneRows:
    """The rows of some lanes in one step, and the bad rows of the windows read since the last step."""

    rows: Rows
    rows_planned: int  # including bad rows
    bad: list[BadRow] = field(default_factory=list)
    targets_skipped: int = 0  # bad targets of rows with other, good ones

    @classmethod
    def joined(cls, parts: Sequence[LaneRows]) -> LaneRows:
        """Join the parts of one step, given in the order of their lanes."""
        return cls(
            Rows.concat([part.rows for part in parts]),
            sum(part.rows_planned for part in parts),
            [fault for part in parts for fault in part.bad],
            sum(part.targets_skipped for part in parts),
        )


@dataclass
class _LoadedWindow:
    """The good rows of a window, in the lane's order."""

    plan: Window
    batch: pa.RecordBatch
    row_ids: np.ndarray  # int64 [good rows]
    good_before: np.ndarray  # int64 [rows + 1]: good rows among the first i of the order


class LaneReader:
    """Reads lanes with one window of at most window_blocks blocks in memory per lane and source of a mixture.

    While a window is loaded, it is in memory twice.
    """

    def __init__(self, dataset: Dataset, split: str, order: Order | MixedOrder, lanes: Sequence[int]) -> None:
        """Nothing is read before the first step."""
        self._dataset, self._split, self._order, self._lanes = dataset, split, order, lanes
        self._index = dataset.index(split)
        self._loaded: dict[tuple[Order, int], _LoadedWindow] = {}
        self._bad: list[BadRow] = []

    def read_steps(self, step: int) -> Iterator[LaneRows]:
        """Yield the lanes' rows of every step from `step` on, endlessly."""
        while True:
            yield self.read_step(step)
            step += 1

    def read_step(self, step: int) -> LaneRows:
        """Return the lanes' rows of one global step, lane after lane."""
        slices: list[tuple[np.ndarray, pa.RecordBatch]] = []
        for lane in self._lanes:
            order, source_step_number = self._order.source_step(step, lane)
            for epoch, first, last in order.ranges(source_step_number, lane):
                slices += self._read(order, epoch, lane, first, last)
        row_ids = np.concatenate([ids for ids, _ in slices])
        batch = pa.concat_batches([batch for _, batch in slices])
        rows = self._dataset.rows(self._split, step, row_ids, batch)
        bad, self._bad = self._bad, []
        targets_skipped = 0
        if rows.position is not None:
            first, end = (batch.column(batch.schema.get_field_index(name)).to_numpy() for name in ("first", "end"))
            targets_skipped = int(end.sum() - first.sum()) - rows.num_queries
        return LaneRows(rows, self._order.rows_per_lane_step * len(self._lanes), bad, targets_skipped)

    def _read(
        self, order: Order, epoch: int, lane: int, first: int, last: int
    ) -> Iterator[tuple[np.ndarray, pa.RecordBatch]]:
        while first < last:
            window = self._window(order, epoch, lane, first)
            start = window.plan.start
            upto = min(last, start + len(window.plan.order))
            a, b = (int(window.good_before[position - start]) for position in (first, upto))
            yield window.row_ids[a:b], window.batch.slice(a, b - a)
            first = upto

    def _window(self, order: Order, epoch: int, lane: int, position: int) -> _LoadedWindow:
        loaded = self._loaded.get((order, lane))
        if (
            loaded is None
            or loaded.plan.key[0] != epoch
            or not 0 <= position - loaded.plan.start < len(loaded.plan.order)
        ):
            loaded = None
            self._loaded.pop((order, lane), None)  # freed before the next one is read
            self._loaded[order, lane] = loaded = self._load(order.window(epoch, lane, position))
        return loaded

    def _load(self, plan: Window) -> _LoadedWindow:
        """Read the window's blocks and reorder the good rows once, so that a step is a slice."""
        batches, readable, good = [empty_batch(self._dataset.layout)], [], []
        contents = read_blocks(self._index, plan.blocks.tolist(), self._dataset.layout)
        for (batch, faults), first, last in zip(contents, plan.first.tolist(), plan.last.tolist(), strict=True):
            usable = np.full(last - first, batch is not None)
            readable.append(usable.copy())
            if batch is not None:
                batches.append(batch.slice(first, last - first))
            for fault in faults:
                if fault.row is None:
                    self._bad.append(fault)
                elif first <= fault.row < last:  # other rows belong to another lane
                    self._bad.append(fault)
                    usable[fault.row - first] &= fault.rows == 0
            good.append(usable)
        keep = np.concatenate(good)[plan.order]
        index = np.cumsum(np.concatenate(readable)) - 1
        batch = pa.concat_batches(batches).take(pa.array(index[plan.order[keep]]))
        return _LoadedWindow(plan, batch, plan.row_ids[plan.order[keep]], offsets_of(keep))
