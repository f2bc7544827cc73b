"""Parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from bigdssm.config import OptimizerConfig


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return AdamW groups of the trainable parameters: matrices (decayed), embedding tables, and the rest.

    The rest are biases, norms, single vectors and alpha. Every group carries `name` and `base_lr`; empty groups are
    left out. Tables are not decayed: a row that is not in the batch must not move.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "tables": [], "rest": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            name = "tables" if id(parameter) in tables else "matrices" if parameter.dim() >= 2 else "rest"
            groups[name].append(parameter)
    return [
        {
            "name": name,
            "params": parameters,
            "lr": config.lr * (config.embedding_lr_ratio if name == "tables" else 1.0),
            "base_lr": config.lr * (config.embedding_lr_ratio if name == "tables" else 1.0),
            "weight_decay": config.weight_decay if name == "matrices" else 0.0,
        }
        for name, parameters in groups.items()
        if parameters
    ]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW over `parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(model, config), betas=config.betas, eps=config.eps)


def schedule_factor(applied_steps: int, total_steps: int, config: OptimizerConfig) -> float:
    """Return what the base learning rate is multiplied by at step `applied_steps`: linear warm-up, then a cosine."""
    warmup = min(config.warmup_steps, total_steps)
    if applied_steps < warmup:
        return (applied_steps + 1) / (warmup + 1)
    progress = min(1.0, (applied_steps - warmup) / max(1, total_steps - warmup))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.final_lr_ratio + (1.0 - config.final_lr_ratio) * cosine
