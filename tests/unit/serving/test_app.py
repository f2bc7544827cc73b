"""Serving: the API equals the library under concurrent requests; invalid input gets a one-sentence error."""

from __future__ import annotations

import asyncio
import difflib
import json
import logging
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.commands import forget as forget_command
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import CheckpointError, DataError
from bigdssm.loader.batch import Collator
from bigdssm.retrieval.embed import query_vectors, tower_encoders
from bigdssm.retrieval.index import Index, build_index, open_index
from bigdssm.retrieval.queries import (
    COMPARED_CHARACTERS,
    MOST_COMPARED,
    DocumentNames,
    Queries,
    Query,
)
from bigdssm.retrieval.request import Event, Request
from bigdssm.retrieval.vectors import write_vectors
from bigdssm.serving.app import Value
from bigdssm.serving.live import AnswerCache, Batcher, Overloaded
from bigdssm.serving.searcher import Folders, Searcher
from bigdssm.utils.atomic import replace_folder
from tests.command_line import Tools
from tests.tolerances import assert_scores_close
from tests.unit.conftest import WIDTH

fastapi = pytest.importorskip("fastapi")
import uvicorn  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402
from pydantic import ValidationError  # noqa: E402

from bigdssm.features.vector import MAX_DIM  # noqa: E402
from bigdssm.serving.app import MOST_BYTES, RequestBody, RequestLimits, make_app  # noqa: E402  # noqa: E402
from bigdssm.serving.metrics import log_accesses  # noqa: E402
from bigdssm.serving.server import _Protocol  # noqa: E402
from tests.unit.serving.metrics_text import counted  # noqa: E402


@pytest.fixture(scope="module")
def searcher(model_dir: Path, index_dir: Path, dataset: Dataset) -> Searcher:
    return Searcher(load_model_folder(model_dir), open_index(index_dir), dataset)


@pytest.fixture
def client(searcher: Searcher) -> Iterator[TestClient]:
    with TestClient(make_app(searcher)) as client:
        yield client


def expected(model_dir: Path, index_dir: Path, dataset: Dataset, query: Query, top: int) -> list[tuple[str, float]]:
    folder = load_model_folder(model_dir)
    collator = Collator(dataset.schema, dataset.catalogue)
    vector = query_vectors(folder.model, collator.query_features(query.columns)).numpy()
    scores, rows = open_index(index_dir).nearest(vector, top, folder.checksum, [query.excluded], query.allowed)
    return list(zip(dataset.catalogue.keys(rows[0][rows[0] >= 0]), scores[0].tolist(), strict=False))


def resolve(dataset: Dataset, **request: Any) -> Query:
    return Queries(dataset.schema, dataset.tokenizer, dataset, exclude_seen=True).of(Request(**request))


def test_a_user(client: TestClient, model_dir: Path, index_dir: Path, dataset: Dataset) -> None:
    answer = client.post("/api/search", json={"user": "u7", "top": 12}).json()
    wanted = expected(model_dir, index_dir, dataset, resolve(dataset, user="u7"), 12)
    assert [entry["key"] for entry in answer["documents"]] == [key for key, _ in wanted]
    assert_scores_close([entry["score"] for entry in answer["documents"]], [s for _, s in wanted], WIDTH)
    assert [entry["rank"] for entry in answer["documents"]] == list(range(1, len(wanted) + 1))
    newest = resolve(dataset, user="u7").seen[::-1][:5]
    assert answer["history"] == dataset.catalogue.titles(newest)
    assert answer["total_ms"] > 0 and answer["encode_ms"] > 0 and not answer["cached"]


def test_excluded_keys_are_no_answers(client: TestClient, searcher: Searcher) -> None:
    def keys(answer: Any) -> list[str]:
        return [entry["key"] for entry in answer.json()["documents"]]

    every = keys(client.post("/api/search", json={"user": "u7", "top": 40}))
    body = {"user": "u7", "top": 40, "exclude": [*every[:3], every[0], "i999"]}
    answer = client.post("/api/search", json=body)
    assert keys(answer) == every[3:] and answer.json()["unknown_excluded"] == 1
    assert answer.json()["unknown_events"] == 0
    assert "bigdssm_unknown_excluded_total 1.0" in client.get("/metrics").text
    (same,) = searcher.search([Request("u7", exclude=tuple(every[:3]), top=5)])
    assert [document.key for document in same] == every[3:8], "as many as requested"
    near = keys(client.get("/api/similar", params={"key": "i3", "top": 40}))
    left = client.get("/api/similar", params={"key": "i3", "top": 5, "exclude": [near[0], near[2], "i999"]})
    assert keys(left) == [near[1], *near[3:7]]
    for exclude, sentence in (("i3", "exclude"), ([3], "exclude"), (["x"] * 1001, "1000")):
        refused = client.post("/api/search", json={"user": "u7", "exclude": exclude})
        assert refused.status_code == 422 and sentence in refused.json()["error"], exclude


