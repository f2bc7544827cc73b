"""Which version of an item an event saw: a search over all versions with their times, which workers map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from bigdssm.dataset.mapped import MappedTable
from bigdssm.dataset.versions import DOCUMENT_COLUMN, SINCE_COLUMN, CatalogueFile, Versions, distinct
from bigdssm.making.documents import Documents
from bigdssm.making.engine import Engine
from bigdssm.making.steps import finished_folder

ARRAYS = ("times", "begin", "at")


@dataclass(frozen=True)
class ItemVersions:
    """Finds versions by item and time; picklable as its files, which workers map."""

    folder: Path
    num_docs: int

    @classmethod
    def of(cls, engine: Engine, known: Sequence[CatalogueFile], documents: Documents) -> ItemVersions:
        """Return those of the dataset that grows, of which `known` are the catalogue's files, and of `documents`."""
        folder = engine.spool / "item_versions"
        if not folder.exists():
            versions, oldest = _versions(known, documents)
            with finished_folder(folder) as aside:
                np.save(aside / "oldest.npy", oldest)
                for name in ARRAYS:
                    np.save(aside / f"{name}.npy", getattr(versions, name))
        return cls(folder, documents.total)

    def _array(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)

    @cached_property
    def _versions(self) -> Versions:
        return Versions(self.num_docs, *map(self._array, ARRAYS))

    @cached_property
    def _oldest(self) -> np.ndarray:
        return self._array("oldest")

    def find(self, items: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Return which version of each item held at a time, int32, as `Versions.named` takes them."""
        if not len(self._versions.begin):
            return np.full(len(items), -1, np.int32)
        place = self._versions.held(items.astype(np.int64), times)
        return np.where(place < self.num_docs, -1, place - self.num_docs).astype(np.int32)

    def num_early(self, items: np.ndarray, times: np.ndarray) -> int:
        """Return how many events are older than all versions of their items."""
        return int((times < self._oldest[items]).sum())


def _versions(known: Sequence[CatalogueFile], documents: Documents) -> tuple[Versions, np.ndarray]:
    """Return all versions, and from when on the oldest of each document holds, float64 [documents]."""
    assert documents.changed is not None
    rows = documents.changed.read(columns=[DOCUMENT_COLUMN, SINCE_COLUMN])
    document, since = (rows.column(name).to_numpy() for name in (DOCUMENT_COLUMN, SINCE_COLUMN))
    first = documents.table.read(columns=[SINCE_COLUMN]).column(SINCE_COLUMN).to_numpy()
    if known:
        table = MappedTable([file.path for file in known if file.since is None])
        first = np.concatenate([table.whole(SINCE_COLUMN), first])
    if earlier := [file.path for file in known if file.since is not None]:
        table = MappedTable(earlier)
        document = np.concatenate([table.whole(DOCUMENT_COLUMN), document])
        since = np.concatenate([table.whole(SINCE_COLUMN), since])
    versions = Versions.of(documents.total, document, since, first[distinct(document)])
    oldest = first.copy()
    np.minimum.at(oldest, document, since)
    return versions, oldest
