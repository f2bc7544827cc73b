"""Ablation: train a config with every choice of one setting, and print the metrics.

    python tools/bench/bench_choices.py negatives --config configs/movielens_latest.yaml --out negatives.json
    python tools/bench/bench_choices.py depth --config configs/movielens_latest.yaml --out depth.json key=value …

negatives: the other documents of the batch (`in-batch`), with the logQ correction (`corrected`), with additional
uniformly sampled documents (`corrected + uniform`), or the whole catalogue. blocks, depth: type and number of history
layers. items: random initialization of item embeddings, or a warm start from item co-occurrence. recipes: products with
a warm start, as in configs/movielens_1m.yaml, or cosines as in configs/amazon_beauty_attributes.yaml.

The dataset of the config must exist; runs are in RUN/CHOICE (RUN: run.dir of the config) and are resumed. Models are
selected on validation and evaluated once on test, with a standard error over the queries.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

from bigdssm.cli import run_main
from bigdssm.config import load_config

ROOT = Path(__file__).parents[2]
CHOICES = {
    "negatives": {
        "in-batch": ["pretrain.negatives.columns=batch", "pretrain.sampling.name=none"],
        "corrected": ["pretrain.negatives.columns=batch", "pretrain.sampling.name=corrected"],
        "corrected + uniform": [
            "pretrain.negatives.columns=batch", "pretrain.sampling.name=corrected", "pretrain.negatives.uniform=2048",
        ],
        "catalogue": ["pretrain.negatives.columns=catalogue", "pretrain.sampling.name=none"],
    },
    "blocks": {block: [f"model.query.history.block={block}"] for block in ("sasrec", "gated", "lowpass")},
    "depth": {str(layers): [f"model.query.history.layers={layers}"] for layers in (1, 2, 4, 8)},
    "items": {start: [f"pretrain.warm_start.window={window}"] for start, window in {"random": 0, "warm": 8}.items()},
    "recipes": {
        "dot": [
            "model.score=dot", "model.alpha_init=1.0", "model.alpha_learned=false", "pretrain.warm_start.window=8",
            "model.query.history.dropout=0.3", "model.query.history.item_dropout=0.3",
            "model.query.history.item_scale=false",
        ],
        "cosine": [
            "model.score=cosine", "model.alpha_init=15.0", "model.alpha_learned=false", "model.beta=none",
            "pretrain.warm_start.window=0", "model.query.history.dropout=0.5", "model.query.history.item_dropout=0.5",
            "model.query.history.item_scale=true",
        ],
    },
}  # fmt: skip


def main() -> int:
    """Run the bench; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=CHOICES, help="setting to vary")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file; key=value arguments override keys")
    parser.add_argument("--only", nargs="+", metavar="CHOICE", help="choices to train (default: all)")
    parser.add_argument("--out", type=Path, metavar="JSON", required=True, help="file for the results")
    args, overrides = parser.parse_known_args()
    return run_main(lambda: bench(args, overrides))


def bench(args: argparse.Namespace, overrides: list[str]) -> None:
    """Train, evaluate and record every choice."""
    folder = Path(load_config(args.config, overrides).run.dir)
    table = []
    for name, chosen in CHOICES[args.what].items():
        if args.only and name not in args.only:
            continue
        run = folder / name.replace(" ", "-")
        command = [sys.executable, ROOT / "launch" / "pretrain.py", "--config", args.config, "--resume", "auto"]
        call([*map(str, command), *overrides, *chosen, f"run.dir={run}"])
        report = run / "report.json"
        call([sys.executable, str(ROOT / "tools" / "report.py"), str(run), "--out", str(report)])
        test = json.loads(report.read_text())[-1]
        records = [json.loads(line) for line in (run / "pretrain" / "metrics.jsonl").read_text().splitlines()]
        best = max((r for r in records if "validation" in r), key=lambda record: record["validation"]["ndcg_at_10"])
        rows_per_s = median(record["rows_per_s"] for record in records if "loss" in record)
        table.append(
            {
                args.what: name,
                "step": best["step"],
                "rows_per_s": rows_per_s,
                "validation": best["validation"],
                "test": test,
            }
        )
        args.out.write_text(json.dumps(table, indent=1))
        for split, metrics in (("validation", best["validation"]), ("test", test)):
            values = f"HR@10 {metrics['hr_at_10']:.4f}  NDCG@10 {metrics['ndcg_at_10']:.4f}"
            print(f"{name:20} {split:10} {values}", flush=True)


def call(command: list[str]) -> None:
    """Run a command without its standard output. Raises CalledProcessError."""
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
