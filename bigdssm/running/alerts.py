"""Alerts: a loss far above what it was lately, with the rows that it came from."""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from pathlib import Path

from torch import Tensor

from bigdssm.log import cut_back_of_rank, get_logger

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
