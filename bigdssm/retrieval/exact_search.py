"""Exact and approximate search over document vectors that are distributed over the ranks."""

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
from bigdssm.retrieval.embed import DocumentVectors, Share
from bigdssm.retrieval.vectors import CodedVectors

QUERIES_AT_ONCE = 16_384  # of all ranks in a round: 17 MB of vectors at D = 256
PAIRS_AT_ONCE = 2_097_152  # of all ranks in a collective: 17 MB
# A product of fewer rows than some 12 takes another path through the BLAS, with other last bits.
LEAST_ROWS = 32

Pairs = tuple[np.ndarray, np.ndarray]
"""(row, catalogue row), both int64: what queries leave out."""


@dataclass(frozen=True)
class ExcludedDocuments:
    """Pairs of a query and a document here that the query leaves out, by ascending query."""

    rows: Tensor  # int64 [p]: the queries …
    places: Tensor  # int64 [p]: … and the places of the documents among those here

    @classmethod
    def of(cls, rows: Tensor, places: Tensor) -> ExcludedDocuments:
        """Return pairs that come in any order."""
        order = rows.argsort()
        return cls(rows[order], places[order])

    def of_block(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return (row less `first`, place), int64, of the pairs of the queries [first, last)."""
        begin, end = torch.searchsorted(self.rows, self.rows.new_tensor([first, last])).tolist()
        return self.rows[begin:end] - first, self.places[begin:end]


@dataclass(frozen=True)
class SearchRound:
    """Queries of all ranks; those of rank k are the rows from k · longest on, padded with queries of zeros."""

    rows: Rows  # of this rank's queries
    vectors: Tensor  # float32 [B, D+1]
    target: Tensor  # int64 [B], the catalogue row of each query's own document
    left_out: ExcludedDocuments  # of this rank's documents

    def head(self, most: int) -> SearchRound:
        """Return the first `most` queries of each rank."""
        world = distributed.world_size()
        longest = len(self.vectors) // world
        size = min(most, longest)
        places = torch.arange(size, device=self.target.device)
        at = (torch.arange(world, device=places.device)[:, None] * longest + places).flatten()
        rank, place = self.left_out.rows // longest, self.left_out.rows % longest
        kept = place < size
        left_out = ExcludedDocuments((rank * size + place)[kept], self.left_out.places[kept])
        return SearchRound(
            self.rows.take(np.arange(min(size, len(self.rows)))), self.vectors[at], self.target[at], left_out
        )

    def own(self, values: Tensor) -> Tensor:
        """Return those of this rank's queries [m, …], of values [B, …] that all ranks have."""
        first = distributed.rank() * (len(values) // distributed.world_size())
        return values[first : first + len(self.rows)]

    def added_up(self, values: Tensor) -> Tensor:
        """Return values [B, …], added up over the ranks, of this rank's queries [m, …]. A collective."""
        return distributed.reduce_scatter_rows(values)[: len(self.rows)]

    def of_targets(self, documents: DocumentVectors, value: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return [B, …], on all ranks: `value` of (queries, their own documents), by the ranks that hold these."""
        at = documents.hold(self.target).nonzero().squeeze(1)
        found = value(self.vectors[at], documents.vectors[self.target[at] - documents.first])
        every = found.new_zeros(len(self.target), *found.shape[1:]).index_put((at,), found)
        return distributed.all_reduce(every)


def rounds(
    pieces: Iterable[tuple[Rows, Tensor]], documents: DocumentVectors, left_out: Callable[[Rows], Pairs], at_once: int,
    known: Callable[[np.ndarray], Pairs] | None = None,
) -> Iterator[SearchRound]:  # fmt: skip
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


def excluded_documents(dataset: Dataset, exclude_seen: bool) -> Callable[[Rows], Pairs]:
    """Return what tells the documents that queries leave out: seen ones; where queries are documents, their own."""
    if dataset.schema.siamese:  # of pairs, which have seen nothing
        return partial(own_documents, dataset.catalogue)
    return seen_pairs if exclude_seen else no_pairs


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
    rows: Rows, queries: Tensor, documents: DocumentVectors, left_out: Callable[[Rows], Pairs],
    known: Callable[[np.ndarray], Pairs] | None,
) -> SearchRound:  # fmt: skip
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
    left = ExcludedDocuments.of(*(torch.cat(side) for side in zip(*held, strict=True)))
    return SearchRound(rows, distributed.all_gather_padded(queries, longest).wait(), target, left)


def _of_all_ranks(number: int, device: torch.device) -> list[int]:
    numbers = distributed.all_gather_rows(torch.tensor([number], device=device), [1] * distributed.world_size())
    return [int(number) for number in numbers.tolist()]


def _held(documents: DocumentVectors, rows: Tensor, docs: Tensor) -> tuple[Tensor, Tensor]:
    here = documents.hold(docs)
    return rows[here], docs[here] - documents.first


TOP_QUERIES_AT_ONCE, TILE_DOCS = 512, 8192  # of whose scores so many are held: 16 MiB
ROW_BITS = 32
LAST_ROW = (1 << ROW_BITS) - 1

Search = Callable[[Tensor, int, Tensor, Tensor], Tensor]
"""(queries [m, D+1], top, rows and places left out) → keys [m, top], best first; of the documents of this rank."""


def top_documents(
    queries: Tensor, documents: Tensor, top: int, excluded_rows: Tensor, excluded_docs: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (scores, catalogue rows int64), both [m, top]: each query's best documents, -inf and -1 behind the last.

    queries [m, D+1] and documents [N, D+1] are index vectors; (excluded_rows, excluded_docs) are left out. Of equal
    scores the lower row is the better.
    """
    return opened(exact_search(DocumentVectors(documents))(queries, top, excluded_rows, excluded_docs))


def top_of_round(search: Search, asked: SearchRound, top: int) -> Tensor:
    """Return keys [m, top] of the best documents of all ranks, for this rank's queries. A collective."""
    found = [asked.vectors.new_zeros(0, top, dtype=torch.int64)]
    for first in range(0, len(asked.vectors), TOP_QUERIES_AT_ONCE):
        queries = asked.vectors[first : first + TOP_QUERIES_AT_ONCE]
        found.append(search(queries, top, *asked.left_out.of_block(first, first + len(queries))))
    world = distributed.world_size()
    # [world, longest, top]: what each rank found for the queries of this one
    received = distributed.exchange_rows(torch.cat(found)).view(world, -1, top)[:, : len(asked.rows)]
    return received.transpose(0, 1).flatten(1).topk(top, dim=1).values


def exact_search(documents: DocumentVectors) -> Search:
    """Return the search that scores every document."""

    def search(queries: Tensor, top: int, rows: Tensor, places: Tensor) -> Tensor:
        best = keys_of(queries.new_full((len(queries), top), float("-inf")), rows.new_tensor(-1))
        for first in range(0, len(documents), TILE_DOCS):
            tile = documents.vectors[first : first + TILE_DOCS]
            scores = product(queries, tile)
            inside = (places >= first) & (places < first + len(tile))
            scores[rows[inside], places[inside] - first] = float("-inf")
            place = _best_places(scores, min(top, len(tile)))
            found = keys_of(scores.gather(1, place), place + (documents.first + first))
            best = torch.cat([best, found], dim=1).topk(top, dim=1).values
        return best

    return search


def approximate_search(documents: DocumentVectors, num_docs: int, share: Share) -> Search:
    """Return the search of an inverted-file index of these documents, built now: it scores about an eighth of them.

    `documents` are the rank's share of `num_docs`. A collective, since building tells how it gets on.
    """
    # only here: who searches exactly need not load FAISS
    from bigdssm.retrieval.index_types import IVF_ROUNDS, ROWS_AT_ONCE, InvertedFile

    total = IVF_ROUNDS + share.num_chunks(num_docs, ROWS_AT_ONCE)
    pieces = iter(range(1, total + 1))

    def tell(piece: int) -> None:
        share.progress("an index of the documents built", piece, total)

    if len(documents):
        vectors = documents.vectors.cpu().numpy()
        coded = CodedVectors(vectors, "float32", vectors.shape[1])
        index = InvertedFile().build(coded, lambda: tell(next(pieces)))
    for piece in pieces:  # that a rank with more documents has
        tell(piece)
    if not len(documents):
        return exact_search(documents)

    def search(queries: Tensor, top: int, rows: Tensor, places: Tensor) -> Tensor:
        # so many more are asked for that `top` are left
        most = int(torch.bincount(rows, minlength=1).max())
        scores, found = (torch.from_numpy(part) for part in index.search(queries.cpu().numpy(), top + most))
        scores, found = scores.to(queries.device), found.to(queries.device)
        names = torch.arange(len(queries), device=found.device)[:, None] * num_docs + found
        gone = (found < 0) | torch.isin(names, rows * num_docs + places)
        keys = keys_of(scores.masked_fill(gone, float("-inf")), found.clamp(min=0) + documents.first)
        return keys.topk(top, dim=1).values

    return search


def keys_of(scores: Tensor, rows: Tensor) -> Tensor:
    """Return the keys of float32 scores [m, n] of int64 catalogue rows, [m, n] or what broadcasts to it."""
    bits = (scores + 0.0).view(torch.int32)  # -0.0 is 0.0
    return (_ordered(bits).long() << ROW_BITS) | (LAST_ROW - 1 - rows)


def opened(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return (scores float32, catalogue rows int64), shaped like the keys; the row is -1 where the score is -inf."""
    scores = _ordered((keys >> ROW_BITS).int()).view(torch.float32)
    return scores, (LAST_ROW - 1 - (keys & LAST_ROW)).masked_fill(scores == float("-inf"), -1)


def _ordered(bits: Tensor) -> Tensor:
    """Return the bits of floats, int32, as integers in the floats' order; of those, the bits again."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _best_places(scores: Tensor, top: int) -> Tensor:
    """Return int64 [m, top], the places of the highest scores in their rows; of equal ones the first are taken."""
    values, places = scores.topk(top, dim=1)
    edge = values[:, -1:]
    # topk takes any of those that are equal
    crowded = ((scores >= edge).sum(dim=1, keepdim=True) > top) & (edge > float("-inf"))
    again = crowded.squeeze(1).nonzero().squeeze(1)
    if len(again):
        places[again] = scores[again].sort(dim=1, descending=True, stable=True).indices[:, :top]
    return places
