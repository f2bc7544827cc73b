"""Publications of a dataset that is rebuilt, appended to and withdrawn from, against a model of them in Python."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.stamps import FIRST_STAMP
from bigdssm.errors import ConfigError, DataError
from bigdssm.features.base import encode_values
from bigdssm.features.conditions import Condition
from bigdssm.retrieval import publish as publishing
from bigdssm.retrieval.forgetting import forget_in_collection
from bigdssm.retrieval.publish import compare_documents, measure_recall, publish
from bigdssm.retrieval.vectors import VectorsMeta, write_meta
from bigdssm.stores.base import FORGOTTEN, Alias, Documents, Store, open_store
from tests.filters import FEATURES
from tests.unit.stores.shop import INDEX_ALONE, MODEL, WIDTH, new_url

SCHEMES = ("postgresql", "memory", "file", "qdrant")


@pytest.fixture(params=SCHEMES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(new_url(request.param, request, tmp_path))


@dataclass
class Shop:
    """A dataset of documents whose vectors are one number each, and the folder of its states."""

    folder: Path
    rows: list[str] = field(default_factory=list)  # keys, "" once forgotten
    values: dict[str, float] = field(default_factory=dict)  # of a document's vector, by key
    withdrawn: set[str] = field(default_factory=set)
    stamp: int = FIRST_STAMP
    states: list[tuple[Path, Any]] = field(default_factory=list)

    @property
    def documents(self) -> dict[str, float]:
        return {key: self.values[key] for key in self.rows if key and key not in self.withdrawn}

    def rebuild(self, random: Random, keys: list[str]) -> None:
        self.rows, self.withdrawn = list(keys), set()
        self.values = {key: 1.0 + random.randrange(5) for key in keys}
        self.stamp += 1

    def append(self, random: Random, keys: list[str]) -> None:
        self.rows += [key for key in keys if key not in self.rows]
        self.values |= {key: 1.0 + random.randrange(5) for key in keys}
        self.withdrawn -= set(keys)
        self.stamp += 1

    def withdraw(self, keys: set[str]) -> None:
        """Withdraw documents, or bring them back."""
        self.withdrawn ^= keys & set(self.rows)
        self.stamp += 1

    def forget(self, keys: set[str]) -> None:
        self.rows = ["" if key in keys else key for key in self.rows]
        self.withdrawn -= keys

    def save(self) -> tuple[Path, Any]:
        """Return a vectors folder and the part of its dataset that `publish` reads."""
        folder = self.folder / str(len(self.states))
        folder.mkdir(parents=True)
        rows, number = list(self.rows), len(self.rows)
        gone = np.array([not key or key in self.withdrawn for key in rows], bool)
        titles = pa.array(["a title"] * number, pa.string())
        table = pa.table({"doc_key": pa.array(rows, pa.string()), "doc_title": titles, "withdrawn": gone})
        with pa.OSFile(str(folder / "documents.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        vectors = np.zeros((number, WIDTH), np.float32)
        vectors[:, 0] = [self.values.get(key, 0.0) for key in rows]
        np.save(folder / "vectors.npy", vectors)
        fingerprint = f"state {len(self.states)}"
        write_meta(folder, VectorsMeta("vectors", MODEL, fingerprint, number, WIDTH, score="dot"))
        price = encode_values(FEATURES["price"], [1.0] * number, None)
        dataset = SimpleNamespace(
            fingerprint=fingerprint, stamp=self.stamp, dir=folder,
            catalogue=SimpleNamespace(
                filterable={"price": FEATURES["price"]}, column=lambda name, of: price[of], num_docs=number,
                withdrawn=np.flatnonzero(gone), keys=lambda of: [rows[row] for row in of.tolist()],
            ),
        )  # fmt: skip
        dataset.whole = dataset
        self.states.append((folder, dataset))
        return folder, dataset


@dataclass
class Expected:
    """The model of a collection."""

    stamp: int
    documents: dict[str, float]
    forgotten: set[str] = field(default_factory=set)


def check(store: Store, expected: dict[str, Expected]) -> None:
    """Compare every collection with the model, and every answer with its documents."""
    for name, model in expected.items():
        collection = store.collections()[name]
        assert collection.version == model.stamp
        assert set(store.contents(collection)) == set(model.documents)
        (found,) = store.search(collection, np.eye(1, WIDTH, dtype=np.float32), 50)
        assert {document.key: document.score for document in found} == model.documents


def published(store: Store, expected: dict[str, Expected], name: str, folder: Path, dataset: Dataset) -> Counter[str]:
    """Publish, compare the report with the model of the collection and update it; return counts of outcomes."""
    if name in expected and dataset.stamp < expected[name].stamp:
        with pytest.raises(DataError, match="later documents would be lost; publish the later dataset"):
            publish(store, folder, dataset, name)
        return Counter(refused=1)
    model = expected.setdefault(name, Expected(dataset.stamp, {}))
    rows, gone = (
        dataset.catalogue.keys(np.arange(dataset.catalogue.num_docs)),
        set(dataset.catalogue.withdrawn.tolist()),
    )
    vectors = np.load(folder / "vectors.npy")[:, 0].tolist()
    documents = {key: vectors[row] for row, key in enumerate(rows) if row not in gone}
    accepted = {key: value for key, value in documents.items() if key not in model.forgotten}
    report = publish(store, folder, dataset, name)
    assert set(report.rejected) == set(documents) - set(accepted)
    assert report.deleted == len(set(model.documents) - set(accepted))
    assert report.written + report.unchanged + len(report.rejected) == len(documents)
    back = len(set(accepted) - set(model.documents))
    model.documents, model.stamp = accepted, dataset.stamp
    return Counter(back=back, rejected=len(report.rejected))


def forget_everywhere(store: Store, expected: dict[str, Expected], keys: list[str]) -> None:
    """Forget documents in all collections and in their models."""
    for name, model in expected.items():
        forget_in_collection(store, name, [], keys)
        model.forgotten |= set(keys)
        for key in keys:
            model.documents.pop(key, None)


CHANGES = ["rebuild", "append", "withdraw", "publish", "publish", "publish", "earlier", "switch", "forget"]


@pytest.mark.parametrize(
    ("scheme", "first", "sequences"),
    [
        ("memory", 0, 20), ("file", 20, 12), ("postgresql", 32, 2), ("qdrant", 34, 6),
        pytest.param("memory", 40, 60, marks=pytest.mark.slow), pytest.param("file", 100, 50, marks=pytest.mark.slow),
        pytest.param("postgresql", 150, 22, marks=pytest.mark.slow),
        pytest.param("qdrant", 172, 28, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_random_publications(
    scheme: str, first: int, sequences: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Rebuild, append, withdraw, publish (also earlier states), switch, roll back and forget."""
    url = new_url(scheme, request, tmp_path)
    store = open_store(url + INDEX_ALONE if scheme == "postgresql" else url)
    universe = [f"k{number}" for number in range(8)]
    occurred = Counter[str]()
    for seed in range(first, first + sequences):
        random, shop = Random(seed), Shop(tmp_path / f"shop {seed}")
        shop.rebuild(random, random.sample(universe, 5))
        expected: dict[str, Expected] = {}
        alias, live = f"live {seed}", Alias("", None)
        for _ in range(14):
            keys = random.sample(universe, random.randrange(1, 4))
            what = random.choice(CHANGES)
            name = f"{random.choice('ab')} {seed}"
            if what == "rebuild":
                shop.rebuild(random, random.sample(universe, random.randrange(3, 7)))
            elif what == "append":
                shop.append(random, keys)
            elif what == "withdraw":
                shop.withdraw(set(keys))
            elif what in ("publish", "earlier"):
                is_late = what == "earlier" and shop.states and random.random() < 0.8
                saved = random.choice(shop.states) if is_late else shop.save()
                occurred += published(store, expected, name, *saved)
            elif what == "switch" and name in expected:
                to = live.previous if random.random() < 0.5 and live.previous else name
                store.switch(alias, to)
                live = Alias(to, live.previous if to == live.name else live.name or None)
                assert store.aliases()[alias] == live
            elif what == "forget":
                shop.forget(set(keys))
                forget_everywhere(store, expected, keys)
            check(store, expected)
    assert occurred["back"] > 0 and (sequences < 20 or min(occurred["refused"], occurred["rejected"]) > 0), (
        "all kinds occurred"
    )


