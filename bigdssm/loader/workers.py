"""Loader processes: they read a rank's rows and make of them what is asked for, so that the training process need not.

A process reads rows by its kind of `WorkerSteps`, makes the batch of each whole step that it returns, and returns every
n-th step, n being the number of processes.
"""

from __future__ import annotations

import os
import signal
import threading
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
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
STEPS_AHEAD = 4  # that are read and made meanwhile, at least; two of each process
log = get_logger(__name__)


@dataclass
class WorkerStep(Generic[T]):
    """What was made of a rank's rows of one step, and what was met when they were read."""

    step: int
    what: T
    rows_planned: int
    rows_skipped: int
    targets_skipped: int  # bad ones of rows that have others
    bad: list[BadRow]

    @classmethod
    def of(cls, read: LaneRows, make: Callable[[Rows], T]) -> WorkerStep[T]:
        """Return what `make` makes of the rows that were read."""
        left_out = read.rows_planned - len(read.rows)
        return cls(read.rows.step, make(read.rows), read.rows_planned, left_out, read.targets_skipped, read.bad)


class WorkerSteps(IterableDataset, Generic[T]):
    """The steps of a rank, as `read` of its kind reads them."""

    def __init__(self, make: Callable[[Rows], T]) -> None:
        """`make` is called in whichever process has read a step."""
        self._make = make

    @abstractmethod
    def read(self, process: int, processes: int) -> Iterator[LaneRows]:
        """Yield the whole steps `process`, `process` + `processes`, … of those that there are."""

    def end(self) -> None:
        """Have the processes end that do not wait for this one alone."""

    def __iter__(self) -> Iterator[WorkerStep[T] | str]:
        """Yield the steps of this process, and as the last thing the message of whatever went wrong."""
        worker = get_worker_info()
        process, processes = (worker.id, worker.num_workers) if worker else (0, 1)
        if worker:
            _one_core_each()
        return until_an_error(WorkerStep.of(read, self._make) for read in self.read(process, processes))


def load(steps: WorkerSteps[T], num_workers: int) -> Generator[WorkerStep[T]]:
    """Yield the steps in order, read in that many loader processes (0: in this one). Close it to end them.

    Raises DataError: a process could not go on; PeerError: one died.
    """
    loader = DataLoader(
        steps, batch_size=None, num_workers=num_workers, collate_fn=_as_it_is, worker_init_fn=_heed_only_the_parent,
        prefetch_factor=max(2, -(-STEPS_AHEAD // num_workers)) if num_workers else None,
        generator=torch.Generator(),  # else it draws a seed from the one that dropout draws from, at a resume once more
    )  # fmt: skip
    try:
        loaded = iter(loader)
        if num_workers:
            _notice_deaths_when_reading()
        for made in loaded:
            if isinstance(made, str):
                raise DataError(made)
            yield made
    except RuntimeError as error:  # torch's word for a loader process that was killed
        raise PeerError(f"a loader process died: {' '.join(str(error).split())}") from None
    finally:
        steps.end()


def until_an_error(items: Iterator[T]) -> Iterator[T | str]:
    """Yield the items, and as the last thing the message of whatever went wrong: all ranks must stop together."""
    try:
        yield from items
    except BigDSSMError as error:
        yield str(error)
    except Exception as error:
        log.exception("reading failed")
        yield f"{type(error).__name__}: {' '.join(str(error).split())}"


def _notice_deaths_when_reading() -> None:
    """Take torch's SIGCHLD handler away: it raises wherever the main thread happens to be, within a collective, too."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _heed_only_the_parent(worker: int) -> None:
    """Let a loader process end on its parent's SIGTERM alone.

    Launchers send the signal to every process below them, and a terminal its own: the rank needs its loaders to go on
    to the step after which all ranks save.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _one_core_each() -> None:
    """Let this loader process use one core: the processes are the parallelism."""
    pa.set_cpu_count(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _as_it_is(made: Any) -> Any:
    return made
