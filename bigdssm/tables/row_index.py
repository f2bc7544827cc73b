"""Slots of rows in keyed storage: a hash table with open addressing on the host, vectorised over rows.

Shapes: n rows, S slots. A slot is a position in the arrays of a RowStore; slot 0 is that of absent rows.
"""

import numpy as np

from bigdssm.utils.hashing import mix64

FIRST_SLOTS = 1024  # a power of 2
FREE = -1
_TABLE = 2  # entries per slot, a power of 2: a search ends after about 1.5 of them


class RowIndex:
    """Maps rows to slots."""

    def __init__(self) -> None:
        self.rows = np.full(FIRST_SLOTS, FREE, np.int64)  # [S]: the row in each slot
        self.free: np.ndarray  # slots without a row
        self._filled: int  # entries with a slot
        self._build()

    def find(self, rows: np.ndarray) -> np.ndarray:
        """Return the slot of each row, int64 [n], 0 for absent rows."""
        slots, entry, pending = np.zeros(len(rows), np.int64), self._first(rows), np.arange(len(rows))
        while len(pending):
            slot_at = self._entries[entry[pending]]
            hit = self.rows[slot_at] == rows[pending]
            slots[pending[hit]] = slot_at[hit]
            pending = pending[(slot_at != 0) & ~hit]
            entry[pending] = (entry[pending] + 1) % len(self._entries)
        return slots

    def add(self, rows: np.ndarray) -> np.ndarray:
        """Assign free slots to distinct absent rows, at most as many as there are in `free`; return them, int64 [n]."""
        if self._filled + len(rows) > len(self._entries) * 3 // 4:
            self._build()
        slots, self.free = self.free[: len(rows)], self.free[len(rows) :]
        self.rows[slots] = rows
        self._insert(slots)
        return slots

    def remove(self, slots: np.ndarray) -> None:
        """Free slots; searches pass their entries until the table is built again."""
        self.rows[slots] = FREE
        self.free = np.append(self.free, slots)

    def grow(self) -> None:
        """Double the number of slots."""
        self.rows = np.concatenate([self.rows, np.full(len(self.rows), FREE, np.int64)])
        self._build()

    def _build(self) -> None:
        self._entries, self._filled = np.zeros(_TABLE * len(self.rows), np.int32), 0
        self.free = np.flatnonzero(self.rows[1:] == FREE) + 1
        self._insert(np.flatnonzero(self.rows != FREE))

    def _insert(self, slots: np.ndarray) -> None:
        entry, self._filled = self._first(self.rows[slots]), self._filled + len(slots)
        while len(slots):
            empty = self._entries[entry] == 0
            self._entries[entry[empty]] = slots[empty]  # of several slots at one entry, one is placed
            left = self._entries[entry] != slots
            slots, entry = slots[left], (entry[left] + 1) % len(self._entries)

    def _first(self, rows: np.ndarray) -> np.ndarray:
        return (mix64(rows, 0) % np.uint64(len(self._entries))).astype(np.int64)
