"""The precision of the towers' products: bfloat16 where the hardware computes it, float32 where it would be emulated.

A product of 2048 × 512 × 512 on one core of an AMD EPYC with AVX2 only: 1,830 ms in bfloat16, 47 ms in float32.
"""

import socket
from dataclasses import replace
from timeit import repeat
from typing import Any, cast

import torch
from torch import nn

from bigdssm import distributed
from bigdssm.config import EngineConfig
from bigdssm.models.encoders.text import TextEncoder
from bigdssm.utils import device as devices
from bigdssm.utils.log import get_logger

# The widths from which models were measured to train faster in bfloat16, by instruction set: of the products of texts,
# and of all; `auto` computes in float32 if neither is reached, and on other instruction sets.
FASTER_FROM_WIDTH = {
    "sm_80": (0, 0),  # Ampere and later GPUs
    "amx": (0, 0),  # 2.6 times: MiniLM on a Xeon
    # CPU time of a step on an AMD EPYC, fp32 : bf16: texts 1.6 at width 128; histories 0.7 at 64, 1.0 at 128
    "avx512_bf16": (64, 256),
}

PRECISIONS = ("fp32", "bf16", "auto")
PRECISION_HELP = "precision of the products of towers; auto: the faster one on this machine (default: %(default)s)"

logger = get_logger(__name__)


def product_width(model: nn.Module) -> int:
    """Return the width of the widest matrix product: of all weight matrices, the largest smaller side; 0 without."""
    tables = (nn.Embedding, nn.EmbeddingBag)
    layers = (part for part in model.modules() if not isinstance(part, tables))
    weights = (weight for layer in layers for weight in layer.parameters(recurse=False))
    shapes = [getattr(weight, "ds_shape", weight.shape) for weight in weights]  # ZeRO-3: of the whole weight
    return max((min(shape) for shape in shapes if len(shape) == 2), default=0)


def is_faster_in_bf16(model: nn.Module, instructions: str) -> bool:
    """Return whether `model` was measured to train faster in bfloat16 with these instructions."""
    if instructions not in FASTER_FROM_WIDTH:
        return False
    of_texts, of_all = FASTER_FROM_WIDTH[instructions]
    texts = (part for part in model.modules() if isinstance(part, TextEncoder))
    return product_width(model) >= of_all or any(product_width(text) >= of_texts for text in texts)


def resolve_precision(requested: str, model: nn.Module, device: str = "cpu") -> str:
    """Return `requested`, or for `auto` the faster one of fp32 and bf16 for `model` on this machine's device type.

    Logs a measured warning if bfloat16 is requested and emulated.
    """
    instructions = devices.instruction_set(device)
    if requested == "auto":
        return "bf16" if is_faster_in_bf16(model, instructions) else "fp32"
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


def resolve_engine_precision(
    engine: EngineConfig, model: nn.Module, device: str, saved: dict[str, str] | None = None
) -> EngineConfig:
    """Return `engine` with the precision that all ranks compute `model` in. All ranks must call it.

    `auto` is bf16 if that is the faster one on every rank. A resumed run keeps the precision that it began with if the
    config still requests the same; `saved`: both, from its checkpoint.
    """
    requested = engine.precision
    choices = distributed.all_gather_object(resolve_precision(requested, model, device))
    computed = choices[0] if len(set(choices)) == 1 else "fp32"
    if saved is not None and saved["requested"] == requested and saved["computed"] != computed:
        logger.warning(
            "engine.precision=%s: computing in %s, in which this run began; on this machine it would be %s",
            requested, saved["computed"], computed,
        )  # fmt: skip
        computed = saved["computed"]
    elif requested == "auto":
        instructions, width = devices.instruction_set(device), product_width(model)
        logger.info(
            "engine.precision=auto: computing in %s (%s, products up to %d wide)", computed, instructions, width
        )
    return replace(engine, precision=cast(Any, computed))
