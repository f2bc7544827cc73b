"""Metadata of partitions (the immutable parts of a dataset), and the parts of a mixture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from bigdssm.dataset.remote import RemoteFolder
from bigdssm.errors import ConfigError, DataError
from bigdssm.utils.arguments import short_repr
from bigdssm.utils.atomic import hidden_version

FORMAT = 1


class Leaf(NamedTuple):
    """A scalar JSON type of the metadata schema."""

    description: str
    accepts: Callable[[Any], bool]


def one_of(*choices: str) -> Leaf:
    """Return the type of a string enumeration."""
    return Leaf(f"one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices)


TEXT = Leaf("a string", lambda value: isinstance(value, str))
COUNT = Leaf("an integer of at least 0", lambda value: type(value) is int and value >= 0)
INTEGER = Leaf("an integer", lambda value: type(value) is int)
NUMBER = Leaf("a number", lambda value: type(value) in (int, float) and abs(value) < float("inf"))
BOOLEAN = Leaf("true or false", lambda value: isinstance(value, bool))
TIME_OR_NONE = Leaf("a number or null", lambda value: value is None or NUMBER.accepts(value))
TEXT_OR_NONE = Leaf("a string or null", lambda value: value is None or TEXT.accepts(value))
# Shapes of JSON values: {key: shape} (`key?`: optional; str: any key), [shape of items], (shape of item 0, …), a Leaf.
FILE_SHAPE = {"file": TEXT, "rows": COUNT, "checksum": TEXT}
ID_SOURCE = one_of("column", "content")
DATASET_SHAPE = {
    "name": TEXT,
    "schema": TEXT,
    "partitions": [TEXT],
    "catalogue": [FILE_SHAPE],
    "versions?": [FILE_SHAPE | {"since": TEXT}],
    "item_partitions?": [TEXT],
    "withdrawals?": [FILE_SHAPE | {"since": TEXT}],
    "text?": one_of("tokens", "raw"),
    "users?": one_of("rows"),
    "items?": one_of("events"),
    "ids?": {"doc?": ID_SOURCE, "query?": ID_SOURCE},
    "tokenizer?": {str: TEXT},
    "times?": {"num_times": COUNT, "units": [(INTEGER, COUNT, NUMBER)]},
    "split?": {
        "how": one_of("random", "time", "column", "leave-one-out", "train"), "column?": TEXT_OR_NONE, "seed?": INTEGER,
        "fractions?": (NUMBER, NUMBER), "whole_documents?": BOOLEAN,
        "validation_from?": TIME_OR_NONE, "test_from?": TIME_OR_NONE, "train_from?": TIME_OR_NONE,
    },
}  # fmt: skip
SPLIT_SHAPE = {"rows": COUNT, "queries": COUNT, "blocks": COUNT, "shards": [TEXT], "index_checksum": TEXT}
PARTITION_SHAPE = {"splits": {str: SPLIT_SHAPE}, "counts_checksum": TEXT, "sequences?": [FILE_SHAPE]}


class Extent(NamedTuple):
    """The part of a dataset that a training segment reads; later appends do not change it."""

    partitions: int  # the first ones in dataset.json
    catalogue_files: int  # with new documents
    vocabularies: dict[str, dict[str, int]]  # see `Schema.vocabulary_sizes`

    def of(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return a dataset.json as it was then."""
        known = content["partitions"][: self.partitions]
        lists = {
            name: [entry for entry in content[name] if entry["since"] in known]
            for name in ("versions", "withdrawals")
            if name in content
        }
        return {**content, **lists, "partitions": known, "catalogue": content["catalogue"][: self.catalogue_files]}


@dataclass(frozen=True)
class Partition:
    """The metadata of one immutable part of a dataset."""

    name: str
    folder: Path
    content: dict[str, Any]  # of partition.json
    number: int = 0  # within its dataset
    num_docs: int = 0  # of its dataset's catalogue
    first_doc: int = 0  # catalogue offset within a joined dataset
    remote: RemoteFolder | None = None  # of a dataset at a URL

    @property
    def sequence_files(self) -> list[Path]:
        """The sequence files, in order; empty for pairs."""
        return [path_inside(self.folder, part["file"]) for part in self.content.get("sequences", [])]

    @property
    def identity(self) -> str:
        """A hash of the partition's rows and documents, through the checksums of its files."""
        known = {"fingerprint": self.content.get("fingerprint"), "splits": self.content["splits"]}
        return short_hash(json.dumps(known, sort_keys=True).encode())


