"""Rows of a table on this rank: their division over ranks, initial values, and storage with an index.

A row belongs to one of SHARDS virtual shards, and a rank owns a range of shards, so that a table saved by any number of
ranks can be read by any other. A row that was never updated is not stored: its value is a function of (seed, table,
row). Shapes: n rows, d width of a row.
"""

import mmap
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from bigdssm.config.components import TableOptimizerConfig
from bigdssm.errors import DiskFullError
from bigdssm.features.base import FIRST_CODE, OUT_OF_VOCABULARY
from bigdssm.tables.initial_rows import initial_rows
from bigdssm.utils.device import to_device
from bigdssm.utils.hashing import derive_key, hash64, mix64

SHARDS = 4096  # virtual shards, a power of 2: the maximum number of ranks
_SPREAD = 2_654_435_761  # odd: neighbouring rows, often of similar frequency, are in distant shards
_INVERSE_SPREAD = pow(_SPREAD, -1, SHARDS)  # from a shard to its rows, modulo SHARDS

ROWS_AT_ONCE = 1 << 16  # copied to the host
DIRECT_ROWS = 1 << 31  # of a table whose storage has a position for each row; larger ones have keyed storage

ABSENT = -1  # a slot without a row, and a row without a slot
FIRST_SLOTS = 1024  # a power of 2
_ENTRIES_PER_SLOT = 2  # a power of 2: a search ends after about 1.5 entries


