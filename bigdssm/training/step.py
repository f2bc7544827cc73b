"""One training step: encode, one loss over all vectors of the global batch, and the way back through the towers.

The loss runs on vectors detached from the towers, so that it does not matter to it in how many chunks they were made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bigdssm import distributed, timing
from bigdssm.batching.batch import Batch
from bigdssm.batching.plan import StepPlan
from bigdssm.dataset.tensors import Features
from bigdssm.losses import LossOutput
from bigdssm.models import Encoded
from bigdssm.training.encoding import encode
from bigdssm.training.engine import Engine

LossFunction = Callable[[Encoded, Batch], LossOutput]


@dataclass(frozen=True)
class StepResult:
    """What one step reports; the same on every rank."""

    loss: float
    applied: bool  # False where loss or gradients were not finite
    gradient_norm: float
    alpha: float
    stats: dict[str, Tensor]


def train_step(
    engine: Engine,
    batch: Batch,
    plan: StepPlan,
    loss_function: LossFunction,
    lr_factor: float,
    further: Features | None = None,
) -> StepResult:
    """Run one step on this rank's share of the global batch and return what all ranks report of it. A collective.

    further: what the model's forward takes for the queries beside both sides (without chunks), by name.
    """
    with timing.span("encode"):
        encoded, backward = encode(engine, batch, plan, further or {})
    with timing.span("loss"):
        leaves = Encoded(*(None if t is None else t.detach().requires_grad_() for t in encoded))  # type: ignore[arg-type]
        output = loss_function(leaves, batch)
        output.loss.backward()
        loss = _agreed_loss(output, leaves)
    applied = False
    if math.isfinite(loss):
        with timing.span("backward"):
            backward(leaves)
        with timing.span("optimizer"):
            applied = engine.step(lr_factor)
    norm = engine.gradient_norm() if applied else float("nan")
    return StepResult(loss, applied, norm, float(leaves.alpha.detach()), output.stats)


def _agreed_loss(output: LossOutput, leaves: Encoded) -> float:
    """Return the mean loss over ranks, NaN on every rank where a loss or a vector's gradient on any is not finite."""
    gradients = [leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None]
    finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    local = float(output.loss.detach()) if finite else float("nan")
    return float(distributed.all_reduce(torch.tensor([local], dtype=torch.float64))) / distributed.world_size()
