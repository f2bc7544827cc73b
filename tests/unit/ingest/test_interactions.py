"""Interactions give exactly the leave-one-out rows of a straightforward reference implementation."""

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from bigdssm.config import DataConfig, load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Categorical, History, Numeric, Ragged
from bigdssm.features.canonical import columns_of_values
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestTarget
from bigdssm.retrieval.queries import PastEvents, histories

HISTORY = History(of="item", max_items=5)
CONFIG = DataConfig(dir="", time_unit="s", query={"past": HISTORY}, doc={"item": Categorical(column="item_id")})
Row = tuple[str, tuple[str, ...], str]


def rows_of(dataset: Dataset, split: str) -> list[Row]:
    """Return (user, earlier items, item) of every row of the split, in dataset order."""
    found = []
    for rows in dataset.iterate(split, 100):
        assert rows.sequence is not None and dataset.sequences is not None
        users = dataset.sequences.strings("query_key", rows.sequence)
        targets = dataset.catalogue.keys(rows.doc_rows)
        for i in range(len(rows)):
            found.append((users[i], tuple(dataset.catalogue.keys(rows.seen(i))), targets[i]))
    return found


def write(
    folder: Path, events: list[tuple[Any, ...]], items: int = 6, header: str = "user_id,item_id,timestamp"
) -> None:
    lines = [header, *(",".join(map(str, event)) for event in events)]
    (folder / "events.csv").write_text("\n".join(lines) + "\n")
    (folder / "items.csv").write_text("item_id\n" + "".join(f"i{i}\n" for i in range(items)))


def make(folder: Path, config: DataConfig = CONFIG, out: str = "out", **options: Any) -> Dataset:
    target = IngestTarget(folder / out, **{k: options.pop(k) for k in ("seed", "partition", "append") if k in options})
    make_interactions(config, InteractionTables(folder / "events.csv", folder / "items.csv", **options), target)
    return Dataset.open(folder / out)


def test_rows_equal_a_brute_force_reading(tiny_interactions: Any) -> None:
    dataset = Dataset.open(tiny_interactions.dir)
    events: dict[str, list[tuple[float, str]]] = {}
    with (tiny_interactions.source / "interactions.csv").open() as stream:
        for event in csv.DictReader(stream):
            events.setdefault(event["user_id"], []).append((float(event["timestamp"]), event["item_id"]))
    expected: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for user, own in events.items():
        items = [item for _, item in sorted(own, key=lambda event: event[0])]
        for i in range(1, len(items)):
            split = {len(items) - 1: "test", len(items) - 2: "validation"}.get(i, "train")
            expected[split].append((user, tuple(items[:i]), items[i]))
    for split, rows in expected.items():
        assert Counter(rows_of(dataset, split)) == Counter(rows)
    assert rows_of(dataset, "test") == expected["test"], "held-out rows stay in source order"
    assert rows_of(dataset, "train") != expected["train"], "train rows are shuffled"
    positives = Counter(item for _, _, item in expected["train"])
    counts = dataset.doc_counts()
    assert {
        key: n for key, n in zip(dataset.catalogue.keys(np.arange(len(counts))), counts, strict=True) if n
    } == positives


def test_ties_in_time_stay_in_file_order(tmp_path: Path) -> None:
    write(tmp_path, [("u", "i4", 2), ("u", "i3", 1), ("u", "i0", 1), ("u", "i5", 1), ("u", "i1", 1)])
    dataset = make(tmp_path)
    assert rows_of(dataset, "test") == [("u", ("i3", "i0", "i5", "i1"), "i4")]
    assert rows_of(dataset, "validation") == [("u", ("i3", "i0", "i5"), "i1")]


def test_short_users_give_as_many_rows_as_possible(tmp_path: Path) -> None:
    events = [("one", "i0", 1), *(("two", f"i{i}", i) for i in range(2)), *(("three", f"i{i}", i) for i in range(3))]
    write(tmp_path, [*events, *(("four", f"i{i}", i) for i in range(4))])
    dataset = make(tmp_path)
    assert rows_of(dataset, "train") == [("four", ("i0",), "i1")]
    assert {user for user, _, _ in rows_of(dataset, "validation")} == {"three", "four"}
    assert {user for user, _, _ in rows_of(dataset, "test")} == {"two", "three", "four"}


