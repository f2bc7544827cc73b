"""Every mode enabled by a config key gives the curve of ZeRO-1 in float32, on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from . import small_run
from .compared_runs import assert_same_weights, weights
from .spawn import Pool

STEPS = ("pretrain.steps=30", "pretrain.optimizer.warmup_steps=5")
FEW_STEPS = ("pretrain.steps=8", "pretrain.optimizer.warmup_steps=3")  # bfloat16 is emulated on many processors
DROPOUT = (
    "pretrain.steps=8",
    "model.query.history.dropout=0.1",
    "model.query.history.layers=2",
    "model.doc.dropout=0.1",
)
OFFLOAD, RECOMPUTE, CHUNKS = (
    "engine.offload_optimizer=true",
    "engine.checkpoint_activations=true",
    "engine.chunk_tokens=400",
)
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_dataset(tmp_path_factory.mktemp("modes"))


@pytest.fixture(scope="module")
def reference(config: Path, tmp_path_factory: pytest.TempPathFactory, pools: dict[int, Pool]) -> Path:
    run_dir = tmp_path_factory.mktemp("reference")
    pools[2].run(run_mode, config, run_dir, STEPS)
    return run_dir


@pytest.fixture(scope="module")
def short_reference(config: Path, tmp_path_factory: pytest.TempPathFactory, pools: dict[int, Pool]) -> Path:
    run_dir = tmp_path_factory.mktemp("short_reference")
    pools[2].run(run_mode, config, run_dir, FEW_STEPS)
    return run_dir


def run_mode(rank: int, world_size: int, config: Path, run_dir: Path, overrides: tuple[str, ...]) -> int:
    """Run and return the number of computations of BERT's attention."""
    from transformers.models.bert.modeling_bert import BertSelfAttention

    attend = BertSelfAttention.forward
    count = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return attend(*args, **kwargs)

    BertSelfAttention.forward = counted
    try:
        small_run.run(rank, world_size, config, run_dir, overrides)
    finally:
        BertSelfAttention.forward = attend
    return count


def relative_errors(run_dir: Path, reference: Path, key: str) -> list[float]:
    pairs = zip(small_run.records(run_dir), small_run.records(reference), strict=True)
    return [abs(mine[key] / theirs[key] - 1) for mine, theirs in pairs]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero_stage", "more"),
    [
        (0, (RECOMPUTE,)),
        (2, (OFFLOAD,)),
        pytest.param(3, (OFFLOAD, RECOMPUTE), marks=slow),
        pytest.param(0, (), marks=slow),
        pytest.param(1, (OFFLOAD, CHUNKS), marks=slow),
        pytest.param(2, (RECOMPUTE, CHUNKS), marks=slow),
        pytest.param(3, (), marks=slow),
        pytest.param(3, (OFFLOAD, RECOMPUTE, CHUNKS), marks=slow),
    ],
)
def test_the_same_curve_in_float32(
    config: Path, reference: Path, tmp_path: Path, pools: dict[int, Pool], zero_stage: int, more: tuple[str, ...]
) -> None:
    pools[2].run(run_mode, config, tmp_path, (*STEPS, f"engine.zero_stage={zero_stage}", *more))
    assert max(relative_errors(tmp_path, reference, "loss")) < 1e-5
    assert max(relative_errors(tmp_path, reference, "grad_norm")) < 1e-4
    assert_same_weights(tmp_path, reference)


@pytest.mark.parametrize(
    ("precision", "zero_stage", "more"),
    [
        ("bf16", 1, ()),
        ("bf16_pure", 2, ()),
        pytest.param("bf16", 0, (CHUNKS,), marks=slow),
        pytest.param("bf16", 2, (OFFLOAD, RECOMPUTE), marks=slow),
        pytest.param("bf16", 3, (RECOMPUTE, CHUNKS), marks=slow),
        pytest.param("bf16_pure", 1, (RECOMPUTE,), marks=slow),
        pytest.param("bf16_pure", 3, (OFFLOAD, RECOMPUTE), marks=slow),
    ],
)
def test_the_same_curve_in_bfloat16_to_two_percent(
    config: Path,
    short_reference: Path,
    tmp_path: Path,
    pools: dict[int, Pool],
    precision: str,
    zero_stage: int,
    more: tuple[str, ...],
) -> None:
    mode = (f"engine.precision={precision}", f"engine.zero_stage={zero_stage}")
    pools[2].run(run_mode, config, tmp_path, (*FEW_STEPS, *mode, *more))
    errors = relative_errors(tmp_path, short_reference, "loss")
    assert max(errors) < 2e-2
    assert max(errors) > 1e-5  # it is bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("mode", [("engine.zero_stage=1",), pytest.param(("engine.zero_stage=3", CHUNKS), marks=slow)])
def test_recomputed_activations_have_the_same_dropout(
    config: Path, tmp_path: Path, pools: dict[int, Pool], mode: tuple[str, ...]
) -> None:
    kept, again = tmp_path / "kept", tmp_path / "again"
    attended = pools[2].run(run_mode, config, kept, (*DROPOUT, *mode))
    attended_again = pools[2].run(run_mode, config, again, (*DROPOUT, *mode, RECOMPUTE))
    assert all(b >= a + 8 for a, b in zip(attended, attended_again, strict=True))  # once more in every backward
    first, second = weights(kept), weights(again)
    assert all(torch.equal(first[name], second[name]) for name in first)
