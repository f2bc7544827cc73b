"""What DeepSpeed's ZeRO holds of a model on a rank, takes in a step and sends, by formula."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from bigdssm.config import EngineConfig, OptimizerConfig
from bigdssm.training.optimizers import state_size

FP32 = 4
BUCKET = 500_000_000  # elements that DeepSpeed reduces at once


@dataclass(frozen=True)
class ModelSizes:
    """Numbers, not bytes: of all weights, of those trained, of the largest trained one, of the optimizer's states."""

    weights: int
    trained: int
    largest: int
    states: int

    @classmethod
    def of(cls, model: nn.Module, optimizer: OptimizerConfig) -> ModelSizes:
        """Return the sizes of a model; its tensors may have no memory."""
        trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
        weights = sum(parameter.numel() for parameter in model.parameters())
        return cls(weights, sum(trained), max(trained), state_size(model, optimizer))

    def share(self, world_size: int) -> int:
        """Return how many trained weights a rank updates from ZeRO 1 on."""
        return -(-self.trained // world_size)


def held_bytes(engine: EngineConfig, sizes: ModelSizes, world_size: int) -> dict[str, int]:
    """Return what weights and optimizer take on a rank all the time, by what for.

    ZeRO 1 to 3 keep a float32 copy of the weights that a rank updates, also beside float32 weights.
    """
    stage, share, weights = engine.zero_stage, sizes.share(world_size), _weight(engine) * sizes.weights
    if stage == 0:
        return {"weights": weights, "optimizer's states": FP32 * sizes.states}
    held = {
        "weights": weights if stage < 3 else -(-weights // world_size),
        "float32 copy of the weights": FP32 * share,
        "optimizer's states": FP32 * -(-sizes.states // world_size),
    }
    if engine.offload_optimizer:
        held["gradients on the host"] = FP32 * share
    if stage == 3:
        held["weights put together"] = weights
        held["this rank's gradients"] = _weight(engine) * share
    return held


def step_bytes(engine: EngineConfig, sizes: ModelSizes, world_size: int) -> int:
    """Return what the optimizer's step takes on a rank on top of that.

    ZeRO 1 and 2 reduce gradients in a bucket as large as they are, and cut their own out of it; AdamW works on whole
    flat groups.
    """
    if engine.zero_stage == 0:
        bucket = FP32 * min(BUCKET, sizes.trained) if world_size > 1 else 0
        return FP32 * sizes.trained + max(bucket, 2 * FP32 * sizes.largest)
    gradients = FP32 * sizes.trained if engine.zero_stage < 3 else 0
    return gradients + 4 * FP32 * sizes.share(world_size)


def sent_bytes(engine: EngineConfig, sizes: ModelSizes) -> dict[str, int]:
    """Return what is reduced and gathered in a step, by what for: an all-reduce counts twice."""
    sent = {"weights' gradients": (1 if engine.zero_stage == 3 else 2) * FP32 * sizes.trained}
    if engine.zero_stage in (1, 2):
        sent["updated weights"] = _weight(engine) * sizes.trained
    elif engine.zero_stage == 3:
        sent["weights, for forward and backward"] = 2 * _weight(engine) * sizes.weights
    return sent


def _weight(engine: EngineConfig) -> int:
    return 2 if engine.precision == "bf16_pure" else FP32
