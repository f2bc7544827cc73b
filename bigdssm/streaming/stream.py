"""PairStream: this rank's rows of every global step, endlessly, exact to the row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bigdssm.dataset.dataset import Dataset, empty_batch
from bigdssm.dataset.mixture import ROUND_STEPS, steps_per_round
from bigdssm.dataset.rows import Rows
from bigdssm.errors import ConfigError, DataError
from bigdssm.hashing import derive_key
from bigdssm.log import get_logger
from bigdssm.streaming.lane_steps import LaneSteps
from bigdssm.streaming.mixed_order import MixedOrder
from bigdssm.streaming.order import WINDOW_BLOCKS, Order, Tail
from bigdssm.streaming.row_stream import RowStream
from bigdssm.streaming.stream_state import check_state
from bigdssm.streaming.workers import Steps

T = TypeVar("T")
STATE_FORMAT = 1
log = get_logger(__name__)


class PairStream(RowStream):
    """Step s holds the rows that lanes k, k + R, … of rank k of R give to step s.

    Bad rows are missing from a rank's Rows, which may be empty. Too many are more than max_bad_fraction of the rows of
    the epochs begun since the stream was opened: few bad rows never stop it because they come early.
    """

    def __init__(
        self, dataset: str | Path | Dataset, *, split: str = "train", rows_global: int, lanes: int, seed: int = 0,
        rank: int = 0, world_size: int = 1, num_workers: int = 0, start_step: int = 0, tail: Tail = "carry",
        window_blocks: int = WINDOW_BLOCKS, max_bad_fraction: float = 0.001, quarantine: Path | None = None,
    ) -> None:  # fmt: skip
        """Plan the stream; nothing is read before the first `next`.

        `num_workers` processes read (0: this one), each for some of this rank's lanes. `quarantine` is the JSONL file
        in which this rank names what it leaves out. Raises ConfigError: numbers that do not go together; DataError:
        a dataset that cannot be opened, or fewer rows than `Order` needs.
        """
        if world_size > lanes:
            raise ConfigError(f"world_size={world_size} is more than lanes={lanes}; use at least one lane per rank")
        self._lanes_owned = range(rank, lanes, world_size)
        super().__init__(
            dataset if isinstance(dataset, Dataset) else Dataset.open(dataset), rank=rank, world_size=world_size,
            num_workers=min(num_workers, len(self._lanes_owned)), start_step=start_step,
            max_bad_fraction=max_bad_fraction, quarantine=quarantine,
        )  # fmt: skip
        self.split = split
        plan = partial(Order, rows_global=rows_global, lanes=lanes, tail=tail, window_blocks=window_blocks)
        self.order: Order | MixedOrder = (
            self._mixed(plan, seed) if self.dataset.sources else plan(self.dataset.index(split).rows, seed=seed)
        )
        # The global steps after which every row (tail="drop": every row but the tail) was given. In a mixture each
        # source has epochs of its own, and this is as many steps as all sources have rows for.
        self.steps_per_epoch = self.order.steps_per_epoch
        self.queries_per_row = self._mean_queries()
        self.queries_per_step = rows_global * self.queries_per_row
        if self.order.rows_dropped_per_epoch:
            log.info("each epoch leaves out %d rows that do not fill a step", self.order.rows_dropped_per_epoch)

    def state(self, step: int | None = None) -> dict[str, Any]:
        """Return where the stream stands before `step` (by default the next one) and what it depends on.

        Plain JSON types, the same on every rank.
        """
        order, step = self.order, self.step if step is None else step
        mixture: dict[str, Any] = {}
        if isinstance(order, MixedOrder):
            names = [source.name for source in self.dataset.sources]
            mixture = {
                "mixture": [[n, t] for n, t in zip(names, order.steps_per_round, strict=True)],
                "batches": order.batches,
            }
        return {
            "format": STATE_FORMAT,
            "step": step,
            "epoch": step // order.steps_per_epoch,
            "seed": order.seed,
            "split": self.split,
            "lanes": order.lanes,
            "rows_global": order.rows_global,
            "tail": order.tail,
            "window_blocks": order.window_blocks,
            "schema": self.dataset.schema.fingerprint(),
            "vocabularies": self.dataset.schema.vocabulary_sizes(),
            "tokenizer": self.dataset.tokenizer_hash,
            "partitions": [[partition.name, partition.identity] for partition in self.dataset.partitions],
            **mixture,
        }

    def check_state(self, state: dict[str, Any]) -> bool:
        """Return True where the stream may go on where `state` was taken, False where it begins partitions added since.

        Raises DataError naming everything else in which this stream differs from the one of `state`.
        """
        return check_state(self.dataset, self.state(), state)

    def doc_weights(self) -> np.ndarray:
        """Return how often each document comes as a positive, relative to all, float64 [num_docs] (any scale)."""
        if not isinstance(self.order, MixedOrder):
            return self.dataset.doc_counts().astype(np.float64)
        total = np.zeros(self.dataset.catalogue.num_docs)
        for source, order, steps in zip(
            self.dataset.sources, self.order.orders, self.order.steps_per_round, strict=True
        ):
            counts = self.dataset.doc_counts(range(source.first, source.last))
            total += counts * (steps / ROUND_STEPS * self.order.rows_per_epoch / order.num_rows)
        return total

    def _mixed(self, plan: Callable[..., Order], seed: int) -> MixedOrder:
        """Return the plan of the dataset's mixture; the sources' blocks stand one after the other in the index."""
        sources, index = self.dataset.sources, self.dataset.index(self.split)
        orders = []
        for number, source in enumerate(sources):
            lo, hi = (int(block) for block in np.searchsorted(index.partition, [source.first, source.last]))
            key, first_row = derive_key(seed, number), int(index.first_row[lo])
            try:
                orders.append(plan(index.rows[lo:hi], seed=key, first_block=lo, first_row=first_row))
            except DataError as error:
                raise DataError(f"data.mixture: {source.name} is too small: {error}") from None
        steps = steps_per_round([source.name for source in sources], [source.weight for source in sources])
        return MixedOrder(orders, steps, self.dataset.batches, seed)

    def _mean_queries(self) -> float:
        index, order = self.dataset.index(self.split), self.order
        if not isinstance(order, MixedOrder):
            return index.num_queries / index.num_rows
        per_row = 0.0
        for source, steps in zip(self.dataset.sources, order.steps_per_round, strict=True):
            its = (index.partition >= source.first) & (index.partition < source.last)
            per_row += steps / ROUND_STEPS * float(index.queries[its].sum() / index.rows[its].sum())
        return per_row

    def _steps(self, steps: range, make: Callable[[Rows], T]) -> Steps[T]:
        return LaneSteps(self.dataset, self.split, self.order, self._lanes_owned, self._num_workers, steps, make)

    def _rows_judged(self, rows_met: int, step: int) -> int:
        rows, per_step = self.order.rows_per_epoch, self.order.rows_global
        return rows * max(1, -(-step * per_step // rows) - self._opened_at * per_step // rows)

    def _empty_rows(self) -> Rows:
        return self.dataset.rows(self.split, self.step, np.empty(0, np.int64), empty_batch(self.dataset.layout))
