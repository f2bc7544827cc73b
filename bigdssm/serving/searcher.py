"""Searcher: a model, its index and its dataset as one object that answers requests; independent of HTTP."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bigdssm.checkpoints.model_folder import META_FILE as MODEL_META
from bigdssm.checkpoints.model_folder import ModelFolder, load_model_folder
from bigdssm.dataset.cache import FileCache
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.schema import Schema
from bigdssm.dataset.tensors import to_features
from bigdssm.errors import CheckpointError, ConfigError, DataError
from bigdssm.export.onnx_model import EXPORT_FILE, query_tower, run_onnx
from bigdssm.features import Column, TextTokenizer, histories_of, ragged, stored_features, texts_of
from bigdssm.retrieval.embed import query_vectors
from bigdssm.retrieval.index import Index, ScoredDocument, cosine_similarities, open_index
from bigdssm.retrieval.index_types import set_search_threads
from bigdssm.retrieval.pair_scorer import PairScorer
from bigdssm.retrieval.request import Request
from bigdssm.retrieval.search import Queries, Query, first_users
from bigdssm.retrieval.vectors import META_FILE as INDEX_META
from bigdssm.retrieval.vectors import truncate_like
from bigdssm.utils.arguments import checked

MOST_NEAR = 5  # that are shown
MOST_WORDS = 64  # of a text that are encoded
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class NearItem:
    """A document of the history."""

    key: str
    title: str
    cosine: float  # of its own vector and the found document's


@dataclass(frozen=True)
class NearWord:
    """A word of a text feature."""

    feature: str
    word: str
    cosine: float  # of the query that has this word alone for its text, and the found document


@dataclass(frozen=True)
class Explanation:
    """What a document is near to, the nearest first."""

    of: str  # its title
    history: list[NearItem]
    words: list[NearWord]


def read_of(seen: np.ndarray, schema: Schema) -> np.ndarray:
    """Return the distinct catalogue rows among the events that the query's histories hold, int64."""
    most = max((feature.max_items for feature in histories_of(schema.query).values()), default=0)
    return np.unique(seen[len(seen) - min(most, len(seen)) :])


def words_of(features: Mapping[str, Any], schema: Schema) -> list[tuple[str, str]]:
    """Return (feature, word) of the distinct words that a request's texts have, in their order."""
    texts = {name: features[name] for name in texts_of(schema.query) if isinstance(features.get(name), str)}
    words = [(name, word) for name, text in texts.items() for word in WORD.findall(text)]
    return list(dict.fromkeys(words))[:MOST_WORDS]


MOST_USERS_LISTED = 1000
SEEN_SHOWN = 5


@dataclass(frozen=True)
class SearchResult:
    """The documents of one query."""

    documents: list[ScoredDocument]  # best first
    encode_ms: float  # of the batch that the query was in
    search_ms: float
    rerank_ms: float  # 0 where nothing is ranked anew
    batch: int  # queries in it


