"""PairStream: this rank's rows of every global step, endlessly, exact to the row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bigdssm import distributed
from bigdssm.data.blocks import Bad
from bigdssm.data.dataset import Dataset, empty_batch
from bigdssm.data.lanes import Part
from bigdssm.data.mixture import TURNS, MixedOrder, turns_per_round
from bigdssm.data.order import WINDOW_BLOCKS, Order, Tail, derive_key
from bigdssm.data.rows import Rows
from bigdssm.data.stream_state import check_state
from bigdssm.data.workers import open_parts
from bigdssm.errors import ConfigError, DataError, PeerError
from bigdssm.log import get_logger

CHECK_EVERY_STEPS = 16
STATE_FORMAT = 1
log = get_logger(__name__)


class PairStream:
    """An endless iterator of Rows: step s holds the rows that lanes k, k + R, … of rank k of R give to step s.

    All ranks make the same number of steps whatever is damaged: bad rows are missing from a rank's Rows, which may be
    empty. Every CHECK_EVERY_STEPS steps `next` is a collective (see `check`), where world_size is the process group's.
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
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank} must be at least 0 and below world_size={world_size}")
        if world_size > lanes:
            raise ConfigError(f"world_size={world_size} is more than lanes={lanes}; use at least one lane per rank")
        if num_workers < 0 or start_step < 0:
            raise ConfigError(f"num_workers={num_workers} and start_step={start_step} must not be negative")
        self.dataset = dataset if isinstance(dataset, Dataset) else Dataset.open(dataset)
        self.split, self.rank, self.world_size = split, rank, world_size
        plan = partial(Order, rows_global=rows_global, lanes=lanes, tail=tail, window_blocks=window_blocks)
        self.order = (
            self._mixed(plan, seed) if self.dataset.sources else plan(self.dataset.index(split).rows, seed=seed)
        )
        self.step = start_step  # the next one to be handed out; may be set until the first `next`
        self.rows_bad = self.rows_met = 0  # of this rank, since it was opened
        self._max_bad_fraction, self._quarantine = max_bad_fraction, quarantine
        self._quarantined: set[tuple[str, int, int | None]] = set()
        self._failure: DataError | PeerError | None = None
        self._opened_at = start_step
        lanes_owned = list(range(rank, lanes, world_size))
        workers = min(num_workers, len(lanes_owned))
        self._shares = np.array_split(np.array(lanes_owned), max(1, workers))  # contiguous: parts stand in lane order
        self._num_workers = workers
        self._parts: Iterator[Part] | None = None
        if self.order.rows_dropped_per_epoch:
            log.info("each epoch leaves out %d rows that do not fill a step", self.order.rows_dropped_per_epoch)

    @property
    def steps_per_epoch(self) -> int:
        """Return the global steps after which every row (tail="drop": every row but the tail) was given.

        In a mixture each source has epochs of its own; this is then as many steps as all sources have rows for.
        """
        return self.order.steps_per_epoch

    def __iter__(self) -> PairStream:
        """Return the stream itself: it goes on where it is."""
        return self

    def __next__(self) -> Rows:
        """Return this rank's rows of the next step. Raises DataError or PeerError as `check` does."""
        if self._parts is None:
            self._parts = self._open()
        if (self.step - self._opened_at) % CHECK_EVERY_STEPS == 0:
            self.check()
        rows = self._next_rows(self._parts)
        self.step += 1
        return rows

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
        turns = turns_per_round([source.name for source in sources], [source.weight for source in sources])
        return MixedOrder(orders, turns, self.dataset.batches, seed)

    def doc_weights(self) -> np.ndarray:
        """Return how often each document comes as a positive, relative to all, float64 [num_docs] (any scale)."""
        if not isinstance(self.order, MixedOrder):
            return self.dataset.doc_counts().astype(np.float64)
        total = np.zeros(self.dataset.catalogue.num_docs)
        for source, order, turns in zip(self.dataset.sources, self.order.orders, self.order.turns, strict=True):
            counts = self.dataset.doc_counts(range(source.first, source.last))
            total += counts * (turns / TURNS * self.order.rows_per_epoch / order.num_rows)
        return total

    def check(self) -> None:
        """Stop all ranks together where one cannot read, or too many rows are bad. A collective.

        Call it before a checkpoint is written, too. Too many is more than max_bad_fraction of the rows of the epochs
        begun since the stream was opened: few bad rows never stop it because they come early. Raises DataError;
        PeerError where a loader process died, and on the ranks that could read where another could not.
        """
        mine = (self.rows_bad, self.rows_met, self._failure is not None)
        alone = self.world_size == 1 or self.world_size != distributed.world_size()
        reports = [mine] if alone else distributed.all_gather_object(mine)
        if any(failed for _, _, failed in reports):
            distributed.raise_together(self._failure) if not alone else self._raise_own()
        bad, met = sum(report[0] for report in reports), sum(report[1] for report in reports)
        rows, per_step = self.order.rows_per_epoch, self.order.rows_global
        epochs = -(-self.step * per_step // rows) - self._opened_at * per_step // rows
        allowed = self._max_bad_fraction * rows * max(1, epochs)
        if bad > allowed:
            where = f"; they are named in {self._quarantine}" if self._quarantine else ""
            raise DataError(
                f"{self.dataset.dir}: {bad} of {met} rows met are bad, more than max_bad_fraction="
                f"{self._max_bad_fraction} allows ({int(allowed)}){where}; mend the shards or allow more"
            )

    def state(self) -> dict[str, Any]:
        """Return where the stream stands and what it depends on; plain JSON types, the same on every rank."""
        order = self.order
        mixture: dict[str, Any] = {}
        if isinstance(order, MixedOrder):
            names = [source.name for source in self.dataset.sources]
            mixture = {"mixture": [[n, t] for n, t in zip(names, order.turns, strict=True)], "batches": order.batches}
        return {
            "format": STATE_FORMAT,
            "step": self.step,
            "epoch": self.step // order.steps_per_epoch,
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

    def close(self) -> None:
        """End the loader processes."""
        self._parts = None

    def _raise_own(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _open(self) -> Iterator[Part]:
        if not self.rows_met:
            self._opened_at = self.step
        return open_parts(self.dataset, self.split, self.order, self._shares, self._num_workers, self.step)

    def _next_rows(self, loaded: Iterator[Part]) -> Rows:
        parts: list[Part] = []
        if self._failure is None:
            try:
                parts = [next(loaded) for _ in self._shares]
            except (DataError, PeerError) as error:
                self._failure = type(error)(f"rank {self.rank} cannot read {self.dataset.dir}: {error}")
                log.error("%s; all ranks stop at the next check", self._failure)
        if self._failure is not None:
            return self._empty_rows()
        for part in parts:
            self.rows_met += part.rows_planned
            self.rows_bad += part.rows_planned - len(part.rows)
            for fault in part.bad:
                self._name(fault)
        rows = Rows.concat([part.rows for part in parts])
        if rows.step != self.step:
            raise AssertionError(f"the loaders gave step {rows.step}, needed is {self.step}")
        return replace(rows, sequences=self.dataset.sequences)

    def _empty_rows(self) -> Rows:
        return self.dataset.rows(self.split, self.step, np.empty(0, np.int64), empty_batch(self.dataset.layout))

    def _name(self, fault: Bad) -> None:
        """Name a bad row or block in the log and the quarantine file, once."""
        key = (fault.shard, fault.block, fault.row)
        if key in self._quarantined:
            return
        self._quarantined.add(key)
        row = "" if fault.row is None else f", row {fault.row}"
        log.warning("left out: %s, block %d%s: %s", fault.shard, fault.block, row, fault.reason)
        if self._quarantine is not None:
            self._quarantine.parent.mkdir(parents=True, exist_ok=True)
            with self._quarantine.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(fault)) + "\n")
