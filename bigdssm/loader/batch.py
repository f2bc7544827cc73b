"""Batches: one rank's rows of a step as tensors, their building from rows, and their transfer to the device."""

from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from bigdssm.dataset.catalogue import Catalogue
from bigdssm.dataset.rows import Rows
from bigdssm.dataset.schema import Schema
from bigdssm.errors import ConfigError
from bigdssm.features import PADDING, Feature, ragged
from bigdssm.features.base import REQUEST_PREFIX
from bigdssm.features.ragged import Column, Ragged
from bigdssm.models import QueryPositions, SideSize
from bigdssm.utils.device import on_current_device, to_device

T = TypeVar("T")

Features = dict[str, Tensor]
"""The features of one side by name, one tensor row per query or document, see `Feature.array`.

Lists (texts, histories, several categories) are int64 [rows, T], right-padded.
"""

Paddings = dict[str, int]
"""The padding value of each list feature of one side; other features have no entry."""


def to_features(declared: Mapping[str, Feature], columns: Mapping[str, Column]) -> Features:
    """Convert columns (one per declared feature, and those of a history's events) to tensors by name.

    The column HISTORY.FEATURE has a value per event of a history; it is padded where the history is. The column
    request.FEATURE has a value per query.
    """
    features = {name: as_tensor(feature.array(columns[name])) for name, feature in declared.items()}
    for name, column in columns.items():
        of_history = name not in declared and name.partition(".")[0] in declared
        if of_history or name.startswith(REQUEST_PREFIX):
            values = column.values if isinstance(column, Ragged) else np.asarray(column)
            fill, dtype = (np.nan, np.float32) if values.dtype.kind == "f" else (PADDING, np.int64)
            array = column.padded(fill, dtype) if isinstance(column, Ragged) else values.astype(dtype, copy=False)
            features[name] = as_tensor(array)
    return features


def paddings(declared: Mapping[str, Feature]) -> Paddings:
    """Return the padding values of the list features."""
    return {name: feature.padding for name, feature in declared.items() if feature.padding is not None}


def as_tensor(array: np.ndarray) -> Tensor:
    """Convert an array to a tensor; read-only arrays are copied."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


@dataclass(frozen=True)
class ListLengths:
    """Lengths per row of a list feature (tokens, history items, several values)."""

    filled: np.ndarray  # int64 [rows]: number of filled cells
    used: np.ndarray  # int64 [rows]: number of cells up to the last filled one
    width: int  # columns of its tensor
    fill: int  # padding value
    inputs: tuple[str, ...] = ()  # of a model: tensors of the same width, which are cut with the list

    def take(self, rows: Tensor) -> "ListLengths":
        """Return the lengths of the given rows, int64."""
        indices = rows.cpu().numpy()
        return replace(self, filled=self.filled[indices], used=self.used[indices])


Lengths = Mapping[str, ListLengths]
"""Lengths by list feature."""


def lengths_of(features: Features, paddings: Paddings) -> Lengths:
    """Return the lengths of one side's list features; the tensors are on the host."""
    return {
        name: lengths_of_mask(features[name].numpy() != fill, fill, inputs_of_events(name, features))
        for name, fill in paddings.items()
    }


