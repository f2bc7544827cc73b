"""Item embeddings initialized from histories: the definition, the table, and errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

import bigdssm
from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.config import Config, WarmStartConfig, load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.transitions import Transitions
from bigdssm.errors import ConfigError
from bigdssm.models import DualEncoder, new_model
from bigdssm.training import warm_start
from bigdssm.training.checks import check_stage
from bigdssm.training.warm_start import initialize_item_embeddings, spectral_vectors

NAME = "tables.tables.doc_item_id.weight"


@pytest.fixture(scope="module")
def dataset(tiny_interactions: Any) -> Dataset:
    return Dataset.open(tiny_interactions.dir)


@pytest.fixture(scope="module")
def config(tiny_interactions: Any) -> Config:
    return load_config(tiny_interactions.config)


def model_of(config: Config, dataset: Dataset, dim: int) -> DualEncoder:
    torch.manual_seed(0)
    doc = replace(config.model.doc, embedding_dim=dim)
    return new_model(replace(config.model, doc=doc), dataset.schema, dataset.vocab_size)


def cooccurrence_counts(dataset: Dataset, window: int) -> np.ndarray:
    """Return the number of times that each item follows another, by definition, [codes, codes]."""
    size = dataset.schema.doc["item_id"].num_codes
    codes = dataset.catalogue.codes("item_id", np.arange(dataset.catalogue.num_docs))
    met = np.zeros((size, size))
    for rows in dataset.iterate("train", 7):
        for query in range(rows.num_queries):
            if rows.relevance[query] > 0:
                for distance, item in enumerate(rows.seen(query)[-window:][::-1], start=1):
                    met[codes[item], codes[rows.doc_rows[query]]] += 1 / distance
    return met


@pytest.mark.parametrize("dense", [True, False])
def test_products_are_the_nearest_to_the_roots_of_the_counts(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_start, "DENSE_UP_TO", 100 if dense else 1)
    random = np.random.RandomState(0)
    met = random.poisson(0.4, (60, 60)).astype(float)
    met[7] = met[:, 7] = 0
    found = spectral_vectors(csr_matrix(met), 5)
    values, vectors = np.linalg.eigh((np.sqrt(met) + np.sqrt(met).T) / 2)
    expected = (vectors[:, -5:] * values[-5:]) @ vectors[:, -5:].T
    np.testing.assert_allclose(found @ found.T, expected, atol=1e-9)
    np.testing.assert_allclose(found[7], 0, atol=1e-9)
    assert (found[np.abs(found).argmax(axis=0), range(5)] > 0).all(), "one of the two signs, on every machine"


@pytest.mark.parametrize("dense", [True, False])
def test_item_embeddings_start_from_co_occurrence(
    dense: bool, config: Config, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_start, "DENSE_UP_TO", 512 if dense else 1)
    model, other = model_of(config, dataset, 6), model_of(config, dataset, 6)
    initialize_item_embeddings(model, dataset, WarmStartConfig(window=3, length=0.4))
    weights, before = ({name: w.detach() for name, w in some.named_parameters()} for some in (model, other))
    assert all(torch.equal(weights[name], before[name]) for name in weights if name != NAME)
    table = weights[NAME].double().numpy()
    met = cooccurrence_counts(dataset, 3)
    known, expected = (met + met.T).any(axis=1), spectral_vectors(csr_matrix(met), 6)
    assert 10 < known.sum() < len(table)
    expected *= 0.4 / np.sqrt((expected[known] ** 2).sum(axis=1).mean())
    np.testing.assert_allclose(table[known], expected[known], atol=1e-6)
    np.testing.assert_array_equal(table[~known], before[NAME].numpy()[~known])


def test_excess_columns_of_a_wide_table_are_unchanged(config: Config, dataset: Dataset) -> None:
    size = dataset.schema.doc["item_id"].num_codes
    model, before = (model_of(config, dataset, 2 * size) for _ in range(2))
    initialize_item_embeddings(model, dataset, WarmStartConfig(window=3))
    table, old = (dict(some.named_parameters())[NAME].detach() for some in (model, before))
    assert torch.equal(table[:, size:], old[:, size:]) and not torch.equal(table[:, :size], old[:, :size])


def test_invalid_warm_starts_are_refused(tiny_interactions: Any, tiny_pairs: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pretrain.warm_start.window: got 3, needs 0: rows of .* have no hist"):
        check_stage(load_config(tiny_pairs.config, ["pretrain.warm_start.window=3"]), "pretrain", 1)
    with pytest.raises(ConfigError, match="window=17: needs at least 1 and at most 16 events"):
        Transitions.of(Dataset.open(tiny_interactions.dir), 17)


def test_a_model_that_is_loaded_keeps_its_tables(
    tiny_interactions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A night continues from yesterday's model with the config of the first one, whose warm start has no effect."""
    options = ["run.trackers=[]", "pretrain.warm_start.window=3", "pretrain.epochs=0", "pretrain.steps=1"]
    first = bigdssm.pretrain(tiny_interactions.config, [*options, f"run.dir={tmp_path / 'first'}"])
    monkeypatch.setattr("bigdssm.training.stages.initialize_item_embeddings", None)
    still = ["pretrain.optimizer.lr=1.0e-9", f"pretrain.init={first.best}", f"run.dir={tmp_path / 'night'}"]
    with caplog.at_level("INFO"):
        night = bigdssm.pretrain(tiny_interactions.config, [*options, *still])
    tables = [dict(load_model_folder(run.best).model.named_parameters())[NAME] for run in (first, night)]
    torch.testing.assert_close(tables[1], tables[0], rtol=0, atol=1e-7)
    note = f"pretrain.warm_start.window has no effect: pretrain starts from {first.best}"
    assert sum(note in record.message for record in caplog.records) == 1


def test_a_warm_started_run_resumes_from_its_checkpoint(
    config: Config, dataset: Dataset, tiny_interactions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model_of(config, dataset, config.model.doc.embedding_dim)
    initialize_item_embeddings(expected, dataset, WarmStartConfig(window=3))
    weight = dict(expected.named_parameters())[NAME].detach()
    where = [f"run.dir={tmp_path}", "run.trackers=[]", "pretrain.warm_start.window=3", "pretrain.epochs=0"]
    still = ["pretrain.optimizer.lr=1.0e-9", "pretrain.steps=1", "pretrain.save_every_steps=1"]
    trained = bigdssm.pretrain(tiny_interactions.config, [*where, *still])

    def table(folder: Path) -> torch.Tensor:
        return dict(load_model_folder(folder).model.named_parameters())[NAME].detach()

    assert torch.allclose(table(trained.best), weight, atol=1e-7)
    monkeypatch.setattr("bigdssm.training.stages.initialize_item_embeddings", None)  # a run that is resumed has its own
    more = bigdssm.pretrain(tiny_interactions.config, [*where, *still, "pretrain.steps=2"], resume=True)
    assert torch.allclose(table(more.best), weight, atol=1e-7)
