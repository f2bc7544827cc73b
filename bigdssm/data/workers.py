"""Loader processes: each assembles some lanes of its rank, so that decoding is shared out and not multiplied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from bigdssm.data.dataset import Dataset
from bigdssm.data.lanes import LaneReader, Part
from bigdssm.data.mixture import MixedOrder
from bigdssm.data.order import Order
from bigdssm.errors import BigDSSMError, DataError
from bigdssm.log import get_logger

log = get_logger(__name__)


def open_parts(
    dataset: Dataset, split: str, order: Order | MixedOrder, shares: Sequence[np.ndarray], num_workers: int,
    start_step: int,
) -> Iterator[Part]:  # fmt: skip
    """Yield, step after step, the part of each share of lanes in turn; `num_workers` is 0 or one per share.

    Raises DataError: reading failed for another reason than damaged data, or a loader process died.
    """
    if num_workers == 0:
        for part in _guarded(dataset, split, order, shares[0].tolist(), start_step):
            yield _raised(part)
        return
    shared = _Shares(dataset, split, order, [share.tolist() for share in shares], start_step)
    loader = DataLoader(shared, batch_size=None, num_workers=num_workers, collate_fn=_as_it_is, prefetch_factor=4)
    try:
        for part in loader:
            yield _raised(part)
    except RuntimeError as error:  # torch's word for a loader process that was killed
        raise DataError(f"a loader process died: {' '.join(str(error).split())}") from None


class _Shares(IterableDataset):
    """Gives process i the steps of share i."""

    def __init__(
        self, dataset: Dataset, split: str, order: Order | MixedOrder, shares: list[list[int]], start_step: int
    ) -> None:
        self._args, self._shares, self._start_step = (dataset, split, order), shares, start_step

    def __iter__(self) -> Iterator[Part | str]:
        worker = get_worker_info()
        pa.set_cpu_count(1)
        for part in _guarded(*self._args, self._shares[worker.id if worker else 0], self._start_step):
            # the parent has its own mapping of the sequences
            yield part if isinstance(part, str) else replace(part, rows=replace(part.rows, sequences=None))


def _guarded(
    dataset: Dataset, split: str, order: Order | MixedOrder, lanes: list[int], start_step: int
) -> Iterator[Part | str]:
    """Yield the parts, and as the last thing the message of whatever went wrong: all ranks must stop together."""
    try:
        yield from LaneReader(dataset, split, order, lanes).parts(start_step)
    except BigDSSMError as error:
        yield str(error)
    except Exception as error:
        log.exception("reading failed")
        yield f"{type(error).__name__}: {' '.join(str(error).split())}"


def _raised(part: Part | str) -> Part:
    if isinstance(part, str):
        raise DataError(part)
    return part


def _as_it_is(part: Any) -> Any:
    return part
