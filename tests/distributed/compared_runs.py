"""Runs that are stopped and resumed, and comparisons of their curves, weights and checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from bigdssm.checkpoints.checkpoint import TensorPiece, open_tensors

from . import small_run

STREAMING = ("pretrain.sampling.frequency=streaming", "pretrain.sampling.frequency_buckets=512")
TABLES_LR_RATIO = 0.5


def assembled(pieces: list[TensorPiece]) -> dict[str, torch.Tensor]:
    """Assemble whole tensors from the pieces of all ranks, which must be complete and disjoint."""
    found: dict[str, list[torch.Tensor]] = {}
    for piece in sorted(pieces, key=lambda piece: (piece.name, piece.first)):
        parts = found.setdefault(piece.name, [])
        assert piece.first == sum(len(part) for part in parts), piece.name
        parts.append(piece.values)
    shapes = {piece.name: piece.shape for piece in pieces}
    return {name: torch.cat(parts).view(shapes[name]) for name, parts in found.items()}


def weights(run_dir: Path, stage: str = "pretrain") -> dict[str, torch.Tensor]:
    best = run_dir / stage / "best"
    return {name: tensor for file in best.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_curve(run_dir: Path, reference: Path, tolerance: float = 1e-5, stage: str = "pretrain") -> None:
    for mine, theirs in zip(small_run.records(run_dir, stage), small_run.records(reference, stage), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=tolerance), mine["step"]
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=10 * tolerance), mine["step"]


def assert_same_weights(run_dir: Path, reference: Path, tolerance: float = 1e-5) -> None:
    mine, theirs = weights(run_dir), weights(reference)
    assert mine.keys() == theirs.keys()
    for name in mine:
        if "attention.self.key.bias" in name:
            continue  # its true gradient is zero: Adam scales up rounding noise
        if "key_value.bias" in name:  # the first half belongs to the keys
            half = mine[name].shape[0] // 2
            torch.testing.assert_close(mine[name][half:], theirs[name][half:], rtol=tolerance, atol=tolerance, msg=name)
            continue
        torch.testing.assert_close(mine[name], theirs[name], rtol=tolerance, atol=tolerance, msg=name)


def common(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint other than weights and optimizer states."""
    read = open_tensors(run_dir / "pretrain" / "checkpoints" / f"step-{step:08d}")
    return {name.removeprefix("common/"): read(name) for name in read.names if name.startswith("common/")}


def assert_same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


class Stopped(Exception):
    """Raised on every rank, so that nothing is done at the end of the run."""


def stop_after(rank: int, world_size: int, config: Path, run_dir: Path, overrides: tuple[str, ...], step: int) -> None:
    """Run or resume, and stop on every rank two steps after the checkpoint of `step`."""
    from bigdssm.training import trainer

    original = trainer.train_step

    def failing(*args: object, **kwargs: object) -> object:
        if args[1].step == step + 2:  # type: ignore[attr-defined]
            raise Stopped
        return original(*args, **kwargs)  # type: ignore[arg-type]

    trainer.train_step = failing  # type: ignore[assignment]
    try:
        small_run.run(rank, world_size, config, run_dir, overrides, resume=run_dir.exists())
    except Stopped:
        return
    finally:
        trainer.train_step = original
    raise AssertionError(f"the run has no step {step + 2}")


def merged(checkpoint: Path) -> dict[str, torch.Tensor]:
    read = open_tensors(checkpoint)
    return {name: read(name) for name in read.names if not name.startswith("common/")}


def restored_share(
    rank: int, world_size: int, config: Path, run_dir: Path, overrides: tuple[str, ...]
) -> tuple[list[TensorPiece], set[tuple[str, float, float]]]:
    """Resume without a step; return this rank's pieces, and (group, Adam's step, decay) of its states."""
    from bigdssm.training.trainer import Trainer

    found = {}
    original = Trainer.train

    def look(stage: object) -> object:
        engine = stage.engine  # type: ignore[attr-defined]
        found["share"] = [piece.on_host(copy=True) for piece in engine.local_pieces()]
        optimizer = engine.base_optimizer
        names = [group["name"] for group in optimizer.param_groups]
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        steps = {float(state["step"]) for state in optimizer.state.values()}
        assert len(steps) == 1
        found["groups"] = {(name, steps.copy().pop(), decay) for name, decay in zip(names, decays, strict=True)}
        return stage.progress  # type: ignore[attr-defined]

    Trainer.train = look  # type: ignore[method-assign,assignment]
    try:
        small_run.run(rank, world_size, config, run_dir, overrides, resume=True)
    finally:
        Trainer.train = original  # type: ignore[method-assign]
    return found["share"], found["groups"]


def write_dataset_with_two_rates(folder: Path) -> Path:
    """Write the small dataset; its config has another learning rate for tables, to detect a group with a wrong rate."""
    path = small_run.write_dataset(folder)
    content = yaml.safe_load(path.read_text())
    content["pretrain"]["optimizer"]["embedding_lr_ratio"] = TABLES_LR_RATIO
    path.write_text(yaml.safe_dump(content))
    return path
