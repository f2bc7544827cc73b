"""Serving on a vector store: the answers are those of FAISS, and a request sees one model and one collection."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.commands import recommend as recommend_command
from bigdssm.commands import search as search_command
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import CheckpointError, ConfigError, DataError, UnavailableError
from bigdssm.ingest.job import IngestTarget
from bigdssm.ingest.pairs import ItemTables, make_items
from bigdssm.retrieval.index import build_index
from bigdssm.retrieval.publish import publish
from bigdssm.retrieval.queries import Filters, StoreFilters
from bigdssm.retrieval.request import Event, Request
from bigdssm.serving.searcher import Folders, Searcher
from bigdssm.stores import postgres
from bigdssm.stores.base import Collection, Documents, Store, open_store
from bigdssm.utils.atomic import replace_folder
from tests.command_line import Tools
from tests.conftest import TinyDataset
from tests.postgres import Server
from tests.tolerances import assert_scores_close
from tests.unit.conftest import WIDTH

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

from bigdssm.serving.app import make_app
from bigdssm.serving.live import Batcher
from tests.unit.serving.metrics_text import counted

REQUESTS = [
    Request("u7", top=12), Request("u8", filter="genres = Comedy and year < 1995", top=40), Request("u9", top=100),
    Request("u7", filter="year >= 1990 or genres not in (Drama, Action)", exclude=["i3", "i999"], exclude_seen=False),
    Request(features={"age": 30}, events=[Event("i5"), Event("i6")], top=7),
]  # fmt: skip


@pytest.fixture
def live(
    store: Store,
    vectors_dir: Path,
    other_vectors_dir: Path,
    dataset: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> Store:
    """A store whose alias `live` is the collection of the first model; the second one's is `second`."""
    publish(store, vectors_dir, dataset, "first")
    publish(store, other_vectors_dir, dataset, "second")
    store.switch("live", "first")
    if store.scheme in ("memory", "qdrant"):  # its content, or the lock of its folder, is in the object
        monkeypatch.setattr("bigdssm.stores.base.open_store", lambda url: replace(store, url=url))
    return store


@pytest.fixture
def models(model_dir: Path, other_model_dir: Path, tmp_path: Path) -> Path:
    """A folder of both models."""
    for number, folder in enumerate((model_dir, other_model_dir)):
        shutil.copytree(folder, tmp_path / "models" / f"night {number}")
    return tmp_path / "models"


def keys(documents: list[Any]) -> list[str]:
    return [document.key for document in documents]


def scores_of(documents: list[Any]) -> list[float]:
    return [document.score for document in documents]


def test_answers_are_those_of_faiss(
    live: Store,
    model_dir: Path,
    vectors_dir: Path,
    dataset: Dataset,
    tmp_path: Path,
) -> None:
    build_index(vectors_dir, tmp_path / "index")
    on_faiss, on_store = (Searcher.open(model_dir, index) for index in (tmp_path / "index", live.url))
    for mine, other in zip(on_store.search(REQUESTS), on_faiss.search(REQUESTS), strict=True):
        assert keys(mine) == keys(other) and len(mine) > 3
        assert [document.title for document in mine] == [document.title for document in other]
        assert_scores_close(scores_of(mine), scores_of(other), WIDTH)
    for exclude in ((), ("i4", "i5", "i999")):
        (title, mine), (other_title, other) = (one.similar("i3", 6, exclude) for one in (on_store, on_faiss))
        assert title == other_title and keys(mine) == keys(other)
        assert_scores_close(scores_of(mine), scores_of(other), WIDTH)
    mine, other = (one.why(Request("u7"), "i3") for one in (on_store, on_faiss))
    assert (mine.of, keys(mine.history)) == (other.of, keys(other.history)) and len(mine.history) == 5
    for call in (on_store.similar, lambda key, top: on_store.why(Request("u7"), key)):
        with pytest.raises(DataError, match="no document has the key 'none'"):
            call("none", 3)
    with pytest.raises(ConfigError, match="got 'yeer', needs one of"):
        on_store.search([Request("u7", filter="yeer > 3")])
    about, other_about = on_store.about(), on_faiss.about()
    assert about["filters"] == other_about["filters"] and about["documents"] == 40
    assert (about["index"], about["collection"], about["version"]) == (live.scheme, "first", dataset.stamp)
    assert abs(about["published"] - time.time()) < 600 and 0 <= about["age_s"] < 600 and 0 <= other_about["age_s"] < 600
    assert about["store"] == live.address and "postgres@" not in str(about)


