"""Checkpoints that are whole or not there: what stands in one, verified before it is believed.

checkpoints/
  step-00000100/
    manifest.json       written last: step, world size, state, what every file holds, and a checksum of all this
    tensors-00000.safetensors   one rank's share of weights, moments, and what else is the same on every rank
    rank-00000.safetensors      one rank's random state
  damaged-step-00000200/  what a resumed run found damaged: it is kept for people, and never counted or read again
  latest                the name of the newest one; moved after the rename, and never needed to find it

manifest.py has the manifest, shares.py the files, store.py writes and finds checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from bigdssm import distributed
from bigdssm.artifacts.manifest import Checkpoint, check_sizes, read_manifest
from bigdssm.artifacts.shares import DTYPES, Block, FileShare, Place, read_blocks, shared_out
from bigdssm.errors import CheckpointError
from bigdssm.hashing import file_checksum

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
        self._places: dict[str, list[tuple[str, Place]]] = {}
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
    parts = shared_out(checkpoint.tensor_shares(), rank, world_size)
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
