"""Bulk recommendation equals search requests, for any number of ranks and after kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv as pa_csv
from pyarrow import parquet

from bigdssm.checkpoints.model_folder import ModelFolder, load_model_folder
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import CheckpointError, ConfigError, DataError
from bigdssm.features.ragged import Ragged
from bigdssm.features.vector import Vector
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.retrieval.index import Index, open_index
from bigdssm.retrieval.recommend import (
    Exclusions,
    QueryBatch,
    QuerySource,
    RecommendOptions,
    RecommendReport,
    SplitRows,
    TableRows,
    Users,
    _of_columns,
    recommend,
)
from bigdssm.retrieval.request import Event, Request
from bigdssm.retrieval.shards import Share
from bigdssm.serving.searcher import Searcher
from tests.command_line import Tools
from tests.conftest import NUM_USERS, TinyDataset

ROOT = Path(__file__).resolve().parents[3]
SHARD = 13  # of 60 users, so that there are 5 shards


@pytest.fixture(scope="module")
def folder(model_dir: Path) -> ModelFolder:
    return load_model_folder(model_dir)


@pytest.fixture(scope="module")
def index(index_dir: Path) -> Index:
    return open_index(index_dir)


@pytest.fixture(scope="module")
def searcher(folder: ModelFolder, index: Index, dataset: Dataset) -> Searcher:
    return Searcher(folder, index, dataset)


def rows_of(out: Path) -> pa.Table:
    return parquet.read_table(sorted(out.glob("part-*.parquet")))


def by_query(out: Path) -> dict[str, list[tuple[str, float]]]:
    found: dict[str, list[tuple[str, float]]] = {}
    for row in rows_of(out).to_pylist():
        found.setdefault(row["query"], []).append((row["document"], row["score"]))
        assert row["rank"] == len(found[row["query"]])
    return found


def check_answers(actual: dict[str, list[tuple[str, float]]], requests: dict[str, Request], searcher: Searcher) -> None:
    assert list(actual) == list(requests)
    for key, documents in zip(requests, searcher.search(list(requests.values())), strict=True):
        assert [document.key for document in documents] == [name for name, _ in actual[key]]
        np.testing.assert_allclose([d.score for d in documents], [s for _, s in actual[key]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seen", [None, False])
def test_bulk_results_equal_search_results(
    folder: ModelFolder, index: Index, dataset: Dataset, searcher: Searcher, tmp_path: Path, seen: bool | None
) -> None:
    options = RecommendOptions(5, "year < 1990", seen)
    recommend(tmp_path / "out", folder, index, dataset, Users(dataset), options, Share(rows_per_chunk=SHARD))
    assert dataset.sequences is not None
    users = dataset.sequences.strings("query_key", np.arange(NUM_USERS))
    requests = {user: Request(user, filter="year < 1990", exclude_seen=seen, top=5) for user in users}
    check_answers(by_query(tmp_path / "out"), requests, searcher)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "meta.json", *(f"part-000000{i}.parquet" for i in range(5)),
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["queries"] == NUM_USERS


def test_a_table_excludes_documents_per_user(
    folder: ModelFolder, index: Index, dataset: Dataset, searcher: Searcher, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    before = {user: searcher.search([Request(user, top=3)])[0] for user in ("u3", "u40")}
    pairs = [(user, one.key) for user, documents in before.items() for one in documents[:2]]
    pairs = [pairs[0], ("nobody", "i1"), *pairs[1:], ("u3", "i999"), pairs[0]]
    table = pa.table({"user": [user for user, _ in pairs], "doc": [key for _, key in pairs]})
    parquet.write_table(table, tmp_path / "gone.parquet")
    out, arguments = tmp_path / "out", (folder, index, dataset, Users(dataset), RecommendOptions(3))
    exclusions = Exclusions(dataset, tmp_path / "gone.parquet", "user", "doc")
    assert "column 'doc': 1 of 7 keys are of no document, such as 'i999'" in caplog.text
    recommend(out, *arguments, Share(rows_per_chunk=SHARD), exclusions=exclusions)
    requests = {user: Request(user, top=3) for user in by_query(out)}
    for user, documents in before.items():
        requests[user] = Request(user, top=3, exclude=[one.key for one in documents[:2]])
    check_answers(by_query(out), requests, searcher)
    assert by_query(out)["u3"][0][0] == before["u3"][2].key
    job = json.loads((out / "meta.json").read_text())
    recommend(out, *arguments, Share(rows_per_chunk=SHARD))
    assert json.loads((out / "meta.json").read_text()) == {k: v for k, v in job.items() if k != "exclusions"}
    assert job["exclusions"] == exclusions.identity, "shards of another job are not reused"
    pairs_have_no_keys = QueryBatch(np.arange(1), None, {}, Ragged.of_lists([[]], np.int64))
    with pytest.raises(ConfigError, match="--exclude-table needs queries with keys"):
        exclusions.of(pairs_have_no_keys.keys)


def test_a_column_excludes_documents_of_a_query(
    folder: ModelFolder, index: Index, dataset: Dataset, searcher: Searcher, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    lists = [["i5", "i999"], [], ["i1", "i2"], None]
    table = {"user": list("abcd"), "items": [["i7"]] * 4, "age": [30] * 4, "occupation": ["artist"] * 4, "no": lists}
    parquet.write_table(pa.table(table), tmp_path / "new.parquet")
    source = TableRows(dataset, tmp_path / "new.parquet", "user", "items", exclude_column="no")
    assert "column 'no': 1 of 4 keys are of no document, such as 'i999'" in caplog.text
    recommend(tmp_path / "out", folder, index, dataset, source, RecommendOptions(40), Share(rows_per_chunk=3))
    features = {"age": 30, "occupation": "artist"}
    requests = {
        user: Request(features=features, events=[Event("i7")], exclude=exclude or (), top=40)
        for user, exclude in zip("abcd", lists, strict=True)
    }
    found = by_query(tmp_path / "out")
    check_answers(found, requests, searcher)
    assert [len(found[user]) for user in "abcd"] == [38, 39, 37, 39]


def test_rows_of_a_split_use_their_preceding_events(
    folder: ModelFolder, index: Index, dataset: Dataset, tmp_path: Path
) -> None:
    recommend(
        tmp_path / "out",
        folder,
        index,
        dataset,
        SplitRows(dataset, "test"),
        RecommendOptions(4),
        Share(rows_per_chunk=SHARD),
    )
    rows = next(dataset.iterate("test", 1000))
    vectors = tower_encoders(folder.model, dataset).queries(rows).numpy()
    seen = [rows.seen(i) for i in range(len(rows))]
    scores, found = index.nearest(vectors, 4, folder.checksum, seen)
    table = rows_of(tmp_path / "out")
    assert table["row"].to_pylist() == rows.row_ids.repeat(4).tolist()
    assert table["document"].to_pylist() == dataset.catalogue.keys(found.ravel())
    np.testing.assert_allclose(table["score"].to_numpy(), scores.ravel(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_table_of_new_users(
    folder: ModelFolder, index: Index, dataset: Dataset, searcher: Searcher, tmp_path: Path, kind: str
) -> None:
    jobs, histories = ["artist", "", "doctor"], [["i3", "i5", "gone", "i3"], [], ["i9"]]
    table = pa.table({"who": ["a", "b", "c"], "age": [31.0, None, 25.0], "occupation": jobs, "did": histories})
    path = tmp_path / f"asked.{kind}"
    if kind == "csv":
        table = table.set_column(3, "did", pa.array([" ".join(items) for items in histories]))
        pa_csv.write_csv(table, path)
    else:
        parquet.write_table(table, path)
    source = TableRows(dataset, path, "who", "did")
    recommend(tmp_path / "out", folder, index, dataset, source, RecommendOptions(6), Share(rows_per_chunk=2))
    requests = {}
    for key, age, job, items in zip("abc", [31.0, None, 25.0], jobs, histories, strict=True):
        requests[key] = Request(None, {"age": age, "occupation": job}, [Event(item) for item in items], top=6)
    check_answers(by_query(tmp_path / "out"), requests, searcher)
    with pytest.raises(ConfigError, match="--events-column None: needs the documents of the queries' histories"):
        TableRows(dataset, path, "who", None)
    with pytest.raises(DataError, match="has no column 'whom', which --key-column names; did you mean 'who'"):
        TableRows(dataset, path, "whom", "did")


def test_rows_of_a_table_have_their_numbers_in_it(dataset: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "asked.csv"
    path.write_text("age,occupation,did\n31,artist,i3\n1,2,3,4,5\n25,doctor,i9\n26,doctor,i5\n")
    source = TableRows(dataset, path, None, "did")
    assert source.num_rows == 3
    assert [source.read(*part).rows.tolist() for part in ((0, 2), (2, 3))] == [[0, 2], [3]]


def test_a_matrix_is_of_the_training_table_alone() -> None:
    feature = Vector(dim=2, column="v", matrix="of_the_training_table.npy")
    assert not feature.source_columns
    assert _of_columns({"taste": feature})["taste"].source_columns == ["v"]


class Killed(QuerySource):
    """A source that raises at a given row and records the rows read."""

    def __init__(self, source: QuerySource, at: int | None = None) -> None:
        self.identity, self.num_rows, self._source, self._at = source.identity, source.num_rows, source, at
        self.read_rows: list[tuple[int, int]] = []

    def read(self, first: int, last: int) -> QueryBatch:
        if self._at is not None and first <= self._at < last:
            raise KeyboardInterrupt
        self.read_rows.append((first, last))
        return self._source.read(first, last)


def test_a_killed_job_resumes_and_another_does_not(
    folder: ModelFolder, index: Index, dataset: Dataset, tmp_path: Path
) -> None:
    def run(
        out: str, source: QuerySource, options: RecommendOptions, rank: int = 0, world_size: int = 1
    ) -> RecommendReport:
        return recommend(tmp_path / out, folder, index, dataset, source, options, Share(rank, world_size, SHARD))

    users = Users(dataset)
    run("whole", users, RecommendOptions(3))
    with pytest.raises(KeyboardInterrupt):
        run("out", Killed(users, at=30), RecommendOptions(3))
    again = [Killed(users), Killed(users)]
    done = [run("out", again[rank], RecommendOptions(3), rank, 2) for rank in (0, 1)]
    assert [one.read_rows for one in again] == [[(26, 39), (52, 60)], [(39, 52)]]
    assert [one.finished for one in done] == [False, True] and [one.resumed_shards for one in done] == [1, 1]
    assert rows_of(tmp_path / "out").equals(rows_of(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        run("out", Killed(users, at=30), RecommendOptions(3))
    other = Killed(users)
    run("out", other, RecommendOptions(3, filter="year < 1990"))
    assert len(other.read_rows) == 5, "results of another filter were reused"


def test_mismatched_models_and_datasets_are_refused(
    folder: ModelFolder, index: Index, dataset: Dataset, other_model_dir: Path, tiny_pairs: TinyDataset, tmp_path: Path
) -> None:
    def run(model: ModelFolder = folder, out: Path = tmp_path / "out", **options: object) -> None:
        recommend(out, model, index, dataset, Users(dataset), RecommendOptions(**options), Share())  # type: ignore[arg-type]

    with pytest.raises(CheckpointError, match="holds vectors of model"):
        run(load_model_folder(other_model_dir))
    with pytest.raises(ConfigError, match="got 'yeer', needs one of the categorical"):
        run(filter="yeer > 1")
    with pytest.raises(ConfigError, match="--top 0: needs at least 1"):
        run(top=0)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("do not touch")
    with pytest.raises(ConfigError, match="does not hold recommendations"):
        run(out=tmp_path / "precious")
    with pytest.raises(DataError, match="holds pairs, no users"):
        Users(Dataset.open(tiny_pairs.dir))
    assert {path.name for path in tmp_path.iterdir()} == {"precious"}


def test_the_recommend_command_writes_its_results(
    tools: Tools, model_dir: Path, index_dir: Path, tmp_path: Path
) -> None:
    command = ("recommend", "--model", model_dir, "--index", index_dir, "--out", tmp_path / "out")
    out = tools.ran(*command, "--users", "--top", 3, "--filter", "genres = Comedy", "--seen", "allow")
    assert f"{NUM_USERS} queries in" in out and " per second" in out and "out: done" in out
    assert rows_of(tmp_path / "out").num_rows == 3 * NUM_USERS
    assert "would have no effect without --queries" in tools.refused(2, *command, "--users", "--key-column", "x")
    (tmp_path / "gone.csv").write_text("user_id,item_id\nu3,i1\n")
    gone = ("--exclude-table", tmp_path / "gone.csv")
    tools.ran(*command[:-1], tmp_path / "fewer", "--users", "--top", 40, "--seen", "allow", *gone)
    counts = {user: len(documents) for user, documents in by_query(tmp_path / "fewer").items()}
    assert counts.pop("u3") == 39 and set(counts.values()) == {40}
    missing = tools.refused(3, *command, "--users", *gone, "--item-column", "item")
    assert "'item'" in missing and "--item-column" in missing
    refused = tools.refused(2, *command, "--users", "--item-column", "x")
    assert "would have no effect without --exclude-table" in refused
    shutil.rmtree(tmp_path / "fewer")
    (tmp_path / "gone.csv").unlink()
    file = tmp_path / "found.csv"
    tools.ran(*command[:-1], file, "--users", "--top", 3, "--filter", "genres = Comedy", "--seen", "allow")
    expected, found = rows_of(tmp_path / "out"), pa_csv.read_csv(file)
    assert found.column_names == expected.column_names and sorted(os.listdir(tmp_path)) == ["found.csv", "out"]
    for name in ("row", "query", "rank", "document"):
        assert found[name].to_pylist() == expected[name].to_pylist()
    np.testing.assert_allclose(found["score"], expected["score"], rtol=1e-5)
    (tmp_path / "folder.csv").mkdir()
    assert "is a folder; name a file" in tools.refused(2, *command[:-1], tmp_path / "folder.csv", "--users")


KILLED = """
import os, signal, sys
from bigdssm.commands.recommend import main
from bigdssm.retrieval.recommend import Users
read = Users.read
def killed(self, first, last):
    if first == 31:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, first, last)
Users.read = killed
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_bulk_job_is_finished_under_torchrun(model_dir: Path, index_dir: Path, tmp_path: Path) -> None:
    arguments = ["--model", model_dir, "--index", index_dir, "--users", "--rows-per-shard", 1, "--top", 3, "--out"]
    ranks = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        2,
        "--master-port",
        0,
        "-m",
        "bigdssm.commands.recommend",
    ]

    def run(program: list[object], out: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, [*program, *arguments, tmp_path / out])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)

    assert run(["-c", KILLED], "out").returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    finished, whole = run(ranks, "out"), run(ranks[-2:], "whole")
    assert finished.returncode == whole.returncode == 0, finished.stderr + whole.stderr
    assert "16 shards were already finished" in finished.stdout and "already finished" not in whole.stdout
    assert rows_of(tmp_path / "out").equals(rows_of(tmp_path / "whole"))
