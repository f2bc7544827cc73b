"""Index vectors of queries and documents, whose inner product is the training score.

A document's index vector is [alpha * w, beta] and a query's [u, 1], so that their product alpha * <u, w> + beta holds
everything that the loss saw. Shapes: m queries, n documents, N catalogue rows, D the towers' width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bigdssm import distributed
from bigdssm.data import Collator, Dataset, Rows
from bigdssm.data.batch import Features
from bigdssm.models import Encoded


@dataclass(frozen=True)
class Encoders:
    """Both towers as functions from rows to float32 index vectors."""

    queries: Callable[[Rows], Tensor]  # Rows of m queries -> [m, D+1]
    documents: Callable[[np.ndarray], Tensor]  # int64 [n] catalogue rows -> [n, D+1]


def tower_encoders(model: nn.Module, dataset: Dataset, device: torch.device | str = "cpu") -> Encoders:
    """Return the Encoders of `model`: a DualEncoder, or an engine around one, on `device`.

    Every call runs the model's own forward in evaluation mode, so it also works on an engine that shards parameters;
    then all ranks must make the same calls.
    """
    collator = Collator(dataset.schema, dataset.catalogue, dataset.pad_token_id)

    def queries(rows: Rows) -> Tensor:
        return query_vectors(model, to_device(collator.query_features(rows.query), device))

    def documents(doc_rows: np.ndarray) -> Tensor:
        return document_vectors(model, to_device(dataset.catalogue.features(doc_rows), device))

    return Encoders(queries, documents)


def query_vectors(model: nn.Module, query: Features) -> Tensor:
    """Return [m, D+1] float32 for the features of m queries."""
    U = _encode(model, query=query).U
    assert U is not None
    return torch.cat([U.float(), U.new_ones(len(U), 1, dtype=torch.float32)], dim=1)


def document_vectors(model: nn.Module, doc: Features) -> Tensor:
    """Return [n, D+1] float32 for the features of n documents; beta is 0 in a model without one."""
    encoded = _encode(model, doc=doc)
    W = encoded.W
    assert W is not None
    beta = W.new_zeros(len(W)) if encoded.beta is None else encoded.beta
    return torch.cat([encoded.alpha.float() * W.float(), beta.float().unsqueeze(1)], dim=1)


def to_device(features: Features, device: torch.device | str) -> Features:
    """Return the same features on `device`."""
    return {name: values.to(device) for name, values in features.items()}


def encode_catalogue(
    encoders: Encoders, num_docs: int, *, rank: int = 0, world_size: int = 1, rows_per_chunk: int = 1024
) -> Tensor:
    """Return the index vectors [N, D+1] of the whole catalogue on every rank, each having encoded one share."""
    bounds = [num_docs * k // world_size for k in range(world_size + 1)]
    counts = [last - first for first, last in zip(bounds, bounds[1:], strict=False)]
    num_chunks = max(1, -(-max(counts) // rows_per_chunk))
    parts = []
    for chunk in range(num_chunks):
        first = bounds[rank] + chunk * rows_per_chunk
        rows = np.arange(first, min(first + rows_per_chunk, bounds[rank + 1]))
        # A rank that has run out encodes a document for nothing: a sharded model's forward is a collective.
        vectors = encoders.documents(rows if len(rows) else np.zeros(1, np.int64))
        parts.append(vectors[: len(rows)])
    return distributed.all_gather_rows(torch.cat(parts), counts)


def in_step(chunks: Iterator[Rows], dummy: Callable[[], Rows]) -> Iterator[tuple[Rows, bool]]:
    """Yield this rank's `chunks` with True, then `dummy()` with False until every rank has run out of its own.

    A collective: every rank must run it to the end.
    """
    rows = next(chunks, None)
    while distributed.any_rank(rows is not None):
        yield (rows, True) if rows is not None else (dummy(), False)
        rows = next(chunks, None)


def _encode(model: nn.Module, **sides: Features) -> Encoded:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            encoded: Encoded = model(**sides)
    finally:
        model.train(was_training)
    return encoded
