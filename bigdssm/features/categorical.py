"""Categorical features: values of an exact vocabulary or hashed into buckets, one or several per row."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdssm.errors import ConfigError
from bigdssm.features.base import (
    FIRST_CODE,
    FITTED,
    OUT_OF_VOCABULARY,
    PADDING,
    ColumnType,
    Decoder,
    Fault,
    Feature,
    code_faults,
    pad_lists,
    register,
)
from bigdssm.features.columns import RowCheck, is_empty, strings, value_lists
from bigdssm.features.ragged import Column, Ragged, rows_with, values_of
from bigdssm.features.tokenizer import TextTokenizer
from bigdssm.features.vocabulary import Vocabulary, write_part
from bigdssm.utils.components import bounded
from bigdssm.utils.hashing import hash_strings

UNKNOWN = "<out of vocabulary>"
# Limits of the search for a similar value: number of values of the vocabulary, and their length; within a second.
MAX_COMPARED, MAX_COMPARED_CHARACTERS = 5000, 80
MAX_CHOICES = 200  # values in the filter choices


def boolean_indices(vocabulary):  # type: ignore[no-untyped-def]
    """Return the index of every spelling of a boolean in a vocabulary of booleans, {} for other vocabularies.

    Spellings depend on the format of a table: Python's CSV has True, Parquet and JSON true, others 1.
    """
    spellings = {"true": 1, "True": 1, "TRUE": 1, "1": 1, "false": 0, "False": 0, "FALSE": 0, "0": 0}
    if len(vocabulary) > len(spellings) or not all(value in spellings for value in vocabulary):
        return {}
    first = {spellings[value]: index for index, value in reversed(list(enumerate(vocabulary)))}
    return {text: first[boolean] for text, boolean in spellings.items() if boolean in first}


def codes_of(feature, values):  # type: ignore[no-untyped-def]
    """Return the codes of strings."""
    if feature["hash_buckets"]:
        import xxhash

        hashes = [int(np.uint64(xxhash.xxh3_64_intdigest(value.encode())).view(np.int64)) for value in values]
        codes = [2 + hashed % feature["hash_buckets"] for hashed in hashes]
    else:
        vocabulary = feature["vocabulary"]
        indices = boolean_indices(vocabulary) | {value: index for index, value in enumerate(vocabulary)}
        codes = [2 + indices.get(value, -1) for value in values]
    trained = feature.get("trained")
    known = set(codes if trained is None else trained)
    return [(code if code in known else 1) if value else 0 for value, code in zip(values, codes, strict=True)]


def categorical_input(feature, values, exported):  # type: ignore[no-untyped-def]
    """Return codes, int64 [rows], or [rows, K] for lists."""
    if feature["multi"]:
        return pad_lists([codes_of(feature, value or []) for value in values], 0)
    return np.array(codes_of(feature, [value or "" for value in values]), np.int64)


@register
@dataclass(frozen=True)
class Categorical(Feature):
    """A category, or several. Vocabularies are append-only, so that codes and embedding tables stay valid."""

    type: ClassVar[str] = "categorical"
    onnx_code: ClassVar = (pad_lists, boolean_indices, codes_of, categorical_input)

    multi: bool = False  # several values in one cell, or a list
    separator: str = " "  # multi: separator of the values in a cell
    min_count: int = bounded(1, 1, 10**9)  # rarer values are out of vocabulary
    # Number of hash buckets; 0: an exact vocabulary. 2**62 buckets are ids without a vocabulary, in a sharded table.
    hash_buckets: int = bounded(0, 0, 2**62)
    vocabulary: Vocabulary = field(default=Vocabulary(), metadata=FITTED)
    # Of a document feature in a model: the codes with a positive training event; all others are unknown, hence out of
    # vocabulary. One bit per code, uint8; for hashes the codes, int64 ascending. None: all codes.
    trained: np.ndarray | None = field(default=None, compare=False, metadata=FITTED)

    def check(self, key: str, side: str, docs: Mapping[str, Feature]) -> None:
        """Raise ConfigError: multi without a separator."""
        if self.multi and not self.separator:
            raise ConfigError(f"{key}.separator: got '', needs the separator of the values in a cell")

    def to_dict(self) -> dict[str, Any]:
        """Return all fields except the vocabulary and the trained codes, which are in files."""
        return {key: value for key, value in super().to_dict().items() if key not in ("vocabulary", "trained")}

    def exported(self) -> dict[str, Any]:
        """Return all fields, the vocabulary and the known codes (None: all) as lists."""
        trained = self.trained
        if trained is not None and not self.hash_buckets:
            trained = np.flatnonzero(~self.unknown(np.arange(self.num_codes)))
        codes = None if trained is None else trained.tolist()
        return {**self.to_dict(), "vocabulary": list(self.vocabulary), "trained": codes}

    @property
    def example(self) -> str:  # type: ignore[override]
        """Return a value as JSON."""
        return '["a value"]' if self.multi else '"a value"'

    @property
    def canonical_type(self) -> pa.DataType:
        """Return large_string, or a list of it."""
        return pa.list_(pa.large_string()) if self.multi else pa.large_string()

    @property
    def missing(self) -> Any:
        """Return '' or no values."""
        return [] if self.multi else ""

    def read(self, check: RowCheck) -> pa.Array:
        """Return the trimmed values, null as ''; lists without empty values."""
        return value_lists(check, self.source, self.separator) if self.multi else strings(check, self.source)

    def is_missing(self, column: pa.Array) -> np.ndarray:
        """Return the mask of rows without a value, bool [R]."""
        if not self.multi:
            return super().is_missing(column)
        return cast(np.ndarray, pc.list_value_length(column).to_numpy() == 0)

    def vocabulary_values(self, column: pa.Array) -> tuple[pa.Array, np.ndarray] | None:
        """Return the values outside the vocabulary and their rows, int64; None for hashed values."""
        if self.hash_buckets:
            return None
        rows = np.arange(len(column))
        if self.multi:
            column, rows = column.flatten(), np.repeat(rows, pc.list_value_length(column).to_numpy())
        new = self.codes(column.cast(pa.string())) == OUT_OF_VOCABULARY
        column, rows = column.filter(pa.array(new)), rows[new]
        if self.multi:  # a value that is repeated in a row counts once
            pairs = pa.table({"row": rows, "value": column}).group_by(["row", "value"], use_threads=False).aggregate([])
            column, rows = pairs.column("value").combine_chunks(), pairs.column("row").to_numpy()
        return column, rows

    @property
    def vocabulary_min_count(self) -> int:
        """Return `min_count`."""
        return self.min_count

    def with_values(self, path: Path, values: Iterable[pa.Array]) -> "Categorical":
        """Return the feature with values (strings, at least one) appended to its vocabulary, written to `path`."""
        num_existing, batches = len(self.vocabulary), iter(values)
        new = next(batches).to_pylist()
        indices = boolean_indices([*self.vocabulary.cut(8), *new])  # 8 spellings
        new = [value for index, value in enumerate(new, num_existing) if indices.get(value, index) == index]
        part = write_part(path, [pa.array(new, pa.large_string()), *batches], first=num_existing)
        return replace(self, vocabulary=self.vocabulary.with_file(part))

    def parse(self, value: str) -> Any:
        """Return the value, or the values split at the separator."""
        if not self.multi:
            return value.strip()
        parts = [part.strip() for part in value.split(None if self.separator == " " else self.separator)]
        return [part for part in parts if part]

    def arrow_type(self, *, large: bool = False) -> pa.DataType:
        """Return int32 codes; int64 if there are more than int32 can hold."""
        codes = pa.from_numpy_dtype(code_type(self.num_codes))
        return pa.list_(codes) if self.multi else codes

    def encode(self, column: pa.Array, tokenizer: TextTokenizer | None, *, large: bool = False) -> pa.Array:
        """Return the codes of values."""
        if not self.multi:
            return pa.array(self.codes(column))
        codes = self.codes(column.flatten())
        offsets = np.concatenate([[0], np.cumsum(pc.list_value_length(column).to_numpy())]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(codes))

    def codes(self, values: pa.Array) -> np.ndarray:
        """Return the codes of single values (strings; null or '' is missing), see `code_type`."""
        values = pc.fill_null(values, "")
        if self.hash_buckets:
            codes: np.ndarray = (FIRST_CODE + hash_strings(values) % self.hash_buckets).astype(
                code_type(self.num_codes)
            )
        else:
            indices = self.vocabulary.codes(values)
            for text, index in boolean_indices(self.vocabulary).items():
                indices[(indices < 0) & pc.equal(values, text).to_numpy(zero_copy_only=False)] = index
            codes = np.where(indices < 0, np.int32(OUT_OF_VOCABULARY), indices + np.int32(FIRST_CODE))
        if self.trained is not None:
            codes[self.unknown(codes)] = OUT_OF_VOCABULARY
        codes[is_empty(values)] = PADDING
        return codes

    def unknown(self, codes: np.ndarray) -> np.ndarray:
        """Return the mask of codes that are beyond the vocabulary, or have no positive training event."""
        beyond: np.ndarray = codes >= self.num_codes
        if self.trained is None:
            return beyond
        if self.hash_buckets:
            index = np.minimum(np.searchsorted(self.trained, codes), len(self.trained) - 1)
            return beyond | (self.trained[index] != codes)
        index = np.where(beyond, 0, codes)
        return beyond | (self.trained[index >> 3] >> (index & 7) & 1 == 0)

    def with_trained(self, codes: np.ndarray, earlier: "Categorical | None") -> "Categorical":
        """Return the feature in which all codes are unknown except `codes` and those known in `earlier`."""
        if self.hash_buckets:
            before = np.arange(FIRST_CODE) if earlier is None else earlier.trained
            trained_codes = None if before is None else np.union1d(np.append(before, np.arange(FIRST_CODE)), codes)
            return replace(self, trained=trained_codes)
        is_trained = np.zeros(self.num_codes, bool)
        is_trained[:FIRST_CODE] = is_trained[codes] = True
        if earlier is not None:
            is_trained |= ~earlier.unknown(np.arange(self.num_codes))
        return replace(self, trained=None if is_trained.all() else np.packbits(is_trained, bitorder="little"))

    def newly_trained(self, earlier: "Categorical") -> np.ndarray:
        """Return the codes, int64 ascending, that are unknown in `earlier` and known here."""
        if self.hash_buckets:
            codes = np.empty(0, np.int64) if self.trained is None else self.trained
        else:
            codes = np.arange(self.num_codes)
        return codes[earlier.unknown(codes) & ~self.unknown(codes)]

    def without_unknown(self, column: Column) -> Column:
        """Replace unknown codes by OUT_OF_VOCABULARY."""
        values = values_of(column)
        unknown = self.unknown(values)
        if not unknown.any():
            return column
        replaced = np.where(unknown, OUT_OF_VOCABULARY, values).astype(values.dtype)
        return replace(column, values=replaced) if isinstance(column, Ragged) else replaced

    def faults(self, column: Column, vocab_size: int) -> Iterator[Fault]:
        """Yield unknown codes."""
        yield from code_faults(self.name, "code", column, 0, self.num_codes)

    def operands(self, operator: str, values: Sequence[str]) -> tuple[str, ...]:
        """Return the values as in the vocabulary. Raises ConfigError: an unknown value, or another operator."""
        if operator not in ("=", "!=", "in", "not in"):
            raise ConfigError(f"{self.name} {operator}: {self.name} is categorical, needs =, !=, in or not in")
        if self.hash_buckets:
            raise ConfigError(f"{self.name} is hashed: its values cannot be distinguished")
        codes = self.codes(pa.array(values, pa.string()))
        if (unknown := codes == OUT_OF_VOCABULARY).any():
            value = values[int(np.argmax(unknown))]
            short = [other for other in self.vocabulary.cut(MAX_COMPARED) if len(other) <= MAX_COMPARED_CHARACTERS]
            near = difflib.get_close_matches(value[:MAX_COMPARED_CHARACTERS], short, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{self.name} has no value {value[:80]!r}", details=hint)
        return tuple(sorted({self.vocabulary[code - FIRST_CODE] for code in codes[codes != PADDING].tolist()}))

    def matches(self, column: Column, operator: str, operands: Sequence[str] | Sequence[float]) -> np.ndarray:
        """Return the mask of rows with one of the values, or for != and `not in` with others alone, bool [R]."""
        values = values_of(column)
        is_match = rows_with(np.isin(values, self.codes(pa.array(operands, pa.string()))), column)
        return is_match if operator in ("=", "in") else rows_with(values != PADDING, column) & ~is_match

    def choices(self, column: Column) -> dict[str, Any] | None:
        """Return the existing values, most frequent first; None if each occurs once, as keys do."""
        if self.hash_buckets:
            return None
        counts = np.bincount(values_of(column))[FIRST_CODE:]
        if counts.max(initial=0) < 2:
            return None
        most = np.argsort(-counts, kind="stable")[:MAX_CHOICES]
        return {"values": [self.vocabulary[code] for code in most[counts[most] > 0].tolist()]}

    @property
    def column_type(self) -> ColumnType | None:
        """Return a category, or categories; none for hashed values."""
        return None if self.hash_buckets else "categories" if self.multi else "category"

    def column_values(self, column: Column) -> list[Any]:
        """Return the values; values out of vocabulary are UNKNOWN."""
        codes = values_of(column)
        value_of: dict[int, str | None] = {PADDING: None, OUT_OF_VOCABULARY: UNKNOWN}
        value_of |= {
            code: self.vocabulary[code - FIRST_CODE] for code in np.unique(codes[codes >= FIRST_CODE]).tolist()
        }
        values = [value_of[code] for code in codes.tolist()]
        if not isinstance(column, Ragged):
            return values
        rows = pairwise(column.offsets.tolist())
        return [[value for value in values[first:last] if value is not None] or None for first, last in rows]

    @property
    def num_codes(self) -> int:
        """Return the number of rows of the embedding table."""
        return FIRST_CODE + (self.hash_buckets or len(self.vocabulary))

    @property
    def padding(self) -> int | None:
        """Return 0 for lists of values."""
        return PADDING if self.multi else None

    def probe(self, random: np.random.RandomState, rows: int, docs: Mapping[str, Feature]) -> Column:
        """Return random codes."""
        if not self.multi:
            return random.randint(0, self.num_codes, rows).astype(code_type(self.num_codes))
        return lists_of_codes(random, rows, 4, self.num_codes)

    def describe(self, vocab_size: int) -> str:
        """Return the number of values."""
        several = ", several per row" if self.multi else ""
        return (
            f"{self.hash_buckets:,} buckets{several}"
            if self.hash_buckets
            else f"{len(self.vocabulary):,} values{several}"
        )

    def display(self, values: np.ndarray, decoder: Decoder) -> Any:
        """Return the value or values; for hashed values the bucket."""
        names = [
            UNKNOWN
            if code == OUT_OF_VOCABULARY
            else f"<bucket {code - FIRST_CODE}>"
            if self.hash_buckets
            else self.vocabulary[code - FIRST_CODE]
            for code in np.atleast_1d(values).tolist()
            if code != PADDING
        ]
        return names if self.multi else (names[0] if names else None)


def categorical_of(features: Mapping[str, Feature]) -> dict[str, Categorical]:
    """Return the categorical features."""
    return {name: feature for name, feature in features.items() if isinstance(feature, Categorical)}


def lists_of_codes(random: np.random.RandomState, rows: int, longest: int, num_codes: int) -> Ragged:
    """Return rows of 0 to `longest` random codes."""
    lengths = np.linspace(0, longest, rows).astype(int)
    return Ragged.of_lists([random.randint(1, num_codes, length) for length in lengths], code_type(num_codes))


def code_type(num_codes: int) -> type:
    """Return the NumPy type of the codes of a feature: int32, and int64 for more codes than it holds."""
    return np.int32 if num_codes <= np.iinfo(np.int32).max else np.int64
