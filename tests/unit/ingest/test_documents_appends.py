"""Appends of items without events: new ones, new versions, withdrawals and returns."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigdssm import make_dataset
from bigdssm.commands import make_shards
from bigdssm.config import DataConfig
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.stamps import STAMPS_FILE
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Categorical, History, Numeric
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestReport, IngestTarget
from bigdssm.ingest.pairs import ItemTables, PairTables, make_items, make_pairs
from bigdssm.loader.inspection import describe, verify_dataset

DOC = {"item": Categorical(column="item_id"), "price": Numeric()}
CONFIG = DataConfig(dir="", time_unit="s", query={"past": History(of="item", max_items=9)}, doc=DOC)
TIMES = [{}, {"items_time_column": "since"}]


def write(path: Path, rows: list[str], since: int = 0) -> Path:
    """Write items, given as `key:price` or `key`; `since` is the time of all rows."""
    cells = [row.partition(":") for row in rows]
    path.write_text("item_id,price,since\n" + "".join(f"{key},{price or 1},{since}\n" for key, _, price in cells))
    return path


def begin(folder: Path, partition: str = "base", day: int = 0, **options: Any) -> None:
    """Build a dataset of the items i0 to i5, or append events of `day` to it."""
    events = [f"{user},i{(n + day) % 6},{100 * day + n}" for user in "uvw" for n in range(4)]
    (folder / "events.csv").write_text("\n".join(["user_id,item_id,timestamp", *events]) + "\n")
    items = write(
        folder / "items.csv", [f"i{n}" for n in range(6)] if not day else ["i0", "i1", "i2", "i3", "i4", "i5"]
    )
    tables = InteractionTables(folder / "events.csv", items, split="train", **options)
    make_interactions(CONFIG, tables, IngestTarget(folder / "out", partition, append=day > 0, processes=1))


def append(
    folder: Path, name: str, items: list[str] | None = None, withdrawn: list[str] | None = None,
    config: DataConfig = CONFIG, since: int = 0, **options: Any,
) -> IngestReport:  # fmt: skip
    tables = {
        kind: write(folder / f"{kind}.csv", rows, since)
        for kind, rows in (("items", items), ("withdrawn", withdrawn))
        if rows is not None
    }
    options = options if items is not None else {}
    return make_items(
        config, ItemTables(**tables, **options), IngestTarget(folder / "out", name, append=True, processes=1)
    )


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != STAMPS_FILE]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def withdrawn_keys(folder: Path) -> list[str]:
    catalogue = Dataset.open(folder / "out").catalogue
    return catalogue.keys(catalogue.withdrawn)


@pytest.mark.parametrize("options", TIMES)
def test_items_are_added_changed_withdrawn_and_back(tmp_path: Path, options: dict[str, Any]) -> None:
    begin(tmp_path, **options)
    before, rows = content(tmp_path / "out"), list(Dataset.open(tmp_path / "out").iterate("train", 99))
    report = append(tmp_path, "a", ["i6", "i2:7", "i1"], since=50, **options)
    assert (report.rows, report.num_docs, report.new_docs, report.changed_docs) == ({}, 7, 1, 1)
    report = append(tmp_path, "b", None, ["i2", "i6"])
    assert report.notes == ("items withdrawn: 2, back: 0",)
    assert withdrawn_keys(tmp_path) == ["i2", "i6"]
    report = append(tmp_path, "c", ["i2:7", "i6", "i7"], ["i6", "i2", "i7"], since=60, **options)
    assert withdrawn_keys(tmp_path) == ["i2", "i6", "i7"], "an item of both tables is withdrawn"
    begin(tmp_path, "day", 1, **options)
    assert withdrawn_keys(tmp_path) == ["i2", "i6", "i7"], "events and their items bring nothing back"
    append(tmp_path, "d", ["i6", "i2:9"], since=70, **options)
    assert withdrawn_keys(tmp_path) == ["i7"]
    dataset = Dataset.open(tmp_path / "out")
    assert [partition.name for partition in dataset.partitions] == ["base", "day"]
    assert np.asarray(dataset.catalogue.column("price", np.array([2, 6]))).tolist() == [9.0, 1.0]
    assert dataset.catalogue.num_docs == 8 and dataset.num_rows("train") == 21
    after = content(tmp_path / "out")
    assert all(after[name] == before[name] for name in before if name.startswith(("catalogue/", "partitions/")))
    of_base = list(Dataset.open(tmp_path / "out", ["base"]).iterate("train", 99))
    assert [some.doc_rows.tolist() for some in of_base] == [some.doc_rows.tolist() for some in rows]
    assert verify_dataset(tmp_path / "out") == []
    assert describe(dataset).num_withdrawn == 1
    (path,) = (tmp_path / "out" / "catalogue").glob("withdrawals-000002.arrow")
    path.write_bytes(path.read_bytes()[:-9] + b"x" * 9)
    assert len(verify_dataset(tmp_path / "out")) == 1


def test_an_opened_or_pickled_dataset_does_not_change_with_an_append(tmp_path: Path) -> None:
    """Loader processes open the dataset again."""
    begin(tmp_path)
    opened = Dataset.open(tmp_path / "out")
    pickled, fingerprint = pickle.dumps(opened), opened.fingerprint
    append(tmp_path, "a", ["i9", "i1:8"], ["i0"])
    again, now = pickle.loads(pickled), Dataset.open(tmp_path / "out")
    assert (again.fingerprint, again.catalogue.num_docs, again.schema) == (fingerprint, 6, opened.schema)
    assert again.catalogue.withdrawn.tolist() == [] and again.catalogue.versions is None
    assert now.fingerprint != fingerprint and now.catalogue.withdrawn.tolist() == [0]
    assert now.extents[0].of(json.loads((tmp_path / "out/dataset.json").read_text()))["partitions"] == ["base", "a"]


def test_datasets_without_item_appends_keep_their_description(tmp_path: Path) -> None:
    begin(tmp_path)
    begin(tmp_path, "day", 1)
    described = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert not {"withdrawals", "item_partitions"} & described.keys()


def test_documents_of_pairs_are_added_by_their_id(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("q,item_id,price\n" + "".join(f"q{n},i{n % 3},1\n" for n in range(30)))
    config = replace(CONFIG, query={"q": Categorical()})
    for out, column in (("out", "item_id"), ("by_content", None)):
        tables = PairTables((tmp_path / "pairs.csv",), doc_id_column=column, split="train")
        make_pairs(config, tables, IngestTarget(tmp_path / out, processes=1))
    report = append(tmp_path, "a", ["i3", "i1:4", "i2"], ["i0"], config=config)
    assert (report.new_docs, report.changed_docs) == (1, 1) and withdrawn_keys(tmp_path) == ["i0"]
    (tmp_path / "out").rename(tmp_path / "moved")
    (tmp_path / "by_content").rename(tmp_path / "out")
    with pytest.raises(ConfigError, match="identifies each doc by its features, not by an id; append pairs instead"):
        append(tmp_path, "a", ["i3"], config=config)


def test_bad_tables_of_items(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(tmp_path)
    before = content(tmp_path / "out")
    with pytest.raises(DataError, match=r"withdrawn.csv, row 2: item_id 'i77' is no item of .*/out"):
        append(tmp_path, "a", None, ["i0", "i77"])
    with pytest.raises(DataError, match="no item is new, changed, withdrawn or back"):
        append(tmp_path, "a", ["i0"])
    with pytest.raises(ConfigError, match="has one row of features per item, so leave out --items-time-column"):
        append(tmp_path, "a", ["i9"], items_time_column="since")
    assert content(tmp_path / "out") == before
    lenient = replace(CONFIG, max_bad_fraction=0.5)
    assert append(tmp_path, "a", None, ["i0", "i77"], config=lenient).num_bad == 1
    assert "'i77' is no item" in (tmp_path / "out" / "quarantine.jsonl").read_text()
    with pytest.raises(DataError, match="partition 'a' has items alone, no rows"):
        Dataset.open(tmp_path / "out", first="a")
    table = {"item_id": ["i0"]}
    with pytest.raises(ConfigError, match="withdrawn= needs append=True, and no other table than items="):
        make_dataset(_config(tmp_path), withdrawn=table)
    assert make_shards.main(["items", "--config", str(_config(tmp_path)), "--items", "x.csv"]) == 2
    assert "needs --append NAME, which adds to a dataset, and --items or --withdrawn" in capsys.readouterr().err


def _config(folder: Path) -> Path:
    path = folder / "c.yaml"
    doc = "{item: {type: categorical, column: item_id}, price: {type: numeric}}"
    past = "{past: {type: history, of: item, max_items: 9}}"
    path.write_text(
        f"run: {{dir: {folder}/run}}\ndata: {{dir: {folder / 'out'}, time_unit: s, query: {past}, doc: {doc}}}\n"
    )
    return path


def test_the_command_line_appends_items(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(tmp_path)
    write(tmp_path / "new.csv", ["i6"])
    write(tmp_path / "gone.csv", ["i0"])
    arguments = ["items", "--config", _config(tmp_path), "--append", "a", "--items", tmp_path / "new.csv"]
    assert make_shards.main([str(word) for word in [*arguments, "--withdrawn", tmp_path / "gone.csv"]]) == 0
    assert "7 documents (1 of them new)" in capsys.readouterr().out and withdrawn_keys(tmp_path) == ["i0"]
    report = make_dataset(_config(tmp_path), items={"item_id": ["i0"], "price": [1]}, append=True, partition="b")
    assert report.notes == ("items withdrawn: 0, back: 1",) and withdrawn_keys(tmp_path) == []
