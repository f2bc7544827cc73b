"""Batch: one rank's rows of a training step, as tensors that are transferred together."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigdssm.dataset.tensors import Features, Paddings
from bigdssm.models import QueryPositions, SideSize

ALIGNMENT = 64  # bytes: a cache line

TensorSlot = tuple[int, torch.dtype, torch.Size]
"""Byte offset, type and shape of a packed tensor."""


def pack_tensors(content: Any) -> tuple[bytes, Tensor, list[TensorSlot]]:
    """Return a pickle of `content` without its tensors, their bytes as one uint8 tensor, and the slot of each.

    The tensors are on the host.
    """
    file = io.BytesIO()
    pickler = _WithoutTensors(file, pickle.HIGHEST_PROTOCOL)
    pickler.dump(content)
    slots, end = [], 0
    for tensor in pickler.tensors:
        slots.append((end, tensor.dtype, tensor.shape))
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    buffer = torch.empty(end, dtype=torch.uint8)
    for tensor, slot in zip(pickler.tensors, slots, strict=True):
        _slot_view(buffer, slot).copy_(tensor)
    return file.getvalue(), buffer, slots


def unpack_tensors(content: bytes, buffer: Tensor, slots: Sequence[TensorSlot]) -> Any:
    """Return the packed content; its tensors are views of `buffer`."""
    return _WithTensors(io.BytesIO(content), [_slot_view(buffer, slot) for slot in slots]).load()


def _slot_view(buffer: Tensor, slot: TensorSlot) -> Tensor:
    offset, dtype, shape = slot
    return buffer[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)


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
    """Lengths per row of a list feature (tokens, history items, several values)."""

    filled: np.ndarray  # int64 [rows]: number of filled cells
    used: np.ndarray  # int64 [rows]: number of cells up to the last filled one
    width: int  # columns of its tensor
    fill: int  # padding value
    inputs: tuple[str, ...] = ()  # of a model: tensors of the same width, which are cut with the list

    def take(self, rows: Tensor) -> ListLengths:
        """Return the lengths of the given rows, int64."""
        indices = rows.cpu().numpy()
        return replace(self, filled=self.filled[indices], used=self.used[indices])


Lengths = Mapping[str, ListLengths]
"""Lengths by list feature."""


def lengths_of(features: Features, paddings: Paddings) -> Lengths:
    """Return the lengths of one side's list features; the tensors are on the host."""
    return {name: lengths_of_mask(features[name].numpy() != fill, fill) for name, fill in paddings.items()}


def lengths_of_mask(filled: np.ndarray, fill: int, inputs: tuple[str, ...] = ()) -> ListLengths:
    """Return the lengths of one list feature by its filled cells, bool [rows, width]."""
    num_rows, width = filled.shape
    from_end = filled[:, ::-1].argmax(axis=1) if width else np.zeros(num_rows, np.int64)
    count = filled.sum(axis=1, dtype=np.int64)
    return ListLengths(count, np.where(count > 0, width - from_end, 0), width, fill, inputs)


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global step."""

    step: int
    row_ids: Tensor  # int64 [R]: row number in the dataset's split; always on the host
    query: Features  # R rows
    doc: Features  # n rows: distinct documents, positives first, then further columns (negatives)
    positive: Tensor  # int64 [m]: column of the query's positive document
    relevance: Tensor  # float32 [m]: r, not negative
    query_ids: Tensor  # int64 [m]
    doc_ids: Tensor  # int64 [n]
    doc_rows: Tensor  # int64 [n]: catalogue rows; -1 if the rows contain their documents
    counts: Tensor  # int64 [n]: number of positives, negatives and extra documents merged into the column
    query_lengths: Lengths  # always on the host
    doc_lengths: Lengths
    query_positions: QueryPositions | None = None  # row after row; None: one query per row, at its newest position
    queries_of_row: np.ndarray | None = None  # int64 [R], on the host; None: one per row
    negatives: Tensor | None = None  # int64 [m, k]: columns of hard negatives, -1 for none
    withdrawn: Tensor | None = None  # bool [n]: whether a catalogue column is a withdrawn document; None: none is
    teacher: Tensor | None = None  # float32 [m, 1 + k]: teacher scores of the positive and the negatives, NaN for none
    teacher_query: Tensor | None = None  # float16 [m, E]: teacher vectors, whose products are the teacher scores
    teacher_doc: Tensor | None = None  # float16 [n, E]
    doc_vectors: Tensor | None = None  # float32 [n, D+1]: fixed index vectors; `doc` is then empty
    # By sharded table: distinct rows int64, on the host. Its features then hold positions: k > 0 is the k-th row.
    table_rows: Mapping[str, np.ndarray] | None = None
    # int64 [p, 2]: further masked pairs (query id or, depending on negatives.mask, query index; doc id)
    known_positives: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Return the size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def sizes(self) -> tuple[SideSize, SideSize]:
        """Return the sizes of the query side and the document side."""
        query, doc = (
            {name: list_.filled for name, list_ in side.items()} for side in (self.query_lengths, self.doc_lengths)
        )
        num_queries = None if self.query_positions is None else len(self.query_ids)
        return SideSize(len(self.row_ids), query, num_queries), SideSize(len(self.doc_ids), doc)

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple[Any, ...]]:
        """Pickle as one tensor: between processes each tensor is a shared memory file to open."""
        return _of_packed, pack_tensors({f.name: getattr(self, f.name) for f in fields(self)})

    def tensors(self) -> list[Tensor]:
        """Return all tensors."""
        return [tensor for f in fields(self) for tensor in _tensors(getattr(self, f.name))]


def _of_packed(*parts: Any) -> Batch:
    return Batch(**unpack_tensors(*parts))


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, dict | tuple):
        parts = value.values() if isinstance(value, dict) else value
        return [tensor for tensor in parts if isinstance(tensor, Tensor)]
    return [value] if isinstance(value, Tensor) else []
