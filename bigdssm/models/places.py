"""Several queries of one row: where in the row's history each of them stands."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Places(NamedTuple):
    """Queries by their places, in any order; a row may have none. A tuple: ZeRO-3 looks for tensors in tuples only."""

    row: Tensor  # int64 [m]: the query's row among the batch's R
    seen: Tensor  # int64 [m]: how many of the row's history items lie before the query, 0 for none