@pytest.mark.parametrize(
    ("events", "unknown_events"),
    [
        ([{"item": "i5"}, {"item": "i6"}], 0),
        ([{"item": "i5", "time": 1.0}, {"item": "none", "time": 2.0}], 1),
        ([], 0),
    ],
)
def test_an_unknown_user_is_answered_from_the_events_of_the_request(
    searcher: Searcher, events: list[dict[str, Any]], unknown_events: int
) -> None:
    assert not searcher.queries._schema.empty_histories
    body = {"features": {"age": 30}, "exclude": ["i3"], "top": 7, "events": events}
    named = {**body, "user": "nobody"}
    with TestClient(make_app(searcher, has_vectors=True)) as client:

        def post(path: str, content: dict[str, Any]) -> Any:
            answer = client.post(path, json=content)
            assert answer.status_code == 200, answer.text
            return answer.json()

        without, unknown = post("/api/search", body), post("/api/search", named)
        assert (without["unknown_user"], unknown["unknown_user"]) == (False, True)
        assert unknown["unknown_events"] == without["unknown_events"] == unknown_events
        assert unknown["documents"] == without["documents"] and len(unknown["documents"]) == 7
        assert unknown["history"] == without["history"]
        assert post("/api/vector", named) == post("/api/vector", body)
        reasons = [post("/api/why", {**content, "answer": "i7"})["history"] for content in (body, named)]
        assert reasons[0] == reasons[1] and len(reasons[0]) == len(events) - unknown_events
        assert post("/api/search", {"user": "u7"})["unknown_user"] is False
        assert counted(client)["bigdssm_unknown_users_total"] == 1
        del named["events"]
        assert client.post("/api/search", json=named).status_code == 404


def test_an_unknown_user_is_one_without_events_if_the_model_learned_empty_histories(
    model_dir: Path, index_dir: Path, dataset: Dataset
) -> None:
    searcher = Searcher(load_model_folder(model_dir), open_index(index_dir), dataset)
    searcher.queries._schema = replace(searcher.queries._schema, empty_histories=True)
    features = {"age": 30}
    unknown, without = searcher.search([Request("nobody", features), Request(features=features, events=[])])
    assert unknown == without and len(unknown) == 10


def test_a_profile_with_live_events_and_a_filter(
    client: TestClient, model_dir: Path, index_dir: Path, dataset: Dataset
) -> None:
    events = [{"item": "i9", "time": 20.0, "features": {}}, {"item": "i2", "time": 10.0}, {"item": "i8", "time": 40}]
    body = {
        "features": {"age": 33, "occupation": "artist"}, "events": [*events, {"item": "sold out", "time": 1}],
        "now": 30, "filter": 'genres in (Comedy, "Drama") and year < 1995',
    }  # fmt: skip
    answer = client.post("/api/search", json=body).json()
    query = resolve(
        dataset, features={"age": "33", "occupation": "artist"}, events=[Event("i2"), Event("i9")],
        filter="genres in (Comedy, Drama) and year < 1995",
    )  # fmt: skip
    assert query.seen.tolist() == [2, 9] and query.allowed is not None
    wanted = expected(model_dir, index_dir, dataset, query, 10)
    assert [entry["key"] for entry in answer["documents"]] == [key for key, _ in wanted]
    assert answer["history"] == dataset.catalogue.titles(np.array([9, 2])) and answer["unknown_events"] == 1
    everything = client.post("/api/search", json={**body, "top": 100}).json()["documents"]
    assert len(everything) == query.allowed.count - 2, "i2 and i9 match and were seen"
    with_seen = client.post("/api/search", json={**body, "top": 100, "exclude_seen": False}).json()["documents"]
    assert {entry["key"] for entry in with_seen} - {entry["key"] for entry in everything} == {"i2", "i9"}


def test_repeated_requests_come_from_the_cache(searcher: Searcher) -> None:
    with TestClient(make_app(searcher, cache_size=1)) as client:
        first = client.post("/api/search", json={"user": "u7"}).json()
        again = client.post("/api/search", json={"user": "u7", "top": 10}).json()
        assert (first["cached"], again["cached"]) == (False, True)
        assert again["documents"] == first["documents"]
        assert not client.post("/api/search", json={"user": "u7", "top": 3}).json()["cached"]
        assert not client.post("/api/search", json={"user": "u7"}).json()["cached"], "the cache holds one answer"
        found = counted(client)
        assert (found["bigdssm_batch_queries_sum"], found["bigdssm_batch_queries_count"]) == (3, 3)
        assert (found["bigdssm_cache_total hit"], found["bigdssm_cache_total miss"]) == (1, 3)
        assert found["bigdssm_requests_total /api/search 200"] == 4


