"""What a feature is: a class for each type, which alone says how it is declared, read, fitted, encoded and shown.

A feature is declared in a config, fitted to the train rows of a dataset, and saved in the dataset's schema. On its way
to a model a value has four forms, each a function of the one before:

    source     a cell of a table, of whatever type it has there
    canonical  an Arrow value without nulls, before vocabulary and tokenizer (`canonical_type`); kept while making
    encoded    an Arrow value in shards and catalogue (`arrow_type`); read back as a Column
    array      what tensors are made of: one value or vector a row, or padded lists

A new type is a subclass in a module of its own, registered with `@register`; its encoder registers beside those of
`models.encoders`. Shapes: R rows, T the longest list.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdssm.errors import ConfigError
from bigdssm.features.ragged import Column, Ragged, from_arrow
from bigdssm.utils.bounds import out_of_bounds
from bigdssm.utils.components import Registry

if TYPE_CHECKING:
    from bigdssm.features.columns import RowCheck
    from bigdssm.features.tokenizer import TextTokenizer


# Codes of values from a vocabulary: padding or missing; any other value; the vocabulary in its order.
PADDING, OUT_OF_VOCABULARY, FIRST_CODE = 0, 1, 2
FITTED: Mapping[str, Any] = {"fitted": True, "omegaconf_ignore": True}  # of fields that the data say, not the config

Fault = tuple[np.ndarray, Callable[[int], str]]
"""Which rows are wrong, bool [R], and what to say of one of them."""

F = TypeVar("F", bound="Feature")


class Fitter(Protocol):
    """Learns what a feature needs to know of the data, one batch of canonical values at a time."""

    def update(self, column: pa.Array) -> None:
        """Take in the values of some rows."""

    def state(self) -> Any:
        """Return what was learned, as JSON types, for `merge`."""

    def merge(self, state: Any) -> None:
        """Take in what another one learned of the rows that follow."""

    def fitted(self, feature: Any, *, grow: bool) -> Any:
        """Return `feature` as the values say; with `grow` it is fitted already, and only gets what is new."""


@dataclass(frozen=True)
class Decoder:
    """What turns encoded values back into what people read."""

    tokenizer: TextTokenizer | None
    pad_token_id: int
    item: Callable[[str, int], str]  # the title of the document with this code in this feature


@dataclass(frozen=True)
class Feature(ABC):
    """One feature of a query or a document. Fields marked FITTED come from the data, the others from the config."""

    type: ClassVar[str]
    from_sequence: ClassVar[bool] = False  # its values are the events before the row's; no column holds them
    example: ClassVar[str] = '"a value"'  # as Python, for model cards
    # What makes an exported tower's input of JSON values, complete as it stands beside NumPy (`np`): functions whose
    # source is copied into model cards, the last one of (`exported()`, values, `Exported`).
    onnx_code: ClassVar[tuple[Callable[..., Any], ...]] = ()

    column: str | None = None  # column of the source table; the feature's own name by default
    name: str = field(default="", metadata=FITTED)

    def with_name(self: F, name: str) -> F:
        """Return the feature under its name."""
        return replace(self, name=name, column=self.column or name)

    @property
    def source(self) -> str:
        """Return the column of the source table."""
        return self.column or self.name

    @property
    def source_columns(self) -> list[str]:
        """Return the columns that `read` needs of a table."""
        return [self.source]

    def check(self, key: str, side: str, docs: Mapping[str, Feature]) -> None:  # noqa: B027, few types have anything
        """Raise ConfigError where it cannot be: `key` names it in the config, `docs` are the documents' features."""

    def declaration(self) -> dict[str, Any]:
        """Return what the config says of it, as plain containers."""
        said = {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata.get("fitted")}
        return {"type": self.type, **said}

    def to_dict(self) -> dict[str, Any]:
        """Return all of it but a vocabulary, as plain containers; `from_dict` is the way back."""
        return {"type": self.type, **{f.name: getattr(self, f.name) for f in fields(self)}}

    def exported(self) -> dict[str, Any]:
        """Return all of it as plain containers, for the code in an exported model's card."""
        return self.to_dict()

    # ----- source → canonical

    @property
    @abstractmethod
    def canonical_type(self) -> pa.DataType:
        """Return the Arrow type of canonical values."""

    @property
    @abstractmethod
    def missing(self) -> Any:
        """Return the canonical value of what is missing."""

    @abstractmethod
    def read(self, check: RowCheck) -> pa.Array:
        """Return the canonical values of a batch; rows or values that cannot be are reported to `check`.

        Raises DataError where the whole column has a type that the feature cannot have.
        """

    def is_missing(self, column: pa.Array) -> np.ndarray:
        """Return which canonical values are missing, bool [R]."""
        found: np.ndarray = pc.equal(column, pa.scalar(self.missing, self.canonical_type)).to_numpy(False)
        return found

    def fitter(self) -> Fitter | None:
        """Return what learns from the data, or None where there is nothing to learn."""
        return None

    def vocabulary_values(self, column: pa.Array) -> tuple[pa.Array, np.ndarray] | None:
        """Return the values (strings) that a vocabulary may get and the row of each, int64; None where it has none."""
        return None

    @property
    def vocabulary_min_count(self) -> int:
        """Return how often a value must stand in train rows to come into its vocabulary."""
        return 1

    def with_values(self: F, path: Path, values: Iterable[pa.Array]) -> F:
        """Return the feature with values (strings, at least one) at the end of its vocabulary; they come to `path`."""
        raise NotImplementedError

    def parse(self, value: str) -> Any:
        """Return the canonical value of what a person typed. Raises ConfigError."""
        return value

    # ----- canonical → encoded

    @abstractmethod
    def arrow_type(self, *, large: bool = False) -> pa.DataType:
        """Return the Arrow type of encoded values; large: lists have offsets of 64 bits where they may need them."""

    @abstractmethod
    def encode(self, column: pa.Array, tokenizer: TextTokenizer | None, *, large: bool = False) -> pa.Array:
        """Return canonical values encoded, of the type `arrow_type`."""

    @property
    def raw_type(self) -> pa.DataType:
        """Return the Arrow type in shards whose texts are no tokens yet."""
        return self.arrow_type()

    def encode_raw(self, column: pa.Array) -> pa.Array:
        """Return canonical values as such shards have them."""
        return self.encode(column, None)

    def faults(self, column: Column, vocab_size: int) -> Iterator[Fault]:
        """Yield what is wrong with encoded values that were read back; `vocab_size` is the tokenizer's."""
        yield from ()

    def without_unknown(self, column: Column) -> Column:
        """Return encoded values in which codes outside the feature's vocabulary are out of vocabulary."""
        return column

    @property
    def max_length(self) -> int | None:
        """Return the length that lists are cut to, None where they are not, or are none."""
        return None

    @property
    def num_codes(self) -> int:
        """Return the rows that an embedding table of its codes needs, 0 where it has no table of its own."""
        return 0

    def matches(self, column: Column, operator: str, values: Sequence[str]) -> np.ndarray:
        """Return which encoded values fulfil a condition of a filter, bool [R]; `in` alone has several `values`.

        Raises ConfigError: the feature has no such condition, or a value is none of its.
        """
        raise ConfigError(f"filter: {self.name} is of type {self.type}, needs a categorical or numeric feature")

    def choices(self, column: Column) -> dict[str, Any] | None:
        """Return what people may choose from for a filter over these encoded values; None where there is nothing."""
        return None

    # ----- encoded → array

    def padding(self, pad_token_id: int) -> int | None:
        """Return what lists are padded with, None where every row is one value or vector."""
        return None

    def array(self, column: Column, pad_token_id: int) -> np.ndarray:
        """Return what a tensor is made of: int64 [R, T] for lists, else as `dtype`, [R] or [R, …]."""
        fill = self.padding(pad_token_id)
        if isinstance(column, Ragged):
            assert fill is not None
            return column.padded(fill)
        return np.asarray(column, np.int64)

    @abstractmethod
    def probe(self, random: np.random.RandomState, rows: int, docs: Mapping[str, Feature]) -> Column:
        """Return encoded values from its whole range, missing ones among them, to try a model on."""

    @abstractmethod
    def describe(self, vocab_size: int) -> str:
        """Return a phrase on what it was fitted to, for people."""

    @abstractmethod
    def display(self, values: np.ndarray, decoder: Decoder) -> Any:
        """Return one row's array as what people read."""


