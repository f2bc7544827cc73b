"""Publish a vectors folder to a store: make a collection equal to the folder, and measure its answers."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from bigdssm.checkpoints.checkpoint import check_file
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.stamps import describe_stamp
from bigdssm.errors import CheckpointError, ConfigError, DataError
from bigdssm.features.base import ColumnType
from bigdssm.retrieval.vectors import (
    DOCUMENTS_FILE,
    META_FILE,
    VECTORS,
    WITHDRAWN,
    load_vectors,
    read_meta,
)
from bigdssm.stores.base import Collection, Documents, Store
from bigdssm.utils.array_file import open_arrow
from bigdssm.utils.log import Progress, get_logger, no_progress

logger = get_logger(__name__)

ROWS_AT_ONCE = 8192
MARGIN = 1.1  # of the radius of a new collection over its longest vector
NAME_DIGITS = 12  # of the model's checksum, the default name of a collection
SAMPLE, TOP = 200, 100  # queries and documents per query of a measurement
NEIGHBOURS = (10, 50)  # numbers of nearest documents that two collections are compared by


@dataclass(frozen=True)
class NeighbourOverlap:
    """Result of `measure_overlap`."""

    previous: str  # the other collection
    num_documents: int  # sampled from those that both collections have
    shares: Mapping[int, float]  # by number of nearest documents: mean share that both collections have in common


@dataclass(frozen=True)
class PublishReport:
    """Result of `publish`."""

    collection: Collection
    written: int  # new or changed documents
    deleted: int
    unchanged: int
    overlap: NeighbourOverlap | None = None  # with the collection to compare
    rejected: tuple[str, ...] = ()  # keys of documents that the collection does not accept: `forget` has removed them


@dataclass(frozen=True)
class DocumentDifference:
    """Result of `compare_documents`."""

    missing: tuple[str, ...]  # keys that the collection lacks
    extra: tuple[str, ...]  # keys that only the collection has


@dataclass(frozen=True)
class RecallReport:
    """Result of `measure_recall`."""

    recall: float  # mean share of the exact best documents that the store returns
    num_queries: int
    top: int
    seconds: float  # per query
    difference: float  # the largest one between a score and the exact inner product, relative to the largest score


class _Folder:
    """A vectors folder opened for publishing."""

    def __init__(self, folder: Path, dataset: Dataset | None = None) -> None:
        """Open a folder, with the withdrawals of `dataset`. Raises CheckpointError: it has other documents."""
        self.meta = meta = read_meta(folder)
        if meta.kind != VECTORS:
            raise CheckpointError(f"{folder} is an index; give the folder of the vectors it was built from")
        check_file(folder / DOCUMENTS_FILE, meta.files.get(DOCUMENTS_FILE), META_FILE)
        documents = open_arrow(folder / DOCUMENTS_FILE).read_all()
        self.keys, self.titles = documents["doc_key"], documents["doc_title"]
        none = np.zeros(meta.num_docs, bool)
        self.withdrawn = np.array(documents[WITHDRAWN]) if WITHDRAWN in documents.column_names else none
        if dataset is not None:  # forgets and withdraws documents that an older folder still has
            for first in range(0, meta.num_docs, ROWS_AT_ONCE):
                rows = np.arange(first, min(first + ROWS_AT_ONCE, meta.num_docs))
                ours = self.keys.slice(first, ROWS_AT_ONCE).to_pylist()
                for row, key, current in zip(rows.tolist(), ours, dataset.catalogue.keys(rows), strict=True):
                    if key and current not in ("", key):
                        raise CheckpointError(
                            f"{folder} has document {key!r} in row {row}, the dataset has {current!r}; embed it again"
                        )
                    self.withdrawn[row] |= not current
            self.withdrawn |= np.isin(np.arange(meta.num_docs), dataset.catalogue.withdrawn)
        self.vectors = load_vectors(folder, meta)


def publish(
    store: Store, vectors_dir: Path, dataset: Dataset, name: str | None = None, progress: Progress = no_progress,
    compare: str | None = None,
) -> PublishReport:  # fmt: skip
    """Make the collection `name` equal to a vectors folder of `dataset`; only differences are written.

    By default the name is the beginning of the model's checksum. Documents that are withdrawn, or no longer in the
    folder, are deleted; those that `forget` has removed from the collection stay away, and are reported. An interrupted
    call is continued by the next one. `compare` is another collection, or an alias, for `measure_overlap`. Raises:
    CheckpointError: the vectors are of another dataset; ConfigError: the collection is of another model or has other
    columns, or an alias has its name; DataError: it was published from a later state of the dataset, or another process
    publishes to it.
    """
    dataset, meta = dataset.whole, read_meta(vectors_dir)
    if meta.dataset_fingerprint != dataset.fingerprint:
        raise CheckpointError(
            f"{vectors_dir} holds vectors of dataset {meta.dataset_fingerprint[:12]}, --data is "
            f"{dataset.fingerprint[:12]}; embed it again"
        )
    folder = _Folder(vectors_dir, dataset)
    filterable = dataset.catalogue.filterable.items()
    features = {name: feature for name, feature in filterable if feature.column_type is not None}
    types = {name: feature.column_type for name, feature in features.items()}
    collection = Collection(
        name or meta.model_checksum[:NAME_DIGITS], meta.model_checksum, meta.dataset_fingerprint, dataset.stamp,
        meta.width, meta.has_beta, meta.score, 0.0, cast(dict[str, ColumnType], types), store.options(), publication=1,
    )  # fmt: skip
    store.check_new_collection(collection.name)
    previous = None if compare is None else store.collection(compare)
    with store.publishing(collection.name):
        existing = store.collections().get(collection.name)
        if existing is not None:
            for what in ("model", "width", "has_beta", "score", "columns"):
                if (theirs := getattr(existing, what)) != (ours := getattr(collection, what)):
                    raise ConfigError(
                        f"collection {collection.name} has {what} {theirs}, these vectors have {ours}; choose another "
                        "name with --as"
                    )
            if existing.version > dataset.stamp:
                raise DataError(
                    f"collection {collection.name} was published from a dataset {describe_stamp(existing.version)}, "
                    f"{dataset.dir} is an earlier one {describe_stamp(dataset.stamp)}: later documents would be lost; "
                    "publish the later dataset, build or append to this one again, or choose another name with --as"
                )
            collection = replace(
                collection, published=existing.published, radius=existing.radius,
                options=store.options(existing.options), publication=existing.next_publication,
            )  # fmt: skip
        lengths = np.concatenate([np.linalg.norm(chunk, axis=1) for chunk in folder.vectors.chunks(65_536)])
        if not collection.radius:
            collection = replace(collection, radius=MARGIN * float(lengths.max()))
        elif store.uses_radius and (longer := int((lengths > collection.radius).sum())):
            # Rows of two radii cannot be compared in an index: a new radius needs a new collection
            logger.warning(
                "collection %s: %d vectors are longer than its radius %.4g and are indexed less exactly; publish under "
                "a new name (--as) to index them exactly",
                collection.name, longer, collection.radius,
            )  # fmt: skip
        store.create(collection)
        version, stored, written = collection.publication, store.contents(collection), 0
        for first, documents in _batches(folder, dataset, features, collection.radius):
            pairs = zip(documents.keys, documents.contents.tolist(), strict=True)
            new = np.array([stored.pop(key, None) != content for key, content in pairs], bool)
            if new.any():
                columns = {name: list(compress(values, new)) for name, values in documents.columns.items()}
                keys, titles = list(compress(documents.keys, new)), list(compress(documents.titles, new))
                changed = Documents(keys, titles, documents.vectors[new], documents.contents[new], columns)
                store.write(collection, changed, version)
            written += int(new.sum())
            progress("documents compared", first + len(new), meta.num_docs)
        deleted = list(stored)
        withdrawn = folder.keys.filter(pa.array(folder.withdrawn)).to_pylist()
        # Withdrawn documents that are not stored, too: a writer of an earlier publication may be late.
        if keys := sorted({*deleted, *withdrawn}):
            for first in range(0, len(keys), ROWS_AT_ONCE):
                store.delete(collection, keys[first : first + ROWS_AT_ONCE], version)
        store.finish(collection)
        collection = store.check_complete(collection.name)
        num_docs, rejected = int((~folder.withdrawn).sum()), ()
        if store.count(collection) < num_docs:
            accepted = store.contents(collection)
            keys = folder.keys.filter(pa.array(~folder.withdrawn)).to_pylist()
            rejected = tuple(key for key in keys if key not in accepted)
        unchanged, overlap = num_docs - written, None
        if previous is not None and previous.name != collection.name:
            keys = folder.keys.filter(pa.array(~folder.withdrawn))
            rows = np.random.default_rng(0).permutation(len(keys))[: 10 * SAMPLE]
            overlap = measure_overlap(store, collection, previous, keys.take(pa.array(rows)).to_pylist())
        return PublishReport(collection, written - len(rejected), len(deleted), unchanged, overlap, rejected)


def compare_documents(store: Store, collection: Collection, other: Collection | Dataset) -> DocumentDifference:
    """Compare the keys of a collection with those of another one, or with the documents of a dataset now."""
    if isinstance(other, Collection):
        expected = set(store.contents(other))
    else:
        catalogue = other.whole.catalogue
        rows = np.setdiff1d(np.arange(catalogue.num_docs), catalogue.withdrawn)
        expected = set(catalogue.keys(rows)) - {""}
    stored = set(store.contents(collection))
    return DocumentDifference(tuple(sorted(expected - stored)), tuple(sorted(stored - expected)))


def measure_overlap(
    store: Store, collection: Collection, previous: Collection, keys: Sequence[str]
) -> NeighbourOverlap | None:
    """Compare the nearest documents, by the scores of either collection, of SAMPLE documents that both have.

    `keys` are candidates for the sample. Returns None if the collections have none of them in common.
    """
    stored = [store.vectors(each, keys) for each in (collection, previous)]
    sample = [key for key in keys if all(key in vectors for vectors in stored)][:SAMPLE]
    if not sample:
        return None
    nearest = []
    for each, vectors in zip((collection, previous), stored, strict=True):
        queries = _as_queries(np.stack([vectors[key].vector for key in sample]), each.has_beta, each.score)
        results = store.search(each, queries, max(NEIGHBOURS), exclude=[[key] for key in sample])
        nearest.append([[document.key for document in result] for result in results])
    shares = {}
    for number in NEIGHBOURS:
        pairs = [(set(ours[:number]), set(theirs[:number])) for ours, theirs in zip(*nearest, strict=True)]
        shares[number] = float(np.mean([len(ours & theirs) / max(1, len(ours), len(theirs)) for ours, theirs in pairs]))
    return NeighbourOverlap(previous.name, len(sample), shares)


def _as_queries(vectors: np.ndarray, has_beta: bool, score: str) -> np.ndarray:
    """Return document vectors [n, D+1] with the beta of queries, 1, and of length 1 if the score is a cosine."""
    queries = np.array(vectors)
    values = queries[:, : queries.shape[1] - has_beta]
    if score == "cosine":
        values /= np.linalg.norm(values, axis=1, keepdims=True).clip(min=np.finfo(np.float32).tiny)
    queries[:, values.shape[1] :] = 1
    return queries


def _batches(
    folder: _Folder, dataset: Dataset, features: Mapping[str, Any], radius: float
) -> Iterator[tuple[int, Documents]]:
    """Yield (first row, documents that are not withdrawn)."""
    for first in range(0, folder.meta.num_docs, ROWS_AT_ONCE):
        rows = first + np.flatnonzero(~folder.withdrawn[first : first + ROWS_AT_ONCE])
        keys, titles = (column.take(pa.array(rows)).to_pylist() for column in (folder.keys, folder.titles))
        vectors = np.ascontiguousarray(folder.vectors[rows])
        catalogue = dataset.catalogue
        columns = {name: f.column_values(catalogue.column(name, rows)) for name, f in features.items()}
        contents = np.empty(len(rows), np.int64)
        for i, values in enumerate(zip(titles, *columns.values(), strict=True)):
            digest = xxhash.xxh3_64(repr((radius, *values)).encode())
            digest.update(vectors[i].tobytes())
            contents[i] = np.uint64(digest.intdigest()).astype(np.int64)
        yield first, Documents(keys, titles, vectors, contents, columns)


def measure_recall(
    store: Store, collection: Collection, vectors_dir: Path, queries: np.ndarray | None = None,
    dataset: Dataset | None = None, rejected: Sequence[str] = (),
) -> RecallReport:  # fmt: skip
    """Compare answers of a store with the exact inner products of the vectors folder that it was published from.

    `queries` are float32 [m, D+1]; None: SAMPLE document vectors, whose beta is replaced by 1 as that of queries, and
    which have length 1 if the score is a cosine. `dataset` has the withdrawals of `publish`, and `rejected` is that of
    its report. Raises: CheckpointError: the folder is of another model; DataError: the number of documents differs, or
    there are none.
    """
    folder = _Folder(vectors_dir, None if dataset is None else dataset.whole)
    collection.check_model(folder.meta.model_checksum)
    if rejected:
        folder.withdrawn |= pc.is_in(folder.keys, pa.array(rejected, folder.keys.type)).to_numpy()
    num_docs, stored = int((~folder.withdrawn).sum()), store.count(collection)
    if num_docs != stored:
        raise DataError(
            f"collection {collection.name} has {stored} documents, {vectors_dir} has {num_docs}; publish it again"
        )
    if not num_docs:
        raise DataError(
            f"collection {collection.name} is empty: all {folder.meta.num_docs} documents of {vectors_dir} are "
            "withdrawn, so there is no answer to measure; publish documents first"
        )
    if queries is None:
        rows = np.flatnonzero(~folder.withdrawn)
        rows = np.random.default_rng(0).choice(rows, min(SAMPLE, len(rows)), replace=False)
        queries = _as_queries(folder.vectors[np.sort(rows)], folder.meta.has_beta, folder.meta.score)
    exact = np.empty((len(queries), folder.meta.num_docs), np.float32)
    for first in range(0, folder.meta.num_docs, 65_536):
        exact[:, first : first + 65_536] = queries @ folder.vectors[first : first + 65_536].T
    exact[:, folder.withdrawn] = -np.inf
    top = min(TOP, num_docs)
    least = -np.partition(-exact, top - 1, axis=1)[:, top - 1]
    started = time.perf_counter()
    results = [store.search(collection, query[None], top)[0] for query in queries]
    seconds = (time.perf_counter() - started) / len(queries)
    row_of = {key: row for row, key in enumerate(folder.keys.to_pylist())}
    scale = np.abs(exact[np.isfinite(exact)]).max(initial=np.finfo(np.float32).tiny)
    matches, difference = 0, 0.0
    for scores, bound, result in zip(exact, least, results, strict=True):
        of_result = scores[[row_of[document.key] for document in result]]
        matches += int((of_result >= bound - 1e-6 * scale).sum())  # of equal scores any
        difference = max(difference, float(np.abs(of_result - [document.score for document in result]).max() / scale))
    return RecallReport(matches / (top * len(queries)), len(queries), top, seconds, difference)
