"""A bucket in an emulator of S3 on the loopback interface."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from bigdssm.utils import urls


@dataclass(frozen=True)
class Bucket:
    """A bucket."""

    url: str
    files: Any  # fsspec's file system


@contextmanager
def emulated_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A context with a new bucket, which this process and those that it starts reach by its URL."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    s3fs.S3FileSystem.clear_instance_cache()  # instances of other tests are connected to their server
    urls._filesystem.cache_clear()
    files = s3fs.S3FileSystem()
    files.mkdir("bucket")
    yield Bucket("s3://bucket", files)
    files.rm("bucket", recursive=True)  # the emulator's buckets are the process's, not the server's
    server.stop()
