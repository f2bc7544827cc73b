"""Measure early interaction: an MLP over the vectors of two towers re-ranks the towers' best documents.

    python -m tools.evidence.mlp_interaction --model runs/NAME/pretrain/best --data datasets/NAME

The folder has towers with FPS pretraining, without features of requests. A copy of them is trained together with an
MLP over [u, w, u·w] by softmax over each query's positive and negatives sampled from the towers' best documents. The
MLP then re-ranks the best `--top` documents of the towers as they were before. Source: He et al. 2017, eq. 11.

The step is `bigdssm.cached_step`; the backward of its loss function also adds the gradients of the MLP, which the
function contains. (On several ranks they would not be averaged.) The towers run on the whole batch: chunk_tokens=0.

Choose `--lr` and `--epochs` with `--split validation`. Shapes: m queries, k candidates per query, D vector width.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

import bigdssm
from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import EventRules
from bigdssm.evaluation.comparison import System, differences
from bigdssm.evaluation.evaluate import Reranking, evaluate_split
from bigdssm.features import Column
from bigdssm.loader.batch import Batch, Collator
from bigdssm.loader.stream import PairStream
from bigdssm.losses import LossOutput
from bigdssm.models import DualEncoder, Encoded
from bigdssm.retrieval.embed import encode_columns, tower_encoders, tower_output
from bigdssm.retrieval.hard_negatives import HardNegatives
from bigdssm.retrieval.mining import mine
from bigdssm.retrieval.reranking import Reranker

HIDDEN = 64


class Mlp(nn.Module):
    """An MLP over [u, w, u·w] with one hidden layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3 * dim, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 1))

    def forward(self, u: Tensor, w: Tensor) -> Tensor:
        """Return scores [m, k] of queries [m, D] and their candidates [m, k, D]."""
        scores: Tensor = self.layers(torch.cat([u[:, None].expand_as(w), w, u[:, None] * w], dim=2))
        return scores.squeeze(2)


class MlpReranker(Reranker):
    """Scores candidates by the MLP over the trained towers' vectors."""

    def __init__(self, model: DualEncoder, mlp: Mlp, dataset: Dataset) -> None:
        self._model = model
        self._mlp = mlp
        self._query = dataset.schema.query
        columns = dataset.catalogue.columns(np.arange(dataset.catalogue.num_docs))
        self._documents = encode_columns(dataset.schema.doc, columns, partial(tower_output, model, "doc"))

    def score(self, queries: Mapping[str, Column], documents: np.ndarray) -> np.ndarray:
        """Score candidates int64 [m, k] (rows of documents; -1: absent, scored -inf) as float32 [m, k]."""
        if not documents.size:
            return np.zeros(documents.shape, np.float32)
        rows = torch.from_numpy(documents)
        u = encode_columns(self._query, queries, partial(tower_output, self._model, "query"))
        with torch.no_grad():
            scores = self._mlp(u, self._documents[rows.clamp(min=0)])
        return scores.masked_fill(rows < 0, -torch.inf).numpy()


def mlp_loss(mlp: Mlp, encoded: Encoded, batch: Batch) -> LossOutput:
    """Return the softmax loss of each query's positive and negatives; rows with relevance 0 have none."""
    assert encoded.U is not None and encoded.W is not None and batch.negatives is not None
    candidates = torch.cat([batch.positive[:, None], batch.negatives.clamp(min=0)], dim=1)
    scores = mlp(encoded.U, encoded.W[candidates])
    scores = scores.masked_fill(pad(batch.negatives < 0, (1, 0)), -torch.inf)
    losses = cross_entropy(scores, torch.zeros_like(batch.positive), reduction="none")
    weight = (batch.relevance > 0).to(losses.dtype)
    return LossOutput((losses * weight).sum() / weight.sum().clamp(min=1), {})


def train(model: DualEncoder, mlp: Mlp, dataset: Dataset, windows: HardNegatives, args: argparse.Namespace) -> None:
    """Train the towers and the MLP; negatives are drawn from `windows`."""
    optimizer = torch.optim.Adam([*model.parameters(), *mlp.parameters()], args.lr)
    collator = Collator(dataset.schema, dataset.catalogue)
    stream = PairStream(dataset, rows_global=args.rows, lanes=1, seed=args.seed)
    draw = np.random.default_rng(args.seed)
    model.train()
    for stored_rows in islice(stream, round(args.epochs * stream.steps_per_epoch)):
        rows = dataset.one_query_per_row(stored_rows)
        sampled = draw.permuted(windows.windows(rows.query_keys), axis=1)[:, : args.negatives]
        full = collator(rows, negatives=sampled.astype(np.int64))
        batch = bigdssm.pair_batch(
            full.query, full.doc, positive=full.positive, negatives=full.negatives, relevance=full.relevance
        )
        optimizer.zero_grad()
        bigdssm.cached_step(model, batch, loss=partial(mlp_loss, mlp), chunk_tokens=0)
        optimizer.step()


def measure(args: argparse.Namespace) -> tuple[System, System]:
    """Return the results of the MLP and of the towers on the split."""
    torch.manual_seed(args.seed)
    folder = load_model_folder(args.model)
    trained = load_model_folder(args.model).model
    dataset = folder.view(Dataset.open(args.data).with_rules(EventRules.of(folder.config.data)))
    exclude_seen = folder.config.data.exclude_seen
    towers = tower_encoders(folder.model, dataset)
    windows = HardNegatives(mine(towers, dataset, first=0, last=args.top, exclude_seen=exclude_seen))
    mlp = Mlp(folder.config.model.dim)
    train(trained, mlp, dataset, windows, args)

    def system(name: str, rerank: Reranking | None) -> System:
        evaluation = evaluate_split(towers, dataset, args.split, exclude_seen=exclude_seen, rerank=rerank)
        return System.from_ranks(name, evaluation.ranks, evaluation.query_ids, evaluation.seconds)

    reranking = Reranking(MlpReranker(trained, mlp, dataset), args.top)
    return system(f"MLP over the top {args.top}", reranking), system("towers", None)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder of FPS pretraining")
    parser.add_argument("--data", required=True, help="dataset folder")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--top", type=int, default=100, help="documents that are re-ranked")
    parser.add_argument("--negatives", type=int, default=20, help="sampled per query")
    parser.add_argument("--rows", type=int, default=512, help="rows per step")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--lr", type=float, default=5e-4, help="of Adam, for towers and MLP")
    parser.add_argument("--seed", type=int, default=0)
    mlp, towers = measure(parser.parse_args())
    for system in (towers, mlp):
        print(f"{system.name}: NDCG@10 {system.values['ndcg_at_10'].mean():.4f}")
    print(*differences([(mlp, towers)], ["ndcg_at_10"]))


if __name__ == "__main__":
    main()
