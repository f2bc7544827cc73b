"""A moving average of the weights, which validation measures and best/ keeps; training goes on with the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_PREFIX = "average."


class WeightAverage:
    """The exponential moving average of a module's weights, in float32; every rank has all of it.

    The decay grows from 0.1 to the one that is asked for, so that new weights are soon forgotten. Source: Polyak and
    Juditsky 1992; Tarvainen and Valpola 2017 for the exponential one.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module, self._decay, self.num_updates = module, decay, 0
        self._average = {name: weight.detach().float().clone() for name, weight in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights in."""
        decay = min(self._decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        for name, weight in self._module.named_parameters():
            self._average[name].lerp_(weight.float(), 1 - decay)

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """Within it, the module has the average for its weights."""
        weights = {name: weight.detach().clone() for name, weight in self._module.named_parameters()}
        try:
            for name, weight in self._module.named_parameters():
                weight.copy_(self._average[name])
            yield
        finally:
            for name, weight in self._module.named_parameters():
                weight.copy_(weights[name])

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps; the same on every rank."""
        average = {_PREFIX + name: tensor.cpu() for name, tensor in self._average.items()}
        return {_PREFIX + "updates": torch.tensor([self.num_updates]), **average}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint's state. Where the module has grown since, the average begins anew."""
        saved = {name: state[_PREFIX + name] for name in self._average}
        if all(saved[name].shape == tensor.shape for name, tensor in self._average.items()):
            for name, tensor in self._average.items():
                tensor.copy_(saved[name])
            self.num_updates = int(state[_PREFIX + "updates"])
