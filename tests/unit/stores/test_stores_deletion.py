"""Forgotten items leave every file of a store, and neighbours of two collections are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import psycopg
import pytest

from bigdssm.errors import DataError, UnavailableError
from bigdssm.retrieval import folder_store
from bigdssm.retrieval.forgetting import forget_in_collection
from bigdssm.retrieval.publish import publish
from bigdssm.stores import postgres
from bigdssm.stores.base import Collection, Documents, Store, open_store
from tests.postgres import Server
from tests.unit.stores.shop import OTHER_MODEL, WIDTH, Shop

SECRET = "0f4c9a-hidden-identifier"


@pytest.fixture(params=["postgresql", "file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "file":
        return open_store(f"file://{tmp_path}/store")
    if request.param == "memory":
        request.getfixturevalue("memory_store")
        return open_store("memory://here")
    return open_store(request.getfixturevalue("server").new_database())


def write(store: Store, collection: Collection, key: str, vector: np.ndarray) -> None:
    columns: dict[str, list[Any]] = {"shop": [key], "tags": [[key]], "price": [None]}
    documents = Documents([key], [f"Title {key}"], vector[None], np.array([1]), columns)
    store.write(collection, documents, collection.version)


def files_with(server: Server, store: Store, needles: Sequence[bytes]) -> list[str]:
    """Return the files of the store's database that contain one of `needles`: tables, indexes and statistics."""
    with psycopg.connect(store.url, autocommit=True) as connection:
        connection.execute("CHECKPOINT")
        row = connection.execute("SELECT oid FROM pg_database WHERE datname = current_database()").fetchone()
    assert row is not None
    contents = {str(file): file.read_bytes() for file in (server.folder / f"data/base/{row[0]}").iterdir()}
    return [file for file, content in contents.items() if any(needle in content for needle in needles)]


def test_items_leave_a_collection_and_a_late_write_is_rejected(store: Store, tmp_path: Path) -> None:
    shop = Shop.new(Random(0), 30)
    folder, dataset = shop.save(tmp_path / "v")
    collection = publish(store, folder, dataset, "first").collection
    before = store.contents(collection)
    planned, left = forget_in_collection(store, "first", [], ["key 3", "key 4", "unknown"], dry_run=True)
    assert planned["found"] == 2 and planned["documents"] == {"before": 30, "after": 30} and left == []
    assert store.contents(collection) == before
    record, _ = forget_in_collection(store, "first", [], ["key 3", "key 4", "unknown"])
    assert record["found"] == 2 and record["documents"] == {"before": 30, "after": 28}
    assert record["content"]["before"] == planned["content"]["before"] != record["content"]["after"]
    remaining = {key: content for key, content in before.items() if key not in ("key 3", "key 4")}
    assert store.contents(collection) == remaining
    assert store.collection("first").published > collection.published, "servers drop cached answers"
    publish(store, folder, dataset, "first")  # from a folder that still has them
    assert store.contents(collection) == remaining
    again, _ = forget_in_collection(store, "first", [], ["key 3"])
    assert again["found"] == 0 and again["content"]["before"] == again["content"]["after"]


def test_an_id_that_other_documents_have_is_reported(store: Store, tmp_path: Path) -> None:
    collection = publish(store, *Shop.new(Random(0), 9).save(tmp_path / "v"), "first").collection
    write(store, collection, SECRET, np.ones(WIDTH, np.float32))
    store.finish(collection)
    before = store.contents(collection)
    record, left = forget_in_collection(store, "first", [SECRET], [])
    assert record["found"] == 0 and store.contents(collection) == before, "users are no documents"
    values = [f"collection first: an id is a value of {name} in 1 documents" for name in ("shop", "tags")]
    assert sorted(left) == values


def test_an_unfinished_collection_stays_unfinished(store: Store, tmp_path: Path) -> None:
    collection = publish(store, *Shop.new(Random(0), 9).save(tmp_path / "v"), "first").collection
    store.create(replace(collection, published=0.0))
    forget_in_collection(store, "first", [], ["key 1"])
    assert store.collections()["first"].published == 0 and store.count(collection) == 8


