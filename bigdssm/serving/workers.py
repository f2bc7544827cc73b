"""Several processes that listen on one socket: started, started again where one dies, and stopped together."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from typing import Any

from bigdssm.errors import BigDSSMError
from bigdssm.log import get_logger

METRICS_DIR = "PROMETHEUS_MULTIPROC_DIR"  # where prometheus_client finds what other workers counted
RETRY_S = 5.0  # until a worker that could not serve is started again, while others serve
KILLED_AFTER_S = 5.0  # what a worker may take longer to end than it says
logger = get_logger(__name__)


class WorkersFailed(BigDSSMError):
    """A worker ended before it could serve."""


def run_workers(number: int, work: Callable[..., Any], arguments: tuple[Any, ...], timeout_s: int) -> None:
    """Run `work(*arguments, ready)` in so many processes until a signal asks to stop; all have ended when it returns.

    Both have to be picklable, as sockets are. `work` calls `ready()` as soon as it can serve: a process that ends
    after that is started again. One that ends before, as when what it opens was replaced in part, is tried again while
    others serve. Raises WorkersFailed: one ended before, and no other serves.
    """
    context = multiprocessing.get_context("spawn")  # torch's threads do not live through a fork
    stopping = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stopping.set())

    def start() -> tuple[BaseProcess, Event]:
        ready = context.Event()
        process = context.Process(target=_worker, args=(work, (*arguments, ready.set)))
        process.start()
        return process, ready

    workers = [start() for _ in range(number)]
    again = dict[int, float]()  # when to try, by the place of a worker that could not serve
    try:
        while not stopping.is_set():
            wait([process.sentinel for place, (process, _) in enumerate(workers) if place not in again], timeout=0.5)
            for place, (process, ready) in enumerate(workers):
                if process.is_alive() or stopping.is_set() or time.monotonic() < again.get(place, 0):
                    continue
                if place not in again and not ready.is_set():
                    code = process.exitcode
                    if not any(other.is_alive() and serves.is_set() for other, serves in workers):
                        raise WorkersFailed(f"a worker ended with code {code} before it could serve; see above")
                    logger.warning(
                        "worker %s ended with code %s before it could serve, see above; the others serve on, and it is "
                        "started again in %.0f s", process.pid, code, RETRY_S,
                    )  # fmt: skip
                    again[place] = time.monotonic() + RETRY_S
                    continue
                if again.pop(place, None) is None:
                    logger.warning("worker %s ended with code %s; another is started", process.pid, process.exitcode)
                workers[place] = start()
    finally:
        _end([process for process, _ in workers], timeout_s + KILLED_AFTER_S)


def _worker(work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()  # however it ends
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()
    work(*arguments)


def _end(processes: list[BaseProcess], timeout_s: float) -> None:
    for process in processes:
        process.terminate()
    until = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
