"""The fitted schema of a dataset: every feature with its vocabulary or normalisation, saved beside data and models.

Codes of categorical features (and of history items, which are codes of a document feature): 0 is padding or a
missing value, 1 any value out of the vocabulary, 2 and on the vocabulary in its order (or the hash buckets).
A vocabulary only ever grows at its end, so that codes, and the rows of embedding tables, keep their meaning.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from bigdssm.config import DataConfig, FeatureConfig, FeatureType
from bigdssm.errors import DataError

PADDING, OUT_OF_VOCABULARY, FIRST_CODE = 0, 1, 2
SCHEMA_FILE = "schema.json"


def hash64(text: str) -> int:
    """Return the 64-bit signed hash of `text` that identifies documents and queries everywhere (xxh3)."""
    return int(np.int64(np.uint64(xxhash.xxh3_64_intdigest(text.encode()))))


@dataclass(frozen=True)
class Feature:
    """One fitted feature."""

    name: str
    type: FeatureType
    column: str
    max_tokens: int = 64
    multi: bool = False
    separator: str = " "
    hash_buckets: int = 0
    log: bool = False
    of: str | None = None
    max_items: int = 50
    vocabulary: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def declared(cls, name: str, config: FeatureConfig) -> Feature:
        """Return the feature as `config` declares it, not fitted yet."""
        shared = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in ("column", "min_count")}
        return cls(name=name, column=config.column or name, **shared)

    @property
    def num_codes(self) -> int:
        """Return the rows that an embedding table of this categorical feature needs."""
        return FIRST_CODE + (self.hash_buckets or len(self.vocabulary))

    @cached_property
    def _value_set(self) -> pa.Array:
        return pa.array(self.vocabulary, pa.string())

    def encode(self, values: pa.Array | Sequence[str | None]) -> np.ndarray:
        """Return the int32 codes of single `values` (strings; null or '' is missing)."""
        array = values if isinstance(values, pa.Array) else pa.array(values, pa.string())
        missing = pc.fill_null(pc.equal(array, ""), True).to_numpy(zero_copy_only=False)
        if self.hash_buckets:
            hashed = [FIRST_CODE + hash64(value or "") % self.hash_buckets for value in array.to_pylist()]
            codes = np.array(hashed, np.int32)
        else:
            found = pc.fill_null(pc.index_in(array, value_set=self._value_set), -1).to_numpy(zero_copy_only=False)
            codes = np.where(found < 0, OUT_OF_VOCABULARY, found + FIRST_CODE).astype(np.int32)
        codes[missing] = PADDING
        return codes


@dataclass(frozen=True)
class Schema:
    """The features of queries and documents, by name, in the order in which towers concatenate them."""

    query: dict[str, Feature] = field(default_factory=dict)
    doc: dict[str, Feature] = field(default_factory=dict)
    display: str | None = None

    @classmethod
    def declared(cls, config: DataConfig) -> Schema:
        """Return the schema as `config` declares it, not fitted yet."""
        return cls(
            query={name: Feature.declared(name, feature) for name, feature in config.query.items()},
            doc={name: Feature.declared(name, feature) for name, feature in config.doc.items()},
            display=config.display,
        )

    @property
    def has_text(self) -> bool:
        """Return True where any feature is text."""
        return any(feature.type == "text" for feature in (*self.query.values(), *self.doc.values()))

    def fingerprint(self) -> str:
        """Return a hash of everything in the schema."""
        return hashlib.sha256(json.dumps(self._to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def vocabulary_sizes(self) -> dict[str, dict[str, int]]:
        """Return the length of every vocabulary, by side and feature name."""
        sides = {"query": self.query, "doc": self.doc}
        return {
            side: {name: len(feature.vocabulary) for name, feature in features.items() if feature.vocabulary}
            for side, features in sides.items()
        }

    def cut(self, sizes: dict[str, dict[str, int]]) -> Schema:
        """Return the schema with every vocabulary cut to the first so many values (0 where `sizes` has no entry)."""

        def side(name: str, features: dict[str, Feature]) -> dict[str, Feature]:
            sized = sizes.get(name, {})
            return {n: replace(f, vocabulary=f.vocabulary[: sized.get(n, 0)]) for n, f in features.items()}

        return replace(self, query=side("query", self.query), doc=side("doc", self.doc))

    def difference(self, other: Schema) -> str | None:
        """Return a phrase that names the first difference from `other` (declaration, not vocabulary), or None."""
        for side in ("query", "doc"):
            mine, theirs = getattr(self, side), getattr(other, side)
            if list(mine) != list(theirs):
                return f"{side} features {list(mine)} against {list(theirs)}"
            for name in mine:
                a, b = (asdict(replace(f, vocabulary=(), mean=0.0, std=1.0)) for f in (mine[name], theirs[name]))
                for key in a:
                    if a[key] != b[key]:
                        return f"{side}.{name}.{key}={a[key]!r} against {b[key]!r}"
        return None

    def save(self, folder: Path) -> None:
        """Write `schema.json` into `folder`."""
        text = json.dumps(self._to_dict(), ensure_ascii=False, indent=1)
        (folder / SCHEMA_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Schema:
        """Read `schema.json` from `folder`. Raises DataError where it is missing or unreadable."""
        path = folder / SCHEMA_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            sides = {
                side: {name: _feature(value) for name, value in content[side].items()} for side in ("query", "doc")
            }
            return cls(**sides, display=content["display"])
        except FileNotFoundError:
            raise DataError(f"{path} does not exist; {folder} is no dataset or model folder of this project") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged or of another version: {error!r}") from None

    def _to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _feature(value: dict[str, Any]) -> Feature:
    return Feature(**{**value, "vocabulary": tuple(value["vocabulary"])})
