"""The documents that a dataset has when it grows: rows of a table are compared with what they are, or were."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdssm.dataset.keys import Keys
from bigdssm.dataset.mapped import MappedTable
from bigdssm.dataset.versions import SINCE_COLUMN, CatalogueFile, Versions, catalogue_files
from bigdssm.making.dataset_writer import AS_OF, DatasetWriter

IS_NEW = "is_new"  # whether a row has features that the dataset has not: of a new document, or other ones than it had
KNOWN_SINCE = "known_since"  # from when on the version holds that a row with a time was compared with; −∞: it has none


@dataclass(frozen=True)
class KnownDocuments:
    """Finds a dataset's documents by key; picklable as its files, which workers map."""

    keys: Keys  # of all documents
    files: tuple[CatalogueFile, ...]  # those of versions last
    dated: bool  # whether they have times

    @classmethod
    def of(cls, writer: DatasetWriter) -> KnownDocuments:
        """Return those of the dataset that is written."""
        files = tuple(catalogue_files(writer.out, writer.content))
        return cls(Keys(writer.key_files), files, writer.content.get("items") == AS_OF["items"])

    @cached_property
    def _table(self) -> MappedTable:
        return MappedTable([file.path for file in self.files])

    @cached_property
    def _versions(self) -> Versions | None:
        return Versions.read(self.files, dated=self.dated)

    def compared(self, rows: pa.Table) -> pa.Table:
        """Return rows of documents with the columns `document`, which they are (-1: new), and IS_NEW.

        What the dataset has already is null in the others: such a row only tells where its document stands first.
        Rows with times are compared with what their documents were then, stay whole, and get KNOWN_SINCE.
        """
        documents = self.keys.find(rows.column("doc_id").to_numpy())
        is_new, known_since = np.ones(rows.num_rows, bool), np.full(rows.num_rows, -np.inf)
        known = np.flatnonzero(documents >= 0)
        if len(known):
            at = documents[known]
            if self.dated:
                since = rows.column(SINCE_COLUMN).to_numpy()[known]
                at = at if self._versions is None else self._versions.held(at, since)
                began = np.asarray(self._table.take(SINCE_COLUMN, at))
                known_since[known] = np.where(began <= since, began, -np.inf)
            elif self._versions is not None:
                at = self._versions.place(at)
            is_new[known] = rows.column("content").to_numpy()[known] != self._table.take("content", at)
            display = rows.column("display").combine_chunks().take(pa.array(known)).cast(pa.large_string())
            is_new[known] |= pc.not_equal(display, self._table.arrow("display", at)).to_numpy(zero_copy_only=False)
            is_new[known] |= np.isinf(known_since[known]) & self.dated  # older than all that is known
        columns = {name: rows.column(name) for name in rows.column_names}
        if self.dated:
            columns[KNOWN_SINCE] = pa.array(known_since)
        elif not is_new.all():
            for name in columns.keys() - {"place", "doc_id", "content", "doc_key"}:
                columns[name] = pc.if_else(pa.array(is_new), columns[name], pa.scalar(None, columns[name].type))
        return pa.table({**columns, "document": pa.array(documents), IS_NEW: pa.array(is_new.astype(np.int32))})
