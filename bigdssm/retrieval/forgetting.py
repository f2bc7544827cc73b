"""Remove users and items from vectors folders, indexes, collections of stores, hard negatives and teacher vectors.

Documents and rows are known by their numbers in the dataset, see `ingest.forgetting.Forgotten`.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.lib.format import open_memmap

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import EVENT_BITS
from bigdssm.errors import CheckpointError
from bigdssm.features.conditions import Condition
from bigdssm.retrieval.hard_negatives import REMAKE, HardNegatives
from bigdssm.retrieval.index import build_index
from bigdssm.retrieval.publish import ROWS_AT_ONCE
from bigdssm.retrieval.teacher_vectors import DOCUMENTS, QUERIES, TeacherVectors
from bigdssm.retrieval.vectors import (
    CONTENTS_FILE,
    DOCUMENTS_FILE,
    META_FILE,
    VECTORS,
    VECTORS_FILE,
    WITHDRAWN,
    formats_in,
    read_meta,
    write_file,
    write_meta,
)
from bigdssm.stores.base import FORGOTTEN, Store
from bigdssm.utils.array_file import open_arrow, read_seal, seal
from bigdssm.utils.atomic import Changes
from bigdssm.utils.hashing import hash_strings, json_checksum


def forget_in_vectors(folder: Path, documents: np.ndarray, dataset: Dataset, changes: Changes) -> None:
    """Empty the rows of `documents` (int64) in a vectors folder: zeros, no key or title, and withdrawn.

    Its dataset and model stay the same. Raises CheckpointError: not a vectors folder, or not of this dataset.
    """
    meta = read_meta(folder)
    if meta.kind != VECTORS:
        raise CheckpointError(f"{folder} is an index of kind {meta.kind}, not a vectors folder; give it as --index")
    stored = _documents_of(folder, documents, dataset)
    documents = documents[documents < meta.num_docs]
    with changes.new_version(folder) as temporary:
        if not any(stored["doc_key"].take(pa.array(documents)).to_pylist()):
            return
        emptied = np.zeros(meta.num_docs, bool)
        emptied[documents] = True
        columns = {
            name: pc.if_else(pa.array(emptied), "", stored[name].combine_chunks()) for name in ("doc_key", "doc_title")
        }
        withdrawn = np.asarray(stored[WITHDRAWN]) if WITHDRAWN in stored.column_names else np.zeros(len(emptied), bool)
        table = pa.table({**columns, WITHDRAWN: pa.array(withdrawn | emptied)})
        with pa.OSFile(str(temporary / DOCUMENTS_FILE), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        for name in (VECTORS_FILE, CONTENTS_FILE):
            shutil.copyfile(folder / name, temporary / name)
            array = open_memmap(temporary / name, "r+")
            array[documents] = np.zeros((), array.dtype)
            array.flush()
        write_meta(temporary, meta)
        for target in formats_in(folder):
            write_file(temporary, target)


def check_index(folder: Path, vectors: Sequence[Path]) -> Path:
    """Return the folder of `vectors` that an index was built from. Raises CheckpointError: none is."""
    meta = read_meta(folder)
    for candidate in vectors:
        source = read_meta(candidate)
        same = [(m.model_checksum, m.dataset_fingerprint, m.num_docs) for m in (meta, source)]
        if same[0] == same[1] and source.kind == VECTORS:
            return candidate
    raise CheckpointError(
        f"{folder}: an index is built again, from its vectors, of model {meta.model_checksum[:12]} and dataset "
        f"{meta.dataset_fingerprint}; give their folder as --vectors, or remove the index"
    )


def forget_in_index(folder: Path, vectors: Path, documents: np.ndarray, dataset: Dataset, changes: Changes) -> None:
    """Build an index with `documents` again, from its vectors without them, with the same options."""
    meta = read_meta(folder)
    stored = _documents_of(folder, documents, dataset)
    with changes.new_version(folder) as temporary:
        if not any(stored["doc_key"].take(pa.array(documents[documents < meta.num_docs])).to_pylist()):
            return
        if changes.dry_run:  # the vectors are still those before
            for name in (*meta.files, META_FILE):
                changes.note(folder / name)
            return
        source = read_meta(vectors)
        width = None if meta.width == source.width else meta.width - meta.has_beta
        build_index(
            vectors, temporary, meta.kind, width=width, rescore=meta.rescored, options=meta.options, overwrite=True
        )


def forget_in_collection(
    store: Store, name: str, users: Sequence[str], items: Sequence[str], *, dry_run: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Delete items from a collection and its files; return a record, and the places that may still have the ids.

    A tombstone rejects all later writes of them to this collection. Documents that have an id of `users` or `items` as
    a value stay. Raises DataError: another process publishes to the collection.
    """
    with store.publishing(name):
        collection, left = store.collections()[name], list[str]()
        before = after = store.contents(collection)
        if not dry_run:
            if items:
                for first in range(0, len(items), ROWS_AT_ONCE):
                    store.delete(collection, items[first : first + ROWS_AT_ONCE], FORGOTTEN)
                if collection.published:
                    store.finish(collection)  # so that servers drop cached answers
                left += store.compact(collection)  # without a match, too: of documents that were withdrawn before
                after = store.contents(collection)
            ids = tuple(sorted({*users, *items}))
            for column in (column for column, kind in collection.columns.items() if kind != "number"):
                if number := store.count(collection, Condition(column, "in", ids)):
                    left.append(f"collection {name}: an id is a value of {column} in {number} documents")
    return {
        "collection": name, "found": len(before.keys() & set(items)),
        "documents": {"before": len(before), "after": len(after)},
        "content": {"before": json_checksum(before), "after": json_checksum(after)},
    }, left  # fmt: skip


