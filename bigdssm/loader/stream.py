"""This rank's rows of every global step, in an exactly reproducible order, and the saved state of the order.

A stream counts and records bad rows, and stops all ranks together if one cannot read.

A rank's lanes are divided among its loader processes. Each process reads its lanes of every step, one window of blocks
at a time, and sends the rows of step i to process i mod n, for n processes, which joins the parts and builds the batch.
"""

import json
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from bigdssm import distributed
from bigdssm.dataset.blocks import FORGOTTEN, BadRow, read_blocks
from bigdssm.dataset.dataset import Dataset, empty_batch
from bigdssm.dataset.partition import ROUND_STEPS, steps_per_round
from bigdssm.dataset.rows import Rows
from bigdssm.errors import ConfigError, DataError, PeerError
from bigdssm.features.ragged import offsets_of
from bigdssm.loader.order import WINDOW_BLOCKS, MixedOrder, Order, Window
from bigdssm.loader.workers import LoadedStep, Peers, WorkerSteps, load
from bigdssm.utils.hashing import derive_key
from bigdssm.utils.log import get_logger

T = TypeVar("T")
CHECK_EVERY_STEPS = 16
MAX_KINDS, MAX_LOGGED_KINDS = 20, 3  # kinds of bad rows: counted per rank, listed in the error
STATE_FORMAT = 1  # of PairStream
log = get_logger(__name__)


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

    def read(self, peers: Peers) -> Iterator[LoadedStep[Rows]]:
        """Yield the steps at the indices `peers.process`, `peers.process` + `peers.processes`, …."""
        process, processes = peers.process, peers.processes
        reader = LaneReader(self._dataset, self._split, self._order, self._shares[process])
        for number, step in enumerate(self._steps):
            own = reader.read_step(step)
            if number % processes == process:
                received = {sender: peers.receive(sender) for sender in range(processes) if sender != process}
                parts_of_step = [received.get(sender, own) for sender in range(processes)]
                yield LoadedStep(
                    own.step,
                    replace(Rows.concat([part.value for part in parts_of_step]), sequences=self._dataset.sequences),
                    sum(part.rows_planned for part in parts_of_step),
                    sum(part.rows_skipped for part in parts_of_step),
                    sum(part.targets_skipped for part in parts_of_step),
                    [fault for part in parts_of_step for fault in part.bad],
                )
            else:
                peers.send(number % processes, own)


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
        rows = self._dataset.rows(self._split, step, np.concatenate(row_ids), pa.concat_batches(batches))
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


class RowCounts(NamedTuple):
    """State of a rank's stream: whether reading failed, and row counts."""

    failed: float
    rows_bad: float
    rows_read: float


