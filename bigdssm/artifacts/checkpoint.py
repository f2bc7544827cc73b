"""Checkpoints that are whole or not there: written aside, checksummed, renamed, verified before they are believed.

checkpoints/
  step-00000100/
    manifest.json       written last: step, world size, state, what every file holds, and a checksum of all this
    tensors-00000.safetensors   one rank's share of the weights and moments
    rank-00000.safetensors      one rank's random state
    common.safetensors          further tensors that are the same on every rank, where there are any
  damaged-step-00000200/  what a resumed run found damaged: it is kept for people, and never counted or read again
  latest                the name of the newest one; moved after the rename, and never needed to find it
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bigdssm import distributed
from bigdssm.atomic import REPLACED, UNFINISHED, aside_of, recover, remove, replace_folder, sync, write_text
from bigdssm.errors import BigDSSMError, CheckpointError
from bigdssm.hashing import file_checksum, json_checksum
from bigdssm.log import get_logger

logger = get_logger(__name__)

CHECKPOINTS = "checkpoints"  # of a stage's folder
MANIFEST, LATEST, COMMON = "manifest.json", "latest", "common.safetensors"
FORMAT = 2  # 1 had no checksum of the manifest itself: an edited step was believed


class OtherFormatError(CheckpointError):
    """A checkpoint that is whole, but of another version: no damage, and not to be passed over."""


@dataclass(frozen=True)
class FileShare:
    """The bytes [first, last) of a checkpoint's file, as one rank wrote them; the shares of a file cover it."""

    owner: int  # rank
    file: str
    range: tuple[int, int]  # first, last
    xxh3_128: str


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    path: Path
    step: int
    world_size: int
    state: dict[str, Any]  # what is the same on every rank
    shares: tuple[FileShare, ...]

    @property
    def files(self) -> list[str]:
        """The names of the verified files; what else lies in the folder is not read."""
        return sorted({share.file for share in self.shares})

    def rank_state(self, rank: int) -> dict[str, Tensor]:
        """Return what rank `rank` saved for itself."""
        return load_file(self.path / _rank_file(rank))

    def common_tensors(self) -> dict[str, Tensor]:
        """Return the tensors, beside the weights, that were the same on every rank."""
        return load_file(self.path / COMMON) if COMMON in self.files else {}

    def reader(self) -> TensorReader:
        """Return what reads single tensors by name."""
        return TensorReader(self)


class TensorReader:
    """Reads tensors by name out of all ranks' files, one at a time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        files = [name for name in checkpoint.files if name.startswith("tensors-")]
        self._files = [safe_open(checkpoint.path / name, "pt") for name in files]
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
        aside = aside_of(path)
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
        Raises OtherFormatError, and CheckpointError where the folder cannot be read or written.
        """
        found: list[Checkpoint] = []
        self._together(lambda: found.extend(self._newest_good()), "look for")
        return distributed.broadcast_object(found[0] if found else None)

    def _newest_good(self) -> list[Checkpoint]:
        """Return the newest good one, on rank 0, if there is one."""
        if not distributed.is_main():
            return []
        for replaced in self.folder.glob(f".*{REPLACED}"):  # by one of the same step, when the run was killed
            recover(self.folder / replaced.name[1:].removesuffix(REPLACED))
        for path in reversed(_checkpoints(self.folder)):
            try:
                return [verify(path)]
            except OtherFormatError:
                raise
            except CheckpointError as error:
                logger.warning("%s; trying the one before", error)
                _set_aside(path)
        return []

    def _prepare(self, aside: Path) -> None:
        if distributed.is_main():
            for stale in self.folder.glob(f".*{UNFINISHED}"):
                remove(stale)
            aside.mkdir(parents=True)

    def _publish(self, aside: Path, path: Path, step: int, state: dict[str, Any]) -> None:
        if not distributed.is_main():
            return
        shares = [
            FileShare(_owner(file.name), file.name, (0, file.stat().st_size), file_checksum(file))
            for file in sorted(aside.iterdir())
        ]
        _write_manifest(aside / MANIFEST, step, distributed.world_size(), state, shares)
        replace_folder(aside, path)
        write_text(self.folder / LATEST, path.name)
        for old in _checkpoints(self.folder)[: -self._keep]:
            shutil.rmtree(old)

    def _together(self, action: Callable[[], None], verb: str) -> None:
        error: BigDSSMError | None = None
        try:
            action()
        except BigDSSMError as problem:
            error = problem
        except (OSError, RuntimeError, SafetensorError) as problem:
            reason = " ".join(str(problem).split())
            error = CheckpointError(
                f"could not {verb} a checkpoint in {self.folder}: {reason}; the last good one stays"
            )
        distributed.raise_together(error)


