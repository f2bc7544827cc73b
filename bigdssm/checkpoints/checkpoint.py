"""Checkpoints, written atomically with checksums: the manifest, verification, and reading."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from bigdssm import distributed
from bigdssm.checkpoints.shares import (
    FileShare,
    TensorLocation,
    TensorSpec,
    VerifiedRange,
    assign_blocks,
    read_blocks,
)
from bigdssm.errors import CheckpointError
from bigdssm.utils.hashing import file_checksum, json_checksum
from bigdssm.utils.safetensors_header import DTYPES

MANIFEST = "manifest.json"
FORMAT = 1
TABLES = "tables-"  # file name prefix of row files
CHECKPOINTS = "checkpoints"  # subfolder of a stage's folder
LATEST = "latest"
COMMON = "common/"  # tensor name prefix: tensors other than weights that are equal on every rank
TRAINED_CODES = "trained."  # prefix after COMMON: the tensors of `Schema.trained`


class UnsupportedFormatError(CheckpointError):
    """An intact checkpoint of another format version; it must not be skipped as damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose manifest is verified."""

    path: Path
    step: int
    world_size: int
    state: dict[str, Any]  # equal on every rank
    tensors: dict[str, TensorSpec]  # by name: weights, optimizer states as STATE/NAME, and COMMON + NAME
    shares: tuple[FileShare, ...]

    def tensor_shares(self) -> list[FileShare]:
        """Return the shares that hold tensors, in the order of their ranks."""
        return [share for share in self.shares if share.file == tensors_file(share.owner)]

    def table_shares(self, rank: int) -> list[FileShare]:
        """Return the shares with the table rows of rank `rank`; later ones replace rows of earlier ones."""
        shares = [share for share in self.shares if share.owner == rank and share.file.startswith(TABLES)]
        return sorted(shares, key=lambda share: share.file)

    def table_files(self) -> list[list[Path]]:
        """Return the files of `table_shares` for each rank that has any."""
        chains = [[self.path / share.file for share in self.table_shares(rank)] for rank in range(self.world_size)]
        return [chain for chain in chains if chain]


def check_sizes(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if a file is missing or has another size."""
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
    path: Path, step: int, world_size: int, state: dict[str, Any], tensors: dict[str, TensorSpec],
    shares: Sequence[FileShare],
) -> None:  # fmt: skip
    """Write the manifest to the folder `path`."""
    index_of = {name: index for index, name in enumerate(tensors)}
    content = {
        "format": FORMAT, "step": step, "world_size": world_size, "state": state,
        "tensors": [[name, spec.dtype, spec.shape] for name, spec in tensors.items()],
        "shares": [
            {
                "owner": share.owner, "file": share.file, "range": share.range,
                "block": share.block, "xxh3_128": share.xxh3_128,
                # `places` is the key of the locations in this format
                "places": [[index_of[item.name], item.first, item.count, item.offset] for item in share.locations],
            }
            for share in shares
        ],
    }  # fmt: skip
    content = json.loads(json.dumps(content))  # the checksum is of the content as it is read back
    (path / MANIFEST).write_text(json.dumps({"checksum": json_checksum(content), **content}), encoding="utf-8")