def inputs_of_events(history: str, features: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the tensors of a history's events, of the history's shape."""
    return tuple(name for name in features if name.startswith(f"{history}."))


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
    time: Tensor | None = None  # float64 [m]: of the queries' targets, with `since`; NaN: unknown
    since: Tensor | None = None  # float64 [n]: time from which a document is available; None: items have no times
    no_negative: Tensor | None = None  # bool [n]: whether a column is no negative of any query; None: none is
    teacher: Tensor | None = None  # float32 [m, 1 + k]: teacher scores of the positive and the negatives, NaN for none
    shown: Tensor | None = None  # int64 [m, 1 + k]: positions where the pairs were shown, from 1; 0: unknown
    teacher_query: Tensor | None = None  # float16 [m, E]: teacher vectors, whose products are the teacher scores
    teacher_doc: Tensor | None = None  # float16 [n, E]
    doc_vectors: Tensor | None = None  # float32 [n, D+1]: fixed index vectors; `doc` is then empty
    # By sharded table: distinct rows int64, on the host. Its features then hold positions: k > 0 is the k-th row.
    table_rows: Mapping[str, np.ndarray] | None = None
    # int64 [p, 2]: further masked pairs (query id or, depending on negatives.mask, query index; doc id)
    known_positives: Tensor | None = None
    is_known: Tensor | None = None  # bool [m]: whether a positive is one for all queries of its id; None: all are

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

    def tensors(self) -> list[Tensor]:
        """Return all tensors."""
        tensors: list[Tensor] = []
        for f in fields(self):
            value = getattr(self, f.name)
            parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else [value]
            tensors += [part for part in parts if isinstance(part, Tensor)]
        return tensors


class Collator:
    """Builds batches: one column per distinct document, positives first."""

    def __init__(self, schema: Schema, catalogue: Catalogue | None, *, reads_documents: bool = True) -> None:
        """`catalogue`: None if the rows contain their documents. reads_documents: else `Batch.doc` is empty."""
        self._schema, self._catalogue, self._reads_documents = schema, catalogue, reads_documents

    def __call__(
        self, rows: Rows, *, negatives: np.ndarray | None = None, extra_docs: np.ndarray | None = None
    ) -> Batch:
        """Return `rows` as a Batch; columns are the positives, then new documents of `negatives`, then `extra_docs`.

        negatives: int64 [m, k], catalogue rows, -1 for none. extra_docs: int64 [e], catalogue rows. Raises ConfigError:
        one of them without a catalogue.
        """
        # Each distinct document is one column; column_of: those of the positives, the negatives and the extra ones.
        mapped = None
        if self._catalogue is None:
            if negatives is not None or extra_docs is not None:
                raise ConfigError("hard and uniform negatives need a catalogue; these rows contain their documents")
            ids = np.empty(0, np.int64) if rows.doc_ids is None else rows.doc_ids
            doc_ids, column_of = distinct_in_order(ids)
            first = np.empty(len(doc_ids), np.int64)
            first[column_of[::-1]] = np.arange(len(ids))[::-1]  # written last, the first row of each document stays
            doc = to_features(self._schema.doc, {name: ragged.take(c, first) for name, c in rows.doc.items()})
            doc_rows = np.full(len(doc_ids), -1, np.int64)
        else:
            given = np.empty(0, np.int64) if negatives is None else negatives[negatives >= 0]
            extra = np.empty(0, np.int64) if extra_docs is None else extra_docs
            doc_rows, column_of = distinct_in_order(np.concatenate([rows.doc_rows, given, extra]))
            if negatives is not None:
                mapped = np.full(negatives.shape, -1, np.int64)
                mapped[negatives >= 0] = column_of[rows.num_queries : rows.num_queries + len(given)]
            doc_ids = self._catalogue.ids(doc_rows)
            doc = to_features(self._schema.doc, self._catalogue.columns(doc_rows)) if self._reads_documents else {}
        # The positions of the queries in their rows' histories, for several queries per row.
        query_positions, queries_of_row = None, None
        if rows.row is not None and rows.prefix is not None and rows.history_start is not None:
            prefix_length = np.maximum(rows.prefix - rows.history_start[rows.row], 0)
            queries_of_row = np.bincount(rows.row, minlength=len(rows))
            most = int(queries_of_row.max(initial=1))
            query_positions = QueryPositions(as_tensor(rows.row), as_tensor(prefix_length), most)
        query = self.query_features(rows.inputs)
        return Batch(
            step=rows.step,
            row_ids=as_tensor(rows.row_ids),
            query=query,
            doc=doc,
            positive=as_tensor(column_of[: rows.num_queries]),
            relevance=as_tensor(rows.relevance),
            query_ids=as_tensor(rows.query_ids),
            doc_ids=as_tensor(doc_ids),
            doc_rows=as_tensor(doc_rows),
            counts=as_tensor(np.bincount(column_of, minlength=len(doc_ids))),
            negatives=None if mapped is None else as_tensor(mapped),
            query_lengths=lengths_of(query, paddings(self._schema.query)),
            doc_lengths=lengths_of(doc, paddings(self._schema.doc)) if doc else {},
            query_positions=query_positions,
            queries_of_row=queries_of_row,
        )

    def query_features(self, columns: Mapping[str, Column]) -> Features:
        """Return the query columns of `Rows.inputs` as tensors."""
        return to_features(self._schema.query, columns)


def distinct_in_order(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct values in order of first appearance, and the index of each value in them."""
    distinct, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return distinct[order], rank[inverse]


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors on `device`, except the row ids, which only the host reads."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return to_device(value, device)
        if isinstance(value, dict):
            return {name: moved(part) for name, part in value.items()}
        return type(value)(*map(moved, value)) if isinstance(value, tuple) else value

    return replace(batch, **{f.name: moved(getattr(batch, f.name)) for f in fields(batch) if f.name != "row_ids"})


def uploaded_batches(batches: Iterator[Batch], device: torch.device) -> Generator[Batch]:
    """Yield host batches on `device`; for a GPU a thread transfers the next one. Close it to end the thread."""
    if device.type != "cuda":  # nothing to overlap
        for batch in batches:
            yield on_device(batch, device)
        return

    def transfers() -> Iterator[tuple[Batch, torch.cuda.Event]]:
        stream = torch.cuda.Stream(device)
        for batch in batches:
            with torch.cuda.stream(stream):  # also sets the thread's current device
                moved = on_device(batch, device)
                sent = stream.record_event()
            yield moved, sent

    with closing(prefetch(transfers())) as sending:
        for batch, sent in sending:
            now = torch.cuda.current_stream(device)
            now.wait_event(sent)
            for tensor in batch.tensors():
                if tensor.is_cuda:
                    tensor.record_stream(now)  # else the copy stream could reuse its memory too early
            yield batch


def prefetch(items: Iterator[T]) -> Generator[T]:
    """Yield the items in order while a thread fetches the next one; its exception is raised at that item."""
    end: Any = object()
    with ThreadPoolExecutor(1, "batches") as thread:
        fetch = on_current_device(next)
        following = thread.submit(fetch, items, end)
        while (item := following.result()) is not end:
            following = thread.submit(fetch, items, end)
            yield item
