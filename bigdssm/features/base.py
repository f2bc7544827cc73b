"""Base class of features. A type of feature is one class that declares, reads, fits, encodes and displays its values.

A feature is declared in a config, fitted to the train rows of a dataset, and saved in the dataset's schema. On its way
to a model a value has four forms, each a function of the previous one:

    source     a cell of a table, of any type
    canonical  an Arrow value without nulls, before vocabulary and tokenizer (`canonical_type`); used during ingestion
    encoded    an Arrow value in shards and catalogue (`arrow_type`); read back as a Column
    array      the NumPy form of a tensor: one value or vector per row, or padded lists

A new type is a subclass, registered with `@register`; its encoder is registered with `models.encoders.encodes`.
Shapes: R rows, T length of the longest list.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar, cast, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdssm.features.ragged import Column, Ragged, from_arrow, rows_with, values_of
from bigdssm.utils.components import BOUND, Registry, read_value

if TYPE_CHECKING:
    from bigdssm.features.columns import RowCheck
    from bigdssm.features.tokenizer import TextTokenizer


# Codes of categorical values: padding or missing, out of vocabulary, first value of the vocabulary.
PADDING, OUT_OF_VOCABULARY, FIRST_CODE = 0, 1, 2
REQUEST_PREFIX = "request."  # of the columns of a query's own features of events, see Schema.request
ITEM_ROW = "item row"  # HISTORY.ITEM_ROW: 1 + the catalogue row of each item, 0 for none
FITTED: Mapping[str, Any] = {"fitted": True}  # metadata of fields that are fitted to the data

Fault = tuple[np.ndarray, Callable[[int], str]]
"""Mask of invalid rows, bool [R], and the message for one of them."""

ColumnType = Literal["category", "categories", "number"]
"""Type of a column in a vector store: a string, a list of strings, a 32-bit number."""

F = TypeVar("F", bound="Feature")


class Fitter(Protocol):
    """Fits the parameters of a feature to batches of canonical values."""

    def update(self, column: pa.Array) -> None:
        """Add the values of some rows."""

    def state(self) -> Any:
        """Return the state in JSON types, for `merge`."""

    def merge(self, state: Any) -> None:
        """Add the state of a fitter of the following rows."""

    def fitted(self, feature: Any, *, grow: bool) -> Any:
        """Return the fitted feature; with `grow` it is fitted already and may only be extended."""


@dataclass(frozen=True)
class Decoder:
    """Context for decoding encoded values to readable ones."""

    tokenizer: TextTokenizer | None
    item: Callable[[str, int], str]  # (feature, code) → title of the document


@dataclass(frozen=True)
class Feature(ABC):
    """One feature of a query or a document. Fields marked FITTED come from the data, the others from the config."""

    type: ClassVar[str]
    from_sequence: ClassVar[bool] = False  # values are the events before the row's event, not a column
    is_input: ClassVar[bool] = True  # of models; else stored for the rules of events alone
    example: ClassVar[str] = '"a value"'  # Python code, for model cards
    # Functions that convert JSON values to an exported tower's input, with NumPy (`np`) only: their source is copied
    # into model cards. The last one takes (`exported()`, values, `Exported`).
    onnx_code: ClassVar[tuple[Callable[..., Any], ...]] = ()

    column: str | None = None  # column of the source table; by default the feature's name
    name: str = field(default="", metadata=FITTED)

    def with_name(self: F, name: str) -> F:
        """Return the feature with its name."""
        return replace(self, name=name, column=self.column or name)

    @property
    def source(self) -> str:
        """Return the column of the source table."""
        return self.column or self.name

    @property
    def source_columns(self) -> list[str]:
        """Return the columns of the source table that `read` requires."""
        return [self.source]

    def check(self, key: str, side: str, docs: Mapping[str, Feature]) -> None:  # noqa: B027, few types have anything
        """Raise ConfigError if the declaration is invalid; `key` is its config key, `docs` the document features."""

    def of_table(self: F, own: Feature) -> F:
        """Return the feature with the files of `own`, the same feature declared for another table."""
        return self

    def declaration(self) -> dict[str, Any]:
        """Return the feature's config section as plain containers."""
        declared = {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata.get("fitted")}
        return {"type": self.type, **declared}

    def to_dict(self) -> dict[str, Any]:
        """Return all fields except the vocabulary as plain containers; inverse of `from_dict`."""
        return {"type": self.type, **{f.name: getattr(self, f.name) for f in fields(self)}}

    def exported(self) -> dict[str, Any]:
        """Return all fields as plain containers, for the code in an exported model's card."""
        return self.to_dict()

    # ----- source → canonical

    @property
    @abstractmethod
    def canonical_type(self) -> pa.DataType:
        """Return the Arrow type of canonical values."""

    @property
    @abstractmethod
    def missing(self) -> Any:
        """Return the canonical form of a missing value."""

    @abstractmethod
    def read(self, check: RowCheck) -> pa.Array:
        """Return the canonical values of a batch; invalid rows and values are reported to `check`.

        Raises DataError: the column's type is not supported.
        """

    def is_missing(self, column: pa.Array) -> np.ndarray:
        """Return the mask of missing canonical values, bool [R]."""
        return cast(np.ndarray, pc.equal(column, pa.scalar(self.missing, self.canonical_type)).to_numpy(False))

    def fitter(self) -> Fitter | None:
        """Return a fitter, or None if the feature has no parameters to fit."""
        return None

    def vocabulary_values(self, column: pa.Array) -> tuple[pa.Array, np.ndarray] | None:
        """Return new candidates for the vocabulary (strings) and their rows, int64; None without a vocabulary."""
        return None

    @property
    def vocabulary_min_count(self) -> int:
        """Return the minimum number of train rows with a value for it to enter the vocabulary."""
        return 1

    def with_values(self: F, path: Path, values: Iterable[pa.Array]) -> F:
        """Return the feature with values (strings, at least one) appended to its vocabulary, written to `path`."""
        raise NotImplementedError

    def parse(self, value: str) -> Any:
        """Return the canonical value of user input. Raises ConfigError."""
        return value

    # ----- canonical → encoded

    @abstractmethod
    def arrow_type(self, *, large: bool = False) -> pa.DataType:
        """Return the Arrow type of encoded values; large: lists have 64-bit offsets if they may need them."""

    @abstractmethod
    def encode(self, column: pa.Array, tokenizer: TextTokenizer | None, *, large: bool = False) -> pa.Array:
        """Encode canonical values, as `arrow_type`."""

    @property
    def raw_type(self) -> pa.DataType:
        """Return the Arrow type in shards with untokenized texts."""
        return self.arrow_type()

    def encode_raw(self, column: pa.Array) -> pa.Array:
        """Encode canonical values, as `raw_type`."""
        return self.encode(column, None)

    def faults(self, column: Column, vocab_size: int) -> Iterator[Fault]:
        """Yield the faults of encoded values that were read from disk; `vocab_size` is the tokenizer's."""
        yield from ()

    def without_unknown(self, column: Column) -> Column:
        """Replace unknown codes by OUT_OF_VOCABULARY."""
        return column

    @property
    def max_length(self) -> int | None:
        """Return the length that lists are truncated to; None if they are not, or the feature is not a list."""
        return None

    @property
    def num_codes(self) -> int:
        """Return the number of rows of its embedding table, 0 without one."""
        return 0

    def operands(self, operator: str, values: Sequence[str]) -> tuple[str, ...] | tuple[float, ...]:
        """Return the values of a condition as the rows have them: distinct, without missing ones.

        Raises ConfigError: the feature does not support the operator, or a value is invalid.
        """
        raise NotImplementedError

    def matches(self, column: Column, operator: str, operands: Sequence[str] | Sequence[float]) -> np.ndarray:
        """Return the mask of encoded values that match a condition (conditions.py), bool [R]; see `operands`."""
        raise NotImplementedError

    def choices(self, column: Column) -> dict[str, Any] | None:
        """Return the filter choices for these encoded values (`values`, or `least` and `most`); None without any."""
        return None

    @property
    def column_type(self) -> ColumnType | None:
        """Return the type of its column in a vector store; None: it has none."""
        return None

    def column_values(self, column: Column) -> list[Any]:
        """Return encoded values as a vector store has them, by `column_type`; None for a missing value."""
        raise NotImplementedError

    # ----- encoded → array

    @property
    def padding(self) -> int | None:
        """Return the padding value of lists, None if every row is one value or vector."""
        return None

    def array(self, column: Column) -> np.ndarray:
        """Return the array of a tensor: int64 [R, T] for lists, else int64 [R] unless overridden."""
        fill = self.padding
        if isinstance(column, Ragged):
            assert fill is not None
            return column.padded(fill)
        return np.asarray(column, np.int64)

    @abstractmethod
    def probe(self, random: np.random.RandomState, rows: int, docs: Mapping[str, Feature]) -> Column:
        """Return random encoded values of the whole range, including missing ones, to test a model with."""

    @abstractmethod
    def describe(self, vocab_size: int) -> str:
        """Return a readable summary of the fitted parameters."""

    @abstractmethod
    def display(self, values: np.ndarray, decoder: Decoder) -> Any:
        """Return the readable value of one row's array."""


