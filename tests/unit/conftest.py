"""Small random models of the tiny interactions, as model folders; a run folder, and datasets written by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bigdssm.checkpoints.model_folder import load_model_folder, save_model_folder
from bigdssm.config import Config, load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.models import DualEncoder, new_model
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.retrieval.index import build_index
from bigdssm.retrieval.vectors import write_vectors
from tests.command_line import Tools
from tests.tiny_datasets import Writer

SMALL = ("dim=8", "query.mlp=[16]", "doc.mlp=[16]", "doc.text.layers=1", "doc.text.hidden=8", "beta=document")
WIDTH = 9  # of index vectors: dim and beta


def random_model(config: Config, dataset: Dataset, seed: int) -> DualEncoder:
    """Return a model whose parameters all affect the scores, beta included."""
    torch.manual_seed(seed)
    model = new_model(config.model, dataset.schema, dataset.vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
    return model.eval()


def write_cross_encoder(folder: Path, dataset: Dataset, outputs: int = 1) -> tuple[Any, Any]:
    """Write a random cross-encoder with the dataset's tokenizer; return its transformer and tokenizer."""
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    assert dataset.tokenizer_dir is not None
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=dataset.vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=outputs,
        initializer_range=0.5,
    )
    model = BertForSequenceClassification(config).eval()
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(dataset.tokenizer_dir / "tokenizer.json"), **special)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


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


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tools:
    return Tools(monkeypatch, capsys)


@pytest.fixture(scope="module")
def run_dir(config: Config, model_dir: Path, other_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as after training, without checkpoints."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    for stage, best in (("pretrain", model_dir), ("sft", other_model_dir)):
        shutil.copytree(best, run / stage / "best")
        content = {**config.to_dict(), "sft": config.to_dict()["pretrain"]}
        (run / stage / "config.yaml").write_text(yaml.safe_dump(content))
        with (run / stage / "metrics.jsonl").open("w") as file:
            for step in range(10, 110, 10):
                record = {"step": step, "loss": 5 / step, "alpha": 10 + step / 10, "rows_per_s": 2048.0, "lr": 0.1}
                file.write(json.dumps(record) + "\n")
                if step % 50 == 0:
                    validation = {"hr_at_10": 0.1, "ndcg_at_10": step / 1000, "mrr": 0.1}
                    record = {"step": step, "validation": validation, "selected_by": "ndcg_at_10", "seconds": 0.5}
                    file.write(json.dumps(record) + "\n")
            file.write('{"step": 110, "lo')  # killed while writing
    return run


@pytest.fixture(scope="session")
def interactions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 train rows in 16 blocks, targets and histories in their sequences."""
    return Writer(tmp_path_factory.mktemp("interactions") / "data").write()


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text pairs with a catalogue."""
    return Writer(tmp_path_factory.mktemp("texts") / "data", text=True, interactions=False).write()
