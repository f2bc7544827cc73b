"""Appends of events, and their splits.

Newer events are added, repeated ones are counted, older ones and other units are refused; the recorded split is used.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bigdssm.config import DataConfig
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import TIME_COLUMN
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Categorical, History
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestReport, IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs

DOC = {"item": Categorical(column="item_id")}
CONFIG = DataConfig(dir="", time_unit="s", query={"past": History(of="item", max_items=9)}, doc=DOC)
LENIENT = DataConfig(dir="", query=CONFIG.query, doc=DOC, max_bad_fraction=0.5)
Event = tuple[str, str, float, float]
FIRST: list[Event] = [("u", "i0", 10, 3), ("u", "i1", 20, 4), ("u", "i1", 20, 5), ("v", "i0", 5, 1), ("v", "i2", 6, 1)]


def make(
    folder: Path, events: list[Event], partition: str | None = None, config: DataConfig = CONFIG, **options: Any
) -> IngestReport:
    lines = ["user_id,item_id,timestamp,rating", *(",".join(map(str, event)) for event in events)]
    (folder / "events.csv").write_text("\n".join(lines) + "\n")
    (folder / "items.csv").write_text("item_id\n" + "".join(f"i{i}\n" for i in range(6)))
    tables = InteractionTables(
        folder / "events.csv", folder / "items.csv", rating_column="rating", **{"split": "train", **options}
    )
    target = IngestTarget(folder / "out", partition or "base", append=partition is not None, processes=1)
    return make_interactions(config, tables, target)


def sequence_of(folder: Path, user: str) -> tuple[list[str], list[float]]:
    """Return the items and times of a user's sequence in the newest partition that has it."""
    dataset = Dataset.open(folder / "out")
    assert dataset.sequences is not None
    keys = dataset.sequences.strings("query_key", np.arange(dataset.sequences.num_rows))
    row = np.array([max(number for number, key in enumerate(keys) if key == user)])
    items, times = (dataset.sequences.take(name, row) for name in ("items", TIME_COLUMN))
    return dataset.catalogue.keys(items[0]), times[0].tolist()  # type: ignore[index]


def test_sequences_are_extended_by_time(tmp_path: Path) -> None:
    make(tmp_path, FIRST)
    make(tmp_path, [("u", "i3", 30, 1), ("w", "i5", 1, 1), ("u", "i2", 20, 1), ("w", "i4", 2, 1)], "day2")
    make(tmp_path, [("u", "i0", 30.5, 1)], "day3")
    assert sequence_of(tmp_path, "u") == (["i0", "i1", "i1", "i2", "i3", "i0"], [10, 20, 20, 20, 30, 30.5])
    assert sequence_of(tmp_path, "w") == (["i5", "i4"], [1, 2])


@pytest.mark.parametrize(
    ("events", "left", "repeated"),
    [
        pytest.param([*FIRST, ("v", "i3", 7, 1)], 1, 5, id="the same table again, and more"),
        pytest.param([("u", "i1", 20, 6), ("u", "i2", 20, 4)], 2, 0, id="of the newest time, but others"),
        pytest.param([("u", "i1", 20, 4)] * 3 + [("u", "i1", 21, 4)] * 2, 2, 3, id="a newer one given twice stays"),
        pytest.param([("u", "i0", 10, 3), ("new", "i0", 10, 3), ("new", "i1", 10, 3)], 2, 1, id="another user's"),
    ],
)
def test_repeats_are_counted_and_left_out(tmp_path: Path, events: list[Event], left: int, repeated: int) -> None:
    make(tmp_path, FIRST)
    report = make(tmp_path, events, "day2")
    assert [note for note in report.notes if "already" in note] == (
        [f"{repeated} interactions are in {tmp_path / 'out'} already and are dropped"] if repeated else []
    )
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.sequences is not None
    own = dataset.partitions[1].content["sequences"][0]["rows"]
    users = np.arange(dataset.sequences.num_rows - own, dataset.sequences.num_rows)
    before = {"u": 3, "v": 2}
    keys, lengths = dataset.sequences.strings("query_key", users), dataset.sequences.lengths("items", users)
    assert sum(lengths) - sum(before.get(key, 0) for key in keys) == left


