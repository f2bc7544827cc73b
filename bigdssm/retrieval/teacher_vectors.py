"""Teacher vectors of documents and training queries; their inner products are teacher scores.

FOLDER/documents.npy   float16 [N, E], by catalogue row
FOLDER/queries.npy     records (query int64, vector float16 [E]), ascending by key (see `Rows.query_keys`)

Both end in a seal with the dataset's fingerprint (see array_file.py).

Written in resumable shards by any number of ranks (retrieval/shards.py), read memory-mapped.
"""

from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import EVENT_BITS
from bigdssm.dataset.schema import find_sorted
from bigdssm.errors import DataError
from bigdssm.retrieval.embed import Encoders
from bigdssm.retrieval.hard_negatives import rows_of_queries
from bigdssm.retrieval.shards import ShardedFolder, Share
from bigdssm.utils.array_file import check_seal, new_array, seal
from bigdssm.utils.atomic import real_path

DOCUMENTS, QUERIES = "documents.npy", "queries.npy"
ROWS_AT_ONCE = 1024
PASS_ROWS = 65_536


class TeacherVectors:
    """The memory-mapped vectors of a folder."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError: `folder` holds no teacher vectors."""
        self.folder = folder
        try:
            documents, queries = (
                np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in (DOCUMENTS, QUERIES)
            )
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"{folder} holds no teacher vectors: {reason}; make them with bigdssm embed_teacher"
            ) from None
        if documents.ndim != 2 or queries.dtype != _record(documents.shape[1]):
            raise DataError(
                f"{folder} holds no teacher vectors: got queries {queries.dtype} for documents {documents.shape}"
            )
        self.documents, self._queries = documents, queries

    def check_against(self, dataset: Dataset) -> None:
        """Validate both files. Raises DataError: damaged, or of another dataset."""
        for name in (DOCUMENTS, QUERIES):
            check_seal(self.folder / name, dataset.rows_fingerprint, "make it with bigdssm embed_teacher")

    @property
    def keys(self) -> np.ndarray:
        """Return the query keys, int64."""
        return np.asarray(self._queries["query"])

    def queries(self, keys: np.ndarray) -> np.ndarray:
        """Return float16 [m, E] for int64 keys [m]. Raises DataError: a key is missing."""
        positions, present = find_sorted(self.keys, keys)
        if not present.all():
            row = int(keys[~present][0]) >> EVENT_BITS
            raise DataError(f"{self.folder} has no query of row {row}; make it again with bigdssm embed_teacher")
        return np.asarray(self._queries["vector"][positions])


def write_teacher_vectors(
    out: Path, encoders: Encoders, dataset: Dataset, name: str, work: Share
) -> TeacherVectors | None:
    """Encode all documents and training queries; returned on the rank that finishes, else None.

    `name` identifies the teacher: finished shards of an earlier run with the same name are reused. Raises DataError: a
    vector is not finite, or too large for float16.
    """
    out = real_path(out)
    width, num_docs = encoders.documents(np.zeros(1, np.int64)).shape[1], dataset.catalogue.num_docs
    keys = np.concatenate([np.zeros(0, np.int64), *(r.query_keys for r in dataset.iterate("train", PASS_ROWS))])

    def prepare(temporary: Path) -> None:
        new_array(temporary / DOCUMENTS, np.float16, (num_docs, width))
        records = new_array(temporary / QUERIES, _record(width), (len(keys),))
        records["query"] = keys
        records.flush()

    job = {"kind": "teacher", "name": name, "dataset": dataset.rows_fingerprint}
    shards = ShardedFolder(out, job, num_docs + len(keys), work, prepare)
    documents, queries = (open_memmap(shards.aside / name, "r+") for name in (DOCUMENTS, QUERIES))
    for _, first, last in shards.pending("shards encoded"):
        for begin in range(first, min(last, num_docs), ROWS_AT_ONCE):
            rows = np.arange(begin, min(begin + ROWS_AT_ONCE, last, num_docs))
            documents[rows] = _checked(encoders.documents(rows).cpu().numpy(), "documents", rows)
        if last > num_docs:
            local = slice(max(first - num_docs, 0), last - num_docs)
            queries["vector"][local] = np.concatenate(
                [
                    _checked(encoders.queries(rows).cpu().numpy(), "queries of rows", rows.row_ids)
                    for rows in rows_of_queries(dataset, keys[local], ROWS_AT_ONCE)
                ]
            )
        documents.flush()
        queries.flush()

    def complete(temporary: Path) -> None:
        for name in (DOCUMENTS, QUERIES):
            seal(temporary / name, dataset.rows_fingerprint)

    return TeacherVectors(out) if shards.finish(complete) else None


def _checked(vectors: np.ndarray, what: str, rows: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        small = np.asarray(vectors.astype(np.float16))
    if not np.isfinite(small).all():
        raise DataError(f"the teacher's vectors of {what} {rows[0]} to {rows[-1]} are not finite in float16")
    return small


def _record(width: int) -> np.dtype[np.void]:
    return np.dtype([("query", np.int64), ("vector", np.float16, (width,))])
