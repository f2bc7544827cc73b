"""KNN indexes of document vectors, bound to the model that encoded them, and the search of a folder or store.

INDEX/    index.faiss, documents.arrow (doc_key, doc_title), meta.json (checksums of all files), and vectors.npy,
          to rescore candidates if the index holds truncated or quantized vectors

Files are memory-mapped, so processes on a machine share their pages.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdssm.checkpoints.checkpoint import check_file
from bigdssm.dataset.catalogue import NO_ROWS
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import CheckpointError, ConfigError, DataError, UnavailableError, UnknownKeyError
from bigdssm.features.conditions import Expression
from bigdssm.features.ragged import Ragged
from bigdssm.retrieval.embed import check_width
from bigdssm.retrieval.index_types import INDEX_TYPES, AllowedDocuments, IndexBackend
from bigdssm.retrieval.model import Model
from bigdssm.retrieval.queries import Filters, Query, StoreFilters
from bigdssm.retrieval.vectors import (
    CONTENTS_FILE,
    DOCUMENTS_FILE,
    INDEX_FILE,
    META_FILE,
    OWN_FILES,
    VECTORS,
    VECTORS_FILE,
    WITHDRAWN,
    CodedVectors,
    VectorsMeta,
    check_output_folder,
    load_vectors,
    read_meta,
    truncate_like,
    write_meta,
)
from bigdssm.stores.base import Collection, ScoredDocument, Store, StoredVector
from bigdssm.utils.arguments import check_utf8, checked, short_repr
from bigdssm.utils.atomic import new_folder, real_path
from bigdssm.utils.hashing import hash_strings
from bigdssm.utils.log import get_logger

logger = get_logger(__name__)

SIMILAR_CANDIDATES = 20


@dataclass(frozen=True)
class Index:
    """An opened KNN index; with its dataset, it has filters, and keys are looked up in the catalogue."""

    index: Any  # object of the back-end of `meta.kind`
    meta: VectorsMeta
    keys: pa.ChunkedArray  # string [N]
    title: pa.ChunkedArray
    vectors: CodedVectors | None = None  # full vectors, if candidates are rescored
    answers: AllowedDocuments | None = None  # the documents that are not withdrawn; None: all
    dataset: Dataset | None = None  # see `of_dataset`
    published: float | None = None  # seconds since 1970

    @property
    def has_beta(self) -> bool:
        """Whether vectors have a beta."""
        return self.meta.has_beta

    @cached_property
    def filters(self) -> Filters | None:
        """The filters of the dataset's documents; None without a dataset."""
        return None if self.dataset is None else Filters(self.dataset.whole.catalogue, self.meta.num_docs)

    @property
    def description(self) -> dict[str, Any]:
        """Return the identity of the index, for clients and metrics: its type, and the dataset's fingerprint."""
        return {
            "index": self.meta.kind, "documents": self.meta.num_docs, "dataset": self.meta.dataset_fingerprint,
            "published": self.published, "store": None, "collection": None, "version": None,
        }  # fmt: skip

    @checked
    def search(
        self,
        vectors: Any,
        top: int,
        exclude: Sequence[Sequence[str]] | None = None,
        allowed: AllowedDocuments | None = None,
    ) -> list[list[ScoredDocument]]:
        """Return the `top` best documents per query, best first.

        vectors [m, D+1] come from `Model.encode_queries` of the index's model; `exclude` holds document keys to exclude
        per query; `allowed`: as in `nearest`. Raises ConfigError: vectors of another width or not finite, `top` below
        1, `exclude` of another length.
        """
        width = self.meta.whole or self.meta.width
        try:
            vectors = self.with_beta(np.asarray(vectors, np.float32))
        except (TypeError, ValueError):
            raise ConfigError(f"vectors={short_repr(vectors)}: needs an array of numbers [queries, {width}]") from None
        if vectors.ndim != 2 or vectors.shape[1] != width:
            raise ConfigError(f"got vectors {list(vectors.shape)}, needs [queries, {width}] for this index")
        if not np.isfinite(vectors).all():
            raise ConfigError("vectors has a number that is not finite; pass the output of Model.encode_queries")
        if top < 1:
            raise ConfigError(f"top {top}: needs at least 1")
        if exclude is not None and len(exclude) != len(vectors):
            raise ConfigError(f"exclude has keys of {len(exclude)} queries, needs {len(vectors)}")
        row_of = self._row_of if exclude is not None else {}
        excluded = [np.array([row_of[key] for key in keys if key in row_of], np.int64) for keys in exclude or ()]
        scores, rows = self.nearest(vectors, top, self.meta.model_checksum, excluded or None, allowed)
        return [self.documents(*result) for result in zip(scores, rows, strict=True)]

    def documents(self, scores: np.ndarray, rows: np.ndarray) -> list[ScoredDocument]:
        """Convert scores [n] and catalogue rows [n] (-1: absent) to documents."""
        scores, rows = scores[rows >= 0], rows[rows >= 0]
        keys, titles = (column.take(pa.array(rows)).to_pylist() for column in (self.keys, self.title))
        return [ScoredDocument(*result) for result in zip(scores.tolist(), keys, titles, strict=True)]

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.keys.to_pylist())}

    def nearest(
        self,
        queries: np.ndarray,
        top: int,
        model_checksum: str,
        excluded: Sequence[np.ndarray] | None = None,
        allowed: AllowedDocuments | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (scores float32, catalogue rows int64), both [m, top], best first, padded with -inf, -1.

        queries [m, D+1] are index vectors of the model `model_checksum`, `excluded` the rows to exclude per query,
        `allowed` the documents that pass the filter (None: `answers`). A query gets fewer than `top` documents only if
        no more remain. Raises CheckpointError: the index is of another model.
        """
        self.check_model(model_checksum)
        queries = self.with_beta(queries)
        allowed = self.answers if allowed is None else allowed
        scores, rows = np.full((len(queries), top), -np.inf, np.float32), np.full((len(queries), top), -1)
        available = self.meta.num_docs if allowed is None else allowed.count
        if not available:
            return scores, rows
        exclusions = Ragged.of_lists(excluded or [NO_ROWS] * len(queries), np.int64)
        # Request `top` plus the number of exclusions. It is rounded up to a power of two, so that there are few depths.
        extra = np.where(exclusions.lengths, 2 ** np.ceil(np.log2(np.maximum(exclusions.lengths, 1))), 0)
        extra = extra.astype(np.int64)
        for number in np.unique(extra).tolist():
            group = np.flatnonzero(extra == number)
            depth = min(top + number, available)
            group_scores, group_rows = self._search(queries[group], depth, allowed)
            # Excluded rows move behind the others and become absent.
            group_excluded, query = exclusions.take(group), np.arange(len(group))
            width = int(max(group_rows.max(initial=0), group_excluded.values.max(initial=0))) + 1
            pairs = np.repeat(query, group_excluded.lengths) * width + group_excluded.values
            left_out = (group_rows < 0) | np.isin(query[:, None] * width + group_rows, pairs)
            order = np.argsort(left_out, axis=1, kind="stable")[:, :top]
            retained = min(top, depth)
            group_scores = np.where(left_out, np.float32(-np.inf), group_scores)
            group_rows = np.where(left_out, -1, group_rows)
            scores[group, :retained] = np.take_along_axis(group_scores, order, 1)
            rows[group, :retained] = np.take_along_axis(group_rows, order, 1)
        return scores, rows

    def with_beta(self, queries: np.ndarray) -> np.ndarray:
        """Return queries with a last 0 if only they have no beta: indexes of earlier versions have a beta of 0."""
        missing = self.meta.has_beta and queries.ndim == 2 and (self.meta.whole or self.meta.width) - queries.shape[1]
        return np.pad(queries, ((0, 0), (0, 1))) if missing == 1 and self._beta_is_zero else queries

    @cached_property
    def _beta_is_zero(self) -> bool:
        return not self.vectors_at(range(min(SIMILAR_CANDIDATES, self.meta.num_docs)))[:, -1].any()

    def check_model(self, model_checksum: str) -> None:
        """Raise CheckpointError if the index holds another model's vectors."""
        if model_checksum != self.meta.model_checksum:
            raise CheckpointError(
                f"the index holds vectors of model {self.meta.model_checksum[:12]}, the queries are of model "
                f"{model_checksum[:12]}; their scores are not comparable: embed and index with the model in use"
            )

    def of_dataset(self, dataset: Dataset) -> "Index":
        """Return the index with the withdrawals of its dataset, to which documents may have been added since.

        Raises CheckpointError: the first documents of `dataset` are not those of the index.
        """
        catalogue, num_docs = dataset.catalogue, self.meta.num_docs
        ids = hash_strings(self.keys.cast(pa.large_string()))
        known = num_docs <= catalogue.num_docs
        # forgotten documents have another id than before, and an empty key
        if not known or any(catalogue.keys(np.flatnonzero(ids != catalogue.doc_ids[:num_docs]))):
            raise CheckpointError(
                f"the index was built from another dataset: its {num_docs} documents are not the first ones of "
                f"{dataset.dir}; embed and index again"
            )
        if self.meta.dataset_fingerprint != dataset.fingerprint:
            logger.warning(
                "the index was built before changes of %s and answers with the %d documents of then; add later ones by "
                "bigdssm embed --since and build_index", dataset.dir, num_docs,
            )  # fmt: skip
        return replace(self, answers=AllowedDocuments.without(catalogue.withdrawn, num_docs), dataset=dataset)

    def query_vectors(self, vectors: np.ndarray) -> np.ndarray:
        """Convert vectors of the query tower to those of the index, float32 [m, width]."""
        return truncate_like(self.with_beta(vectors), self.meta)

    def search_queries(self, vectors: np.ndarray, queries: Sequence[Query], top: int) -> list[list[ScoredDocument]]:
        """Return the `top` best documents per query, best first.

        vectors [m, D+1] are of the query tower, the queries have one filter.
        """
        # Without a dataset, the keys are those of the index.
        by_key = self.dataset is None
        excluded = [self.rows(query.exclude) if by_key and query.exclude else query.excluded for query in queries]
        allowed, top = queries[0].allowed, min(top, self.meta.num_docs)
        assert allowed is None or isinstance(allowed, AllowedDocuments)
        scores, rows = self.nearest(vectors, top, self.meta.model_checksum, excluded, allowed)
        return [self.documents(*result) for result in zip(scores, rows, strict=True)]

    def similar_documents(self, key: str, top: int, exclude: Sequence[str]) -> list[ScoredDocument]:
        """Return the documents nearest to an existing one by cosine, ignoring beta, without the keys `exclude`."""
        excluded = self.rows(exclude) if exclude else NO_ROWS
        return self.documents(*self.similar(self.row(key), top, excluded))

    def stored_vectors(self, keys: Sequence[str]) -> dict[str, StoredVector]:
        """Return the vectors of the existing documents among `keys`, with the precision of the index."""
        rows = self.rows(keys) if self.dataset is None else self.dataset.catalogue.rows_by_key(keys)
        rows = np.unique(rows[(rows >= 0) & (rows < self.meta.num_docs)])
        documents = self.documents(np.zeros(len(rows), np.float32), rows)
        return {
            document.key: StoredVector(document.title, vector)
            for document, vector in zip(documents, self.vectors_at(rows), strict=True)
        }

    def similar(self, row: int, top: int, excluded: np.ndarray = NO_ROWS) -> tuple[np.ndarray, np.ndarray]:
        """Return (cosines float32, catalogue rows int64), [top], of the nearest documents, ignoring beta.

        Cosine re-ranks the SIMILAR_CANDIDATES · (top + 1) documents with the largest inner products. excluded: int64,
        rows that are no answers.
        """
        query = self.vectors_at([row])
        query[:, query.shape[1] - self.meta.has_beta :] = 0
        available = self.meta.num_docs if self.answers is None else self.answers.count
        candidates = min(SIMILAR_CANDIDATES * (top + 1 + len(excluded)), available)
        rows = self._search(query, candidates, self.answers)[1][0] if candidates else NO_ROWS
        rows = rows[(rows != row) & ~np.isin(rows, excluded)]
        cosines = cosine_similarities(query[0], self.vectors_at(rows), self.meta.has_beta)
        best = np.argsort(-cosines, kind="stable")[:top]
        return cosines[best], rows[best]

    def row(self, key: str) -> int:
        """Return the catalogue row of a document. Raises UnknownKeyError: no document has this key."""
        check_utf8([key])
        row: int = pc.index(self.keys, pa.scalar(key, pa.string())).as_py()  # 100 times as fast as index_in
        if row < 0:
            raise UnknownKeyError(f"no document has the key {key!r}")
        return row

    def rows(self, keys: Sequence[str]) -> np.ndarray:
        """Return the catalogue rows of documents, int64, -1 for an unknown key."""
        check_utf8(keys)
        rows = pc.index_in(pa.array(keys, pa.string()), value_set=self.keys.combine_chunks())
        return np.asarray(rows.fill_null(-1), np.int64)

    def vectors_at(self, rows: Iterable[int]) -> np.ndarray:
        """Return the vectors of documents, float32 [n, D+1], with the precision of this index."""
        if self.vectors is not None:
            return self.vectors[np.asarray(rows, np.int64)].copy()
        return self._backend.vectors_at(self.index, np.asarray(list(rows), np.int64))

    @cached_property
    def _backend(self) -> IndexBackend:
        return INDEX_TYPES.make(self.meta.kind, self.meta.options)

    def _search(
        self, queries: np.ndarray, depth: int, allowed: AllowedDocuments | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (scores, rows), both [m, depth], best first."""
        truncated = truncate_like(queries, self.meta)
        if self.vectors is None:
            return self._backend.search(self.index, truncated, depth, allowed)
        available = self.meta.num_docs if allowed is None else allowed.count
        num_candidates = min(depth * self.meta.rescored, available)
        candidates = self._backend.search(self.index, truncated, num_candidates, allowed)[1]
        scores = np.stack([self.vectors[rows] @ query for rows, query in zip(candidates, queries, strict=True)])
        order = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(candidates, order, 1)


def cosine_similarities(vector: np.ndarray, others: np.ndarray, has_beta: bool) -> np.ndarray:
    """Return the cosines float32 [n] of index vectors [D+1] and [n, D+1], ignoring beta."""
    both = np.concatenate([vector[None], others])[:, : len(vector) - has_beta]
    both = both / np.linalg.norm(both, axis=1, keepdims=True).clip(min=np.finfo(np.float32).tiny)
    return np.asarray(both[1:] @ both[0])


def build_index(
    vectors_dir: Path,
    folder: Path,
    kind: str | IndexBackend = "flat",
    *,
    width: int | None = None,
    rescore: int = 0,
    options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> VectorsMeta:
    """Build the inner-product index of a vectors folder and return its meta.

    flat is exact, sq8 (int8) is flat with a byte per dimension and binary with a bit; hnsw, ivf and ivfpq probe a part
    of the catalogue, and ivfpq stores half a byte per dimension; `options` of the type: docs/config_keys.md. `width`
    truncates the vectors of a model trained with loss.widths. `rescore` candidates per requested document are rescored
    with the full vectors on disk. overwrite: `folder` may hold something else; its files with other names are kept.
    Raises: CheckpointError: `vectors_dir` is not a complete vectors folder; ConfigError: `folder` holds something else,
    ivfpq has too few documents, or an invalid width or rescore.
    """
    folder = real_path(folder)
    meta = read_meta(vectors_dir)
    if meta.kind != VECTORS:
        raise CheckpointError(f"{vectors_dir} is an index; the vectors it was built from are needed")
    backend = INDEX_TYPES.make(kind, options)
    built = index_meta(meta, backend, width, rescore)
    vectors = load_vectors(vectors_dir, meta)
    if built.width != meta.width:
        truncated = truncate_like(vectors[:], built)
        vectors = CodedVectors(truncated, "float32", built.width, built.has_beta)
    check_file(vectors_dir / DOCUMENTS_FILE, meta.files.get(DOCUMENTS_FILE), META_FILE)
    check_output_folder(folder, CONTENTS_FILE, overwrite)
    with new_folder(folder, OWN_FILES) as temporary:
        backend.write(backend.build(vectors), temporary / INDEX_FILE)
        for name in (DOCUMENTS_FILE, *([VECTORS_FILE] if rescore else [])):
            shutil.copyfile(vectors_dir / name, temporary / name)
        write_meta(temporary, built)
    return built


def index_meta(meta: VectorsMeta, backend: IndexBackend, width: int | None, rescore: int) -> VectorsMeta:
    """Return the meta of an index of these vectors. Raises ConfigError: invalid options."""
    kind, options = backend.type, asdict(backend)
    if rescore < 0 or (backend.needs_rescore and rescore == 0):
        raise ConfigError(f"--type {kind} --rescore {rescore}: needs candidates to rescore, such as 20")
    if rescore and meta.whole:
        raise ConfigError(f"--rescore {rescore}: these vectors are truncated; embed without --width")
    if width is None:
        return replace(meta, kind=kind, options=options, rescored=rescore)
    check_width("--width", width, meta.width - meta.has_beta)
    width += meta.has_beta
    if not meta.score:
        raise ConfigError(f"--width {width}: the meta of these vectors has no score type; embed again")
    full_width = meta.whole or meta.width
    return replace(
        meta, kind=kind, options=options, rescored=rescore, width=width, whole=0 if width == full_width else full_width
    )


@checked
def open_index(folder: str | Path, model: Model | None = None) -> Index:
    """Open the Index in `folder`.

    Raises CheckpointError: the folder is missing, damaged, a vectors folder, or of another model than `model`.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    if meta.kind == VECTORS:
        raise CheckpointError(f"{folder} holds {meta.kind}, not an index; run bigdssm build_index on it")
    try:
        backend = INDEX_TYPES.make(meta.kind, meta.options)
    except ConfigError as error:
        raise CheckpointError(f"the index {folder} cannot be opened: {error}") from None
    for name in (INDEX_FILE, DOCUMENTS_FILE):
        check_file(folder / name, meta.files.get(name), META_FILE)
    try:
        index = backend.read(folder / INDEX_FILE)
        with pa.memory_map(str(folder / DOCUMENTS_FILE)) as file:
            documents = pa.ipc.open_file(file).read_all()
    except (RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(f"the index {folder} does not load: {' '.join(str(error).split())}") from None
    rows, width = backend.shape(index)
    if rows != meta.num_docs or width != meta.width or documents.num_rows != meta.num_docs:
        raise CheckpointError(
            f"the index {folder} is damaged: {rows} vectors of width {width} and {documents.num_rows} "
            f"documents, {META_FILE} has {meta.num_docs} of width {meta.width}"
        )
    vectors = load_vectors(folder, replace(meta, width=meta.whole or meta.width)) if meta.rescored else None
    withdrawn = np.asarray(documents[WITHDRAWN]).nonzero()[0] if WITHDRAWN in documents.column_names else NO_ROWS
    answers = AllowedDocuments.without(withdrawn, meta.num_docs)
    opened = Index(index, meta, documents["doc_key"], documents["doc_title"], vectors, answers)
    if model is not None:
        opened.check_model(model.folder.doc_checksum)
    return opened


@dataclass(frozen=True)
class StoreIndex:
    """A pinned collection of a vector store; excluded documents are keys.

    Documents may be newer or older than the dataset, which filters and histories are read from if there is one.
    """

    store: Store
    collection: Collection
    num_docs: int  # when it was opened
    dataset: Dataset | None = None
    stored_withdrawn: set[str] = field(default_factory=set, compare=False)  # keys that the collection still has

    @cached_property
    def filters(self) -> StoreFilters:
        """The filters of the collection's columns."""
        catalogue = None if self.dataset is None else self.dataset.whole.catalogue
        return StoreFilters(self.collection.columns, catalogue)

    @property
    def has_beta(self) -> bool:
        """Whether vectors have a beta."""
        return self.collection.has_beta

    @property
    def description(self) -> dict[str, Any]:
        """Return the identity of the index as that of `Index`, with the store, its scheme and the dataset's version."""
        return {
            "index": self.store.scheme, "documents": self.num_docs, "dataset": self.collection.dataset,
            "published": self.collection.published, "store": self.store.address, "collection": self.collection.name,
            "version": self.collection.version,
        }  # fmt: skip

    def check_model(self, model: str) -> None:
        """Compare with the model of the collection; a search compares with that of every row."""
        self.collection.check_model(model)

    def of_dataset(self, dataset: Dataset) -> "StoreIndex":
        """Return the index without the documents that `dataset` withdraws; others may be newer or older than it."""
        return replace(self, dataset=dataset, stored_withdrawn=set())

    @cached_property
    def _withdrawn(self) -> frozenset[str]:
        """The keys of the documents that the dataset withdraws."""
        if self.dataset is None:
            return frozenset()
        catalogue = self.dataset.whole.catalogue
        return frozenset(catalogue.keys(catalogue.withdrawn))

    def query_vectors(self, vectors: np.ndarray) -> np.ndarray:
        """Truncate to the width of the collection."""
        return truncate_like(vectors, self.collection)

    def search_queries(self, vectors: np.ndarray, queries: Sequence[Query], top: int) -> list[list[ScoredDocument]]:
        """Search the collection."""
        where: Expression | None = queries[0].allowed  # type: ignore[assignment]
        exclude = [list(query.exclude) for query in queries]
        if self.dataset is not None:
            exclude = [[*self.dataset.catalogue.keys(query.excluded), *query.exclude] for query in queries]
        return self._search(self.query_vectors(vectors), top, where, exclude)

    def _search(
        self, vectors: np.ndarray, top: int, where: Expression | None, exclude: Sequence[Sequence[str]]
    ) -> list[list[ScoredDocument]]:
        """Search without the documents that the dataset withdraws.

        Few of them are in a collection, so those that a search finds are excluded from the next ones.
        """
        depth = top
        while True:
            excluded = [[*keys, *self.stored_withdrawn] for keys in exclude]
            with self._present():
                results = self.store.search(self.collection, vectors, depth, where, excluded)
            withdrawn = self._withdrawn.intersection(document.key for result in results for document in result)
            if not withdrawn:
                return [result[:top] for result in results]
            self.stored_withdrawn.update(withdrawn)
            depth *= 2  # if there are many, few searches find all

    def similar_documents(self, key: str, top: int, exclude: Sequence[str]) -> list[ScoredDocument]:
        """Re-rank the documents with the largest inner products by cosine. Raises UnknownKeyError: no such document."""
        own = self.stored_vectors([key])
        if key not in own:  # deleted since the caller read it
            raise UnknownKeyError(f"no document has the key {key!r}")
        vector = own[key].vector
        query = vector.copy()[None]
        query[:, query.shape[1] - self.has_beta :] = 0
        candidates = SIMILAR_CANDIDATES * (top + 1)
        (documents,) = self._search(query, candidates, None, [[key, *exclude]])
        stored = self.stored_vectors([document.key for document in documents])
        documents = [document for document in documents if document.key in stored]  # not deleted meanwhile
        others = np.stack([stored[document.key].vector for document in documents]) if documents else vector[None][:0]
        cosines = cosine_similarities(vector, others, self.has_beta)
        best = np.argsort(-cosines, kind="stable")[:top].tolist()
        return [ScoredDocument(float(cosines[i]), documents[i].key, documents[i].title) for i in best]

    def stored_vectors(self, keys: Sequence[str]) -> dict[str, StoredVector]:
        """Read vectors from the store."""
        with self._present():
            return self.store.vectors(self.collection, keys)

    @contextmanager
    def _present(self) -> Iterator[None]:
        """Convert the error of a collection that was dropped while it is served."""
        try:
            yield
        except DataError as error:
            if isinstance(error, UnavailableError) or self.collection.name in self.store.collections():
                raise
            raise UnavailableError(
                f"{self.store.address}: collection {self.collection.name} was dropped while it was served; switch the "
                "alias before a collection is dropped"
            ) from None


DocumentIndex = Index | StoreIndex
"""Documents of one model as a `Searcher` reads them."""
