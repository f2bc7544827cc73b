"""Build a training batch from rows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bigdssm.dataset.catalogue import Catalogue
from bigdssm.dataset.rows import Rows
from bigdssm.dataset.schema import Schema
from bigdssm.dataset.tensors import Features, as_tensor, paddings, to_features
from bigdssm.errors import ConfigError
from bigdssm.features import ragged
from bigdssm.features.ragged import Column
from bigdssm.loader.batch import Batch, lengths_of
from bigdssm.models.packed import QueryPositions


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
        if self._catalogue is None:
            if negatives is not None or extra_docs is not None:
                raise ConfigError("hard and uniform negatives need a catalogue; these rows contain their documents")
            return self._batch(rows, *self._inline(rows))
        m = rows.num_queries
        given = np.empty(0, np.int64) if negatives is None else negatives[negatives >= 0]
        extra = np.empty(0, np.int64) if extra_docs is None else extra_docs
        distinct, column_of = distinct_in_order(np.concatenate([rows.doc_rows, given, extra]))
        mapped = None
        if negatives is not None:
            mapped = np.full(negatives.shape, -1, np.int64)
            mapped[negatives >= 0] = column_of[m : m + len(given)]
        doc = self._catalogue.features(distinct) if self._reads_documents else {}
        return self._batch(rows, doc, column_of, self._catalogue.ids(distinct), distinct, mapped)

    def query_features(self, columns: Mapping[str, Column]) -> Features:
        """Return the query columns of `Rows.query` as tensors."""
        return to_features(self._schema.query, columns)

    def _query_positions(self, rows: Rows) -> tuple[QueryPositions | None, np.ndarray | None]:
        """Return the queries' positions in their rows' histories, and the number of queries per row."""
        if rows.row is None or rows.position is None or rows.history_start is None:
            return None, None
        prefix_length = rows.position - rows.history_start[rows.row]
        return QueryPositions(as_tensor(rows.row), as_tensor(prefix_length)), np.bincount(rows.row, minlength=len(rows))

    def _inline(self, rows: Rows) -> tuple[Features, np.ndarray, np.ndarray, np.ndarray]:
        ids = np.empty(0, np.int64) if rows.doc_ids is None else rows.doc_ids
        distinct, column_of = distinct_in_order(ids)
        first = np.empty(len(distinct), np.int64)
        first[column_of[::-1]] = np.arange(len(ids))[::-1]  # written last, the first row of each document stays
        columns = {name: ragged.take(column, first) for name, column in rows.doc.items()}
        doc = to_features(self._schema.doc, columns)
        return doc, column_of, distinct, np.full(len(distinct), -1, np.int64)

    def _batch(
        self, rows: Rows, doc: Features, column_of: np.ndarray, doc_ids: np.ndarray, doc_rows: np.ndarray,
        negatives: np.ndarray | None = None,
    ) -> Batch:  # fmt: skip
        """`column_of`: the column of each document before merging, positives first."""
        query = self.query_features(rows.query)
        query_positions, queries_of_row = self._query_positions(rows)
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
            negatives=None if negatives is None else as_tensor(negatives),
            query_lengths=lengths_of(query, paddings(self._schema.query)),
            doc_lengths=lengths_of(doc, paddings(self._schema.doc)) if doc else {},
            query_positions=query_positions,
            queries_of_row=queries_of_row,
        )


def distinct_in_order(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct values in order of first appearance, and the index of each value in them."""
    distinct, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return distinct[order], rank[inverse]
