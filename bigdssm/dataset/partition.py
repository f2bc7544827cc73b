"""Partitions, the immutable parts of a dataset: their metadata, the index of a split, and the parts of a mixture.

Row order, reads and counts all use the index; tar headers of shards are not read. A truncated, replaced or deleted
shard therefore appears as unreadable blocks, never as silently missing rows.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from bigdssm.dataset.catalogue import path_inside
from bigdssm.dataset.remote import RemoteFile, RemoteFolder
from bigdssm.dataset.rows import TargetEvents
from bigdssm.dataset.schema import EVENT_FORMAT, FORMAT
from bigdssm.errors import ConfigError, DataError
from bigdssm.features.ragged import offsets_of
from bigdssm.utils.arguments import short_repr
from bigdssm.utils.atomic import hidden_version

INDEX_COLUMNS = {"offset": np.int64, "size": np.int64, "rows": np.int32, "queries": np.int64, "checksum": np.uint64}
ROUND_STEPS = 1000  # per lane; the shares of a mixture are exact over these
CUT_OFFS = ("validation_from", "test_from", "train_from")  # in the `split` of dataset.json, of a split by time
PARTITION_CUT_OFFS = "cut_offs"  # in partition.json of events: the times at which its splits start, if by time


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
    "times?": {"unit": one_of("s", "ms", "us", "ns"), "oldest": NUMBER, "newest": NUMBER},
    "split?": {
        "how": one_of("random", "time", "column", "leave-one-out", "train"), "column?": TEXT_OR_NONE, "seed?": INTEGER,
        "fractions?": (NUMBER, NUMBER), "whole_documents?": BOOLEAN,
        "validation_from?": TIME_OR_NONE, "test_from?": TIME_OR_NONE, "train_from?": TIME_OR_NONE,
    },
}  # fmt: skip
# Before units were recorded: the number of times, and that of dates by power of ten (0: s, 3: ms) with an example.
COUNTED_TIMES_SHAPE = {"num_times": COUNT, "units": [(INTEGER, COUNT, NUMBER)]}
SPLIT_SHAPE = {"rows": COUNT, "queries": COUNT, "blocks": COUNT, "shards": [TEXT], "index_checksum": TEXT}
PARTITION_SHAPE = {
    "splits": {str: SPLIT_SHAPE}, "counts_checksum": TEXT, "sequences?": [FILE_SHAPE], "identity?": TEXT,
    f"{PARTITION_CUT_OFFS}?": [NUMBER],
}  # fmt: skip


class Extent(NamedTuple):
    """The part of a dataset that a training segment reads; later appends do not change it."""

    partitions: int  # the first ones in dataset.json
    catalogue_files: int  # with new documents
    vocabularies: dict[str, dict[str, int]]  # see `Schema.vocabulary_sizes`

    def of(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return a dataset.json as it was then."""
        partitions = content["partitions"][: self.partitions]
        lists = {
            name: [entry for entry in content[name] if entry["since"] in partitions]
            for name in ("versions", "withdrawals")
            if name in content
        }
        return {**content, **lists, "partitions": partitions, "catalogue": content["catalogue"][: self.catalogue_files]}


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
    cut_offs: tuple[float, ...] = ()  # the times at which splits of the partition start, of a split by time

    @property
    def sequence_files(self) -> list[Path]:
        """The sequence files, in order; empty for pairs."""
        return [path_inside(self.folder, part["file"]) for part in self.content.get("sequences", [])]

    @property
    def identity(self) -> str:
        """A hash of the partition's rows and documents, through the checksums of its files when it was written."""
        if "identity" in self.content:  # rows were emptied since, which changes neither order nor numbers
            return str(self.content["identity"])
        identity = {"fingerprint": self.content.get("fingerprint"), "splits": self.content["splits"]}
        return short_hash(json.dumps(identity, sort_keys=True).encode())


def dataset_fingerprint(schema: str, tokenizer_hash: str, partitions: Iterable[Partition]) -> str:
    """Hash a schema, by its fingerprint, a tokenizer, and the rows and documents of partitions; those of items last."""
    identities = [schema, tokenizer_hash, *(partition.name + partition.identity for partition in partitions)]
    return short_hash("\n".join(identities).encode())


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
    if content.get("format") not in (FORMAT, EVENT_FORMAT):
        raise DataError(
            f"{path} has format {short_repr(content.get('format'))}, this version reads {FORMAT} and {EVENT_FORMAT}; "
            "rebuild it with bigdssm make_shards"
        )
    times = content.get("times")
    counted = isinstance(times, dict) and "unit" not in times
    _check_shape(path, content, DATASET_SHAPE | {"times?": COUNTED_TIMES_SHAPE} if counted else DATASET_SHAPE)
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
        for number, (element, inner) in enumerate(zip(value, shapes, strict=False)):
            yield from _misfits(element, inner, f"{key}[{number}]")
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


