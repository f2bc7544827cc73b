"""The fitted schema of a dataset: every feature with its vocabulary or normalisation, saved beside data and models.

schema.json has all but the vocabularies' values, and names the files in vocabularies/ beside it that have these. What
is declared of a feature, and what was fitted, its type says: see `bigdssm.features`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bigdssm.config import DataConfig
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Feature, texts_of
from bigdssm.features.base import from_dict
from bigdssm.features.categorical import Categorical, categorical_of
from bigdssm.features.vocabulary import PartFile, Vocabulary

SCHEMA_FILE, VOCABULARIES, SIAMESE = "schema.json", "vocabularies", "siamese"
FORMAT = 1


@dataclass(frozen=True)
class Schema:
    """The features of queries and documents, by name, in the order in which towers concatenate them."""

    query: dict[str, Feature] = field(default_factory=dict)
    doc: dict[str, Feature] = field(default_factory=dict)
    title: str | None = None
    siamese: bool = False  # queries are documents, see config.DataConfig

    @classmethod
    def declared(cls, config: DataConfig) -> Schema:
        """Return the schema as `config` declares it, not fitted yet."""
        return cls(
            query={name: feature.named(name) for name, feature in config.query.items()},
            doc={name: feature.named(name) for name, feature in config.doc.items()},
            title=config.title,
            siamese=config.siamese,
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
        """Return a hash of everything in the schema, however its vocabularies are cut into files."""
        return hashlib.sha256(json.dumps(self._to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def vocabulary_sizes(self) -> dict[str, dict[str, int]]:
        """Return the length of every vocabulary, by side and feature name."""
        return {
            side: {name: len(f.vocabulary) for name, f in categorical_of(features).items() if f.vocabulary}
            for side, features in self.sides.items()
        }

    @property
    def vocabulary_files(self) -> list[PartFile]:
        """Return the files of all vocabularies; of a schema that was loaded or saved."""
        return [file for _, _, feature in self._vocabularies() for file in feature.vocabulary.files]

    def cut(self, sizes: dict[str, dict[str, int]]) -> Schema:
        """Return the schema with every vocabulary cut to the first so many values (0 where `sizes` has no entry)."""

        return self._with_vocabularies(lambda side, name, known: known.cut(sizes.get(side, {}).get(name, 0)))

    def difference(self, other: Schema) -> str | None:
        """Return a phrase that names the first difference from `other` (declaration, not vocabulary), or None."""
        if self.siamese != other.siamese:
            return f"siamese={self.siamese} against {other.siamese}"
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

    def save(self, folder: Path) -> Schema:
        """Write `schema.json` and the vocabularies' files into `folder`, and return the schema that maps these.

        Files of vocabularies that are in another folder are linked or copied. Raises OSError, which names the file.
        """
        saved = self._with_vocabularies(
            lambda side, name, known: known.saved(folder / VOCABULARIES, quote(f"{side}.{name}", safe=""))
        )
        text = json.dumps(saved._to_dict(files=True), ensure_ascii=False, indent=1)
        (folder / SCHEMA_FILE).write_text(text + "\n", encoding="utf-8")
        return saved

    @classmethod
    def load(cls, folder: Path) -> Schema:
        """Read `schema.json` from `folder`, and map the vocabularies' files.

        Raises DataError: one of them is missing, unreadable or not as long as it should be. What the bytes are, is the
        checksums' to say.
        """
        path = folder / SCHEMA_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if (found := content.get("format")) != FORMAT:
                raise DataError(f"{path} has format {found}, this version reads format {FORMAT}; make it again")
            sides = {side: {name: from_dict(f) for name, f in content[side].items()} for side in ("query", "doc")}
            for side, features in sides.items():
                for name, feature in features.items():
                    feature.check(f"{side}.{name}", side, sides["doc"])
            described = content[VOCABULARIES]
            schema = cls(**sides, title=content["title"], siamese=content.get(SIAMESE, False))._with_vocabularies(
                lambda side, name, _: _opened(folder, described.get(side, {}).get(name, {}).get("files", []))
            )
            if schema._to_dict(files=True)[VOCABULARIES] != described:
                raise DataError(f"{folder / VOCABULARIES} is not what {path} was written with; copy both again")
            return schema
        except ConfigError as error:
            raise DataError(f"{path} is damaged: {error}") from None
        except FileNotFoundError:
            raise DataError(f"{path} does not exist; {folder} is no dataset or model folder of this project") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path} is damaged or of another version: {error!r}") from None

    def exported(self) -> dict[str, Any]:
        """Return all of it as plain containers, vocabularies as lists, for whoever reads it without this project."""
        sides = {side: {name: f.exported() for name, f in features.items()} for side, features in self.sides.items()}
        return {**sides, "title": self.title}

    def _to_dict(self, *, files: bool = False) -> dict[str, Any]:
        sides = {side: {name: f.to_dict() for name, f in features.items()} for side, features in self.sides.items()}
        vocabularies: dict[str, dict[str, Any]] = {side: {} for side in sides}
        for side, name, feature in self._vocabularies():
            known = feature.vocabulary
            vocabularies[side][name] = {"values": len(known), "checksum": known.checksum}
            if files:
                vocabularies[side][name]["files"] = [
                    {"file": f"{VOCABULARIES}/{part.path.name}", "rows": part.rows, "checksum": part.checksum}
                    for part in known.files
                ]
        siamese = {SIAMESE: True} if self.siamese else {}  # the usual schema is written, and hashed, without
        return {"format": FORMAT, **sides, "title": self.title, **siamese, VOCABULARIES: vocabularies}

    def _vocabularies(self) -> list[tuple[str, str, Categorical]]:
        """Return side, name and feature where there is a vocabulary."""
        sides = self.sides.items()
        return [(side, name, f) for side, every in sides for name, f in categorical_of(every).items() if f.vocabulary]

    def _with_vocabularies(self, change: Callable[[str, str, Vocabulary], Vocabulary]) -> Schema:
        """Return the schema with every vocabulary as `change` makes it of side, name and what it is."""
        sides = {
            side: features
            | {n: replace(f, vocabulary=change(side, n, f.vocabulary)) for n, f in categorical_of(features).items()}
            for side, features in self.sides.items()
        }
        return replace(self, query=sides["query"], doc=sides["doc"])


def vocabulary_checksums(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the checksum of each of the vocabularies' files that schema.json names, by its path in the folder.

    Raises KeyError, TypeError, AttributeError: `content` is not that of such a file.
    """
    described = [one for side in content[VOCABULARIES].values() for one in side.values()]
    return {part["file"]: part["checksum"] for one in described for part in one["files"]}


def _opened(folder: Path, files: list[dict[str, Any]]) -> Vocabulary:
    for place in (Path(part["file"]) for part in files):
        if place.parts != (VOCABULARIES, place.name) or place.name.startswith("."):
            raise DataError(f"{folder}/{SCHEMA_FILE} names a file {str(place)!r}, not one in {VOCABULARIES}/; refused")
    return Vocabulary.open([PartFile(folder / part["file"], part["rows"], part["checksum"]) for part in files])