def read_partition(folder: Path, name: str) -> Partition:
    """Read the metadata of partition `name` of a dataset folder.

    Raises DataError: missing or damaged.
    """
    where = folder / "partitions" / name
    if where.parent != folder / "partitions" or name.startswith("."):
        raise DataError(f"{folder}/dataset.json: partition name {name!r} is not a plain folder name; rejected")
    content = read_json(where / "partition.json", "copy the dataset whole")
    _check_shape(where / "partition.json", content, PARTITION_SHAPE)
    return Partition(name, where, content)


def read_dataset_json(folder: Path) -> dict[str, Any]:
    """Read a dataset's dataset.json. Raises DataError: missing, another format, or damaged."""
    path = folder / "dataset.json"
    hint = hidden_version(folder) or "; bigdssm make_shards builds one"
    content = read_json(path, f"{folder} is not a dataset{hint}")
    if content.get("format") != FORMAT:
        raise DataError(
            f"{path} has format {short_repr(content.get('format'))}, this version reads {FORMAT}; rebuild it with "
            "bigdssm make_shards"
        )
    _check_shape(path, content, DATASET_SHAPE)
    return content


def _check_shape(path: Path, content: Any, shape: Any) -> None:
    """Raise DataError with the first value of another shape."""
    for fault in _misfits(content, shape, ""):
        raise DataError(f"{path} is damaged: {fault}; copy the dataset whole")


def _misfits(value: Any, shape: Any, key: str) -> Iterator[str]:
    """Yield a message (key, got, needed) per value of another shape."""
    if isinstance(shape, dict) and isinstance(value, dict):
        dot = f"{key}." if key else ""
        for name, inner in dict.fromkeys(value, shape[str]).items() if str in shape else shape.items():
            plain = name if str in shape else name.removesuffix("?")
            if plain in value:
                yield from _misfits(value[plain], inner, f"{dot}{plain}")
            elif plain == name:
                yield f"{dot}{plain} is missing"
    elif isinstance(value, list) and type(shape) in (list, tuple):
        shapes = shape * len(value) if isinstance(shape, list) else shape
        if len(shapes) != len(value):
            yield f"{key} is {short_repr(value)}, needs {len(shapes)} values"
        for number, (one, inner) in enumerate(zip(value, shapes, strict=False)):
            yield from _misfits(one, inner, f"{key}[{number}]")
    elif not isinstance(shape, Leaf):
        yield f"{key} is {short_repr(value)}, needs {'an object' if isinstance(shape, dict) else 'a list'}"
    elif not shape.accepts(value):
        yield f"{key} is {short_repr(value)}, needs {shape.description}"


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises DataError: missing (`fix` ends the message), damaged, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path} does not exist; {fix}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} is damaged: not a JSON object")
    return content


def path_inside(folder: Path, path: str) -> Path:
    """Join a path from metadata to the folder. Raises DataError: it leads out of the folder."""
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise DataError(f"{folder}: its metadata names a file {path!r}, not a plain path inside it; rejected")
    return folder / path


def short_hash(content: bytes) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


MixtureBatches = Literal["mixed", "one_source"]
ROUND_STEPS = 1000  # per lane; the shares of a mixture are exact over these


@dataclass(frozen=True)
class MixturePart:
    """The partitions [first, last) of a joined dataset that come from one source."""

    name: str
    first: int
    last: int
    weight: float


def steps_per_round(names: Sequence[str], weights: Sequence[float]) -> list[int]:
    """Divide ROUND_STEPS among the sources by weight, by largest remainders.

    Raises ConfigError: a weight is too small for a single step.
    """
    shares = np.array(weights, float) / max(weights)  # normalized so that their sum cannot overflow
    exact = shares / shares.sum() * ROUND_STEPS
    steps = np.floor(exact).astype(np.int64)
    missing = ROUND_STEPS - int(steps.sum())
    steps[np.argsort(-(exact - steps), kind="stable")[:missing]] += 1
    for name, weight, count in zip(names, weights, steps.tolist(), strict=True):
        if not count:
            needed = max(weights) / ROUND_STEPS * float(shares.sum())
            raise ConfigError(f"data.mixture: {name} has weight {weight}, needs at least {needed:g}, a thousandth")
    return [int(count) for count in steps]
