"""Ingestion on Apache Spark, with any number of partitions, writes the same bytes as the built-in engine."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from bigdssm.commands.make_shards import main
from bigdssm.config import load_config
from bigdssm.dataset.stamps import STAMPS_FILE
from bigdssm.distributed import free_port
from bigdssm.errors import ConfigError, DataError
from bigdssm.ingest.engines import LocalEngine
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestTarget
from bigdssm.ingest.pairs import ItemTables, PairTables, make_items, make_pairs
from bigdssm.ingest.spark import Cluster, SparkEngine
from tests.conftest import WORDS
from tests.e2e.runs import ROOT

if find_spec("pyspark") is None or not ("JAVA_HOME" in os.environ or shutil.which("java")):
    give_up = pytest.fail if "BIGDSSM_FULL" in os.environ else partial(pytest.skip, allow_module_level=True)
    give_up("needs pyspark, the extra [spark], and Java")
pytestmark = pytest.mark.slow

SMALL = Path(__file__).parent / "small_sizes"
FAST = {  # code generation pays off for millions of rows only
    "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1",
    "spark.executor.extraJavaOptions": "-XX:TieredStopAtLevel=1",
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.ui.enabled": "false",
    "spark.bigdssm.driverBytes": "0",  # run all queries on Spark
}
DATA: dict[str, dict[str, Any]] = {
    "interactions": {
        "time_unit": "s",
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
        "time_unit": "s",
        "query": {"query": {"type": "text", "max_tokens": 8}},
        "doc": {
            "text": {"type": "text", "max_tokens": 16},
            "tags": {"type": "categorical", "multi": True},
            "shape": {"type": "vector", "dim": 3},
            "size": {"type": "numeric", "log": True},
        },
    },
}
DATA["as_of"] = DATA["interactions"]
COLUMNS: dict[str, dict[str, Any]] = {
    "interactions": {"rating_column": "rating", "min_rating": 2.0},
    "as_of": {"users_time_column": "since", "items_time_column": "updated"},
    "pairs": {"doc_id_column": "id", "relevance_column": "relevance", "dedup": True, "validation_fraction": 0.1},
}
SPLITS: dict[str, list[dict[str, Any]]] = {  # of the first and the appended partition
    "interactions": [{"split": "leave-one-out"}, {"split": "time"}],
    "as_of": [{"split": "leave-one-out"}, {"split": "time"}],
    "pairs": [{"whole_documents": True, "split_column": "group"}, {"split": "time", "split_column": "time"}],
}


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Use small constants in this process and in all its subprocesses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SMALL))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(SMALL), str(ROOT)]))
        import sizes

        sizes.make_small(patch.setattr)
        yield


@pytest.fixture(scope="module")
def session(small: None) -> Iterator[Any]:
    from pyspark.sql import SparkSession

    session = SparkSession.builder.master("local[2]").config(map=FAST).getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    yield session
    session.stop()


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parquet folders events, items, users, pairs, further ones (…2), with some bad rows; and configs."""
    root, random = tmp_path_factory.mktemp("tables"), np.random.default_rng(0)
    title = [f"{WORDS[i % 14]} {WORDS[i * 5 % 13]}" for i in range(200)]
    for part, first in (("", 0), ("2", 60)):
        items = np.arange(first, first + 130)
        write(root / f"items{part}", 2, item_id=[f"i{i}" for i in items], title=[title[i] for i in items],
              year=[None if i % 9 == 0 else 1950.5 + i + (len(part) if i % 4 == 0 else 0) for i in items])  # fmt: skip
        dated = np.concatenate([items, random.choice(items, 250)])
        write(root / f"dated_items{part}", 2, item_id=[f"i{i}" for i in dated],
              updated=random.integers(-50, 400, len(dated)), title=[title[i] for i in dated],
              year=1950.5 + dated + random.integers(0, 4, len(dated)))  # fmt: skip
        users = np.arange(first // 2, first // 2 + 70)
        dated = random.choice(users, 300)
        write(root / f"dated_users{part}", 2, user_id=[f"u{u}" for u in dated], age=np.arange(300) / 3,
              job=[f"job{u % 7}" for u in dated], since=random.integers(-50, 400, 300))  # fmt: skip
        write(root / f"users{part}", 2, user_id=[f"u{u}" for u in users], age=users % 50 / 3,
              job=[f"job{u % 7}" for u in users])  # fmt: skip
        who, what = random.integers(users[0], users[-1] + 3, 1500), random.integers(first, first + 131, 1500)
        first_time = 380 if part else 0  # the second table has some older and some repeated events
        events = {"user_id": [f"u{u}" for u in who], "item_id": [f"i{i}" for i in what],
                  "timestamp": first_time + random.integers(0, 400, 1500),
                  "rating": random.integers(1, 6, 1500)}  # fmt: skip
        if part:
            again = pq.read_table(root / "events").slice(700, 100).to_pydict()
            events = {name: [*values, *again[name]] for name, values in events.items()}
        write(root / f"events{part}", 3, **events)
        docs = random.integers(first, first + 110, 1200)
        write(
            root / f"pairs{part}", 3,
            query=[f"{WORDS[random.integers(14)]} {WORDS[random.integers(14)]}" for _ in docs],
            id=[f"d{d}" for d in docs],
            text=[f"{title[d]} {d}" for d in docs],
            tags=[[f"t{d % 5}", f"t{d % 11}"][: d % 3] for d in docs],
            shape=[[d / 7, 1.0, -d / 3] for d in docs],
            size=docs * 37.5 + np.where(docs % 3 == 0, len(part), 0),
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


def make(tables: Path, kind: str, out: Path, *, appended: bool = True, **engine: Any) -> dict[str, bytes]:
    """Build a dataset, optionally append to it, and return the content of all its files."""
    config = load_config(tables / f"{kind}.yaml").data
    for part, split in zip(("", "2") if appended else ("",), SPLITS[kind], strict=False):
        target = IngestTarget(out / "dataset", f"day{part}", append=bool(part), **engine)
        if kind == "pairs":
            folder = tables / f"pairs{part}"
            again = sorted(folder.iterdir())[0]
            make_pairs(config, PairTables((folder, again), **COLUMNS[kind], **split), target)
        else:
            dated = "dated_" if kind == "as_of" else ""
            files = [tables / f"{name}{part}" for name in ("events", f"{dated}items", f"{dated}users")]
            make_interactions(config, InteractionTables(*files, **COLUMNS[kind], **split), target)
    if appended and kind != "pairs":
        back = {"items": files[1], **({"items_time_column": "updated"} if kind == "as_of" else {})}
        for name, given in (("gone", {"withdrawn": tables / "items"}), ("back", back)):
            make_items(config, ItemTables(**given), IngestTarget(out / "dataset", name, append=True, **engine))
    return content(out / "dataset")


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != STAMPS_FILE]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def built_in(small: None, tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, bytes]]:
    """Return the files written by the built-in engine with one process."""
    return functools.cache(
        lambda kind, appended=True: make(tables, kind, tmp_path_factory.mktemp(kind), appended=appended, processes=1)
    )


