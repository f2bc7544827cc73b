"""Loader processes: they read the rows of a rank's lanes and build the batches of its steps.

A rank's lanes are divided among its processes. Each process reads its lanes of every step, one window of blocks at a
time, and sends the rows of step i to process i mod n, for n processes, which joins the parts and builds the batch.
"""

import os
import signal
import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from multiprocessing import get_context
from multiprocessing.queues import Queue
from queue import Empty
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from bigdssm.dataset.blocks import FORGOTTEN, BadRow, read_blocks
from bigdssm.dataset.dataset import Dataset, empty_batch
from bigdssm.dataset.rows import Rows
from bigdssm.errors import BigDSSMError, DataError, PeerError
from bigdssm.features.ragged import offsets_of
from bigdssm.loader.order import MixedOrder, Order, Window
from bigdssm.utils.log import get_logger

T = TypeVar("T")
STEPS_AHEAD = 4  # prefetched steps, at least; two per process
PARENT_CHECK_S = 1.0  # between checks whether the parent has ended
POLL_INTERVAL_S = 0.1  # between checks whether the stream was closed
CONTEXT = get_context("fork")  # of the processes: their parent is the rank, not a fork server
log = get_logger(__name__)


@dataclass(frozen=True)
class LoadedStep(Generic[T]):
    """The rows of some lanes in one step, or the value built from them; the bad rows read since the last step."""

    step: int
    value: T
    rows_planned: int  # including bad rows
    rows_skipped: int
    targets_skipped: int = 0  # bad targets of rows with other, good ones
    bad: list[BadRow] = field(default_factory=list)


class WorkerSteps(IterableDataset, Generic[T]):
    """The steps of a rank; subclasses implement `read`."""

    def __init__(self, make: Callable[[Rows], T]) -> None:
        """`make` is called in the process that has read the step."""
        self._make = make

    @abstractmethod
    def read(self, process: int, processes: int) -> Iterator[LoadedStep[Rows]]:
        """Yield the steps at the indices `process`, `process` + `processes`, …."""

    def end(self) -> None:
        """End processes that wait for other loader processes."""

    def __iter__(self) -> Iterator[LoadedStep[T] | str]:
        """Yield the steps of this process; if one fails, the error message is the last item."""
        process, processes = 0, 1
        if worker := get_worker_info():
            process, processes = worker.id, worker.num_workers
            pa.set_cpu_count(1)  # one core per loader process
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        return until_an_error(
            LoadedStep(s.step, self._make(s.value), s.rows_planned, s.rows_skipped, s.targets_skipped, s.bad)
            for s in self.read(process, processes)
        )


