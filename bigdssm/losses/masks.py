"""The mask: excluded entries of the score matrix, false negatives and documents that were not available.

The known positives of a query, exact across ranks by 64-bit ids, include its own positive. The mask excludes it with
the others from the sums over negatives, and the loss adds its score. With times, it also excludes the documents that
are available only after a query's time (`MaskTimes`).

In the order of a step: the known positives of this rank's queries (`find_known_positives`, from the pairs of all
ranks); which columns they exclude (`find_false_negatives`), as a matrix of bytes or as pairs; which candidates
(`KnownPositives.contain`). `BlockMask.drop` in kernels/torch_passes.py sets the scores of masked columns to −inf, a
tile at a time, and `_drop` in kernels/triton_kernels.py does so on CUDA.

On a device, no function of this module synchronizes with the host.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group
from bigdssm.losses.ids import FactorizedIds, Groups, search

_PAIR_BYTES = 48  # memory per pair: its key, unsorted and sorted, and grouped by query
_MATRIX_FROM = 1 / _PAIR_BYTES  # pairs per cell from which a matrix, one byte per cell, takes less memory
_MATRIX_CELLS = 1 << 16  # up to this size, a matrix has no advantage
_CHUNK_PAIRS = 1 << 16  # pairs per chunk on a CPU, to keep temporaries in cache
_MATRIX_ROWS = 256  # matrix rows converted at a time on a CPU
MASK_TILE = 128  # rows and columns of a tile of the kernels' mask: a 64-bit word per row and 64 columns
_NO_COLUMN = 2**63 - 1  # key of a pair whose document has no column


def count_known_positives(query_ids: Tensor | None, weight_m: Tensor, known: Tensor | None) -> Tensor | int:
    """Return the number of known positives that this rank sends."""
    return 0 if query_ids is None else (weight_m > 0).sum() + (0 if known is None else known.shape[0])


def local_pairs(query_ids: Tensor, doc_m: Tensor, weight_m: Tensor, known: Tensor | None) -> Tensor:
    """Return (query id, document id) [pairs, 2]; the first `count_known_positives` of them are to be sent."""
    pairs = torch.stack([query_ids, doc_m], 1)[torch.argsort(weight_m <= 0, stable=True)]
    return pairs if known is None else torch.cat([known, pairs])


def gather_pairs(pairs: Tensor, counts: Sequence[int], group: Group | None) -> Tensor:
    """Gather the pairs of all ranks, counts[k] of rank k, [world_size, pairs, 2]; a collective."""
    longest = max(counts)
    return distributed.all_gather_padded(pairs[:longest], longest, group).view(len(counts), longest, 2)


@dataclass
class KnownPositives:
    """The known positives of this rank's queries, gathered from all ranks."""

    row_query: Tensor  # [m] query code of each row
    num_queries: int
    rows_are_queries: bool  # each row is a distinct query
    parts: list[tuple[Tensor, Tensor, Tensor]]  # query codes, document ids, validity; may hold duplicates

    def pairs_in(self, docs: FactorizedIds) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield chunks of pairs: query codes, document codes in `docs`, and whether the pair is valid and present."""
        for part in self.parts:
            for query, doc_id, valid in zip(*map(_chunks, part), strict=True):
                present, doc = docs.find(doc_id)
                yield query, doc, present & valid

    def keys(self, docs: FactorizedIds) -> Tensor:
        """Return query code · docs.limit + document code of each pair, sorted.

        On a device there may be duplicates, and pairs with an absent document are `_NO_COLUMN`, at the end: removing
        them would synchronize.
        """
        chunks = [self.row_query.new_zeros(0)]
        for query, doc, present in self.pairs_in(docs) if docs.limit else ():
            key = query * docs.limit + doc
            chunks.append(key[present] if key.device.type == "cpu" else torch.where(present, key, _NO_COLUMN))
        keys = torch.cat(chunks)
        return torch.unique(keys) if keys.device.type == "cpu" else torch.sort(keys)[0]

    def contain(self, doc_mk: Tensor) -> Tensor:
        """Return bool [m, k]: whether a candidate of a row is a known positive of the row's query."""
        if doc_mk.numel() == 0:
            return torch.zeros_like(doc_mk, dtype=torch.bool)
        docs = FactorizedIds(doc_mk.flatten())
        keys_mk = self.row_query[:, None] * docs.limit + docs.codes.view(doc_mk.shape)
        return search(self.keys(docs), keys_mk)[0]


