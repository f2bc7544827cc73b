"""What every stream of rows does: hand out steps, count and name what is left out, stop all ranks together."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bigdssm import distributed
from bigdssm.dataset.blocks import Bad
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.errors import ConfigError, DataError, PeerError
from bigdssm.log import get_logger
from bigdssm.streaming.lanes import LaneRows

CHECK_EVERY_STEPS = 16
MOST_KINDS, SHOWN_KINDS = 20, 3  # of bad rows: remembered by a rank, told where there are too many
log = get_logger(__name__)


class Report(NamedTuple):
    """What a rank has met: whether it cannot read any further, and rows."""

    failed: float
    rows_bad: float
    rows_met: float


class RowStream(ABC):
    """An endless iterator of Rows: this rank's share of step after step.

    All ranks make the same number of steps whatever is damaged. Every CHECK_EVERY_STEPS steps `next` is a collective
    (see `check`), where world_size is the process group's; `next_alone` never is.
    """

    steps_per_epoch: int  # 0: not known
    queries_per_row = 1.0  # on average
    queries_per_step: float  # of all ranks, on average
    inline = False  # whether rows bring their documents' features

    def __init__(
        self, dataset: Dataset, *, rank: int, world_size: int, start_step: int, parts_per_step: int,
        max_bad_fraction: float, quarantine: Path | None,
    ) -> None:  # fmt: skip
        """`parts_per_step` parts make a step; `quarantine` is the JSONL file that names what is left out.

        Raises ConfigError: numbers that cannot work.
        """
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank} must be at least 0 and below world_size={world_size}")
        if start_step < 0:
            raise ConfigError(f"start_step={start_step} must not be negative")
        self.dataset, self.rank, self.world_size = dataset, rank, world_size
        self.step = start_step  # the next one to be handed out; may be set until the first `next`
        # Of this rank, since it was opened; a bad target counts as its share of a row.
        self.rows_bad, self.rows_met = 0.0, 0
        self._opened_at = start_step
        self._parts_per_step, self._max_bad_fraction, self._quarantine = parts_per_step, max_bad_fraction, quarantine
        self._named: set[tuple[str, int, int | None, int | None]] = set()
        self._written: set[bytes] | None = None  # lines of the file, also those of a run that this one goes on with
        self._reasons: dict[str, tuple[str, int]] = {}  # of what is bad, by kind: the first, and in how many rows
        self._failure: DataError | PeerError | None = None
        self._parts: Iterator[LaneRows] | None = None

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
        """Return how often each document comes as a positive, relative to all, float64 [num_docs] (any scale)."""

    @abstractmethod
    def _open(self) -> Iterator[LaneRows]:
        """Return the parts from `self.step` on."""

    @abstractmethod
    def _rows_judged(self, rows_met: int, step: int) -> int:
        """Return the rows of which max_bad_fraction may be bad, all ranks having met `rows_met` before `step`."""

    @abstractmethod
    def _empty_rows(self) -> Rows:
        """Return no rows, of the present step."""

    def __iter__(self) -> RowStream:
        """Return the stream itself: it goes on where it is."""
        return self

    def __next__(self) -> Rows:
        """Return this rank's rows of the next step. Raises DataError or PeerError as `check` does."""
        self._opened()
        if (self.step - self._opened_at) % CHECK_EVERY_STEPS == 0:
            self.check()
        return self.next_alone()

    def next_alone(self) -> Rows:
        """Return this rank's rows of the next step, none where it cannot read: who calls it compares `report`s."""
        rows = self._next_rows(self._opened())
        self.step += 1
        return rows

    def report(self) -> Report:
        """Return what this rank has met so far."""
        return Report(self._failure is not None, self.rows_bad, self.rows_met)

    def needs_check(self, reports: Sequence[Report], step: int) -> bool:
        """Return True where `check` is due before `step` by the reports of all ranks."""
        if any(report.failed for report in reports):
            return True
        due = (step - self._opened_at) % CHECK_EVERY_STEPS == 0
        bad, met = sum(report.rows_bad for report in reports), sum(report.rows_met for report in reports)
        return due and bad > self._max_bad_fraction * self._rows_judged(int(met), step)

    def check(self, step: int | None = None) -> None:
        """Stop all ranks together where one cannot read, or too many rows before `step` are bad. A collective.

        Call it before a checkpoint is written, too. Raises DataError; PeerError where a loader process died, and on the
        ranks that could read where another could not.
        """
        mine = (self.rows_bad, self.rows_met, self._failure is not None, dict(self._reasons))
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
        """End the loader processes."""
        self._parts = None

    def _opened(self) -> Iterator[LaneRows]:
        if self._parts is None:
            if not self.rows_met:
                self._opened_at = self.step
            self._parts = self._open()
        return self._parts

    def _raise_own(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _next_rows(self, loaded: Iterator[LaneRows]) -> Rows:
        parts: list[LaneRows] = []
        if self._failure is None:
            try:
                parts = [next(loaded) for _ in range(self._parts_per_step)]
            except (DataError, PeerError) as error:
                self._failure = type(error)(f"rank {self.rank} cannot read {self.dataset.dir}: {error}")
                log.error("%s; all ranks stop at the next check", self._failure)
        if self._failure is not None:
            return self._empty_rows()
        for part in parts:
            self.rows_met += part.rows_planned
            self.rows_bad += part.rows_planned - len(part.rows) + part.targets_left_out / self.queries_per_row
            for fault in part.bad:
                self._name(fault)
        rows = Rows.concat([part.rows for part in parts])
        if rows.step != self.step:
            raise AssertionError(f"the loaders gave step {rows.step}, needed is {self.step}")
        return rows

    def _name(self, fault: Bad) -> None:
        """Name a bad row or block in the log and, where it does not stand there yet, in the quarantine file."""
        key = (fault.shard, fault.block, fault.row, fault.place)
        if key in self._named:
            return
        self._named.add(key)
        kind = re.sub(r"'[^']*'|\d+", "", fault.reason)  # without what is the row's own
        first, count = self._reasons.get(kind, (fault.reason, 0))
        if count or len(self._reasons) < MOST_KINDS:
            self._reasons[kind] = (first, count + max(1, fault.rows))
        row = "" if fault.row is None else f", row {fault.row}"
        row += "" if fault.place is None else f", place {fault.place}"
        log.warning("left out: %s, block %d%s: %s", fault.shard, fault.block, row, fault.reason)
        if self._quarantine is not None:
            if self._written is None:
                self._written = _whole_lines(self._quarantine)
            line = json.dumps(asdict(fault)).encode() + b"\n"
            if line not in self._written:
                self._written.add(line)
                with self._quarantine.open("ab") as file:
                    file.write(line)


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
