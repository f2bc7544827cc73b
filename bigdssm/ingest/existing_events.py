"""The existing events of a dataset: to extend sequences, and to detect repeated events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from bigdssm.dataset.catalogue import MappedTable
from bigdssm.dataset.keys import SortedKeys
from bigdssm.dataset.partition import Partition
from bigdssm.dataset.remote import SEQUENCE_KEYS_FILE
from bigdssm.dataset.rows import TIME_COLUMN
from bigdssm.features.ragged import Ragged

EVENT = np.dtype([("user", np.int64), ("item", np.int64), ("time", np.float64), ("relevance", np.float32)])


@dataclass(frozen=True)
class EarlierEvents:
    """The sequences of existing partitions, oldest partition first; pickled by path."""

    parts: tuple[tuple[tuple[Path, ...], Path], ...]  # sequence files and key file

    @classmethod
    def of(cls, partitions: Sequence[Partition]) -> EarlierEvents:
        """Return the sequences of partitions."""
        return cls(tuple((tuple(p.sequence_files), p.folder / SEQUENCE_KEYS_FILE) for p in partitions))

    def __reduce__(self) -> tuple[type[EarlierEvents], tuple[object]]:
        return EarlierEvents, (self.parts,)

    @cached_property
    def _tables(self) -> list[tuple[MappedTable, SortedKeys]]:
        return [(MappedTable(files), SortedKeys([keys])) for files, keys in self.parts]

    def take(self, user_ids: np.ndarray, columns: Mapping[str, type], *, last: bool = False) -> dict[str, Ragged]:
        """Return list columns of the users' sequences, or only their last events.

        Empty for unknown users. user_ids int64 [users]. The newest partition with a user has all of the user's events.
        """
        found = {name: [Ragged.of_lists([[]], dtype)] for name, dtype in columns.items()}
        row_of_user, num_found = np.zeros(len(user_ids), np.int64), 1  # row 0 is the empty sequence
        for table, keys in reversed(self._tables):
            rows = keys.find(user_ids)
            new = np.flatnonzero((rows >= 0) & (row_of_user == 0))
            row_of_user[new] = num_found + np.arange(len(new))
            num_found += len(new)
            if len(new):
                for name, pieces in found.items():
                    ends = table.lengths(name, rows[new])
                    starts = np.maximum(ends - 1, 0) if last else np.zeros_like(ends)
                    pieces.append(table.take_slices(name, rows[new], starts, ends))
        return {name: Ragged.concat(pieces).take(row_of_user) for name, pieces in found.items()}

    def compare(
        self, user_ids: np.ndarray, item: np.ndarray, time: np.ndarray, relevance: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the mask of existing events, and each user's newest time (−inf: none).

        An event exists if all four values are equal. Arrays are [events], of the types of EVENT.
        """
        users, user = np.unique(user_ids, return_inverse=True)
        last = self.take(users, {TIME_COLUMN: np.float64}, last=True)[TIME_COLUMN]
        newest = np.full(len(users), -np.inf)
        newest[last.lengths > 0] = last.values
        repeated = np.zeros(len(user_ids), bool)
        maybe = np.flatnonzero(time <= newest[user])
        if len(maybe):
            old_users, of_new = np.unique(user_ids[maybe], return_inverse=True)
            columns = {"items": np.int32, TIME_COLUMN: np.float64, "relevance": np.float32}
            items, times, relevances = self.take(old_users, columns).values()
            of_known = np.repeat(np.arange(len(old_users)), items.lengths)
            known = _events(of_known, items.values, times.values, relevances.values)
            repeated[maybe] = np.isin(_events(of_new, item[maybe], time[maybe], relevance[maybe]), known)
        return repeated, newest[user]


def _events(user: np.ndarray, item: np.ndarray, time: np.ndarray, relevance: np.ndarray) -> np.ndarray:
    """Pack events into one comparable value each, [events]."""
    events = np.empty(len(user), EVENT)
    for name, values in zip(EVENT.names or (), (user, item, time, relevance), strict=True):
        events[name] = values + 0  # −0.0 becomes 0.0: values are compared by bytes
    return events.view(np.dtype((np.void, EVENT.itemsize)))
