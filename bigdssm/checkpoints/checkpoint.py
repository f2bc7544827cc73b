"""Checkpoints, written atomically with checksums: the shares of ranks, the manifest, verification, and reading.

ZeRO's partitioning determines the pieces of tensors that a rank writes, to a safetensors file. Reading is independent
of it: files consist of blocks with separate checksums. On resume, any number of ranks reads every block exactly once in
total.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from bigdssm import distributed
from bigdssm.errors import CheckpointError
from bigdssm.utils.hashing import file_checksum, json_checksum
from bigdssm.utils.safetensors_header import DTYPE_NAMES, DTYPES, safetensors_header

MANIFEST = "manifest.json"
FORMAT = 1
TABLES = "tables-"  # file name prefix of row files
CHECKPOINTS = "checkpoints"  # subfolder of a stage's folder
LATEST = "latest"
COMMON = "common/"  # tensor name prefix: tensors other than weights that are equal on every rank
BLOCK = 1 << 20  # bytes of a block, the unit of reading and verification
TRAINED_CODES = "trained."  # prefix after COMMON: the tensors of `Schema.trained`


class UnsupportedFormatError(CheckpointError):
    """An intact checkpoint of another format version; it must not be skipped as damaged."""


@dataclass(frozen=True)
class TensorPiece:
    """The elements [first, first + n) of a tensor in row-major order."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    first: int
    values: Tensor  # [n]; may be a view of a tensor in training

    def on_host(self, copy: bool) -> "TensorPiece":
        """Return the piece with its values in host memory; a copy is unaffected by further steps."""
        return replace(self, values=self.values.detach().to("cpu", copy=copy))


@dataclass(frozen=True)
class TensorLocation:
    """The byte offset of the elements [first, first + count) of a tensor in a file."""

    name: str
    first: int
    count: int
    offset: int


