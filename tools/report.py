"""Report a run on a split: popularity, a window-3 Markov chain, the pretrained model, and what fine-tuning adds.

    python tools/report.py RUN --out REPORT.json [--split test]

Evaluates RUN/pretrain/best and, where it is there, RUN/sft/best over the full catalogue. REPORT.json is a list of
{name, hr_at_10, ndcg_at_10, mrr, …, seconds}; a model's seconds are those of its training and its evaluation.
"""

from __future__ import annotations

import argparse
import sys
from itertools import combinations
from pathlib import Path

from rich.console import Console

from bigdssm.cli import ProgressBar, run_main
from bigdssm.data import Dataset
from bigdssm.data.cache import Cache
from bigdssm.errors import CheckpointError
from bigdssm.evaluation.curves import training_seconds
from bigdssm.evaluation.split import evaluate_split
from bigdssm.evaluation.systems import System, as_json, baseline_systems, differences, table, write_json
from bigdssm.export import ModelFolder, load_model_folder
from bigdssm.retrieval.embed import tower_encoders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--data", help="dataset folder or URL (by default the one that the run was trained on)")
    parser.add_argument("--split", default="test", help="split of the dataset (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="JSON", help="where the list is saved")
    args = parser.parse_args()

    stages = {stage: args.run / stage for stage in ("pretrain", "sft") if (args.run / stage / "best").is_dir()}
    if not stages:
        raise CheckpointError(f"{args.run} holds neither pretrain/best nor sft/best; train first")
    folders = {stage: load_model_folder(folder / "best") for stage, folder in stages.items()}
    data = next(iter(folders.values())).config.data
    dataset = Dataset.open(args.data or data.dir, cache=Cache.of(data))
    baselines = baseline_systems(dataset, args.split)
    models = [evaluated(stage, folders[stage], folder, dataset, args.split) for stage, folder in stages.items()]

    console = Console()
    console.print(table([*baselines, *models], f"{args.split}, {dataset.num_rows(args.split)} rows"))
    console.print("paired differences with 95 % bootstrap intervals:")
    strongest = baselines[-1]
    pairs = [(model, strongest) for model in models] + [(b, a) for a, b in combinations(models, 2)]
    for line in differences(pairs):
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, as_json([*baselines, *models]))


def evaluated(stage: str, folder: ModelFolder, stage_dir: Path, dataset: Dataset, split: str) -> System:
    folder.check_dataset(dataset)
    loss = folder.config.pretrain.loss.name
    name = f"{loss.upper()} pretraining" if stage == "pretrain" else "+ SFT"
    with ProgressBar() as progress:
        evaluation = evaluate_split(tower_encoders(folder.model, dataset), dataset, split, progress=progress)
    return System(name, evaluation.ranks, evaluation.seconds + training_seconds(stage_dir))


if __name__ == "__main__":
    sys.exit(run_main(main))
