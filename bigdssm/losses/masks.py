"""The false-negative mask: which entries of the score matrix are left out, exact across ranks, by 64-bit ids.

Known positives are P = {(query id, document id)}: the pairs of weight > 0 of all ranks, plus those a caller adds.
Entry (i, j) is masked where (query id of i, document id of j) is in P. Each positive itself is among them, which the
losses score apart, so one mask serves both directions.

Shape legend: m queries of this rank and k documents listed for each, N columns of all ranks (see `passes.columns` for
their index), P known positives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group


def gather_known_positives(
    query_ids: Tensor | None,
    doc_m: Tensor,
    weight_m: Tensor,
    known: Tensor | None,
    counts: Sequence[int],
    group: Group | None,
) -> tuple[Tensor, Tensor]:
    """Return (query ids [m], all ranks' known positives [P, 2]), of which rank k has counts[k]; see `count_known`.

    Without ids each query is its own, numbered by row, and no other rank can know it: nothing is gathered.
    """
    rows = torch.arange(doc_m.shape[0], device=doc_m.device) if query_ids is None else query_ids
    own = torch.stack([rows, doc_m], 1)[weight_m > 0]
    if query_ids is None:
        return rows, own
    own, longest = own if known is None else torch.cat([own, known]), max(counts)
    gathered = distributed.all_gather_padded(own, longest, group).wait()
    return rows, torch.cat([gathered[k * longest : k * longest + count] for k, count in enumerate(counts)])


def count_known(query_ids: Tensor | None, weight_m: Tensor, known: Tensor | None) -> int:
    """Return how many known positives this rank tells the others."""
    return 0 if query_ids is None else int((weight_m > 0).sum()) + (0 if known is None else known.shape[0])


def is_known_positive(pairs: Tensor, query_ids: Tensor, doc_mk: Tensor) -> Tensor:
    """Return bool [m, k]: whether (query id, document id listed) is among `pairs`."""
    if doc_mk.numel() == 0:
        return torch.zeros_like(doc_mk, dtype=torch.bool)
    wanted = torch.stack([query_ids[:, None].expand_as(doc_mk), doc_mk], -1).flatten(0, 1)
    numbers = torch.unique(torch.cat([pairs, wanted]), dim=0, return_inverse=True)[1]
    return torch.isin(numbers[pairs.shape[0] :], numbers[: pairs.shape[0]]).view_as(doc_mk)


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

    def expand(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Return (which of `groups`, value) for every member of every group named."""
        lengths = self.start[groups + 1] - self.start[groups]
        which = torch.repeat_interleave(torch.arange(groups.shape[0], device=groups.device), lengths)
        first = torch.cumsum(lengths, 0) - lengths
        within = torch.arange(which.shape[0], device=groups.device) - first[which]
        return which, self.values[self.start[groups][which] + within]


@dataclass
class FalseNegatives:
    """The masked entries of this rank's queries: never a matrix, and usually little more than one entry a row."""

    row_query: Tensor  # [m] the row's query, 0 … number of distinct queries − 1
    query_docs: Groups  # the documents that are positives of a query
    doc_columns: Groups  # the columns that hold a document
    column_doc: Tensor  # [N]
    pair_keys: Tensor  # sorted query · num_docs + document
    num_docs: int

    def __post_init__(self) -> None:
        self.row_lengths = self.row_sums(torch.ones_like(self.column_doc))  # [m] masked entries of each row

    def row_sums(self, values_N: Tensor) -> Tensor:
        """Return [m]: the sum of a value per column over the masked entries of each row."""
        in_use = self.doc_columns.values
        per_doc = values_N.new_zeros(self.num_docs).index_add_(0, self.column_doc[in_use], values_N[in_use])
        per_query = values_N.new_zeros(self.query_docs.start.shape[0] - 1)
        per_query.index_add_(0, self.pair_keys // self.num_docs, per_doc[self.pair_keys % self.num_docs])
        return per_query[self.row_query]

    def contains(self, columns: Tensor) -> Tensor:
        """Return bool [m]: whether the entry of each row in one of the columns [m] is masked."""
        return _look_up(self.pair_keys, self.row_query * self.num_docs + self.column_doc[columns])[0]

    def entries(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return (row − start, column) of every masked entry in rows [start, stop)."""
        row, doc = self.query_docs.expand(self.row_query[start:stop])
        which, column = self.doc_columns.expand(doc)
        return row[which], column


def find_false_negatives(
    query_ids: Tensor, pairs: Tensor, doc_ids_N: Tensor | None, valid: Tensor, num_columns: int
) -> FalseNegatives:
    """Find the masked entries of queries [m] in columns [N], of which those in `valid` are in use.

    Without document ids a column is its own document, of its own index as id.
    """
    column_doc = docs = torch.arange(num_columns, device=valid.device)
    if doc_ids_N is not None:
        docs, inverse = torch.unique(doc_ids_N[valid], return_inverse=True)
        column_doc = torch.zeros_like(column_doc).index_copy_(0, valid, inverse)
    num_docs = max(1, docs.shape[0])
    queries, row_query = torch.unique(query_ids, return_inverse=True)
    here, query = _look_up(queries, pairs[:, 0])
    present, doc = _look_up(docs, pairs[:, 1])
    found = here & present
    pair_keys = torch.unique(query[found] * num_docs + doc[found])
    query_docs = Groups.of(pair_keys // num_docs, pair_keys % num_docs, queries.shape[0])
    doc_columns = Groups.of(column_doc[valid], valid, num_docs)
    return FalseNegatives(row_query, query_docs, doc_columns, column_doc, pair_keys, num_docs)


def _look_up(sorted_ids: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether each id is among `sorted_ids`, and where."""
    if sorted_ids.shape[0] == 0:
        return torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids)
    at = torch.searchsorted(sorted_ids, ids.contiguous()).clamp_(max=sorted_ids.shape[0] - 1)
    return sorted_ids[at] == ids, at