@dataclass(frozen=True)
class FileShare:
    """The byte range [start, stop) of a checkpoint file, written by one rank.

    The shares of a file together cover all of its bytes.
    """

    owner: int  # rank
    file: str
    range: tuple[int, int]  # start, stop
    block: int  # bytes per block
    xxh3_128: tuple[str, ...]  # one checksum per block
    locations: tuple[TensorLocation, ...] = ()

    @property
    def size(self) -> int:
        """The number of bytes."""
        return self.range[1] - self.range[0]


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of a whole tensor."""

    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class VerifiedRange:
    """Verified bytes of a file, from offset `first`."""

    file: str
    first: int
    content: Tensor  # uint8 [n]


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


def whole_tensor(name: str, tensor: Tensor) -> TensorPiece:
    """Return a whole tensor as one piece."""
    return TensorPiece(name, tuple(tensor.shape), 0, tensor.detach().reshape(-1))


def even_share(tensors: Iterable[tuple[str, Tensor]], rank: int, world_size: int) -> list[TensorPiece]:
    """Split the concatenation of replicated tensors into equal byte ranges; return those of rank `rank` as pieces."""
    named = [(name, tensor.detach().reshape(-1), tuple(tensor.shape)) for name, tensor in tensors]
    total = sum(flat.nbytes for _, flat, _ in named)
    low, high = rank * total // world_size, (rank + 1) * total // world_size
    pieces, begin = [], 0
    for name, flat, shape in named:
        # rounded up: an element belongs to the rank in whose range it starts
        size = flat.element_size()
        first, last = (min(max(0, -(-(end - begin) // size)), len(flat)) for end in (low, high))
        if first < last:
            pieces.append(TensorPiece(name, shape, first, flat[first:last]))
        begin += flat.nbytes
    return pieces


def write_share(path: Path, owner: int, pieces: Sequence[TensorPiece]) -> tuple[FileShare, dict[str, TensorSpec]]:
    """Write pieces of different tensors, in host memory, to a file; return its manifest entries. Raises OSError.

    The file is synced to disk before the function returns.
    """
    pieces = sorted(pieces, key=lambda piece: -piece.values.element_size())  # keeps all of them aligned
    header, offsets = safetensors_header([(piece.name, piece.values.dtype, piece.values.numel()) for piece in pieces])
    contents = [memoryview(header)]
    for piece in pieces:
        if len(piece.values):  # the strides of an empty tensor may not allow a view
            contents.append(piece.values.contiguous().view(torch.uint8).numpy().data)
    # one checksum per BLOCK bytes of the file, independent of the pieces
    checksums, digest, filled = [], xxhash.xxh3_128(), 0
    with path.open("wb") as file:
        for content in contents:
            while content:
                part, content = content[: BLOCK - filled], content[BLOCK - filled :]
                file.write(part)
                digest.update(part)
                filled += len(part)
                if filled == BLOCK:
                    checksums.append(digest.hexdigest())
                    digest, filled = xxhash.xxh3_128(), 0
        if filled:
            checksums.append(digest.hexdigest())
        file.flush()
        os.fsync(file.fileno())
    locations = [
        TensorLocation(piece.name, piece.first, piece.values.numel(), begin)
        for piece, begin in zip(pieces, offsets, strict=False)
    ]
    share = FileShare(owner, path.name, (0, offsets[-1]), BLOCK, tuple(checksums), tuple(locations))
    return share, {piece.name: TensorSpec(DTYPE_NAMES[piece.values.dtype], piece.shape) for piece in pieces}


def assign_blocks(shares: Iterable[FileShare], rank: int, world_size: int) -> Iterator[tuple[FileShare, int, int]]:
    """Yield (share, first block, end block) for a rank: an equal range of the concatenated blocks, end exclusive."""
    shares = list(shares)
    total = sum(share.size for share in shares)
    low, high = rank * total // world_size, (rank + 1) * total // world_size
    begin = 0
    for share in shares:
        # rounded up: a block belongs to the rank in whose range it starts
        num_blocks = len(share.xxh3_128)
        first, last = (min(max(0, -(-(end - begin) // share.block)), num_blocks) for end in (low, high))
        if first < last:
            yield share, first, last
        begin += share.size


def read_blocks(folder: Path, share: FileShare, first: int, last: int) -> VerifiedRange:
    """Read and verify the blocks [first, last) of a share.

    Raises CheckpointError: the file is damaged or cannot be read; FileNotFoundError.
    """
    path, begin = folder / share.file, share.range[0] + first * share.block
    content = torch.empty(min(last * share.block, share.size) - first * share.block, dtype=torch.uint8)
    into = content.numpy().data
    try:
        with path.open("rb") as file:
            file.seek(begin)
            for index in range(first, last):
                block = into[(index - first) * share.block :][: share.block]
                if file.readinto(block) != len(block) or xxhash.xxh3_128_hexdigest(block) != share.xxh3_128[index]:
                    raise CheckpointError(
                        f"checkpoint file {path} is damaged: a block is truncated or does not match its checksum"
                    )
    except FileNotFoundError:  # not damaged: the checkpoint was removed after `check_sizes`
        raise
    except OSError as error:
        raise CheckpointError(f"checkpoint file {path} cannot be read: {error.strerror}") from None
    return VerifiedRange(share.file, begin, content)


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
    # The folder, the progress and the data stream must agree on the step.
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
        return self.reader().with_prefix(COMMON)


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

    def with_prefix(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names have a prefix, by the rest of their names."""
        return {name.removeprefix(prefix): self(name) for name in self._specs if name.startswith(prefix)}

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
        for block in range(len(share.xxh3_128)):  # one at a time, in little memory
            read_blocks(path, share, block, block + 1)
    return checkpoint


def load_checkpoint(checkpoint: Checkpoint, rank: int, world_size: int) -> LoadedCheckpoint:
    """Read and verify this rank's share of a checkpoint; together the ranks read every block once.

    Raises CheckpointError with the damaged or unreadable file, FileNotFoundError.
    """
    path = checkpoint.path
    assigned = assign_blocks(checkpoint.tensor_shares(), rank, world_size)
    blocks = tuple(read_blocks(path, *part) for part in assigned)
    rank_state = None
    for owner in range(rank, checkpoint.world_size, world_size):  # every file of a rank is verified by one rank
        for table_share in checkpoint.table_shares(owner):
            for index in range(len(table_share.xxh3_128)):  # verified only; the ranks that own the rows read them
                read_blocks(path, table_share, index, index + 1)
        share = next(share for share in checkpoint.shares if share.file == rank_file(owner))
        block = read_blocks(path, share, 0, len(share.xxh3_128))
        if owner == rank and checkpoint.world_size == world_size:
            try:
                rank_state = load(block.content.numpy().tobytes())
            except SafetensorError as error:
                raise CheckpointError(f"checkpoint file {path / share.file} is damaged: {error}") from None
    return LoadedCheckpoint(**vars(checkpoint), blocks=blocks, rank_state=rank_state, collective=True)


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
