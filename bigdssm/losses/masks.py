"""Which entries of the score matrix are dropped: exact across ranks, by 64-bit ids.

Known positives are P = {(query id, document id)}: the pairs of weight > 0 of all ranks, plus those a caller adds.
Entry (i, j) is in the drop set X where (query id of i, document id of j) is in P. X holds each positive itself, which
the losses score apart, so one mask serves both directions.

X is usually little more than one entry per row, and is found for a strip of rows at a time as coordinates; where one
document or query fills much of the batch it is dense, and the strip's mask is one byte per entry instead.

Shape legend: m queries of this rank, N slots, Q distinct queries of this rank, E entries of X.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bigdssm.losses.columns import Columns, Tile
from bigdssm.losses.inputs import LossInputs

# coordinates cost about 64 bytes an entry while they are made, the dense mask one byte per entry of the strip
_DENSE_FROM = 1 / 32


@dataclass
class Ragged:
    """Lists of integers stored end to end: list k is values[start[k] : start[k + 1]]."""

    start: Tensor
    values: Tensor

    @staticmethod
    def of(keys: Tensor, values: Tensor, num_lists: int) -> Ragged:
        """Group `values` by `keys`."""
        order = torch.argsort(keys, stable=True)
        start = torch.zeros(num_lists + 1, dtype=torch.int64, device=keys.device)
        torch.cumsum(torch.bincount(keys, minlength=num_lists), 0, out=start[1:])
        return Ragged(start, values[order])

    def lengths(self, lists: Tensor) -> Tensor:
        """Return how many members each of `lists` has."""
        return self.start[lists + 1] - self.start[lists]

    def expand(self, lists: Tensor) -> tuple[Tensor, Tensor]:
        """Return (which of `lists`, value) for every member of every list named."""
        lengths = self.lengths(lists)
        which = torch.repeat_interleave(torch.arange(lists.shape[0], device=lists.device), lengths)
        first = torch.cumsum(lengths, 0) - lengths
        within = torch.arange(which.shape[0], device=lists.device) - first[which]
        return which, self.values[self.start[lists][which] + within]


@dataclass
class StripMask:
    """X in the rows of one strip: coordinates sorted by slot, or a dense [rows, N] mask; both None where X is empty."""

    rows: Tensor | None = None
    slots: Tensor | None = None
    bounds: dict[int, tuple[int, int]] | None = None
    dense: Tensor | None = None

    def fill(self, S: Tensor, tile: Tile, value: float) -> None:
        """Write `value` into the dropped entries of a tile's scores [rows, width], in place."""
        if self.dense is not None:
            S.masked_fill_(self.dense[:, tile.start : tile.stop], value)
        elif self.rows is not None:
            assert self.slots is not None and self.bounds is not None
            lo, hi = self.bounds[tile.start]
            if hi > lo:
                S[self.rows[lo:hi], self.slots[lo:hi] - tile.start] = value


