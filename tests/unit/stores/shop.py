"""Documents of a shop that change, and an empty store for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.stamps import FIRST_STAMP
from bigdssm.features.base import encode_values
from bigdssm.features.conditions import parse_filter, resolve
from bigdssm.features.ragged import take
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.retrieval.vectors import VectorsMeta, write_meta, write_vectors
from bigdssm.stores.base import Collection, Store
from tests.filters import FEATURES, random_rows

# The planner would scan a small table
INDEX_ALONE = "&options=" + "%20".join(f"-cenable_{plan}%3Doff" for plan in ("seqscan", "bitmapscan", "sort"))
MODEL, OTHER_MODEL = "a1" * 16, "b2" * 16
WIDTH = 5


def new_url(scheme: str, request: pytest.FixtureRequest, folder: Path) -> str:
    """Return the URL of an empty store."""
    if scheme == "memory":
        request.getfixturevalue("memory_store")
        return "memory://here"
    if scheme == "postgresql":
        return str(request.getfixturevalue("server").new_database())
    return f"{scheme}://{folder}/store"


@dataclass
class Shop:
    """Documents of a shop, which change; `save` writes their vectors folder."""

    random: Random
    rows: list[dict[str, Any]]  # by document number
    vectors: np.ndarray
    withdrawn: set[int]
    version: int = 1

    @classmethod
    def new(cls, random: Random, number: int) -> Shop:
        vectors = np.random.default_rng(random.randrange(1000)).standard_normal((number, WIDTH)).astype(np.float32)
        return cls(random, random_rows(random, number), vectors, set())

    def change(self) -> None:
        """Add, change, remove and withdraw documents, or bring them back."""
        random, self.version = self.random, self.version + 1
        for _ in range(random.randrange(4)):
            self.rows += random_rows(random, 1)
            self.vectors = np.append(self.vectors, np.float32([[random.random() for _ in range(WIDTH)]]), 0)
        for _ in range(random.randrange(4)):
            row = random.randrange(len(self.rows))
            if random.random() < 0.5:
                self.vectors[row] = random.random()
            else:
                self.rows[row] = random_rows(random, 1)[0]
        if random.random() < 0.3:  # a dataset that was rebuilt
            self.rows.pop()
            self.vectors = self.vectors[:-1]
            self.withdrawn.discard(len(self.rows))
        self.withdrawn ^= {random.randrange(len(self.rows)) for _ in range(random.randrange(4))}

    def save(self, folder: Path, model: str = MODEL) -> tuple[Path, Any]:
        """Return a vectors folder and the part of its dataset that `publish` reads."""
        folder.mkdir(parents=True)
        number = len(self.rows)
        withdrawn = np.isin(np.arange(number), list(self.withdrawn))
        keys = [f"key {row}" for row in range(number)]
        table = pa.table({"doc_key": keys, "doc_title": [f"Title {key}" for key in keys], "withdrawn": withdrawn})
        with pa.OSFile(str(folder / "documents.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        np.save(folder / "vectors.npy", self.vectors)
        fingerprint = f"fingerprint {self.version}"
        write_meta(folder, VectorsMeta("vectors", model, fingerprint, number, WIDTH, score="dot"))
        columns = {name: encode_values(f, [row[name] for row in self.rows], None) for name, f in FEATURES.items()}
        dataset = SimpleNamespace(
            fingerprint=fingerprint, stamp=FIRST_STAMP + self.version, dir=folder,
            catalogue=SimpleNamespace(
                filterable=FEATURES, column=lambda name, rows: take(columns[name], rows), withdrawn=np.zeros(0, int),
                keys=lambda rows: [keys[row] for row in rows.tolist()],
            ),
        )  # fmt: skip
        dataset.whole = dataset
        return folder, dataset


def state(store: Store, collection: Collection) -> dict[str, Any]:
    """Return all documents with score, title and hash, and the answers to some filters."""
    query = np.arange(1, WIDTH + 1, dtype=np.float32)[None]
    (every,) = store.search(collection, query, 10_000)
    texts = ("price > 1", "tags != red", "shop = corner or tags in (blue, and)")
    found = [store.count(collection, resolve(parse_filter(text), FEATURES)) for text in texts]
    vectors = store.vectors(collection, [document.key for document in every])
    return {
        "documents": sorted(every),
        "keys": sorted(store.contents(collection)),
        "counts": found,
        "sum": sum(vectors[key].vector for key in sorted(vectors)).tolist(),
    }


def embedded(model_dir: Path, dataset: Dataset, out: Path) -> Path:
    folder = load_model_folder(model_dir)
    write_vectors(out, tower_encoders(folder.model, dataset), dataset, folder.doc_checksum, score="dot")
    return out
