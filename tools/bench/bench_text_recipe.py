"""Choose one training recipe for small sets of text pairs, and compare it with the shipped configs.

    python -m tools.public_data docstrings --max-per-package 1000 --out datasets/source/docstrings.jsonl.gz
    python -m tools.bench.bench_text_recipe search --source ../shared/data --pairs 1000 --out search.json
    python -m tools.bench.bench_text_recipe compare --source ../shared/data --pairs 500 1500 --out compare.json

The sets are seeded subsamples of MedQuAD, tldr, WordNet and docstrings. Validation and test have groups (a disease, a
command, a definition, a package) and documents that train does not have; a set has at least --documents documents.

search: trains every recipe in RECIPES on every set. The choice for a set is the recipe with the highest mean validation
NDCG@10 over the other three sets; the overall choice has the highest mean over all four.
compare: trains the choice for each set (from --search) and the shipped config on the same pairs, and evaluates both on
the test split, with paired bootstrap intervals. The shipped config has its own number of steps for any number of pairs.

Existing results in --folder are reused, so an interrupted command continues where it stopped.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import bigdssm
from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.cli import run_main
from bigdssm.dataset.dataset import Dataset
from bigdssm.evaluation.comparison import System, differences, save_comparison
from bigdssm.evaluation.evaluate import evaluate_split
from bigdssm.retrieval.embed import encode_in, tower_encoders
from bigdssm.utils.atomic import write_json
from bigdssm.utils.hashing import hash64
from tools.bench.bench_few_labels import read, split_of

HELD_OUT = 0.15  # share of the groups in validation, and in test
METRIC = "ndcg_at_10"
SHIPPED = "shipped"
Row = dict[str, Any]


@dataclass(frozen=True)
class TextSet:
    """A set of pairs: its config, rows, and the columns of groups, documents and queries."""

    rows: Callable[[Path], Iterator[Row]]
    group: str
    document: str
    query: str
    text: str  # the document feature
    options: dict[str, Any] = field(default_factory=dict)  # for make_dataset


@dataclass(frozen=True)
class Recipe:
    """Training settings that are the same for every set; the number of steps follows from the pairs."""

    rows: int = 128
    epochs: float = 8.0
    lr: float = 2e-4
    alpha: float = 20.0
    alpha_learned: bool = True
    direction: str = "both"
    weight_average: float = 0.0
    hard: int = 0  # negatives per row, mined once by the pretrained encoder
    first: int = 0
    last: int = 50
    margin: float | None = None

    def overrides(self, pairs: int) -> list[str]:
        """Return the config overrides for a number of train pairs."""
        rows = min(self.rows, pairs // 8 * 8)  # data.lanes divides it
        steps = ceil(self.epochs * pairs / rows)
        margin = "null" if self.margin is None else self.margin
        return [
            f"model.alpha_init={self.alpha}", f"model.alpha_learned={str(self.alpha_learned).lower()}",
            f"pretrain.rows_global={rows}", f"pretrain.steps={steps}",
            f"pretrain.loss.direction={self.direction}", "pretrain.loss.widths=null",
            f"pretrain.optimizer.lr={self.lr}", f"pretrain.optimizer.warmup_steps={max(1, steps // 10)}",
            f"pretrain.weight_average={self.weight_average}", f"pretrain.negatives.hard={self.hard}",
            f"pretrain.negatives.mining={{first: {self.first}, last: {self.last}, margin: {margin}}}",
        ]  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A set with a number of train pairs, and how it is sampled."""

    set: str
    pairs: int
    seed: int
    documents: int
    tokens: int  # at most, of a document
    folder: Path
    source: Path

    @property
    def name(self) -> str:
        """Name of the files."""
        return f"{self.set}-{self.pairs}-{self.tokens}-{self.seed}"

    @property
    def config(self) -> tuple[str, list[str]]:
        """Config and overrides of the dataset."""
        text = f"data.doc.{SETS[self.set].text}.max_tokens"
        path = f"configs/{self.set}.yaml"
        own = bigdssm.load_config(path).data.doc[SETS[self.set].text].max_tokens
        return path, [f"data.dir={self.dataset}", f"run.seed={self.seed}", f"{text}={min(own, self.tokens)}"]

    @property
    def dataset(self) -> Path:
        """Folder of the dataset."""
        return self.folder / "datasets" / self.name

    def make(self) -> None:
        """Build the dataset if it does not exist."""
        if not self.dataset.exists():
            rows = pa.Table.from_pylist(list(sampled(SETS[self.set], self)))
            bigdssm.make_dataset(
                *self.config, pairs=rows, split="column", split_column="split", processes=1, **SETS[self.set].options
            )  # fmt: skip


