"""Weights by name, whole or partitioned by ZeRO 3: those that are trained, and a checksum of the others."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bigdssm import distributed
from bigdssm.utils.hashing import hash64


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
            partition.copy_(partition_of(parameter, read(name)))


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


def partition_of(parameter: Any, value: Tensor) -> Tensor:
    """Return this rank's padded partition of a ZeRO-3 parameter."""
    size = parameter.ds_tensor.numel()
    padded = value.new_zeros(size * distributed.world_size())
    padded[: value.numel()] = value.flatten()
    return padded[size * distributed.rank() :][:size]
