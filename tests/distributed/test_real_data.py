"""Thirty steps on real rows: one curve and the same weights at 1, 2 and 3 ranks, and in every mode of the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from . import real_data, small_run
from .compared_runs import assert_same_curve, assert_same_weights
from .spawn import Pool

pytestmark = pytest.mark.slow
STEPS = 30
SETS: dict[str, Callable[[Path], Path]] = {
    "debian_packages": real_data.debian_packages,
    "movielens_100k": real_data.movielens_100k,
    "ml_latest_small": real_data.ml_latest_small,
}
CHUNKS = "engine.chunk_tokens=600"


@dataclass
class Real:
    """A dataset's config, and a run on one rank at ZeRO 1 in float32."""

    name: str
    config: Path
    reference: Path


@pytest.fixture(scope="module", params=list(SETS))
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pools: dict[int, Pool]) -> Real:
    config = SETS[request.param](tmp_path_factory.mktemp(request.param))
    found = Real(request.param, config, config.parent / "reference")
    pools[1].run(small_run.run, config, found.reference, timeout_s=300)
    losses = [record["loss"] for record in small_run.records(found.reference)]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.1
    distinct = [record["distinct_fraction"] for record in small_run.records(found.reference)]
    assert (min(distinct) < 0.95) == (request.param != "debian_packages")  # documents repeat there
    return found


@pytest.mark.parametrize(
    ("world_size", "mode"),
    [
        (3, ("engine.zero_stage=1", CHUNKS)),
        (2, ("engine.zero_stage=0", CHUNKS)),
        (1, ("engine.zero_stage=2", "engine.offload_optimizer=true", CHUNKS)),
        (3, ("engine.zero_stage=3", "engine.checkpoint_activations=true")),
    ],
)
def test_one_curve_at_any_world_size(
    real: Real, tmp_path: Path, pools: dict[int, Pool], world_size: int, mode: tuple[str, ...]
) -> None:
    if real.name != "debian_packages" and "engine.zero_stage=1" not in mode:
        pytest.skip("the engine's modes are compared on one set")
    pools[world_size].run(small_run.run, real.config, tmp_path, mode, timeout_s=300)
    assert_same_curve(tmp_path, real.reference)
    assert_same_weights(tmp_path, real.reference)


@pytest.mark.parametrize(
    "mode",
    [
        ("engine.precision=bf16", "engine.zero_stage=1", CHUNKS),
        ("engine.precision=bf16_pure", "engine.zero_stage=3", "engine.checkpoint_activations=true"),
    ],
)
def test_one_curve_in_bfloat16(real: Real, tmp_path: Path, pools: dict[int, Pool], mode: tuple[str, ...]) -> None:
    if real.name != "debian_packages":
        pytest.skip("the engine's modes are compared on one set")
    few, reference = ("pretrain.steps=10",), tmp_path / "reference"  # bfloat16 is emulated on many processors
    pools[1].run(small_run.run, real.config, reference, few)
    pools[2].run(small_run.run, real.config, tmp_path / "run", (*few, *mode), timeout_s=300)
    pairs = zip(small_run.records(tmp_path / "run"), small_run.records(reference), strict=True)
    errors = [abs(mine["loss"] / theirs["loss"] - 1) for mine, theirs in pairs]
    assert 1e-6 < max(errors) < 2e-2
