"""Measure the value of pretraining on other pairs for tasks with few labels.

    python -m tools.bench.bench_few_labels medquad --source ../shared/data --out few_labels.json     # 25 CPU-minutes
    python -m tools.bench.bench_few_labels similar-packages --source ../shared/data --out similar.json     # 15

A small BERT with random weights is pretrained with FPS on abundant pairs. The pretrained model is fine-tuned with 50,
200, 1,000 and all labels of the task, and a model with random weights is trained for as many steps. Both rank all
documents of the task; the number of steps is selected on validation, and the test split is evaluated once.

medquad: pretraining on tldr, Debian packages and WordNet; the task is to answer medical questions.
similar-packages: pretraining on common build dependencies; the task is to retrieve packages of the same purpose with a
siamese model. Packages of different sources have the same purpose if they have the same tags (debtags).

Existing results in --folder are reused.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa

import bigdssm
from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.cli import run_main
from bigdssm.cluster.launcher import run_command
from bigdssm.dataset.dataset import Dataset
from bigdssm.evaluation.comparison import System, save_comparison
from bigdssm.evaluation.evaluate import evaluate_split
from bigdssm.evaluation.metrics import means
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.sources.base import TableFile
from bigdssm.utils.hashing import hash64
from tools.public_data.debian import read_build_depends

NO_PURPOSE = ("role", "implemented-in", "interface", "uitoolkit", "suite", "x11", "scope", "made-of")  # debtags facets
MIN_TAGS, MAX_PACKAGES = 2, 10  # per purpose

Row = dict[str, str]


@dataclass(frozen=True)
class Task:
    """A task with few labels, and the pairs for pretraining."""

    config: str
    set: tuple[str, ...]
    pretrain_steps: int
    steps: dict[int | None, int]  # by number of labels; None: all
    pretraining: Callable[[Path], Iterator[Row]]
    labelled: Callable[[Path], list[Row]]  # including the split
    options: dict[str, Any] = field(default_factory=dict)  # for make_dataset


def main() -> int:
    """Run the bench; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=tuple(TASKS), help="task to run")
    parser.add_argument("--source", type=Path, required=True, help="folder with one subfolder per table")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="folder for all files (default: runs/few_labels/TASK)")
    parser.add_argument("--out", type=Path, required=True, metavar="JSON", help="file for the results")
    args = parser.parse_args()
    folder = args.folder or Path("runs/few_labels") / args.task
    return run_main(lambda: bench(TASKS[args.task], args.source, folder, args.seed, args.out))


def bench(task: Task, source: Path, folder: Path, seed: int, out: Path) -> None:
    """Build the datasets, train and evaluate all models, and print their metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    log, common = folder / "log.txt", [*task.set, f"run.seed={seed}"]

    def trained(stage: str, name: str, data: Path, *given: str) -> Path:
        where = [f"run.dir={folder / name}", f"data.dir={data}"]
        run_command(log, stage, "--config", task.config, *common, *where, *given, "--resume", "auto").check()
        return folder / name / stage / "best"

    def made(name: str, table: Iterator[Row], **options: Any) -> Path:
        if not (folder / name).exists():
            pairs = pa.Table.from_pylist(list(table))
            bigdssm.make_dataset(task.config, task.set, pairs=pairs, out=folder / name, **task.options, **options)
        return folder / name

    many = made("pretraining", task.pretraining(source))
    rows = task.labelled(source)
    start = trained(
        "pretrain", "pretrained", many, "pretrain.rows_global=256", f"pretrain.steps={task.pretrain_steps}",
        "pretrain.optimizer={lr: 1.0e-3, warmup_steps: 30}",
    )  # fmt: skip
    pairs = []
    for labels, steps in task.steps.items():
        name = "all" if labels is None else str(labels)
        data = made(
            f"labels-{name}", with_labels(rows, labels), like=many, split="column", split_column="split"
        )  # fmt: skip
        how = [
            f"rows_global={min(256, (labels or 256) // 8 * 8)}",
            f"steps={steps}",
            f"validate_every_steps={steps // 2}",
        ]
        loss = ["loss.name=fps", "loss.direction=both", "negatives.hard=0", "negatives.in_batch=true"]
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
    save_comparison(out, systems, pairs, Dataset.open(data), split="test", exclude_seen=False)


def measured(name: str, model: Path, data: Path) -> System:
    """Evaluate a model on the test split."""
    dataset = Dataset.open(data)
    encoders = tower_encoders(load_model_folder(model).model, dataset)
    result = evaluate_split(encoders, dataset, "test", exclude_seen=False)
    return System.from_ranks(name, result.ranks, result.query_ids, 0.0)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a .jsonl.xz file."""
    return map(json.loads, TableFile(path).open())


