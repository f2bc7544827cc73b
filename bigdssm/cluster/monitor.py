"""Monitoring of a run from its folder: loss alerts, and its present state."""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bigdssm.cluster.metrics import METRICS_FILE, metric_label, read_stage, stage_folders
from bigdssm.cluster.run_folder import is_locked, read_events, running
from bigdssm.errors import DataError
from bigdssm.utils.log import cut_back_of_rank, get_logger, read_records

WINDOW_STEPS, FEWEST_STEPS = 100, 20
DEVIATIONS, LEAST_RISE = 8.0, 0.25
SHOWN_ROWS = 8
ALERTS = "alerts"

logger = get_logger(__name__)


class SpikeAlert:
    """Compares each step's loss with those of the 100 applied steps before it.

    A spike is more than 8 standard deviations (1.48 median absolute deviations, which spikes do not move) and more
    than a quarter above their median. It is told, not acted upon: clipping and the optimizer's moments limit what
    one step can do. Every rank logs it and adds its rows to `alerts-<rank>.jsonl`.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, step: int = 0) -> None:
        """Cut the file back to the checkpoint that the run goes on from, made after `step` steps."""
        self._path = cut_back_of_rank(folder, ALERTS, rank, world_size, lambda record: record["step"] <= step)
        self._losses: deque[float] = deque(maxlen=WINDOW_STEPS)

    def after_step(self, step: int, loss: float, row_ids: Tensor) -> None:
        """Look at the loss of a step, the same on every rank, and at this rank's rows; a skipped step is no spike."""
        if not math.isfinite(loss):
            return
        if len(self._losses) >= FEWEST_STEPS:
            usual = statistics.median(self._losses)
            deviation = 1.48 * statistics.median(abs(other - usual) for other in self._losses)
            if loss > usual + max(DEVIATIONS * deviation, LEAST_RISE * abs(usual)):
                self._tell(step, loss, usual, row_ids.tolist())
        self._losses.append(loss)

    def _tell(self, step: int, loss: float, usual: float, row_ids: list[int]) -> None:
        logger.warning(
            "step %d: the loss is %.4f, %.1f times the usual %.4f; this rank's first row ids: %s; all are in %s",
            step, loss, loss / usual, usual, row_ids[:SHOWN_ROWS], self._path,
        )  # fmt: skip
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "loss": loss, "usual": usual, "row_ids": row_ids}) + "\n")


SHOWN_ALERTS = 3
BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class RunState:
    """A stage as its folder shows it."""

    folder: Path
    state: str  # one phrase: trains where, or how it ended
    ended: bool
    step: int
    total_steps: int  # 0: not known
    curves: dict[str, list[float]]  # oldest first, at least one value each
    figures: dict[str, str]  # the newest record's
    alerts: list[str]


def read_run_state(run: Path) -> RunState:
    """Return what the newest stage of a run folder, or a stage folder, shows. Raises DataError: no run folder."""
    folder = stage_folders(run)[-1]
    events = read_events(folder)
    start: dict[str, Any] = next((event for event in reversed(events) if event["event"] == "start"), {})
    state, ended = _state(folder, events)
    records = read_stage(folder).records
    if not records and not events:
        raise DataError(f"{folder / METRICS_FILE} holds nothing yet; has the run taken its first steps?")
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
    return RunState(
        folder=folder,
        state=state,
        ended=ended,
        step=max((record["step"] for record in records), default=int(start.get("step", 0))),
        total_steps=int(start.get("total_steps", 0)),
        curves={name: values for name, values in curves.items() if values},
        figures=_figures(train[-1]) if train else {},
        alerts=_alerts(folder),
    )


def sparkline(values: Sequence[float], width: int) -> str:
    """Return the last `width` or fewer means of equal parts of `values` as a line of blocks."""
    parts = [values[len(values) * i // width : len(values) * (i + 1) // width] for i in range(width)]
    means = [sum(part) / len(part) for part in parts if len(part)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def _state(folder: Path, events: list[dict[str, Any]]) -> tuple[str, bool]:
    holder = running(folder)
    if holder is not None and is_locked(folder):
        return f"trains: pid {holder['pid']} on {holder['host']}, since {holder['started']}", False
    if events and events[-1]["event"] == "end":
        return f"ended with exit code {events[-1]['exit_code']}: {events[-1]['reason']}", True
    return "ended without a word: killed, or its machine is gone; --resume auto goes on", True


def _figures(record: dict[str, Any]) -> dict[str, str]:
    """Return the newest record as it reads best: fractions in per cent."""
    found = {}
    for name, value in record.items():
        if name in ("step", "loss", "rows_per_s") or not isinstance(value, int | float):
            continue
        is_fraction = name.endswith(("_fraction", "_accuracy"))
        found[name.removesuffix("_fraction").replace("_", " ")] = (
            f"{100 * value:.1f} %" if is_fraction else f"{value:.4g}"
        )
    return found


def _alerts(folder: Path) -> list[str]:
    """Return the newest alerts, one line each; every rank has a file with the same steps."""
    newest: dict[int, str] = {}
    for path in sorted(folder.glob("alerts-*.jsonl")):
        for alert in read_records(path, "usual"):
            text = f"alert at step {alert['step']}: loss {alert['loss']:.4g}, usually {alert['usual']:.4g}"
            newest[alert["step"]] = f"{text}; rows in {path.parent / 'alerts-*.jsonl'}"
    return [newest[step] for step in sorted(newest)[-SHOWN_ALERTS:]]
