"""Split the features of a batch into chunks and reassemble the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from bigdssm.dataset.tensors import Features
from bigdssm.loader.step_plan import Chunk, SidePlan
from bigdssm.loader.upload import to_device
from bigdssm.models import Packed, QueryPositions, Values, pack

T = TypeVar("T")
SIDES = ("query", "doc")


def join_sides(query: Mapping[str, T], doc: Mapping[str, T]) -> dict[str, T]:
    """Return what both sides have, by side and name."""
    return {
        f"{side}.{name}": value for side, has in zip(SIDES, (query, doc), strict=True) for name, value in has.items()
    }


def split_sides(pairs: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Return what `join_sides` has put together, by side."""
    return {
        side: {name.removeprefix(f"{side}."): value for name, value in pairs.items() if name.startswith(f"{side}.")}
        for side in SIDES
    }


class Chunked:
    """One side's features, to be encoded by its plan. The order of rows and outputs is brought to their device once."""

    def __init__(self, features: Features, plan: SidePlan, places: QueryPositions | None = None) -> None:
        """Take `places` where rows give several queries."""
        self._features, self.plan = features, plan
        device = next(iter(features.values())).device
        parts = (plan.order, plan.outputs, plan.row_in_chunk)
        sent = to_device(torch.from_numpy(np.concatenate(parts)), device)
        self._order, self._outputs, row_in_chunk = sent.split([len(part) for part in parts])
        self._packed = {name: self._whole(name, fill) for name, fill in plan.packed.items()}
        self._places = None if places is None else QueryPositions(row_in_chunk, places.seen[self._outputs])

    def features(self, chunk: Chunk) -> dict[str, Values]:
        """Return the features of a chunk's rows, lists packed or cut to the longest of them; one row for a dummy.

        A list in which no row has anything is not packed.
        """
        if not chunk.num_rows:
            return {**at_least_one({name: tensor[:1] for name, tensor in self._features.items()})}
        rows = slice(chunk.first, chunk.last)
        packed = {
            name: self._packed[name].part(rows, slice(run.first, run.last), run.groups)
            for name, run in chunk.runs.items()
            if run.last > run.first
        }
        taken = {name: tensor[self._order[rows]] for name, tensor in self._features.items() if name not in packed}
        return {
            **taken,
            **{name: taken[name][:, : chunk.widths[name]] for name in chunk.widths.keys() & taken},
            **packed,
        }

    def _whole(self, name: str, fill: int) -> Packed:
        """Return a list of all rows packed, in the plan's order, once for all chunks."""
        runs = [chunk.runs[name] for chunk in self.plan.chunks if chunk.num_rows]
        last = max((run.last for run in runs), default=0)
        longest = max((run.groups[0].longest for run in runs), default=0)
        return pack(self._features[name][self._order], fill, last, longest)

    def places(self, chunk: Chunk) -> QueryPositions | None:
        """Return where the chunk's queries stand in its rows, None where each row is one."""
        return None if self._places is None else QueryPositions(*(part[chunk.outputs] for part in self._places))

    def outputs(self, chunk: Chunk) -> Tensor:
        """Return the numbers of the queries or documents that a chunk gives, int64; none in a dummy."""
        return self._outputs[chunk.outputs]

    def assemble(self, parts: Sequence[Tensor]) -> Tensor:
        """Return what was computed of every chunk, [outputs, …], in the order of queries or documents."""
        whole = parts[0].new_empty((len(self._outputs), *parts[0].shape[1:]))
        for part, chunk in zip(parts, self.plan.chunks, strict=True):
            whole[self.outputs(chunk)] = part[: chunk.num_outputs]
        return whole


def at_least_one(features: Features) -> Features:
    """Return `features`, or one row of padding where they have none."""
    if next(iter(features.values())).shape[0] > 0:
        return features
    return {
        name: tensor.new_zeros((1, *(max(1, size) for size in tensor.shape[1:]))) for name, tensor in features.items()
    }
