"""Opening a dataset, iterating over a split in order, and the messages for invalid datasets."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bigdssm.config import DataConfig
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Categorical, History, Numeric
from tests.tiny_datasets import NUM_DOCS, Writer, checksum, write_index


@pytest.fixture
def copy(interactions: Path, tmp_path: Path) -> Path:
    return shutil.copytree(interactions, tmp_path / "copy")


def test_properties_of_a_dataset(interactions: Path, texts: Path) -> None:
    dataset = Dataset.open(interactions)
    assert (dataset.num_rows("train"), dataset.num_rows("test"), dataset.num_rows("validation")) == (1000, 100, 0)
    assert dataset.doc_counts().tolist() == [1] * NUM_DOCS
    assert dataset.tokenizer_dir is None
    text = Dataset.open(texts)
    assert (text.tokenizer_dir, text.vocab_size) == (texts / "tokenizer", 53)
    assert text.fingerprint != dataset.fingerprint == Dataset.open(interactions).fingerprint


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("rows_per_batch", [1, 30, 64, 1000])
def test_iterate_gives_a_split_in_order(interactions: Path, world_size: int, rows_per_batch: int) -> None:
    dataset = Dataset.open(interactions)
    ranks = [list(dataset.iterate("test", rows_per_batch, rank, world_size)) for rank in range(world_size)]
    ids = [rows.row_ids for batches in ranks for rows in batches]
    assert np.concatenate(ids).tolist() == list(range(100))
    assert all((rows.position == rows.row_ids % 30).all() for batches in ranks for rows in batches)
    assert all(len(rows) <= rows_per_batch for batches in ranks for rows in batches)
    assert all([rows.step for rows in batches] == list(range(len(batches))) for batches in ranks)


def test_a_config_with_other_features_is_refused_by_name(interactions: Path) -> None:
    history = History(of="item", max_items=5)
    query = {"age": Numeric(), "history": history}
    doc = {
        "item": Categorical(),
        "tags": Categorical(multi=True),
        "year": Numeric(),
    }
    dataset, config = Dataset.open(interactions), DataConfig(dir="x", query=query, doc=doc)
    dataset.check_against(config)
    changed = replace(config, query={**query, "history": replace(history, max_items=9)})
    with pytest.raises(ConfigError, match=r"query\.history\.max_items=9 against 5"):
        dataset.check_against(changed)
    with pytest.raises(ConfigError, match="doc features"):
        dataset.check_against(replace(config, doc={"item": doc["item"]}))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def remove(name: str):
    return lambda folder: (folder / name).unlink()


PARTITION = "partitions/all"
CASES = {
    "no folder": (shutil.rmtree, "dataset.json does not exist; .* is not a dataset; bigdssm make_shards builds one"),
    "no dataset.json": (remove("dataset.json"), "dataset.json does not exist"),
    "another format": (
        lambda d: edit(d / "dataset.json", format=3), "has format 3, this version reads 1 and 2; rebuild it"
    ),
    "broken JSON": (lambda d: (d / "dataset.json").write_text("{"), "dataset.json is damaged"),
    "another schema": (lambda d: edit(d / "dataset.json", schema="00"), "schema.json does not match"),
    "no partitions": (lambda d: edit(d / "dataset.json", partitions=[]), "has no partitions"),
    "a partition elsewhere": (lambda d: edit(d / "dataset.json", partitions=["../x"]), "not a plain folder name"),
    "a catalogue elsewhere": (
        lambda d: edit(d / "dataset.json", catalogue=[{"file": "../x", "rows": 1, "checksum": ""}]), "not a plain path"
    ),
    "an empty catalogue": (lambda d: edit(d / "dataset.json", catalogue=[]), "names no catalogue"),
    "no partition.json": (remove(f"{PARTITION}/partition.json"), "partition.json does not exist"),
    "no index": (remove(f"{PARTITION}/train.index.arrow"), "train.index.arrow is missing"),
    "no catalogue": (remove("catalogue/000000.arrow"), "000000.arrow is missing"),
    "no counts": (remove(f"{PARTITION}/counts.arrow"), "counts.arrow is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_missing_parts_of_a_dataset_are_named(copy: Path, case: str) -> None:
    spoil, message = CASES[case]
    spoil(copy)
    with pytest.raises(DataError, match=message):
        dataset = Dataset.open(copy)
        dataset.index("train")
        dataset.doc_counts()


SIZES = {"rows": 1, "queries": 1, "blocks": 1, "shards": [], "index_checksum": ""}
MISFITS = [
    ("dataset.json", {"split": ["time"]}, "split is ['time'], needs an object"),
    ("dataset.json", {"split": {}}, "split.how is missing"),
    ("dataset.json", {"split": {"how": "Time"}}, "split.how is 'Time', needs one of random, time, column, "),
    ("dataset.json", {"split": {"how": "time", "test_from": "1"}}, "split.test_from is '1', needs a number or null"),
    ("dataset.json", {"split": {"how": "random", "fractions": [0.1]}}, "split.fractions is [0.1], needs 2 values"),
    ("dataset.json", {"split": {"how": "random", "seed": 0.5}}, "split.seed is 0.5, needs an integer"),
    ("dataset.json", {"times": {"units": []}}, "times.num_times is missing"),
    ("dataset.json", {"times": {"num_times": 1, "units": [[0, 1]]}}, "times.units[0] is [0, 1], needs 3 values"),
    ("dataset.json", {"times": {"num_times": 1, "units": [[0, 1, True]]}}, "units[0][2] is True, needs a number"),
    ("dataset.json", {"partitions": {"all": 1}}, "partitions is {'all': 1}, needs a list"),
    ("dataset.json", {"partitions": [1]}, "partitions[0] is 1, needs a string"),
    ("dataset.json", {"catalogue": [{"file": "x", "checksum": ""}]}, "catalogue[0].rows is missing"),
    ("dataset.json", {"catalogue": [{"file": "x", "rows": -1, "checksum": ""}]}, "catalogue[0].rows is -1, needs an "),
    ("dataset.json", {"catalogue": [{"file": 1, "rows": True, "checksum": ""}]}, "catalogue[0].file is 1, needs a s"),
    ("dataset.json", {"versions": None}, "versions is None, needs a list"),
    ("dataset.json", {"schema": None}, "schema is None, needs a string"),
    ("dataset.json", {"text": "Raw"}, "text is 'Raw', needs one of tokens, raw"),
    ("dataset.json", {"ids": {"doc": "row"}}, "ids.doc is 'row', needs one of column, content"),
    ("dataset.json", {"tokenizer": {"tokenizer.json": 5}}, "tokenizer.tokenizer.json is 5, needs a string"),
    ("dataset.json", {"format": {"a": 1}}, "has format {'a': 1}, this version reads 1"),
    (f"{PARTITION}/partition.json", {"splits": []}, "splits is [], needs an object"),
    (f"{PARTITION}/partition.json", {"splits": {"train": SIZES | {"rows": "9"}}}, "splits.train.rows is '9', needs an"),
    (f"{PARTITION}/partition.json", {"splits": {"train": {"rows": 9}}}, "splits.train.queries is missing"),
    (f"{PARTITION}/partition.json", {"splits": {"train": SIZES | {"shards": [1]}}}, "splits.train.shards[0] is 1, n"),
    (f"{PARTITION}/partition.json", {"counts_checksum": 7}, "counts_checksum is 7, needs a string"),
    (f"{PARTITION}/partition.json", {"sequences": [[]]}, "sequences[0] is [], needs an object"),
]


@pytest.mark.parametrize(("file", "changes", "words"), MISFITS)
def test_a_value_of_another_shape_is_damage(copy: Path, file: str, changes: dict[str, object], words: str) -> None:
    edit(copy / file, **changes)
    with pytest.raises(DataError, match=re.escape(words)) as refused:
        Dataset.open(copy)
    assert f"{copy / file} " in str(refused.value)


def test_unknown_splits_and_partitions_are_named(interactions: Path) -> None:
    with pytest.raises(DataError, match=r"no rows in split 'dev'; its splits are \['test', 'train'\]"):
        Dataset.open(interactions).index("dev")
    with pytest.raises(DataError, match=r"has no partition 'b', only \['all'\]"):
        Dataset.open(interactions, ["b"])


def test_sequences_missing_from_one_partition_are_named(tmp_path: Path) -> None:
    folder = Writer(tmp_path / "data").write("a", "b")
    edit(folder / "partitions" / "b" / "partition.json", sequences=[])
    with pytest.raises(DataError, match=r"b has no sequences, other partitions have some"):
        Dataset.open(folder)
    edit(folder / "partitions" / "a" / "partition.json", sequences=[{"file": "../x.arrow", "rows": 1, "checksum": ""}])
    with pytest.raises(DataError, match=r"names a file '../x.arrow', not a plain path inside it"):
        Dataset.open(folder)


def test_a_text_dataset_without_its_tokenizer_is_refused(texts: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(texts, tmp_path / "copy")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="is not a readable tokenizer"):
        Dataset.open(folder)


def test_invalid_indexes_are_refused(copy: Path) -> None:
    path, partition = copy / PARTITION / "train.index.arrow", copy / PARTITION / "partition.json"
    splits = json.loads(partition.read_text())["splits"]

    def attempt(entries: list[tuple], rows: int) -> Dataset:
        write_index(path, entries)
        facts = {"rows": rows, "queries": 5, "blocks": len(entries), "shards": []}
        facts["index_checksum"] = checksum(path)
        edit(partition, splits={**splits, "train": facts})
        return Dataset.open(copy)

    for name in ("../train-000000.tar", "/etc/x.tar", "..\\x.tar", ".hidden.tar", "train-000000.pickle", "pipe:cat x"):
        with pytest.raises(DataError, match=r"is not a plain file name ending in \.tar"):
            attempt([(name, 512, 10, 5, 5, 0)], 5).index("train")
    with pytest.raises(DataError, match="blocks without bytes or rows"):
        attempt([("a.tar", 512, 10, 0, 0, 0)], 0).index("train")
    with pytest.raises(
        DataError, match=r"5 rows of 5 queries in 1 blocks, partition\.json has 6 rows of 5 queries in 1"
    ):
        attempt([("a.tar", 512, 10, 5, 5, 0)], 6).index("train")
    shutil.copy(copy / PARTITION / "test.index.arrow", path)
    with pytest.raises(DataError, match="is damaged or belongs to other shards"):
        Dataset.open(copy).index("train")
