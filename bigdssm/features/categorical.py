"""Categories: values of an exact vocabulary or hashed into buckets, one a row or several."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdssm.errors import ConfigError
from bigdssm.features.base import (
    FIRST_CODE,
    FITTED,
    OUT_OF_VOCABULARY,
    PADDING,
    Decoder,
    Fault,
    Feature,
    code_faults,
    outside,
    pad_lists,
    register,
)
from bigdssm.features.columns import RowCheck, is_empty, strings, value_lists
from bigdssm.features.ragged import Column, Ragged
from bigdssm.features.tokenizer import TextTokenizer
from bigdssm.features.vocabulary import Vocabulary, write_part
from bigdssm.utils.bounds import bounded
from bigdssm.utils.string_hashing import hash_strings

UNKNOWN = "<out of vocabulary>"
# A mistyped value is compared with so many of the vocabulary, none longer than so many characters: within a second.
MOST_COMPARED, COMPARED_CHARACTERS = 5000, 80
MOST_CHOICES = 200  # values that people are shown to choose from


def codes_of(feature, values):  # type: ignore[no-untyped-def]
    """Return the codes of strings."""
    if feature["hash_buckets"]:
        import xxhash

        hashes = [int(np.uint64(xxhash.xxh3_64_intdigest(value.encode())).view(np.int64)) for value in values]
        return [
            2 + hashed % feature["hash_buckets"] if value else 0 for value, hashed in zip(values, hashes, strict=True)
        ]
    known = {value: number for number, value in enumerate(feature["vocabulary"], start=2)}
    return [known.get(value, 1) if value else 0 for value in values]


def categorical_input(feature, values, exported):  # type: ignore[no-untyped-def]
    """Return codes, int64 [rows], or [rows, K] of lists."""
    if feature["multi"]:
        return pad_lists([codes_of(feature, value or []) for value in values], 0)
    return np.array(codes_of(feature, [value or "" for value in values]), np.int64)


@register
@dataclass(frozen=True)
class Categorical(Feature):
    """A category, or several. A vocabulary only ever grows at its end, so that codes and tables keep their meaning."""

    type: ClassVar[str] = "categorical"
    onnx_code: ClassVar = (pad_lists, codes_of, categorical_input)

    multi: bool = False  # several values in one cell, or a list
    separator: str = " "  # multi: what parts the values in a cell
    min_count: int = bounded(1, 1, 10**9)  # rarer values become out-of-vocabulary
    hash_buckets: int = bounded(0, 0, 2**30)  # 0 keeps an exact vocabulary, else values are hashed into this many
    vocabulary: Vocabulary = field(default=Vocabulary(), metadata=FITTED)

    def check(self, key: str, side: str, docs: Mapping[str, Feature]) -> None:
        """Raise ConfigError on several values that nothing parts."""
        if self.multi and not self.separator:
            raise ConfigError(f"{key}.separator: got '', needs what parts the values in a cell")

    def to_dict(self) -> dict[str, Any]:
        """Return all but the vocabulary, which is in files."""
        return {key: value for key, value in super().to_dict().items() if key != "vocabulary"}

    def exported(self) -> dict[str, Any]:
        """Return all, the vocabulary as a list."""
        return {**self.to_dict(), "vocabulary": list(self.vocabulary)}

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
        """Return the values without the blanks around them, null as ''; lists without empty values."""
        return value_lists(check, self.source, self.separator) if self.multi else strings(check, self.source)

    def is_missing(self, column: pa.Array) -> np.ndarray:
        """Return which rows have no value, bool [R]."""
        if not self.multi:
            return super().is_missing(column)
        empty: np.ndarray = pc.list_value_length(column).to_numpy() == 0
        return empty

    def vocabulary_values(self, column: pa.Array) -> tuple[pa.Array, np.ndarray] | None:
        """Return the values that are not in the vocabulary, where there is one, and the row of each, int64."""
        if self.hash_buckets:
            return None
        rows = np.arange(len(column))
        if self.multi:
            column, rows = column.flatten(), np.repeat(rows, pc.list_value_length(column).to_numpy())
        new = self.codes(column.cast(pa.string())) == OUT_OF_VOCABULARY
        return column.filter(pa.array(new)), rows[new]

    @property
    def vocabulary_min_count(self) -> int:
        """Return how often a value must stand in train rows to come into its vocabulary."""
        return self.min_count

    def with_values(self, path: Path, values: Iterable[pa.Array]) -> Categorical:
        """Return the feature with values (strings, at least one) at the end of its vocabulary; they come to `path`."""
        part = write_part(path, values, first=len(self.vocabulary))
        return replace(self, vocabulary=self.vocabulary.with_file(part))

    def parse(self, value: str) -> Any:
        """Return the value, or those that the separator parts."""
        if not self.multi:
            return value.strip()
        parts = [part.strip() for part in value.split(None if self.separator == " " else self.separator)]
        return [part for part in parts if part]

    def arrow_type(self, *, large: bool = False) -> pa.DataType:
        """Return int32 codes."""
        return pa.list_(pa.int32()) if self.multi else pa.int32()

    def encode(self, column: pa.Array, tokenizer: TextTokenizer | None, *, large: bool = False) -> pa.Array:
        """Return the codes of values."""
        if not self.multi:
            return pa.array(self.codes(column))
        codes = self.codes(column.flatten())
        offsets = np.concatenate([[0], np.cumsum(pc.list_value_length(column).to_numpy())]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(codes))

    def codes(self, values: pa.Array) -> np.ndarray:
        """Return the int32 codes of single values (strings; null or '' is missing)."""
        values = pc.fill_null(values, "")
        if self.hash_buckets:
            codes = (FIRST_CODE + hash_strings(values) % self.hash_buckets).astype(np.int32)
        else:
            found = self.vocabulary.codes(values)
            codes = np.where(found < 0, np.int32(OUT_OF_VOCABULARY), found + np.int32(FIRST_CODE))
        codes[is_empty(values)] = PADDING
        return codes

    def without_unknown(self, column: Column) -> Column:
        """Return codes of which those that a later vocabulary added are out of vocabulary."""
        values = column.values if isinstance(column, Ragged) else np.asarray(column)
        if not outside(values, 0, self.num_codes):
            return column
        known = np.where(values < self.num_codes, values, OUT_OF_VOCABULARY).astype(values.dtype)
        return replace(column, values=known) if isinstance(column, Ragged) else known

    def faults(self, column: Column, vocab_size: int) -> Iterator[Fault]:
        """Yield unknown codes."""
        yield from code_faults(self.name, "code", column, 0, self.num_codes)

    def matches(self, column: Column, operator: str, values: Sequence[str]) -> np.ndarray:
        """Return which rows have one of the values, bool [R]. Raises ConfigError: one that the vocabulary has not."""
        if operator not in ("=", "in"):
            raise ConfigError(f"filter: {self.name} {operator}: {self.name} is categorical, needs = or in")
        if self.hash_buckets:
            raise ConfigError(f"filter: {self.name} is hashed, so that its values cannot be told apart")
        codes = self.codes(pa.array(values, pa.string()))
        if (unknown := codes == OUT_OF_VOCABULARY).any():
            value = values[int(np.argmax(unknown))]
            short = [known for known in self.vocabulary.cut(MOST_COMPARED) if len(known) <= COMPARED_CHARACTERS]
            near = difflib.get_close_matches(value[:COMPARED_CHARACTERS], short, 1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"filter: no document is known by {self.name} = {value[:80]!r}{meant}")
        if not isinstance(column, Ragged):
            return np.isin(column, codes)
        found = np.zeros(len(column), bool)
        found[np.searchsorted(column.offsets, np.flatnonzero(np.isin(column.values, codes)), "right") - 1] = True
        return found

    def choices(self, column: Column) -> dict[str, Any] | None:
        """Return the values that are there, the most frequent first; None where each stands once, as keys do."""
        counts = np.bincount(column.values if isinstance(column, Ragged) else np.asarray(column))[FIRST_CODE:]
        if self.hash_buckets or counts.max(initial=0) < 2:
            return None
        most = np.argsort(-counts, kind="stable")[:MOST_CHOICES]
        return {"values": [self.vocabulary[code] for code in most[counts[most] > 0].tolist()]}

    @property
    def num_codes(self) -> int:
        """Return the rows that an embedding table needs."""
        return FIRST_CODE + (self.hash_buckets or len(self.vocabulary))

    def padding(self, pad_token_id: int) -> int | None:
        """Return 0 where there are several values."""
        return PADDING if self.multi else None

    def probe(self, random: np.random.RandomState, rows: int, docs: Mapping[str, Feature]) -> Column:
        """Return codes of all kinds."""
        if not self.multi:
            return random.randint(0, self.num_codes, rows).astype(np.int32)
        return lists_of_codes(random, rows, 4, self.num_codes)

    def describe(self, vocab_size: int) -> str:
        """Return how many values there are."""
        several = ", several at once" if self.multi else ""
        return (
            f"{self.hash_buckets:,} buckets{several}"
            if self.hash_buckets
            else f"{len(self.vocabulary):,} values{several}"
        )

    def display(self, values: np.ndarray, decoder: Decoder) -> Any:
        """Return the value or values; a hashed one is shown as its bucket."""
        names = [self._value(code) for code in np.atleast_1d(values).tolist() if code != PADDING]
        return names if self.multi else (names[0] if names else None)

    def _value(self, code: int) -> str:
        if code == OUT_OF_VOCABULARY:
            return UNKNOWN
        return f"<bucket {code - FIRST_CODE}>" if self.hash_buckets else self.vocabulary[code - FIRST_CODE]


def categorical_of(features: Mapping[str, Feature]) -> dict[str, Categorical]:
    """Return the features that are categories."""
    return {name: feature for name, feature in features.items() if isinstance(feature, Categorical)}


def lists_of_codes(random: np.random.RandomState, rows: int, longest: int, num_codes: int) -> Ragged:
    """Return rows of random codes, from none to `longest` a row."""
    lengths = np.linspace(0, longest, rows).astype(int)
    return Ragged.of_lists([random.randint(1, num_codes, length).tolist() for length in lengths])