def test_an_item_without_a_value_is_no_end_of_a_history(tmp_path: Path) -> None:
    """With a history of brands, which some items do not have."""
    brands = {"i0": "a", "i1": "", "i2": "b", "i3": "", "i4": "a", "i5": "b"}
    write(tmp_path, [("u", f"i{i}", i) for i in range(6)])
    (tmp_path / "items.csv").write_text("item_id,brand\n" + "".join(f"{key},{of}\n" for key, of in brands.items()))
    doc = {"item": Categorical(column="item_id"), "brand": Categorical()}
    config = DataConfig(dir="", time_unit="s", query={"past": History(of="brand", max_items=9)}, doc=doc)
    dataset = make(tmp_path, config)
    (rows,) = dataset.iterate("test", 10)
    a, b, unknown = 2, 3, 1
    expected = [a, unknown, b, unknown, a]
    assert rows.query["past"].values.tolist() == expected  # type: ignore[union-attr]
    seen = Ragged(np.arange(5), np.array([0, 5]))
    assert histories(dataset, PastEvents.of_items(dataset.schema, seen))["past"].values.tolist() == expected  # type: ignore[union-attr]
    given = [{"past": ["a", None, "b", None, "a"]}]
    columns, _ = columns_of_values(given, dataset.schema.query, dataset.schema.doc, None)
    assert columns["past"].values.tolist() == expected  # type: ignore[union-attr]


def test_time_split_and_ratings(tmp_path: Path) -> None:
    events = [(f"u{t % 4}", f"i{t % 6}", t, t % 5) for t in range(40)]
    write(tmp_path, events, header="user_id,item_id,timestamp,rating")
    dataset = make(tmp_path, split="time", test_fraction=0.25, validation_fraction=0.25)
    assert [len(rows_of(dataset, split)) for split in ("train", "validation", "test")] == [16, 10, 10]
    told = make(tmp_path, out="told", split="time", validation_from=22, test_from="1970-01-01T00:00:28", until=36.5)
    found = {
        name: [4 * len(past) + int(user[1:]) for user, past, _ in rows_of(told, name)]
        for name in ("train", "validation", "test")
    }
    assert {name: sorted(times) for name, times in found.items()} == {
        "train": list(range(4, 22)), "validation": list(range(22, 28)), "test": list(range(28, 37))
    }  # fmt: skip
    items = next(told.iterate("test", 100)).sequences.take("items", np.arange(4))  # type: ignore[union-attr]
    assert len(items.values) == 37, "what came later is in no sequence"
    rated = make(tmp_path, out="rated", split="train", rating_column="rating", min_rating=2.0)
    relevance = np.concatenate([rows.relevance for rows in rated.iterate("train", 100)])
    assert set(relevance) == {2.0, 3.0, 4.0} and len(relevance) == 24 - 4
    bright = make(tmp_path, out="bright", split="train", rating_column="rating", positive_rating=3.0)
    relevance = np.concatenate([rows.relevance for rows in bright.iterate("train", 100)])
    met = rows_of(bright, "train")
    assert Counter(met) == Counter(rows_of(make(tmp_path, out="all", split="train"), "train"))
    times = [4 * len(past) + int(user[1:]) for user, past, _ in met]
    assert relevance.tolist() == [float(t % 5 >= 3) for t in times]


def test_bad_rows_are_named_counted_and_left_out(tmp_path: Path) -> None:
    good = [(f"u{u}", f"i{t % 6}", t, 1) for u in range(10) for t in range(6)]
    bad = [("u0", "nope", 9, 1), ("u0", "", 9, 1), ("", "i1", 9, 1), ("u0", "i1", "?", 1), ("u0", "i1", 9, -1)]
    write(tmp_path, [*bad, *good], header="user_id,item_id,timestamp,rating")
    with (tmp_path / "items.csv").open("a") as stream:
        stream.write("i0\n")
    with pytest.raises(DataError, match=r"6 of 72 rows are bad.*0\.001: 1 × .*; the first is .*items\.csv, row 7"):
        make(tmp_path, rating_column="rating")
    assert not (tmp_path / "out").exists() and len((tmp_path / "out.quarantine.jsonl").read_text().splitlines()) == 6
    tolerant = DataConfig(dir="", time_unit="s", query=CONFIG.query, doc=CONFIG.doc, max_bad_fraction=0.1)
    dataset = make(tmp_path, tolerant, rating_column="rating")
    reasons = (dataset.dir / "quarantine.jsonl").read_text()
    expected = ("'i0' is in the table already", "'nope' is not in", "item_id is empty", "user_id is empty")
    for said in (*expected, "needs a number or an ISO", "≥ 0"):
        assert said in reasons
    assert dataset.num_rows("train") == 30 and dataset.catalogue.num_docs == 6


def test_users_missing_from_their_table_have_missing_features(tmp_path: Path) -> None:
    write(tmp_path, [(f"u{u}", f"i{t}", t) for u in range(3) for t in range(5)])
    (tmp_path / "users.csv").write_text("user_id,age,job\nu0,30,a\nu2,50,b\n")
    query = {"past": HISTORY, "age": Numeric(), "job": Categorical()}
    config = DataConfig(dir="", time_unit="s", query=query, doc=CONFIG.doc)
    with pytest.raises(ConfigError, match="age, job need a users table"):
        make(tmp_path, config)
    dataset = make(tmp_path, config, users=tmp_path / "users.csv")
    rows = next(dataset.iterate("test", 10))
    assert np.asarray(rows.query["job"]).tolist() == [2, 0, 3]
    np.testing.assert_array_equal(rows.query["age"], [30, np.nan, 50])
    assert (dataset.schema.query["age"].mean, dataset.schema.query["age"].std) == (40, 10)


