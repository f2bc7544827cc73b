"""A small dataset with all kinds of features, and small random models of it as model folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from bigdssm.config import Config, load_config
from bigdssm.data import Dataset
from bigdssm.data.interactions import InteractionTables, make_interactions
from bigdssm.data.making import Target
from bigdssm.export import save_model_folder
from bigdssm.models import DualEncoder

NUM_USERS, NUM_ITEMS = 40, 60
WORDS = ["alpha", "beta", "gamma", "delta", "north", "south", "river", "stone", "night", "day", "king", "queen"]

SECTIONS = {
    "run": {"dir": "runs/tiny"},
    "data": {
        "display": "title",
        "query": {
            "history": {"type": "history", "of": "item_id", "max_items": 5},
            "age": {"type": "numeric"},
            "gender": {"type": "categorical"},
        },
        "doc": {
            "item_id": {"type": "categorical"},
            "title": {"type": "text", "max_tokens": 8},
            "genres": {"type": "categorical", "multi": True},
            "year": {"type": "numeric"},
        },
        "tokenizer": {"vocab_size": 200},
        "lanes": 2,
    },
    "model": {
        "dim": 8,
        "query": {"mlp": [16]},
        "doc": {"mlp": [16], "embedding_dim": 8, "text": {"layers": 1, "hidden": 8, "heads": 2}},
    },
    "pretrain": {"rows_global": 64},
}


def random_model(config: Config, dataset: Dataset, seed: int) -> DualEncoder:
    """Return a model in which every parameter matters, beta included."""
    torch.manual_seed(seed)
    model = DualEncoder(config.model, dataset.schema, dataset.pad_token_id, dataset.vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("config")
    sections = {**SECTIONS, "data": {**SECTIONS["data"], "dir": str(folder / "data")}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(sections, sort_keys=False))
    return load_config(folder / "tiny.yaml")


@pytest.fixture(scope="session")
def dataset(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """40 users with 4 to 30 events each over 60 items; some events repeat."""
    random = np.random.RandomState(0)
    folder = tmp_path_factory.mktemp("tables")
    items = ["item_id\ttitle\tgenres\tyear"]
    for item in range(NUM_ITEMS):
        words = " ".join(random.choice(WORDS, random.randint(1, 5)))
        items.append(f"i{item}\tThe {words} {item}\t{' '.join(random.choice(['a', 'b', 'c'], 2))}\t{1950 + item}")
    users = ["user_id\tage\tgender", *(f"u{user}\t{20 + user}\t{'mf'[user % 2]}" for user in range(NUM_USERS))]
    events = ["user_id\titem_id\ttimestamp"]
    for user in range(NUM_USERS):
        for time in range(random.randint(4, 31)):
            events.append(f"u{user}\ti{int(NUM_ITEMS * random.rand() ** 2)}\t{time}")
    for name, lines in (("items", items), ("users", users), ("events", events)):
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    tables = InteractionTables(folder / "events.tsv", folder / "items.tsv", folder / "users.tsv")
    make_interactions(config.data, tables, Target(Path(config.data.dir)))
    return Dataset.open(config.data.dir)


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
