"""A making on Apache Spark, in however many partitions, writes what the built-in engine does, byte for byte."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from bigdssm.commands.make_shards import main
from bigdssm.config import load_config
from bigdssm.distributed import free_port
from bigdssm.errors import ConfigError, DataError
from bigdssm.making.interactions import InteractionTables, make_interactions
from bigdssm.making.making import Target
from bigdssm.making.pairs import PairTables, make_pairs
from bigdssm.making.spark import Cluster
from tests.e2e.runs import ROOT

pyspark = pytest.importorskip("pyspark")
if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
    pytest.skip("needs Java", allow_module_level=True)
pytestmark = pytest.mark.slow

SMALL = Path(__file__).parent / "small_sizes"
DATA: dict[str, dict[str, Any]] = {
    "interactions": {
        "query": {
            "history": {"type": "history", "of": "item_id", "max_items": 10},
            "age": {"type": "numeric"},
            "job": {"type": "categorical"},
        },
        "doc": {
            "item_id": {"type": "categorical"},
            "title": {"type": "text", "max_tokens": 8},
            "year": {"type": "numeric"},
        },
    },
    "pairs": {
        "query": {"query": {"type": "text", "max_tokens": 8}},
        "doc": {
            "text": {"type": "text", "max_tokens": 16},
            "tags": {"type": "categorical", "multi": True},
            "shape": {"type": "vector", "dim": 3},
            "size": {"type": "numeric", "log": True},
        },
    },
}
COLUMNS: dict[str, dict[str, Any]] = {
    "interactions": {"rating_column": "rating", "min_rating": 2.0},
    "pairs": {"doc_id_column": "id", "relevance_column": "relevance", "dedup": True, "validation_fraction": 0.1},
}
SPLITS: dict[str, list[dict[str, Any]]] = {  # of the first partition, and of the one that is appended
    "interactions": [{"split": "leave-one-out"}, {"split": "time"}],
    "pairs": [{"whole_documents": True, "split_column": "group"}, {"split": "time", "split_column": "time"}],
}
WORDS = "river stone bridge lantern copper meadow signal harbor winter violet engine mirror saddle basket".split()


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Make the constants small, here and in all processes that are started from here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SMALL))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(SMALL), str(ROOT)]))
        import sizes

        sizes.make_small(patch.setattr)
        yield


@pytest.fixture(scope="module")
def session(small: None) -> Iterator[Any]:
    builder = pyspark.sql.SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
    session = builder.config("spark.sql.warehouse.dir", "file:///nowhere").getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    yield session
    session.stop()


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parquet folders events, items, users, pairs, and more of each (…2), with some bad rows; and configs."""
    root, random = tmp_path_factory.mktemp("tables"), np.random.default_rng(0)
    title = [f"{WORDS[i % 14]} {WORDS[i * 5 % 13]}" for i in range(200)]
    for part, first in (("", 0), ("2", 60)):
        items = np.arange(first, first + 130)
        write(root / f"items{part}", 2, item_id=[f"i{i}" for i in items], title=[title[i] for i in items],
              year=[None if i % 9 == 0 else 1950.5 + i for i in items])  # fmt: skip
        users = np.arange(first // 2, first // 2 + 70)
        write(root / f"users{part}", 2, user_id=[f"u{u}" for u in users], age=users % 50 / 3,
              job=[f"job{u % 7}" for u in users])  # fmt: skip
        who, what = random.integers(users[0], users[-1] + 3, 1500), random.integers(first, first + 131, 1500)
        write(root / f"events{part}", 3, user_id=[f"u{u}" for u in who], item_id=[f"i{i}" for i in what],
              timestamp=random.integers(0, 400, 1500), rating=random.integers(1, 6, 1500))  # fmt: skip
        docs = random.integers(first, first + 110, 1200)
        write(
            root / f"pairs{part}", 3,
            query=[f"{WORDS[random.integers(14)]} {WORDS[random.integers(14)]}" for _ in docs],
            id=[f"d{d}" for d in docs],
            text=[f"{title[d]} {d}" for d in docs],
            tags=[[f"t{d % 5}", f"t{d % 11}"][: d % 3] for d in docs],
            shape=[[d / 7, 1.0, -d / 3] for d in docs],
            size=docs * 37.5,
            relevance=random.integers(0, 3, len(docs)),
            group=[None if row % 2 else f"g{row % 301}" for row in range(len(docs))],
            time=random.integers(0, 100, len(docs)),
        )  # fmt: skip
    for kind, data in DATA.items():
        settings = {"dir": "nowhere", "tokenizer": {"vocab_size": 120}, "max_bad_fraction": 0.2, "lanes": 2}
        (root / f"{kind}.yaml").write_text(yaml.safe_dump({"run": {"dir": "nowhere"}, "data": settings | data}))
    return root


def write(folder: Path, files: int, **columns: Any) -> None:
    folder.mkdir()
    table = pa.table(columns)
    for number, first in enumerate(range(0, table.num_rows, -(-table.num_rows // files))):
        rows = table.slice(first, -(-table.num_rows // files))
        pq.write_table(rows, folder / f"part-{number}.parquet", row_group_size=90)


def make(tables: Path, kind: str, out: Path, **engine: Any) -> dict[str, bytes]:
    """Make a dataset and append to it; return the content of all its files."""
    config = load_config(tables / f"{kind}.yaml").data
    for part, split in zip(("", "2"), SPLITS[kind], strict=True):
        target = Target(out / "dataset", f"day{part}", append=bool(part), **engine)
        if kind == "pairs":
            folder = tables / f"pairs{part}"
            again = sorted(folder.iterdir())[0]
            make_pairs(config, PairTables((folder, again), **COLUMNS[kind], **split), target)
        else:
            files = [tables / f"{name}{part}" for name in ("events", "items", "users")]
            make_interactions(config, InteractionTables(*files, **COLUMNS[kind], **split), target)
    return content(out / "dataset")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def built_in(small: None, tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    """Return what the built-in engine writes with one process."""
    return functools.cache(lambda kind: make(tables, kind, tmp_path_factory.mktemp(kind), processes=1))


@pytest.mark.parametrize("kind", DATA)
def test_processes_do_not_matter(kind: str, tables: Path, built_in: Any, tmp_path: Path) -> None:
    expected = built_in(kind)
    assert make(tables, kind, tmp_path, processes=2) == expected
    assert sum(name.endswith(".tar") for name in expected) > 8, "the test is of many files"


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("partitions", [1, 2, 7])
def test_partitions_do_not_matter(
    kind: str, partitions: int, session: Any, tables: Path, built_in: Any, tmp_path: Path
) -> None:
    conf = {
        "spark.sql.shuffle.partitions": str(partitions),
        "spark.sql.adaptive.coalescePartitions.enabled": "false",  # of so few rows it would make one
    }
    assert make(tables, kind, tmp_path, spark=Cluster(conf=tuple(conf.items()))) == built_in(kind)
