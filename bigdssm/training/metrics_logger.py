"""Run monitoring: log lines, metrics records, trackers and a progress bar."""

import logging
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from bigdssm import distributed
from bigdssm.cluster.metrics import Trackers
from bigdssm.evaluation.evaluate import Evaluation
from bigdssm.evaluation.metrics import table_metrics
from bigdssm.loader.batch import Batch
from bigdssm.models import DualEncoder
from bigdssm.training.engine import Engine
from bigdssm.training.process_group import device
from bigdssm.training.step import StepResult
from bigdssm.utils import timing
from bigdssm.utils.log import ProgressBar, get_logger, metric_label

logger = get_logger(__name__)

SLOW_PRODUCT_S = 0.02  # no larger product is timed after such a one: emulated bfloat16 would take half a minute
NON_TRAINING_SPANS = ("validation", "model folder", "checkpoint")
TOWER_SPANS = ("encode", "backward", "backward/encode again")  # contain the towers' matrix products


class MetricsLogger:
    """Measures throughput, data wait and time spans, per log interval and over the run."""

    def __init__(
        self, name: str, engine: Engine, trackers: Trackers, bar: ProgressBar, total_steps: int, rows_global: int,
        log_every_steps: int, describe_best: Callable[[], str],
    ) -> None:  # fmt: skip
        self._describe_best = describe_best
        self._speed = ""  # of the last interval, for the progress bar
        self._name, self._engine, self._trackers, self._bar = name, engine, trackers, bar
        self._total_steps, self._rows_global, self._every = total_steps, rows_global, log_every_steps
        self._run_times = TimeTable()
        # since the last log line
        self._started, self._steps, self._flops = time.perf_counter(), 0, 0.0
        self._tokens = 0
        self._queries = [0.0] * distributed.world_size()  # by rank
        timing.pop_seconds()

    @contextmanager
    def timed(self, span: str) -> Iterator[None]:
        """A context of non-training work: counts its time as `span` and logs it."""
        started = time.perf_counter()
        with timing.span(span):
            yield
        logger.info("%s: %s took %.2f s", self._name, span, time.perf_counter() - started)

    def after_step(self, step: int, applied: int, batch: Batch, result: StepResult) -> None:
        """Count a step; write a record and a log line every `log_every_steps`, and a line of the first step."""
        self._steps += 1
        plan = result.plan
        self._flops += step_flops(cast(DualEncoder, self._engine.module), batch)
        self._tokens += plan.tokens
        for rank, report in enumerate(result.reports):
            self._queries[rank] += report.queries
        self._bar(self._name, step, self._total_steps, f"loss {result.loss:.4f}{self._speed}  {self._describe_best()}")
        is_due = step % self._every == 0 or step == self._total_steps
        if not is_due and self._run_times.steps:  # the first step of a process always logs a line
            return
        interval = self._interval()
        seconds = interval.training_s
        # one read of the device for all values on it
        on_device = [*result.stats.values(), batch.counts.sum()]
        *values, num_columns = torch.stack([value.double() for value in on_device]).tolist()
        stats = dict(zip(result.stats, values, strict=True))
        gradient_norm = float(result.gradient_norm)
        rows_per_s = self._rows_global * interval.steps / seconds
        query_rates = {}
        if batch.query_positions is not None:  # several queries per row: their imbalance across ranks matters, too
            total = sum(self._queries)
            query_rates = {
                "queries_per_s": total / seconds,
                "queries_max_over_mean": max(self._queries) / max(1.0, total / len(self._queries)),
            }
        record: dict[str, Any] = {
            "step": step,
            "loss": result.loss,
            "lr": float(self._engine.deepspeed.optimizer.param_groups[0]["lr"]),  # of the first group
            "grad_norm": gradient_norm,
            "alpha": result.alpha,
            **stats,
            "rows_per_s": rows_per_s,
            **query_rates,
            "tokens_per_s": self._tokens * distributed.world_size() / seconds,  # extrapolated from this rank
            "data_wait_fraction": interval.seconds.get("data wait", 0.0) / seconds,
            "padding_fraction": plan.padding,  # this rank's
            "distinct_fraction": len(batch.doc_ids) / max(1.0, num_columns),
            "skipped": step - applied,
            "memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            **({"gpu_memory_gb": torch.cuda.max_memory_allocated() / 2**30} if torch.cuda.is_available() else {}),
            "seconds": {name: round(value, 4) for name, value in interval.seconds.items()},
        }
        if is_due:
            self._trackers.log({key: value for key, value in record.items() if value == value})  # JSON has no NaN
        eta_s = (self._total_steps - step) * seconds / interval.steps
        self._speed = f"  {rows_per_s:,.0f} rows/s"
        queries = f"{record['queries_per_s']:,.0f} queries/s  " if "queries_per_s" in record else ""
        accuracy = f"accuracy {stats['in_batch_accuracy']:.1%}  " if "in_batch_accuracy" in stats else ""
        logger.log(
            logging.DEBUG if self._bar.is_live else logging.INFO,  # the bar shows the newest; metrics.jsonl has all
            "%s %d/%d  loss %.4f  lr %.2e  |g| %.2f  alpha %.2f  %sdropped %.2f%%  %s rows/s  "
            "%s%s tokens/s  data wait %.0f%%  padding %.0f%%  distinct %.0f%%  skipped %d  %.2f GB  ETA %d:%02d",
            self._name, step, self._total_steps, result.loss, record["lr"], gradient_norm, result.alpha,
            accuracy, 100 * stats.get("dropped_fraction", 0.0),
            f"{rows_per_s:,.0f}", queries, f"{record['tokens_per_s']:,.0f}",
            100 * record["data_wait_fraction"], 100 * record["padding_fraction"],
            100 * record["distinct_fraction"], record["skipped"], record["memory_gb"], eta_s // 60, eta_s % 60,
        )  # fmt: skip
        self._tokens = 0
        self._queries = [0.0] * len(self._queries)

    def after_run(self) -> None:
        """Log the time table of the run."""
        self._interval()
        table = self._run_times.lines(peak_flops(device(), self._engine.product_dtype))
        logger.info("%s, time of this rank by span: %s", self._name, "\n    ".join(table))

    def after_validation(self, step: int, evaluation: Evaluation, selected_by: str) -> None:
        """Write the record and the log line of a validation."""
        metrics = evaluation.metrics
        record = {"step": step, "validation": metrics, "selected_by": selected_by, "seconds": evaluation.seconds}
        self._trackers.log(record)
        names = dict.fromkeys((selected_by, *table_metrics()))
        shown = "  ".join(f"{metric_label(name)} {metrics[name]:.4f}" for name in names)
        logger.info(
            "%s %d/%d  validation: %s  (%.1f s)", self._name, step, self._total_steps, shown, evaluation.seconds
        )

    def _interval(self) -> "TimeTable":
        """Return the times since the last call, and add them to the run's."""
        started, self._started = self._started, time.perf_counter()
        interval = TimeTable(self._started - started, self._steps, self._flops, timing.pop_seconds())
        self._run_times.add(interval)
        self._steps, self._flops = 0, 0.0
        return interval


