"""The best documents of queries, exactly or by an approximate index, and merged over ranks.

What was found is a key, int64: the score's bits in an order of integers, then the catalogue row, counted from the end.
So keys compare as scores do, and where these are equal the lower row comes first, on any number of ranks.

Shapes: m or B queries, n documents here, `top` found of each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.retrieval.coding import CodedVectors
from bigdssm.retrieval.embed import Documents, Share
from bigdssm.retrieval.rounds import Round, product

QUERIES_AT_ONCE, TILE_DOCS = 512, 8192  # of whose scores so many are held: 16 MiB
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
    return opened(exact_search(Documents(documents))(queries, top, excluded_rows, excluded_docs))


def top_of_round(search: Search, asked: Round, top: int) -> Tensor:
    """Return keys [m, top] of the best documents of all ranks, for this rank's queries. A collective."""
    found = [asked.vectors.new_zeros(0, top, dtype=torch.int64)]
    for first in range(0, len(asked.vectors), QUERIES_AT_ONCE):
        queries = asked.vectors[first : first + QUERIES_AT_ONCE]
        found.append(search(queries, top, *asked.left_out.of_block(first, first + len(queries))))
    world = distributed.world_size()
    # [world, longest, top]: what each rank found for the queries of this one
    received = distributed.exchange_rows(torch.cat(found)).view(world, -1, top)[:, : len(asked.rows)]
    return received.transpose(0, 1).flatten(1).topk(top, dim=1).values


def exact_search(documents: Documents) -> Search:
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


def approximate_search(documents: Documents, num_docs: int, share: Share) -> Search:
    """Return the search of an inverted-file index of these documents, built now: it scores about an eighth of them.

    `documents` are the rank's share of `num_docs`. A collective, since building tells how it gets on.
    """
    # only here: who searches exactly need not load FAISS
    from bigdssm.retrieval.kinds import IVF_ROUNDS, ROWS_AT_ONCE, faiss_index

    total = IVF_ROUNDS + share.num_chunks(num_docs, ROWS_AT_ONCE)
    pieces = iter(range(1, total + 1))

    def tell(piece: int) -> None:
        share.progress("an index of the documents built", piece, total)

    if len(documents):
        vectors = documents.vectors.cpu().numpy()
        coded = CodedVectors(vectors, "float32", vectors.shape[1])
        index = faiss_index("ivf", coded, lambda: tell(next(pieces)))
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
