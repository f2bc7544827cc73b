"""Interactions with features of events, and the rows of their dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bigdssm.config import DataConfig, load_config
from bigdssm.features import CalendarTime, Categorical, Elapsed, History, Numeric, Timestamp
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestReport, IngestTarget

EVENT = {
    "action": Categorical(column="event_type"), "price": Numeric(log=True), "gap": Elapsed(),
    "hour": CalendarTime(unit="hour_of_week", timezone="Europe/Berlin"), "when": Timestamp(),
}  # fmt: skip
QUERY = {"past": History(of="item", max_items=6), "brands": History(of="brand", max_items=4)}
DOC = {"item": Categorical(column="item_id"), "brand": Categorical()}
CONFIG = DataConfig(dir="", query=QUERY, doc=DOC, event=EVENT, targets_per_row=4)
ITEMS = pa.table({"item_id": [f"i{n}" for n in range(30)], "brand": [f"b{n % 7}" for n in range(30)]})


def rows_of_events(seed: int, number: int, start: int, unit: int = 1) -> list[dict[str, Any]]:
    """Draw events of 12 users in any order, some of them at one time, with missing actions and prices."""
    random = np.random.RandomState(seed)
    return [
        {
            "user_id": f"u{random.randint(12)}",
            "item_id": f"i{random.randint(30)}",
            "timestamp": (start + 7 * n // 3 * int(10 ** random.uniform(0, 3))) * unit,
            "event_type": [None, "view", "cart", "buy"][random.randint(4)],
            "price": None if random.rand() < 0.2 else float(random.randint(1, 99)),
        }
        for n in range(number)
    ]


def make(
    folder: Path, rows: list[dict[str, Any]], partition: str | None = None, config: DataConfig = CONFIG,
    items: pa.Table = ITEMS, **options: Any,
) -> IngestReport:  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "events.parquet")
    pq.write_table(items, folder / "items.parquet")
    tables = InteractionTables(folder / "events.parquet", folder / "items.parquet", **{"split": "time", **options})
    target = IngestTarget(folder / "out", partition or "base", append=partition is not None, processes=1)
    return make_interactions(config, tables, target)


def sequences(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the events by user, in order of time and then of the table."""
    by_user: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["timestamp"]):
        by_user.setdefault(row["user_id"], []).append(row)
    return by_user


def load(folder: Path, history: dict[str, Any] | None = None) -> Any:
    """Return a valid config, with keys of model.query.history."""
    content = {"run": {"dir": "r"}, "data": {"dir": "d", "query": {"past": {"type": "history", "of": "item"}}}}
    content["data"]["doc"] = {"item": {"type": "categorical"}}  # type: ignore[index]
    content["model"] = {"query": {"history": history or {}}}  # type: ignore[dict-item]
    (folder / "config.yaml").write_text(json.dumps(content))
    return load_config(folder / "config.yaml")
