"""Rules on events (targets, exclusions, visits): every reader against a reference of plain Python."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bigdssm.cli import open_with_rules
from bigdssm.commands import list_candidates
from bigdssm.config import DataConfig, SourceConfig, StageConfig, VisitConfig, check_config
from bigdssm.dataset.dataset import Dataset, open_dataset
from bigdssm.dataset.rows import EventRules, Rows
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Numeric
from bigdssm.loader.batch import Collator
from bigdssm.loader.inspection import describe
from bigdssm.loader.step_plan import TokenBudget, plan_locally
from bigdssm.loader.stream import PairStream
from bigdssm.losses.masks import find_known_positives, local_pairs
from bigdssm.models import PackedLists
from bigdssm.retrieval.embed import Encoders
from bigdssm.retrieval.exact_search import excluded_documents
from bigdssm.retrieval.hard_negatives import HardNegatives
from bigdssm.retrieval.mining import TrainPositives
from bigdssm.retrieval.queries import Queries
from bigdssm.retrieval.recommend import TableRows, Users
from bigdssm.retrieval.request import Event, Request
from bigdssm.retrieval.vectors import read_vectors, write_vectors
from bigdssm.training.batches import BatchBuilder
from bigdssm.training.step import encode
from tests.unit.conftest import random_model
from tests.unit.dataset.event_rules import RULED, START, Known, drawn, keys_of, known_to
from tests.unit.ingest.events import CONFIG, EVENT, load, make, sequences

BUY = "action = buy and price >= 20"
NO_VISIT, BY_SESSION, BY_GAP = VisitConfig(), VisitConfig(feature="session"), VisitConfig(gap_s=3000.0)


def is_bought(event: dict[str, Any]) -> bool:
    return event["event_type"] == "buy" and event["price"] is not None and event["price"] >= 20


def of_visit(history: list[dict[str, Any]], session: str | None, now: float, visit: VisitConfig) -> list[str]:
    """Return the items of the history that are in the visit of a request."""
    if visit.feature:
        return [event["item_id"] for event in history if session is not None and event["session"] == session]
    items: list[str] = []
    for event in reversed(history if visit.gap_s else []):
        if now - event["timestamp"] > visit.gap_s:  # type: ignore[operator]
            break
        items.append(event["item_id"])
        now = event["timestamp"]
    return items


def excluded_of(
    history: list[dict[str, Any]], session: str | None, now: float, visit: VisitConfig, exclude_seen: bool | str
) -> set[str]:
    seen = [e["item_id"] for e in history if exclude_seen is True or (exclude_seen and is_bought(e))]
    return {*seen, *of_visit(history, session, now, visit)}


def assert_epoch_of_targets(view: Dataset, events: dict[str, list[dict[str, Any]]]) -> None:
    """In the stream of training every target occurs once per epoch, as positives and in the counts."""
    stream = PairStream(view, rows_global=8, lanes=2)
    targets: list[list[tuple[str, int]]] = []
    while sum(map(len, targets)) < view.num_queries("train"):
        targets.append(keys_of(view, next(stream)))
    of_train = {key for r in view.iterate("train", 50) for key in keys_of(view, r)}
    assert set().union(*targets) == of_train and stream.step <= stream.steps_per_epoch
    assert stream.state()["data.targets.train"] == BUY and stream.rows_bad == 0
    items = Counter(events[user][position]["item_id"] for user, position in of_train)
    assert dict(zip(view.catalogue.keys(np.arange(30)), view.doc_counts().tolist(), strict=True)) == {
        f"i{n}": items.get(f"i{n}", 0) for n in range(30)
    }


def assert_excluded(
    view: Dataset, raw: Dataset, events: dict[str, list[dict[str, Any]]], every: dict[tuple[str, int], Rows],
    visit: VisitConfig, exclude_seen: bool | str, split: str, excludes_ties: bool,
) -> None:  # fmt: skip
    """Histories have all events; the history and the request determine the excluded items."""
    for r in view.iterate(split, 7):
        for i, (user, position) in enumerate(keys_of(view, r)):
            event, history = events[user][position], known_to(events[user], position, excludes_ties)
            before = every[user, position]
            j = keys_of(raw, before).index((user, position))
            assert "past.action" in r.query and "past.session" not in r.query
            for name, column in r.query.items():
                np.testing.assert_array_equal(column[i], before.query[name][j])  # type: ignore[index]
            query, docs = excluded_documents(view, exclude_seen)(r)
            excluded = set(view.catalogue.keys(docs[query == i]))
            assert excluded == excluded_of(history, event["session"], event["timestamp"], visit, exclude_seen)


@pytest.mark.parametrize("visit", [NO_VISIT, BY_SESSION, BY_GAP], ids=["all", "session", "gap"])
@pytest.mark.parametrize(("split_by", "targets_per_row"), [("time", 4), ("leave-one-out", 1)])
@pytest.mark.parametrize("request_names", [(), ("action", "gap")])
def test_targets_and_exclusions_are_those_of_a_reference(
    tmp_path: Path, visit: VisitConfig, split_by: str, targets_per_row: int, request_names: tuple[str, ...]
) -> None:
    ties: Any = "order" if request_names and split_by == "time" else "exclude"
    config = replace(RULED, request=request_names, targets_per_row=targets_per_row, ties=ties)
    excludes_ties = bool(request_names) and ties == "exclude"
    config = replace(config, empty_histories=split_by == "time")
    rows = drawn(len(split_by) + len(request_names))
    make(tmp_path, rows, config=config, split=split_by)
    raw, events = Dataset.open(tmp_path / "out"), sequences(rows)
    for exclude_seen in (True, False, BUY):
        rules = EventRules({"train": BUY, "test": "action in (buy, cart)"}, exclude_seen, visit)
        view = raw.with_rules(rules)
        if exclude_seen is not BUY:  # the rows are the same
            view = view.with_schema(raw.schema)
        for split in ("train", "validation", "test"):
            every = {key: r for r in raw.iterate(split, 50) for key in keys_of(raw, r)}
            expected: Known = set()
            for user, position in every:
                event = events[user][position]
                history = known_to(events[user], position, excludes_ties)
                wanted = {"train": is_bought(event), "test": event["event_type"] in ("buy", "cart")}.get(split, True)
                if wanted and event["item_id"] not in of_visit(history, event["session"], event["timestamp"], visit):
                    expected.add((user, position))
            assert 0 < len(expected) <= len(every) - (split == "train") * 40
            assert Counter(key for r in view.iterate(split, 7) for key in keys_of(view, r)) == Counter(expected)
            assert view.num_queries(split) == len(expected) and view.num_rows(split) <= len(expected)
            assert_excluded(view, raw, events, every, visit, exclude_seen, split, excludes_ties)
        assert_epoch_of_targets(view, events)
        assert view.fingerprint == raw.fingerprint == raw.rows_fingerprint != view.rows_fingerprint
        assert pickle.loads(pickle.dumps(view)).rows_fingerprint == view.rows_fingerprint
        sizes = {size.split: size.queries for size in describe(view).sizes}
        assert sizes == {split: view.num_queries(split) for split in sizes}
    assert (
        raw.num_queries("train") > view.num_queries("train")
        and "data.targets.train" not in PairStream(raw, rows_global=8, lanes=2).state()
    )


@pytest.fixture(scope="module", params=[1, 4])
def of_requests(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset of `drawn(5)`, by targets per row."""
    folder = tmp_path_factory.mktemp("requests")
    make(folder, drawn(5), config=replace(RULED, request=("action",), targets_per_row=request.param))
    return folder / "out"


