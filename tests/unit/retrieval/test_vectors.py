"""Vectors folders: several ranks write one, killed runs resume, unchanged documents are reused."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import asdict
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.config import Config, load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import CheckpointError, ConfigError
from bigdssm.ingest.job import IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs
from bigdssm.models import DualEncoder
from bigdssm.retrieval import shards
from bigdssm.retrieval import vectors as vectors_module
from bigdssm.retrieval.embed import Encoders, tower_encoders
from bigdssm.retrieval.shards import Share
from bigdssm.retrieval.vectors import difference_from_model, read_meta, read_rows, write_card, write_file, write_vectors
from bigdssm.utils.atomic import temporary_path
from tests.conftest import NUM_ITEMS
from tests.unit.conftest import random_model

SHARD = 7  # of 40 documents, so that there are 6 shards


class Counting:
    """Encoders that record the encoded documents, and raise at a given one."""

    def __init__(self, model: DualEncoder, dataset: Dataset, killed_at: int | None = None) -> None:
        encoders = tower_encoders(model, dataset)
        self.calls: list[list[int]] = []

        def documents(rows: np.ndarray):  # type: ignore[no-untyped-def]
            if killed_at in rows.tolist():
                raise KeyboardInterrupt
            self.calls.append(rows.tolist())
            return encoders.documents(rows)

        self.encoders = Encoders(encoders.queries, documents)

    @property
    def rows(self) -> list[int]:
        return [row for call in self.calls[1:] for row in call]  # the first call determines the width


@pytest.fixture(scope="module")
def expected(model: DualEncoder, dataset: Dataset) -> np.ndarray:
    return tower_encoders(model, dataset).documents(np.arange(NUM_ITEMS)).numpy()


def test_a_killed_run_resumes_from_its_finished_shards(
    model: DualEncoder, dataset: Dataset, expected: np.ndarray, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_vectors(tmp_path / "v", Counting(model, dataset, 25).encoders, dataset, "m", Share(rows_per_chunk=SHARD))
    assert not (tmp_path / "v").exists()
    again = Counting(model, dataset)
    written = write_vectors(tmp_path / "v", again.encoders, dataset, "m", Share(rows_per_chunk=SHARD))
    assert again.rows == list(range(21, NUM_ITEMS))
    assert (written.resumed_shards, written.encoded, written.reused) == (3, 19, 0)
    np.testing.assert_allclose(np.load(tmp_path / "v" / "vectors.npy"), expected, rtol=1e-5, atol=1e-5)
    names = {path.name for path in (tmp_path / "v").iterdir()}
    assert names == {"vectors.npy", "contents.npy", "documents.arrow", "meta.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["v"]


@pytest.mark.parametrize("other", ["model", "shards"])
def test_another_job_does_not_resume_from_unfinished_shards(
    model: DualEncoder, dataset: Dataset, tmp_path: Path, other: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_vectors(tmp_path / "v", Counting(model, dataset, 25).encoders, dataset, "m", Share(rows_per_chunk=SHARD))
    checksum, rows_per_shard = ("n", SHARD) if other == "model" else ("m", SHARD + 1)
    written = write_vectors(
        tmp_path / "v", Counting(model, dataset).encoders, dataset, checksum, Share(rows_per_chunk=rows_per_shard)
    )
    assert (written.resumed_shards, written.encoded) == (0, NUM_ITEMS)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_share_the_shards_and_the_last_renames_the_folder(
    model: DualEncoder, dataset: Dataset, expected: np.ndarray, tmp_path: Path, world_size: int
) -> None:
    encoders = [Counting(model, dataset) for _ in range(world_size)]
    order = [*range(1, world_size), 0]
    for rank in order:
        assert not (tmp_path / "v").exists()
        written = write_vectors(
            tmp_path / "v", encoders[rank].encoders, dataset, "m", Share(rank, world_size, rows_per_chunk=SHARD)
        )
        assert (written.meta is not None) == (rank == order[-1])
    assert sorted(row for one in encoders for row in one.rows) == list(range(NUM_ITEMS))
    np.testing.assert_allclose(np.load(tmp_path / "v" / "vectors.npy"), expected, rtol=1e-5, atol=1e-5)


def test_ranks_at_the_same_time(model: DualEncoder, dataset: Dataset, expected: np.ndarray, tmp_path: Path) -> None:
    written, encoders = [], tower_encoders(model, dataset)

    def run(rank: int) -> None:
        written.append(write_vectors(tmp_path / "v", encoders, dataset, "m", Share(rank, 4, rows_per_chunk=1)))

    ranks = [threading.Thread(target=run, args=(rank,)) for rank in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert sum(one.encoded for one in written) == NUM_ITEMS
    assert sum(one.meta is not None for one in written) == 1
    np.testing.assert_allclose(np.load(tmp_path / "v" / "vectors.npy"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("when", ["before it looks", "while it waits for the lock"])
def test_only_one_rank_finishes_the_folder(
    model: DualEncoder, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Rank 1 finishes the folder after rank 0's last shard."""
    encoders, others, lock = tower_encoders(model, dataset), [], shards._lock

    def other_rank() -> None:
        with monkeypatch.context() as undone:
            undone.setattr(shards, "_lock", lock)
            others.append(write_vectors(tmp_path / "v", encoders, dataset, "m", Share(1, 2, SHARD)))

    def late_lock(aside: Path) -> IO[str]:
        waiting = (aside / "lock").open("w")
        other_rank()
        return waiting

    def after_a_shard(what: str, done: int, total: int) -> None:
        if done == total and when == "before it looks":
            other_rank()
        elif done == total:
            monkeypatch.setattr(shards, "_lock", late_lock)

    own = write_vectors(tmp_path / "v", encoders, dataset, "m", Share(0, 2, SHARD, after_a_shard))
    assert (tmp_path / "v" / "meta.json").is_file()
    assert len(others) == 1 and others[0].meta is not None and own.meta is None


