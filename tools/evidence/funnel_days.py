"""Compare a model that is trained from scratch each night with the shop's own chain, on days of the generated shop.

    python -m tools.evidence.funnel_days CONFIG [key=value …] --out FOLDER --seeds 2 3 4 [--split test]

For each seed a shop is generated (`tools.evidence.funnel_shop`). For each of the last three days (--split validation:
the three before) a model is trained on all events before that day, and ranks the requests of that day. The chain counts
all events before each day, too; its options are chosen on the three days before the last three.

Writes `NAME-SPLIT.json` (per seed and group of requests: number, metrics of both, and the paired difference with its
95 % interval; per seed CPU-seconds of a night), and prints a table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pandas as pd

import bigdssm
from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import EventRules
from bigdssm.evaluation.comparison import System, chain_systems, model_system
from bigdssm.evaluation.counted_events import request_days
from bigdssm.evaluation.metrics import Difference, paired_bootstrap
from bigdssm.evaluation.slices import read_slices
from tools.evidence import funnel_shop
from tools.evidence.funnel_shop import DAY, START

DAYS = 90
NUM_DAYS = 3  # of a split
BEFORE_ALL = -1  # day: of the first versions of products
GROUPS = {
    "all events": None,
    "purchases": "action = purchase",
    "purchases of known products": "action = purchase and item_age >= 3",
    "purchases of new products": "action = purchase and item_age < 3",
}
METRICS = ("hr_at_10", "ndcg_at_10")
ROWS_AT_ONCE = 65_536


@dataclass(frozen=True)
class Shop:
    """A generated shop and the config of its model."""

    folder: Path
    config: Path
    overrides: tuple[str, ...]

    def of_dataset(self, name: str) -> list[str]:
        """Return the overrides of a run on a dataset."""
        return [*self.overrides, f"data.dir={self.folder / name}", "run.trackers=[]"]

    def make_dataset(self, name: str, since: int, until: int, **options: Any) -> None:
        """Make or extend a dataset by the events and versions of the days from `since` on, before `until`."""

        def of_days(file: str, column: str) -> pd.DataFrame:
            rows = pd.read_parquet(self.folder / file)
            return rows[rows[column].between(START + since * DAY, START + until * DAY, inclusive="left")]

        bigdssm.make_dataset(
            self.config,
            self.of_dataset(name),
            interactions=of_days("events.parquet", "timestamp"),
            items=of_days("items.parquet", "available_from"),
            items_time_column="available_from",
            **options,
        )


def nightly_models(shop: Shop, name: str, days: Sequence[int]) -> tuple[dict[int, Path], float]:
    """Train a model before each day, on the dataset as of then; return the folders by day, and CPU-seconds a night."""
    models = {}
    spent_s = []
    shop.make_dataset(name, BEFORE_ALL, days[0], split="train")
    for day in days:
        overrides = [*shop.of_dataset(name), f"run.dir={shop.folder / f'{name}-{day}'}", "pretrain.save_every_steps=0"]
        started = process_time()
        models[day] = bigdssm.pretrain(shop.config, overrides).best
        spent_s.append(process_time() - started)
        shop.make_dataset(name, day, day + 1, split="train", partition=f"day-{day}", append=True)
    return models, float(np.mean(spent_s))


def compare(shop: Shop, name: str, split: str) -> tuple[System, System, dict[str, np.ndarray], float]:
    """Return the model and the daily chain on the days of a split, the rows of each group, and CPU-seconds a night."""
    first = DAYS - NUM_DAYS
    days = range(first, DAYS) if split == "test" else range(first - NUM_DAYS, first)
    models, night_s = nightly_models(shop, name, days)

    by_time = f"{name}-by-time"
    shop.make_dataset(
        by_time,
        BEFORE_ALL,
        days[-1] + 1,
        split="time",
        validation_from=str(START + (first - NUM_DAYS) * DAY),
        test_from=str(START + first * DAY),
        like=shop.folder / name,
    )
    data = load_config(shop.config, shop.of_dataset(by_time)).data
    dataset = Dataset.open(data.dir).with_rules(EventRules.of(data))
    parts = [request_days(dataset, rows)[rows.relevance > 0] for rows in dataset.iterate(split, ROWS_AT_ONCE)]
    day_of_row = np.concatenate(parts) - START // DAY

    values = {metric: np.full(len(day_of_row), np.nan) for metric in METRICS}
    for day, folder in models.items():
        of_day = model_system("model", load_model_folder(folder), dataset, split, data.exclude_seen)
        for metric, column in values.items():
            column[day_of_row == day] = of_day.values[metric][day_of_row == day]
    model = System("model", values, night_s, query_ids=of_day.query_ids)
    chain = chain_systems(dataset, split, data.exclude_seen, dataset)[-1]
    groups = {
        group: read_slices(dataset, split, [condition])[0].rows if condition else np.ones(len(day_of_row), bool)
        for group, condition in GROUPS.items()
    }
    return model, chain, groups, night_s


def figures(model: System, chain: System, groups: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return number, means and paired differences by group."""
    result: dict[str, Any] = {}
    for name, rows in groups.items():
        of_model, of_chain = model.of_slice(rows), chain.of_slice(rows)
        result[name] = {"requests": int(rows.sum())}
        for metric in METRICS:
            difference = paired_bootstrap(of_model.values[metric], of_chain.values[metric], of_model.query_ids)
            result[name][metric] = {
                "model": float(of_model.values[metric].mean()),
                "chain": float(of_chain.values[metric].mean()),
                "difference": difference.mean,
                "interval": [difference.low, difference.high],
            }
    return result


