"""Assembles the rows of some lanes, step after step: what a loader process does."""

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
    """The rows that some lanes give to one step, and what their windows, read since the last step, hold of bad ones."""

    rows: Rows
    rows_planned: int  # as many would be here if none were bad
    bad: list[BadRow] = field(default_factory=list)
    targets_skipped: int = 0  # bad ones of rows that have others

    @classmethod
    def joined(cls, parts: Sequence[LaneRows]) -> LaneRows:
        """Return the parts of one step, given in the order of their lanes, as one."""
        return cls(
            Rows.concat([part.rows for part in parts]),
            sum(part.rows_planned for part in parts),
            [fault for part in parts for fault in part.bad],
            sum(part.targets_skipped for part in parts),
        )


@dataclass
class _Loaded:
    """A window whose good rows stand in the order in which the lane gives them."""

    plan: Window
    batch: pa.RecordBatch
    row_ids: np.ndarray  # int64 [good rows]
    good_before: np.ndarray  # int64 [rows + 1]: good rows among the first i of the order


class LaneReader:
    """Holds one window per lane, and per source of a mixture, in memory: each of at most window_blocks blocks.

    A window is held once more while it is loaded.
    """

    def __init__(self, dataset: Dataset, split: str, order: Order | MixedOrder, lanes: Sequence[int]) -> None:
        """Prepare to read `lanes` of `split`; nothing is read yet."""
        self._dataset, self._split, self._order, self._lanes = dataset, split, order, lanes
        self._index = dataset.index(split)
        self._loaded: dict[tuple[Order, int], _Loaded] = {}
        self._bad: list[BadRow] = []

    def parts(self, step: int) -> Iterator[LaneRows]:
        """Yield the lanes' part of every step from `step` on, endlessly."""
        while True:
            yield self.part(step)
            step += 1

    def part(self, step: int) -> LaneRows:
        """Return the lanes' part of one global step, lane after lane."""
        slices: list[tuple[np.ndarray, pa.RecordBatch]] = []
        for lane in self._lanes:
            order, own_step = self._order.source_step(step, lane)
            for epoch, first, last in order.spans(own_step, lane):
                slices += self._read(order, epoch, lane, first, last)
        row_ids = np.concatenate([ids for ids, _ in slices])
        batch = pa.concat_batches([batch for _, batch in slices])
        rows = self._dataset.rows(self._split, step, row_ids, batch)
        bad, self._bad = self._bad, []
        left_out = 0
        if rows.position is not None:
            first, end = (batch.column(batch.schema.get_field_index(name)).to_numpy() for name in ("first", "end"))
            left_out = int(end.sum() - first.sum()) - rows.num_queries
        return LaneRows(rows, self._order.rows_per_lane_step * len(self._lanes), bad, left_out)

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

    def _window(self, order: Order, epoch: int, lane: int, position: int) -> _Loaded:
        held = self._loaded.get((order, lane))
        if held is None or held.plan.key[0] != epoch or not 0 <= position - held.plan.start < len(held.plan.order):
            held = None
            self._loaded.pop((order, lane), None)  # freed before the next one is read
            self._loaded[order, lane] = held = self._load(order.window(epoch, lane, position))
        return held

    def _load(self, plan: Window) -> _Loaded:
        """Read the window's blocks and bring the good rows into its order once, so that a step is a slice."""
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
                elif first <= fault.row < last:  # the others are another lane's
                    self._bad.append(fault)
                    usable[fault.row - first] &= fault.rows == 0
            good.append(usable)
        keep = np.concatenate(good)[plan.order]
        place = np.cumsum(np.concatenate(readable)) - 1
        batch = pa.concat_batches(batches).take(pa.array(place[plan.order[keep]]))
        return _Loaded(plan, batch, plan.row_ids[plan.order[keep]], offsets_of(keep))
