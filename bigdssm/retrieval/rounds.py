"""Queries go round the ranks, each of which holds the vectors of its share of the documents and no others.

In a round some queries of every rank are gathered on all of them, with what each query leaves out. A rank then looks at
its own documents, and what it found goes back to the query's rank: counts are added up, best documents merged.

Shapes: m queries of this rank in the round, `longest` of the rank that has most, B = world size · longest, n documents
of this rank, N of the catalogue, p pairs of a query and one of the n documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.dataset.catalogue import Catalogue
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.dataset.tensors import as_tensor
from bigdssm.retrieval.embed import Documents

QUERIES_AT_ONCE = 16_384  # of all ranks in a round: 17 MB of vectors at D = 256
PAIRS_AT_ONCE = 2_097_152  # of all ranks in a collective: 17 MB
# A product of fewer rows than some 12 takes another path through the BLAS, with other last bits.
LEAST_ROWS = 32

Pairs = tuple[np.ndarray, np.ndarray]
"""(row, catalogue row), both int64: what queries leave out."""


@dataclass(frozen=True)
class LeftOut:
    """Pairs of a query and a document here that the query leaves out, by ascending query."""

    rows: Tensor  # int64 [p]: the queries …
    places: Tensor  # int64 [p]: … and the places of the documents among those here

    @classmethod
    def of(cls, rows: Tensor, places: Tensor) -> LeftOut:
        """Return pairs that come in any order."""
        order = rows.argsort()
        return cls(rows[order], places[order])

    def of_block(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return (row less `first`, place), int64, of the pairs of the queries [first, last)."""
        begin, end = torch.searchsorted(self.rows, self.rows.new_tensor([first, last])).tolist()
        return self.rows[begin:end] - first, self.places[begin:end]


