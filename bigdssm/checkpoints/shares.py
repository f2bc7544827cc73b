"""A rank's share of a checkpoint: pieces of tensors in a safetensors file, with block checksums.

ZeRO's partitioning determines the pieces that a rank writes. Reading is independent of it: files consist of blocks with
separate checksums. On resume, any number of ranks reads every block exactly once in total.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from bigdssm.errors import CheckpointError
from bigdssm.utils.safetensors_header import DTYPE_NAMES, DTYPES, safetensors_header

BLOCK = 1 << 20  # bytes of a block, the unit of reading and verification


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
    # one checksum of every BLOCK bytes of the file, whatever the pieces
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
        number = len(share.xxh3_128)
        first, last = (min(max(0, -(-(end - begin) // share.block)), number) for end in (low, high))
        if first < last:
            yield share, first, last
        begin += share.size


def read_blocks(folder: Path, share: FileShare, first: int, last: int) -> VerifiedRange:
    """Read and verify the blocks [first, last) of a share. Raises OSError; CheckpointError: the file is damaged."""
    path, begin = folder / share.file, share.range[0] + first * share.block
    content = torch.empty(min(last * share.block, share.size) - first * share.block, dtype=torch.uint8)
    into = content.numpy().data
    with path.open("rb") as file:
        file.seek(begin)
        for number in range(first, last):
            block = into[(number - first) * share.block :][: share.block]
            if file.readinto(block) != len(block) or xxhash.xxh3_128_hexdigest(block) != share.xxh3_128[number]:
                raise CheckpointError(
                    f"checkpoint file {path} is damaged: a block is truncated or does not match its checksum"
                )
    return VerifiedRange(share.file, begin, content)