class RowStream(ABC):
    """An endless iterator over this rank's rows of each step.

    All ranks run the same number of steps, for any damage. Every CHECK_EVERY_STEPS steps `next` is a collective
    (see `check`) if world_size is the process group's; `map_steps` never is.
    """

    steps_per_epoch: int  # 0: unknown
    queries_per_row = 1.0  # on average
    queries_per_step: float  # of all ranks, on average
    inline = False  # whether rows contain their documents' features

    def __init__(
        self, dataset: Dataset, *, rank: int, world_size: int, num_workers: int, start_step: int,
        max_bad_fraction: float, quarantine: Path | None,
    ) -> None:  # fmt: skip
        """`num_workers`: reading processes (0: this one); `quarantine`: JSONL file of the skipped rows.

        Raises ConfigError: an invalid number.
        """
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank} must be at least 0 and below world_size={world_size}")
        if num_workers < 0:
            raise ConfigError(f"num_workers={num_workers} must not be negative")
        if start_step < 0:
            raise ConfigError(f"start_step={start_step} must not be negative")
        self.dataset, self.rank, self.world_size = dataset, rank, world_size
        self.step = start_step  # the next step; may be set before the first `next`
        # Of this rank, since opening; a bad target counts as its share of a row.
        self.rows_bad, self.rows_read = 0.0, 0
        self._opened_at = start_step
        self._num_workers, self._max_bad_fraction, self._quarantine = num_workers, max_bad_fraction, quarantine
        self._recorded: set[tuple[str, int, int | None, int | None]] = set()
        self._written: set[bytes] | None = None  # lines of the quarantine file, including those before a resume
        self._bad_kinds: dict[str, tuple[str, int]] = {}  # the first reason of a kind of bad rows, and their number
        self._failure: DataError | PeerError | None = None
        self._rows: Generator[Rows] | None = None

    @abstractmethod
    def state(self, step: int | None = None) -> dict[str, Any]:
        """Return the stream's state before `step` (by default the next one), in JSON types; equal on all ranks."""

    @abstractmethod
    def check_state(self, state: dict[str, Any]) -> bool:
        """Return True if the stream can resume from `state`, False if it starts on other partitions.

        Raises DataError with all other differences.
        """

    @abstractmethod
    def doc_weights(self) -> np.ndarray:
        """Return the number of positives per document in an epoch, float64 [num_docs]."""

    @abstractmethod
    def _steps(self, steps: range, make: Callable[[Rows], T]) -> WorkerSteps[T]:
        """Return the dataset of the given steps for the loader processes."""

    @abstractmethod
    def _rows_for_limit(self, rows_read: int, step: int) -> int:
        """Return the row count that max_bad_fraction applies to, after `rows_read` rows of all ranks before `step`."""

    @abstractmethod
    def _empty_rows(self) -> Rows:
        """Return empty rows of the current step."""

    def __iter__(self) -> "RowStream":
        """Return the stream itself."""
        return self

    def __next__(self) -> Rows:
        """Return this rank's rows of the next step. Raises DataError or PeerError as `check` does."""
        if self._rows is None:
            self._rows = self.map_steps(lambda rows: rows)
        if (self.step - self._opened_at) % CHECK_EVERY_STEPS == 0:
            self.check()
        return replace(next(self._rows), sequences=self.dataset.sequences)

    def map_steps(self, make: Callable[[Rows], T], num: int | None = None) -> Generator[T]:
        """Yield `make(rows)` for this rank's rows of each of the next `num` steps (None: endlessly).

        `make` runs in the loader processes, which end when the generator is closed. It gets empty rows if reading has
        failed: the caller compares the ranks' `counts`.
        """
        if not self.rows_read:  # a resume sets `step` after the stream was built
            self._opened_at = self.step
        steps = range(self.step, sys.maxsize if num is None else self.step + num)
        with closing(load(self._steps(steps, make), self._num_workers)) as loaded:
            for step in steps:
                result = None
                if self._failure is None:
                    try:
                        result = next(loaded)
                    except (DataError, PeerError) as error:
                        self._failure = type(error)(f"rank {self.rank} cannot read {self.dataset.dir}: {error}")
                        log.error("%s; all ranks stop at the next check", self._failure)
                if result is None:
                    value = make(self._empty_rows())
                elif result.step != step:
                    raise AssertionError(f"the loaders returned step {result.step}, expected {step}")
                else:
                    value = result.value
                    self.rows_read += result.rows_planned
                    self.rows_bad += result.rows_skipped + result.targets_skipped / self.queries_per_row
                    for fault in result.bad:
                        self._record(fault)
                self.step = step + 1
                yield value

    def counts(self) -> RowCounts:
        """Return the current counts of this rank."""
        return RowCounts(self._failure is not None, self.rows_bad, self.rows_read)

    def needs_check(self, counts: Sequence[RowCounts], step: int) -> bool:
        """Return whether `check` is due before `step`, from the counts of all ranks."""
        if any(rank.failed for rank in counts):
            return True
        due = (step - self._opened_at) % CHECK_EVERY_STEPS == 0
        bad, read = sum(rank.rows_bad for rank in counts), sum(rank.rows_read for rank in counts)
        return due and bad > self._max_bad_fraction * self._rows_for_limit(int(read), step)

    def check(self, step: int | None = None) -> None:
        """Raise on all ranks if reading failed on one, or too many rows before `step` are bad.

        All ranks must call it. Also call it before writing a checkpoint. Raises DataError; PeerError if a loader
        process died, and on the healthy ranks if another one failed.
        """
        local = self.counts(), dict(self._bad_kinds)
        # without peers: one rank, or the stream of one rank read outside a process group of `world_size` ranks
        alone = self.world_size == 1 or self.world_size != distributed.world_size()
        reports = [local] if alone else distributed.all_gather_object(local)
        if any(counts.failed for counts, _ in reports):
            if not alone:
                distributed.raise_together(self._failure)
            elif self._failure is not None:
                raise self._failure
        bad = sum(counts.rows_bad for counts, _ in reports)
        read = sum(int(counts.rows_read) for counts, _ in reports)
        allowed = self._max_bad_fraction * self._rows_for_limit(read, self.step if step is None else step)
        if bad > allowed:
            total: dict[str, tuple[str, int]] = {}  # over all ranks
            for kind, (reason, rows) in [item for _, kinds in reports for item in kinds.items()]:
                first, before = total.get(kind, (reason, 0))
                total[kind] = first, before + rows
            most_frequent = sorted(total.values(), key=lambda kind: -kind[1])[:MAX_LOGGED_KINDS]
            reasons = ", ".join(f"{reason} ({rows} row{'s' if rows > 1 else ''})" for reason, rows in most_frequent)
            where = f"; see {self._quarantine}" if self._quarantine else ""
            raise DataError(
                f"{self.dataset.dir}: {bad:.10g} of {read} rows read are bad, more than data.max_bad_fraction="
                f"{self._max_bad_fraction} allows ({int(allowed)}): {reasons}{where}; "
                "repair the shards or raise the limit"
            )

    def close(self) -> None:
        """End the loader processes of `next`."""
        if self._rows is not None:
            self._rows.close()
            self._rows = None

    def _record(self, fault: BadRow) -> None:
        """Log a bad row or block, and add it to the quarantine file unless it is already there."""
        key = (fault.shard, fault.block, fault.row, fault.position)
        if key in self._recorded:
            return
        self._recorded.add(key)
        kind = re.sub(r"'[^']*'|\d+", "", fault.reason)  # without the row's values
        first, count = self._bad_kinds.get(kind, (fault.reason, 0))
        if count or len(self._bad_kinds) < MAX_KINDS:
            self._bad_kinds[kind] = first, count + max(1, fault.rows)
        log.warning("skipped: %s", fault)
        if self._quarantine is None:
            return
        if self._written is None:
            self._quarantine.parent.mkdir(parents=True, exist_ok=True)
            with self._quarantine.open("ab+") as file:
                file.seek(0)
                lines = file.read().splitlines(keepends=True)
                if lines and not lines[-1].endswith(b"\n"):  # incomplete: the process was killed
                    file.truncate(sum(map(len, lines[:-1])))
                    lines.pop()
            self._written = set(lines)
        line = json.dumps(asdict(fault)).encode() + b"\n"
        if line not in self._written:
            self._written.add(line)
            with self._quarantine.open("ab") as file:
                file.write(line)


