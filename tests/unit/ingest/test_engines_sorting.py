"""Sorting, lookup and counting by jobs agree with plain NumPy."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bigdssm.dataset.schema import SortedKeys, write_keys
from bigdssm.ingest.engines import (
    FirstRows,
    LocalEngine,
    RowFile,
    RowTable,
    float_sort_keys,
    read_bucket,
    shuffled,
    sort_key_to_float,
    stable_order,
    write_buckets,
)

RANDOM = np.random.RandomState(0)
NUMBERS = {
    "few": RANDOM.randint(-3, 3, 5_000).astype(float),
    "both zeros": np.array([0.0, -0.0, 0.0, -1.0, -0.0, 1.0]),
    "all of them": np.concatenate([[-np.inf, np.inf, 1e308, -1e308, 5e-324, -5e-324], RANDOM.randn(3_000)]),
    "seconds": RANDOM.randint(1.6e9, 1.7e9, 5_000).astype(float),
    "none": np.empty(0),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_an_order_by_radix_is_that_of_a_stable_sort(name: str) -> None:
    numbers = NUMBERS[name]
    assert stable_order(numbers).tolist() == np.argsort(numbers, kind="stable").tolist()
    keys = float_sort_keys(numbers)
    assert [sort_key_to_float(key) for key in keys.tolist()] == numbers.tolist()


def table_of(folder: Path, columns: dict[str, np.ndarray]) -> RowTable:
    """Return a table of three files."""
    size = len(next(iter(columns.values())))
    for number, (first, end) in enumerate(pairwise([0, size // 5, size // 2, size])):
        piece = pa.table({name: values[first:end] for name, values in columns.items()})
        pq.write_table(piece, folder / f"{number}.parquet", row_group_size=70)
    return RowTable.of(folder / f"{number}.parquet" for number in range(3))


def to_buckets(rows: pa.Table) -> tuple[pa.Table, np.ndarray]:
    return rows.select(["n"]), rows.column("bucket").to_numpy()


@pytest.mark.parametrize("num_buckets", [9, 302, 65_582])
def test_a_bucket_has_its_rows_in_their_order(
    num_buckets: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigdssm.ingest.engines.ROWS_PER_BUCKET_JOB", 150)
    some = [
        0,
        3,
        4,
        max(5, num_buckets - 44),
        num_buckets - 1,
    ]  # the last but one is 2 in the next smaller type (overflow)
    bucket = RANDOM.choice(some, 1_000)
    table = table_of(tmp_path, {"n": np.arange(1_000), "bucket": bucket})
    if num_buckets > 302:
        monkeypatch.setattr("bigdssm.ingest.engines.ROWS_PER_BUCKET_JOB", 1_000)
    buckets = write_buckets(LocalEngine(tmp_path / "spool"), "dealt", table, to_buckets, num_buckets)
    for number in (1, *some):
        assert read_bucket(buckets, number).column("n").to_pylist() == np.flatnonzero(bucket == number).tolist()


@pytest.mark.parametrize("rows_per_bucket", [7, 400, 10_000])
def test_rows_are_shuffled_by_their_hashes(
    rows_per_bucket: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigdssm.ingest.engines.ROWS_PER_BUCKET_JOB", 150)
    monkeypatch.setattr("bigdssm.ingest.engines.ROWS_PER_BUCKET", rows_per_bucket)
    hashes = RANDOM.randint(-(2**63), 2**63 - 1, 1_000)
    table = table_of(tmp_path, {"n": np.arange(1_000), "more": np.zeros(1_000), "shuffle": hashes})
    rows = shuffled(LocalEngine(tmp_path / "spool"), "train", table, ["n"]).read()
    assert rows.column_names == ["n"]
    assert rows.column("n").to_pylist() == np.argsort(hashes).tolist()


def test_lookups_return_the_last_occurrence_of_a_key(tmp_path: Path) -> None:
    ends = [-(2**63), 2**63 - 1, 0, -1]
    known, files = dict[int, int](), list[Path]()
    for number in range(3):
        keys = np.unique(np.append(RANDOM.randint(-(2**63), 2**63 - 1, 500), ends[: number + 2]))
        rows = RANDOM.permutation(len(keys)) + 1_000 * number
        files.append(tmp_path / f"{number}.npy")
        write_keys(files[-1], len(keys), zip(np.split(keys, [100, 100]), np.split(rows, [100, 100]), strict=True))
        known |= dict(zip(keys.tolist(), rows.tolist(), strict=True))
    near = np.array(list(known)[:200])[:, None] + [-1, 0, 1]  # neighbours of keys are not keys
    wanted = RANDOM.permutation(np.concatenate([list(known), ends, near.ravel()]))
    assert SortedKeys(files).find(wanted).tolist() == [known.get(key, -1) for key in wanted.tolist()]
    assert (
        SortedKeys(files).find(np.empty(0, np.int64)).tolist()
        == SortedKeys([]).find(np.empty(0, np.int64)).tolist()
        == []
    )
    assert SortedKeys([]).find(wanted[:2]).tolist() == [-1, -1]


@pytest.mark.parametrize("waiting", [10, 200, 10_000])
def test_first_rows_have_the_counts_of_all(waiting: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigdssm.ingest.engines.MAX_BUFFERED_ROWS", waiting)
    schema = pa.schema([("place", pa.int64()), ("key", pa.int64()), ("n", pa.int64())])
    keys = RANDOM.randint(0, 40, 1_000)
    with RowFile(tmp_path / "rows.parquet", schema) as file, FirstRows(file, "key", count="n") as rows:
        for first in range(0, 1_000, 90):
            piece = np.arange(first, min(first + 90, 1_000))
            rows.add(pa.table([piece, keys[piece], np.ones(len(piece), np.int64)], schema=schema))
    found = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    first_of, counts = dict[int, int](), Counter[int]()
    for row in found:
        first_of.setdefault(row["key"], row["place"])
        counts[row["key"]] += row["n"]
    assert counts == Counter(keys.tolist())
    assert first_of == {key: keys.tolist().index(key) for key in set(keys.tolist())}
    assert len(found) < 1_000
