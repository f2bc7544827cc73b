"""How each kind of index is searched for documents of a choice: exactly as many are found as there are.

FAISS leaves out by itself what a selector of ids does not name. Where an index looks at a part of the documents only,
a choice of few would leave it a part of these: so as many *chosen* documents are looked at as it looks at without a
choice, which for less than that part of them is every one. A query that still found too few is asked again of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import faiss
import numpy as np

_made: Any = faiss  # whose stubs lack what its Python adds to classes of C++
LOOKED_AT = 8  # an inverted file looks at one list in so many
MANY_QUERIES = 20  # from which FAISS multiplies matrices, ten times as fast, where no selector forbids it


@dataclass(frozen=True, eq=False)
class Allowed:
    """The documents that may be found."""

    mask: np.ndarray  # bool [N]

    @cached_property
    def count(self) -> int:
        """Return how many there are."""
        return int(self.mask.sum())

    @cached_property
    def selector(self) -> Any:
        """Return what FAISS asks for each document."""
        return _made.IDSelectorBitmap(np.packbits(self.mask, bitorder="little"))


def scan(
    index: faiss.Index, queries: np.ndarray, wanted: int, allowed: Allowed | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (scores float32, rows int64), both [m, wanted], best first.

    queries are float32 [m, D+1]; `wanted` is at least 1 and at most the number of documents, or of those `allowed`.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    share = 1.0 if allowed is None else allowed.count / index.ntotal
    scores, rows = _searched(index, queries, wanted, allowed, thoroughness=1 / share)
    short = (rows < 0).any(axis=1)
    if short.any():
        scores[short], rows[short] = _searched(index, queries[short], wanted, allowed, thoroughness=LOOKED_AT)
    return scores, rows


def _searched(
    index: faiss.Index, queries: np.ndarray, wanted: int, allowed: Allowed | None, thoroughness: float
) -> tuple[np.ndarray, np.ndarray]:
    """Search with so many times the usual effort; of LOOKED_AT every document is looked at."""
    chosen: dict[str, Any] = {} if allowed is None else {"sel": allowed.selector}
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        lists = faiss.extract_index_ivf(index)
        parameters = _made.SearchParametersPreTransform(index_params=_of_lists(lists, thoroughness, chosen))
    elif isinstance(index, faiss.IndexIVF):
        parameters = _of_lists(index, thoroughness, chosen)
    elif isinstance(index, faiss.IndexHNSW) and thoroughness < LOOKED_AT:
        width = int(max(index.hnsw.efSearch, wanted) * thoroughness)
        parameters = _made.SearchParametersHNSW(efSearch=width, **chosen)
    else:
        if isinstance(index, faiss.IndexHNSW):
            index = faiss.downcast_index(index.storage)
        if allowed is not None and isinstance(index, faiss.IndexFlat) and len(queries) >= MANY_QUERIES:
            return _multiplied(index, queries, wanted, allowed)
        parameters = _made.SearchParameters(**chosen) if chosen else None
    scores, rows = index.search(queries, wanted, params=parameters)
    return scores, rows


def _multiplied(
    index: faiss.IndexFlat, queries: np.ndarray, wanted: int, allowed: Allowed
) -> tuple[np.ndarray, np.ndarray]:
    """Search a copy of the allowed documents' vectors."""
    every = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)
    scores, places = faiss.knn(queries, every[allowed.mask], wanted, metric=faiss.METRIC_INNER_PRODUCT)
    return scores, np.flatnonzero(allowed.mask)[places]


def _of_lists(lists: Any, thoroughness: float, chosen: dict[str, Any]) -> Any:
    probed = lists.nlist if thoroughness >= LOOKED_AT else min(lists.nlist, int(np.ceil(lists.nprobe * thoroughness)))
    return _made.SearchParametersIVF(nprobe=probed, **chosen)