def test_an_append_without_new_rows_is_refused(tmp_path: Path) -> None:
    make(tmp_path, FIRST)
    with pytest.raises(DataError, match=r"no interactions remain to train on; 5 interactions are in .*/out already"):
        make(tmp_path, FIRST, "day2")
    assert [partition.name for partition in Dataset.open(tmp_path / "out").partitions] == ["base"]


OLDER: list[Event] = [("u", "i2", 15, 1), ("u", "i4", 30, 1), ("v", "i4", 30, 1), ("v", "i1", 5, 2)]


def test_older_events_are_refused(tmp_path: Path) -> None:
    make(tmp_path, FIRST)
    with pytest.raises(DataError) as refused:
        make(tmp_path, OLDER, "day2")
    assert "2 of 10 rows are bad" in str(refused.value), "the six items are rows, too"
    assert "row 1: timestamp is 15, older than 20, the newest event of its user in the dataset" in str(refused.value)
    assert [partition.name for partition in Dataset.open(tmp_path / "out").partitions] == ["base"]


@pytest.mark.parametrize("options", [{}, {"min_rating": 1.0}])
def test_older_events_within_the_bad_row_limit_are_left_out(tmp_path: Path, options: dict[str, Any]) -> None:
    make(tmp_path, FIRST)
    assert make(tmp_path, OLDER, "day2", LENIENT, **options).num_bad == 2
    assert sequence_of(tmp_path, "u") == (["i0", "i1", "i1", "i4"], [10, 20, 20, 30])
    assert sequence_of(tmp_path, "v") == (["i0", "i2", "i4"], [5, 6, 30])


@pytest.mark.parametrize("units", [(1, 1000), (1000, 1), (1_000_000, 1)])
def test_another_unit_of_time_than_the_datasets_is_refused(tmp_path: Path, units: tuple[int, int]) -> None:
    first, second = units
    config = replace(CONFIG, time_unit="auto")
    make(tmp_path, [("u", f"i{day}", (1_700_000_000 + day) * first, 1) for day in range(3)], config=config)
    unit = {1: "s", 1000: "ms", 1_000_000: "us"}[first]
    with pytest.raises(DataError, match=rf"3 × timestamp is …, needs a time of … to … in {unit}; .* of 1975 to 2100"):
        make(tmp_path, [("u", f"i{day}", (1_700_000_000 + day) * second, 1) for day in range(3, 6)], "day2", config)


@pytest.mark.parametrize("first", ["timestamp", None])
def test_events_have_times_in_all_partitions_or_in_none(tmp_path: Path, first: str | None) -> None:
    make(tmp_path, FIRST, time_column=first)
    with pytest.raises(ConfigError, match="give --time-column here, too" if first else "leave out the time column"):
        make(tmp_path, [("u", "i3", 30, 1)], "day2", time_column=None if first else "timestamp")
    make(tmp_path, [("u", "i3", 30, 1)], "day2", time_column=first)


@pytest.mark.parametrize(
    ("split", "late", "expected"),
    [
        pytest.param({"split": "time"}, 1000, {"train": 8}, id="newer than all: train"),
        pytest.param({"split": "time"}, 0, {"train": 3, "validation": 2, "test": 3}, id="other users of the same days"),
        pytest.param({"split": "time", "validation_fraction": 0.0, "test_fraction": 0.0}, 0, {"train": 8}, id="none"),
        pytest.param(
            {"split": "time", "validation_from": 13, "test_from": 15, "until": 17}, 0,
            {"train": 4, "validation": 2, "test": 2}, id="from --until on: train",
        ),
        pytest.param({"split": "train"}, 0, {"train": 8}, id="train"),
        pytest.param({"split": "leave-one-out"}, 0, {"train": 4, "validation": 2, "test": 2}, id="leave-one-out"),
        pytest.param({"split": None}, 0, {"train": 4, "validation": 2, "test": 2}, id="the default"),
    ],
)  # fmt: skip
def test_events_are_split_as_the_datasets_were(
    tmp_path: Path, split: dict[str, Any], late: int, expected: dict[str, int]
) -> None:
    """Two users with five events each, at 10 to 19, followed by other users with as many."""

    def events(users: str, first: int) -> list[Event]:
        return [(users[n % 2], f"i{n % 6}", first + n, 1) for n in range(10)]

    fractions = {"validation_fraction": 0.25, "test_fraction": 0.25} if split["split"] == "time" else {}
    given = split if "validation_from" in split else {**fractions, **split}
    make(tmp_path, events("uv", 10), **given)
    report = make(tmp_path, events("xy", 10 + late), "day2", split=None)
    assert report.rows == expected


