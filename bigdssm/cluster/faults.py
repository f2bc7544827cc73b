"""Fault injection for tests of recovery: BIGDSSM_FAULT=kind@step[:rank][,…]. Off by default.

`step` counts consumed global batches from 0. A fault is triggered on its rank (default 0) in that step, or in the
checkpoint written after `step` consumed batches.

    kill stop hang raise     SIGKILL, SIGSTOP, a main thread in an endless loop, an exception
    term int                 SIGTERM, SIGINT to this rank
    kill-launcher term-launcher kill-runner term-runner
                             SIGKILL or SIGTERM to the parent process (launcher) or to its parent (runner)
    kill-loader              SIGKILL to this rank's first loader process
    nan spike                a NaN loss; a loss value 100 times too large, with an unchanged gradient
    kill-save disk-full      SIGKILL or ENOSPC during a checkpoint, between this rank's files
"""

import errno
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from bigdssm import distributed
from bigdssm.cluster.launcher import children_of, parent_of
from bigdssm.errors import ConfigError
from bigdssm.utils.log import get_logger

VARIABLE = "BIGDSSM_FAULT"
IN_STEP = (
    "kill", "stop", "hang", "raise", "term", "int", "kill-launcher", "term-launcher", "kill-runner", "term-runner",
    "kill-loader",
)  # fmt: skip
IN_LOSS, IN_SAVE = ("nan", "spike"), ("kill-save", "disk-full")

logger = get_logger(__name__)


@dataclass(frozen=True)
class Fault:
    """One fault: `kind@step:rank`."""

    kind: str
    step: int
    rank: int = 0


def install_faults(trainer: Any) -> None:
    """Make a `training.trainer.Trainer` trigger this rank's faults: in its steps, its loss, and its checkpoints.

    Raises ConfigError: the environment variable is invalid.
    """
    rank = int(os.environ.get("RANK", "0"))
    configured = map(parse, filter(None, os.environ.get(VARIABLE, "").split(",")))
    faults = [fault for fault in configured if fault.rank == rank]
    if not faults:
        return
    train_step, loss_function = trainer.train_step, trainer.loss_function

    def due(step: int, kinds: tuple[str, ...]) -> Iterator[str]:
        for fault in faults:
            if fault.step == step and fault.kind in kinds:
                logger.warning("%s: %s at step %d on rank %d", VARIABLE, fault.kind, step, distributed.rank())
                yield fault.kind

    def faulty_step(batch: Any, *args: Any) -> Any:
        for kind in due(batch.step, IN_STEP):
            _trigger(kind)
        return train_step(batch, *args)

    def faulty_loss(encoded: Any, batch: Any) -> Any:
        output = loss_function(encoded, batch)
        for kind in due(batch.step, IN_LOSS):
            wrong = float("nan") if kind == "nan" else 99 * output.loss.detach()
            output = replace(output, loss=output.loss + wrong)
        return output

    def between_files(step: int) -> None:
        for kind in due(step, IN_SAVE):
            if kind == "kill-save":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trainer.train_step, trainer.loss_function = faulty_step, faulty_loss
    trainer.store.between_files = between_files


def parse(text: str) -> Fault:
    """Parse `kind@step[:rank]`. Raises ConfigError."""
    match = re.fullmatch(r"([a-z-]+)@(\d+)(?::(\d+))?", text.strip())
    if match is None or match[1] not in (*IN_STEP, *IN_LOSS, *IN_SAVE):
        kinds = ", ".join((*IN_STEP, *IN_LOSS, *IN_SAVE))
        raise ConfigError(f"{VARIABLE}: got {text!r}, needs kind@step or kind@step:rank; kind is one of {kinds}")
    return Fault(match[1], int(match[2]), int(match[3] or 0))


def _trigger(kind: str) -> None:
    name, _, target = kind.partition("-")
    if kind == "hang":
        while True:
            time.sleep(1)
    if kind == "raise":
        raise RuntimeError(f"injected by {VARIABLE}")
    numbers = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "int": signal.SIGINT}
    pid = os.getpid()
    if target == "loader":
        loaders = [loader for server in children_of(pid) for loader in children_of(server)]
        if not loaders:
            raise ConfigError(f"{VARIABLE}: this rank has no loader process; set data.num_workers to at least 1")
        pid = loaders[0]
    elif target == "launcher":
        pid = os.getppid()
    elif target == "runner":
        pid = parent_of(os.getppid()) or os.getppid()
    os.kill(pid, numbers[name])