def step_flops(model: DualEncoder, batch: Batch) -> float:
    """Return the FLOPs of this rank's forward and backward (twice the forward); see `DualEncoder.flops`."""
    query, doc = batch.sizes
    towers = model.query_tower.flops(query) if batch.doc_vectors is not None else model.flops(query, doc)
    return 3 * towers


@dataclass
class TimeTable:
    """Seconds of a rank by span (see timing.py), and FLOPs of its matrix products."""

    elapsed_s: float = 0.0
    steps: int = 0
    flops: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, more: "TimeTable") -> None:
        """Add the times of another table."""
        self.elapsed_s += more.elapsed_s
        self.steps += more.steps
        self.flops += more.flops
        for name, seconds in more.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @property
    def training_s(self) -> float:
        """The elapsed seconds without non-training spans."""
        other = sum(seconds for name, seconds in self.seconds.items() if name.split("/")[0] in NON_TRAINING_SPANS)
        return max(1e-9, self.elapsed_s - other)

    def lines(self, peak_flops: float) -> list[str]:
        """Format the table; `peak_flops` is the processor's FLOP/s in a large matrix product."""
        other = max(0.0, self.elapsed_s - sum(self.seconds.values()))
        rows = [*sorted(self.seconds.items()), ("other", other)]
        elapsed = max(1e-9, self.elapsed_s)
        lines = [f"{self.elapsed_s:.1f} s in {self.steps} steps"]
        lines += [f"{name:28s} {seconds:9.2f} s {seconds / elapsed:6.1%}" for name, seconds in rows]
        towers = max(1e-9, sum(self.seconds.get(name, 0.0) for name in TOWER_SPANS))
        lines.append(
            f"the towers' matrix products, without padding and recomputation: {self.flops / towers / peak_flops:.0%} "
            f"of the peak of {peak_flops / 1e9:.0f} GFLOP/s in encode and backward, "
            f"{self.flops / self.training_s / peak_flops:.0%} over all training"
        )
        return lines


def peak_flops(device: torch.device, dtype: torch.dtype, largest: int = 1024, turns: int = 5) -> float:
    """Measure the FLOP/s of products of two square matrices, the best of sizes up to `largest`."""
    best, size = 0.0, largest // 8
    while size <= largest:
        a, b = (torch.rand(size, size, device=device, dtype=dtype) for _ in range(2))
        for _ in range(turns):
            started = time.perf_counter()
            float((a @ b)[0, 0])  # synchronizes with the device
            seconds = time.perf_counter() - started
            best = max(best, 2 * size**3 / seconds)
        if seconds > SLOW_PRODUCT_S:
            break
        size *= 2
    return best
