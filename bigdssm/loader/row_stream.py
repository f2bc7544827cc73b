"""Base class of row streams: iterate over steps, count and record bad rows, stop all ranks together."""

from __future__ import annotations

import json
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from bigdssm import distributed
from bigdssm.dataset.blocks import BadRow
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.errors import ConfigError, DataError, PeerError
from bigdssm.loader.workers import WorkerStep, WorkerSteps, load
from bigdssm.utils.log import get_logger

T = TypeVar("T")
CHECK_EVERY_STEPS = 16
MAX_KINDS, MAX_LOGGED_KINDS = 20, 3  # kinds of bad rows: counted per rank, listed in the error
log = get_logger(__name__)


class RowReport(NamedTuple):
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
        self._reasons: dict[str, tuple[str, int]] = {}  # by kind of bad row: the first reason, and the number of rows
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

    def __iter__(self) -> RowStream:
        """Return the stream itself."""
        return self

    def __next__(self) -> Rows:
        """Return this rank's rows of the next step. Raises DataError or PeerError as `check` does."""
        if self._rows is None:
            self._rows = self.map_steps(_identity)
        if (self.step - self._opened_at) % CHECK_EVERY_STEPS == 0:
            self.check()
        return replace(next(self._rows), sequences=self.dataset.sequences)

    def map_steps(self, make: Callable[[Rows], T], num: int | None = None) -> Generator[T]:
        """Yield `make(rows)` for this rank's rows of each of the next `num` steps (None: endlessly).

        `make` runs in the loader processes, which end when the generator is closed. It gets empty rows if reading has
        failed: the caller compares the ranks' `report`s.
        """
        if not self.rows_read:
            self._opened_at = self.step
        return self._map_steps(make, range(self.step, sys.maxsize if num is None else self.step + num))

    def _map_steps(self, make: Callable[[Rows], T], steps: range) -> Generator[T]:
        with closing(load(self._steps(steps, make), self._num_workers)) as loaded:
            for step in steps:
                result = self._next_step(loaded, step)
                value = make(self._empty_rows()) if result is None else result.value
                self.step = step + 1
                yield value

    def report(self) -> RowReport:
        """Return the current report of this rank."""
        return RowReport(self._failure is not None, self.rows_bad, self.rows_read)

    def needs_check(self, reports: Sequence[RowReport], step: int) -> bool:
        """Return whether `check` is due before `step`, from the reports of all ranks."""
        if any(report.failed for report in reports):
            return True
        due = (step - self._opened_at) % CHECK_EVERY_STEPS == 0
        bad, read = sum(report.rows_bad for report in reports), sum(report.rows_read for report in reports)
        return due and bad > self._max_bad_fraction * self._rows_for_limit(int(read), step)

    def check(self, step: int | None = None) -> None:
        """Raise on all ranks if reading failed on one, or too many rows before `step` are bad.

        All ranks must call it. Also call it before writing a checkpoint. Raises DataError; PeerError if a loader
        process died, and on the healthy ranks if another one failed.
        """
        mine = (self.rows_bad, self.rows_read, self._failure is not None, dict(self._reasons))
        alone = self.world_size == 1 or self.world_size != distributed.world_size()
        reports = [mine] if alone else distributed.all_gather_object(mine)
        if any(failed for _, _, failed, _ in reports):
            distributed.raise_together(self._failure) if not alone else self._raise_own()
        bad, read = sum(report[0] for report in reports), sum(report[1] for report in reports)
        allowed = self._max_bad_fraction * self._rows_for_limit(read, self.step if step is None else step)
        if bad > allowed:
            where = f"; see {self._quarantine}" if self._quarantine else ""
            raise DataError(
                f"{self.dataset.dir}: {bad:.10g} of {read} rows read are bad, more than data.max_bad_fraction="
                f"{self._max_bad_fraction} allows ({int(allowed)}): {_commonest([report[3] for report in reports])}"
                f"{where}; repair the shards or raise the limit"
            )

    def close(self) -> None:
        """End the loader processes of `next`."""
        if self._rows is not None:
            self._rows.close()
            self._rows = None

    def _raise_own(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _next_step(self, loaded: Generator[WorkerStep[T]], step: int) -> WorkerStep[T] | None:
        """Return the result of a step, None if reading has failed."""
        if self._failure is not None:
            return None
        try:
            result = next(loaded)
        except (DataError, PeerError) as error:
            self._failure = type(error)(f"rank {self.rank} cannot read {self.dataset.dir}: {error}")
            log.error("%s; all ranks stop at the next check", self._failure)
            return None
        if result.step != step:
            raise AssertionError(f"the loaders returned step {result.step}, expected {step}")
        self.rows_read += result.rows_planned
        self.rows_bad += result.rows_skipped + result.targets_skipped / self.queries_per_row
        for fault in result.bad:
            self._record(fault)
        return result

    def _record(self, fault: BadRow) -> None:
        """Log a bad row or block, and add it to the quarantine file unless it is already there."""
        key = (fault.shard, fault.block, fault.row, fault.position)
        if key in self._recorded:
            return
        self._recorded.add(key)
        kind = re.sub(r"'[^']*'|\d+", "", fault.reason)  # without the row's values
        first, count = self._reasons.get(kind, (fault.reason, 0))
        if count or len(self._reasons) < MAX_KINDS:
            self._reasons[kind] = (first, count + max(1, fault.rows))
        row = "" if fault.row is None else f", row {fault.row}"
        row += "" if fault.position is None else f", position {fault.position}"
        log.warning("skipped: %s, block %d%s: %s", fault.shard, fault.block, row, fault.reason)
        if self._quarantine is not None:
            if self._written is None:
                self._written = _whole_lines(self._quarantine)
            line = json.dumps(asdict(fault)).encode() + b"\n"
            if line not in self._written:
                self._written.add(line)
                with self._quarantine.open("ab") as file:
                    file.write(line)


def _identity(rows: Rows) -> Rows:
    return rows


def _commonest(reasons: Sequence[dict[str, tuple[str, int]]]) -> str:
    """Return the most frequent kinds of bad rows over all ranks, with their first reason and number of rows."""
    total: dict[str, tuple[str, int]] = {}
    for kind, (reason, rows) in (item for of_rank in reasons for item in of_rank.items()):
        first, before = total.get(kind, (reason, 0))
        total[kind] = (first, before + rows)
    commonest = sorted(total.values(), key=lambda reason: -reason[1])[:MAX_LOGGED_KINDS]
    return ", ".join(f"{reason} ({rows} row{'s' if rows > 1 else ''})" for reason, rows in commonest)


def _whole_lines(path: Path) -> set[bytes]:
    """Return the lines of a file, which is created if missing; an incomplete last line (after a kill) is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        lines = file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            file.truncate(sum(map(len, lines[:-1])))
            lines.pop()
    return set(lines)