def read_manifest(path: Path) -> Checkpoint:
    """Read and verify the manifest of the checkpoint folder `path`; other files are not verified."""
    file = path / MANIFEST
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("checksum") != json_checksum(content):
            raise CheckpointError(f"{file} is damaged: its content does not match its checksum")
        if content["format"] != FORMAT:
            raise UnsupportedFormatError(
                f"checkpoint {path} has format {content['format']}, this version reads {FORMAT}; continue with the "
                "version that wrote it, or start again in another run.dir"
            )
        tensors = {name: TensorSpec(dtype, tuple(shape)) for name, dtype, shape in content["tensors"]}
        names = list(tensors)
        shares = tuple(
            FileShare(
                s["owner"], s["file"], (s["range"][0], s["range"][1]), s["block"], tuple(s["xxh3_128"]),
                tuple(TensorLocation(names[i], first, count, offset) for i, first, count, offset in s["places"]),
            )
            for s in content["shares"]
        )  # fmt: skip
        checkpoint = Checkpoint(path, content["step"], content["world_size"], content["state"], tensors, shares)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} has no {MANIFEST}: it was not completed") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{file} is damaged: {error!r}") from None
    if path.name != checkpoint_name(checkpoint.step):
        raise CheckpointError(f"checkpoint {path} was written as {checkpoint_name(checkpoint.step)}; restore that name")
    progress, stream = checkpoint.state.get("progress", {}), checkpoint.state.get("stream", {})
    first = progress.get("part_step", 0)  # a stream counts from the start of its segment
    steps = {"progress": progress.get("step"), "stream": first + stream["step"] if "step" in stream else None}
    for part, step in steps.items():
        if step not in (None, checkpoint.step):
            raise CheckpointError(f"{file} is damaged: the step of its {part} is {step}, its own {checkpoint.step}")
    return checkpoint


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint of a step."""
    return f"step-{step:08d}"


def tensors_file(rank: int) -> str:
    """Return the file name of a rank's share of all tensors."""
    return f"tensors-{rank:05d}.safetensors"


def tables_file(rank: int, number: int) -> str:
    """Return the name of a file with rows of sharded tables of a rank (see tables/files.py)."""
    return f"{TABLES}{rank:05d}-{number:02d}.safetensors"


def rank_file(rank: int) -> str:
    """Return the file name of a rank's local state."""
    return f"rank-{rank:05d}.safetensors"


@dataclass(frozen=True)
class LoadedCheckpoint(Checkpoint):
    """A verified checkpoint, with the blocks and the local state that this rank has read."""

    blocks: tuple[VerifiedRange, ...]
    rank_state: dict[str, Tensor] | None  # None if the checkpoint is of another world size
    collective: bool  # every rank has read a different part; otherwise this rank has read everything

    def reader(self) -> "TensorReader":
        """Return a reader of single tensors by name."""
        return TensorReader(self)

    def common_tensors(self) -> dict[str, Tensor]:
        """Return the tensors other than weights that are equal on every rank.

        All ranks must call it.
        """
        read = self.reader()
        return {name.removeprefix(COMMON): read(name) for name in self.tensors if name.startswith(COMMON)}


