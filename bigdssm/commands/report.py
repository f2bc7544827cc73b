"""Report a run on a split: baselines, and the models after pretraining and fine-tuning.

    bigdssm report RUN [RUN …] --out REPORT.json [--split test]
    bigdssm report RUN [RUN …] --out JSON --beir DIR [--bm25] [--pretrained FOLDER] [--compare TREC …]

Evaluates the existing models among RUN/pretrain/best and RUN/sft/best over the full catalogue, with popularity and, if
rows have histories, a Markov chain as baselines; the models are compared with the last baseline. With --beir the models
are evaluated on a BEIR folder (such as that of make_shards --beir), against BM25 (--bm25), an unchanged pretrained
encoder (--pretrained), and runs saved by bigdssm evaluate (--compare). Several RUNs must have the same config with
different seeds: metrics are means ± standard errors over queries and seeds; confidence intervals
bootstrap over seeds and over clusters of queries (one per user or query text). REPORT.json is a list of {name,
ndcg_at_10, …, seconds}; `seconds` includes training and evaluation; `seeds` contains the metrics per seed.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.console import Console

from bigdssm.checkpoints.model_folder import ModelFolder, load_model_folder
from bigdssm.cli import OVERWRITE, check_file_to_write, command, option, refuse_options
from bigdssm.cluster.metrics import training_seconds
from bigdssm.config import Config, RunConfig, first_difference
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.remote import FileCache
from bigdssm.dataset.rows import EventRules
from bigdssm.errors import CheckpointError, ConfigError
from bigdssm.evaluation.collection import bm25_run, measure_run, model_run, pretrained_run
from bigdssm.evaluation.comparison import (
    RUN_METRICS,
    System,
    as_json,
    baseline_systems,
    differences,
    distinct_names,
    model_system,
    table,
)
from bigdssm.evaluation.metrics import table_metrics
from bigdssm.evaluation.trec import Run, read_run
from bigdssm.models.precision import PRECISION_HELP, PRECISIONS
from bigdssm.retrieval.embed import encode_in
from bigdssm.sources.beir import Collection, read_collection
from bigdssm.utils.atomic import write_json
from bigdssm.utils.log import ProgressBar


@command(
    option("runs", type=Path, nargs="+", metavar="RUN", help="run folder; several: one config with different seeds"),
    option("--data", help="dataset folder or URL (default: the training dataset)"),
    option("--split", default="test", help="split of the dataset or collection (default: %(default)s)"),
    option("--out", type=Path, required=True, metavar="JSON", help="file for the report"),
    option("--beir", type=Path, metavar="DIR", help="evaluate on this BEIR folder"),
    option("--bm25", action="store_true", help="with --beir: also evaluate BM25"),
    option("--pretrained", type=Path, metavar="FOLDER", help="with --beir: also evaluate an unchanged text encoder"),
    option(
        "--compare", type=Path, nargs="+", default=[], metavar="TREC", help="TREC runs of other systems (default: none)"
    ),
    option("--save-runs", type=Path, metavar="DIR", help="write all runs to this folder in TREC format"),
    option("--filter-known", action="store_true", help="exclude documents that are relevant in other splits"),
    option("--precision", choices=PRECISIONS, default="fp32", help=PRECISION_HELP),
    OVERWRITE,
)
def main(args: argparse.Namespace) -> None:
    """Run the command line."""
    check_file_to_write("--out", args.out, "report", overwrite=args.overwrite)
    if args.beir is None:
        beir_options = ["--bm25", "--pretrained", "--compare", "--save-runs", "--filter-known"]
        refuse_options(args, beir_options, "without --beir")
    else:
        refuse_options(args, ["--data"], "with --beir, which has its own documents")

    runs = []
    for run in args.runs:
        existing = [stage for stage in ("pretrain", "sft") if (run / stage / "best").is_dir()]
        if not existing:
            raise CheckpointError(f"{run} contains neither pretrain/best nor sft/best; train first")
        runs.append({stage: load_model_folder(run / stage / "best") for stage in existing})
        for folder in runs[-1].values():
            encode_in(folder.model, args.precision)
    _check_seeds(args.runs, [next(iter(stages.values())).config for stages in runs])
    names = {
        stage: f"{folder.config.pretrain.loss.name.upper()} pretraining" if stage == "pretrain" else "+ SFT"
        for stage, folder in runs[0].items()
    }
    if args.beir is None:
        data = next(iter(runs[0].values())).config.data
        dataset = Dataset.open(args.data or data.dir, cache=FileCache.from_config(data)).with_rules(EventRules.of(data))
        others = baseline_systems(dataset, args.split, data.exclude_seen)

        def measure(name: str, folder: ModelFolder, stage_dir: Path) -> System:
            exclude_seen, spent_s = folder.config.data.exclude_seen, training_seconds(stage_dir)
            with ProgressBar() as progress:
                return model_system(name, folder, dataset, args.split, exclude_seen, spent_s=spent_s, progress=progress)

        title, shown = f"{dataset.num_queries(args.split)} queries", table_metrics()
    else:
        collection = read_collection(args.beir, args.split)
        options: dict[str, Any] = {"filter_known": args.filter_known}
        baselines: dict[str, Callable[[], Run]] = {}
        if args.bm25:
            baselines["BM25"] = partial(bm25_run, collection, **options)
        if args.pretrained is not None:
            encode = partial(pretrained_run, args.pretrained, collection, precision=args.precision, **options)
            baselines[f"{args.pretrained.name}, unchanged"] = encode
        for name, path in zip(distinct_names(args.compare), args.compare, strict=True):
            baselines[name] = partial(read_run, path)
        others = [_on_collection(name, make, collection, args) for name, make in baselines.items()]

        def measure(name: str, folder: ModelFolder, stage_dir: Path) -> System:
            make = partial(model_run, folder.model, folder.schema, folder.tokenizer_dir, collection, **options)
            label = name if len(args.runs) == 1 else f"{name} {stage_dir.parent.name}"
            return _on_collection(name, make, collection, args, training_seconds(stage_dir), label)

        title, shown = f"{len(collection.qrels)} queries", RUN_METRICS
    models = [
        System.from_seeds(
            [measure(names[stage], stages[stage], run / stage) for run, stages in zip(args.runs, runs, strict=True)]
        )
        for stage in names
    ]
    pairs = [(model, other) for model in models for other in (others[-1:] if args.beir is None else others)]
    if len(runs) > 1:
        title += f", {len(runs)} seeds"

    console = Console()
    console.print(table([*others, *models], f"{args.split}, {title}", shown))
    console.print("paired differences with 95 % bootstrap intervals:")
    for line in differences(pairs + [(b, a) for a, b in combinations(models, 2)], shown):
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, as_json([*others, *models]))


def _check_seeds(runs: Sequence[Path], configs: Sequence[Config]) -> None:
    """Raise ConfigError unless the configs differ only in their run sections and have distinct seeds."""
    first = replace(configs[0], run=RunConfig()).to_dict()
    seeds: dict[int, Path] = {}
    for run, config in zip(runs, configs, strict=True):
        difference = first_difference(first, replace(config, run=RunConfig()).to_dict())
        if difference:
            raise ConfigError(f"{run} and {runs[0]} differ in more than the seed: {difference}; report them separately")
        if config.run.seed in seeds:
            raise ConfigError(f"{run} has the same seed as {seeds[config.run.seed]}; omit one of them")
        seeds[config.run.seed] = run


def _on_collection(
    name: str, make: Callable[[], Run], collection: Collection, args: argparse.Namespace, spent_s: float = 0.0,
    label: str | None = None,
) -> System:  # fmt: skip
    """Measure a run and write it to the folder of --save-runs, by its label (default: its name)."""
    label, file = label or name, None
    if args.save_runs is not None:
        file = args.save_runs / f"{'-'.join(label.replace('/', ' ').split())}.trec"
        check_file_to_write("--save-runs", file, "report", overwrite=args.overwrite)
    return measure_run(name, make, collection, spent_s, file, label)


if __name__ == "__main__":
    raise SystemExit(main())
