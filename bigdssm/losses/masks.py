"""The false-negative mask: which entries of the score matrix are left out, exact across ranks, by 64-bit ids.

Known positives are P = {(query id, document id)}: the pairs of weight > 0 of all ranks, plus those a caller adds.
Entry (i, j) is masked where (query id of i, document id of j) is in P. Each positive itself is among them, which the
losses score apart, so one mask serves both directions.

Without query ids each query is its own, numbered by its row: no other rank's pairs concern it, and none of its own
leave the rank.

Few pairs are kept as pairs, usually little more than one a row; many as a matrix of bytes, which then takes no more
than working on them as pairs.

Shape legend: m queries and n columns of this rank, N columns of all ranks (with unused ones: a column's index is its
place in gathered buffers), P known positives, Q distinct queries of this rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group

_PAIR_BYTES = 48  # of a pair: its key, before and behind the sort, and grouped by query
_MATRIX_FROM = 1 / _PAIR_BYTES  # pairs a cell: a matrix has a byte a cell
_MATRIX_CELLS = 1 << 16  # up to which there is nothing to gain
_CHUNK_PAIRS = 1 << 16  # worked on at once by a CPU: temporaries of all would cost more than the work on them
_MATRIX_ROWS = 256  # widened at once
_BUCKETS_PER_ID = 16  # of a hash table: so few ids share a bucket
_GOLDEN = 0x1E3779B97F4A7C15  # odd: ids that differ in any bits differ in the top ones of their products


def count_known(query_ids: Tensor | None, weight_m: Tensor, known: Tensor | None) -> int:
    """Return how many known positives this rank tells the others."""
    return 0 if query_ids is None else int((weight_m > 0).sum()) + (0 if known is None else known.shape[0])


@dataclass
class KnownPositives:
    """The known positives of this rank's queries, which are numbered by their distinct ids."""

    row_query: Tensor  # [m] each row's query
    num_queries: int
    parts: list[tuple[Tensor, Tensor]]  # queries and document ids, in any order, some more than once

    @property
    def number(self) -> int:
        """P."""
        return sum(query.shape[0] for query, _ in self.parts)

    def among(self, docs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield queries and places in `docs` (ids, sorted, distinct), some at a time, of the pairs that are there."""
        table = IdTable(docs)
        for query, doc_id in self.parts:
            for some_queries, ids in zip(_chunks(query), _chunks(doc_id), strict=True):
                there, doc = table.find(ids)
                yield (some_queries, doc) if bool(there.all()) else (some_queries[there], doc[there])

    def keys(self, docs: Tensor) -> Tensor:
        """Return query · len(docs) + place in `docs` of the pairs that are there, sorted, each once."""
        found = [query * docs.shape[0] + doc for query, doc in self.among(docs)]
        return torch.unique(torch.cat([docs.new_zeros(0), *found]))

    def contain(self, doc_mk: Tensor) -> Tensor:
        """Return bool [m, k]: whether a document listed for a row's query is a known positive of it."""
        if doc_mk.numel() == 0:
            return torch.zeros_like(doc_mk, dtype=torch.bool)
        docs, at_mk = torch.unique(doc_mk, return_inverse=True)
        return _search(self.keys(docs), self.row_query[:, None] * docs.shape[0] + at_mk)[0]


def gather_known_positives(
    query_ids: Tensor | None,
    doc_m: Tensor,
    weight_m: Tensor,
    known: Tensor | None,
    counts: Sequence[int],
    group: Group | None,
) -> KnownPositives:
    """Return what all ranks know of this rank's queries; rank k tells counts[k] pairs, see `count_known`.

    Without query ids nothing is gathered, and `known` names queries by their rows.
    """
    used, m = weight_m > 0, doc_m.shape[0]
    if query_ids is None:
        rows = torch.arange(m, device=doc_m.device)
        more = [] if known is None else [(known[:, 0], known[:, 1])]
        return KnownPositives(rows, m, [(rows[used], doc_m[used]), *more])
    own = torch.stack([query_ids, doc_m], 1)[used]
    own, longest = own if known is None else torch.cat([own, known]), max(counts)
    gathered = distributed.all_gather_padded(own, longest, group).wait()
    of_ranks = [gathered[k * longest : k * longest + count] for k, count in enumerate(counts)]
    of_all = of_ranks[0] if len(of_ranks) == 1 else torch.cat(of_ranks)
    queries, row_query = torch.unique(query_ids, return_inverse=True)
    table = IdTable(queries)
    parts = []
    for pairs in _chunks(of_all):
        here, query = table.find(pairs[:, 0])
        parts.append((query, pairs[:, 1]) if bool(here.all()) else (query[here], pairs[here, 1]))
    return KnownPositives(row_query, queries.shape[0], parts)


class FalseNegatives(ABC):
    """The masked entries of this rank's queries."""

    @abstractmethod
    def row_sums(self, values_N: Tensor) -> Tensor:
        """Return float64 [m]: the sum of a value per column over the masked entries of each row."""

    @abstractmethod
    def contains(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return bool [k]: whether the entry of each of `rows` [k] in one of `columns` [k] is masked."""


@dataclass
class MaskMatrix(FalseNegatives):
    """Of many pairs: bytes, 1 where an entry is masked."""

    row_query: Tensor  # [m] the row's query
    matrix_QN: Tensor  # uint8

    def __post_init__(self) -> None:
        self.is_of_rows = torch.equal(self.row_query, torch.arange(len(self.matrix_QN), device=self.matrix_QN.device))

    def rows(self, start: int, stop: int) -> Tensor:
        """Return uint8 [rows, N] of rows [start, stop)."""
        return self.matrix_QN[start:stop] if self.is_of_rows else self.matrix_QN[self.row_query[start:stop]]

    def row_sums(self, values_N: Tensor) -> Tensor:
        """Return float64 [m]: the sum of a value per column over the masked entries of each row."""
        sums = [torch.mv(some.double(), values_N.double()) for some in self.matrix_QN.split(_MATRIX_ROWS)]
        return torch.cat(sums)[self.row_query]

    def contains(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return bool [k]: whether the entry of each of `rows` [k] in one of `columns` [k] is masked."""
        return self.matrix_QN[self.row_query[rows], columns] > 0


@dataclass
class MaskPairs(FalseNegatives):
    """Of few pairs: the documents of each query, and the columns of each document."""

    row_query: Tensor  # [m] the row's query
    query_docs: Groups  # the documents that are positives of a query
    doc_columns: Groups  # the columns that hold a document
    column_doc: Tensor  # [N]
    pair_keys: Tensor  # sorted query · documents + document

    def __post_init__(self) -> None:
        self.row_lengths = self.row_sums(torch.ones_like(self.column_doc)).long()  # [m] masked entries of each row

    def row_sums(self, values_N: Tensor) -> Tensor:
        """Return float64 [m]: the sum of a value per column over the masked entries of each row."""
        in_use, num_docs = self.doc_columns.values, self.doc_columns.number
        per_doc = torch.zeros(num_docs, dtype=torch.float64, device=in_use.device)
        per_doc.index_add_(0, self.column_doc[in_use], values_N[in_use].double())
        per_query = per_doc.new_zeros(self.query_docs.number)
        per_query.index_add_(0, self.pair_keys // max(1, num_docs), per_doc[self.query_docs.values])
        return per_query[self.row_query]

    def contains(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return bool [k]: whether the entry of each of `rows` [k] in one of `columns` [k] is masked."""
        return _search(self.pair_keys, self.row_query[rows] * self.doc_columns.number + self.column_doc[columns])[0]

    def entries(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return (row − start, column) of every masked entry in rows [start, stop)."""
        row, doc = self.query_docs.expand(self.row_query[start:stop])
        which, column = self.doc_columns.expand(doc)
        return row[which], column


@dataclass
class Groups:
    """Integers grouped by key, end to end: group k is values[start[k] : start[k + 1]]."""

    start: Tensor
    values: Tensor

    @staticmethod
    def of(keys: Tensor, values: Tensor, num_groups: int) -> Groups:
        """Group `values` by `keys`."""
        order = torch.argsort(keys, stable=True)
        start = torch.zeros(num_groups + 1, dtype=torch.int64, device=keys.device)
        torch.cumsum(torch.bincount(keys, minlength=num_groups), 0, out=start[1:])
        return Groups(start, values[order])

    @property
    def number(self) -> int:
        """Number of groups."""
        return self.start.shape[0] - 1

    def expand(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Return (which of `groups`, value) for every member of every group named."""
        lengths = self.start[groups + 1] - self.start[groups]
        which = torch.repeat_interleave(torch.arange(groups.shape[0], device=groups.device), lengths)
        first = torch.cumsum(lengths, 0) - lengths
        within = torch.arange(which.shape[0], device=groups.device) - first[which]
        return which, self.values[self.start[groups][which] + within]


def find_false_negatives(
    positives: KnownPositives, doc_ids_N: Tensor | None, valid: Tensor, num_columns: int
) -> FalseNegatives:
    """Find the masked entries of this rank's queries in columns [N], of which those in `valid` are in use.

    Without document ids a column is its own document, of its own index as id.
    """
    column_doc = docs = torch.arange(num_columns, device=valid.device)
    if doc_ids_N is not None:
        docs, inverse = torch.unique(doc_ids_N[valid], return_inverse=True)
        column_doc = torch.zeros_like(column_doc).index_copy_(0, valid, inverse)
    num_docs, num_queries = docs.shape[0], positives.num_queries
    doc_columns = Groups.of(column_doc[valid], valid, num_docs)
    if not _is_matrix(num_queries * num_columns, positives.number):
        keys = positives.keys(docs)
        query_docs = Groups.of(keys // max(1, num_docs), keys % max(1, num_docs), num_queries)
        return MaskPairs(positives.row_query, query_docs, doc_columns, column_doc, keys)
    matrix_QN = torch.zeros((num_queries, num_columns), dtype=torch.uint8, device=valid.device)
    a_column, single = torch.zeros_like(docs), bool((doc_columns.start.diff() <= 1).all())
    a_column.index_copy_(0, column_doc[valid], valid)
    for query, doc in positives.among(docs):
        if single:
            column = a_column[doc]
        else:
            which, column = doc_columns.expand(doc)
            query = query[which]
        matrix_QN.view(-1)[query * num_columns + column] = 1
    return MaskMatrix(positives.row_query, matrix_QN)


def _chunks(pairs: Tensor) -> tuple[Tensor, ...]:
    """Return parts of a tensor of pairs; on a device one, where each would have its own launches and waits."""
    return pairs.split(_CHUNK_PAIRS) if pairs.device.type == "cpu" else (pairs,)


def _is_matrix(cells: int, num_pairs: int) -> bool:
    return cells > _MATRIX_CELLS and num_pairs >= cells * _MATRIX_FROM


def mask_bytes(num_queries: int, num_columns: int, num_pairs: int) -> int:
    """Return what the mask of so many known positives takes, these left out, while it is made and after."""
    cells = num_queries * num_columns
    return cells if _is_matrix(cells, num_pairs) else _PAIR_BYTES * num_pairs + 4 * 8 * num_columns


class IdTable:
    """Finds ids among others by hashing: a sixth of a binary search's time where many are looked up in few."""

    def __init__(self, sorted_ids: Tensor) -> None:
        """`sorted_ids` are distinct."""
        self._ids, number = sorted_ids, sorted_ids.shape[0]
        self._bits = max(1, _BUCKETS_PER_ID * number).bit_length()
        bucket = self._bucket(sorted_ids)
        self._at = torch.zeros(1 << self._bits, dtype=torch.int64, device=sorted_ids.device)
        self._at[bucket] = torch.arange(number, device=sorted_ids.device)
        self._shared = torch.bincount(bucket, minlength=1 << self._bits) > 1

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return whether each id is among those of the table, and where."""
        if self._ids.shape[0] == 0:
            return torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids)
        bucket = self._bucket(ids)
        at = self._at[bucket]
        there = self._ids[at] == ids
        again = (~there).nonzero().squeeze(1)
        again = again[self._shared[bucket[again]]]
        there[again], at[again] = _search(self._ids, ids[again])
        return there, at

    def _bucket(self, ids: Tensor) -> Tensor:
        top = (ids * _GOLDEN).bitwise_right_shift_(63 - self._bits)
        return top.bitwise_and_((1 << self._bits) - 1)


def _search(sorted_ids: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether each id is among `sorted_ids`, and where."""
    if sorted_ids.shape[0] == 0:
        return torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids)
    at = torch.searchsorted(sorted_ids, ids.contiguous()).clamp_(max=sorted_ids.shape[0] - 1)
    return sorted_ids[at] == ids, at