def test_concurrent_queries_are_batched_and_answered_individually(searcher: Searcher) -> None:
    users = searcher.users[:30]
    with TestClient(make_app(searcher, cache_size=0)) as client:
        bodies = {user: {"user": user, "top": 1 + number % 7} for number, user in enumerate(users)}
        alone = {user: client.post("/api/search", json=bodies[user]).json() for user in users}
        before = counted(client)["bigdssm_batch_queries_count"]
        together: dict[str, Any] = {}

        def ask(user: str) -> None:
            together[user] = client.post("/api/search", json=bodies[user]).json()

        threads = [threading.Thread(target=ask, args=(user,)) for user in users]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert counted(client)["bigdssm_batch_queries_count"] - before < len(users)
    for user in users:
        a, b = alone[user]["documents"], together[user]["documents"]
        assert [entry["key"] for entry in a] == [entry["key"] for entry in b]
        np.testing.assert_allclose([e["score"] for e in a], [e["score"] for e in b], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["flat", "sq8", "hnsw", "ivf"])
def test_the_nearest_documents_of_a_document(
    kind: str, model_dir: Path, index_dir: Path, dataset: Dataset, tmp_path: Path
) -> None:
    vectors_dir = index_dir.with_name("vectors")
    build_index(vectors_dir, tmp_path / "index", kind)
    with TestClient(
        make_app(Searcher(load_model_folder(model_dir), open_index(tmp_path / "index"), dataset))
    ) as client:
        answer = client.get("/api/similar", params={"key": "i3", "top": 5}).json()
    vectors = np.load(vectors_dir / "vectors.npy")[:, :-1]  # without beta
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors[3]
    order = np.argsort(-cosines)[1:6]
    if kind != "sq8":
        assert [entry["key"] for entry in answer["documents"]] == dataset.catalogue.keys(order)
    np.testing.assert_allclose([entry["score"] for entry in answer["documents"]], cosines[order], atol=0.02)
    assert answer["of"] == dataset.catalogue.titles(np.array([3]))[0]


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ({}, 400, "the query is empty; give features, events or a user"),
        ({"history": ["i2"]}, 422, "history: Extra inputs are not permitted"),
        ({"events": [{"item": "i2", "tiem": 3}]}, 422, "events.0.tiem: Extra inputs are not permitted"),
        ({"events": [{"item": "i2", "deed": "buy"}]}, 422, "events.0.deed: Extra inputs are not permitted"),
        ({"events": [{"item": "i2", "time": 3}, {"item": "i3"}]}, 400, "1 of 2 events have no time"),
        ({"user": "u7", "now": "3"}, 422, "now: Input should be a valid number"),
        ({"user": "u7", "exclude_seen": 1}, 422, "exclude_seen: Input should be a valid boolean"),
        ({"user": "u7", "filter": "yeer > 3"}, 400, "got 'yeer', needs one of the categorical"),
        ({"user": "nobody"}, 404, "no user is called 'nobody'"),
        ({"features": {"colour": "red"}}, 400, "colour is not a query feature that can be given"),
        ({"features": {"colour\n": "red"}}, 400, "'colour\\n' is not a query feature that can be given"),
        ({"features": {"c" * 9000: "red"}}, 400, f"{'c' * 80} is not a query feature that can be given"),
        ({"features": {"age": "old"}}, 400, "age is 'old', needs a number"),
        ({"features": {"age": "1e99"}}, 400, "age is '1e99', needs a number"),
        ({"features": {"age": "nan"}}, 400, "age is 'nan', needs a number"),
        ({"features": {"age": " "}}, 400, "the query is empty"),
        ({"features": {"age": {"is": 33}}}, 422, "features.age: needs a text of at most 10000 characters, a finite"),
        ({"features": {"occupation": "x" * 10_001}}, 422, "features.occupation: needs a text of at most 10000"),
        ({"features": {"occupation": ["a", 3, None]}}, 422, "features.occupation: needs a text of at most 10000"),
        ({"features": {"occupation": ["a", 3]}}, 400, "occupation: values of one feature need one type"),
        ({"user": "u7", "filter": 'genres = "\\ud800"'}, 400, "'\\ud800' is not valid UTF-8"),
        ({"user": "u7", "top": 0}, 422, "top: Input should be greater than or equal to 1, got '0'"),
        ({"user": "u7", "top": 101}, 422, "top: Input should be less than or equal to 100"),
        ({"user": "u7", "top": True}, 422, "top: Input should be a valid integer"),
        ({"user": "u7", "top": "5"}, 422, "top: Input should be a valid integer"),
        ({"user": "u7", "top": 10**400}, 422, "top: Input should be"),
        ({"features": {"age": 10**400}}, 422, "features.age: needs a text"),
        ({"events": [{"item": "i3", "time": 10**400}]}, 422, "events.0.time: "),
        ({"user": "u7", "filter": " and ".join(f"year > {n}" for n in range(500))}, 400, "got 500 conditions"),
        ({"user": "u7", "tpo": 5}, 422, "tpo: Extra inputs are not permitted"),
        ([], 422, "the request: Input should be"),
    ],
)  # fmt: skip
def test_bad_queries_give_a_one_line_error(client: TestClient, body: object, status: int, sentence: str) -> None:
    answer = client.post("/api/search", json=body)
    assert answer.status_code == status
    assert sentence in answer.json()["error"]
    assert "\n" not in answer.json()["error"] and len(answer.json()["error"]) < 300


