"""Components registered by an external module, with no change of the library.

A feature type with its encoder, a sequence block, a text encoder, losses, a distillation, a sampling correction, an
optimizer, a table source, a store, an export and a metric.
"""

from __future__ import annotations

import copy
import math
import operator
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow.orc import ORCFile
from torch import Tensor, from_numpy, nn, optim, zeros_like

from bigdssm.checkpoints.model_folder import ModelFolder
from bigdssm.config import (
    FrequencyCorrection,
    HistoryEncoderConfig,
    OptimizerConfig,
    TextEncoderConfig,
    TextInputs,
)
from bigdssm.errors import CheckpointError, ConfigError
from bigdssm.evaluation.metrics import register_metric
from bigdssm.export.formats import ExportFormat, Parity, Probe, largest_difference, register_export
from bigdssm.features import Column, Decoder, Feature, TextTokenizer, register
from bigdssm.features.base import FITTED
from bigdssm.features.columns import ReportBad, RowCheck, SourceBatch, numbers
from bigdssm.features.conditions import And, Expression, Or
from bigdssm.losses import PairLoss, register_distillation, register_loss, register_sampling
from bigdssm.losses.declarations import ListDistillation, SoftmaxLoss
from bigdssm.losses.terms import Scores, TermResult
from bigdssm.models.blocks import AttentionContext, attend, split_heads
from bigdssm.models.declarations import register_block, register_text_encoder
from bigdssm.models.encoders import BuildContext, Encoder, TextEncoder, encodes
from bigdssm.retrieval.embed import document_vectors, query_vectors
from bigdssm.sources.base import FileSource, Part, register_source
from bigdssm.sources.text import require_columns
from bigdssm.stores.base import Alias, Collection, Documents, ScoredDocument, Store, StoredVector, register_store
from bigdssm.training.optimizers import register_optimizer
from bigdssm.utils.components import bounded


def angle_input(feature, values, exported):  # type: ignore[no-untyped-def]
    turns = np.array([np.nan if value is None else value for value in values], np.float32) / feature["whole"]
    return np.stack([np.sin(2 * np.pi * turns), np.cos(2 * np.pi * turns)], axis=1).astype(np.float32)


@register
@dataclass(frozen=True)
class Angle(Feature):
    """A number on a circle, such as an hour of a day: its sine and cosine."""

    type: ClassVar[str] = "angle"
    example: ClassVar[str] = "6.0"
    onnx_code: ClassVar = (angle_input,)

    whole: float = 360.0  # size of a full turn

    @property
    def canonical_type(self) -> pa.DataType:
        return pa.float64()

    @property
    def missing(self) -> float:
        return math.nan

    def read(self, check: RowCheck) -> pa.Array:
        return pa.array(numbers(check, self.source)[0])

    def is_missing(self, column: pa.Array) -> np.ndarray:
        return np.isnan(column.to_numpy())

    def parse(self, value: str) -> float:
        try:
            return float(value)
        except ValueError:
            raise ConfigError(f"{self.name} is {value!r}, needs an angle") from None

    def arrow_type(self, *, large: bool = False) -> pa.DataType:
        return pa.list_(pa.float32(), 2)

    def encode(self, column: pa.Array, tokenizer: TextTokenizer | None, *, large: bool = False) -> pa.Array:
        turns = 2 * np.pi * column.to_numpy() / self.whole
        both = np.stack([np.sin(turns), np.cos(turns)], axis=1).astype(np.float32)
        return pa.FixedSizeListArray.from_arrays(pa.array(both.ravel()), 2)

    def array(self, column: Column) -> np.ndarray:
        return np.asarray(column, np.float32)

    def probe(self, random: np.random.RandomState, rows: int, docs: Mapping[str, Feature]) -> Column:
        turns = 2 * np.pi * random.rand(rows)
        return np.stack([np.sin(turns), np.cos(turns)], axis=1).astype(np.float32)

    def describe(self, vocab_size: int) -> str:
        return f"{self.whole:g} a turn"

    def display(self, values: np.ndarray, decoder: Decoder) -> Any:
        return round(float(np.arctan2(*values)) * self.whole / (2 * np.pi) % self.whole, 3)


