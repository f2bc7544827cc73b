"""Targets of a funnel: one per user, item and visit, at its first event, against a reference of plain Python."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigdssm.config import VisitConfig, check_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import EventRules, Rows
from bigdssm.errors import ConfigError
from bigdssm.evaluation.baselines import DailyEvents
from bigdssm.evaluation.slices import read_slices
from bigdssm.loader.stream import PairStream
from bigdssm.retrieval.exact_search import excluded_documents
from bigdssm.retrieval.mining import TrainPositives
from bigdssm.retrieval.queries import Queries
from bigdssm.retrieval.request import Event, Request
from tests.unit.dataset.event_rules import RULED, START, drawn, keys_of, known_to
from tests.unit.ingest.events import load, make, sequences

STEPS = ("view", "cart", "buy")
FUNNEL = {"action": STEPS}
BY_SESSION = VisitConfig(feature="session", funnel=FUNNEL)
BY_GAP = VisitConfig(gap_s=3000.0, funnel=FUNNEL)
OF_REQUESTS = replace(RULED, request=("action", "gap"), targets_per_row=4, empty_histories=True)


def rated(seed: int, number: int = 250) -> list[dict[str, Any]]:
    """Draw events with weights that differ between the events of one item."""
    return [{**row, "weight": 1.0 + n % 7} for n, row in enumerate(drawn(seed, number))]


def visits_of(events: list[dict[str, Any]], visit: VisitConfig) -> list[Any]:
    """Return the visit of each event of a user; its own for an event without a session."""
    visits: list[Any] = []
    for n, event in enumerate(events):
        if visit.feature is not None:
            visits.append(event["session"] or n)
        else:
            gap = event["timestamp"] - events[n - 1]["timestamp"] if n else 0
            visits.append((visits[-1] if n else 0) + (gap > visit.gap_s))  # type: ignore[operator]
    return visits


def outcomes_of(events: list[dict[str, Any]], visit: VisitConfig, cut_offs: tuple[float, ...]) -> dict[int, int]:
    """Return the position of each target's outcome, by the position of the target."""

    def period(event: dict[str, Any]) -> int:
        return sum(event["timestamp"] >= time for time in cut_offs)

    groups: dict[Any, list[int]] = {}
    for n, (event, of_event) in enumerate(zip(events, visits_of(events, visit), strict=True)):
        groups.setdefault((of_event, event["item_id"]), []).append(n)
    outcomes = {}
    for positions in groups.values():
        first = events[positions[0]]
        counted = [p for p in positions if events[p]["event_type"] in STEPS and period(events[p]) == period(first)]
        if counted:
            outcomes[positions[0]] = max(counted, key=lambda p: (STEPS.index(events[p]["event_type"]), -p))
    return outcomes


BOUGHT = "action = buy"


def of_funnel(folder: Path, visit: VisitConfig, ties: Any) -> tuple[Dataset, Dataset, Any, list[str]]:
    """Return a dataset, its view with targets of a funnel, its events by user, and the values of the action."""
    rows = rated(21)
    shares = {"validation_fraction": 0.2, "test_fraction": 0.2}
    make(folder, rows, config=replace(OF_REQUESTS, ties=ties), rating_column="weight", **shares)
    raw = Dataset.open(folder / "out")
    rules = EventRules({"train": "action in (cart, buy)", "test": BOUGHT}, BOUGHT, visit)
    view = pickle.loads(pickle.dumps(raw.with_rules(rules)))
    assert len(view.header.cut_offs) == 3 and view.rules == rules
    return raw, view, sequences(rows), list(view.schema.event["action"].vocabulary)


