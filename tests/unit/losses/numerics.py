"""Matrix products and directions for tests of the numerics of the losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DOUBLE = torch.float64


def unit(rows: int, D: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, D, generator=generator, dtype=DOUBLE), dim=1)


class NarrowProducts(TorchFunctionMode):
    """Emulates float32 products of a CPU with bfloat16 units, if the loss enables them: operands are rounded."""

    narrowed = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        allowed = torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        if allowed and function in (torch.addmm, Tensor.addmm_) and args[1].dtype == torch.float32:
            self.narrowed += 1
            args = (args[0], *(operand.bfloat16().float() for operand in args[1:3]), *args[3:])
        return function(*args, **(kwargs or {}))