def test_an_append_that_holds_most_out_is_reported(tmp_path: Path) -> None:
    make(tmp_path, [("u", f"i{n}", n, 1) for n in range(5)], split="leave-one-out")
    report = make(tmp_path, [("u", f"i{n}", 10 + n, 1) for n in range(3)], "day2", split=None)
    assert report.rows == {"train": 1, "validation": 1, "test": 1}
    held = "most queries of the partition are held out: 2 of 3; with --split train all are trained on"
    assert held in report.notes
    assert held not in make(tmp_path, [("u", f"i{n}", 20 + n, 1) for n in range(3)], "day3", split="train").notes
    with pytest.raises(DataError, match=r"no train rows remain.* for --split leave-one-out; with --split train all"):
        make(tmp_path, [("u", "i1", 40, 1)], "day4", split=None)


PAIR_CONFIG = DataConfig(dir="", time_unit="s", query={"q": Categorical()}, doc={"d": Categorical()})
# split options, and the expected split by row number
SPLITS: dict[str, tuple[dict[str, Any], Callable[[int], str | None]]] = {
    "random": ({"split": "random", "validation_fraction": 0.3, "test_fraction": 0.3}, lambda row: None),
    "group": ({"split": "random", "split_column": "group", "test_fraction": 0.4}, lambda row: None),
    "time": ({"split": "time", "split_column": "time", "validation_fraction": 0.25, "test_fraction": 0.25},
             lambda row: "train" if row < 50 or row >= 100 else "validation" if row < 75 else "test"),
    "column": ({"split": "column", "split_column": "said"}, lambda row: ["train", "test"][row % 2]),
    "train": ({"split": "train"}, lambda row: "train"),
}  # fmt: skip


def make_pairs_of(folder: Path, rows: range, partition: str | None = None, **options: Any) -> IngestReport:
    """Build a dataset of pairs with distinct queries, grouped by row number modulo 50."""
    lines = [f"q{row},g{row % 50},d{row % 7},{row},{['train', 'test'][row % 2]}" for row in rows]
    (folder / "pairs.csv").write_text("\n".join(["q,group,d,time,said", *lines]) + "\n")
    target = IngestTarget(folder / "out", partition or "base", append=partition is not None, processes=1)
    return make_pairs(PAIR_CONFIG, PairTables((folder / "pairs.csv",), **options), target)


def test_features_may_be_declared_in_another_order(tmp_path: Path) -> None:
    def build(names: str, partition: str | None = None) -> Dataset:
        (tmp_path / "pairs.csv").write_text("q,a,b\n" + "".join(f"q{i},a{i % 5},b{i % 3}\n" for i in range(30)))
        config = DataConfig(dir="", query={"q": Categorical()}, doc={name: Categorical() for name in names})
        target = IngestTarget(tmp_path / "out", partition or "base", append=partition is not None, processes=1)
        make_pairs(config, PairTables((tmp_path / "pairs.csv",), split="train"), target)
        dataset = Dataset.open(tmp_path / "out")
        dataset.check_against(config)
        return dataset

    first, second = build("ab"), build("ba", "more")
    assert list(second.schema.doc) == ["a", "b"] and second.schema == first.schema
    assert second.catalogue.num_docs == first.catalogue.num_docs == 15


