"""The fitted schema of a dataset: every feature with its vocabulary or normalisation, saved beside data and models.

What is declared of a feature, and what was fitted, its type says: see `bigdssm.features`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bigdssm.config import DataConfig
from bigdssm.errors import DataError
from bigdssm.features import Feature, texts_of
from bigdssm.features.base import from_dict
from bigdssm.features.categorical import categorical_of

SCHEMA_FILE = "schema.json"
FORMAT = 2  # 1 gave every feature the fields of all types


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
            query={name: feature.named(name) for name, feature in config.query.items()},
            doc={name: feature.named(name) for name, feature in config.doc.items()},
            display=config.display,
        )

    @property
    def sides(self) -> dict[str, dict[str, Feature]]:
        """Return the features of both sides, by side."""
        return {"query": self.query, "doc": self.doc}

    @property
    def has_text(self) -> bool:
        """Return True where any feature is text."""
        return bool(texts_of(self.query) or texts_of(self.doc))

    def fingerprint(self) -> str:
        """Return a hash of everything in the schema."""
        return hashlib.sha256(json.dumps(self._to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def vocabulary_sizes(self) -> dict[str, dict[str, int]]:
        """Return the length of every vocabulary, by side and feature name."""
        return {
            side: {name: len(f.vocabulary) for name, f in categorical_of(features).items() if f.vocabulary}
            for side, features in self.sides.items()
        }

    def cut(self, sizes: dict[str, dict[str, int]]) -> Schema:
        """Return the schema with every vocabulary cut to the first so many values (0 where `sizes` has no entry)."""

        def side(name: str, features: dict[str, Feature]) -> dict[str, Feature]:
            sized = sizes.get(name, {})
            known = categorical_of(features).items()
            return features | {n: replace(f, vocabulary=f.vocabulary[: sized.get(n, 0)]) for n, f in known}

        return replace(self, query=side("query", self.query), doc=side("doc", self.doc))

    def difference(self, other: Schema) -> str | None:
        """Return a phrase that names the first difference from `other` (declaration, not vocabulary), or None."""
        for side, mine in self.sides.items():
            theirs = other.sides[side]
            if list(mine) != list(theirs):
                return f"{side} features {list(mine)} against {list(theirs)}"
            for name in mine:
                a, b = mine[name].declaration(), theirs[name].declaration()
                for key in a:
                    if a[key] != b.get(key):
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
            if (found := content.get("format", 1)) != FORMAT:
                raise DataError(f"{path} has format {found}, this version reads format {FORMAT}; make it again")
            sides = {side: {name: from_dict(f) for name, f in content[side].items()} for side in ("query", "doc")}
            return cls(**sides, display=content["display"])
        except FileNotFoundError:
            raise DataError(f"{path} does not exist; {folder} is no dataset or model folder of this project") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged or of another version: {error!r}") from None

    def _to_dict(self) -> dict[str, Any]:
        sides = {side: {name: f.to_dict() for name, f in features.items()} for side, features in self.sides.items()}
        return {"format": FORMAT, **sides, "display": self.display}
