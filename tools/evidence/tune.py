"""Search the options of a baseline, or the config values of pretraining, by the validation metric.

    python -m tools.evidence.tune --config CONFIG --baseline ease --space SPACE.yaml --out DIR [--trials 20]
    python -m tools.evidence.tune --config CONFIG --space SPACE.yaml --out DIR [--trials 10] [key=value …]

SPACE.yaml maps each option or config key to {low: …, high: …, log: true} or {choices: […]}; Optuna proposes the values.
A baseline is fitted in this process; without one each trial pretrains in DIR/trial-NUMBER. The test split is not read.
The finished trials are in DIR/study.db: the same command continues an interrupted search, and a larger --trials extends
it. DIR/best.json contains the best values as key=value.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import optuna
from omegaconf import OmegaConf
from optuna.trial import TrialState

import tools.evidence.baselines  # noqa: F401, which registers them
from bigdssm.cli import at_least, command, option
from bigdssm.config import load_config
from bigdssm.config.loading import read_yaml
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import EventRules
from bigdssm.errors import ConfigError
from bigdssm.evaluation.baselines import BASELINES, fit_baseline
from bigdssm.evaluation.evaluate import evaluate_scores
from bigdssm.evaluation.metrics import find_metric
from bigdssm.training.stages import pretrain
from bigdssm.utils.atomic import write_json

Values = dict[str, Any]  # by option or config key


@command(
    option("--config", required=True, metavar="FILE", help="YAML file; see configs/"),
    option("--baseline", choices=BASELINES, help="baseline to fit (default: pretrain)"),
    option("--space", type=Path, required=True, metavar="YAML", help="search space"),
    option("--out", type=Path, required=True, metavar="DIR", help="folder for the trials"),
    option("--trials", type=at_least(1), default=10, help="number of trials (default: %(default)s)"),
    option("--seed", type=int, default=0, help="seed of the search (default: %(default)s)"),
    option("overrides", nargs="*", metavar="key=value", help="config overrides for all trials"),
)
def main(args: argparse.Namespace) -> None:
    """Run the command line."""
    space = read_space(args.space)
    config = load_config(args.config, args.overrides)
    metric = find_metric(config.pretrain.validation_metric)

    def train(values: Values, number: int) -> float:
        overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        run = f"run.dir={args.out / f'trial-{number}'}"
        metrics = pretrain(args.config, [*args.overrides, *overrides, run]).metrics
        if not metrics:
            raise ConfigError(f"{args.config}: its dataset has no validation split, which a search needs")
        return float(metrics[metric])

    score: Callable[[Values, int], float] = train
    if args.baseline is not None:
        dataset = Dataset.open(config.data.dir).with_rules(EventRules.of(config.data))

        def fit(values: Values, number: int) -> float:
            scores = fit_baseline(args.baseline, dataset, values)
            result = evaluate_scores(scores, dataset, "validation", exclude_seen=config.data.exclude_seen)
            return float(result.metrics[metric])

        score = fit

    best = search(score, space, args.out, args.trials, args.seed)
    print(f"{metric} {best.value:.4f}: {best.params}")
    write_json(args.out / "best.json", [f"{key}={json.dumps(value)}" for key, value in best.params.items()])


def search(
    score: Callable[[Values, int], float], space: dict[str, Values], out: Path, trials: int, seed: int
) -> optuna.trial.FrozenTrial:
    """Start or continue the search in `out` until `trials` are finished; return the best trial.

    score: returns the validation metric of values, given the number of the trial, too.
    """
    out.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{out.absolute() / 'study.db'}",
        study_name="search",
        sampler=optuna.samplers.TPESampler(seed=seed),
        direction="maximize",
        load_if_exists=True,
    )
    finished = len(study.get_trials(states=(TrialState.COMPLETE,)))
    study.optimize(lambda trial: score(propose(trial, space), trial.number), n_trials=max(0, trials - finished))
    return study.best_trial


def read_space(path: Path) -> dict[str, Values]:
    """Read the search space of a YAML file. Raises ConfigError: the file is invalid."""
    needs = "keys with their values, such as `window: {low: 1, high: 16}` or `k: {choices: [1, 2]}`"
    space = cast(dict[str, Any], OmegaConf.to_container(read_yaml(path, needs)))
    for key, entry in space.items():
        if not isinstance(entry, dict) or not ({"choices"} == set(entry) or {"low", "high"} <= set(entry)):
            raise ConfigError(f"{path}: {key}: got {entry!r}, needs {needs}")
    return space


def propose(trial: optuna.Trial, space: dict[str, Values]) -> Values:
    """Return the values of a trial; a range between two integers contains integers alone."""
    values: Values = {}
    for key, entry in space.items():
        if "choices" in entry:
            values[key] = trial.suggest_categorical(key, **entry)
        elif isinstance(entry["low"], int) and isinstance(entry["high"], int):
            values[key] = trial.suggest_int(key, **entry)
        else:
            values[key] = trial.suggest_float(key, **entry)
    return values


if __name__ == "__main__":
    sys.argv[0] = "python -m tools.evidence.tune"  # the name in its --help
    sys.exit(main())