@pytest.mark.parametrize("mask", ["batch", "user", "past", "none"])
@pytest.mark.parametrize("exclude_seen", [True, BUY])
def test_masks_have_the_condition_of_serving(of_requests: Path, mask: str, exclude_seen: bool | str) -> None:
    events = sequences(drawn(5))
    visit = BY_SESSION if mask == "past" else NO_VISIT
    view = Dataset.open(of_requests).with_rules(EventRules({}, exclude_seen, visit))
    stage = replace(StageConfig(), rows_global=16)
    stage = replace(stage, negatives=replace(stage.negatives, mask=mask))
    stream = PairStream(view, rows_global=16, lanes=2)
    batch_rows = next(stream)
    batch = BatchBuilder(stream, stage)(batch_rows)
    keys, masked = keys_of(view, batch_rows), 0
    ids, known, docs = batch.query_ids, batch.known_positives, batch.doc_ids[batch.positive]
    shared = mask in ("batch", "user")
    assert (batch.is_known is not None) == (exclude_seen is BUY)
    weight = torch.ones(len(keys))
    sent = weight if batch.is_known is None else weight * batch.is_known
    pairs = local_pairs(ids, docs, sent, known) if shared else None
    if pairs is not None:
        pairs = pairs[: int((sent > 0).sum()) + (0 if known is None else len(known))]
    positives = find_known_positives(
        ids if shared else None, docs, weight, known, None if pairs is None else pairs[None],
        torch.tensor([0 if pairs is None else len(pairs)]), all_known=batch.is_known is None,
    )  # fmt: skip
    every = torch.from_numpy(view.catalogue.doc_ids.copy())
    matrix = positives.contain(every.expand(len(keys), -1))
    for i, (user, position) in enumerate(keys):
        expected = {events[user][position]["item_id"]}
        if shared:
            of_user = [p for u, p in keys if u == user]
            batched = [events[user][p] for p in of_user]
            expected |= {e["item_id"] for e in batched if exclude_seen is True or is_bought(e)}
        if mask == "user":
            expected |= excluded_of(known_to(events[user], max(of_user), True), None, 0.0, NO_VISIT, exclude_seen)
        if mask == "past":
            event, history = events[user][position], known_to(events[user], position, True)
            expected |= excluded_of(history, event["session"], 0.0, visit, exclude_seen)
        assert set(view.catalogue.keys(np.flatnonzero(matrix[i].numpy()))) == expected
        masked += len(expected)
    assert masked > len(keys) or mask == "none"