@pytest.mark.parametrize("visit", [BY_SESSION, BY_GAP], ids=["session", "gap"])
@pytest.mark.parametrize("ties", ["exclude", "order"])
def test_targets_of_a_funnel_are_those_of_a_reference(tmp_path: Path, visit: VisitConfig, ties: Any) -> None:
    raw, view, events, actions = of_funnel(tmp_path, visit, ties)
    furthest = {user: outcomes_of(own, visit, view.header.cut_offs) for user, own in events.items()}
    differing = 0
    for split, wanted in (("train", ("cart", "buy")), ("validation", STEPS), ("test", ("buy",))):
        every = {key for r in raw.iterate(split, 50) for key in keys_of(raw, r)}
        expected = {(u, p) for u, p in every if p in furthest[u] and events[u][furthest[u][p]]["event_type"] in wanted}
        found: list[tuple[str, int]] = []
        items: Counter[str] = Counter()
        for r in view.iterate(split, 20):
            keys = keys_of(view, r)
            found += keys
            items.update(view.catalogue.keys(r.doc_rows))
            outcome = [events[user][furthest[user][position]] for user, position in keys]
            assert r.outcome is not None
            assert r.outcome.tolist() == [furthest[user][position] for user, position in keys]
            assert r.relevance.tolist() == [event["weight"] for event in outcome]
            requested = np.asarray(r.request["action"]).tolist()
            assert [actions[code - 2] for code in requested] == [event["event_type"] for event in outcome]
            matching = view.matching_targets(r, BOUGHT, "data.exclude_seen")
            assert matching.tolist() == [event["event_type"] == "buy" for event in outcome]
            for i, (user, position) in enumerate(keys):  # the history has the raw events
                history = known_to(events[user], position, ties == "exclude")
                if ties == "order":
                    history = events[user][:position]
                seen = view.catalogue.keys(r.seen(i))
                assert seen == [event["item_id"] for event in history]
                differing += events[user][position]["event_type"] != outcome[i]["event_type"]
        assert Counter(found) == Counter(expected) and len(expected) == view.num_queries(split) > 3
        if split == "train":
            counts = dict(zip(view.catalogue.keys(np.arange(30)), view.doc_counts().tolist(), strict=True))
            assert {item: number for item, number in counts.items() if number} == items
    assert differing > 5


@pytest.mark.parametrize("visit", [BY_SESSION, BY_GAP], ids=["session", "gap"])
def test_all_that_reads_the_action_of_a_target_reads_that_of_its_outcome(tmp_path: Path, visit: VisitConfig) -> None:
    raw, view, _, actions = of_funnel(tmp_path, visit, "exclude")
    by_action = {part.condition: int(part.rows.sum()) for part in read_slices(view, "validation", ["action"])}
    of_validation = [r for r in view.iterate("validation", 1000)]
    codes = np.concatenate([np.asarray(r.request["action"]) for r in of_validation])
    assert by_action == {f"action = {step}": int((codes == actions.index(step) + 2).sum()) for step in STEPS}
    users, docs = TrainPositives.of(view, exclude_seen=BOUGHT).pairs(next(view.iterate("train", 1000)).query_ids)
    train = next(view.iterate("train", 1000))
    is_bought = view.matching_targets(train, BOUGHT, "data.exclude_seen")
    expected_pairs = set(zip(train.query_ids[is_bought].tolist(), train.doc_rows[is_bought].tolist(), strict=True))
    assert set(zip(train.query_ids[users].tolist(), docs.tolist(), strict=True)) == expected_pairs
    assert 3 < len(expected_pairs) < len(set(zip(train.query_ids.tolist(), train.doc_rows.tolist(), strict=True)))
    assert len(DailyEvents(view).day) > 20
    stream = PairStream(view, rows_global=8, lanes=2)
    assert stream.state()["data.visit.funnel"] == {"action": list(STEPS)}
    assert stream.check_state(stream.state())
    assert (
        view.rows_fingerprint != raw.with_rules(replace(view.rules, visit=replace(visit, funnel={}))).rows_fingerprint
    )


def queries_of(view: Dataset) -> dict[tuple[str, int], tuple[dict[str, Any], list[int], int]]:
    """Return the inputs, exclusions and requested action of each query, by user and position."""
    queries = {}
    for split in [split for split in ("train", "validation", "test") if view.num_rows(split)]:
        for rows in view.iterate(split, 20):
            query, docs = excluded_documents(view, view.rules.exclude_seen)(rows)
            inputs = rows.inputs
            action = np.asarray(inputs.pop("request.action"))
            for i, key in enumerate(keys_of(view, rows)):
                values = {name: np.asarray(column[i]).tobytes() for name, column in inputs.items()}  # type: ignore[index]
                queries[key] = values, sorted(docs[query == i].tolist()), int(action[i])
    return queries


