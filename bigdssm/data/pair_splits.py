"""Which split a pair goes to: by a hash of its group, by time, or as a column of the table says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np

from bigdssm.data.columns import RowCheck, is_empty, strings, times
from bigdssm.data.hashing import hash_strings, mix, uniform
from bigdssm.errors import ConfigError, DataError

PairSplit = Literal["random", "time", "column", "train"]
SPLITS = ("train", "validation", "test")
NAMES = {"train": 0, "training": 0, "validation": 1, "valid": 1, "val": 1, "dev": 1, "test": 2}
MAX_SAMPLE = 1 << 22  # times held to find the thresholds


class Splitter:
    """Gives every row of a batch its split, a number in SPLITS."""

    def __init__(self, how: PairSplit, column: str | None, fractions: tuple[float, float], seed: int) -> None:
        validation, test = fractions
        if not (validation >= 0 and test >= 0 and validation + test < 1):
            raise ConfigError(f"split fractions {validation} and {test} must not be negative and sum to less than 1")
        if how in ("time", "column") and column is None:
            raise ConfigError(f"--split {how} needs --{'time' if how == 'time' else 'split'}-column")
        self._how, self._column, self._seed = how, column, seed
        self._validation, self._test = validation, test
        self._thresholds = (np.inf, np.inf)

    @property
    def columns(self) -> list[str]:
        """Return the source columns it needs."""
        return [self._column] if self._column is not None and self._how != "train" else []

    @property
    def needs_thresholds(self) -> bool:
        """Return True where `learn` must see the times first."""
        return self._how == "time"

    def learn(self, batches: Iterable[RowCheck]) -> None:
        """Find the times at which validation and test begin; beyond 4M rows from an even sample of them."""
        assert self._column is not None
        sample = np.empty(0)
        modulus, seen = 1, 0
        for check in batches:
            moments = times(check, self._column)
            place = np.arange(seen, seen + len(moments))
            seen += len(moments)
            sample = np.concatenate([sample, moments[check.good & (place % modulus == 0)]])
            if len(sample) > MAX_SAMPLE:
                sample, modulus = sample[::2], modulus * 2
        if not len(sample):
            raise DataError(f"no row has a usable time in column {self._column!r}")
        ordered = np.sort(sample)
        ends = [int(len(ordered) * kept) for kept in (1 - self._validation - self._test, 1 - self._test)]
        first, second = (ordered[end] if end < len(ordered) else np.inf for end in ends)
        self._thresholds = (first, second)

    def split(self, check: RowCheck, query_ids: np.ndarray) -> np.ndarray:
        """Return the split of every row of the batch, int64; without a group column rows of one query stay together."""
        if self._how == "train":
            return np.zeros(len(query_ids), np.int64)
        if self._how == "time":
            assert self._column is not None
            return np.searchsorted(self._thresholds, times(check, self._column), side="right")
        if self._how == "column":
            assert self._column is not None
            said = strings(check, self._column)
            numbers = np.array([NAMES.get(value.lower(), -1) for value in said.to_pylist()], np.int64)
            check.fail(numbers < 0, f"{self._column} is {{}}, needs train, validation or test", said)
            return numbers
        units = query_ids
        if self._column is not None:
            groups = strings(check, self._column)
            # A row without a group is its own.
            units = np.where(is_empty(groups), query_ids, hash_strings(groups))
        u = uniform(units, "split", self._seed)
        return np.where(u < self._test, 2, np.where(u < self._test + self._validation, 1, 0))


def pair_hash(query_ids: np.ndarray, docs: np.ndarray) -> np.ndarray:
    """Return a 64-bit hash of (query, document), int64."""
    return (mix(query_ids, "query", 0) + mix(docs, "document", 0)).astype(np.int64)
