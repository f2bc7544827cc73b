"""What one training step of one rank works on.

Shapes: R rows, m queries, n distinct document columns, T tokens or history items, K values of a multi-valued feature,
k given negatives, E a teacher's width. R is m unless rows are pieces of sequences that give several queries each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from torch import Tensor

from bigdssm.batching.lengths import Lengths
from bigdssm.batching.one_tensor import packed, unpacked
from bigdssm.dataset.tensors import Features
from bigdssm.models import Places, SideSize


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
    places: Places | None = None  # of the queries, row after row; None: each row is one, at its newest place
    queries_of_row: np.ndarray | None = None  # int64 [R], on the host; None: one each
    negatives: Tensor | None = None  # int64 [m, k]: columns of given negatives, -1 for none
    past: Tensor | None = None  # bool [n]: whether a column is its document as rows saw it before it changed
    teacher: Tensor | None = None  # float32 [m, 1 + k]: a judge's scores of positive and negatives, NaN for none
    teacher_query: Tensor | None = None  # float16 [m, E]: a teacher's vectors, whose products are its scores
    teacher_doc: Tensor | None = None  # float16 [n, E]
    known: Tensor | None = None  # int64 [p, 2]: (query id or, by loss.mask, number; doc id) of further no negatives

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
        return _of_packed, packed({f.name: getattr(self, f.name) for f in fields(self)})

    def tensors(self) -> list[Tensor]:
        """Return its tensors."""
        return [tensor for f in fields(self) for tensor in _tensors(getattr(self, f.name))]


def _of_packed(*parts: Any) -> Batch:
    return Batch(**unpacked(*parts))


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, dict | tuple):
        parts = value.values() if isinstance(value, dict) else value
        return [tensor for tensor in parts if isinstance(tensor, Tensor)]
    return [value] if isinstance(value, Tensor) else []