@encodes(Angle)
class AngleEncoder(Encoder):
    """Both numbers through one layer; zeros where they are missing."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.layer = nn.Linear(2, dim)

    @classmethod
    def build(cls, feature: Angle, context: BuildContext) -> AngleEncoder:
        return cls(context.config.numeric_dim)

    def forward(self, values: Tensor) -> Tensor:
        return self.layer(values.nan_to_num(nan=0.0))


@register_block
@dataclass(frozen=True)
class Cosine(HistoryEncoderConfig):
    """Attention by cosines, and no feed-forward layer."""

    block: str = "cosine"
    sharpness: float = bounded(4.0, above=0, at_most=100)  # times the cosines

    def build(self, dim: int) -> nn.Module:
        return CosineBlock(dim, self.heads, self.sharpness * (dim / self.heads) ** 0.5)


class CosineBlock(nn.Module):
    def __init__(self, dim: int, heads: int, scale: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.norm, self.query, self.key_value = nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, memory: Tensor, context: AttentionContext) -> Tensor:
        k, v = self.key_value(self.norm(memory)).chunk(2, dim=2)
        q, k, v = (split_heads(part, self.heads) for part in (self.query(self.norm(x)), k, v))
        return x + attend(nn.functional.normalize(q, dim=3) * self.scale, nn.functional.normalize(k, dim=3), v, context)


@register_text_encoder
@dataclass(frozen=True)
class Bag(TextEncoderConfig):
    """The mean of a text's token vectors."""

    type: str = "bag"
    width: int = bounded(64, 1, 4096)

    def build(self, inputs: TextInputs) -> nn.Module:
        return BagEncoder(inputs, self.width, self.dropout)