def main() -> int:
    """Run the bench; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("search", "compare"), help="part to run")
    parser.add_argument("--source", type=Path, required=True, help="folder with one subfolder per table")
    parser.add_argument("--folder", type=Path, default=Path("runs/text_recipe"), help="folder for all files")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="sets (default: all)")
    parser.add_argument("--pairs", nargs="+", type=int, default=[1000], help="numbers of train pairs")
    parser.add_argument("--seed", type=int, default=0, help="random seed of sampling and training")
    parser.add_argument("--documents", type=int, default=4000, help="least number of documents (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="largest number of tokens of a document")
    parser.add_argument("--recipes", nargs="+", choices=[SHIPPED, *RECIPES], help="recipes to train (default: all)")
    parser.add_argument("--search", type=Path, metavar="JSON", help="results of a search, for the choice per set")
    parser.add_argument("--out", type=Path, required=True, metavar="JSON", help="file for the results")
    return run_main(lambda: bench(parser.parse_args()))


def bench(args: argparse.Namespace) -> None:
    """Run a part of the bench."""
    cells = [
        Cell(name, pairs, args.seed, args.documents, args.tokens, args.folder, args.source)
        for pairs in args.pairs
        for name in args.sets
    ]
    (search if args.what == "search" else compare)(cells, args)


def search(cells: list[Cell], args: argparse.Namespace) -> None:
    """Train recipes on all sets, print and save their validation metrics and the choice per set."""
    table: dict[str, dict[str, float]] = {}
    for recipe in args.recipes or RECIPES:
        table[recipe] = {cell.name: trained(cell, recipe)["validation"] for cell in cells}
        print(f"{recipe:20}", *(f"{value:.4f}" for value in table[recipe].values()), flush=True)
    choices = {}
    for left_out in (*args.sets, None):
        others = [cell.name for cell in cells if cell.set != left_out]
        mean = {recipe: float(np.mean([values[name] for name in others])) for recipe, values in table.items()}
        choices[left_out or "all"] = max(mean, key=lambda recipe: mean[recipe])
    print("choice per left-out set:", choices)
    recipes = {name: asdict(RECIPES[name]) for name in table if name != SHIPPED}
    write_json(args.out, {"validation": table, "choices": choices, "recipes": recipes})


def compare(cells: list[Cell], args: argparse.Namespace) -> None:
    """Train and evaluate recipes and the shipped config on the test split of every set."""
    choices = json.loads(args.search.read_text())["choices"] if args.search else {}
    table = []
    for cell in cells:
        names = args.recipes or [choices[cell.set]]
        systems = {name: measured(cell, name) for name in (*names, SHIPPED)}
        shipped, results = systems.pop(SHIPPED), [trained(cell, name) for name in (*names, SHIPPED)]
        pairs = [(system, shipped) for system in systems.values()]
        out = args.out.with_name(f"{args.out.stem}-{cell.name}.json")
        save_comparison(out, [*systems.values(), shipped], pairs, Dataset.open(cell.dataset), split="test")
        comparison = json.loads(out.read_text())
        table.append({"set": cell.set, "pairs": cell.pairs, "results": results, **comparison})
        write_json(args.out, table)
        for result in results:
            print(f"{cell.name:20} {result['recipe']:20} validation {result['validation']:.4f}", end=" ")
            print(f"{result['steps']} steps, {result['cpu_seconds']:.0f} CPU-seconds")
        print(*(f"{cell.name:20} {line}" for line in differences(pairs, [METRIC])), sep="\n", flush=True)


def trained(cell: Cell, name: str) -> dict[str, Any]:
    """Train a recipe unless its result exists; return the result."""
    run, file = cell.folder / "runs" / cell.name / name, cell.folder / "results" / cell.name / f"{name}.json"
    overrides = [] if name == SHIPPED else RECIPES[name].overrides(cell.pairs)
    if file.exists():
        result: dict[str, Any] = json.loads(file.read_text())
        if result["overrides"] != overrides:
            raise ValueError(f"{file} is of other settings under the name {name}: delete it or rename the recipe")
        return result
    cell.make()
    path, common = cell.config
    shutil.rmtree(run, ignore_errors=True)
    common = [
        *common, f"run.dir={run}", "run.trackers=[]", "data.num_workers=0", "pretrain.save_every_steps=0",
        "engine.keep_graph_tokens=32768", *overrides,
    ]  # fmt: skip
    started = time.process_time()
    best = bigdssm.pretrain(path, common)
    result = {
        "set": cell.set,
        "pairs": cell.pairs,
        "recipe": name,
        "overrides": overrides,
        "steps": best.metrics["step"],
        "validation": best.metrics[METRIC],
        "cpu_seconds": round(time.process_time() - started, 1),
    }
    shutil.rmtree(run / "pretrain" / "checkpoints", ignore_errors=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, result)
    return result


def measured(cell: Cell, name: str) -> System:
    """Evaluate a trained recipe on the test split; its ranks are stored."""
    seconds = trained(cell, name)["cpu_seconds"]
    ranks, dataset = cell.folder / "results" / cell.name / f"{name}.npy", Dataset.open(cell.dataset)
    if not ranks.exists():
        model = load_model_folder(cell.folder / "runs" / cell.name / name / "pretrain" / "best").model
        encode_in(model, "auto")
        np.save(ranks, evaluate_split(tower_encoders(model, dataset), dataset, "test").ranks)
    query_ids = np.concatenate([rows.query_ids for rows in dataset.iterate("test", 65_536)])
    return System.from_ranks(name, np.load(ranks), query_ids, seconds)


def sampled(text_set: TextSet, cell: Cell) -> Iterator[Row]:
    """Yield a seeded sample of the pairs of a set with their split, and rows that add only documents.

    Train has `cell.pairs` rows without documents of the other splits, validation 1,000 and test 1,500.
    """
    by_split: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for row in text_set.rows(cell.source):
        by_split[split_of(row[text_set.group], HELD_OUT)].append(row)
    order = {
        split: sorted(rows, key=lambda row: hash64(f"{cell.seed} {row[text_set.query]} {row[text_set.document]}"))
        for split, rows in by_split.items()
    }
    held_out = {row[text_set.document] for split in ("validation", "test") for row in by_split[split]}
    train = [row for row in order["train"] if row[text_set.document] not in held_out]
    parts = {"validation": order["validation"][:1000], "test": order["test"][:1500], "train": train[: cell.pairs]}
    documents: set[str] = set()
    for split, rows in parts.items():
        documents |= {row[text_set.document] for row in rows}
        yield from ({**row, "split": split} for row in rows)
    for row in train[cell.pairs :]:
        if len(documents) >= cell.documents:
            break
        if row[text_set.document] not in documents:
            documents.add(row[text_set.document])
            yield {**row, "split": "none"}


def wordnet_rows(source: Path) -> Iterator[Row]:
    """Yield a row per word and definition."""
    for row in read(source / "wordnet/synsets.jsonl.xz"):
        for lemma in row["lemmas"]:
            yield {"lemmas": lemma, "gloss": row["gloss"]}


def docstring_rows(_source: Path) -> Iterator[Row]:
    """Yield the functions of this environment's packages."""
    with gzip.open("datasets/source/docstrings.jsonl.gz", "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


SETS = {
    "medquad": TextSet(lambda source: read(source / "medquad/pairs.jsonl.xz"), "focus", "doc", "query", "answer"),
    "tldr": TextSet(lambda source: read(source / "tldr/pairs.jsonl.xz"), "command", "doc", "query", "shell"),
    "wordnet": TextSet(wordnet_rows, "gloss", "gloss", "lemmas", "gloss"),
    "docstrings": TextSet(docstring_rows, "package", "name", "docstring", "source", {"doc_id_column": "name"}),
}
CENTRE = Recipe()
RECIPES = {
    "centre": CENTRE,
    "epochs-4": replace(CENTRE, epochs=4.0),
    "epochs-2": replace(CENTRE, epochs=2.0),
    "alpha-50": replace(CENTRE, alpha=50.0),
    "lr-1e-4": replace(CENTRE, lr=1e-4),
    "lr-4e-4": replace(CENTRE, lr=4e-4),
    "average-0.9": replace(CENTRE, weight_average=0.9),
    "rows-256": replace(CENTRE, rows=256),
    "q2d": replace(CENTRE, direction="q2d"),
    "hard-1": replace(CENTRE, epochs=4.0, hard=1, margin=1.0),
}

if __name__ == "__main__":
    sys.exit(main())
