"""KNN indexes of document vectors; each names the model whose vectors it holds and refuses another's queries.

INDEX/    index.faiss, documents.arrow (doc_key, doc_title), meta.json (checksums of all files), and vectors.npy,
          which scores the candidates again, of an index whose own vectors are cut or coded

Processes on a machine share the pages of all files.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdssm.checkpoints.checkpoint import check_file
from bigdssm.cli import check_width
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import CheckpointError, ConfigError, DataError
from bigdssm.features.ragged import Ragged
from bigdssm.retrieval.index_types import AllowedDocuments, IndexBackend, index_type
from bigdssm.retrieval.model import Model
from bigdssm.retrieval.request import check_encoded
from bigdssm.retrieval.vectors import (
    CONTENTS_FILE,
    DOCUMENTS_FILE,
    INDEX_FILE,
    META_FILE,
    VECTORS,
    VECTORS_FILE,
    CodedVectors,
    VectorsMeta,
    check_free,
    cut_like,
    load_vectors,
    read_meta,
    write_meta,
)
from bigdssm.utils.arguments import checked, short_repr
from bigdssm.utils.atomic import new_folder, real_path

SIMILAR_CANDIDATES = 20
NO_ROWS = np.zeros(0, np.int64)


class FoundDocument(NamedTuple):
    """A document that was found."""

    score: float
    key: str
    title: str


@dataclass(frozen=True)
class Index:
    """An opened KNN index."""

    index: Any  # of the back-end that meta names
    meta: VectorsMeta
    keys: pa.ChunkedArray  # string [N]
    title: pa.ChunkedArray
    vectors: CodedVectors | None = None  # where candidates are scored again

    @checked
    def search(
        self, vectors: Any, top: int, exclude: Sequence[Sequence[str]] | None = None
    ) -> list[list[FoundDocument]]:
        """Return the `top` best documents of each query, best first.

        vectors [m, D+1] are `Model.encode_queries`' of the model that the index names; `exclude` holds each query's
        document keys to leave out. Raises ConfigError: vectors of another width, or that are not finite, `top` 0,
        `exclude` of other queries.
        """
        width = self.meta.whole or self.meta.width
        try:
            vectors = np.asarray(vectors, np.float32)
        except (TypeError, ValueError):
            raise ConfigError(f"vectors={short_repr(vectors)}: needs an array of numbers [queries, {width}]") from None
        if vectors.ndim != 2 or vectors.shape[1] != width:
            raise ConfigError(f"got vectors {list(vectors.shape)}, the index has {width} numbers in each")
        if not np.isfinite(vectors).all():
            raise ConfigError("vectors has a number that is not finite; they are Model.encode_queries'")
        if top < 1:
            raise ConfigError(f"top {top}: needs at least 1")
        if exclude is not None and len(exclude) != len(vectors):
            raise ConfigError(f"exclude has keys of {len(exclude)} queries, there are {len(vectors)}")
        known = self._row_of if exclude is not None else {}
        excluded = [np.array([known[key] for key in some if key in known], np.int64) for some in exclude or ()]
        scores, rows = self.nearest(vectors, top, self.meta.model_checksum, excluded or None)
        return [self.documents(*found) for found in zip(scores, rows, strict=True)]

    def documents(self, scores: np.ndarray, rows: np.ndarray) -> list[FoundDocument]:
        """Return what was found as documents: scores [n] and catalogue rows [n], -1 where there is none."""
        scores, rows = scores[rows >= 0], rows[rows >= 0]
        keys, names = (column.take(pa.array(rows)).to_pylist() for column in (self.keys, self.title))
        return [FoundDocument(*found) for found in zip(scores.tolist(), keys, names, strict=True)]

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
        """Return (scores float32 [m, top], catalogue rows int64 [m, top]), best first; -inf and -1 behind the last.

        queries [m, D+1] are index vectors of the model `model_checksum`, `excluded` each query's rows to leave out,
        `allowed` the documents that any of them may have (none: all). Every query finds as many as are left for it.
        Raises CheckpointError where the index holds another model's vectors.
        """
        self.check_model(model_checksum)
        scores, rows = np.full((len(queries), top), -np.inf, np.float32), np.full((len(queries), top), -1)
        available = self.meta.num_docs if allowed is None else allowed.count
        if not available:
            return scores, rows
        left_out = Ragged.of_lists(excluded or [NO_ROWS] * len(queries), np.int64)
        # So many more are asked for that `top` are left; queries of like many together, as few have a long history.
        more = np.where(left_out.lengths, 2 ** np.ceil(np.log2(np.maximum(left_out.lengths, 1))), 0).astype(np.int64)
        for number in np.unique(more).tolist():
            some = np.flatnonzero(more == number)
            wanted = min(top + number, available)
            found = self._found(queries[some], wanted, allowed)
            kept = min(top, wanted)
            scores[some, :kept], rows[some, :kept] = _without(*found, left_out.take(some), top)
        return scores, rows

    def check_model(self, model_checksum: str) -> None:
        """Raise CheckpointError where the index holds another model's vectors."""
        if model_checksum != self.meta.model_checksum:
            raise CheckpointError(
                f"the index holds vectors of model {self.meta.model_checksum[:12]}, the queries are of model "
                f"{model_checksum[:12]}; their scores would mean nothing: embed and index with the model in use"
            )

    def check_dataset(self, dataset: Dataset) -> None:
        """Raise CheckpointError where the index holds the documents of another dataset, or of it as it was earlier."""
        if self.meta.dataset_fingerprint != dataset.fingerprint:
            raise CheckpointError(f"the index was made of another dataset than {dataset.dir}; embed and index again")

    def similar(self, row: int, top: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (cosines float32 [top], catalogue rows int64 [top]) of the documents nearest to one; beta is no part.

        They are chosen by cosine among those of the largest inner products, SIMILAR_CANDIDATES for each.
        """
        asked = self.vectors_at([row])
        asked[:, -1] = 0
        candidates = min(SIMILAR_CANDIDATES * (top + 1), self.meta.num_docs)
        rows = self._found(asked, candidates, None)[1][0]
        rows = rows[rows != row]
        cosines = cosines_with(asked[0], self.vectors_at(rows))
        best = np.argsort(-cosines, kind="stable")[:top]
        return cosines[best], rows[best]

    def row(self, key: str) -> int:
        """Return the catalogue row of a document. Raises DataError: no document has this key."""
        check_encoded([key])
        row: int = pc.index(self.keys, pa.scalar(key, pa.string())).as_py()
        if row < 0:
            raise DataError(f"no document has the key {key!r}")
        return row

    def vectors_at(self, rows: Iterable[int]) -> np.ndarray:
        """Return the vectors of documents, float32 [n, D+1], as exact as this kind of index keeps them."""
        if self.vectors is not None:
            return self.vectors[np.asarray(rows, np.int64)].copy()
        return self._backend.vectors_at(self.index, np.asarray(list(rows), np.int64))

    @cached_property
    def _backend(self) -> IndexBackend:
        return index_type(self.meta.kind, self.meta.options)

    def _found(
        self, queries: np.ndarray, wanted: int, allowed: AllowedDocuments | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (scores, rows), both [m, wanted], best first."""
        searched = cut_like(queries, self.meta)
        if self.vectors is None:
            return self._backend.search(self.index, searched, wanted, allowed)
        available = self.meta.num_docs if allowed is None else allowed.count
        wanted_again = min(wanted * self.meta.rescored, available)
        candidates = self._backend.search(self.index, searched, wanted_again, allowed)[1]
        scores = np.stack([self.vectors[some] @ query for some, query in zip(candidates, queries, strict=True)])
        order = np.argsort(-scores, axis=1, kind="stable")[:, :wanted]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(candidates, order, 1)


def cosines_with(vector: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the cosines, float32 [n], of index vectors [D+1] and [n, D+1], of which the last number is no part."""
    both = np.concatenate([vector[None], others])[:, :-1]
    both = both / np.linalg.norm(both, axis=1, keepdims=True).clip(min=np.finfo(np.float32).tiny)
    return np.asarray(both[1:] @ both[0])


def _without(scores: np.ndarray, rows: np.ndarray, left_out: Ragged, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first `top` of what was found, [m, found], without each query's rows to leave out."""
    number, width = np.arange(len(rows)), int(max(rows.max(initial=0), left_out.values.max(initial=0))) + 1
    names = np.repeat(number, left_out.lengths) * width + left_out.values
    out = (rows < 0) | np.isin(number[:, None] * width + rows, names)
    order = np.argsort(out, axis=1, kind="stable")[:, :top]
    scores, rows = np.where(out, np.float32(-np.inf), scores), np.where(out, -1, rows)
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def build_index(
    vectors_dir: Path,
    folder: Path,
    kind: str | IndexBackend = "flat",
    *,
    width: int | None = None,
    rescore: int = 0,
    options: Mapping[str, Any] | None = None,
) -> VectorsMeta:
    """Build the inner-product index of a vectors folder and return its meta.

    flat is exact, sq8 (int8) is flat with a byte per dimension and binary with a bit; hnsw, ivf and ivfpq look at a
    part of the catalogue only, and ivfpq keeps half a byte per dimension; `options` are
    the type's own (docs/config_keys.md). `width` cuts the vectors, as of a model
    that was trained with loss.widths; of `rescore` candidates for each document asked for, the folder's own vectors
    choose the best, which stay on the disk. Raises CheckpointError where `vectors_dir` is not a whole vectors folder,
    ConfigError where `folder` holds something else, ivfpq has too few documents, or width or rescore cannot be.
    """
    folder = real_path(folder)
    meta = read_meta(vectors_dir)
    if meta.kind != VECTORS:
        raise CheckpointError(f"{vectors_dir} is an index; the vectors it was built from are needed")
    backend = index_type(kind, options)
    built = planned(meta, backend, width, rescore)
    vectors = load_vectors(vectors_dir, meta)
    if built.width != meta.width:
        cut = cut_like(vectors[:], built)
        vectors = CodedVectors(cut, "float32", built.width)
    check_file(vectors_dir / DOCUMENTS_FILE, meta.files.get(DOCUMENTS_FILE), META_FILE)
    check_free(folder, CONTENTS_FILE)
    with new_folder(folder) as aside:
        backend.write(backend.build(vectors), aside / INDEX_FILE)
        for name in (DOCUMENTS_FILE, *([VECTORS_FILE] if rescore else [])):
            shutil.copyfile(vectors_dir / name, aside / name)
        write_meta(aside, built)
    return built


def planned(meta: VectorsMeta, backend: IndexBackend, width: int | None, rescore: int) -> VectorsMeta:
    """Return the meta of an index of these vectors. Raises ConfigError: it cannot be."""
    kind, options = backend.type, asdict(backend)
    if rescore < 0 or (backend.needs_rescore and rescore == 0):
        raise ConfigError(f"--type {kind} --rescore {rescore}: needs some candidates to score again, such as 20")
    if rescore and meta.whole:
        raise ConfigError(f"--rescore {rescore}: these vectors were cut when they were made; embed without --width")
    if width is None:
        return replace(meta, kind=kind, options=options, rescored=rescore)
    check_width("--width", width, meta.width - 1)
    if not meta.score:
        raise ConfigError(f"--width {width}: these vectors do not say of which score they are; embed again")
    whole = meta.whole or meta.width
    return replace(
        meta, kind=kind, options=options, rescored=rescore, width=width + 1, whole=0 if width + 1 == whole else whole
    )


@checked
def open_index(folder: str | Path, model: Model | None = None) -> Index:
    """Return the Index in `folder`. Raises CheckpointError: missing, damaged, no index, or of another than `model`."""
    folder = Path(folder)
    meta = read_meta(folder)
    if meta.kind == VECTORS:
        raise CheckpointError(f"{folder} holds {meta.kind}, not an index; run bigdssm build_index on it")
    try:
        backend = index_type(meta.kind, meta.options)
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
            f"documents, {META_FILE} says {meta.num_docs} of width {meta.width}"
        )
    vectors = None
    if meta.rescored:
        vectors = load_vectors(folder, replace(meta, width=meta.whole or meta.width))
    opened = Index(index, meta, documents["doc_key"], documents["doc_title"], vectors)
    if model is not None:
        opened.check_model(model.checksum)
    return opened