def test_seen_documents_that_the_store_lacks_have_no_part_in_why(live: Store, model_dir: Path) -> None:
    searcher = Searcher.open(model_dir, live.url)
    before = keys(searcher.why(Request("u7"), "i3").history)
    live.delete(live.collection("first"), [before[1]], 9)
    live.finish(live.collection("first"))
    after = keys(searcher.why(Request("u7"), "i3").history)
    assert before[0] == "i3" and after[:4] == [before[0], *before[2:]]


@pytest.mark.parametrize("second", [False, True])
def test_the_model_of_the_collection_is_opened(live: Store, models: Path, second: bool) -> None:
    """Among several folders, at start and by name."""
    address = f"{live.url}#second" if second else live.url
    checksum = load_model_folder(models / f"night {int(second)}").checksum
    assert Searcher.open(models, address).about()["model"] == checksum
    other = models / f"night {int(not second)}"
    with pytest.raises(CheckpointError, match=r"holds vectors of model .*embed and index or publish with the model in"):
        Searcher.open(other, address)
    with pytest.raises(DataError, match="has no collection or alias 'none'"):
        Searcher.open(models, f"{live.url}#none")


@pytest.mark.parametrize("url", ["file"], indirect=True)
def test_a_replay_uses_the_model_of_each_request(live: Store, models: Path, tools: Tools, tmp_path: Path) -> None:
    """A log over a change of models; no alias names the collection of the second one."""
    log = tmp_path / "log"
    for number, name in enumerate(("first", "second")):
        searcher = Searcher.open(models, f"{live.url}#{name}")
        with TestClient(make_app(searcher, log_folder=log)) as client:
            for user in ("u7", "u8", "u9")[: 2 + number]:
                assert client.post("/api/search", json={"user": user, "top": 5}).status_code == 200
    arguments = ("--log", log, "--index", live.url)
    report = json.loads(tools.ran("replay", *arguments, "--model", models))
    assert (report["requests"], report["other_model"], report["other_index"]) == (5, 0, 0)
    assert (report["differing"], report["overlap"]) == (0, 1)
    report = json.loads(tools.ran("replay", *arguments, "--model", models / "night 0"))
    assert (report["requests"], report["other_model"], report["differing"]) == (2, 3, 0)
    live.drop("second")
    report = json.loads(tools.ran("replay", *arguments, "--model", models))
    assert (report["requests"], report["other_model"]) == (2, 3), "no index of the second model"


