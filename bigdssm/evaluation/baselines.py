"""Baselines: popularity, a Markov chain over the last items, and BM25; others register themselves in BASELINES.

All are fitted to the train split alone and scored on the same rows, filter and ties as a model.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

import numpy as np
from scipy.sparse.linalg import svds

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.dataset.transitions import Transitions, last_items
from bigdssm.errors import ConfigError
from bigdssm.evaluation.teachers import Bm25Teacher
from bigdssm.retrieval.texts import Texts
from bigdssm.utils.arguments import argument


@dataclass(frozen=True)
class Popularity:
    """The score of a document is the number of its train positives."""

    counts: np.ndarray  # int64 [N]

    @classmethod
    def fit(cls, dataset: Dataset) -> Popularity:
        """Return the baseline of `dataset`."""
        return cls(dataset.doc_counts())

    def __call__(self, rows: Rows) -> np.ndarray:
        """Return scores float64 [m, N]."""
        return np.repeat(self.counts[None].astype(np.float64), len(rows), axis=0)


@dataclass(frozen=True)
class Markov:
    """The score of document j is Σ over the last `window` items of the history of count(item → j) / distance.

    The counts are those of Transitions, which weight by distance too. Weighting neither, or only one of both, is weaker
    on MovieLens-100K.
    """

    transitions: Transitions

    @classmethod
    def fit(cls, dataset: Dataset, window: int = 3) -> Markov:
        """Return the baseline of `dataset`. Raises DataError where its rows have no history."""
        return cls(Transitions.of(dataset, window))

    def __call__(self, rows: Rows) -> np.ndarray:
        """Return scores float64 [m, N]."""
        found = self.transitions
        weights, items, row = last_items(rows, found.window)
        length = found.starts[items + 1] - found.starts[items]
        entry = np.repeat(found.starts[items] - np.cumsum(length) + length, length) + np.arange(length.sum())
        cell = np.repeat(row, length) * found.num_docs + found.followers[entry]
        values = found.counts[entry] * np.repeat(weights, length)
        return np.bincount(cell, values, len(rows) * found.num_docs).reshape(len(rows), found.num_docs)


@dataclass(frozen=True)
class MarkovVectors:
    """A Markov chain as the product of two vectors: what an index of vectors of `dim` numbers can hold of it.

    The counts are replaced by the nearest matrix of that rank, their truncated SVD. Source: Eckart and Young 1936.
    """

    window: int
    queries: np.ndarray  # float64 [N, dim]: a query's vector is the sum of its last items', each over its distance
    documents: np.ndarray  # float64 [N, dim]

    @classmethod
    def fit(cls, dataset: Dataset, dim: int, window: int = 3) -> MarkovVectors:
        """Return the baseline of `dataset`. Raises ConfigError: too many numbers; DataError: no histories."""
        chain = Transitions.of(dataset, window)
        if not 0 < dim < chain.num_docs:
            raise ConfigError(f"dim={dim}: needs at least 1, and fewer than the {chain.num_docs} documents")
        left, lengths, right = svds(chain.matrix(), dim, v0=np.ones(chain.num_docs))
        return cls(window, left * lengths, right.T)

    def __call__(self, rows: Rows) -> np.ndarray:
        """Return scores float64 [m, N]."""
        weights, items, row = last_items(rows, self.window)
        vectors = np.zeros((len(rows), self.queries.shape[1]))
        np.add.at(vectors, row, weights[:, None] * self.queries[items])
        return vectors @ self.documents.T


@dataclass(frozen=True)
class Bm25Texts:
    """The score of a document is BM25's."""

    judge: Bm25Teacher
    documents: np.ndarray  # int64 [N], all of them

    @classmethod
    def fit(cls, dataset: Dataset) -> Bm25Texts:
        """Return the baseline of `dataset`. Raises ConfigError: a side without texts, or a package is missing."""
        return cls(Bm25Teacher(dataset, Texts(dataset)), np.arange(dataset.catalogue.num_docs))

    def __call__(self, rows: Rows) -> np.ndarray:
        """Return scores float64 [m, N]."""
        return self.judge(rows, np.broadcast_to(self.documents, (len(rows), len(self.documents)))).astype(np.float64)


BASELINES: dict[str, Any] = {  # by name; each has fit(dataset, **options), and gives scores [m, N] of Rows
    "popularity": Popularity,
    "markov": Markov,
    "markov_vectors": MarkovVectors,
    "bm25": Bm25Texts,
}

# The least value of an option, of any baseline, and whether that value itself is refused.
LEAST: dict[str, tuple[float, bool]] = {"window": (1, False), "dim": (1, False)}


def check_options(name: str, options: Mapping[str, Any], *, all_of_them: bool = True) -> None:
    """Raise ConfigError unless the baseline `name` can have these options; `all_of_them`: and needs no others."""
    fit = BASELINES[name].fit
    known, hints = dict(list(inspect.signature(fit).parameters.items())[1:]), get_type_hints(fit)
    for option, given in options.items():
        if option not in known:
            raise ConfigError(f"the baseline {name} has no option {option}, but {', '.join(known) or 'none'}")
        value = argument(f"the baseline {name}: {option}", given, hints[option])
        least, above = LEAST.get(option, (-math.inf, False))
        within = hints[option] not in (int, float) or (value > least if above else value >= least)
        if not within or value == math.inf:
            needed = f"{'above' if above else 'at least'} {least}" if math.isfinite(least) else "a finite number"
            raise ConfigError(f"the baseline {name}: {option}: got {given}, needs {needed}")
    for option, parameter in known.items():
        if all_of_them and parameter.default is inspect.Parameter.empty and option not in options:
            raise ConfigError(f"the baseline {name} needs the option {option}")


def fit_baseline(name: str, dataset: Dataset, options: Mapping[str, Any]) -> Callable[[Rows], np.ndarray]:
    """Return the baseline `name` of BASELINES, fitted. Raises ConfigError: an option cannot be, or is missing."""
    check_options(name, options)
    fitted: Callable[[Rows], np.ndarray] = BASELINES[name].fit(dataset, **options)
    return fitted
