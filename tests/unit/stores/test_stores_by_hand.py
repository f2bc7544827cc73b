"""Queries of docs/stores.md that a user sends to a store: they return the answers and scores of the model."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from bigdssm.dataset.dataset import Dataset
from bigdssm.retrieval.index import build_index
from bigdssm.retrieval.publish import publish
from bigdssm.retrieval.request import Request
from bigdssm.serving.searcher import Searcher
from bigdssm.stores.base import Collection, Documents, open_store
from tests.postgres import Server
from tests.unit.stores.shop import INDEX_ALONE, MODEL

PAGE = (Path(__file__).parents[3] / "docs/stores.md").read_text(encoding="utf-8")
NUM_DOCS, DIM, TOP = 3000, 12, 10
CASES = [("dot", True), ("dot", False), ("cosine", True), ("cosine", False)]  # score, beta


def block(title: str) -> str:
    """Return the code of the page with this title."""
    match = re.search(rf'```\w+ title="{title}"\n(.*?)^```$', PAGE, re.DOTALL | re.MULTILINE)
    assert match is not None
    return match[1]


def drawn(score: str, *, has_beta: bool) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Return vectors of documents with lengths of 1 to 10, or of one length, a query as /api/vector has it, columns."""
    random = np.random.default_rng(0)
    vectors = random.standard_normal((NUM_DOCS, DIM)).astype(np.float32)
    query = random.standard_normal(DIM).astype(np.float32)
    if score == "cosine":
        vectors *= 20 / np.linalg.norm(vectors, axis=1, keepdims=True)  # alpha = 20
        query /= np.linalg.norm(query)
    else:
        vectors *= random.uniform(0.3, 3, (NUM_DOCS, 1)).astype(np.float32)
    if has_beta:
        beta = random.normal(0, 2, (NUM_DOCS, 1)).astype(np.float32)
        vectors = np.concatenate([vectors, beta], axis=1)
        query = np.append(query, np.float32(1))
    year = random.integers(1980, 2000, NUM_DOCS).astype(float).tolist()
    genres = [["Comedy", "Drama"][: 1 + row % 2] if row % 3 else ["Drama"] for row in range(NUM_DOCS)]
    return vectors, query, {"year": year, "genres": genres}


@pytest.mark.parametrize("title", ["exact.sql", "indexed.sql"])
@pytest.mark.parametrize(("score", "has_beta"), CASES)
def test_sql_of_the_page(server: Server, score: str, has_beta: bool, title: str) -> None:
    store = open_store(server.new_database())
    vectors, query, columns = drawn(score, has_beta=has_beta)
    radius = 1.1 * float(np.linalg.norm(vectors, axis=1).max())
    types: Any = {"year": "number", "genres": "categories"}
    collection = Collection(
        "first", MODEL, "dataset", 1, vectors.shape[1], has_beta, score, radius, types, store.options()
    )  # fmt: skip
    store.create(collection)
    keys = [f"k{row}" for row in range(NUM_DOCS)]
    store.write(collection, Documents(keys, keys, vectors, np.arange(NUM_DOCS), columns), 1)
    store.finish(collection)

    url = store.url + (INDEX_ALONE if title == "indexed.sql" else "")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET hnsw.ef_search = 200")
        connection.execute("SET hnsw.iterative_scan = relaxed_order")
        parameters = {"query": query.tolist()}
        rows = connection.execute(block(title), parameters).fetchall()  # type: ignore[arg-type]
        plan = str(connection.execute("EXPLAIN " + block(title), parameters).fetchall())  # type: ignore[arg-type]
    assert ("_hnsw" in plan) == (title == "indexed.sql")

    matches = np.array([y >= 1990 and "Comedy" in g for y, g in zip(columns["year"], columns["genres"], strict=True)])
    scores = np.where(matches, vectors.astype(np.float64) @ query, -np.inf)
    best = np.argsort(-scores)[:TOP]
    answered = [keys.index(key) for key, *_ in rows]
    np.testing.assert_allclose([row[2] for row in rows], scores[answered], rtol=1e-5, atol=1e-5)
    if title == "exact.sql":
        assert answered == best.tolist()
    assert len(answered) == TOP and len({*answered} & {*best.tolist()}) >= TOP - 1, "HNSW may miss one"


