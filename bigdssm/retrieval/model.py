"""Python API of a model folder: encode dicts, texts, Arrow tables and data frames; score pairs.

PairScorer.from_folder(folder, dataset).score(rows.query, documents)

Shapes: m queries, k candidates per query, p pairs, n distinct documents, D vector width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from bigdssm import distributed
from bigdssm.checkpoints.model_folder import ModelFolder, fetch_from_hub, load_model_folder
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.schema import Schema
from bigdssm.errors import CheckpointError
from bigdssm.features import Column, Feature, ragged
from bigdssm.features.canonical import columns_of_values
from bigdssm.loader.batch import join_sides, split_sides
from bigdssm.models import DualEncoder, FeatureScorer, Scorer, Values, VectorScorer
from bigdssm.retrieval.embed import (
    document_vectors,
    encode,
    encode_columns,
    encode_features,
    query_vectors,
    tower_output,
)
from bigdssm.utils.arguments import checked

PAIRS_AT_ONCE = 8192  # pairs converted to tensors at a time
VECTORS_AT_ONCE = 16_384  # vector pairs scored at a time

Columns = Mapping[str, Column]
EncodeSide = Callable[[nn.Module, Mapping[str, Values]], Tensor]
"""Computes the vectors of one side with the model, such as `query_vectors`."""


@dataclass(frozen=True)
class PairScorer:
    """Scores pairs by the model's scorer, or by inner product if it has none."""

    model: nn.Module  # a DualEncoder, or an engine around one
    schema: Schema
    documents: Callable[[np.ndarray], Columns]  # features of documents by row, int64 [n]
    device: torch.device | str = "cpu"

    @classmethod
    def from_folder(cls, folder: ModelFolder, dataset: Dataset) -> "PairScorer":
        """Return the PairScorer of a model folder over a dataset's catalogue."""
        return cls(folder.model, folder.schema, dataset.catalogue.columns)

    @property
    def scorer(self) -> Scorer | None:
        """Return the model's scorer."""
        return cast(DualEncoder, getattr(self.model, "module", self.model)).scorer

    def require_scorer(self) -> None:
        """Raise CheckpointError if the model has no scorer: re-ranking would have no effect."""
        if self.scorer is None:
            raise CheckpointError(
                "--rerank needs a model with a scorer in addition to its vectors; fine-tune one with sft.scorer"
            )

    def score(self, queries: Columns, documents: np.ndarray) -> np.ndarray:
        """Score candidates int64 [m, k] (catalogue rows; -1: absent, scored -inf) as float32 [m, k].

        `queries` are feature columns of m queries, as in Rows.query. If an engine shards the model, all ranks must call
        this method.
        """
        scores = torch.full(documents.shape, float("-inf"))
        row, column = (torch.from_numpy(part) for part in np.nonzero(documents >= 0))
        pairs = queries, row.numpy(), documents[documents >= 0]
        pair_scores = self._by_vectors(*pairs).float().cpu()
        if isinstance(self.scorer, FeatureScorer):
            pair_scores = pair_scores + self._by_features(*pairs)
        scores[row, column] = pair_scores
        return np.asarray(scores)

    def _by_features(self, queries: Columns, row: np.ndarray, docs: np.ndarray) -> Tensor:
        """Return the scorer's term of the scores, [p]."""
        assert isinstance(self.scorer, FeatureScorer)

        def score(pairs: Mapping[str, Values]) -> Tensor:
            scores = encode(self.model, **split_sides(pairs), paired=True).scores
            assert scores is not None
            return scores.float()

        sides = self.scorer.features.items()
        features_of_side = {side: {name: self.schema.sides[side][name] for name in names} for side, names in sides}
        declared: dict[str, Feature] = join_sides(features_of_side["query"], features_of_side["doc"])
        parts = [torch.zeros(0)]
        # as many forward passes on every rank, some of no pairs: with a sharded model each is a collective
        num_pieces = int(distributed.all_reduce(torch.tensor(-(-len(row) // PAIRS_AT_ONCE)), "max"))
        for first in range(0, num_pieces * PAIRS_AT_ONCE, PAIRS_AT_ONCE):
            piece = slice(first, first + PAIRS_AT_ONCE)
            doc_columns = self.documents(docs[piece])
            query_columns = {name: ragged.take(queries[name], row[piece]) for name in features_of_side["query"]}
            columns = join_sides(query_columns, {name: doc_columns[name] for name in features_of_side["doc"]})
            parts.append(encode_features(declared, columns, len(row[piece]), score, self.device).cpu())
        return torch.cat(parts)

    def _by_vectors(self, queries: Columns, row: np.ndarray, docs: np.ndarray) -> Tensor:
        """Return the vectors' scores of pairs, [p]."""
        distinct, column = np.unique(docs, return_inverse=True)
        scorer = self.scorer if isinstance(self.scorer, VectorScorer) else None

        def encoded(side: str, columns: Columns, vectors: EncodeSide) -> Tensor:
            # a scorer takes the towers' outputs; vectors for inner products also contain alpha and beta
            vectors_of = partial(vectors, self.model) if scorer is None else partial(tower_output, self.model, side)
            declared, num_rows = self.schema.sides[side], len(next(iter(columns.values())))
            return encode_features(declared, columns, num_rows, lambda part: vectors_of(part).float(), self.device)

        q = encoded("query", queries, query_vectors)[torch.from_numpy(row)]
        d = encoded("doc", self.documents(distinct), document_vectors)[torch.from_numpy(column)]
        with torch.no_grad():
            pieces = zip(q.split(VECTORS_AT_ONCE), d.split(VECTORS_AT_ONCE), strict=True)
            return torch.cat([(u * w).sum(1) if scorer is None else scorer(u, w) for u, w in pieces])


@dataclass(frozen=True)
class Model:
    """A loaded model; the inner product of a query and a document vector is the training score.

    Rows are a list of dicts (feature → value), a list of strings if a side has one text feature, an Arrow table or a
    pandas data frame with one column per feature. A history is a list of item values, oldest first, and
    HISTORY.FEATURE the list of a feature of its events; absent features are missing values.
    """

    folder: ModelFolder

    @property
    def checksum(self) -> str:
        """Return the checksum that identifies the model in vectors and indexes."""
        return self.folder.checksum

    def encode_queries(self, rows: Any) -> np.ndarray:
        """Encode queries to [m, D+1], or [m, D] without beta. Raises DataError: an unknown feature or bad value."""
        schema = self.folder.schema
        return self._encode(rows, schema.query, query_vectors, schema.request)

    def encode_documents(self, rows: Any) -> np.ndarray:
        """Encode documents to [n, D+1], or [n, D] without beta. Raises DataError: an unknown feature or bad value."""
        return self._encode(rows, self.folder.schema.doc, document_vectors)

    def _encode(
        self, rows: Any, features: Mapping[str, Feature], encode: Callable[[nn.Module, Any], Tensor],
        request: Sequence[str] = (),
    ) -> np.ndarray:  # fmt: skip
        schema = self.folder.schema
        columns, num_rows = columns_of_values(
            rows, features, schema.doc, self.folder.tokenizer, schema.event_inputs, request
        )
        if num_rows == 0:
            return np.zeros((0, self.folder.index_width), np.float32)
        return encode_columns(features, columns, partial(encode, self.folder.model)).numpy()


@checked
def load_model(folder: str | Path) -> Model:
    """Load a model folder such as RUN/sft/best. Raises CheckpointError: missing or damaged."""
    return Model(load_model_folder(Path(folder)))


@checked
def from_pretrained(repo_id: str, revision: str | None = None) -> Model:
    """Load a model from the Hugging Face Hub (OWNER/NAME). Raises CheckpointError: missing or damaged."""
    return load_model(fetch_from_hub(repo_id, revision))
