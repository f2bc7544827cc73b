"""The fitted schema of a dataset (features, vocabularies, normalization), and 64-bit keys of its rows.

It is saved with datasets and models. schema.json contains everything but the vocabularies' values, which are in files
in vocabularies/ next to it. The declared and fitted fields of each feature type are defined in `bigdssm.features`.

All randomness in a dataset is a function of the seed and a row's ordinal or key, so equal inputs and seeds give equal
bytes on every machine and library version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdssm.config import DataConfig
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Feature, texts_of
from bigdssm.features.base import from_dict
from bigdssm.features.categorical import FIRST_CODE, Categorical, categorical_of
from bigdssm.features.vocabulary import PartFile, Vocabulary
from bigdssm.utils.array_file import new_array
from bigdssm.utils.hashing import hash64, hash_strings, mix64


def hash_rows(table: pa.Table) -> np.ndarray:
    """Hash all canonical columns of every row, int64 [rows]; identifies rows without an id."""
    between, within = (pa.scalar(separator, pa.large_string()) for separator in "\x1f\x1e")

    def text(array: pa.Array) -> pa.Array:
        if pa.types.is_list(array.type):
            return pc.binary_join(array, within)
        if pa.types.is_fixed_size_list(array.type):
            rows = array.flatten().to_numpy().reshape(-1, array.type.list_size)
            return pa.array([row.tobytes().hex() for row in rows], pa.large_string())
        return array.cast(pa.large_string())

    return hash_strings(pc.binary_join_element_wise(*(text(c.combine_chunks()) for c in table.columns), between))


def row_keys(hashes: np.ndarray) -> pa.Array:
    """Return keys of documents without an id: their `hash_rows` in hexadecimal."""
    digits = pa.py_buffer(hashes.astype(">i8").tobytes().hex().encode())
    offsets = pa.py_buffer(np.arange(len(hashes) + 1, dtype=np.int64) * 16)
    return pa.Array.from_buffers(pa.large_string(), len(hashes), [None, offsets, digits])


def mix(keys: np.ndarray, purpose: str, seed: int) -> np.ndarray:
    """Hash int64 keys to uint64, independently per purpose and seed; injective in the keys."""
    return mix64(keys, hash64(f"{purpose}/{seed}"))


def shuffle_keys(ordinals: np.ndarray, seed: int) -> np.ndarray:
    """Return distinct int64 sort keys of source rows; train rows are written in their order."""
    return (mix(ordinals, "shuffle", seed) ^ np.uint64(1 << 63)).view(np.int64)


def uniform(keys: np.ndarray, purpose: str, seed: int) -> np.ndarray:
    """Map every key to a pseudorandom float64 in [0, 1)."""
    return (mix(keys, purpose, seed) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def pair_hash(query_ids: np.ndarray, docs: np.ndarray) -> np.ndarray:
    """Hash (query, document) pairs, int64."""
    return (mix(query_ids, "query", 0) + mix(docs, "document", 0)).astype(np.int64)


class SortedKeys:
    """A map from int64 keys to rows in several files; pickled by path."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)

    def __reduce__(self) -> tuple[type[SortedKeys], tuple[Sequence[Path]]]:
        return SortedKeys, (self.files,)

    @cached_property
    def _parts(self) -> list[np.ndarray]:
        return [np.load(path, mmap_mode="r", allow_pickle=False) for path in self.files]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the row of each key, int64, −1 for an unknown key; later files take precedence."""
        rows = np.full(len(keys), -1, np.int64)
        # Searching in the order of the top 16 bits is three times as fast, due to memory locality.
        order = np.argsort((keys >> 48).astype(np.int16), kind="stable")
        ordered = keys[order]
        for sorted_keys, numbers in self._parts:
            positions, matched = find_sorted(sorted_keys, ordered)
            rows[order[matched]] = numbers[positions[matched]]
        return rows


def find_sorted(sorted_keys: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Look up keys [m] in ascending keys; return (positions int64 [m], found bool [m])."""
    positions = np.minimum(np.searchsorted(sorted_keys, keys), max(len(sorted_keys) - 1, 0))
    return positions, sorted_keys[positions] == keys if len(sorted_keys) else np.zeros(len(keys), bool)


def write_keys(path: Path, num_keys: int, pieces: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """Write int64 (keys, rows) chunk by chunk; keys ascend over all chunks."""
    target = new_array(path, np.int64, (2, num_keys))
    first = 0
    for keys, rows in pieces:
        target[0, first : first + len(keys)], target[1, first : first + len(keys)] = keys, rows
        first += len(keys)
    assert first == num_keys
    target.flush()


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
