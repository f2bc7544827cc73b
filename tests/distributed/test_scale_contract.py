"""Training with the loss through DDP and a real DeepSpeed engine: the same weights at 1, 2 and 3 ranks."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigdssm import distributed
from bigdssm.losses import PairCE, fps_loss, ranking_loss

from .spawn import Pool

ROWS, D, STEPS = 24, 6, 5
LR = 0.5
# 0.05 clips every step and exposes wrong ratios between gradients; 0 never clips and exposes a wrong scale.
CLIPS = (0.05, 0.0)


class Towers(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.query, self.doc = (nn.Linear(8, D, dtype=torch.float64) for _ in range(2))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        self.log_alpha = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        # beta per document: a constant bias has zero gradient under a softmax and would test nothing
        self.bias = nn.Linear(8, 1, bias=False, dtype=torch.float64)
        self.bias.weight.data = torch.ones(1, 8, dtype=torch.float64) * 0.1
        self.to(dtype)

    def forward(self, q: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        return self.query(q), self.doc(d), self.log_alpha.exp(), self.bias(d)[:, 0]


def batch(step: int, rank: int, world_size: int) -> dict[str, Tensor]:
    """Return this rank's uneven share of a step's rows."""
    generator = torch.Generator().manual_seed(100 + step)
    table = torch.randn(12, 8, generator=generator, dtype=torch.float64)
    doc_ids = torch.randint(12, (ROWS,), generator=generator)
    whole = {
        "q": torch.randn(ROWS, 8, generator=generator, dtype=torch.float64),
        "d": table[doc_ids],
        "doc_ids": doc_ids,
        "query_ids": torch.randint(15, (ROWS,), generator=generator),
        "weight": torch.rand(ROWS, generator=generator, dtype=torch.float64).sub(0.2).clamp(min=0),
    }
    edges = {1: [0, ROWS], 2: [0, 5, ROWS], 3: [0, 5, 11, ROWS]}[world_size]
    return {name: value[edges[rank] : edges[rank + 1]] for name, value in whole.items()}


def compute_loss(loss: str, outputs: tuple[Tensor, ...], rows: dict[str, Tensor]) -> Tensor:
    U, W, alpha, beta = outputs
    shared: dict[str, Any] = {name: rows[name] for name in ("weight", "query_ids", "doc_ids")}
    if loss == "fps":
        return fps_loss(U, W, alpha=alpha, beta=beta, direction="both", **shared).loss
    return ranking_loss(PairCE(), U, W, alpha=alpha, beta=beta, in_batch=True, **shared).loss


def train_plain(rank: int, world_size: int, loss: str, clip: float) -> list[Tensor]:
    """Train with torch: one process, or DDP."""
    model: nn.Module = Towers(torch.float64)
    parameters = list(model.parameters())
    if world_size > 1:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parameters, LR)
    for step in range(STEPS):
        rows = batch(step, rank, world_size)
        optimizer.zero_grad()
        compute_loss(loss, model(rows["q"], rows["d"]), rows).backward()
        if clip:
            assert float(nn.utils.clip_grad_norm_(parameters, clip)) > clip
        optimizer.step()
    return [p.detach().clone() for p in parameters]


def train_deepspeed(rank: int, world_size: int, loss: str, stage: int, clip: float) -> list[Tensor]:
    """Train with a DeepSpeed engine, in float32."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", DS_ACCELERATOR="cpu")
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    model = Towers(torch.float32)  # DeepSpeed reduces no float64
    names = [name for name, _ in model.named_parameters()]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    if distributed.world_size() > 1:
        deepspeed.init_distributed("gloo")
    optimizer = torch.optim.SGD(model.parameters(), LR)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(STEPS):
        rows = batch(step, rank, world_size)
        outputs = engine(rows["q"].float(), rows["d"].float())
        engine.backward(compute_loss(loss, outputs, rows))
        engine.step()
    parameters = [engine.module.get_parameter(name) for name in names]
    with deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
        return [parameter.detach().clone() for parameter in parameters]


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize(("world_size", "loss"), [(2, "fps"), (3, "fps"), (3, "pair_ce")])
def test_ddp(pools: dict[int, Pool], world_size: int, loss: str, clip: float) -> None:
    expected = train_plain(0, 1, loss, clip)
    for weights in pools[world_size].run(train_plain, loss, clip):
        assert_same(weights, expected, 1e-10)


# every stage on two ranks, and each other case at one stage; the rest with --full
QUICK = {*((2, "fps", stage) for stage in range(4)), (1, "fps", 1), (3, "fps", 2), (2, "pair_ce", 3)}
ENGINES = [
    pytest.param(*case, stage, marks=() if (*case, stage) in QUICK else pytest.mark.slow)
    for case in ((1, "fps"), (2, "fps"), (2, "pair_ce"), (3, "fps"))
    for stage in range(4)
]


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "loss", "stage"), ENGINES)
def test_deepspeed(pools: dict[int, Pool], world_size: int, loss: str, stage: int) -> None:
    for clip in CLIPS:
        expected = train_plain(0, 1, loss, clip)
        for weights in pools[world_size].run(train_deepspeed, loss, stage, clip):
            assert_same([w.double() for w in weights], expected, 1e-5)
