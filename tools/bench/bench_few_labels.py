"""What pretraining on other pairs is worth where a task has few labels of its own.

    python -m tools.bench.bench_few_labels medquad --source ../shared/data --out few_labels.json     # 25 CPU-minutes
    python -m tools.bench.bench_few_labels similar-packages --source ../shared/data --out similar.json     # 15

A small BERT of random weights is pretrained with FPS on pairs of which there is much. With 50, 200, 1,000 and all
labels of the task the pretrained model is fine-tuned, and one of random weights is trained as long. All rank all
documents of the task; steps are chosen on validation, and the test split is read once.

medquad: tldr's pairs, Debian's packages and WordNet, then questions and their answers.
similar-packages: packages that are built from together, then packages of one purpose, the two towers being one. Of one
purpose are packages of different sources that Debian's volunteers gave the same tags (debtags).

What is in --folder already is not done again.
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
from bigdssm.ingest.sources.files import LocalFile
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.utils.hashing import hash64
from tools.public_data.debian import read_build_depends

# Facets of debtags that do not say what a package is for.
NO_PURPOSE = ("role", "implemented-in", "interface", "uitoolkit", "suite", "x11", "scope", "made-of")
LEAST_TAGS, MOST_ALIKE = 2, 10  # of a purpose, and packages of one

Row = dict[str, str]


@dataclass(frozen=True)
class Task:
    """A task of few labels, and the pairs to pretrain on."""

    config: str
    set: tuple[str, ...]
    pretrain_steps: int
    steps: dict[int | None, int]  # by labels; None: all
    pretraining: Callable[[Path], Iterator[Row]]
    labelled: Callable[[Path], list[Row]]  # with their split
    options: dict[str, Any] = field(default_factory=dict)  # of make_dataset


def main() -> int:
    """Run the bench; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=tuple(TASKS))
    parser.add_argument("--source", type=Path, required=True, help="folder with the task's tables, each in its own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="of all files (default: runs/few_labels/TASK)")
    parser.add_argument("--out", type=Path, required=True, metavar="JSON")
    args = parser.parse_args()
    folder = args.folder or Path("runs/few_labels") / args.task
    return run_main(lambda: bench(TASKS[args.task], args.source, folder, args.seed, args.out))


def bench(task: Task, source: Path, folder: Path, seed: int, out: Path) -> None:
    """Make the datasets, train and measure all, and print what each reaches."""
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
    """Return what a model is worth on the test split."""
    dataset = Dataset.open(data)
    encoders = tower_encoders(load_model_folder(model).model, dataset)
    found = evaluate_split(encoders, dataset, "test", exclude_seen=False)
    return System.of_ranks(name, found.ranks, found.query_ids, 0.0)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a .jsonl.xz."""
    return map(json.loads, LocalFile(path).open())


def other_tasks(source: Path) -> Iterator[Row]:
    """Yield pairs of the other tasks."""
    for row in read(source / "tldr/pairs.jsonl.xz"):
        yield {"query": row["query"], "doc": row["doc"]}
    for row in read(source / "debian_packages/packages.jsonl.xz"):
        yield {"query": row["synopsis"], "doc": row["description"]}
    for row in read(source / "wordnet/synsets.jsonl.xz"):
        yield {"query": ", ".join(row["lemmas"]), "doc": row["gloss"]}


def questions(source: Path) -> list[Row]:
    """Return MedQuAD's pairs with their split: a disease is in one, and an answer that is held out not in train."""
    rows = list(read(source / "medquad/pairs.jsonl.xz"))
    splits = [split_of(row["focus"], 0.05) for row in rows]
    held_out = {row["doc"] for row, split in zip(rows, splits, strict=True) if split != "train"}
    return [
        {"query": row["query"], "doc": row["doc"], "split": split}
        for row, split in zip(rows, splits, strict=True)
        if split != "train" or row["doc"] not in held_out
    ]


def split_of(key: str, held_out: float) -> str:
    """Return the split that all rows of `key` are in: of each of validation and test, a share of `held_out`."""
    drawn = hash64(key) / 2**64 % 1
    return "test" if drawn < held_out else "validation" if drawn < 2 * held_out else "train"


def built_together(source: Path) -> Iterator[Row]:
    """Yield pairs of packages that are built from together."""
    for table in read_build_depends(source):
        yield from (dict(zip(table.columns, row, strict=True)) for row in table.rows)


def alike(source: Path) -> list[Row]:
    """Return the pairs of packages of one purpose with their split, which all of the purpose share.

    Of a source's packages with the same tags one has a part. Those that are alone, or too many, are documents.
    """
    purposes: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in read(source / "debian_packages/packages.jsonl.xz"):
        tags = tuple(sorted(tag for tag in row["tags"] if tag.split("::")[0] not in NO_PURPOSE))
        if len(tags) >= LEAST_TAGS:
            about = f"{row['synopsis']}. {row['description']}"
            package = {"id": row["package"], "description": about, "section": row["section"]}
            purposes.setdefault(tags, {}).setdefault(row["source"], package)
    pairs: list[tuple[Row, Row, str]] = []
    others: list[Row] = []
    for tags, by_source in purposes.items():
        packages = list(by_source.values())
        if 1 < len(packages) <= MOST_ALIKE:
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
    """Yield rows with so many labels to train on: of the others the documents are left."""

    def drawn(row: Row) -> int:
        return hash64("".join(value for key, value in row.items() if key != "split"))

    train = sorted((row for row in rows if row["split"] == "train"), key=drawn)
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
