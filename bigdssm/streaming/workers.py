"""Loader processes: each assembles some lanes of its rank, so that decoding is shared out and not multiplied."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import BigDSSMError, DataError, PeerError
from bigdssm.log import get_logger
from bigdssm.streaming.lanes import LaneReader, LaneRows
from bigdssm.streaming.mixed_order import MixedOrder
from bigdssm.streaming.order import Order

log = get_logger(__name__)


def open_parts(
    dataset: Dataset, split: str, order: Order | MixedOrder, shares: Sequence[np.ndarray], num_workers: int,
    start_step: int,
) -> Iterator[LaneRows]:  # fmt: skip
    """Yield, step after step, the part of each share of lanes in turn; `num_workers` is 0 or one per share.

    Raises DataError: reading failed for another reason than damaged data; PeerError: a loader process died.
    """
    if num_workers == 0:
        for part in until_an_error(_read(dataset, split, order, shares[0].tolist(), start_step)):
            yield _raised(part)
        return
    shared = _Shares(dataset, split, order, [share.tolist() for share in shares], start_step)
    yield from load(shared, num_workers, prefetch=4)


def load(source: IterableDataset, num_workers: int, prefetch: int) -> Iterator[LaneRows]:
    """Yield what `source` gives through `until_an_error`, in that many loader processes (0: in this one).

    Raises DataError and PeerError as `open_parts` does.
    """
    loader = DataLoader(
        source, batch_size=None, num_workers=num_workers, collate_fn=_as_it_is, worker_init_fn=_heed_only_the_parent,
        prefetch_factor=prefetch if num_workers else None,
        generator=torch.Generator(),  # else it draws a seed from the one that dropout draws from, at a resume once more
    )  # fmt: skip
    try:
        parts = iter(loader)
        _notice_deaths_when_reading()
        for part in parts:
            yield _raised(part)
    except RuntimeError as error:  # torch's word for a loader process that was killed
        raise PeerError(f"a loader process died: {' '.join(str(error).split())}") from None


def _read(
    dataset: Dataset, split: str, order: Order | MixedOrder, lanes: list[int], start_step: int
) -> Iterator[LaneRows]:
    yield from LaneReader(dataset, split, order, lanes).parts(start_step)


class _Shares(IterableDataset):
    """Gives process i the steps of share i."""

    def __init__(
        self, dataset: Dataset, split: str, order: Order | MixedOrder, shares: list[list[int]], start_step: int
    ) -> None:
        self._args, self._shares, self._start_step = (dataset, split, order), shares, start_step

    def __iter__(self) -> Iterator[LaneRows | str]:
        worker = get_worker_info()
        one_core_each()
        for part in until_an_error(_read(*self._args, self._shares[worker.id if worker else 0], self._start_step)):
            # the parent has its own mapping of the sequences
            yield part if isinstance(part, str) else replace(part, rows=replace(part.rows, sequences=None))


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


def one_core_each() -> None:
    """Let this loader process use one core: the processes are the parallelism."""
    pa.set_cpu_count(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def until_an_error(parts: Iterator[LaneRows]) -> Iterator[LaneRows | str]:
    """Yield the parts, and as the last thing the message of whatever went wrong: all ranks must stop together."""
    try:
        yield from parts
    except BigDSSMError as error:
        yield str(error)
    except Exception as error:
        log.exception("reading failed")
        yield f"{type(error).__name__}: {' '.join(str(error).split())}"


def _raised(part: LaneRows | str) -> LaneRows:
    if isinstance(part, str):
        raise DataError(part)
    return part


def _as_it_is(part: Any) -> Any:
    return part
