"""Metrics to where people look at them: metrics.jsonl always, accelerate's trackers by name."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from bigdssm import distributed
from bigdssm.config import Config
from bigdssm.errors import ConfigError
from bigdssm.log import MetricsWriter, cut_back

METRICS_FILE = "metrics.jsonl"


class Trackers:
    """Writes records on rank 0; the other ranks' calls do nothing."""

    def __init__(
        self, folder: Path, config: Config, step: int = 0, num_validations: int = 0, *, cpu: bool = True
    ) -> None:
        """Open `folder`/metrics.jsonl and the trackers that `config.run.trackers` names.

        The file is cut back to the checkpoint that the run goes on from, made after `step` steps and so many
        validations: what it tells of later ones will be told again. TensorBoard passes over them; what other trackers
        have is theirs. cpu: the ranks compute on it.
        """
        self._metrics: MetricsWriter | None = None
        self._trackers: list[Any] = []
        if config.run.trackers:  # they ask accelerate's state for the main process; the process group stays ours
            PartialState(cpu=cpu)
        if distributed.is_main():
            _cut_back(folder / METRICS_FILE, step, num_validations)
            self._metrics = MetricsWriter(folder / METRICS_FILE)
            self._trackers = [_open(name, folder, step) for name in config.run.trackers]
            for tracker in self._trackers:
                tracker.start()
                tracker.store_init_configuration(_flat(config.to_dict()))

    def log(self, record: dict[str, Any]) -> None:
        """Write one record; `step` is its step, numbers (one level of nesting allowed) go to the trackers."""
        if self._metrics is None:
            return
        self._metrics.write(record)
        values = {
            key: value for key, value in _flat(record).items() if isinstance(value, int | float) and key != "step"
        }
        for tracker in self._trackers:
            tracker.log(values, step=record["step"])

    def close(self) -> None:
        """Flush and close everything."""
        if self._metrics is not None:
            self._metrics.close()
        for tracker in self._trackers:
            tracker.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError where a name is no tracker, or its package is not installed."""
    known = {str(key): tracker for key, tracker in LOGGER_TYPE_TO_CLASS.items()}
    for name in names:
        if name not in known:
            raise ConfigError(f"run.trackers: got {name!r}, needs names out of {sorted(known)}")
        if importlib.util.find_spec(name) is None:  # every tracker is called like its package
            raise ConfigError(
                f"run.trackers: {name} is not installed; pip install {name}, or take it out of run.trackers"
            )


def _cut_back(path: Path, step: int, num_validations: int) -> None:
    validations = itertools.count()

    def keep(record: dict[str, Any]) -> bool:
        return next(validations) < num_validations if "validation" in record else bool(record["step"] <= step)

    cut_back(path, keep)


def _open(name: str, folder: Path, step: int) -> Any:
    tracker_class = {str(key): tracker for key, tracker in LOGGER_TYPE_TO_CLASS.items()}[name]
    if not tracker_class.requires_logging_directory:
        return tracker_class(f"{folder.parent.name}-{folder.name}")
    purged = {"purge_step": step + 1} if name == "tensorboard" else {}
    return tracker_class(name, logging_dir=folder, **purged)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
