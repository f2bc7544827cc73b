"""Public sets as they are published, through their tables, to datasets with the counts that are published of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestTarget
from tools.public_data.tables import make_tables

from . import real_data


def dataset_of(folder: Path, config: str, **options: str | None) -> Dataset:
    """Build the dataset of the tables in `folder`, as in the header of the config."""
    tables = InteractionTables(folder / "interactions.tsv", folder / "items.tsv", **options)  # type: ignore[arg-type]
    data = load_config(real_data.ROOT / "configs" / f"{config}.yaml").data
    make_interactions(data, tables, IngestTarget(folder / "dataset"))
    return Dataset.open(folder / "dataset")


def test_amazon_beauty_has_its_published_counts(tmp_path: Path) -> None:
    made = make_tables("s3rec", real_data.shared("amazon_beauty"), tmp_path)
    assert (made.num_users, made.rows, made.notes) == (22_363, {"interactions": 198_502, "items": 12_101}, [])
    dataset = dataset_of(tmp_path, "amazon_beauty_attributes", time_column="position", time_unit="s")
    assert dataset.catalogue.num_docs == 12_101
    assert dataset.num_rows("validation") == dataset.num_rows("test") == 22_363
    # Of each user the first event has no history, the last two are held out.
    assert dataset.num_queries("train") == 198_502 - 3 * 22_363 == int(dataset.doc_counts().sum())
    assert len(dataset.schema.doc["attributes"].vocabulary) == 637

    (last,) = dataset.iterate("test", 22_363)
    first_user = np.flatnonzero(np.array(dataset.sequences.strings("query_key", last.sequence)) == "1")[0]
    assert dataset.catalogue.keys(last.seen(first_user)) == ["1", "2", "3", "4"]
    assert dataset.catalogue.keys(last.doc_rows[first_user : first_user + 1]) == ["5"]


def test_movielens_latest_walks_forward_in_time(tmp_path: Path) -> None:
    made = make_tables("movielens-latest", real_data.shared("ml_latest_small"), tmp_path)
    assert (made.num_users, made.rows, made.notes) == (671, {"interactions": 100_004, "items": 9_125}, [])
    dataset = dataset_of(tmp_path, "movielens_latest", split="time")
    assert dataset.catalogue.num_docs == 9_125
    queries = {split: dataset.num_queries(split) for split in ("train", "validation", "test")}
    assert sum(queries.values()) == 100_004 - 671, "each event but a user's first is a query of one split"
    assert 0.04 < queries["test"] / 100_004 < 0.06 and 0.04 < queries["validation"] / 100_004 < 0.06
