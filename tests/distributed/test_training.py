"""Training as a whole, on 1, 2 and 3 ranks: one curve, exact resumes, steps that skip together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from . import small_run
from .spawn import Pool, RankFailed


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_dataset(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def reference(config: Path, tmp_path_factory: pytest.TempPathFactory, pools: dict[int, Pool]) -> Path:
    """One rank, ZeRO 1, float32, everything encoded at once."""
    run_dir = tmp_path_factory.mktemp("reference")
    pools[1].run(small_run.run, config, run_dir)
    return run_dir


def weights(run_dir: Path, stage: str = "pretrain") -> dict[str, torch.Tensor]:
    return load_file(run_dir / stage / "best" / "model.safetensors")


def assert_same_curve(run_dir: Path, reference: Path, tolerance: float = 1e-5) -> None:
    for mine, theirs in zip(small_run.records(run_dir), small_run.records(reference), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=tolerance), mine["step"]
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=10 * tolerance), mine["step"]


def assert_same_weights(run_dir: Path, reference: Path, tolerance: float = 1e-5) -> None:
    mine, theirs = weights(run_dir), weights(reference)
    assert mine.keys() == theirs.keys()
    for name in mine:
        if "attention.self.key.bias" in name:
            continue  # its true gradient is zero: Adam makes steps of its rounding noise
        if "key_value.bias" in name:  # the first half belongs to the keys
            half = mine[name].shape[0] // 2
            torch.testing.assert_close(mine[name][half:], theirs[name][half:], rtol=tolerance, atol=tolerance, msg=name)
            continue
        torch.testing.assert_close(mine[name], theirs[name], rtol=tolerance, atol=tolerance, msg=name)


def test_the_loss_falls(reference: Path) -> None:
    losses = [record["loss"] for record in small_run.records(reference)]
    assert len(losses) == 12
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_one_curve_at_any_world_size_and_zero_stage(
    config: Path, reference: Path, tmp_path: Path, pools: dict[int, Pool], world_size: int, zero_stage: int
) -> None:
    pools[world_size].run(small_run.run, config, tmp_path, (f"engine.zero_stage={zero_stage}",))
    assert_same_curve(tmp_path, reference)
    assert_same_weights(tmp_path, reference)


@pytest.mark.parametrize(("world_size", "zero_stage"), [(1, 1), (2, 0), (2, 1), (2, 2), (2, 3), (3, 1)])
def test_the_gradient_cache_changes_nothing(
    config: Path, reference: Path, tmp_path: Path, pools: dict[int, Pool], world_size: int, zero_stage: int
) -> None:
    pools[world_size].run(
        small_run.run, config, tmp_path, (f"engine.zero_stage={zero_stage}", "engine.chunk_tokens=100")
    )
    assert_same_curve(tmp_path, reference)
    assert_same_weights(tmp_path, reference)


def test_fine_tuning_starts_from_the_pretraining_on_two_ranks(
    config: Path, reference: Path, pools: dict[int, Pool]
) -> None:
    pools[2].run(small_run.run, config, reference, (), "sft")
    losses = [record["loss"] for record in small_run.records(reference, "sft")]
    assert len(losses) == 4
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_resumed_run_ends_with_the_same_bits(
    config: Path, tmp_path: Path, pools: dict[int, Pool], zero_stage: int
) -> None:
    dropout = (
        "model.query.history.dropout=0.1",
        "model.doc.dropout=0.1",
        "pretrain.save_every_steps=4",
        "debug.log_row_ids=true",
        f"engine.zero_stage={zero_stage}",
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pools[2].run(small_run.run, config, whole, dropout)
    for stop_at in (4, 8):
        with pytest.raises(RankFailed, match="stopped for the test"):
            pools[2].run(stop_after, config, cut, dropout, stop_at)
    pools[2].run(small_run.run, config, cut, dropout, "pretrain", True)
    first, second = weights(whole), weights(cut)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("row_ids-00000.jsonl", "row_ids-00001.jsonl"):
        assert (whole / "pretrain" / name).read_text() == (cut / "pretrain" / name).read_text()


def stop_after(rank: int, world_size: int, config: Path, run_dir: Path, overrides: tuple[str, ...], step: int) -> None:
    """Run, and fail on every rank two steps after the checkpoint of `step`."""
    from bigdssm.training import loop

    original = loop.train_step

    def failing(*args: object, **kwargs: object) -> object:
        if args[1].step == step + 2:  # type: ignore[attr-defined]
            raise RuntimeError("stopped for the test")
        return original(*args, **kwargs)  # type: ignore[arg-type]

    loop.train_step = failing  # type: ignore[assignment]
    try:
        small_run.run(rank, world_size, config, run_dir, overrides, resume=run_dir.exists())
    finally:
        loop.train_step = original
