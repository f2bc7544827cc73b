"""The false-negative mask: excluded entries of the score matrix, exact across ranks, by 64-bit ids.

On a device, nothing here synchronises with the host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group

_BUCKETS_PER_ID = 16  # of a hash table: so few ids share a bucket
_GOLDEN = 0x1E3779B97F4A7C15  # odd: ids that differ in any bits differ in the top ones of their products


@dataclass
class Groups:
    """Integers grouped by key, end to end: group k is values[start[k] : start[k + 1]]."""

    start: Tensor
    values: Tensor

    def lengths(self) -> Tensor:
        """Return the number of members of each group."""
        return self.start.diff()

    def first(self) -> Tensor:
        """Return each group's first member, anything where it has none."""
        return self.values[self.start[:-1].clamp(max=self.values.shape[0] - 1)]

    @staticmethod
    def ranges(lengths: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """Return (k, 0 … lengths[k] − 1) for every k, end to end; `total` is the sum of the lengths."""
        ends, at = torch.cumsum(lengths, 0), torch.arange(total, device=lengths.device)
        which = torch.searchsorted(ends, at, right=True)
        return which, at - (ends - lengths)[which]


def occurrences(numbers: Tensor, limit: int) -> Tensor:
    """Return how often each of 0 … limit − 1 is among the int64 `numbers`; bincount would wait for a device."""
    return numbers.new_zeros(limit).index_add_(0, numbers, torch.ones_like(numbers))


class Numbers:
    """Ids [n] numbered by value, from 0; equal ids share a number, and all numbers are below `limit`."""

    def __init__(self, ids: Tensor) -> None:
        """On a device `limit` is n, beyond what numbers there are: how many is not known to the host."""
        self._sorted, order = torch.sort(ids, stable=True)
        numbers = torch.zeros_like(ids)
        torch.cumsum(self._sorted[1:] != self._sorted[:-1], 0, out=numbers[1:])
        self.of_ids = torch.empty_like(ids).index_copy_(0, order, numbers)  # [n]
        self.limit = int(numbers[-1]) + 1 if len(ids) and ids.device.type == "cpu" else len(ids)
        start = torch.searchsorted(numbers, torch.arange(self.limit + 1, device=ids.device))
        self.places = Groups(start, order)  # of the ids, by number

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return whether each id is among them, and its number, anything below `limit` where it is not."""
        return self._table.find(ids)

    @cached_property
    def _table(self) -> IdTable:
        return IdTable(Groups(self.places.start, self._sorted).first())


class IdTable:
    """Finds ids among others; on a CPU by hashing: a sixth of a binary search's time where many are found in few."""

    def __init__(self, sorted_ids: Tensor) -> None:
        """`sorted_ids` are distinct; on a device the last may be repeated."""
        self._ids, number = sorted_ids, sorted_ids.shape[0]
        if sorted_ids.device.type != "cpu":
            return
        self._bits = max(1, _BUCKETS_PER_ID * number).bit_length()
        bucket = self._bucket(sorted_ids)
        self._at = torch.zeros(1 << self._bits, dtype=torch.int64)
        self._at[bucket] = torch.arange(number)
        self._shared = torch.bincount(bucket, minlength=1 << self._bits) > 1

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return whether each id is among those of the table, and where."""
        if self._ids.shape[0] == 0 or ids.device.type != "cpu":
            return search(self._ids, ids)
        bucket = self._bucket(ids)
        at = self._at[bucket]
        there = self._ids[at] == ids
        again = (~there).nonzero().squeeze(1)
        again = again[self._shared[bucket[again]]]
        there[again], at[again] = search(self._ids, ids[again])
        return there, at

    def _bucket(self, ids: Tensor) -> Tensor:
        top = (ids * _GOLDEN).bitwise_right_shift_(63 - self._bits)
        return top.bitwise_and_((1 << self._bits) - 1)


def search(sorted_ids: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether each id is among `sorted_ids`, and where."""
    if sorted_ids.shape[0] == 0:
        return torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids)
    at = torch.searchsorted(sorted_ids, ids.contiguous()).clamp_(max=sorted_ids.shape[0] - 1)
    return sorted_ids[at] == ids, at


