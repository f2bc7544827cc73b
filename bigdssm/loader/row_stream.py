"""What every stream of rows does: hand out steps, count and name what is left out, stop all ranks together."""

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
MOST_KINDS, SHOWN_KINDS = 20, 3  # of bad rows: remembered by a rank, told where there are too many
log = get_logger(__name__)


class RowReport(NamedTuple):
    """What a rank has met: whether it cannot read any further, and rows."""

    failed: float
    rows_bad: float
    rows_read: float


class RowStream(ABC):
    """This rank's share of step after step, endlessly: an iterator of Rows, or of what `made` makes of them.

    All ranks make the same number of steps whatever is damaged. Every CHECK_EVERY_STEPS steps `next` is a collective
    (see `check`), where world_size is the process group's; `made` never is.
    """

    steps_per_epoch: int  # 0: not known
    queries_per_row = 1.0  # on average
    queries_per_step: float  # of all ranks, on average
    inline = False  # whether rows bring their documents' features

    def __init__(
        self, dataset: Dataset, *, rank: int, world_size: int, num_workers: int, start_step: int,
        max_bad_fraction: float, quarantine: Path | None,
    ) -> None:  # fmt: skip
        """`num_workers` processes read (0: this one); `quarantine` is the JSONL file that names what is left out.

        Raises ConfigError: numbers that cannot work.
        """
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank} must be at least 0 and below world_size={world_size}")
        if num_workers < 0:
            raise ConfigError(f"num_workers={num_workers} must not be negative")
        if start_step < 0:
            raise ConfigError(f"start_step={start_step} must not be negative")
        self.dataset, self.rank, self.world_size = dataset, rank, world_size
        self.step = start_step  # the next one to be handed out; may be set until the first `next`
        # Of this rank, since it was opened; a bad target counts as its share of a row.
        self.rows_bad, self.rows_read = 0.0, 0
        self._opened_at = start_step
        self._num_workers, self._max_bad_fraction, self._quarantine = num_workers, max_bad_fraction, quarantine
        self._named: set[tuple[str, int, int | None, int | None]] = set()
        self._written: set[bytes] | None = None  # lines of the file, also those of a run that this one goes on with
        self._reasons: dict[str, tuple[str, int]] = {}  # of what is bad, by kind: the first, and in how many rows
        self._failure: DataError | PeerError | None = None
        self._rows: Generator[Rows] | None = None

    @abstractmethod
    def state(self, step: int | None = None) -> dict[str, Any]:
        """Return where the stream stands before `step` (by default the next one) and what it depends on.

        Plain JSON types, the same on every rank.
        """

    @abstractmethod
    def check_state(self, state: dict[str, Any]) -> bool:
        """Return True where the stream may go on where `state` was taken, False where it begins a new part.

        Raises DataError naming everything else in which this stream differs from the one of `state`.
        """

    @abstractmethod
    def doc_weights(self) -> np.ndarray:
        """Return how often each document comes as a positive, in an epoch, float64 [num_docs]."""

    @abstractmethod
    def _steps(self, steps: range, make: Callable[[Rows], T]) -> WorkerSteps[T]:
        """Return the given steps, for the loader processes to read."""

    @abstractmethod
    def _rows_judged(self, rows_read: int, step: int) -> int:
        """Return the rows of which max_bad_fraction may be bad, all ranks having met `rows_read` before `step`."""

    @abstractmethod
    def _empty_rows(self) -> Rows:
        """Return no rows, of the present step."""

    def __iter__(self) -> RowStream:
        """Return the stream itself: it goes on where it is."""
        return self

    def __next__(self) -> Rows:
        """Return this rank's rows of the next step. Raises DataError or PeerError as `check` does."""
        if self._rows is None:
            self._rows = self.made(_as_they_are)
        if (self.step - self._opened_at) % CHECK_EVERY_STEPS == 0:
            self.check()
        return replace(next(self._rows), sequences=self.dataset.sequences)

    def made(self, make: Callable[[Rows], T], num: int | None = None) -> Generator[T]:
        """Return what `make` makes of this rank's rows of each of the next `num` steps (None: endlessly).

        It is made by the loader processes, which end when this is closed; of no rows where they cannot read: who calls
        it compares `report`s.
        """
        if not self.rows_read:
            self._opened_at = self.step
        return self._made(make, range(self.step, sys.maxsize if num is None else self.step + num))

    def _made(self, make: Callable[[Rows], T], steps: range) -> Generator[T]:
        with closing(load(self._steps(steps, make), self._num_workers)) as loaded:
            for step in steps:
                made = self._next_of(loaded, step)
                what = make(self._empty_rows()) if made is None else made.what
                self.step = step + 1
                yield what

    def report(self) -> RowReport:
        """Return what this rank has met so far."""
        return RowReport(self._failure is not None, self.rows_bad, self.rows_read)

    def needs_check(self, reports: Sequence[RowReport], step: int) -> bool:
        """Return True where `check` is due before `step` by the reports of all ranks."""
        if any(report.failed for report in reports):
            return True
        due = (step - self._opened_at) % CHECK_EVERY_STEPS == 0
        bad, met = sum(report.rows_bad for report in reports), sum(report.rows_read for report in reports)
        return due and bad > self._max_bad_fraction * self._rows_judged(int(met), step)

    def check(self, step: int | None = None) -> None:
        """Stop all ranks together where one cannot read, or too many rows before `step` are bad. A collective.

        Call it before a checkpoint is written, too. Raises DataError; PeerError where a loader process died, and on the
        ranks that could read where another could not.
        """
        mine = (self.rows_bad, self.rows_read, self._failure is not None, dict(self._reasons))
        alone = self.world_size == 1 or self.world_size != distributed.world_size()
        reports = [mine] if alone else distributed.all_gather_object(mine)
        if any(failed for _, _, failed, _ in reports):
            distributed.raise_together(self._failure) if not alone else self._raise_own()
        bad, met = sum(report[0] for report in reports), sum(report[1] for report in reports)
        allowed = self._max_bad_fraction * self._rows_judged(met, self.step if step is None else step)
        if bad > allowed:
            where = f"; they are named in {self._quarantine}" if self._quarantine else ""
            raise DataError(
                f"{self.dataset.dir}: {bad:.10g} of {met} rows met are bad, more than data.max_bad_fraction="
                f"{self._max_bad_fraction} allows ({int(allowed)}): {_told([report[3] for report in reports])}{where}; "
                "mend the shards or allow more"
            )

    def close(self) -> None:
        """End the loader processes of what `next` gives."""
        if self._rows is not None:
            self._rows.close()
            self._rows = None

    def _raise_own(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _next_of(self, loaded: Generator[WorkerStep[T]], step: int) -> WorkerStep[T] | None:
        """Return what was made of a step, None where this rank cannot read any further."""
        if self._failure is not None:
            return None
        try:
            made = next(loaded)
        except (DataError, PeerError) as error:
            self._failure = type(error)(f"rank {self.rank} cannot read {self.dataset.dir}: {error}")
            log.error("%s; all ranks stop at the next check", self._failure)
            return None
        if made.step != step:
            raise AssertionError(f"the loaders gave step {made.step}, needed is {step}")
        self.rows_read += made.rows_planned
        self.rows_bad += made.rows_skipped + made.targets_skipped / self.queries_per_row
        for fault in made.bad:
            self._name(fault)
        return made

    def _name(self, fault: BadRow) -> None:
        """Name a bad row or block in the log and, where it does not stand there yet, in the quarantine file."""
        key = (fault.shard, fault.block, fault.row, fault.position)
        if key in self._named:
            return
        self._named.add(key)
        kind = re.sub(r"'[^']*'|\d+", "", fault.reason)  # without what is the row's own
        first, count = self._reasons.get(kind, (fault.reason, 0))
        if count or len(self._reasons) < MOST_KINDS:
            self._reasons[kind] = (first, count + max(1, fault.rows))
        row = "" if fault.row is None else f", row {fault.row}"
        row += "" if fault.position is None else f", position {fault.position}"
        log.warning("left out: %s, block %d%s: %s", fault.shard, fault.block, row, fault.reason)
        if self._quarantine is not None:
            if self._written is None:
                self._written = _whole_lines(self._quarantine)
            line = json.dumps(asdict(fault)).encode() + b"\n"
            if line not in self._written:
                self._written.add(line)
                with self._quarantine.open("ab") as file:
                    file.write(line)


def _as_they_are(rows: Rows) -> Rows:
    return rows


def _told(reasons: Sequence[dict[str, tuple[str, int]]]) -> str:
    """Return the commonest kinds of bad rows over all ranks, each by its first reason, with its rows."""
    total: dict[str, tuple[str, int]] = {}
    for kind, (reason, rows) in (item for of_rank in reasons for item in of_rank.items()):
        first, before = total.get(kind, (reason, 0))
        total[kind] = (first, before + rows)
    commonest = sorted(total.values(), key=lambda reason: -reason[1])[:SHOWN_KINDS]
    return ", ".join(f"{reason} ({rows} row{'s' if rows > 1 else ''})" for reason, rows in commonest)


def _whole_lines(path: Path) -> set[bytes]:
    """Return the lines of a file, which is made where it is not there; one that a kill cut short is taken away."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        lines = file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            file.truncate(sum(map(len, lines[:-1])))
            lines.pop()
    return set(lines)
