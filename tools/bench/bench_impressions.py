"""Measure the value of impressions without a click for fine-tuning, on synthetic data with known preferences.

    python tools/bench/bench_impressions.py --out impressions.json   # 1 CPU-minute

Tastes and habits of users and documents are random. An old recommender shows documents by habit, and users click
impressions by taste. Pretraining uses only the clicks, so it learns both. Validation and test contain choices by taste
alone, among all documents that were not shown. Fine-tuning uses the other impressions as hard negatives
(`list_candidates --given`); the control continues with FPS for as many steps. `the truth` ranks by taste.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import bigdssm
from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.cli import run_main
from bigdssm.cluster.launcher import run_command
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.errors import ConfigError
from bigdssm.evaluation.comparison import System, save_comparison
from bigdssm.evaluation.evaluate import evaluate_scores, evaluate_split
from bigdssm.evaluation.metrics import means
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.utils.hashing import hash_strings

USERS, DOCS, WIDTH, SHOWN, CHOSEN = 3000, 1000, 6, 100, 4
CONFIG = """
run: {{dir: {folder}/run, seed: {seed}}}
data:
  dir: {folder}/dataset
  query: {{user: {{type: categorical}}}}
  doc: {{document: {{type: categorical}}}}
  lanes: 8
model:
  dim: 32
  score: dot
  alpha_init: 1.0
  query: {{mlp: [], embedding_dim: 32}}
  doc: {{mlp: [], embedding_dim: 32}}
pretrain:
  rows_global: 1024
  epochs: 10
  loss: {{name: fps}}
  sampling: {{name: corrected, gamma: 1.0}}
  optimizer: {{lr: 1.0e-2, weight_decay: 0.0, warmup_steps: 20, gradient_clipping: 0.0}}
sft:
  rows_global: 1024
  epochs: 5
  loss: {{name: softmax}}
  negatives: {{hard: 8, in_batch: false}}
  optimizer: {{lr: 3.0e-3, weight_decay: 0.0, warmup_steps: 10, gradient_clipping: 0.0}}
"""
RUNS = {
    "FPS": None,
    "FPS goes on": [
        "sft.loss.name=fps",
        "sft.negatives.hard=0",
        "sft.negatives.in_batch=true",
        "sft.sampling.name=corrected",
    ],
    "softmax over what was shown": ["sft.negatives.mining.file={folder}/shown.npy"],
}


def main() -> int:
    """Run the bench; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/impressions"), help="folder for all files (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="JSON", help="file for the results")
    args = parser.parse_args()
    return run_main(lambda: bench(args.folder, args.seed, args.out))


def bench(folder: Path, seed: int, out: Path) -> None:
    """Generate the data, train and evaluate all models."""
    if folder.exists():
        raise ConfigError(f"--folder {folder} exists; choose another, or remove it")
    folder.mkdir(parents=True)
    pairs, taste = generate(folder, seed)
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(folder=folder, seed=seed))
    options: dict[str, Any] = {
        "split": "column",
        "split_column": "split",
        "query_id_column": "user",
        "doc_id_column": "document",
    }
    bigdssm.make_dataset(config, pairs=pairs, **options)
    dataset, log = Dataset.open(folder / "dataset"), folder / "log.txt"
    shown = ["--given", folder / "shown.parquet", "--query-column", "user", "--column", "shown", "--width", SHOWN]
    run(log, "list_candidates", "--data", dataset.dir, "--out", folder / "shown.npy", *shown)
    run(log, "pretrain", "--config", config)
    start = folder / "run/pretrain/best"
    systems = []
    for name, overrides in RUNS.items():
        best = start
        if overrides is not None:
            where = folder / name.replace(" ", "-")
            given = [line.format(folder=folder) for line in overrides]
            run(log, "sft", "--config", config, f"run.dir={where}", f"sft.init={start}", *given)
            best = where / "sft/best"
        result = evaluate_split(tower_encoders(load_model_folder(best).model, dataset), dataset, "test")
        systems.append(System.from_ranks(name, result.ranks, result.query_ids, 0.0))
    result = evaluate_scores(by_taste(dataset, taste), dataset, "test")
    systems.append(System.from_ranks("the truth", result.ranks, result.query_ids, 0.0))
    *_, control, tuned, _ = systems
    for system in systems:
        print(f"{system.name:30} NDCG@10 {means(system.values)['ndcg_at_10']:.4f}")
    print(f"{tuned.name} less {control.name}: {tuned.difference(control, 'ndcg_at_10')}")
    save_comparison(out, systems, [(tuned, control)], dataset, split="test", exclude_seen=True)


def generate(folder: Path, seed: int) -> tuple[pa.Table, np.ndarray]:
    """Return clicks (train) and free choices (other splits), and tastes [U, D]; write impressions without a click."""
    random = np.random.default_rng(seed)
    taste, habit = (random.normal(size=(USERS, WIDTH)) @ random.normal(size=(WIDTH, DOCS)) for _ in range(2))
    shown = top(0.8 * habit + random.gumbel(size=habit.shape), SHOWN)
    clicks = random.random(shown.shape) < 1 / (1 + np.exp(3 - np.take_along_axis(taste, shown, 1)))
    unseen = taste.copy()
    np.put_along_axis(unseen, shown, -np.inf, 1)
    chosen = top(unseen + random.gumbel(size=taste.shape), CHOSEN)
    user, position = np.nonzero(clicks)
    chooser, halves = np.repeat(np.arange(USERS), CHOSEN), np.array(["validation", "test"])
    pairs: list[tuple[np.ndarray, np.ndarray, Any]] = [
        (user, shown[user, position], ["train"]),
        (chooser, chosen.ravel(), halves[np.arange(len(chooser)) % 2]),
    ]
    columns = [
        {"user": names("u", u), "document": names("d", d), "split": np.broadcast_to(s, len(u))} for u, d, s in pairs
    ]
    left = [names("d", docs[~clicked]) for docs, clicked in zip(shown, clicks, strict=True)]
    pq.write_table(pa.table({"user": names("u", np.arange(USERS)), "shown": left}), folder / "shown.parquet")
    return pa.concat_tables([pa.table(split) for split in columns]), taste


def by_taste(dataset: Dataset, taste: np.ndarray) -> Callable[[Rows], np.ndarray]:
    """Return the scores of rows by taste: [m, N]."""
    users, docs = (
        {key: number for number, key in enumerate(hash_strings(pa.array(names(kind, np.arange(size)))).tolist())}
        for kind, size in (("u", USERS), ("d", DOCS))
    )
    columns = [docs[key] for key in dataset.catalogue.ids(np.arange(dataset.catalogue.num_docs)).tolist()]
    return lambda rows: taste[[users[key] for key in rows.query_ids.tolist()]][:, columns]


def top(scores: np.ndarray, number: int) -> np.ndarray:
    """Return the top columns per row, int64 [rows, number]; with Gumbel noise added, a softmax sample."""
    return np.argpartition(-scores, number, axis=1)[:, :number]


def names(kind: str, numbers: np.ndarray) -> list[str]:
    """Return the ids of users (u…) or documents (d…)."""
    return [f"{kind}{number}" for number in numbers]


def run(log: Path, command: str, *arguments: object) -> None:
    """Run `bigdssm command …`."""
    run_command(log, command, *map(str, arguments)).check()


if __name__ == "__main__":
    sys.exit(main())
