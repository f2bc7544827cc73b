"""Datasets and tables in S3, through s3fs, against an emulator on this machine."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.remote import FileCache
from bigdssm.errors import ConfigError, DataError
from bigdssm.ingest.api import make_dataset
from bigdssm.loader.stream import PairStream
from bigdssm.sources import columnar
from bigdssm.sources.opening import open_source
from bigdssm.utils import urls
from tests.object_store import Bucket, emulated_bucket
from tests.unit.sources.written_tables import TABLE, in_parts, write_arrow, write_folder, write_parquet

pytest.importorskip("s3fs"), pytest.importorskip("moto.server")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with emulated_bucket(monkeypatch) as emulated:
        yield emulated


def steps(dataset: Dataset, num_workers: int = 0) -> list[tuple[list[int], list[int]]]:
    stream = PairStream(dataset, rows_global=80, lanes=8, num_workers=num_workers)
    taken = [(r.row_ids.tolist(), r.query["history"].values.tolist()) for r in itertools.islice(stream, 14)]
    stream.close()
    return taken


def test_rows_damage_and_the_cache(
    bucket: Bucket,
    interactions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(urls, "FIRST_WAIT_S", 0.001)
    url, local = f"{bucket.url}/dt=1/data", Dataset.open(interactions)
    bucket.files.put(str(interactions), "bucket/dt=1/data", recursive=True)
    cache = FileCache(tmp_path / "cache", 1 << 30)
    dataset = Dataset.open(url, cache=cache)
    next(iter(dataset.iterate("test", 10)))  # this process is connected before the others are forked
    assert steps(dataset, num_workers=2) == steps(local)

    index, shards = dataset.index("train"), "bucket/dt=1/data/partitions/all"
    bucket.files.rm(f"{shards}/train-000000.tar")
    content = bytearray((interactions / "partitions/all/train-000001.tar").read_bytes())
    content[int(index.offset[4]) + 20] ^= 1
    bucket.files.pipe_file(f"{shards}/train-000001.tar", bytes(content))
    content = (interactions / "partitions/all/train-000002.tar").read_bytes()
    bucket.files.pipe_file(f"{shards}/train-000002.tar", content[: int(index.offset[9]) + 10])
    assert steps(dataset) == steps(local), "the cache has it"
    fresh = Dataset.open(url, cache=FileCache(tmp_path / "other", 1 << 30))
    rows = sum(len(rows) for rows in fresh.iterate("train", 100))
    assert rows == 1000 - int(index.rows[[0, 1, 2, 3, 4, 9, 10, 11]].sum())
    for reason in ("missing", "checksum", "cut short: 10 of", "cut short: 0 of"):
        assert reason in caplog.text
    bucket.files.rm("bucket/dt=1/data/schema.json")
    with pytest.raises(DataError, match=r"data/schema\.json does not exist"):
        Dataset.open(url, cache=cache)


def test_tables(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(columnar, "ROWS_PER_PART", 110)
    lines = "".join(json.dumps(row) + "\n" for row in TABLE.to_pylist())
    (tmp_path / "t.jsonl").write_text(lines)
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    write_parquet(tmp_path / "t.parquet")
    write_arrow(tmp_path / "t.feather", pa.ipc.new_file)
    write_folder(tmp_path / "t")
    bucket.files.put(str(tmp_path), "bucket/tables", recursive=True)
    for name in ("t.jsonl", "t.jsonl.gz", "t.parquet", "t.feather", "t", "t/"):
        url = f"{bucket.url}/tables/{name}"
        source, local = open_source(url), open_source(tmp_path / name)
        assert in_parts(source, "id", "number") == in_parts(local, "id", "number"), name
        assert (source.name, source.size()) == (url, local.size())
    source = open_source(f"{bucket.url}/tables/t.jsonl")
    before = source.fingerprint()
    bucket.files.pipe_file("bucket/tables/t.jsonl", lines.replace("000", "aaa").encode())  # of the same size
    assert source.fingerprint() != before
    with pytest.raises(DataError, match=r"table s3://bucket/tables/none\.csv does not exist"):
        open_source(f"{bucket.url}/tables/none.csv")
    bucket.files.pipe_file("bucket/tables/s.arrow", write_arrow(tmp_path / "s.arrow", pa.ipc.new_stream).read_bytes())
    with pytest.raises(DataError, match=r"s\.arrow is an Arrow stream, which has no index"):
        open_source(f"{bucket.url}/tables/s.arrow").parts()
    bucket.files.pipe_file("bucket/tables/bad.parquet", b"not Parquet")
    with pytest.raises(DataError, match=r"bad\.parquet is damaged or not of the format"):
        open_source(f"{bucket.url}/tables/bad.parquet").parts()


def test_a_dataset_is_built_from_and_written_to_a_bucket(bucket: Bucket, tmp_path: Path) -> None:
    pairs = pa.table({"q": [f"q{i}" for i in range(40)], "d": [f"d{i % 9}" for i in range(40)]})
    pq.write_table(pairs, tmp_path / "p.parquet")
    bucket.files.put_file(str(tmp_path / "p.parquet"), "bucket/tables/p.parquet")
    features = {"query": {"q": {"type": "categorical"}}, "doc": {"d": {"type": "categorical"}}}
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"run": {"dir": "nowhere"}, "data": {"dir": f"{bucket.url}/made", **features}}))
    tables = f"{bucket.url}/tables/p.parquet"
    assert str(make_dataset(config, pairs=tables, split="train").out) == f"{bucket.url}/made"
    make_dataset(config, pairs=tmp_path / "p.parquet", split="train", out=tmp_path / "made")
    there = Dataset.open(f"{bucket.url}/made", cache=FileCache(tmp_path / "cache", 1 << 30))
    assert there.fingerprint == Dataset.open(tmp_path / "made").fingerprint and there.num_rows("train") == 40
    with pytest.raises(DataError, match="s3://bucket/made already holds a dataset"):
        make_dataset(config, pairs=tables)
    with pytest.raises(ConfigError, match="cannot append to a dataset at a URL"):
        make_dataset(config, pairs=tables, partition="more", append=True)
    assert make_dataset(config, pairs=tables, split="train", overwrite=True).rows == {"train": 40}