class TensorReader:
    """Assembles whole tensors from the blocks that the ranks have read; calls are collectives if `collective`."""

    def __init__(self, read: LoadedCheckpoint) -> None:
        self._specs, self._collective = read.tensors, read.collective
        self._blocks: dict[str, list[VerifiedRange]] = {}
        self._locations: dict[str, list[tuple[str, TensorLocation]]] = {}
        for block in read.blocks:
            self._blocks.setdefault(block.file, []).append(block)
        for share in read.tensor_shares():
            for location in share.locations:
                self._locations.setdefault(location.name, []).append((share.file, location))

    def __call__(self, name: str) -> Tensor:
        """Return the tensor `name`, on the CPU. Raises CheckpointError: no such tensor."""
        shape = self.shape(name)
        spec = self._specs[name]
        num_words = -(-spec.nbytes // 4)  # rounded up, as the sum over ranks is of int32
        content = torch.zeros(4 * num_words, dtype=torch.uint8)
        for file, location in self._locations[name]:
            for block in self._blocks.get(file, ()):
                # bytes [first, last) of the file are in the tensor and in the block
                first = max(location.offset, block.first)
                last = min(location.offset + location.count * spec.itemsize, block.first + len(block.content))
                if first < last:
                    target = location.first * spec.itemsize + first - location.offset
                    content[target : target + last - first] = block.content[first - block.first : last - block.first]
        if self._collective:  # a byte is set on one rank and 0 on the others: the integer sum is exact
            distributed.all_reduce(content.view(torch.int32))
        return content[: spec.nbytes].view(DTYPES[spec.dtype]).view(shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the tensor `name`. Raises CheckpointError: no such tensor."""
        if name not in self._specs:
            raise CheckpointError(f"the checkpoint has no tensor {name!r}; it was written for another model")
        return self._specs[name].shape

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._specs)

    def weights(self) -> dict[str, Tensor]:
        """Return all weights, without optimizer states."""
        return {name: self(name) for name in self._specs if "/" not in name}


def verify(path: Path) -> Checkpoint:
    """Read and verify all files of the checkpoint at `path`.

    Raises CheckpointError with the first damaged file, UnsupportedFormatError: intact, but of another version.
    """
    checkpoint = read_manifest(path)
    check_sizes(checkpoint)
    for share in checkpoint.shares:
        for number in range(len(share.xxh3_128)):
            _read_blocks(path, share, number, number + 1)
    return checkpoint


def load_checkpoint(checkpoint: Checkpoint, rank: int, world_size: int) -> LoadedCheckpoint:
    """Read and verify this rank's share of a checkpoint; together the ranks read every block once.

    Raises CheckpointError with the damaged or unreadable file, FileNotFoundError.
    """
    path = checkpoint.path
    assigned = assign_blocks(checkpoint.tensor_shares(), rank, world_size)
    blocks = tuple(_read_blocks(path, *part) for part in assigned)
    rank_state = None
    for owner in range(rank, checkpoint.world_size, world_size):  # every file of a rank is verified by one rank
        for table_share in checkpoint.table_shares(owner):
            for number in range(len(table_share.xxh3_128)):  # verified only; the ranks that own the rows read them
                _read_blocks(path, table_share, number, number + 1)
        share = next(share for share in checkpoint.shares if share.file == rank_file(owner))
        block = _read_blocks(path, share, 0, len(share.xxh3_128))
        if owner == rank and checkpoint.world_size == world_size:
            try:
                rank_state = load(block.content.numpy().tobytes())
            except SafetensorError as error:
                raise CheckpointError(f"checkpoint file {path / share.file} is damaged: {error}") from None
    return LoadedCheckpoint(**vars(checkpoint), blocks=blocks, rank_state=rank_state, collective=True)


def _read_blocks(path: Path, share: FileShare, first: int, last: int) -> VerifiedRange:
    try:
        return read_blocks(path, share, first, last)
    except FileNotFoundError:  # no damage: `check_sizes` has found the file
        raise
    except OSError as error:
        raise CheckpointError(f"checkpoint file {path / share.file} cannot be read: {error.strerror}") from None


def open_tensors(path: Path) -> TensorReader:
    """Verify the checkpoint folder `path` and return a reader for this rank only. Raises CheckpointError."""
    checkpoint = verify(path)
    blocks = tuple(
        VerifiedRange(share.file, 0, torch.from_file(str(path / share.file), size=share.size, dtype=torch.uint8))
        for share in checkpoint.tensor_shares()
    )
    return TensorReader(LoadedCheckpoint(**vars(checkpoint), blocks=blocks, rank_state=None, collective=False))


def find_checkpoint(stage_dir: Path, which: str) -> Path:
    """Return the path of a stage's checkpoint `which` (`latest` or a `step-…` name). Raises CheckpointError."""
    folder = stage_dir / CHECKPOINTS
    names = [path.name for path in checkpoints_in(folder)]
    name = names[-1] if which == LATEST and names else which
    if name not in names:
        raise CheckpointError(f"{folder} has no checkpoint {which!r}; it has {names or 'none'}")
    return folder / name


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, damaged or not, sorted by step."""
    paths = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step-")))


def tensor_names(path: Path) -> list[str]:
    """Return the names of the tensors of the checkpoint folder `path`; none if its manifest is damaged."""
    try:
        return list(read_manifest(path).tensors)
    except UnsupportedFormatError:
        raise
    except CheckpointError:
        return []


def folder_checksums(folder: Path, compute: Callable[[Path], str] = file_checksum) -> dict[str, str]:
    """Return the checksum, by default xxh3_128 in hex, of every file in a folder, by its relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): compute(path) for path in files}


def check_file(path: Path, checksum: str | None, manifest: str, compute: Callable[[Path], str] = file_checksum) -> None:
    """Raise CheckpointError if the file is missing, or its checksum is not the one in `manifest`."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; the folder is incomplete, copy it or create it again")
    if compute(path) != checksum:
        raise CheckpointError(f"{path} is damaged: its checksum is not that in {manifest}; copy it or create it again")
