"""Checkpoints, complete and checksummed or absent: the manifest, verification, and reading."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from bigdssm import distributed
from bigdssm.checkpoints.shares import (
    DTYPES,
    Block,
    FileShare,
    TensorKind,
    TensorLocation,
    partition_pieces,
    read_blocks,
)
from bigdssm.errors import CheckpointError
from bigdssm.utils.hashing import file_checksum, json_checksum

MANIFEST = "manifest.json"
FORMAT = 1


class OtherFormatError(CheckpointError):
    """A checkpoint that is whole, but of another version: no damage, and not to be passed over."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose manifest is verified."""

    path: Path
    step: int
    world_size: int
    state: dict[str, Any]  # what is the same on every rank
    tensors: dict[str, TensorKind]  # by name: weights, STATE/… of the optimizer's, and COMMON…
    shares: tuple[FileShare, ...]

    def tensor_shares(self) -> list[FileShare]:
        """Return the shares of all tensors, in the order of their ranks."""
        return [share for share in self.shares if share.file == tensors_file(share.owner)]

    def rank_share(self, rank: int) -> FileShare:
        """Return the share that holds what rank `rank` saved for itself."""
        return next(share for share in self.shares if share.file == rank_file(rank))


def check_sizes(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where a file is missing or has another size."""
    ends: dict[str, int] = {}
    for share in checkpoint.shares:
        ends[share.file] = max(ends.get(share.file, 0), share.range[1])
    for name, end in ends.items():
        file = checkpoint.path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint file {file} is missing")
        if file.stat().st_size != end:
            raise CheckpointError(f"checkpoint file {file} has {file.stat().st_size} bytes, was {end}")


def write_manifest(
    path: Path, step: int, world_size: int, state: dict[str, Any], tensors: dict[str, TensorKind],
    shares: Sequence[FileShare],
) -> None:  # fmt: skip
    """Write the manifest to the folder `path`."""
    number = {name: n for n, name in enumerate(tensors)}
    content = {
        "format": FORMAT, "step": step, "world_size": world_size, "state": state,
        "tensors": [[name, kind.dtype, kind.shape] for name, kind in tensors.items()],
        "shares": [
            {
                "owner": share.owner, "file": share.file, "range": share.range,
                "block": share.block, "xxh3_128": share.xxh3_128,
                "places": [[number[place.name], place.first, place.count, place.at] for place in share.places],
            }
            for share in shares
        ],
    }  # fmt: skip
    content = json.loads(json.dumps(content))  # as it will be read
    (path / MANIFEST).write_text(json.dumps({"checksum": json_checksum(content), **content}), encoding="utf-8")


def read_manifest(path: Path) -> Checkpoint:
    """Return the checkpoint that the manifest of `path` describes; the manifest is verified, the files are not."""
    file = path / MANIFEST
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("checksum") != json_checksum(content):
            raise CheckpointError(f"{file} is damaged: its content does not have the checksum that it tells")
        if content["format"] != FORMAT:
            raise OtherFormatError(
                f"checkpoint {path} has format {content['format']}, this version reads {FORMAT}; go on with the "
                "version that wrote it, or begin anew in another run.dir"
            )
        tensors = {name: TensorKind(dtype, tuple(shape)) for name, dtype, shape in content["tensors"]}
        names = list(tensors)
        shares = tuple(
            FileShare(
                s["owner"], s["file"], (s["range"][0], s["range"][1]), s["block"], tuple(s["xxh3_128"]),
                tuple(TensorLocation(names[number], first, count, at) for number, first, count, at in s["places"]),
            )
            for s in content["shares"]
        )  # fmt: skip
        checkpoint = Checkpoint(path, content["step"], content["world_size"], content["state"], tensors, shares)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} has no {MANIFEST}: it was never finished") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{file} is damaged: {error!r}") from None
    if path.name != name_of(checkpoint.step):
        raise CheckpointError(f"checkpoint {path} was written as {name_of(checkpoint.step)}; give it that name again")
    for what, step in _steps_of(checkpoint.state).items():
        if step != checkpoint.step:
            raise CheckpointError(f"{file} is damaged: the step of its {what} is {step}, its own {checkpoint.step}")
    return checkpoint


def _steps_of(state: dict[str, Any]) -> dict[str, int]:
    """Return the steps that a stage's state tells of; a stream counts from the beginning of its part."""
    progress, stream = state.get("progress", {}), state.get("stream", {})
    steps = {"progress": progress["step"]} if "step" in progress else {}
    return steps | ({"stream": stream["step"] + progress.get("part_step", 0)} if "step" in stream else {})


def name_of(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"step-{step:08d}"


def tensors_file(rank: int) -> str:
    """Return the name of a rank's share of all tensors."""
    return f"tensors-{rank:05d}.safetensors"


def rank_file(rank: int) -> str:
    """Return the name of what a rank keeps for itself."""
    return f"rank-{rank:05d}.safetensors"


CHECKPOINTS = "checkpoints"  # of a stage's folder
LATEST = "latest"
COMMON = "common/"  # what further tensors that are the same on every rank are called after


@dataclass(frozen=True)
class ReadCheckpoint:
    """A verified checkpoint, with what this rank has read of it: its part of all tensors, and its own state."""

    checkpoint: Checkpoint
    blocks: tuple[Block, ...]
    rank_state: dict[str, Tensor] | None  # none where the checkpoint is of another number of ranks
    together: bool  # all ranks have read it, each a part of its own

    @property
    def path(self) -> Path:
        """The folder."""
        return self.checkpoint.path

    @property
    def step(self) -> int:
        """The step after which it was written."""
        return self.checkpoint.step

    @property
    def state(self) -> dict[str, Any]:
        """What is the same on every rank."""
        return self.checkpoint.state

    def reader(self) -> TensorReader:
        """Return what gives single tensors by name."""
        return TensorReader(self)

    def common_tensors(self) -> dict[str, Tensor]:
        """Return the tensors, beside the weights, that were the same on every rank. A collective."""
        read = self.reader()
        return {name.removeprefix(COMMON): read(name) for name in self.checkpoint.tensors if name.startswith(COMMON)}


class TensorReader:
    """Puts whole tensors together from what the ranks have read, one at a time: a collective where all have read."""

    def __init__(self, read: ReadCheckpoint) -> None:
        self._kinds, self._together = read.checkpoint.tensors, read.together
        self._blocks: dict[str, list[Block]] = {}
        self._places: dict[str, list[tuple[str, TensorLocation]]] = {}
        for block in read.blocks:
            self._blocks.setdefault(block.file, []).append(block)
        for share in read.checkpoint.tensor_shares():
            for place in share.places:
                self._places.setdefault(place.name, []).append((share.file, place))

    def __call__(self, name: str) -> Tensor:
        """Return the tensor `name`, on the CPU. Raises CheckpointError where there is none."""
        shape = self.shape(name)
        kind = self._kinds[name]
        content = torch.zeros(-(-kind.nbytes // 4) * 4, dtype=torch.uint8)
        for file, place in self._places[name]:
            for block in self._blocks.get(file, ()):
                first = max(place.at, block.first)
                last = min(place.at + place.count * kind.itemsize, block.first + len(block.content))
                if first < last:
                    into = place.first * kind.itemsize + first - place.at
                    content[into : into + last - first] = block.content[first - block.first : last - block.first]
        if self._together:  # each byte is one rank's, zero on the others: the sum of integers has the same bits
            distributed.all_reduce(content.view(torch.int32))
        return content[: kind.nbytes].view(DTYPES[kind.dtype]).view(shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the tensor `name`. Raises CheckpointError where there is none."""
        if name not in self._kinds:
            raise CheckpointError(f"the checkpoint has no tensor {name!r}; it was written for another model")
        return self._kinds[name].shape

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._kinds)

    def weights(self) -> dict[str, Tensor]:
        """Return all weights, without the optimizer's moments."""
        return {name: self(name) for name in self._kinds if "/" not in name}


def verify(path: Path) -> Checkpoint:
    """Return the checkpoint at `path`, all of which was read.

    Raises CheckpointError naming the first thing that is not as it was written, OtherFormatError where all is, by
    another version.
    """
    checkpoint = read_manifest(path)
    check_sizes(checkpoint)
    for share in checkpoint.shares:
        for number in range(len(share.xxh3_128)):
            _read_blocks(path, share, number, number + 1)
    return checkpoint


def read_part(checkpoint: Checkpoint, rank: int, world_size: int) -> ReadCheckpoint:
    """Return a checkpoint with this rank's part of it, verified; all parts are all of it.

    Raises CheckpointError naming what is damaged or cannot be read, FileNotFoundError.
    """
    path = checkpoint.path
    parts = partition_pieces(checkpoint.tensor_shares(), rank, world_size)
    blocks = tuple(_read_blocks(path, *part) for part in parts)
    own = None
    for owner in range(rank, checkpoint.world_size, world_size):
        share = checkpoint.rank_share(owner)
        block = _read_blocks(path, share, 0, len(share.xxh3_128))
        if owner == rank and checkpoint.world_size == world_size:
            try:
                own = load(block.content.numpy().tobytes())
            except SafetensorError as error:
                raise CheckpointError(f"checkpoint file {path / share.file} is damaged: {error}") from None
    return ReadCheckpoint(checkpoint, blocks, own, together=True)


def _read_blocks(path: Path, share: FileShare, first: int, last: int) -> Block:
    try:
        return read_blocks(path, share, first, last)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"checkpoint file {path / share.file} cannot be read: {error.strerror}") from None


def is_checkpoint(path: Path) -> bool:
    """Return True where `path` is a folder such as STAGE/checkpoints/step-00000100, whole or not."""
    return path.is_dir() and path.parent.name == CHECKPOINTS


def open_whole(path: Path) -> TensorReader:
    """Return what reads all of the checkpoint folder `path` by itself. Raises CheckpointError where it is damaged."""
    checkpoint = verify(path)
    blocks = tuple(
        Block(share.file, 0, torch.from_file(str(path / share.file), size=share.size, dtype=torch.uint8))
        for share in checkpoint.tensor_shares()
    )
    return TensorReader(ReadCheckpoint(checkpoint, blocks, None, together=False))


def consolidated_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the whole float32 weights in the checkpoint folder `path`. Raises CheckpointError where it is damaged."""
    return open_whole(path).weights()


def find(stage_dir: Path, which: str) -> Path:
    """Return the checkpoint folder `which` (`latest` or a `step-…` name) of a stage. Raises CheckpointError."""
    folder = stage_dir / CHECKPOINTS
    names = [path.name for path in checkpoints_in(folder)]
    name = names[-1] if which == LATEST and names else which
    if name not in names:
        raise CheckpointError(f"{folder} has no checkpoint {which!r}; it has {names or 'none'}")
    return folder / name


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, damaged or not, by step."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


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
