"""Choose one training recipe for small sets of text pairs, and compare it with the shipped configs.

    python -m tools.public_data docstrings --max-per-package 1000 --out datasets/source/docstrings.jsonl.gz
    python -m tools.bench.bench_text_recipe search --source ../shared/data --pairs 500 --out search.json
    python -m tools.bench.bench_text_recipe compare --source ../shared/data --pairs 500 --search search.json \\
        --out left_out.json
    python -m tools.bench.bench_text_recipe compare --source ../shared/data --pairs 500 --recipe lr-1e-4-hard \\
        --out compare.json

The sets are seeded subsamples of MedQuAD, tldr, WordNet, docstrings and Debian's packages. Train has no group (a
disease, a command, a definition, a package) and no document of validation or test.

search: trains the recipes on every set. The choice for a set is the recipe with the highest mean validation NDCG@10
over the other sets and all sizes; `all` is the choice over all sets.
compare: trains the choice for each set, or one recipe, and the pretraining of the set's shipped config on the same
pairs, and evaluates both on the test split, with paired bootstrap intervals. A shipped config has the same number of
steps for any set.

Existing results in --folder are reused, so an interrupted command continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import bigdssm
from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.cli import run_main
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError
from bigdssm.evaluation.comparison import System, differences, save_comparison
from bigdssm.evaluation.evaluate import evaluate_split
from bigdssm.retrieval.embed import encode_in, tower_encoders
from bigdssm.sources.base import TableFile
from bigdssm.utils.atomic import write_json
from bigdssm.utils.hashing import hash64

HELD_OUT = 0.15  # share of the groups in validation, and in test
HELD_OUT_PAIRS = {"validation": 1000, "test": 1500}
METRIC = "ndcg_at_10"
SHIPPED = "shipped"
SPEED = ("engine.chunk_tokens=768", "engine.keep_graph_tokens=32768", "data.num_workers=0")  # same loss, less time
Row = dict[str, Any]


@dataclass(frozen=True)
class TextSet:
    """Source of the pairs of a config, and the columns that identify groups, documents and queries."""

    rows: Callable[[Path], Iterator[Row]]
    group: str
    document: str
    query: str
    text: str  # name of the document's text feature
    options: dict[str, Any] = field(default_factory=dict)  # for make_dataset


@dataclass(frozen=True)
class Recipe:
    """Training settings that are the same for every set; the number of steps follows from the number of pairs."""

    lr: float = 1e-4
    epochs: float = 4.0
    alpha: float = 20.0
    direction: str = "both"
    weight_average: float = 0.0
    hard: int = 0  # hard negatives per row, mined by the pretrained encoder, below the positive's score plus 1
    rows: int = 128  # of a step

    def overrides(self, pairs: int) -> list[str]:
        """Return the config overrides for a number of train pairs."""
        rows = min(self.rows, pairs // 8 * 8)  # a multiple of data.lanes
        steps = max(1, ceil(self.epochs * pairs / rows))
        return [
            f"model.alpha_init={self.alpha}", f"pretrain.rows_global={rows}", f"pretrain.steps={steps}",
            f"pretrain.loss.direction={self.direction}", "pretrain.loss.widths=null",
            f"pretrain.optimizer.lr={self.lr}", f"pretrain.optimizer.warmup_steps={max(1, steps // 10)}",
            f"pretrain.weight_average={self.weight_average}", f"pretrain.negatives.hard={self.hard}",
            "pretrain.negatives.mining={first: 0, last: 50, margin: 1.0}",
        ]  # fmt: skip


@dataclass(frozen=True)
class Subsample:
    """A number of train pairs of a set, and its files."""

    set: str
    pairs: int
    args: argparse.Namespace

    @property
    def name(self) -> str:
        """Name of the files."""
        return f"{self.set}-{self.pairs}-{self.args.documents}-{self.args.tokens}-{self.args.seed}"

    @property
    def dataset(self) -> Path:
        """Folder of the dataset."""
        return Path(self.args.folder) / "datasets" / self.name

    @property
    def config(self) -> tuple[str, list[str]]:
        """Path and overrides of the config."""
        path, text = f"configs/{self.set}.yaml", SETS[self.set].text
        tokens = min(bigdssm.load_config(path).data.doc[text].max_tokens, self.args.tokens)
        return path, [
            f"data.dir={self.dataset}", f"run.seed={self.args.seed}", f"data.doc.{text}.max_tokens={tokens}"
        ]  # fmt: skip

    def train(self, recipe: str) -> dict[str, Any]:
        """Train a recipe unless its result exists; return the result. Raises ConfigError: that of other settings."""
        file = self._result(f"{recipe}.json")
        run = self._run(recipe)
        overrides = [] if recipe == SHIPPED else RECIPES[recipe].overrides(self.pairs)
        if file.exists():
            result: dict[str, Any] = json.loads(file.read_text())
            if result["overrides"] != overrides:
                raise ConfigError(
                    f"{file}: got a result of other settings than {recipe}; delete it, or rename the recipe"
                )
            return result
        path, common = self.config
        if not self.dataset.exists():
            rows = pa.Table.from_pylist(list(sampled(SETS[self.set], self)))
            options = SETS[self.set].options
            bigdssm.make_dataset(path, common, pairs=rows, split="column", split_column="split", processes=1, **options)
        shutil.rmtree(run, ignore_errors=True)
        common += [f"run.dir={run}", "run.trackers=[]", "pretrain.save_every_steps=0", *SPEED]
        started = time.process_time()
        metrics = bigdssm.pretrain(path, [*common, *overrides]).metrics
        seconds = round(time.process_time() - started, 1)
        shutil.rmtree(run / "pretrain/checkpoints")
        result = {"set": self.set, "pairs": self.pairs, "recipe": recipe, "overrides": overrides}
        result |= {"steps": metrics["step"], "validation": metrics[METRIC], "cpu_seconds": seconds}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, result)
        return result

    def evaluate(self, recipe: str) -> System:
        """Evaluate a trained recipe on the test split, unless its ranks exist."""
        seconds = self.train(recipe)["cpu_seconds"]
        ranks = self._result(f"{recipe}.npy")
        dataset = Dataset.open(self.dataset)
        if not ranks.exists():
            model = load_model_folder(self._run(recipe) / "pretrain/best").model
            encode_in(model, "auto")
            np.save(ranks, evaluate_split(tower_encoders(model, dataset), dataset, "test").ranks)
        query_ids = np.concatenate([rows.query_ids for rows in dataset.iterate("test", 65_536)])
        return System.from_ranks(recipe, np.load(ranks), query_ids, seconds)

    def _result(self, file: str) -> Path:
        return Path(self.args.folder) / "results" / self.name / file

    def _run(self, recipe: str) -> Path:
        return Path(self.args.folder) / "runs" / self.name / recipe


def main() -> int:
    """Run the bench; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("search", "compare"), help="part to run")
    parser.add_argument("--source", type=Path, required=True, help="folder with one subfolder per table")
    parser.add_argument("--folder", type=Path, default=Path("runs/text_recipe"), help="folder for all files")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="sets (default: all)")
    parser.add_argument("--pairs", nargs="+", type=int, default=[500], help="numbers of train pairs")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="of search (default: all)")
    parser.add_argument("--search", type=Path, metavar="JSON", help="of compare: results of search")
    parser.add_argument("--recipe", choices=RECIPES, help="of compare, in place of the choices of --search")
    parser.add_argument(
        "--documents", type=int, default=3000, help="minimum number of documents (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=int, default=32, help="maximum number of tokens of a document (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of sampling and training")
    parser.add_argument("--out", type=Path, required=True, metavar="JSON", help="file for the results")
    args = parser.parse_args()
    if args.what == "compare" and (args.search is None) == (args.recipe is None):
        parser.error("compare needs --search or --recipe")
    subsamples = [Subsample(name, pairs, args) for pairs in args.pairs for name in args.sets]
    return run_main(lambda: (search if args.what == "search" else compare)(subsamples, args))


def search(subsamples: list[Subsample], args: argparse.Namespace) -> None:
    """Train recipes; print and save their validation metrics and the choices."""
    table: dict[str, list[float]] = {}
    for recipe in args.recipes:
        table[recipe] = [subsample.train(recipe)["validation"] for subsample in subsamples]
        print(f"{recipe:20}", *(f"{value:.4f}" for value in table[recipe]), flush=True)
    choices = {}
    for left_out in (*args.sets, "all"):
        others = [number for number, subsample in enumerate(subsamples) if subsample.set != left_out]
        if others:
            choices[left_out] = max(table, key=lambda recipe: sum(table[recipe][number] for number in others))
    print("choices:", choices)
    names, recipes = [subsample.name for subsample in subsamples], {name: asdict(RECIPES[name]) for name in table}
    write_json(args.out, {"subsamples": names, "validation": table, "choices": choices, "recipes": recipes})


def compare(subsamples: list[Subsample], args: argparse.Namespace) -> None:
    """Train and evaluate a recipe and the shipped config of each set; print and save both."""
    choices = json.loads(args.search.read_text())["choices"] if args.search else dict.fromkeys(SETS, args.recipe)
    table = []
    for subsample in subsamples:
        names = (choices[subsample.set], SHIPPED)
        results = [subsample.train(name) for name in names]
        chosen, shipped = (subsample.evaluate(name) for name in names)
        out = args.out.with_name(f"{args.out.stem}-{subsample.name}.json")
        save_comparison(out, [chosen, shipped], [(chosen, shipped)], Dataset.open(subsample.dataset), split="test")
        table.append({"results": results, **json.loads(out.read_text())})
        write_json(args.out, table)
        for result, system in zip(results, (chosen, shipped), strict=True):
            scores = f"validation {result['validation']:.4f} test {system.values[METRIC].mean():.4f}"
            cost = f"{result['steps']} steps, {result['cpu_seconds']:.0f} CPU-seconds"
            print(f"{subsample.name:20} {result['recipe']:12} {scores}, {cost}")
        print(f"{subsample.name:20}", *differences([(chosen, shipped)], [METRIC]), flush=True)


def sampled(text_set: TextSet, subsample: Subsample) -> Iterator[Row]:
    """Yield the pairs of a seeded subsample with their split, and rows that add only documents."""

    def order(row: Row) -> int:
        return hash64(f"{subsample.args.seed} {row[text_set.query]} {row[text_set.document]}")

    parts: dict[str, list[Row]] = {"validation": [], "test": [], "train": []}
    for row in sorted(text_set.rows(subsample.args.source), key=order):
        uniform = hash64(row[text_set.group]) / 2**64 % 1  # the hash is signed
        split = "test" if uniform < HELD_OUT else "validation" if uniform < 2 * HELD_OUT else "train"
        parts[split].append(row)
    held_out = {row[text_set.document] for split in HELD_OUT_PAIRS for row in parts[split]}
    train = [row for row in parts["train"] if row[text_set.document] not in held_out]
    parts["train"] = train[: subsample.pairs]
    documents: set[str] = set()
    for split, rows in parts.items():
        used = rows[: HELD_OUT_PAIRS.get(split)]
        documents |= {row[text_set.document] for row in used}
        yield from ({**row, "split": split} for row in used)
    for row in train[subsample.pairs :]:
        if len(documents) < subsample.args.documents and row[text_set.document] not in documents:
            documents.add(row[text_set.document])
            yield {**row, "split": "none"}


def read(path: Path) -> Iterator[Row]:
    """Yield the records of a compressed .jsonl file."""
    return map(json.loads, TableFile(path).open())


def wordnet_rows(source: Path) -> Iterator[Row]:
    """Yield a row per word and definition."""
    for row in read(source / "wordnet/synsets.jsonl.xz"):
        yield from ({"lemmas": lemma, "gloss": row["gloss"]} for lemma in row["lemmas"])


def debian_rows(source: Path) -> Iterator[Row]:
    """Yield the columns that the config declares of each Debian package."""
    columns = ("package", "source", "synopsis", "description", "section", "installed_kb", "tags")
    for row in read(source / "debian_packages/packages.jsonl.xz"):
        yield {name: row[name] for name in columns}


SETS = {
    "medquad": TextSet(lambda source: read(source / "medquad/pairs.jsonl.xz"), "focus", "doc", "query", "answer"),
    "tldr": TextSet(lambda source: read(source / "tldr/pairs.jsonl.xz"), "command", "doc", "query", "shell"),
    "wordnet": TextSet(wordnet_rows, "gloss", "gloss", "lemmas", "gloss"),
    "docstrings": TextSet(
        lambda _: read(Path("datasets/source/docstrings.jsonl.gz")),
        "package",
        "name",
        "docstring",
        "source",
        {"doc_id_column": "name"},
    ),
    "debian_packages": TextSet(
        debian_rows,
        "source",
        "package",
        "synopsis",
        "description",
        {"doc_id_column": "package"},
    ),
}
RECIPES = {
    "unchanged": Recipe(lr=0.0, epochs=0.0),
    "lr-5e-5": Recipe(lr=5e-5),
    "lr-1e-4": Recipe(),
    "lr-1e-4-hard": Recipe(hard=1),
    "lr-1e-4-average": Recipe(weight_average=0.9),
    "lr-1e-4-alpha-30": Recipe(alpha=30.0),
    "lr-1e-4-q2d": Recipe(direction="q2d"),
    "lr-2e-4": Recipe(lr=2e-4),
    "lr-2e-4-epochs-8": Recipe(lr=2e-4, epochs=8.0),
    "lr-2e-4-hard": Recipe(lr=2e-4, hard=1),
    "lr-1e-4-epochs-2": Recipe(epochs=2.0),
    "rows-512": Recipe(lr=2e-4, rows=512),
    "rows-512-epochs-2": Recipe(lr=2e-4, epochs=2.0, rows=512),
    "rows-512-epochs-1": Recipe(lr=2e-4, epochs=1.0, rows=512),
}

if __name__ == "__main__":
    sys.exit(main())
