"""A dataset in S3, through s3fs, against an emulator on this machine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bigdssm import urls
from bigdssm.dataset.cache import Cache
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import DataError
from bigdssm.streaming.stream import PairStream

s3fs, server_module = pytest.importorskip("s3fs"), pytest.importorskip("moto.server")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@dataclass(frozen=True)
class Store:
    """A bucket."""

    url: str
    files: Any  # fsspec's file system


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    files = s3fs.S3FileSystem()
    files.mkdir("bucket")
    yield Store("s3://bucket", files)
    server.stop()


def steps(dataset: Dataset, num_workers: int = 0) -> list[tuple[list[int], list[int]]]:
    stream = PairStream(dataset, rows_global=80, lanes=8, num_workers=num_workers)
    taken = [(r.row_ids.tolist(), r.query["history"].values.tolist()) for r in itertools.islice(stream, 14)]
    stream.close()
    return taken


def test_rows_damage_and_the_cache(
    bucket: Store, interactions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(urls, "FIRST_WAIT_S", 0.001)
    url, local = f"{bucket.url}/dt=1/data", Dataset.open(interactions)
    bucket.files.put(str(interactions), "bucket/dt=1/data", recursive=True)
    cache = Cache(tmp_path / "cache", 1 << 30)
    dataset = Dataset.open(url, cache=cache)
    next(iter(dataset.iterate("test", 10)))  # this process has its connections before the others are forked
    assert steps(dataset, num_workers=2) == steps(local)

    index, shards = dataset.index("train"), "bucket/dt=1/data/partitions/all"
    bucket.files.rm(f"{shards}/train-000000.tar")
    content = bytearray((interactions / "partitions/all/train-000001.tar").read_bytes())
    content[int(index.offset[4]) + 20] ^= 1
    bucket.files.pipe_file(f"{shards}/train-000001.tar", bytes(content))
    content = (interactions / "partitions/all/train-000002.tar").read_bytes()
    bucket.files.pipe_file(f"{shards}/train-000002.tar", content[: int(index.offset[9]) + 10])
    assert steps(dataset) == steps(local), "the cache has it"
    fresh = Dataset.open(url, cache=Cache(tmp_path / "other", 1 << 30))
    rows = sum(len(rows) for rows in fresh.iterate("train", 100))
    assert rows == 1000 - int(index.rows[[0, 1, 2, 3, 4, 9, 10, 11]].sum())
    for reason in ("missing", "checksum", "cut short: 10 of", "cut short: 0 of"):
        assert reason in caplog.text
    bucket.files.rm("bucket/dt=1/data/schema.json")
    with pytest.raises(DataError, match=r"data/schema\.json does not exist"):
        Dataset.open(url, cache=cache)
