"""Re-ranking: a cross-encoder scores the texts of a query jointly with the texts of each of its best documents.

The texts are those that the towers read: decoded by the dataset's tokenizer, and truncated to `max_tokens`.

Shapes: m queries, k candidates per query, n documents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.schema import Schema
from bigdssm.errors import ConfigError
from bigdssm.features import Column, Ragged, Text, TextTokenizer, texts_of

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

PAIRS_AT_ONCE = 64  # per batch of a cross-encoder: fits a CPU's caches

Columns = Mapping[str, Column]


class Texts:
    """The texts of queries and documents; several text features of a side are joined by a bar."""

    def __init__(
        self, schema: Schema, tokenizer: TextTokenizer | None, documents: Callable[[np.ndarray], Columns]
    ) -> None:
        """`documents` reads the features of documents by row, int64 [n]. Raises ConfigError: a side without texts."""
        self._query = texts_of(schema.query)
        self._doc = texts_of(schema.doc)
        if not self._query or not self._doc or tokenizer is None:
            raise ConfigError("a cross-encoder and BM25 read texts: needs a text feature on both sides")
        self._tokenizer = tokenizer
        self._read_documents = documents

    @classmethod
    def of(cls, dataset: Dataset) -> Texts:
        """Return the texts of a dataset's rows. Raises ConfigError: a side has no text feature."""
        return cls(dataset.schema, dataset.tokenizer, dataset.catalogue.columns)

    def queries(self, columns: Columns) -> list[str]:
        """Return the texts of queries by their feature columns, as in Rows.query."""
        return self._decode(columns, self._query)

    def documents(self, doc_rows: np.ndarray) -> list[str]:
        """Return the texts of documents by row, int64 [n]."""
        return self._decode(self._read_documents(doc_rows), self._doc)

    def _decode(self, columns: Columns, features: Mapping[str, Text]) -> list[str]:
        parts = [feature.decode(cast(Ragged, columns[name]), self._tokenizer) for name, feature in features.items()]
        return [" | ".join(row) for row in zip(*parts, strict=True)]


class Reranker:
    """A cross-encoder of sentence-transformers with one output; scores are its logits."""

    def __init__(self, folder: Path, texts: Texts) -> None:
        """Raises ConfigError: sentence-transformers is missing, or no one-output model in `folder`."""
        self._model = load_cross_encoder(folder)
        self._texts = texts

    def score(self, queries: Columns, documents: np.ndarray) -> np.ndarray:
        """Score candidates int64 [m, k] (rows of documents; -1: absent, scored -inf) as float32 [m, k]."""
        scores = np.full(documents.shape, -np.inf, np.float32)
        present = documents >= 0
        distinct, text_of_pair = np.unique(documents[present], return_inverse=True)
        query_texts = self._texts.queries(queries)
        doc_texts = self._texts.documents(distinct)
        query_of_pair = np.nonzero(present)[0]
        pairs = [(query_texts[query], doc_texts[doc]) for query, doc in zip(query_of_pair, text_of_pair, strict=True)]
        if pairs:
            scores[present] = self._model.predict(pairs, batch_size=PAIRS_AT_ONCE, show_progress_bar=False)
        return scores


def check_reranking(rerank: int, reranker: Path | None) -> None:
    """Raise ConfigError unless both a number of documents and a cross-encoder are given, or neither."""
    if rerank < 0 or rerank == 1:
        raise ConfigError(f"rerank={rerank}: needs at least 2 documents, or 0 for none")
    if rerank and reranker is None:
        raise ConfigError(f"--rerank {rerank}: needs --reranker, the folder of a cross-encoder (docs/ranking.md)")
    if reranker is not None and not rerank:
        raise ConfigError(f"--reranker {reranker}: needs --rerank, the number of documents to re-rank")


def load_cross_encoder(folder: Path) -> CrossEncoder:
    """Load a cross-encoder with logits as outputs.

    Raises ConfigError: sentence-transformers is missing, or no one-output model in `folder`.
    """
    try:
        from sentence_transformers import CrossEncoder
    except ImportError:
        raise ConfigError("a cross-encoder needs sentence-transformers; install bigdssm[rerank]") from None
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} holds no cross-encoder: config.json is missing; give a cross-encoder's folder")
    try:
        model: Any = CrossEncoder(str(folder), local_files_only=True, activation_fn=torch.nn.Identity())
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"the cross-encoder in {folder} does not load: {' '.join(str(error).split())}") from None
    if model.num_labels != 1:
        raise ConfigError(f"the cross-encoder in {folder} has {model.num_labels} outputs, needs one: a score")
    return cast("CrossEncoder", model)
