"""Loader processes: they read a rank's rows and build the batches of its steps.

Each process reads rows through a subclass of `WorkerSteps` and returns every n-th step, for n processes.
"""

from __future__ import annotations

import os
import signal
import threading
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any, Generic, TypeVar

import pyarrow as pa
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from bigdssm.dataset.blocks import BadRow
from bigdssm.dataset.rows import Rows
from bigdssm.errors import BigDSSMError, DataError, PeerError
from bigdssm.loader.lanes import LaneRows
from bigdssm.utils.log import get_logger

T = TypeVar("T")
STEPS_AHEAD = 4  # prefetched steps, at least; two per process
PARENT_CHECK_S = 1.0  # between checks whether the parent has ended
CONTEXT = get_context("fork")  # of the processes: their parent is the rank, not a fork server
log = get_logger(__name__)


@dataclass
class WorkerStep(Generic[T]):
    """The result of a rank's rows of one step, and statistics of reading them."""

    step: int
    value: T
    rows_planned: int
    rows_skipped: int
    targets_skipped: int  # bad targets of rows with other, good ones
    bad: list[BadRow]

    @classmethod
    def of(cls, read: LaneRows, make: Callable[[Rows], T]) -> WorkerStep[T]:
        """Return the result of `make` on the rows."""
        left_out = read.rows_planned - len(read.rows)
        return cls(read.rows.step, make(read.rows), read.rows_planned, left_out, read.targets_skipped, read.bad)


class WorkerSteps(IterableDataset, Generic[T]):
    """The steps of a rank; subclasses implement `read`."""

    def __init__(self, make: Callable[[Rows], T]) -> None:
        """`make` is called in the process that has read the step."""
        self._make = make

    @abstractmethod
    def read(self, process: int, processes: int) -> Iterator[LaneRows]:
        """Yield the steps at the indices `process`, `process` + `processes`, …."""

    def end(self) -> None:
        """End processes that wait for other loader processes."""

    def __iter__(self) -> Iterator[WorkerStep[T] | str]:
        """Yield the steps of this process; if one fails, the error message is the last item."""
        worker = get_worker_info()
        process, processes = (worker.id, worker.num_workers) if worker else (0, 1)
        if worker:
            _use_one_core()
        return until_an_error(WorkerStep.of(read, self._make) for read in self.read(process, processes))


def load(steps: WorkerSteps[T], num_workers: int) -> Generator[WorkerStep[T]]:
    """Yield the steps in order, read by `num_workers` processes (0: this one). Close it to end them.

    Raises DataError: reading failed; PeerError: a process died.
    """
    loader = DataLoader(
        steps, batch_size=None, num_workers=num_workers, collate_fn=_identity,
        worker_init_fn=partial(_obey_parent_only, os.getpid()),
        multiprocessing_context=CONTEXT if num_workers else None,
        prefetch_factor=max(2, -(-STEPS_AHEAD // num_workers)) if num_workers else None,
        generator=torch.Generator(),  # else it draws a seed from dropout's generator, once more at each resume
    )  # fmt: skip
    try:
        loaded = iter(loader)
        if num_workers:
            _reset_sigchld()
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


def _reset_sigchld() -> None:
    """Remove torch's SIGCHLD handler: it raises anywhere in the main thread, even within a collective."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _obey_parent_only(parent: int, worker: int) -> None:
    """Ignore SIGINT, and SIGTERM unless `parent` sends it; end when `parent` has ended.

    Launchers and terminals signal the whole process group, but a rank needs its loaders until all ranks have saved.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for_parent, args=(parent,), daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    """End this process if `parent` sends SIGTERM or has ended; torch's exit waits until a full queue is read."""
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, PARENT_CHECK_S)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)


def _use_one_core() -> None:
    """Restrict this loader process to one core."""
    pa.set_cpu_count(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _identity(item: Any) -> Any:
    return item
