"""Exact and approximate search over document vectors distributed over ranks."""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.loader.batch import as_tensor
from bigdssm.retrieval.embed import DocumentVectors
from bigdssm.retrieval.shards import Share
from bigdssm.retrieval.vectors import CodedVectors

QUERIES_AT_ONCE = 16_384  # per round, over all ranks: 17 MB of vectors at D = 256
PAIRS_AT_ONCE = 2_097_152  # per collective, over all ranks: 17 MB
# Below about 12 rows the BLAS takes another path, with different last bits.
LEAST_ROWS = 32
PRODUCT_WIDTH = 512  # of one product: MKL divides wider sums by the number of rows, on AVX-512 from 769 on

TOP_QUERIES_AT_ONCE, TILE_DOCS = 512, 8192  # 16 MiB of scores per tile
ROW_BITS = 32
LAST_ROW = (1 << ROW_BITS) - 1

Pairs = tuple[np.ndarray, np.ndarray]
"""(query row, catalogue row), both int64."""


@dataclass(frozen=True)
class ExcludedDocuments:
    """(query, local document) pairs to exclude, sorted by query, and the times of queries, which exclude later ones."""

    rows: Tensor  # int64 [p]: query rows
    positions: Tensor  # int64 [p]: positions among the local documents
    times: Tensor | None = None  # float64 [m]: of the queries; None: no document is too late

    @classmethod
    def of(cls, rows: Tensor, positions: Tensor, times: Tensor | None = None) -> "ExcludedDocuments":
        """Sort pairs by query."""
        order = rows.argsort()
        return cls(rows[order], positions[order], times)

    def block(self, first: int, last: int) -> "ExcludedDocuments":
        """Return those of the queries [first, last)."""
        begin, end = torch.searchsorted(self.rows, self.rows.new_tensor([first, last])).tolist()
        times = None if self.times is None else self.times[first:last]
        return ExcludedDocuments(self.rows[begin:end] - first, self.positions[begin:end], times)

    def mask(self, scores: Tensor, documents: DocumentVectors, first: int) -> None:
        """Set the scores [m, n] of excluded and absent documents to -inf; `first` is the position of column 0."""
        last = first + scores.shape[1]
        inside = (self.positions >= first) & (self.positions < last)
        scores[self.rows[inside], self.positions[inside] - first] = float("-inf")
        absent = documents.absent
        scores[:, absent[(absent >= first) & (absent < last)] - first] = float("-inf")
        if self.times is not None and documents.since is not None:
            scores.masked_fill_(documents.since[first:last] > self.times[:, None], float("-inf"))


Search = Callable[[Tensor, int, ExcludedDocuments], Tensor]
"""(queries [m, D+1], top, excluded documents) → sort keys [m, top] of local documents, best first."""


