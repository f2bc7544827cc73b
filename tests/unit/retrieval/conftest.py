"""Small random models of the tiny interactions, as model folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bigdssm.checkpoints.model_folder import load_model_folder, save_model_folder
from bigdssm.config import Config, ScorerConfig, load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.models import DualEncoder, new_model
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.retrieval.index import build_index
from bigdssm.retrieval.vectors import write_vectors

SMALL = ("dim=8", "query.mlp=[16]", "doc.mlp=[16]", "doc.text.layers=1", "doc.text.hidden=8")


def random_model(config: Config, dataset: Dataset, seed: int, scorer: ScorerConfig | None = None) -> DualEncoder:
    """Return a model whose parameters all affect the scores, beta included."""
    torch.manual_seed(seed)
    model = new_model(config.model, dataset.schema, dataset.vocab_size, scorer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
    return model.eval()


@pytest.fixture(scope="session")
def config(tiny_interactions: Any) -> Config:
    return load_config(tiny_interactions.config, [f"model.{override}" for override in SMALL])


@pytest.fixture(scope="session")
def dataset(tiny_interactions: Any) -> Dataset:
    return Dataset.open(tiny_interactions.dir)


@pytest.fixture(scope="session")
def model(config: Config, dataset: Dataset) -> DualEncoder:
    return random_model(config, dataset, seed=1)


@pytest.fixture(scope="session")
def model_dir(config: Config, dataset: Dataset, model: DualEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "first"
    save_model_folder(folder, model, config, dataset.schema, dataset.tokenizer_dir, {"stage": "pretrain", "step": 3})
    return folder


@pytest.fixture(scope="session")
def other_model_dir(config: Config, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "second"
    other = random_model(config, dataset, seed=2)
    save_model_folder(folder, other, config, dataset.schema, dataset.tokenizer_dir, {})
    return folder


@pytest.fixture(scope="module")
def index_dir(model_dir: Path, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build an index next to the model's vectors, once per module, since some tests modify it."""
    folder, loaded = tmp_path_factory.mktemp("served"), load_model_folder(model_dir)
    write_vectors(folder / "vectors", tower_encoders(loaded.model, dataset), dataset, loaded.checksum)
    build_index(folder / "vectors", folder / "index")
    return folder / "index"