@pytest.mark.parametrize("url", ["file"], indirect=True)
def test_changes_between_the_reads_of_similar(
    live: Store, models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The document is deleted after its title was read, or the collection dropped after its vector was."""
    vectors, reads = type(live).vectors, []

    def deleted_at_once(store: Store, collection: Any, keys: Sequence[str]) -> dict[str, Any]:
        reads.append(keys)
        return vectors(store, collection, keys) if len(reads) == 1 else {}

    def dropped(store: Store, collection: Any, *arguments: Any) -> None:
        store.drop(collection.name)
        raise DataError("no such table")

    with TestClient(make_app(Folders(models, f"{live.url}#second").open())) as client:
        with monkeypatch.context() as patched:
            patched.setattr(type(live), "vectors", deleted_at_once)
            response = client.get("/api/similar?key=i3")
        assert response.status_code == 404 and "no document has the key 'i3'" in response.json()["error"], response.text
        assert len(reads) == 2
        monkeypatch.setattr(type(live), "search", dropped)
        response = client.get("/api/similar?key=i3")
        assert response.status_code == 503 and "second was dropped while it was served" in caplog.text


def test_a_collection_that_is_not_complete_is_not_served(
    live: Store, model_dir: Path, vectors_dir: Path, dataset: Dataset
) -> None:
    """A publication was killed before `finish`; the alias cannot name it, and the next publication completes it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(live), "finish", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            publish(live, vectors_dir, dataset, "half")
    for refused in (
        lambda: Searcher.open(model_dir, f"{live.url}#half"),
        lambda: live.switch("live", "half"),
        lambda: live.collection("half"),
    ):
        with pytest.raises(DataError, match="collection half is not complete; publish it again"):
            refused()
    assert live.aliases()["live"].name == "first" and Searcher.open(model_dir, live.url).about()["documents"] == 40
    publish(live, vectors_dir, dataset, "half")
    live.switch("live", "half")
    assert Searcher.open(model_dir, live.url).about()["collection"] == "half"


def test_the_commands(live: Store, model_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    search = ["--model", str(model_dir), "--index", live.url, "--user", "u7", "--top", "4"]
    assert search_command.main(search) == 0
    expected = Searcher.open(model_dir, live.url).search([Request("u7", top=4)])[0]
    out = capsys.readouterr().out
    assert all(f"{document.score:.4f}" in out for document in expected) and len(expected) == 4
    code = recommend_command.main([*search[:4], "--users", "--out", str(tmp_path / "out")])
    assert code == ConfigError.exit_code and "recommend needs an index folder, not a store" in capsys.readouterr().err


# ----- the server


def answers_of(client: TestClient, number: int) -> tuple[str, list[tuple[str, float]]]:
    """Return the kind of the request `number`, and its documents with rounded scores."""
    user, kind = f"u{number % 20}", ("search", "similar", "why")[number % 3]
    if kind == "search":
        response = client.post("/api/search", json={"user": user, "top": 5, "filter": "year >= 1970"})
    elif kind == "similar":
        response = client.get("/api/similar", params={"key": f"i{number % 20}", "top": 5})
    else:
        response = client.post("/api/why", json={"user": user, "answer": "i3"})
    assert response.status_code == 200, response.text
    content = response.json()
    found = content["history"] if kind == "why" else content["documents"]
    return f"{kind} {number % 20}", [(one["key"], one.get("score", one.get("cosine"))) for one in found]


def same(some: list[tuple[str, float]], others: list[tuple[str, float]]) -> bool:
    """Return whether two answers are of one model; scores depend a little on the batch."""
    scores, other_scores = ([score for _, score in answer] for answer in (some, others))
    return keys_of(some) == keys_of(others) and np.allclose(scores, other_scores, atol=1e-3)


def keys_of(answer: list[tuple[str, float]]) -> list[str]:
    return [key for key, _ in answer]


def until(holds: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def answers_of_each(models: Path, live: Store, names: Sequence[str]) -> list[dict[Any, Any]]:
    """Return the answers of each collection, which all differ."""
    own = []
    for name in names:
        with TestClient(make_app(Folders(models, f"{live.url}#{name}").open(), cache_size=0)) as client:
            own.append(dict(answers_of(client, number) for number in range(60)))
    assert len(own[0]) == 60 and all(not same(own[0][kind], own[1][kind]) for kind in own[0])
    return own


def put_model(models: Path, switch: int, folder: Path) -> None:
    shutil.copytree(models / f"night {switch % 2}", folder / "new")
    replace_folder(folder / "new", folder / "model")


@contextmanager
def asking(
    client: TestClient, clients: int, own: list[dict[Any, Any]], counts: list[int], failed: list[str]
) -> Iterator[None]:
    """A context in which clients send requests and count the answers of each collection."""
    stop = threading.Event()

    def ask(number: int) -> None:
        while not stop.is_set():
            number += 7
            try:
                kind, found = answers_of(client, number)
                counts[[same(answers[kind], found) for answers in own].index(True)] += 1
            except Exception as error:
                failed.append(repr(error))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    yield
    stop.set()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("layout", ["model", pytest.param("models", marks=pytest.mark.slow)])
@pytest.mark.parametrize("url", ["memory", pytest.param("postgresql", marks=pytest.mark.slow)], indirect=True)
def test_sixteen_clients_through_ten_switches(
    layout: str, live: Store, models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No request fails or mixes two models, with a folder of models or one that is replaced before or after."""
    names, folders = ("first", "second"), Folders(models, live.url)
    own = answers_of_each(models, live, names)
    if layout == "model":
        shutil.copytree(models / "night 0", tmp_path / "model")
        folders = Folders(tmp_path / "model", live.url)
    failed, counts = list[str](), [0, 0]
    app = make_app(folders.open(), folders=folders, poll_s=0.02)
    with TestClient(app) as client, asking(client, 16, own, counts, failed):

        def served() -> str:
            return str(client.get("/api/about").json()["collection"])

        def loads() -> float:
            return counted(client).get("bigdssm_model_loads_total", 0.0)

        for switch in range(1, 11):
            before = loads()
            if layout == "model" and switch % 4 < 2:  # the model first
                put_model(models, switch, tmp_path)
                until(lambda before=before: loads() > before)  # type: ignore[misc]
                assert served() == names[1 - switch % 2], "the model in memory serves its collection"
            live.switch("live", names[switch % 2])
            if layout == "model" and switch % 4 >= 2:
                until(lambda before=before: loads() > before)  # type: ignore[misc]
                assert served() == names[1 - switch % 2], "the previous collection is served"
                put_model(models, switch, tmp_path)
            until(lambda switch=switch: served() == names[switch % 2])  # type: ignore[misc]
            enough = counts[switch % 2] + 10
            until(lambda switch=switch, enough=enough: counts[switch % 2] > enough or bool(failed))  # type: ignore[misc]
        assert min(counts) > 50 and counted(client)["bigdssm_model_loads_total"] >= 10
    assert not failed, failed[:3]
    if layout == "model":
        assert "serving the previous collection, first" in caplog.text


def test_cached_answers_end_with_a_publication(live: Store, models: Path, vectors_dir: Path, dataset: Dataset) -> None:
    folders = Folders(models, live.url)
    with TestClient(make_app(folders.open(), folders=folders, poll_s=0.02)) as client:
        first = client.post("/api/search", json={"user": "u7"}).json()["documents"]
        assert client.post("/api/search", json={"user": "u7"}).json()["cached"]
        collection = live.collection("first")
        live.delete(collection, [first[0]["key"]], 1)
        live.finish(collection)
        until(lambda: not client.post("/api/search", json={"user": "u7"}).json()["cached"])
        again = client.post("/api/search", json={"user": "u7"}).json()["documents"]
        assert [one["key"] for one in again[:9]] == [one["key"] for one in first[1:]]


@pytest.fixture
def changing(tiny_interactions: TinyDataset, tmp_path: Path) -> Path:
    """A copy of the dataset."""
    return Path(shutil.copytree(tiny_interactions.dir, tmp_path / "changing"))


def withdraw(folder: Path, config: Path, name: str, items: Sequence[str], back: Sequence[str] = ()) -> None:
    """Append a partition that withdraws items, and brings others back."""
    tables = {}
    if items:
        tables["withdrawn"] = folder.parent / f"{name}.csv"
        tables["withdrawn"].write_text("\n".join(["item_id", *items]) + "\n")
    if back:
        tables["items"] = folder.parent / f"{name} back.csv"
        tables["items"].write_text("item_id,title,genres,year\n" + "".join(f"{key},Back,Drama,1999\n" for key in back))
    make_items(load_config(config).data, ItemTables(**tables), IngestTarget(folder, name, append=True, processes=1))


def test_a_server_applies_the_withdrawals_of_its_dataset_to_every_collection(
    live: Store, models: Path, changing: Path, tiny_interactions: TinyDataset
) -> None:
    """Of collections that were published before, as after a rollback, in searches and similar documents."""
    for address in (live.url, f"{live.url}#second"):
        folders = Folders(models, address, str(changing))
        searcher = folders.open()
        request = Request("u7", top=12, exclude_seen=False)
        first, similar = keys(searcher.search([request])[0]), keys(searcher.similar("i3", 8)[1])
        gone = sorted({*first[:9], *similar[:3], "i30"} - {"i3"})
        name = f"gone {live.collection(address.partition('#')[2] or 'live').name}"
        withdraw(changing, tiny_interactions.config, name, gone)
        searcher = folders.open(searcher)
        for top in (12, 100):
            found = keys(searcher.search([replace(request, top=top)])[0])
            assert len(found) == min(top, 40 - len(gone)) and not {*found} & {*gone}
        assert found[:3] == [key for key in keys(Folders(models, address).open().search(
            [replace(request, top=100)])[0]) if key not in gone][:3]  # fmt: skip
        assert len(again := keys(searcher.similar("i3", 8)[1])) == 8 and not {*again} & {*gone}
        assert searcher._index.stored_withdrawn, "the collection still has them"  # type: ignore[union-attr]
        withdraw(changing, tiny_interactions.config, f"{name} no more", [], gone)
        searcher = folders.open(searcher)
        assert keys(searcher.search([request])[0]) == first


def test_a_withdrawal_ends_cached_answers_without_a_publication(
    live: Store, models: Path, changing: Path, tiny_interactions: TinyDataset
) -> None:
    folders = Folders(models, live.url, str(changing))
    with TestClient(make_app(folders.open(), folders=folders, poll_s=0.02)) as client:

        def best() -> list[str]:
            answer = client.post("/api/search", json={"user": "u7", "top": 5}).json()
            return [one["key"] for one in answer["documents"]]

        before = best()
        withdraw(changing, tiny_interactions.config, "noon", before[:2])
        until(lambda: best()[:3] == before[2:])


def test_a_withdrawn_document_that_is_written_later_is_no_answer(
    live: Store, models: Path, changing: Path, tiny_interactions: TinyDataset, vectors_dir: Path, dataset: Dataset
) -> None:
    """By a publisher of an older dataset, after the server has opened the collection."""
    folders = Folders(models, live.url, str(changing))
    best = keys(folders.open().search([Request("u7", top=3)])[0])
    withdraw(changing, tiny_interactions.config, "noon", best[:1])
    live.delete(collection := live.collection("first"), best[:1], collection.next_publication)
    live.finish(collection)
    searcher = folders.open()
    assert keys(searcher.search([Request("u7", top=2)])[0]) == best[1:]
    assert publish(live, vectors_dir, dataset, "first").written == 0
    assert publish(live, vectors_dir, dataset, "first").written == 1
    assert keys(searcher.search([Request("u7", top=2)])[0]) == best[1:]


def test_the_vector_of_a_query_finds_the_same_documents(live: Store, models: Path) -> None:
    searcher = Folders(models, live.url).open()
    with TestClient(make_app(searcher)) as client:
        off = client.post("/api/vector", json={"user": "u7"})
        assert off.status_code == 404 and "start the server with --vectors" in off.json()["error"]
        assert "/api/vector" not in client.get("/openapi.json").json()["paths"]
    with TestClient(make_app(searcher, has_vectors=True)) as client:
        found = client.post("/api/vector", json={"user": "u7"}).json()
        assert "/api/vector" in client.get("/openapi.json").json()["paths"]
        assert client.post("/api/vector", json={"user": "nobody"}).status_code == 404
        documents = client.post("/api/search", json={"user": "u7", "exclude_seen": False}).json()["documents"]
    collection, model = live.collection("live"), load_model_folder(models / "night 0")
    assert (found["model"], found["width"], found["metric"]) == (collection.model, collection.width, "inner product")
    assert found["vector"][-1] == 1 and collection.has_beta
    assert found["scale"] == pytest.approx(float(model.model.log_alpha.detach().exp()))
    (result,) = live.search(collection, np.array([found["vector"]], np.float32), 10)
    assert keys(result) == [one["key"] for one in documents]
    assert_scores_close(scores_of(result), [one["score"] for one in documents], WIDTH)


def test_the_metrics_name_model_and_index(
    live: Store, models: Path, tmp_path: Path, vectors_dir: Path, dataset: Dataset
) -> None:
    build_index(vectors_dir, tmp_path / "index", "sq8")
    second = Folders(models, tmp_path / "index").open()
    with TestClient(make_app(Folders(models, live.url).open(), second=second)) as client:
        text = client.get("/metrics").text
    checksum, fingerprint = second.about()["model"], second.about()["dataset"]
    info = {
        "path": "/api", "model": checksum, "index": live.scheme, "store": live.address, "collection": "first",
        "dataset": fingerprint, "version": str(dataset.stamp),
    }  # fmt: skip
    lines = [line for line in text.splitlines() if line.startswith("bigdssm_index_info")]
    assert len(lines) == 2 and all(f'{name}="{value}"' in lines[0] for name, value in info.items())
    assert 'path="/second/api"' in lines[1] and 'index="sq8"' in lines[1] and 'collection=""' not in lines[1]
    assert 'bigdssm_index_documents{path="/api"} 40.0' in text
    for path in ("/api", "/second/api"):
        (age,) = [line for line in text.splitlines() if line.startswith(f'bigdssm_index_age_seconds{{path="{path}"}}')]
        assert 0 <= float(age.split()[1]) < 600


def test_requests_are_refused_while_the_store_is_away(
    live: Store, models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    away = UnavailableError("memory://here: the server is away; try again when this is fixed")
    calls = []

    def gone(*arguments: Any) -> None:
        calls.append(arguments)
        raise away

    folders = Folders(models, live.url)
    with TestClient(make_app(folders.open(), folders=folders, poll_s=0.02, cache_size=0)) as client:
        assert client.get("/readyz").status_code == 200
        with monkeypatch.context() as patched:
            for name in ("search", "vectors", "aliases"):
                patched.setattr(type(live), name, gone)
            until(lambda: client.get("/readyz").status_code == 503)
            for response in (
                client.post("/api/search", json={"user": "u7"}), client.get("/api/similar", params={"key": "i3"}),
                client.get("/readyz"),
            ):  # fmt: skip
                assert response.status_code == 503
                assert response.json()["error"] == "the vector store does not answer; retry later"
                assert response.headers["Retry-After"] == "1"
            assert client.get("/healthz").status_code == client.get("/api/about").status_code == 200
        until(lambda: client.get("/readyz").status_code == 200)
        assert client.post("/api/search", json={"user": "u7"}).status_code == 200
    assert caplog.text.count("cannot check") == 1 and f"cannot answer /readyz: {away}" in caplog.text


def test_a_batch_waits_for_the_store_once() -> None:
    waits = []

    def work(queries: Sequence[int]) -> list[int]:
        waits.append(len(queries))
        raise UnavailableError("away")

    async def ask() -> list[Any]:
        batcher = Batcher(work)
        answers = [asyncio.ensure_future(batcher(number)) for number in range(5)]
        running = asyncio.create_task(batcher.run())
        results = await asyncio.gather(*answers, return_exceptions=True)
        running.cancel()
        return results

    assert [str(error) for error in asyncio.run(ask())] == ["away"] * 5 and waits == [5]


def test_booleans_without_a_dataset(url: str) -> None:
    """The collection has one spelling, of its dataset's vocabulary; a filter may have any."""
    store, vectors = open_store(url), np.ones((4, 3), np.float32)
    columns: dict[str, Any] = {"flag": "category", "flags": "categories"}
    collection = Collection("booleans", "a" * 32, "d", 1, 3, True, "dot", 9.0, columns, store.options())
    store.create(collection)
    values = {"flag": ["true", "true", "false", None], "flags": [["1"], ["1", "0"], ["0"], None]}
    store.write(collection, Documents(["a", "b", "c", "d"], [""] * 4, vectors, np.arange(4), values), 1)
    store.finish(collection)
    filters = StoreFilters(columns, None)
    for text, keys in (
        ("flag = True", "ab"), ("flag = 1", "ab"), ("flag != TRUE", "c"), ("flag in (0, 1)", "abc"),
        ("flags = true", "ab"), ("flags != true", "c"), ("flags not in (False, 2)", "a"), ("flag = yes", ""),
    ):  # fmt: skip
        (result,) = store.search(collection, vectors[:1], 4, filters.allowed(text))
        assert "".join(sorted(document.key for document in result)) == keys, text


def test_filters_without_a_dataset(live: Store, dataset: Dataset) -> None:
    """A model without histories is served without a dataset: values are those of the collection's columns."""
    collection, catalogue = live.collection("first"), dataset.whole.catalogue
    without, masks = StoreFilters(collection.columns, None), Filters(catalogue)
    for text in ("genres = Comedy and year < 1990.5", "genres not in (Comedy, Drama)", 'genres != "" or year = 1999'):
        assert live.count(collection, without.allowed(text)) == masks.allowed(text).count > 0
        assert without.allowed(text) == StoreFilters(collection.columns, catalogue).allowed(text)
    assert (
        live.count(collection, without.allowed("genres in (Comedy, Unknown)")) == masks.allowed("genres = Comedy").count
    )
    for text, error in (
        ("genres < 3", "is categorical"),
        ("year = old", "needs a number"),
        ("title = x", "needs one of"),
    ):
        with pytest.raises(ConfigError, match=error):
            without.allowed(text)
    assert without.choices == {}


@pytest.mark.slow
@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_a_server_that_returns_is_served_again(
    live: Store, models: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "WAITS_S", (0.1,))
    folders = Folders(models, live.url)
    with TestClient(make_app(folders.open(), folders=folders, poll_s=0.05, cache_size=0)) as client:
        first = client.post("/api/search", json={"user": "u7"}).json()["documents"]
        server.stop()
        try:
            until(lambda: client.get("/readyz").status_code == 503)
            refused = client.post("/api/search", json={"user": "u7"})
            assert refused.status_code == 503 and "the vector store does not answer" in refused.json()["error"]
        finally:
            server.start()
        until(lambda: client.get("/readyz").status_code == 200)
        assert client.post("/api/search", json={"user": "u7"}).json()["documents"] == first


def test_a_dropped_collection_is_not_a_missing_document(
    live: Store, models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    searcher = Folders(models, f"{live.url}#second").open()
    if live.scheme == "memory":
        pytest.skip("it has no error")
    with TestClient(make_app(searcher)) as client:
        live.drop("second")
        for response in (client.post("/api/search", json={"user": "u7"}), client.get("/api/similar?key=i3")):
            assert response.status_code == 503
    assert "second was dropped while it was served" in caplog.text