def find_known_positives(
    query_ids: Tensor | None, doc_m: Tensor, weight_m: Tensor, known: Tensor | None, all_pairs: Tensor | None,
    counts: Tensor, *, all_known: bool = True,
) -> KnownPositives:  # fmt: skip
    """Select the known positives of this rank's queries from those of all ranks.

    all_pairs [world_size, pairs, 2]: `local_pairs` of each rank, of which the first `counts` [world_size] are valid;
    None without query ids, when `known` holds rows in place of query ids. all_known: `all_pairs` has the positives of
    all queries; else each positive that is not in it is masked for one query, the one it belongs to.
    """
    m = doc_m.shape[0]
    if query_ids is None or all_pairs is None:
        rows = torch.arange(m, device=doc_m.device)
        parts = [(rows, doc_m, weight_m > 0)]
        if known is not None:
            parts.append((known[:, 0], known[:, 1], torch.ones_like(known[:, 0], dtype=torch.bool)))
        return KnownPositives(rows, m, True, parts)
    queries = FactorizedIds(query_ids)
    all_valid = (torch.arange(all_pairs.shape[1], device=all_pairs.device) < counts[:, None]).flatten()
    parts = []
    for pairs, valid in zip(_chunks(all_pairs.reshape(-1, 2)), _chunks(all_valid), strict=True):
        present, query = queries.find(pairs[:, 0])
        index = (present & valid).nonzero().squeeze(1)  # usually few
        parts.append((query[index], pairs[index, 1], valid[index]))
    if all_known:
        return KnownPositives(queries.codes, queries.limit, False, parts)
    # Queries of one id differ in their own positives: each row is a query, with the pairs of its id.
    rows, members = torch.arange(m, device=doc_m.device), queries.positions
    of_rows = [(rows, doc_m, weight_m > 0)]
    for query, docs, valid in parts:
        lengths = members.lengths()[query]
        pair, within = Groups.ranges(lengths, int(lengths.sum()))
        of_rows.append((members.values[members.start[query][pair] + within], docs[pair], valid[pair]))
    return KnownPositives(rows, m, True, of_rows)


