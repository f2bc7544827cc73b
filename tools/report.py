"""Report a run on a split: popularity, a window-3 Markov chain, the pretrained model, and what fine-tuning adds.

    python tools/report.py RUN --out REPORT.json [--split test]
    python tools/report.py RUN --out REPORT.json --beir DIR [--bm25] [--pretrained FOLDER] [--compare TREC …] [--bf16]

Evaluates RUN/pretrain/best and, where it is there, RUN/sft/best over the full catalogue. With --beir they are measured
on a collection that tools/make_shards.py wrote beside the dataset, against BM25, a pretrained encoder as it is, and
runs that tools/evaluate.py saved. REPORT.json is a list of {name, ndcg_at_10, …, seconds}; a model's seconds are those
of its training and its evaluation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
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
from bigdssm.evaluation.collection import Run, bm25_run, model_run, pretrained_run
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
from bigdssm.retrieval.embed import encode_in_bf16, tower_encoders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--data", help="dataset folder or URL (by default the one that the run was trained on)")
    parser.add_argument("--split", default="test", help="split of the dataset or collection (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="JSON", help="where the list is saved")
    parser.add_argument("--beir", type=Path, metavar="DIR", help="measure on this BEIR folder")
    parser.add_argument("--bm25", action="store_true", help="with --beir: also BM25")
    parser.add_argument("--pretrained", type=Path, metavar="FOLDER", help="with --beir: also an encoder as it is")
    parser.add_argument("--compare", type=Path, nargs="+", default=[], metavar="TREC", help="runs of other systems")
    parser.add_argument("--save-runs", type=Path, metavar="DIR", help="write all runs there in TREC's format")
    parser.add_argument("--filter-known", action="store_true", help="as with tools/evaluate.py")
    parser.add_argument("--bf16", action="store_true", help="multiply in bfloat16, which some processors do faster")
    args = parser.parse_args()

    stages = {stage: args.run / stage for stage in ("pretrain", "sft") if (args.run / stage / "best").is_dir()}
    if not stages:
        raise CheckpointError(f"{args.run} holds neither pretrain/best nor sft/best; train first")
    folders = {stage: load_model_folder(folder / "best") for stage, folder in stages.items()}
    if args.bf16:
        for folder in folders.values():
            encode_in_bf16(folder.model)
    names = {stage: stage_name(stage, folder.config) for stage, folder in folders.items()}
    if args.beir is None:
        data = next(iter(folders.values())).config.data
        dataset = Dataset.open(args.data or data.dir, cache=Cache.of(data))
        others = baseline_systems(dataset, args.split)
        models = [evaluated(names[stage], folders[stage], stages[stage], dataset, args.split) for stage in stages]
        title, shown, pairs = f"{dataset.num_rows(args.split)} rows", SHOWN, [(m, others[-1]) for m in models]
    else:
        collection = read_collection(args.beir, args.split)
        others = baselines_on_collection(collection, args)
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


def baselines_on_collection(collection: Collection, args: argparse.Namespace) -> list[System]:
    known, runs = args.filter_known, {}
    if args.bm25:
        runs["BM25"] = partial(bm25_run, collection, filter_known=known)
    if args.pretrained is not None:
        name = f"{args.pretrained.name} as it is"
        runs[name] = partial(pretrained_run, args.pretrained, collection, bf16=args.bf16, filter_known=known)
    runs |= {path.stem: partial(read_run, path) for path in args.compare}
    return [measured(name, run, collection, args, 0.0) for name, run in runs.items()]


def on_collection(
    name: str, folder: ModelFolder, stage_dir: Path, collection: Collection, args: argparse.Namespace
) -> System:
    make = partial(
        model_run, folder.model, folder.schema, folder.tokenizer_dir, collection, filter_known=args.filter_known
    )
    return measured(name, make, collection, args, training_seconds(stage_dir))


def measured(
    name: str, make: Callable[..., Run], collection: Collection, args: argparse.Namespace, spent: float
) -> System:
    started = perf_counter()
    run = make()
    if args.save_runs is not None:
        write_run(args.save_runs / f"{'-'.join(name.split())}.trec", run, name)
    return System(name, run_metrics(collection.qrels, run), perf_counter() - started + spent)


def evaluated(name: str, folder: ModelFolder, stage_dir: Path, dataset: Dataset, split: str) -> System:
    folder.check_dataset(dataset)
    with ProgressBar() as progress:
        evaluation = evaluate_split(tower_encoders(folder.model, dataset), dataset, split, progress=progress)
    return System.of_ranks(name, evaluation.ranks, evaluation.seconds + training_seconds(stage_dir))


if __name__ == "__main__":
    sys.exit(run_main(main))
