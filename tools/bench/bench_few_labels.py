"""What pretraining on other tasks' pairs is worth where a task has few labels of its own.

    python tools/bench/bench_few_labels.py --source ../shared/data --out few_labels.json     # 25 CPU-minutes

A small BERT of random weights is pretrained with FPS on pairs of tldr, Debian's packages and WordNet. The task is
MedQuAD: with 50, 200, 1,000 and all labelled questions the pretrained model is fine-tuned, and one of random weights is
trained as long. All rank all answers of MedQuAD; steps are chosen on validation, and the test split is read once.
What is in --folder already is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

import bigdssm
from bigdssm.artifacts.model_folder import load_model_folder
from bigdssm.cli import run_main
from bigdssm.dataset.dataset import Dataset
from bigdssm.evaluation.metrics import means
from bigdssm.evaluation.split import evaluate_split
from bigdssm.evaluation.systems import System, save_comparison
from bigdssm.hashing import hash64
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.running.commands import run_command
from bigdssm.tables.files import LocalFile

CONFIG = "configs/medquad.yaml"
SMALL = ["model.query.text.init=null", "model.dim=128", "engine.chunk_tokens=8192", "engine.keep_graph_tokens=131072"]
STEPS = {50: 30, 200: 40, 1000: 80, None: 300}  # by labels; None: all
HELD_OUT = 0.05  # of each, validation and test


def main() -> int:
    """Run the bench; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder of medquad, tldr, debian_packages, wordnet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/few_labels"), help="of all files (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="JSON")
    args = parser.parse_args()
    return run_main(lambda: bench(args.source, args.folder, args.seed, args.out))


def bench(source: Path, folder: Path, seed: int, out: Path) -> None:
    """Make the datasets, train and measure all, and print what each reaches."""
    folder.mkdir(parents=True, exist_ok=True)
    log, common = folder / "log.txt", [*SMALL, f"run.seed={seed}"]

    def trained(stage: str, name: str, data: Path, *given: str) -> Path:
        where = [f"run.dir={folder / name}", f"data.dir={data}"]
        run_command(log, stage, "--config", CONFIG, *common, *where, *given, "--resume", "auto").check()
        return folder / name / stage / "best"

    def made(name: str, table: Iterator[dict[str, str]], **options: Any) -> Path:
        if not (folder / name).exists():
            pairs = pa.Table.from_pylist(list(table))
            bigdssm.make_dataset(CONFIG, SMALL, pairs=pairs, out=folder / name, **options)
        return folder / name

    mixture = made("mixture", other_tasks(source))
    rows = labelled(source)
    start = trained(
        "pretrain", "other-tasks", mixture, "pretrain.rows_global=256", "pretrain.steps=800",
        "pretrain.optimizer={lr: 1.0e-3, warmup_steps: 30}",
    )  # fmt: skip
    pairs = []
    for labels, steps in STEPS.items():
        name = "all" if labels is None else str(labels)
        data = made(
            f"labels-{name}", with_labels(rows, labels), like=mixture, split="column", split_column="split"
        )  # fmt: skip
        how = [
            f"rows_global={min(256, (labels or 256) // 8 * 8)}",
            f"steps={steps}",
            f"validate_every_steps={steps // 2}",
        ]
        loss = ["loss.name=fps", "loss.negatives=0", "loss.in_batch=true", "loss.direction=both"]
        alone = [*how, "optimizer={lr: 1.0e-3, warmup_steps: 5}"]
        tuned = [*how, *loss, "optimizer={lr: 3.0e-4, warmup_steps: 5}"]
        nothing = trained("pretrain", f"nothing-{name}", data, *(f"pretrain.{line}" for line in alone))
        other = trained("sft", f"tuned-{name}", data, f"sft.init={start}", *(f"sft.{line}" for line in tuned))
        pairs.append((measured(f"{name} labels, pretrained", other, data), measured(f"{name} labels", nothing, data)))
    systems = [measured("no label, pretrained", start, data), *(system for both in pairs for system in both)]
    for system in systems:
        print(f"{system.name:24} NDCG@10 {means(system.values)['ndcg_at_10']:.4f}")
    for pretrained, alone_system in pairs:
        print(f"{pretrained.name} less {alone_system.name}: {pretrained.difference(alone_system, 'ndcg_at_10')}")
    save_comparison(out, systems, pairs, Dataset.open(data), split="test", filter_seen=False)


def measured(name: str, model: Path, data: Path) -> System:
    """Return what a model is worth on the test split."""
    dataset = Dataset.open(data)
    encoders = tower_encoders(load_model_folder(model).model, dataset)
    return System.of_ranks(name, evaluate_split(encoders, dataset, "test", filter_seen=False).ranks, 0.0)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a .jsonl.xz."""
    return map(json.loads, LocalFile(path).open())


def other_tasks(source: Path) -> Iterator[dict[str, str]]:
    """Yield pairs of the other tasks."""
    for row in read(source / "tldr/pairs.jsonl.xz"):
        yield {"query": row["query"], "doc": row["doc"]}
    for row in read(source / "debian_packages/packages.jsonl.xz"):
        yield {"query": row["synopsis"], "doc": row["description"]}
    for row in read(source / "wordnet/synsets.jsonl.xz"):
        yield {"query": ", ".join(row["lemmas"]), "doc": row["gloss"]}


def labelled(source: Path) -> list[dict[str, str]]:
    """Return MedQuAD's pairs with their split: a disease is in one, and an answer that is held out not in train."""
    rows = list(read(source / "medquad/pairs.jsonl.xz"))
    drawn = [hash64(row["focus"]) / 2**64 % 1 for row in rows]
    splits = ["test" if u < HELD_OUT else "validation" if u < 2 * HELD_OUT else "train" for u in drawn]
    held_out = {row["doc"] for row, split in zip(rows, splits, strict=True) if split != "train"}
    return [
        {"query": row["query"], "doc": row["doc"], "split": split}
        for row, split in zip(rows, splits, strict=True)
        if split != "train" or row["doc"] not in held_out
    ]


def with_labels(rows: list[dict[str, str]], labels: int | None) -> Iterator[dict[str, str]]:
    """Yield rows with so many labels to train on: of the others the documents are left."""
    train = sorted((row for row in rows if row["split"] == "train"), key=lambda row: hash64(row["query"] + row["doc"]))
    yield from train[:labels]
    yield from (row | {"split": "none"} for row in train[len(train[:labels]) :])
    yield from (row for row in rows if row["split"] != "train")


if __name__ == "__main__":
    sys.exit(main())
