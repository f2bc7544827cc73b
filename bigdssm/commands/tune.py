"""Search for a config's values, or a baseline's options, by what they reach on validation.

    bigdssm tune --config CONFIG --space SPACE.yaml --out DIR [--trials 10] [--stage pretrain] [key=value …]
    bigdssm tune --config CONFIG --baseline markov --space SPACE.yaml --out DIR [--trials 10]

SPACE.yaml has the values of each key (bigdssm/training/tuning.py). The first trial has those of the config. A trial
trains in a process of its own, in DIR; it is stopped where its first validation after a fifth of its steps is below the
median of those before. Test is never looked at. The same command goes on with a search that was broken off, and with
more --trials adds some. DIR/best.json has the best values as key=value; a baseline's options go by their names.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bigdssm.cli import at_least, command
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError
from bigdssm.evaluation.baselines import BASELINES, check_options
from bigdssm.evaluation.metrics import find_metric
from bigdssm.utils.atomic import write_json


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file; see configs/")
    parser.add_argument("--space", type=Path, required=True, metavar="YAML", help="values to choose from")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the trials")
    parser.add_argument("--trials", type=at_least(1), default=10, help="(%(default)s)")
    parser.add_argument("--stage", choices=("pretrain", "sft"), default="pretrain", help="(%(default)s)")
    parser.add_argument("--baseline", choices=tuple(BASELINES), help="tune its options in place of a training")
    parser.add_argument("--seed", type=int, default=0, help="of the search (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of every trial")
    args = parser.parse_intermixed_args(argv)
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("tuning needs the package optuna: pip install 'bigdssm[tune]'")
    from bigdssm.training.tuning import TuningBaseline, TuningStage, Value, check_space, read_space, search, values_of

    space, config = read_space(args.space), load_config(args.config, args.overrides)
    value: Value
    if args.baseline is None:
        first = values_of(config, space)
        check_space(space, args.config, args.overrides, args.stage)
        value = TuningStage(args.config, tuple(args.overrides), args.stage, args.out)
    else:
        for option, end in space.ends():
            check_options(args.baseline, {option: end}, all_of_them=False)
        dataset, metric = Dataset.open(config.data.dir), find_metric(config.stage(args.stage).validation_metric)
        first, value = {}, TuningBaseline(args.baseline, dataset, config.data.exclude_seen, metric)
    found = search(value, space, args.out, args.trials, first=first, seed=args.seed)
    drawn = Table("trial", "validation NDCG@10", "")
    for key in space.keys:
        drawn.add_column(key, overflow="fold")
    for trial in found:
        reached = "–" if trial.value is None else f"{trial.value:.4f}"
        values = [trial.params[key] for key in space.keys]
        cells = [f"{value:.4g}" if isinstance(value, float) else json.dumps(value) for value in values]
        drawn.add_row(str(trial.number), reached, trial.state.name.lower(), *cells)
    Console().print(drawn)
    write_json(args.out / "best.json", [f"{key}={json.dumps(choice)}" for key, choice in found[0].params.items()])


if __name__ == "__main__":
    sys.exit(main())
