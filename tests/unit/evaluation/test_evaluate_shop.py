"""Evaluation as a shop reads it, against plain Python: available items, baselines by day, slices, coverage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from bigdssm.config import DataConfig, ModelConfig, NegativesConfig, StageConfig
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.negatives import NegativeDocuments
from bigdssm.dataset.rows import EventRules, Rows
from bigdssm.errors import ConfigError, DataError
from bigdssm.evaluation.baselines import DailyEvents, fit_baseline
from bigdssm.evaluation.chains import GRID, Chain, ChainEvents, ChainOptions, tuned_chain
from bigdssm.evaluation.comparison import System, baseline_systems, slice_tables, slices_as_json
from bigdssm.evaluation.evaluate import evaluate_scores, evaluate_split
from bigdssm.evaluation.slices import FEW_QUERIES, read_slices
from bigdssm.features import Categorical, History
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestTarget
from bigdssm.loader.stream import PairStream
from bigdssm.losses import FPS, Softmax
from bigdssm.losses.declarations import NoCorrection
from bigdssm.models import Encoded
from bigdssm.retrieval.embed import Encoders
from bigdssm.retrieval.hard_negatives import UniformNegatives
from bigdssm.retrieval.queries import Queries
from bigdssm.retrieval.recommend import SplitRows, Users
from bigdssm.retrieval.request import Request
from bigdssm.training.batches import BatchBuilder, read_batches
from bigdssm.training.objective import Objective

DAY, START, NUM_ITEMS, NUM_USERS, NUM_DAYS, D = 86_400, 1_699_920_000, 25, 30, 40, 8  # START is a midnight
CONFIG = DataConfig(
    dir="", query={"past": History(of="item", max_items=6), "country": Categorical()},
    doc={"item": Categorical(column="item_id"), "kind": Categorical(multi=True)},
    event={"action": Categorical(column="event_type")}, request=["action"],
)  # fmt: skip
VALIDATION, TEST = START + 28 * DAY, START + 34 * DAY
Event = dict[str, Any]


def drawn() -> tuple[list[Event], dict[str, float]]:
    """Return events, and the start of every item; some items have events before, and some two at one time."""
    random = np.random.RandomState(0)
    since = {f"i{n}": START + DAY * float(random.choice([-5, 3, 20, 33, 36, 38])) for n in range(NUM_ITEMS)}
    events = []
    for _ in range(900):
        time = START + int(random.rand() * NUM_DAYS * DAY) // 3600 * 3600
        item = f"i{random.randint(NUM_ITEMS)}"
        if since[item] <= time or random.rand() < 0.03:
            action = ["view", "cart", "buy"][random.randint(3)]
            event = {"user_id": f"u{random.randint(NUM_USERS)}", "item_id": item, "timestamp": time}
            events.append(event | {"event_type": action, "rating": int(random.rand() < 0.9)})
    return sorted(events, key=lambda event: event["timestamp"]), since


EVENTS, SINCE = drawn()


def make(folder: Path, name: str, **options: Any) -> Dataset:
    pq.write_table(pa.Table.from_pylist(EVENTS), folder / "events.parquet")
    items = [{"item_id": i, "kind": f"k{n % 3} k{n % 4}", "since": s} for n, (i, s) in enumerate(SINCE.items())]
    later = [{**item, "kind": "changed", "since": START + DAY * 39.0} for item in items[:5]]  # newer versions
    with_versions = later + items if "items_time_column" in options else items
    pq.write_table(pa.Table.from_pylist(with_versions), folder / "items.parquet")
    users = [{"user_id": f"u{n}", "country": ["A", "B", "B B"][n % 3]} for n in range(NUM_USERS)]
    pq.write_table(pa.Table.from_pylist(users), folder / "users.parquet")
    paths = (folder / f"{table}.parquet" for table in ("events", "items", "users"))
    given = {"split": "time", "validation_from": VALIDATION, "test_from": TEST, "rating_column": "rating", **options}
    make_interactions(CONFIG, InteractionTables(*paths, **given), IngestTarget(folder / name, processes=1))
    return Dataset.open(folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shop")


@pytest.fixture(scope="module")
def dated(folder: Path) -> Dataset:
    return make(folder, "dated", items_time_column="since")


@pytest.fixture(scope="module")
def undated(folder: Path) -> Dataset:
    return make(folder, "undated")


def targets(dataset: Dataset, split: str = "test") -> list[tuple[Event, list[Event]]]:
    """Return the events that are targets, and the events before them, in the order of rows."""
    found = []
    for rows in dataset.iterate(split, 50):
        for target in targets_of(dataset, rows):
            own = [event for event in EVENTS if event["user_id"] == target["user_id"]]
            found.append((target, [event for event in own if event["timestamp"] < target["timestamp"]]))
    return found


def targets_of(dataset: Dataset, rows: Rows) -> list[Event]:
    assert dataset.sequences is not None and rows.sequence is not None and rows.position is not None
    users = dataset.sequences.strings("query_key", rows.sequence)
    of_users = [[event for event in EVENTS if event["user_id"] == user] for user in users]
    return [own[position] for own, position in zip(of_users, rows.position.tolist(), strict=True)]


def introduced(item: str, *, dated: bool = True) -> float:
    times = [event["timestamp"] for event in EVENTS if event["item_id"] == item]
    return float(min([*times, *([SINCE[item]] if dated else [])], default=np.inf))


def vectors() -> tuple[Encoders, Tensor, Tensor]:
    """Return encoders of whole numbers, and their vectors of queries and documents."""
    generator = torch.Generator().manual_seed(0)
    queries, documents = (torch.randint(-2, 3, (n, D), generator=generator).float() for n in (97, NUM_ITEMS))
    encoders = Encoders(
        lambda rows: queries[torch.from_numpy(rows.query_keys % 97)], lambda rows: documents[torch.from_numpy(rows)]
    )
    return encoders, queries, documents


@pytest.mark.parametrize("kind", ["columns", "candidates"])
def test_a_document_is_no_negative_of_a_query_before_its_time(dated: Dataset, undated: Dataset, kind: str) -> None:
    negatives = NegativesConfig(columns="catalogue", mask="none")
    if kind != "columns":
        negatives = NegativesConfig(in_batch=False, hard=20, mask="none")
    loss = FPS() if kind == "columns" else Softmax()
    stage = StageConfig(loss=loss, negatives=negatives, sampling=NoCorrection())
    numbers = []
    for dataset in (dated, undated):
        stream = PairStream(dataset, rows_global=40, lanes=1)
        negative = None if kind == "columns" else UniformNegatives(NegativeDocuments(NUM_ITEMS))
        build = BatchBuilder(stream, stage, 0, negative)
        batch = next(read_batches(stream, build, torch.device("cpu"), 1))
        if batch.negatives is not None:  # without the positives
            positives = batch.negatives == batch.positive[:, None]
            batch = replace(batch, negatives=batch.negatives.masked_fill(positives, -1))
        n, keys = len(batch.doc_ids), dataset.catalogue.keys(batch.doc_rows.numpy())
        chosen = iter(dataset.iterate("train", 1))
        by_row = {int(rows.row_ids[0]): targets_of(dataset, rows)[0]["timestamp"] for rows in chosen}
        times = [by_row[row] for row in batch.row_ids.tolist()]
        others = [range(n)] * len(times) if batch.negatives is None else batch.negatives.tolist()
        allowed = [
            [column for column in of_row if column not in (-1, positive)
             and (dataset is undated or introduced(keys[column]) <= time)]
            for of_row, positive, time in zip(others, batch.positive.tolist(), times, strict=True)
        ]  # fmt: skip
        U, W = torch.randn(len(times), D), torch.randn(n, D)
        objective = Objective(stage, ModelConfig(score="dot"), None, 40)
        output = objective(Encoded(U, W, None, torch.tensor([1.0])), batch)
        numbers.append(float(output.stats["effective_negatives"]))
        assert numbers[-1] == pytest.approx(sum(map(len, allowed)) / len(times)), kind
        if kind == "columns":
            used = batch.relevance.nonzero().squeeze(1).tolist()
            tables = [U[row] @ W[[int(batch.positive[row]), *allowed[row]]].T for row in used]
            expected = sum(float(table.logsumexp(0) - table[0]) for table in tables) / len(used)
            assert float(output.loss) == pytest.approx(expected, rel=1e-5)
    assert numbers[0] < 0.9 * numbers[1]


def test_a_query_ranks_the_items_that_are_available_at_its_time(
    dated: Dataset, undated: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigdssm.evaluation.evaluate.TOP", top := 2)  # the coverage of more would be 1
    (encoders, _, documents), left_out = vectors(), 0
    for dataset in (dated, undated):
        expected, shown, keys = [], set(), dataset.catalogue.keys(np.arange(NUM_ITEMS))
        scores = np.concatenate(
            [(encoders.queries(rows) @ documents.T).numpy() for rows in dataset.iterate("test", 50)]
        )
        for of_query, (target, known) in zip(scores, targets(dataset), strict=True):
            own, seen = keys.index(target["item_id"]), {event["item_id"] for event in known}
            late = [dataset is dated and introduced(key) > target["timestamp"] for key in keys]
            left_out += sum(late)
            others = [n for n, key in enumerate(keys) if n != own and key not in seen and not late[n]]
            above, ties = ((sign(of_query[others], of_query[own])).sum() for sign in (np.greater, np.equal))
            expected.append(1 + above + ties / 2 if target["rating"] else np.nan)
            order = sorted(others, key=lambda n: (-of_query[n], n))
            shown |= set([*order[: top - 1], own] if 1 + above + ties / 2 <= top else order[:top])
        evaluation = evaluate_split(encoders, dataset, "test", coverage=True)
        np.testing.assert_array_equal(evaluation.ranks, expected)
        assert evaluation.coverage == len(shown) / NUM_ITEMS < 1
        assert evaluate_split(encoders, dataset, "test").coverage is None

        def score(rows: Rows) -> np.ndarray:
            return (encoders.queries(rows) @ documents.T).numpy()

        np.testing.assert_array_equal(evaluate_scores(score, dataset, "test").ranks, expected)
    assert left_out > 50

    def target_first(rows: Rows) -> np.ndarray:
        return -np.arange(NUM_ITEMS) + 100.0 * (np.arange(NUM_ITEMS) == rows.doc_rows[:, None])

    own = {int(row) for rows in undated.iterate("test", 50) for row in rows.doc_rows}
    covered = evaluate_scores(target_first, undated, "test", exclude_seen=False, coverage=True).coverage
    assert covered == len(own | {0, 1}) / NUM_ITEMS and len(own) > 4


def test_answers_at_a_time_are_available_at_it(dated: Dataset, undated: Dataset) -> None:
    now = START + 30.5 * DAY
    for dataset in (dated, undated):
        keys = dataset.catalogue.keys(np.arange(NUM_ITEMS))
        late = {n for n, key in enumerate(keys) if dataset is dated and introduced(key) > now}
        assert bool(late) == (dataset is dated)
        queries = Queries(dataset.schema, None, dataset, exclude_seen=False)
        context = {"action": "buy"}
        assert set(queries.of(Request("u1", now=now, context=context)).excluded.tolist()) == late
        assert not len(queries.of(Request("u1", context=context)).excluded)
        users = Users(dataset, now, context).with_dataset(dataset, exclude_seen=False).read(0, 3)
        assert [set(row.tolist()) for row in map(users.excluded.__getitem__, range(3))] == [late] * 3
        rows = SplitRows(dataset, "test").with_dataset(dataset, exclude_seen=True).read(0, 20)
        for n, (target, known) in enumerate(targets(dataset)[:20]):
            late = {n for n, key in enumerate(keys) if dataset is dated and introduced(key) > target["timestamp"]}
            seen = {keys.index(event["item_id"]) for event in known}
            assert set(rows.excluded[n].tolist()) == late | seen


def counted_events(dataset: Dataset, *, rebuilt: bool) -> list[tuple[Event, list[Event]]]:
    splits = ("train", "validation", "test") if rebuilt else ("train",)
    return [pair for split in splits for pair in targets(dataset, split) if pair[0]["rating"]]


@pytest.mark.parametrize("split", ["time", "leave-one-out"])
def test_baselines_by_day(folder: Path, undated: Dataset, split: str) -> None:
    dataset = undated
    if split != "time":
        dataset = make(folder, "left", split=split, validation_from=None, test_from=None)
    rebuilt, keys = split == "time", dataset.catalogue.keys(np.arange(NUM_ITEMS))
    rows = next(dataset.iterate("test", 1000))
    week = fit_baseline("popularity_by_day", dataset, {"days": 7})(rows)
    newest = fit_baseline("newest_by_day", dataset, {"days": 2})(rows)
    num_new, counted = 0, counted_events(dataset, rebuilt=rebuilt)
    for n, (target, _) in enumerate(targets(dataset)):
        today = target["timestamp"] // DAY * DAY
        recent, earlier = np.zeros((2, NUM_ITEMS))
        for event, _ in counted:
            item = keys.index(event["item_id"])
            recent[item] += today - 7 * DAY <= event["timestamp"] < today
            earlier[item] += event["timestamp"] < today
        np.testing.assert_array_equal(week[n], recent)
        introductions = [introduced(key, dated=False) for key in keys]
        new = np.array([today - 2 * DAY <= first < target["timestamp"] for first in introductions])
        np.testing.assert_array_equal(newest[n], np.where(new, earlier + 0.5, 0))
        num_new += int((new & (earlier > 0)).sum())
    assert num_new > 5 or not rebuilt


def last_distinct(known: list[Event], window: int) -> list[tuple[str, str, int]]:
    """Return (item, action of its newest event, distance) of the last distinct items."""
    newest: dict[str, str] = {}
    for event in reversed(known):
        newest.setdefault(event["item_id"], event["event_type"])
    return [(item, action, n + 1) for n, (item, action) in enumerate(newest.items())][:window]


@pytest.mark.parametrize("daily", [True, False])
@pytest.mark.parametrize("split", ["time", "leave-one-out"])
def test_chain_is_that_of_a_plain_loop(folder: Path, undated: Dataset, split: str, daily: bool) -> None:
    dataset = undated
    if split != "time":
        dataset = make(folder, f"chain-{daily}", split=split, validation_from=None, test_from=None)
    rebuilt = split == "time" and daily
    options = {"window": 2, "half_life_days": 5.0, "other_source": 0.25, "other_requested": 0.5, "daily": daily}
    rows = next(dataset.iterate("test", 1000))
    chain = fit_baseline("chain", dataset, options)(rows)
    keys = dataset.catalogue.keys(np.arange(NUM_ITEMS))
    counted = counted_events(dataset, rebuilt=rebuilt)
    num_scored = 0
    for n, (target, known) in enumerate(targets(dataset)):
        today = target["timestamp"] // DAY
        scores, popularity = np.zeros((2, NUM_ITEMS))
        for event, before in counted:
            age = today - event["timestamp"] // DAY
            if rebuilt and age <= 0:
                continue
            item = keys.index(event["item_id"])
            popularity[item] += 1
            for source, source_action, distance in last_distinct(before, 2):
                for of_request, action, nth in last_distinct(known, 2):
                    if source == of_request:
                        weight = 1 / (distance * nth) * 0.5 ** (max(age, 0) / 5)
                        weight *= 1 if source_action == action else 0.25
                        weight *= 1 if event["event_type"] == target["event_type"] else 0.5
                        scores[item] += weight
        num_scored += int((scores > 0).sum())
        expected = scores / (scores.max() or 1) + 1e-9 * popularity / popularity.sum()
        np.testing.assert_allclose(chain[n], expected, rtol=1e-9)
    assert num_scored > 100


def test_options_of_a_chain_are_the_best_on_validation(undated: Dataset) -> None:
    events = ChainEvents(undated, "action")

    def ndcg(options: ChainOptions, dataset: Dataset) -> float:
        return evaluate_scores(Chain(events, options), dataset, "validation").metrics["ndcg_at_10"]

    chosen = tuned_chain(events, undated).options
    of_window = {window: ndcg(replace(ChainOptions(), window=window), undated) for window in GRID["window"]}
    assert chosen.window == max(of_window, key=of_window.__getitem__) and len(set(of_window.values())) > 1
    assert ndcg(chosen, undated) >= max(of_window.values())
    assert chosen != ChainOptions(window=chosen.window)
    system = baseline_systems(undated, "test", by_day=True)[-1]
    assert system.name == "daily chain" and system.options == f"{chosen} (chosen on validation)"
    # the targets of validation decide, not those of train, which are counted
    viewed = undated.with_rules(EventRules(targets={"validation": "action = view"}))
    for_viewed = tuned_chain(ChainEvents(viewed, "action"), viewed).options
    assert for_viewed != chosen and ndcg(for_viewed, viewed) > ndcg(chosen, viewed)


def test_an_item_is_new_from_its_first_event_or_version_on(dated: Dataset, undated: Dataset) -> None:
    """Not before on its first day, and not for its own first event."""
    keys = dated.catalogue.keys(np.arange(NUM_ITEMS))
    first_event = np.array([introduced(key, dated=False) for key in keys])
    for dataset in (dated, undated):
        first_version = np.array([SINCE[key] if dataset is dated else np.inf for key in keys])
        first_day = np.minimum(first_event, first_version) // DAY
        scores = fit_baseline("newest_by_day", dataset, {"days": 2})(next(dataset.iterate("test", 1000)))
        num_own, num_early = 0, 0
        for n, (target, _) in enumerate(targets(dataset)):
            time = target["timestamp"]
            known = (first_event < time) | (first_version <= time)
            recent = first_day >= time // DAY - 2
            assert (scores[n] > 0).tolist() == (known & recent).tolist()
            num_own += first_event[keys.index(target["item_id"])] == time
            num_early += int((~known & (first_day == time // DAY)).sum())
        assert num_own > 1 and (num_early > 10 or dataset is dated)


def test_baselines_by_day_count_the_targets_of_training(undated: Dataset) -> None:
    bought = undated.with_rules(EventRules(targets={"train": "action = buy"}))
    events = DailyEvents(bought)
    every = [event for event, _ in counted_events(undated, rebuilt=True)]
    buys = [event["timestamp"] // DAY for event in every if event["event_type"] == "buy"]
    assert sorted(buys) == events.day.tolist() and len(buys) < len(every) / 2
    names = [system.name for system in baseline_systems(undated, "test", by_day=True)]
    assert names == [
        "popularity",
        "Markov, window 3",
        "popularity, 7 days",
        "popularity, 30 days",
        "chain",
        "daily chain",
    ]
    with pytest.raises(ConfigError, match=r"feature=kind: needs a categorical feature of data.event, of \['action'\]"):
        fit_baseline("chain", undated, {"feature": "kind"})


def test_slices(dated: Dataset, undated: Dataset) -> None:
    for dataset in (dated, undated):
        rows = [pair for pair in targets(dataset) if pair[0]["rating"]]
        train = [event["item_id"] for event, _ in targets(dataset, "train") if event["rating"]]
        kinds = {f"i{n}": {"changed"} if n < 5 and dataset is dated else {f"k{n % 3}", f"k{n % 4}"} for n in range(25)}
        facts = []
        for target, known in rows:
            item, user = target["item_id"], int(target["user_id"][1:])
            age = (target["timestamp"] - introduced(item, dated=dataset is dated)) / DAY
            facts.append(
                (train.count(item), age, len(known), "ABB"[user % 3 : user % 3 + 1], kinds[item], target, user)
            )
        conditions = {
            "train_events = 0": [f[0] == 0 for f in facts],
            "item_age < 3": [f[1] < 3 for f in facts],
            "history >= 3 and history < 10": [3 <= f[2] < 10 for f in facts],
            "country = A": [f[6] % 3 == 0 for f in facts],
            'country = "B B"': [f[6] % 3 == 2 for f in facts],
            "kind = k1": ["k1" in f[4] for f in facts],
            "action = buy": [f[5]["event_type"] == "buy" for f in facts],
            "event.action in (buy, cart) and item_age >= 7": [
                f[5]["event_type"] != "view" and f[1] >= 7 for f in facts
            ],
        }
        of_conditions = read_slices(dataset, "test", list(conditions))
        assert [part.by for part in of_conditions[::2]] == list(conditions)
        for part, other in zip(of_conditions[::2], of_conditions[1::2], strict=True):
            assert part.rows.tolist() == conditions[part.condition], part.condition
            assert other.rows.tolist() == (~part.rows).tolist() and 0 < part.rows.sum() < len(rows)
            users = {f[6] for f, inside in zip(facts, part.rows, strict=True) if inside}
            assert part.num_queries == len(users) and part.has_few
        standard = read_slices(dataset, "test", [])
        assert [part.by for part in standard] == ["train_events"] * 2 + ["item_age"] * 5 + ["history"] * 5
        for name in ("train_events", "item_age", "history"):
            assert sum(part.rows.astype(int) for part in standard if part.by == name).tolist() == [1] * len(rows)
        by_country = read_slices(dataset, "test", ["country", "doc.kind"])
        assert {part.condition for part in by_country if part.by == "country"} == {
            "country = A", "country = B", 'country = "B B"'
        }  # fmt: skip


def test_slices_have_intervals_or_too_few_queries(undated: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    slices = read_slices(undated, "test", ["country", "train_events = 999"])
    ranks = vectors()[0], undated
    evaluation = evaluate_split(*ranks, "test")
    systems = [System.from_ranks(name, evaluation.ranks, evaluation.query_ids, 1.0) for name in "ab"]
    few = slices_as_json(systems, [(systems[0], systems[1])], slices)
    assert FEW_QUERIES > NUM_USERS and all(part["too_few"] and not part["differences"] for part in few)
    empty = next(part for part in few if part["condition"] == "train_events = 999")
    assert (empty["rows"], empty["systems"]) == (0, [])
    monkeypatch.setattr("bigdssm.evaluation.slices.FEW_QUERIES", 5)
    many = slices_as_json(systems, [(systems[0], systems[1])], slices)
    relevant = evaluation.ranks[~np.isnan(evaluation.ranks)]
    for part, entry in zip(slices[:3], many, strict=False):
        assert entry["systems"][0]["hr_at_10"] == pytest.approx((relevant[part.rows] <= 10).mean(), abs=1e-6)
        assert entry["systems"][0]["standard_errors"]["hr_at_10"] > 0 and entry["differences"][0]["mean"] == 0
    assert len(list(slice_tables(systems, slices, "users"))) == 4


def test_refused_slices(undated: Dataset) -> None:
    for by, message in (
        (
            "colour = red",
            "--by 'colour = red': got colour, needs one of country, item, kind, action, "
            "train_events, item_age, history",
        ),
        ("colour", "got nothing after colour"),
        ("item_age < old", "item_age is 'old', needs a number"),
        ("country = C", "--by 'country = C': country has no value 'C'"),
        ("country < 3", "country is categorical, needs =, !=, in or not in"),
    ):
        with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
            read_slices(undated, "test", [by])
    with pytest.raises(DataError, match="has no rows in split 'tset'"):
        read_slices(undated, "tset", [])
    two = replace(undated.schema, query=undated.schema.query | {"kind": Categorical(name="kind")})
    with pytest.raises(ConfigError, match=r"got kind, needs one of .*history, query.kind, doc.kind$"):
        read_slices(undated.with_schema(two), "test", ["kind = k1"])
