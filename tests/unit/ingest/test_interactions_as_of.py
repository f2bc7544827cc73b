"""User features as of each row agree with a straightforward reference; search uses the newest ones."""

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
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Categorical, History, Numeric
from bigdssm.features.ragged import Ragged
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestTarget
from bigdssm.retrieval.queries import read_user

QUERY = {"past": History(of="item", max_items=5), "age": Numeric(), "jobs": Categorical(multi=True)}
CONFIG = DataConfig(dir="", time_unit="s", query=QUERY, doc={"item": Categorical(column="item_id")}, targets_per_row=3)
Known = tuple[float | None, tuple[str, ...]]
NOTHING: Known = (None, ())


def write_tables(folder: Path, *, seed: int = 0, first: int = 0) -> dict[str, list[tuple[Any, ...]]]:
    """Write unordered tables with many equal times and some users without rows; return their rows."""
    random = np.random.RandomState(seed)
    items = [(f"i{n}",) for n in range(30)]
    events = [(f"u{random.randint(40)}", f"i{random.randint(30)}", first + random.randint(50)) for _ in range(600)]
    users = [
        (f"u{random.randint(36)}", first + random.randint(60) - 5, float(row), [f"j{n}" for n in range(row % 3)])
        for row in range(200)
    ]
    tables = {
        "items": (["item_id"], items),
        "events": (["user_id", "item_id", "timestamp"], events),
        "users": (["user_id", "since", "age", "jobs"], users),
    }
    folder.mkdir(exist_ok=True)
    for name, (columns, rows) in tables.items():
        pq.write_table(pa.table(dict(zip(columns, zip(*rows, strict=True), strict=True))), folder / f"{name}.parquet")
    return {name: rows for name, (_, rows) in tables.items()}


def make(folder: Path, out: Path, *, since: str | None = "since", partition: str = "base", **options: Any) -> Dataset:
    paths = [folder / f"{name}.parquet" for name in ("events", "items", "users")]
    tables = InteractionTables(*paths, users_time_column=since, **options)
    make_interactions(CONFIG, tables, IngestTarget(out, partition, append=out.exists(), processes=1))
    return Dataset.open(out)


def as_of(users: list[tuple[Any, ...]], user: str, time: float) -> Known:
    known = NOTHING
    newest = -np.inf
    for key, since, age, jobs in users:
        if key == user and newest <= since <= time:
            newest, known = since, (age, tuple(jobs))
    return known


def jobs_of(dataset: Dataset, column: Ragged, row: int) -> tuple[str, ...]:
    names = list(dataset.schema.query["jobs"].vocabulary)
    return tuple(names[code - 2] for code in column.values[column.offsets[row] : column.offsets[row + 1]].tolist())


def known_of(dataset: Dataset, query: dict[str, Any], row: int) -> Known:
    age = float(query["age"][row])
    return None if np.isnan(age) else age, jobs_of(dataset, query["jobs"], row)


def check(dataset: Dataset, split: str, events: list[tuple[Any, ...]], users: list[tuple[Any, ...]]) -> int:
    """Compare every row of the split with the tables; return the number of rows without user features."""
    assert dataset.sequences is not None
    unknown, index = 0, dataset.index(split)
    times: dict[str, list[float]] = {}
    for user, _, time in sorted(events, key=lambda event: event[2]):
        times.setdefault(user, []).append(time)
    for block in range(index.num_blocks):
        ids = np.arange(index.first_row[block], index.first_row[block + 1])
        batch, bad = read_block(index, block, dataset.layout)
        assert batch is not None and not bad
        rows = dataset.rows(split, 0, ids, batch)
        keys = dataset.sequences.strings("query_key", rows.sequence)
        first = batch.column("first").to_pylist()
        for row, key in enumerate(keys):
            expected = as_of(users, key, times[key][first[row]])
            assert known_of(dataset, rows.query, row) == expected
            unknown += expected == NOTHING
    return unknown


