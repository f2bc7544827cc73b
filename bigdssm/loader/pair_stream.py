"""PairStream: this rank's rows of every global step, exact to the row, and its saved state."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
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
from bigdssm.loader.workers import WorkerSteps, until_an_error
from bigdssm.utils.hashing import derive_key
from bigdssm.utils.log import get_logger

T = TypeVar("T")
STATE_FORMAT = 1
logger = get_logger(__name__)


class PairStream(RowStream):
    """Step s holds the rows that lanes k, k + R, … of rank k of R give to step s.

    Bad rows are missing from a rank's Rows, which may be empty. Too many are more than max_bad_fraction of the rows of
    the epochs begun since the stream was opened: few bad rows never stop it because they come early.
    """

    def __init__(
        self, dataset: str | Path | Dataset, *, split: str = "train", rows_global: int, lanes: int, seed: int = 0,
        rank: int = 0, world_size: int = 1, num_workers: int = 0, start_step: int = 0, tail: Tail = "carry",
        window_blocks: int = WINDOW_BLOCKS, max_bad_fraction: float = 0.001, quarantine: Path | None = None,
    ) -> None:  # fmt: skip
        """Plan the stream; nothing is read before the first `next`.

        `num_workers` processes read (0: this one), each for some of this rank's lanes. `quarantine` is the JSONL file
        in which this rank names what it leaves out. Raises ConfigError: numbers that do not go together; DataError:
        a dataset that cannot be opened, or fewer rows than `Order` needs.
        """
        if world_size > lanes:
            raise ConfigError(f"world_size={world_size} is more than lanes={lanes}; use at least one lane per rank")
        self._lanes_owned = range(rank, lanes, world_size)
        super().__init__(
            dataset if isinstance(dataset, Dataset) else Dataset.open(dataset), rank=rank, world_size=world_size,
            num_workers=min(num_workers, len(self._lanes_owned)), start_step=start_step,
            max_bad_fraction=max_bad_fraction, quarantine=quarantine,
        )  # fmt: skip
        self.split = split
        plan = partial(Order, rows_global=rows_global, lanes=lanes, tail=tail, window_blocks=window_blocks)
        self.order: Order | MixedOrder = (
            self._mixed(plan, seed) if self.dataset.sources else plan(self.dataset.index(split).rows, seed=seed)
        )
        # The global steps after which every row (tail="drop": every row but the tail) was given. In a mixture each
        # source has epochs of its own, and this is as many steps as all sources have rows for.
        self.steps_per_epoch = self.order.steps_per_epoch
        self.queries_per_row = self._mean_queries()
        self.queries_per_step = rows_global * self.queries_per_row
        if self.order.rows_dropped_per_epoch:
            logger.info("each epoch leaves out %d rows that do not fill a step", self.order.rows_dropped_per_epoch)

    def state(self, step: int | None = None) -> dict[str, Any]:
        """Return where the stream stands before `step` (by default the next one) and what it depends on.

        Plain JSON types, the same on every rank.
        """
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
            "partitions": [[partition.name, partition.identity] for partition in self.dataset.partitions],
            **mixture,
        }

    def check_state(self, state: dict[str, Any]) -> bool:
        """Return True where the stream may go on where `state` was taken, False where it begins partitions added since.

        Raises DataError naming everything else in which this stream differs from the one of `state`.
        """
        return check_state(self.dataset, self.state(), state)

    def doc_weights(self) -> np.ndarray:
        """Return how often each document comes as a positive, in an epoch, float64 [num_docs]."""
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
        """Return the plan of the dataset's mixture; the sources' blocks stand one after the other in the index."""
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
            its = (index.partition >= source.first) & (index.partition < source.last)
            per_row += steps / ROUND_STEPS * float(index.queries[its].sum() / index.rows[its].sum())
        return per_row

    def _steps(self, steps: range, make: Callable[[Rows], T]) -> WorkerSteps[T]:
        return LaneSteps(self.dataset, self.split, self.order, self._lanes_owned, self._num_workers, steps, make)

    def _rows_judged(self, rows_read: int, step: int) -> int:
        rows, per_step = self.order.rows_per_epoch, self.order.rows_global
        return rows * max(1, -(-step * per_step // rows) - self._opened_at * per_step // rows)

    def _empty_rows(self) -> Rows:
        return self.dataset.rows(self.split, self.step, np.empty(0, np.int64), empty_batch(self.dataset.layout))


def check_state(dataset: Dataset, mine: dict[str, Any], state: dict[str, Any]) -> bool:
    """Return True where a stream in state `mine` goes on where `state` was taken, False where it begins a new part.

    A new part has only partitions that were added since, or a mixture with one of them in it; those of `state` must
    still be there, unchanged, and vocabularies may have grown at their end. Raises DataError naming everything else
    that differs.
    """
    before, now = dict(state.get("partitions", [])), dict(mine["partitions"])
    mixed = bool(dataset.sources) and any(name not in before for name in now)
    new_part = bool(before) and (mixed or not before.keys() & now.keys())
    differences = []
    for key in {**mine, **state}:
        if key in ("step", "epoch", "vocabularies", "partitions") or mine.get(key) == state.get(key):
            continue
        if new_part and (key in ("mixture", "batches") or (key == "schema" and has_only_grown(dataset.schema, state))):
            continue
        differences.append(f"{key} was {state.get(key)!r}, is {mine.get(key)!r}")
    growing = ""
    if new_part:
        on_disk = {partition.name: partition.identity for partition in dataset.partitions_on_disk()}
        differences += _gone_or_changed(before, on_disk)
        if not mixed:
            order = list(on_disk)
            latest = max((order.index(name) for name in before if name in on_disk), default=-1)
            differences += [f"partition {n} is older than {order[latest]}" for n in now if order.index(n) < latest]
    else:
        new = [name for name in now if name not in before]
        differences += _gone_or_changed(before, now) + [f"partition {name} is new" for name in new]
        growing = _how_to_go_on(list(before), list(now)) if new else ""
        if not differences and list(before) != list(now):
            differences.append(f"partitions were {list(before)}, are {list(now)}")
    if differences:
        raise DataError(
            f"{dataset.dir}: the stream cannot go on where it was, because {'; '.join(differences)}; "
            f"restore that, or start a new run{growing}"
        )
    return not new_part


def has_only_grown(schema: Schema, state: dict[str, Any]) -> bool:
    """Return True where `schema` with its vocabularies cut to the state's lengths is the state's schema."""
    lengths = state.get("vocabularies")
    return lengths is not None and schema.cut(lengths).fingerprint() == state["schema"]


def _gone_or_changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    gone = [f"partition {name} is gone" for name in before if name not in now]
    return gone + [f"partition {name} has changed" for name in before if name in now and before[name] != now[name]]


def _how_to_go_on(before: list[str], now: list[str]) -> str:
    if not before or before[-1] not in now:
        return ""
    later = now[now.index(before[-1]) + 1 :]
    if later:
        return (
            f", or go on over the new partitions with data.from_partition={later[0]}, over old and new ones by weight "
            f"with data.mixture"
        )
    return f", or go on where it was with data.from_partition={before[0]}"


LOOK_S = 0.1  # between looks at whether what is waited for is still wanted


class LaneSteps(WorkerSteps[T]):
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
