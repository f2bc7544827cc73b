"""Faults for tests of recovery: BIGDSSM_TEST_FAULT=kind@step[:rank][,…], with this folder in PYTHONPATH.

Every Python of the run, including the ranks of a launcher, imports this module at its start and injects the faults
when it imports the trainer. `step` counts consumed global batches from 0. A fault is triggered on its rank (default 0)
in that step, or in the checkpoint written after `step` consumed batches.

    kill stop hang raise     SIGKILL, SIGSTOP, a main thread in an endless loop, an exception
    term int                 SIGTERM, SIGINT to this rank
    kill-launcher term-launcher kill-runner term-runner
                             SIGKILL or SIGTERM to the parent process (launcher) or to its parent (runner)
    kill-loader              SIGKILL to this rank's first loader process
    nan spike                a NaN loss; a loss value 100 times too large, with an unchanged gradient
    kill-save disk-full      SIGKILL or ENOSPC during a checkpoint, between this rank's files
"""

from __future__ import annotations

import errno
import importlib.abc
import importlib.util
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

VARIABLE = "BIGDSSM_TEST_FAULT"
TRAINER = "bigdssm.training.trainer"
IN_STEP = (
    "kill", "stop", "hang", "raise", "term", "int", "kill-launcher", "term-launcher", "kill-runner", "term-runner",
    "kill-loader",
)  # fmt: skip
IN_LOSS, IN_SAVE = ("nan", "spike"), ("kill-save", "disk-full")

logger = logging.getLogger("bigdssm.faults")  # a child of the logger whose lines the commands print


@dataclass(frozen=True)
class Fault:
    """One fault: `kind@step:rank`."""

    kind: str
    step: int
    rank: int = 0


def variables(faults: str) -> dict[str, str]:
    """Return the variables of the environment of a run with faults; the folder follows those of PYTHONPATH."""
    folders = [*filter(None, [os.environ.get("PYTHONPATH")]), str(Path(__file__).parent)]
    return {VARIABLE: faults, "PYTHONPATH": os.pathsep.join(folders)} if faults else {}


def inject(trainer: ModuleType) -> None:
    """Make the trainers of the module trigger this rank's faults: in their steps, losses and checkpoints.

    Raises ValueError: the environment variable is invalid.
    """
    rank = int(os.environ.get("RANK", "0"))
    configured = map(parse, filter(None, os.environ.get(VARIABLE, "").split(",")))
    faults = [fault for fault in configured if fault.rank == rank]
    if not faults:
        return
    train, train_step = trainer.Trainer.train, trainer.train_step

    def due(step: int, kinds: tuple[str, ...]) -> Iterator[str]:
        for fault in faults:
            if fault.step == step and fault.kind in kinds:
                logger.warning("%s: %s at step %d on rank %d", VARIABLE, fault.kind, step, rank)
                yield fault.kind

    def faulty_step(engine: Any, batch: Any, plan: Any, loss_function: Any, *args: Any) -> Any:
        def faulty_loss(encoded: Any, batch: Any) -> Any:
            output = loss_function(encoded, batch)
            for kind in due(batch.step, IN_LOSS):
                wrong = float("nan") if kind == "nan" else 99 * output.loss.detach()
                output = replace(output, loss=output.loss + wrong)
            return output

        for kind in due(batch.step, IN_STEP):
            _trigger(kind)
        return train_step(engine, batch, plan, faulty_loss, *args)

    def between_files(step: int) -> None:
        for kind in due(step, IN_SAVE):
            if kind == "kill-save":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def faulty_train(self: Any) -> Any:
        self.store.between_files = between_files
        return train(self)

    trainer.Trainer.train, trainer.train_step = faulty_train, faulty_step


def parse(text: str) -> Fault:
    """Parse `kind@step[:rank]`. Raises ValueError."""
    match = re.fullmatch(r"([a-z-]+)@(\d+)(?::(\d+))?", text.strip())
    if match is None or match[1] not in (*IN_STEP, *IN_LOSS, *IN_SAVE):
        kinds = ", ".join((*IN_STEP, *IN_LOSS, *IN_SAVE))
        raise ValueError(f"{VARIABLE}: got {text!r}, needs kind@step or kind@step:rank; kind is one of {kinds}")
    return Fault(match[1], int(match[2]), int(match[3] or 0))


def _trigger(kind: str) -> None:
    from bigdssm.cluster.launcher import children_of, parent_of

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
            raise ValueError(f"{VARIABLE}: this rank has no loader process; set data.num_workers to at least 1")
        pid = loaders[0]
    elif target == "launcher":
        pid = os.getppid()
    elif target == "runner":
        pid = parent_of(os.getppid()) or os.getppid()
    os.kill(pid, numbers[name])


class TrainerFinder(importlib.abc.MetaPathFinder):
    """Injects the faults into the trainer's module when it is imported, so that other processes import nothing."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != TRAINER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            inject(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if __name__ == "sitecustomize" and os.environ.get(VARIABLE):
    sys.meta_path.insert(0, TrainerFinder())