def load(steps: WorkerSteps[T], num_workers: int) -> Generator[LoadedStep[T]]:
    """Yield the steps in order, read by `num_workers` processes (0: this one). Close it to end them.

    Raises DataError: reading failed; PeerError: a process died.
    """
    loader = DataLoader(
        steps, batch_size=None, num_workers=num_workers, collate_fn=lambda step: step,
        worker_init_fn=partial(_obey_parent_only, os.getpid()),
        multiprocessing_context=CONTEXT if num_workers else None,
        prefetch_factor=max(2, -(-STEPS_AHEAD // num_workers)) if num_workers else None,
        generator=torch.Generator(),  # else it draws a seed from dropout's generator, once more at each resume
    )  # fmt: skip
    try:
        loaded = iter(loader)
        if num_workers and threading.current_thread() is threading.main_thread():
            # torch's handler raises anywhere in the main thread, even within a collective
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for step in loaded:
            if isinstance(step, str):
                raise DataError(step)
            yield step
    except RuntimeError as error:  # raised by torch if a loader process was killed
        raise PeerError(f"a loader process died: {' '.join(str(error).split())}") from None
    finally:
        steps.end()


def until_an_error(items: Iterator[T]) -> Iterator[T | str]:
    """Yield the items; on an error, yield its message instead of raising, so that all ranks can stop together."""
    try:
        yield from items
    except BigDSSMError as error:
        yield str(error)
    except Exception as error:
        log.exception("reading failed")
        yield f"{type(error).__name__}: {' '.join(str(error).split())}"


def _obey_parent_only(parent: int, worker: int) -> None:
    """Ignore SIGINT, and SIGTERM unless `parent` sends it; end when `parent` has ended.

    Launchers and terminals signal the whole process group, but a rank needs its loaders until all ranks have saved.
    """

    def wait_for_parent() -> None:
        while os.getppid() == parent:
            received = signal.sigtimedwait({signal.SIGTERM}, PARENT_CHECK_S)
            if received is not None and received.si_pid == parent:
                break
        os._exit(0)  # torch's exit waits until a full queue is read

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait_for_parent, daemon=True).start()


class LaneSteps(WorkerSteps[T]):
    """The given steps of the given lanes."""

    def __init__(
        self, dataset: Dataset, split: str, order: Order | MixedOrder, lanes: Sequence[int], num_workers: int,
        steps: range, make: Callable[[Rows], T],
    ) -> None:  # fmt: skip
        super().__init__(make)
        self._dataset, self._split, self._order, self._steps = dataset, split, order, steps
        # contiguous shares keep the parts in lane order
        self._shares = [share.tolist() for share in np.array_split(np.array(lanes), max(1, num_workers))]
        self._inboxes: list[Queue[Any]] = [CONTEXT.Queue() for _ in self._shares] if num_workers > 1 else []
        self._ended = CONTEXT.RawValue("b", 0)  # without a lock: a killed process may hold it

    def read(self, process: int, processes: int) -> Iterator[LoadedStep[Rows]]:
        """Yield the steps at the indices `process`, `process` + `processes`, …."""
        reader = LaneReader(self._dataset, self._split, self._order, self._shares[process])
        parts = until_an_error(map(reader.read_step, count(self._steps.start)))
        received: list[deque[LoadedStep[Rows] | str]] = [deque() for _ in self._shares]  # by sender

        def receive(sender: int) -> LoadedStep[Rows]:
            while not received[sender]:
                if self._ended.value:
                    os._exit(0)
                with suppress(Empty):
                    actual, part = self._inboxes[process].get(timeout=POLL_INTERVAL_S)
                    received[actual].append(part)
            next_part = received[sender].popleft()
            if isinstance(next_part, str):
                raise DataError(next_part)
            return next_part

        try:
            for number, _ in enumerate(self._steps):
                own = next(parts)
                if isinstance(own, str):
                    # sent to all others, after the parts that they still need
                    for receiver, inbox in enumerate(self._inboxes):
                        if receiver != process:
                            inbox.put((process, own))
                    raise DataError(own)
                if number % processes == process:
                    parts_of_step = [own if sender == process else receive(sender) for sender in range(processes)]
                    yield LoadedStep(
                        own.step,
                        replace(Rows.concat([part.value for part in parts_of_step]), sequences=self._dataset.sequences),
                        sum(part.rows_planned for part in parts_of_step),
                        sum(part.rows_skipped for part in parts_of_step),
                        sum(part.targets_skipped for part in parts_of_step),
                        [fault for part in parts_of_step for fault in part.bad],
                    )
                else:
                    self._inboxes[number % processes].put((process, own))
        except GeneratorExit:
            for inbox in self._inboxes:
                inbox.cancel_join_thread()  # this process may exit without flushing its queues
            raise

    def end(self) -> None:
        """End loader processes that wait for each other."""
        self._ended.value = 1


@dataclass
class _LoadedWindow:
    """The good rows of a window, in the lane's order."""

    plan: Window
    batch: pa.RecordBatch
    row_ids: np.ndarray  # int64 [good rows]
    good_before: np.ndarray  # int64 [rows + 1]: good rows among the first i of the order
    forgotten_before: np.ndarray  # int64 [rows + 1]: emptied rows, which are not bad


class LaneReader:
    """Reads lanes with one window of at most window_blocks blocks in memory per lane and source of a mixture.

    While a window is loaded, it is in memory twice.
    """

    def __init__(self, dataset: Dataset, split: str, order: Order | MixedOrder, lanes: Sequence[int]) -> None:
        """Nothing is read before the first step."""
        self._dataset, self._split, self._order, self._lanes = dataset, split, order, lanes
        self._index = dataset.index(split)
        self._loaded: dict[tuple[Order, int], _LoadedWindow] = {}
        self._bad: list[BadRow] = []

    def read_step(self, step: int) -> LoadedStep[Rows]:
        """Return the lanes' rows of one global step, lane after lane."""
        row_ids, batches, forgotten = [], [], 0
        for lane in self._lanes:
            order, source_step = self._order.source_step(step, lane)
            for epoch, first, last in order.ranges(source_step, lane):
                while first < last:  # the range may lie in several windows
                    window = self._window(order, epoch, lane, first)
                    start = window.plan.start
                    upto = min(last, start + len(window.plan.order))
                    a, b = (int(window.good_before[position - start]) for position in (first, upto))
                    forgotten += int(np.diff(window.forgotten_before[[first - start, upto - start]])[0])
                    row_ids.append(window.row_ids[a:b])
                    batches.append(window.batch.slice(a, b - a))
                    first = upto
        batch = pa.concat_batches(batches)
        rows = self._dataset.rows(self._split, step, np.concatenate(row_ids), batch)
        bad, self._bad = self._bad, []
        planned = self._order.rows_per_lane_step * len(self._lanes)
        return LoadedStep(step, rows, planned, planned - len(rows) - forgotten, rows.num_invalid, bad)

    def _window(self, order: Order, epoch: int, lane: int, position: int) -> _LoadedWindow:
        """Return the lane's window that contains `position`, read unless it is loaded."""
        loaded = self._loaded.get((order, lane))
        if (
            loaded is not None
            and loaded.plan.key[0] == epoch
            and 0 <= position - loaded.plan.start < len(loaded.plan.order)
        ):
            return loaded
        loaded = None
        self._loaded.pop((order, lane), None)  # freed before the next one is read
        plan = order.window(epoch, lane, position)
        batches, readable, good, emptied = [empty_batch(self._dataset.layout)], [], [], []
        contents = read_blocks(self._index, plan.blocks.tolist(), self._dataset.layout)
        for (batch, faults), first, last in zip(contents, plan.first.tolist(), plan.last.tolist(), strict=True):
            usable = np.full(last - first, batch is not None)
            readable.append(usable.copy())
            emptied.append(np.zeros(last - first, bool))
            if batch is not None:
                batches.append(batch.slice(first, last - first))
            for fault in faults:
                if fault.row is None:
                    self._bad.append(fault)
                elif first <= fault.row < last:  # other rows belong to another lane
                    usable[fault.row - first] &= fault.rows == 0
                    if fault.reason == FORGOTTEN:
                        emptied[-1][fault.row - first] = True
                    else:
                        self._bad.append(fault)
            good.append(usable)
        # the good rows are reordered once, so that a step is a slice
        keep = np.concatenate(good)[plan.order]
        index = np.cumsum(np.concatenate(readable)) - 1
        batch = pa.concat_batches(batches).take(pa.array(index[plan.order[keep]]))
        forgotten = np.concatenate(emptied)[plan.order]
        window = _LoadedWindow(plan, batch, plan.row_ids[plan.order[keep]], offsets_of(keep), offsets_of(forgotten))
        self._loaded[order, lane] = window
        return window
