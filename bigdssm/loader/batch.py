"""Batch: the rows of one training step on one rank, as tensors that are transferred together."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigdssm.dataset.tensors import Features, PadIds
from bigdssm.models import QueryPositions, SideSize

ALIGNMENT = 64  # bytes: of what a processor loads at once

TensorSlot = tuple[int, torch.dtype, torch.Size]
"""Where a tensor begins, in bytes, and what it is."""


def pack_tensors(content: Any) -> tuple[bytes, Tensor, list[TensorSlot]]:
    """Return a pickle of `content` without its tensors, these as bytes, uint8, and the place of each.

    The tensors are the host's.
    """
    file = io.BytesIO()
    pickler = _WithoutTensors(file, pickle.HIGHEST_PROTOCOL)
    pickler.dump(content)
    places, end = [], 0
    for tensor in pickler.tensors:
        places.append((end, tensor.dtype, tensor.shape))
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    whole = torch.empty(end, dtype=torch.uint8)
    for tensor, place in zip(pickler.tensors, places, strict=True):
        _at(whole, place).copy_(tensor)
    return file.getvalue(), whole, places


def unpack_tensors(content: bytes, whole: Tensor, places: Sequence[TensorSlot]) -> Any:
    """Return what was packed; its tensors are parts of `whole`."""
    return _WithTensors(io.BytesIO(content), [_at(whole, place) for place in places]).load()


def _at(whole: Tensor, place: TensorSlot) -> Tensor:
    first, dtype, shape = place
    return whole[first : first + shape.numel() * dtype.itemsize].view(dtype).view(shape)


class _WithoutTensors(pickle.Pickler):
    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        self.tensors.append(obj)
        return len(self.tensors) - 1


class _WithTensors(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self._tensors[pid]


@dataclass(frozen=True)
class ListLengths:
    """Of one feature that is a list (tokens, history items, several values)."""

    filled: np.ndarray  # int64 [rows]: cells that hold something
    used: np.ndarray  # int64 [rows]: cells up to the last that does
    width: int  # columns of its tensor
    fill: int  # what pads it

    def take(self, rows: Tensor) -> ListLengths:
        """Return those of the given rows, int64."""
        at = rows.cpu().numpy()
        return ListLengths(self.filled[at], self.used[at], self.width, self.fill)


Lengths = Mapping[str, ListLengths]
"""By feature; those that are no lists are not in it."""


def lengths_of(features: Features, pad_ids: PadIds) -> Lengths:
    """Return the lengths of one side's lists; the tensors are the host's."""
    return {name: _lengths(features[name].numpy(), fill) for name, fill in pad_ids.items()}


def _lengths(values: np.ndarray, fill: int) -> ListLengths:
    filled = values != fill
    num_rows, width = filled.shape
    from_end = filled[:, ::-1].argmax(axis=1) if width else np.zeros(num_rows, np.int64)
    count = filled.sum(axis=1, dtype=np.int64)
    return ListLengths(count, np.where(count > 0, width - from_end, 0), width, fill)


@dataclass(frozen=True)
class Batch:
    """This rank's share of one global step."""

    step: int
    row_ids: Tensor  # int64 [R]: the row's number in the dataset's split; on the host, wherever the others are
    query: Features  # R rows
    doc: Features  # n rows: distinct documents, positives first, further columns (negatives) behind
    positive: Tensor  # int64 [m]: the column of the query's document
    relevance: Tensor  # float32 [m]: r, not negative
    query_ids: Tensor  # int64 [m]
    doc_ids: Tensor  # int64 [n]
    doc_rows: Tensor  # int64 [n]: catalogue rows; -1 where documents stand in the shards themselves
    multiplicity: Tensor  # int64 [n]: how many positives, negatives and extra documents were merged in the column
    query_lengths: Lengths  # on the host, wherever the tensors are
    doc_lengths: Lengths
    places: QueryPositions | None = None  # of the queries, row after row; None: each row is one, at its newest place
    queries_of_row: np.ndarray | None = None  # int64 [R], on the host; None: one each
    negatives: Tensor | None = None  # int64 [m, k]: columns of given negatives, -1 for none
    past: Tensor | None = None  # bool [n]: whether a column is its document as rows saw it before it changed
    teacher: Tensor | None = None  # float32 [m, 1 + k]: a judge's scores of positive and negatives, NaN for none
    teacher_query: Tensor | None = None  # float16 [m, E]: a teacher's vectors, whose products are its scores
    teacher_doc: Tensor | None = None  # float16 [n, E]
    known: Tensor | None = (
        None  # int64 [p, 2]: (query id or, by negatives.mask, number; doc id) of further no negatives
    )

    @property
    def nbytes(self) -> int:
        """Return the bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def sizes(self) -> tuple[SideSize, SideSize]:
        """Return how much the queries' side and the documents' hold."""
        query, doc = (
            {name: list_.filled for name, list_ in side.items()} for side in (self.query_lengths, self.doc_lengths)
        )
        num_queries = None if self.places is None else len(self.query_ids)
        return SideSize(len(self.row_ids), query, num_queries), SideSize(len(self.doc_ids), doc)

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple[Any, ...]]:
        """Pickle as one tensor, which between processes is shared memory: each tensor would be a file to open."""
        return _of_packed, pack_tensors({f.name: getattr(self, f.name) for f in fields(self)})

    def tensors(self) -> list[Tensor]:
        """Return its tensors."""
        return [tensor for f in fields(self) for tensor in _tensors(getattr(self, f.name))]


def _of_packed(*parts: Any) -> Batch:
    return Batch(**unpack_tensors(*parts))


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, dict | tuple):
        parts = value.values() if isinstance(value, dict) else value
        return [tensor for tensor in parts if isinstance(tensor, Tensor)]
    return [value] if isinstance(value, Tensor) else []
