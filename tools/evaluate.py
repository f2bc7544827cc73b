"""Evaluate a model on a split over the full catalogue: seen items filtered, rank ties counting half.

    python tools/evaluate.py --model MODEL --data DATASET --split test [--baselines] [--compare OTHER] [--out JSON]

OTHER is another model folder, or the JSON of an earlier evaluation. Each row's rank is saved beside JSON as .npy.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from bigdssm.cli import ProgressBar, run_main
from bigdssm.data import Dataset
from bigdssm.evaluation.split import evaluate_split
from bigdssm.evaluation.systems import System, baseline_systems, differences, load_system, save_comparison, table
from bigdssm.export import load_model_folder
from bigdssm.retrieval.embed import tower_encoders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--data", required=True, help="dataset folder or URL")
    parser.add_argument("--split", default="test", help="split of the dataset (%(default)s)")
    parser.add_argument("--baselines", action="store_true", help="also evaluate popularity and the Markov baseline")
    parser.add_argument("--compare", type=Path, metavar="OTHER", help="model folder or earlier JSON to compare with")
    parser.add_argument("--out", type=Path, metavar="JSON", help="where to save the figures")
    args = parser.parse_args()

    dataset = Dataset.open(args.data)
    model = evaluated(args.model, dataset, args.split)
    others = baseline_systems(dataset, args.split) if args.baselines else []
    if args.compare is not None:
        is_model = args.compare.is_dir()
        others.append((evaluated if is_model else load_system)(args.compare, dataset, args.split))
    pairs = [(model, other) for other in others]

    console = Console()
    console.print(table([model, *others], f"{args.split}, {dataset.num_rows(args.split)} rows"))
    for line in differences(pairs):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if args.out is not None:
        save_comparison(args.out, dataset, args.split, [model, *others], pairs)


def evaluated(path: Path, dataset: Dataset, split: str) -> System:
    folder = load_model_folder(path)
    folder.check_dataset(dataset)
    with ProgressBar() as progress:
        evaluation = evaluate_split(tower_encoders(folder.model, dataset), dataset, split, progress=progress)
    return System(path.name, evaluation.ranks, evaluation.seconds)


if __name__ == "__main__":
    sys.exit(run_main(main))
