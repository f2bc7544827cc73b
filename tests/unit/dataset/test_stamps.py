"""Stamps of a dataset's states: they grow with every build and append, and are no part of its content."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from bigdssm.config import DataConfig
from bigdssm.dataset import stamps
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.stamps import FIRST_STAMP, STAMPS_FILE, describe_stamp, read_stamps
from bigdssm.errors import DataError
from bigdssm.features import Categorical, Text
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestTarget
from bigdssm.ingest.pairs import ItemTables, make_items
from tests.tiny_datasets import Writer

CONFIG = DataConfig(time_unit="s", query={}, doc={"item_id": Categorical(), "name": Text(max_tokens=4)})


def build(folder: Path, items: list[str], *, overwrite: bool = False) -> Dataset:
    """Write a dataset of one user and some items to FOLDER/data."""
    folder.mkdir(exist_ok=True)
    (folder / "items.csv").write_text("item_id,name\n" + "".join(f"{item},tea {item}\n" for item in items))
    events = "".join(f"u,{item},{number}\n" for number, item in enumerate(items))
    (folder / "events.csv").write_text("user_id,item_id,timestamp\n" + events)
    tables = InteractionTables(folder / "events.csv", folder / "items.csv", split="train")
    make_interactions(CONFIG, tables, IngestTarget(folder / "data", "all", processes=1, overwrite=overwrite))
    return Dataset.open(folder / "data")


def append(folder: Path, name: str, gone: str = "a") -> Dataset:
    """Append a partition that withdraws an item."""
    (folder / "gone.csv").write_text(f"item_id\n{gone}\n")
    target = IngestTarget(folder / "data", name, append=True, processes=1)
    make_items(CONFIG, ItemTables(withdrawn=folder / "gone.csv"), target)
    return Dataset.open(folder / "data")


def test_every_build_and_append_has_a_later_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also within a millisecond, with a clock that goes back, and of a state that the folder had before."""
    clock = iter([5_000_000_000_000, 5_000_000_000_000, 1, 7_000_000_000_000, 6_000_000_000_000])
    monkeypatch.setattr(stamps.time, "time_ns", lambda: next(clock) * 1_000_000)
    first = build(tmp_path, ["a", "b", "c"])
    found = [first.stamp, append(tmp_path, "noon").stamp, append(tmp_path, "night", "b").stamp]
    assert found == [5_000_000_000_000, 5_000_000_000_001, 5_000_000_000_002]
    states = read_stamps(tmp_path / "data")
    assert states[first.fingerprint] == first.stamp and len(states) == 3
    again = build(tmp_path, ["a", "b", "c"], overwrite=True)
    assert (again.fingerprint, again.stamp) == (first.fingerprint, 7_000_000_000_000)
    assert build(tmp_path, ["b", "c"], overwrite=True).stamp == 7_000_000_000_001
    assert len(read_stamps(tmp_path / "data")) == 4, "states of before, too"


def test_a_stamp_is_no_part_of_the_content(tmp_path: Path) -> None:
    one, other = (build(tmp_path / name, ["a", "b"]) for name in ("one", "other"))
    assert one.fingerprint == other.fingerprint and abs(one.stamp - time.time() * 1000) < 60_000
    (other.dir / STAMPS_FILE).unlink()
    assert Dataset.open(other.dir).fingerprint == one.fingerprint
    shutil.copytree(one.dir, tmp_path / "copy")
    assert Dataset.open(tmp_path / "copy").stamp == one.stamp


def test_a_dataset_without_stamps_counts_its_partitions(tmp_path: Path) -> None:
    folder = Writer(tmp_path / "tiny").write("one", "two")
    assert Dataset.open(folder).stamp == 2 and describe_stamp(2) == "of 2 partitions and unknown time"
    dataset = build(tmp_path / "shop", ["a", "b"])
    (dataset.dir / STAMPS_FILE).unlink()
    assert Dataset.open(dataset.dir).stamp == 1
    assert append(tmp_path / "shop", "noon").stamp > FIRST_STAMP > 10**6


@pytest.mark.parametrize("content", ["[1]", "{", '{"a": 3}', '{"a": "x"}'])
def test_damaged_stamps_are_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / STAMPS_FILE).write_text(content)
    with pytest.raises(DataError, match=rf"{STAMPS_FILE} is damaged: .*; copy the dataset whole"):
        read_stamps(tmp_path)
    (tmp_path / STAMPS_FILE).write_text(json.dumps({"a": FIRST_STAMP}))
    assert read_stamps(tmp_path) == {"a": FIRST_STAMP}
