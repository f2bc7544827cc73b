"""Config classes of optimizers, parameter groups, the learning-rate schedule; torch is imported on build."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bigdssm.config import OPTIMIZERS, OptimizerConfig
from bigdssm.utils.components import bounded

if TYPE_CHECKING:
    import torch
    from torch import nn

register_optimizer = OPTIMIZERS.register


@register_optimizer
@dataclass(frozen=True)
class AdamW(OptimizerConfig):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    name: str = "adamw"
    betas: tuple[float, float] = bounded((0.9, 0.98), 0, below=1)
    eps: float = bounded(1e-8, 1e-30, 1)

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build AdamW, fused on a GPU."""
        import torch

        on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
        return torch.optim.AdamW(groups, betas=self.betas, eps=self.eps, fused=on_gpu or None)

    def state_of(self, group: str) -> tuple[str, ...]:
        """Return the names of both moments."""
        return ("exp_avg", "exp_avg_sq")


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return the groups of trainable parameters: matrices (with weight decay), embedding tables, and the rest.

    The rest are biases, norms, single vectors and alpha. Groups have `name` and `base_lr`; empty groups are omitted.
    Tables have no weight decay: rows that are not in the batch must not change.
    """
    from torch import nn

    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "tables": [], "rest": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # of a parameter partitioned by ZeRO 3
            name = "tables" if id(parameter) in tables else "matrices" if len(shape) >= 2 else "rest"
            groups[name].append(parameter)
    lr = config.learning_rate
    base_lrs = {"matrices": lr, "tables": lr * config.embedding_lr_ratio, "rest": lr}
    return [
        {
            "name": name,
            "params": parameters,
            "lr": base_lrs[name],
            "base_lr": base_lrs[name],
            "weight_decay": config.weight_decay if name == "matrices" else 0.0,
        }
        for name, parameters in groups.items()
        if parameters
    ]


def warmup_steps(total_steps: int, config: OptimizerConfig) -> int:
    """Return the steps of warm-up, at most half of all, so that short schedules also reach `final_lr_ratio`."""
    return min(config.warmup_steps, math.ceil(total_steps / 2))


def schedule_factor(applied_steps: int, total_steps: int, config: OptimizerConfig) -> float:
    """Return the factor of the base learning rate at step `applied_steps`: linear warm-up, then cosine decay."""
    warmup = warmup_steps(total_steps, config)
    if applied_steps < warmup:
        return (applied_steps + 1) / (warmup + 1)
    progress = min(1.0, (applied_steps - warmup) / max(1, total_steps - warmup))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.final_lr_ratio + (1.0 - config.final_lr_ratio) * cosine
