"""PairStream: this rank's rows of every global step, in an exactly reproducible order, and its saved state."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from typing import Any, TypeVar

import numpy as np

from bigdssm.dataset.dataset import Dataset, empty_batch
from bigdssm.dataset.partition import ROUND_STEPS, steps_per_round
from bigdssm.dataset.rows import Rows
from bigdssm.dataset.schema import Schema
from bigdssm.errors import ConfigError, DataError
from bigdssm.loader.lanes import LaneReader, LaneRows
from bigdssm.loader.mixed_order import MixedOrder
from bigdssm.loader.order import WINDOW_BLOCKS, Order, Tail
from bigdssm.loader.row_stream import RowStream
from bigdssm.loader.workers import CONTEXT, WorkerSteps, until_an_error
from bigdssm.utils.hashing import derive_key
from bigdssm.utils.log import get_logger

T = TypeVar("T")
STATE_FORMAT = 1
logger = get_logger(__name__)


class PairStream(RowStream):
    """Rank k of R reads the lanes k, k + R, ….

    Bad rows are skipped, so a rank's Rows may be empty. max_bad_fraction applies to the rows of all epochs started
    since the stream was opened: a few bad rows at the beginning do not stop it.
    """

    def __init__(
        self, dataset: str | Path | Dataset, *, split: str = "train", rows_global: int, lanes: int, seed: int = 0,
        rank: int = 0, world_size: int = 1, num_workers: int = 0, start_step: int = 0, tail: Tail = "carry",
        window_blocks: int = WINDOW_BLOCKS, max_bad_fraction: float = 0.001, quarantine: Path | None = None,
    ) -> None:  # fmt: skip
        """Plan the stream; nothing is read before the first `next`.

        num_workers: reading processes (0: this one), each for some of this rank's lanes. quarantine: JSONL file of this
        rank's skipped rows. Raises ConfigError: inconsistent numbers; DataError: the dataset cannot be opened, or has
        fewer rows than `Order` needs.
        """
        if world_size > lanes:
            raise ConfigError(f"world_size={world_size} is more than lanes={lanes}; use at least one lane per rank")
        self._local_lanes = range(rank, lanes, world_size)
        super().__init__(
            dataset if isinstance(dataset, Dataset) else Dataset.open(dataset), rank=rank, world_size=world_size,
            num_workers=min(num_workers, len(self._local_lanes)), start_step=start_step,
            max_bad_fraction=max_bad_fraction, quarantine=quarantine,
        )  # fmt: skip
        self.split = split
        plan = partial(Order, rows_global=rows_global, lanes=lanes, tail=tail, window_blocks=window_blocks)
        self.order: Order | MixedOrder = (
            self._mixed(plan, seed) if self.dataset.sources else plan(self.dataset.index(split).rows, seed=seed)
        )
        # The global steps after which every row (tail="drop": every row except the tail) was read. In a mixture, where
        # each source has separate epochs, this is the total number of rows over rows_global.
        self.steps_per_epoch = self.order.steps_per_epoch
        self.queries_per_row = self._mean_queries()
        self.queries_per_step = rows_global * self.queries_per_row
        if self.order.rows_dropped_per_epoch:
            logger.info("each epoch drops %d rows that do not fill a step", self.order.rows_dropped_per_epoch)

    def state(self, step: int | None = None) -> dict[str, Any]:
        """Return the stream's state before `step` (by default the next one), in JSON types; equal on all ranks."""
        order, step = self.order, self.step if step is None else step
        mixture: dict[str, Any] = {}
        if isinstance(order, MixedOrder):
            names = [source.name for source in self.dataset.sources]
            mixture = {
                "mixture": [[n, t] for n, t in zip(names, order.steps_per_round, strict=True)],
                "batches": order.batches,
            }
        return {
            "format": STATE_FORMAT,
            "step": step,
            "epoch": step // order.steps_per_epoch,
            "seed": order.seed,
            "split": self.split,
            "lanes": order.lanes,
            "rows_global": order.rows_global,
            "tail": order.tail,
            "window_blocks": order.window_blocks,
            "schema": self.dataset.schema.fingerprint(),
            "vocabularies": self.dataset.schema.vocabulary_sizes(),
            "tokenizer": self.dataset.tokenizer_hash,
            "extents": [list(extent) for extent in self.dataset.extents],
            "partitions": [[partition.name, partition.identity] for partition in self.dataset.partitions],
            **mixture,
        }

    def check_state(self, state: dict[str, Any]) -> bool:
        """Return True if the stream can resume from `state`, False if it starts on partitions added since.

        Raises DataError with all other differences.
        """
        return check_state(self.dataset, self.state(), state)

    def doc_weights(self) -> np.ndarray:
        """Return the number of positives per document in an epoch, float64 [num_docs]."""
        if not isinstance(self.order, MixedOrder):
            return self.dataset.doc_counts().astype(np.float64)
        total = np.zeros(self.dataset.catalogue.num_docs)
        for source, order, steps in zip(
            self.dataset.sources, self.order.orders, self.order.steps_per_round, strict=True
        ):
            counts = self.dataset.doc_counts(range(source.first, source.last))
            total += counts * (steps / ROUND_STEPS * self.order.rows_per_epoch / order.num_rows)
        return total

    def _mixed(self, plan: Callable[..., Order], seed: int) -> MixedOrder:
        """Return the plan of the dataset's mixture; in the index, the blocks of a source are contiguous."""
        sources, index = self.dataset.sources, self.dataset.index(self.split)
        orders = []
        for number, source in enumerate(sources):
            lo, hi = (int(block) for block in np.searchsorted(index.partition, [source.first, source.last]))
            key, first_row = derive_key(seed, number), int(index.first_row[lo])
            try:
                orders.append(plan(index.rows[lo:hi], seed=key, first_block=lo, first_row=first_row))
            except DataError as error:
                raise DataError(f"data.mixture: {source.name} is too small: {error}") from None
        steps = steps_per_round([source.name for source in sources], [source.weight for source in sources])
        return MixedOrder(orders, steps, self.dataset.batches, seed)

    def _mean_queries(self) -> float:
        index, order = self.dataset.index(self.split), self.order
        if not isinstance(order, MixedOrder):
            return index.num_queries / index.num_rows
        per_row = 0.0
        for source, steps in zip(self.dataset.sources, order.steps_per_round, strict=True):
            mask = (index.partition >= source.first) & (index.partition < source.last)
            per_row += steps / ROUND_STEPS * float(index.queries[mask].sum() / index.rows[mask].sum())
        return per_row

    def _steps(self, steps: range, make: Callable[[Rows], T]) -> WorkerSteps[T]:
        return LaneSteps(self.dataset, self.split, self.order, self._local_lanes, self._num_workers, steps, make)

    def _rows_for_limit(self, rows_read: int, step: int) -> int:
        rows, per_step = self.order.rows_per_epoch, self.order.rows_global
        return rows * max(1, -(-step * per_step // rows) - self._opened_at * per_step // rows)

    def _empty_rows(self) -> Rows:
        return self.dataset.rows(self.split, self.step, np.empty(0, np.int64), empty_batch(self.dataset.layout))


def check_state(dataset: Dataset, current: dict[str, Any], state: dict[str, Any]) -> bool:
    """Return True if a stream in state `current` can resume from `state`, False if it starts a new segment.

    A new segment has only partitions added since, or a mixture that contains one of them; the partitions of `state`
    must still exist, unchanged, and vocabularies may have been extended. Raises DataError with all other differences.
    """
    before, now = dict(state.get("partitions", [])), dict(current["partitions"])
    mixed = bool(dataset.sources) and any(name not in before for name in now)
    new_segment = bool(before) and (mixed or not before.keys() & now.keys())
    differences = []
    for key in {**current, **state}:
        if key in ("step", "epoch", "vocabularies", "partitions") or current.get(key) == state.get(key):
            continue
        if key == "extents" and key not in state:  # of an earlier version
            continue
        if new_segment and (
            key in ("extents", "mixture", "batches") or (key == "schema" and has_only_grown(dataset.schema, state))
        ):
            continue
        differences.append(f"{key} was {state.get(key)!r}, is {current.get(key)!r}")
    hint = ""
    if new_segment:
        on_disk = {partition.name: partition.identity for partition in dataset.partitions_on_disk()}
        differences += _removed_or_changed(before, on_disk)
        if not mixed:
            order = list(on_disk)
            latest = max((order.index(name) for name in before if name in on_disk), default=-1)
            differences += [f"partition {n} is older than {order[latest]}" for n in now if order.index(n) < latest]
    else:
        new = [name for name in now if name not in before]
        differences += _removed_or_changed(before, now) + [f"partition {name} is new" for name in new]
        hint = _resume_hint(list(before), list(now)) if new else ""
        if not differences and list(before) != list(now):
            differences.append(f"partitions were {list(before)}, are {list(now)}")
    if differences:
        raise DataError(
            f"{dataset.dir}: the stream cannot resume, because {'; '.join(differences)}; "
            f"restore that, or start a new run{hint}"
        )
    return not new_segment


def has_only_grown(schema: Schema, state: dict[str, Any]) -> bool:
    """Return whether `schema` equals the state's schema except for appended vocabulary values."""
    lengths = state.get("vocabularies")
    return lengths is not None and schema.cut(lengths).fingerprint() == state["schema"]


def _removed_or_changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    removed = [f"partition {name} is missing" for name in before if name not in now]
    return removed + [f"partition {name} has changed" for name in before if name in now and before[name] != now[name]]


def _resume_hint(before: list[str], now: list[str]) -> str:
    if not before or before[-1] not in now:
        return ""
    later = now[now.index(before[-1]) + 1 :]
    if later:
        return (
            f", or continue on the new partitions with data.from_partition={later[0]}, or on old and new ones by "
            f"weight with data.mixture"
        )
    return f", or resume with data.from_partition={before[0]}"


POLL_INTERVAL_S = 0.1  # between checks whether the stream was closed


class LaneSteps(WorkerSteps[T]):
    """The given steps of the given lanes."""

    def __init__(
        self, dataset: Dataset, split: str, order: Order | MixedOrder, lanes: Sequence[int], num_workers: int,
        steps: range, make: Callable[[Rows], T],
    ) -> None:  # fmt: skip
        super().__init__(make)
        self._args, self._dataset, self._steps = (dataset, split, order), dataset, steps
        # contiguous shares keep the parts in lane order
        self._shares = [share.tolist() for share in np.array_split(np.array(lanes), max(1, num_workers))]
        self._inboxes: list[Queue[Any]] = [CONTEXT.Queue() for _ in self._shares] if num_workers > 1 else []
        self._ended = CONTEXT.RawValue("b", 0)  # without a lock: a killed process may hold it

    def read(self, process: int, processes: int) -> Iterator[LaneRows]:
        """Yield the steps at the indices `process`, `process` + `processes`, …."""
        parts = until_an_error(LaneReader(*self._args, self._shares[process]).read_steps(self._steps.start))
        peers = _Peers(self._inboxes, process, lambda: bool(self._ended.value))
        try:
            for number, _ in enumerate(self._steps):
                part = next(parts)
                if isinstance(part, str):
                    peers.broadcast(part)
                    raise DataError(part)
                if number % processes == process:
                    whole = LaneRows.joined(peers.gather(part))
                    yield replace(whole, rows=replace(whole.rows, sequences=self._dataset.sequences))
                else:
                    peers.send(number % processes, part)
        except GeneratorExit:
            peers.abandon()
            raise

    def end(self) -> None:
        """End loader processes that wait for each other."""
        self._ended.value = 1


class _Peers:
    """The exchange of parts with the other loader processes."""

    def __init__(self, inboxes: Sequence[Queue[Any]], process: int, has_ended: Callable[[], bool]) -> None:
        self._inboxes, self._process, self._has_ended = inboxes, process, has_ended
        self._pending: list[deque[LaneRows | str]] = [deque() for _ in inboxes]  # received parts, by sender

    def send(self, receiver: int, part: LaneRows | str) -> None:
        self._inboxes[receiver].put((self._process, part))

    def broadcast(self, message: str) -> None:
        """Send the error that ends this process to all others, after the parts that they still need."""
        for receiver in range(len(self._inboxes)):
            if receiver != self._process:
                self.send(receiver, message)

    def abandon(self) -> None:
        """Allow this process to exit without flushing its queues."""
        for inbox in self._inboxes:
            inbox.cancel_join_thread()

    def gather(self, own_part: LaneRows) -> list[LaneRows]:
        """Return all processes' parts of the step, in order. Raises DataError: one of them could not read."""
        senders = range(len(self._inboxes)) if self._inboxes else [self._process]
        return [own_part if sender == self._process else self._receive_from(sender) for sender in senders]

    def _receive_from(self, sender: int) -> LaneRows:
        while not self._pending[sender]:
            actual, part = self._receive()
            self._pending[actual].append(part)
        part = self._pending[sender].popleft()
        if isinstance(part, str):
            raise DataError(part)
        return part

    def _receive(self) -> tuple[int, LaneRows | str]:
        """Return the next (sender, part); exit the process if the stream was closed."""
        while not self._has_ended():
            with suppress(Empty):
                message: tuple[int, LaneRows | str] = self._inboxes[self._process].get(timeout=POLL_INTERVAL_S)
                return message
        os._exit(0)
