"""Which split a pair goes to: by a hash of its group, by time, or as a column of the table says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np

from bigdssm.errors import ConfigError
from bigdssm.features.columns import RowCheck, check_one_unit, is_empty, strings, times
from bigdssm.string_hashes import hash_strings
from bigdssm.tables.hashing import mix, uniform

PairSplit = Literal["random", "time", "column", "train"]
SPLITS = ("train", "validation", "test")
NAMES = {"train": 0, "training": 0, "validation": 1, "valid": 1, "val": 1, "dev": 1, "test": 2}
MAX_SAMPLE = 1 << 22  # times held to find the thresholds


class Splitter:
    """Gives every row of a batch its split, a number in SPLITS."""

    def __init__(
        self,
        how: PairSplit,
        column: str | None,
        fractions: tuple[float, float],
        seed: int,
        whole_documents: bool = False,
    ) -> None:
        validation, test = fractions
        check_fractions(validation, test)
        if whole_documents and how != "random":
            raise ConfigError(f"--whole-documents goes with --split random, not with --split {how}")
        if how in ("time", "column") and column is None:
            raise ConfigError(f"--split {how} needs --{'time' if how == 'time' else 'split'}-column")
        self._how, self._column, self._seed = how, column, seed
        self._validation, self._test = validation, test
        self._thresholds = (np.inf, np.inf)
        self._joined: tuple[np.ndarray, np.ndarray] | None = None

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
            return  # the reading that follows names the rows
        check_one_unit(sample, f"column {self._column!r}")
        ordered = np.sort(sample)
        ends = [int(len(ordered) * kept) for kept in (1 - self._validation - self._test, 1 - self._test)]
        first, second = (ordered[end] if end < len(ordered) else np.inf for end in ends)
        self._thresholds = (first, second)

    @property
    def why_no_train(self) -> str:
        """Return what may have left the train split without a row, to end a sentence with."""
        return {
            "time": "; nearly all rows have one time",
            "column": f"; {self._column} never says train",
            "random": f"; nearly all rows are of one {self._column or 'query'}",
            "train": "",
        }[self._how]

    def units(self, check: RowCheck, query_ids: np.ndarray) -> np.ndarray:
        """Return what a random split keeps together: the rows of one group, or without a column of one query, int64."""
        if self._column is None:
            return query_ids
        groups = strings(check, self._column)
        # A row without a group is its own.
        return np.where(is_empty(groups), query_ids, hash_strings(groups))

    def join(self, units: np.ndarray, documents: np.ndarray) -> None:
        """Keep together, too, all units that a document connects; both int64 [rows]."""
        self._joined = joined_units(units, documents)

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
        units = self.units(check, query_ids)
        if self._joined is not None:
            known, joined = self._joined
            units = joined[np.minimum(np.searchsorted(known, units), len(known) - 1)]
        u = uniform(units, "split", self._seed)
        return np.where(u < self._test, 2, np.where(u < self._test + self._validation, 1, 0))


def check_fractions(validation: float, test: float) -> None:
    """Raise ConfigError unless the fractions of a split leave some rows to train on."""
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise ConfigError(f"split fractions {validation} and {test} must not be negative and sum to less than 1")


def joined_units(units: np.ndarray, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct units, sorted, and for each the least unit that documents connect it with, int64."""
    known, unit = np.unique(units, return_inverse=True)
    distinct, document = np.unique(documents, return_inverse=True)
    label = np.arange(len(known))
    while True:
        least = np.full(len(distinct), len(known))
        np.minimum.at(least, document, label[unit])
        new = label.copy()
        np.minimum.at(new, unit, least[document])
        new = new[new]  # a label's own label is at most it: long chains shorten by half
        if (new == label).all():
            return known, known[label]
        label = new


def pair_hash(query_ids: np.ndarray, docs: np.ndarray) -> np.ndarray:
    """Return a 64-bit hash of (query, document), int64."""
    return (mix(query_ids, "query", 0) + mix(docs, "document", 0)).astype(np.int64)
