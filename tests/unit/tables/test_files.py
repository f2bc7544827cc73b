"""Row files: blocks are verified when they are first read, and written one by one."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from bigdssm.errors import CheckpointError, DiskFullError
from bigdssm.tables.files import (
    BLOCK_ROWS,
    MappedTables,
    RowFile,
    RowSource,
    store_sources,
    write_row_file,
)
from bigdssm.tables.optimizers import RowwiseAdagrad
from bigdssm.tables.rows import RowPartition, RowStore, TableSpec
from bigdssm.tables.sharded import ShardedTables

DIM, BLOCKS = 4, 3
ROWS = BLOCKS * BLOCK_ROWS - 100
SPECS = {"items": TableSpec("items", 3 * ROWS, DIM), "none": TableSpec("none", 10, 2, dtype=torch.bfloat16)}


def trained() -> ShardedTables:
    """Return a table of which every third row was updated."""
    tables = ShardedTables(list(SPECS.values()), RowwiseAdagrad(lr=0.1), 0)
    working = tables.fetch({"items": np.arange(1, 3 * ROWS, 3)})
    positions = torch.arange(1, ROWS + 1)
    (working.look_up("items", positions) * positions[:, None]).sum().backward()
    tables.reduce(working)
    tables.commit(1.0, 1.0)
    return tables


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_row_file(tmp_path / "rows.safetensors", store_sources(trained()))
    return tmp_path / "rows.safetensors"


def flip(path: Path, tensor: str, byte: int) -> None:
    """Flip a bit of a tensor in a file."""
    array, content = RowFile(path)._arrays[tensor], bytearray(path.read_bytes())
    content[content.index(array.tobytes()) + byte] ^= 16
    path.write_bytes(content)


def test_a_row_file_has_the_updated_rows(path: Path) -> None:
    tables, mapped = trained(), MappedTables([[path]], SPECS)
    rows = torch.arange(3 * ROWS).view(3, -1).flip(0)
    assert torch.equal(mapped.look_up("items", rows), tables.look_up("items", rows))
    every = torch.arange(10)
    assert torch.equal(mapped.look_up("none", every), tables.look_up("none", every))
    content = list(mapped.contents("items", lambda rows: rows % 2 == 0, states=False))
    expected = tables.stores["items"].content(tables.steps, states=False)
    even = expected["rows"] % 2 == 0
    assert [torch.equal(content[0][key], expected[key][even]) for key in ("rows", "values")] == [True, True]
    mapped.write(path.parent / "copy")
    assert (path.parent / "copy" / "rows-00000.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("tensor", "bytes_per_row"), [("rows", 8), ("values", 4 * DIM)])
def test_a_damaged_block_is_refused_when_it_is_read(path: Path, tensor: str, bytes_per_row: int) -> None:
    tables, checksum = trained(), RowFile(path).checksum
    flip(path, f"items/{tensor}", (BLOCK_ROWS + 7) * bytes_per_row)
    assert RowFile(path).checksum == checksum  # rows are not read
    mapped = MappedTables([[path]], SPECS)
    blocks = torch.arange(1, 3 * ROWS, 3).split(BLOCK_ROWS)
    message = rf"rows\.safetensors is damaged: block 1 of items/{tensor}, rows 4096 to 8191 of 12188 in the file, has "
    for _ in range(2):
        for intact in (blocks[0], blocks[2], blocks[0] + 1):
            assert torch.equal(mapped.look_up("items", intact), tables.look_up("items", intact))
        with pytest.raises(CheckpointError, match=message + r"the digest \w{32}, needs \w{32}; copy the folder again"):
            mapped.look_up("items", blocks[1][-1:])
    with pytest.raises(CheckpointError, match=message):
        list(mapped.contents("items", lambda rows: rows > 0, states=False))


@pytest.mark.parametrize("tensor", ["items/rows/first", "items/values/digests", "items/key", "digest"])
def test_a_damaged_index_is_refused_at_once(path: Path, tensor: str) -> None:
    flip(path, tensor, 3)
    with pytest.raises(CheckpointError, match="is damaged: its index does not match its digest; copy the folder again"):
        MappedTables([[path]], SPECS)


def test_incomplete_files_are_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"is not a row file: it has \d+ bytes, needs \d+; copy the folder again"):
        RowFile(path)
    write_row_file(path, {"items": RowSource(1, np.arange(3), lambda some: {"rows": torch.arange(3)[some]})})
    with pytest.raises(CheckpointError, match="does not hold the table items of width 4 with digests; copy it again"):
        MappedTables([[path]], {"items": SPECS["items"]})


def test_a_file_is_written_in_blocks(path: Path) -> None:
    source = store_sources(trained())["items"]
    most = 0

    def read(some: slice) -> dict[str, torch.Tensor]:
        nonlocal most
        content = source.read(some)
        most = max(most, len(content["rows"]))
        return content

    write_row_file(path, {"items": RowSource(source.key, source.rows, read)})
    assert most == BLOCK_ROWS


@pytest.mark.parametrize("rows", [20_000, 1 << 33], ids=["direct", "keyed"])
def test_pages_of_a_table_in_files_have_blocks_before_they_are_written(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, draws = TableSpec("items", rows, 24, admit_after=2), np.random.default_rng(0)

    def store(folder: Path | None) -> RowStore:
        return RowStore(spec, 1, RowPartition(0, 1), RowwiseAdagrad(lr=0.1), torch.device("cpu"), folder)

    in_files, in_memory = store(tmp_path), store(None)
    for step in range(8):
        some = np.unique(draws.integers(2, rows, 150))
        gradients = torch.randn(len(some), 24)
        for one in (in_files, in_memory):
            one.update(some, gradients, 1.0, step)
        assert torch.equal(in_files.read(some, step + 1), in_memory.read(some, step + 1))
        for file in in_files._files.values():
            pages = np.frombuffer(file.mapped, np.uint8)
            written = np.add.reduceat(pages.astype(np.int64), np.arange(0, len(pages), mmap.PAGESIZE)) > 0
            assert not (written & ~file._reserved).any()
    for key, tensor in in_memory.content(9, states=True).items():
        assert torch.equal(in_files.content(9, states=True)[key], tensor)
    assert rows > 20_000 or not in_files._files["values"]._reserved.all(), "the file stays sparse"

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    in_files.read(np.arange(2, 2000), 9)
    with pytest.raises(DiskFullError, match=f"more space in {tmp_path}: No space left on device; free some, or choose"):
        in_files.update(np.arange(2, 2000), torch.ones(1998, 24), 1.0, 9)
    with pytest.raises(DiskFullError):
        store(tmp_path)