@dataclass(frozen=True)
class SequenceFeature(Feature):
    """A feature of integers that are read from the sequences: it has no column, and its values are not encoded."""

    from_sequence: ClassVar[bool] = True

    def read(self, check: RowCheck) -> pa.Array:
        """Not implemented: it has no column."""
        raise NotImplementedError

    def arrow_type(self, *, large: bool = False) -> pa.DataType:
        """Return the canonical type."""
        return self.canonical_type

    def encode(self, column: pa.Array, tokenizer: TextTokenizer | None, *, large: bool = False) -> pa.Array:
        """Return the values unchanged."""
        return column


def code_faults(name: str, kind: str, column: Column, low: int, high: int) -> Iterator[Fault]:
    """Yield the rows with a code outside [low, high)."""
    values = values_of(column)
    if outside(values, low, high):
        yield (
            rows_with((values < low) | (values >= high), column),
            lambda row: f"{name} has a {kind} outside the schema's {high}",
        )


def outside(values: np.ndarray, low: int, high: int) -> bool:
    """Return whether any value is below `low` or not below `high`."""
    return bool(len(values)) and (int(values.min()) < low or int(values.max()) >= high)


def pad_lists(rows, fill):  # type: ignore[no-untyped-def]
    """Return padded lists of numbers, int64 [rows, T]."""
    padded = np.full((len(rows), max(1, *map(len, rows), 1)), fill, np.int64)
    for row, numbers in enumerate(rows):
        padded[row, : len(numbers)] = numbers
    return padded


