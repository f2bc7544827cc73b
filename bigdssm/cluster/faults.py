"""Faults on purpose, to see that a run survives them: BIGDSSM_FAULT=kind@step[:rank][,…]. Without it nothing happens.

The step counts consumed global batches from 0; a fault strikes on its rank (0 by default) in that step, or in the
checkpoint written when so many steps are consumed.

    kill stop hang raise     SIGKILL, SIGSTOP, a main thread that never gets on, an exception
    term int                 SIGTERM, SIGINT to this rank
    kill-launcher term-launcher kill-runner term-runner
                             to the process that started this rank, and to the one that started that
    kill-loader              SIGKILL to this rank's first loader process
    nan spike                a loss that is not finite; a loss 100 times as high, without its gradient
    kill-save disk-full      in the checkpoint, between this rank's files: SIGKILL; the disk is full
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bigdssm import distributed
from bigdssm.cluster.launcher import parent_of
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
    """One fault; `kind@step:rank`."""

    kind: str
    step: int
    rank: int = 0


@dataclass(frozen=True)
class Faults:
    """The faults that are to strike this rank."""

    faults: tuple[Fault, ...] = ()

    @classmethod
    def from_environment(cls) -> Faults:
        """Return the faults that the environment asks of this rank. Raises ConfigError."""
        text = os.environ.get(VARIABLE, "")
        rank = int(os.environ.get("RANK", "0"))
        return cls(tuple(fault for fault in map(parse, filter(None, text.split(","))) if fault.rank == rank))

    def in_step(self, step: int) -> None:
        """Strike before the step that consumes global batch `step`."""
        for kind in self._due(step, IN_STEP):
            _strike(kind)

    def in_loss(self, objective: Callable[..., Any]) -> Callable[..., Any]:
        """Return the objective, spoiled where a fault asks for it."""
        if not any(fault.kind in IN_LOSS for fault in self.faults):
            return objective

        def spoiled(encoded: Any, batch: Any) -> Any:
            output = objective(encoded, batch)
            for kind in self._due(batch.step, IN_LOSS):
                wrong = float("nan") if kind == "nan" else 99 * output.loss.detach()
                output = replace(output, loss=output.loss + wrong)
            return output

        return spoiled

    def in_save(self, step: int) -> Callable[[], None]:
        """Return what the checkpoint of `step` calls between two files: it strikes where a fault asks for it."""
        due = self._due(step, IN_SAVE)

        def strike() -> None:
            for kind in due:
                if kind == "kill-save":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return strike

    def _due(self, step: int, kinds: tuple[str, ...]) -> list[str]:
        due = [fault.kind for fault in self.faults if fault.step == step and fault.kind in kinds]
        for kind in due:
            logger.warning("%s: %s at step %d on rank %d", VARIABLE, kind, step, distributed.rank())
        return due


def parse(text: str) -> Fault:
    """Return the fault that `kind@step[:rank]` names. Raises ConfigError."""
    match = re.fullmatch(r"([a-z-]+)@(\d+)(?::(\d+))?", text.strip())
    if match is None or match[1] not in (*IN_STEP, *IN_LOSS, *IN_SAVE):
        known = ", ".join((*IN_STEP, *IN_LOSS, *IN_SAVE))
        raise ConfigError(f"{VARIABLE}: got {text!r}, needs kind@step or kind@step:rank with a kind out of {known}")
    return Fault(match[1], int(match[2]), int(match[3] or 0))


def _strike(kind: str) -> None:
    """Do one of IN_STEP to this process or one near it."""
    name, _, whom = kind.partition("-")
    if kind == "hang":
        while True:
            time.sleep(1)
    if kind == "raise":
        raise RuntimeError(f"{VARIABLE} asked for this")
    numbers = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "int": signal.SIGINT}
    os.kill(_target(whom), numbers[name])


def _target(whom: str) -> int:
    if whom == "loader":
        threads = sorted(Path("/proc/self/task").glob("*/children"))  # loader processes are those of whichever reads
        children = [child for thread in threads for child in thread.read_text().split()]
        if not children:
            raise ConfigError(f"{VARIABLE}: this rank has no loader process; set data.num_workers to at least 1")
        return int(children[0])
    if whom == "launcher":
        return os.getppid()
    return (parent_of(os.getppid()) or os.getppid()) if whom == "runner" else os.getpid()
