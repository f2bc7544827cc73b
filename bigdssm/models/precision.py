"""The precision of the towers' products: bfloat16 where the hardware computes it, float32 where it would be emulated.

A product of 2048 × 512 × 512 on one core of an AMD EPYC with AVX2 only: 1,830 ms in bfloat16, 47 ms in float32.
"""

from __future__ import annotations

import socket
from dataclasses import replace
from timeit import repeat
from typing import Any, cast

import torch

from bigdssm import distributed
from bigdssm.config import EngineConfig
from bigdssm.utils import device as devices
from bigdssm.utils.log import get_logger

# Instruction sets on which towers were measured to train faster in bfloat16; `auto` computes in float32 on all others.
FASTER_IN_BF16 = {
    "sm_80": "Ampere and later GPUs",
    "amx": "2.6 times: MiniLM on a Xeon",
    "avx512_bf16": "1.7 times: a tower of histories on an AMD EPYC",
}

PRECISIONS = ("fp32", "bf16", "auto")
PRECISION_HELP = "precision of the products of towers; auto: the faster one on this machine (default: %(default)s)"

logger = get_logger(__name__)


def resolve_precision(requested: str, device: str = "cpu") -> str:
    """Return `requested`, or for `auto` the faster one of fp32 and bf16 on this machine's device type.

    Logs a measured warning if bfloat16 is requested and emulated.
    """
    instructions = devices.instruction_set(device)
    if requested == "auto":
        return "bf16" if instructions in FASTER_IN_BF16 else "fp32"
    if requested != "fp32" and instructions == "none" and device == "cpu":
        logger.warning(
            "precision %s: the processor of %s emulates bfloat16; a product takes %.0f times as long as in fp32; "
            "use precision auto or fp32", requested, socket.gethostname(), emulation_factor(),
        )  # fmt: skip
    return requested


def emulation_factor() -> float:
    """Measure the time of a bfloat16 product of 256 × 512 × 512 over that of a float32 one."""
    times = []
    for dtype in (torch.bfloat16, torch.float32):
        x, y = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        times.append(min(repeat(lambda x=x, y=y: x @ y, number=1, repeat=3)))  # type: ignore[misc]
    return times[0] / times[1]


def resolve_engine_precision(engine: EngineConfig, device: str, saved: dict[str, str] | None = None) -> EngineConfig:
    """Return `engine` with the precision that all ranks compute in. All ranks must call it.

    `auto` is bf16 if that is the faster one on every rank. A resumed run keeps the precision that it began with if the
    config still requests the same; `saved`: both, from its checkpoint.
    """
    requested = engine.precision
    choices = distributed.all_gather_object(resolve_precision(requested, device))
    computed = choices[0] if len(set(choices)) == 1 else "fp32"
    if saved is not None and saved["requested"] == requested and saved["computed"] != computed:
        logger.warning(
            "engine.precision=%s: computing in %s, in which this run began; on this machine it would be %s",
            requested, saved["computed"], computed,
        )  # fmt: skip
        computed = saved["computed"]
    elif requested == "auto":
        logger.info("engine.precision=auto: computing in %s", computed)
    return replace(engine, precision=cast(Any, computed))
