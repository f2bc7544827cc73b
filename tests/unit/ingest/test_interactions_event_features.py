"""Features of events: from a table to histories, by an independent reference; appends, requests, and refused input."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from bigdssm.config import SourceConfig, check_config, load_config
from bigdssm.dataset.blocks import read_block
from bigdssm.dataset.dataset import Dataset, join
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import CalendarTime, Timestamp
from bigdssm.features.canonical import columns_of_values
from bigdssm.features.event_time import UNKNOWN_TIME, elapsed_codes
from bigdssm.loader.batch import Collator
from bigdssm.loader.inspection import sample_rows
from bigdssm.retrieval.queries import PastEvents, Queries, histories
from bigdssm.retrieval.recommend import TableRows, Users
from bigdssm.retrieval.request import Event, Request, load_json, parse_request
from tests.unit.ingest.events import CONFIG, DOC, EVENT, QUERY, load, make, rows_of_events, sequences

DAY = 86_400
BERLIN = ZoneInfo("Europe/Berlin")


def expected(events: list[dict[str, Any]], first: int, actions: list[str], unit: int = 1) -> dict[str, list[float]]:
    """Return the features of the events from position `first` on."""
    times = [None, *(event["timestamp"] for event in events)]
    gaps = [np.nan if before is None else (now - before) / unit for before, now in pairwise(times)]
    return {
        "action": [0 if e["event_type"] is None else actions.index(e["event_type"]) + 2 for e in events[first:]],
        "price": [np.nan if e["price"] is None else e["price"] for e in events[first:]],
        "gap": elapsed_codes(np.array(gaps, float))[first:].tolist(),
        "hour": [hour_of_week(event["timestamp"] / unit) + 2 for event in events[first:]],
        "when": [event["timestamp"] * 1_000_000 // unit for event in events[first:]],
    }


def hour_of_week(seconds: float, zone: ZoneInfo = BERLIN) -> int:
    local = datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=math.floor(seconds))
    local = local.astimezone(zone)
    return 24 * local.weekday() + local.hour


def assert_histories(dataset: Dataset, events: dict[str, list[dict[str, Any]]], split: str, unit: int = 1) -> int:
    """Compare all histories of a split with the reference; return the number of events."""
    actions, compared = list(dataset.schema.event["action"].vocabulary), 0  # type: ignore[attr-defined]
    for rows in dataset.iterate(split, 16):
        assert rows.sequences is not None and rows.sequence is not None and rows.position is not None
        users = rows.sequences.strings("query_key", rows.sequence)
        for i, (user, position) in enumerate(zip(users, rows.position.tolist(), strict=True)):
            for history, feature in QUERY.items():
                first = max(0, position - feature.max_items)
                for name, values in expected(events[user][:position], first, actions, unit).items():
                    column: Any = rows.query[f"{history}.{name}"]
                    found = column.values[column.offsets[i] : column.offsets[i + 1]]
                    np.testing.assert_array_equal(found, np.array(values, found.dtype), f"{user} {history}.{name}")
                    compared += len(found)
    return compared


@pytest.mark.parametrize("unit", [1, 1000])
def test_histories_have_the_features_of_their_events(tmp_path: Path, unit: int) -> None:
    rows = rows_of_events(0, 300, 1_700_000_000, unit)
    make(tmp_path, rows)
    dataset = Dataset.open(tmp_path / "out")
    for name in ("dataset.json", "schema.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["format"] == 2
    for split in ("train", "validation", "test"):
        assert assert_histories(dataset, sequences(rows), split, unit) > 50
    shown = sample_rows(dataset, count=3)[0]
    assert set(shown["query.past.action"]) <= {"view", "cart", "buy", None} and len(shown["query.past.gap"]) > 0
    assert all(time.startswith("2023-") for time in shown["query.past.when"])


def test_datasets_without_features_of_events_stay_as_they_are(tmp_path: Path) -> None:
    make(tmp_path, rows_of_events(0, 200, 1_700_000_000), config=replace(CONFIG, event={}))
    content = json.loads((tmp_path / "out" / "schema.json").read_text())
    assert content["format"] == 1 and "event" not in content
    dataset = Dataset.open(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["format"] == 1
    assert dataset.sequences is not None and not any(
        name.startswith("event.") for name in dataset.sequences.schema.names
    )
    assert list(next(dataset.iterate("test", 5)).query) == list(QUERY)


def test_an_append_compares_events_with_their_features(tmp_path: Path) -> None:
    first = rows_of_events(1, 200, 1_700_000_000)
    make(tmp_path, first)
    newest = {user: events[-1] for user, events in sequences(first).items()}
    same_time = [{**event, "event_type": "returned", "price": 5.0} for event in newest.values()]
    later = rows_of_events(2, 60, 1_800_000_000)
    report = make(tmp_path, [*first, *same_time, *later], "day2")
    assert [note for note in report.notes if "already" in note] == [
        f"200 interactions are in {tmp_path / 'out'} already and are dropped"
    ]
    dataset = Dataset.open(tmp_path / "out", ["day2"])
    assert "returned" in list(dataset.schema.event["action"].vocabulary)  # type: ignore[attr-defined]
    events = sequences([*first, *same_time, *later])
    assert (
        sum(
            assert_histories(dataset, events, split)
            for split in ("validation", "test", "train")
            if dataset.num_rows(split)
        )
        > 50
    )
    # A view of the dataset by the schema of the first day: the new action is out of vocabulary.
    sizes = dataset.schema.vocabulary_sizes()
    view = dataset.with_schema(dataset.schema.cut({**sizes, "event": {"action": 3}}))
    (rows,) = view.iterate("test", 1000)
    values = rows.query["past.action"].values  # type: ignore[union-attr]
    assert values.max() == 4 and (values == 1).any()


def test_requests_have_the_features_of_stored_and_given_events(tmp_path: Path) -> None:
    rows = rows_of_events(3, 150, 1_700_000_000)
    make(tmp_path, rows)
    dataset = Dataset.open(tmp_path / "out")
    events, actions = sequences(rows), list(dataset.schema.event["action"].vocabulary)  # type: ignore[attr-defined]
    queries = Queries(dataset.schema, None, dataset, exclude_seen=False)
    user = max(events, key=lambda key: len(events[key]))
    now = events[user][-1]["timestamp"]
    given = [Event("i3", now + 60, {"action": "buy", "price": 7.5}), Event("i4", now + DAY)]
    query = queries.of(Request(user=user, events=given))
    live = [
        {"timestamp": now + 60, "event_type": "buy", "price": 7.5},
        {"timestamp": now + DAY, "event_type": None, "price": None},
    ]
    every = [*events[user], *live]
    reference = expected(every, len(every) - 6, actions)
    for name, values in reference.items():
        np.testing.assert_array_equal(query.columns[f"past.{name}"].values, values)  # type: ignore[union-attr]
    # The same from Python values, and of stored users in bulk.
    items = [event["item_id"] for event in events[user]] + ["i3", "i4"]
    seconds = np.diff([event["timestamp"] for event in every], prepend=np.nan)
    row = {
        "past": items, "past.action": [event["event_type"] for event in every],
        "past.price": [event["price"] for event in every], "past.gap": seconds,
        "past.hour": [hour_of_week(event["timestamp"]) for event in every],
        "past.when": [float(event["timestamp"]) for event in every],
    }  # fmt: skip
    columns, _ = columns_of_values([row], dataset.schema.query, dataset.schema.doc, None, dataset.schema.event)
    for name, values in reference.items():
        np.testing.assert_array_equal(columns[f"past.{name}"].values, values)  # type: ignore[union-attr]
    for name in ("gap", "hour"):
        assert (columns[f"brands.{name}"].values == 0).all()  # type: ignore[union-attr]
    assert (columns["brands.when"].values == UNKNOWN_TIME).all()  # type: ignore[union-attr]
    table: Any = dataset.sequences
    number = np.array([table.strings("query_key", np.arange(table.num_rows)).index(user)])
    stored = histories(dataset, PastEvents.of_users(dataset, table, number))
    for name, values in expected(events[user], max(0, len(events[user]) - 6), actions).items():
        np.testing.assert_array_equal(stored[f"past.{name}"].values, values)  # type: ignore[union-attr]


def test_invalid_events_of_requests_are_refused(tmp_path: Path) -> None:
    rows = rows_of_events(3, 150, 1_700_000_000)
    make(tmp_path, rows)
    dataset, events = Dataset.open(tmp_path / "out"), sequences(rows)
    queries = Queries(dataset.schema, None, dataset, exclude_seen=False)
    user = max(events, key=lambda key: len(events[key]))
    later = events[user][-1]["timestamp"] + 60
    for event, sentence in (
        (Event("i3"), "1 of 1 events have no time; give it for all"),
        (Event("i3", later, {"kind": "buy"}), "'kind' is not a feature of events; they are: action, price"),
        (Event("i3", later, {"price": "dear"}), "price is 'dear', needs a number"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            queries.of(Request(user=user, events=[event]))
    for given, sentence in (
        ({"past.when": [1.0, None]}, r"past\.when has no value for 1 of 2 events; give the times of all"),
        ({"past.action": ["buy"]}, r"past\.action has lists of other lengths than past"),
    ):
        row = {"past": ["i1", "i2"], **given}
        with pytest.raises(DataError, match=sentence):
            columns_of_values([row], dataset.schema.query, dataset.schema.doc, None, EVENT)


@pytest.mark.parametrize(
    ("event", "sentence"),
    [
        ({"words": {"type": "text"}}, r"data\.event\.words: got type text .*, needs one value per event"),
        ({"tags": {"type": "categorical", "multi": True}}, r"data\.event\.tags: .* categorical without multi"),
        ({"past": {"type": "history", "of": "item"}}, r"data\.event\.past: got type=history on side event"),
    ],
)
def test_types_of_several_values_are_refused(tmp_path: Path, event: dict[str, Any], sentence: str) -> None:
    config = {
        "run": {"dir": "r"}, "data": {"dir": "d", "query": {"past": {"type": "history", "of": "item"}}, "event": event,
        "doc": {"item": {"type": "categorical"}}},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=sentence):
        load_config(tmp_path / "config.yaml")


def test_refused_events(tmp_path: Path) -> None:
    rows = rows_of_events(4, 100, 1_700_000_000)
    with pytest.raises(ConfigError, match=r"data\.event\.gap: type elapsed needs the times of events"):
        make(tmp_path, rows, time_column=None, split="leave-one-out")
    with pytest.raises(ConfigError, match=r"data\.request needs the times of events"):
        config = replace(CONFIG, event={"action": EVENT["action"]}, request=("action",))
        make(tmp_path, rows, config=config, time_column=None, split="leave-one-out")
    with pytest.raises(DataError, match=r"event_type.*data\.event\.action"):
        make(tmp_path, [{key: value for key, value in row.items() if key != "event_type"} for row in rows])
    with pytest.raises(ConfigError, match=r"data\.doc\.gap: got type=elapsed on side doc"):
        EVENT["gap"].check("data.doc.gap", "doc", DOC)
    make(tmp_path, rows)
    with pytest.raises(ConfigError, match=r"event features \[.*\] against \[.*\]"):
        make(tmp_path, rows, "day2", replace(CONFIG, event={"action": EVENT["action"]}))
    milliseconds = [{**row, "timestamp": row["timestamp"] * 1000} for row in rows]
    with pytest.raises(DataError, match="100 × timestamp is … needs a time of … to … in s;"):
        make(tmp_path, milliseconds, "day2")
    (tmp_path / "other").mkdir()
    make(tmp_path / "other", milliseconds)
    folders = [tmp_path / "out", tmp_path / "other" / "out"]
    with pytest.raises(ConfigError, match=r"the times of events are in units of 1 s and 0\.001 s; build both from"):
        join([*map(Dataset.open, folders)], [SourceConfig(str(f)) for f in folders], str(folders[0]))
    (tmp_path / "1997").mkdir()
    make(tmp_path / "1997", [{**row, "timestamp": row["timestamp"] * 500} for row in rows])
    assert Dataset.open(tmp_path / "1997" / "out").header.time_unit == 0.001
    (tmp_path / "1850").mkdir()
    dates = pd.date_range("1850-01-01", periods=len(rows))
    with pytest.raises(
        DataError, match=r"got times from -37\d+ to -37\d+, needs dates of 1900 to 2100 for features of type"
    ):
        make(tmp_path / "1850", [{**row, "timestamp": day} for row, day in zip(rows, dates, strict=True)])
    with pytest.raises(ConfigError, match=r"data\.event\.hour\.timezone: got 'Europe/Paradise', needs a time zone"):
        CalendarTime(timezone="Europe/Paradise").check("data.event.hour", "event", DOC)
    with pytest.raises(ConfigError, match=r"data\.ties: got order, needs exclude without data\.request"):
        check_config(replace(load(tmp_path), data=replace(load(tmp_path).data, ties="order")))


def test_now_cuts_the_events_of_a_user(tmp_path: Path) -> None:
    rows = rows_of_events(5, 150, 1_700_000_000)
    make(tmp_path, rows)
    dataset = Dataset.open(tmp_path / "out")
    queries = Queries(dataset.schema, None, dataset, exclude_seen=True)
    user, events = max(sequences(rows).items(), key=lambda item: len(item[1]))
    now = events[4]["timestamp"]
    known = [event["item_id"] for event in events if event["timestamp"] <= now]
    query = queries.of(Request(user=user, now=now))
    assert dataset.catalogue.keys(query.seen) == known and len(known) < len(events)
    assert dataset.catalogue.keys(query.excluded) == known
    assert len(queries.of(Request(user=user, now=1_600_000_000)).seen) == 0
    for request in (Request(user=user, now=now * 1000), Request(events=[], now=now * 1000)):
        with pytest.raises(ConfigError, match=r"now is 17\d+, needs a time of 1975 to 2100 in s, as the events of"):
            queries.of(request)
    make(tmp_path / "out", rows, config=replace(CONFIG, event={}), time_column=None, split="leave-one-out")
    undated = Dataset.open(tmp_path / "out" / "out")
    with pytest.raises(ConfigError, match="now is given, but the events of"):
        Queries(undated.schema, None, undated, exclude_seen=True).of(Request(user=user, now=now))


@pytest.mark.parametrize(("targets_per_row", "ties"), [(1, "exclude"), (4, "exclude"), (1, "order"), (4, "order")])
def test_requests_are_those_of_their_targets_and_know_nothing_of_their_time(
    tmp_path: Path, targets_per_row: int, ties: Any
) -> None:
    config = replace(CONFIG, query={"past": QUERY["past"]}, request=("action", "gap", "hour", "when"), ties=ties)
    config = replace(config, targets_per_row=targets_per_row)
    rows = [{**row, "timestamp": row["timestamp"] // 20_000 * 20_000} for row in rows_of_events(6, 250, 1_700_000_000)]
    make(tmp_path, rows, config=config, split="leave-one-out")
    dataset, events = Dataset.open(tmp_path / "out"), sequences(rows)
    assert dataset.schema.request == ("action", "gap", "hour", "when")
    actions, tied = list(dataset.schema.event["action"].vocabulary), 0  # type: ignore[attr-defined]
    for split in ("train", "test"):
        stream = [dataset.rows(split, 0, *part) for part in blocks_of(dataset, split)]
        for rows_of_split in [*stream, *map(dataset.one_query_per_row, stream)]:
            batch = Collator(dataset.schema, dataset.catalogue)(rows_of_split)
            table: Any = rows_of_split.sequences
            for query, row in enumerate(rows_of_split.row_of_query.tolist()):
                user = table.strings("query_key", rows_of_split.sequence[[row]])[0]  # type: ignore[index]
                position = int(rows_of_split.position[query])  # type: ignore[index]
                target = events[user][position]
                earlier = [event for event in events[user] if event["timestamp"] < target["timestamp"]]
                tied += len(earlier) < position
                known = earlier if ties == "exclude" else events[user][:position]
                gap = target["timestamp"] - known[-1]["timestamp"] if known else np.nan
                assert batch.query["request.gap"][query] == elapsed_codes(np.array([gap], float))[0]
                assert batch.query["request.hour"][query] == hour_of_week(target["timestamp"]) + 2
                assert batch.query["request.when"][query] == target["timestamp"] * 1_000_000
                code = 0 if target["event_type"] is None else actions.index(target["event_type"]) + 2
                assert batch.query["request.action"][query] == code
                # The history has the newest events before the time of the target, and no event of its time.
                length = int(batch.query_lengths["past"].used[row])
                if batch.query_positions is not None:
                    length = int(batch.query_positions.prefix_length[query])
                for name in ("gap", "when"):
                    found = batch.query[f"past.{name}"][row][:length].tolist()
                    reference = expected(known, 0, actions)[name]
                    assert found == reference[len(reference) - len(found) :] and (len(found) > 0) == bool(known)
    assert tied > 20


@pytest.mark.parametrize(("split", "targets_per_row"), [("leave-one-out", 1), ("time", 4)])
def test_first_events_are_targets_with_empty_histories(tmp_path: Path, split: str, targets_per_row: int) -> None:
    config = replace(CONFIG, query={"past": QUERY["past"]}, request=("gap",), targets_per_row=targets_per_row)
    rows = [*rows_of_events(8, 120, 1_700_000_000), {**rows_of_events(8, 1, 1_700_000_000)[0], "user_id": "once"}]
    every = {(user, position) for user, events in sequences(rows).items() for position in range(len(events))}
    targets = {}
    for allowed in (False, True):
        (folder := tmp_path / str(allowed)).mkdir()
        make(folder, rows, config=replace(config, empty_histories=allowed), split=split)
        dataset, found = Dataset.open(folder / "out"), []
        for name in ("train", "validation", "test"):
            for part in dataset.iterate(name, 10):
                users = part.sequences.strings("query_key", part.sequence)  # type: ignore[union-attr, arg-type]
                found += list(zip(users, part.position.tolist(), strict=True))  # type: ignore[union-attr]
                empty = np.diff(part.query["past"].offsets) == 0  # type: ignore[union-attr]
                assert (empty >= (part.position == 0)).all()
                np.testing.assert_array_equal(part.request["gap"] == 1, empty)
        assert len(found) == len(set(found))
        targets[allowed] = set(found)
    assert targets[True] == every and targets[False] == {target for target in every if target[1]}
    queries = Queries(dataset.schema, None, dataset, exclude_seen=False)
    given = {"now": 1_700_000_000, "context": {}}
    unknown, without = queries.of(Request(user="nobody", **given)), queries.of(Request(events=[], **given))
    assert without.columns.keys() == unknown.columns.keys() and not len(unknown.seen)
    for name, column in without.columns.items():
        np.testing.assert_array_equal(*(getattr(c, "values", c) for c in (unknown.columns[name], column)))
    schema = replace(dataset.schema, empty_histories=False)
    assert "empty_histories=True against False" in str(dataset.schema.difference(schema))
    with pytest.raises(DataError, match="no user is called 'nobody'"):
        Queries(schema, None, dataset, exclude_seen=False).of(Request(user="nobody", **given))


def blocks_of(dataset: Dataset, split: str) -> list[tuple[np.ndarray, pa.RecordBatch]]:
    """Return the rows of all blocks of a split."""
    index = dataset.index(split)
    ids = np.split(np.arange(index.num_rows), index.first_row[1:-1])
    batches = [read_block(index, block, dataset.layout)[0] for block in range(index.num_blocks)]
    return list(zip(ids, batches, strict=True))


OF_REQUESTS = replace(CONFIG, request=("action", "gap", "price", "hour", "when"))


def request_of_a_user(folder: Path) -> tuple[Dataset, Queries, str, float, int]:
    """Return a dataset with features of requests, its queries, a user, a time, and the code of the action buy."""
    rows = rows_of_events(7, 150, 1_700_000_000)
    make(folder, rows, config=OF_REQUESTS)
    dataset, events = Dataset.open(folder / "out"), sequences(rows)
    actions = list(dataset.schema.event["action"].vocabulary)  # type: ignore[attr-defined]
    user = max(events, key=lambda key: len(events[key]))
    queries = Queries(dataset.schema, None, dataset, exclude_seen=False)
    return dataset, queries, user, events[user][-1]["timestamp"] + 3600, actions.index("buy") + 2


def test_a_request_in_serving_is_that_of_training(tmp_path: Path) -> None:
    dataset, queries, user, now, buy = request_of_a_user(tmp_path)
    query = queries.of(Request(user=user, now=now, context={"action": "buy", "price": 3}))
    assert query.columns["request.action"].tolist() == [buy]  # type: ignore[union-attr]
    assert query.columns["request.gap"].tolist() == elapsed_codes(np.array([3600.0])).tolist()  # type: ignore[union-attr]
    assert query.columns["request.price"].tolist() == [3.0]  # type: ignore[union-attr]
    assert query.columns["request.hour"].tolist() == [hour_of_week(now) + 2]  # type: ignore[union-attr]
    assert query.columns["request.when"].tolist() == [now * 1_000_000]  # type: ignore[union-attr]
    later = queries.of(Request(user=user, now=now, events=[Event("i3", now - 60)]))
    assert later.columns["request.gap"].tolist() == elapsed_codes(np.array([60.0])).tolist()  # type: ignore[union-attr]
    assert later.columns["request.action"].tolist() == [0] and np.isnan(later.columns["request.price"]).all()
    bulk = Users(dataset, now, {"action": "buy"}).read(0, 100)
    number = bulk.keys.index(user)  # type: ignore[union-attr]
    for name, value in (
        ("request.action", buy),
        ("request.gap", elapsed_codes(np.array([3600.0]))[0]),
        ("request.hour", hour_of_week(now) + 2),
        ("request.when", now * 1_000_000),
    ):
        assert bulk.columns[name][number] == value  # type: ignore[index]
    (tmp_path / "new.jsonl").write_text('{"items": ["i3"]}\n{"items": []}\n')
    table = TableRows(dataset, tmp_path / "new.jsonl", None, "items", now, {"action": "buy"}).read(0, 2)
    assert table.columns["request.action"].tolist() == [buy] * 2  # type: ignore[union-attr]
    assert table.columns["request.hour"].tolist() == [hour_of_week(now) + 2] * 2  # type: ignore[union-attr]
    assert table.columns["request.gap"].tolist() == [0, 1]  # type: ignore[union-attr]  # events without times, none


def test_a_request_from_python_is_that_of_training(tmp_path: Path) -> None:
    dataset, _, _, now, buy = request_of_a_user(tmp_path)
    given, _ = columns_of_values(
        [{"past": ["i3"], "request.action": "buy", "request.gap": 3600.0, "request.when": now}, {"past": ["i3"]}],
        dataset.schema.query, dataset.schema.doc, None, dataset.schema.event, dataset.schema.request,
    )  # fmt: skip
    assert given["request.action"].tolist() == [buy, 0]  # type: ignore[union-attr]
    assert given["request.gap"].tolist() == [elapsed_codes(np.array([3600.0]))[0], 1]  # type: ignore[union-attr]
    assert given["request.hour"].tolist() == [0, 0]  # type: ignore[union-attr]
    assert given["request.when"].tolist() == [now * 1_000_000, UNKNOWN_TIME]  # type: ignore[union-attr]
    for value in (168, -1, 0.5):
        with pytest.raises(DataError, match=r"request\.hour is .*, needs a whole hour_of_week from 0 to 167"):
            columns_of_values(
                [{"past": ["i3"], "request.hour": value}], dataset.schema.query, dataset.schema.doc, None,
                dataset.schema.event, dataset.schema.request,
            )  # fmt: skip


def test_invalid_requests_are_refused(tmp_path: Path) -> None:
    dataset, queries, user, now, _ = request_of_a_user(tmp_path)
    without_now = Request(user=user), Request(events=[Event("i3", now)])
    for refused in (*(lambda r=r: queries.of(r) for r in without_now), lambda: Users(dataset)):
        with pytest.raises(ConfigError, match="now is missing: the features gap, hour, when of a request are"):
            refused()
    with pytest.raises(ConfigError, match="context: 'gap' is not a feature of requests; they are: action, price"):
        queries.of(Request(user=user, now=now, context={"gap": 5}))
    with pytest.raises(ConfigError, match=r"--context kind: needs a feature of requests, of \["):
        Users(dataset, now, {"kind": "buy"})
    with pytest.raises(ConfigError, match=r"data\.request: got kind, needs features of data\.event"):
        check_config(replace(load(tmp_path), data=replace(OF_REQUESTS, dir="d", request=("kind",), targets_per_row=1)))
    with pytest.raises(ConfigError, match=r"times: got rotary, needs a feature of data\.event of type timestamp"):
        load(tmp_path, {"times": "rotary"})
    with pytest.raises(
        ConfigError, match=r"data\.event: got 2 features of type timestamp, data\.event\.a, data\.event\.b"
    ):
        two = replace(OF_REQUESTS, dir="d", event={"a": Timestamp(), "b": Timestamp()}, request=(), targets_per_row=1)
        check_config(replace(load(tmp_path), data=two))


def test_hostile_events_of_an_append_are_bad_rows(tmp_path: Path) -> None:
    config, first = replace(CONFIG, max_bad_fraction=0.5), rows_of_events(9, 100, 1_700_000_000)
    make(tmp_path, first, config=config)
    later = [{**row, "user_id": "u1"} for row in rows_of_events(10, 20, 1_800_000_000)]
    left_out = [
        ("timestamp", math.nan, "timestamp is nan, needs a number or an ISO-8601 time"),
        ("timestamp", math.inf, "timestamp is inf, needs a number or an ISO-8601 time"),
        ("timestamp", 1_700_000_000, "timestamp is 1700000000, older than 17"),
        ("item_id", None, "item_id is empty"),
    ]
    missing = [
        ("price", math.inf, "price is inf, needs a finite 32-bit number; taken as missing"),
        ("price", -5.0, "price is -5.0, needs a number ≥ 0 for its logarithm; taken as missing"),
        ("price", math.nan, None),
        ("event_type", None, None),
    ]
    for row, (column, value, _) in zip(later, [*left_out, *missing], strict=False):
        row[column] = value
    make(tmp_path, later, "day2", config)
    bad = map(json.loads, (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines())
    reasons = {line["row"]: line["reason"] for line in bad}
    assert sorted(reasons) == [1, 2, 3, 4, 5, 6]
    for number, (*_, reason) in enumerate([*left_out, *missing[:2]], 1):
        assert reasons[number].startswith(reason)
    dataset = Dataset.open(tmp_path / "out", ["day2"])
    table: Any = dataset.sequences
    known = sum(row["user_id"] == "u1" for row in first)
    assert table.lengths("items", np.array([0])).tolist() == [known + 16]
    rest = sequences(
        [*first, *[{**row, "price": row["price"] if i > 6 else None} for i, row in enumerate(later) if i > 3]]
    )
    assert (
        sum(
            assert_histories(dataset, rest, split)
            for split in ("test", "validation", "train")
            if dataset.num_rows(split)
        )
        > 50
    )


@pytest.mark.parametrize(
    ("column", "values", "sentence"),
    [
        ("event_type", None, r"has no column 'event_type', which data\.event\.action names"),
        ("event_type", [["view"]], "column 'event_type' holds list.*, needs single values"),
        ("price", [[3.0]], "column 'price' holds list.*, needs numbers"),
        ("price", ["dear"], r"rows are bad .* price is 'dear', needs a finite 32-bit number"),
        (
            "timestamp",
            [1_800_000_000_000, *[1_800_000_000] * 59],
            "mixes units of time: .* 1 in ms, such as 1800000000000 |timestamp is 1800000000000, needs a time of 1975",
        ),
    ],
)
def test_hostile_tables(tmp_path: Path, column: str, values: Any, sentence: str) -> None:
    for partition in (None, "day2"):
        if partition:
            make(tmp_path, rows_of_events(11, 100, 1_700_000_000))
        later = rows_of_events(12, 60, 1_800_000_000)
        for number, row in enumerate(later):
            row |= {} if values is None else {column: values[number % len(values)]}
        with pytest.raises(DataError, match=sentence):
            make(tmp_path, [{k: v for k, v in row.items() if values or k != column} for row in later], partition)


def test_hostile_requests(tmp_path: Path) -> None:
    rows = rows_of_events(13, 150, 1_700_000_000)
    make(tmp_path, rows, config=replace(CONFIG, request=("action", "gap", "price")))
    dataset, (user, events) = Dataset.open(tmp_path / "out"), max(sequences(rows).items(), key=lambda kv: len(kv[1]))
    queries, newest = Queries(dataset.schema, None, dataset, exclude_seen=False), events[-1]["timestamp"]

    def query(**given: Any) -> Any:
        return queries.of(parse_request({"user": user, "now": newest + DAY, **given})).columns

    for given, sentence in (
        ({"events": [{"time": newest}]}, "item of an event is missing"),
        ({"events": [{"item": "i3", "time": newest - 1}]}, f"needs at least {newest}, that of the user's newest"),
        ({"events": [{"item": "i3", "time": newest * 1000}]}, "time of an event is 17.*, needs a time of 1975 to"),
        ({"events": [{"item": "i3", "time": 0}]}, "time of an event is 0, needs a time of 1975 to 2100 in s"),
        ({"events": [{"item": "i3", "time": math.nan}]}, "time of an event is nan, needs a finite number"),
        ({"events": [{"item": "i3"}]}, "1 of 1 events have no time; give it for all"),
        ({"now": newest * 1000}, "now is 17.*, needs a time of 1975 to 2100 in s, as the events of"),
        ({"now": 0}, "now is 0, needs a time of 1975 to 2100 in s"),
        ({"now": math.inf}, "now is inf, needs a finite number"),
        ({"context": {"action": ["buy"]}}, "action: column 'action' holds list.*, needs single values"),
        ({"context": {"price": "dear"}}, "price is 'dear', needs a number"),
        ({"context": {"price": math.inf}}, "price is inf, needs a finite 32-bit number"),
        ({"context": ["action"]}, "context is .*, needs a mapping"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=sentence):
            query(**given)  # type: ignore[arg-type]
    assert query(context={"action": "phoned"})["request.action"].tolist() == [1], "out of vocabulary"
    future, before = query(now=newest + 10**9), query(now=1_600_000_000)
    assert future["request.gap"].tolist() == elapsed_codes(np.array([1e9])).tolist()
    assert before["request.gap"].tolist() == [1] and not len(before["past"].values)
    with pytest.raises(ConfigError, match="an object of the request has the key 'action' 2 times"):
        load_json('{"context": {"action": "view", "action": "buy"}}')


@pytest.mark.parametrize("power", [0, 3, 6, 9])
@pytest.mark.parametrize(
    "zone", ["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu", "Africa/Monrovia"]
)
def test_calendar_times_are_those_of_zoneinfo(zone: str, power: int) -> None:
    random, place = np.random.RandomState(power), ZoneInfo(zone)
    changes = [
        (3, 28),
        (3, 30),
        (3, 14),
        (3, 9),
        (10, 31),
        (10, 26),
        (4, 4),
        (4, 6),
        (10, 3),
        (10, 5),
        (11, 7),
        (11, 2),
    ]
    days = np.array([datetime(y, *day, tzinfo=timezone.utc).timestamp() for y in (2021, 2025) for day in changes])
    seconds = np.concatenate([(days[:, None] + np.arange(-8, 40) * 1800).ravel(), random.uniform(-2e9, 4e9, 3000)])
    seconds = np.concatenate([seconds, np.round(seconds), np.round(seconds) - 2**-10, [0, -1, -0.5, 63_593_069]])
    times, nowhere = np.round(seconds * 10.0**power, 0 if power else 9), np.full(len(seconds), np.nan)
    expected = np.array([hour_of_week(time / 10**power, place) for time in times.tolist()])
    assert len(np.unique(expected)) == 168
    for unit, values in (("hour_of_week", expected), ("hour", expected % 24), ("weekday", expected // 24)):
        feature = CalendarTime(unit=unit, timezone=zone)  # type: ignore[arg-type]
        np.testing.assert_array_equal(feature.codes(times, nowhere, 10.0**-power), values + 2)
        unknown = np.array([np.nan, np.inf, -np.inf, 5e9, -3e9]) * 10.0**power
        assert feature.codes(unknown, unknown, 10.0**-power).tolist() == [0] * 5
        assert feature.codes_of_values(values.astype(float)).max() == feature.num_codes - 1