@pytest.mark.parametrize(
    ("kind", "partitions", "appended", "on_driver"),
    [
        ("interactions", 7, True, 0),
        ("pairs", 7, True, 0),
        ("as_of", 5, True, 0),
        ("pairs", 1, False, 0),
        ("pairs", 3, False, 100_000),  # some queries run on the driver, over tables written by Spark
    ],
)
def test_partitions_do_not_matter(
    kind: str, partitions: int, appended: bool, on_driver: int,
    session: Any, tables: Path, built_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    answered = Counter[str]()
    for name, engine in (("fetch", LocalEngine), ("_write", LocalEngine), ("_sql", SparkEngine)):
        asked = getattr(engine, name)
        monkeypatch.setattr(
            engine, name, lambda self, *q, e=engine, f=asked: answered.update([e.__name__]) or f(self, *q)
        )
    conf = {
        "spark.sql.shuffle.partitions": str(partitions),
        "spark.sql.adaptive.coalescePartitions.enabled": "false",  # it would merge these few rows into one partition
        "spark.bigdssm.driverBytes": str(on_driver),
    }
    made = make(tables, kind, tmp_path, appended=appended, spark=Cluster(conf=tuple(conf.items())))
    assert answered.keys() == ({"LocalEngine", "SparkEngine"} if on_driver else {"SparkEngine"}), "both were asked"
    expected = built_in(kind, appended=appended)
    assert made == expected
    assert any("/versions-" in name for name in made) == appended, "documents changed"
    assert ("catalogue/withdrawals-000001.arrow" in made) == (appended and kind != "pairs")
    assert (b'"items": "events"' in made["dataset.json"]) == (kind == "as_of")
    assert sum(name.endswith(".tar") for name in expected) > 4, "the test is of many files"


def test_tables_and_queries_of_the_session(session: Any, tables: Path, tmp_path: Path) -> None:
    session.read.parquet(f"{tables}/events").createOrReplaceTempView("events")  # steps use the same name
    config = load_config(tables / "interactions.yaml").data
    given = (
        "spark:SELECT *, 1 AS more FROM events WHERE rating >= 2",
        f"spark:parquet.`{tables}/items`",
        str(tables / "users"),
    )

    def made(name: str, files: tuple[str, ...], **engine: Any) -> dict[str, bytes]:
        target = IngestTarget(tmp_path / name / "dataset", **engine)
        make_interactions(config, InteractionTables(*files, rating_column="rating"), target)
        return content(tmp_path / name / "dataset")

    one = made("one", given, spark=Cluster(conf=(("spark.sql.shuffle.partitions", "1"),)))
    session.read.parquet(f"{tables}/events").repartition(5).createOrReplaceTempView("events")
    assert made("two", given, spark=Cluster(conf=(("spark.sql.shuffle.partitions", "5"),))) == one, (
        "parts of the table do not matter"
    )
    for name in ("events", "items"):  # the same rows sorted by their columns
        rows = pq.read_table(tables / name)
        rows = rows.filter(pc.greater_equal(rows["rating"], 2)) if name == "events" else rows
        columns = ["user_id", "item_id", "timestamp", "rating"] if name == "events" else ["item_id", "title", "year"]
        keys = [(column, "ascending") for column in columns]
        pq.write_table(rows.sort_by(keys), tmp_path / f"{name}.parquet")
    files = (str(tmp_path / "events.parquet"), str(tmp_path / "items.parquet"), str(tables / "users"))
    sorted_files = made("files", files, processes=1)
    quarantine = [c.pop("quarantine.jsonl").replace(b"spark:SELECT", b"") for c in (one, sorted_files)]
    assert one == sorted_files
    assert quarantine[0].count(b"\n") == quarantine[1].count(b"\n") > 0
    for wrong, said in (
        ("spark:SELECT nothing FROM events", "nothing"),
        ("spark:no_table", "no_table"),
        ("spark:SELECT user_id, item_id FROM events", "has no column 'timestamp'"),
    ):
        with pytest.raises(DataError, match=said):
            made("wrong", (wrong, *given[1:]), spark=Cluster())
    assert not (tmp_path / "wrong").exists() or not list((tmp_path / "wrong").iterdir())
    with pytest.raises(ConfigError, match="give --engine spark"):
        make_interactions(config, InteractionTables(*given), IngestTarget(tmp_path / "local"))


def test_bad_rows_and_damaged_tables_are_reported_as_without_spark(
    session: Any, tables: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tables / "events", tmp_path / "events")
    command = ["interactions", "--config", str(tables / "interactions.yaml"), "--out", str(tmp_path / "out"),
               "--interactions", str(tmp_path / "events"), "--items", str(tables / "items"),
               "--users", str(tables / "users"), "--engine", "spark"]  # fmt: skip
    assert main([*command, "data.max_bad_fraction=0.001"]) == DataError.exit_code
    assert "rows are bad" in capfd.readouterr().err
    damaged = tmp_path / "events" / "part-1.parquet"
    damaged.write_bytes(damaged.read_bytes()[:300] + b"?" * 300 + damaged.read_bytes()[600:])
    assert main(command) == DataError.exit_code
    assert f"{damaged.parent} is damaged" in capfd.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(Path, "touch", lambda path: None)  # the file that workers check
        assert main(command) == ConfigError.exit_code
        assert f"cannot access {tmp_path / '.out.unfinished' / 'spool'}" in capfd.readouterr().err
    assert main([*command, "--master", "spark://elsewhere:7077"]) == ConfigError.exit_code
    assert "already has a Spark session on local[2], not on spark://elsewhere:7077" in capfd.readouterr().err
    assert main([*command, "--spark-conf", "spark.executor.memory=1g"]) == ConfigError.exit_code
    assert "spark.executor.memory cannot be set" in capfd.readouterr().err
    assert main([*command[:-2], "--master", "local[2]"]) == ConfigError.exit_code
    assert "have no effect without engine='spark'" in capfd.readouterr().err


def test_a_cluster_resumes_after_its_driver_is_killed(tables: Path, built_in: Any, tmp_path: Path) -> None:
    """A standalone master and two workers on this machine: an ingestion on them is killed with SIGKILL and repeated."""
    with cluster(tmp_path) as master:
        settings = {**FAST, "spark.sql.shuffle.partitions": "2", "spark.executor.memory": "512m"}
        run = [sys.executable, str(ROOT / "tools" / "make_shards.py"), "interactions", "--engine", "spark",
               "--config", str(tables / "interactions.yaml"), "--out", str(tmp_path / "dataset"), "--partition", "day",
               "--interactions", str(tables / "events"), "--items", str(tables / "items"),
               "--users", str(tables / "users"), "--rating-column", "rating", "--min-rating", "2", "--master", master,
               *(word for item in settings.items() for word in ("--spark-conf", "=".join(item)))]  # fmt: skip
        staging = tmp_path / ".dataset.unfinished"
        with subprocess.Popen(run) as process:
            wait_for(lambda: any(staging.glob("spool-*/sequences")), process)
            process.kill()
        steps = staging.glob("spool-*/*/*")
        finished = {path: path.stat().st_mtime_ns for path in steps if not path.name.startswith(".")}
        assert finished
        assert not (tmp_path / "dataset").exists()
        with subprocess.Popen(run) as process:
            wait_for(lambda: any(staging.glob("spool-*/write_train")), process)
            assert all(path.stat().st_mtime_ns == time for path, time in finished.items()), "nothing is made twice"
            assert process.wait() == 0
    assert content(tmp_path / "dataset") == built_in("interactions", appended=False)


@contextmanager
def cluster(folder: Path) -> Iterator[str]:
    """Run a standalone master and two workers; yield the master's URL."""
    port, binary = free_port(), Path(str(find_spec("pyspark").origin)).parent / "bin" / "spark-class"
    master = f"spark://127.0.0.1:{port}"
    commands = [["master.Master", "--host", "127.0.0.1", "--port", port, "--webui-port", free_port()]]
    for number in range(2):
        own = ["--cores", "1", "--memory", "600m", "--work-dir", str(folder / f"work{number}")]
        commands.append(["worker.Worker", *own, "--webui-port", free_port(), master])
    with ExitStack() as stack:
        for command in commands:
            log = stack.enter_context((folder / f"{command[0]}.log").open("a"))
            whole = [str(binary), f"org.apache.spark.deploy.{command[0]}", *command[1:]]
            environment = os.environ | {"SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable}
            process = subprocess.Popen(whole, stdout=log, stderr=log, env=environment)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        yield master


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[bytes], most_s: float = 300) -> None:
    end = time.monotonic() + most_s
    while not happened():
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)