def changed_from(events: list[dict[str, Any]], position: int, random: np.random.RandomState) -> list[dict[str, Any]]:
    """Change all that follows the request of the event at `position`: its outcome, and later events."""
    first = events[position]
    later = [
        {
            **event,
            "item_id": first["item_id"] if random.rand() < 0.3 else f"i{random.randint(6)}",
            "timestamp": event["timestamp"] + random.randint(2500),
            "event_type": STEPS[random.randint(3)],
            "price": float(random.randint(1, 99)),
            "session": [None, first["session"], *"abc"][random.randint(5)],
            "weight": 1.0 + random.randint(7),
        }
        for event in events[position + 1 :]
        if random.rand() < 0.8
    ]
    of_first = {"event_type": STEPS[random.randint(3)], "price": float(random.randint(1, 99)), "weight": 9.0}
    return [*events[:position], {**first, **of_first}, *later]


@pytest.mark.parametrize("ties", ["exclude", "order"])
def test_nothing_at_or_after_the_first_event_of_a_visit_changes_its_query(tmp_path: Path, ties: Any) -> None:
    """Change all events of each user from one target on: its query has the same bits."""
    rows = rated(22, 300)
    # a user with all actions: every build has the same vocabulary
    values = [{**at(0, 0, "all", f"i{n}", step, "s"), "weight": 1.0} for n, step in enumerate(STEPS)]
    events, config = sequences(rows), replace(OF_REQUESTS, ties=ties)

    def queries(table: list[dict[str, Any]], name: str) -> list[dict[tuple[str, int], Any]]:
        (tmp_path / name).mkdir()
        make(tmp_path / name, [*values, *table], config=config, split="train", rating_column="weight")
        raw = Dataset.open(tmp_path / name / "out")
        return [queries_of(raw.with_rules(EventRules({}, "action = buy", visit))) for visit in (BY_SESSION, BY_GAP)]

    original = queries(rows, "original")
    random = np.random.RandomState(0)
    positions = {}
    for user, own in events.items():
        by_visit = [outcomes_of(own, visit, ()) for visit in (BY_SESSION, BY_GAP)]
        targets = [p for p in by_visit[0] if p in by_visit[1]]
        with_outcome = [p for p in targets if by_visit[0][p] != p or by_visit[1][p] != p]
        positions[user] = (with_outcome or targets)[random.randint(len(with_outcome or targets))]
    table = [row for user, own in events.items() for row in changed_from(own, positions[user], random)]
    compared = relabelled = 0
    for found, expected in zip(queries(table, "changed"), original, strict=True):
        for key in positions.items():
            assert found[key][:2] == expected[key][:2], key
            compared += 1
            relabelled += found[key][2] != expected[key][2]
    assert compared == 24 and relabelled > 5


def at(day: int, second: int, user: str, item: str, action: str, session: str) -> dict[str, Any]:
    time = START + day * 86_400 + second
    return {
        "user_id": user, "item_id": item, "timestamp": time, "event_type": action, "price": 5.0, "session": session,
    }  # fmt: skip


def test_appended_days_are_one_build_and_a_visit_counts_as_far_as_it_was_known(tmp_path: Path) -> None:
    days = [
        [
            at(day, 100 * n, f"u{n % 3}", f"i{n % 4}", STEPS[(n * 7 + day) % 3], f"{day} {n % 3}")
            for n in range(24)
        ]
        for day in range(3)
    ]  # fmt: skip
    config = replace(OF_REQUESTS, targets_per_row=2)

    def build(name: str, parts: list[list[dict[str, Any]]]) -> Dataset:
        (tmp_path / name).mkdir()
        for number, part in enumerate(parts):
            make(tmp_path / name, part, f"day{number}" if number else None, config=config, split="train")
        return Dataset.open(tmp_path / name / "out")

    whole, by_days = build("whole", [[*days[0], *days[1], *days[2]]]), build("days", days)
    # a view, and the purchase of a visit that goes on in the next part
    early = [*days[0], at(1, 0, "u0", "i5", "view", "x")]
    late = [at(1, 10, "u0", "i5", "buy", "x"), at(1, 20, "u0", "i6", "view", "x")]
    one, two = build("one", [early + late]), build("two", [early, late])
    codes = dict(enumerate(whole.schema.event["action"].vocabulary, 2))  # type: ignore[attr-defined]
    key = ("u0", 8)
    for visit in (BY_SESSION, BY_GAP):
        rules = EventRules({}, True, visit)
        expected = queries_of(whole.with_rules(rules))
        assert queries_of(by_days.with_rules(rules)) == expected and len(expected) > 20
        of_one, of_two = queries_of(one.with_rules(rules)), queries_of(two.with_rules(rules))
        assert of_one.keys() == of_two.keys() and ("u0", 9) not in of_one
        assert codes[of_one[key][2]] == "buy" and codes[of_two[key][2]] == "view"
        assert of_one[key][:2] == of_two[key][:2]