@pytest.mark.parametrize("how", SPLITS)
def test_pairs_are_split_as_the_datasets_were(tmp_path: Path, how: str) -> None:
    """The same rows again and, if the split depends on the row alone, newer ones."""
    options, split_of = SPLITS[how]
    base = make_pairs_of(tmp_path, range(100), **options)
    again = make_pairs_of(tmp_path, range(100), "again")
    assert again.rows == base.rows
    assert "all rows equal those of partition base: is it the same table?" in again.notes
    if split_of(0) is not None:
        expected = Counter(split_of(row) for row in range(150, 190))
        assert make_pairs_of(tmp_path, range(150, 190), "newer").rows == expected
    else:
        assert len(base.rows) == 3
        dataset = Dataset.open(tmp_path / "out")
        for split in base.rows:
            first, second = (
                {
                    query
                    for rows in Dataset.open(tmp_path / "out", [name]).iterate(split, 100)
                    for query in rows.query_ids
                }
                for name in ("base", "again")
            )
            assert first == second and len(first) == base.rows[split]
        assert dataset.num_rows("train") == 2 * base.rows["train"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"split": ["time"]}, r"split is \['time'\], needs an object"),
        ({"split": {"how": "column"}}, "split.how is column, needs one of leave-one-out, time, train"),
        ({"split": {"how": "time", "test_from": 1, "train_from": 2}}, "split.validation_from is missing"),
        ({"times": {"units": []}}, "times.num_times is missing"),
        ({"times": 5}, "times is 5, needs an object"),
    ],
)
def test_an_append_names_damaged_fields(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    make(tmp_path, FIRST)
    path = tmp_path / "out" / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(DataError, match=rf"dataset.json is damaged: {words}"):
        make(tmp_path, [("u", "i3", 30, 1)], "day2", split=None)


@pytest.mark.parametrize("split", [{"how": "leave-one-out"}, {"how": "time", "column": "time"}])
def test_an_append_of_pairs_names_damaged_fields(tmp_path: Path, split: dict[str, Any]) -> None:
    make_pairs_of(tmp_path, range(9), split="train")
    path = tmp_path / "out" / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"split": split}))
    with pytest.raises(DataError, match=r"dataset.json is damaged: split\.(how is leave|validation_from is missing)"):
        make_pairs_of(tmp_path, range(9, 12), "day2")


@pytest.mark.parametrize("option", [{"validation_fraction": 0.2}, {"test_from": 5}, {"until": 5}])
def test_options_of_a_split_need_one(tmp_path: Path, option: dict[str, Any]) -> None:
    make(tmp_path, FIRST)
    with pytest.raises(ConfigError, match="needs --split; without it an append uses the split of the dataset at --out"):
        make(tmp_path, [("u", "i3", 30, 1)], "day2", split=None, **option)
    (tmp_path / "pairs").mkdir()
    make_pairs_of(tmp_path / "pairs", range(9), split="train")
    with pytest.raises(ConfigError, match="needs --split"):
        make_pairs_of(tmp_path / "pairs", range(9), "day2", **option)


def test_ratings_stored_in_float32_are_at_least_their_threshold(tmp_path: Path) -> None:
    make(tmp_path, FIRST)  # writes the items
    ratings = pa.array([4.1, 4.3, 4.0, 4.1], pa.float32())
    events = {"user_id": ["u"] * 4, "item_id": ["i0", "i1", "i2", "i3"], "timestamp": [1, 2, 3, 4], "rating": ratings}
    pq.write_table(pa.table(events), tmp_path / "events.parquet")
    tables = InteractionTables(
        tmp_path / "events.parquet", tmp_path / "items.csv", rating_column="rating", split="train", min_rating=4.1
    )
    make_interactions(CONFIG, tables, IngestTarget(tmp_path / "rated", processes=1))
    dataset = Dataset.open(tmp_path / "rated")
    assert dataset.sequences is not None
    (items,) = dataset.sequences.take("items", np.array([0]))
    assert dataset.catalogue.keys(np.asarray(items)) == ["i0", "i1", "i3"]
