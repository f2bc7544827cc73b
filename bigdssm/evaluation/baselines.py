"""Baselines: popularity, a Markov chain over the last items, and BM25; others register in BASELINES.

All are fitted on the train split and evaluated as a model is: same rows, exclusions and tie handling.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_origin, get_type_hints

import numpy as np
from scipy.sparse.linalg import svds

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.dataset.transitions import MAX_WINDOW, Transitions, last_items
from bigdssm.errors import ConfigError
from bigdssm.evaluation.teachers import Bm25Teacher
from bigdssm.retrieval.texts import Texts
from bigdssm.utils.arguments import argument
from bigdssm.utils.bounds import Bound, out_of_bounds

Count = Annotated[int, Bound(1)]  # types of options
Window = Annotated[int, Bound(1, at_most=MAX_WINDOW)]


@dataclass(frozen=True)
class Popularity:
    """Score documents by their number of train positives."""

    counts: np.ndarray  # int64 [N]

    @classmethod
    def fit(cls, dataset: Dataset) -> Popularity:
        """Fit on `dataset`."""
        return cls(dataset.doc_counts())

    def __call__(self, rows: Rows) -> np.ndarray:
        """Return scores float64 [m, N]."""
        return np.repeat(self.counts[None].astype(np.float64), len(rows), axis=0)


@dataclass(frozen=True)
class Markov:
    """Score document j by Σ count(item → j) / distance over the last `window` items of the history.

    The counts of Transitions are weighted by distance, too. Weighting neither or only one is weaker on MovieLens-100K.
    """

    transitions: Transitions

    @classmethod
    def fit(cls, dataset: Dataset, window: Window = 3) -> Markov:
        """Fit on `dataset`. Raises DataError: its rows have no history."""
        return cls(Transitions.of(dataset, window))

    def __call__(self, rows: Rows) -> np.ndarray:
        """Return scores float64 [m, N]."""
        chain = self.transitions
        weights, items, row = last_items(rows, chain.window)
        length = chain.starts[items + 1] - chain.starts[items]
        entry = np.repeat(chain.starts[items] - np.cumsum(length) + length, length) + np.arange(length.sum())
        cell = np.repeat(row, length) * chain.num_docs + chain.followers[entry]
        values = chain.counts[entry] * np.repeat(weights, length)
        return np.bincount(cell, values, len(rows) * chain.num_docs).reshape(len(rows), chain.num_docs)


@dataclass(frozen=True)
class MarkovVectors:
    """The Markov chain as a two-tower model of width `dim`: an upper bound for vectors of that width.

    The counts are approximated by their truncated SVD of rank `dim`. Source: Eckart and Young 1936.
    """

    window: int
    queries: np.ndarray  # float64 [N, dim]: a query's vector is the sum of its last items' rows over their distance
    documents: np.ndarray  # float64 [N, dim]

    @classmethod
    def fit(cls, dataset: Dataset, dim: Count, window: Window = 3) -> MarkovVectors:
        """Fit on `dataset`. Raises: ConfigError: `dim` out of range; DataError: no histories."""
        chain = Transitions.of(dataset, window)
        if not 0 < dim < chain.num_docs:
            raise ConfigError(f"dim={dim}: needs at least 1 and less than the number of documents, {chain.num_docs}")
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
    """Score documents by BM25."""

    teacher: Bm25Teacher
    documents: np.ndarray  # int64 [N]: all catalogue rows

    @classmethod
    def fit(cls, dataset: Dataset) -> Bm25Texts:
        """Index the texts of `dataset`. Raises ConfigError: a side has no text, or a package is not installed."""
        return cls(Bm25Teacher(dataset, Texts(dataset)), np.arange(dataset.catalogue.num_docs))

    def __call__(self, rows: Rows) -> np.ndarray:
        """Return scores float64 [m, N]."""
        documents = np.broadcast_to(self.documents, (len(rows), len(self.documents)))
        return self.teacher(rows, documents).astype(np.float64)


BASELINES: dict[str, Any] = {  # by name; each has fit(dataset, **options) and maps Rows to scores [m, N]
    "popularity": Popularity,
    "markov": Markov,
    "markov_vectors": MarkovVectors,
    "bm25": Bm25Texts,
}


def check_options(name: str, options: Mapping[str, Any], *, require_all: bool = True) -> None:
    """Raise ConfigError if the options are invalid for the baseline `name`; `require_all`: or incomplete."""
    fit = BASELINES[name].fit
    known, hints = dict(list(inspect.signature(fit).parameters.items())[1:]), get_type_hints(fit, include_extras=True)
    for option, given in options.items():
        if option not in known:
            raise ConfigError(f"the baseline {name} has no option {option}; its options: {', '.join(known) or 'none'}")
        key, hint = f"the baseline {name}: {option}", hints[option]
        kind, bound = (hint.__origin__, hint.__metadata__[0]) if get_origin(hint) is Annotated else (hint, None)
        for _, _, needed in out_of_bounds(argument(key, given, kind), key, bound):
            raise ConfigError(f"{key}: got {given}, needs {needed}")
    for option, parameter in known.items():
        if require_all and parameter.default is inspect.Parameter.empty and option not in options:
            raise ConfigError(f"the baseline {name} needs the option {option}")


def fit_baseline(name: str, dataset: Dataset, options: Mapping[str, Any]) -> Callable[[Rows], np.ndarray]:
    """Fit the baseline `name` of BASELINES. Raises ConfigError: an option is invalid or missing."""
    check_options(name, options)
    return BASELINES[name].fit(dataset, **options)