_PAIR_BYTES = 48  # of a pair: its key, before and behind the sort, and grouped by query
_MATRIX_FROM = 1 / _PAIR_BYTES  # pairs a cell: a matrix has a byte a cell
_MATRIX_CELLS = 1 << 16  # up to which there is nothing to gain
_CHUNK_PAIRS = 1 << 16  # worked on at once by a CPU: temporaries of all would cost more than the work on them
_MATRIX_ROWS = 256  # widened at once by a CPU
_NOWHERE = 2**63 - 1  # the key of a pair whose document has no column


def count_known(query_ids: Tensor | None, weight_m: Tensor, known: Tensor | None) -> Tensor | int:
    """Return how many known positives this rank tells the others."""
    return 0 if query_ids is None else (weight_m > 0).sum() + (0 if known is None else known.shape[0])


def own_pairs(query_ids: Tensor, doc_m: Tensor, weight_m: Tensor, known: Tensor | None) -> Tensor:
    """Return (query id, document id) [pairs, 2]; the first `count_known` of them are what this rank tells others."""
    own = torch.stack([query_ids, doc_m], 1)[torch.argsort(weight_m <= 0, stable=True)]
    return own if known is None else torch.cat([known, own])


def gather_pairs(pairs: Tensor, counts: Sequence[int], group: Group | None) -> Tensor:
    """Return the pairs that all ranks tell, counts[k] of rank k, [world_size, pairs, 2]; a collective."""
    longest = max(counts)
    return distributed.all_gather_padded(pairs[:longest], longest, group).wait().view(len(counts), longest, 2)


@dataclass
class KnownPositives:
    """The known positives of this rank's queries."""

    row_query: Tensor  # [m] each row's query
    num_queries: int
    own_rows: bool  # each row is its own query
    parts: list[tuple[Tensor, Tensor, Tensor]]  # queries, document ids, whether they count; some more than once

    @property
    def number(self) -> int:
        """P, or more where some do not count."""
        return sum(query.shape[0] for query, _, _ in self.parts)

    def among(self, docs: Numbers) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield queries, numbers among `docs`, and whether they are there, some pairs at a time."""
        for part in self.parts:
            for query, doc_id, counts in zip(*map(_chunks, part), strict=True):
                there, doc = docs.find(doc_id)
                yield query, doc, there & counts

    def keys(self, docs: Numbers) -> Tensor:
        """Return query · docs.limit + number of the document of each pair, sorted.

        On a device pairs may come twice, and those whose document is not there stand at the end, `_NOWHERE`: leaving
        them out would have the host wait for their number.
        """
        found = [self.row_query.new_zeros(0)]
        for query, doc, there in self.among(docs) if docs.limit else ():
            key = query * docs.limit + doc
            found.append(key[there] if key.device.type == "cpu" else torch.where(there, key, _NOWHERE))
        keys = torch.cat(found)
        return torch.unique(keys) if keys.device.type == "cpu" else torch.sort(keys)[0]

    def contain(self, doc_mk: Tensor) -> Tensor:
        """Return bool [m, k]: whether a document listed for a row's query is a known positive of it."""
        if doc_mk.numel() == 0:
            return torch.zeros_like(doc_mk, dtype=torch.bool)
        docs = Numbers(doc_mk.flatten())
        keys_mk = self.row_query[:, None] * docs.limit + docs.of_ids.view(doc_mk.shape)
        return search(self.keys(docs), keys_mk)[0]


