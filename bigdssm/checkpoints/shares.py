"""A rank's share of a checkpoint: pieces of tensors in one safetensors file, checksummed while they are written.

Who writes which piece is ZeRO's affair, who reads which bytes is not: files are cut into blocks, each with
a checksum of its own, and the ranks of a resumed run, however many, read every block once between them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
import xxhash
from torch import Tensor

from bigdssm.errors import CheckpointError

BLOCK = 1 << 20  # bytes of a file that can be read, and believed, by themselves
_ALIGNMENT = 8  # of the data in a safetensors file

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorPiece:
    """The elements [first, first + n) of a tensor, counted in the order of its rows."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    first: int
    values: Tensor  # [n]; may be a part of what is being trained

    def on_host(self, copy: bool) -> TensorPiece:
        """Return the piece with its values in host memory; those of a copy no further step changes."""
        return replace(self, values=self.values.detach().to("cpu", copy=copy))


@dataclass(frozen=True)
class TensorLocation:
    """Where the elements [first, first + count) of a tensor stand in a file: at the bytes from `at` on."""

    name: str
    first: int
    count: int
    at: int


@dataclass(frozen=True)
class FileShare:
    """The bytes [first, last) of a checkpoint's file, as one rank wrote them; the shares of a file cover it."""

    owner: int  # rank
    file: str
    range: tuple[int, int]  # first, last
    block: int  # bytes
    xxh3_128: tuple[str, ...]  # of every block
    places: tuple[TensorLocation, ...] = ()

    @property
    def size(self) -> int:
        """The number of bytes."""
        return self.range[1] - self.range[0]


@dataclass(frozen=True)
class TensorKind:
    """What a whole tensor is like."""

    dtype: str  # of DTYPES
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
class Block:
    """Verified bytes of a file, from `first` on."""

    file: str
    first: int
    content: Tensor  # uint8 [n]


def whole_tensor(name: str, tensor: Tensor) -> TensorPiece:
    """Return a whole tensor as one piece."""
    return TensorPiece(name, tuple(tensor.shape), 0, tensor.detach().reshape(-1))


def even_share(tensors: Iterable[tuple[str, Tensor]], rank: int, world_size: int) -> list[TensorPiece]:
    """Return rank `rank`'s pieces of tensors that every rank has: laid end to end, each gets as many bytes."""
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


def write_share(path: Path, owner: int, pieces: Sequence[TensorPiece]) -> tuple[FileShare, dict[str, TensorKind]]:
    """Write pieces, on the host, of different tensors to a file; return what a manifest tells of them. Raises OSError.

    When it returns, the file is on the disk.
    """
    pieces = sorted(pieces, key=lambda piece: -piece.values.element_size())  # so that all are aligned
    ends = list(accumulate((piece.values.nbytes for piece in pieces), initial=0))
    header = {
        piece.name: {
            "dtype": _NAMES[piece.values.dtype], "shape": [piece.values.numel()], "data_offsets": [first, last]
        }
        for piece, first, last in zip(pieces, ends, ends[1:], strict=False)
    }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        checksummed = _Checksummed(file)
        checksummed.write(memoryview(len(text).to_bytes(8, "little") + text))
        for piece in pieces:
            checksummed.write(piece.values.contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    data = 8 + len(text)
    places = [
        TensorLocation(piece.name, piece.first, piece.values.numel(), data + at)
        for piece, at in zip(pieces, ends, strict=False)
    ]
    share = FileShare(owner, path.name, (0, data + ends[-1]), BLOCK, tuple(checksummed.checksums()), tuple(places))
    return share, {piece.name: TensorKind(_NAMES[piece.values.dtype], piece.shape) for piece in pieces}


def partition_pieces(shares: Iterable[FileShare], rank: int, world_size: int) -> Iterator[tuple[FileShare, int, int]]:
    """Yield (share, first block, last block) of what a rank reads: of all blocks in a row, as much as any other."""
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


def read_blocks(folder: Path, share: FileShare, first: int, last: int) -> Block:
    """Return the blocks [first, last) of a share, verified. Raises OSError; CheckpointError names a damaged file."""
    path, begin = folder / share.file, share.range[0] + first * share.block
    content = torch.empty(min(last * share.block, share.size) - first * share.block, dtype=torch.uint8)
    into = content.numpy().data
    with path.open("rb") as file:
        file.seek(begin)
        for number in range(first, last):
            block = into[(number - first) * share.block :][: share.block]
            if file.readinto(block) != len(block) or xxhash.xxh3_128_hexdigest(block) != share.xxh3_128[number]:
                raise CheckpointError(f"checkpoint file {path} is damaged: its checksum is not the manifest's")
    return Block(share.file, begin, content)


class _Checksummed:
    """Writes to a file and takes the checksum of every BLOCK bytes of it on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._filled = file, xxhash.xxh3_128(), 0
        self._checksums: list[str] = []

    def write(self, content: memoryview) -> None:
        while content:
            part, content = content[: BLOCK - self._filled], content[BLOCK - self._filled :]
            self._file.write(part)
            self._digest.update(part)
            self._filled += len(part)
            if self._filled == BLOCK:
                self._end_block()

    def checksums(self) -> list[str]:
        if self._filled:
            self._end_block()
        return self._checksums

    def _end_block(self) -> None:
        self._checksums.append(self._digest.hexdigest())
        self._digest, self._filled = xxhash.xxh3_128(), 0
