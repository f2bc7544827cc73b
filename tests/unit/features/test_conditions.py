"""Filters match their definition, and every index type returns all matching documents."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from bigdssm.dataset.catalogue import Catalogue
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError
from bigdssm.features import Categorical, Numeric, Vocabulary
from bigdssm.features.base import encode_values
from bigdssm.features.conditions import And, Condition, Expression, Or, evaluate, parse_filter, resolve
from bigdssm.retrieval.index import Index
from bigdssm.retrieval.index_types import INDEX_TYPES, AllowedDocuments
from bigdssm.retrieval.queries import Filters
from bigdssm.retrieval.vectors import CodedVectors, VectorsMeta
from tests.filters import FEATURES, random_filter, random_rows

NUM_DOCS, WIDTH = 12_000, 9
NAMES = pa.chunked_array([pa.nulls(0, pa.string())])


def test_filters_are_parsed_by_their_grammar() -> None:
    text = 'genre = Drama AND year>=1990 and tag in ("two words", and, "say \\"in\\"")and "odd name"=="x"'
    with pytest.raises(ConfigError, match="got =, needs a value after odd name ="):
        parse_filter(text)
    assert parse_filter(text.replace("==", "=")) == And(
        (
            Condition("genre", "=", ("Drama",)),
            Condition("year", ">=", ("1990",)),
            Condition("tag", "in", ("and", 'say "in"', "two words")),
            Condition("odd name", "=", ("x",)),
        )
    )


A, B, C = (Condition(name, "=", ("1",)) for name in "abc")


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ("a=1 or b=1 and c=1", Or((A, And((B, C))))),
        ("(a=1 or b=1) AND c=1", And((Or((A, B)), C))),
        ("a=1 and (b=1 and ((c=1)))", And((A, B, C))),
        ("a=1 Or b=1 or a=1 or (b=1 or a=1)", Or((A, B))),
        ("(a=1 and b=1) or (b=1 and a=1)", Or((And((A, B)), And((B, A))))),
        ("((a=1))", A),
        ("a!=1", Condition("a", "!=", ("1",))),
        ("a NOT  in(2,1,2)", Condition("a", "not in", ("1", "2"))),
        ("or = and or in in (not, or)", Or((Condition("or", "=", ("and",)), Condition("in", "in", ("not", "or"))))),
        ("a!b = c!", Condition("a!b", "=", ("c!",))),
        ("(" * 16 + "a=1" + ")" * 16, A),
    ],
)
def test_or_binds_weaker_than_and(text: str, expression: Expression) -> None:
    assert parse_filter(text) == expression


def test_random_filters_match_their_definition() -> None:
    """500 filters over rows with missing values, several values, values out of the vocabulary, and 25 bits."""
    random = Random(0)
    rows, selectivities, operators = random_rows(random, 300), Counter[str](), Counter[str]()
    columns = {name: encode_values(f, [row[name] for row in rows], None) for name, f in FEATURES.items()}
    for _ in range(500):
        text, matches = random_filter(random)
        expected = [matches(row) for row in rows]
        mask = evaluate(resolve(parse_filter(text), FEATURES), FEATURES, columns.__getitem__)
        assert mask.dtype == bool and mask.tolist() == expected, text
        selectivities["all" if all(expected) else "some" if any(expected) else "none"] += 1
        operators.update(sign for sign in ("!=", "not in", " or ", "(", ">=") if sign in text)
    resolved = resolve(parse_filter("price in (16777217, 16777216)"), FEATURES)
    assert resolved == Condition("price", "in", (16777216.0,)), "a store compares the numbers that the catalogue has"
    assert selectivities["some"] > 300 and selectivities["none"] > 10 and min(operators.values()) > 100


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("genres = Comedy", lambda i: i % 4 == 1 or i // 10 == 1),
        ("genres in (Comedy, Western) and year < 1980", lambda i: ({i % 4, i // 10} & {1, 3}) and 0 < i < 20),
        ("year = 1965 ", lambda i: i == 5),
        ("year in (1965, 1966.0, 3)", lambda i: i in (5, 6)),
        ("year > 1990", lambda i: i > 30),
        ("year <= 1961", lambda i: i == 1),  # i0 has no year
        ("item_id in (i3, i17)", lambda i: i in (3, 17)),
        ("year > 3000", lambda i: False),
    ],
)
def test_a_filter_allows_the_matching_documents(dataset: Dataset, text: str, fits: Callable[[int], bool]) -> None:
    filters = Filters(dataset.catalogue)
    keys = dataset.catalogue.keys(np.flatnonzero(filters.allowed(text).mask))
    assert keys == [f"i{i}" for i in range(40) if fits(i)]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "got its end, needs the name of a feature"),
        ("genres", "got nothing after genres, needs one of <=, >=, !=, =, <, >, in, not in"),
        ("genres not Comedy", "got Comedy, needs in after genres not"),
        ("not (genres = Comedy)", "got ( after not, needs one of"),
        ("(genres = Comedy or year > 3", "got its end, needs 'and', 'or' or )"),
        ("genres = Comedy)", "got ), needs 'and' or 'or'"),
        ("genres = Comedy or", "got its end, needs the name of a feature"),
        ("()", "got ), needs the name of a feature"),
        ("(" * 5000, "got 17 levels of parentheses, needs at most 16"),
        ("genres in Comedy", "got Comedy, needs ("),
        ("genres in (Comedy", "got its end, needs a comma or )"),
        ("genres = Comedy year > 3", "got year, needs 'and' or 'or', as in genre = Drama and ("),
        ('genres = "Comedy', "is not closed"),
        ('genres = "\\x"', "needs a string as in JSON"),
        ("genre = Comedy", "got 'genre', needs one of the categorical or numeric features item_id, genres, year; did "
         "you mean genres?"),
        ("genres = Comdey", "filter: genres has no value 'Comdey'; did you mean 'Comedy'"),
        ("year = 1 or genres not in (Comdey)", "filter: genres has no value 'Comdey'; did you mean 'Comedy'"),
        ("genres < Comedy", "genres is categorical, needs =, !=, in or not in"),
        ("title = anchor", "got 'title', needs one of the categorical or numeric features item_id, genres, year"),
        ("year > old", "year is 'old', needs a number"),
        ("year > nan", "year is 'nan', needs a number"),
        ("year > 3.5e38", "year is '3.5e38', needs a number"),
        ('genres = "\\ud800"', "'\\ud800' is not valid UTF-8"),
        ('genres in (Comedy, "\\udfff")', "'\\udfff' is not valid UTF-8"),
        ('"\\ud800" = 3', "'\\ud800' is not valid UTF-8"),
        (" and ".join(f"year > {n}" for n in range(100)), "filter: got 100 conditions, needs at most 64"),
        (" or ".join(f"(year > {n} and year < 9)" for n in range(33)), "got 66 conditions, needs at most 64"),
        (f"{'y' * 9000} = 3", f"got '{'y' * 80}', needs one of"),
    ],
)  # fmt: skip
def test_an_invalid_filter_gives_a_one_line_error(dataset: Dataset, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Filters(dataset.catalogue).allowed(text)
    assert sentence in str(refused.value)


def test_conditions_that_repeat_are_evaluated_once(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each distinct condition scans the documents once, in filters of any length."""
    filters, read, compared = Filters(dataset.catalogue), [], []
    column, matches = Catalogue.column, Numeric.matches

    def reading(catalogue: Catalogue, name: str, rows: np.ndarray) -> Any:
        read.append(name)
        return column(catalogue, name, rows)

    def comparing(feature: Numeric, *others: Any) -> np.ndarray:
        compared.append(others[1:])
        return matches(feature, *others)

    monkeypatch.setattr(Catalogue, "column", reading)
    monkeypatch.setattr(Numeric, "matches", comparing)
    text = " and ".join(["year > 1970", "genres in (Comedy, Drama)", "genres in (Drama, Comedy)", "year <= 1980"] * 100)
    mask = filters.allowed(text).mask
    assert (sorted(read), sorted(compared)) == (["genres", "year"], [("<=", (1980.0,)), (">", (1970.0,))])
    assert (mask == filters.allowed("year > 1970 and genres in (Comedy, Drama) and year <= 1980").mask).all()


