"""Hyperparameter search with Optuna over the keys of a YAML search space."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, cast

import optuna
from omegaconf import OmegaConf
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    check_distribution_compatibility,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from bigdssm.cluster.launcher import run_command
from bigdssm.cluster.metrics import read_stage, selection_score
from bigdssm.cluster.run_folder import read_events, request_stop
from bigdssm.config import Config, StageName, read_config
from bigdssm.config.loading import read_yaml
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import CheckpointError, ConfigError
from bigdssm.evaluation.baselines import fit_baseline
from bigdssm.evaluation.evaluate import evaluate_scores
from bigdssm.utils.atomic import WriterLock
from bigdssm.utils.hashing import hex64
from bigdssm.utils.log import get_logger

DISTRIBUTION_KEYS = ("low", "high", "log", "choices")
PRUNE_DIVISOR = 5  # trials are pruned after 1 / PRUNE_DIVISOR of the steps
STOP_TIMEOUT_S = 600.0
logger = get_logger(__name__)


@dataclass(frozen=True)
class Space:
    """The search space: a distribution per config key."""

    keys: dict[str, BaseDistribution]

    def allowed_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the entries of `values` that are in the space."""
        allowed = {}
        for key, value in values.items():
            distribution = self.keys.get(key)
            is_allowed = False
            if isinstance(distribution, CategoricalDistribution):
                is_allowed = value in distribution.choices
            elif isinstance(distribution, IntDistribution | FloatDistribution) and _is_number(value):
                is_allowed = distribution.low <= value <= distribution.high
            if is_allowed:
                allowed[key] = value
        return allowed

    def contains(self, values: Mapping[str, Any]) -> bool:
        """Return True if `values` has a value of the space for every key, and nothing else."""
        return values.keys() == self.keys.keys() and self.allowed_values(values) == values

    def bounds(self) -> Iterator[tuple[str, Any]]:
        """Yield (key, value) for the lowest and highest value of each range, and for every choice."""
        for key, distribution in self.keys.items():
            if isinstance(distribution, CategoricalDistribution):
                yield from ((key, choice) for choice in distribution.choices)
            else:
                assert isinstance(distribution, IntDistribution | FloatDistribution)
                yield from ((key, distribution.low), (key, distribution.high))


def read_space(path: Path) -> Space:
    """Read the space of a YAML file. Raises ConfigError: the file is invalid."""
    needs = "keys with their values, such as `pretrain.optimizer.lr: {low: 1.0e-3, high: 1}`"
    content = cast(dict[Any, Any], OmegaConf.to_container(read_yaml(path, needs)))
    if not content:
        raise ConfigError(f"{path} is empty, needs {needs}")
    return Space({str(key): _distribution(f"{path}: {key}", entry) for key, entry in content.items()})


def _distribution(where: str, entry: Any) -> BaseDistribution:
    if not isinstance(entry, dict) or set(entry) - set(DISTRIBUTION_KEYS):
        raise ConfigError(f"{where}: got {entry!r}, needs {{low: …, high: …, log: true or false}} or {{choices: […]}}")
    if "choices" in entry:
        choices = entry["choices"]
        if len(entry) > 1 or not isinstance(choices, list) or not choices:
            raise ConfigError(f"{where}: got {entry!r}, needs only a list of choices")
        return CategoricalDistribution(choices)
    low, high, log = entry.get("low"), entry.get("high"), entry.get("log", False)
    if not (_is_number(low) and _is_number(high) and low <= high and isinstance(log, bool) and (low > 0 or not log)):
        raise ConfigError(f"{where}: got {entry!r}, needs numbers low <= high, above 0 with log: true")
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log)
    return FloatDistribution(float(low), float(high), log=log)


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


TrialFunction = Callable[[optuna.Trial, dict[str, Any]], float]
"""Runs a trial with values by key and returns its validation metric. Raises TrialPruned."""


def train_trial(
    config: str, overrides: tuple[str, ...], stage: StageName, out: Path, trial: optuna.Trial, values: dict[str, Any]
) -> float:
    """Train a stage with `values`, in a separate process, and return the best validation metric."""
    run = out / hex64(json.dumps([config, overrides, values]))
    trial.set_user_attr("run", run.name)
    chosen = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    folder, is_reported, is_pruned = run / stage, False, False

    def prune() -> None:
        """Stop the training if an early validation is worse than the median of other trials."""
        nonlocal is_reported, is_pruned
        if is_reported:
            return
        starts = [event for event in read_events(folder) if event["event"] == "start"] if folder.exists() else []
        total = int(starts[-1].get("total_steps", 0)) if starts else 0
        # the first validation after 1 / PRUNE_DIVISOR of the steps, before the last step
        validations = _validations(folder)
        early = [value for step, value in validations if total <= PRUNE_DIVISOR * step < PRUNE_DIVISOR * total]
        if not early:
            return
        is_reported = True
        trial.report(early[0], step=1)
        is_pruned = trial.should_prune()
        if is_pruned:
            request_stop(folder, saving=False, timeout_s=STOP_TIMEOUT_S)

    ended = run_command(
        run / "log", stage, "--config", config, *overrides, *chosen, f"run.dir={run}", "--resume", "auto", poll=prune
    )
    if is_pruned:
        raise optuna.TrialPruned
    ended.check()
    if not (validations := _validations(folder)):
        raise ConfigError(f"{config}: its dataset has no validation split, which a search needs")
    return max(value for _, value in validations)