class Searcher:
    """Answers requests."""

    state: bytes | None = None  # of the folders it was opened from, see `Folders.state`

    @checked
    def __init__(
        self, folder: ModelFolder, index: Index, dataset: Dataset | None, threads: int | None = None,
        onnx: Path | None = None, rerank: int = 0,
    ) -> None:  # fmt: skip
        """Take the model, the index of its vectors, and the dataset, without which there are no users or histories.

        `threads` search the index for one call; by default as many as FAISS takes by itself. `onnx` is the file of the
        model's query tower which encodes in its place. The best `rerank` documents are ranked anew by the model's
        scorer. Raises ConfigError: `threads` or `rerank` out of range; CheckpointError: the index or the dataset is
        another model's, or the model has no scorer; DataError: its queries have a history, or are re-ranked, and there
        is no dataset to look documents up in.
        """
        if rerank < 0 or rerank == 1:
            raise ConfigError(f"rerank={rerank}: needs at least 2 documents, or 0 for none")
        if threads is not None and threads < 1:
            raise ConfigError(f"threads={threads}: needs at least 1")
        if index.meta.model_checksum != folder.checksum:
            raise CheckpointError(
                f"the index holds vectors of model {index.meta.model_checksum[:12]}, --model is "
                f"{folder.checksum[:12]}; embed and index with the model that is served"
            )
        if dataset is not None:
            dataset = folder.view(dataset)
            index.check_dataset(dataset)
        self._folder, self._index, self._dataset, self._threads = folder, index, dataset, threads
        self._tower = None if onnx is None else query_tower(onnx, folder.checksum, threads or 0)
        self._rerank, self._scorer = rerank, None
        if rerank:
            if dataset is None:
                raise DataError("a scorer reads the documents; give the dataset with --data")
            self._scorer = PairScorer.of(folder, dataset)
            self._scorer.require_scorer()
        tokenizer = None if folder.tokenizer_dir is None else TextTokenizer(folder.tokenizer_dir)
        self.queries = Queries(folder.schema, tokenizer, dataset, folder.config.data.exclude_seen)

    @classmethod
    @checked
    def open(
        cls, model: str | Path, index: str | Path, data: str | None = None, threads: int | None = None,
        onnx: Path | None = None, rerank: int = 0,
    ) -> Searcher:  # fmt: skip
        """Return the Searcher of two folders and a dataset, by default the one that the model was trained on.

        Where nothing needs one (no history, no re-ranking) and `data` is none, none is opened. Raises CheckpointError,
        DataError: what is missing, damaged, or of another model.
        """
        folder, opened = load_model_folder(Path(model)), open_index(index)
        if data is None and not (histories_of(folder.schema.query) or folder.schema.siamese or rerank):
            return cls(folder, opened, None, threads, onnx)
        dataset = Dataset.open(data or folder.config.data.dir, cache=FileCache.of(folder.config.data))
        return cls(folder, opened, dataset, threads, onnx, rerank)

    def about(self) -> dict[str, Any]:
        """Return what a client needs to ask queries."""
        meta = self._index.meta
        schema = self._folder.schema
        return {
            "model": self._folder.checksum, "index": meta.kind, "documents": meta.num_docs,
            "score": self._folder.config.model.score, "exclude_seen": self._folder.config.data.exclude_seen,
            "features": {name: feature.type for name, feature in stored_features(schema.query).items()},
            "filters": self.queries.choices,
            "history": self.queries.has_history, "users": bool(self.users),
        }  # fmt: skip

    @cached_property
    def users(self) -> list[str]:
        """Return some users that can be asked for, none in a dataset of pairs."""
        if self._dataset is None or self._dataset.sequences is None:
            return []
        return first_users(self._dataset.sequences, MOST_USERS_LISTED)

    def seen(self, query: Query) -> list[str]:
        """Return the newest documents of a query's events, newest first, as people know them."""
        newest = query.seen[::-1][:SEEN_SHOWN]
        return self._index.title.take(pa.array(newest)).to_pylist() if len(newest) else []

    def search(self, requests: Sequence[Request]) -> list[list[ScoredDocument]]:
        """Return the documents of each request, best first. Raises ConfigError, DataError: one cannot be asked."""
        return [found.documents for found in self.answer([self.queries.of(request) for request in requests])]

    def answer(self, queries: Sequence[Query]) -> list[SearchResult]:
        """Return the best documents of queries, which are encoded together and do not change each other's answers."""
        if not queries:
            return []
        started = time.perf_counter()
        vectors = self.encode(queries)
        if not np.isfinite(vectors).all():
            raise ConfigError("the vector of a query holds NaN or inf: a number of its features is too large")
        encoded = time.perf_counter()
        self._use_threads()
        found = [(np.zeros(0, np.float32), np.zeros(0, np.int64))] * len(queries)
        # By `top`, too: an index that looks at a part of the catalogue looks at more of it for more documents.
        for allowed, wanted in dict.fromkeys((query.allowed, query.top) for query in queries):
            places = [place for place, query in enumerate(queries) if query.allowed is allowed and query.top == wanted]
            some = [queries[place] for place in places]
            top = min(max(self._rerank, wanted), self._index.meta.num_docs)
            scores, rows = self._index.nearest(
                vectors[places], top, self._folder.checksum, [query.excluded for query in some], allowed,
            )  # fmt: skip
            for place, *both in zip(places, scores, rows, strict=True):
                found[place] = both[0], both[1]
        searched = time.perf_counter()
        if self._scorer is not None:
            found = self._reranked(self._scorer, queries, found)
        ranked = time.perf_counter()
        encode_ms, search_ms, rerank_ms = ((b - a) * 1000 for a, b in pairwise((started, encoded, searched, ranked)))
        times = (encode_ms, search_ms, rerank_ms, len(queries))
        return [
            SearchResult(self._index.documents(scores[: query.top], rows[: query.top]), *times)
            for query, (scores, rows) in zip(queries, found, strict=True)
        ]

    def _reranked(
        self, scorer: PairScorer, queries: Sequence[Query], found: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return what was found, (scores, catalogue rows) of each query, with its best documents ranked anew."""
        best = [rows[: self._rerank] for _, rows in found]
        documents = np.full((len(queries), max(map(len, best))), -1)
        for place, rows in enumerate(best):
            documents[place, : len(rows)] = rows
        new = scorer.score(self._columns(queries), documents)
        ranked = []
        for (scores, rows), by_scorer in zip(found, new, strict=True):
            order = np.argsort(-by_scorer[: len(rows)], kind="stable")
            behind = slice(len(order), None)
            ranked.append(
                (np.concatenate([by_scorer[order], scores[behind]]), np.concatenate([rows[order], rows[behind]]))
            )
        return ranked

    def _columns(self, queries: Sequence[Query]) -> dict[str, Column]:
        schema = self._folder.schema
        return {name: ragged.concat([query.columns[name] for query in queries]) for name in schema.query}

    def encode(self, queries: Sequence[Query]) -> np.ndarray:
        """Return the index vectors of queries, float32 [m, D+1]."""
        features = to_features(self._folder.schema.query, self._columns(queries), self._folder.pad_token_id)
        made = query_vectors(self._folder.model, features) if self._tower is None else run_onnx(self._tower, features)
        vectors: np.ndarray = made.numpy()
        return vectors

    def similar(self, key: str, top: int) -> tuple[str, list[ScoredDocument]]:
        """Return a document's title and the documents nearest to it. Raises DataError: no such document."""
        row = self._index.row(key)
        self._use_threads()
        return self._index.title[row].as_py(), self._index.documents(*self._index.similar(row, top))

    def why(self, request: Request, key: str) -> Explanation:
        """Return what a document is near to in a request. Raises ConfigError, DataError: as `queries.of`, `similar`."""
        query, row = self.queries.of(request), self._index.row(key)
        vector = self._index.vectors_at([row])[0]
        rows = read_of(query.seen, self._folder.schema)
        cosines = cosine_similarities(vector, self._index.vectors_at(rows))
        nearest = np.argsort(-cosines, kind="stable")[:MOST_NEAR]
        items = [NearItem(*found[1:], found[0]) for found in self._index.documents(cosines[nearest], rows[nearest])]
        return Explanation(self._index.title[row].as_py(), items, self._near_words(query, request, vector)[:MOST_NEAR])

    def _near_words(self, query: Query, request: Request, vector: np.ndarray) -> list[NearWord]:
        words = words_of(request.features or {}, self._folder.schema)
        if not words:
            return []
        columns = [{**query.columns, name: self.queries.feature(name, word)} for name, word in words]
        vectors = self.encode([replace(query, columns=some) for some in columns])
        if vectors.shape[1] != len(vector):  # of an index that keeps cut ones alone
            vectors = truncate_like(vectors, self._index.meta)
        cosines = cosine_similarities(vector, vectors).tolist()
        near = [NearWord(*word, cosine) for word, cosine in zip(words, cosines, strict=True)]
        return sorted(near, key=lambda word: -word.cosine)

    def _use_threads(self) -> None:
        if self._threads is not None:
            set_search_threads(self._threads)


@dataclass(frozen=True)
class Folders:
    """Where a model and its index lie, and their dataset."""

    model: Path
    index: Path
    data: str | None = None
    threads: int | None = None
    onnx: Path | None = None  # the file of the query tower that encodes
    rerank: int = 0  # documents that the model's scorer ranks anew

    def open(self) -> Searcher:
        """Return the Searcher of what lies there now. Raises as `Searcher.open` does."""
        state = self.state()  # before: what is replaced meanwhile is another
        searcher = Searcher.open(self.model, self.index, self.data, self.threads, self.onnx, self.rerank)
        searcher.state = state
        return searcher

    def state(self) -> bytes:
        """Return what changes when a folder is replaced: the metas name the checksums of all else."""
        digest = hashlib.sha256()
        exported = [] if self.onnx is None else [self.onnx.parent / EXPORT_FILE]
        for path in (self.model / MODEL_META, self.index / INDEX_META, *exported):
            with suppress(OSError):
                digest.update(path.read_bytes())
        return digest.digest()