def code_faults(name: str, what: str, column: Column, low: int, high: int) -> Iterator[Fault]:
    """Yield the rows with a code outside [low, high)."""
    values = column.values if isinstance(column, Ragged) else column
    if outside(values, low, high):
        wrong = (values < low) | (values >= high)
        if isinstance(column, Ragged):
            wrong = np.isin(np.arange(len(column)), np.searchsorted(column.offsets, np.flatnonzero(wrong), "right") - 1)
        yield wrong, lambda row: f"{name} has a {what} outside the schema's {high}"


def outside(values: np.ndarray, low: int, high: int) -> bool:
    """Return whether any value is below `low` or not below `high`."""
    return bool(len(values)) and (int(values.min()) < low or int(values.max()) >= high)


def pad_lists(rows, fill):  # type: ignore[no-untyped-def]
    """Return rows of numbers side by side, int64 [rows, T]."""
    padded = np.full((len(rows), max(1, *map(len, rows), 1)), fill, np.int64)
    for row, numbers in enumerate(rows):
        padded[row, : len(numbers)] = numbers
    return padded


FEATURES: Registry[Feature] = Registry("a type", "type")
register = FEATURES.register


def from_dict(content: Mapping[str, Any]) -> Feature:
    """Return the feature of `Feature.to_dict`. Raises TypeError, KeyError, ValueError: it is none."""
    given: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in content.items() if key != "type"}
    feature = FEATURES.classes[content["type"]](**given)
    hints = get_type_hints(type(feature))
    for key, value in given.items():
        if not _fits(value, hints[key]):
            raise TypeError(f"{feature.name}.{key} is {value!r}, needs {hints[key]}")
    for key, got, needed in out_of_bounds(feature):
        raise ValueError(f"{feature.name}.{key} is {got!r}, needs {needed}")
    return feature


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value of JSON is of a field's declared type; types that JSON does not have are not looked at."""
    options = get_args(hint)
    if get_origin(hint) is Literal:
        return value in options
    if options and get_origin(hint) is not tuple:
        return any(_fits(value, option) for option in options)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    numbers = {int: int, float: int | float}
    return isinstance(value, numbers.get(hint, hint)) if isinstance(hint, type) else True


def filterable(features: Mapping[str, Feature]) -> dict[str, Feature]:
    """Return the features that filters can look at."""
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
    """Return some canonical values as a column."""
    return from_arrow(feature.encode(pa.array(values, feature.canonical_type), tokenizer))
