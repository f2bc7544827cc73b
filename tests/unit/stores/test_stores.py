"""Stores: a collection equals its vectors folder after any changes, and answers with the training score.

The contract is tested with PostgreSQL, a folder of indexes, Qdrant's local mode, and a store from outside the package.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import psycopg
import pytest

from bigdssm.commands import publish as publish_command
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import CheckpointError, ConfigError, DataError, UnavailableError
from bigdssm.features.conditions import Condition, parse_filter, resolve
from bigdssm.retrieval import folder_store
from bigdssm.retrieval import publish as publishing
from bigdssm.retrieval.index import build_index, open_index
from bigdssm.retrieval.publish import PublishReport, measure_recall, publish
from bigdssm.retrieval.queries import Filters
from bigdssm.retrieval.vectors import read_meta
from bigdssm.stores import postgres, qdrant
from bigdssm.stores.base import Collection, Documents, Store, open_named, open_store
from tests.filters import FEATURES, random_filter
from tests.postgres import Server
from tests.tolerances import assert_scores_close
from tests.unit.stores.shop import INDEX_ALONE, MODEL, OTHER_MODEL, WIDTH, Shop, new_url, state


def test_a_collection_answers_with_the_inner_products_of_its_folder(
    store: Store, vectors_dir: Path, dataset: Dataset
) -> None:
    report = publish(store, vectors_dir, dataset)
    collection = report.collection
    assert report == PublishReport(collection, 40, 0, 0)
    assert collection.name == collection.model[:12] and abs(collection.published - time.time()) < 60
    assert collection.columns == {"item_id": "category", "genres": "categories", "year": "number"}
    vectors = np.load(vectors_dir / "vectors.npy")
    keys, titles = (getattr(dataset.catalogue, name)(np.arange(40)) for name in ("keys", "titles"))
    queries = np.random.default_rng(0).standard_normal((3, vectors.shape[1])).astype(np.float32)
    filters = Filters(dataset.catalogue)
    for text in (None, "genres = Comedy", "year >= 1990 or genres != Drama", "item_id in (i3, i4)", "year > 3000"):
        where = None if text is None else resolve(parse_filter(text), dataset.catalogue.filterable)
        mask = np.ones(40, bool) if text is None else filters.allowed(text).mask
        assert store.count(collection, where) == mask.sum()
        results = store.search(collection, queries, 7, where, [["i3"], [], ["i4", "i5", "unknown"]])
        for query, excluded, result in zip(queries, [["i3"], [], ["i4", "i5"]], results, strict=True):
            scores = np.where(mask & ~np.isin(keys, excluded), vectors @ query, -np.inf)
            order = np.argsort(-scores)[: min(7, int(np.isfinite(scores).sum()))]
            assert [document.key for document in result] == [keys[row] for row in order]
            assert [document.title for document in result] == [titles[row] for row in order]
            scale = float((np.abs(vectors) @ np.abs(query)).max())
            assert_scores_close([document.score for document in result], scores[order], vectors.shape[1], scale)
    found = store.vectors(collection, [keys[5], "none", keys[2]])
    assert {key: title for key, (title, _) in found.items()} == {keys[row]: titles[row] for row in (5, 2)}
    for row in (5, 2):
        np.testing.assert_array_equal(found[keys[row]].vector, vectors[row])
    recall = measure_recall(store, collection, vectors_dir)
    assert (recall.recall, recall.num_queries, recall.top) == (1.0, 40, 40) and recall.difference < 1e-6


@pytest.mark.parametrize(
    ("scheme", "number"),
    [
        ("postgresql", 500), ("memory", 100), ("file", 500), ("qdrant", 50),
        *(pytest.param(scheme, 500, marks=pytest.mark.slow) for scheme in ("memory", "qdrant")),
    ],
)  # fmt: skip
def test_random_filters_match_as_in_the_mask(
    scheme: str, number: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    random, store = Random(1), open_store(new_url(scheme, request, tmp_path))
    shop = Shop.new(random, 200)
    collection = publish(store, *shop.save(tmp_path / "vectors")).collection
    numbers = set()
    for _ in range(number):
        text, fits = random_filter(random)
        where = resolve(parse_filter(text), FEATURES)
        expected = {f"key {row}" for row, values in enumerate(shop.rows) if fits(values)}
        (result,) = store.search(collection, shop.vectors[:1], 200, where)
        assert {document.key for document in result} == expected, text
        assert store.count(collection, where) == len(expected), text
        numbers.add(len(expected))
    assert len(numbers) > 20


@pytest.mark.parametrize(
    ("scheme", "sequences"),
    [
        ("postgresql", 4), ("memory", 50), ("file", 4), ("qdrant", 3),
        *(pytest.param(scheme, 50, marks=pytest.mark.slow) for scheme in ("postgresql", "file", "qdrant")),
    ],
)  # fmt: skip
def test_random_changes_equal_a_rebuild(
    scheme: str, sequences: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """After changes, with a late write of each earlier version, the collection is that of a new publication."""
    opened, changes = open_store(new_url(scheme, request, tmp_path)), 0
    for seed in range(sequences):
        shop, name = Shop.new(Random(seed), 12), f"changed {seed}"
        late: list[tuple[Documents, int]] = []
        for step in range(1 + seed % 5):
            saved = shop.save(tmp_path / f"{seed} {step}")
            collection = publish(opened, *saved, name).collection
            _, documents = next(
                publishing._batches(publishing._Folder(saved[0]), saved[1], FEATURES, collection.radius)
            )
            late.append((documents, shop.version))
            shop.change()
        changes += step
        for documents, version in late[:-1]:
            opened.write(collection, documents, version)
            opened.delete(collection, documents.keys, version - 1)
        rebuilt = publish(opened, *saved, f"rebuilt {seed}").collection
        assert state(opened, collection) == state(opened, rebuilt)
        assert publish(opened, *saved, name).written == 0
    assert changes >= sequences


def test_the_largest_version_wins_in_any_order(store: Store, tmp_path: Path) -> None:
    collection = publish(store, *Shop.new(Random(0), 2).save(tmp_path / "v")).collection
    columns: dict[str, list[Any]] = {"shop": [None], "tags": [None], "price": [None]}
    for seed in range(10, 20) if store.scheme in ("file", "qdrant") else range(30):  # of files
        random, key = Random(seed), f"key of {seed}"
        versions = random.sample(range(100), 6)
        is_write = [random.random() < 0.5 for _ in versions]
        for version, writes in zip(versions, is_write, strict=True):
            if writes:
                vector = np.full((1, WIDTH), version, np.float32)
                store.write(collection, Documents([key], [""], vector, np.array([version]), columns), version)
            else:
                store.delete(collection, [key, key], version)
        newest = int(np.argmax(versions))
        expected = versions[newest] if is_write[newest] else None
        assert store.contents(collection).get(key) == expected
        store.delete(collection, [key], 100)
        store.write(collection, Documents([key], [""], np.ones((1, WIDTH), np.float32), np.array([1]), columns), 100)
        assert key not in store.contents(collection), "of equal versions the delete wins"


def test_the_command_switches_and_rolls_back(
    url: str, vectors_dir: Path, other_vectors_dir: Path, tiny_interactions: Any, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    store = open_store(url)
    monkeypatch.setattr(publish_command, "open_store", lambda url, options: replace(store, **options))

    def run(*arguments: str) -> tuple[int, str, str]:
        code = publish_command.main(["--to", url, *arguments])
        return code, *capsys.readouterr()

    data = ("--data", str(tiny_interactions.dir))
    code, out, _ = run("--vectors", str(vectors_dir), *data, "--verify", "--switch", "--as", "first")
    assert code == 0 and "first: 40 written, 0 deleted, 0 unchanged" in out and "live is first" in out
    assert "first: recall@40 1.0000 of 40 queries" in out
    code, _, error = run("--vectors", str(other_vectors_dir), *data, "--as", "first")
    assert code == ConfigError.exit_code and "choose another name with --as" in error
    code, out, _ = run("--vectors", str(other_vectors_dir), *data, "--as", "second", "--switch")
    assert code == 0 and store.aliases()["live"] == ("second", "first")
    assert store.collection("live").name == "second" != store.collection("first").name
    code, _, error = run("--drop", "second")
    assert code == ConfigError.exit_code and "switch the alias first" in error
    code, out, _ = run("--rollback")
    assert code == 0 and store.aliases()["live"].name == "first" and "40 documents of model" in out
    assert run("--drop", "second")[0] == 0 and set(store.collections()) == {"first"}
    if not url.startswith("memory"):
        code, _, error = run("--rollback")
        assert code == ConfigError.exit_code and "has no previous collection" in error
    code, _, error = run("--rollback", "--alias", "none")
    assert code == ConfigError.exit_code and "has no previous collection" in error
    code, out, _ = run("--vectors", str(vectors_dir), *data, "--as", "first")
    assert code == 0 and "0 written, 0 deleted, 40 unchanged" in out
    monkeypatch.setattr(publish_command, "LEAST_RECALL", 1.1)
    code, _, error = run("--vectors", str(vectors_dir), *data, "--as", "third", "--verify", "--switch")
    assert code == DataError.exit_code and "recall@40 is 1.0000" in error
    assert store.aliases()["live"].name == "first", "a collection that is not verified is not live"
    code, _, error = run("--vectors", str(vectors_dir))
    assert code == ConfigError.exit_code and "needs --data" in error


def test_query_files_of_verify(tmp_path: Path) -> None:
    path = tmp_path / "q.npy"
    for values, message in (
        (np.ones((2, 3)), r"got \(2, 3\), needs numbers \[m, 5\]"), (np.ones((0, 5)), "at least one query"),
        (np.ones(5), r"got \(5,\)"), (np.full((1, 5), np.nan), "not finite"), (np.full((1, 5), "x"), "needs numbers"),
    ):  # fmt: skip
        np.save(path, values)
        with pytest.raises(DataError, match=message):
            publish_command._queries(str(path), 5)
    np.save(path, np.ones((2, 5)))
    assert publish_command._queries(str(path), 5).shape == (2, 5)
    np.savez(tmp_path / "q.npz", a=np.ones((2, 5)))
    for content in (b"", b"PK\x03\x04"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is not a NumPy array"):
            publish_command._queries(str(path), 5)
    with pytest.raises(DataError, match="got an archive, needs numbers"):
        publish_command._queries(str(tmp_path / "q.npz"), 5)


def test_another_model_is_refused(store: Store, tmp_path: Path) -> None:
    shop = Shop.new(Random(0), 6)
    folder, dataset = shop.save(tmp_path / "v")
    collection = publish(store, folder, dataset, "shop").collection
    collection.check_model(MODEL)
    with pytest.raises(
        CheckpointError, match=f"vectors of model {MODEL[:12]}, the queries are of model {OTHER_MODEL[:12]}"
    ):
        collection.check_model(OTHER_MODEL)
    others = shop.save(tmp_path / "other", OTHER_MODEL)
    with pytest.raises(ConfigError, match="choose another name"):
        publish(store, *others, "shop")
    with pytest.raises(CheckpointError):
        measure_recall(store, collection, others[0])
    # A writer of another model, past `publish`
    _, documents = next(publishing._batches(publishing._Folder(folder), dataset, FEATURES, 1.0))
    if store.scheme == "file":
        with pytest.raises(CheckpointError, match="rows of"):
            store.write(replace(collection, model=OTHER_MODEL), documents, 2)
        return
    store.write(replace(collection, model=OTHER_MODEL), documents, 2)
    with pytest.raises(CheckpointError, match="rows of"):
        store.search(collection, shop.vectors[:1], 3)
    with pytest.raises(CheckpointError, match="rows of"):
        store.vectors(collection, ["key 1"])


def test_an_earlier_version_is_refused(store: Store, tmp_path: Path) -> None:
    shop = Shop.new(Random(0), 6)
    earlier = shop.save(tmp_path / "earlier")
    shop.change()
    publish(store, *shop.save(tmp_path / "later"), "shop")
    refused = r"published from a dataset of 1973-03-03 .*earlier is an earlier one of 1973-03-03 .*; publish the later"
    with pytest.raises(DataError, match=refused):
        publish(store, *earlier, "shop")
    with pytest.raises(CheckpointError, match="vectors of dataset fingerprint"):
        publish(store, earlier[0], shop.save(tmp_path / "again")[1], "shop")


def test_documents_that_the_dataset_has_forgotten_or_withdrawn_are_not_published(store: Store, tmp_path: Path) -> None:
    """An older vectors folder still has them."""
    folder, dataset = Shop.new(Random(0), 9).save(tmp_path / "v")
    assert publish(store, folder, dataset, "shop").written == 9
    catalogue = dataset.catalogue
    catalogue.withdrawn = np.array([5])
    catalogue.keys = lambda rows: ["" if row == 3 else f"key {row}" for row in rows.tolist()]
    for name in ("shop", "another"):
        collection = publish(store, folder, dataset, name).collection
        assert set(store.contents(collection)) == {f"key {row}" for row in (0, 1, 2, 4, 6, 7, 8)}
        assert measure_recall(store, collection, folder, dataset=dataset).recall == 1
    catalogue.keys = lambda rows: [f"key {row + (row > 6)}" for row in rows.tolist()]
    with pytest.raises(CheckpointError, match=r"v has document 'key 7' in row 7, the dataset has 'key 8'"):
        publish(store, folder, dataset, "shop")


@pytest.mark.parametrize("url", ["postgresql", "file"], indirect=True)
def test_two_publishers_at_once(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (postgres, folder_store):
        monkeypatch.setattr(module, "LOCK_WAIT_S", 0.3)
    saved = Shop.new(Random(0), 6).save(tmp_path / "v")
    with store.publishing("shop"):
        publish(store, *saved, "another")
        with pytest.raises(DataError, match="another process publishes to shop"):
            publish(open_store(store.url), *saved, "shop")
    publish(store, *saved, "shop")


KILLED = """
import sys
from pathlib import Path
from random import Random
from time import sleep
from bigdssm.retrieval import publish
from bigdssm.stores.base import open_store
from tests.unit.stores.shop import Shop
publish.ROWS_AT_ONCE = 50
shop = Shop.new(Random(0), 2000)
# a pause per 50 documents, so that it is killed before the last
publish.publish(open_store(sys.argv[1]), *shop.save(Path(sys.argv[2])), "shop", progress=lambda *_: sleep(0.05))
"""


@pytest.mark.slow
@pytest.mark.parametrize("url", ["postgresql", "file"], indirect=True)
def test_a_killed_publication_continues(store: Store, tmp_path: Path) -> None:
    """Kill -9 at several points of writing; the content is that of one call."""
    shop = Shop.new(Random(0), 2000)
    rows = 0
    for number in range(2):
        process = subprocess.Popen([sys.executable, "-c", KILLED, store.url, str(tmp_path / str(number))])
        while process.poll() is None:
            with contextlib.suppress(DataError, KeyError):
                if len(store.contents(store.collections()["shop"])) >= rows + 400:
                    process.kill()
                    break
            time.sleep(0.005)
        assert process.wait() == -9, "killed before its end"
        rows = len(store.contents(store.collections()["shop"]))
        assert 0 < rows < 2000 and not store.collections()["shop"].published
    saved = shop.save(tmp_path / "v")
    report = publish(store, *saved, "shop")
    assert 0 < report.written < 2000 and report.unchanged == 2000 - report.written >= rows
    assert state(store, report.collection) == state(store, publish(store, *saved, "rebuilt").collection)


def test_a_dropped_collection(store: Store, tmp_path: Path) -> None:
    saved = Shop.new(Random(0), 6).save(tmp_path / "v")
    collection = publish(store, *saved, "shop").collection
    store.drop("shop")
    store.drop("shop")
    if store.scheme != "memory":
        for use in (store.count, store.contents, store.finish):
            with pytest.raises(DataError, match=r"collection.* was dropped; publish it again"):
                use(collection)
        with pytest.raises(DataError, match=r"was dropped; publish it again"):
            store.delete(collection, ["key 1"], 1)
    assert publish(store, *saved, "shop").written == 6


# ----- the folder of indexes alone


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return open_store(f"file://{tmp_path}/a%20store")


def test_a_collection_is_an_index_folder(folder: Store, vectors_dir: Path, dataset: Dataset, tmp_path: Path) -> None:
    """An index folder of the same documents: `search` and `serve` open it, and its alias."""
    publish(folder, vectors_dir, dataset, "first")
    folder.switch("live", "first")
    build_index(vectors_dir, tmp_path / "index")
    built, checksum = open_index(tmp_path / "index").of_dataset(dataset), read_meta(vectors_dir).model_checksum
    queries = np.random.default_rng(0).standard_normal((5, built.meta.width)).astype(np.float32)
    for name in ("first", "live"):
        index = open_index(tmp_path / "a store" / name).of_dataset(dataset)
        assert index.keys == built.keys and index.title == built.title
        for found, expected in zip(
            index.nearest(queries, 9, checksum), built.nearest(queries, 9, checksum), strict=True
        ):
            np.testing.assert_array_equal(found, expected)
    # Without a document, rows are no longer those of the dataset
    collection = folder.collection("live")
    folder.delete(collection, [built.keys[3].as_py()], collection.version)
    folder.finish(collection)
    with pytest.raises(CheckpointError, match="its 39 documents are not the first ones"):
        open_index(tmp_path / "a store/live").of_dataset(dataset)


def test_index_types_and_their_options(folder: Store, tmp_path: Path) -> None:
    shop = Shop.new(Random(0), 300)
    saved = shop.save(tmp_path / "v")
    for options in (
        {"type": "hnsw", "index": {"search_width": 77}}, {"type": "sq8", "rescore": 4}, {"type": "ivf"},
        {"type": "flat"},
    ):  # fmt: skip
        collection = publish(open_store(folder.url, options), *saved, "shop").collection
        meta = read_meta(tmp_path / "a store/shop")
        assert meta.kind == options.get("type", "flat") and meta.rescored == options.get("rescore", 0)
        assert meta.options.get("search_width") == options.get("index", {}).get("search_width")
        assert measure_recall(folder, collection, saved[0]).recall > 0.9
        stored = folder.vectors(collection, ["key 7", "unknown"])
        assert set(stored) == {"key 7"} and (stored["key 7"].vector == shop.vectors[7]).all()
    for invalid, message in (
        ({"type": "tree"}, "type: got tree"), ({"type": "binary"}, "needs candidates to rescore"),
        ({"index": {"links": 3}}, "unknown key links"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            publish(open_store(folder.url, invalid), *saved, "other")
        assert set(folder.collections()) == {"shop"}


def test_changes_are_seen_at_once_and_by_open_stores(folder: Store, tmp_path: Path) -> None:
    """Until `finish`, searches have the earlier documents; then every opened store has the later ones."""
    shop, reader = Shop.new(Random(0), 9), open_store(folder.url)
    folder_of, dataset = shop.save(tmp_path / "v")
    collection = publish(folder, folder_of, dataset, "shop").collection
    where = Condition("price", ">", (-1e38,))
    before = state(reader, collection), reader.count(collection, where)
    shop.vectors[:], shop.rows[2]["price"] = 1, 0.0
    folder_of, dataset = shop.save(tmp_path / "later")
    _, documents = next(publishing._batches(publishing._Folder(folder_of), dataset, FEATURES, collection.radius))
    folder.write(collection, documents, 2)
    folder.delete(collection, ["key 1"], 2)
    assert (state(reader, collection) | {"keys": before[0]["keys"]}, reader.count(collection, where)) == before
    assert len(reader.contents(collection)) == 8
    folder.finish(collection)
    (result,) = reader.search(collection, np.ones((1, WIDTH), np.float32), 9)
    assert [document.score for document in result] == [WIDTH] * 8 and reader.count(collection) == 8
    assert not list((tmp_path / "a store/.shop.changes").iterdir())


def test_a_deleted_document_leaves_no_byte_in_the_folder(folder: Store, tmp_path: Path) -> None:
    shop, secret = Shop.new(Random(0), 30), ["0f4c9a-hidden-identifier"]
    collection = publish(folder, *shop.save(tmp_path / "v"), "shop").collection
    columns: dict[str, list[Any]] = {"shop": secret, "tags": [secret], "price": [None]}
    folder.write(collection, Documents(secret, secret, shop.vectors[:1] + 9, np.array([1]), columns), 1)

    def files() -> list[str]:
        contents = {str(file): file.read_bytes() for file in (tmp_path / "a store").rglob("*") if file.is_file()}
        vector = (shop.vectors[0] + np.float32(9)).tobytes()
        return [name for name, content in contents.items() if secret[0].encode() in content or vector in content]

    assert len(files()) == 1, "a change"
    folder.finish(collection)
    assert len(files()) == 3, "documents, vectors, index"
    folder.delete(collection, secret, 1)
    folder.compact(collection)
    assert not files() and folder.count(collection) == 30


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "..", "a\nb", "x" * 201])
def test_names_of_folders(folder: Store, name: str, tmp_path: Path) -> None:
    saved = Shop.new(Random(0), 3).save(tmp_path / "v")
    with pytest.raises(ConfigError, match="needs a name of 1 to 200"), folder.publishing(name):
        pass
    publish(folder, *saved, "shop")
    with pytest.raises(ConfigError, match="needs a name of 1 to 200"):
        folder.switch(name, "shop")


def test_collections_and_aliases_are_in_one_folder(folder: Store, tmp_path: Path) -> None:
    saved = Shop.new(Random(0), 3).save(tmp_path / "v")
    publish(folder, *saved, "shop")
    folder.switch("live", "shop")
    with pytest.raises(ConfigError, match="it is the name of an alias"):
        publish(folder, *saved, "live")
    with pytest.raises(ConfigError, match="it is the name of a collection"):
        folder.switch("shop", "shop")
    with pytest.raises(DataError, match="has no collection 'none'"):
        folder.switch("live", "none")
    for url in ("file://host/folder", "file:relative"):
        with pytest.raises(ConfigError, match="needs the absolute path of a folder here"):
            open_store(url).collections()


def test_a_fragment_is_refused(tmp_path: Path) -> None:
    for url in (f"file://{tmp_path}/store#second", "postgresql://me@localhost/shop#old", f"file://{tmp_path}/store#"):
        with pytest.raises(ConfigError, match="got #NAME in the URL of the store"):
            open_store(url)
    assert open_named(f"file://{tmp_path}/store#second")[1] == "second"


# ----- Qdrant alone


@pytest.fixture
def qdrant_store(tmp_path: Path) -> Any:
    return open_store(f"qdrant://{tmp_path}/store")


def test_a_lease_excludes_other_publishers(qdrant_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes of one server; a killed publisher's lease ends."""
    saved, now = Shop.new(Random(0), 6).save(tmp_path / "v"), [1e9]
    monkeypatch.setattr(qdrant.time, "time", lambda: now[0])
    collection = publish(qdrant_store, *saved, "shop").collection
    other = replace(qdrant_store, _state=qdrant._State(qdrant_store._state.client))
    with qdrant_store.publishing("shop"):
        now[0] += qdrant.LEASE_S - 1
        qdrant_store.delete(collection, ["key 1"], 1)
        now[0] += qdrant.LEASE_S - 1
        with pytest.raises(DataError, match="another process publishes to shop"):
            publish(other, *saved, "shop")
        publish(other, *saved, "another")
        now[0] += qdrant.LEASE_S
        publish(other, *saved, "shop")
        with other.publishing("shop"), pytest.raises(DataError, match="another process publishes to shop"):
            qdrant_store.delete(collection, ["key 1"], 1)
    publish(qdrant_store, *saved, "shop")
    with pytest.raises(DataError, match="already accessed by another instance"):
        open_store(qdrant_store.url).collections()


