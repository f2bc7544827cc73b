"""Error answers have nothing of the dataset and of the machine that the client did not send."""

from __future__ import annotations

import csv
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigdssm.checkpoints.model_folder import load_model_folder, save_model_folder
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import BigDSSMError, CheckpointError, ConfigError, DataError, UnavailableError
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestTarget
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.retrieval.index import build_index
from bigdssm.retrieval.publish import publish
from bigdssm.retrieval.request import Request
from bigdssm.retrieval.vectors import write_vectors
from bigdssm.serving.searcher import Folders
from bigdssm.stores.base import open_store
from tests.command_line import Tools
from tests.conftest import write_config
from tests.unit.conftest import SMALL, random_model

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

from bigdssm.serving.app import make_app

MARK = "Qx7"  # in every id, title and folder of the dataset, and in no request
START = 1_600_000_000
DATA: dict[str, object] = {
    "title": "title",
    "query": {
        "history": {"type": "history", "of": "item_id", "max_items": 5},
        "age": {"type": "numeric"},
        "mentor": {"type": "categorical"},
    },
    "doc": {
        "item_id": {"type": "categorical"},
        "title": {"type": "text", "max_tokens": 8},
        "shop": {"type": "categorical"},
        "year": {"type": "numeric"},
    },
    "event": {"action": {"type": "categorical"}, "hour": {"type": "calendar"}},
    "request": ["action", "hour"],
    "tokenizer": {"vocab_size": 60},
    "lanes": 4,
}
REQUEST = {"now": START + 10_000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, dataset, index and vectors, and a store whose alias `live` is a collection."""
    root = tmp_path_factory.mktemp(MARK)
    names = [f"{MARK}item{number}" for number in range(12)]
    tables: dict[str, list[list[object]]] = {
        "items": [["item_id", "title", "shop", "year"], *([n, f"{n} title", f"{n} shop", 1990] for n in names)],
        "users": [["user_id", "age", "mentor"], *([f"{MARK}user{u}", 20 + u, f"{MARK}user{u % 3}"] for u in range(9))],
        "events": [["user_id", "item_id", "timestamp", "action"]],
    }
    for u in range(9):
        for t in range(8):
            action = ["view", "buy"][t % 2]
            tables["events"].append([f"{MARK}user{u}", names[(u + t * (1 + u % 3)) % 12], START + 60 * t + u, action])
    for name, rows in tables.items():
        with (root / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    path = write_config(root, DATA)
    config = load_config(path, [f"model.{override}" for override in SMALL])
    sources = InteractionTables(root / "events.csv", root / "items.csv", root / "users.csv")
    make_interactions(config.data, sources, IngestTarget(root / "dataset"))
    dataset = Dataset.open(root / "dataset")
    model = random_model(config, dataset, seed=1)
    save_model_folder(root / "model", model, config, dataset.schema, dataset.tokenizer_dir, {})
    loaded = load_model_folder(root / "model")
    write_vectors(root / "vectors", tower_encoders(loaded.model, dataset), dataset, loaded.checksum)
    build_index(root / "vectors", root / "index")
    store = open_store(f"file://{root / 'store'}")
    publish(store, root / "vectors", dataset, f"{MARK}collection")
    store.switch("live", f"{MARK}collection")
    return root


def folders_of(root: Path, index: str) -> Folders:
    return Folders(root / "model", root / "index" if index == "folder" else f"file://{root / 'store'}")


def near_ids(random: random.Random) -> str:
    """Return a text that is similar to an id, a title or a value of the dataset, for suggestions to be found."""
    kind, number = random.choice(["user", "item"]), random.randrange(14)
    text = f"{random.choice(['Qx', 'Q7', 'x7', 'q_x_7'])}{kind}{number}{random.choice(['', ' title', ' shop'])}"
    return random.choice([text, text, text.upper(), "", " ", "\x00", "nobody", f"{text}\x00", text * 30])


def body_of(random: random.Random) -> dict[str, Any]:
    """Draw a request; most are invalid."""

    def value() -> Any:
        return random.choice([near_ids(random), near_ids(random), 3, -1e300, None, [1, 2], [near_ids(random)], "nan"])

    def when() -> Any:
        return random.choice([REQUEST["now"], REQUEST["now"], None, 5, 1e13, -1.0, 1e300])

    def condition() -> str:
        feature = random.choice(["item_id", "shop", "year", "title", "age", "itemid"])
        operand = random.choice([f'"{near_ids(random)}"', "1990", "(", near_ids(random)])
        return f"{feature} {random.choice(['=', '!=', '<', 'in', 'not in'])} {operand}"

    def event() -> dict[str, Any]:
        features = {random.choice(["action", "hour", "deed"]): value()}
        return {"item": near_ids(random), "time": when(), "features": random.choice([None, None, features])}

    fields: dict[str, Callable[[], Any]] = {
        "user": lambda: near_ids(random),
        "document": lambda: near_ids(random),
        "features": lambda: {random.choice(["age", "mentor", "history", near_ids(random)]): value()},
        "events": lambda: [event() for _ in range(random.randrange(3))],
        "now": when,
        "filter": condition,
        "exclude": lambda: [near_ids(random)],
        "exclude_seen": lambda: random.choice([True, False, 3]),
        "top": lambda: random.choice([1, 100, 1000, "5"]),
        "context": lambda: {random.choice(["action", "hour", "deed"]): value()},
    }
    names = random.sample(list(fields), random.choice([1, 2, 2, 3]))
    body = {name: fields[name]() for name in names}
    return {**random.choice([{}, REQUEST, {**REQUEST, "events": []}, {**REQUEST, "events": []}]), **body}


@pytest.mark.parametrize("index", ["folder", "store"])
def test_an_error_has_no_id_of_the_dataset_and_no_path(folder: Path, index: str) -> None:
    """Random requests whose ids are nearly those of the dataset."""
    draw = random.Random(index)
    statuses: Counter[tuple[str, int]] = Counter()
    sentences = set()
    with TestClient(make_app(folders_of(folder, index).open(), has_vectors=True, cache_size=0)) as client:
        for _ in range(400):
            path = draw.choice(["/api/search", "/api/search", "/api/why", "/api/vector", "/api/similar"])
            if path == "/api/similar":
                parameters = {"key": near_ids(draw), "exclude": near_ids(draw), "top": draw.choice([3, 3, 1000])}
                answer = client.get(path, params=parameters)
            else:
                answer_key = {"answer": near_ids(draw)} if path == "/api/why" else {}
                answer = client.post(path, json={**body_of(draw), **answer_key})
            statuses[path, answer.status_code] += 1
            if answer.status_code >= 400:
                assert MARK not in answer.text and str(folder) not in answer.text, answer.text
                sentences.add(re.sub("'.*?'", "…", answer.json()["error"])[:40])
        for path in ("/api/users", "/api/none", f"/second/api/similar?key={near_ids(draw)}"):
            answer = client.get(path)
            assert answer.status_code == 404 and MARK not in answer.text
    for path in ("/api/search", "/api/why", "/api/vector"):
        assert all(statuses[path, status] for status in (400, 404, 422)), statuses
    assert statuses["/api/similar", 404] and statuses["/api/similar", 422]
    assert {status for _, status in statuses} <= {200, 400, 404, 422}, statuses
    assert {"no user is called …", "no document has the key …"} < sentences
    assert len(sentences) > 25, "too few kinds of errors"


@pytest.mark.parametrize("index", ["folder", "store"])
def test_an_error_about_a_known_user_has_no_id(folder: Path, index: str) -> None:
    with TestClient(make_app(folders_of(folder, index).open(), has_vectors=True, cache_size=0)) as client:
        user = f"{MARK}user3"
        assert client.post("/api/search", json={**REQUEST, "user": user}).status_code == 200
        for body in (
            {"user": user, "now": 5},
            {"user": user, "now": START * 1000},
            {"user": user, "now": None},
            {"user": user, "now": START + 10_000, "events": [{"item": "x", "time": START - 5}]},
            {"user": user, "events": [{"item": "x"}]},
            {"user": user, "document": "x"},
        ):
            answer = client.post("/api/search", json={**REQUEST, **body})
            assert answer.status_code == 400 and MARK not in answer.text, answer.text
        for number in range(14):
            for feature in ("shop", "item_id"):
                condition = f'{feature} = "Qxitem{number}"'
                answer = client.post("/api/search", json={**REQUEST, "events": [], "filter": condition})
                assert answer.json() == {"error": f"filter: {feature} has no value 'Qxitem{number}'"}


@pytest.mark.parametrize("kind", [DataError, UnavailableError, CheckpointError])
def test_a_fault_of_the_server_is_described_in_its_log_alone(
    folder: Path, kind: type[BigDSSMError], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    searcher = folders_of(folder, "store").open()

    def fail(*arguments: Any) -> None:
        raise kind(f"file://{folder}/store: collection {MARK}collection: {MARK}item3 is damaged")

    with TestClient(make_app(searcher, has_vectors=True)) as client:
        monkeypatch.setattr(type(searcher._index.store), "search", fail)  # type: ignore[union-attr]
        monkeypatch.setattr(type(searcher._index.store), "vectors", fail)  # type: ignore[union-attr]
        for answer in (
            client.post("/api/search", json={**REQUEST, "user": f"{MARK}user3"}),
            client.post("/api/why", json={**REQUEST, "user": f"{MARK}user3", "answer": "x"}),
            client.get("/api/similar", params={"key": "x"}),
        ):
            assert answer.status_code == (503 if kind is UnavailableError else 500)
            assert MARK not in answer.text and answer.json()["error"]
    assert f"{MARK}item3 is damaged" in caplog.text


def test_ids_of_users_need_an_option(folder: Path) -> None:
    searcher = folders_of(folder, "folder").open()
    for listed in (False, True):
        with TestClient(make_app(searcher, has_users=listed)) as client:
            answer = client.get("/api/users")
            assert (answer.status_code, MARK in answer.text) == ((200, True) if listed else (404, False))
            about = client.get("/api/about").json()
            assert about["users"] and about["list_users"] is listed
            assert ("/api/users" in client.get("/openapi.json").json()["paths"]) == listed


def test_the_command_line_has_examples(folder: Path, tools: Tools, tmp_path: Path) -> None:
    searcher = folders_of(folder, "folder").open()
    users = "; ".join(f"{MARK}user{u}" for u in range(3))
    with pytest.raises(DataError, match=f"no user is called 'nobody'; existing users are: {users}") as raised:
        searcher.search([Request("nobody", now=REQUEST["now"])])
    assert raised.value.public_message == "no user is called 'nobody'"
    with pytest.raises(ConfigError, match=f"shop has no value 'Qxitem3 shop'; did you mean '{MARK}item3 shop'"):
        searcher.search([Request(events=[], now=REQUEST["now"], filter='shop = "Qxitem3 shop"')])
    with pytest.raises(ConfigError, match=f"as the events of the dataset {folder / 'dataset'}"):
        searcher.search([Request(events=[], now=5)])
    request = tmp_path / "request.json"
    events = [{"item": f"{MARK}item{number}", "time": START + number} for number in (3, 4)]
    request.write_text(json.dumps({**REQUEST, "user": "nobody", "events": events}))
    options = ["--model", folder / "model", "--index", folder / "index"]
    output = tools.ran("search", *options, "--request", request)
    assert f"skipped: no user is called 'nobody'; existing users are: {users}" in output
    assert f"{MARK}item4 title; {MARK}item3 title" in output