def test_folders_of_others_are_not_replaced(model: DualEncoder, dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text('{"kind": "recommendations"}')
    with pytest.raises(ConfigError, match="holds neither vectors nor an index"):
        write_vectors(tmp_path, tower_encoders(model, dataset), dataset, "m")
    assert [path.name for path in tmp_path.iterdir()] == ["meta.json"]


def test_only_changed_documents_are_encoded(tmp_path: Path) -> None:
    """An append adds documents; a rebuilt catalogue changes one."""

    def pairs(name: str, numbers: range, changed: int | None = None) -> Path:
        path = tmp_path / f"{name}.jsonl"
        with path.open("w") as file:
            for number in numbers:
                text = f"document {number}" + (" is another now" if number == changed else "")
                file.write(json.dumps({"query": f"query {number}", "key": f"d{number}", "text": text}) + "\n")
        return path

    data = {"query": {"query": {"type": "text"}}, "doc": {"text": {"type": "text"}}, "tokenizer": {"vocab_size": 80}}
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump({"run": {"dir": "r"}, "data": {"dir": "d", "title": "text", **data}, "model": {"dim": 8}})
    )
    config = load_config(tmp_path / "c.yaml")

    def make(source: Path, target: IngestTarget) -> Dataset:
        fractions = {} if target.append else {"validation_fraction": 0.0, "test_fraction": 0.0}
        tables = PairTables((source,), doc_id_column="key", **fractions)
        make_pairs(config.data, tables, target)
        return Dataset.open(target.out)

    first = make(pairs("first", range(30)), IngestTarget(tmp_path / "d"))
    model = random_model(config, first, 1)
    write_vectors(tmp_path / "v", tower_encoders(model, first), first, "m")
    grown = make(pairs("second", range(30, 37)), IngestTarget(tmp_path / "d", "more", append=True))
    other = make(pairs("third", range(36, -1, -1), changed=4), IngestTarget(tmp_path / "other", like=tmp_path / "d"))
    for dataset, changed, reused in ((grown, [f"d{n}" for n in range(30, 37)], 30), (other, ["d4"], 36)):
        counting = Counting(model, dataset)
        written = write_vectors(tmp_path / "v", counting.encoders, dataset, "m", since=tmp_path / "v")
        assert (written.encoded, written.reused) == (len(changed), reused)
        assert dataset.catalogue.keys(np.array(counting.rows)) == changed
        whole = tower_encoders(model, dataset).documents(np.arange(37)).numpy()
        np.testing.assert_allclose(np.load(tmp_path / "v" / "vectors.npy"), whole, rtol=1e-5, atol=1e-5)
    same = [make(pairs(name, range(36, -1, -1)), IngestTarget(tmp_path / name, like=tmp_path / "d")) for name in "ab"]
    assert same[0].fingerprint == same[1].fingerprint != other.fingerprint, "a document differs"
    with pytest.raises(CheckpointError, match="--since needs vectors of the model in use"):
        write_vectors(tmp_path / "w", counting.encoders, other, "another", since=tmp_path / "v")


