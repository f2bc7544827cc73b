"""One training step: encode, one loss over all vectors of the global batch, and the way back through the towers.

The loss runs on vectors detached from the towers, so that it does not matter to it in how many chunks they were made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from bigdssm import timing
from bigdssm.batching.batch import Batch
from bigdssm.batching.plan import StepPlan
from bigdssm.dataset.tensors import Features
from bigdssm.losses import LossOutput
from bigdssm.models import Encoded
from bigdssm.training.agreement import Agreed, Note, agree
from bigdssm.training.encoding import encode
from bigdssm.training.engine import Engine

LossFunction = Callable[[Encoded, Batch], LossOutput]


@dataclass(frozen=True)
class StepResult:
    """What one step reports; the same on every rank."""

    agreed: Agreed
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
    note: Callable[[], Note] = Note,
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