def test_operands_equal_those_of_the_store(server: Server) -> None:
    """Without a filter, the answers of `search`, by the index alone."""
    store = open_store(server.new_database() + INDEX_ALONE)
    vectors, query, columns = drawn("dot", has_beta=True)
    types: Any = {"year": "number", "genres": "categories"}
    collection = Collection("first", MODEL, "d", 1, DIM + 1, True, "dot", 40.0, types, store.options())
    store.create(collection)
    keys = [f"k{row}" for row in range(NUM_DOCS)]
    store.write(collection, Documents(keys, keys, vectors, np.arange(NUM_DOCS), columns), 1)
    store.finish(collection)
    statement = re.sub("WHERE .*", "", block("indexed.sql"))
    with psycopg.connect(store.url, autocommit=True) as connection:
        for found in (query, np.zeros_like(query)):  # all scores of a vector without length are 0
            rows = connection.execute(statement, {"query": found.tolist()}).fetchall()  # type: ignore[arg-type]
            (answers,) = store.search(collection, found[None], TOP)
            np.testing.assert_allclose([row[2] for row in rows], [answer.score for answer in answers], atol=1e-5)
    store.create(replace(collection, publication=2))  # the functions exist


@pytest.mark.parametrize("scheme", ["postgresql", "qdrant"])
def test_the_vector_of_a_request_is_sent_as_it_is(
    server: Server,
    scheme: str,
    model_dir: Path,
    vectors_dir: Path,
    dataset: Dataset,
    tmp_path: Path,
) -> None:
    url = server.new_database() if scheme == "postgresql" else f"qdrant://{tmp_path}/store"
    store = open_store(url)
    publish(store, vectors_dir, dataset, "first")
    build_index(vectors_dir, tmp_path / "index")
    searcher = Searcher.open(model_dir, tmp_path / "index", str(dataset.dir))
    request = Request("u7", top=TOP, filter="year >= 1990 and genres = Comedy", exclude_seen=False)
    expected = searcher.search([request])[0]
    assert len(expected) > 1
    vector = searcher.query_vector(request)
    assert vector.model == store.collection("first").model
    if scheme == "postgresql":
        with psycopg.connect(url) as connection:
            rows = connection.execute(block("exact.sql"), asdict(vector) | {"query": vector.vector}).fetchall()  # type: ignore[arg-type]
        answers = [(key, score) for key, _, score in rows]
    else:
        request = replace(request, filter="genres = Comedy")
        expected = searcher.search([request])[0]
        answers = points_of_the_page(store, vector.vector)
    assert [key for key, _ in answers] == [document.key for document in expected]
    np.testing.assert_allclose(
        [score for _, score in answers], [document.score for document in expected], rtol=1e-5, atol=1e-6
    )


def points_of_the_page(store: Any, query: list[float]) -> list[tuple[str, float]]:
    names = {"client": store._client(), "query": query}  # a local folder is for one client
    exec(block("points.py"), names)
    return list(names["answers"])


def test_rows_of_a_faiss_file(model_dir: Path, vectors_dir: Path, dataset: Dataset, tmp_path: Path) -> None:
    build_index(vectors_dir, tmp_path / "index")
    searcher = Searcher.open(model_dir, tmp_path / "index", str(dataset.dir))
    request = Request("u7", top=TOP, exclude_seen=False)
    names: dict[str, Any] = {"query": searcher.query_vector(request).vector}
    exec(block("rows.py").replace("runs/quickstart/index", str(tmp_path / "index")), names)
    documents = searcher.search([request])[0]
    assert dataset.catalogue.keys(names["rows"][0]) == [document.key for document in documents]
    expected = [document.score for document in documents]
    np.testing.assert_allclose(names["scores"][0], expected, rtol=1e-5, atol=1e-6)