def test_an_append_leaves_existing_files_unchanged(tmp_path: Path) -> None:
    write(tmp_path, [(f"u{u}", f"i{t}", t) for u in range(4) for t in range(5)])
    before = make(tmp_path, partition="day1")
    kept = {path: path.read_bytes() for path in (tmp_path / "out/partitions/day1").iterdir()}
    catalogue = (tmp_path / "out/catalogue/000000.arrow").read_bytes()
    write(tmp_path, [("u1", "i7", 10), ("new", "i2", 10), ("u1", "i0", 11), ("new", "i6", 12)], items=8)
    after = make(tmp_path, partition="day2", append=True, split="train")
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert (tmp_path / "out/catalogue/000000.arrow").read_bytes() == catalogue
    assert before.catalogue.num_docs == 6 and after.catalogue.keys(np.arange(8)) == [f"i{i}" for i in range(8)]
    assert tuple(after.schema.doc["item"].vocabulary) == tuple(f"i{i}" for i in range(8))
    old = tuple(f"i{i}" for i in range(5))
    added = [row for row in rows_of(after, "train") if row not in rows_of(before, "train")]
    assert sorted(added) == [("new", ("i2",), "i6"), ("u1", old, "i7"), ("u1", (*old, "i7"), "i0")]
    assert rows_of(after, "test") == rows_of(before, "test")
    with pytest.raises(DataError, match="already has a partition 'day2'"):
        make(tmp_path, partition="day2", append=True)
    other = DataConfig(dir="", time_unit="s", query={"past": History(of="item", max_items=6)}, doc=CONFIG.doc)
    with pytest.raises(ConfigError, match="max_items=6 against 5"):
        make(tmp_path, other, partition="day3", append=True)


def test_the_seed_decides_the_order_and_nothing_else(tiny_interactions: Any, tmp_path: Path) -> None:
    config = load_config(tiny_interactions.config).data
    source = tiny_interactions.source
    tables = InteractionTables(source / "interactions.csv", source / "items.csv", source / "users.csv")
    for name, seed in (("a", 0), ("b", 1)):
        make_interactions(config, tables, IngestTarget(tmp_path / name, seed=seed))
    again, other = Dataset.open(tmp_path / "a"), Dataset.open(tmp_path / "b")
    assert again.fingerprint == Dataset.open(tiny_interactions.dir).fingerprint, "the same input gives the same bytes"
    assert rows_of(again, "train") != rows_of(other, "train")
    assert Counter(rows_of(again, "train")) == Counter(rows_of(other, "train"))
    order = rows_of(again, "train")
    place = np.argsort(sorted(range(len(order)), key=lambda i: (order[i][0], len(order[i][1]))))
    assert np.abs(np.diff(place)).mean() > 0.25 * len(place), "neighbours of the source are far apart"


def test_catalogue_and_sequences_are_single_mapped_batches(tiny_interactions: Any) -> None:
    for file in ("catalogue/000000.arrow", "partitions/base/sequences-000000.arrow"):
        with pa.memory_map(str(tiny_interactions.dir / file)) as mapped:
            reader = pa.ipc.open_file(mapped)
            before = pa.total_allocated_bytes()
            batch = reader.get_batch(0)
            assert reader.num_record_batches == 1 and pa.total_allocated_bytes() == before
            batch.validate(full=True)
            assert not any(column.null_count for column in batch.columns)


def leaks(folder: Path, **options: Any) -> list[str]:
    tables = InteractionTables(folder / "events.csv", folder / "items.csv", **options)
    report = make_interactions(CONFIG, tables, IngestTarget(folder / "leak", overwrite=True))
    return [note for note in report.notes if "leaks" in note]


def test_the_leak_of_leave_one_out_is_reported(tmp_path: Path) -> None:
    """Train targets at 11, 12, 14, 15; one of these is newer than the test target at 14, none than that at 17."""
    early = [("u", f"i{k}", 10 + k) for k in range(5)]
    late = [("v", f"i{k}", 13 + k) for k in range(5)]
    write(tmp_path, early + late)
    assert leaks(tmp_path) == [
        "leave-one-out leaks: on average 12.5% of the train targets are newer than a test target; "
        "with --split time none is"
    ]
    assert not leaks(tmp_path, split="time"), "there it does not"
    assert not leaks(tmp_path, time_column=None), "no time is known"
    write(tmp_path, [(user, item, time - (10 if user == "u" else 13)) for user, item, time in early + late])
    assert not leaks(tmp_path), "times that number a user's events compare with nothing"