def short_hash(content: bytes) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


@dataclass(frozen=True)
class SplitIndex:
    """The blocks of a split in all partitions, in order; arrays are [blocks]."""

    shards: tuple[Path | RemoteFile, ...]
    shard: np.ndarray  # int32: number in `shards`
    partition: np.ndarray  # int32: partition number
    block: np.ndarray  # int32: number of the block within its partition's split
    offset: np.ndarray  # int64: of the block's bytes in the shard
    size: np.ndarray  # int64
    rows: np.ndarray  # int32
    queries: np.ndarray  # int64: of its rows
    checksum: np.ndarray  # uint64: xxh3_64 of the bytes
    # With rules on events: the targets among the events of all partitions' sequences; each partition's first
    # sequence, int64; and the rows with a target, block after block, by their number within the block, int64.
    targets: TargetEvents | None = None
    first_sequence: np.ndarray | None = None
    stored_row: np.ndarray | None = None

    @cached_property
    def first_row(self) -> np.ndarray:
        """The first row id of each block, int64 [blocks + 1]; the last entry is the number of rows."""
        return offsets_of(self.rows)

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return int(self.first_row[-1])

    @property
    def num_queries(self) -> int:
        """The number of queries."""
        return int(self.queries.sum())

    @property
    def num_blocks(self) -> int:
        """The number of blocks."""
        return len(self.rows)

    def target_events(self, partition: int) -> TargetEvents | None:
        """Return the targets among the events of a partition's sequences; None: all are."""
        if self.targets is None or self.first_sequence is None:
            return None
        return self.targets.from_sequence(self.first_sequence[partition])

    def name(self, block: int) -> str:
        """Format a block's shard and number for messages."""
        return f"{self.shards[self.shard[block]]}, block {self.block[block]}"

    @classmethod
    def concat(cls, parts: "Sequence[SplitIndex]") -> "SplitIndex":
        """Concatenate the indexes of several partitions."""
        if len(parts) == 1:
            return parts[0]
        names = ("partition", "block", "offset", "size", "rows", "queries", "checksum")
        arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        bases = np.cumsum([0] + [len(part.shards) for part in parts[:-1]])
        shard = np.concatenate([part.shard + np.int32(base) for part, base in zip(parts, bases, strict=True)])
        return cls(shards=tuple(s for part in parts for s in part.shards), shard=shard, **arrays)


def read_index(partition: Partition, split: str, number: int) -> SplitIndex:
    """Read the index of a split in partition `number` of the opened ones, validated against partition.json.

    Raises DataError: missing, unreadable, another checksum, or invalid entries.
    """
    folder, expected, remote = partition.folder, partition.content["splits"][split], partition.remote
    path = folder / f"{split}.index.arrow"
    try:
        content = path.read_bytes() if path.stat().st_size < 1 << 20 else pa.memory_map(str(path)).read_buffer()
    except FileNotFoundError:
        raise DataError(f"{path} is missing; copy the dataset whole or rebuild it") from None
    if xxhash.xxh3_64_hexdigest(content) != expected["index_checksum"]:
        raise DataError(f"{path} is damaged or belongs to other shards: its checksum is not the one in partition.json")
    try:
        table = pa.ipc.open_file(content).read_all().unify_dictionaries().combine_chunks()
        shard = table.column("shard").chunk(0) if table.num_rows else pa.array([], pa.string()).dictionary_encode()
        names = shard.dictionary.to_pylist()
        code = shard.indices.to_numpy().astype(np.int32)
        arrays = {
            name: table.column(name).to_numpy().astype(dtype, copy=False) for name, dtype in INDEX_COLUMNS.items()
        }
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        raise DataError(f"{path} is not an index of a split: {error}") from None
    for name in names:
        if "/" in name or "\\" in name or name.startswith(".") or not name.endswith(".tar"):
            raise DataError(f"{path}: shard name {name!r} is not a plain file name ending in .tar; rejected")
    size, rows, queries, offset = (arrays[key] for key in ("size", "rows", "queries", "offset"))
    if len(rows) and (size.min() < 1 or rows.min() < 1 or offset.min() < 0 or (queries < rows).any()):
        raise DataError(f"{path} has blocks without bytes or rows; rebuild the dataset")
    totals = int(rows.sum()), int(queries.sum()), len(rows)
    if totals != (declared := tuple(expected[key] for key in ("rows", "queries", "blocks"))):
        got, needed = ("{} rows of {} queries in {} blocks".format(*counts) for counts in (totals, declared))
        raise DataError(f"{path} has {got}, partition.json has {needed}")
    count = len(rows)
    return SplitIndex(
        shards=tuple(remote.file(f"partitions/{folder.name}/{n}") if remote else folder / n for n in names),
        shard=code,
        partition=np.full(count, number, np.int32),
        block=np.arange(count, dtype=np.int32),
        **arrays,
    )


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
