"""The Python API: stages train in this process, alone or as a rank of a launcher."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from bigdssm import distributed
from bigdssm.cluster.launcher import check_launch
from bigdssm.cluster.signals import StopRequest
from bigdssm.config import Config, StageName, config_of
from bigdssm.training.engine import leave_process_group
from bigdssm.training.stages import run_stage, stage_lock
from bigdssm.utils.arguments import checked
from bigdssm.utils.device import RandomState
from bigdssm.utils.log import default_logging


@dataclass(frozen=True)
class StageResult:
    """The result of a stage."""

    best: Path  # the model folder of the best validation
    metrics: dict[str, Any]  # of that validation: step, ndcg_at_10, …; empty without a validation split


@checked
def pretrain(config: Config | str | Path, overrides: Sequence[str] = (), *, resume: bool = False) -> StageResult:
    """Run pretraining. `overrides` are key=value pairs; `resume` continues from the newest checkpoint.

    Signals are left to the caller: Ctrl-C stops without saving, `bigdssm stop_run RUN` saves first. A process
    trains one stage at a time. Raises BigDSSMError.
    """
    return _train(config_of(config, overrides), "pretrain", resume)


@checked
def sft(config: Config | str | Path, overrides: Sequence[str] = (), *, resume: bool = False) -> StageResult:
    """Fine-tune the result of `pretrain`; arguments as there."""
    return _train(config_of(config, overrides), "sft", resume)


def _train(config: Config, stage: StageName, resume: bool) -> StageResult:
    with stage_lock(), _restored_process(), default_logging():
        progress = run_stage(
            config, stage, resume=resume, validate_only=False, world_size=check_launch(),
            stop=StopRequest(handle_signals=False),
        )  # fmt: skip
    assert progress is not None
    # the newest record of the best step: an earlier one may be of another segment
    records = (record for record in reversed(progress.history) if record["step"] == progress.best_step)
    metrics: dict[str, Any] = next(records, {}) if isfinite(progress.best) else {}
    return StageResult(config.stage_dir(stage) / "best", metrics)


@contextmanager
def _restored_process() -> Iterator[None]:
    """Restore the process group, the environment, random states and threads at exit."""
    was_distributed, environment = distributed.is_distributed(), dict(os.environ)
    random, threads = RandomState.now(), torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        if not was_distributed:
            leave_process_group()
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)
        random.restore()
        torch.set_num_threads(threads)