def test_bad_requests_give_a_one_line_error(client: TestClient) -> None:
    as_json = {"Content-Type": "application/json"}
    half_a_key, half_a_name = b'{"features": {"\\ud800": "x"}}', b'{"user": "\\udfff"}'
    twice = b'{"user": "u7", "context": {"a": 1, "a": 2}}'
    for answer, status, sentence in (
        (client.post("/api/search", content=b"{", headers=as_json), 422, "the request is not valid JSON: "),
        (client.post("/api/search", content=b'{"user": "\xc3("}', headers=as_json), 400, "POST /api/search: "),
        (
            client.post("/api/search", content=twice, headers=as_json),
            422,
            "JSON: an object of the request has the key 'a' 2",
        ),
        (client.post("/api/search", content=b"{}"), 422, "the request: Input should be a valid dictionary"),
        (client.post("/api/search", content=b" " * (MOST_BYTES + 1)), 413, f"needs at most {MOST_BYTES}"),
        (client.post("/api/search", content=iter([b"{}"])), 411, "no Content-Length"),
        (client.post("/api/search", content=half_a_key, headers=as_json), 422, "features."),
        (
            client.post("/api/search", content=b'{"features": {"age": NaN}}', headers=as_json),
            422,
            "features.age: needs a text of at most 10000 characters, a finite number",
        ),
        (
            client.post("/api/search", content=b'{"features": {"age": [1, Infinity]}}', headers=as_json),
            422,
            "features.age: needs a text",
        ),
        (client.post("/api/search", content=b"[" * 100_000, headers=as_json), 400, "POST /api/search: "),
        (client.post("/api/search", content=half_a_name, headers=as_json), 422, "user: Input should be a valid"),
        (client.post("/api/search", json={"features": {"x" * 10_001: "x"}}), 422, "should have at most 10000"),
        (client.post("/api/search", json={"features": {"age": " "}}), 400, "the query is empty"),
        (client.post("/api/search", json={"user": ""}), 400, "the query is empty"),
        (client.get("/api/search"), 405, "Method Not Allowed"),
        (client.get("/api/nothing"), 404, "GET /api/nothing: Not Found"),
        (client.get("/api/similar"), 422, "key: Field required"),
        (client.get("/api/similar", params={"key": "i3", "top": 1000}), 422, "top: Input should be less than"),
        (client.get("/api/similar", params={"key": "i999"}), 404, "no document has the key 'i999'"),
    ):
        assert answer.status_code == status, answer.text
        assert sentence in answer.json()["error"] and len(answer.json()["error"]) < 300
    assert client.post("/api/search", json={"user": "u7"}).status_code == 200


