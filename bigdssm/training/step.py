"""One training step: forward, one loss over the global batch, backward, and the synchronization of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.dataset.tensors import Features
from bigdssm.loader.batch import Batch
from bigdssm.loader.row_stream import RowReport
from bigdssm.loader.step_plan import StepPlan, StepRequirements
from bigdssm.training.encoding import LossFunction, back_propagate, encode
from bigdssm.training.engine import Engine
from bigdssm.utils import timing
from bigdssm.utils.device import to_device


class StepReport(NamedTuple):
    """The values that a rank sends to all ranks in a step."""

    stop: float = 0.0  # 1 if a stop was requested
    save: float = 0.0  # 1 if a checkpoint is due
    queries: float = 0.0  # number of queries in the batch
    rows: RowReport = RowReport(0.0, 0.0, 0.0)
    requirements: StepRequirements = StepRequirements(1, 1, 0, 0)  # of the next batch's plan


@dataclass(frozen=True)
class StepAgreement:
    """The reports of all ranks, equal on every rank."""

    loss: float  # mean over ranks
    alpha: float
    reports: tuple[StepReport, ...]  # by rank

    @property
    def stop(self) -> bool:
        """Whether a stop was requested on any rank."""
        return any(report.stop for report in self.reports)

    @property
    def save(self) -> bool:
        """Whether a checkpoint is due on any rank."""
        return any(report.save for report in self.reports)

    @property
    def requirements(self) -> StepRequirements:
        """The maximum of the requirements over ranks."""
        of_ranks = zip(*(report.requirements for report in self.reports), strict=True)
        return StepRequirements(*(max(numbers) for numbers in of_ranks))


def exchange_reports(loss: Tensor, alpha: Tensor, report: StepReport) -> Callable[[], StepAgreement]:
    """Start an all-gather of loss, alpha and report; the returned function waits for it.

    All ranks must call it.
    """
    numbers = [report.stop, report.save, report.queries, *report.rows, *report.requirements]
    of_device = torch.stack([loss.detach().double().view(()), alpha.detach().double().view(())])
    row = torch.cat([of_device, to_device(torch.tensor(numbers, dtype=torch.float64), loss.device)])
    gathered = distributed.all_gather_padded(row[None], 1)

    def read() -> StepAgreement:
        table = gathered.wait().tolist()
        losses = [numbers[0] for numbers in table]
        return StepAgreement(
            sum(losses) / len(losses), table[0][1], tuple(_parse_report(numbers[2:]) for numbers in table)
        )

    return read


def _parse_report(numbers: Sequence[float]) -> StepReport:
    stop, save, queries, *others = numbers
    return StepReport(stop, save, queries, RowReport(*others[:3]), StepRequirements(*map(int, others[3:])))


@dataclass(frozen=True)
class StepResult:
    """The result of a step."""

    agreement: StepAgreement
    applied: bool  # False if loss or gradients were not finite
    gradient_norm: float | Tensor  # a tensor if it has not been read from the device
    stats: dict[str, Tensor]
    plan: StepPlan  # as executed

    @property
    def loss(self) -> float:
        """The mean loss over ranks."""
        return self.agreement.loss


def train_step(
    engine: Engine,
    batch: Batch,
    plan: StepPlan,
    loss_function: LossFunction,
    lr_factor: float,
    extra_inputs: Features | None = None,
    make_report: Callable[[], StepReport] = StepReport,
) -> StepResult:
    """Run one step on this rank's share of the global batch. All ranks must call it.

    extra_inputs: see `encode`. make_report: called after the backward, while gradients are being reduced.
    """
    if batch.table_rows is not None:
        with timing.span("tables"):
            engine.fetch(batch.table_rows)
    with timing.span("encode"):
        encoded, backward, plan = encode(engine, batch, plan, extra_inputs or {})
    output = back_propagate(encoded, backward, lambda leaves: loss_function(leaves, batch))
    with timing.span("optimizer"):
        agreement = exchange_reports(output.loss, encoded.alpha, make_report())
        applied = engine.step(lr_factor)
    norm = engine.gradient_norm() if applied else float("nan")
    return StepResult(agreement(), applied, norm, output.stats, plan)
