"""Small data frames and the arguments that build a dataset of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import yaml

import bigdssm

ITEMS = pd.DataFrame({"item_id": [f"i{i}" for i in range(20)]})
EVENTS = pd.DataFrame(
    {
        "user_id": [f"u{i % 9}" for i in range(90)],
        "item_id": [f"i{i % 20}" for i in range(90)],
        "timestamp": range(1_500_000_000, 1_500_000_090),
    }
)


def make(folder: Path, **arguments: Any) -> Any:
    """Build a dataset from events, or from pairs if these are passed."""
    features = {
        True: {"query": {"word": {"type": "categorical"}}, "doc": {"title": {"type": "categorical"}}},
        False: {
            "query": {"history": {"type": "history", "of": "item_id"}}, "doc": {"item_id": {"type": "categorical"}},
        },
    }["pairs" in arguments]  # fmt: skip
    content = {"run": {"dir": str(folder / "run")}, "data": {"dir": str(folder / "data"), **features}}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    tables = {} if "pairs" in arguments else {"interactions": EVENTS, "items": ITEMS}
    return bigdssm.make_dataset(folder / "config.yaml", **{"processes": 1, **tables, **arguments})
