"""Train all stages of a config with several seeds, and report means and intervals.

    bigdssm seeds --config configs/movielens_100k.yaml --seeds 0 1 2 [--ranks N] [key=value …] [-- REPORT …]

Seeds are trained one after another, seed S in RUN/seed-S (RUN: run.dir of the config); interrupted runs are resumed.
RUN/report.json contains means and intervals over the seeds; arguments after `--` are passed to `bigdssm report`, such
as --beir DIR. Training runs on this machine; to train on several machines, run each stage under a launcher, and then
`bigdssm report RUN/seed-*`.
"""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bigdssm.cli import command_parser, option, run_main
from bigdssm.cluster.launcher import environment
from bigdssm.config import load_config
from bigdssm.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code of the first command that failed, or 0."""
    return run_main(lambda: _train_seeds(argv))


def _train_seeds(argv: Sequence[str] | None) -> int:
    own, report = list(sys.argv[1:] if argv is None else argv), list[str]()
    if "--" in own:
        own, report = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = command_parser(
        __doc__,
        option("--config", required=True, metavar="FILE", help="YAML file; see configs/"),
        option("--seeds", nargs="+", required=True, metavar="S", help="seeds to train, each once"),
        option("--ranks", type=int, help="number of ranks (default: as in `bigdssm pretrain`)"),
    )
    args, others = parser.parse_known_args(own)
    if odd := [word for word in others if "=" not in word or word.startswith("-")]:
        parser.error(f"unknown option {odd[0]}")
    words = [word for word in args.seeds if "=" not in word]
    overrides = [word for word in own if "=" in word and word in (*others, *args.seeds)]  # also those after --seeds
    if not words or not all(word.isdecimal() for word in words):
        raise ConfigError(f"--seeds {' '.join(args.seeds)}: needs at least one non-negative integer")
    seeds = [int(word) for word in words]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {' '.join(words)}: contains a seed twice")
    if args.ranks is not None and args.ranks < 1:
        raise ConfigError(f"--ranks {args.ranks}: needs at least 1")
    config, *_ = (load_config(args.config, [*overrides, f"run.seed={seed}"]) for seed in seeds)
    runs = [Path(config.run.dir) / f"seed-{seed}" for seed in seeds]
    for seed, run in zip(seeds, runs, strict=True):
        for stage in ("pretrain", "sft") if config.sft is not None else ("pretrain",):
            line = [sys.executable, "-m", "bigdssm.commands", stage, "--config", args.config, *overrides]
            line += [f"run.dir={run}", f"run.seed={seed}", "--resume", "auto"]
            if code := _run(*line, *([] if args.ranks is None else ["--ranks", str(args.ranks)])):
                return code
    out = Path(config.run.dir) / "report.json"
    return _run(sys.executable, "-m", "bigdssm.commands", "report", *map(str, runs), "--out", str(out), *report)


def _run(*command: str) -> int:
    """Print a command, run it, and return its exit code."""
    print(f"$ {shlex.join(command)}", flush=True)
    return subprocess.run(command, env=environment()).returncode


if __name__ == "__main__":
    raise SystemExit(main())