def find_known_positives(
    query_ids: Tensor | None, doc_m: Tensor, weight_m: Tensor, known: Tensor | None, told: Tensor | None,
    counts: Tensor,
) -> KnownPositives:  # fmt: skip
    """Return what all ranks know of this rank's queries.

    told [world_size, pairs, 2]: what the ranks tell, `own_pairs` of each, of which the first `counts` [world_size]
    count; None without query ids, where `known` names queries by their rows.
    """
    m = doc_m.shape[0]
    if query_ids is None or told is None:
        rows = torch.arange(m, device=doc_m.device)
        parts = [(rows, doc_m, weight_m > 0)]
        if known is not None:
            parts.append((known[:, 0], known[:, 1], torch.ones_like(known[:, 0], dtype=torch.bool)))
        return KnownPositives(rows, m, True, parts)
    queries = Numbers(query_ids)
    counted = (torch.arange(told.shape[1], device=told.device) < counts[:, None]).flatten()
    parts = []
    for pairs, counts_too in zip(_chunks(told.reshape(-1, 2)), _chunks(counted), strict=True):
        here, query = queries.find(pairs[:, 0])
        kept = (here & counts_too).nonzero().squeeze(1)  # usually few
        parts.append((query[kept], pairs[kept, 1], counts_too[kept]))
    return KnownPositives(queries.of_ids, queries.limit, False, parts)