def test_a_forgotten_document_leaves_no_byte(server: Server, tmp_path: Path) -> None:
    """Not in dead rows, indexes, the planner's statistics, or those of a collection that was dropped."""
    store, shop = open_store(server.new_database()), Shop.new(Random(0), 30)
    saved = shop.save(tmp_path / "v")
    vector = np.random.default_rng(7).standard_normal(WIDTH).astype(np.float32)
    for name in ("dropped", "first"):
        collection = publish(store, *saved, name).collection
        for _ in range(2):  # the second write leaves a dead row
            write(store, collection, SECRET, vector)
        store.finish(collection)  # copies values to the statistics
    store.drop("dropped")
    needles = [SECRET.encode(), vector.tobytes()]
    assert len(files_with(server, store, needles)) >= 4
    record, left = forget_in_collection(store, "first", [], [SECRET])
    assert record["found"] == 1 and files_with(server, store, needles) == []
    assert [line for line in left if "write-ahead log" in line] and not [
        line for line in left if "pg_statistic" in line
    ]


def test_a_forgotten_document_leaves_no_byte_in_a_folder(tmp_path: Path) -> None:
    """Neither in the index nor in changes that are not applied yet."""
    store, shop = open_store(f"file://{tmp_path}/store"), Shop.new(Random(0), 30)
    collection = publish(store, *shop.save(tmp_path / "v"), "first").collection
    vector = np.random.default_rng(7).standard_normal(WIDTH).astype(np.float32)
    write(store, collection, SECRET, vector)
    store.finish(collection)
    write(store, collection, SECRET, vector)
    needles = [SECRET.encode(), vector.tobytes()]

    def files_left() -> list[Path]:
        files = {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()}
        return [path for path, content in files.items() if any(needle in content for needle in needles)]

    assert len(files_left()) >= 4
    record, left = forget_in_collection(store, "first", [], [SECRET])
    assert record["found"] == 1 and files_left() == []
    assert left == [f"{tmp_path}/store/first/tombstones.npy, which has a 64-bit hash of each removed key"]


VECTOR = np.random.default_rng(7).standard_normal(WIDTH).astype(np.float32)


def secret_files(folder: Path) -> list[Path]:
    files = [path for path in (folder / "store").rglob("*") if path.is_file()]
    return [path for path in files if SECRET.encode() in path.read_bytes()]


