"""Train a config with several seeds, both stages of each, and report their means.

    bigdssm seeds --config configs/movielens_100k.yaml --seeds 0 1 2 [--ranks 2] [key=value …] [-- REPORT …]

Seed S is trained in RUN/seed-S (RUN: the config's run.dir), one after another; what was finished or broken off before
goes on where it was. RUN/report.json holds means and intervals over the seeds; what stands behind `--` goes to
`bigdssm report`, such as --beir DIR. The command that trains is `deepspeed`; on machines of your own, run the stages by
themselves and `bigdssm report RUN/seed-*` over them.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bigdssm.cli import command
from bigdssm.cluster.launcher import environment
from bigdssm.config import load_config
from bigdssm.distributed import free_port
from bigdssm.errors import ConfigError


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code of the first command that failed, or 0."""
    own, report = list(sys.argv[1:] if argv is None else argv), list[str]()
    if "--" in own:
        own, report = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file; see configs/")
    parser.add_argument("--seeds", nargs="+", required=True, metavar="S")
    parser.add_argument("--ranks", type=int, default=2, help="on this machine (default: 2)")
    args, others = parser.parse_known_args(own)
    if odd := [word for word in others if "=" not in word or word.startswith("-")]:
        parser.error(f"unknown option {odd[0]}")
    words = [word for word in args.seeds if "=" not in word]
    overrides = [word for word in own if "=" in word and word in (*others, *args.seeds)]  # behind --seeds, too
    if not words or not all(word.isdecimal() for word in words):
        raise ConfigError(f"--seeds {' '.join(args.seeds)}: needs whole numbers, at least one")
    seeds = [int(word) for word in words]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {' '.join(words)}: needs each seed once")
    if args.ranks < 1:
        raise ConfigError(f"--ranks {args.ranks}: needs at least 1")
    config, *_ = (load_config(args.config, [*overrides, f"run.seed={seed}"]) for seed in seeds)
    runs = [Path(config.run.dir) / f"seed-{seed}" for seed in seeds]
    for seed, run in zip(seeds, runs, strict=True):
        for stage in ("pretrain", "sft") if config.sft is not None else ("pretrain",):
            launcher = [str(Path(sys.executable).with_name("deepspeed")), "--log_level", "warning"]
            launcher += ["--num_gpus", str(args.ranks)]
            of_run = [*overrides, f"run.dir={run}", f"run.seed={seed}", "--resume", "auto"]
            module = ["--module", f"bigdssm.commands.{stage}", "--config", args.config]
            if code := _run(*launcher, "--master_port", free_port(), *module, *of_run):
                return code
    out = Path(config.run.dir) / "report.json"
    return _run(sys.executable, "-m", "bigdssm.commands", "report", *map(str, runs), "--out", str(out), *report)


def _run(*command: str) -> int:
    """Print a command, run it, and return its exit code."""
    print(f"$ {shlex.join(command)}", flush=True)
    return subprocess.run(command, env=environment()).returncode


if __name__ == "__main__":
    sys.exit(main())