def verify(path: Path) -> Checkpoint:
    """Return the checkpoint at `path`.

    Raises CheckpointError naming the first thing that is not as it was written, OtherFormatError where all is, by
    another version.
    """
    checkpoint = _read_manifest(path)
    ends: dict[str, int] = {}
    for share in checkpoint.shares:
        ends[share.file] = max(ends.get(share.file, 0), share.range[1])
    for name, end in ends.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint file {file} is missing")
        if file.stat().st_size != end:
            raise CheckpointError(f"checkpoint file {file} has {file.stat().st_size} bytes, was {end}")
    for share in checkpoint.shares:
        file = path / share.file
        try:
            checksum = file_checksum(file, *share.range)
        except OSError as error:
            raise CheckpointError(f"checkpoint file {file} cannot be read: {error.strerror}") from None
        if checksum != share.xxh3_128:
            raise CheckpointError(f"checkpoint file {file} is damaged: its checksum is not the manifest's")
    return checkpoint


def _write_manifest(path: Path, step: int, world_size: int, state: dict[str, Any], shares: Sequence[FileShare]) -> None:
    content = {
        "format": FORMAT, "step": step, "world_size": world_size, "state": state,
        "shares": [asdict(share) for share in shares],
    }  # fmt: skip
    content = json.loads(json.dumps(content))  # as it will be read
    path.write_text(json.dumps({"checksum": json_checksum(content), **content}, indent=1), encoding="utf-8")


def _read_manifest(path: Path) -> Checkpoint:
    """Return the checkpoint that the manifest of `path` describes; the manifest is verified, the files are not."""
    file = path / MANIFEST
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        format_ = content["format"] if "files" not in content else 1  # which did not tell it
        if format_ != 1 and content.pop("checksum") != json_checksum(content):
            raise CheckpointError(f"{file} is damaged: its content does not have the checksum that it tells")
        if format_ != FORMAT:
            raise OtherFormatError(
                f"checkpoint {path} has format {format_}, this version reads {FORMAT}; go on with the version that "
                "wrote it, or begin anew in another run.dir"
            )
        shares = [
            FileShare(s["owner"], s["file"], (s["range"][0], s["range"][1]), s["xxh3_128"]) for s in content["shares"]
        ]
        checkpoint = Checkpoint(path, content["step"], content["world_size"], content["state"], tuple(shares))
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} has no {MANIFEST}: it was never finished") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: {error!r}") from None
    if path.name != _name(checkpoint.step):
        raise CheckpointError(f"checkpoint {path} was written as {_name(checkpoint.step)}; give it that name again")
    for what, step in _steps_of(checkpoint.state).items():
        if step != checkpoint.step:
            raise CheckpointError(f"{file} is damaged: the step of its {what} is {step}, its own {checkpoint.step}")
    return checkpoint


def _steps_of(state: dict[str, Any]) -> dict[str, int]:
    """Return the steps that a stage's state tells of; a stream counts from the beginning of its part."""
    progress, stream = state.get("progress", {}), state.get("stream", {})
    steps = {"progress": progress["step"]} if "step" in progress else {}
    return steps | ({"stream": stream["step"] + progress.get("part_step", 0)} if "step" in stream else {})


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
        sync(folder / name)


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, damaged or not, by step."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _set_aside(path: Path) -> None:
    target = path.with_name(f"damaged-{path.name}")
    remove(target)
    os.replace(path, target)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _owner(name: str) -> int:
    """Return the rank that writes the file `name`."""
    number = re.search(r"-(\d+)\.", name)
    return int(number[1]) if number else 0


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


def checkpoint_bytes(numbers: int) -> int:
    """Return the bytes of a checkpoint of so many weights and optimizer states: all ranks' shares, in float32."""
    return 4 * numbers


def saving_bytes(weights: int, largest: int, world_size: int) -> int:
    """Return what writing one takes on a rank: its share of weights and two states, and one tensor put together."""
    return 12 * weights // world_size + 4 * largest
