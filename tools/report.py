"""Report a run on a split: popularity, a window-3 Markov chain, the pretrained model, and what fine-tuning adds.

    python tools/report.py RUN --out REPORT.json [--split test]
    python tools/report.py RUN --out REPORT.json --beir DIR [--compare RUN.trec …] [--save-runs DIR]

Evaluates RUN/pretrain/best and, where it is there, RUN/sft/best over the full catalogue. With --beir they are measured
on a collection that tools/make_shards.py wrote beside the dataset, against runs that tools/evaluate.py saved (BM25, a
pretrained encoder as it is). REPORT.json is a list of {name, ndcg_at_10, …, seconds}; a model's seconds are those of
its training and its evaluation.
"""

from __future__ import annotations

import argparse
import sys
from itertools import combinations
from pathlib import Path
from time import perf_counter

from rich.console import Console

from bigdssm.cli import ProgressBar, run_main
from bigdssm.config import Config
from bigdssm.data import Dataset
from bigdssm.data.beir import Collection, read_collection
from bigdssm.data.cache import Cache
from bigdssm.errors import CheckpointError
from bigdssm.evaluation.collection import model_run
from bigdssm.evaluation.curves import training_seconds
from bigdssm.evaluation.split import evaluate_split
from bigdssm.evaluation.systems import (
    SHOWN,
    SHOWN_OF_RUNS,
    System,
    as_json,
    baseline_systems,
    differences,
    table,
    write_json,
)
from bigdssm.evaluation.trec import read_run, run_metrics, write_run
from bigdssm.export import ModelFolder, load_model_folder
from bigdssm.retrieval.embed import tower_encoders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--data", help="dataset folder or URL (by default the one that the run was trained on)")
    parser.add_argument("--split", default="test", help="split of the dataset or collection (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="JSON", help="where the list is saved")
    parser.add_argument("--beir", type=Path, metavar="DIR", help="measure on this BEIR folder")
    parser.add_argument("--compare", type=Path, nargs="+", default=[], metavar="TREC", help="runs of other systems")
    parser.add_argument("--save-runs", type=Path, metavar="DIR", help="write the models' runs there in TREC's format")
    parser.add_argument("--filter-known", action="store_true", help="as with tools/evaluate.py")
    args = parser.parse_args()

    stages = {stage: args.run / stage for stage in ("pretrain", "sft") if (args.run / stage / "best").is_dir()}
    if not stages:
        raise CheckpointError(f"{args.run} holds neither pretrain/best nor sft/best; train first")
    folders = {stage: load_model_folder(folder / "best") for stage, folder in stages.items()}
    names = {stage: stage_name(stage, folder.config) for stage, folder in folders.items()}
    if args.beir is None:
        data = next(iter(folders.values())).config.data
        dataset = Dataset.open(args.data or data.dir, cache=Cache.of(data))
        others = baseline_systems(dataset, args.split)
        models = [evaluated(names[stage], folders[stage], stages[stage], dataset, args.split) for stage in stages]
        title, shown, pairs = f"{dataset.num_rows(args.split)} rows", SHOWN, [(m, others[-1]) for m in models]
    else:
        collection = read_collection(args.beir, args.split)
        others = [System(path.stem, run_metrics(collection.qrels, read_run(path)), 0.0) for path in args.compare]
        models = [on_collection(names[stage], folders[stage], stages[stage], collection, args) for stage in stages]
        title, shown = f"{len(collection.qrels)} queries", SHOWN_OF_RUNS
        pairs = [(model, other) for model in models for other in others]

    console = Console()
    console.print(table([*others, *models], f"{args.split}, {title}", shown))
    console.print("paired differences with 95 % bootstrap intervals:")
    for line in differences(pairs + [(b, a) for a, b in combinations(models, 2)], shown):
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, as_json([*others, *models]))


def stage_name(stage: str, config: Config) -> str:
    return f"{config.pretrain.loss.name.upper()} pretraining" if stage == "pretrain" else "+ SFT"


def on_collection(
    name: str, folder: ModelFolder, stage_dir: Path, collection: Collection, args: argparse.Namespace
) -> System:
    started = perf_counter()
    with ProgressBar() as progress:
        run = model_run(
            folder.model, folder.schema, folder.tokenizer_dir, collection,
            filter_known=args.filter_known, progress=progress,
        )  # fmt: skip
    if args.save_runs is not None:
        write_run(args.save_runs / f"{stage_dir.name}.trec", run, name)
    seconds = perf_counter() - started + training_seconds(stage_dir)
    return System(name, run_metrics(collection.qrels, run), seconds)


def evaluated(name: str, folder: ModelFolder, stage_dir: Path, dataset: Dataset, split: str) -> System:
    folder.check_dataset(dataset)
    with ProgressBar() as progress:
        evaluation = evaluate_split(tower_encoders(folder.model, dataset), dataset, split, progress=progress)
    return System.of_ranks(name, evaluation.ranks, evaluation.seconds + training_seconds(stage_dir))


if __name__ == "__main__":
    sys.exit(run_main(main))