def test_an_item_that_comes_back_is_published_again(store: Store, tmp_path: Path) -> None:
    """A dataset that is built again each night, of one partition each time."""
    random, shop = Random(0), Shop(tmp_path / "shop")
    for night, keys in enumerate((["a", "b"], ["b"], ["a", "b"])):
        shop.rebuild(random, keys)
        saved = shop.save()
        report = publish(store, *saved, "shop")
        assert set(store.contents(report.collection)) == set(keys) and report.collection.publication == night + 1
        assert measure_recall(store, report.collection, saved[0], dataset=saved[1]).recall == 1
    shop.stamp -= 1  # another folder, built before
    with pytest.raises(DataError, match=r"is an earlier one of .*; publish the later dataset, build or append to this"):
        publish(store, *shop.save(), "shop")
    shop.stamp += 1  # equal stamps of two folders: the latest publication wins
    shop.rows = ["b"]
    assert publish(store, *shop.save(), "shop").deleted == 1


def test_deletes_of_forget_win_over_later_publications(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random, shop = Random(0), Shop(tmp_path / "shop")
    shop.rebuild(random, ["a", "b", "c"])
    publish(store, *shop.save(), "shop")
    forget_in_collection(store, "shop", [], ["a"])
    for _ in range(2):  # from source tables that still have it
        shop.rebuild(random, ["a", "b"])
        saved = shop.save()
        report = publish(store, *saved, "shop")
        assert report.rejected == ("a",) and set(store.contents(report.collection)) == {"b"}
        recall = measure_recall(store, report.collection, saved[0], dataset=saved[1], rejected=report.rejected)
        assert recall.recall == 1
    assert publish(store, *saved, "another").rejected == ()
    columns: dict[str, Any] = {"price": [1.0]}
    documents = Documents(["b"], [""], np.ones((1, WIDTH), np.float32), np.array([7]), columns)
    store.write(report.collection, documents, FORGOTTEN - 1)
    assert set(store.contents(report.collection)) == {"b"}, "a version is exact up to there"
    store.delete(report.collection, ["b"], FORGOTTEN - 2)
    assert set(store.contents(report.collection)) == {"b"}


def test_collections_from_before_stamps_are_read_and_continued(store: Store, tmp_path: Path) -> None:
    """Their versions are numbers of partitions, of the collection and of every row and tombstone."""
    random, shop = Random(0), Shop(tmp_path / "shop")
    shop.rebuild(random, ["a", "b"])
    saved = shop.save()
    collection = publish(store, *saved, "shop").collection
    store.drop("shop")
    earlier = {**vars(collection), "version": 3, "published": 0.0, "publication": 0}
    old = type(collection)(**earlier)
    store.create(old)
    _, documents = next(
        publishing._batches(
            publishing._Folder(*saved), saved[1], saved[1].catalogue.filterable, collection.radius
        )
    )  # fmt: skip
    store.write(old, documents, 3)
    store.delete(old, ["b"], 3)
    store.finish(old)
    if store.scheme == "file":  # as it was written then
        path = tmp_path / "store/shop/collection.json"
        content = json.loads(path.read_text())
        del content["publication"]
        path.write_text(json.dumps(content))
    assert set(store.contents(store.collection("shop"))) == {"a"} and store.collection("shop").publication == 0
    dataset = saved[1]
    dataset.stamp = 2  # that of an earlier version, without stamps
    with pytest.raises(DataError, match=r"a dataset of 3 partitions and unknown time, .* one of 2 partitions"):
        publish(store, *saved, "shop")
    dataset.stamp = 3
    report = publish(store, *saved, "shop")
    assert (report.collection.publication, set(store.contents(report.collection))) == (4, {"a", "b"})
    dataset.stamp = FIRST_STAMP
    assert publish(store, *saved, "shop").collection.publication == 5
    dataset.stamp = 9
    with pytest.raises(DataError, match="is an earlier one of 9 partitions"):
        publish(store, *saved, "shop")


def test_an_alias_and_a_collection_have_different_names(store: Store, tmp_path: Path) -> None:
    random, shop = Random(0), Shop(tmp_path / "shop")
    shop.rebuild(random, ["a", "b"])
    saved = shop.save()
    publish(store, *saved, "first")
    with pytest.raises(ConfigError, match="alias first: it is the name of a collection; choose another one"):
        store.switch("first", "first")
    store.switch("live", "first")
    with pytest.raises(ConfigError, match="collection live: it is the name of an alias, of first; choose another one"):
        publish(store, *saved, "live")
    with pytest.raises(ConfigError, match="collection live: it is the name of an alias"):
        store.create(type(store.collection("first"))(**{**vars(store.collection("first")), "name": "live"}))
    assert set(store.collections()) == {"first"} and set(store.aliases()) == {"live"}
    store.switch("live", "first")


def test_an_empty_collection_is_not_verified(store: Store, tmp_path: Path) -> None:
    random, shop = Random(0), Shop(tmp_path / "shop")
    shop.rebuild(random, ["a", "b"])
    shop.withdraw({"a", "b"})
    saved = shop.save()
    collection = publish(store, *saved, "shop").collection
    with pytest.raises(DataError, match=r"collection shop is empty: all 2 documents of .* are withdrawn"):
        measure_recall(store, collection, saved[0], dataset=saved[1])


def test_documents_of_collections_and_datasets_are_compared(store: Store, tmp_path: Path) -> None:
    random, shop = Random(0), Shop(tmp_path / "shop")
    shop.rebuild(random, ["a", "b", "c"])
    before = publish(store, *shop.save(), "before").collection
    shop.append(random, ["d", "e"])
    shop.withdraw({"a"})
    shop.forget({"b"})
    _, dataset = saved = shop.save()
    after = publish(store, *saved, "after").collection
    for other in (after, dataset):
        difference = compare_documents(store, before, other)
        assert difference.missing == ("d", "e")
        assert difference.extra == ("a", "b")
    same = compare_documents(store, after, dataset)
    assert (same.missing, same.extra) == ((), ())


# ----- PostgreSQL alone


def test_a_nul_matches_nothing_in_postgresql(postgres_store: Store, tmp_path: Path) -> None:
    random, shop = Random(0), Shop(tmp_path / "shop")
    shop.rebuild(random, ["a", "b"])
    store, saved = postgres_store, shop.save()
    collection = publish(store, *saved, "shop").collection
    queries = np.ones((1, WIDTH), np.float32)
    (found,) = store.search(collection, queries, 5, None, [["a", "a\0", "\0"]])
    assert [document.key for document in found] == ["b"]
    assert set(store.vectors(collection, ["a\0", "b"])) == {"b"}
    columns = type(collection)(**{**vars(collection), "name": "texts", "columns": {"kind": "category"}})
    store.create(columns)
    store.write(columns, Documents(["a"], [""], queries, np.array([1]), {"kind": ["tea"]}), 1)
    for operator, values, number in (("in", ("tea\0", "tea"), 1), ("=", ("tea\0",), 0), ("!=", ("tea\0",), 1)):
        assert store.count(columns, Condition("kind", operator, values)) == number
    store.delete(columns, ["a\0", "a"], 2)
    assert store.count(columns) == 0


@pytest.mark.parametrize(
    ("key", "title", "kind", "reason"),
    [
        ("x" * 9000, "", "tea", r"document 'xxxx.*its key has 9000 bytes, needs at most 2600"),
        ("a", "", "ä" * 2000, r"document 'a': its kind has 4000 bytes, needs at most 2600"),
        ("a", "t\0", "tea", "document 'a': its title has a NUL character, which PostgreSQL cannot store"),
    ],
)
def test_texts_that_postgresql_cannot_store_are_named(
    postgres_store: Store, tmp_path: Path, key: str, title: str, kind: str, reason: str
) -> None:
    random, shop = Random(0), Shop(tmp_path / "shop")
    shop.rebuild(random, ["a"])
    collection = publish(postgres_store, *shop.save(), "shop").collection
    texts = type(collection)(**{**vars(collection), "name": "texts", "columns": {"kind": "category"}})
    postgres_store.create(texts)
    vector = np.ones((1, WIDTH), np.float32)
    with pytest.raises(DataError, match=reason):
        postgres_store.write(texts, Documents([key], [title], vector, np.array([1]), {"kind": [kind]}), 1)
    longest = "".join(Random(0).choices("abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGHIJ", k=2600))  # not compressible
    postgres_store.write(texts, Documents([longest], ["t" * 9000], vector, np.array([1]), {"kind": [longest]}), 1)
    postgres_store.finish(texts)
    assert set(postgres_store.contents(texts)) == {longest}
