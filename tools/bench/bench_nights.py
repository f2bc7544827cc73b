"""The learning rate of nights that continue a model: NDCG@10 on the requests of the next day, by share of the rate.

    python tools/bench/bench_nights.py --config CONFIG --interactions TABLE --items TABLE --out FOLDER
        [--day 0.01] [--nights 5] [--epochs E] [--ratios 1 0.3 0.1 0.03 0] [--seeds 0 1] [key=value …]

The newest events are cut into days of equal numbers of events, `--day` of the table each; a model is trained on the
events before them (FOLDER/seed-S/base). Each night appends a day and continues the model of the night before on it,
for `--epochs` at the config's learning rate times a ratio (0: the first model answers every day), and all requests of
the day after are measured. The last weights of a night are taken, so that no selection hides a rate that does harm.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

import bigdssm
from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.cli import run_main
from bigdssm.config import Config, load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.evaluation.comparison import model_system
from bigdssm.evaluation.metrics import means, paired_bootstrap

METRIC = "ndcg_at_10"


def main() -> int:
    """Run the bench; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file; key=value arguments override keys")
    parser.add_argument("--interactions", type=Path, required=True, help="Parquet or TSV file with a column timestamp")
    parser.add_argument("--items", type=Path, required=True, help="Parquet or TSV file")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder for datasets, runs, results")
    parser.add_argument("--day", type=float, default=0.01, help="share of the events in a day (default: %(default)s)")
    parser.add_argument("--nights", type=int, default=5, help="nights that train (default: %(default)s)")
    parser.add_argument("--epochs", type=float, help="epochs of a night (default: those of the config)")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1, 0.3, 0.1, 0.03, 0], help="shares of the rate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="seeds (default: 0 1)")
    args, overrides = parser.parse_known_args()
    return run_main(lambda: bench(args, overrides))


def bench(args: argparse.Namespace, overrides: list[str]) -> None:
    """Build the dataset, train every chain of nights, and print the means and the differences from ratio 1."""
    data = args.out / "dataset"
    overrides = [*overrides, f"data.dir={data}", "run.trackers=[]"]
    days = build_days(args, overrides)
    values: dict[float, list[np.ndarray]] = {ratio: [] for ratio in args.ratios}
    for seed in args.seeds:
        of_seed = [*overrides, f"run.seed={seed}"]
        folder = args.out / f"seed-{seed}"
        first = trained(args.config, [*of_seed, f"run.dir={folder / 'base'}", "data.mixture=[{partitions: [base]}]"])
        for ratio in args.ratios:
            measured = chain(args, of_seed, folder / f"ratio-{ratio:g}", first, days, ratio)
            by_day = ", ".join(f"{part.mean():.4f}" for part in measured)
            values[ratio].append(np.concatenate(measured))
            print(f"seed {seed}, ratio {ratio:g}: {values[ratio][-1].mean():.4f} (by day {by_day})", flush=True)
    results = {ratio: np.stack(rows) for ratio, rows in values.items()}
    for ratio, rows in results.items():
        line = f"ratio {ratio:g}: NDCG@10 {rows.mean():.4f} on {rows.shape[1]} requests"
        if args.ratios[0] != ratio:
            line += f", less ratio {args.ratios[0]:g}: {paired_bootstrap(rows, results[args.ratios[0]])}"
        print(line, flush=True)
    content = {f"{ratio:g}": means({METRIC: rows})[METRIC] for ratio, rows in results.items()}
    (args.out / "nights.json").write_text(json.dumps(content, indent=1))


def build_days(args: argparse.Namespace, overrides: list[str]) -> list[str]:
    """Build the dataset of the events before the days; return the names of the days, which are appended to it."""
    events, items = (read_table(path) for path in (args.interactions, args.items))
    events = events.sort_values("timestamp", kind="stable")
    size = int(args.day * len(events))
    first = len(events) - size * (args.nights + 1)
    days = [f"day{number}" for number in range(args.nights + 1)]
    if not (args.out / "dataset").exists():
        options = {"interactions": events[:first], "items": items, "split": "train"}
        bigdssm.make_dataset(args.config, overrides, **options, partition="base")
        for number, day in enumerate(days):
            begin = first + number * size
            options["interactions"] = events[begin : begin + size]
            bigdssm.make_dataset(args.config, overrides, **options, partition=day, append=True)
    return days


def read_table(path: Path) -> pd.DataFrame:
    """Read a Parquet or TSV file; ids are strings."""
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    return pd.read_csv(path, sep="\t", dtype={"user_id": str, "item_id": str})


def chain(
    args: argparse.Namespace, overrides: list[str], folder: Path, model: Path, days: list[str], ratio: float
) -> list[np.ndarray]:
    """Train the nights of one ratio; return the values of the requests of the day after each."""
    config: Config = load_config(args.config, overrides)
    stage = config.pretrain
    epochs = stage.epochs if args.epochs is None else args.epochs
    rates = [
        f"pretrain.optimizer.lr={stage.optimizer.learning_rate * ratio}",
        f"pretrain.table_optimizer.lr={stage.table_optimizer.lr * ratio}",
    ]
    measured = []
    for day, tomorrow in pairwise(days):
        if ratio:
            source = f"data.mixture=[{{partitions: [{day}]}}]"
            night = [source, f"pretrain.init={model}", f"pretrain.epochs={epochs}", "pretrain.warm_start.window=0"]
            model = trained(args.config, [*overrides, *rates, *night, f"run.dir={folder / day}"])
        dataset = Dataset.open(config.data.dir, [tomorrow])
        system = model_system("", load_model_folder(model), dataset, "train", config.data.exclude_seen)
        measured.append(system.values[METRIC])
    return measured


def trained(config: str, overrides: list[str]) -> Path:
    """Train, or return the model of an earlier call."""
    best = load_config(config, overrides).stage_dir("pretrain") / "best"
    return best if best.exists() else bigdssm.pretrain(config, overrides).best


if __name__ == "__main__":
    sys.exit(main())