class PairStream(RowStream):
    """Rank k of R reads the lanes k, k + R, ….

    Bad rows are skipped, so a rank's Rows may be empty. max_bad_fraction applies to the rows of all epochs started
    since the stream was opened: a few bad rows at the beginning do not stop it.
    """

    def __init__(
        self, dataset: str | Path | Dataset, *, split: str = "train", rows_global: int, lanes: int, seed: int = 0,
        rank: int = 0, world_size: int = 1, num_workers: int = 0, start_step: int = 0,
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
        plan = partial(Order, rows_global=rows_global, lanes=lanes, window_blocks=window_blocks)
        index, sources = self.dataset.index(split), self.dataset.sources
        self.order: Order | MixedOrder
        if sources:
            # In the index, the blocks of a source are contiguous.
            bounds = [np.searchsorted(index.partition, [source.first, source.last]).tolist() for source in sources]
            orders = []
            for number, (source, (lo, hi)) in enumerate(zip(sources, bounds, strict=True)):
                key, first_row = derive_key(seed, number), int(index.first_row[lo])
                try:
                    orders.append(plan(index.rows[lo:hi], seed=key, first_block=lo, first_row=first_row))
                except DataError as error:
                    raise DataError(f"data.mixture: {source.name} is too small: {error}") from None
            steps = steps_per_round([source.name for source in sources], [source.weight for source in sources])
            self.order = MixedOrder(orders, steps, seed)
            self.queries_per_row = 0.0
            for (lo, hi), count in zip(bounds, steps, strict=True):
                mean = float(index.queries[lo:hi].sum() / index.rows[lo:hi].sum())
                self.queries_per_row += count / ROUND_STEPS * mean
        else:
            self.order = plan(index.rows, seed=seed)
            self.queries_per_row = index.num_queries / index.num_rows
        # The global steps after which every row was read. In a mixture, where each source has separate epochs, this is
        # the total number of rows over rows_global.
        self.steps_per_epoch = self.order.steps_per_epoch
        self.queries_per_step = rows_global * self.queries_per_row

    def state(self, step: int | None = None) -> dict[str, Any]:
        """Return the stream's state before `step` (by default the next one), in JSON types; equal on all ranks."""
        order, step = self.order, self.step if step is None else step
        mixture: dict[str, Any] = {}
        if isinstance(order, MixedOrder):
            names = [source.name for source in self.dataset.sources]
            mixture = {
                "mixture": [[n, t] for n, t in zip(names, order.steps_per_round, strict=True)],
                "batches": "mixed",  # as in states of earlier versions, which had others
            }
        return {
            "format": STATE_FORMAT,
            "step": step,
            "epoch": step // order.steps_per_epoch,
            "seed": order.seed,
            "split": self.split,
            "lanes": order.lanes,
            "rows_global": order.rows_global,
            "tail": "carry",  # as in states of earlier versions, which had others
            "window_blocks": order.window_blocks,
            "schema": self.dataset.schema.fingerprint(),
            "vocabularies": self.dataset.schema.vocabulary_sizes(),
            "tokenizer": self.dataset.tokenizer_hash,
            "extents": [list(extent) for extent in self.dataset.extents],
            "partitions": [[partition.name, partition.identity] for partition in self.dataset.partitions],
            **mixture,
            **self.dataset.rules.row_keys,
        }

    def check_state(self, state: dict[str, Any]) -> bool:
        """Return True if the stream can resume from `state`, False if it starts a new segment.

        A new segment has only partitions added since, or a mixture that contains one of them; the partitions of `state`
        must still exist, unchanged, and vocabularies may have been extended. Raises DataError with all other
        differences.
        """
        dataset, current = self.dataset, self.state()
        before, now = dict(state.get("partitions", [])), dict(current["partitions"])
        # A new segment has no partition of `state`, or is a mixture with a partition that `state` does not have.
        mixed = bool(dataset.sources) and any(name not in before for name in now)
        new_segment = bool(before) and (mixed or not before.keys() & now.keys())

        # Compare the values; a new segment may have other rows, and more values in its vocabularies.
        lengths = state["vocabularies"]
        differences = []
        for key in {**current, **state}:
            if key in ("step", "epoch", "vocabularies", "partitions") or current.get(key) == state.get(key):
                continue
            if new_segment and key in ("extents", "mixture", "batches"):
                continue
            # equal but for the values that were appended to vocabularies
            if new_segment and key == "schema" and dataset.schema.cut(lengths).fingerprint() == state[key]:
                continue
            differences.append(f"{key} was {state.get(key)!r}, is {current.get(key)!r}")

        # Compare the partitions. In a new segment those of `state` are still on disk, and new ones are newer; otherwise
        # they are the same, in the same order.
        hint = ""
        if new_segment:
            on_disk = {partition.name: partition.identity for partition in dataset.partitions_on_disk()}
            differences += _removed_or_changed(before, on_disk)
            if not mixed:
                by_age = list(on_disk)
                latest = max((by_age.index(name) for name in before if name in on_disk), default=-1)
                differences += [
                    f"partition {n} is older than {by_age[latest]}" for n in now if by_age.index(n) < latest
                ]
        else:
            names, new = list(now), [name for name in now if name not in before]
            differences += _removed_or_changed(before, now) + [f"partition {name} is new" for name in new]
            if not differences and list(before) != names:
                differences.append(f"partitions were {list(before)}, are {names}")
            # with new partitions, propose the config that reads them
            last = list(before)[-1] if before else None
            if new and last in now:
                later = names[names.index(last) + 1 :]
                hint = f", or resume with data.from_partition={next(iter(before))}"
                if later:
                    hint = (
                        f", or continue on the new partitions with data.from_partition={later[0]}, or on old and new "
                        "ones by weight with data.mixture"
                    )
        if differences:
            raise DataError(
                f"{dataset.dir}: the stream cannot resume, because {'; '.join(differences)}; "
                f"restore that, or start a new run{hint}"
            )
        return not new_segment

    def doc_weights(self) -> np.ndarray:
        """Return the number of positives per document in an epoch, float64 [num_docs]."""
        if not isinstance(self.order, MixedOrder):
            return self.dataset.doc_counts().astype(np.float64)
        total = np.zeros(self.dataset.catalogue.num_docs)
        for source, order, steps in zip(
            self.dataset.sources, self.order.orders, self.order.steps_per_round, strict=True
        ):
            counts = self.dataset.doc_counts(range(source.first, source.last))
            total += counts * (steps / ROUND_STEPS * self.order.num_rows / order.num_rows)
        return total

    def _steps(self, steps: range, make: Callable[[Rows], T]) -> WorkerSteps[T]:
        return LaneSteps(self.dataset, self.split, self.order, self._local_lanes, self._num_workers, steps, make)

    def _rows_for_limit(self, rows_read: int, step: int) -> int:
        rows, per_step = self.order.num_rows, self.order.rows_global
        epochs_started = -(-step * per_step // rows)  # rounded up
        epochs_complete_at_open = self._opened_at * per_step // rows
        return rows * max(1, epochs_started - epochs_complete_at_open)

    def _empty_rows(self) -> Rows:
        return self.dataset.rows(self.split, self.step, np.empty(0, np.int64), empty_batch(self.dataset.layout))


def _removed_or_changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    removed = [f"partition {name} is missing" for name in before if name not in now]
    return removed + [f"partition {name} has changed" for name in before if name in now and before[name] != now[name]]
