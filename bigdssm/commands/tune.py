"""Tune values of a config, or options of a baseline, by their validation metric.

    bigdssm tune --config CONFIG --space SPACE.yaml --out DIR [--trials 10] [--stage pretrain] [key=value …]
    bigdssm tune --config CONFIG --baseline markov --space SPACE.yaml --out DIR [--trials 10]

SPACE.yaml maps each key to {low: …, high: …, log: true} or {choices: […]}. The first trial of a stage uses the values
of the config that are in the space. Every trial of a stage trains in a subprocess, in DIR; it is pruned if its first
validation after a fifth of its steps is below the median of the earlier trials. Trials of a baseline are fitted in this
process and are not pruned. The test split is not used. Repeating the command resumes an interrupted search, or adds
trials with a larger --trials. DIR/best.json contains the best values as key=value.
"""

import argparse
import importlib.util
import json
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bigdssm.cli import at_least, command, option
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import EventRules
from bigdssm.errors import ConfigError
from bigdssm.evaluation.baselines import BASELINES, check_options
from bigdssm.evaluation.metrics import find_metric
from bigdssm.utils.atomic import write_json


@command(
    option("--config", required=True, metavar="FILE", help="YAML file; see configs/"),
    option("--space", type=Path, required=True, metavar="YAML", help="search space"),
    option("--out", type=Path, required=True, metavar="DIR", help="folder for the trials"),
    option("--trials", type=at_least(1), default=10, help="number of trials (default: %(default)s)"),
    option("--stage", choices=("pretrain", "sft"), default="pretrain", help="stage to train (default: %(default)s)"),
    option("--baseline", choices=BASELINES, help="tune this baseline (default: train the stage)"),
    option("--seed", type=int, default=0, help="seed of the search (default: %(default)s)"),
    option("overrides", nargs="*", metavar="key=value", help="config overrides for all trials"),
)
def main(args: argparse.Namespace) -> None:
    """Run the command line."""
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("tuning needs the package optuna: pip install 'bigdssm[tune]'")
    from bigdssm.training.tuning import (
        TrialFunction,
        check_space,
        fit_trial,
        read_space,
        search,
        train_trial,
        values_of,
    )

    space, config = read_space(args.space), load_config(args.config, args.overrides)
    value: TrialFunction
    if args.baseline is None:
        first = values_of(config, space)
        check_space(space, args.config, args.overrides, args.stage)
        value = partial(train_trial, args.config, tuple(args.overrides), args.stage, args.out)
    else:
        for option, end in space.bounds():
            check_options(args.baseline, {option: end}, require_all=False)
        dataset = Dataset.open(config.data.dir).with_rules(EventRules.of(config.data))
        metric = find_metric(config.stage(args.stage).validation_metric)
        first, value = {}, partial(fit_trial, args.baseline, dataset, config.data.exclude_seen, metric)
    trials = search(value, space, args.out, args.trials, first=first, seed=args.seed)
    table = Table("trial", "validation metric", "")
    for key in space.keys:
        table.add_column(key, overflow="fold")
    for trial in trials:
        score = "–" if trial.value is None else f"{trial.value:.4f}"
        values = [trial.params[key] for key in space.keys]
        cells = [f"{value:.4g}" if isinstance(value, float) else json.dumps(value) for value in values]
        table.add_row(str(trial.number), score, trial.state.name.lower(), *cells)
    Console().print(table)
    write_json(args.out / "best.json", [f"{key}={json.dumps(choice)}" for key, choice in trials[0].params.items()])


if __name__ == "__main__":
    raise SystemExit(main())