def test_a_mistyped_value_is_compared_with_few(monkeypatch: pytest.MonkeyPatch) -> None:
    compared, close_matches = [], difflib.get_close_matches

    def counting(word: str, known: Sequence[str], *others: Any) -> list[str]:
        compared.append((len(word), len(known), max(map(len, known))))
        return close_matches(word, known, *others)

    monkeypatch.setattr(difflib, "get_close_matches", counting)
    shop = Categorical(vocabulary=Vocabulary.of(("x" * 10_000, *map(str, range(20_000))))).with_name("shop")
    with pytest.raises(ConfigError, match="shop has no value"):
        shop.operands("=", ["y" * 9000])
    assert compared == [(80, 4999, 4)]


def test_a_condition_is_parsed_in_linear_time() -> None:
    """The text is not copied at every token: memory traffic of 20,000 values would be 2 GB."""

    class Watched(str):
        copied = 0

        def __getitem__(self, part: Any) -> str:
            found = str.__getitem__(self, part)
            Watched.copied += len(found)
            return found

    values = [f"value{number}" for number in range(20_000)]
    text = Watched(f"shop in ({', '.join(values)})  ")
    assert parse_filter(text) == Condition("shop", "in", tuple(sorted(values)))
    assert Watched.copied < 1000
    with pytest.raises(ConfigError, match="the quote in '\"open' is not closed"):
        parse_filter(' shop = "open  ')