def other_tasks(source: Path) -> Iterator[Row]:
    """Yield pairs of the other tasks."""
    for row in read(source / "tldr/pairs.jsonl.xz"):
        yield {"query": row["query"], "doc": row["doc"]}
    for row in read(source / "debian_packages/packages.jsonl.xz"):
        yield {"query": row["synopsis"], "doc": row["description"]}
    for row in read(source / "wordnet/synsets.jsonl.xz"):
        yield {"query": ", ".join(row["lemmas"]), "doc": row["gloss"]}


def questions(source: Path) -> list[Row]:
    """Return MedQuAD's pairs, split by disease; answers of the other splits are excluded from train."""
    rows = list(read(source / "medquad/pairs.jsonl.xz"))
    splits = [split_of(row["focus"], 0.05) for row in rows]
    held_out = {row["doc"] for row, split in zip(rows, splits, strict=True) if split != "train"}
    return [
        {"query": row["query"], "doc": row["doc"], "split": split}
        for row, split in zip(rows, splits, strict=True)
        if split != "train" or row["doc"] not in held_out
    ]


def split_of(key: str, held_out: float) -> str:
    """Return the split of all rows with `key`; validation and test each have a share of `held_out`."""
    uniform = hash64(key) / 2**64 % 1
    return "test" if uniform < held_out else "validation" if uniform < 2 * held_out else "train"


def built_together(source: Path) -> Iterator[Row]:
    """Yield pairs of packages that are build dependencies of the same source."""
    for table in read_build_depends(source):
        yield from (dict(zip(table.columns, row, strict=True)) for row in table.rows)


def alike(source: Path) -> list[Row]:
    """Return pairs of packages with the same purpose, split by purpose.

    One package per source and purpose is used. Purposes with one package or too many add only documents.
    """
    purposes: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in read(source / "debian_packages/packages.jsonl.xz"):
        tags = tuple(sorted(tag for tag in row["tags"] if tag.split("::")[0] not in NO_PURPOSE))
        if len(tags) >= MIN_TAGS:
            about = f"{row['synopsis']}. {row['description']}"
            package = {"id": row["package"], "description": about, "section": row["section"]}
            purposes.setdefault(tags, {}).setdefault(row["source"], package)
    pairs: list[tuple[Row, Row, str]] = []
    others: list[Row] = []
    for tags, by_source in purposes.items():
        packages = list(by_source.values())
        if 1 < len(packages) <= MAX_PACKAGES:
            split = split_of(" ".join(tags), 0.15)
            pairs += [(*pair, split) for pair in combinations(packages, 2)]
        else:
            others += packages
    pairs += [(*pair, "none") for pair in pairwise(others)]
    return [
        {f"{side}_{key}": about[key] for side, about in (("query", query), ("doc", doc)) for key in about}
        | {"split": split}
        for query, doc, split in pairs
    ]


def with_labels(rows: list[Row], labels: int | None) -> Iterator[Row]:
    """Yield rows with at most `labels` train rows; the other train rows add only documents."""

    def order(row: Row) -> int:
        return hash64("".join(value for key, value in row.items() if key != "split"))

    train = sorted((row for row in rows if row["split"] == "train"), key=order)
    yield from train[:labels]
    yield from (row | {"split": "none"} for row in train[len(train[:labels]) :])
    yield from (row for row in rows if row["split"] != "train")


TASKS = {
    "medquad": Task(
        "configs/medquad.yaml",
        ("model.query.text.init=null", "model.dim=128", "engine.chunk_tokens=8192", "engine.keep_graph_tokens=131072"),
        pretrain_steps=800,
        steps={50: 30, 200: 40, 1000: 80, None: 300},
        pretraining=other_tasks,
        labelled=questions,
    ),
    "similar-packages": Task(
        "configs/debian_build_depends.yaml",
        (),
        pretrain_steps=300,
        steps={50: 30, 200: 40, 1000: 80, None: 120},
        pretraining=built_together,
        labelled=alike,
        options={"query_id_column": "query_id", "doc_id_column": "doc_id"},
    ),
}

if __name__ == "__main__":
    sys.exit(main())
