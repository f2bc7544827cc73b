"""Weights and optimizer states by parameter name, in float32, independent of ZeRO stage and world size.

An engine returns pieces, each rank those that it stores, and loads whole tensors, one at a time, possibly at another
ZeRO stage or world size.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from typing import Any, cast

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
from bigdssm.errors import ConfigError
from bigdssm.utils.hashing import hash64

StateOf = Callable[[str], tuple[str, ...]]
"""The names of the optimizer states of a parameter in a group, see `OptimizerConfig.state_of`."""


def local_pieces(engine: Any, zero_stage: int, state_of: StateOf) -> Iterator[TensorPiece]:
    """Yield this rank's float32 pieces of every trained weight NAME and every optimizer state STATE/NAME.

    They are the partitions that ZeRO assigns to the rank, and an even share of replicated tensors. No collective. The
    pieces are views of tensors in training. Before the first step there are no states.
    """
    has_states = any(len(state) for state in base_optimizer(engine, zero_stage).state.values())
    states = _states(engine, zero_stage, state_of) if has_states else {}
    if has_states:
        _link_states(engine, zero_stage)
    replicated: list[tuple[str, Tensor]] = []
    for name, parameter in trained_weights(engine.module):
        names, stored = states.get(parameter, ()), cast(Any, parameter)
        if zero_stage == 0:
            replicated.append((name, parameter))
            replicated += [(f"{state}/{name}", engine.optimizer.state[parameter][state]) for state in names]
        elif zero_stage == 3:  # this rank's partition, without padding, if any
            shape, size = tuple(stored.ds_shape), stored.ds_tensor.numel()
            first = size * distributed.rank()
            count = min(size, prod(shape) - first)
            if count > 0:
                yield TensorPiece(name, shape, first, safe_get_local_fp32_param(parameter).flatten()[:count])
                for state in names:
                    values = safe_get_local_optimizer_state(parameter, state)[:count]
                    yield TensorPiece(f"{state}/{name}", shape, first, values)
        elif (mapping := stored._hp_mapping) is not None:  # this rank's fragment, if any
            shape, first = tuple(parameter.shape), mapping.lp_fragment_address.start
            yield TensorPiece(name, shape, first, mapping.get_hp_fragment())
            for state in names:
                yield TensorPiece(f"{state}/{name}", shape, first, mapping.get_hp_fragment(state))
    for piece in even_share(replicated, distributed.rank(), distributed.world_size()):
        yield replace(piece, values=piece.values.float())


def trained_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the weights of a checkpoint; the others are those that the stage starts from."""
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


