"""A dataset with users and items to delete, and a run trained on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

import bigdssm
from bigdssm.commands import build_index, embed, mine_negatives
from bigdssm.config import load_config
from bigdssm.utils.hashing import file_checksum, hash64

CONFIG: dict[str, Any] = {
    "data": {
        "time_unit": "s",
        "lanes": 2, "title": "title", "targets_per_row": 3, "tokenizer": {"vocab_size": 300},
        "query": {
            "past": {"type": "history", "of": "item_id", "max_items": 4}, "user_id": {"type": "categorical"},
            "town": {"type": "categorical"},
        },
        "event": {"session": {"type": "categorical"}}, "filter": {"shelf": {"type": "categorical"}},
        "doc": {
            "item_id": {"type": "categorical"}, "title": {"type": "text", "max_tokens": 16},
            "maker": {"type": "categorical"}, "price": {"type": "numeric"},
            "color": {"type": "vector", "dim": 3}, "tags": {"type": "categorical", "multi": True, "separator": "|"},
        },
    },
    "model": {
        "dim": 8,
        "query": {"residual": "past", "mlp": [], "embedding_dim": 8, "history": {"positions": "relative"}},
        "doc": {"residual": "item_id", "mlp": [], "embedding_dim": 8, "text": {"layers": 1, "hidden": 8, "heads": 1}},
    },
    "pretrain": {
        "rows_global": 8, "steps": 4, "optimizer": {"lr": 0.05, "warmup_steps": 0}, "validate_every_steps": 2,
        "save_every_steps": 2, "keep_checkpoints": 9,
    },
}  # fmt: skip
SHARDED = [
    "data.query.user_id.hash_buckets=4611686018427387904", "model.tables.rows=[query.user_id,doc.item_id]",
    "pretrain.table_optimizer.name=rowwise_adagrad",
]  # fmt: skip


def user(number: int) -> str:
    return f"user-{hash64(f'u{number}') % 2**64:016x}"


def item(number: int) -> str:
    return f"item-{hash64(f'i{number}') % 2**64:016x}"


def add_day(folder: Path, day: int, users: int, items: int, **options: Any) -> None:
    """Build a dataset, or append a day with a new version of item 1; tables have bad rows that name ids."""
    random = np.random.RandomState(day)
    number = np.repeat(np.arange(users), 6)
    bought = random.randint(0, items, len(number))
    events = pd.DataFrame({
        "user_id": [user(n) for n in number], "item_id": [item(n) for n in bought],
        "timestamp": 1000.0 * day + np.tile(np.arange(6), users), "session": [f"s-{user(n)}" for n in number],
    })  # fmt: skip
    events.loc[len(events)] = [user(1), f"no {item(2)}", 5.0, ""]
    rows = pd.DataFrame({
        "item_id": [item(n) for n in range(items)], "title": [f"tea of {item(n)}" for n in range(items)],
        "maker": [f"maker {n % 4}" if n % 3 else f"m-{item(n)}" for n in range(items)], "price": 1.0 + np.arange(items),
        "shelf": [f"shelf {item(n)}" if n % 2 else "shelf" for n in range(items)],
        "color": [[n, 1.0, 2.0] for n in range(items)], "tags": [f"t-{item(n)}|common" for n in range(items)],
    })  # fmt: skip
    rows.loc[rows["item_id"] == item(1), "price"] = 100.0 + day
    people = pd.DataFrame({"user_id": [user(n) for n in range(users)], "town": [f"w{n % 3}" for n in range(users)]})
    people.loc[len(people)] = [user(users + 1), "w0"]  # without events, and in the vocabulary
    bigdssm.make_dataset(
        folder / "config.yaml", interactions=events, items=rows, users=people, partition=f"day{day}", append=day > 0,
        **options,
    )  # fmt: skip


def write_config(folder: Path) -> None:
    content = {**CONFIG, "run": {"dir": str(folder / "run"), "trackers": []}}
    content["data"] = {**CONFIG["data"], "dir": str(folder / "data"), "max_bad_fraction": 0.1}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))


def checksums(*folders: Path) -> dict[str, str]:
    return {str(path): file_checksum(path) for folder in folders for path in folder.rglob("*") if path.is_file()}


def trained(folder: Path, users: int, items: int, overrides: Sequence[str] = ()) -> Path:
    """Return a folder with a dataset, a run with mined negatives, vectors and indexes."""
    folder.mkdir()
    write_config(folder)
    mining = ["pretrain.negatives.hard=2", "pretrain.negatives.mining.first=1", "pretrain.negatives.mining.last=5"]
    content = load_config(folder / "config.yaml", [*mining, *overrides]).to_dict()
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    add_day(folder, 0, users, items)
    bigdssm.pretrain(folder / "config.yaml")
    (folder / "run/pretrain/checkpoints/damaged-step-00000001").mkdir()
    model, data = str(folder / "run/pretrain/best"), str(folder / "data")
    vectors = str(folder / "vectors")
    formats = ["--format", "parquet", "--format", "fvecs"]
    assert embed.main(["--model", model, "--data", data, "--out", vectors, *formats]) == 0
    for kind in ("flat", "hnsw", "ivf", "sq8"):
        assert build_index.main(["--vectors", vectors, "--out", str(folder / f"{kind}-index"), "--type", kind]) == 0
    out = str(folder / "negatives.npy")
    assert mine_negatives.main(["--model", model, "--data", data, "--out", out, "--first", "0", "--last", "4"]) == 0
    return folder
