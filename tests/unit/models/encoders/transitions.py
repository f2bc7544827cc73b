"""Events with actions, and a config whose history encoder counts transitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bigdssm.config import Config, load_config

TABLE = "query_past"
D, NUM_ITEMS, NUM_USERS, START = 4, 12, 9, 1_700_000_000
ACTIONS = ("view", "cart")


def events(count: int, num_items: int = NUM_ITEMS, actions: tuple[str, ...] = ACTIONS) -> list[dict[str, Any]]:
    random = np.random.RandomState(0)
    return [
        {
            "user_id": f"u{random.randint(NUM_USERS)}", "item_id": f"i{random.randint(num_items)}",
            "timestamp": START + 60 * number, "action": actions[random.randint(len(actions))],
        }
        for number in range(count)
    ]  # fmt: skip


def items(count: int = NUM_ITEMS) -> list[dict[str, Any]]:
    return [{"item_id": f"i{number}"} for number in range(count)]


def write_config(folder: Path, *overrides: str) -> Config:
    content = {
        "run": {"dir": str(folder / "run"), "trackers": []}, "pretrain": {"rows_global": 8, "steps": 1},
        "data": {
            "dir": str(folder / "dataset"), "lanes": 1, "targets_per_row": 4, "exclude_seen": False,
            "event": {"action": {"type": "categorical"}}, "request": ["action"], "empty_histories": True,
            "query": {"past": {"type": "history", "of": "item_id", "max_items": 6}},
            "doc": {"item_id": {"type": "categorical"}},
        },
        "model": {
            "dim": D, "score": "dot", "beta": "document",
            "query": {
                "residual": "past", "mlp": [],
                "history": {"positions": "relative", "transition": "action", "transition_dropout": 0.0},
            },
            "doc": {"residual": "item_id", "mlp": [], "embedding_dim": D},
        },
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_config(path, overrides)