@dataclass(frozen=True)
class Round:
    """Queries of all ranks; those of rank k are the rows from k · longest on, padded with queries of zeros."""

    rows: Rows  # of this rank's queries
    vectors: Tensor  # float32 [B, D+1]
    target: Tensor  # int64 [B], the catalogue row of each query's own document
    left_out: LeftOut  # of this rank's documents

    def head(self, most: int) -> Round:
        """Return the first `most` queries of each rank."""
        world = distributed.world_size()
        longest = len(self.vectors) // world
        size = min(most, longest)
        places = torch.arange(size, device=self.target.device)
        at = (torch.arange(world, device=places.device)[:, None] * longest + places).flatten()
        rank, place = self.left_out.rows // longest, self.left_out.rows % longest
        kept = place < size
        left_out = LeftOut((rank * size + place)[kept], self.left_out.places[kept])
        return Round(self.rows.take(np.arange(min(size, len(self.rows)))), self.vectors[at], self.target[at], left_out)

    def own(self, values: Tensor) -> Tensor:
        """Return those of this rank's queries [m, …], of values [B, …] that all ranks have."""
        first = distributed.rank() * (len(values) // distributed.world_size())
        return values[first : first + len(self.rows)]

    def added_up(self, values: Tensor) -> Tensor:
        """Return values [B, …], added up over the ranks, of this rank's queries [m, …]. A collective."""
        return distributed.reduce_scatter_rows(values)[: len(self.rows)]

    def of_targets(self, documents: Documents, value: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return [B, …], on all ranks: `value` of (queries, their own documents), by the ranks that hold these."""
        at = documents.hold(self.target).nonzero().squeeze(1)
        found = value(self.vectors[at], documents.vectors[self.target[at] - documents.first])
        every = found.new_zeros(len(self.target), *found.shape[1:]).index_put((at,), found)
        return distributed.all_reduce(every)


def rounds(
    pieces: Iterable[tuple[Rows, Tensor]], documents: Documents, left_out: Callable[[Rows], Pairs], at_once: int,
    known: Callable[[np.ndarray], Pairs] | None = None,
) -> Iterator[Round]:  # fmt: skip
    """Yield rounds of about `at_once` queries of all ranks, at least one of each that has some left. Collectives.

    `pieces` are rows of one query each and their index vectors, as many pieces on every rank. `left_out` tells what
    this rank's queries leave out beside their own document, `known` what this rank knows of queries of all ranks, by
    their ids.
    """
    most = max(1, at_once // distributed.world_size())
    for rows, queries in pieces:
        blocks = distributed.all_reduce(torch.tensor([-(-len(rows) // most)]), "max").item()
        for first in range(0, int(blocks) * most, most):
            part = np.arange(min(first, len(rows)), min(first + most, len(rows)))
            yield _round(rows.take(part), queries[first : first + most], documents, left_out, known)


def seen_pairs(rows: Rows) -> Pairs:
    """Return what queries have seen."""
    values, offsets = rows.seen_ragged()
    return np.repeat(np.arange(len(rows)), np.diff(offsets)), values


def no_pairs(rows: Rows) -> Pairs:
    """Return that queries leave out nothing but their own document."""
    return np.zeros(0, np.int64), np.zeros(0, np.int64)


def left_out_of(dataset: Dataset, filter_seen: bool) -> Callable[[Rows], Pairs]:
    """Return what tells the documents that queries leave out: seen ones; where queries are documents, their own."""
    if dataset.schema.siamese:  # of pairs, which have seen nothing
        return partial(own_documents, dataset.catalogue)
    return seen_pairs if filter_seen else no_pairs


def own_documents(catalogue: Catalogue, rows: Rows) -> Pairs:
    """Return the documents that queries are."""
    own = catalogue.rows_of(rows.query_ids)
    return np.flatnonzero(own >= 0), own[own >= 0]


def product(queries: Tensor, documents: Tensor) -> Tensor:
    """Return queries @ documents.T, [m, n], an entry's bits being the same whatever is beside it in the two."""
    m, n = len(queries), len(documents)
    return (_at_least(queries) @ _at_least(documents).T)[:m, :n]


def _at_least(rows: Tensor) -> Tensor:
    missing = max(0, LEAST_ROWS - len(rows))
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def _round(
    rows: Rows, queries: Tensor, documents: Documents, left_out: Callable[[Rows], Pairs],
    known: Callable[[np.ndarray], Pairs] | None,
) -> Round:  # fmt: skip
    device, world = documents.vectors.device, distributed.world_size()
    longest = max(_of_all_ranks(len(rows), device))
    target = distributed.all_gather_padded(as_tensor(rows.doc_rows).to(device), longest).wait()
    own, docs = left_out(rows)
    told = [np.stack([own + distributed.rank() * longest, docs], 1)]
    if known is not None:
        ids = distributed.all_gather_padded(as_tensor(rows.query_ids).to(device), longest).wait()
        told.append(np.stack(known(ids.cpu().numpy()), 1))
    pairs = as_tensor(np.concatenate(told).astype(np.int32)).to(device)
    held = [_held(documents, torch.arange(len(target), device=device), target)]
    counts, at_once = _of_all_ranks(len(pairs), device), max(1, PAIRS_AT_ONCE // world)
    for first in range(0, max(counts), at_once):
        sent = [min(max(0, count - first), at_once) for count in counts]
        gathered = distributed.all_gather_rows(pairs[first : first + at_once], sent).long()
        held.append(_held(documents, gathered[:, 0], gathered[:, 1]))
    left = LeftOut.of(*(torch.cat(side) for side in zip(*held, strict=True)))
    return Round(rows, distributed.all_gather_padded(queries, longest).wait(), target, left)


def _of_all_ranks(number: int, device: torch.device) -> list[int]:
    numbers = distributed.all_gather_rows(torch.tensor([number], device=device), [1] * distributed.world_size())
    return [int(number) for number in numbers.tolist()]


def _held(documents: Documents, rows: Tensor, docs: Tensor) -> tuple[Tensor, Tensor]:
    here = documents.hold(docs)
    return rows[here], docs[here] - documents.first
