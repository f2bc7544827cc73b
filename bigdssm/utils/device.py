"""Devices: copies of tensors from the host, and the instructions of this machine."""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to `device`, through pinned memory, without blocking the host; others are returned."""
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


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