@torch.no_grad()
def set_weights(module: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Set the trained weights of a model without an engine, possibly partitioned, to `read(name)`.

    All ranks must call it.
    """
    for name, parameter in trained_weights(module):
        partition: Tensor | None = getattr(parameter, "ds_tensor", None)
        if partition is None:
            parameter.copy_(read(name))
        else:
            partition.copy_(_partition(parameter, read(name)))


def frozen_checksum(module: nn.Module) -> int:
    """Return a checksum of all weights that are not trained, the same at any ZeRO stage. All ranks must call it."""
    replicated, partitioned = 0, 0
    parameters: Iterator[tuple[str, Any]] = module.named_parameters()
    for name, parameter in parameters:
        if parameter.requires_grad:
            continue
        partition: Any = getattr(parameter, "ds_tensor", None)
        if partition is not None:  # its padding is not initialized
            size = partition.numel()
            first = size * distributed.rank()
            partition = partition.flatten()[: max(0, min(size, parameter.ds_numel - first))]
        values = parameter if partition is None else partition
        bits = values.detach().contiguous().view(torch.int16 if values.element_size() == 2 else torch.int32)
        number = int(bits.sum(dtype=torch.int64)) * (hash64(name) | 1)
        if partition is None:
            replicated += number
        else:
            partitioned += number
    return (replicated + sum(distributed.all_gather_object(partitioned))) % 2**63


def set_tensors(
    engine: Any, zero_stage: int, state_of: StateOf, read: Callable[[str], Tensor], applied_steps: int
) -> None:
    """Set master weights and optimizer states to the tensors that `read` returns by name.

    All ranks must call it. Names are those of `local_pieces`. The model's weights must have been set before the engine
    was built. `applied_steps` becomes the optimizer's step of every parameter.
    """
    states: dict[nn.Parameter, tuple[str, ...]] = {}
    if applied_steps > 0:
        # the states that the optimizer would create in its first step, linked in DeepSpeed
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
        states = _states(engine, zero_stage, state_of)
    for name, parameter in trained_weights(engine.module):
        if zero_stage == 3:  # safe_set_full_fp32_param fails if a parameter is not divisible by the world size
            safe_set_local_fp32_param(parameter, _partition(parameter, read(name)))
        elif zero_stage > 0:
            safe_set_full_fp32_param(parameter, read(name).to(parameter.device))
        for state in states.get(parameter, ()):
            value = read(f"{state}/{name}")
            if zero_stage == 0:
                engine.optimizer.state[parameter][state].copy_(value)
            elif zero_stage == 3:
                safe_set_local_optimizer_state(parameter, _partition(parameter, value), state)
            else:
                safe_set_full_optimizer_state(parameter, value.to(parameter.device), state)


def group_values(engine: Any, zero_stage: int) -> list[dict[str, Any]]:
    """Return the settings of the optimizer's groups that no schedule changes."""
    groups = base_optimizer(engine, zero_stage).param_groups
    return [{key: group[key] for key in group if key not in ("params", "lr")} for group in groups]


def check_states(engine: Any, zero_stage: int, state_of: StateOf, before: list[dict[str, Any]]) -> None:
    """Compare the optimizer's state after a step with the declared one.

    before: `group_values` before the step. Raises ConfigError: a checkpoint would lack a part of the state.
    """
    optimizer = base_optimizer(engine, zero_stage)
    name = f"optimizer {type(optimizer).__name__}"
    group_of = {tensor: group["name"] for group in optimizer.param_groups for tensor in group["params"]}
    for tensor, state in (dict(optimizer.state) or {torch.empty(0): {}}).items():
        got = {key: _form(value) for key, value in state.items() if key != "step"}
        group = group_of.get(tensor, before[0]["name"])  # at ZeRO 1 to 3 the states are the same for all groups
        declared = dict.fromkeys(state_of(group), _form(tensor))
        if got != declared:
            raise ConfigError(
                f"{name}: got the states {got} after a step, needs those of state_of, {declared}, since a "
                "checkpoint has these alone; return all names from state_of, of tensors of the parameter's shape"
            )
    after = group_values(engine, zero_stage)
    changed = {key for old, new in zip(before, after, strict=True) for key in new if new[key] != old.get(key)}
    if changed:
        raise ConfigError(
            f"{name}: got a step that changes {', '.join(sorted(changed))} of a parameter group, needs "
            "this state per parameter, since a checkpoint has no groups; move it to optimizer.state"
        )


def _form(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def base_optimizer(engine: Any, zero_stage: int) -> torch.optim.Optimizer:
    """Return the torch optimizer that DeepSpeed wraps."""
    optimizer: torch.optim.Optimizer = engine.optimizer.optimizer if zero_stage > 0 else engine.optimizer
    return optimizer


def _states(engine: Any, zero_stage: int, state_of: StateOf) -> dict[nn.Parameter, tuple[str, ...]]:
    """Return the state names of every trainable parameter; at ZeRO 1 to 3 they are the same for all."""
    groups = base_optimizer(engine, zero_stage).param_groups
    if zero_stage == 0:
        return {parameter: state_of(group["name"]) for group in groups for parameter in group["params"]}
    names = state_of(groups[0]["name"])
    return {parameter: names for parameter in engine.module.parameters() if parameter.requires_grad}


def _link_states(engine: Any, zero_stage: int) -> None:
    """Link the states of all groups at ZeRO 1 and 2: DeepSpeed links them when only the first group has stepped."""
    if zero_stage in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _partition(parameter: Any, value: Tensor) -> Tensor:
    """Return this rank's padded partition of a ZeRO-3 parameter."""
    size = parameter.ds_tensor.numel()
    padded = value.new_zeros(size * distributed.world_size())
    padded[: value.numel()] = value.flatten()
    return padded[size * distributed.rank() :][:size]
