"""Any process can read any part of a table: together the parts are the table, with consecutive row numbers."""

from __future__ import annotations

import gzip
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import DataError
from bigdssm.sources import base, columnar
from bigdssm.sources.opening import open_source, read_table
from bigdssm.utils.urls import fetch
from tests.unit.commands.hostile_tables import RECORDS, Maker
from tests.unit.sources.written_tables import (
    ROWS,
    TABLE,
    in_parts,
    no_bad,
    write_arrow,
    write_folder,
    write_parquet,
    write_saved,
    zstd,
)

LZ4 = pa.ipc.IpcWriteOptions(compression="lz4")
PARTS = [100, 100, 50]
KINDS: dict[str, tuple[Callable[[Path], Path], list[int]]] = {
    "a Parquet file": (lambda folder: write_parquet(folder / "t.parquet"), PARTS),
    "a folder of Parquet files": (lambda folder: write_folder(folder / "t"), [100, 20, 100, 30]),
    "an Arrow file": (lambda folder: write_arrow(folder / "t.feather", pa.ipc.new_file, options=LZ4), PARTS),
    "an Arrow stream": (lambda folder: write_arrow(folder / "t.arrow", pa.ipc.new_stream), PARTS),
    "a saved dataset": (lambda folder: write_saved(folder / "t"), [100, 20, 100, 30]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_parts_make_the_whole_table_for_every_reader(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columnar, "ROWS_PER_PART", 110)
    write, sizes = KINDS[kind]
    path = write(tmp_path)
    source = open_source(path)
    rows = TABLE.slice(0, ROWS).select(["number", "kind", "id"]).to_pylist()
    read = in_parts(source, "number", "kind", "id")
    assert [len(part) for part in read] == sizes == [part.num_rows for part in source.parts()]
    assert [pair for part in read for pair in part] == list(enumerate(rows, 1))
    assert [part.first_row for part in source.parts()] == [part[0][0] for part in read]
    whole = pa.concat_tables(batch.table for batch in read_table(path, ["id"], no_bad))
    assert whole.column("id").to_pylist() == [row["id"] for row in rows] and source.name == str(path)
    assert source.size() == sum(
        file.stat().st_size for file in ([path] if path.is_file() else path.glob("[!_.s]*[tw]"))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_another_content_has_another_fingerprint(kind: str, tmp_path: Path) -> None:
    path = KINDS[kind][0](tmp_path)
    before = open_source(path).fingerprint()
    assert before == open_source(path).fingerprint()
    last = (
        path if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in (".parquet", ".arrow"))[-1]
    )
    os.utime(last, ns=(0, 0))
    assert open_source(path).fingerprint() != before


@pytest.mark.parametrize("compress", [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstd)])
def test_text_at_a_url_is_read_in_few_requests(
    compress: tuple[str, Callable[[bytes], bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    suffix, compressed = compress
    digits = np.random.RandomState(0).randint(1 << 60, size=1 << 16)
    url, content = f"memory://t.csv{suffix}", "\n".join(["id", *map(str, digits)]).encode()
    fsspec.filesystem("memory").pipe_file(url, compressed(content))
    requests: list[int] = []
    monkeypatch.setattr(
        base, "fetch", lambda url, at, size, is_valid: requests.append(at) or fetch(url, at, size, is_valid)
    )
    assert sum(len(batch.rows) for batch in read_table(url, ["id"], no_bad)) == len(digits)
    assert len(content) > 1 << 20 and len(requests) <= 4, "the header, and the content in large pieces"


def test_batches_of_arrow_are_neither_tiny_nor_huge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columnar, "ROWS_PER_BATCH", 70)
    path = write_arrow(tmp_path / "t.arrow", pa.ipc.new_file)
    assert [len(batch.rows) for batch in read_table(path, ["id"], no_bad)] == [100, 100, 50]
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, TABLE.schema) as writer:
        writer.write_table(TABLE)
    assert [len(batch.rows) for batch in read_table(path, ["id"], no_bad)] == [70, 70, 70, 40]
    monkeypatch.setattr(columnar, "BYTES_PER_BATCH", 240)  # 8 per number
    assert {len(batch.rows) for batch in read_table(path, ["number"], no_bad)} == {30, 10}


def test_bad_strings_of_arrow_are_bad_rows(tmp_path: Path) -> None:
    wrong = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    bad: list[tuple[Any, ...]] = []
    path = write_arrow(tmp_path / "t.arrow", pa.ipc.new_file, pa.table({"id": wrong, "n": [1, 2, 3]}))
    read = [
        row
        for batch in read_table(path, ["id", "n"], lambda *told: bad.append(told[:3]))
        for row in batch.table.to_pylist()
    ]
    assert read == [{"id": "a", "n": 1}, {"id": "c", "n": 3}]
    assert bad == [(str(path), 2, "invalid UTF-8 in column 'id'")]


def outside_itself(path: Path) -> None:
    """Write an Arrow file with string offsets out of range."""
    offsets = np.array([0, 1, 1 << 30, 3], np.int32)
    wrong = pa.StringArray.from_buffers(3, pa.py_buffer(offsets.tobytes()), pa.py_buffer(b"abc"))
    write_arrow(path, pa.ipc.new_file, pa.table({"id": wrong}))


def split_folder(folder: Path) -> None:
    write_saved(folder / "train", folder.mkdir())
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')


def open_stream(path: Path) -> None:
    """Write an Arrow stream whose writer was not closed: it ends after a batch."""
    with pa.OSFile(str(path), "wb") as file:
        pa.ipc.new_stream(file, TABLE.schema).write_table(TABLE)


REFUSED: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "nothing": ("t", lambda p: p.mkdir(), r"table .*/t is not a file, and as a folder it has no \.parquet files"),
    "others": ("t", lambda p: (p.mkdir(), (p / "a.csv").write_text("x")), r"has 'a\.csv'; move it away"),
    "partitioned": (
        "t",
        lambda p: (p / "dt=1").mkdir(parents=True),
        "has 'dt=1'; .* give the files or folders in it",
    ),
    "a command": ("pipe:cat x.tar", lambda p: None, "commands are not run"),
    "splits": ("t", split_folder, r"several splits of a dataset; give one of them: .*/t/train, .*/t/test"),
    "an index": (
        "t",
        lambda p: write_saved(p, {"_indices_data_files": [{"filename": "indices.arrow"}]}),
        r"by an indices mapping; .*flatten_indices\(\)",
    ),
    "outside": (
        "t",
        lambda p: write_saved(p, {"_data_files": [{"filename": "../x.arrow"}]}),
        r"'\.\./x\.arrow', not one in",
    ),
    "lost": (
        "t",
        lambda p: write_saved(p, {"_data_files": [{"filename": "x.arrow"}]}),
        r"x\.arrow does not exist, but state",
    ),
    "state": ("t", lambda p: write_saved(p, {"_data_files": [1]}), r"state\.json is of another format"),
    "broken": ("t", lambda p: (write_saved(p), (p / "state.json").write_text("[1")), r"state\.json is damaged"),
    "Arrow": ("t.arrow", lambda p: p.write_bytes(b"ARROW1 or not"), "is damaged or not of the format of its name"),
    "an open stream": ("t.arrow", open_stream, "nor a stream with an end marker, so that batches may be missing"),
    "empty": ("t.feather", lambda p: p.write_bytes(b""), "is damaged or not of the format of its name"),
    "offsets": ("t.arrow", outside_itself, "is damaged or not of the format of its name, after row 0"),
    "columns": (
        "t.feather",
        lambda p: write_arrow(p, pa.ipc.new_file, TABLE.rename_columns(["idd", "k", "n"])),
        "did you mean",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unreadable_tables_give_a_one_line_error(case: str, tmp_path: Path) -> None:
    name, write, message = REFUSED[case]
    path = Path(name) if name.startswith("pipe:") else tmp_path / name
    write(path)
    with pytest.raises(DataError, match=message) as caught:
        list(read_table(path, ["id"], no_bad))
    assert "\n" not in str(caught.value)


def test_a_damaged_file_of_a_folder_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "t")
    (folder / "part-00001.snappy.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(DataError, match=r"part-00001\.snappy\.parquet is damaged or not of the format of its name"):
        list(read_table(folder, ["id"], no_bad))


def test_folders_and_files_build_the_same_dataset(tmp_path: Path, capsys: Any) -> None:
    make = Maker(tmp_path, capsys)
    assert make.parquet()[0] == 0
    expected = Dataset.open(make.out).fingerprint
    table = pq.read_table(tmp_path / "pairs.parquet")
    (tmp_path / "several").mkdir()
    for number in range(2):
        pq.write_table(table.slice(number * 25, 25 + number * 10), tmp_path / "several" / f"part-{number}.parquet")
    assert len(RECORDS) == 60 and make.pairs("--overwrite", table="several")[0] == 0
    assert Dataset.open(make.out).fingerprint == expected
