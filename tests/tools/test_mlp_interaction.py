"""Early interaction: an MLP is trained with the towers by the cached step, and re-ranks the best of the towers."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bigdssm.checkpoints.model_folder import load_model_folder, save_model_folder
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.models import Encoded, new_model
from bigdssm.training.cached_step import pair_batch
from tests.conftest import TinyDataset
from tools.evidence import mlp_interaction
from tools.evidence.mlp_interaction import Mlp, MlpReranker, mlp_loss, train


@pytest.fixture(scope="module")
def towers(tiny_interactions: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained towers."""
    small = [
        "model.dim=8",
        "model.query.mlp=[]",
        "model.doc.mlp=[]",
        "model.doc.text.layers=1",
        "model.doc.text.hidden=8",
    ]
    config = load_config(tiny_interactions.config, small)
    dataset = Dataset.open(tiny_interactions.dir)
    torch.manual_seed(0)
    model = new_model(config.model, dataset.schema, dataset.vocab_size)
    folder = tmp_path_factory.mktemp("towers") / "best"
    save_model_folder(folder, model, config, dataset.schema, dataset.tokenizer_dir, {"stage": "pretrain"})
    return folder


def test_the_command_prints_both_systems_and_their_difference(
    towers: Path, tiny_interactions: TinyDataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--top", 20, "--rows", 256, "--epochs", 0.5, "--negatives", 4]
    arguments = ["mlp_interaction", "--model", towers, "--data", tiny_interactions.dir, *options]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    mlp_interaction.main()
    first, second, difference = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"towers: NDCG@10 0\.\d{4}", first)
    assert re.fullmatch(r"MLP over the top 20: NDCG@10 0\.\d{4}", second)
    assert re.match(r"MLP over the top 20 − towers: NDCG@10 [+-]0\.\d{4} \[[+-]0\.\d{4}, [+-]0\.\d{4}\]", difference)


def test_the_loss_is_the_softmax_over_the_candidates() -> None:
    torch.manual_seed(0)
    mlp = Mlp(4)
    U, W = torch.randn(3, 4), torch.randn(5, 4)
    sides = {"x": torch.zeros(3, 1)}, {"x": torch.zeros(5, 1)}
    negatives = [[3, 4], [4, -1], [0, 3]]
    batch = pair_batch(*sides, positive=[0, 1, 2], negatives=negatives, relevance=[1.0, 2.0, 0.0])
    losses = []
    for row, of_row in enumerate(negatives[:2]):
        docs = [row, *(doc for doc in of_row if doc >= 0)]
        pairs = torch.stack([torch.cat([U[row], W[doc], U[row] * W[doc]]) for doc in docs])
        losses.append(-mlp.layers(pairs).squeeze(1).log_softmax(0)[0])
    found = mlp_loss(mlp, Encoded(U, W, None, torch.ones(1)), batch).loss
    torch.testing.assert_close(found, torch.stack(losses).mean())


def test_training_changes_towers_and_mlp_and_lowers_the_loss(towers: Path, tiny_interactions: TinyDataset) -> None:
    folder = load_model_folder(towers)
    dataset = folder.view(Dataset.open(tiny_interactions.dir))
    torch.manual_seed(0)
    mlp = Mlp(8)
    before = {name: weight.clone() for name, weight in folder.model.named_parameters()}
    rows = next(dataset.iterate("train", 50))
    docs = np.concatenate([rows.doc_rows[:, None], (rows.doc_rows[:, None] + [[1, 2, 3]]) % 30], axis=1)

    class Following:
        """Windows of the documents behind a query's own, so that the negatives are the same in every step."""

        def windows(self, keys: np.ndarray) -> np.ndarray:
            return np.tile(np.arange(20), (len(keys), 1))

    def loss() -> float:
        scores = torch.from_numpy(MlpReranker(folder.model, mlp, dataset).score(rows.query, docs))
        return float(torch.nn.functional.cross_entropy(scores, torch.zeros(len(docs), dtype=torch.int64)))

    first = loss()
    options = argparse.Namespace(lr=0.01, rows=256, epochs=2.0, negatives=8, seed=0)
    train(folder.model, mlp, dataset, Following(), options)  # type: ignore[arg-type]
    assert loss() < first - 0.01
    changed = {name for name, weight in folder.model.named_parameters() if not torch.equal(weight, before[name])}
    assert any(name.startswith("query_tower") for name in changed)
    assert any(name.startswith("doc_tower") for name in changed)
    absent = MlpReranker(folder.model, mlp, dataset).score(rows.query, np.full((len(docs), 2), -1))
    assert np.isneginf(absent).all()
