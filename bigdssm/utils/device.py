"""Devices: copies of tensors from the host, instructions of this machine, states of random generators."""

import os
import platform
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from bigdssm.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")


def find_device(name: str) -> torch.device:
    """Return the device of a name: `cpu`, `cuda`, `cuda:INDEX`, or `auto`, the GPU if there is one.

    A rank of a launcher has the only visible GPU, or that of its LOCAL_RANK. DS_ACCELERATOR=cpu makes `auto` the CPU.
    Raises ConfigError: no such device.
    """
    kind, _, index = name.partition(":")
    is_name = name in ("auto", "cpu") or (kind == "cuda" and (name == kind or (index.isascii() and index.isdecimal())))
    if not is_name:
        raise ConfigError(f"--device {name}: needs auto, cpu, cuda or cuda:INDEX")
    number = num_gpus()
    if name == "cpu" or (name == "auto" and (not number or os.environ.get("DS_ACCELERATOR") == "cpu")):
        return torch.device("cpu")
    if not index:
        index = "0" if number == 1 else os.environ.get("LOCAL_RANK", "0")
    if int(index) >= number:
        raise ConfigError(f"--device {name}: this process needs GPU {index}, and sees {number}; choose another one")
    return torch.device("cuda", int(index))


def num_gpus() -> int:
    """Return the number of GPUs that this process sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's weights."""
    return next(model.parameters()).device


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to `device`, through pinned memory, without blocking the host; others are returned."""
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def on_current_device(function: Callable[P, T]) -> Callable[P, T]:
    """Return `function` for another thread: there, too, this thread's device is then the current one.

    A thread starts with device 0, where its first operation would allocate memory.
    """
    if not torch.cuda.is_available():
        return function
    index = torch.cuda.current_device()

    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        torch.cuda.set_device(index)
        return function(*args, **kwargs)

    return run


def instruction_set(device: str = "cpu") -> str:
    """Return the best bfloat16 instructions of a device type: `sm_80`, `amx`, `avx512_bf16`, `arm_bf16` or `none`."""
    if device == "cuda":
        return "sm_80" if torch.cuda.get_device_capability() >= (8, 0) else "none"
    cpu: Any = torch.cpu
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # also where ONEDNN_MAX_CPU_ISA excludes the instructions
        return "none"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "arm_bf16"
    if cpu._is_amx_tile_supported():
        return "amx"
    # mkldnn's test is also true of AVX-512 without bfloat16 instructions.
    return "avx512_bf16" if cpu._is_avx512_bf16_supported() else "none"


@dataclass(frozen=True)
class RandomState:
    """The state of torch's random generators of the CPU and of this rank's device, and of Python's and NumPy's."""

    cpu: Tensor
    device: Tensor | None
    python: Any = None  # None: not restored
    numpy: Any = None

    @classmethod
    def now(cls) -> "RandomState":
        """Return the current state."""
        device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return cls(torch.get_rng_state(), device, random.getstate(), np.random.get_state())

    def restore(self) -> None:
        """Set the generators to this state."""
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device)
        if self.python is not None:
            random.setstate(self.python)
            np.random.set_state(self.numpy)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """A context that starts from this state and restores the current one at exit."""
        present = RandomState.now()
        self.restore()
        yield
        present.restore()
