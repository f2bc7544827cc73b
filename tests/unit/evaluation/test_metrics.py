"""Metrics: hand-worked ranks, agreement with trec_eval, and the paired bootstrap."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import pytrec_eval
import torch
from rich.console import Console

from bigdssm.errors import ConfigError
from bigdssm.evaluation import metrics
from bigdssm.evaluation.comparison import System, differences, differences_as_json, table
from bigdssm.evaluation.evaluate import ranks_of_scores
from bigdssm.evaluation.metrics import mean_metrics, means, paired_bootstrap, row_metrics, standard_errors
from bigdssm.utils.log import metric_label


def test_hand_worked() -> None:
    ranks = np.array([1.0, 3.0, 10.0, 10.5, 101.0, np.nan])
    metrics = mean_metrics(ranks)
    assert metrics["hr_at_10"] == 3 / 5
    assert metrics["ndcg_at_10"] == pytest.approx((1 + 0.5 + 1 / math.log2(11)) / 5, abs=1e-12)
    assert metrics["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 10 + 1 / 10.5 + 1 / 101) / 5, abs=1e-12)
    assert metrics["recall_at_100"] == 4 / 5
    assert standard_errors(row_metrics(ranks))["hr_at_10"] == pytest.approx(math.sqrt(0.6 * 0.4 / 4))
    assert math.isnan(mean_metrics(np.array([np.nan]))["mrr"])


def test_agrees_with_trec_eval() -> None:
    random = np.random.RandomState(1)
    scores = (
        random.permutation(200 * 300).reshape(200, 300).astype(np.float64)
    )  # no ties: trec_eval breaks them by name
    target = random.randint(0, 300, 200)
    ranks = ranks_of_scores(torch.tensor(scores), torch.tensor(target))[0].numpy()
    run = {f"q{i}": {f"d{j}": float(score) for j, score in enumerate(row)} for i, row in enumerate(scores)}
    qrels = {f"q{i}": {f"d{j}": 1} for i, j in enumerate(target)}
    names = {"success_10": "hr_at_10", "ndcg_cut_10": "ndcg_at_10", "recip_rank": "mrr", "recall_100": "recall_at_100"}
    measured = pytrec_eval.RelevanceEvaluator(qrels, {"success.10", "ndcg_cut.10", "recip_rank", "recall.100"})
    theirs = measured.evaluate(run)
    ours = row_metrics(ranks)
    for their_name, name in names.items():
        np.testing.assert_allclose(ours[name], [theirs[f"q{i}"][their_name] for i in range(200)], atol=1e-12)


def test_paired_bootstrap() -> None:
    random = np.random.RandomState(2)
    b = random.rand(900)
    a = b + 0.1 + 0.5 * random.randn(900)
    difference = paired_bootstrap(a, b)
    assert difference == paired_bootstrap(a, b)
    assert difference != paired_bootstrap(a, b, seed=1)
    assert difference.mean == pytest.approx((a - b).mean(), abs=1e-12)
    half_width = 1.96 * (a - b).std() / 30  # normal approximation
    assert difference.low == pytest.approx(difference.mean - half_width, rel=0.1)
    assert difference.high == pytest.approx(difference.mean + half_width, rel=0.1)
    # Frozen: the intervals of reports must be equal on every machine.
    assert (
        str(paired_bootstrap(np.array([1.0, 0, 1, 1, 0]), np.array([0.0, 0, 1, 0, 0]))) == "+0.4000 [+0.0000, +0.8000]"
    )


def test_several_seeds_resample_rows_and_seeds() -> None:
    random = np.random.RandomState(3)
    rows, seeds = 0.3 * random.randn(500), np.array([0.0, 0.2, 0.4])[:, None]
    a, b = rows + seeds, 0.3 * random.randn(500) - 0.1
    found, alone = paired_bootstrap(a, b), paired_bootstrap(a.mean(axis=0), b)
    assert found.mean == pytest.approx(alone.mean, abs=1e-12)
    assert alone.high - alone.low < 0.08  # over rows only; the seeds' mean has a standard error of 0.09
    assert 0.3 < found.high - found.low < 0.5
    assert paired_bootstrap(a, a - 0.1).low == pytest.approx(0.1)  # seeds pair
    error = standard_errors({"x": a})["x"]
    assert error == pytest.approx((rows.var(ddof=1) / 500 + 0.2**2 / 3) ** 0.5)
    assert means({"x": a})["x"] == pytest.approx(rows.mean() + 0.2)


def test_rows_of_one_query_are_drawn_together() -> None:
    random = np.random.RandomState(4)
    query_ids = random.permutation(np.repeat(np.arange(300), random.randint(1, 9, 300)))
    taste = 0.5 * random.randn(300)
    a = 3 + taste[query_ids] + 0.1 * random.randn(len(query_ids))
    found, alone = paired_bootstrap(a, np.zeros(len(a)), query_ids), paired_bootstrap(a, np.zeros(len(a)))
    assert found.mean == pytest.approx(alone.mean, abs=1e-12) == pytest.approx(a.mean())
    error = standard_errors({"x": a}, query_ids)["x"]
    sizes = np.bincount(query_ids)
    assert error == pytest.approx(0.5 * (sizes**2).sum() ** 0.5 / len(a), rel=0.1)  # the variance of the tastes
    assert error > 1.8 * standard_errors({"x": a})["x"]
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    seeds = np.stack([a - 0.2, a, a + 0.2])
    more = standard_errors({"x": seeds}, query_ids)["x"]
    assert more == pytest.approx((error**2 + 0.2**2 / 3) ** 0.5)
    # With one row per query the ids do not matter.
    ids = random.permutation(len(a))
    assert paired_bootstrap(seeds, taste[query_ids], ids) == paired_bootstrap(seeds, taste[query_ids])
    assert standard_errors({"x": seeds}, ids)["x"] == pytest.approx(standard_errors({"x": seeds})["x"])
    one = np.zeros(len(a), np.int64)
    assert math.isnan(standard_errors({"x": a}, one)["x"]) and math.isnan(paired_bootstrap(a, -a, one).low)


def test_bootstrap_refuses_rows_that_do_not_pair() -> None:
    with pytest.raises(ValueError, match="paired rows"):
        paired_bootstrap(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="paired rows"):
        paired_bootstrap(np.zeros(0), np.zeros(0))


def test_a_registered_metric_is_shown_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_METRICS", dict(metrics._METRICS))
    metrics.register_metric("hr_at_1", lambda ranks: ranks <= 1)
    ranks, queries = np.array([1.0, 3.0, 20.0]), np.arange(3)
    a = System.from_ranks("a", ranks, queries, 1.0)
    b = System.from_ranks("b", ranks + 1, queries, 1.0)
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(table([a, b], "three rows"))
    shown = console.export_text()
    assert all(label in shown for label in ("HR@10", "NDCG@10", "MRR", "HR@1 ")) and "Recall@100" not in shown
    assert "HR@1 +0.3333" in differences([(a, b)])[0]
    assert "hr_at_1" in {entry["metric"] for entry in differences_as_json([(a, b)])}


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "high"])
def test_a_metric_without_finite_numbers_is_refused(monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    monkeypatch.setattr(metrics, "_METRICS", dict(metrics._METRICS))
    for number, returned in enumerate((lambda ranks: value, lambda ranks: [value] * len(ranks))):
        with pytest.raises(ConfigError, match=r"the metric odd.* needs a finite number per rank"):
            metrics.register_metric(f"odd{number}", returned)
    metrics.register_metric("late", lambda ranks: [value if rank > 1000 else 0.0 for rank in ranks])
    with pytest.raises(ConfigError, match=r"the metric late returned \[0.0, .*an array of 2"):
        metrics.row_metrics(np.array([1.0, 2000.0]))
    with pytest.raises(ConfigError, match="the metric 'step': needs another name"):
        metrics.register_metric("step", lambda ranks: ranks)


def test_an_unregistered_metric_is_refused() -> None:
    assert metrics.find_metric("mrr") == "mrr"
    with pytest.raises(ConfigError, match=r"pretrain\.validation_metric: got map"):
        metrics.find_metric("map", "pretrain.validation_metric")


@pytest.mark.parametrize(
    ("name", "label"), [("ndcg_at_10", "NDCG@10"), ("mrr", "MRR"), ("recall_at_100", "Recall@100"), ("gini", "GINI")]
)
def test_labels_of_metrics(name: str, label: str) -> None:
    assert metric_label(name) == label
