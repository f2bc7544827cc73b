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

StateOf = Callable[[str], tuple[str, ...]]
"""The names of the tensors that the optimizer keeps of a parameter in a group, see `optimizers.OptimizerKind`."""


def whole_tensors(engine: Any, zero_stage: int, state_of: StateOf) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, float32 tensor) of every weight, and (state's name + "/" + name) of every state of the optimizer.

    A collective: every rank must run it to the end. Before the first step there are no states.
    """
    has_states = any(len(state) for state in base_optimizer(engine, zero_stage).state.values())
    states = _states(engine, zero_stage, state_of) if has_states else {}
    if has_states:
        _link_states(engine, zero_stage)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            yield name, parameter.detach().float()
            continue
        yield name, parameter.detach().float() if zero_stage == 0 else safe_get_full_fp32_param(parameter)
        for state in states.get(parameter, ()):
            yield f"{state}/{name}", _state(engine, zero_stage, parameter, state)


def own_share(tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors that this rank keeps, on the CPU: every world_size-th one."""
    rank, world_size = distributed.rank(), distributed.world_size()
    return {
        name: tensor.detach().cpu().contiguous().clone()
        for number, (name, tensor) in enumerate(tensors)
        if number % world_size == rank
    }


def set_tensors(
    engine: Any, zero_stage: int, state_of: StateOf, read: Callable[[str], Tensor], applied_steps: int
) -> None:
    """Set an engine's master weights and states to what `read` returns for the names of `whole_tensors`. A collective.

    The model must have been given the same weights before the engine was built around it. `applied_steps` becomes
    the optimizer's step of every parameter.
    """
    if applied_steps > 0:
        _create_states(engine, zero_stage, state_of, applied_steps)
    states = _states(engine, zero_stage, state_of) if applied_steps > 0 else {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if zero_stage > 0:
            _set_master(zero_stage, parameter, read(name))
        for state in states.get(parameter, ()):
            _set_state(engine, zero_stage, parameter, read(f"{state}/{name}"), state)


def base_optimizer(engine: Any, zero_stage: int) -> torch.optim.Optimizer:
    """Return the torch optimizer beneath DeepSpeed's."""
    optimizer: torch.optim.Optimizer = engine.optimizer.optimizer if zero_stage > 0 else engine.optimizer
    return optimizer


def _states(engine: Any, zero_stage: int, state_of: StateOf) -> dict[nn.Parameter, tuple[str, ...]]:
    """Return the names of the states of every trained parameter. ZeRO keeps the same of all, in flat pieces."""
    groups = base_optimizer(engine, zero_stage).param_groups
    if zero_stage == 0:
        return {parameter: state_of(group["name"]) for group in groups for parameter in group["params"]}
    names = state_of(groups[0]["name"])
    return {parameter: names for parameter in engine.module.parameters() if parameter.requires_grad}


def _state(engine: Any, zero_stage: int, parameter: nn.Parameter, state: str) -> Tensor:
    whole: Tensor
    if zero_stage == 0:
        whole = engine.optimizer.state[parameter][state]
    else:
        whole = safe_get_full_optimizer_state(parameter, state)
    return whole


def _create_states(engine: Any, zero_stage: int, state_of: StateOf, applied_steps: int) -> None:
    """Make the states that the optimizer itself would make in its first step, and tell DeepSpeed of them."""
    optimizer = base_optimizer(engine, zero_stage)
    groups = [(group["name"], group["params"]) for group in optimizer.param_groups]
    if zero_stage == 3:
        groups = [(groups[0][0], list(engine.optimizer.fp32_partitioned_groups_flat))]
    for group, tensors in groups:
        for tensor in tensors:
            optimizer.state[tensor] = {
                "step": torch.tensor(float(applied_steps)),
                **{state: torch.zeros_like(tensor) for state in state_of(group)},
            }
    _link_states(engine, zero_stage)


def _link_states(engine: Any, zero_stage: int) -> None:
    """Let ZeRO 1 and 2 find all groups' states: by itself it links them when only the first group has stepped."""
    if zero_stage in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _set_master(zero_stage: int, parameter: nn.Parameter, value: Tensor) -> None:
    if zero_stage == 3:  # the call for whole tensors fails where a parameter does not divide by the ranks
        safe_set_local_fp32_param(parameter, _partition(parameter, value))
    else:
        safe_set_full_fp32_param(parameter, value.to(parameter.device))


def _set_state(engine: Any, zero_stage: int, parameter: nn.Parameter, value: Tensor, state: str) -> None:
    if zero_stage == 0:
        engine.optimizer.state[parameter][state].copy_(value)
    elif zero_stage == 3:
        safe_set_local_optimizer_state(parameter, _partition(parameter, value), state)
    else:
        safe_set_full_optimizer_state(parameter, value.to(parameter.device), state)


def _partition(parameter: Any, value: Tensor) -> Tensor:
    """Return this rank's padded part of a ZeRO-3 parameter."""
    size = parameter.ds_tensor.numel()
    padded = value.new_zeros(size * distributed.world_size())
    padded[: value.numel()] = value.flatten()
    return padded[size * distributed.rank() :][:size]
