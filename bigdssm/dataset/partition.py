"""Partitions, the immutable parts of a dataset, by their metadata; and the parts of a mixture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bigdssm.dataset.remote import RemoteFolder
from bigdssm.errors import ConfigError, DataError

FORMAT = 1


@dataclass(frozen=True)
class Partition:
    """One immutable part of a dataset."""

    name: str
    folder: Path
    content: dict[str, Any]  # of partition.json
    number: int = 0  # among all of its dataset
    num_docs: int = 0  # documents of its dataset's catalogue
    first_doc: int = 0  # where that catalogue begins in the one of several joined datasets
    remote: RemoteFolder | None = None  # where the dataset is at a URL

    @property
    def sequence_files(self) -> list[Path]:
        """Return the files of its sequences, in order; none for pairs."""
        return [inside(self.folder, part["file"]) for part in self.content.get("sequences", [])]

    @property
    def identity(self) -> str:
        """Return a hash of the partition's rows: its indexes hold every block's checksum."""
        known = {"fingerprint": self.content.get("fingerprint"), "splits": self.content["splits"]}
        return short_hash(json.dumps(known, sort_keys=True).encode())


def read_partition(folder: Path, name: str) -> Partition:
    """Return the partition `name` of the dataset in `folder`. Raises DataError: none there, or damaged."""
    where = folder / "partitions" / name
    if where.parent != folder / "partitions" or name.startswith("."):
        raise DataError(f"{folder}/dataset.json: partition name {name!r} is not a plain folder name; refused")
    return Partition(name, where, read_json(where / "partition.json", "copy the dataset whole"))


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """Return a file's JSON object. Raises DataError: missing (`fix` says what to do), damaged, or another value."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path} does not exist; {fix}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} is damaged: no JSON object")
    return content


def inside(folder: Path, place: str) -> Path:
    """Return a file that metadata name. Raises DataError where that is not inside the folder."""
    if Path(place).is_absolute() or ".." in Path(place).parts:
        raise DataError(f"{folder}: its metadata names a file {place!r}, not a plain path inside it; refused")
    return folder / place


def short_hash(content: bytes) -> str:
    """Return 16 hexadecimal digits of SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


MixtureBatches = Literal["mixed", "one_source"]
ROUND_STEPS = 1000  # of a lane, over which the shares of a mixture are exact


@dataclass(frozen=True)
class MixturePart:
    """The partitions [first, last) of a joined dataset, which come from one source."""

    name: str
    first: int
    last: int
    weight: float


def steps_per_round(names: Sequence[str], weights: Sequence[float]) -> list[int]:
    """Return how many of ROUND_STEPS each source gets: its share, the largest remainders rounded up.

    Raises ConfigError where a weight is too small for a single one.
    """
    shares = np.array(weights, float) / max(weights)  # their sum cannot overflow
    exact = shares / shares.sum() * ROUND_STEPS
    steps = np.floor(exact).astype(np.int64)
    missing = ROUND_STEPS - int(steps.sum())
    steps[np.argsort(-(exact - steps), kind="stable")[:missing]] += 1
    for name, weight, count in zip(names, weights, steps.tolist(), strict=True):
        if not count:
            needed = max(weights) / ROUND_STEPS * float(shares.sum())
            raise ConfigError(f"data.mixture: {name} has weight {weight}, needs at least {needed:g}, a thousandth")
    return [int(count) for count in steps]
