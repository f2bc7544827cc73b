"""Every rank starts with the item embeddings that a single rank would have, and a stage trains from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bigdssm import distributed
from bigdssm.config import TablesConfig, WarmStartConfig, load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.models import new_model
from bigdssm.tables.optimizers import RowwiseAdagrad
from bigdssm.tables.sharded import ShardedTables
from bigdssm.training import warm_start
from bigdssm.training.warm_start import initialize_item_embeddings

from .spawn import Pool


def started(rank: int, world_size: int, config_file: Path) -> np.ndarray:
    config = load_config(config_file)
    dataset = Dataset.open(config.data.dir)
    torch.manual_seed(0)
    model = new_model(config.model, dataset.schema, dataset.vocab_size)
    if not distributed.is_main():
        warm_start._item_vectors = None  # type: ignore[assignment]  # rank 0 alone finds them
    initialize_item_embeddings(model, dataset, WarmStartConfig(window=3))
    return model.tables.tables["doc_item_id"].weight.detach().numpy()  # type: ignore[no-any-return,union-attr,operator]


def test_ranks_begin_with_one_table(tiny_interactions: Any, pools: dict[int, Pool]) -> None:
    alone = started(0, 1, tiny_interactions.config)
    assert np.abs(alone).max() > 0.1, "as it is initialized, all are below"
    for found in pools[2].run(started, tiny_interactions.config):
        np.testing.assert_array_equal(found, alone)


def sharded(rank: int, world_size: int, config_file: Path) -> np.ndarray:
    """Return the rows of a sharded table; all but those without co-occurrences are those of a replicated one."""
    config = load_config(config_file)
    dataset = Dataset.open(config.data.dir)
    model = new_model(replace(config.model, tables=TablesConfig("rows")), dataset.schema, dataset.vocab_size)
    tables = ShardedTables(list(model.tables.sharded.values()), RowwiseAdagrad(), 0)
    rows = torch.arange(model.tables.sharded["doc_item_id"].rows)
    initial = tables.look_up("doc_item_id", rows)
    initialize_item_embeddings(model, dataset, WarmStartConfig(window=3), tables)
    found = tables.look_up("doc_item_id", rows)
    return torch.where(found == initial, torch.nan, found).numpy()


def test_sharded_rows_begin_as_replicated_ones(tiny_interactions: Any, pools: dict[int, Pool]) -> None:
    replicated = started(0, 1, tiny_interactions.config)
    for ranks in (1, 2):
        for found in pools[ranks].run(sharded, tiny_interactions.config):
            started_rows = ~np.isnan(found[:, 0])
            assert 10 < started_rows.sum() < len(found)
            np.testing.assert_array_equal(found[started_rows], replicated[started_rows])