def test_hashed_features_cannot_be_filtered() -> None:
    with pytest.raises(ConfigError, match="shop is hashed"):
        Categorical(hash_buckets=7).with_name("shop").operands("=", ["a"])


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    random = np.random.RandomState(0)
    made = (random.randn(NUM_DOCS, 4) @ random.randn(4, WIDTH)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)  # as in cosine models


@pytest.fixture(scope="module", params=["flat", "sq8", "hnsw", "ivf", pytest.param("ivfpq", marks=pytest.mark.slow)])
def index(request: pytest.FixtureRequest, vectors: np.ndarray) -> Index:
    kind: str = request.param
    return Index(
        INDEX_TYPES.make(kind).build(CodedVectors(vectors, "float32", WIDTH)),
        VectorsMeta(kind, "m", "d", NUM_DOCS, WIDTH),
        NAMES,
        NAMES,
    )


@pytest.mark.parametrize("let_through", [0, 1, 7, 200, NUM_DOCS // 8, NUM_DOCS // 3, NUM_DOCS])
@pytest.mark.parametrize("num_queries", [3, 30])
def test_every_index_returns_all_documents_that_a_filter_allows(
    index: Index, vectors: np.ndarray, let_through: int, num_queries: int
) -> None:
    random = np.random.RandomState(let_through)
    mask = np.zeros(NUM_DOCS, bool)
    mask[random.permutation(NUM_DOCS)[:let_through]] = True
    queries = random.randn(num_queries, WIDTH).astype(np.float32)
    excluded = [random.permutation(np.flatnonzero(mask))[: min(i, 5)] for i in range(num_queries)]
    scores, rows = index.nearest(queries, 50, "m", excluded, AllowedDocuments(mask))
    exact = np.where(mask, queries @ vectors.T, -np.inf)
    for i, out in enumerate(excluded):
        exact[i, out] = -np.inf
    expected = np.argsort(-exact, axis=1)[:, :50]
    found = []
    for i, out in enumerate(excluded):
        left = max(0, let_through - len(out))
        assert (rows[i] >= 0).sum() == min(50, left) and (scores[i, min(50, left) :] == -np.inf).all()
        own = rows[i][rows[i] >= 0]
        assert mask[own].all() and not set(own) & set(out) and len(set(own)) == len(own)
        found += [row in own for row in expected[i, : len(own)]]
        if index.meta.kind in ("flat", "hnsw", "ivf"):
            np.testing.assert_allclose(scores[i, : len(own)], exact[i, own], rtol=1e-3, atol=1e-4)
    few = let_through <= NUM_DOCS // 8  # small enough to scan all
    least = {"sq8": 0.9, "ivfpq": 0.7}.get(index.meta.kind, 1.0 if few or index.meta.kind == "flat" else 0.9)
    assert sum(found) >= least * len(found)


def test_an_ivf_index_without_a_filter_returns_the_requested_number(index: Index) -> None:
    rows = index.nearest(np.ones((2, WIDTH), np.float32), NUM_DOCS, "m")[1]
    assert (np.sort(rows, axis=1) == np.arange(NUM_DOCS)).all()


def test_an_empty_value_is_missing_and_matches_nothing() -> None:
    feature = Categorical(vocabulary=Vocabulary.of(["Drama"])).with_name("genre")
    codes = feature.codes(pa.array(["", "Drama"]))
    for text, expected in {
        'genre = ""': [False, False],
        'genre in ("", Drama)': [False, True],
        'genre != ""': [False, True],
        'genre not in ("", Drama)': [False, False],
    }.items():
        expression = resolve(parse_filter(text), {"genre": feature})
        assert evaluate(expression, {"genre": feature}, lambda name: codes).tolist() == expected


def test_the_largest_number_is_one() -> None:
    largest = float(np.finfo(np.float32).max)
    assert Numeric().with_name("year").parse(str(largest)) == largest
