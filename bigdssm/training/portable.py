"""Weights and optimizer state by parameter name, whole and in float32, whatever ZeRO stage and world size hold them.

What one engine gives, any other takes: another stage, another number of ranks. Every parameter is put together on all
ranks at once (a collective per tensor), and kept by one of them, so that no rank holds more than its share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from bigdssm import distributed

MOMENTS = ("exp_avg", "exp_avg_sq")


def whole_tensors(engine: Any, zero_stage: int) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, float32 tensor) of every weight, and (`exp_avg/` or `exp_avg_sq/` + name) of every moment.

    A collective: every rank must run it to the end. Before the first step there are no moments.
    """
    has_moments = any(len(state) for state in base_optimizer(engine, zero_stage).state.values())
    if has_moments:
        _link_moments(engine, zero_stage)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            yield name, parameter.detach().float()
            continue
        yield name, parameter.detach().float() if zero_stage == 0 else safe_get_full_fp32_param(parameter)
        for moment in MOMENTS if has_moments else ():
            yield f"{moment}/{name}", _moment(engine, zero_stage, parameter, moment)


def own_share(tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors that this rank keeps, on the CPU: every world_size-th one."""
    rank, world_size = distributed.rank(), distributed.world_size()
    return {
        name: tensor.detach().cpu().contiguous().clone()
        for number, (name, tensor) in enumerate(tensors)
        if number % world_size == rank
    }


def set_tensors(engine: Any, zero_stage: int, read: Callable[[str], Tensor], applied_steps: int) -> None:
    """Set an engine's master weights and moments to what `read` returns for the names of `whole_tensors`. A collective.

    The model must have been given the same weights before the engine was built around it. `applied_steps` becomes
    Adam's step of every parameter.
    """
    if applied_steps > 0:
        _create_moments(engine, zero_stage, applied_steps)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if zero_stage > 0:
            _set_master(zero_stage, parameter, read(name))
        for moment in MOMENTS if applied_steps > 0 else ():
            _set_moment(engine, zero_stage, parameter, read(f"{moment}/{name}"), moment)


def base_optimizer(engine: Any, zero_stage: int) -> torch.optim.Optimizer:
    """Return the torch optimizer beneath DeepSpeed's."""
    optimizer: torch.optim.Optimizer = engine.optimizer.optimizer if zero_stage > 0 else engine.optimizer
    return optimizer


def _moment(engine: Any, zero_stage: int, parameter: nn.Parameter, moment: str) -> Tensor:
    whole: Tensor
    if zero_stage == 0:
        whole = engine.optimizer.state[parameter][moment]
    else:
        whole = safe_get_full_optimizer_state(parameter, moment)
    return whole


def _create_moments(engine: Any, zero_stage: int, applied_steps: int) -> None:
    """Make the states that the optimizer itself would make in its first step, and tell DeepSpeed of them."""
    optimizer = base_optimizer(engine, zero_stage)
    if zero_stage == 3:
        flat = list(engine.optimizer.fp32_partitioned_groups_flat)
    else:
        flat = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for tensor in flat:
        optimizer.state[tensor] = {
            "step": torch.tensor(float(applied_steps)),
            **{moment: torch.zeros_like(tensor) for moment in MOMENTS},
        }
    _link_moments(engine, zero_stage)


def _link_moments(engine: Any, zero_stage: int) -> None:
    """Let ZeRO 1 and 2 find all groups' moments: by itself it links them when only the first group has stepped."""
    if zero_stage in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _set_master(zero_stage: int, parameter: nn.Parameter, value: Tensor) -> None:
    if zero_stage == 3:  # the call for whole tensors fails where a parameter does not divide by the ranks
        safe_set_local_fp32_param(parameter, _partition(parameter, value))
    else:
        safe_set_full_fp32_param(parameter, value.to(parameter.device))


def _set_moment(engine: Any, zero_stage: int, parameter: nn.Parameter, value: Tensor, moment: str) -> None:
    if zero_stage == 0:
        engine.optimizer.state[parameter][moment].copy_(value)
    elif zero_stage == 3:
        safe_set_local_optimizer_state(parameter, _partition(parameter, value), moment)
    else:
        safe_set_full_optimizer_state(parameter, value.to(parameter.device), moment)


def _partition(parameter: Any, value: Tensor) -> Tensor:
    """Return this rank's padded part of a ZeRO-3 parameter."""
    size = parameter.ds_tensor.numel()
    padded = value.new_zeros(size * distributed.world_size())
    padded[: value.numel()] = value.flatten()
    return padded[size * distributed.rank() :][:size]
