"""Damaged rows are reported, counted and skipped; steps do not change; above the limit the stream stops."""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from bigdssm.dataset import blocks as blocks_module
from bigdssm.dataset.blocks import BlockLayout, decode, max_decoded_size
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.dataset.schema import Schema
from bigdssm.errors import DataError
from bigdssm.features import Text
from bigdssm.loader.stream import PairStream
from tests.tiny_datasets import Writer, block_bytes, checksum, write_index

STEPS, ROWS_GLOBAL, LANES = 21, 48, 8
FIRST_SHARD = "partitions/all/train-000000.tar"


@pytest.fixture
def copy(interactions: Path, tmp_path: Path) -> Path:
    return shutil.copytree(interactions, tmp_path / "copy")


def read(folder: Path, tmp_path: Path, **arguments: object) -> tuple[list[Rows], list[dict], PairStream]:
    """Return an epoch's steps, the quarantine's lines, and the stream."""
    quarantine = tmp_path / "run" / "quarantine.jsonl"
    stream = PairStream(
        folder, rows_global=ROWS_GLOBAL, lanes=LANES, max_bad_fraction=1.0, quarantine=quarantine, **arguments
    )  # type: ignore[arg-type]
    rows = list(islice(stream, STEPS))
    stream.close()
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()] if quarantine.exists() else []
    return rows, lines, stream


def missing(rows: list[Rows]) -> list[int]:
    return sorted(set(range(1000)) - set(np.concatenate([part.row_ids for part in rows]).tolist()))


