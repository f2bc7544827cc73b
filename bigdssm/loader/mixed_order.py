"""Several sources in one stream: which of them gives a lane's rows of a step, a pure function of (seed, step, lane).

A lane's steps are counted in rounds of ROUND_STEPS. In each round every source gets as many steps as its weight says,
exactly, in the order of a counter hash, so that how many a source had before a step follows without counting from the
beginning. In the i-th step that a source gets in a lane it gives what its own `Order` gives that lane in step i: each
source runs through epochs of its own.

batches
mixed       every lane draws for itself: a step has rows of several sources
one_source  all lanes draw alike: a step has rows of one source
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from bigdssm.dataset.partition import ROUND_STEPS, MixtureBatches
from bigdssm.loader.order import Order
from bigdssm.utils.hashing import derive_key, mix64

_PURPOSE = 0x6D6978  # keeps these hashes apart from those of an order


class MixedOrder:
    """The plan of a mixture: an `Order` per source, and which of them gives a lane's rows of a step."""

    def __init__(
        self, orders: Sequence[Order], steps_per_round: Sequence[int], batches: MixtureBatches, seed: int
    ) -> None:
        """`orders` agree in lanes, rows_global, tail and window; `steps_per_round` sums to ROUND_STEPS."""
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
        """Return which source's order gives a lane's rows of a global step, and of which step of that order."""
        number, place = divmod(step, ROUND_STEPS)
        sources, before = self._round(number, lane if self.batches == "mixed" else -1)
        source = int(sources[place])
        return self.orders[source], number * self.steps_per_round[source] + int(before[place])

    def row_ids(self, step: int, lanes: range | None = None) -> np.ndarray:
        """Return the row ids of a global step, lane after lane, int64."""
        out = []
        for lane in range(self.lanes) if lanes is None else lanes:
            order, own_step = self.source_step(step, lane)
            out.append(order.row_ids(own_step, range(lane, lane + 1)))
        return np.concatenate(out)

    def _round(self, number: int, lane: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a round's sources, int64 [ROUND_STEPS], and how many steps each of them had in the round before."""
        key = (number, lane)
        if key not in self._rounds:
            hashes = mix64(np.arange(ROUND_STEPS), derive_key(self.seed, _PURPOSE, number, lane))
            sources = np.repeat(np.arange(len(self.orders)), self.steps_per_round)[np.argsort(hashes, kind="stable")]
            before = np.empty(ROUND_STEPS, np.int64)
            for source in range(len(self.orders)):
                mine = sources == source
                before[mine] = np.arange(np.count_nonzero(mine))
            self._rounds[key] = sources, before
            while len(self._rounds) > self.lanes:
                self._rounds.popitem(last=False)
        return self._rounds[key]