@pytest.mark.parametrize("visit", [BY_SESSION, BY_GAP], ids=["session", "gap"])
def test_a_visit_across_a_cut_off_counts_up_to_it(tmp_path: Path, visit: VisitConfig) -> None:
    """An action after --validation-from is unknown to the training targets before it."""
    cut = START + 86_400.0
    rows = [at(0, 1000 * n, "u0", f"i{n}", "view", "a") for n in range(4)]
    rows += [at(1, -20, "u0", "i9", "view", "b"), at(1, -10, "u0", "i9", "cart", "b"), at(1, 0, "u0", "i9", "buy", "b")]
    rows += [at(1, 10, "u0", "i8", "view", "b"), at(1, 20, "u0", "i8", "buy", "b"), at(3, 0, "u0", "i1", "view", "c")]
    make(tmp_path, rows, config=OF_REQUESTS, validation_from=cut, test_from=cut + 86_400)
    view = Dataset.open(tmp_path / "out").with_rules(EventRules({}, True, visit))
    actions = list(view.schema.event["action"].vocabulary)  # type: ignore[attr-defined]

    def requested(split: str) -> dict[str, str]:
        (found,) = view.iterate(split, 100)
        codes = np.asarray(found.request["action"]).tolist()
        return dict(zip(view.catalogue.keys(found.doc_rows), (actions[code - 2] for code in codes), strict=True))

    assert requested("train")["i9"] == "cart" and requested("validation") == {"i8": "buy"}


def test_an_appended_partition_counts_up_to_its_own_cut_offs(tmp_path: Path) -> None:
    """Its split by time, or without one, replaces that of the first partition; older datasets have that one alone."""
    make(tmp_path, [at(0, 100 * n, "u0", f"i{n}", "view", "a") for n in range(4)], config=OF_REQUESTS, split="time")
    visit = [at(1, 0, "u0", "i9", "view", "b"), at(1, 10, "u0", "i9", "buy", "b")]
    options: dict[str, Any] = {"validation_from": float(START + 86_405), "test_from": float(START + 86_406)}
    make(tmp_path, [*visit, at(1, 20, "u0", "i8", "view", "b")], "own", config=OF_REQUESTS, **options)
    visit = [at(2, 0, "u0", "i9", "view", "c"), at(2, 10, "u0", "i9", "buy", "c")]
    make(tmp_path, visit, "train", config=OF_REQUESTS, split="train")

    def outcomes(dataset: Dataset) -> dict[int, int]:
        view = dataset.with_rules(EventRules({}, True, replace(BY_SESSION, funnel={"action": ("view", "buy")})))
        parts = list(view.iterate("train", 100))
        positions = np.concatenate([rows.position for rows in parts])  # type: ignore[arg-type]
        return dict(zip(positions.tolist(), np.concatenate([rows.outcome for rows in parts]).tolist(), strict=True))  # type: ignore[arg-type]

    dataset = Dataset.open(tmp_path / "out")
    assert [len(partition.cut_offs) for partition in dataset.partitions] == [2, 2, 0]
    found = outcomes(dataset)
    assert found[4] == 4 and found[7] == 8
    for file in (tmp_path / "out/partitions").glob("*/partition.json"):
        content = json.loads(file.read_text())
        del content["cut_offs"]
        file.write_text(json.dumps(content))
    older = Dataset.open(tmp_path / "out")
    assert {partition.cut_offs for partition in older.partitions} == {older.header.cut_offs}
    assert outcomes(older)[4] == 5


