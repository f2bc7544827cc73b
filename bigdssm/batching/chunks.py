"""The features of chunks, and what is computed chunk by chunk put together again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bigdssm.batching.plan import Chunk, SidePlan
from bigdssm.dataset.tensors import Features


class Chunked:
    """One side's features, to be encoded by its plan. The order of the rows is brought to their device once."""

    def __init__(self, features: Features, plan: SidePlan) -> None:
        self._features, self._plan = features, plan
        device = next(iter(features.values())).device
        self._order = torch.from_numpy(plan.order).to(device, non_blocking=True)

    def features(self, chunk: Chunk) -> Features:
        """Return the features of a chunk's rows, lists cut to the longest of them; one row for a dummy."""
        if not chunk.num_rows:
            return at_least_one({name: tensor[:1] for name, tensor in self._features.items()})
        taken = {name: tensor[self.rows(chunk)] for name, tensor in self._features.items()}
        return taken | {name: taken[name][:, :width] for name, width in chunk.widths.items()}

    def rows(self, chunk: Chunk) -> Tensor:
        """Return the numbers of a chunk's rows, int64 [rows]; none in a dummy."""
        return self._order[chunk.first : chunk.last]

    def assemble(self, parts: Sequence[Tensor]) -> Tensor:
        """Return what was computed of every chunk, [num_rows, …], in the order of the rows."""
        whole = parts[0].new_empty((len(self._order), *parts[0].shape[1:]))
        for part, chunk in zip(parts, self._plan.chunks, strict=True):
            whole[self.rows(chunk)] = part[: chunk.num_rows]
        return whole


def at_least_one(features: Features) -> Features:
    """Return `features`, or one row of padding where they have none."""
    if next(iter(features.values())).shape[0] > 0:
        return features
    return {
        name: tensor.new_zeros((1, *(max(1, size) for size in tensor.shape[1:]))) for name, tensor in features.items()
    }