@dataclass(frozen=True)
class SearchRound:
    """Queries of all ranks; rank k's start at row k · longest, padded with zero vectors."""

    rows: Rows  # of this rank's queries
    vectors: Tensor  # float32 [B, D+1]
    target: Tensor  # int64 [B]: catalogue row of the query's target document
    excluded: ExcludedDocuments  # of this rank's documents

    def head(self, most: int) -> "SearchRound":
        """Return the first `most` queries per rank."""
        world = distributed.world_size()
        longest = len(self.vectors) // world
        size = min(most, longest)
        offsets = torch.arange(size, device=self.target.device)
        positions = (torch.arange(world, device=offsets.device)[:, None] * longest + offsets).flatten()
        rank, offset = self.excluded.rows // longest, self.excluded.rows % longest
        retained, times = offset < size, self.excluded.times
        excluded = ExcludedDocuments(
            (rank * size + offset)[retained], self.excluded.positions[retained],
            None if times is None else times[positions],
        )  # fmt: skip
        return SearchRound(
            self.rows.take(np.arange(min(size, len(self.rows)))),
            self.vectors[positions],
            self.target[positions],
            excluded,
        )

    def local(self, values: Tensor) -> Tensor:
        """Select this rank's queries [m, …] from replicated values [B, …]."""
        first = distributed.rank() * (len(values) // distributed.world_size())
        return values[first : first + len(self.rows)]

    def of_targets(self, documents: DocumentVectors, value: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Apply `value` to (queries, targets) on the ranks that hold the targets; [B, …] everywhere."""
        positions = documents.hold(self.target).nonzero().squeeze(1)
        local = value(self.vectors[positions], documents.vectors[self.target[positions] - documents.first])
        values = local.new_zeros(len(self.target), *local.shape[1:]).index_put((positions,), local)
        return distributed.all_reduce(values)


def rounds(
    chunks: Iterable[tuple[Rows, Tensor]], documents: DocumentVectors, excluded: Callable[[Rows], Pairs], at_once: int,
    known: Callable[[np.ndarray], Pairs] | None = None, times: Callable[[Rows], np.ndarray] | None = None,
) -> Iterator[SearchRound]:  # fmt: skip
    """Yield rounds of about `at_once` queries over all ranks, at least one per rank with queries left. Collectives.

    `chunks` are single-query rows and their index vectors, as many chunks on every rank. `excluded` returns the
    documents that this rank's queries exclude in addition to their target; `known` maps query ids of all ranks to this
    rank's known positives, which are excluded, too. `times` returns the times of queries, float64, see `since` of
    documents.
    """
    device, world = documents.vectors.device, distributed.world_size()
    most, pairs_at_once = max(1, at_once // world), max(1, PAIRS_AT_ONCE // world)
    for chunk_rows, chunk_queries in chunks:
        blocks = distributed.all_reduce(torch.tensor([-(-len(chunk_rows) // most)]), "max").item()
        for first in range(0, int(blocks) * most, most):
            part = np.arange(min(first, len(chunk_rows)), min(first + most, len(chunk_rows)))
            rows, queries = chunk_rows.take(part), chunk_queries[first : first + most]
            longest = max(_of_all_ranks(len(rows), device))
            target = distributed.all_gather_padded(as_tensor(rows.doc_rows).to(device), longest)

            # The pairs that this rank knows to exclude, as (query of the round, catalogue row).
            query, docs = excluded(rows)
            local_pairs = [np.stack([query + distributed.rank() * longest, docs], 1)]
            if known is not None:
                ids = distributed.all_gather_padded(as_tensor(rows.query_ids).to(device), longest)
                local_pairs.append(np.stack(known(ids.cpu().numpy()), 1))
            pairs = as_tensor(np.concatenate(local_pairs).astype(np.int32)).to(device)

            # Every rank gets those of its documents, from all ranks.
            held = [_local_positions(documents, torch.arange(len(target), device=device), target)]
            counts = _of_all_ranks(len(pairs), device)
            for begin in range(0, max(counts), pairs_at_once):
                sent = [min(max(0, count - begin), pairs_at_once) for count in counts]
                gathered = distributed.all_gather_rows(pairs[begin : begin + pairs_at_once], sent).long()
                held.append(_local_positions(documents, gathered[:, 0], gathered[:, 1]))
            of_round = None
            if times is not None:
                of_round = distributed.all_gather_padded(as_tensor(times(rows)).to(device), longest)
            excluded_rows, positions = (torch.cat(side) for side in zip(*held, strict=True))
            local = ExcludedDocuments.of(excluded_rows, positions, of_round)
            yield SearchRound(rows, distributed.all_gather_padded(queries, longest), target, local)


def excluded_documents(dataset: Dataset, exclude_seen: bool | str) -> Callable[[Rows], Pairs]:
    """Return the exclusion function: seen documents, or in a siamese dataset the query itself.

    exclude_seen: as data.exclude_seen.
    """

    def excluded(rows: Rows) -> Pairs:
        if dataset.schema.siamese:  # of pairs, without histories
            docs = dataset.catalogue.rows_by_id(rows.query_ids)
            return np.flatnonzero(docs >= 0), docs[docs >= 0]
        seen = dataset.excluded(rows, exclude_seen)
        return np.repeat(np.arange(len(rows)), seen.lengths), seen.values

    return excluded


def inner_products(queries: Tensor, documents: Tensor) -> Tensor:
    """Return queries @ documents.T, [m, n]; an entry's bits do not depend on the other rows."""
    m, n = len(queries), len(documents)
    parts = zip(_at_least(queries).split(PRODUCT_WIDTH, 1), _at_least(documents).split(PRODUCT_WIDTH, 1), strict=True)
    return functools.reduce(torch.add, (query @ document.T for query, document in parts))[:m, :n]


def _at_least(rows: Tensor) -> Tensor:
    missing = max(0, LEAST_ROWS - len(rows))
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def _of_all_ranks(number: int, device: torch.device) -> list[int]:
    numbers = distributed.all_gather_rows(torch.tensor([number], device=device), [1] * distributed.world_size())
    return [int(number) for number in numbers.tolist()]


def _local_positions(documents: DocumentVectors, rows: Tensor, docs: Tensor) -> tuple[Tensor, Tensor]:
    here = documents.hold(docs)
    return rows[here], docs[here] - documents.first


def top_documents(
    queries: Tensor, documents: Tensor, top: int, excluded_rows: Tensor, excluded_docs: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the best documents as (scores, catalogue rows int64), both [m, top], padded with -inf, -1.

    queries [m, D+1] and documents [N, D+1] are index vectors; the pairs (excluded_rows, excluded_docs) are excluded.
    Ties rank by ascending row.
    """
    excluded = ExcludedDocuments(excluded_rows, excluded_docs)
    return unpack_keys(exact_search(DocumentVectors(documents))(queries, top, excluded))


def top_of_round(search: Search, batch: SearchRound, top: int) -> Tensor:
    """Return sort keys [m, top] of the best documents over all ranks for this rank's queries.

    All ranks must call it.
    """
    results = [batch.vectors.new_zeros(0, top, dtype=torch.int64)]
    for first in range(0, len(batch.vectors), TOP_QUERIES_AT_ONCE):
        queries = batch.vectors[first : first + TOP_QUERIES_AT_ONCE]
        results.append(search(queries, top, batch.excluded.block(first, first + len(queries))))
    world, rows = distributed.world_size(), torch.cat(results)
    longest = [len(rows) // world] * world
    # [world, longest, top]: each rank's results for the queries of this one
    received = distributed.all_to_all_rows(rows, longest, longest).view(world, -1, top)[:, : len(batch.rows)]
    return received.transpose(0, 1).flatten(1).topk(top, dim=1).values


def exact_search(documents: DocumentVectors) -> Search:
    """Return a Search that scores every document by inner product."""

    def search(queries: Tensor, top: int, excluded: ExcludedDocuments) -> Tensor:
        best = pack_keys(queries.new_full((len(queries), top), float("-inf")), excluded.rows.new_tensor(-1))
        for first in range(0, len(documents), TILE_DOCS):
            tile = documents.vectors[first : first + TILE_DOCS]
            scores = inner_products(queries, tile)
            excluded.mask(scores, documents, first)
            best_of_tile = _best_positions(scores, min(top, len(tile)))
            keys = pack_keys(scores.gather(1, best_of_tile), best_of_tile + (documents.first + first))
            best = torch.cat([best, keys], dim=1).topk(top, dim=1).values
        return best

    return search


def approximate_search(documents: DocumentVectors, num_docs: int, share: Share) -> Search:
    """Build an inverted-file index and return its Search, which scores about 1/8 of the documents.

    `documents` are the rank's share of `num_docs`. All ranks must call it, since building reports progress.
    """
    # imported here: exact search does not need FAISS
    from bigdssm.retrieval.index_types import IVF_ROUNDS, ROWS_AT_ONCE, InvertedFile

    total = IVF_ROUNDS + share.num_chunks(num_docs, ROWS_AT_ONCE)
    steps = iter(range(1, total + 1))

    def report(step: int) -> None:
        share.progress("an index of the documents built", step, total)

    present = np.delete(np.arange(len(documents)), documents.absent.cpu().numpy())
    if len(present):
        vectors = documents.vectors.cpu().numpy()[present if len(present) < len(documents) else slice(None)]
        coded = CodedVectors(vectors, "float32", vectors.shape[1])
        index = InvertedFile().build(coded, lambda: report(next(steps)))
    for step in steps:  # of ranks with more documents
        report(step)
    if not len(present):
        return exact_search(documents)
    of_hit = torch.from_numpy(np.append(present, -1)).to(documents.vectors.device)  # the last one: no hit
    newest_last = None if documents.since is None else documents.since[of_hit[:-1]].sort().values

    def search(queries: Tensor, top: int, excluded: ExcludedDocuments) -> Tensor:
        rows, positions = excluded.rows, excluded.positions
        # search deeper by the largest number of exclusions, so that `top` remain
        most = int(torch.bincount(rows, minlength=1).max())
        if excluded.times is not None and newest_last is not None:
            available = torch.searchsorted(newest_last, excluded.times.nan_to_num(torch.inf), right=True)
            most += min(top, len(newest_last) - int(available.min()))
        scores, hits = (torch.from_numpy(part) for part in index.search(queries.cpu().numpy(), top + most))
        scores, hits = scores.to(queries.device), of_hit[hits.to(queries.device)]
        pairs = torch.arange(len(queries), device=hits.device)[:, None] * num_docs + hits
        left_out = (hits < 0) | torch.isin(pairs, rows * num_docs + positions)
        if excluded.times is not None and documents.since is not None:
            left_out |= documents.since[hits] > excluded.times[:, None]
        keys = pack_keys(scores.masked_fill(left_out, float("-inf")), hits.clamp(min=0) + documents.first)
        return keys.topk(top, dim=1).values

    return search


def pack_keys(scores: Tensor, rows: Tensor) -> Tensor:
    """Pack float32 scores [m, n] and int64 catalogue rows (broadcast to [m, n]) into int64 sort keys."""
    bits = (scores + 0.0).view(torch.int32)  # -0.0 is 0.0
    return (_ordered(bits).long() << ROW_BITS) | (LAST_ROW - 1 - rows)


def unpack_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return (scores float32, catalogue rows int64) of keys; the row is -1 for a score of -inf."""
    scores = _ordered((keys >> ROW_BITS).int()).view(torch.float32)
    return scores, (LAST_ROW - 1 - (keys & LAST_ROW)).masked_fill(scores == float("-inf"), -1)


def _ordered(bits: Tensor) -> Tensor:
    """Map the int32 bits of floats to integers in the floats' order; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _best_positions(scores: Tensor, top: int) -> Tensor:
    """Return int64 [m, top]: positions of the highest scores per row; ties resolve to the first."""
    values, positions = scores.topk(top, dim=1)
    edge = values[:, -1:]
    # topk breaks ties arbitrarily
    crowded = ((scores >= edge).sum(dim=1, keepdim=True) > top) & (edge > float("-inf"))
    again = crowded.squeeze(1).nonzero().squeeze(1)
    if len(again):
        positions[again] = scores[again].sort(dim=1, descending=True, stable=True).indices[:, :top]
    return positions