def test_a_killed_drop_leaves_no_byte_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither after another drop, nor in a new collection, nor after `forget` in another collection."""
    store, shop = open_store(f"file://{tmp_path}/store"), Shop.new(Random(0), 30)
    saved = shop.save(tmp_path / "v")

    def killed(last: int) -> None:
        """Drop a collection with an unapplied change, up to its removal number `last`."""
        write(store, publish(store, *saved, "dropped").collection, SECRET, VECTOR)
        removed: list[Path] = []

        def remove(path: Path) -> None:
            removed.append(path)
            if len(removed) == last:
                raise KeyboardInterrupt
            folder_remove(path)

        with monkeypatch.context() as patched:
            patched.setattr(folder_store, "remove", remove)
            with pytest.raises(KeyboardInterrupt):
                store.drop("dropped")

    folder_remove = folder_store.remove
    for last in (1, 2, 3):
        killed(last)
        store.drop("dropped")
        assert secret_files(tmp_path) == [] and store.collections().keys() == set()
    assert not list((tmp_path / "store").iterdir())


def test_changes_of_an_earlier_version_that_outlived_a_drop_leave_no_byte(tmp_path: Path) -> None:
    store, shop = open_store(f"file://{tmp_path}/store"), Shop.new(Random(0), 30)
    saved = shop.save(tmp_path / "v")
    changes = tmp_path / "store/.dropped.changes"  # of an earlier version, which removed them last
    write(store, publish(store, *saved, "dropped").collection, SECRET, VECTOR)
    changes.rename(tmp_path / "changes")
    store.drop("dropped")
    (tmp_path / "changes").rename(changes)
    assert len(secret_files(tmp_path)) == 1
    assert SECRET not in store.contents(publish(store, *saved, "dropped").collection)
    store.drop("dropped")
    publish(store, *saved, "first")
    for folder in (changes, tmp_path / "store/.dropped.dropped"):
        folder.mkdir()
        (folder / "1.arrow").write_bytes(SECRET.encode())
    (tmp_path / "store/.first.changes/.2.arrow.unfinished").write_bytes(SECRET.encode())
    assert len(secret_files(tmp_path)) == 3
    forget_in_collection(store, "first", [], [SECRET])
    assert secret_files(tmp_path) == []


def test_a_document_that_was_withdrawn_before_leaves_no_byte(server: Server, tmp_path: Path) -> None:
    store, shop = open_store(server.new_database()), Shop.new(Random(0), 30)
    collection = publish(store, *shop.save(tmp_path / "v"), "first").collection
    write(store, collection, SECRET, shop.vectors[0])
    store.delete(collection, [SECRET], collection.version)
    assert files_with(server, store, [SECRET.encode()])
    record, _ = forget_in_collection(store, "first", [], [SECRET])
    assert record["found"] == 0 and not files_with(server, store, [SECRET.encode()])


def test_a_late_publisher_does_not_lower_the_publication(server: Server, tmp_path: Path) -> None:
    """Its lock is lost if the server restarts."""
    store, shop = open_store(server.new_database()), Shop.new(Random(0), 9)
    saved = shop.save(tmp_path / "v")
    late = publish(store, *saved, "first").collection
    collection = publish(store, *saved, "first").collection
    assert (late.publication, collection.publication) == (1, 2)
    store.finish(late)
    assert store.collection("first").publication == 2
    store.finish(replace(collection, publication=3))
    assert store.collection("first").publication == 3


def test_rows_that_a_transaction_may_still_read_are_no_success(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "LOCK_WAIT_S", 0.1)
    store = open_store(server.new_database())
    publish(store, *Shop.new(Random(0), 30).save(tmp_path / "v"), "first")
    with psycopg.connect(store.url) as reader:
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT count(*) FROM bigdssm_aliases")
        with pytest.raises(UnavailableError, match=r"an older transaction keeps deleted rows of .*first"):
            forget_in_collection(store, "first", [], ["key 3"])
        assert files_with(server, store, [b"Title key 3"])
    forget_in_collection(store, "first", [], ["key 3"])
    assert not files_with(server, store, [b"Title key 3"])


def test_rights_on_statistics_that_are_missing_are_reported(server: Server, tmp_path: Path) -> None:
    store = open_store(server.new_database())
    database = store.url.split("/")[3].split("?")[0]
    with psycopg.connect(store.url, autocommit=True) as connection:
        connection.execute("CREATE EXTENSION vector")
        connection.execute("CREATE ROLE clerk LOGIN")
        connection.execute("GRANT CREATE ON SCHEMA public TO clerk")
    store = open_store(server.url(database).replace("postgres@", "clerk@"))
    publish(store, *Shop.new(Random(0), 9).save(tmp_path / "v"), "first")
    _, left = forget_in_collection(store, "first", [], ["key 3"])
    assert [line for line in left if "VACUUM FULL pg_statistic" in line]


# ----- neighbours


def test_the_neighbours_of_two_collections_are_compared(store: Store, tmp_path: Path) -> None:
    shop = Shop.new(Random(0), 300)
    saved = shop.save(tmp_path / "v")
    assert publish(store, *saved, "first").overlap is None
    assert publish(store, *saved, "first", compare="first").overlap is None
    store.switch("live", "first")
    overlap = publish(store, *saved, "same", compare="live").overlap
    assert overlap is not None and (overlap.previous, overlap.num_documents) == ("first", 200)
    assert overlap.shares == {10: 1.0, 50: 1.0}
    shop.vectors[:150] = np.random.default_rng(5).standard_normal((150, WIDTH))  # half of the documents have moved
    shop.withdrawn = set(range(290, 300))
    folder, dataset = shop.save(tmp_path / "moved", OTHER_MODEL)
    overlap = publish(store, folder, dataset, "second", compare="live").overlap
    assert overlap is not None
    expected = {}
    old, new = (np.load(f / "vectors.npy") for f in (saved[0], folder))
    rows = np.arange(290)
    for number in (10, 50):
        shares = []
        for row in rows:
            nearest = []
            for vectors, size in ((new, 290), (old, 300)):
                scores = vectors[:size, :-1] @ vectors[row, :-1] + vectors[:size, -1]
                scores[row] = -np.inf
                nearest.append(set(np.argsort(-scores)[:number].tolist()))
            shares.append(len(nearest[0] & nearest[1]) / number)
        expected[number] = np.mean(shares)
    assert all(abs(overlap.shares[number] - expected[number]) < 0.05 for number in (10, 50))
    assert expected[10] < 0.5 < 1, "not the same documents"
    with pytest.raises(DataError, match="no collection or alias 'none'"):
        publish(store, folder, dataset, "third", compare="none")
    assert "third" not in store.collections(), "refused before anything is written"
