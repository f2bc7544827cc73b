"""The stages as functions: they train in this process, alone or as a rank of a launcher, and leave it as it was."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigdssm import distributed
from bigdssm.cluster.launcher import check_launch
from bigdssm.cluster.signals import StopRequest
from bigdssm.config import Config, StageName, config_of
from bigdssm.training.encoding import RandomState
from bigdssm.training.engine import leave_process_group
from bigdssm.training.stages import run_stage, sole_stage
from bigdssm.utils.arguments import checked
from bigdssm.utils.log import default_logging


@dataclass(frozen=True)
class Trained:
    """What a stage has learned."""

    best: Path  # the model folder of the best validation
    metrics: dict[str, Any]  # of that validation: its step, ndcg_at_10, …; empty without a validation split


@checked
def pretrain(config: Config | str | Path, overrides: Sequence[str] = (), *, resume: bool = False) -> Trained:
    """Pretrain and return what was learned; `overrides` are key=value of a file, `resume` goes on where it was.

    Signals stay with the caller: Ctrl-C ends it unsaved, `bigdssm stop_run RUN --save` saves. One stage at a
    time trains in a process. Raises BigDSSMError.
    """
    return _train(config_of(config, overrides), "pretrain", resume)


@checked
def sft(config: Config | str | Path, overrides: Sequence[str] = (), *, resume: bool = False) -> Trained:
    """Fine-tune what `pretrain` left, as it does."""
    return _train(config_of(config, overrides), "sft", resume)


def _train(config: Config, stage: StageName, resume: bool) -> Trained:
    with sole_stage(), _as_it_was(), default_logging():
        progress = run_stage(
            config, stage, resume=resume, validate_only=False, world_size=check_launch(),
            stop=StopRequest(handle_signals=False),
        )  # fmt: skip
    assert progress is not None
    return Trained(config.stage_dir(stage) / "best", progress.best_metrics())


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Take back what a stage does to its process: the process group, the environment, random state and threads."""
    joined, environment = distributed.is_distributed(), dict(os.environ)
    random, threads = RandomState.now(), torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        if not joined:
            leave_process_group()
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)
        random.restore()
        torch.set_num_threads(threads)