def block_entry(folder: Path, block: int) -> tuple[Path, int, int]:
    index = Dataset.open(folder).index("train")
    return index.shards[index.shard[block]], int(index.offset[block]), int(index.size[block])


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def flip_payload(folder: Path) -> None:
    path, offset, size = block_entry(folder, 1)
    flip(path, offset + size // 2)


def cut_in_data(folder: Path) -> None:
    path, offset, size = block_entry(folder, 1)
    with path.open("r+b") as file:
        file.truncate(offset + size // 2)


def cut_in_header(folder: Path) -> None:
    path, offset, _ = block_entry(folder, 1)
    with path.open("r+b") as file:
        file.truncate(offset - 256)


def delete(folder: Path) -> None:
    (folder / FIRST_SHARD).unlink()


def swap(folder: Path) -> None:
    shutil.copy(folder / "partitions/all/train-000001.tar", folder / FIRST_SHARD)


FILE_DAMAGE: dict[str, tuple[Callable[[Path], None], list[int], str]] = {
    "payload byte flipped": (flip_payload, [1], "the bytes are damaged"),
    "cut in data": (cut_in_data, [1, 2, 3], "the shard is cut short"),
    "cut in a header": (cut_in_header, [1, 2, 3], "the shard is cut short"),
    "shard deleted": (delete, [0, 1, 2, 3], "the shard is missing"),
    "another shard's content": (swap, [0, 1, 2, 3], "the bytes are damaged"),
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("damage", list(FILE_DAMAGE))
def test_damaged_files_cost_their_blocks_and_nothing_else(
    copy: Path, tmp_path: Path, damage: str, num_workers: int
) -> None:
    spoil, blocks, reason = FILE_DAMAGE[damage]
    spoil(copy)
    rows, lines, stream = read(copy, tmp_path, num_workers=num_workers)
    assert len(rows) == STEPS
    assert all((part.position == part.row_ids % 30).all() for part in rows)  # the others are unchanged
    assert missing(rows) == [row for block in blocks for row in range(64 * block, 64 * block + 64)]
    assert sorted({(line["block"], line["row"]) for line in lines}) == [(block, None) for block in blocks]
    assert len(lines) == len(blocks)
    assert all(line["shard"] == str(copy / FIRST_SHARD) and reason in line["reason"] for line in lines)
    assert stream.rows_read == STEPS * ROWS_GLOBAL
    assert 64 * len(blocks) <= stream.rows_bad < 64 * len(blocks) + 64  # step 21 includes rows of the second epoch


def test_a_resumed_run_names_no_block_twice(copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cut_in_data(copy)
    _, first, _ = read(copy, tmp_path)
    quarantine = tmp_path / "run" / "quarantine.jsonl"
    lines = quarantine.read_bytes().splitlines(keepends=True)
    quarantine.write_bytes(b"".join(lines[:-1]) + lines[-1][:30])  # killed while writing the third
    caplog.clear()
    _, again, _ = read(copy, tmp_path, start_step=5)
    assert len(first) == 3 and again == first
    assert caplog.text.count("skipped: ") == 3  # of this process


def test_a_flipped_header_byte_costs_nothing(copy: Path, tmp_path: Path) -> None:
    _, offset, _ = block_entry(copy, 1)
    flip(copy / FIRST_SHARD, offset - 512 + 3)
    rows, lines, _ = read(copy, tmp_path)
    assert (missing(rows), lines) == ([], [])


def put_block(folder: Path, content: bytes, rows: int = 64) -> None:
    """Replace block 0 by other bytes, and update the index."""
    shard = folder / "partitions/all/evil.tar"
    shard.write_bytes(bytes(512) + content)
    path = folder / "partitions/all/train.index.arrow"
    table = pa.ipc.open_file(path.read_bytes()).read_all().to_pydict()
    names = ("shard", "offset", "size", "rows", "queries", "checksum")
    entries = list(zip(*(table[name] for name in names), strict=True))
    entries[0] = ("evil.tar", 512, len(content), rows, rows, xxhash.xxh3_64_intdigest(content))
    write_index(path, entries)
    partition = folder / "partitions/all/partition.json"
    facts = json.loads(partition.read_text())
    facts["splits"]["train"]["index_checksum"] = checksum(path)
    partition.write_text(json.dumps(facts))


def spoil(columns: dict[str, pa.Array], name: str, row: int, value: object) -> dict[str, pa.Array]:
    values = columns[name].to_pylist()
    values[row] = value
    return {**columns, name: pa.array(values, columns[name].type)}


BAD_PAIRS = {
    "NaN relevance": ("relevance", float("nan"), "relevance is nan"),
    "infinite relevance": ("relevance", float("inf"), "relevance is inf"),
    "negative relevance": ("relevance", -1.0, "relevance is -1.0"),
    "unknown document": ("doc", 37, "unknown document: 37 is not a row of the catalogue's 37"),
    "negative document": ("doc", -1, "unknown document: -1"),
}
BAD_PIECES = {
    "unknown sequence": ("sequence", 11, "sequence 11 is not a row of the partition's 11"),
    "end beyond the sequence": ("end", 31, "targets 17 to 31 are outside its sequence of 30 events"),
    "negative first": ("first", -1, "targets -1 to 18 are outside its sequence"),
    "no target": ("end", 17, "targets 17 to 17 are outside its sequence"),
}
BAD_TEXT_ROWS = {
    "empty text": ("words", [], "words has 0 tokens, needs 1 to 6"),
    "5 MB in one field": ("words", [3] * 1_250_000, "words has 1250000 tokens, needs 1 to 6"),
    "unknown token": ("words", [1, 53], "words has a token id outside the schema's 53"),
    "code out of range": ("job", 99, "job has a code outside the schema's 5"),
    "multi-valued code": ("likes", [2, -7], "likes has a code outside the schema's 5"),
}


@pytest.mark.parametrize("case", [*BAD_PAIRS, *BAD_PIECES, *BAD_TEXT_ROWS])
def test_bad_rows_are_left_out_one_by_one(case: str, tmp_path: Path) -> None:
    writer = Writer(tmp_path / "data", text=case in BAD_TEXT_ROWS, interactions=case in BAD_PIECES)
    folder = writer.write()
    name, value, reason = (BAD_PAIRS | BAD_PIECES | BAD_TEXT_ROWS)[case]
    put_block(folder, block_bytes(spoil(writer.columns(0, 64, 0), name, 17, value)))
    rows, lines, stream = read(folder, tmp_path)
    assert missing(rows) == [17]
    assert [(line["block"], line["row"], line["rows"]) for line in lines] == [(0, 17, 1)]
    assert reason in lines[0]["reason"]
    assert stream.rows_bad == 1


def cast(columns: dict[str, pa.Array], name: str, to: pa.DataType) -> dict[str, pa.Array]:
    return {**columns, name: columns[name].cast(to)}


BAD_BLOCKS: dict[str, tuple[Callable[..., bytes], str]] = {
    "a missing column": (
        lambda c: block_bytes({n: v for n, v in c.items() if n != "end"}), "it has no column end"
    ),
    "another type": (
        lambda c: block_bytes(cast(c, "end", pa.float64())), "column end is double, needed is int32"
    ),
    "nulls": (lambda c: block_bytes(spoil(c, "end", 0, None)), "column end has nulls"),
    "fewer rows": (
        lambda c: block_bytes({n: v.slice(1) for n, v in c.items()}), "it has 63 rows, the index has 64"
    ),
    "no Arrow": (lambda c: b"\x80\x04}q\x00." * 20, "not an Arrow stream"),
    "half an Arrow stream": (lambda c: block_bytes(c)[:-300], "it cannot be used"),
    "a dictionary": (
        lambda c: block_bytes({**c, "end": c["end"].dictionary_encode()}), "with dictionaries"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD_BLOCKS))
def test_foreign_blocks_are_skipped_entirely(case: str, tmp_path: Path) -> None:
    writer = Writer(tmp_path / "data")
    folder = writer.write()
    make, reason = BAD_BLOCKS[case]
    put_block(folder, make(writer.columns(0, 64, 0)))
    rows, lines, _ = read(folder, tmp_path)
    assert missing(rows) == list(range(64))
    assert {(line["block"], line["row"]) for line in lines} == {(0, None)}
    assert reason in lines[0]["reason"]


def test_a_block_that_would_fill_the_memory_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks_module, "MAX_DECODED_BYTES", 1 << 24)
    writer = Writer(tmp_path / "data")
    folder = writer.write()
    bomb = block_bytes({**writer.columns(0, 64, 0), "extra": pa.array([b"\0" * (1 << 20)] * 64, pa.large_binary())})
    assert len(bomb) < 1 << 16
    assert max_decoded_size(bomb) > 1 << 26
    put_block(folder, bomb)
    before = pa.default_memory_pool().max_memory()
    rows, lines, _ = read(folder, tmp_path)
    assert missing(rows) == list(range(64))
    assert "bytes decoded, more than the" in lines[0]["reason"]
    assert pa.default_memory_pool().max_memory() - before < 1 << 24


def test_a_block_of_raw_text_that_is_not_utf8_is_refused() -> None:
    """Texts that are tokenized while reading must be UTF-8; make_shards never writes others."""
    words = {"words": Text(max_tokens=6).with_name("words")}
    layout = BlockLayout.of(Schema(words, {}), num_docs=(1,), vocab_size=9, sequences=(), raw_text=True)
    for text, good in ((b"na\xc3\xafve", True), (b"na\xefve", False)):
        offsets = pa.py_buffer(np.array([0, len(text)], np.int64))
        columns = {
            "query_id": pa.array([1]), "relevance": pa.array([1.0], pa.float32()), "doc": pa.array([0]),
            "words": pa.Array.from_buffers(pa.large_string(), 1, [None, offsets, pa.py_buffer(text)]),
        }  # fmt: skip
        content = block_bytes(columns)
        if good:
            assert decode(content, layout).column("words").to_pylist() == ["naïve"]
        else:
            with pytest.raises(pa.ArrowInvalid, match="UTF8"):
                decode(content, layout)


@pytest.mark.parametrize("position", range(0, 1200, 7))
def test_no_flipped_byte_of_a_block_crashes_the_reader(position: int, tmp_path: Path) -> None:
    """Offsets and lengths are validated before use, even if index and checksum match."""
    content = bytearray(block_bytes(Writer(tmp_path).columns(0, 64, 0), compression=None))
    content[position % len(content)] ^= 0xFF
    folder = Writer(tmp_path / "data").write()
    layout = Dataset.open(folder).layout
    try:
        batch = blocks_module.decode(bytes(content), layout)
    except (ValueError, OSError, pa.ArrowException):
        return
    assert batch.schema.names == list(layout.types)


@pytest.mark.parametrize("value", [-4, 3, 1 << 30])
def test_list_offsets_that_point_elsewhere_are_refused(value: int, tmp_path: Path) -> None:
    writer = Writer(tmp_path / "data", text=True, interactions=False)
    layout = Dataset.open(writer.write()).layout
    columns = writer.columns(0, 64, 0)
    content = block_bytes(columns, compression=None)
    offsets = columns["words"].offsets.to_numpy()
    spoilt = offsets.copy()
    spoilt[40] = value
    assert content.count(offsets.tobytes()) == 1
    with pytest.raises((pa.ArrowInvalid, ValueError)):
        blocks_module.decode(content.replace(offsets.tobytes(), spoilt.tobytes()), layout)


def test_past_the_limit_the_stream_stops(copy: Path, tmp_path: Path) -> None:
    flip_payload(copy)  # 64 of 1,000 rows
    arguments = {"rows_global": 40, "lanes": LANES, "quarantine": tmp_path / "q.jsonl"}  # 25 steps are an epoch
    stream = PairStream(copy, max_bad_fraction=0.063, **arguments)
    with pytest.raises(
        DataError, match=r"rows read are bad, more than data.max_bad_fraction=0.063 allows \(63\).*q.jsonl"
    ):
        list(islice(stream, 25))
        stream.check()  # as before a checkpoint
    assert stream.rows_bad == 64
    for start_step in (0, 10):  # 10: the first rows are the end of one epoch and the start of the next
        stream = PairStream(copy, max_bad_fraction=0.065, start_step=start_step, **arguments)
        assert len(list(islice(stream, 200))) == 200


def test_a_bad_row_early_in_a_good_dataset_does_not_stop_it(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "data")
    folder = writer.write()
    put_block(folder, block_bytes(spoil(writer.columns(0, 64, 0), "end", 17, -1)))
    stream = PairStream(folder, rows_global=8, lanes=8, max_bad_fraction=0.001)
    assert len(list(islice(stream, 300))) == 300  # 1 of 1,000, although temporarily 1 of fewer rows


def test_iterate_warns_of_skipped_rows(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = copy / "partitions/all/test-000000.tar"
    index = Dataset.open(copy).index("test")
    flip(path, int(index.offset[0]) + 100)
    with caplog.at_level(logging.WARNING):
        rows = list(Dataset.open(copy).iterate("test", 30))
    assert np.concatenate([part.row_ids for part in rows]).tolist() == list(range(64, 100))
    assert "test-000000.tar, block 0: the bytes are damaged" in caplog.text


def test_decoded_size_matches_decoded_memory() -> None:
    columns = {"a": pa.array(np.zeros(10_000)), "b": pa.array([[1, 2]] * 10_000, pa.list_(pa.int32()))}
    for compression in (None, "zstd"):
        content = block_bytes(columns, compression)
        decoded = pa.ipc.open_stream(io.BytesIO(content)).read_all()
        assert decoded.nbytes <= max_decoded_size(content) <= decoded.nbytes + 64
