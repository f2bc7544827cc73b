"""Whether products are computed in bfloat16, which a processor without instructions for it emulates.

A product of 2048 × 512 × 512 on one core of an AMD EPYC with AVX2 alone: 1,830 ms in bfloat16, 47 ms in float32.
"""

from __future__ import annotations

import platform
import socket
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch

from bigdssm import distributed
from bigdssm.utils.log import get_logger

if TYPE_CHECKING:  # the losses need torch and NumPy alone
    from bigdssm.config import EngineConfig

MISSING = "has no bfloat16 instructions (AVX512-BF16, AMX)"

logger = get_logger(__name__)


def has_bf16() -> bool:
    """Return whether this processor multiplies bfloat16 by instructions of its own."""
    cpu: Any = torch.cpu
    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # on x86 true of AVX-512 without them, too


def takes_bf16(device: str = "cpu") -> bool:
    """Return whether a device multiplies in bfloat16, as requested; where not, log one line."""
    if device != "cpu" or has_bf16():
        return True
    logger.warning("bf16: computing in fp32, since the processor of %s %s", socket.gethostname(), MISSING)
    return False


def settle_precision(engine: EngineConfig, device: str, saved: dict[str, str] | None = None) -> EngineConfig:
    """Return `engine` with the precision that every rank computes in. A collective.

    On processors it is fp32 where any rank's has no bfloat16 instructions. A resumed run keeps the precision it began
    with: `saved` is what its checkpoint has of `saved_precision`, and counts while the config requests the same.
    """
    requested = engine.precision
    if requested == "fp32" or device != "cpu":
        return engine
    hosts = distributed.all_gather_object(None if has_bf16() else socket.gethostname())
    without = next((host for host in hosts if host is not None), None)
    began = saved["computed"] if saved is not None and saved["requested"] == requested else None
    precision = began or ("fp32" if without else requested)
    what = f"engine.precision={requested}: computing in {precision}"
    if began is None and without:
        logger.warning("%s, since the processor of %s %s", what, without, MISSING)
    elif began == "fp32":
        logger.warning("%s, as this run began on a processor without bfloat16 instructions", what)
    elif without:
        logger.warning(
            "%s, as this run began, although the processor of %s %s, which takes 20 to 60 times as long; "
            "engine.precision=fp32 goes on in fp32", what, without, MISSING,
        )  # fmt: skip
    return replace(engine, precision=cast(Any, precision))


def saved_precision(requested: EngineConfig, settled: EngineConfig) -> dict[str, str]:
    """Return what a checkpoint keeps for `settle_precision`."""
    return {"requested": requested.precision, "computed": settled.precision}
