"""Optimizers by name, parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bigdssm.config import OptimizerConfig
from bigdssm.errors import ConfigError

ADAM_STATE = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OptimizerKind:
    """An optimizer by name: how it is built, and which tensors it keeps of a parameter, each of the parameter's shape.

    Beside these it may keep one number, `step`, of a parameter. Checkpoints and estimates go by what stands here.
    """

    build: Callable[[list[dict[str, Any]], OptimizerConfig], torch.optim.Optimizer]
    state_of: Callable[[str], tuple[str, ...]]  # the names of its tensors in a group of `parameter_groups`
    whole_tensors: bool = False  # it needs parameters as they are: ZeRO 1 to 3 would give it flat pieces of them


_OPTIMIZERS: dict[str, OptimizerKind] = {}


def register_optimizer(name: str, kind: OptimizerKind) -> None:
    """Make an optimizer known to configs as `optimizer.name`."""
    _OPTIMIZERS[name] = kind


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return the groups of the trainable parameters: matrices (decayed), embedding tables, and the rest.

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


def find_optimizer(name: str) -> OptimizerKind:
    """Return the optimizer that a config names. Raises ConfigError: none is registered under it."""
    if name not in _OPTIMIZERS:
        raise ConfigError(
            f"optimizer.name: got {name}, needs one of {', '.join(_OPTIMIZERS)}, or an optimizer whose module is "
            "imported first (docs/extending.md)"
        )
    return _OPTIMIZERS[name]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimizer that `config` names, over `parameter_groups`."""
    return find_optimizer(config.name).build(parameter_groups(model, config), config)


def state_size(model: nn.Module, config: OptimizerConfig) -> int:
    """Return how many numbers an optimizer keeps of all parameters of a model, beside the weights."""
    kind = find_optimizer(config.name)
    return sum(
        len(kind.state_of(group["name"])) * parameter.numel()
        for group in parameter_groups(model, config)
        for parameter in group["params"]
    )


class _MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices, AdamW for the rest, as one optimizer: groups and states are shared with both."""

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> None:
        super().__init__(groups, {})
        matrices = [group for group in self.param_groups if group["name"] == "matrices"]
        others = [group for group in self.param_groups if group["name"] != "matrices"]
        self._both: list[torch.optim.Optimizer] = []
        if matrices:
            # its rate is scaled to what AdamW's would do to a matrix, so that one lr fits both
            muon = torch.optim.Muon(matrices, momentum=config.momentum, adjust_lr_fn="match_rms_adamw")
            self._both.append(muon)
        if others:
            self._both.append(_adamw(others, config))
        for optimizer in self._both:
            optimizer.state = self.state
        self.param_groups = [group for optimizer in self._both for group in optimizer.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step of both."""
        for optimizer in self._both:
            optimizer.step()


def _adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW; on a GPU as one kernel for many parameters, where each would have a dozen of its own."""
    on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=on_gpu or None)


register_optimizer("adamw", OptimizerKind(_adamw, lambda group: ADAM_STATE))
register_optimizer(
    "muon",
    OptimizerKind(
        _MuonAndAdamW, lambda group: ("momentum_buffer",) if group == "matrices" else ADAM_STATE, whole_tensors=True
    ),
)


def warmup_steps(total_steps: int, config: OptimizerConfig) -> int:
    """Return the steps of warm-up, at most half of all: the schedule ends at `final_lr_ratio`, however short it is."""
    return min(config.warmup_steps, math.ceil(total_steps / 2))


def schedule_factor(applied_steps: int, total_steps: int, config: OptimizerConfig) -> float:
    """Return what the base learning rate is multiplied by at step `applied_steps`: linear warm-up, then a cosine."""
    warmup = warmup_steps(total_steps, config)
    if applied_steps < warmup:
        return (applied_steps + 1) / (warmup + 1)
    progress = min(1.0, (applied_steps - warmup) / max(1, total_steps - warmup))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.final_lr_ratio + (1.0 - config.final_lr_ratio) * cosine
