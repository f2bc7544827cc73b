"""A model that starts from a factorized chain: its counts, its vectors, and the scores of the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

import bigdssm
from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.checkpoints.removal import _rows_of_tables
from bigdssm.config import Config, WarmStartConfig, check_config, load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError, DataError
from bigdssm.features.base import OUT_OF_VOCABULARY
from bigdssm.ingest.api import make_dataset
from bigdssm.models import DualEncoder, new_model
from bigdssm.models.embedding_tables import TransitionTable
from bigdssm.training import chain_start
from bigdssm.training.chain_start import Counts, count_followers, fitted_chain, initialize_from_chain
from tests.unit.models.encoders.transitions import TABLE, D, events, items, write_config

DAY = 86_400
CHAIN = ["pretrain.warm_start.chain=true", "pretrain.warm_start.half_life_days=2"]


def daily_events() -> list[dict[str, Any]]:
    return [{**event, "timestamp": event["timestamp"] + 3600 * number} for number, event in enumerate(events(300))]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = write_config(tmp_path_factory.mktemp("chain"), *CHAIN)
    make_dataset(config, interactions=daily_events(), items=items(), split="time", processes=1)
    return config


@pytest.fixture(scope="module")
def dataset(config: Config) -> Dataset:
    return Dataset.open(config.data.dir)


def model_of(config: Config, dataset: Dataset) -> DualEncoder:
    torch.manual_seed(0)
    return new_model(config.model, dataset.schema)


def table_of(config: Config, dataset: Dataset) -> TransitionTable:
    return model_of(config, dataset).tables.transitions[TABLE]


@pytest.mark.parametrize("half_life", [0, 2])
def test_counts_are_those_of_the_train_events_by_age(half_life: int, config: Config, dataset: Dataset) -> None:
    counts = count_followers(dataset, table_of(config, dataset), "action", half_life)
    code_of = {value: code for code, value in enumerate(dataset.schema.doc["item_id"].vocabulary, start=2)}
    action_of = {value: code for code, value in enumerate(dataset.schema.event["action"].vocabulary, start=2)}
    train = daily_events()[: dataset.num_queries("train")]
    newest = train[-1]["timestamp"] // DAY
    expected: dict[tuple[int, int, int], float] = {}
    last: dict[str, dict[str, Any]] = {}
    for event in train:
        if (before := last.get(event["user_id"])) is not None:
            key = code_of[before["item_id"]], action_of[before["action"]], code_of[event["item_id"]]
            age = newest - event["timestamp"] // DAY
            expected[key] = expected.get(key, 0.0) + (2 ** (-age / half_life) if half_life else 1.0)
        last[event["user_id"]] = event
    matrix = counts.matrix.tocoo()
    found = {
        (int(counts.items[row]), int(counts.actions[row]), int(counts.followers[column])): value
        for row, column, value in zip(matrix.row, matrix.col, matrix.data, strict=True)
    }
    assert len(expected) > 100 and found == pytest.approx(expected, rel=1e-5)


def test_the_vectors_have_the_probabilities_of_the_counts() -> None:
    """12 pairs of an item and an action, each with a distribution of its own that no single item has."""
    random = np.random.RandomState(0)
    followers = random.dirichlet([0.3] * 8, 12).astype(np.float32) * 50
    counts = Counts(np.repeat(np.arange(2, 8), 2), np.tile([2, 3], 6), np.arange(2, 10), csr_matrix(followers))
    table = TransitionTable("item_id", 10, 16, 4)
    chain = fitted_chain(counts, table, 0.0, 0, has_bias=True)
    rows = chain.transitions.view(10, 5, 16)
    vectors = rows[counts.items, 0] + rows[counts.items, 1 + counts.actions]
    share = ((vectors + chain.bias) @ chain.documents.T).softmax(dim=1).numpy()
    expected = followers / followers.sum(axis=1, keepdims=True)
    assert np.abs(share - expected).max() < 0.15 and np.abs(share - expected).mean() < 0.02
    again = fitted_chain(counts, table, 0.0, 0, has_bias=True)
    assert torch.equal(again.transitions, chain.transitions) and torch.equal(again.documents, chain.documents)
    assert not fitted_chain(counts, table, 0.0, 0, has_bias=False).bias.any()


def test_a_new_model_scores_as_the_chain(config: Config, dataset: Dataset) -> None:
    """Without the other part of the history, the request and contents, which are small at first."""
    model = model_of(config, dataset).eval()
    settings = config.pretrain.warm_start
    initialize_from_chain(model, dataset, settings, seed=3)
    counts = count_followers(dataset, table_of(config, dataset), "action", settings.half_life_days)
    chain = fitted_chain(counts, table_of(config, dataset), 0.0, 3, has_bias=True)
    history = torch.from_numpy(counts.items)[:, None]
    query = {"past": history, "past.action": torch.from_numpy(counts.actions)[:, None]}
    query["request.action"] = torch.full((len(history),), 2)
    with torch.no_grad():
        encoded = model(query, {"item_id": torch.from_numpy(counts.followers)})
        found = encoded.alpha * encoded.U @ encoded.W.T + encoded.beta
    rows = chain.transitions.view(-1, 5, D)
    vectors = rows[counts.items, 0] + rows[counts.items, 1 + counts.actions]
    expected = (vectors + chain.bias) @ chain.documents.T
    assert expected.std() > 0.5
    rest = (found - expected).std() / expected.std()
    assert 0 < rest < 0.2, "the rest of the vectors is small"


def test_items_without_events_keep_their_vectors(config: Config, dataset: Dataset) -> None:
    model, other = model_of(config, dataset), model_of(config, dataset)
    initialize_from_chain(model, dataset, config.pretrain.warm_start, seed=0)
    counts = count_followers(dataset, table_of(config, dataset), "action", 2)
    for name, codes in ((TABLE, counts.items), ("doc_item_id", counts.followers)):
        weight, before = (some.tables.tables[name].weight.detach() for some in (model, other))
        changed = (weight != before).any(dim=1).nonzero().flatten().numpy()
        assert np.array_equal(changed, np.unique(codes)) and len(changed) < len(weight)


def test_a_run_starts_from_the_chain_and_resumes_without_it(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ["pretrain.optimizer.lr=1.0e-9", "pretrain.steps=1", "pretrain.epochs=0", "pretrain.save_every_steps=1"]
    path = Path(config.data.dir).parent / "config.yaml"
    trained = bigdssm.pretrain(path, [*CHAIN, *run])
    dataset = Dataset.open(config.data.dir)
    expected = model_of(config, dataset)
    initialize_from_chain(expected, dataset, config.pretrain.warm_start, seed=config.run.seed)
    first, second = (some.tables.tables[TABLE].weight for some in (load_model_folder(trained.best).model, expected))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    monkeypatch.setattr("bigdssm.training.stages.initialize_from_chain", None)
    more = bigdssm.pretrain(path, [*CHAIN, *run, "pretrain.steps=2"], resume=True)
    third = load_model_folder(more.best).model.tables.tables[TABLE].weight
    torch.testing.assert_close(third, first, rtol=0, atol=1e-6)


def test_a_night_starts_the_transitions_of_new_items_as_those_of_unknown_ones(tmp_path: Path) -> None:
    """Deletion of an item erases its row, too."""
    config = write_config(tmp_path, *CHAIN)
    make_dataset(config, interactions=events(300), items=items(), split="train", processes=1)
    run = ["pretrain.optimizer.lr=1.0e-9", "pretrain.steps=1", "pretrain.epochs=0"]
    first = bigdssm.pretrain(tmp_path / "config.yaml", [*CHAIN, *run]).best
    more = [{**event, "timestamp": event["timestamp"] + 10**6} for event in events(80, 20)]
    make_dataset(config, interactions=more, items=items(20), split="train", partition="more", append=True, processes=1)
    night = [f"pretrain.init={first}", f"run.dir={tmp_path / 'night'}", "data.from_partition=more"]
    second = bigdssm.pretrain(tmp_path / "config.yaml", [*CHAIN, *run, *night]).best
    before, after = (load_model_folder(path).model.tables.tables[TABLE].weight for path in (first, second))
    assert len(after) == len(before) + 8
    torch.testing.assert_close(after[: len(before)], before, rtol=0, atol=1e-6)
    assert before[OUT_OF_VOCABULARY].abs().sum() > 0
    unknown = before[OUT_OF_VOCABULARY].expand(8, -1)
    torch.testing.assert_close(after[len(before) :], unknown, rtol=0, atol=1e-6)

    codes = np.array([3, 5])
    rows = _rows_of_tables(second, {("doc", "item_id"): codes})
    assert {name: table.tolist() for name, table in rows.items()} == {"doc_item_id": [3, 5], TABLE: [3, 5]}


def test_a_chain_of_too_many_items_or_of_no_events_is_refused(
    config: Config, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(chain_start, "MOST_ITEMS", 5)
        with pytest.raises(DataError, match="got 12 items with events, needs at most 5, as its cost is quadratic"):
            initialize_from_chain(model_of(config, dataset), dataset, WarmStartConfig(chain=True), 0)
    single = write_config(tmp_path, *CHAIN)
    alone = [{**event, "user_id": f"v{number}"} for number, event in enumerate(events(30))]
    make_dataset(single, interactions=alone, items=items(), split="train", processes=1)
    with pytest.raises(DataError, match="no train event follows another"):
        initialize_from_chain(
            model_of(single, Dataset.open(single.data.dir)),
            Dataset.open(single.data.dir),
            single.pretrain.warm_start,
            0,
        )


@pytest.mark.parametrize(
    "change",
    [
        "model.query.residual=null",
        "model.doc.residual=null",
        "model.score=cosine",
        "model.query.history.transition=null",
    ],
)
def test_a_chain_that_is_no_part_of_the_score_is_refused(change: str, config: Config) -> None:
    path = Path(config.data.dir).parent / "config.yaml"
    with pytest.raises(ConfigError, match=r"pretrain.warm_start.chain: got True, needs model.query.history.transition"):
        check_config(load_config(path, [*CHAIN, change]))
