"""The fitted schema of a dataset: features with their vocabularies and normalization.

It is saved with datasets and models. schema.json contains everything but the vocabularies' values, which are in files
in vocabularies/ next to it. The declared and fitted fields of each feature type are defined in `bigdssm.features`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from bigdssm.config import DataConfig
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Feature, texts_of
from bigdssm.features.base import from_dict
from bigdssm.features.categorical import FIRST_CODE, Categorical, categorical_of
from bigdssm.features.vocabulary import PartFile, Vocabulary

SCHEMA_FILE, VOCABULARIES, REQUEST = "schema.json", "vocabularies", "request"
# Fields that are in files only if they are not the default, so that fingerprints stay the same.
OPTIONS = ("siamese", REQUEST, "ties", "empty_histories")
FORMAT, EVENT_FORMAT = 1, 2  # of schema.json and dataset.json; the second: events have features
TRAINED = "trained"  # folder of the codes with a positive training event, by document feature, of a model
NO_CODES = np.zeros(0, np.int64)
QUARANTINE_FILE = "quarantine.jsonl"  # the bad rows of a dataset


@dataclass(frozen=True)
class Schema:
    """The features of queries and documents by name, in order of concatenation in towers."""

    query: dict[str, Feature] = field(default_factory=dict)
    doc: dict[str, Feature] = field(default_factory=dict)
    filter: dict[str, Feature] = field(default_factory=dict, kw_only=True)  # of documents; no inputs of models
    title: str | None = None
    siamese: bool = False  # queries are documents, see config.DataConfig
    event: dict[str, Feature] = field(default_factory=dict)  # of an event of a history
    request: tuple[str, ...] = ()  # features of events that a query has, too
    ties: str = "exclude"  # whether earlier events at the time of a query's target are history: exclude, or order
    empty_histories: bool = False  # whether first events of users are targets

    @classmethod
    def declared(cls, config: DataConfig) -> Schema:
        """Return the unfitted schema that `config` declares."""
        return cls(
            query={name: feature.with_name(name) for name, feature in config.query.items()},
            doc={name: feature.with_name(name) for name, feature in config.doc.items()},
            filter={name: feature.with_name(name) for name, feature in config.filter.items()},
            title=config.title,
            siamese=config.siamese,
            event={name: feature.with_name(name) for name, feature in config.event.items()},
            request=tuple(config.request),
            ties=config.ties,
            empty_histories=config.empty_histories,
        )

    @property
    def sides(self) -> dict[str, dict[str, Feature]]:
        """The features by side; columns that only filter, and events, are a side if there are any."""
        more = {name: side for name, side in (("filter", self.filter), ("event", self.event)) if side}
        return {"query": self.query, "doc": self.doc, **more}

    @property
    def inputs(self) -> Schema:
        """The schema of models, without columns that only filter."""
        return replace(self, filter={})

    @property
    def documents(self) -> dict[str, Feature]:
        """The features in the catalogue: those of `doc`, then those of `filter`."""
        return self.doc | self.filter

    @property
    def event_inputs(self) -> dict[str, Feature]:
        """The features of events that a model reads."""
        return {name: feature for name, feature in self.event.items() if feature.is_input}

    @property
    def format(self) -> int:
        """The version of a dataset's files that is needed to read it."""
        return EVENT_FORMAT if self.event else FORMAT

    @property
    def has_text(self) -> bool:
        """True if any feature is text."""
        return bool(texts_of(self.query) or texts_of(self.doc))

    def fingerprint(self) -> str:
        """Hash the schema, independently of the division of its vocabularies into files."""
        return hashlib.sha256(json.dumps(self._to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def vocabulary_sizes(self) -> dict[str, dict[str, int]]:
        """Return the size of every vocabulary, by side and feature name."""
        return {
            side: {name: len(f.vocabulary) for name, f in categorical_of(features).items() if f.vocabulary}
            for side, features in self.sides.items()
        }

    @property
    def vocabulary_files(self) -> list[PartFile]:
        """The files of all vocabularies, for a loaded or saved schema."""
        return [file for _, _, feature in self._vocabularies() for file in feature.vocabulary.files]

    def cut(self, sizes: dict[str, dict[str, int]]) -> Schema:
        """Truncate every vocabulary to its size in `sizes`; one without a size becomes empty."""

        return self._with_vocabularies(lambda side, name, known: known.cut(sizes.get(side, {}).get(name, 0)))

    @property
    def trained(self) -> dict[str, np.ndarray]:
        """The codes with a positive training event by document feature, see `Categorical.trained`."""
        return {name: f.trained for name, f in categorical_of(self.doc).items() if f.trained is not None}

    def with_trained(self, codes: Mapping[str, np.ndarray]) -> Schema:
        """Set `trained`; a feature that is not in `codes` has none unknown."""
        doc = {name: replace(f, trained=codes.get(name)) for name, f in categorical_of(self.doc).items()}
        return replace(self, doc=self.doc | doc)

    def difference(self, other: Schema) -> str | None:
        """Describe the first difference in declarations from `other`, or return None."""
        options, others = self._options(), other._options()
        for name in OPTIONS:
            if options[name] != others[name]:
                return f"{name}={options[name]} against {others[name]}"
        for side in self.sides | other.sides:
            mine, theirs = self.sides.get(side, {}), other.sides.get(side, {})
            if mine.keys() != theirs.keys():
                return f"{side} features {list(mine)} against {list(theirs)}"
            for name in mine:
                a, b = mine[name].of_table(theirs[name]).declaration(), theirs[name].declaration()
                for key in a:
                    if a[key] is not None and a[key] != b.get(key):  # None: chosen at ingestion
                        return f"{side}.{name}.{key}={a[key]!r} against {b[key]!r}"
        return None

    def save(self, folder: Path) -> Schema:
        """Write schema.json and the vocabulary files; return the schema with memory-mapped vocabularies.

        Vocabulary files in other folders are linked or copied. Raises OSError.
        """
        saved = self._with_vocabularies(
            lambda side, name, known: known.saved(folder / VOCABULARIES, quote(f"{side}.{name}", safe=""))
        )
        for name, codes in self.trained.items():
            (folder / TRAINED).mkdir(exist_ok=True)
            np.save(_trained_file(folder, name), codes)
        saved._write(folder)
        return saved

    def erase(self, codes: Mapping[tuple[str, str], np.ndarray], folder: Path) -> None:
        """Write the schema without the values of `codes` to `folder`: schema.json, and the files that change.

        `codes` by side and feature, int64; those beyond the vocabulary are skipped. The fingerprint stays. Raises
        OSError.
        """
        files = folder / VOCABULARIES
        erased = self._with_vocabularies(
            lambda side, name, known: known.erased(codes.get((side, name), NO_CODES) - FIRST_CODE, files)
        )
        for name, feature in categorical_of(self.doc).items():
            if feature.hash_buckets and feature.trained is not None:  # the others are bits
                path = _trained_file(folder, name)
                path.parent.mkdir(exist_ok=True)
                np.save(path, np.setdiff1d(feature.trained, codes.get(("doc", name), NO_CODES)))
        erased._write(folder)

    def _write(self, folder: Path) -> None:
        text = json.dumps(self._to_dict(files=True), ensure_ascii=False, indent=1)
        (folder / SCHEMA_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Schema:
        """Read `schema.json` from `folder`, and map the vocabulary files.

        Raises DataError: a file is missing, unreadable or of another length. Checksums are not verified here.
        """
        path = folder / SCHEMA_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if (version := content.get("format")) not in (FORMAT, EVENT_FORMAT):
                raise DataError(
                    f"{path} has format {version}, this version reads formats {FORMAT} and {EVENT_FORMAT}; rebuild it"
                )
            declared = ["query", "doc", *(["filter"] if "filter" in content else [])]
            declared += ["event"] if version == EVENT_FORMAT else []
            sides: dict[str, Any] = {
                side: {name: from_dict(f) for name, f in content[side].items()} for side in declared
            }
            for side, features in sides.items():
                for name, feature in features.items():
                    feature.check(f"{side}.{name}", side, sides["doc"])
            described = content[VOCABULARIES]
            options = {name: content[name] for name in OPTIONS if name in content}
            options[REQUEST] = tuple(options.get(REQUEST, ()))
            schema = cls(**sides, title=content["title"], **options)._with_vocabularies(
                lambda side, name, _: _opened(folder, described.get(side, {}).get(name, {}).get("files", []))
            )
            if schema._to_dict(files=True)[VOCABULARIES] != described:
                raise DataError(f"{folder / VOCABULARIES} does not match {path}; copy both again")
            names = content.get(TRAINED, [])
            return schema.with_trained({name: np.load(_trained_file(folder, name), mmap_mode="r") for name in names})
        except ConfigError as error:
            raise DataError(f"{path} is damaged: {error}") from None
        except FileNotFoundError:
            raise DataError(
                f"{path} does not exist; {folder} is not a dataset or model folder of this project"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path} is damaged or of another version: {error!r}") from None

    def exported(self) -> dict[str, Any]:
        """Return the schema as plain containers, with vocabularies as lists."""
        sides = {side: {name: f.exported() for name, f in features.items()} for side, features in self.sides.items()}
        return {**sides, "title": self.title}

    def _options(self) -> dict[str, Any]:
        """Return OPTIONS, in JSON types."""
        return {name: list(self.request) if name == REQUEST else getattr(self, name) for name in OPTIONS}

    def _to_dict(self, *, files: bool = False) -> dict[str, Any]:
        sides = {side: {name: f.to_dict() for name, f in features.items()} for side, features in self.sides.items()}
        vocabularies: dict[str, dict[str, Any]] = {side: {} for side in sides}
        for side, name, feature in self._vocabularies():
            vocabulary = feature.vocabulary
            vocabularies[side][name] = {"values": len(vocabulary), "checksum": vocabulary.checksum}
            if files:
                vocabularies[side][name]["files"] = [
                    {"file": f"{VOCABULARIES}/{part.path.name}", "rows": part.rows, "checksum": part.checksum}
                    for part in vocabulary.files
                ]
        trained = {TRAINED: list(self.trained)} if files and self.trained else {}
        default = Schema()._options()
        options = {name: value for name, value in self._options().items() if value != default[name]}
        return {
            "format": self.format,
            **sides,
            "title": self.title,
            **options,
            **trained,
            VOCABULARIES: vocabularies,
        }

    def _vocabularies(self) -> list[tuple[str, str, Categorical]]:
        """Return (side, name, feature) of all features with a vocabulary."""
        sides = self.sides.items()
        return [
            (side, name, f) for side, features in sides for name, f in categorical_of(features).items() if f.vocabulary
        ]

    def _with_vocabularies(self, change: Callable[[str, str, Vocabulary], Vocabulary]) -> Schema:
        """Apply `change(side, name, vocabulary)` to every vocabulary."""
        sides = {
            side: features
            | {n: replace(f, vocabulary=change(side, n, f.vocabulary)) for n, f in categorical_of(features).items()}
            for side, features in self.sides.items()
        }
        only_filter, event = sides.get("filter", {}), sides.get("event", {})
        return replace(self, query=sides["query"], doc=sides["doc"], filter=only_filter, event=event)


def _trained_file(folder: Path, name: str) -> Path:
    return folder / TRAINED / f"{quote(name, safe='')}.npy"


def _opened(folder: Path, files: list[dict[str, Any]]) -> Vocabulary:
    for path in (Path(part["file"]) for part in files):
        if path.parts != (VOCABULARIES, path.name) or path.name.startswith("."):
            raise DataError(f"{folder}/{SCHEMA_FILE} names a file {str(path)!r}, not one in {VOCABULARIES}/; rejected")
    return Vocabulary.open([PartFile(folder / part["file"], part["rows"], part["checksum"]) for part in files])
