"""Requests resolve to the vectors of equivalent dataset rows, and to the allowed documents."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.schema import Schema
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Categorical, Numeric, Ragged, Text, TextTokenizer, Vector, Vocabulary
from bigdssm.features.ragged import Column
from bigdssm.models import DualEncoder
from bigdssm.retrieval.embed import query_vectors, tower_encoders
from bigdssm.retrieval.queries import DocumentNames, Queries, first_users
from bigdssm.retrieval.request import Event, Request, parse_request
from tests.conftest import NUM_ITEMS


def as_list(column: Column) -> list[object]:
    return [column[0].tolist()] if isinstance(column, Ragged) else column.tolist()


@pytest.fixture(scope="module")
def queries(dataset: Dataset) -> Queries:
    return Queries(dataset.schema, dataset.tokenizer, dataset, exclude_seen=True)


def vector(model: DualEncoder, dataset: Dataset, queries: Queries, request: Request) -> np.ndarray:
    from bigdssm.loader.batch import to_features

    columns = queries.of(request).columns
    found: np.ndarray = query_vectors(model, to_features(dataset.schema.query, columns)).numpy()
    return found[0]


@pytest.mark.parametrize("given", ["by hand", "user and what came since", "shuffled, with a time each"])
def test_the_vector_of_a_request_is_the_offline_one_of_the_same_facts(
    model: DualEncoder, dataset: Dataset, queries: Queries, given: str
) -> None:
    rows = next(dataset.iterate("test", 1000))
    assert dataset.sequences is not None and rows.sequence is not None
    expected = tower_encoders(model, dataset).queries(rows).numpy()
    jobs = ["artist", "doctor", "farmer"]
    for i in range(0, len(rows), 7):
        key = dataset.sequences.strings("query_key", rows.sequence[i : i + 1])[0]
        number = int(key[1:])
        features = {"age": 20 + number % 50, "occupation": jobs[number % 3]}
        events = [Event(item, 1e9 + place) for place, item in enumerate(dataset.catalogue.keys(rows.seen(i)))]
        if given == "user and what came since":  # a later dataset has one more event of the user
            events = [Event(event.item) for event in events]
            later = Queries(dataset.schema, dataset.tokenizer, dataset, True).of(Request(key)).seen
            assert later.tolist() == [*rows.seen(i), rows.doc_rows[i]]
            request = Request(key, {"age": "20", **features}, [Event("i3")])
            events += [Event(dataset.catalogue.keys(rows.doc_rows[i : i + 1])[0]), Event("i3")]
            by_hand = Request(features=features, events=events)
            both = vector(model, dataset, queries, request), vector(model, dataset, queries, by_hand)
            assert np.abs(both[0] - both[1]).max() <= 1e-5
            continue
        now = 1e9 + len(events) - 0.5
        if given.startswith("shuffled"):
            after = Event("i5", now + 1)
            events = [after, *events[1::2], Event("gone", 1e9), *events[::2]]
        request = Request(features=features, events=events, now=now)
        assert len(queries.of(request).seen) > 10, "the history is truncated to the newest 10"
        assert np.abs(vector(model, dataset, queries, request) - expected[i]).max() <= 1e-5
        assert queries.of(request).unknown == (("gone",) if given.startswith("shuffled") else ())


def test_a_user_has_the_dataset_s_features_which_given_ones_replace(dataset: Dataset, queries: Queries) -> None:
    query = queries.of(Request("u7", {"age": 99.0}))
    assert as_list(query.columns["age"]) == [99.0] and as_list(query.columns["occupation"]) == [3]
    assert list(query.columns) == list(dataset.schema.query)
    with pytest.raises(DataError, match="no user is called 'u999'; existing users are: u"):
        queries.of(Request("u999"))


def test_events_are_documents_by_key_or_name(dataset: Dataset, queries: Queries) -> None:
    title = dataset.catalogue.titles(np.array([4]))[0].upper()
    query = queries.of(Request(events=[Event(f" {title} "), Event("nothing"), Event("i9"), Event("i4")]))
    assert query.seen.tolist() == query.excluded.tolist() == [4, 9, 4] and query.unknown == ("nothing",)
    assert as_list(query.columns["history"]) == [dataset.catalogue.codes("item_id", query.seen).tolist()]
    assert np.isnan(query.columns["age"]).all() and as_list(query.columns["occupation"]) == [0]
    assert queries.of(Request(events=[])).seen.tolist() == []


def test_whether_seen_documents_are_left_out(dataset: Dataset) -> None:
    for of_model in (True, False):
        queries = Queries(dataset.schema, dataset.tokenizer, dataset, of_model)
        for asked, out in ((None, of_model), (True, True), (False, False)):
            query = queries.of(Request(events=[Event("i9")], exclude_seen=asked))
            assert query.excluded.tolist() == ([9] if out else []) and query.seen.tolist() == [9]


def test_unknown_documents_get_the_nearest_names() -> None:
    documents = DocumentNames(["1", "2", "3", "4"], ["Toy Story", "Toy Story 2", "GoldenEye", "Heat"])
    assert documents.rows([" toy story ", "3", "story"]).tolist() == [0, 2, -1]
    assert documents.nearest("story") == ["Toy Story", "Toy Story 2"]
    assert documents.nearest("Goldeneey") == ["GoldenEye"]


def test_names_match_in_any_unicode_normal_form() -> None:
    documents = DocumentNames(["1", "2"], ["Am\u00e9lie", "Le\u0301on"])
    names = ["Am\u00e9lie", "AME\u0301LIE", "l\u00e9on", "LE\u0301ON"]
    assert documents.rows(names).tolist() == [0, 0, 1, 1]
    assert documents.nearest("me\u0301li") == ["Am\u00e9lie"]


def test_typed_features(dataset: Dataset) -> None:
    schema = Schema(
        query={
            "words": Text(max_tokens=4).with_name("words"),
            "more": Text(max_tokens=6).with_name("more"),
            "age": Numeric().with_name("age"),
            "sex": Categorical(vocabulary=Vocabulary.of(("m", "f"))).with_name("sex"),
            "tags": Categorical(multi=True, separator="|", vocabulary=Vocabulary.of(("a b", "c"))).with_name("tags"),
            "look": Vector(dim=2).with_name("look"),
        }
    )
    tokenizer = dataset.tokenizer
    assert isinstance(tokenizer, TextTokenizer)
    queries = Queries(schema, tokenizer, None, True)
    typed = {"words": "stone anchor stone anchor", "age": "3.5", "sex": "f", "tags": "c| a b|z", "look": "1, 2"}
    given = {**typed, "age": 3.5, "tags": ["c", "a b", "z"], "look": [1, 2], "more": None}
    for features in (typed, given):
        query = queries.of(Request(features=features))
        ids, _ = tokenizer.encode(pa.array(["stone anchor stone anchor"]), 4)
        assert as_list(query.columns["words"]) == [ids.tolist()]
        assert len(ids) == 4
        assert len(query.columns["more"].values) >= 1  # an empty text has special tokens
        assert [as_list(query.columns[name]) for name in ("age", "sex", "tags")] == [[3.5], [3], [[3, 2, 1]]]
        assert as_list(query.columns["look"]) == [[1.0, 2.0]]
        assert list(query.columns) == list(schema.query)


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({}, "the query is empty"),
        ({"user": " ", "features": {"age": ""}}, "the query is empty"),
        ({"features": {"colour": "red"}}, "colour is not a query feature that can be given; they are: age, oc"),
        ({"features": {"history": ["i3"]}}, "give events instead of a history"),
        ({"features": {"age": "old"}}, "age is 'old', needs a number"),
        ({"features": {"age": 1e39}}, "age is 1e+39, needs a finite 32-bit number"),
        ({"features": {"age": [1.0]}}, "column 'age' holds list<item: double>, needs numbers"),
        ({"features": {"age": math.inf}}, "age is inf, needs a finite 32-bit number"),
        ({"features": {"occupation": ["a", "\ud800"]}}, "'\\ud800' is not valid UTF-8"),
        ({"features": {"\ud800": "a"}}, "'\\ud800' is not a query feature"),
        ({"features": {3: "a"}}, "the name of a feature is 3, needs a text"),
        ({"features": ["a"]}, "features is ['a'], needs a mapping"),
        ({"user": 7}, "user is 7, needs a text, such as '7'"),
        ({"user": "u7", "exclude_seen": "no"}, "exclude_seen is 'no', needs true or false"),
        ({"user": "u7", "exclude_seen": 0}, "exclude_seen is 0, needs true or false"),
        ({"user": "u7", "top": True}, "top is True, needs a whole number"),
        ({"user": "u7", "top": 2.5}, "top is 2.5, needs a whole number"),
        ({"features": {"age": 3}, "now": "5"}, "now is '5', needs a number"),
        ({"features": {"age": 3}, "now": 10**400}, "needs a finite number"),
        ({"events": [{"item": 3}]}, "item of an event is 3, needs a text, such as '3'"),
        ({"events": [{}]}, "item of an event is missing"),
        ({"events": ["i3"]}, "events[0] is 'i3', needs an object"),
        ({"user": "u7", "top": 0}, "top is 0, needs at least 1"),
        ({"events": [{"item": "i3", "time": 5}, {"item": "i4"}]}, "1 of 2 events have no time"),
        ({"events": [{"item": "i3"}], "now": 5}, "1 of 1 events have no time"),
        ({"events": [{"item": "i3", "time": math.nan}]}, "time of an event is nan, needs a finite number"),
        ({"events": [{"item": "i3", "time": 1.7e9}], "now": 1.7e12}, "now is 1700000000000, needs a time of"),
        ({"user": "\udfff"}, "is not valid UTF-8"),
        ({"user": "u7", "filter": "year > "}, "got its end, needs a value after year >"),
        ({"usr": "u7"}, "usr"),
        ({"events": [{"itm": "u7"}]}, "itm"),
        ({"events": "i3"}, "events"),
        ({"top": "many"}, "top"),
    ],
)  # fmt: skip
def test_an_invalid_search_gives_a_one_line_error(queries: Queries, request_: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        queries.of(parse_request(request_))
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "${top}", "a ${missing} b", "???", "\\${x}", "{0}", "[/]%s"])
def test_the_texts_of_a_request_are_data(text: str) -> None:
    content = {"user": text, "features": {"words": text, text: [text]}, "events": [{"item": text}], "filter": text}
    made = parse_request(content)
    assert (made.user, made.features, made.filter) == (text, content["features"], text)
    assert made.events == [Event(text)]


def test_a_request_takes_numbers_of_numpy() -> None:
    made = Request(events=[Event("i3", np.float32(3))], now=np.int64(5), top=np.int64(3), exclude_seen=np.bool_(False))
    assert (made.now, made.top, made.exclude_seen) == (5, 3, False)


def test_users_of_several_partitions_appear_once() -> None:
    keys = ["u1", "u2", "u1", "u3", "u2"]

    class Table:
        def column(self, name: str) -> np.ndarray:
            return np.array([5, 3, 5, 1, 3])

        def strings(self, name: str, rows: np.ndarray) -> list[str]:
            return [keys[row] for row in rows]

    table: Any = Table()
    assert first_users(table, 10) == ["u1", "u2", "u3"] and first_users(table, 2) == ["u1", "u2"]


def test_a_filter_reaches_the_query(dataset: Dataset, queries: Queries) -> None:
    allowed = queries.of(Request("u7", filter="year >= 1990")).allowed
    assert allowed is not None and np.flatnonzero(allowed.mask).tolist() == list(range(30, NUM_ITEMS))
    assert queries.of(Request("u8", filter="year >= 1990")).allowed is allowed, "a filter is cached"
    with pytest.raises(ConfigError, match="give the dataset with --data"):
        schema = Schema(query={"age": Numeric().with_name("age")})
        Queries(schema, None, None, True).of(Request(features={"age": 3}, filter="year > 1990"))
