"""Embedding tables of all categorical features, looked up by name.

A replicated table is a weight of the model. The rows of a sharded one are outside of it: look-ups go to `source`, which
is a step's working set in training (the batch then has positions in it for codes), else the tables themselves.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from bigdssm.config import ModelConfig
from bigdssm.dataset.schema import Schema
from bigdssm.features import PADDING, Categorical, Feature, History, histories_of
from bigdssm.features.base import OUT_OF_VOCABULARY, REQUEST_PREFIX
from bigdssm.tables.rows import TableSpec

INIT_STD = 0.02  # BERT's


class RowLookup(Protocol):
    """The rows of sharded tables."""

    def look_up(self, name: str, rows: Tensor) -> Tensor:
        """Return vectors [*rows.shape, E] of rows int64, zeros for row 0."""


class TransitionTable(NamedTuple):
    """A table with a vector per item, and one more per item and value of a feature of events, side by side in a row."""

    item: str  # document feature, whose codes are the rows
    rows: int
    dim: int  # of a vector
    num_values: int

    @property
    def width(self) -> int:
        """Return the width of a row."""
        return (1 + self.num_values) * self.dim


class EmbeddingTables(nn.Module):
    """The tables of all categorical features of both sides; a history uses the table of its items.

    A history with `transition` has a table of its own in addition, see `TransitionTable`.

    Shapes: R rows, K values or items, E table width.
    """

    source: RowLookup | None = None

    def __init__(self, schema: Schema, config: ModelConfig, dense: Collection[str] = ()) -> None:
        """dense: names of tables of any size that are weights, since they have been trained as weights."""
        super().__init__()
        sharded = sharded_tables(schema, config)
        self._config, self.sharded = config, {name: spec for name, spec in sharded.items() if name not in dense}
        self.tables = nn.ModuleDict()
        for side, feature in _features_with_tables(schema):
            if (name := table_name(side, feature.name)) not in self.sharded:
                self.tables[name] = _table(feature.num_codes, config.tower(side).embedding_dim)
        self.transitions = transition_tables(schema, config)
        for name, table in self.transitions.items():
            self.tables[name] = _transitions(table)

    def grow(self, schema: Schema) -> dict[str, tuple[int, int]]:
        """Extend the tables to the vocabularies of `schema`; return (rows before, now) by extended table."""
        larger = sharded_tables(schema, self._config, existing=self.sharded)
        grown = {
            name: (spec.rows, larger[name].rows) for name, spec in self.sharded.items() if spec.rows < larger[name].rows
        }
        self.sharded = {name: larger[name] for name in self.sharded}
        for side, feature in _features_with_tables(schema):
            if (name := table_name(side, feature.name)) in self.sharded:
                continue
            old = cast(nn.Embedding, self.tables[name])
            if old.num_embeddings < feature.num_codes:
                self.tables[name] = _extended(old, _table(feature.num_codes, old.embedding_dim))
                grown[name] = (old.num_embeddings, feature.num_codes)
        self.transitions = transition_tables(schema, self._config)
        for name, transitions in self.transitions.items():
            old = cast(nn.Embedding, self.tables[name])
            if old.weight.shape != (transitions.rows, transitions.width):
                self.tables[name] = _extended(old, _transitions(transitions))
                grown[name] = (old.num_embeddings, transitions.rows)
        return grown

    @torch.no_grad()
    def start_unknown(self, codes: Mapping[str, np.ndarray]) -> None:
        """Copy the out-of-vocabulary row to the rows of `codes`, in tables that are trained weights."""
        for name in codes.keys() & set(self.tables):
            weight = cast(nn.Embedding, self.tables[name]).weight
            if weight.requires_grad:
                weight[torch.from_numpy(codes[name])] = weight[OUT_OF_VOCABULARY].clone()

    def shape(self, name: str) -> tuple[int, int]:
        """Return the number of rows and the width of table `name`."""
        if (spec := self.sharded.get(name)) is not None:
            return spec.rows, spec.dim
        table = cast(nn.Embedding, self.tables[name])
        return table.num_embeddings, table.embedding_dim

    def look_up(self, name: str, codes: Tensor) -> Tensor:
        """Return the vectors [*codes.shape, E] of int64 `codes` in table `name`; zeros for padding."""
        if name in self.sharded:
            assert self.source is not None, "sharded tables have no rows yet"
            return self.source.look_up(name, codes)
        return cast(Tensor, self.tables[name](codes))


def table_name(side: str, name: str) -> str:
    """Return the name of the table of a feature; `side` is query, doc or event."""
    return f"{side}_{name}"


def transition_tables(schema: Schema, config: ModelConfig) -> dict[str, TransitionTable]:
    """Return the tables of transitions by name: one per history if `model.query.history.transition` is set."""
    feature = config.query.history.transition
    if feature is None:
        return {}
    num_values, dim = schema.event[feature].num_codes, config.doc.embedding_dim
    return {
        table_name("query", name): TransitionTable(
            str(history.of), schema.doc[str(history.of)].num_codes, dim, num_values
        )
        for name, history in histories_of(schema.query).items()
    }


def sharded_tables(schema: Schema, config: ModelConfig, existing: Collection[str] = ()) -> dict[str, TableSpec]:
    """Return the tables that are sharded by rows, by name; `existing`: tables that stay sharded at any size."""
    specs = {}
    for side, feature in _features_with_tables(schema):
        name = table_name(side, feature.name)
        if name in existing or config.tables.is_sharded(side, feature.name, feature.num_codes):
            specs[name] = TableSpec(
                name, feature.num_codes, config.tower(side).embedding_dim, INIT_STD, config.tables.admit_after,
                config.tables.evict_after, getattr(torch, config.tables.dtype), config.tables.capacity,
            )  # fmt: skip
            if config.tables.hash_rows and isinstance(feature, Categorical) and feature.hash_buckets:
                k = config.tables.hashes  # the sum of k rows has the standard deviation of one row
                specs[name] = replace(specs[name], std=INIT_STD / k**0.5, hashes=k, hash_rows=config.tables.hash_rows)
    return specs


def tables_of_features(schema: Schema, tables: Collection[str]) -> list[tuple[str, str, str]]:
    """Return (side, feature, table) of the features that read one of `tables`; histories read that of their items."""
    read = []
    for side, features in schema.sides.items():
        for name, feature in features.items():
            if side == "event":  # read by every history
                if (table := table_name(side, name)) in tables:
                    read += [("query", f"{history}.{name}", table) for history in histories_of(schema.query)]
                    if name in schema.request:
                        read.append(("query", REQUEST_PREFIX + name, table))
                continue
            table = table_name("doc", str(feature.of)) if isinstance(feature, History) else table_name(side, name)
            if side == "query" and schema.siamese and not isinstance(feature, History):
                table = table_name("doc", name)
            if table in tables:
                read.append((side, name, table))
    return read


def _features_with_tables(schema: Schema) -> Iterator[tuple[str, Feature]]:
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


def _extended(old: nn.Embedding, new: nn.Embedding) -> nn.Embedding:
    """Return the larger table `new` with the weights of `old` in its first rows and columns, trained as `old` is."""
    new.weight.requires_grad_(old.weight.requires_grad)
    with torch.no_grad():
        new.weight[: old.num_embeddings, : old.embedding_dim] = old.weight
    return new


def _transitions(table: TransitionTable) -> nn.Embedding:
    """Return new transitions: the same for all values of the feature."""
    weights = _table(table.rows, table.width)
    with torch.no_grad():
        weights.weight[:, table.dim :].zero_()
    return weights
