"""Split the features of a batch into chunks and reassemble the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from bigdssm.dataset.tensors import Features
from bigdssm.loader.step_plan import Chunk, SidePlan
from bigdssm.models import Packed, QueryPositions, Values, pack
from bigdssm.utils.device import to_device

T = TypeVar("T")
SIDES = ("query", "doc")


def join_sides(query: Mapping[str, T], doc: Mapping[str, T]) -> dict[str, T]:
    """Return the entries of both sides as one mapping with keys `side.name`."""
    return {
        f"{side}.{name}": value for side, has in zip(SIDES, (query, doc), strict=True) for name, value in has.items()
    }


def split_sides(pairs: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Return the mappings that `join_sides` joined, by side."""
    return {
        side: {name.removeprefix(f"{side}."): value for name, value in pairs.items() if name.startswith(f"{side}.")}
        for side in SIDES
    }


class Chunked:
    """One side's features, split by its plan. The order of rows and outputs is sent to the device once."""

    def __init__(self, features: Features, plan: SidePlan, query_positions: QueryPositions | None = None) -> None:
        """`query_positions`: for rows with several queries."""
        self._features, self.plan = features, plan
        device = next(iter(features.values())).device
        parts = (plan.order, plan.outputs, plan.row_in_chunk)
        sent = to_device(torch.from_numpy(np.concatenate(parts)), device)
        self._order, self._outputs, row_in_chunk = sent.split([len(part) for part in parts])
        self._packed = {name: self._whole(name, fill) for name, fill in plan.packed.items()}
        self._query_positions = (
            None
            if query_positions is None
            else QueryPositions(row_in_chunk, query_positions.prefix_length[self._outputs])
        )

    def features(self, chunk: Chunk) -> dict[str, Values]:
        """Return the features of a chunk's rows, lists packed or cut to the longest row; one row for a dummy chunk.

        A list that is empty in all rows is not packed.
        """
        if not chunk.num_rows:
            return {**at_least_one({name: tensor[:1] for name, tensor in self._features.items()})}
        rows = slice(chunk.first, chunk.last)
        packed = {
            name: self._packed[name].slice_rows(rows, slice(run.first, run.last), run.groups)
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
        """Return a list feature of all rows packed in the plan's order."""
        runs = [chunk.runs[name] for chunk in self.plan.chunks if chunk.num_rows]
        last = max((run.last for run in runs), default=0)
        longest = max((run.groups[0].longest for run in runs), default=0)
        return pack(self._features[name][self._order], fill, last, longest)

    def query_positions(self, chunk: Chunk) -> QueryPositions | None:
        """Return the positions of the chunk's queries in its rows; None: one query per row."""
        return (
            None
            if self._query_positions is None
            else QueryPositions(*(part[chunk.outputs] for part in self._query_positions))
        )

    def outputs(self, chunk: Chunk) -> Tensor:
        """Return the indices of the chunk's queries or documents, int64; empty for a dummy chunk."""
        return self._outputs[chunk.outputs]

    def assemble(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the outputs of all chunks, [outputs, …], in the order of queries or documents."""
        whole = parts[0].new_empty((len(self._outputs), *parts[0].shape[1:]))
        for part, chunk in zip(parts, self.plan.chunks, strict=True):
            whole[self.outputs(chunk)] = part[: chunk.num_outputs]
        return whole


def at_least_one(features: Features) -> Features:
    """Return `features`, or one row of padding if they are empty."""
    if next(iter(features.values())).shape[0] > 0:
        return features
    return {
        name: tensor.new_zeros((1, *(max(1, size) for size in tensor.shape[1:]))) for name, tensor in features.items()
    }
