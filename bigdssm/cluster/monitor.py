"""Monitoring of a run: loss alerts, and its current state read from its folder."""

import json
import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bigdssm.cluster.metrics import METRICS_FILE, read_stage, stage_folders
from bigdssm.cluster.run_folder import is_locked, lock_holder, read_events
from bigdssm.errors import DataError
from bigdssm.utils.log import get_logger, metric_label, read_records, truncate_rank_records

WINDOW_STEPS, FEWEST_STEPS = 100, 20
DEVIATIONS, LEAST_RISE = 8.0, 0.25
MAX_LOGGED_ROWS = 8

logger = get_logger(__name__)
MAX_ALERTS = 3
BLOCKS = "▁▂▃▄▅▆▇█"


class SpikeAlert:
    """Detects loss spikes against the previous 100 applied steps.

    A spike exceeds their median by more than 8 standard deviations (robust: 1.48 median absolute deviations) and by
    more than a quarter. Logged only; training continues. Every rank logs it and appends its row ids to
    `alerts-<rank>.jsonl`.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, step: int = 0) -> None:
        """Truncate the file to the resumed checkpoint, after `step` steps."""
        self._path = truncate_rank_records(folder, "alerts", rank, world_size, lambda record: record["step"] <= step)
        self._losses: deque[float] = deque(maxlen=WINDOW_STEPS)

    def after_step(self, step: int, loss: float, row_ids: Tensor) -> None:
        """Check the global loss of a step; `row_ids` are this rank's. A skipped step (non-finite loss) is no spike."""
        if not math.isfinite(loss):
            return
        if len(self._losses) >= FEWEST_STEPS:
            usual = statistics.median(self._losses)
            deviation = 1.48 * statistics.median(abs(other - usual) for other in self._losses)
            if loss > usual + max(DEVIATIONS * deviation, LEAST_RISE * abs(usual)):
                rows = row_ids.tolist()
                logger.warning(
                    "step %d: the loss is %.4g, usually %.4g; this rank's first row ids: %s; all are in %s",
                    step, loss, usual, rows[:MAX_LOGGED_ROWS], self._path,
                )  # fmt: skip
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, "loss": loss, "usual": usual, "row_ids": rows}) + "\n")
        self._losses.append(loss)


@dataclass(frozen=True)
class RunState:
    """The current state of a stage, read from its folder."""

    folder: Path
    state: str  # one phrase: host and pid of the running stage, or how the run ended
    ended: bool
    step: int
    total_steps: int  # 0: unknown
    curves: dict[str, list[float]]  # oldest first, at least one value per curve
    figures: dict[str, str]  # formatted values of the newest record
    alerts: list[str]


def read_run_state(run: Path) -> RunState:
    """Read the state of a stage folder, or of a run folder's newest stage. Raises DataError: no run folder."""
    folder = stage_folders(run)[-1]
    events = read_events(folder)
    start: dict[str, Any] = next((event for event in reversed(events) if event["event"] == "start"), {})
    holder, ended = lock_holder(folder), True
    if holder is not None and is_locked(folder):
        state, ended = f"trains: pid {holder['pid']} on {holder['host']}, since {holder['started']}", False
    elif events and events[-1]["event"] == "end":
        state = f"ended with exit code {events[-1]['exit_code']}: {events[-1]['reason']}{_best_of(events[-1])}"
    else:
        state = "ended without an end record: killed, or its machine is gone; continue with --resume auto"
    records = read_stage(folder)
    if not records and not events:
        raise DataError(f"{folder / METRICS_FILE} is empty; wait for the first steps of the run")
    train = [record for record in records if "loss" in record]
    validations = [record for record in records if "validation" in record]
    curves = {
        "loss": [record["loss"] for record in train],
        **{
            f"validation {metric_label(name)}": [record["validation"][name] for record in validations]
            for name in {record["selected_by"] for record in validations}
        },
        "rows/s": [record["rows_per_s"] for record in train if "rows_per_s" in record],
    }
    # the values of the newest record, fractions in per cent
    figures = {}
    for name, value in train[-1].items() if train else ():
        if name not in ("step", "loss", "rows_per_s") and isinstance(value, int | float):
            is_fraction = name.endswith(("_fraction", "_accuracy"))
            text = f"{100 * value:.1f} %" if is_fraction else f"{value:.4g}"
            figures[name.removesuffix("_fraction").replace("_", " ")] = text
    # the newest alerts, one line per step: the files of all ranks contain the same steps
    alerts: dict[int, str] = {}
    for path in sorted(folder.glob("alerts-*.jsonl")):
        for alert in read_records(path, "usual"):
            text = f"alert at step {alert['step']}: loss {alert['loss']:.4g}, usually {alert['usual']:.4g}"
            alerts[alert["step"]] = f"{text}; rows in {path.parent / 'alerts-*.jsonl'}"
    return RunState(
        folder=folder,
        state=state,
        ended=ended,
        step=max((record["step"] for record in records), default=int(start.get("step", 0))),
        total_steps=int(start.get("total_steps", 0)),
        curves={name: values for name, values in curves.items() if values},
        figures=figures,
        alerts=[alerts[step] for step in sorted(alerts)[-MAX_ALERTS:]],
    )


def _best_of(end: dict[str, Any]) -> str:
    """Format the part of an end record on best/; nothing without one."""
    best = end.get("best")
    if not best:
        return ""
    which = "the initial weights, unchanged" if best["initial"] else f"the weights of step {best['step']}"
    return f"; best/ has {which} (model {best['model'][:12]}, selected on {best['queries']} queries)"


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw `values`, averaged over at most `width` equal segments, as a line of block characters."""
    parts = [values[len(values) * i // width : len(values) * (i + 1) // width] for i in range(width)]
    means = [sum(part) / len(part) for part in parts if len(part)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)