@dataclass(frozen=True)
class TableSpec:
    """A table: its name, number of rows (with `hash_rows` of codes, whose vectors are sums of rows) and width."""

    name: str
    rows: int
    dim: int
    std: float = 0.02  # of initial values
    admit_after: int = 1  # steps with a row until it is used
    evict_after: int = 0  # steps without a row until it is evicted; 0: never
    dtype: torch.dtype = torch.float32  # of stored rows; states and updates are float32
    capacity: int = 0  # stored rows above which the least recently updated ones are evicted; 0: all are stored

    hashes: int = 1  # rows of a code, with `hash_rows`
    hash_rows: int = 0  # rows that the codes from 2 on share; 0: each has a row

    @property
    def stored_rows(self) -> int:
        """The number of rows of the storage."""
        return FIRST_CODE + self.hash_rows if self.hash_rows else self.rows

    @property
    def is_keyed(self) -> bool:
        """Whether updated rows alone take a place in the storage."""
        return self.stored_rows > DIRECT_ROWS or 0 < self.capacity < self.stored_rows

    def hashed(self, codes: np.ndarray) -> np.ndarray:
        """Return the rows of codes int64 [...], int64 [..., hashes]; padding and out of vocabulary have one each."""
        keys = (derive_key(hash64(self.name), number) for number in range(self.hashes))
        rows = np.stack(
            [FIRST_CODE + (mix64(codes, key) % np.uint64(self.hash_rows)).astype(np.int64) for key in keys], -1
        )
        first = np.where(np.arange(self.hashes) == 0, codes[..., None], 0)
        return np.asarray(np.where(codes[..., None] < FIRST_CODE, first, rows))

    @property
    def shard_capacity(self) -> int:
        """The capacity of a virtual shard."""
        return -(-self.capacity // SHARDS)


@dataclass(frozen=True)
class RowPartition:
    """The rows of a rank: those of its range of virtual shards. All arguments and results are int64 arrays."""

    rank: int
    world_size: int

    def owner(self, rows: np.ndarray) -> np.ndarray:
        """Return the rank of each row."""
        return np.asarray(shard_of(rows) * self.world_size // SHARDS)

    def owns(self, rows: np.ndarray) -> np.ndarray:
        """Return whether rows are this rank's, bool [n]."""
        return np.asarray(self.owner(rows) == self.rank)

    @property
    def shards(self) -> tuple[int, int]:
        """The range [first, end) of this rank's shards."""
        return -(-self.rank * SHARDS // self.world_size), -(-(self.rank + 1) * SHARDS // self.world_size)

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """Return the positions of this rank's rows in its storage; rows that are added later follow."""
        first, end = self.shards
        return np.asarray(rows // SHARDS * (end - first) + shard_of(rows) - first)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Return the rows at positions of the storage; the inverse of `positions`."""
        first, end = self.shards
        size = end - first
        return np.asarray(positions // size * SHARDS + (positions % size + first) * _INVERSE_SPREAD % SHARDS)

    def capacity(self, rows: int) -> int:
        """Return the size of the storage for a table of `rows` rows."""
        first, end = self.shards
        return -(-rows // SHARDS) * (end - first)


def shard_of(rows: np.ndarray) -> np.ndarray:
    """Return the virtual shard of each row."""
    return rows % SHARDS * _SPREAD % SHARDS


def table_key(seed: int, name: str) -> int:
    """Return the key of a table's initial values."""
    return derive_key(seed, hash64(name))


class SparseFile:
    """A memory-mapped file of zeros without a name, whose pages get disk blocks before they are written.

    A write to a mapped page without a block ends the process (SIGBUS) when the disk is full.
    """

    def __init__(self, folder: Path, rows: int, row_bytes: int) -> None:
        self._folder, self._row_bytes = folder, row_bytes
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, removed with the process
        self._file.truncate(rows * row_bytes)
        self.mapped = mmap.mmap(self._file.fileno(), 0)
        self.mapped.madvise(mmap.MADV_RANDOM)  # a row is read without those around it
        self._reserved = np.zeros(-(-len(self.mapped) // mmap.PAGESIZE), bool)

    def reserve(self, rows: np.ndarray | None = None) -> None:
        """Allocate the pages of rows, by default of all. Raises DiskFullError."""
        pages = np.arange(len(self._reserved))
        if rows is not None:
            first, last = rows * self._row_bytes // mmap.PAGESIZE, ((rows + 1) * self._row_bytes - 1) // mmap.PAGESIZE
            span = np.arange(2 + self._row_bytes // mmap.PAGESIZE)
            pages = np.unique(np.minimum(first[:, None] + span, last[:, None]))
            pages = pages[~self._reserved[pages]]
        for run in np.split(pages, np.flatnonzero(np.diff(pages) > 1) + 1) if len(pages) else ():
            try:
                os.posix_fallocate(self._file.fileno(), int(run[0]) * mmap.PAGESIZE, len(run) * mmap.PAGESIZE)
            except OSError as error:
                raise DiskFullError(
                    f"the rows of sharded tables need more space in {self._folder}: {error.strerror}; free some, or "
                    "choose another engine.table_dir, and resume from the last checkpoint"
                ) from None
            self._reserved[run] = True


class RowIndex:
    """Slots of rows in keyed storage: a hash table with open addressing on the host, vectorised over rows.

    Shapes: n rows, S slots. A slot is a position in the arrays of a RowStore; slot 0 is that of absent rows.
    """

    def __init__(self) -> None:
        self.rows = np.full(FIRST_SLOTS, ABSENT, np.int64)  # [S]: the row in each slot
        self.free: np.ndarray  # slots without a row
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
        """Free slots; their entries are skipped by look-ups until the next `_build` removes them."""
        self.rows[slots] = ABSENT
        self.free = np.append(self.free, slots)

    def grow(self) -> None:
        """Double the number of slots."""
        self.rows = np.concatenate([self.rows, np.full(len(self.rows), ABSENT, np.int64)])
        self._build()

    def _build(self) -> None:
        self._entries = np.zeros(_ENTRIES_PER_SLOT * len(self.rows), np.int32)  # slots
        self._filled = 0  # their number
        self.free = np.flatnonzero(self.rows[1:] == ABSENT) + 1
        self._insert(np.flatnonzero(self.rows != ABSENT))

    def _insert(self, slots: np.ndarray) -> None:
        entry, self._filled = self._first(self.rows[slots]), self._filled + len(slots)
        while len(slots):
            empty = self._entries[entry] == 0
            self._entries[entry[empty]] = slots[empty]  # of several slots at one entry, one is placed
            left = self._entries[entry] != slots
            slots, entry = slots[left], (entry[left] + 1) % len(self._entries)

    def _first(self, rows: np.ndarray) -> np.ndarray:
        return (mix64(rows, 0) % np.uint64(len(self._entries))).astype(np.int64)


class RowStore:
    """The rows of one table on this rank, with their optimizer states; memory is allocated as rows are written.

    Storage is direct, with a position for each row of this rank, or keyed, with a slot for each updated row alone.
    """

    def __init__(
        self, spec: TableSpec, key: int, partition: RowPartition, optimizer: TableOptimizerConfig,
        device: torch.device, folder: Path | None = None,
    ) -> None:  # fmt: skip
        """`device`: of the storage; `folder`: of temporary files that hold it instead of memory."""
        self.spec, self.partition, self.key, self._optimizer = spec, partition, key, optimizer
        self._device, self._folder = device, folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, SparseFile] = {}  # of values and states
        self._slots = RowIndex() if spec.is_keyed else None
        size = partition.capacity(spec.stored_rows) if self._slots is None else len(self._slots.rows)
        widths = optimizer.state_widths(spec.dim)
        self._states = list(widths)
        self.stored = {name: self._allocate(name, size, n) for name, n in {"values": spec.dim, **widths}.items()}
        # On the host, where rows are known before they are read: the step of the last update plus 1, 0 for none; and
        # the number of steps with the row, up to `admit_after`.
        self.updated: np.ndarray = self._on_host(size, 1, np.int32).reshape(-1)
        counted = spec.admit_after > 1
        self.occurrences = self._on_host(size, 1, np.int16).reshape(-1) if counted else None
        self._released: list[tuple[int, np.ndarray]] = []  # a step, and rows that it evicted before they were replaced
        self.evictions_known_from = 0  # the first step from which all of them are listed
        self._read_initial: tuple[np.ndarray, Tensor] | None = None  # distinct rows of the last read, and their values

    def _on_host(self, size: int, width: int, dtype: type, name: str | None = None) -> np.ndarray:
        """Return zeros [size, width]; in a file, the pages of those without a name are allocated at once."""
        if self._folder is None or not size:
            return np.zeros((size, width), dtype)
        file = SparseFile(self._folder, size, width * np.dtype(dtype).itemsize)
        if name is None:
            file.reserve()
        else:
            self._files[name] = file
        return np.frombuffer(file.mapped, dtype).reshape(size, width)

    def _allocate(self, name: str, size: int, width: int) -> Tensor:
        """Return zeros [size, width] for values or a state."""
        dtype = self.spec.dtype if name == "values" else torch.float32
        if self._folder is None:
            return torch.zeros(size, width, dtype=dtype, device=self._device)
        narrow = dtype == torch.bfloat16
        stored = torch.from_numpy(self._on_host(size, width, np.uint16 if narrow else np.float32, name))
        return stored.view(torch.bfloat16) if narrow else stored

    def _positions(self, rows: np.ndarray) -> np.ndarray:
        """Return the positions of rows in the storage, 0 for rows without a slot."""
        return self.partition.positions(rows) if self._slots is None else self._slots.find(rows)

    def _rows(self, positions: np.ndarray) -> np.ndarray:
        return self.partition.rows(positions) if self._slots is None else self._slots.rows[positions]

    def _assign(self, rows: np.ndarray, step: int) -> np.ndarray:
        """Return the positions of distinct rows in the storage, for writing; rows without a slot get one.

        Raises DiskFullError.
        """
        positions = self._positions(rows)
        if self._slots is not None:
            if len(absent := np.flatnonzero(positions == 0)) > len(self._slots.free):
                self._release(np.flatnonzero(self._expired(np.arange(len(self.updated)), step)), step)
                while len(self._slots.free) < len(rows) + len(self.updated) // 4:
                    self._grow()
                positions = self._positions(rows)
                absent = np.flatnonzero(positions == 0)
            positions[absent] = self._slots.add(rows[absent])
        for file in self._files.values():
            file.reserve(positions)
        return positions

    def _release(self, positions: np.ndarray, step: int) -> None:
        """Return rows to their initial values, and free their slots."""
        self._released.append((step, self._rows(positions)))
        if sum(len(rows) for _, rows in self._released) > len(self.updated):  # no more than the table itself
            self._released, self.evictions_known_from = [], step + 1
        self.updated[positions] = 0
        if self.occurrences is not None:
            self.occurrences[positions] = 0
        for name in self._states:
            self.stored[name].index_fill_(0, self._index(positions), 0)
        if self._slots is not None:
            self._slots.remove(positions)

    def _grow(self) -> None:
        """Double the number of slots, and the arrays one by one."""
        assert self._slots is not None
        self._slots.grow()
        size = len(self._slots.rows)
        for name, stored in self.stored.items():
            self.stored[name] = self._allocate(name, size, stored.shape[1])
            if name in self._files:
                self._files[name].reserve(np.arange(len(stored)))
            self.stored[name][: len(stored)] = stored
        updated = self._on_host(size, 1, np.int32).reshape(-1)
        updated[: len(self.updated)] = self.updated
        self.updated = updated
        if self.occurrences is not None:
            occurrences = self._on_host(size, 1, np.int16).reshape(-1)
            occurrences[: len(self.occurrences)] = self.occurrences
            self.occurrences = occurrences

    def is_admitted(self, rows: np.ndarray, step: int) -> np.ndarray:
        """Return whether rows are in use before `step`, bool [n]; others read the out-of-vocabulary row.

        That row itself is always admitted.
        """
        if self.occurrences is None:
            return np.ones(len(rows), bool)
        positions = self._positions(rows)
        admitted = (self.occurrences[positions] >= self.spec.admit_after) & ~self._expired(positions, step)
        return np.asarray(admitted | (rows == OUT_OF_VOCABULARY))

    def _expired(self, positions: np.ndarray, step: int) -> np.ndarray:
        last, limit = self.updated[positions].astype(np.int64) - 1, self.spec.evict_after
        return np.asarray((last >= 0) & (step - last > limit) if limit else np.zeros(len(positions), bool))

    def read(self, rows: np.ndarray, step: int) -> Tensor:
        """Return this rank's rows before `step`, float32 [n, d] on the device of the storage."""
        positions = self._positions(rows)
        if self._files:  # only stored rows are read: tmpfs adds blocks to pages that are read
            stored = np.flatnonzero(self.updated[positions])
            values = torch.zeros(len(rows), self.spec.dim)
            values[stored] = self.stored["values"][positions[stored]].float()
        else:
            values = self.stored["values"][self._index(positions)].float()
        return self._with_initial(values, rows, positions, step)

    def _with_initial(self, values: Tensor, rows: np.ndarray, positions: np.ndarray, step: int) -> Tensor:
        """Set rows that were never updated, or are evicted before `step`, to their initial values."""
        new = np.flatnonzero((self.updated[positions] == 0) | self._expired(positions, step))
        if len(new):
            index = to_device(torch.from_numpy(new), values.device)
            values.index_copy_(0, index, self._initial(rows[new], values.device))
        return values

    def _initial(self, rows: np.ndarray, device: torch.device) -> Tensor:
        """Return the initial values of rows; those of an update are computed once, when they are read."""
        if self._read_initial is None or not np.isin(rows, self._read_initial[0]).all():
            distinct = np.unique(rows)
            self._read_initial = distinct, initial_rows(distinct, self.spec.dim, self.key, self.spec.std, device)
        distinct, values = self._read_initial
        if np.array_equal(distinct, rows):
            return values
        return values.index_select(0, to_device(torch.from_numpy(np.searchsorted(distinct, rows)), device))

    def update(self, rows: np.ndarray, gradients: Tensor, lr: float, step: int) -> None:
        """Apply gradients float32 [n, d] to distinct rows."""
        positions = self._assign(rows, step)
        index = self._index(positions)
        states = {name: stored[index] for name, stored in self.stored.items()}
        values = self._with_initial(states.pop("values").float(), rows, positions, step)
        if len(expired := np.flatnonzero(self._expired(positions, step))):
            for state in states.values():
                state.index_fill_(0, to_device(torch.from_numpy(expired), state.device), 0)
            if self.occurrences is not None:
                self.occurrences[positions[expired]] = 0
        self._optimizer.update(values, gradients.to(values.device), states, lr, step)
        self._write(positions, values, states)
        if self.occurrences is not None:
            self.occurrences[positions] = np.minimum(self.occurrences[positions] + 1, self.spec.admit_after)
        self.updated[positions] = step + 1
        self._read_initial = None

    def trim(self, step: int) -> None:
        """Reduce each virtual shard with more rows than its capacity to 7/8 of it; the rows updated last are retained.

        Of rows updated in the same step, the lowest are retained. A rank owns whole shards: the evicted rows do not
        depend on the number of ranks, and ranks need not communicate.
        """
        if not self.spec.capacity:
            return
        positions = np.flatnonzero(self.updated)
        shards = shard_of(self._rows(positions))
        counts = np.bincount(shards, minlength=SHARDS)
        full = np.flatnonzero(counts[shards] > self.spec.shard_capacity)
        if not len(full):
            return
        positions, shards = positions[full], shards[full]
        order = np.lexsort((self._rows(positions), -self.updated[positions], shards))
        firsts = np.searchsorted(shards[order], shards[order])  # of the shard
        # less than the capacity, so that few shards are sorted the next time
        retained = self.spec.shard_capacity - self.spec.shard_capacity // 8
        self._release(positions[order[np.arange(len(order)) - firsts >= retained]], step)

    def content(self, step: int, *, states: bool) -> dict[str, Tensor]:
        """Return the updated rows that are not evicted before `step`, ascending, on the host: `rows` and `values`.

        states: also `updated`, `occurrences` and the optimizer states, of all rows; else only the admitted rows.
        """
        return self.content_of(*self.saved(step, states=states), states=states)

    def saved(self, step: int, *, states: bool, since: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of `content` that step `since` or a later one updated, and their positions in the storage."""
        positions = np.flatnonzero(self.updated > since)
        positions = positions[~self._expired(positions, step)]
        rows = self._rows(positions)
        order = np.argsort(rows)
        if not states:
            order = order[self.is_admitted(rows[order], step)]
        return rows[order], positions[order]

    def evicted(self, step: int, since: int) -> np.ndarray:
        """Return the rows that are evicted before `step` and were not before step `since`, ascending.

        Known for `since` from `evictions_known_from` on; those of earlier steps are forgotten.
        """
        self._released = [(evicted_step, rows) for evicted_step, rows in self._released if evicted_step >= since]
        positions = np.flatnonzero(self.updated)
        positions = positions[self._expired(positions, step) & ~self._expired(positions, since)]
        released = (rows[self.updated[self._positions(rows)] == 0] for _, rows in self._released)
        return np.unique(np.concatenate([self._rows(positions), *released]))

    def content_of(self, rows: np.ndarray, positions: np.ndarray, *, states: bool) -> dict[str, Tensor]:
        """Return the `content` of rows at positions of the storage."""
        content = {"rows": torch.from_numpy(rows), "values": self._copied(self.stored["values"], positions)}
        if states:
            content["updated"] = torch.from_numpy(self.updated[positions])
            if self.occurrences is not None:
                content["occurrences"] = torch.from_numpy(self.occurrences[positions].astype(np.int32))
            content |= {name: self._copied(self.stored[name], positions) for name in self._states}
        return content

    def _copied(self, stored: Tensor, positions: np.ndarray) -> Tensor:
        """Return rows on the host, copied in parts: the device has no memory for another table."""
        copied = torch.empty(len(positions), stored.shape[1], dtype=stored.dtype)
        for first in range(0, len(positions), ROWS_AT_ONCE):
            part = slice(first, first + ROWS_AT_ONCE)
            copied[part] = stored[self._index(positions[part])].cpu()
        return copied

    def load(self, content: dict[str, Tensor]) -> None:
        """Set rows of this rank to saved ones, with their states if they were saved."""
        positions = self._assign(content["rows"].numpy(), 0)
        self._write(positions, content["values"], {name: content[name] for name in self._states if name in content})
        self.updated[positions] = content["updated"].numpy() if "updated" in content else 1
        if self.occurrences is not None:
            saved = content.get("occurrences")
            self.occurrences[positions] = self.spec.admit_after if saved is None else saved.numpy()

    def initialize(self, rows: np.ndarray, vectors: Tensor, step: int = 1) -> None:
        """Set the first columns of this rank's rows among `rows` int64 [n], not yet updated, to vectors [n, ≤ d]."""
        owned = np.flatnonzero(self.partition.owns(rows))
        values = self.read(rows[owned], 0)
        values[:, : vectors.shape[1]] = vectors[torch.from_numpy(owned)].to(values)
        self.load(
            {
                "rows": torch.from_numpy(rows[owned]),
                "values": values,
                "updated": torch.full((len(owned),), max(1, step)),
            }
        )

    def _write(self, positions: np.ndarray, values: Tensor, states: dict[str, Tensor]) -> None:
        for name, rows in {"values": values, **states}.items():
            self.stored[name].index_copy_(0, self._index(positions), rows.to(self.stored[name]))

    def _index(self, positions: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(positions), self.stored["values"].device)
