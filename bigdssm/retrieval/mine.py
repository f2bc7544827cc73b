"""Mined negatives: for each train row a window of its own query's ranking, and the choice of some at each epoch.

Ranks below `first` are left out because they hold what the user would have liked but did not happen to meet, and so
may be documents that score nearly as the row's own does (`margin`). Only train rows are looked at: leaving out
validation or test items would tell the model what they are.

Shapes: m rows, N documents, W = last − first window places, k negatives a row.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from bigdssm import distributed
from bigdssm.data import Dataset, Rows
from bigdssm.data.streaming.order import derive_key, mix64
from bigdssm.data.tensors import as_tensor
from bigdssm.errors import DivergedError
from bigdssm.retrieval.embed import Encoders, Progress, Share, encode_catalogue, encode_queries, no_progress

TILE_DOCS = 16_384


@dataclass(frozen=True)
class KnownPositives:
    """The train positives of every query, by query id."""

    query_ids: np.ndarray  # int64, sorted, distinct
    starts: np.ndarray  # int64 [len(query_ids) + 1]
    doc_rows: np.ndarray  # int64

    @classmethod
    def of(cls, dataset: Dataset, split: str = "train") -> KnownPositives:
        """Return those of `dataset`: one pass over the split."""
        parts = [
            (rows.query_ids[rows.relevance > 0], rows.doc_rows[rows.relevance > 0])
            for rows in dataset.iterate(split, 65_536)
        ]
        ids, docs = (np.concatenate([part[side] for part in parts] or [np.zeros(0, np.int64)]) for side in (0, 1))
        order = np.lexsort((docs, ids))
        query_ids, starts = np.unique(ids[order], return_index=True)
        return cls(query_ids, np.append(starts, len(order)), docs[order])

    def pairs(self, query_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (row, catalogue row) of every known positive of the queries `query_ids` [m], int64."""
        place = np.minimum(np.searchsorted(self.query_ids, query_ids), max(len(self.query_ids) - 1, 0))
        known = self.query_ids[place] == query_ids if len(self.query_ids) else np.zeros(len(query_ids), bool)
        first = np.where(known, self.starts[place], 0)
        length = np.where(known, self.starts[np.minimum(place + 1, len(self.starts) - 1)], 0) - first
        entry = np.repeat(first - np.cumsum(length) + length, length) + np.arange(length.sum())
        return np.repeat(np.arange(len(query_ids)), length), self.doc_rows[entry]


def mine(
    encoders: Encoders,
    dataset: Dataset,
    split: str = "train",
    *,
    first: int,
    last: int,
    margin: float | None = None,
    documents: Tensor | None = None,
    rank: int = 0,
    world_size: int = 1,
    rows_per_chunk: int = 1024,
    progress: Progress = no_progress,
) -> np.ndarray:
    """Return int32 [rows of this rank's share, last − first]: catalogue rows at ranks [first, last) of each ranking.

    The share is that of `dataset.iterate(split, …, rank, world_size)`, so the shares of all ranks one after another
    are the split. Known positives (all of the query's train documents, the row's own history, and its target) are
    taken out before ranks are counted; -1 stands where the catalogue ends, in rows that were left out as bad, and with
    `margin` where a document's score alpha * <u, w> + beta is above that of the row's own less the margin. `documents`
    [N, D+1] are index vectors of the catalogue that were made before. A collective over the ranks. Raises DivergedError
    where a vector is not finite.
    """
    share = Share(rank, world_size, rows_per_chunk, progress)
    if documents is None:
        documents = encode_catalogue(encoders, dataset.catalogue.num_docs, share)
    known = KnownPositives.of(dataset, split)
    finite = bool(documents.isfinite().all())
    begin, end = share.of(dataset.num_rows(split))
    windows = np.full((end - begin, last - first), -1, np.int32)
    for rows, queries in encode_queries(encoders, dataset, split, share):
        finite = finite and bool(queries.isfinite().all())
        scores, best = top_documents(queries, documents, last, *_excluded(rows, known, documents.device))
        if margin is not None:
            own = (queries * documents[as_tensor(rows.doc_rows).to(documents.device)]).sum(dim=1)
            best = best.masked_fill(scores > (own - margin).unsqueeze(1), -1)
        windows[rows.row_ids - begin] = best[:, first:].cpu().numpy()
    distributed.raise_together(None if finite else DivergedError("the model's vectors hold NaN or inf; nothing mined"))
    return windows


