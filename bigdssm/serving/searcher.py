"""A model, its index and its dataset, as what a request needs of them; knows nothing of HTTP."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdssm.artifacts.model_folder import ModelFolder
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.tensors import to_features
from bigdssm.errors import CheckpointError, ConfigError, DataError
from bigdssm.features import TextTokenizer, histories_of, ragged, stored
from bigdssm.retrieval.embed import query_vectors
from bigdssm.retrieval.index import Index, search_with
from bigdssm.retrieval.search import DocumentNames, Query, check_typed, feature_query, history_query, user_query

MOST_USERS_LISTED = 1000
SEEN_SHOWN = 5


@dataclass(frozen=True)
class Found:
    """The documents of one query."""

    documents: list[dict[str, Any]]  # rank, score, key, display
    encode_ms: float  # of the batch that the query was in
    search_ms: float
    batch: int  # queries in it


class Searcher:
    """Answers queries in batches."""

    def __init__(self, folder: ModelFolder, index: Index, dataset: Dataset | None, threads: int | None = None) -> None:
        """Take the model, the index of its vectors, and the dataset, without which there are no users or histories.

        `threads` search the index for one call; by default as many as FAISS takes by itself.
        Raises CheckpointError: the index or the dataset is another model's; DataError: its queries have a history, and
        there is no dataset to look items up in.
        """
        if index.meta.model_checksum != folder.checksum:
            raise CheckpointError(
                f"the index holds vectors of model {index.meta.model_checksum[:12]}, --model is "
                f"{folder.checksum[:12]}; embed and index with the model that is served"
            )
        if dataset is not None:
            folder.check_dataset(dataset)
            if index.meta.dataset_fingerprint != dataset.fingerprint:
                raise CheckpointError(
                    f"the index was made of another dataset than {dataset.dir}; embed and index again"
                )
        self._folder, self._index, self._dataset, self._threads = folder, index, dataset, threads
        self._has_history = bool(histories_of(folder.schema.query))
        if self._has_history and dataset is None:
            raise DataError("queries of this model have a history; give its dataset with --data")
        self._names = DocumentNames.of(dataset) if dataset is not None and self._has_history else None
        self._tokenizer = None if folder.tokenizer_dir is None else TextTokenizer(folder.tokenizer_dir)

    def about(self) -> dict[str, Any]:
        """Return what a client needs to ask queries."""
        meta = self._index.meta
        features = {name: feature.type for name, feature in stored(self._folder.schema.query).items()}
        return {
            "model": self._folder.checksum, "index": meta.kind, "documents": meta.num_docs,
            "score": self._folder.config.model.score, "features": features, "history": self._has_history,
            "users": bool(self.users),
        }  # fmt: skip

    @cached_property
    def users(self) -> list[str]:
        """Return some users that can be asked for, none in a dataset of pairs."""
        if self._dataset is None or self._dataset.sequences is None:
            return []
        table = self._dataset.sequences
        return table.strings("query_key", np.arange(min(MOST_USERS_LISTED, table.num_rows)))

    def query(self, features: Mapping[str, str] | None, user: str | None, history: Sequence[str] | None) -> Query:
        """Return the query that one of the three describes. Raises ConfigError, DataError: not one, or unknown."""
        given = [what for what in (features, user, history) if what is not None]
        if len(given) != 1:
            raise ConfigError(f"a query is one of features, user, history; got {len(given)} of them")
        check_typed([user or "", *(history or ()), *(features or {}).values()])
        if features is not None:
            return feature_query(self._folder.schema, features, self._tokenizer)
        if user is not None and self._dataset is not None and self._dataset.sequences is not None:
            return user_query(self._dataset, user)
        if history is not None and self._dataset is not None and self._names is not None:
            return history_query(self._dataset, self._names, history)
        raise ConfigError("this model is served without users or histories; describe the query by its features")

    def seen(self, query: Query) -> list[str]:
        """Return the newest documents of a query's history, newest first, as people know them."""
        newest = query.seen[::-1][:SEEN_SHOWN]
        return self._index.display.take(pa.array(newest)).to_pylist() if len(newest) else []

    def search(self, asked: Sequence[tuple[Query, int]]) -> list[Found]:
        """Return the best documents of queries, each asked for so many; encoded and searched together."""
        started = time.perf_counter()
        columns = {
            name: ragged.concat([query.columns[name] for query, _ in asked]) for name in self._folder.schema.query
        }
        features = to_features(self._folder.schema.query, columns, self._folder.pad_token_id)
        vectors = query_vectors(self._folder.model, features).numpy()
        encoded = time.perf_counter()
        self._use_threads()
        top = max(top for _, top in asked)
        seen = [query.seen for query, _ in asked]
        scores, rows = self._index.nearest(vectors, top, self._folder.checksum, seen)
        searched = time.perf_counter()
        encode_ms, search_ms = (encoded - started) * 1000, (searched - encoded) * 1000
        return [
            Found(self._documents(scores[i, :top], rows[i, :top]), encode_ms, search_ms, len(asked))
            for i, (_, top) in enumerate(asked)
        ]

    def similar(self, key: str, top: int) -> tuple[str, list[dict[str, Any]]]:
        """Return a document's display name and the documents nearest to it. Raises DataError: no such document."""
        row = pc.index(self._index.keys, pa.scalar(key, pa.string())).as_py()
        if row < 0:
            raise DataError(f"no document has the key {key!r}")
        self._use_threads()
        return self._index.display[row].as_py(), self._documents(*self._index.similar(row, top))

    def _use_threads(self) -> None:
        if self._threads is not None:
            search_with(self._threads)

    def _documents(self, scores: np.ndarray, rows: np.ndarray) -> list[dict[str, Any]]:
        found = self._index.documents(scores, rows)
        return [{"rank": rank, **document._asdict()} for rank, document in enumerate(found, start=1)]
