"""The time from which an item is available: the same in every view of a dataset."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import bigdssm
from bigdssm.config import load_config
from bigdssm.config.keys import SourceConfig
from bigdssm.dataset.dataset import Dataset, open_dataset
from bigdssm.dataset.remote import FileCache
from bigdssm.evaluation.evaluate import evaluate_split
from bigdssm.retrieval.embed import Encoders
from tests.conftest import write_config
from tests.remote import Server

START, DAY, OLD, ITEMS, NEW_USERS = 1_700_000_000, 86_400, 20, 40, 10
DATA = {
    "query": {"past": {"type": "history", "of": "item_id", "max_items": 5}},
    "doc": {"item_id": {"type": "categorical"}},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the config of a dataset of two partitions: the newer one has other users, and half of the items.

    The rows of items are newer than all events, so that their first events decide.
    """
    folder = tmp_path_factory.mktemp("item_times")
    config = write_config(folder, DATA)
    names = [f"i{number}" for number in range(ITEMS)]
    for day, items in enumerate((names, names[:OLD])):
        users = np.repeat(np.arange(NEW_USERS), 4) + 100 * day
        events = pd.DataFrame({
            "user_id": [f"u{user}" for user in users], "item_id": np.resize(items, len(users)),
            "timestamp": START + day * DAY + np.arange(len(users)),
        })  # fmt: skip
        table = pd.DataFrame({"item_id": names, "updated": START + 30 * DAY})
        bigdssm.make_dataset(
            config, interactions=events, items=table, items_time_column="updated", partition=f"day{day}",
            append=day > 0, split="leave-one-out",
        )  # fmt: skip
    return config


def num_candidates(dataset: Dataset) -> set[int]:
    """Return the numbers of available items at the validation queries of the newest partition."""
    times = np.concatenate([dataset.request_times(rows) for rows in dataset.iterate("validation", 100)])
    later = dataset.later_items(times[times >= START + DAY])
    return {ITEMS - length for length in later.lengths.tolist()}


def test_every_view_has_the_same_candidates(config: Path) -> None:
    data = load_config(config).data
    whole = open_dataset(data)
    assert num_candidates(whole) == {ITEMS}
    sources = [SourceConfig(partitions=("day1",))]
    views = {
        "newest_part": whole.newest_part("validation"),
        "reopened": Dataset.open(data.dir, ["day1"]).newest_part("validation"),
        "from_partition": open_dataset(replace(data, from_partition="day1")),
        "mixture": open_dataset(replace(data, mixture=sources)),
    }
    for name, view in views.items():
        assert [partition.folder.name for partition in view.partitions] == ["day1"]
        np.testing.assert_array_equal(view.item_times, whole.item_times, name)
        assert num_candidates(view) == {ITEMS}, name


def test_a_partition_of_a_remote_dataset_has_the_same_times(config: Path, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    folder = Path(load_config(config).data.dir)
    server = Server(folder.parent)
    try:
        part = Dataset.open(f"{server.url}/{folder.name}", ["day1"], cache=FileCache(tmp_path, 1 << 30))
        np.testing.assert_array_equal(part.item_times, Dataset.open(folder).item_times)
    finally:
        server.close()


def test_validation_ranks_as_evaluate_does(config: Path) -> None:
    """All scores are equal, so that the rank of a target depends on the number of its candidates."""
    whole = open_dataset(load_config(config).data)
    equal = Encoders(lambda rows: torch.ones(rows.num_queries, 2), lambda rows: torch.ones(len(rows), 2))
    ranks = [
        evaluate_split(equal, dataset, "validation", exclude_seen=False).ranks
        for dataset in (whole, whole.newest_part("validation"))
    ]
    assert set(ranks[1]) == {1 + (ITEMS - 1) / 2}
    np.testing.assert_array_equal(ranks[0][-len(ranks[1]) :], ranks[1])
