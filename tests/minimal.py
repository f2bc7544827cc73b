"""The smallest valid config."""

from __future__ import annotations

MINIMAL = {
    "run": {"dir": "runs/x"},
    "data": {
        "dir": "data/x",
        "lanes": 8,
        "query": {"history": {"type": "history", "of": "item"}},
        "doc": {"item": {"type": "categorical"}, "tags": {"type": "categorical", "multi": True}},
    },
}
