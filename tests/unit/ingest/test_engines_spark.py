"""Messages of the Spark engine for missing dependencies; tests/e2e/test_spark.py runs it."""

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from bigdssm.errors import BigDSSMError, ConfigError, UnavailableError
from bigdssm.ingest import spark
from bigdssm.ingest.engines import UnreadableTable
from bigdssm.ingest.spark import Cluster, SparkEngine


def test_a_missing_pyspark_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyspark.sql", None)
    with pytest.raises(ConfigError, match=r"needs pyspark; pip install 'bigdssm\[spark\]'"):
        SparkEngine(tmp_path, cluster=Cluster())


def test_a_missing_java_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("pyspark.sql")
    module.SparkSession = SimpleNamespace(getActiveSession=lambda: None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyspark.sql", module)
    monkeypatch.setitem(sys.modules, "pyspark", ModuleType("pyspark"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(ConfigError, match="needs Java 17 or newer, but there is no java"):
        SparkEngine(tmp_path, cluster=Cluster())
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=f"there is no {tmp_path}/bin/java"):
        SparkEngine(tmp_path, cluster=Cluster())


@pytest.mark.parametrize(("given", "most"), [({}, 128 << 20), ({"spark.bigdssm.driverBytes": "0"}, 0)])
def test_the_size_limit_of_driver_results_is_a_setting(given: dict[str, str], most: int) -> None:
    engine = SparkEngine.__new__(SparkEngine)
    engine._steps = SimpleNamespace(conf=given)
    assert engine._read_max_driver_bytes() == most
    engine._steps = SimpleNamespace(conf={"spark.bigdssm.driverBytes": "64m"})
    with pytest.raises(ConfigError, match="driverBytes=64m: needs an integer number of bytes, such as 134217728"):
        engine._read_max_driver_bytes()


@pytest.mark.parametrize(
    "error",
    [
        UnavailableError("the server stays away"),  # finished steps are retained for this type
        ConfigError("no such thing"),
        UnreadableTable("a table is cut off", [["a.csv", 7, "no number", True]]),
    ],
)
def test_a_workers_error_comes_back_as_it_was(error: BigDSSMError, tmp_path: Path) -> None:
    def fail(job: Any, folder: Path) -> None:
        raise error

    answer = spark._do(fail, [(None, tmp_path / "none")], os.getcwd(), 0)
    assert answer is not None
    again = spark._error_of(answer)
    assert type(again) is type(error) and (str(again), vars(again)) == (str(error), vars(error))