def row_ids(view: Dataset, folder: Path, train_rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the ids, in a view, of rows of the dataset in `folder`.

    train_rows: their numbers in the train split of each partition. The view may have some of these, and others.
    """
    ids = [np.zeros(0, np.int64)]
    index = view.index("train")
    for number, partition in enumerate(view.partitions):
        blocks = np.flatnonzero(index.partition == number)
        if len(blocks) and partition.folder.parent.parent.resolve() == folder.resolve():
            ids.append(index.first_row[blocks[0]] + train_rows.get(partition.folder.name, ids[0]))
    return np.concatenate(ids)


def forget_in_negatives(path: Path, rows: Mapping[str, np.ndarray], documents: np.ndarray, changes: Changes) -> None:
    """Empty the windows of forgotten rows, and the places of `documents` in all windows, of a hard-negatives file.

    rows: ids of forgotten rows by fingerprint of the dataset. A file of another dataset, or one whose rows are numbered
    by rules on events, is removed. Raises DataError: no hard-negatives file.
    """
    HardNegatives.open(path)
    dataset, _ = read_seal(path, REMAKE)
    if dataset not in rows:
        changes.remove(path)
        return
    records = np.load(path, allow_pickle=False)
    absent = np.isin(records["window"], documents)
    of_rows = np.isin(records["query"] >> EVENT_BITS, rows[dataset])
    absent[of_rows] = True
    if (records["window"][absent] == -1).all():
        return
    records["window"][absent] = -1
    if "teacher" in records.dtype.names:
        records["teacher"][:, 1:][absent] = np.nan
        records["teacher"][of_rows, 0] = np.nan
    if "shown" in records.dtype.names:
        records["shown"][:, 1:][absent] = 0
        records["shown"][of_rows, 0] = 0
    with changes.new_file(path) as new:
        _write_sealed(new, records, dataset)


def forget_in_teacher(folder: Path, rows: Mapping[str, np.ndarray], documents: np.ndarray, changes: Changes) -> None:
    """Set the vectors of forgotten rows and of `documents` to zero in a folder of teacher vectors.

    rows, and files of another dataset: as in `forget_in_negatives`. Raises DataError: no teacher vectors.
    """
    vectors = TeacherVectors(folder)
    dataset, _ = read_seal(folder / QUERIES, REMAKE)
    if dataset not in rows:
        changes.remove(folder)
        return
    with changes.new_version(folder) as temporary:
        of_documents, queries = np.array(vectors.documents), np.load(folder / QUERIES, allow_pickle=False)
        of_documents[documents[documents < len(of_documents)]] = 0
        queries["vector"][np.isin(queries["query"] >> EVENT_BITS, rows[dataset])] = 0
        _write_sealed(temporary / DOCUMENTS, of_documents, dataset)
        _write_sealed(temporary / QUERIES, queries, dataset)


def _write_sealed(path: Path, array: np.ndarray, dataset: str) -> None:
    with path.open("wb") as file:
        np.save(file, array)
    seal(path, dataset)


def _documents_of(folder: Path, documents: np.ndarray, dataset: Dataset) -> pa.Table:
    """Return the documents of a vectors or index folder. Raises CheckpointError: not the first ones of `dataset`."""
    stored = open_arrow(folder / DOCUMENTS_FILE).read_all().combine_chunks()
    ids, known = hash_strings(stored["doc_key"].cast(pa.large_string())), dataset.catalogue.doc_ids
    differ = np.flatnonzero(ids != known[: len(ids)]) if len(ids) <= len(known) else np.arange(1)
    if len(np.setdiff1d(differ, documents)):
        raise CheckpointError(f"{folder} has other documents than {dataset.dir}; give the dataset that was embedded")
    return stored
