"""The events that a dataset has already: what sequences go on from, and what new events are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from bigdssm.dataset.keys import SortedKeys
from bigdssm.dataset.mapped import MappedTable
from bigdssm.dataset.partition import Partition
from bigdssm.dataset.remote import SEQUENCE_KEYS_FILE
from bigdssm.dataset.sequences import TIME_COLUMN
from bigdssm.features.ragged import Ragged

EVENT = np.dtype([("user", np.int64), ("item", np.int64), ("time", np.float64), ("relevance", np.float32)])


@dataclass(frozen=True)
class EarlierEvents:
    """The sequences of earlier partitions, oldest partition first; picklable as their paths."""

    parts: tuple[tuple[tuple[Path, ...], Path], ...]  # sequence files and key file

    @classmethod
    def of(cls, partitions: Sequence[Partition]) -> EarlierEvents:
        """Return those of partitions with sequences."""
        return cls(tuple((tuple(p.sequence_files), p.folder / SEQUENCE_KEYS_FILE) for p in partitions))

    def __reduce__(self) -> tuple[type[EarlierEvents], tuple[object]]:
        return EarlierEvents, (self.parts,)

    @cached_property
    def _tables(self) -> list[tuple[MappedTable, SortedKeys]]:
        return [(MappedTable(files), SortedKeys([keys])) for files, keys in self.parts]

    def take(self, user_ids: np.ndarray, columns: Mapping[str, type], *, last: bool = False) -> dict[str, Ragged]:
        """Return list columns of the users' sequences, of `last` events only where it is set; none where not known.

        user_ids int64 [users]. The newest partition that has a user has all events of it.
        """
        found = {name: [Ragged.of_lists([[]], dtype)] for name, dtype in columns.items()}
        place, num_found = np.zeros(len(user_ids), np.int64), 1  # row 0 of what is found is the empty sequence
        for table, keys in reversed(self._tables):
            rows = keys.find(user_ids)
            new = np.flatnonzero((rows >= 0) & (place == 0))
            place[new] = num_found + np.arange(len(new))
            num_found += len(new)
            if len(new):
                for name, pieces in found.items():
                    ends = table.lengths(name, rows[new])
                    starts = np.maximum(ends - 1, 0) if last else np.zeros_like(ends)
                    pieces.append(table.take_slices(name, rows[new], starts, ends))
        return {name: Ragged.concat(pieces).take(place) for name, pieces in found.items()}

    def compare(
        self, user_ids: np.ndarray, item: np.ndarray, time: np.ndarray, relevance: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return which events are repeats (of all four values), bool, and the time of each user's newest, −inf: none.

        All arrays are [events], of the types of EVENT.
        """
        users, user = np.unique(user_ids, return_inverse=True)
        own = self.take(users, {TIME_COLUMN: np.float64}, last=True)[TIME_COLUMN]
        newest = np.full(len(users), -np.inf)
        newest[own.lengths > 0] = own.values
        repeated = np.zeros(len(user_ids), bool)
        maybe = np.flatnonzero(time <= newest[user])
        if len(maybe):
            asked, of_asked = np.unique(user_ids[maybe], return_inverse=True)
            columns = {"items": np.int32, TIME_COLUMN: np.float64, "relevance": np.float32}
            items, times, relevances = self.take(asked, columns).values()
            of_known = np.repeat(np.arange(len(asked)), items.lengths)
            known = _events(of_known, items.values, times.values, relevances.values)
            repeated[maybe] = np.isin(_events(of_asked, item[maybe], time[maybe], relevance[maybe]), known)
        return repeated, newest[user]


def _events(user: np.ndarray, item: np.ndarray, time: np.ndarray, relevance: np.ndarray) -> np.ndarray:
    """Return events as one comparable value each, [events]."""
    events = np.empty(len(user), EVENT)
    for name, values in zip(EVENT.names or (), (user, item, time, relevance), strict=True):
        events[name] = values + 0  # no −0.0, which is another value by its bytes
    return events.view(np.dtype((np.void, EVENT.itemsize)))