@pytest.fixture(scope="module")
def folder(model_dir: Path, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("files") / "v"
    loaded = load_model_folder(model_dir)
    write_vectors(out, tower_encoders(loaded.model, dataset), dataset, loaded.checksum)
    return out


def test_files_of_other_engines(model: DualEncoder, dataset: Dataset, config: Config, folder: Path) -> None:
    vectors = np.load(folder / "vectors.npy")
    parity = {}
    for target in ("npy", "fvecs", "parquet"):
        path = write_file(folder, target)  # type: ignore[arg-type]
        parity[target] = difference_from_model(path, tower_encoders(model, dataset))
        np.testing.assert_array_equal(read_rows(path, np.array([3, 39, 0])), vectors[[3, 39, 0]])
    # as other engines read them
    raw = np.fromfile(folder / "vectors.fvecs", np.int32)
    assert raw[0] == 9
    np.testing.assert_array_equal(raw.reshape(-1, 10)[:, 1:].view(np.float32), vectors)
    table = parquet.read_table(folder / "vectors.parquet")
    assert table["doc_key"].to_pylist() == dataset.catalogue.keys(np.arange(NUM_ITEMS))
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 9)
    assert table["vector"][5].as_py() == vectors[5].tolist()
    write_card(folder, config.model.score, parity)  # type: ignore[arg-type]
    card = (folder / "README.md").read_text()
    assert read_meta(folder).model_checksum in card
    assert "40 documents" in card and "width 9" in card and "vectors.parquet" in card


def test_a_few_rows_of_parquet_are_read_without_the_rest(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    expected = np.load(copied / "vectors.npy")
    monkeypatch.setattr(vectors_module, "ROWS_AT_ONCE", 7)
    path, read = write_file(copied, "parquet"), []

    class Watched(parquet.ParquetFile):  # type: ignore[misc]
        def read_row_group(self, group: int, columns: list[str]) -> pa.Table:
            read.append((group, columns))
            return super().read_row_group(group, columns=columns)

    monkeypatch.setattr(parquet, "ParquetFile", Watched)
    rows = np.array([38, 3, 39, 0, 6, 7])
    np.testing.assert_array_equal(read_rows(path, rows), expected[rows])
    assert read == [(0, ["vector"]), (1, ["vector"]), (5, ["vector"])]


def test_a_file_with_other_vectors_is_named(model: DualEncoder, dataset: Dataset, folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    vectors = np.load(copied / "vectors.npy")
    np.save(copied / "vectors.npy", vectors[::-1])
    with pytest.raises(CheckpointError, match=r"vectors\.npy does not match the model"):
        difference_from_model(copied / "vectors.npy", tower_encoders(model, dataset))


def test_another_format_is_named(folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    (copied / "meta.json").write_text(json.dumps({**asdict(read_meta(folder)), "format": 2}))
    with pytest.raises(CheckpointError, match="has format 2"):
        read_meta(copied)
    assert not temporary_path(folder).exists()
