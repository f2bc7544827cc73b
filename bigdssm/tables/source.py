"""Stub of the source interface."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bigdssm.tables.sources import check_table, read_table
from bigdssm.tables.webdataset_source import check_shard, is_shard, read_shard

Part = int


@dataclass(frozen=True)
class Source:
    path: Path
    ordered: bool = True

    @property
    def name(self):
        return str(self.path)

    def fingerprint(self):
        stat = self.path.stat()
        return f"{self.path.resolve()} {stat.st_size} {stat.st_mtime_ns}"

    def size(self):
        return self.path.stat().st_size

    def parts(self):
        return [0]

    def batches(self, part, columns, report_bad):
        yield from (read_shard if is_shard(self.path) else read_table)(self.path, columns, report_bad)


def open_source(path):
    path = Path(path)
    (check_shard if is_shard(path) else check_table)(path)
    return Source(path)
