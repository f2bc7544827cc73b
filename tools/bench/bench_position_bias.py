"""Measure a learned bias of positions on synthetic clicks with a known examination of positions.

    python -m tools.bench.bench_position_bias --out position_bias.json   # 1 CPU-minute

Users and documents have vectors of taste and of habit, which the towers read. An old recommender orders documents by
habit. A user examines position p with probability p^-0.7, and clicks an examined document by taste. Training on pairs
of a click and a document without one learns taste and the order of the old recommender, unless `loss.position_bias`
explains the latter. Validation and test are choices by taste alone, among documents that were not shown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import bigdssm
from bigdssm.checkpoints.checkpoint import checkpoints_in, load_checkpoint, read_manifest
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

USERS, DOCS, WIDTH, CHOSEN = 3000, 1000, 6, 4
SHOWN, EXAMINATION = 50, 0.7
CONFIG = f"""
run: {{{{dir: {{folder}}/run, seed: {{seed}}}}}}
data:
  dir: {{folder}}/dataset
  query: {{{{of_user: {{{{type: vector, dim: {2 * WIDTH}}}}}}}}}
  doc: {{{{of_document: {{{{type: vector, dim: {2 * WIDTH}}}}}}}}}
  lanes: 8
model: {{{{dim: 16, score: dot, alpha_init: 1.0, alpha_learned: false, query: {{{{mlp: []}}}}, doc: {{{{mlp: []}}}}}}}}
pretrain: {{{{rows_global: 256, steps: 1, optimizer: {{{{lr: 0.0}}}}}}}}
sft:
  rows_global: 256
  epochs: 8
  loss: {{{{name: pair_ce}}}}
  negatives: {{{{hard: 8, in_batch: false}}}}
  optimizer: {{{{lr: 1.0e-2, weight_decay: 0.0, warmup_steps: 10}}}}
"""
RUNS = {"pair_ce": 0, "pair_ce and position_bias": SHOWN}


def main() -> int:
    """Run the bench; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/position_bias"), help="folder for all files (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="JSON", help="file for the results")
    args = parser.parse_args()
    return run_main(lambda: bench(args.folder, args.seed, args.out))


def bench(folder: Path, seed: int, out: Path) -> None:
    """Generate the data, train and evaluate both models."""
    if folder.exists():
        raise ConfigError(f"--folder {folder} exists; choose another, or remove it")
    folder.mkdir(parents=True)
    pairs, taste = generate(folder, seed)
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(folder=folder, seed=seed))
    bigdssm.make_dataset(
        config, pairs=pairs, split="column", split_column="split", query_id_column="user", doc_id_column="document"
    )
    dataset, log, shown = Dataset.open(folder / "dataset"), folder / "log.txt", folder / "shown.npy"
    columns = ["--query-column", "user", "--positive-column", "clicked", "--column", "shown"]
    table = ["--given", folder / "shown.parquet", *columns, "--position-column", "positions", "--width", SHOWN]
    run(log, "list_candidates", "--data", dataset.dir, "--out", shown, *table)
    run(log, "pretrain", "--config", config)
    systems = []
    for name, positions in RUNS.items():
        where = folder / name.replace(" ", "-")
        given = [f"run.dir={where}", f"sft.init={folder}/run/pretrain/best", f"sft.negatives.mining.file={shown}"]
        given += [f"sft.loss.position_bias={positions}"]
        run(log, "sft", "--config", config, *given)
        result = evaluate_split(tower_encoders(load_model_folder(where / "sft/best").model, dataset), dataset, "test")
        systems.append(System.from_ranks(name, result.ranks, result.query_ids, 0.0))
    result = evaluate_scores(by_taste(dataset, taste), dataset, "test")
    systems.append(System.from_ranks("the truth", result.ranks, result.query_ids, 0.0))
    plain, biased, _ = systems
    for system in systems:
        print(f"{system.name:30} NDCG@10 {means(system.values)['ndcg_at_10']:.4f}")
    print(f"{biased.name} less {plain.name}: {biased.difference(plain, 'ndcg_at_10')}")
    last = load_checkpoint(read_manifest(checkpoints_in(where / "sft/checkpoints")[-1]), 0, 1)
    learned = last.common_tensors()["position_bias"][0].numpy()
    for position in (1, 2, 5, 10, 20, SHOWN):
        true, bias = -EXAMINATION * np.log(position), learned[position - 1] - learned[0]
        print(f"position {position}: bias {bias:.2f}, log of the examination {true:.2f}")
    save_comparison(out, systems, [(biased, plain)], dataset, split="test", exclude_seen=True)


def generate(folder: Path, seed: int) -> tuple[pa.Table, np.ndarray]:
    """Return clicks (train) and free choices (other splits), and tastes [U, D]; write impressions of each click."""
    random = np.random.default_rng(seed)
    users, documents = (random.normal(size=(number, 2, WIDTH)) for number in (USERS, DOCS))
    taste, habit = (users[:, kind] @ documents[:, kind].T for kind in (0, 1))
    shown = np.argsort(-(0.8 * habit + random.gumbel(size=habit.shape)), axis=1)[:, :SHOWN]
    examined = random.random(shown.shape) < np.arange(1, SHOWN + 1) ** -EXAMINATION
    clicks = examined & (random.random(shown.shape) < 1 / (1 + np.exp(2 - np.take_along_axis(taste, shown, 1))))
    unseen = taste.copy()
    np.put_along_axis(unseen, shown, -np.inf, 1)
    chosen = top(unseen + random.gumbel(size=taste.shape), CHOSEN)
    user, position = np.nonzero(clicks)
    chooser, halves = np.repeat(np.arange(USERS), CHOSEN), np.array(["validation", "test"])
    parts = [
        (user, shown[user, position], np.array(["train"])),
        (chooser, chosen.ravel(), halves[np.arange(len(chooser)) % 2]),
    ]
    columns = [
        {
            "user": names("u", u), "document": names("d", d), "split": np.broadcast_to(split, len(u)),
            "of_user": list(users[u].reshape(len(u), -1)), "of_document": list(documents[d].reshape(len(d), -1)),
        }
        for u, d, split in parts
    ]  # fmt: skip
    others = [np.flatnonzero(~clicks[number]) for number in user]
    impressions = {
        "user": names("u", user), "clicked": names("d", shown[user, position]),
        "shown": [names("d", shown[number, of]) for number, of in zip(user, others, strict=True)],
        "positions": [np.append(own, of) + 1 for own, of in zip(position, others, strict=True)],
    }  # fmt: skip
    pq.write_table(pa.table(impressions), folder / "shown.parquet")
    return pa.concat_tables([pa.table(part) for part in columns]), taste


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
