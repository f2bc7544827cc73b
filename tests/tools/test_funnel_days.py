"""Comparison of nightly models with the daily chain, on days of a generated shop."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from bigdssm.dataset.dataset import Dataset
from bigdssm.evaluation.comparison import System
from bigdssm.evaluation.counted_events import request_days
from tools.evidence import funnel_days
from tools.evidence.funnel_shop import DAY, START

CONFIG = """
run: {dir: runs/none}
data:
  dir: datasets/none
  query:
    history: {type: history, of: item_id, max_items: 5}
  doc:
    item_id: {type: categorical}
model: {dim: 8, doc: {embedding_dim: 8}}
"""


def write_shop(folder: Path, days: range) -> funnel_days.Shop:
    """Write tables with one event per user and hour, and a new item per day."""
    hours = np.arange(days.start * 24, days.stop * 24)
    events = pd.DataFrame(
        {
            "user_id": np.repeat(["u0", "u1", "u2"], len(hours)),
            "item_id": [f"i{n % 7}" for n in range(3 * len(hours))],
            "timestamp": START + np.tile(hours, 3) * 3600,
        }
    )
    available = [START - DAY] * 7 + [START + day * DAY for day in days]  # a new item per day
    items = pd.DataFrame({"item_id": [f"i{n}" for n in range(len(available))], "available_from": available})
    events.to_parquet(folder / "events.parquet")
    items.to_parquet(folder / "items.parquet")
    (folder / "config.yaml").write_text(CONFIG)
    return funnel_days.Shop(folder, folder / "config.yaml", ())


def test_a_night_has_the_events_before_its_day_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = write_shop(tmp_path, range(10))
    newest: list[int] = []

    def record(config: Path, overrides: list[str]) -> SimpleNamespace:
        data_dir = next(value for value in overrides if value.startswith("data.dir=")).removeprefix("data.dir=")
        dataset = Dataset.open(data_dir)
        days = [request_days(dataset, rows).max() for rows in dataset.iterate("train", 100)]
        newest.append(int(max(days)) - START // DAY)
        return SimpleNamespace(best=tmp_path)

    monkeypatch.setattr(funnel_days.bigdssm, "pretrain", record)
    models, _ = funnel_days.nightly_models(shop, "nights", range(7, 10))
    assert list(models) == [7, 8, 9]
    assert newest == [6, 7, 8]


def system(users: list[int], values: list[float]) -> System:
    of_metrics = {metric: np.array(values) for metric in funnel_days.METRICS}
    return System("model", of_metrics, 0.0, query_ids=np.array(users))


def test_users_of_two_seeds_are_distinct() -> None:
    both = funnel_days.pooled([system([1, 2], [0.0, 1.0]), system([1, 2], [1.0, 1.0])])
    assert both.query_ids is not None and len(set(both.query_ids)) == 4
    assert both.values["ndcg_at_10"].tolist() == [0.0, 1.0, 1.0, 1.0]


def test_figures_are_of_the_rows_of_a_group() -> None:
    model = system([1, 1, 2, 3], [0.0, 1.0, 1.0, 0.5])
    chain = system([1, 1, 2, 3], [0.0, 0.5, 0.5, 0.5])
    groups = {"all": np.ones(4, bool), "two": np.array([False, True, True, False])}
    result = funnel_days.figures(model, chain, groups)
    assert result["all"]["requests"] == 4
    assert result["two"]["requests"] == 2
    assert result["two"]["hr_at_10"]["difference"] == pytest.approx(0.5)
    assert result["all"]["ndcg_at_10"]["difference"] == pytest.approx(0.25)
