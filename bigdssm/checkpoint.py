"""Checkpoints that are whole or not there: written aside, checksummed, renamed, verified before they are believed.

checkpoints/
  step-00000100/
    manifest.json       written last: step, world size, state, and size and checksum of every file
    deepspeed/          what the engine wrote
    rank-00000.pt       this rank's random state
  latest                the name of the newest one; moved after the rename, and never needed to find it
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from bigdssm import distributed
from bigdssm.errors import BigDSSMError, CheckpointError
from bigdssm.log import get_logger

logger = get_logger(__name__)

MANIFEST, LATEST, ENGINE_TAG = "manifest.json", "latest", "deepspeed"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    path: Path
    step: int
    world_size: int
    state: dict[str, Any]  # what is the same on every rank

    def rank_state(self, rank: int) -> dict[str, Tensor]:
        """Return what rank `rank` saved for itself."""
        state: dict[str, Tensor] = torch.load(self.path / _rank_file(rank), weights_only=True)
        return state


class CheckpointStore:
    """The checkpoints of one stage, at most `keep` of them. Its methods are collectives."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    def save(
        self, step: int, state: dict[str, Any], rank_state: dict[str, Tensor], write_engine: Callable[[Path], None]
    ) -> Path:
        """Write the checkpoint of `step` and drop the oldest; `write_engine(folder)` writes `folder`/deepspeed.

        Raises CheckpointError on every rank where any rank cannot write; earlier checkpoints are untouched.
        """
        path = self.folder / _name(step)
        aside = self.folder / f".{_name(step)}.unfinished"
        self._together(lambda: self._prepare(aside), "prepare")
        self._together(lambda: write_engine(aside), "write")
        self._together(lambda: torch.save(rank_state, aside / _rank_file(distributed.rank())), "write")
        self._together(lambda: self._publish(aside, path, step, state), "publish")
        return path

    def newest_good(self) -> Checkpoint | None:
        """Return the newest checkpoint that is as its manifest says, or None; damage is named in the log."""
        found = None
        if distributed.is_main():
            for path in sorted(self.folder.glob("step-*"), reverse=True):
                try:
                    found = verify(path)
                    break
                except CheckpointError as error:
                    logger.warning("%s; trying the one before", error)
        return distributed.broadcast_object(found)

    def _prepare(self, aside: Path) -> None:
        if distributed.is_main():
            for stale in self.folder.glob(".*.unfinished"):
                shutil.rmtree(stale)
            aside.mkdir(parents=True)

    def _publish(self, aside: Path, path: Path, step: int, state: dict[str, Any]) -> None:
        if not distributed.is_main():
            return
        files = {
            file.relative_to(aside).as_posix(): {"bytes": file.stat().st_size, "xxh3_128": _checksum(file)}
            for file in sorted(aside.rglob("*"))
            if file.is_file()
        }
        manifest = {"step": step, "world_size": distributed.world_size(), "state": state, "files": files}
        _write_synced(aside / MANIFEST, json.dumps(manifest, indent=1))
        shutil.rmtree(path, ignore_errors=True)
        os.replace(aside, path)
        _write_synced(self.folder / f".{LATEST}", path.name)
        os.replace(self.folder / f".{LATEST}", self.folder / LATEST)
        for old in sorted(self.folder.glob("step-*"))[: -self._keep]:
            shutil.rmtree(old)

    def _together(self, action: Callable[[], None], verb: str) -> None:
        error: BigDSSMError | None = None
        try:
            action()
        except (OSError, RuntimeError) as problem:
            reason = " ".join(str(problem).split())
            error = CheckpointError(
                f"could not {verb} a checkpoint in {self.folder}: {reason}; the last good one stays"
            )
        distributed.raise_together(error)


def verify(path: Path) -> Checkpoint:
    """Return the checkpoint at `path`. Raises CheckpointError naming the first file that is not as it was written."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, dict[str, Any]] = manifest["files"]
        checkpoint = Checkpoint(path, manifest["step"], manifest["world_size"], manifest["state"])
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} has no {MANIFEST}: it was never finished") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged: {error!r}") from None
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint file {file} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"checkpoint file {file} has {file.stat().st_size} bytes, was {expected['bytes']}")
        if _checksum(file) != expected["xxh3_128"]:
            raise CheckpointError(f"checkpoint file {file} is damaged: its checksum is not the manifest's")
    return checkpoint


def consolidated_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the whole float32 weights in the checkpoint folder `path`, from any ZeRO stage and world size.

    Verified first, since DeepSpeed's files are pickles. Raises CheckpointError.
    """
    checkpoint = verify(path)
    if checkpoint.state["zero_stage"] == 0:
        file = checkpoint.path / ENGINE_TAG / "mp_rank_00_model_states.pt"
        module: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=False)["module"]
        return {name: tensor.float() for name, tensor in module.items()}
    state: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.path), tag=ENGINE_TAG)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def find(stage_dir: Path, which: str) -> Path:
    """Return the checkpoint folder `which` (`latest` or a `step-…` name) of a stage. Raises CheckpointError."""
    folder = stage_dir / "checkpoints"
    names = sorted(path.name for path in folder.glob("step-*"))
    name = names[-1] if which == LATEST and names else which
    if name not in names:
        raise CheckpointError(f"{folder} has no checkpoint {which!r}; it has {names or 'none'}")
    return folder / name


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
