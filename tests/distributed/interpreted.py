"""Losses by Triton kernels on CPU tensors, for ranks started with TRITON_INTERPRET=1.

The interpreter has two bugs with bfloat16, fixed here: it multiplies the bits as integers, and rounds down.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bigdssm.losses import fps_loss
from bigdssm.losses.kernels import triton_passes

ENVIRONMENT = {"TRITON_INTERPRET": "1"}
MULTIPROCESSORS = 6  # so that some sums are split among programs and others are not
PAIRS_AT_ONCE = 64  # so that masks are packed in chunks
ROW_BLOCKS_AT_ONCE = 2  # so that sums of columns are merged


def by_kernels(loss: Callable[..., Any], *tensors: Any, **arguments: Any) -> Any:
    """Compute a loss with the kernels on any device."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        _mend()
    launched, pass_of = [], triton_passes.FusedMatrix.of
    with (
        mock.patch.object(triton_passes, "available", lambda x: x.U.dtype != torch.float64),
        mock.patch.object(triton_passes, "_multiprocessors", lambda device: MULTIPROCESSORS),
        mock.patch.object(triton_passes, "_PAIRS_AT_ONCE", PAIRS_AT_ONCE),
        mock.patch.object(triton_passes, "_ROW_BLOCKS_AT_ONCE", ROW_BLOCKS_AT_ONCE),
        mock.patch.object(triton_passes.FusedMatrix, "of", lambda *given: launched.append(1) or pass_of(*given)),
    ):
        found = loss(*tensors, **arguments)
    assert launched, "the plain path has been taken"
    return found


def fused_fps(*tensors: Any, **arguments: Any) -> Any:
    return by_kernels(fps_loss, *tensors, **arguments)


def fused_fps_of_packed(U: Tensor, W: Tensor, *tensors: Any, **arguments: Any) -> Any:
    """Pass a W whose rows are not adjacent."""
    return fused_fps(U, torch.cat([W, torch.full_like(W[:, :8], torch.nan)], 1)[:, : W.shape[1]], *tensors, **arguments)


def fused_on_rank_0(*tensors: Any, **arguments: Any) -> Any:
    return (fused_fps if os.environ["RANK"] == "0" else fps_loss)(*tensors, **arguments)


@cache
def _mend() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def mended_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    def mended_cast(self: Any, x: Any, to: Any) -> Any:
        if x.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return cast(self, x, to)
        rounded = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16()
        return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = mended_dot, mended_cast