def test_a_delete_during_a_write_wins(qdrant_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collection = publish(qdrant_store, *Shop.new(Random(0), 3).save(tmp_path / "v"), "shop").collection
    deleted, columns = type(qdrant_store)._deleted, {"shop": [None], "tags": [None], "price": [None]}

    def delete_then(self: Any, *arguments: Any) -> Any:
        before = deleted(self, *arguments)
        monkeypatch.setattr(type(qdrant_store), "_deleted", deleted)
        qdrant_store.delete(collection, ["new"], 7)
        return before

    monkeypatch.setattr(type(qdrant_store), "_deleted", delete_then)
    qdrant_store.write(collection, Documents(["new"], [""], np.ones((1, WIDTH), np.float32), np.array([1]), columns), 7)
    assert sorted(qdrant_store.contents(collection)) == ["key 0", "key 1", "key 2"]


def test_a_killed_drop_hides_its_collection_alone(qdrant_store: Any, tmp_path: Path) -> None:
    saved = Shop.new(Random(0), 3).save(tmp_path / "v")
    for name in ("shop", "other"):
        publish(qdrant_store, *saved, name)
    qdrant_store._client().delete_collection("bigdssm_vectors_shop")  # the first step
    assert {name: qdrant_store.count(one) for name, one in qdrant_store.collections().items()} == {"other": 3}
    qdrant_store.drop("shop")
    assert qdrant_store._described().keys() == {"other"}
    assert "bigdssm_tombstones_shop" not in {one.name for one in qdrant_store._client().get_collections().collections}


def test_columns_of_any_name(qdrant_store: Any) -> None:
    columns = {"price now": "number", "a.b[]": "category", "ключ": "category"}
    collection = Collection("c", MODEL, "d", 1, WIDTH, True, "dot", 9.0, columns, qdrant_store.options())  # type: ignore[arg-type]
    qdrant_store.create(collection)
    values: dict[str, list[Any]] = {"price now": [1.0, None], "a.b[]": ["x", "y"], "ключ": ["я", "x"]}
    documents = Documents(["k", "l"], ["", ""], np.ones((2, WIDTH), np.float32), np.arange(2), values)
    qdrant_store.write(collection, documents, 1)
    for name, value in (("price now", 1.0), ("a.b[]", "x"), ("ключ", "я")):
        (result,) = qdrant_store.search(collection, documents.vectors[:1], 5, Condition(name, "=", (value,)))
        assert [document.key for document in result] == ["k"], name
    for name in ("doc_key", 'a"b'):
        with pytest.raises(ConfigError, match="needs a name without double quotes"):
            qdrant_store.create(replace(collection, columns={name: "number"}))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("qdrant://127.0.0.1:1", "Connection refused; try again"), ("qdrant://host:x", "URL of the store is invalid"),
        ("qdrant://host/path", "URL of the store is invalid"), ("qdrant://me@host", "URL of the store is invalid"),
        ("qdrant://host?tls=no", "URL of the store is invalid"), ("qdrant://", "URL of the store is invalid"),
        ("qdrant://host?tls=off", "would send it unencrypted"),
    ],
)  # fmt: skip
def test_errors_of_qdrant_are_one_sentence(
    url: str, message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(qdrant.KEY_VARIABLE, "hidden-key")
    assert publish_command.main(["--to", url]) in (ConfigError.exit_code, DataError.exit_code)
    out, error = capfd.readouterr()
    assert message in error and "hidden-key" not in out + error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("host", "query", "key", "https"),
    [("host", "", "k", True), ("host", "?tls=off", None, False), ("localhost", "", "k", False)],
)
def test_tls_of_qdrant(
    host: str, query: str, key: str | None, https: bool, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    given: dict[str, Any] = {}

    def connect(**options: Any) -> Any:
        given.update(options)
        return SimpleNamespace(info=lambda: SimpleNamespace(version="1.15.2"))

    monkeypatch.delenv(qdrant.KEY_VARIABLE, raising=False)
    if key is not None:
        monkeypatch.setenv(qdrant.KEY_VARIABLE, key)
    monkeypatch.setattr(qdrant, "QdrantClient", connect)
    with pytest.raises(DataError, match=r"has Qdrant 1\.15\.2, needs 1\.16"):
        open_store(f"qdrant://{host}:7{query}").collections()
    assert (given["https"], given["api_key"], given["port"]) == (https, key, 7)


# ----- PostgreSQL alone


def big_collection(store: Store, number: int, width: int = WIDTH) -> tuple[Collection, np.ndarray]:
    vectors = np.random.default_rng(0).standard_normal((number, width)).astype(np.float32)
    radius = 1.1 * float(np.linalg.norm(vectors, axis=1).max())
    collection = Collection(
        "big", MODEL, "dataset", 1, width, True, "dot", radius, {"part": "number"}, store.options()
    )  # fmt: skip
    store.create(collection)
    parts: list[Any] = [float(row % 1000) for row in range(number)]
    keys = [f"k{row}" for row in range(number)]
    store.write(collection, Documents(keys, keys, vectors, np.arange(number), {"part": parts}), 1)
    store.finish(collection)
    return collection, vectors


@pytest.mark.parametrize("exact_rows", [0, 20_000])
def test_a_filtered_search_returns_as_many_as_match(
    postgres_store: Store, exact_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 8,000 documents from none to all, by iterative scans alone or with exact ones."""
    monkeypatch.setattr(postgres, "EXACT_ROWS", exact_rows)
    store = open_store(postgres_store.url + INDEX_ALONE, {"ef_search": 10})
    collection, vectors = big_collection(store, 8000)
    for below in (0, 1, 8, 100, 500, 1000):
        mask = np.arange(8000) % 1000 < below
        where = Condition("part", "<", (float(below),))
        for top in (1, 30, 300):
            (result,) = store.search(collection, vectors[:1], top, where)
            best = np.sort((vectors @ vectors[0])[mask])[::-1][:top]
            assert len(result) == len(best)
            scores = np.array([document.score for document in result])
            assert (scores[:-1] >= scores[1:]).all() if len(scores) else not mask.any()
            assert (scores >= best[-1] - 1e-5).mean() >= 0.9 if len(scores) else True


def plan(store: Any, statement: str) -> str:
    rows = store._run(lambda connection: connection.execute(f"EXPLAIN {statement}").fetchall())
    return " ".join(line for (line,) in rows)


def test_a_filter_is_scanned_iteratively(postgres_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan returns as many matches as requested: the exact query is not needed."""
    monkeypatch.setattr(postgres, "EXACT_ROWS", 0)
    store = open_store(postgres_store.url + INDEX_ALONE, {"ef_search": 10})
    collection, vectors = big_collection(store, 3000)
    statements: list[str] = []
    run = psycopg.Connection.execute

    def execute(self: Any, query: Any, *arguments: Any, **options: Any) -> Any:
        statements.append(query if isinstance(query, str) else query.as_string(self))
        return run(self, query, *arguments, **options)

    monkeypatch.setattr(psycopg.Connection, "execute", execute)
    (result,) = store.search(collection, vectors[:1], 30, Condition("part", "<", (100.0,)))
    searches = [statement for statement in statements if "doc_title" in statement]
    assert len(result) == 30 and len(searches) == 1 and "<->" in searches[0]


def test_a_longer_vector_is_the_best_result(
    postgres_store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Vectors beyond the radius of the collection leave radius and other rows as they are, and the index finds them."""
    store, shop = open_store(postgres_store.url + INDEX_ALONE), Shop.new(Random(0), 1000)
    first = publish(store, *shop.save(tmp_path / "v"), "shop").collection
    directions = shop.vectors[:20] / np.linalg.norm(shop.vectors[:20], axis=1, keepdims=True)
    for times in (1.2, 3):
        shop.vectors[:20], shop.version = times * first.radius * directions, shop.version + 1
        with caplog.at_level("WARNING"):
            report = publish(store, *shop.save(tmp_path / f"{times}"), "shop")
        assert report.written == 20 and report.collection.radius == first.radius
        assert "20 vectors are longer than its radius" in caplog.text
        results = store.search(report.collection, directions, 20)
        assert [result[0].key for result in results] == [f"key {row}" for row in range(20)]
        scores = np.array([[document.score for document in result] for result in results])
        np.testing.assert_allclose(scores[:, 0], times * first.radius, rtol=1e-5)
        best = np.sort(directions @ shop.vectors.T, 1)[:, -20]
        assert (scores >= best[:, None] - 1e-5).mean() > 0.95


def test_wide_vectors_are_indexed_in_half_precision_and_rescored(postgres_store: Store) -> None:
    for width, index in ((2000, "halfvec_l2_ops"), (1999, "vector_l2_ops"), (4000, None)):
        collection, vectors = big_collection(postgres_store, 150, width)
        (definitions,) = postgres_store._select(  # type: ignore[attr-defined]
            "SELECT string_agg(indexdef, ' ') FROM pg_indexes WHERE indexdef ~ 'USING hnsw'"
        )[0]
        assert index in definitions if index else definitions is None
        (result,) = postgres_store.search(collection, vectors[7:8], 20)
        expected = np.sort(vectors @ vectors[7])[::-1][:20]
        scale = float((np.abs(vectors) @ np.abs(vectors[7])).max())
        assert_scores_close([document.score for document in result], expected, width, scale)
        postgres_store.drop("big")


def test_the_index_follows_changed_options(postgres_store: Store, tmp_path: Path) -> None:
    saved = Shop.new(Random(0), 9).save(tmp_path / "v")
    publish(postgres_store, *saved)
    collection = publish(replace(postgres_store, m=7, ef_search=33), *saved).collection
    assert collection.options["ef_search"] == 33
    select = "SELECT indexdef FROM pg_indexes WHERE indexdef ~ 'USING hnsw'"
    ((definition,),) = postgres_store._select(select)  # type: ignore[attr-defined]
    assert "m='7'" in definition


@pytest.mark.parametrize("url", ["postgresql", "file"], indirect=True)
def test_options_stay_unless_given(url: str, tmp_path: Path) -> None:
    saved = Shop.new(Random(0), 9).save(tmp_path / "v")
    first, second, merged, back = {
        "file": (
            {"type": "hnsw", "index": {"search_width": 77}}, {"index": {"links": 9}},
            {"index": {"search_width": 77, "links": 9}}, {"type": "flat"},
        ),
        "postgresql": ({"ef_search": 800, "m": 32}, {"m": 16}, {"m": 16}, {"m": 24, "ef_search": 200}),
    }[url.partition(":")[0]]  # fmt: skip

    def published(options: dict[str, Any] | None) -> dict[str, Any]:
        return dict(publish(open_store(url, options), *saved, "shop").collection.options)

    created = published(first)
    assert created == open_store(url, first).options() and published(None) == created
    assert published(second) == {**created, **merged}
    assert published(back) == open_store(url).options()


def test_names_and_values_are_quoted(postgres_store: Store, tmp_path: Path) -> None:
    store, name = postgres_store, 'a"b; DROP TABLE bigdssm_collections; --'
    shop = Shop.new(Random(0), 9)
    collection = publish(store, *shop.save(tmp_path / "v"), name).collection
    assert store.search(collection, shop.vectors[:1], 3, Condition("shop", "=", ("' OR true; --",))) == [[]]
    columns: dict[str, Any] = {"sale %s%": "number"}
    half = replace(collection, name="50%off %(x)s", columns=columns)
    store.create(half)
    documents = Documents(["a", "b"], ["", ""], shop.vectors[:2], np.arange(2), {"sale %s%": [1.0, 2.0]})
    store.write(half, documents, 1)
    store.delete(half, ["a"], 1)
    store.finish(half)
    where = Condition("sale %s%", ">", (1.0,))
    assert set(store.contents(half)) == set(store.vectors(half, ["a", "b"])) == {"b"} and store.count(half, where) == 1
    assert [document.key for document in store.search(half, shop.vectors[:1], 3, where)[0]] == ["b"]
    store.compact(half)
    store.drop(half.name)
    store.switch("it's", name)
    assert store.collection("it's").name == name
    for invalid in ("", "x" * 41, "a\nb"):
        with pytest.raises(ConfigError, match="needs a name of 1 to 40"):
            store.create(replace(collection, name=invalid))
    with pytest.raises(ConfigError, match="'doc_key'"):
        store.create(replace(collection, columns={"doc_key": "category"}))
    with pytest.raises(ConfigError, match="unknown is not a column of the collection"):
        store.count(collection, Condition("unknown", "=", ("x",)))
    with pytest.raises(DataError, match="has no collection or alias 'none'"):
        store.collection("none")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:hidden@host/db", "postgresql://me:hid/den@host/db", "postgresql://host/db?password=hidden",
        "postgresql://host/db?pass%77ord=hidden", "postgresql://me:hid@den@host/db", "postgresql://me:@host/db",
        "postgresql://me:hid#den@host/db", "postgresql://me:hid?den@host/db",
        "postgresql://me:hid[den@host/db",
    ],
)  # fmt: skip
def test_a_password_in_the_url_is_refused_and_not_shown(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert publish_command.main(["--to", url]) == ConfigError.exit_code
    out, error = capfd.readouterr()
    assert "URL of the store" in error and "hid" not in out + error and "den@" not in error


@pytest.mark.parametrize(
    ("url", "environment", "mode"),
    [
        ("postgresql://db.example.com/x", {}, "verify-full"),
        ("postgresql:///x?hostaddr=10.0.0.1", {}, "verify-full"),
        ("postgresql:///x?host=/run/pg,db.example.com", {}, "verify-full"),
        ("postgresql:///x", {"PGHOST": "db.example.com"}, "verify-full"),
        ("postgresql:///?service=shop", {}, "verify-full"),
        ("postgresql:///x", {"PGSERVICE": "shop"}, "verify-full"),
        ("postgresql:///x", {"PGHOSTADDR": "203.0.113.5"}, "verify-full"),
        ("postgresql://localhost/x", {"PGHOSTADDR": "203.0.113.5"}, "verify-full"),
        ("postgresql://db.example.com/x?sslmode=require", {}, "require"),
        ("postgresql://db.example.com/x", {"PGSSLMODE": "disable"}, None),
        ("postgresql:///x", {}, None),
        ("postgresql://localhost/x", {}, None),
        ("postgresql:///x?host=/run/pg", {}, None),
    ],
)
def test_tls_is_verified_unless_the_server_is_local(
    url: str, environment: dict[str, str], mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {}

    def connect(**given: Any) -> None:
        options.update(given)
        raise psycopg.OperationalError("nobody is there")

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(psycopg, "connect", connect)
    with pytest.raises(UnavailableError, match="nobody is there; try again"):
        open_store(url).collections()
    assert options.get("sslmode") == mode
    assert options.get("sslrootcert") == ("system" if mode == "verify-full" else None)


def test_errors_of_the_server_are_one_sentence(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r'postgresql://.*/missing: .*"missing" does not exist; try again'):
        open_store(server.url("missing")).collections()
    store = open_store(server.new_database())
    assert store.collections() == store.aliases() == {}
    collection = publish(store, *Shop.new(Random(0), 6).save(tmp_path / "v"), "shop").collection
    open_store(store.url).drop("shop")
    for use in (store.count, store.contents, store.finish):
        with pytest.raises(DataError, match="the collection was dropped; publish it again"):
            use(collection)
    with pytest.raises(DataError, match="collection shop was dropped"):
        store.delete(collection, ["key 1"], 1)


def test_a_server_that_restarts_loses_no_answer(postgres_store: Store, server: Server, tmp_path: Path) -> None:
    shop = Shop.new(Random(0), 30)
    collection = publish(postgres_store, *shop.save(tmp_path / "v")).collection
    expected, answers, stop = postgres_store.search(collection, shop.vectors[:2], 5), [], threading.Event()

    def search() -> None:
        while not stop.is_set():
            answers.append(postgres_store.search(collection, shop.vectors[:2], 5))

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    for mode in ("immediate", "fast"):
        before = len(answers)
        while len(answers) < before + 4 and any(thread.is_alive() for thread in threads):
            time.sleep(0.01)
        server.stop(mode)
        server.start()
    before = len(answers)
    while len(answers) < before + 4 and any(thread.is_alive() for thread in threads):
        time.sleep(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    assert len(answers) >= before + 4 and all(answer == expected for answer in answers)


def test_a_server_that_is_gone_is_waited_for_once(
    postgres_store: Store, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = Shop.new(Random(0), 30)
    collection = publish(postgres_store, *shop.save(tmp_path / "v")).collection
    expected, waited = postgres_store.search(collection, shop.vectors[:2], 5), list[float]()
    monkeypatch.setattr(postgres.time, "sleep", waited.append)
    server.stop()
    try:
        for _ in range(2):
            with pytest.raises(UnavailableError, match="try again when this is fixed"):
                postgres_store.search(collection, shop.vectors[:2], 5)
        assert waited == list(postgres.WAITS_S)
    finally:
        server.start()
    assert postgres_store.search(collection, shop.vectors[:2], 5) == expected


def test_threads_share_connections(postgres_store: Store, tmp_path: Path) -> None:
    shop = Shop.new(Random(0), 9)
    collection = publish(postgres_store, *shop.save(tmp_path / "v")).collection
    for _ in range(5):
        thread = threading.Thread(target=postgres_store.search, args=(collection, shop.vectors[:1], 3))
        thread.start()
        thread.join()
    assert len(postgres_store._pool.idle) == 1  # type: ignore[attr-defined]


def test_a_damaged_table_of_documents_is_not_published(
    store: Store, vectors_dir: Path, dataset: Dataset, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(vectors_dir, tmp_path / "vectors"))
    content = bytearray((folder / "documents.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "documents.arrow").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"documents\.arrow"):
        publish(store, folder, dataset)
    assert not store.collections()
