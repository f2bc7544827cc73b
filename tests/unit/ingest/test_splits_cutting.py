"""Rows with several targets agree with a straightforward reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bigdssm.config import DataConfig
from bigdssm.dataset.blocks import read_block
from bigdssm.dataset.dataset import Dataset
from bigdssm.features import Categorical, History
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestTarget

Piece = tuple[str, int, int]  # user, position of the first target, position after the last
CONFIG = DataConfig(
    dir="", time_unit="s", query={"past": History(of="item", max_items=5)}, doc={"item": Categorical(column="item_id")},
    targets_per_row=3,
)  # fmt: skip


def pieces_of(dataset: Dataset, split: str) -> list[Piece]:
    assert dataset.sequences is not None
    found, index = list[Piece](), dataset.index(split)
    for block in range(index.num_blocks):
        ids = np.arange(index.first_row[block], index.first_row[block + 1])
        batch, bad = read_block(index, block, dataset.layout)
        assert batch is not None and not bad
        users = dataset.sequences.strings("query_key", dataset.rows(split, 0, ids, batch).sequence)
        found += zip(users, batch.column("first").to_pylist(), batch.column("end").to_pylist(), strict=True)
    return found


def cut(positions: list[int], most: int) -> list[tuple[int, int]]:
    """Cut each run of consecutive positions into full pieces from the newest; the oldest may be shorter."""
    pieces = list[tuple[int, int]]()
    for position in reversed(positions):
        if pieces and pieces[-1][0] == position + 1 and pieces[-1][1] - pieces[-1][0] < most:
            pieces[-1] = (position, pieces[-1][1])
        else:
            pieces.append((position, position + 1))
    return pieces


@pytest.mark.parametrize("split", ["time", "leave-one-out", "train"])
def test_pieces_are_cut_from_the_newest_target_on(split: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"SEQUENCES_PER_FILE": 40, "SEQUENCES_AT_ONCE": 7, "EVENTS_PER_FILE": 150}.items():
        monkeypatch.setattr(f"bigdssm.ingest.cutting.{name}", size)
    random = np.random.RandomState(0)
    users = [f"u{n}" for n in random.randint(0, 100, 800)]
    times = random.randint(0, 60, len(users))
    items = {"item_id": [f"i{n}" for n in range(9)]}
    events = {"user_id": users, "item_id": [f"i{n}" for n in random.randint(0, 9, len(users))], "timestamp": times}
    for name, columns in {"items": items, "events": events}.items():
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    tables = InteractionTables(
        tmp_path / "events.parquet", tmp_path / "items.parquet", split=split, validation_fraction=0.2, test_fraction=0.2
    )
    make_interactions(CONFIG, tables, IngestTarget(tmp_path / "out", processes=1))

    first, second = np.sort(times)[[int(len(times) * share) for share in (0.6, 0.8)]]
    expected: dict[str, list[Piece]] = {"train": [], "validation": [], "test": []}
    for user in set(users):
        own = sorted(time for time, who in zip(times, users, strict=True) if who == user)
        splits = {
            "time": ["test" if time >= second else "validation" if time >= first else "train" for time in own],
            "leave-one-out": ["train"] * (len(own) - 2) + ["validation", "test"][-len(own) :],
            "train": ["train"] * len(own),
        }[split]
        for name in expected:
            places = [place for place in range(1, len(own)) if splits[place] == name]
            expected[name] += [(user, *piece) for piece in cut(places, 3 if name == "train" else 1)]
    dataset = Dataset.open(tmp_path / "out")
    made = {name: sorted(pieces_of(dataset, name)) if pieces else [] for name, pieces in expected.items()}
    assert made == {name: sorted(pieces) for name, pieces in expected.items()}
    assert {end - first for _, first, end in made["train"]} == {1, 2, 3}
