"""Rows of a table that are kept on the device, while the table is in the memory of the host or in files."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from bigdssm.utils.device import to_device

ABSENT = -1


class RowCache:
    """The rows that were used last, with their optimizer states; rows that changed are written when they are replaced.

    Shapes: n distinct positions in the storage, R rows of the cache.
    """

    def __init__(self, stored: Mapping[str, Tensor], rows: int, device: torch.device) -> None:
        """`stored`: tensors [size, d] of the storage, by name, in host memory; `rows`: R."""
        self._stored, self._device = stored, device
        self._cached = {
            name: torch.zeros(rows, tensor.shape[1], dtype=tensor.dtype, device=device)
            for name, tensor in stored.items()
        }
        self._slot_of: np.ndarray  # int32 [size], plus 1; 0: not in the cache
        self._position = np.full(rows, ABSENT, np.int64)
        self._last_use = np.zeros(rows, np.int64)  # number of the read
        self._changed = np.zeros(rows, bool)
        self._reads = 0
        self.use(stored)

    def use(self, stored: Mapping[str, Tensor]) -> None:
        """Use other tensors of the storage, whose rows are those of the ones before. The cache must be clear."""
        self._stored, self._slot_of = stored, np.zeros(len(next(iter(stored.values()))), np.int32)

    def hits(self, local: np.ndarray) -> int:
        """Return the number of positions that are in the cache."""
        return int(np.count_nonzero(self._slot_of[local]))

    def read(self, local: np.ndarray) -> dict[str, Tensor]:
        """Return the tensors [n, d] of positions, on the device, and keep them as long as there is space."""
        slots = self._slot_of[local].astype(np.int64) - 1
        missing = np.flatnonzero(slots == ABSENT)
        self._reads += 1
        self._last_use[slots[slots != ABSENT]] = self._reads
        # missing rows replace those that were used longest ago
        unused = np.flatnonzero(self._last_use < self._reads)
        missing = missing[: len(unused)]
        if len(missing) < len(unused):
            unused = unused[np.argpartition(self._last_use[unused], len(missing))[: len(missing)]]
        self._write_back(unused[self._changed[unused]])
        replaced, new = self._position[unused], local[missing]
        self._slot_of[replaced[replaced != ABSENT]] = 0
        self._slot_of[new] = unused + 1
        self._position[unused], self._last_use[unused] = new, self._reads
        for name, stored in self._stored.items():
            rows = to_device(stored[torch.from_numpy(new)], self._device)
            self._cached[name].index_copy_(0, self._index(unused), rows)
        slots[missing] = unused
        # positions without space are read from the storage
        inside, outside = np.flatnonzero(slots != ABSENT), np.flatnonzero(slots == ABSENT)
        tensors = {}
        for name, stored in self._stored.items():
            tensors[name] = torch.empty(len(local), stored.shape[1], dtype=stored.dtype, device=self._device)
            tensors[name].index_copy_(0, self._index(inside), self._cached[name][self._index(slots[inside])])
            stored_rows = to_device(stored[torch.from_numpy(local[outside])], self._device)
            tensors[name].index_copy_(0, self._index(outside), stored_rows)
        return tensors

    def write(self, local: np.ndarray, tensors: Mapping[str, Tensor]) -> None:
        """Set positions to tensors [n, d]."""
        slots = self._slot_of[local].astype(np.int64) - 1
        inside, outside = np.flatnonzero(slots != ABSENT), np.flatnonzero(slots == ABSENT)
        self._changed[slots[inside]] = True
        for name, tensor in tensors.items():
            cached_rows = tensor[torch.from_numpy(inside).to(tensor.device)].to(self._cached[name])
            self._cached[name].index_copy_(0, self._index(slots[inside]), cached_rows)
            stored_rows = tensor[torch.from_numpy(outside).to(tensor.device)].to(self._stored[name])
            self._stored[name].index_copy_(0, torch.from_numpy(local[outside]), stored_rows)

    def flush(self) -> None:
        """Write all changed rows to the storage."""
        self._write_back(np.flatnonzero(self._changed))

    def clear(self) -> None:
        """Write all changed rows to the storage, and keep none."""
        self.flush()
        self._slot_of[self._position[self._position != ABSENT]] = 0
        self._position[:] = ABSENT
        self._last_use[:] = 0

    def _write_back(self, slots: np.ndarray) -> None:
        for name, stored in self._stored.items():
            rows = self._cached[name][self._index(slots)].to(stored.device)
            stored.index_copy_(0, torch.from_numpy(self._position[slots]), rows)
        self._changed[slots] = False

    def _index(self, numbers: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(numbers), self._device)