def test_a_damaged_model_is_an_error_of_the_server(
    client: TestClient, searcher: Searcher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has the reason, once; the answer has no path."""
    calls = []

    def damaged(*arguments: Any) -> None:
        calls.append(arguments)
        kind = CheckpointError if len(calls) < 3 else DataError
        raise kind(f"{searcher.queries} is damaged: block {min(len(calls), 2)}; copy the folder again")

    monkeypatch.setattr(searcher.queries, "of", damaged)
    for _ in range(4):
        response = client.post("/api/search", json={"user": "u1"})
        assert response.status_code == 500
        assert response.json() == {
            "error": "the model, index or dataset of the server is damaged; its log has the reason"
        }
    assert len(calls) == 4
    assert [caplog.text.count(f"block {block}; copy the folder again") for block in (1, 2)] == [1, 1]


def test_others_are_answered_while_a_query_is_looked_up(searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, others_answered, waited = threading.Event(), threading.Event(), []
    of = searcher.queries.of

    def slow(*arguments: Any) -> Query:
        begun.set()
        waited.append(others_answered.wait(10))
        return of(*arguments)

    monkeypatch.setattr(searcher.queries, "of", slow)
    with TestClient(make_app(searcher)) as client:
        asking = threading.Thread(target=client.post, args=("/api/search",), kwargs={"json": {"user": "u7"}})
        asking.start()
        assert begun.wait(10)
        assert client.get("/api/about").status_code == 200
        others_answered.set()
        asking.join()
    assert waited == [True], "the lookup blocked another request"


def test_requests_of_other_filters_share_a_batch(searcher: Searcher) -> None:
    requests = [
        Request("u7", filter="year < 1980", top=2), Request("u8", top=6),
        Request("u9", filter="genres = Comedy", top=1), Request("u7", None, None, None, "year < 1980", False, 100),
    ]  # fmt: skip
    together, alone = searcher.search(requests), [searcher.search([request])[0] for request in requests]
    assert [[document.key for document in some] for some in together] == [[d.key for d in some] for some in alone]
    assert list(map(len, together)) == [2, 6, 1, 19], "i1 to i19 are older"


def test_a_new_model_and_index_are_loaded_together(
    model_dir: Path, other_model_dir: Path, index_dir: Path, dataset: Dataset, tmp_path: Path
) -> None:
    for source, name in ((model_dir, "model"), (index_dir, "index"), (other_model_dir, "new")):
        shutil.copytree(source, tmp_path / name)
    other = load_model_folder(other_model_dir)
    write_vectors(tmp_path / "vectors", tower_encoders(other.model, dataset), dataset, other.checksum)
    build_index(tmp_path / "vectors", tmp_path / "new-index")
    folders = Folders(tmp_path / "model", tmp_path / "index", str(dataset.dir))
    expected = Searcher(other, open_index(tmp_path / "new-index"), dataset).search([Request("u7")])[0]
    with TestClient(make_app(folders.open(), folders=folders, poll_s=0.02)) as client:
        first = client.post("/api/search", json={"user": "u7"}).json()
        assert client.get("/readyz").text == client.get("/healthz").text == "ok"
        replace_folder(tmp_path / "new", tmp_path / "model")
        time.sleep(0.5)
        assert client.post("/api/search", json={"user": "u7"}).json()["cached"], "a model alone is not loaded"
        replace_folder(tmp_path / "new-index", tmp_path / "index")
        until = time.monotonic() + 20
        while client.get("/api/about").json()["model"] != other.checksum:
            assert time.monotonic() < until
        found = client.post("/api/search", json={"user": "u7"}).json()
        assert not found["cached"] and found["documents"] != first["documents"]
        assert [entry["key"] for entry in found["documents"]] == [document.key for document in expected]
        assert counted(client)["bigdssm_model_loads_total"] == 1


@pytest.fixture
def forgetful(model_dir: Path, index_dir: Path, dataset: Dataset, tmp_path: Path) -> tuple[Folders, dict[str, Path]]:
    """Folders of copies, and the paths of these by option of `bigdssm forget`."""
    sources = {"data": dataset.dir, "model": model_dir, "vectors": index_dir.parent / "vectors", "index": index_dir}
    paths = {name: Path(shutil.copytree(source, tmp_path / name)) for name, source in sources.items()}
    return Folders(paths["model"], paths["index"], str(paths["data"])), paths


def until(holds: Callable[[], Any]) -> None:
    end = time.monotonic() + 15  # less than the 30 s after which a failed reload is tried again
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def forget(paths: dict[str, Path], options: Sequence[str], *ids: str) -> None:
    assert forget_command.main([*ids, *(word for name in options for word in (f"--{name}", str(paths[name])))]) == 0


def test_a_forgotten_user_has_no_answers(forgetful: tuple[Folders, dict[str, Path]]) -> None:
    """Neither cached nor new ones: the model and index stay the same, and no partition is added."""
    folders, paths = forgetful
    with TestClient(make_app(folders.open(), folders=folders, poll_s=0.02, has_users=True)) as client:
        for _ in range(2):
            cached = client.post("/api/search", json={"user": "u7"}).json()["cached"]
        users = client.get("/api/users").json()
        assert cached and {"u7", "u8"} < set(users)
        forget(paths, ["data"], "--user", "u7", "--user", "u8")
        until(lambda: counted(client)["bigdssm_model_loads_total"] == 1)
        for user in ("u7", "u8"):
            assert client.post("/api/search", json={"user": user}).status_code == 404
        remaining = client.get("/api/users").json()
        assert remaining and not {"u7", "u8"} & set(remaining)
        assert client.post("/api/search", json={"user": "u9"}).status_code == 200
        time.sleep(0.3)
        assert counted(client)["bigdssm_model_loads_total"] == 1


@pytest.mark.parametrize("options", [["data", "vectors", "index"], ["data", "model", "vectors", "index"]])
def test_a_forgotten_item_is_no_answer(
    options: list[str],
    forgetful: tuple[Folders, dict[str, Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The new model is loaded, and the new index refused, before the dataset is replaced."""
    folders, paths = forgetful
    of_vectors, of_index, opened = forget_command.forget_in_vectors, forget_command.forget_in_index, Folders.open
    refused = []
    body = {"features": {"age": 30}, "events": [], "top": 39}
    with TestClient(make_app(folders.open(), folders=folders, poll_s=0.02)) as client:

        def loads() -> float:
            return counted(client).get("bigdssm_model_loads_total", 0.0)

        def opens(folders: Folders, current: Searcher | None = None) -> Searcher:
            try:
                return opened(folders, current)
            except CheckpointError as error:
                refused.append(str(error))
                raise

        def slow_vectors(*arguments: Any) -> None:
            until(lambda: loads() == ("model" in options))
            of_vectors(*arguments)

        def slow_index(*arguments: Any) -> None:
            of_index(*arguments)
            until(lambda: any("built from another dataset" in error for error in refused))

        monkeypatch.setattr(Folders, "open", opens)
        monkeypatch.setattr(forget_command, "forget_in_vectors", slow_vectors)
        monkeypatch.setattr(forget_command, "forget_in_index", slow_index)
        keys = [one["key"] for one in client.post("/api/search", json=body).json()["documents"]]
        forget(paths, options, "--item", keys[0])
        until(lambda: loads() == 1 + ("model" in options))
        after = [one["key"] for one in client.post("/api/search", json=body).json()["documents"]]
        assert len(keys) == 39 and set(after) >= set(keys[1:]) and keys[0] not in after
        assert client.get("/api/similar", params={"key": keys[0]}).status_code == 404


class Unopened(Folders):
    """Folders with a new state, opened by `opens`."""

    opens: Callable[[], Searcher]

    def open(self, current: Searcher | None = None) -> Searcher:
        return type(self).opens()

    def state(self) -> bytes:
        return b"new"


def test_whole_numbers_are_not_rounded() -> None:
    values = TypeAdapter(Value)
    assert [values.validate_python(value) for value in (2**53 + 1, [2**62 + 1, -3], 2.5)] == [
        2**53 + 1,
        [2**62 + 1, -3],
        2.5,
    ]
    assert type(values.validate_json("3")) is int and type(values.validate_json(str(2**70))) is float


@pytest.mark.parametrize(
    "error",
    [
        RecursionError("deep"),
        MemoryError(),
        RuntimeError("onnx"),
        KeyError("x"),
        OSError(),
        DataError("the dataset is not there yet"),
    ],
)
def test_the_watcher_survives_any_error_of_a_folder(
    searcher: Searcher, error: Exception, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigdssm.serving.live.RETRY_S", 0.01)
    tried: list[int] = []
    looked: list[int] = []

    def opens() -> Searcher:
        tried.append(1)
        if len(tried) < 3:
            raise error
        return searcher

    class Failing(Unopened):
        def state(self) -> bytes:
            looked.append(1)
            if len(looked) == 1:
                raise error
            return b"new"

    Failing.opens = staticmethod(opens)  # type: ignore[assignment]
    with TestClient(make_app(searcher, folders=Failing(Path("m"), Path("i")), poll_s=0.01)) as client:
        until = time.monotonic() + 10
        while not counted(client)["bigdssm_model_loads_total"]:
            assert time.monotonic() < until
        assert client.post("/api/search", json={"user": "u7"}).status_code == 200
    assert "cannot check m: " in caplog.text
    assert "cannot reload m: " in caplog.text and len(tried) >= 3


def test_a_stop_does_not_wait_for_a_folder_that_opens_slowly(searcher: Searcher) -> None:
    begun, release = threading.Event(), threading.Event()

    def opens() -> Searcher:
        begun.set()
        release.wait(30)
        return searcher

    class Slow(Unopened):
        pass

    Slow.opens = staticmethod(opens)  # type: ignore[assignment]

    async def run() -> float:
        app = make_app(searcher, folders=Slow(Path("m"), Path("i")), poll_s=0.01)
        async with app.router.lifespan_context(app):
            while not begun.is_set():
                await asyncio.sleep(0.01)
        return time.monotonic()

    stopped = asyncio.run(run())
    assert time.monotonic() - stopped < 5, "the shutdown waited for the thread"
    release.set()


def test_requests_are_logged_as_json(searcher: Searcher, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("bigdssm.serving.requests")
    before = list(logger.handlers), logger.level, logger.propagate
    try:
        log_accesses()
        with TestClient(make_app(searcher)) as client:
            client.post("/api/search", json={"user": "nobody"})
            client.get("/invented/path")
            found = counted(client)
    finally:
        logger.handlers[:], logger.level, logger.propagate = before
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert [(line["method"], line["path"], line["status"]) for line in lines] == [
        ("POST", "/api/search", 404), ("GET", "/invented/path", 404), ("GET", "/metrics", 200),
    ]  # fmt: skip
    assert all(line["ms"] >= 0 and line["time"] > 1e9 for line in lines)
    assert found["bigdssm_requests_total other 404"] == 1, "clients cannot create labels"


def test_an_unknown_title_is_compared_with_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of requests may be long, and the catalogue large."""
    compared, close_matches = [], difflib.get_close_matches

    def counting(word: str, titles: Sequence[str], *others: Any) -> list[str]:
        compared.append((len(titles), max(map(len, titles), default=0), len(word)))
        return close_matches(word, titles, *others)

    monkeypatch.setattr(difflib, "get_close_matches", counting)
    keys = [str(number) for number in range(3 * MOST_COMPARED)]
    names = DocumentNames(keys, [f"{'ab'[int(key) % 2]} film {key} {'and on ' * 30}" for key in keys])
    assert names.nearest("b flim 9001 " + "and on " * 1000)[0].startswith("b film 9001 and")
    assert compared == [(MOST_COMPARED, COMPARED_CHARACTERS, COMPARED_CHARACTERS)]


def test_the_index_is_searched_with_the_requested_threads(
    model_dir: Path, index_dir: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any thread: FAISS's setting is per thread."""
    used: dict[str, int] = {}

    class Watched(Index):
        def nearest(self, *arguments: Any) -> Any:
            used["search"] = faiss.omp_get_max_threads()
            return super().nearest(*arguments)

        def similar(self, *arguments: Any) -> Any:
            used["similar"] = faiss.omp_get_max_threads()
            return super().similar(*arguments)

    opened = open_index(index_dir)
    index = Watched(opened.index, opened.meta, opened.keys, opened.title)
    before = faiss.omp_get_max_threads()
    with TestClient(make_app(Searcher(load_model_folder(model_dir), index, dataset, threads=before + 3))) as client:
        assert client.post("/api/search", json={"user": "u7"}).status_code == 200
        assert client.get("/api/similar", params={"key": "i3"}).status_code == 200
    assert used == {"search": before + 3, "similar": before + 3}


def test_the_server_listens_on_localhost_with_the_requested_threads(
    model_dir: Path, index_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    addresses, threads = [], []

    class Watched(Searcher):
        def __init__(self, *arguments: Any) -> None:
            threads.append(arguments[3])
            super().__init__(*arguments)

    def listen(address: tuple[str, int]) -> None:
        addresses.append(address)
        raise OSError("enough seen")

    monkeypatch.setattr(socket, "create_server", listen)
    monkeypatch.setattr("bigdssm.serving.searcher.Searcher", Watched)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    tools, arguments = Tools(monkeypatch, capsys), ("serve", "--model", model_dir, "--index", index_dir)
    assert "enough seen" in tools.refused(2, *arguments)
    assert (addresses, threads) == ([("127.0.0.1", 8000)], [None])
    tools.refused(2, *arguments, "--threads", 3)
    assert threads == [None, 3, 3], "the model's and the index's"
    assert "--threads 0: needs at least 1" in tools.refused(2, *arguments, "--threads", 0)


def test_invalid_server_options_give_a_one_line_error(
    model_dir: Path, index_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each error names its own requirement only."""
    tools, arguments = Tools(monkeypatch, capsys), ("serve", "--model", model_dir, "--index", index_dir)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for options, sentence in (
            (("--port", taken.getsockname()[1]), "cannot listen: Address already in use; choose another"),
            (("--port", 65536), "--port 65536: needs 0 to 65535"),
            (("--port", -1), "--port -1: needs 0 to 65535"),
            (("--max-batch", 0), "--max-batch 0: needs at least 1"),
            (("--cache", -1), "--cache -1: needs at least 0"),
            (("--timeout-s", 0), "--timeout-s 0: needs at least 1"),
            (("--host", "203.0.113.7"), "--host 203.0.113.7 --port 8000: cannot listen: Cannot assign"),
            (("--host", "no such.invalid"), "--host no such.invalid --port 8000: cannot listen: "),
        ):
            message = tools.refused(2, *arguments, *options)
            assert sentence in message and message.count("--") <= 3


def test_another_models_index_is_refused(
    other_model_dir: Path, model_dir: Path, index_dir: Path, dataset: Dataset
) -> None:
    with pytest.raises(CheckpointError, match="embed and index with the model in use"):
        Searcher(load_model_folder(other_model_dir), open_index(index_dir), dataset)
    with pytest.raises(DataError, match="have a history; give its dataset with --data"):
        Searcher(load_model_folder(model_dir), open_index(index_dir), None)


def test_a_full_queue_refuses_and_a_query_fails_alone() -> None:
    release = threading.Event()

    def work(batch: Sequence[str]) -> list[str]:
        release.wait(10)
        if "bad" in batch:
            raise RuntimeError("broken")
        return [one.upper() for one in batch]

    async def run() -> list[Any]:
        batcher: Batcher[str, str] = Batcher(work, max_batch=2, max_waiting=3)
        running = asyncio.create_task(batcher.run())
        first = asyncio.create_task(batcher("a"))
        await asyncio.sleep(0.05)  # the thread is busy
        others = [asyncio.create_task(batcher(one)) for one in ("bad", "b", "c")]
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded, match="3 queries are waiting"):
            await batcher("d")
        release.set()
        answers = await asyncio.gather(first, *others, return_exceptions=True)
        running.cancel()
        return answers

    first, bad, with_bad, last = asyncio.run(run())
    assert (first, with_bad, last) == ("A", "B", "C")
    assert isinstance(bad, RuntimeError)


def test_the_cache_evicts_the_least_recently_used() -> None:
    cache: AnswerCache[int] = AnswerCache(2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (1, None, 3)


def test_a_vector_of_any_allowed_length_is_a_value() -> None:
    assert RequestBody(features={"v": [0.5] * MAX_DIM}).features
    with pytest.raises(ValidationError, match=f"a list of at most {MAX_DIM} of these"):
        RequestBody(features={"v": [0.5] * (MAX_DIM + 1)})


@contextmanager
def served() -> Iterator[tuple[str, int]]:
    """Serve an application without routes; yield its address."""
    app = fastapi.FastAPI()
    app.add_middleware(RequestLimits, hosts=None)
    config = uvicorn.Config(app, http=_Protocol, ws="none", log_config=None, timeout_graceful_shutdown=2)
    server, listening = uvicorn.Server(config), socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield listening.getsockname()
    finally:
        server.should_exit = True
        thread.join()


def test_a_malformed_body_leaves_no_traceback_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """The server has answered such a request before the application does."""
    with served() as address:
        for chunks in (b"zz\r\nabc\r\n", b"-1\r\n", b"5\r\nabcde\r\n0\r\nno field\r\n\r\n"):
            with socket.create_connection(address, timeout=20) as connection:
                connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
                received = b"".join(iter(lambda: connection.recv(65536), b""))
            assert received.startswith(b"HTTP/1.1 400") and received.endswith(
                b'{"error": "this is not an HTTP request"}'
            )
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_body_does_not_wait_for_the_acknowledgement_of_its_head() -> None:
    """A delayed ACK takes 40 ms, from the second request of a connection on."""
    with served() as (host, port):
        connection, seconds = HTTPConnection(host, port, timeout=20), []
        for _ in range(8):
            started = time.perf_counter()
            connection.request("GET", "/none")
            assert connection.getresponse().read() == b'{"detail":"Not Found"}'
            seconds.append(time.perf_counter() - started)
        connection.close()
    assert min(seconds[2:]) < 0.03, seconds


@pytest.mark.parametrize(
    ("headers", "status", "sentence"),
    [
        ("Content-Length: 5\r\nTransfer-Encoding: chunked", 400, b"both Content-Length and Transfer-Encoding"),
        ("Transfer-Encoding: chunked", 411, b"no Content-Length"),
        (f"Content-Length: {MOST_BYTES + 1}", 413, b"needs at most"),
    ],
)
def test_the_status_of_invalid_headers(headers: str, status: int, sentence: bytes) -> None:
    with served() as address, socket.create_connection(address, timeout=20) as connection:
        connection.sendall(f"POST / HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n\r\n".encode())
        connection.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.startswith(f"HTTP/1.1 {status}".encode()) and sentence in received