def test_a_served_request_reads_raw_events_and_the_action_that_the_client_wants(tmp_path: Path) -> None:
    make(tmp_path, rated(23), config=OF_REQUESTS)
    dataset = Dataset.open(tmp_path / "out")
    answers = []
    for visit in (BY_SESSION, replace(BY_SESSION, funnel={})):
        view = dataset.with_rules(EventRules({}, False, visit))
        live = Event("i3", START + 10**8, {"action": "view", "session": "live"})
        request = Request(user="u1", events=[live], now=START + 10**8 + 5, context={"action": "buy"})
        answers.append(Queries(view.schema, None, view, False).of(request))
    first, second = answers
    assert first.columns.keys() == second.columns.keys() and first.seen.tolist() == second.seen.tolist()
    for name, column in first.columns.items():
        np.testing.assert_array_equal(np.asarray(column[0]), np.asarray(second.columns[name][0]))  # type: ignore[index]
    assert view.catalogue.keys(first.excluded) == view.catalogue.keys(second.excluded) == ["i3"]
    assert np.asarray(first.columns["request.action"]).tolist() == [
        list(view.schema.event["action"].vocabulary).index("buy") + 2  # type: ignore[attr-defined]
    ]


def test_events_outside_the_funnel_are_history_alone(tmp_path: Path) -> None:
    rows = [at(0, 100 * n, "u0", f"i{n}", "view", "a") for n in range(3)]
    rows += [at(0, 400, "u0", "i5", "return", "b"), at(0, 500, "u0", "i5", "view", "b")]
    rows += [at(0, 600, "u0", "i6", "return", "b"), at(0, 700, "u0", "i7", "view", "b")]
    make(tmp_path, rows, config=OF_REQUESTS, split="train")
    rules = EventRules({}, True, replace(BY_SESSION, funnel={"action": ("view",)}))
    (found,) = Dataset.open(tmp_path / "out").with_rules(rules).iterate("train", 100)
    assert isinstance(found, Rows) and found.outcome is not None
    assert found.position.tolist() == [0, 1, 2, 3, 6]  # type: ignore[union-attr]
    assert found.outcome.tolist() == [0, 1, 2, 4, 6]
    assert found.take(np.array([3, 4])).outcome.tolist() == [4, 6]  # type: ignore[union-attr]


def test_refused_funnels(tmp_path: Path) -> None:
    make(tmp_path, rated(24, 100), config=OF_REQUESTS)
    dataset = Dataset.open(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"data\.visit\.funnel: action has no value 'purchse'"):
        dataset.with_rules(EventRules(visit=replace(BY_GAP, funnel={"action": ("view", "purchse")})))
    with pytest.raises(ConfigError, match=r"data\.visit\.funnel: the events have no feature step, only action, "):
        dataset.with_rules(EventRules(visit=replace(BY_GAP, funnel={"step": ("view",)})))
    base = replace(load(tmp_path), data=replace(OF_REQUESTS, dir="d", targets_per_row=1))
    check_config(replace(base, data=replace(base.data, visit=BY_GAP)))
    refused: list[tuple[VisitConfig, str]] = [
        (VisitConfig(funnel=FUNNEL), r"data\.visit\.funnel: got .*, needs visits: set data\.visit\.gap_s or"),
        (replace(BY_GAP, funnel={"price": ("1",)}), r"data\.visit\.funnel: got price, needs a categorical feature"),
        (replace(BY_GAP, funnel={"action": ()}), r"data\.visit\.funnel\.action: got \[\], needs at least one value"),
        (replace(BY_GAP, funnel={"action": ("a", "a")}), r"data\.visit\.funnel\.action: .* each once"),
        (replace(BY_GAP, funnel={"action": ("a",), "price": ("b",)}), r"data\.visit\.funnel: got 2 features, .* one"),
    ]
    for visit, sentence in refused:
        with pytest.raises(ConfigError, match=sentence):
            check_config(replace(base, data=replace(base.data, visit=visit)))
