"""A dataset's bytes do not depend on the number of processes, nor on the division of tables into jobs."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from joblib import Parallel, delayed

from bigdssm.config import DataConfig, TokenizerConfig
from bigdssm.errors import ConfigError
from bigdssm.features import Categorical, History, Numeric, Text, Vector
from bigdssm.ingest.api import make_dataset
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs
from tests.unit.ingest.content import content

TEXT, KINDS = Text(max_tokens=8), Categorical(multi=True, min_count=2)
SIZES = {
    "cutting.SEQUENCES_AT_ONCE": 7,
    "engines.SMALL_WORK": 0,
    "fitting.ROWS_PER_FIT": 200,
    "job.DOCUMENTS_PER_FILE": 100,
    "job.BLOCKS_PER_SHARD": 2,
    "cutting.SEQUENCES_PER_FILE": 30,
    "engines.ROWS_PER_BUCKET": 500,
    "engines.ROWS_PER_BUCKET_JOB": 700,
    "splits.ROWS_PER_RUN": 600,
}


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in SIZES.items():
        monkeypatch.setattr(f"bigdssm.ingest.{name}", size)


def write_tables(folder: Path, seed: int) -> None:
    """Write folders of Parquet files with several row groups."""
    random = np.random.RandomState(seed)
    items, users, events, pairs = 300 + 50 * seed, 120, 4000, 3000
    dated = [*range(items), *random.randint(0, items, 1200)]
    tables = {
        "items": {
            "item_id": [f"i{n}" for n in range(items)],
            "title": [f"the title {n % 7} of {n}" for n in range(items)],
            "kinds": [[f"k{n % 5}", f"k{n % 11}"] for n in range(items)],
            "look": random.randn(items, 3).astype(np.float32).tolist(),
        },
        "items_with_times": {
            "item_id": [f"i{n}" for n in dated],
            "updated": random.randint(-50, 500, len(dated)),
            "title": [f"the title {n} of {n % 7}" for n in random.randint(0, 90, len(dated))],
            "kinds": [[f"k{n % 5}"] for n in dated],
            "look": np.ones((len(dated), 3), np.float32).tolist(),
        },
        "users": {"user_id": [f"u{n}" for n in range(users)], "age": random.rand(users)},
        "users_with_times": {
            "user_id": [f"u{n}" for n in random.randint(0, users, 900)],
            "since": random.randint(-50, 500, 900),
            "age": random.rand(900),
        },
        "events": {
            "user_id": [f"u{n}" for n in random.randint(0, users + 9, events)],
            "item_id": [f"i{n}" for n in random.randint(0, items, events)],
            "timestamp": 500 * seed + random.randint(0, 500, events),  # many are equal
        },
        "pairs": {
            "q": [f"find {n % 90} {n % 13}" for n in random.randint(0, 10**6, pairs)],
            "title": [f"an answer {n}" for n in random.randint(0, 400, pairs)],
            "kinds": [[f"k{n % 5}", f"k{n % 11}"] for n in random.randint(0, 99, pairs)],
            "time": random.rand(pairs),
        },
    }
    for name, columns in tables.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        table = pa.table(columns)
        if name == "events" and seed:  # some repeated
            table = pa.concat_tables([table, pq.read_table(folder.parent / "0" / "events").slice(100, 300)])
        for part in range(3):
            piece = table.slice(part * (table.num_rows // 3), table.num_rows // 3 if part < 2 else None)
            pq.write_table(piece, folder / name / f"{part}.parquet", row_group_size=500)


def make_as_of_twice(folder: Path, out: Path, processes: int) -> dict[str, bytes]:
    times = {"users_time_column": "since", "items_time_column": "updated"}
    return make_interactions_twice(folder, out, processes, "items_with_times", "users_with_times", **times)


def make_interactions_twice(
    folder: Path, out: Path, processes: int, items: str = "items", users: str = "users", **options: Any
) -> dict[str, bytes]:
    query = {"past": History(of="item_id", max_items=5), "age": Numeric()}
    doc = {"item_id": Categorical(), "title": TEXT, "kinds": KINDS, "look": Vector(dim=3)}
    config = DataConfig(
        dir="", time_unit="s", query=query, doc=doc, tokenizer=TokenizerConfig(vocab_size=150), targets_per_row=4
    )
    for number in range(2):
        source = folder / str(number)
        tables = InteractionTables(source / "events", source / items, source / users, split="time", **options)
        target = IngestTarget(out, f"day{number}", append=number > 0, processes=processes)
        make_interactions(config, tables, target)
    return content(out)


def make_pairs_twice(folder: Path, out: Path, processes: int) -> dict[str, bytes]:
    config = DataConfig(
        time_unit="s",
        dir="",
        query={"q": TEXT},
        doc={"title": TEXT, "kinds": KINDS},
        tokenizer=TokenizerConfig(vocab_size=150),
    )
    for number in range(2):
        tables = PairTables((folder / str(number) / "pairs",), split="random", whole_documents=True, dedup=True)
        make_pairs(config, tables, IngestTarget(out, f"day{number}", append=number > 0, processes=processes))
    return content(out)


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_interactions_twice, make_as_of_twice, make_pairs_twice])
def test_any_number_of_processes_makes_the_same_bytes(make, small_steps: None, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for seed in range(2):
        write_tables(tmp_path / str(seed), seed)
    alone = make(tmp_path, tmp_path / "one", 1)
    assert sum(name.endswith(".tar") for name in alone) >= 8, "several shards"
    for processes in (2, 4):
        assert make(tmp_path, tmp_path / f"made{processes}", processes) == alone


@pytest.mark.slow
def test_where_parts_are_cut_changes_nothing(small_steps: None, tmp_path: Path) -> None:
    for seed in range(2):
        write_tables(tmp_path / "cut" / str(seed), seed)
        for name in ("items", "users", "events"):
            (tmp_path / "whole" / str(seed) / name).mkdir(parents=True)
            table = pq.read_table(tmp_path / "cut" / str(seed) / name)
            pq.write_table(table, tmp_path / "whole" / str(seed) / name / "all.parquet")
    made = [make_interactions_twice(tmp_path / name, tmp_path / f"of_{name}", 1) for name in ("cut", "whole")]
    assert made[0] == made[1]


def test_processes_are_a_number(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="processes=-1: needs at least 1, or 0 for one per core"):
        make_dataset("configs/movielens_100k.yaml", pairs=tmp_path / "none.csv", out=tmp_path / "out", processes=-1)


def processes() -> set[int]:
    """Return the process ids in joblib's pools."""
    found = set[int]()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"popen_loky" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
    return found


@pytest.mark.slow
def test_an_ingestion_ends_its_own_processes_only(small_steps: None, tmp_path: Path) -> None:
    Parallel(2)(delayed(abs)(number) for number in range(4))
    others, met = processes(), set[int]()
    assert others
    write_tables(tmp_path / "tables", 0)
    tables = InteractionTables(tmp_path / "tables/events", tmp_path / "tables/items")
    config = DataConfig(dir="", time_unit="s", query={"past": History(of="item_id")}, doc={"item_id": Categorical()})
    make_interactions(
        config, tables, IngestTarget(tmp_path / "out", processes=2), lambda *told: met.update(processes())
    )
    assert met - others, "it had some of its own"
    assert processes() == others
    assert Parallel(2)(delayed(abs)(number) for number in (-1, -2)) == [1, 2]
