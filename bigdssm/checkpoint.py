"""Checkpoints that are whole or not there: written aside, checksummed, renamed, verified before they are believed.

checkpoints/
  step-00000100/
    manifest.json       written last: step, world size, state, and size and checksum of every file
    tensors-00000.safetensors   one rank's share of the weights and moments
    rank-00000.safetensors      one rank's random state
    common.safetensors          further tensors that are the same on every rank, where there are any
  damaged-step-00000200/  what a resumed run found damaged: it is kept for people, and never counted or read again
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

import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bigdssm import distributed
from bigdssm.errors import BigDSSMError, CheckpointError
from bigdssm.log import get_logger

logger = get_logger(__name__)

CHECKPOINTS = "checkpoints"  # of a stage's folder
MANIFEST, LATEST, COMMON = "manifest.json", "latest", "common.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    path: Path
    step: int
    world_size: int
    state: dict[str, Any]  # what is the same on every rank

    def rank_state(self, rank: int) -> dict[str, Tensor]:
        """Return what rank `rank` saved for itself."""
        return load_file(self.path / _rank_file(rank))

    def common_tensors(self) -> dict[str, Tensor]:
        """Return the tensors, beside the weights, that were the same on every rank."""
        path = self.path / COMMON
        return load_file(path) if path.is_file() else {}

    def reader(self) -> TensorReader:
        """Return what reads single tensors by name."""
        return TensorReader(self.path)


class TensorReader:
    """Reads tensors by name out of all ranks' files, one at a time."""

    def __init__(self, path: Path) -> None:
        self._files = [safe_open(file, "pt") for file in sorted(path.glob("tensors-*.safetensors"))]
        self._file_of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118 (no mapping)

    def __call__(self, name: str) -> Tensor:
        """Return the tensor `name`, on the CPU. Raises CheckpointError where there is none."""
        if name not in self._file_of:
            raise CheckpointError(f"the checkpoint has no tensor {name!r}; it was written for another model")
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def weights(self) -> dict[str, Tensor]:
        """Return all weights, without the optimizer's moments."""
        return {name: self(name) for name in self._file_of if "/" not in name}


class CheckpointStore:
    """The checkpoints of one stage, at most `keep` of them. Its methods are collectives."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    def save(
        self,
        step: int,
        state: dict[str, Any],
        common: dict[str, Tensor],
        rank_state: dict[str, Tensor],
        share: Callable[[], dict[str, Tensor]],
    ) -> Path:
        """Write the checkpoint of `step` and drop the oldest; `share()` returns this rank's share of the weights.

        `state` and the `common` tensors are the same on every rank, `rank_state` is this one's own.
        Raises CheckpointError on every rank where any rank cannot write; earlier checkpoints are untouched.
        """
        path = self.folder / _name(step)
        aside = self.folder / f".{_name(step)}.unfinished"
        rank = distributed.rank()
        self._together(lambda: self._prepare(aside), "prepare")
        tensors = share()
        own = {f"tensors-{rank:05d}.safetensors": tensors, _rank_file(rank): rank_state}
        if common and distributed.is_main():
            own[COMMON] = common
        self._together(lambda: _save_files(aside, own), "write")
        self._together(lambda: self._publish(aside, path, step, state), "publish")
        return path

    def newest_good(self) -> Checkpoint | None:
        """Return the newest checkpoint that is as its manifest says, or None; damage is named in the log.

        Damaged ones are renamed: a run that goes on behind them would else drop its own first, as the oldest by step.
        """
        found = None
        if distributed.is_main():
            self._finish_replacing()
            for path in reversed(_checkpoints(self.folder)):
                try:
                    found = verify(path)
                    break
                except CheckpointError as error:
                    logger.warning("%s; trying the one before", error)
                    _set_aside(path)
        return distributed.broadcast_object(found)

    def _finish_replacing(self) -> None:
        """Put a checkpoint back that was being replaced by one of the same step when the run was killed."""
        for old in self.folder.glob(".*.replaced"):
            path = self.folder / old.name[1:].removesuffix(".replaced")
            if path.exists():
                shutil.rmtree(old)
            else:
                os.replace(old, path)

    def _prepare(self, aside: Path) -> None:
        if distributed.is_main():
            for stale in self.folder.glob(".*.unfinished"):
                shutil.rmtree(stale)
            aside.mkdir(parents=True)

    def _publish(self, aside: Path, path: Path, step: int, state: dict[str, Any]) -> None:
        if not distributed.is_main():
            return
        files = {
            file.relative_to(aside).as_posix(): {"bytes": file.stat().st_size, "xxh3_128": file_checksum(file)}
            for file in sorted(aside.rglob("*"))
            if file.is_file()
        }
        manifest = {"step": step, "world_size": distributed.world_size(), "state": state, "files": files}
        _write_synced(aside / MANIFEST, json.dumps(manifest, indent=1))
        replaced = self.folder / f".{path.name}.replaced"
        if path.exists():
            os.replace(path, replaced)
        os.replace(aside, path)
        _sync(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)
        _write_synced(self.folder / f".{LATEST}", path.name)
        os.replace(self.folder / f".{LATEST}", self.folder / LATEST)
        for old in _checkpoints(self.folder)[: -self._keep]:
            shutil.rmtree(old)

    def _together(self, action: Callable[[], None], verb: str) -> None:
        error: BigDSSMError | None = None
        try:
            action()
        except (OSError, RuntimeError, SafetensorError) as problem:
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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged: {error!r}") from None
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint file {file} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"checkpoint file {file} has {file.stat().st_size} bytes, was {expected['bytes']}")
        try:
            checksum = file_checksum(file)
        except OSError as error:
            raise CheckpointError(f"checkpoint file {file} cannot be read: {error.strerror}") from None
        if checksum != expected["xxh3_128"]:
            raise CheckpointError(f"checkpoint file {file} is damaged: its checksum is not the manifest's")
    return checkpoint


def is_checkpoint(path: Path) -> bool:
    """Return True where `path` is a folder such as STAGE/checkpoints/step-00000100, whole or not."""
    return path.is_dir() and path.parent.name == CHECKPOINTS


def consolidated_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the whole float32 weights in the checkpoint folder `path`. Raises CheckpointError where it is damaged."""
    return verify(path).reader().weights()


def find(stage_dir: Path, which: str) -> Path:
    """Return the checkpoint folder `which` (`latest` or a `step-…` name) of a stage. Raises CheckpointError."""
    folder = stage_dir / CHECKPOINTS
    names = [path.name for path in _checkpoints(folder)]
    name = names[-1] if which == LATEST and names else which
    if name not in names:
        raise CheckpointError(f"{folder} has no checkpoint {which!r}; it has {names or 'none'}")
    return folder / name


def _save_files(folder: Path, files: dict[str, dict[str, Tensor]]) -> None:
    for name, tensors in files.items():
        save_file(tensors, folder / name)
        _sync(folder / name)


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, damaged or not, by step."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _set_aside(path: Path) -> None:
    target = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(path, target)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def file_checksum(path: Path) -> str:
    """Return the xxh3_128 of a file, in hex."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def folder_checksums(folder: Path) -> dict[str, str]:
    """Return the xxh3_128 of every file in a folder, in hex, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_checksum(path) for path in files}


def check_file(path: Path, checksum: str | None, listed_in: str) -> None:
    """Raise CheckpointError where the file is missing, or is not the one whose checksum `listed_in` has."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; the folder is not whole, copy or make it again")
    if file_checksum(path) != checksum:
        raise CheckpointError(f"{path} is damaged: its checksum is not the one in {listed_in}; copy or make it again")


def _write_synced(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before what follows."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