class FalseNegatives(ABC):
    """The masked entries of this rank's queries."""

    @abstractmethod
    def row_sums(self, values_N: Tensor) -> Tensor:
        """Return float64 [m]: the sum over each row's masked entries of a value per column, 0 where not in use."""

    @abstractmethod
    def contains(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return bool [k]: whether the entry of each of `rows` [k] in one of `columns` [k] is masked."""


@dataclass
class MaskMatrix(FalseNegatives):
    """Of many pairs: bytes, 1 where an entry is masked."""

    row_query: Tensor  # [m] the row's query
    own_rows: bool  # each row is its own query
    matrix_QN: Tensor  # uint8

    def rows(self, start: int, stop: int) -> Tensor:
        """Return uint8 [rows, N] of rows [start, stop)."""
        return self.matrix_QN[start:stop] if self.own_rows else self.matrix_QN[self.row_query[start:stop]]

    def row_sums(self, values_N: Tensor) -> Tensor:
        """Return float64 [m]: the sum over each row's masked entries of a value per column, 0 where not in use."""
        height = _MATRIX_ROWS if values_N.device.type == "cpu" else max(1, (1 << 28) // max(1, values_N.shape[0]))
        sums = [torch.mv(some.double(), values_N.double()) for some in self.matrix_QN.split(height)]
        return torch.cat(sums)[self.row_query]

    def contains(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return bool [k]: whether the entry of each of `rows` [k] in one of `columns` [k] is masked."""
        return self.matrix_QN[self.row_query[rows], columns] > 0


@dataclass
class MaskPairs(FalseNegatives):
    """Of few pairs: the documents of each query, and the columns of each document."""

    row_query: Tensor  # [m] the row's query
    num_queries: int
    pair_keys: Tensor  # sorted query · documents + document, see KnownPositives.keys
    docs: Numbers
    doc_columns: Groups  # the columns that hold a document
    column_doc: Tensor  # [N]

    def __post_init__(self) -> None:
        self._block_lengths: dict[int, list[int]] = {}
        limit, keys = max(1, self.docs.limit), self.pair_keys
        self._counts = keys < _NOWHERE  # each pair once
        self._counts[1:] &= keys[1:] != keys[:-1]
        self._query = torch.where(self._counts, keys // limit, 0)
        self._doc = torch.where(self._counts, keys % limit, 0)
        # the masked columns of all queries, end to end: pair p's end at ends[p], query q's at bounds[q + 1]
        self._lengths = self.doc_columns.lengths()[self._doc] * self._counts if len(keys) else keys
        self._ends = torch.cumsum(self._lengths, 0)
        edges = torch.searchsorted(keys, torch.arange(self.num_queries + 1, device=keys.device) * limit)
        self._bounds = torch.cat([keys.new_zeros(1), self._ends])[edges]
        self.row_lengths = self._bounds.diff()[self.row_query]  # [m] masked entries of each row

    def row_sums(self, values_N: Tensor) -> Tensor:
        """Return float64 [m]: the sum over each row's masked entries of a value per column, 0 where not in use."""
        per_doc = torch.zeros(max(1, self.docs.limit), dtype=torch.float64, device=values_N.device)
        per_doc.index_add_(0, self.column_doc, values_N.double())
        per_query = per_doc.new_zeros(self.num_queries)
        if len(self._query):
            per_query.index_add_(0, self._query, per_doc[self._doc] * self._counts)
        return per_query[self.row_query]

    def contains(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return bool [k]: whether the entry of each of `rows` [k] in one of `columns` [k] is masked."""
        return search(self.pair_keys, self.row_query[rows] * self.docs.limit + self.column_doc[columns])[0]

    def block_lengths(self, height: int) -> list[int]:
        """Return the number of masked entries of each block of `height` rows; the host waits for all at once."""
        if height not in self._block_lengths:
            padded = torch.nn.functional.pad(self.row_lengths, (0, -len(self.row_lengths) % height))
            self._block_lengths[height] = padded.view(-1, height).sum(1).tolist()
        return self._block_lengths[height]

    def entries(self, start: int, stop: int, total: int) -> tuple[Tensor, Tensor]:
        """Return (row − start, column) of every masked entry in rows [start, stop), of which there are `total`."""
        query, lengths = self.row_query[start:stop], self.row_lengths[start:stop]
        row, within = Groups.ranges(lengths, total)
        at = self._bounds[query][row] + within
        pair = torch.searchsorted(self._ends, at, right=True)
        first = self.doc_columns.start[self._doc[pair]] - (self._ends[pair] - self._lengths[pair])
        return row, self.doc_columns.values[first + at]

    def matrix(self, start: int, stop: int) -> Tensor:
        """Return uint8 [rows, N] of rows [start, stop): 1 where an entry is masked, anything where no column is."""
        query, height = self.row_query[start:stop], stop - start
        # rows of one query have one of them marked for all
        marked_Q = torch.full((self.num_queries,), height, device=query.device)
        marked_Q[query] = torch.arange(height, device=query.device)
        marks = torch.zeros((height + 1, max(1, self.docs.limit)), dtype=torch.uint8, device=query.device)
        marks[torch.where(self._counts, marked_Q[self._query], height), self._doc] = 1
        return marks[marked_Q[query]].index_select(1, self.column_doc)


def find_false_negatives(positives: KnownPositives, docs: Numbers, valid: Tensor, num_columns: int) -> FalseNegatives:
    """Find the masked entries of this rank's queries in columns [N]; `docs` are the documents of those in `valid`."""
    column_doc = torch.zeros(num_columns, dtype=torch.int64, device=valid.device).index_copy_(0, valid, docs.of_ids)
    doc_columns = Groups(docs.places.start, valid[docs.places.values])
    num_queries = positives.num_queries
    if not _is_matrix(num_queries * num_columns, positives.number):
        keys = positives.keys(docs)
        return MaskPairs(positives.row_query, num_queries, keys, docs, doc_columns, column_doc)
    spare = num_queries * num_columns  # for pairs whose document has no column
    cells = torch.zeros(spare + 1, dtype=torch.uint8, device=valid.device)
    lengths, a_column = doc_columns.lengths(), doc_columns.first()
    single = bool((lengths <= 1).all())
    for query, doc, there in positives.among(docs):
        if single:
            cells[torch.where(there, query * num_columns + a_column[doc], spare)] = 1
        else:
            each = lengths[doc] * there
            which, within = Groups.ranges(each, int(each.sum()))
            column = doc_columns.values[doc_columns.start[doc][which] + within]
            cells[query[which] * num_columns + column] = 1
    return MaskMatrix(positives.row_query, positives.own_rows, cells[:spare].view(num_queries, num_columns))


def _chunks(pairs: Tensor) -> tuple[Tensor, ...]:
    """Return parts of a tensor of pairs; on a device one, where each would have its own launches and waits."""
    return pairs.split(_CHUNK_PAIRS) if pairs.device.type == "cpu" else (pairs,)


def _is_matrix(cells: int, num_pairs: int) -> bool:
    return cells > _MATRIX_CELLS and num_pairs >= cells * _MATRIX_FROM


def mask_bytes(num_queries: int, num_columns: int, num_pairs: int) -> int:
    """Return what the mask of so many known positives takes, these left out, while it is made and after."""
    cells = num_queries * num_columns
    return cells if _is_matrix(cells, num_pairs) else _PAIR_BYTES * num_pairs + 4 * 8 * num_columns
