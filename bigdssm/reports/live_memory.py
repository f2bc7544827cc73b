"""The memory that a computation would take, found by running it on tensors that have no memory."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HEAP_BELOW = 32 << 20  # bytes: larger allocations glibc maps by themselves, and gives back when they are freed


class LiveBytes(TorchDispatchMode):
    """Within it, counts the bytes of all storages that operations make, until the last tensor of each is gone.

    `in_heap` is the highest count of those that glibc takes from its heap.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.in_heap = self._heap_now = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        output = func(*args, **(kwargs or {}))
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in given:
                self._count(leaf.untyped_storage())
        return output

    def _count(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._counted:
            return
        self._counted.add(key)
        self._add(size)
        self.peak = max(self.peak, self.now)
        self.in_heap = max(self.in_heap, self._heap_now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self._add(-size)

    def _add(self, change: int) -> None:
        self.now += change
        if abs(change) < HEAP_BELOW:
            self._heap_now += change
