"""Baselines over histories as sets of items: ItemKNN and ALS (package implicit), EASE (SciPy).

Each is fitted to the binary matrix of train positives X [users, N], and scores all documents for the binary history x
[N] of a query: x S, or x V (VᵀV …)⁻¹ Vᵀ. Source: Sarwar et al. 2001 with the weights of BM25; Steck 2019,
"Embarrassingly Shallow Autoencoders", eq. 8; Hu, Koren and Volinsky 2008.

Shapes: m queries, N documents.
"""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from scipy.sparse import csr_matrix

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.errors import ConfigError, DataError
from bigdssm.evaluation.baselines import Count
from bigdssm.utils.components import Bound

Positive = Annotated[float, Bound(above=0)]  # types of options
Seed = Annotated[int, Bound(0)]
FIT_ROWS = 65_536
MAX_EASE_DOCS = 30_000  # EASE's matrix [N, N] is dense: 7 GB


@dataclass(frozen=True)
class ItemKNN:
    """ItemKNN: the score of a document is the sum of its similarities to the items of the history."""

    similarity: Any  # CSR [N, N]

    @classmethod
    def fit(cls, dataset: Dataset, neighbours: Count = 100, weights: str = "bm25") -> ItemKNN:
        """Fit the baseline; `weights` of the matrix before the cosines: bm25, tfidf or none."""
        _need("implicit")
        from implicit import nearest_neighbours

        kinds = {"bm25": "BM25Recommender", "tfidf": "TFIDFRecommender", "none": "CosineRecommender"}
        if weights not in kinds:
            raise ConfigError(f"weights={weights}: needs one of {', '.join(kinds)}")
        model = getattr(nearest_neighbours, kinds[weights])(K=neighbours)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns about converting its own matrix
            model.fit(positives(dataset), show_progress=False)
        return cls(model.similarity)

    def __call__(self, rows: Rows) -> np.ndarray:
        """Return scores float64 [m, N]."""
        scores: np.ndarray = (history(rows, self.similarity.shape[0]) @ self.similarity).toarray()
        return scores


@dataclass(frozen=True)
class Ease:
    """A linear autoencoder without self-similarity, in closed form."""

    weights: np.ndarray  # float64 [N, N], diagonal 0

    @classmethod
    def fit(cls, dataset: Dataset, regularisation: Positive = 300.0) -> Ease:
        """Fit the baseline. Raises DataError: N is too large for a dense matrix."""
        if dataset.catalogue.num_docs > MAX_EASE_DOCS:
            raise DataError(
                f"EASE needs at most {MAX_EASE_DOCS} documents, {dataset.dir} has {dataset.catalogue.num_docs}"
            )
        X = positives(dataset)
        gram = (X.T @ X).toarray().astype(np.float64)
        gram[np.diag_indices_from(gram)] += regularisation
        inverse = np.linalg.inv(gram)
        weights = inverse / -np.diag(inverse)
        np.fill_diagonal(weights, 0.0)
        return cls(weights)

    def __call__(self, rows: Rows) -> np.ndarray:
        """Return scores float64 [m, N]."""
        scores: np.ndarray = history(rows, len(self.weights)) @ self.weights
        return scores


@dataclass(frozen=True)
class ImplicitALS:
    """Matrix factorization of implicit feedback; query vectors are computed from histories (fold-in)."""

    model: Any

    @classmethod
    def fit(
        cls, dataset: Dataset, factors: Count = 64, regularisation: Positive = 0.05, weight: Positive = 10.0,
        iterations: Count = 15, seed: Seed = 0,
    ) -> ImplicitALS:  # fmt: skip
        """Fit the baseline; `weight` is the confidence of positives relative to zeros."""
        _need("implicit")
        from implicit.als import AlternatingLeastSquares

        model = AlternatingLeastSquares(
            factors=factors, regularization=regularisation, alpha=weight, iterations=iterations, random_state=seed
        )
        model.fit(positives(dataset), show_progress=False)
        return cls(model)

    def __call__(self, rows: Rows) -> np.ndarray:
        """Return scores float64 [m, N]."""
        of_items = self.model.item_factors
        seen = history(rows, len(of_items))
        of_queries = self.model.recalculate_user(np.arange(seen.shape[0]), seen)
        scores: np.ndarray = (of_queries @ of_items.T).astype(np.float64)
        return scores


def positives(dataset: Dataset) -> Any:
    """Return the train positives as a binary CSR matrix, float32 [users, N]. Raises DataError: no histories."""
    users, docs = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for rows in dataset.iterate("train", FIT_ROWS):
        if rows.sequence is None:
            raise DataError(f"{dataset.dir} contains pairs without histories, which this baseline needs")
        relevant = rows.relevance > 0
        users.append(rows.query_ids[relevant])
        docs.append(rows.doc_rows[relevant])
    _, user = np.unique(np.concatenate(users), return_inverse=True)
    item = np.concatenate(docs)
    shape = (int(user.max(initial=-1)) + 1, dataset.catalogue.num_docs)
    matrix = csr_matrix((np.ones(len(item), np.float32), (user, item)), shape=shape)
    matrix.data[:] = 1.0  # duplicates were summed
    return matrix


def history(rows: Rows, num_docs: int) -> Any:
    """Return the histories as a binary CSR matrix, float32 [m, N]."""
    items, offsets = rows.seen_ragged()
    matrix = csr_matrix(
        (np.ones(len(items), np.float32), np.asarray(items, np.int64), offsets), (rows.num_queries, num_docs)
    )
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    return matrix


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"this baseline needs the package {package}: pip install 'bigdssm[baselines]'")
