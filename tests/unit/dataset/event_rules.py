"""Random events with rules for targets and exclusions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from bigdssm.dataset.dataset import Dataset
from bigdssm.features import Session
from tests.unit.ingest.events import CONFIG, EVENT, rows_of_events

RULED = replace(CONFIG, event={**EVENT, "session": Session()}, query={"past": CONFIG.query["past"]})
Known = set[tuple[str, int]]
START = 1_700_000_000


def drawn(seed: int, number: int = 250) -> list[dict[str, Any]]:
    """Draw events with sessions, few items, and many at the time of another one."""
    random = np.random.RandomState(seed)
    return [
        {
            **row, "item_id": f"i{random.randint(6)}", "timestamp": row["timestamp"] // 2000 * 2000,
            "session": [None, *"abcdefg"][random.randint(8)],
        }
        for row in rows_of_events(seed, number, START)
    ]  # fmt: skip


def known_to(events: list[dict[str, Any]], position: int, request: bool) -> list[dict[str, Any]]:
    """Return the history of the query of the event at `position`."""
    if not request:
        return events[:position]
    return [event for event in events if event["timestamp"] < events[position]["timestamp"]]


def keys_of(dataset: Dataset, rows: Any) -> list[tuple[str, int]]:
    table, position = rows.sequences, rows.position
    users = table.strings("query_key", rows.sequence[rows.row_of_query])
    return list(zip(users, position.tolist(), strict=True))