def mine_to_file(
    path: Path,
    encoders: Encoders,
    dataset: Dataset,
    split: str = "train",
    *,
    first: int,
    last: int,
    margin: float | None = None,
    documents: Tensor | None = None,
    rank: int = 0,
    world_size: int = 1,
    rows_per_chunk: int = 1024,
    progress: Progress = no_progress,
) -> np.ndarray:
    """Return int32 [rows of the split, last − first], indexed by row id and mapped from the .npy file `path`.

    Every rank writes its share, so `path` must be on storage that all ranks see, as a run's folder is; the file
    appears under its name when it is whole. A collective; see `mine`.
    """
    windows = mine(
        encoders, dataset, split, first=first, last=last, margin=margin, documents=documents,
        rank=rank, world_size=world_size, rows_per_chunk=rows_per_chunk, progress=progress,
    )  # fmt: skip
    bounds = Share(rank, world_size).bounds(dataset.num_rows(split))
    unfinished = path.with_name(f".{path.name}.unfinished")
    if rank == 0:
        open_memmap(unfinished, "w+", np.int32, (bounds[-1][1], last - first)).flush()
    distributed.barrier()
    whole = open_memmap(unfinished, "r+")
    whole[slice(*bounds[rank])] = windows
    whole.flush()
    distributed.barrier()
    if rank == 0:
        os.replace(unfinished, path)
    distributed.barrier()
    return open_memmap(path, "r")


def top_documents(
    queries: Tensor, documents: Tensor, top: int, excluded_rows: Tensor, excluded_docs: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (scores, catalogue rows int64), both [m, top]: each query's best documents, -inf and -1 behind the last.

    queries [m, D+1] and documents [N, D+1] are index vectors; (excluded_rows, excluded_docs) are left out.
    """
    num_queries, num_docs = len(queries), len(documents)
    best = queries.new_full((num_queries, top), float("-inf"))
    index = torch.full((num_queries, top), -1, dtype=torch.int64, device=queries.device)
    for column in range(0, num_docs, TILE_DOCS):
        scores = queries @ documents[column : column + TILE_DOCS].T
        width = scores.shape[1]
        inside = (excluded_docs >= column) & (excluded_docs < column + width)
        scores[excluded_rows[inside], excluded_docs[inside] - column] = float("-inf")
        columns = torch.arange(column, column + width, device=queries.device).expand(num_queries, width)
        scores, columns = torch.cat([best, scores], dim=1), torch.cat([index, columns], dim=1)
        best, place = scores.topk(top, dim=1)
        index = columns.gather(1, place)
    return best, index.masked_fill(best == float("-inf"), -1)


def choose_negatives(window: np.ndarray, row_ids: np.ndarray, epoch: int, seed: int, k: int) -> np.ndarray:
    """Return int32 [m, k]: k distinct entries of each row of `window` [m, W], -1 where it holds fewer.

    A pure function of (seed, epoch, row id): the same whatever the ranks and the steps, another draw every epoch.
    """
    row_keys = mix64(row_ids, derive_key(seed, epoch))
    keys = mix64(row_keys[:, None] ^ mix64(np.arange(window.shape[1]), 0), 0)
    keys = np.where(window < 0, np.iinfo(np.uint64).max, keys)
    place = np.argsort(keys, axis=1, kind="stable")[:, :k]
    chosen = np.take_along_axis(window, place, axis=1).astype(np.int32)
    return np.pad(chosen, ((0, 0), (0, k - chosen.shape[1])), constant_values=-1)


def _excluded(rows: Rows, known: KnownPositives, device: torch.device) -> tuple[Tensor, Tensor]:
    known_rows, known_docs = known.pairs(rows.query_ids)
    seen, offsets = rows.seen_ragged()
    row = np.arange(len(rows))
    all_rows = np.concatenate([known_rows, np.repeat(row, np.diff(offsets)), row])
    all_docs = np.concatenate([known_docs, seen, rows.doc_rows]).astype(np.int64)
    return torch.as_tensor(all_rows, device=device), torch.as_tensor(all_docs, device=device)
