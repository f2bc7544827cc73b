"""Several sources in one stream: which of them gives a lane's rows of a step, a pure function of (seed, step, lane).

A lane's steps are counted in rounds of TURNS. In each round every source has as many turns as its weight says, to the
turn, in the order of a counter hash: the shares are exact over a round, and how many turns a source had before a step
follows without counting from the beginning. At its i-th turn in a lane a source gives what its own `Order` gives that
lane in step i, so that each source runs through its own epochs.

batches
mixed       every lane draws for itself: a step has rows of several sources
one_source  all lanes draw alike: a step has rows of one source
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from bigdssm.dataset.mixture import TURNS, MixtureBatches
from bigdssm.hashing import derive_key, mix64
from bigdssm.streaming.order import Order

_PURPOSE = 0x6D6978  # keeps these hashes apart from those of an order


class MixedOrder:
    """The plan of a mixture: an `Order` per source, and whose turn it is."""

    def __init__(self, orders: Sequence[Order], turns: Sequence[int], batches: MixtureBatches, seed: int) -> None:
        """`orders` agree in lanes, rows_global, tail and window; `turns` sum to TURNS."""
        first = orders[0]
        self.orders, self.turns, self.batches, self.seed = tuple(orders), tuple(turns), batches, seed
        self.rows_global, self.lanes, self.tail, self.window_blocks = (
            first.rows_global, first.lanes, first.tail, first.window_blocks
        )  # fmt: skip
        self.rows_per_lane_step = first.rows_per_lane_step
        self.rows_per_epoch = sum(order.rows_per_epoch for order in orders)
        self.rows_dropped_per_epoch = sum(order.rows_dropped_per_epoch for order in orders)
        self.steps_per_epoch = -(-self.rows_per_epoch // self.rows_global)
        self._rounds: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def turn(self, step: int, lane: int) -> tuple[Order, int]:
        """Return which order gives a lane's part of a global step, and as the how manieth of its turns in that lane."""
        number, place = divmod(step, TURNS)
        sources, before = self._round(number, lane if self.batches == "mixed" else -1)
        source = int(sources[place])
        return self.orders[source], number * self.turns[source] + int(before[place])

    def row_ids(self, step: int, lanes: range | None = None) -> np.ndarray:
        """Return the row ids of a global step, lane after lane, int64."""
        out = []
        for lane in range(self.lanes) if lanes is None else lanes:
            order, turn = self.turn(step, lane)
            out.append(order.row_ids(turn, range(lane, lane + 1)))
        return np.concatenate(out)

    def _round(self, number: int, lane: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a round's sources, int64 [TURNS], and how many turns each of them had in the round before."""
        key = (number, lane)
        if key not in self._rounds:
            hashes = mix64(np.arange(TURNS), derive_key(self.seed, _PURPOSE, number, lane))
            sources = np.repeat(np.arange(len(self.turns)), self.turns)[np.argsort(hashes, kind="stable")]
            before = np.empty(TURNS, np.int64)
            for source in range(len(self.turns)):
                mine = sources == source
                before[mine] = np.arange(np.count_nonzero(mine))
            self._rounds[key] = sources, before
            while len(self._rounds) > self.lanes:
                self._rounds.popitem(last=False)
        return self._rounds[key]