def pooled(systems: Sequence[System]) -> System:
    """Return the systems of all seeds as one, with distinct users per seed."""
    users = []
    for nth, system in enumerate(systems):
        assert system.query_ids is not None
        users.append(system.query_ids + (nth << 40))
    values = {metric: np.concatenate([system.values[metric] for system in systems]) for metric in METRICS}
    return System(systems[0].name, values, 0.0, query_ids=np.concatenate(users))


def print_table(of_groups: dict[str, Any]) -> None:
    """Print one line per group: requests, then per metric the model, the chain, and their difference."""
    for name, of_group in of_groups.items():
        parts = [f"  {name:27} {of_group['requests']:6}"]
        for metric in METRICS:
            of_metric = of_group[metric]
            difference = Difference(of_metric["difference"], *of_metric["interval"])
            means = f"{of_metric['model']:.4f} {of_metric['chain']:.4f}"
            parts.append(f"{metric} {means} {difference}")
        print("  ".join(parts), flush=True)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--name", default="nights", help="of the datasets and models in the folder of each shop")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    models, chains, groups_of_seed = [], [], []
    for seed in args.seeds:
        folder = args.out / f"seed-{seed}"
        if not (folder / "events.parquet").exists():
            funnel_shop.write_shop(folder, seed=seed, users=3000, days=DAYS)
        shop = Shop(folder, args.config, tuple(args.overrides))
        model, chain, groups, night_s = compare(shop, args.name, args.split)
        models.append(model)
        chains.append(chain)
        groups_of_seed.append(groups)
        print(f"seed {seed}: a night {night_s:.0f} CPU-s; chain: {chain.options}")
        results[str(seed)] = {"night_s": night_s, "chain": chain.options, "groups": figures(model, chain, groups)}
        print_table(results[str(seed)]["groups"])
    of_all = {name: np.concatenate([groups[name] for groups in groups_of_seed]) for name in GROUPS}
    results["all"] = {"groups": figures(pooled(models), pooled(chains), of_all)}
    path = args.out / f"{args.name}-{args.split}.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("all seeds")
    print_table(results["all"]["groups"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
