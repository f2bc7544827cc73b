"""ItemKNN, EASE and ALS against their definitions, on the tiny interactions."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

import tools.evidence.baselines  # noqa: F401, which registers them
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError, DataError
from bigdssm.evaluation.baselines import fit_baseline
from bigdssm.evaluation.evaluate import evaluate_scores
from tools.evidence.item_baselines import history, positives


@pytest.fixture(scope="module")
def dataset(tiny_interactions: Any) -> Dataset:
    return Dataset.open(tiny_interactions.dir)


@pytest.fixture(scope="module")
def X(dataset: Dataset) -> np.ndarray:
    """Train positives as a dense matrix."""
    users: dict[int, set[int]] = {}
    for rows in dataset.iterate("train", 100):
        for user, doc, relevance in zip(rows.query_ids, rows.doc_rows, rows.relevance, strict=True):
            if relevance > 0:
                users.setdefault(int(user), set()).add(int(doc))
    found = np.zeros((len(users), dataset.catalogue.num_docs))
    for row, user in enumerate(sorted(users)):
        found[row, sorted(users[user])] = 1
    return found


def evaluated_rows(dataset: Dataset) -> Any:
    return next(iter(dataset.iterate("test", 1000)))


def seen(dataset: Dataset) -> np.ndarray:
    rows = evaluated_rows(dataset)
    found = np.zeros((rows.num_queries, dataset.catalogue.num_docs))
    for query in range(rows.num_queries):
        found[query, rows.seen(query)] = 1
    return found


def test_positives_and_histories_are_those_of_the_rows(dataset: Dataset, X: np.ndarray) -> None:
    np.testing.assert_array_equal(positives(dataset).toarray(), X)
    np.testing.assert_array_equal(history(evaluated_rows(dataset), X.shape[1]).toarray(), seen(dataset))


def test_ease_solves_its_problem(dataset: Dataset, X: np.ndarray) -> None:
    found = fit_baseline("ease", dataset, {"regularisation": 7.0})
    B = found.weights  # type: ignore[attr-defined]
    gradient = X.T @ (X @ B - X) + 7.0 * B  # of (|X − XB|² + 7 |B|²) / 2
    np.fill_diagonal(gradient, 0)  # the diagonal is fixed
    assert np.abs(gradient).max() < 1e-9 and not np.diag(B).any() and np.abs(B).max() > 0.01
    np.testing.assert_allclose(found(evaluated_rows(dataset)), seen(dataset) @ B, atol=1e-12)


def test_item_knn_keeps_the_nearest_by_cosine(dataset: Dataset, X: np.ndarray) -> None:
    pytest.importorskip("implicit")
    found = fit_baseline("item_knn", dataset, {"neighbours": 5, "weights": "none"})
    lengths = np.linalg.norm(X, axis=0).clip(1e-12)
    cosine = (X / lengths).T @ (X / lengths)
    kept = found.similarity.toarray()  # type: ignore[attr-defined]
    for item in range(len(cosine)):
        own = np.flatnonzero(kept[item])
        assert len(own) <= 5
        np.testing.assert_allclose(kept[item, own], cosine[item, own], atol=1e-6)
        others = np.delete(cosine[item], own)
        assert len(own) < 5 or kept[item, own].min() >= others.max() - 1e-6
    np.testing.assert_allclose(found(evaluated_rows(dataset)), seen(dataset) @ kept, atol=1e-5)


def test_als_solves_for_the_history(dataset: Dataset) -> None:
    pytest.importorskip("implicit")
    found = fit_baseline("ials", dataset, {"factors": 4, "regularisation": 0.3, "weight": 5.0})
    V = found.model.item_factors.astype(np.float64)  # type: ignore[attr-defined]
    expected = []
    for x in seen(dataset):
        confidence = np.diag(1 + 4.0 * x)  # implicit's confidence: 1 + alpha for positives, 1 elsewhere
        expected.append(np.linalg.solve(V.T @ confidence @ V + 0.3 * np.eye(4), V.T @ (5.0 * x)) @ V.T)
    np.testing.assert_allclose(found(evaluated_rows(dataset)), np.array(expected), rtol=1e-3, atol=1e-4)


def test_item_baselines_beat_popularity(dataset: Dataset) -> None:
    pytest.importorskip("implicit")
    popular = evaluate_scores(fit_baseline("popularity", dataset, {}), dataset, "test").metrics["mrr"]
    for name, options in (("item_knn", {"weights": "none"}), ("ease", {"regularisation": 20.0})):
        assert evaluate_scores(fit_baseline(name, dataset, options), dataset, "test").metrics["mrr"] > popular


def test_invalid_item_baseline_options_are_refused(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match="the baseline ease has no option lambda; its options: regularisation"):
        fit_baseline("ease", dataset, {"lambda": 1})
    with pytest.raises(ConfigError, match="the baseline pretrained needs the option folder"):
        fit_baseline("pretrained", dataset, {})
    pytest.importorskip("implicit")
    with pytest.raises(ConfigError, match="weights=bm26: needs one of bm25, tfidf, none"):
        fit_baseline("item_knn", dataset, {"weights": "bm26"})


def test_missing_packages_of_item_baselines_are_named(
    dataset: Dataset, tiny_pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "implicit", None)
    fit_baseline("ease", dataset, {})
    with pytest.raises(DataError, match="contains pairs without histories"):
        fit_baseline("ease", Dataset.open(tiny_pairs.dir), {})
    for name in ("item_knn", "ials"):
        with pytest.raises(ConfigError, match="needs the package implicit: pip install"):
            fit_baseline(name, dataset, {})
