"""Collects the distinct documents of a dataset being made, and writes them as one part of its catalogue."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdssm.dataset.mapped import MappedTable
from bigdssm.errors import ConfigError
from bigdssm.features import Feature, TextTokenizer, encode_columns
from bigdssm.making.ahead import ahead
from bigdssm.making.column_file import ColumnFile
from bigdssm.making.journal import State
from bigdssm.making.row_spool import RowSpool
from bigdssm.string_hashes import hash_strings
from bigdssm.tables.hashing import KeyIndex

KEY_COLUMNS = (("doc_key", pa.string()), ("doc_id", pa.int64()), ("display", pa.string()))


class CatalogueWriter:
    """Numbers documents by first appearance, behind those of the existing parts; their raw features wait on disk."""

    def __init__(
        self, spool: Path, features: Mapping[str, Feature], existing: Sequence[Path], state: State | None = None
    ) -> None:
        """Begin behind `existing`, or go on where another writer's `state` was taken."""
        self._features = features
        self._index = KeyIndex()
        if existing:
            self._index.add(MappedTable(existing).whole("doc_id"))
        self.first_new = len(self._index)
        if state is not None:
            self._index.restore(state["index"])
        fields = [("doc_key", pa.large_string()), ("display", pa.large_string())]
        fields += [(f"feature.{name}", feature.canonical_type) for name, feature in features.items()]
        self._schema = pa.schema(fields)
        self._spool = RowSpool(spool / "documents.arrows", self._schema, state["spool"] if state else None)

    def state(self) -> State:
        """Return what the constructor takes to go on from here."""
        return {"index": self._index.state(), "spool": self._spool.state()}

    @property
    def num_docs(self) -> int:
        """Return the documents known so far, those of existing parts included."""
        return len(self._index)

    def find(self, doc_ids: np.ndarray) -> np.ndarray:
        """Return the catalogue rows of documents by their hash, -1 where unknown, int64."""
        return self._index.find(doc_ids)

    def add(self, keys: pa.Array, display: pa.Array, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Take in documents (canonical features in `table`); the first row of a key stays.

        Returns their catalogue rows, int64, and the places in the batch where new ones stand.
        """
        rows, first = self._index.add(hash_strings(keys))
        shown = pc.if_else(pc.equal(display, ""), keys, display)
        columns = [keys, shown, *(table.column(name).combine_chunks() for name in self._features)]
        batch = pa.Table.from_arrays(columns, schema=self._schema)
        if len(first):
            self._spool.add(batch if len(first) == len(rows) else batch.take(pa.array(first)))
        return rows, first

    def new_documents(self) -> Iterator[pa.Table]:
        """Yield the canonical features of the new documents in order; no document can be added after this."""
        for batch in self._spool.batches():
            yield self._canonical(batch)

    def write(
        self, path: Path, features: Mapping[str, Feature], text: TextTokenizer | None, spool: Path,
        state: State | None = None, note: Callable[..., None] | None = None,
    ) -> str:  # fmt: skip
        """Write the new documents, encoded with the fitted `features`, and return the file's checksum.

        Behind every batch it calls `note(documents=state)`; with such a state it goes on from there.
        """
        fields = [*KEY_COLUMNS, *((name, feature.arrow_type(large=True)) for name, feature in features.items())]
        part = ColumnFile(path, pa.schema(fields), spool, state)

        def encoded(batch: pa.RecordBatch) -> dict[str, pa.Array]:
            keys = {
                "doc_key": batch.column("doc_key"),
                "doc_id": pa.array(hash_strings(batch.column("doc_key"))),
                "display": batch.column("display"),
            }
            return keys | encode_columns(self._canonical(batch), features, text, large=True)

        for _, columns in ahead(encoded, _behind(self._spool.batches(), part.num_rows)):
            part.append(columns)
            if note is not None:
                note(documents=part.state())
        return part.finish()

    def close(self) -> None:
        """Close the spool file."""
        self._spool.close()

    def _canonical(self, batch: pa.RecordBatch) -> pa.Table:
        return pa.table({name: batch.column(f"feature.{name}") for name in self._features})


def _behind(batches: Iterable[pa.RecordBatch], done: int) -> Iterator[pa.RecordBatch]:
    """Yield the batches behind the first `done` rows, which are whole batches."""
    for batch in batches:
        if done:
            done -= batch.num_rows
        else:
            yield batch


def check_names(features: Iterable[str], reserved: Sequence[str], side: str) -> None:
    """Raise ConfigError where a feature has the name of one of the dataset's own columns."""
    for name in features:
        if name in reserved:
            raise ConfigError(f"data.{side}.{name}: the name is taken by the dataset's own column; choose another")