class BagEncoder(TextEncoder):
    def __init__(self, inputs: TextInputs, width: int, dropout: float) -> None:
        super().__init__(inputs, width)
        self.words = nn.Embedding(inputs.vocab_size, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        weight = (tokens >= 0).unsqueeze(2).to(self.words.weight.dtype)
        return self.dropout((self.words(tokens.clamp(min=0)) * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1))


@register_loss
@dataclass(frozen=True)
class Cubed(PairLoss):
    """Cubed hinge: max(0, S⁻ − S⁺ + margin)³."""

    name: str = "cubed"
    margin: float = bounded(0.2, 0)

    def value(self, x: Tensor) -> Tensor:
        return (x + self.margin).relu() ** 3


@register_loss
@dataclass(frozen=True)
class AdditiveMargin(SoftmaxLoss):
    """Softmax over all columns, with an additive margin on the positive (AM-Softmax, Wang et al. 2018)."""

    all_columns: ClassVar[bool] = True

    name: str = "additive_margin"
    margin: float = bounded(0.1, 0)

    def value_and_gradients(self, scores: Scores) -> TermResult:
        return super().value_and_gradients(replace(scores, positive_m=scores.positive_m - self.margin))


@register_distillation
@dataclass(frozen=True)
class MarginHuber(ListDistillation):
    """Huber loss of the model's margin minus the teacher's, between the positive and each hard negative."""

    name: str = "margin_huber"
    delta: float = bounded(1.0, above=0)

    def value(self, S_ml: Tensor, T_ml: Tensor, valid_ml: Tensor) -> Tensor:
        excess_ml = S_ml - T_ml
        error_mk = (excess_ml[:, :1] - excess_ml[:, 1:]).masked_fill(~valid_ml[:, 1:], 0.0)
        return nn.functional.huber_loss(error_mk, zeros_like(error_mk), reduction="none", delta=self.delta).sum(1)


@register_sampling
@dataclass(frozen=True)
class Shared(FrequencyCorrection):
    """The correction of negatives, and a share of it for positives."""

    name: str = "shared"
    share: float = bounded(0.5, 0, 1)

    def shares(self, correction: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return self.share * correction, (1 - self.share) * correction


@register_optimizer
@dataclass(frozen=True)
class HeavyBall(OptimizerConfig):
    """Stochastic gradient descent with momentum (Polyak 1964)."""

    name: str = "heavy_ball"
    foreach: bool = bounded(False, resume="may")  # one kernel for many parameters; does not change the result
    friction: float = bounded(0.1, above=0, at_most=1)  # 1 - momentum

    def build(self, groups: list[dict[str, Any]]) -> optim.Optimizer:
        return optim.SGD(groups, momentum=1 - self.friction, foreach=self.foreach)

    def state_of(self, group: str) -> tuple[str, ...]:
        return ("momentum_buffer",)


@register_source
class OrcSource(FileSource):
    """An ORC file, with one part per stripe."""

    suffixes: ClassVar[tuple[str, ...]] = (".orc",)

    def split(self) -> Sequence[Part]:
        """Return the stripes with the numbers of their first rows."""
        file = ORCFile(self.file.open_arrow())
        rows = [file.read_stripe(number, file.schema.names[:1]).num_rows for number in range(file.nstripes)]
        return [Part(number, 1 + sum(rows[:number]), rows[number]) for number in range(len(rows))]

    def read(self, part: Part, columns: Sequence[str], report_bad: ReportBad) -> Iterator[SourceBatch]:
        """Yield the rows of one stripe."""
        file = ORCFile(self.file.open_arrow())
        require_columns(self.name, file.schema.names, columns)
        table = pa.Table.from_batches([file.read_stripe(part.number, list(columns))]).select(list(columns))
        yield SourceBatch(self.name, table, np.arange(table.num_rows) + part.first_row)


@register_store
@dataclass(frozen=True)
class MemoryStore(Store):
    """Collections in the memory of this process, searched exactly."""

    scheme: ClassVar[str] = "memory"

    state: dict[str, Any] = field(default_factory=lambda: defaultdict(dict), metadata=FITTED)

    def collections(self) -> dict[str, Collection]:
        return dict(self.state["collections"])

    def create(self, collection: Collection) -> None:
        self.check_new_collection(collection.name)
        self.state["collections"][collection.name] = collection

    def publishing(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def contents(self, collection: Collection) -> dict[str, int]:
        return {key: row.content for key, row in self.state[collection.name].items() if row.vector is not None}

    def write(self, collection: Collection, documents: Documents, version: int) -> None:
        rows = self.state[collection.name]
        for i, key in enumerate(documents.keys):
            if key not in rows or rows[key].version + (rows[key].vector is None) <= version:
                values = {name: column[i] for name, column in documents.columns.items()}
                content = int(documents.contents[i])
                rows[key] = StoredRow(
                    version, collection.model, content, documents.titles[i], documents.vectors[i], values
                )

    def delete(self, collection: Collection, keys: Sequence[str], version: int) -> None:
        rows = self.state[collection.name]
        for key in keys:
            if key not in rows or rows[key].version <= version:
                rows[key] = StoredRow(version, collection.model)  # a tombstone

    def finish(self, collection: Collection) -> None:
        self.create(replace(collection, published=time.time()))

    def compact(self, collection: Collection) -> Sequence[str]:
        return ()  # a deleted document has no bytes

    def drop(self, name: str) -> None:
        if name in [alias.name for alias in self.aliases().values()]:
            raise ConfigError(f"collection {name}: an alias names it; switch the alias first")
        self.state["collections"].pop(name, None)
        self.state.pop(name, None)

    def count(self, collection: Collection, where: Expression | None = None) -> int:
        return len(self._matching(collection, where))

    def _matching(self, collection: Collection, where: Expression | None) -> dict[str, StoredRow]:
        rows = {key: row for key, row in self.state[collection.name].items() if row.vector is not None}
        if any(row.model != collection.model for row in rows.values()):
            raise CheckpointError(f"collection {collection.name} has rows of another model; publish under another name")
        return {key: row for key, row in rows.items() if where is None or matches(where, row.values)}

    def search(
        self, collection: Collection, queries: np.ndarray, top: int, where: Expression | None = None,
        exclude: Sequence[Sequence[str]] | None = None,
    ) -> list[list[ScoredDocument]]:  # fmt: skip
        rows, results = self._matching(collection, where), []
        for query, excluded in zip(queries, exclude or [()] * len(queries), strict=True):
            every = [
                ScoredDocument(float(row.vector @ query), key, row.title)
                for key, row in rows.items() if key not in excluded
            ]  # fmt: skip
            results.append(sorted(every, key=lambda document: -document.score)[:top])
        return results

    def vectors(self, collection: Collection, keys: Sequence[str]) -> dict[str, StoredVector]:
        rows = self._matching(collection, None)
        return {key: StoredVector(rows[key].title, rows[key].vector) for key in keys if key in rows}

    def aliases(self) -> dict[str, Alias]:
        return dict(self.state["aliases"])

    def switch(self, alias: str, name: str) -> None:
        self.check_switch(alias, name)
        current = self.state["aliases"].get(alias, Alias(name, None))
        self.state["aliases"][alias] = Alias(name, current.previous if current.name == name else current.name)


class StoredRow(NamedTuple):
    version: int
    model: str
    content: int = 0
    title: str = ""
    vector: Any = None  # None: deleted
    values: Mapping[str, Any] = MappingProxyType({})


def matches(where: Expression, values: Mapping[str, Any]) -> bool:
    if isinstance(where, And | Or):
        return (all if isinstance(where, And) else any)(matches(part, values) for part in where.parts)
    value = values[where.feature]
    if value is None:  # no condition matches a missing value
        return False
    if compare := COMPARISONS.get(where.operator):
        return compare(value, where.values[0])
    of_row = value if isinstance(value, list) else [value]
    return (where.operator in ("=", "in")) != set(of_row).isdisjoint(where.values)


COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@register_export
@dataclass(frozen=True)
class NumpyExport(ExportFormat):
    """The weights as a NumPy archive."""

    format: ClassVar[str] = "npz"
    library: ClassVar[str] = "numpy"

    compressed: bool = False  # smaller, and slower to load

    def write(self, model: ModelFolder, out: Path) -> Parity:
        save = np.savez_compressed if self.compressed else np.savez
        save(out / "weights.npz", **{name: t.numpy() for name, t in model.model.state_dict().items()})
        with np.load(out / "weights.npz") as weights:
            read = copy.deepcopy(model.model)
            read.load_state_dict({name: from_numpy(weights[name]) for name in weights})
        probe = Probe(model)
        queries, documents = probe.vectors["query"], probe.vectors["doc"]
        return Parity(
            largest_difference(query_vectors(read, probe.features["query"]), queries),
            largest_difference(document_vectors(read, probe.features["doc"]), documents),
        )

    def loading(self, model: ModelFolder, name: str) -> str:
        return f'`np.load("{name}/weights.npz")`'


register_metric("hr_at_1", lambda ranks: ranks <= 1)