@dataclass
class DropPlan:
    """The drop set of this rank's queries."""

    row_query: Tensor  # [m] the row's query, 0 … Q − 1
    query_docs: Ragged  # the documents that are positives of a query
    doc_slots: Ragged  # the slots of a document
    slot_doc: Tensor  # [N]
    pair_keys: Tensor  # sorted query · num_docs + document
    num_docs: int
    columns: Columns

    def __post_init__(self) -> None:
        self.row_lengths = self.row_sums(torch.ones_like(self.slot_doc))  # [m] entries of X in each row

    def row_sums(self, values_N: Tensor) -> Tensor:
        """Return [m]: the sum of a value per slot over the entries of X in each row."""
        valid = self.columns.valid
        per_doc = values_N.new_zeros(self.num_docs).index_add_(0, self.slot_doc[valid], values_N[valid])
        per_query = values_N.new_zeros(self.query_docs.start.shape[0] - 1)
        per_query.index_add_(0, self.pair_keys // self.num_docs, per_doc[self.pair_keys % self.num_docs])
        return per_query[self.row_query]

    def strip(self, start: int, stop: int) -> StripMask:
        """Return X in rows [start, stop)."""
        lengths = self.row_lengths[start:stop]
        total = int(lengths.sum())
        budget = int((stop - start) * self.columns.num_slots * _DENSE_FROM)
        if total == 0:
            return StripMask()
        if total > max(budget, 4096):
            return self._dense(start, stop, lengths, budget)
        rows, slots = self._entries(start, stop)
        slots, order = torch.sort(slots)
        edges = torch.tensor([[t.start, t.stop] for t in self.columns.tiles], device=slots.device)
        at = torch.searchsorted(slots, edges.flatten()).view(-1, 2).tolist()
        bounds = {t.start: (lo, hi) for t, (lo, hi) in zip(self.columns.tiles, at, strict=True)}
        return StripMask(rows=rows[order], slots=slots, bounds=bounds)

    def contains(self, rows: Tensor, slots: Tensor) -> Tensor:
        """Return, elementwise, whether (row, slot) is in X."""
        if self.pair_keys.shape[0] == 0:
            return torch.zeros_like(rows, dtype=torch.bool)
        keys = self.row_query[rows] * self.num_docs + self.slot_doc[slots]
        at = torch.searchsorted(self.pair_keys, keys).clamp_(max=self.pair_keys.shape[0] - 1)
        return self.pair_keys[at] == keys

    def _entries(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        row, doc = self.query_docs.expand(self.row_query[start:stop])
        which, slot = self.doc_slots.expand(doc)
        return row[which], slot

    def _dense(self, start: int, stop: int, lengths: Tensor, budget: int) -> StripMask:
        mask = torch.zeros((stop - start, self.columns.num_slots), dtype=torch.bool, device=lengths.device)
        ends = torch.cumsum(lengths, 0)
        lo = 0
        while lo < stop - start:
            done = int(ends[lo - 1]) if lo else 0
            hi = max(lo + 1, int(torch.searchsorted(ends, done + budget, right=True)))
            rows, slots = self._entries(start + lo, start + hi)
            mask[rows + lo, slots] = True
            lo = hi
        return StripMask(dense=mask)


def plan_drops(x: LossInputs, columns: Columns) -> DropPlan:
    """Find the drop set of this rank's queries."""
    m, device = x.positive.shape[0], x.positive.device
    slot_doc, docs = _documents(columns, device)
    num_docs = max(1, docs.shape[0])
    positive_slot = x.positive + columns.own_start
    if x.query_ids is None:
        row_query, num_queries = torch.arange(m, device=device), m
        query = row_query[x.weight > 0]
        doc = slot_doc[positive_slot[x.weight > 0]]
    else:
        distinct, row_query = torch.unique(x.query_ids, return_inverse=True)
        num_queries = distinct.shape[0]
        query, doc = _known_positives(columns, slot_doc, docs)
        found, query = _look_up(distinct, query)
        query, doc = query[found], doc[found]
    pair_keys = torch.unique(query * num_docs + doc)
    query_docs = Ragged.of(pair_keys // num_docs, pair_keys % num_docs, num_queries)
    doc_slots = Ragged.of(slot_doc[columns.valid], columns.valid, num_docs)
    return DropPlan(row_query, query_docs, doc_slots, slot_doc, pair_keys, num_docs, columns)


def _documents(columns: Columns, device: torch.device) -> tuple[Tensor, Tensor]:
    """Number the distinct documents: (document of each slot [N], their sorted ids)."""
    if columns.doc_keys is None:
        slots = torch.arange(columns.num_slots, device=device)
        return slots, slots
    docs, inverse = torch.unique(columns.doc_keys[columns.valid], return_inverse=True)
    slot_doc = torch.zeros(columns.num_slots, dtype=torch.int64, device=device)
    slot_doc[columns.valid] = inverse
    return slot_doc, docs


def _known_positives(columns: Columns, slot_doc: Tensor, docs: Tensor) -> tuple[Tensor, Tensor]:
    """Return (query id, document) of all ranks' pairs of weight > 0 and of the known pairs whose document is here."""
    assert columns.pairs is not None
    rows = columns.pairs[columns.pairs[:, 1] >= 0]
    query, doc = rows[:, 0], slot_doc[rows[:, 1]]
    if columns.known is not None:
        found, known_doc = _look_up(docs, columns.known[:, 1])
        query, doc = torch.cat([query, columns.known[found, 0]]), torch.cat([doc, known_doc[found]])
    return query, doc


def _look_up(sorted_ids: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether each id is among `sorted_ids`, and where."""
    if sorted_ids.shape[0] == 0:
        return torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids)
    at = torch.searchsorted(sorted_ids, ids.contiguous()).clamp_(max=sorted_ids.shape[0] - 1)
    return sorted_ids[at] == ids, at