@dataclass
class MaskMatrix:
    """A mask of many pairs: a dense matrix of bytes, 1 if an entry is masked."""

    row_query: Tensor  # [m] query code of each row
    rows_are_queries: bool  # each row is a distinct query
    matrix_QN: Tensor  # uint8

    def rows(self, start: int, stop: int) -> Tensor:
        """Return uint8 [rows, N] of rows [start, stop)."""
        return self.matrix_QN[start:stop] if self.rows_are_queries else self.matrix_QN[self.row_query[start:stop]]

    def row_sums(self, values_N: Tensor) -> Tensor:
        """Return float64 [m]: the sum of `values_N` over each row's masked columns; unused columns must hold 0."""
        height = _MATRIX_ROWS if values_N.device.type == "cpu" else max(1, (1 << 28) // max(1, values_N.shape[0]))
        sums = [torch.mv(strip_QN.double(), values_N.double()) for strip_QN in self.matrix_QN.split(height)]
        return torch.cat(sums)[self.row_query]

    def contains(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return bool [k]: whether the entries (rows [k], columns [k]) are masked."""
        return self.matrix_QN[self.row_query[rows], columns] > 0


@dataclass
class MaskPairs:
    """A sparse mask of few pairs: the documents of each query, and the columns of each document."""

    row_query: Tensor  # [m] query code of each row
    num_queries: int
    pair_keys: Tensor  # sorted query code · docs.limit + document code, see KnownPositives.keys
    docs: FactorizedIds
    doc_columns: Groups  # the columns that hold a document
    column_doc: Tensor  # [N] document code of each column

    def __post_init__(self) -> None:
        self._block_lengths: dict[int, list[int]] = {}
        limit, keys = max(1, self.docs.limit), self.pair_keys
        self._valid = keys < _NO_COLUMN  # and no duplicates
        self._valid[1:] &= keys[1:] != keys[:-1]
        self._query = torch.where(self._valid, keys // limit, 0)
        self._doc = torch.where(self._valid, keys % limit, 0)
        # the masked columns of all queries, concatenated: pair p's end at ends[p], query q's at bounds[q + 1]
        self._lengths = self.doc_columns.lengths()[self._doc] * self._valid if len(keys) else keys
        self._ends = torch.cumsum(self._lengths, 0)
        edges = torch.searchsorted(keys, torch.arange(self.num_queries + 1, device=keys.device) * limit)
        self._bounds = torch.cat([keys.new_zeros(1), self._ends])[edges]
        self.row_lengths = self._bounds.diff()[self.row_query]  # [m] masked entries of each row

    def row_sums(self, values_N: Tensor) -> Tensor:
        """Return float64 [m]: the sum of `values_N` over each row's masked columns; unused columns must hold 0."""
        per_doc = torch.zeros(max(1, self.docs.limit), dtype=torch.float64, device=values_N.device)
        per_doc.index_add_(0, self.column_doc, values_N.double())
        per_query = per_doc.new_zeros(self.num_queries)
        if len(self._query):
            per_query.index_add_(0, self._query, per_doc[self._doc] * self._valid)
        return per_query[self.row_query]

    def contains(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return bool [k]: whether the entries (rows [k], columns [k]) are masked."""
        return search(self.pair_keys, self.row_query[rows] * self.docs.limit + self.column_doc[columns])[0]

    def block_lengths(self, height: int) -> list[int]:
        """Return the number of masked entries of each block of `height` rows; one read of the device, cached."""
        if height not in self._block_lengths:
            padded = torch.nn.functional.pad(self.row_lengths, (0, -len(self.row_lengths) % height))
            self._block_lengths[height] = padded.view(-1, height).sum(1).tolist()
        return self._block_lengths[height]

    def entries(self, start: int, stop: int, total: int) -> tuple[Tensor, Tensor]:
        """Return (row − start, column) of the `total` masked entries in rows [start, stop)."""
        query, lengths = self.row_query[start:stop], self.row_lengths[start:stop]
        row, within = Groups.ranges(lengths, total)
        position = self._bounds[query][row] + within
        pair = torch.searchsorted(self._ends, position, right=True)
        first = self.doc_columns.start[self._doc[pair]] - (self._ends[pair] - self._lengths[pair])
        return row, self.doc_columns.values[first + position]

    def rows(self, start: int, stop: int) -> Tensor:
        """Return uint8 [rows, N] of rows [start, stop): 1 if an entry is masked; undefined in unused columns."""
        query, height = self.row_query[start:stop], stop - start
        # of several rows of one query, one is marked for all
        marked_Q = torch.full((self.num_queries,), height, device=query.device)
        marked_Q[query] = torch.arange(height, device=query.device)
        marks = torch.zeros((height + 1, max(1, self.docs.limit)), dtype=torch.uint8, device=query.device)
        marks[torch.where(self._valid, marked_Q[self._query], height), self._doc] = 1
        return marks[marked_Q[query]].index_select(1, self.column_doc)


@dataclass
class MaskTimes:
    """A mask of known positives and of the documents that are not yet available at a row's time."""

    known: MaskMatrix | MaskPairs
    time_m: Tensor  # float64 [m]; NaN: unknown, when all documents are available
    since_N: Tensor  # float64 [N]: the time from which a column's document is available

    def rows(self, start: int, stop: int) -> Tensor:
        """Return uint8 [rows, N] of rows [start, stop); undefined in unused columns."""
        return self.known.rows(start, stop) | (self.since_N > self.time_m[start:stop, None])

    def row_sums(self, values_N: Tensor) -> Tensor:
        """Return float64 [m]: the sum of `values_N` over each row's masked columns; unused columns must hold 0."""
        m, values_N = len(self.time_m), values_N.double()
        if isinstance(self.known, MaskMatrix):
            strips = range(0, m, _MATRIX_ROWS)
            sums = [torch.mv(self.rows(k, min(k + _MATRIX_ROWS, m)).double(), values_N) for k in strips]
            return torch.cat([values_N[:0], *sums])
        since_N, order = torch.sort(self.since_N)
        sums_N = torch.nn.functional.pad(values_N[order].cumsum(0), (1, 0))
        later_m = sums_N[-1] - sums_N[torch.searchsorted(since_N, self.time_m, right=True)]
        # the known positives among them are in both sums
        row, column = self.known.entries(0, m, sum(self.known.block_lengths(MASK_TILE)))
        both = torch.where(self.since_N[column] > self.time_m[row], values_N[column], 0.0)
        return self.known.row_sums(values_N) + later_m.index_add(0, row, -both)

    def contains(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return bool [k]: whether the entries (rows [k], columns [k]) are masked."""
        return self.known.contains(rows, columns) | (self.since_N[columns] > self.time_m[rows])


Mask = MaskMatrix | MaskPairs | MaskTimes


def find_false_negatives(
    positives: KnownPositives, docs: FactorizedIds, valid: Tensor, num_columns: int
) -> MaskMatrix | MaskPairs:
    """Find the masked entries of this rank's queries in columns [N], each query's own positive included.

    `docs` are the documents of columns `valid`.
    """
    column_doc = torch.zeros(num_columns, dtype=torch.int64, device=valid.device).index_copy_(0, valid, docs.codes)
    doc_columns = Groups(docs.positions.start, valid[docs.positions.values])
    num_queries = positives.num_queries
    num_pairs = sum(query.shape[0] for query, _, _ in positives.parts)
    if not _is_matrix(num_queries * num_columns, num_pairs):
        keys = positives.keys(docs)
        return MaskPairs(positives.row_query, num_queries, keys, docs, doc_columns, column_doc)
    spare = num_queries * num_columns  # for pairs whose document has no column
    cells = torch.zeros(spare + 1, dtype=torch.uint8, device=valid.device)
    lengths, first_column = doc_columns.lengths(), doc_columns.first()
    single = bool((lengths <= 1).all())
    for query, doc, present in positives.pairs_in(docs):
        if single:
            cells[torch.where(present, query * num_columns + first_column[doc], spare)] = 1
        else:
            lengths_of_pairs = lengths[doc] * present
            pair, within = Groups.ranges(lengths_of_pairs, int(lengths_of_pairs.sum()))
            column = doc_columns.values[doc_columns.start[doc][pair] + within]
            cells[query[pair] * num_columns + column] = 1
    return MaskMatrix(positives.row_query, positives.rows_are_queries, cells[:spare].view(num_queries, num_columns))


def _chunks(pairs: Tensor) -> tuple[Tensor, ...]:
    """Split a tensor of pairs into chunks; on a device, one, since each chunk costs launches."""
    return pairs.split(_CHUNK_PAIRS) if pairs.device.type == "cpu" else (pairs,)


def _is_matrix(cells: int, num_pairs: int) -> bool:
    return cells > _MATRIX_CELLS and num_pairs >= cells * _MATRIX_FROM


def mask_bytes(num_queries: int, num_columns: int, num_pairs: int) -> int:
    """Return the peak bytes of a mask of `num_pairs` known positives, without the pairs themselves."""
    cells = num_queries * num_columns
    return cells if _is_matrix(cells, num_pairs) else _PAIR_BYTES * num_pairs + 4 * 8 * num_columns
