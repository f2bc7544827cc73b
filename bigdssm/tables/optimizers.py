"""Optimizers of table rows: only rows of the batch change, and only they are read. Torch is imported when one updates.

Shapes: n rows, d width of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bigdssm.config.components import TABLE_OPTIMIZERS, TableOptimizerConfig
from bigdssm.utils.components import bounded

if TYPE_CHECKING:
    from torch import Tensor

register_table_optimizer = TABLE_OPTIMIZERS.register


@register_table_optimizer
@dataclass(frozen=True)
class RowwiseAdagrad(TableOptimizerConfig):
    """Adagrad with one number of state per row, the sum of mean squared gradients (as in FBGEMM)."""

    name: str = "rowwise_adagrad"
    eps: float = bounded(1e-8, 1e-30, 1)

    def state_widths(self, dim: int) -> dict[str, int]:
        """Return one number per row."""
        return {"square": 1}

    def update(self, rows: Tensor, gradients: Tensor, states: dict[str, Tensor], lr: float, step: int) -> None:
        """Update rows and states in place."""
        square = states["square"].add_(gradients.square().mean(1, keepdim=True))
        rows.addcdiv_(gradients, square.sqrt().add_(self.eps), value=-lr)


@register_table_optimizer
@dataclass(frozen=True)
class LazyAdam(TableOptimizerConfig):
    """Adam whose moments change only with their row, as torch.optim.SparseAdam."""

    name: str = "lazy_adam"
    betas: tuple[float, float] = bounded((0.9, 0.98), 0, below=1)
    eps: float = bounded(1e-8, 1e-30, 1)

    def state_widths(self, dim: int) -> dict[str, int]:
        """Return two moments of the width of a row."""
        return {"exp_avg": dim, "exp_avg_sq": dim}

    def update(self, rows: Tensor, gradients: Tensor, states: dict[str, Tensor], lr: float, step: int) -> None:
        """Update rows and states in place."""
        first, second = self.betas
        mean = states["exp_avg"].lerp_(gradients, 1 - first)
        square = states["exp_avg_sq"].mul_(second).addcmul_(gradients, gradients, value=1 - second)
        size = lr * math.sqrt(1 - second ** (step + 1)) / (1 - first ** (step + 1))
        rows.addcdiv_(mean, square.sqrt().add_(self.eps), value=-size)
