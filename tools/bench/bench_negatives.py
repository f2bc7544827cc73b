"""Train a config with each kind of negatives, all else the same, and print what it reaches.

    python tools/bench/bench_negatives.py --config configs/movielens_latest.yaml --out negatives.json [key=value …]

Negatives are the other documents of the batch (`in-batch`), with the sampling correction (`corrected`), with documents
drawn uniformly beside them (`corrected + uniform`), or the whole catalogue. The dataset is the config's, made before;
runs stand in RUN/NEGATIVES (RUN: the config's run.dir) and go on where they were broken off. Each is chosen on
validation and measured on test once, with a standard error over its rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from bigdssm.cli import run_main
from bigdssm.config import load_config

ROOT = Path(__file__).parents[2]
NEGATIVES = {
    "in-batch": ["columns=batch", "sampling=none"],
    "corrected": ["columns=batch", "sampling=corrected", "gamma=1.0"],
    "corrected + uniform": ["columns=batch", "sampling=corrected", "gamma=1.0", "uniform_negatives=2048"],
    "catalogue": ["columns=catalogue", "sampling=none"],
}


def main() -> int:
    """Run the bench; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--negatives", nargs="+", choices=NEGATIVES, default=list(NEGATIVES))
    parser.add_argument("--out", type=Path, metavar="JSON", required=True)
    args, overrides = parser.parse_known_args()
    return run_main(lambda: bench(args, overrides))


def bench(args: argparse.Namespace, overrides: list[str]) -> None:
    """Train, measure and write every kind."""
    folder = Path(load_config(args.config, overrides).run.dir)
    table = []
    for name in args.negatives:
        run = folder / name.replace(" ", "-")
        of_loss = [f"pretrain.loss.{option}" for option in NEGATIVES[name]]
        command = [sys.executable, ROOT / "launch" / "pretrain.py", "--config", args.config, "--resume", "auto"]
        call([*map(str, command), *overrides, *of_loss, f"run.dir={run}"])
        report = run / "report.json"
        call([sys.executable, str(ROOT / "tools" / "report.py"), str(run), "--out", str(report)])
        test = json.loads(report.read_text())[-1]
        records = [json.loads(line) for line in (run / "pretrain" / "metrics.jsonl").read_text().splitlines()]
        best = max((r for r in records if "validation" in r), key=lambda record: record["validation"]["ndcg_at_10"])
        table.append({"negatives": name, "step": best["step"], "validation": best["validation"], "test": test})
        args.out.write_text(json.dumps(table, indent=1))
        for split, found in (("validation", best["validation"]), ("test", test)):
            print(f"{name:20} {split:10} HR@10 {found['hr_at_10']:.4f}  NDCG@10 {found['ndcg_at_10']:.4f}", flush=True)


def call(command: list[str]) -> None:
    """Run a command, its output beside the others'."""
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
