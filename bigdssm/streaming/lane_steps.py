"""The steps of a rank's lanes: loader processes share out the lanes, and hand each other the parts of a step.

Process i of P reads the i-th share of the lanes, so that no block is decoded more often than by one process, and gives
the steps i, i + P, …: it sends its parts of the other steps to those that give them.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.queues import Queue
from queue import Empty
from typing import Any, TypeVar

import numpy as np

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.errors import DataError
from bigdssm.streaming.lanes import LaneReader, LaneRows
from bigdssm.streaming.mixed_order import MixedOrder
from bigdssm.streaming.order import Order
from bigdssm.streaming.workers import Steps, until_an_error

T = TypeVar("T")
LOOK_S = 0.1  # between looks at whether what is waited for is still wanted


class LaneSteps(Steps[T]):
    """The given steps, of rows of the given lanes."""

    def __init__(
        self, dataset: Dataset, split: str, order: Order | MixedOrder, lanes: Sequence[int], num_workers: int,
        steps: range, make: Callable[[Rows], T],
    ) -> None:  # fmt: skip
        super().__init__(make)
        self._args, self._dataset, self._steps = (dataset, split, order), dataset, steps
        # contiguous shares: parts stand in lane order
        self._shares = [share.tolist() for share in np.array_split(np.array(lanes), max(1, num_workers))]
        self._inboxes: list[Queue[Any]] = [get_context().Queue() for _ in self._shares] if num_workers > 1 else []
        self._ended = get_context().RawValue("b", 0)  # without a lock, with which a process may have been killed

    def read(self, process: int, processes: int) -> Iterator[LaneRows]:
        """Yield the whole steps `process`, `process` + `processes`, … of those that there are."""
        parts = until_an_error(LaneReader(*self._args, self._shares[process]).parts(self._steps.start))
        others = _Others(self._inboxes, process, lambda: bool(self._ended.value))
        try:
            for number, _ in enumerate(self._steps):
                part = next(parts)
                if isinstance(part, str):
                    others.tell(part)
                    raise DataError(part)
                if number % processes == process:
                    whole = LaneRows.joined(others.received_around(part))
                    yield replace(whole, rows=replace(whole.rows, sequences=self._dataset.sequences))
                else:
                    others.send(number % processes, part)
        except GeneratorExit:
            others.leave()
            raise

    def end(self) -> None:
        """Let loader processes that wait for each other end."""
        self._ended.value = 1


class _Others:
    """The other loader processes, to the one of number `own`."""

    def __init__(self, inboxes: Sequence[Queue[Any]], own: int, has_ended: Callable[[], bool]) -> None:
        self._inboxes, self._own, self._parent, self._has_ended = inboxes, own, os.getppid(), has_ended
        self._waiting: list[deque[LaneRows | str]] = [deque() for _ in inboxes]  # what each has sent

    def send(self, whom: int, part: LaneRows | str) -> None:
        self._inboxes[whom].put((self._own, part))

    def tell(self, message: str) -> None:
        """Send all of them, behind the parts that they still need, why there are no more."""
        for whom in range(len(self._inboxes)):
            if whom != self._own:
                self.send(whom, message)

    def leave(self) -> None:
        """Let this process end with parts unsent, which else it waits for: no more is wanted."""
        for inbox in self._inboxes:
            inbox.cancel_join_thread()

    def received_around(self, own_part: LaneRows) -> list[LaneRows]:
        """Return all processes' parts of the step, in order. Raises DataError: one could not read its own."""
        senders = range(len(self._inboxes)) if self._inboxes else [self._own]
        return [own_part if sender == self._own else self._next_of(sender) for sender in senders]

    def _next_of(self, sender: int) -> LaneRows:
        while not self._waiting[sender]:
            whose, part = self._received()
            self._waiting[whose].append(part)
        part = self._waiting[sender].popleft()
        if isinstance(part, str):
            raise DataError(part)
        return part

    def _received(self) -> tuple[int, LaneRows | str]:
        """Return the next that any has sent; end this process where nobody waits for what it makes of it."""
        while not self._has_ended() and os.getppid() == self._parent:
            with suppress(Empty):
                message: tuple[int, LaneRows | str] = self._inboxes[self._own].get(timeout=LOOK_S)
                return message
        os._exit(0)
