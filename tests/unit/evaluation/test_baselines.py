"""The package's baselines against their definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.transitions import Transitions
from bigdssm.errors import ConfigError
from bigdssm.evaluation.baselines import fit_baseline
from bigdssm.evaluation.evaluate import evaluate_scores
from bigdssm.ingest.api import make_dataset
from tests.conftest import write_config


def test_vectors_of_a_chain_are_the_best_low_rank_approximation(tiny_interactions: Any) -> None:
    dataset = Dataset.open(tiny_interactions.dir)
    chain, rows = Transitions.of(dataset, 4), next(iter(dataset.iterate("test", 1000)))
    counts = np.zeros((chain.num_docs, chain.num_docs))
    for item in range(len(counts)):
        own = slice(chain.starts[item], chain.starts[item + 1])
        counts[item, chain.followers[own]] = chain.counts[own]
    left, lengths, right = np.linalg.svd(counts)
    last = np.zeros((rows.num_queries, len(counts)))
    for query in range(rows.num_queries):
        for distance, item in enumerate(rows.seen(query)[-4:][::-1], start=1):
            last[query, item] += 12 / distance
    for dim in (3, len(counts) - 1):
        found = fit_baseline("markov_vectors", dataset, {"window": 4, "dim": dim})
        expected = last @ (left[:, :dim] * lengths[:dim]) @ right[:dim]
        np.testing.assert_allclose(found(rows), expected, rtol=1e-6, atol=1e-6 * expected.max())
    with pytest.raises(ConfigError, match="dim: got 0, needs at least 1"):
        fit_baseline("markov_vectors", dataset, {"dim": 0})


def test_rows_without_a_successor_are_evaluated(tmp_path: Path) -> None:
    """The last item of each test history is followed by no train event."""
    config = write_config(
        tmp_path,
        {"query": {"past": {"type": "history", "of": "item_id"}}, "doc": {"item_id": {"type": "categorical"}}},
    )
    events = [(f"u{user}", item) for user in range(6) for item in ("a", "b", "c", f"last{user}", "d")]
    users, items = zip(*events, strict=True)
    times = range(1_700_000_000, 1_700_000_000 + len(events))
    interactions = {"user_id": users, "item_id": items, "timestamp": times}
    make_dataset(config, interactions=interactions, items={"item_id": sorted(set(items))})
    dataset = Dataset.open(tmp_path / "dataset")
    scores = fit_baseline("markov", dataset, {"window": 1})
    assert not scores(next(dataset.iterate("test", 10))).any()
    # all scores are 0, of the target and the five other documents that are not in the history
    assert evaluate_scores(scores, dataset, "test").ranks.tolist() == [1 + 5 / 2] * 6