def test_hard_negatives_are_no_known_positives(tmp_path: Path) -> None:
    rows = drawn(6)
    make(tmp_path, rows, config=RULED)
    dataset, events = Dataset.open(tmp_path / "out"), sequences(rows)
    positives = TrainPositives.of(dataset, exclude_seen=BUY)
    (batch,) = dataset.iterate("train", 1000)
    keys = keys_of(dataset, batch)
    bought = {(user, events[user][p]["item_id"]) for user, p in keys if is_bought(events[user][p])}
    number, docs = positives.pairs(batch.query_ids)
    users = [user for user, _ in keys]
    assert {(users[i], key) for i, key in zip(number, dataset.catalogue.keys(docs), strict=True)} == bought
    assert 3 < len(bought) < len({(user, events[user][p]["item_id"]) for user, p in keys})


@pytest.fixture(scope="module")
def appended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Return a dataset with an append, and its events."""
    folder, rows = tmp_path_factory.mktemp("appended"), drawn(7, 150)
    make(folder, rows, config=RULED)
    newest_row = max(row["timestamp"] for row in rows)
    later = [{**row, "timestamp": row["timestamp"] - START + newest_row + 300} for row in drawn(8, 40)]
    make(folder, [*rows, *later], "day2", config=RULED)
    return folder / "out", [*rows, *later]


@pytest.mark.parametrize("visit", [BY_SESSION, BY_GAP], ids=["session", "gap"])
@pytest.mark.parametrize("exclude_seen", [True, False, BUY])
def test_serving_excludes_the_visit_and_the_condition(
    appended: tuple[Path, list[dict[str, Any]]], visit: VisitConfig, exclude_seen: bool | str
) -> None:
    every = sequences(appended[1])
    dataset = Dataset.open(appended[0]).with_rules(EventRules({}, exclude_seen, visit))
    queries, sizes = Queries(dataset.schema, None, dataset, exclude_seen), set()
    end = max(event["timestamp"] for events in every.values() for event in events)
    for now in (None, START + 2000, end, end + 86_400):
        bulk = Users(dataset, now).with_dataset(dataset, exclude_seen).read(0, 100)
        for user, events in every.items():
            history = [event for event in events if now is None or event["timestamp"] <= now]
            newest = history[-1] if history else {"session": None, "timestamp": 0}
            session, time = newest["session"], newest["timestamp"] if now is None else now
            expected = excluded_of(history, session, time, visit, exclude_seen)
            row = bulk.keys.index(user)  # type: ignore[union-attr]
            assert set(dataset.catalogue.keys(bulk.excluded[row])) == expected
            assert set(dataset.catalogue.keys(queries.of(Request(user=user, now=now)).excluded)) == expected
            # Live events follow the stored ones; the session of the request is in its context.
            live = [
                {"item_id": "i9", "event_type": "buy", "price": 30.0, "session": "z", "timestamp": end + 90_000},
                {"item_id": "i8", "event_type": "view", "price": 30.0, "session": "y", "timestamp": end + 90_300},
            ]
            given = [
                Event(e["item_id"], e["timestamp"], {"action": e["event_type"], "price": 30.0, "session": e["session"]})
                for e in live
            ]
            if now is None:
                context = {"session": "z"} if visit.feature else None
                query = queries.of(Request(user=user, events=given, context=context))
                reference = excluded_of([*events, *live], "z", end + 90_300, visit, exclude_seen)
                assert set(dataset.catalogue.keys(query.excluded)) == reference
                assert ("i8" in reference) == (exclude_seen is True or visit is BY_GAP) and "i9" in reference
            sizes.add(len(expected))
    assert len(sizes) > 3
    all_seen = queries.of(Request(user=user, exclude_seen=True)).excluded
    assert set(dataset.catalogue.keys(all_seen)) == {event["item_id"] for event in every[user]}


def known_to_validation(
    view: Dataset, table: list[dict[str, Any]], cut: float
) -> tuple[dict[Any, tuple[dict[str, Any], list[int], bool]], list[dict[str, Any]]]:
    """Return (inputs, exclusions, whether at the cut) of the queries up to a time, and the inputs of later ones."""
    queries, later = {}, []
    brands = ["", "", *view.schema.doc["brand"].vocabulary]  # type: ignore[attr-defined]
    for r in view.iterate("validation", 20):
        assert r.sequences is not None
        time = [sequences(table)[user][position]["timestamp"] for user, position in keys_of(view, r)]
        query, docs = excluded_documents(view, BUY)(r)
        for i, key in enumerate(keys_of(view, r)):
            inputs = {name: np.asarray(column[i]).tolist() for name, column in r.inputs.items()}  # type: ignore[index]
            inputs["brands"] = [brands[code] for code in inputs["brands"]]
            if time[i] <= cut:
                queries[key] = inputs, sorted(docs[query == i].tolist()), time[i] == cut
            else:
                later.append(inputs)
    return queries, later


@pytest.mark.parametrize("visit", [BY_SESSION, BY_GAP], ids=["session", "gap"])
def test_nothing_at_or_after_a_request_is_known_to_it(tmp_path: Path, visit: VisitConfig) -> None:
    """Change the item at a time, and all that follows it: neither inputs nor exclusions of its query change.

    What follows: events, and new features of users and items.
    """
    query = {"past": CONFIG.query["past"], "brands": CONFIG.query["brands"], "age": Numeric()}
    config = replace(RULED, query=query, request=("action", "gap"), targets_per_row=1)
    rows = sorted(drawn(9, 200), key=lambda row: row["timestamp"])
    start, cut, end = rows[0]["timestamp"], rows[140]["timestamp"], rows[-1]["timestamp"]
    after = [row for row in rows if row["timestamp"] > cut]
    changed = [
        {**row, "item_id": "i20"} if row["timestamp"] == cut else row for row in rows if row["timestamp"] <= cut
    ] + [
        {**row, **{key: other[key] for key in ("item_id", "event_type", "price", "session")}}
        for row, other in zip(after, after[7:] + after[:7], strict=True)
    ]
    random = np.random.RandomState(0)
    users = [{"user_id": f"u{n % 12}", "since": random.randint(start, end), "age": float(n)} for n in range(60)]
    times = [start if n < 30 else random.randint(start, end) for n in range(300)]
    items = [{"item_id": f"i{n % 30}", "updated": time, "brand": f"b{n % 7}"} for n, time in enumerate(times)]
    changed_users = [{**user, "age": 99.0} if user["since"] > cut else user for user in users]
    changed_items = [{**item, "brand": "later"} if item["updated"] >= cut else item for item in items]
    found, later = [], []
    splits = {"validation_from": float(rows[100]["timestamp"]), "test_from": float(rows[190]["timestamp"])}
    tables = (rows, users, items), (changed, changed_users, changed_items)
    for number, (table, of_users, of_items) in enumerate(tables):
        (folder := tmp_path / str(number)).mkdir()
        pq.write_table(pa.Table.from_pylist(of_users), folder / "users.parquet")
        dated = {"users": folder / "users.parquet", "users_time_column": "since", "items_time_column": "updated"}
        make(folder, table, config=config, items=pa.Table.from_pylist(of_items), **dated, **splits)
        view = Dataset.open(folder / "out").with_rules(EventRules({"validation": "price >= 1"}, BUY, visit))
        queries, after_cut = known_to_validation(view, table, cut)
        found.append(queries)
        later += after_cut
    at_cut = [key for key, (_, _, is_cut) in found[1].items() if is_cut]
    assert at_cut and set(found[0]) <= set(found[1]) and len(found[0]) > 20
    assert any(inputs["age"] == 99 for inputs in later) and any("later" in inputs["brands"] for inputs in later)
    for key, (inputs, excluded, _) in found[0].items():
        np.testing.assert_equal(inputs, found[1][key][0])
        assert excluded == found[1][key][1]


@pytest.mark.parametrize("chunk_tokens", [0, 60])
@pytest.mark.parametrize(("visit", "times"), [(BY_SESSION, "none"), (BY_GAP, "rotary")], ids=["session", "gap, times"])
def test_rules_give_the_same_vectors_packed_padded_and_alone(
    tmp_path: Path, visit: VisitConfig, times: str, chunk_tokens: int
) -> None:
    query = {"past": replace(CONFIG.query["past"], max_items=50)}  # type: ignore[call-arg]
    data = replace(RULED, query=query, request=("action", "gap", "when"))
    make(tmp_path, drawn(13), config=data)
    raw = Dataset.open(tmp_path / "out")
    view = raw.with_rules(EventRules({"train": "action in (cart, buy)"}, BUY, visit))
    config = load(tmp_path, {"block": "gated", "positions": "relative", "layers": 2})
    history = replace(config.model.query.history, times=times)  # type: ignore[call-arg]
    config = replace(config, model=replace(config.model, query=replace(config.model.query, history=history)))
    model = random_model(config, raw, seed=0)
    stream = PairStream(view, rows_global=12, lanes=2)
    rows = next(stream)
    batch = BatchBuilder(stream, replace(StageConfig(), rows_global=12))(rows)
    engine, packs = SimpleNamespace(module=model, forward=model), model.accepts_packed(training=False)
    vectors = []
    for packed in (packs, PackedLists()):
        local = plan_locally(batch, TokenBudget(chunk_tokens, 0, packed))
        plan = local.synchronized(local.counts)
        assert plan.whole == (chunk_tokens == 0) and set(plan.query.packed) == packed.query
        vectors.append(encode(engine, batch, plan)[0].U)  # type: ignore[arg-type]
    assert packs.query == {"past"} and len(vectors[0]) == rows.num_queries > len(rows) > 6
    torch.testing.assert_close(vectors[0], vectors[1], rtol=1e-5, atol=1e-5)
    # The same queries without rules, each in a row of its own.
    collate, alone = Collator(raw.schema, raw.catalogue), {}
    for single in raw.iterate("train", 50):
        encoded = model(query=collate(single).query).U
        alone |= dict(zip(keys_of(raw, single), encoded, strict=True))
    expected = torch.stack([alone[key] for key in keys_of(view, rows)])
    torch.testing.assert_close(vectors[0], expected, rtol=1e-5, atol=1e-5)


def test_exclusions_without_the_features_or_times_of_events_are_refused(tmp_path: Path) -> None:
    make(tmp_path, drawn(12, 100), config=RULED)
    raw = Dataset.open(tmp_path / "out")
    undated = Request(events=[Event("i1"), Event("i2")])
    (tmp_path / "queries.jsonl").write_text(json.dumps({"did": ["i1", "i2"]}))
    table = TableRows(raw, tmp_path / "queries.jsonl", None, "did")
    for visit, exclude_seen in ((BY_GAP, False), (BY_GAP, BUY), (BY_SESSION, False), (NO_VISIT, BUY)):
        dataset = raw.with_rules(EventRules({}, exclude_seen, visit))
        queries = Queries(dataset.schema, None, dataset, exclude_seen)
        if visit is BY_GAP:
            with pytest.raises(ConfigError, match=r"no time, which data\.visit\.gap_s needs"):
                queries.of(undated)
        else:
            assert not len(queries.of(undated).excluded)
        with pytest.raises(ConfigError, match=r"events of a table have no features or times.* --seen exclude"):
            table.with_dataset(dataset, exclude_seen)
        expected = dataset.catalogue.rows_by_key(["i1", "i2"]).tolist()
        assert queries.of(replace(undated, exclude_seen=True)).excluded.tolist() == expected
        assert table.with_dataset(dataset, True).read(0, 1).excluded.values.tolist() == expected
    assert not len(table.with_dataset(raw, False).read(0, 1).excluded.values)


def test_files_of_rows_belong_to_rules_and_vectors_to_the_dataset(tmp_path: Path) -> None:
    make(tmp_path, drawn(11, 100), config=RULED)
    config = replace(load(tmp_path), data=replace(RULED, dir=str(tmp_path / "out"), targets=BUY, targets_per_row=1))
    (tmp_path / "run.yaml").write_text(json.dumps(config.to_dict()))
    raw, out = Dataset.open(tmp_path / "out"), tmp_path / "graded.npy"
    view = open_with_rules(str(raw.dir), tmp_path / "run.yaml")
    command = ["--data", str(raw.dir), "--out", str(out), "--graded", "--config", str(tmp_path / "run.yaml")]
    assert list_candidates.main(command) == 0
    graded = HardNegatives.open(out)
    graded.check_against(view)
    assert len(graded) == view.num_queries("train") < raw.num_queries("train")
    with pytest.raises(DataError, match=r"another dataset.* by the same data\.targets and data\.visit"):
        graded.check_against(raw)
    # The documents of a dataset, and their vectors, do not depend on rules.
    encoders = Encoders(lambda rows: torch.ones(len(rows), 3), lambda docs: torch.ones(len(docs), 3))
    write_vectors(tmp_path / "vectors", encoders, raw, "model")
    assert read_vectors(tmp_path / "vectors", "model", view).shape == (30, 3)


def test_visits_of_a_mixture_need_one_unit_of_time(tmp_path: Path) -> None:
    seconds = replace(RULED, event={})
    rows, folders = drawn(13, 100), [tmp_path / "out", tmp_path / "other" / "out"]
    folders[1].parent.mkdir()
    make(tmp_path, rows, config=seconds)
    make(tmp_path / "other", [{**row, "timestamp": row["timestamp"] * 1000} for row in rows], config=seconds)
    mixed = replace(seconds, dir=str(folders[0]), mixture=[SourceConfig(str(folder)) for folder in folders])
    assert open_dataset(mixed).num_queries("train") == 2 * Dataset.open(folders[0]).num_queries("train")
    with pytest.raises(ConfigError, match=r"data\.visit\.gap_s: .* times in units of 0\.001 s and 1 s; build all from"):
        open_dataset(replace(mixed, visit=BY_GAP))


def test_refused_conditions_on_targets(tmp_path: Path) -> None:
    make(tmp_path, drawn(10, 100), config=RULED)
    dataset = Dataset.open(tmp_path / "out")
    for targets, sentence in (
        ("action = purchse", r"data\.targets\.train 'action = purchse': action has no value 'purchse'"),
        ("action == buy", r"data\.targets\.train 'action == buy': got =, needs a value"),
        ("gap < 5", r"data\.targets\.train 'gap < 5': got 'gap', needs one of the categorical or numeric features"),
        ("price > dear", r"data\.targets\.train 'price > dear': price is 'dear', needs a number"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            dataset.with_rules(EventRules({"train": targets}))
    nothing = dataset.with_rules(EventRules({"train": "price > 1000"}))
    with pytest.raises(
        DataError, match=r"no event of split 'train' is a target with data\.targets\.train=price > 1000"
    ):
        PairStream(nothing, rows_global=8, lanes=2)
    assert nothing.num_rows("train") == 0 and not nothing.doc_counts().any() and nothing.num_rows("test")


def test_refused_rules_of_a_config(tmp_path: Path) -> None:
    base = replace(load(tmp_path), data=replace(RULED, dir="d", targets_per_row=1))
    check_config(replace(base, data=replace(base.data, targets="action = buy", exclude_seen=BUY, visit=BY_SESSION)))
    refused: list[tuple[dict[str, Any], str]] = [
        ({"targets": {"dev": "action = buy"}}, r"data\.targets: got .*dev.*, needs a condition, or a mapping of train"),
        ({"targets": {"train": 3}}, r"data\.targets\.train: got 3, needs a condition"),
        (
            {"exclude_seen": "kind = buy"},
            r"data\.exclude_seen 'kind = buy': got 'kind', needs .* features action, price",
        ),
        ({"visit": VisitConfig("action")}, r"data\.visit\.feature: got action, needs .* type session"),
        (
            {"visit": VisitConfig("session", 3.0)},
            r"data\.visit: got \{'feature': 'session', 'gap_s': 3\.0\}, needs feature or",
        ),
        ({"exclude_seen": 3}, r"data\.exclude_seen: got 3, needs true, false or a condition"),
        ({"request": ("session",)}, r"data\.request: got session, needs features that are inputs"),
    ]
    for keys, sentence in refused:
        with pytest.raises(ConfigError, match=sentence):
            check_config(replace(base, data=replace(base.data, **keys)))
    assert DataConfig(dir="d", targets="action = buy").targets == dict.fromkeys(
        ("train", "validation", "test"), "action = buy"
    )


def test_a_visit_by_gaps_needs_times(tmp_path: Path) -> None:
    undated = replace(RULED, event={"action": EVENT["action"]})
    make(tmp_path, drawn(10, 100), config=undated, time_column=None, split="leave-one-out")
    with pytest.raises(ConfigError, match=r"data\.visit: .* has no event_time"):
        Dataset.open(tmp_path / "out").with_rules(EventRules(visit=BY_GAP))
