"""A model with an MLP scorer is evaluated over every document."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bigdssm.checkpoints.model_folder import load_model_folder, save_model_folder
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import CheckpointError
from bigdssm.evaluation.evaluate import encoders_of, evaluate_split
from bigdssm.loader.batch import Collator, to_features
from bigdssm.models import DualEncoder
from bigdssm.models.declarations import MlpConfig
from bigdssm.models.scorers import MlpScorer
from tests.unit.conftest import SMALL, random_model

MLP = MlpConfig(hidden=(12, 5))
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def mlp_dir(tiny_interactions: Any, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides = [f"model.{override}" for override in SMALL]
    loss = "sft={loss: {name: pair_ce}, negatives: {hard: 3, in_batch: false}, scorer: {name: mlp, hidden: [12, 5]}}"
    config = load_config(tiny_interactions.config, [*overrides, loss])
    model = random_model(config, dataset, seed=1, scorer=config.stage("sft").scorer)
    folder = tmp_path_factory.mktemp("mlp") / "model"
    save_model_folder(folder, model, config, dataset.schema, dataset.tokenizer_dir, {"stage": "sft", "step": 3})
    return folder


def test_every_document_is_scored(mlp_dir: Path, dataset: Dataset) -> None:
    model = load_model_folder(mlp_dir).model
    assert model.scorer is not None
    found = evaluate_split(encoders_of(model, dataset), dataset, "test", rows_per_chunk=7)
    collator = Collator(dataset.schema, dataset.catalogue)
    rows = next(dataset.iterate("test", 1000))
    num_docs = dataset.catalogue.num_docs
    with torch.no_grad():
        docs = to_features(dataset.schema.doc, dataset.catalogue.columns(np.arange(num_docs)))
        everything = torch.arange(num_docs).expand(len(rows), num_docs)
        scores = model(collator.query_features(rows.query), docs, everything).scores.double()
    expected = []
    for i, target in enumerate(rows.doc_rows):
        others = [j for j in range(num_docs) if j != target and j not in rows.seen(i)]
        expected.append(1 + sum(float(scores[i, j]) > float(scores[i, target]) for j in others))
    np.testing.assert_array_equal(found.ranks[rows.row_ids], expected)
    assert len(set(expected)) > 10


def test_a_folder_without_a_scorer_gets_a_new_one(mlp_dir: Path, model_dir: Path, model: DualEncoder) -> None:
    torch.manual_seed(4)
    loaded = load_model_folder(model_dir, scorer=MLP).model
    assert loaded.scorer is not None and loaded.scorer.widths == (8, (12, 5))
    torch.manual_seed(4)
    load_model_folder(model_dir)
    for name, tensor in MlpScorer(8, (12, 5)).state_dict().items():  # initialized after everything else
        assert torch.equal(loaded.scorer.state_dict()[name], tensor), name
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with pytest.raises(RuntimeError, match=r"it has a scorer, with scorer\.of_query\.weight"):
        loaded.load_towers(loaded.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        loaded.load_towers({})
    with pytest.raises(CheckpointError, match="it has a scorer"):
        load_model_folder(mlp_dir, scorer=MLP)


@pytest.mark.slow
@pytest.mark.e2e
def test_the_evaluate_tool_accepts_an_mlp_score(
    mlp_dir: Path, model_dir: Path, dataset: Dataset, tmp_path: Path
) -> None:
    def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, f"tools/{name}.py", *map(str, arguments), "--data", str(dataset.dir)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    done = run("evaluate", "--model", mlp_dir, "--compare", model_dir)
    assert done.returncode == 0 and "model − first: HR@10" in done.stdout, done.stderr
