"""The order of a mixture: the source of a lane's rows in a step is a pure function of (seed, step, lane).

The steps of a lane are divided into rounds of ROUND_STEPS. In each round every source has exactly as many steps as its
weight requires, in the order of a counter hash, so that the number of a source's earlier steps follows without counting
from the beginning. In its i-th step in a lane, a source contributes the rows of that lane in step i of its own `Order`:
each source has separate epochs.

batches
mixed       every lane draws independently: a step has rows of several sources
one_source  all lanes draw the same source: a step has rows of one source
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from bigdssm.dataset.partition import ROUND_STEPS, MixtureBatches
from bigdssm.loader.order import Order
from bigdssm.utils.hashing import derive_key, mix64

_PURPOSE = 0x6D6978  # separates these hashes from those of an order


class MixedOrder:
    """The plan of a mixture: an `Order` per source, and the source of each step and lane."""

    def __init__(
        self, orders: Sequence[Order], steps_per_round: Sequence[int], batches: MixtureBatches, seed: int
    ) -> None:
        """`orders` have the same lanes, rows_global, tail and window; `steps_per_round` sums to ROUND_STEPS."""
        first = orders[0]
        self.orders, self.steps_per_round = tuple(orders), tuple(steps_per_round)
        self.batches, self.seed = batches, seed
        self.rows_global, self.lanes, self.tail, self.window_blocks = (
            first.rows_global, first.lanes, first.tail, first.window_blocks
        )  # fmt: skip
        self.rows_per_lane_step = first.rows_per_lane_step
        self.rows_per_epoch = sum(order.rows_per_epoch for order in orders)
        self.rows_dropped_per_epoch = sum(order.rows_dropped_per_epoch for order in orders)
        self.steps_per_epoch = -(-self.rows_per_epoch // self.rows_global)
        self._rounds: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def source_step(self, step: int, lane: int) -> tuple[Order, int]:
        """Return the source order of a lane's rows in a global step, and the step of that order."""
        number, index = divmod(step, ROUND_STEPS)
        sources, before = self._round(number, lane if self.batches == "mixed" else -1)
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