FEATURES: Registry[Feature] = Registry("a type", "type", Feature)
register = FEATURES.register


def from_dict(content: Mapping[str, Any]) -> Feature:
    """Inverse of `Feature.to_dict`. Raises ConfigError, TypeError, KeyError: invalid content."""
    cls = FEATURES.classes[content["type"]]
    hints, bounds = get_type_hints(cls), {f.name: f.metadata.get(BOUND) for f in fields(cls)}
    values = {}
    for key, value in content.items():
        if key == "type":
            continue
        values[key] = read_value(f"{content['name']}.{key}", value, hints[key], bounds[key])
        if any(isinstance(value, kind) != isinstance(values[key], kind) for kind in (str, bool)):
            raise TypeError(f"{content['name']}.{key} is {value!r}, needs {hints[key]}")
    return cls(**values)


def filterable(features: Mapping[str, Feature]) -> dict[str, Feature]:
    """Return the features that support filters."""
    return {name: feature for name, feature in features.items() if type(feature).matches is not Feature.matches}


def encode_columns(
    table: pa.Table, features: Mapping[str, Feature], tokenizer: TextTokenizer | None, *, large: bool
) -> dict[str, pa.Array]:
    """Return the encoded columns of a canonical table by feature name."""
    return {
        name: feature.encode(table.column(name).combine_chunks(), tokenizer, large=large)
        for name, feature in features.items()
    }


def encode_values(feature: Feature, values: list[Any], tokenizer: TextTokenizer | None) -> Column:
    """Encode canonical values as a column."""
    return from_arrow(feature.encode(pa.array(values, feature.canonical_type), tokenizer))
