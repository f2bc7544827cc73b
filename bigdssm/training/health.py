"""What a run tells about itself: a line of health per interval, metrics, trackers, a progress bar."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bigdssm import distributed
from bigdssm.cli import ProgressBar
from bigdssm.data import Batch
from bigdssm.data.chunks import padding_fraction
from bigdssm.evaluation.split import Evaluation
from bigdssm.log import get_logger
from bigdssm.training.engine import Engine
from bigdssm.training.step import StepResult
from bigdssm.training.trackers import Trackers

logger = get_logger(__name__)


class Health:
    """Measures between two log lines; time in checkpoints and validations does not count as training time."""

    def __init__(
        self, name: str, engine: Engine, trackers: Trackers, bar: ProgressBar, total_steps: int, rows_global: int,
        log_every_steps: int,
    ) -> None:  # fmt: skip
        self._name, self._engine, self._trackers, self._bar = name, engine, trackers, bar
        self._total_steps, self._rows_global, self._every = total_steps, rows_global, log_every_steps
        self._skipped = 0
        self._began, self._spent_s = time.perf_counter(), {"checkpoint": 0.0, "validation": 0.0}
        self._restart()

    def waited_for(self, batches: Iterator[Batch]) -> Batch:
        """Return the next batch, counting the time it took as waiting for data."""
        started = time.perf_counter()
        batch = next(batches)
        self._waited_s += time.perf_counter() - started
        return batch

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Take what happens within it out of the training time, and say how long it took."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._apart_s += seconds
        self._spent_s[what] += seconds
        logger.info("%s: %s took %.2f s", self._name, what, seconds)

    def after_step(self, step: int, applied: int, batch: Batch, result: StepResult) -> None:
        """Count a step; every so many, write a record and a line."""
        self._steps += 1
        self._skipped += not result.applied
        self._bar(self._name, step, self._total_steps)
        if step % self._every and step != self._total_steps:
            return
        seconds = max(1e-9, time.perf_counter() - self._started - self._apart_s)
        stats = {name: float(value) for name, value in result.stats.items()}
        rows_per_s = self._rows_global * self._steps / seconds
        record: dict[str, Any] = {
            "step": step,
            "loss": result.loss,
            "lr": self._engine.learning_rate(),
            "grad_norm": result.gradient_norm,
            "alpha": result.alpha,
            **stats,
            "rows_per_s": rows_per_s,
            "data_wait_fraction": self._waited_s / seconds,
            "padding_fraction": padding_fraction({**batch.query, **{f"doc.{k}": v for k, v in batch.doc.items()}}),
            "distinct_fraction": len(batch.doc_ids) / max(1, int(batch.multiplicity.sum())),
            "skipped": self._skipped,
            "memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        self._trackers.log({key: value for key, value in record.items() if value == value})  # JSON has no NaN
        eta_s = (self._total_steps - step) * seconds / self._steps
        logger.info(
            "%s %d/%d  loss %.4f  lr %.2e  |g| %.2f  alpha %.2f  accuracy %.1f%%  dropped %.2f%%  %s rows/s  "
            "data wait %.0f%%  padding %.0f%%  distinct %.0f%%  skipped %d  %.2f GB  ETA %d:%02d",
            self._name, step, self._total_steps, result.loss, record["lr"], result.gradient_norm, result.alpha,
            100 * stats.get("in_batch_accuracy", 0.0), 100 * stats.get("dropped_fraction", 0.0),
            f"{rows_per_s:,.0f}", 100 * record["data_wait_fraction"], 100 * record["padding_fraction"],
            100 * record["distinct_fraction"], self._skipped, record["memory_gb"], eta_s // 60, eta_s % 60,
        )  # fmt: skip
        self._restart()

    def after_validation(self, step: int, evaluation: Evaluation) -> None:
        """Write a validation's record and line; its time is taken out of the training time."""
        self._apart_s += evaluation.seconds
        self._spent_s["validation"] += evaluation.seconds
        metrics = evaluation.metrics
        self._trackers.log({"step": step, "validation": metrics, "seconds": evaluation.seconds})
        logger.info(
            "%s %d/%d  validation: NDCG@10 %.4f  HR@10 %.4f  MRR %.4f  (%.1f s)",
            self._name, step, self._total_steps, metrics["ndcg_at_10"], metrics["hr_at_10"], metrics["mrr"],
            evaluation.seconds,
        )  # fmt: skip

    def costs(self) -> str:
        """Return what checkpoints and validations took so far, in seconds and as a share of the whole."""
        whole_s = time.perf_counter() - self._began
        return ", ".join(
            f"{what}s took {seconds:.1f} s ({100 * seconds / whole_s:.1f}%)" for what, seconds in self._spent_s.items()
        )

    def _restart(self) -> None:
        self._started, self._waited_s, self._apart_s, self._steps = time.perf_counter(), 0.0, 0.0, 0


def describe_ranks() -> str:
    """Return for example `2 ranks`."""
    number = distributed.world_size()
    return f"{number} rank{'s' if number != 1 else ''}"
