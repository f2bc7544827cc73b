"""Embedding tables of all categorical features, looked up by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from bigdssm.dataset.schema import Schema
from bigdssm.features import PADDING, Feature

INIT_STD = 0.02  # BERT's


class EmbeddingTables(nn.Module):
    """The tables of all categorical features of both sides; a history uses the table of its items.

    Shapes: R rows, K values or items, E table width.
    """

    def __init__(self, schema: Schema, query_dim: int, doc_dim: int) -> None:
        super().__init__()
        widths = {"query": query_dim, "doc": doc_dim}
        self.tables = nn.ModuleDict()
        for side, feature in _tabled(schema):
            self.tables[table_name(side, feature.name)] = _table(feature.num_codes, widths[side])

    def grow(self, schema: Schema) -> dict[str, tuple[int, int]]:
        """Extend the tables to the vocabularies of `schema`; return (rows before, now) by extended table."""
        grown = {}
        for side, feature in _tabled(schema):
            name = table_name(side, feature.name)
            old = cast(nn.Embedding, self.tables[name])
            if old.num_embeddings < feature.num_codes:
                table = self.tables[name] = _table(feature.num_codes, old.embedding_dim)
                table.weight.requires_grad_(old.weight.requires_grad)
                with torch.no_grad():
                    table.weight[: old.num_embeddings] = old.weight
                grown[name] = (old.num_embeddings, feature.num_codes)
        return grown

    def look_up(self, name: str, codes: Tensor) -> Tensor:
        """Return the vectors [*codes.shape, E] of int64 `codes` in table `name`; zeros for padding."""
        vectors: Tensor = self.tables[name](codes)
        return vectors


def table_name(side: str, name: str) -> str:
    """Return the name of the table of a feature; `side` is query or doc."""
    return f"{side}_{name}"


def _tabled(schema: Schema) -> Iterator[tuple[str, Feature]]:
    for side, features in schema.sides.items():
        if side == "query" and schema.siamese:
            continue  # shared with the documents
        for feature in features.values():
            if feature.num_codes:
                yield side, feature


def _table(num_codes: int, dim: int) -> nn.Embedding:
    table = nn.Embedding(num_codes, dim, padding_idx=PADDING)
    with torch.no_grad():
        table.weight.normal_(std=INIT_STD)
        table.weight[PADDING].zero_()
    return table
