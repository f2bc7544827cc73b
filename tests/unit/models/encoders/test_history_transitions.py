"""The vector of the newest event's item and action, in all layouts of a batch, and its table as items are added."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bigdssm.config import Config, check_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError
from bigdssm.features import PADDING
from bigdssm.ingest.api import make_dataset
from bigdssm.models import DualEncoder, new_model
from bigdssm.models.encoders.history import HistoryEncoder
from bigdssm.models.packed import QueryPositions, pack
from tests.unit.models.encoders.transitions import NUM_ITEMS, TABLE, D, events, items, write_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = write_config(tmp_path_factory.mktemp("transition"))
    make_dataset(config, interactions=events(300), items=items(), split="time", processes=1)
    return config


@pytest.fixture(scope="module")
def model(config: Config) -> DualEncoder:
    torch.manual_seed(0)
    model = new_model(config.model, Dataset.open(config.data.dir).schema).eval()
    with torch.no_grad():
        model.tables.tables[TABLE].weight[1:].normal_()
    return model


def encoder_of(model: DualEncoder) -> HistoryEncoder:
    encoder = model.query_tower.encoders["past"]
    assert isinstance(encoder, HistoryEncoder)
    return encoder


def histories() -> tuple[Tensor, Tensor]:
    """Return items and actions [R, T] of histories of 3, 0, 5 and 1 events."""
    codes, actions = torch.zeros(2, 4, 5, dtype=torch.long).unbind()
    random = np.random.RandomState(1)
    for row, length in enumerate((3, 0, 5, 1)):
        codes[row, :length] = torch.from_numpy(random.randint(2, NUM_ITEMS + 2, length))
        actions[row, :length] = torch.from_numpy(random.randint(1, 4, length))
    return codes, actions


def expected(model: DualEncoder, codes: Tensor, actions: Tensor, row: int, length: int) -> Tensor:
    """Return the vector after the first `length` events of a row, by definition."""
    if length == 0:
        return torch.zeros(D)
    of_item = model.tables.tables[TABLE].weight[codes[row, length - 1]].view(-1, D)
    return of_item[0] + of_item[1 + actions[row, length - 1]]


@pytest.mark.parametrize("packed", [False, True])
def test_it_is_that_of_the_newest_event_in_all_layouts(packed: bool, model: DualEncoder) -> None:
    codes, actions = histories()
    values: Any = codes
    of_events = actions
    if packed:
        values = pack(codes, PADDING, int((codes != PADDING).sum()), 5)
        of_events = actions[codes != PADDING]
    with torch.no_grad():
        whole = encoder_of(model)._transitions(values, of_events, None)
        rows, lengths = [2, 0, 2, 1, 3, 0], [5, 1, 0, 0, 1, 3]
        positions = QueryPositions(torch.tensor(rows), torch.tensor(lengths))
        at_positions = encoder_of(model)._transitions(values, of_events, positions)
    newest = [expected(model, codes, actions, row, length) for row, length in enumerate((3, 0, 5, 1))]
    assert torch.equal(whole, torch.stack(newest)) and whole[0].abs().max() > 0.1
    earlier = [expected(model, codes, actions, row, length) for row, length in zip(rows, lengths, strict=True)]
    assert torch.equal(at_positions, torch.stack(earlier))


def test_it_is_added_to_the_vector_of_the_history(model: DualEncoder) -> None:
    codes, actions = histories()
    query = {"past": codes, "past.action": actions, "request.action": torch.full((4,), 2)}
    table = model.tables.tables[TABLE].weight
    with torch.no_grad():
        found = model(query=query).U
        kept = table.clone()
        table.zero_()
        difference = found - model(query=query).U
        table.copy_(kept)
    newest = [expected(model, codes, actions, row, length) for row, length in enumerate((3, 0, 5, 1))]
    torch.testing.assert_close(difference, torch.stack(newest), rtol=0, atol=1e-5)


def test_new_items_and_new_actions_extend_its_table(config: Config, tmp_path: Path) -> None:
    """Rows and columns of before are the same; those of a new action are zeros."""
    larger = write_config(tmp_path)
    make_dataset(larger, interactions=events(300), items=items(), split="time", processes=1)
    more = [{**event, "timestamp": event["timestamp"] + 10**6} for event in events(80, 20, ("view", "cart", "buy"))]
    before = Dataset.open(larger.data.dir).schema
    torch.manual_seed(0)
    model = new_model(larger.model, before)
    old = model.tables.tables[TABLE].weight.detach().clone()
    make_dataset(larger, interactions=more, items=items(20), split="train", partition="more", append=True, processes=1)
    grown = model.tables.grow(Dataset.open(larger.data.dir).schema)
    new = model.tables.tables[TABLE].weight
    assert grown[TABLE] == (len(old), len(new)) and len(new) > len(old)
    assert old.shape[1] == (1 + 4) * D and new.shape[1] == (1 + 5) * D
    assert torch.equal(new[: len(old), : old.shape[1]], old) and not new[:, old.shape[1] :].any()
    assert new[len(old) :, :D].abs().sum() > 0
    assert model.tables.grow(Dataset.open(larger.data.dir).schema) == {}


def test_a_feature_without_a_vocabulary_of_events_is_refused(config: Config, tmp_path: Path) -> None:
    history = replace(config.model.query.history, transition="device")
    query = replace(config.model.query, history=history)
    wrong = replace(config, model=replace(config.model, query=query))
    with pytest.raises(ConfigError, match=r"model.query.history.transition: got device, needs .*, of \['action'\]"):
        check_config(wrong)
    sharded = write_config(tmp_path, f"data.dir={config.data.dir}", "model.tables.rows=[doc.item_id]")
    with pytest.raises(ConfigError, match=r"transition=action: the table of doc\.item_id is sharded"):
        new_model(sharded.model, Dataset.open(config.data.dir).schema)
