"""Weights and optimizer state by parameter name, in float32, whatever ZeRO stage and world size hold them.

What one engine gives, any other takes: another stage, another number of ranks. An engine gives pieces, each rank those
that it has; it takes whole tensors, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from bigdssm import distributed
from bigdssm.checkpoints.shares import TensorPiece, even_share

StateOf = Callable[[str], tuple[str, ...]]
"""The names of the tensors that the optimizer keeps of a parameter in a group, see `OptimizerConfig.state_of`."""


def own_pieces(engine: Any, zero_stage: int, state_of: StateOf) -> Iterator[TensorPiece]:
    """Yield this rank's float32 pieces of every weight, and (state's name + "/" + name) of every optimizer's state.

    They are what ZeRO gives the rank, and an even share of what every rank has. No collective; the pieces are parts
    of what is trained. Before the first step there are no states.
    """
    has_states = any(len(state) for state in base_optimizer(engine, zero_stage).state.values())
    states = _states(engine, zero_stage, state_of) if has_states else {}
    if has_states:
        _link_states(engine, zero_stage)
    replicated: list[tuple[str, Tensor]] = []
    for name, parameter in engine.module.named_parameters():
        if zero_stage == 3:
            yield from _partitions(name, parameter, states.get(parameter, ()))
        elif zero_stage > 0 and parameter.requires_grad:
            yield from _fragments(name, parameter, states.get(parameter, ()))
        else:
            replicated.append((name, parameter))
            replicated += [(f"{s}/{name}", engine.optimizer.state[parameter][s]) for s in states.get(parameter, ())]
    for piece in even_share(replicated, distributed.rank(), distributed.world_size()):
        yield replace(piece, values=piece.values.float())


def _fragments(name: str, parameter: Any, states: tuple[str, ...]) -> Iterator[TensorPiece]:
    """Yield what ZeRO 1 and 2 give this rank of a parameter, if anything."""
    mapping, shape = parameter._hp_mapping, tuple(parameter.shape)
    if mapping is None:
        return
    first = mapping.lp_fragment_address.start
    yield TensorPiece(name, shape, first, mapping.get_hp_fragment())
    for state in states:
        yield TensorPiece(f"{state}/{name}", shape, first, mapping.get_hp_fragment(state))


def _partitions(name: str, parameter: Any, states: tuple[str, ...]) -> Iterator[TensorPiece]:
    """Yield what ZeRO 3 gives this rank of a parameter, without what it is padded with, if anything is left."""
    shape, size = tuple(parameter.ds_shape), parameter.ds_tensor.numel()
    first = size * distributed.rank()
    count = min(size, prod(shape) - first)
    if count <= 0:
        return
    values = safe_get_local_fp32_param(parameter) if parameter.requires_grad else parameter.ds_tensor.float()
    yield TensorPiece(name, shape, first, values.flatten()[:count])
    for state in states:
        yield TensorPiece(f"{state}/{name}", shape, first, safe_get_local_optimizer_state(parameter, state)[:count])


def set_tensors(
    engine: Any, zero_stage: int, state_of: StateOf, read: Callable[[str], Tensor], applied_steps: int
) -> None:
    """Set an engine's master weights and states to what `read` returns for the names of `own_pieces`. A collective.

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
