"""Item features as of each event agree with a straightforward reference; serving uses the newest ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bigdssm.config import DataConfig, SourceConfig
from bigdssm.dataset.dataset import Dataset, open_dataset
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Categorical, History, Numeric, Ragged
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestReport, IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs
from bigdssm.loader.inspection import describe, sample_rows, verify_dataset
from bigdssm.retrieval.queries import histories, read_user

CONFIG = DataConfig(
    time_unit="s",
    dir="", query={"past": History(of="kind", max_items=4)}, doc={"kind": Categorical(), "price": Numeric()},
    title="title", targets_per_row=3,
)  # fmt: skip
Item = tuple[str, float, str, float, str]  # key, start of validity, and features: kind, price, title
Event = tuple[str, str, float]  # user, item, time
Facts = tuple[str, float, str]
Version = tuple[float, Facts]  # start of validity
ITEMS: list[Item] = [
    ("b", 10, "kind 2", 2.0, "b"),
    ("a", 20, "later", 5.0, "a, renamed"),
    ("a", 10, "first", 1.0, "a"),
]


def write(folder: Path, items: list[Any], events: list[Any], updated: str = "updated") -> None:
    folder.mkdir(exist_ok=True)
    for name, columns, rows in (
        ("items", ("item_id", updated, "kind", "price", "title"), items),
        ("events", ("user_id", "item_id", "timestamp"), events),
    ):
        pq.write_table(pa.table(dict(zip(columns, zip(*rows, strict=True), strict=True))), folder / f"{name}.parquet")


def make(
    folder: Path, out: Path, partition: str = "base", updated: str | None = "updated", config: DataConfig = CONFIG,
    **options: Any,
) -> IngestReport:  # fmt: skip
    tables = InteractionTables(
        folder / "events.parquet", folder / "items.parquet", items_time_column=updated, **{"split": "train", **options}
    )
    return make_interactions(config, tables, IngestTarget(out, partition, append=out.exists(), processes=1))


def facts_at(dataset: Dataset, rows: np.ndarray) -> list[Facts]:
    names, catalogue = ["", "", *dataset.schema.doc["kind"].vocabulary], dataset.catalogue
    columns = catalogue.codes("kind", rows).tolist(), np.asarray(catalogue.column("price", rows)).tolist()
    return [(names[k], p, d) for k, p, d in zip(*columns, catalogue.titles(rows), strict=True)]


def seen(dataset: Dataset, split: str = "train") -> dict[tuple[str, int], tuple[Any, list[str]]]:
    """Return the features of the query at each (user, position): of its item, and the kinds in its history."""
    found, names = {}, ["", "", *dataset.schema.doc["kind"].vocabulary]
    assert dataset.sequences is not None
    for rows in dataset.iterate(split, 7):
        past = rows.query["past"]
        assert rows.sequence is not None and rows.position is not None and isinstance(past, Ragged)
        users = dataset.sequences.strings("query_key", rows.sequence)
        for row, at in enumerate(zip(users, rows.position.tolist(), facts_at(dataset, rows.doc_rows), strict=True)):
            found[at[0], at[1]] = at[2], [names[code] for code in past[row].tolist()]
    return found


def test_a_history_has_the_versions_of_its_events_and_a_target_the_newest(tmp_path: Path) -> None:
    times = [5, 10, 19, 20, 99]  # before all versions, at one, between two, at the other, after both
    write(tmp_path, ITEMS, [("u", "b", 0), *(("u", "a", time) for time in times)])
    report = make(tmp_path, tmp_path / "out")
    assert (report.num_docs, report.new_docs, report.changed_docs, report.new_versions) == (2, 2, 0, 1)
    told = ["new versions of items in {}: 1",
            "2 events are older than all rows of their items in {}: they use the oldest version"]  # fmt: skip
    assert list(report.notes[:2]) == [note.format(tmp_path / "items.parquet") for note in told]
    dataset = Dataset.open(tmp_path / "out")
    later = ("later", 5.0, "a, renamed")
    assert seen(dataset) == {
        ("u", 1): (later, ["kind 2"]),
        ("u", 2): (later, ["kind 2", "first"]),
        ("u", 3): (later, ["kind 2", "first", "first"]),
        ("u", 4): (later, ["kind 2", "first", "first", "first"]),
        ("u", 5): (later, ["first", "first", "first", "later"]),
    }
    assert dataset.catalogue.keys(np.arange(2)) == ["b", "a"], "documents are numbered by their first row"
    assert facts_at(dataset, np.arange(2)) == [("kind 2", 2.0, "b"), later], "the catalogue has the newest features"
    _, past = read_user(dataset, "u")
    (newest,) = histories(dataset, past).values()
    assert isinstance(newest, Ragged) and len(set(newest.values.tolist())) == 1, "as of now, too"
    assert verify_dataset(tmp_path / "out") == []
    assert len(sample_rows(dataset, count=5)) == 5
    found = describe(dataset)
    assert (found.num_docs, found.num_versions, found.seen_as_of) == (2, 1, "event")


def random_tables(seed: int, first_time: int) -> tuple[list[Item], list[Event]]:
    """Return unordered rows with repeats, equal times, and recurring features."""
    random = np.random.RandomState(seed)
    items = []
    for _ in range(150):
        item, since, state = random.randint(20), first_time + random.randint(60), random.randint(3)
        items.append((f"i{item}", since, f"kind {state}", float(item), f"i{item}, {random.randint(2)}"))
    keys = {item[0] for item in items}
    events = []
    for user in random.randint(0, 40, 700):  # half of the users are known and get later events
        own, late = (f"u{user}", 200 * seed) if user % 2 else (f"day{seed}-{user}", 0)
        events.append((own, f"i{random.randint(20)}", first_time + late + random.randint(-5, 70)))
    return items, [event for event in events if event[1] in keys]


def grown(known: list[Version], rows: list[Version]) -> list[Version]:
    """Add a table's rows that differ from their preceding version to an item's versions, oldest first."""
    new = sorted(dict(rows).items())  # the last row of equal times
    every = sorted([*((since, 0, facts) for since, facts in known), *((since, 1, facts) for since, facts in new)])
    befores = [None, *(facts for *_, facts in every)]
    pairs = zip(every, befores, strict=False)
    return [(since, facts) for (since, is_new, facts), before in pairs if not is_new or facts != before]


def held(versions: list[Version], time: float) -> Facts:
    """Return the facts at a time; before the first version, those of the first."""
    return [facts for since, facts in versions if since <= time or since == versions[0][0]][-1]


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "time"])
def test_histories_use_the_versions_of_their_ingestion(split: str, tmp_path: Path) -> None:
    versions: dict[str, list[Version]] = {}
    expected: dict[str, list[Facts]] = {}
    keys_of: dict[str, list[str]] = {}
    for day, first_time in enumerate((0, 40, -30)):  # the last table's versions are older than others
        items, some = random_tables(day, first_time)
        for key in {item[0] for item in items}:
            rows = [(since, (kind, price, title)) for name, since, kind, price, title in items if name == key]
            versions[key] = grown(versions.get(key, []), rows)
        write(tmp_path / str(day), items, some)
        report = make(tmp_path / str(day), tmp_path / "out", f"day{day}", split=split)
        assert report.new_versions > 20
        early = sum(time < versions[item][0][0] for _, item, time in some)
        assert bool(early) == (day != 1)
        assert any(note.startswith(f"{early} events are older than all") for note in report.notes) == bool(early)
        for user, item, time in sorted(some, key=lambda event: event[2]):
            expected.setdefault(user, []).append(held(versions[item], time))
            keys_of.setdefault(user, []).append(item)
        dataset = Dataset.open(tmp_path / "out", [f"day{day}"])
        assert dataset.catalogue.versions is not None
        queries: dict[tuple[str, int], Any] = {}
        for name in ("train", "validation", "test") if split == "time" else ("train",):
            queries |= seen(dataset, name)
        assert len(queries) > 400
        for (user, place), (own, past) in queries.items():
            assert own == versions[keys_of[user][place]][-1][1], (day, user, place)
            assert past == [kind for kind, *_ in expected[user][max(0, place - 4) : place]]
        keys = dataset.catalogue.keys(everything := np.arange(dataset.catalogue.num_docs))
        assert facts_at(dataset, everything) == [versions[key][-1][1] for key in keys]
    write(tmp_path / "2", items, [(user, item, time + 200) for user, item, time in some])
    again = make(tmp_path / "2", tmp_path / "out", "again", split=split)
    assert (again.new_docs, again.changed_docs, again.new_versions) == (0, 0, 0), (
        "what is known already is written once"
    )
    assert verify_dataset(tmp_path / "out") == []


@pytest.mark.slow
def test_rows_that_change_nothing_cost_nothing(tmp_path: Path) -> None:
    """A row is a version if it differs from its preceding version, in the dataset or in its table."""
    events = [("u", "a", 1), ("u", "a", 4), ("v", "a", 3), ("v", "a", 4)]
    x, y = ("kind x", 1.0, "a"), ("kind y", 1.0, "a")
    cases: list[tuple[list[Version], list[Version], int, Facts]] = [
        ([(5, x), (6, x), (9, x)], [], 0, x),
        ([(5, x), (6, y), (9, x)], [], 2, x),
        ([(5, x)], [(5, x), (8, x)], 0, x),
        ([(5, x)], [(3, x)], 1, x),
        ([(5, x)], [(3, y)], 1, x),
        ([(5, x)], [(2, y), (3, x)], 2, x),
        ([(5, x)], [(7, y), (8, x)], 2, x),
        ([(5, x), (8, y)], [(7, y), (9, y), (10, x)], 2, x),
        ([(5, x)], [(5, y), (5, x)], 0, x),
        ([(5, x)], [(5, y)], 1, y),
    ]
    for number, (known, come, told, newest) in enumerate(cases):
        out = tmp_path / f"out{number}"
        for day, rows in enumerate(filter(None, (known, come))):
            later = [(user, item, time + 5 * day) for user, item, time in events]
            write(tmp_path / "tables", [("a", since, *facts) for since, facts in rows], later)
            report = make(tmp_path / "tables", out, f"day{day}")
        assert (report.changed_docs, report.new_versions) == (bool(come and told), told), number
        assert facts_at(Dataset.open(out), np.zeros(1, np.int64)) == [newest], number


def test_datasets_without_item_times_have_no_versions(tmp_path: Path) -> None:
    write(tmp_path, ITEMS[:2], [("u", "a", 1), ("u", "b", 2)])
    make(tmp_path, tmp_path / "out", updated=None)
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.sequences is not None and "version" not in dataset.sequences.schema.names
    assert "items" not in json.loads((tmp_path / "out" / "dataset.json").read_text())
    with pytest.raises(ConfigError, match="has one row of features per item, so leave out --items-time-column"):
        make(tmp_path, tmp_path / "out", "more")
    make(tmp_path, tmp_path / "empty", updated="", users_time_column="")
    for file in (tmp_path / "out").rglob("*.arrow"):
        assert file.read_bytes() == (tmp_path / "empty" / file.relative_to(tmp_path / "out")).read_bytes(), (
            "an empty column name means no column"
        )
    make(tmp_path, tmp_path / "dated")
    sources = [SourceConfig(dir=str(tmp_path / name)) for name in ("out", "dated")]
    with pytest.raises(ConfigError, match=r"dated cannot be.* build both with --items-time-column, or both without"):
        open_dataset(replace(CONFIG, mixture=sources))
    with pytest.raises(ConfigError, match="has item features as of each event, so give --items-time-column here"):
        make(tmp_path, tmp_path / "dated", "more", updated=None)


def test_names_of_features_do_not_imply_times(tmp_path: Path) -> None:
    """A dataset without times may have features with the names of time columns."""
    config = replace(
        CONFIG, query={**CONFIG.query, "version": Categorical()}, doc={"kind": Categorical(), "since": Numeric()}
    )
    pq.write_table(pa.table({"user_id": ["u"], "version": ["1.0"]}), tmp_path / "users.parquet")
    days = [{"a": 2001.0, "b": 2002.0}, {"a": 1990.0, "b": 2003.0}]
    for day, since in enumerate(days):
        events = [("u", item, 10 * day + n) for n, item in enumerate("aba")]
        write(tmp_path, [(item, year, "x", 1.0, item) for item, year in since.items()], events, updated="since")
        make(tmp_path, tmp_path / "out", f"day{day}", None, config, users=tmp_path / "users.parquet")
        pairs = PairTables((tmp_path / "items.parquet",), doc_id_column="item_id", split="train")
        target = IngestTarget(tmp_path / "pairs", f"day{day}", append=day > 0, processes=1)
        make_pairs(replace(config, query={"item_id": Categorical()}, targets_per_row=1), pairs, target)
    for folder in ("out", "pairs"):
        for day in range(len(days)):
            dataset = Dataset.open(tmp_path / folder, [f"day{day}"])
            found = np.asarray(dataset.catalogue.column("since", np.arange(2))).tolist()
            assert found == [1990.0, 2003.0], "as they are now"
            for rows in dataset.iterate("train", 7):
                assert len(rows.doc_rows)
                keys = dataset.catalogue.keys(rows.doc_rows)
                found = np.asarray(dataset.catalogue.column("since", rows.doc_rows)).tolist()
                assert found == [days[-1][key] for key in keys], (folder, day)
                assert folder == "pairs" or set(np.asarray(rows.query["version"]).tolist()) == {2}


def test_invalid_time_columns_of_items_are_refused(tmp_path: Path) -> None:
    events = [("u", "a", 1), ("u", "b", 2), ("u", "a", 3)]
    write(tmp_path, ITEMS, events)
    with pytest.raises(ConfigError, match="--items-time-column updated needs a --time-column of the events"):
        make(tmp_path, tmp_path / "out", time_column=None)
    for side, name in (("doc", "since"), ("doc", "document"), ("query", "version")):
        with pytest.raises(ConfigError, match=rf"data.{side}.{name}: the name is reserved for a column of the dataset"):
            make(tmp_path, tmp_path / "out", config=replace(CONFIG, **{side: {name: Categorical()}}))
    with pytest.raises(DataError, match=r"items.parquet has no column 'changed'"):
        make(tmp_path, tmp_path / "out", updated="changed")
    with pytest.raises(DataError, match=r"row 1: title is 'b'"):
        make(tmp_path, tmp_path / "out", updated="title")
    write(tmp_path, [*ITEMS, ("a", float("nan"), "no", 1.0, "a")], events)
    told = r"1 of 7 rows are bad.*: 1 × updated is nan, needs a number or an ISO-8601 time; .*items.parquet, row 4: u"
    with pytest.raises(DataError, match=told):
        make(tmp_path, tmp_path / "out")
    write(tmp_path, ITEMS, [(user, item, 1.7e9 + time) for user, item, time in events])
    items = [(key, 1.7e12 + since, *facts) for key, since, *facts in ITEMS]
    write(tmp_path, items, [(user, item, 1.7e9 + time) for user, item, time in events])
    with pytest.raises(DataError, match=r"events.parquet, .* with .*items.parquet, column 'updated', mixes units"):
        make(tmp_path, tmp_path / "out", config=replace(CONFIG, time_unit="auto"))
