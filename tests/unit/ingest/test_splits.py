"""Thresholds of splits by time are computed without a global sort, and equal those of a sort."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bigdssm.ingest.engines import LocalEngine, RowTable
from bigdssm.ingest.splits import quantiles

RANDOM = np.random.RandomState(0)
TIMES = {
    "seconds": RANDOM.randint(1.6e9, 1.7e9, 20_000).astype(float),
    "one": np.full(100, 3.5),
    "nearly all are one": np.append(np.full(5_000, 1.7e9), RANDOM.randint(0, 2e9, 50)),
    "far and near": np.concatenate([[-3e38, 3e38], 1.7e9 + RANDOM.rand(5_000), RANDOM.rand(5_000) * 1e-320]),
    "the last bit tells them apart": 1e15 + np.arange(2_000) * 0.125,
}


@pytest.mark.parametrize("name", TIMES)
def test_quantiles_are_those_of_a_sort(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = RANDOM.permutation(TIMES[name])
    monkeypatch.setattr("bigdssm.ingest.splits.ROWS_PER_RUN", 999)
    pq.write_table(pa.table({"time": times}), tmp_path / "times.parquet")
    shares = [0, 0.003, 0.5, 0.9, 0.95, 0.9999, 1]
    wanted = [np.sort(times)[int(len(times) * share)] for share in shares[:-1]]
    found = RowTable.of([tmp_path / "times.parquet"])
    assert quantiles(LocalEngine(tmp_path / "spool"), found, shares) == [*wanted, np.inf]
