"""The catalogue as columns of every step, shared out over the ranks: `loss.columns=catalogue`.

Rank k of N encodes documents k, k + N, k + 2 N, … and its own queries' positives, each once. A positive of another
rank's share is there to be scored by its own queries alone: to everybody it is never a negative, and its query drops
the column that stands for it, as it drops all copies of its positive. So each query has every document once.

Shape legend: n columns of this rank.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from bigdssm.batching.batch import Batch


def catalogue_share(num_docs: int, rank: int, world_size: int) -> np.ndarray:
    """Return the catalogue rows that a rank encodes for all, int64: every document is in one rank's share."""
    return np.arange(rank, num_docs, world_size, dtype=np.int64)


def is_shared(batch: Batch, rank: int, world_size: int) -> Tensor:
    """Return bool [n]: whether columns of a rank are of its share; what a document was before it changed is not."""
    own = batch.doc_rows % world_size == rank
    return own if batch.past is None else own & ~batch.past