@pytest.mark.parametrize("split", ["time", "leave-one-out"])
def test_every_row_sees_the_newest_of_its_users_rows_that_is_not_younger(split: Any, tmp_path: Path) -> None:
    known = write_tables(tmp_path)
    dataset = make(tmp_path, tmp_path / "out", split=split)
    users = known["users"]
    assert len({(user, since) for user, since, *_ in users}) < len(users), "the test is of ties, too"
    splits = ("train", "validation", "test")
    assert sum(check(dataset, name, known["events"], users) for name in splits) > 10
    assert dataset.num_queries("train") > dataset.num_rows("train"), "pieces of several targets"
    for user in ("u3", "u7", "u38"):
        assert known_of(dataset, read_user(dataset, user)[0], 0) == as_of(users, user, np.inf)


def test_search_and_evaluation_use_the_features_of_their_time(tmp_path: Path) -> None:
    tables = {
        "events": {"user_id": ["u"] * 4, "item_id": ["a", "b", "a", "b"], "timestamp": [1, 2, 3, 4]},
        "items": {"item_id": ["a", "b"]},
        "users": {"user_id": ["u"] * 3, "since": [9, 2, 3], "age": [90.0, 20.0, 30.0], "jobs": [["z"], ["x"], ["y"]]},
    }
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    dataset = make(tmp_path, tmp_path / "out")
    for split, age in (("train", 20), ("validation", 30), ("test", 30)):
        assert [rows.query["age"].tolist() for rows in dataset.iterate(split, 10)] == [[age]]
    assert read_user(dataset, "u")[0]["age"].tolist() == [90]


def test_a_dataset_grows_with_rows_of_both_days(tmp_path: Path) -> None:
    first, second = write_tables(tmp_path / "1"), write_tables(tmp_path / "2", seed=1, first=100)
    make(tmp_path / "1", tmp_path / "out")
    dataset = make(tmp_path / "2", tmp_path / "out", partition="second", split="train")
    assert check(Dataset.open(tmp_path / "out", ["base"]), "test", first["events"], first["users"])
    both = [*first["events"], *second["events"]]
    assert check(Dataset.open(tmp_path / "out", ["second"]), "train", both, second["users"])
    assert dataset.num_rows("train") > Dataset.open(tmp_path / "out", ["base"]).num_rows("train")
    with pytest.raises(ConfigError, match="has user features as of each row, so give --users-time-column here, too"):
        make(tmp_path / "2", tmp_path / "out", since=None, partition="third")
    users = pq.read_table(tmp_path / "1" / "users.parquet")
    once = np.unique(users.column("user_id").to_pylist(), return_index=True)[1]
    pq.write_table(users.take(once), tmp_path / "1" / "users.parquet")
    make(tmp_path / "1", tmp_path / "plain", since=None)
    with pytest.raises(ConfigError, match="has one row of features per user, so leave out --users-time-column"):
        make(tmp_path / "2", tmp_path / "plain", partition="second")


def test_invalid_time_columns_of_users_are_refused(tmp_path: Path) -> None:
    write_tables(tmp_path)
    with pytest.raises(ConfigError, match="--users-time-column since needs a --time-column of the events"):
        make(tmp_path, tmp_path / "out", time_column=None)
    tables = InteractionTables(tmp_path / "events.parquet", tmp_path / "items.parquet", users_time_column="since")
    with pytest.raises(ConfigError, match="--users-time-column since needs a users table"):
        make_interactions(CONFIG, tables, IngestTarget(tmp_path / "out"))
    for name, column, seconds in (("events", 2, 1.7e9), ("users", 1, 1.7e12)):
        table = pq.read_table(tmp_path / f"{name}.parquet")
        moved = pa.array(np.asarray(table.column(column), np.float64) + seconds)
        table = table.set_column(column, table.column_names[column], moved)
        pq.write_table(table, tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match=r"events.parquet, .* with .*users.parquet, column 'since', mixes units"):
        make(tmp_path, tmp_path / "out", time_unit="auto")
