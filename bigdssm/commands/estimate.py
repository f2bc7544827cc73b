"""Estimate memory, communication, checkpoints, duration and negatives per query of a stage.

    bigdssm estimate --config configs/debian_packages.yaml
    bigdssm estimate --config F --gpus 64 --rows 65536 --rows-per-s 40000 [key=value …]
    bigdssm estimate --config F --gpus 8 --pairs 300000 --documents 2000000 --rows-per-s 2000

Memory depends on the vocabularies of the dataset and on the rows of one step. With --pairs and --documents, the dataset
need not exist: all texts then have max_tokens words, and a category feature has one value. Without --rows-per-s the
durations are those recorded by the run in run.dir, if there is one. The memory estimate excludes the base memory of a
process after all imports, about 0.5 GB.
"""

import argparse
import ast
import math
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bigdssm.cli import at_least, command, option
from bigdssm.config import Config, load_config
from bigdssm.dataset.dataset import Dataset, open_dataset
from bigdssm.dataset.schema import Schema
from bigdssm.errors import ConfigError
from bigdssm.features import Text
from bigdssm.ingest.api import make_dataset
from bigdssm.training.estimate import StatedSizes, estimate, recorded_times


@command(
    option("--config", required=True, metavar="FILE", help="YAML file; see configs/"),
    option("--stage", choices=["pretrain", "sft"], default="pretrain", help="stage to estimate (default: %(default)s)"),
    option(
        "--gpus", type=int, default=1, metavar="N", help="number of ranks, with or without GPUs (default: %(default)s)"
    ),
    option("--rows", type=int, metavar="R", help="global batch size (default: rows_global of the stage)"),
    option("--rows-per-s", type=float, metavar="X", help="speed of all ranks together (default: recorded in run.dir)"),
    option("--pairs", type=at_least(1), metavar="N", help="training pairs of a dataset that is not built"),
    option("--documents", type=at_least(1), metavar="N", help="its documents, with --pairs"),
    option("--validation", type=at_least(1), metavar="N", help="its queries of validation (default: 5%% of --pairs)"),
    option("overrides", nargs="*", metavar="key=value", help="overrides of dotted config keys"),
)
def main(args: argparse.Namespace) -> None:
    """Run the command line."""
    for name, given in (("--gpus", args.gpus), ("--rows", args.rows)):
        if given is not None and given < 1:
            raise ConfigError(f"{name} {given}: needs at least 1")
    if args.rows_per_s is not None and not 0 < args.rows_per_s < math.inf:
        raise ConfigError(f"--rows-per-s {args.rows_per_s}: needs a finite number above 0")
    rows = [f"{args.stage}.rows_global={args.rows}"] if args.rows else []
    config = load_config(args.config, [*args.overrides, *rows])
    recorded = recorded_times(config.stage_dir(args.stage))
    if args.pairs and args.documents:
        sizes = StatedSizes(args.pairs, args.documents, args.validation or -(-args.pairs // 20))
        with TemporaryDirectory() as folder:
            step = min(args.pairs, config.stage(args.stage).rows_global)
            dataset = stand_in_dataset(config, step, Path(folder) / "dataset")
            result = estimate(config, args.stage, dataset, args.gpus, sizes)
    elif args.pairs or args.documents or args.validation:
        raise ConfigError("a dataset that is not built needs both --pairs and --documents")
    else:
        dataset = open_dataset(config.data)
        dataset.check_against(config.data)
        result = estimate(config, args.stage, dataset, args.gpus)
    for line in result.lines(args.rows_per_s or recorded[0], None if args.rows_per_s or args.pairs else recorded[1]):
        print(line)


def stand_in_dataset(config: Config, rows: int, folder: Path) -> Dataset:
    """Build a dataset of `rows` pairs of different documents, with texts of `max_tokens` words.

    Raises ConfigError: a feature or kind of negatives whose size depends on more than StatedSizes.
    """
    features = [feature for side in Schema.declared(config.data).sides.values() for feature in side.values()]
    needed = next((f"the feature {feature.name}" for feature in features if feature.type == "history"), "")
    if needed or config.data.webdataset:
        raise ConfigError(f"sizes of {needed or 'data.webdataset'} cannot be stated; build the dataset first")
    random = np.random.RandomState(0)
    columns: dict[str, list[Any]] = {"id of a document": [str(row) for row in range(rows)], "split": ["train"] * rows}
    for feature in features:
        if isinstance(feature, Text):
            words = random.randint(config.data.tokenizer.vocab_size, size=(rows, feature.max_tokens))
            values: list[Any] = [" ".join(map(str, text)) for text in words.tolist()]
        else:
            values = [ast.literal_eval(feature.example)] * rows
        columns |= dict.fromkeys(feature.source_columns, values)
    config = replace(config, data=replace(config.data, dir=str(folder), mixture=[], from_partition=None))
    make_dataset(config, pairs=columns, doc_id_column="id of a document", split="column", split_column="split")
    return open_dataset(config.data)


if __name__ == "__main__":
    raise SystemExit(main())