def fit_trial(
    baseline: str, dataset: Dataset, exclude_seen: bool | str, metric: str, trial: optuna.Trial, values: dict[str, Any]
) -> float:
    """Fit a baseline with `values` as options and return the validation metric."""
    scores = fit_baseline(baseline, dataset, values)
    return evaluate_scores(scores, dataset, "validation", exclude_seen=exclude_seen).metrics[metric]


def search(
    value: TrialFunction, space: Space, out: Path, trials: int, *, first: Mapping[str, Any], seed: int = 0
) -> list[FrozenTrial]:
    """Start or continue the search in `out` until `trials` are finished; return all trials, the best first.

    The first trial has the values `first` that are in the space. Trials of an earlier search with values outside the
    space do not count. Raises the error of a failed trial; ConfigError: the kind of values of a key has changed;
    DataError: another search is running in `out`; CheckpointError: its journal is damaged.
    """
    out.mkdir(parents=True, exist_ok=True)
    with WriterLock(out / "search.lock", out):
        _truncate_torn_record(out / "study.log")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(out / "study.log"))),
            study_name="search", direction="maximize", load_if_exists=True,
            sampler=optuna.samplers.TPESampler(seed=seed),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=max(1, trials // 5)),
        )  # fmt: skip
        # Optuna supports no change of the choices, the type or the scale of a key
        for trial in study.trials:
            for key in trial.distributions.keys() & space.keys.keys():
                try:
                    check_distribution_compatibility(trial.distributions[key], space.keys[key])
                except ValueError:
                    raise ConfigError(
                        f"the space's {key}: got {space.keys[key]}, was {trial.distributions[key]} in {out}: the "
                        "choices, the type and the scale of a key cannot change during a search; choose another --out"
                    ) from None
        if not study.trials and (allowed_values := space.allowed_values(first)):
            study.enqueue_trial(allowed_values)
        for interrupted in study.get_trials(states=(TrialState.RUNNING,)):
            study.tell(interrupted.number, state=TrialState.FAIL)
            study.enqueue_trial(space.allowed_values(interrupted.params))

        def finished() -> list[FrozenTrial]:
            done = study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
            return [trial for trial in done if space.contains(trial.params)]

        while len(finished()) < trials:
            new_trial = study.ask(space.keys)  # an interrupted trial is enqueued again by the next run
            if not space.contains(new_trial.params):  # enqueued before the space was changed
                study.tell(new_trial, state=TrialState.FAIL)
                continue
            try:
                study.tell(new_trial, value(new_trial, new_trial.params))
            except optuna.TrialPruned:
                study.tell(new_trial, state=TrialState.PRUNED)
        return sorted(finished(), key=lambda trial: (trial.state != TrialState.COMPLETE, -(trial.value or 0.0)))


def _truncate_torn_record(journal: Path) -> None:
    """Truncate an incomplete last record, left by a kill or a full disk; its trial is repeated.

    Raises CheckpointError: another record is damaged.
    """
    content = journal.read_bytes() if journal.exists() else b""
    complete, newline, torn = content.rpartition(b"\n")
    for number, line in enumerate(complete.split(b"\n") if newline else [], start=1):
        try:
            json.loads(line)["op_code"]
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(
                f"{journal} is damaged in line {number}, which is not a record; remove it to start the search again: "
                "finished training runs are not repeated"
            ) from None
    if torn:
        logger.warning("%s: removed the last record, which was incomplete", journal)
        os.truncate(journal, len(complete) + len(newline))


def check_space(space: Space, path: str, overrides: Sequence[str], stage: StageName) -> None:
    """Raise ConfigError if a key does not affect the training of `stage`, or a value is out of bounds."""
    sections = ("data", "model", "engine", stage)
    for key, value in space.bounds():
        if key.partition(".")[0] not in sections:
            raise ConfigError(
                f"the space's {key}: needs a key of {', '.join(sections)}: {stage} is trained for each value"
            )
        try:
            read_config(path, [*overrides, f"{key}={json.dumps(value)}"])
        except ConfigError as error:
            raise ConfigError(f"the space's {str(error).removeprefix(f'{path}: ')}") from None


def values_of(config: Config, space: Space) -> dict[str, Any]:
    """Return the values of a config for the keys of a space. Raises ConfigError: no such key."""
    values = {}
    for key in space.keys:
        content: Any = config.to_dict()
        for part in key.split("."):
            if not isinstance(content, dict) or part not in content:
                raise ConfigError(f"the space's {key} is not a key of the config")
            content = content[part]
        values[key] = content
    return values


def _validations(folder: Path) -> list[tuple[int, float]]:
    """Return (step, metric) of every recorded validation."""
    records = read_stage(folder) if folder.exists() else []
    return [(record["step"], value) for record in records if (value := selection_score(record)) is not None]
