"""One training step: encode, one loss over the global batch, backward through the towers, rank synchronisation."""

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
from bigdssm.loader.upload import to_device
from bigdssm.losses import LossOutput
from bigdssm.models import Encoded
from bigdssm.training.encoding import encode
from bigdssm.training.engine import Engine
from bigdssm.utils import timing


class StepReport(NamedTuple):
    """What one rank tells."""

    stop: float = 0.0  # whether it was asked to
    save: float = 0.0  # whether a checkpoint is due
    queries: float = 0.0
    report: RowReport = RowReport(0.0, 0.0, 0.0)
    needs: StepRequirements = StepRequirements(1, 1, 0, 0)  # of the next batch's plan


@dataclass(frozen=True)
class StepAgreement:
    """What every rank then knows of all."""

    loss: float  # the mean
    alpha: float
    notes: tuple[StepReport, ...]  # by rank

    @property
    def stop(self) -> bool:
        """Return whether any rank was asked to stop."""
        return any(note.stop for note in self.notes)

    @property
    def save(self) -> bool:
        """Return whether a checkpoint is due on any rank."""
        return any(note.save for note in self.notes)

    @property
    def needs(self) -> StepRequirements:
        """Return the most that any rank needs."""
        return StepRequirements(*(max(numbers) for numbers in zip(*(note.needs for note in self.notes), strict=True)))


def agree(loss: Tensor, alpha: Tensor, note: StepReport) -> Callable[[], StepAgreement]:
    """Send this rank's loss, alpha and note; what is returned waits for those of all ranks. A collective."""
    own = torch.tensor([note.stop, note.save, note.queries, *note.report, *note.needs], dtype=torch.float64)
    of_device = torch.stack([loss.detach().double().view(()), alpha.detach().double().view(())])
    row = torch.cat([of_device, to_device(own, loss.device)])
    gathered = distributed.all_gather_padded(row[None], 1)

    def read() -> StepAgreement:
        table = gathered.wait().tolist()
        losses = [numbers[0] for numbers in table]
        return StepAgreement(sum(losses) / len(losses), table[0][1], tuple(_note(numbers[2:]) for numbers in table))

    return read


def _note(numbers: Sequence[float]) -> StepReport:
    stop, save, queries, *further = numbers
    return StepReport(stop, save, queries, RowReport(*further[:3]), StepRequirements(*map(int, further[3:])))


LossFunction = Callable[[Encoded, Batch], LossOutput]


@dataclass(frozen=True)
class StepResult:
    """What one step reports; the same on every rank."""

    agreed: StepAgreement
    applied: bool  # False where loss or gradients were not finite
    gradient_norm: float | Tensor  # on the device, where nothing needed it yet
    stats: dict[str, Tensor]
    plan: StepPlan  # of what was encoded

    @property
    def loss(self) -> float:
        """Return the mean loss over ranks."""
        return self.agreed.loss


def train_step(
    engine: Engine,
    batch: Batch,
    plan: StepPlan,
    loss_function: LossFunction,
    lr_factor: float,
    further: Features | None = None,
    note: Callable[[], StepReport] = StepReport,
) -> StepResult:
    """Run one step on this rank's share of the global batch and return what all ranks report of it. A collective.

    further: what the model's forward takes for the queries beside both sides (without chunks), by name. note: asked
    for what this rank has to tell the others, once its gradients are on their way.
    """
    with timing.span("encode"):
        encoded, backward, plan = encode(engine, batch, plan, further or {})
    with timing.span("loss"):
        leaves = Encoded(*(None if t is None else t.detach().requires_grad_() for t in encoded))  # type: ignore[arg-type]
        output = loss_function(leaves, batch)
        output.loss.backward()
        _spoil(leaves, output.loss.detach())
    with timing.span("backward"):
        backward(leaves)
    with timing.span("optimizer"):
        agreed = agree(output.loss, leaves.alpha, note())
        applied = engine.step(lr_factor)
    norm = engine.gradient_norm() if applied else float("nan")
    return StepResult(agreed(), applied, norm, output.stats, plan)


def _spoil(leaves: Encoded, loss: Tensor) -> None:
    """Make every gradient NaN where the loss is not finite on this rank: reduced, they have all ranks skip the step."""
    zero_or_nan = loss * 0
    for leaf in leaves:
        if leaf is not None and leaf.grad is not None:
            leaf.grad.add_(zero_or_nan)
