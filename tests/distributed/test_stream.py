"""The stream on several processes: damage that only one rank reads, and ranks that are killed and restarted."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigdssm.cluster.launcher import children_of
from bigdssm.config import StageName
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.distributed import all_gather_object
from bigdssm.errors import DataError, PeerError
from bigdssm.loader import stream as stream_module
from bigdssm.loader.order import Order
from bigdssm.loader.stream import CHECK_EVERY_STEPS, PairStream
from bigdssm.loader.workers import fork_server
from tests.tiny_datasets import Writer

from . import small_run
from .spawn import Pool

ROWS_GLOBAL, LANES, SAVE_EVERY_STEPS = 32, 4, 5


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Writer(tmp_path_factory.mktemp("ranks") / "data").write()


@pytest.fixture(scope="module")
def pool():
    with Pool(2) as ranks:
        yield ranks


def read_until_it_stops(rank: int, world_size: int, folder: str, fraction: float, fails: str) -> tuple[int, int, str]:
    """Return this rank's number of steps and rows, and the error's class and message."""
    if fails == "rank 1" and rank == 1:

        def fail(*_: object) -> None:
            raise OSError("the disk is gone")

        stream_module.read_blocks = fail  # type: ignore[assignment]
    stream = PairStream(
        folder, rows_global=ROWS_GLOBAL, lanes=LANES, rank=rank, world_size=world_size, max_bad_fraction=fraction
    )
    made = rows = 0
    try:
        for part in islice(stream, 100):
            made, rows = made + 1, rows + len(part)
    except (DataError, PeerError) as error:
        return made, rows, f"{type(error).__name__}: {error}"
    return made, rows, ""


def test_all_ranks_stop_at_the_same_step_where_one_alone_meets_damage(
    pool: Pool, dataset: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(dataset, tmp_path / "copy")
    index = Dataset.open(folder).index("train")
    lane_of_rank_1 = Order(index.rows, rows_global=ROWS_GLOBAL, lanes=LANES).window(0, 1, 0)
    block = int(lane_of_rank_1.blocks[1])  # entirely within the lane
    with index.shards[index.shard[block]].open("r+b") as file:
        file.seek(int(index.offset[block]) + 50)
        file.write(b"damage")
    (made_0, rows_0, error_0), (made_1, rows_1, error_1) = pool.run(read_until_it_stops, str(folder), 0.01, "")
    assert made_0 == made_1 < 100
    assert made_0 % CHECK_EVERY_STEPS == 0
    assert rows_0 == made_0 * 16 > rows_1
    assert error_0 == error_1
    assert "more than data.max_bad_fraction=0.01 allows" in error_0
    allowed = pool.run(read_until_it_stops, str(folder), 0.5, "")
    assert [(made, error) for made, _, error in allowed] == [(100, ""), (100, "")]


def test_a_rank_that_cannot_read_stops_the_others(dataset: Path) -> None:
    with Pool(2) as own:  # the planted fault stays in the processes
        (made_0, _, error_0), (made_1, rows_1, error_1) = own.run(read_until_it_stops, str(dataset), 0.5, "rank 1")
    assert (made_0, made_1, rows_1) == (CHECK_EVERY_STEPS, CHECK_EVERY_STEPS, 0)
    assert error_0.startswith("PeerError: rank 1 stopped: rank 1 cannot read")
    assert error_1.startswith("DataError: rank 1 cannot read")
    assert "the disk is gone" in error_0


class Planted:
    """A value of a loader process that cannot be sent, or that ends the process while it is sent."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __reduce__(self) -> Any:
        if self.kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise TypeError("cannot pickle 'planted' object")


def read_with_loader_processes(rank: int, world_size: int, folder: str, kind: str) -> tuple[int, str]:
    """Return the number of steps before the ranks stop, and the error; rank 1 has a fault in step 5."""
    stream = PairStream(
        folder, rows_global=ROWS_GLOBAL, lanes=LANES, rank=rank, world_size=world_size, num_workers=2
    )  # fmt: skip
    make = partial(value_of_step, kind if rank == 1 else "")
    steps = 0
    try:
        with closing(stream.map_steps(make, 100)) as values:
            for _ in values:
                counts = all_gather_object(stream.counts())  # as a training step does
                if stream.needs_check(counts, stream.step):
                    stream.check()
                steps += 1
    except (DataError, PeerError) as error:
        return steps, f"{type(error).__name__} {error.exit_code}: {error}"
    return steps, ""


def value_of_step(kind: str, rows: Rows) -> Any:
    return Planted(kind) if kind and len(rows) and rows.step == 5 else len(rows)


@pytest.mark.parametrize(
    ("kind", "error", "code", "text"),
    [
        ("unpicklable", "DataError", 3, "TypeError: cannot pickle 'planted' object"),
        ("killed", "PeerError", 6, r"a loader process died: pid \d+ was killed by SIGKILL"),
    ],
)
def test_a_fault_of_a_loader_process_that_sends_a_step_stops_all_ranks_at_once(
    pool: Pool, dataset: Path, kind: str, error: str, code: int, text: str
) -> None:
    """At the step of the fault, or before it if the process has died, and with the text of the fault."""
    started = time.monotonic()
    (steps_0, error_0), (steps_1, error_1) = pool.run(read_with_loader_processes, str(dataset), kind)
    assert time.monotonic() - started < 30
    assert steps_0 == steps_1 <= 5
    assert re.match(f"{error} {code}: rank 1 cannot read {dataset}: {text}$", error_1)
    assert re.match(f"PeerError 6: rank 1 stopped: rank 1 cannot read {dataset}: {text}$", error_0)


def forks_of_stages(rank: int, world_size: int, config: Path, run_dir: Path) -> dict[str, Any]:
    """Train both stages; return the forks of this process, and the thread counts of it and the fork server."""
    found: dict[str, Any] = {"forks": [], "loaders": 0}
    os.register_at_fork(before=lambda: found["forks"].append(traceback.format_stack()))
    sys.addaudithook(lambda event, _: event in ("os.fork", "os.forkpty") and found["forks"].append(event))
    fork = fork_server.fork

    def counted(*arguments: Any) -> int:
        found["loaders"] += 1
        return fork(*arguments)

    fork_server.fork = counted  # type: ignore[method-assign]
    stages: tuple[StageName, ...] = ("pretrain", "sft")
    for stage in stages:
        small_run.run(rank, world_size, config, run_dir, ("data.num_workers=2",), stage)
    assert fork_server._process is not None and fork_server._process.pid in children_of(os.getpid())
    for name, process in (("rank", os.getpid()), ("server", fork_server._process.pid)):
        found[name] = len(os.listdir(f"/proc/{process}/task"))
    return found


def test_no_stage_forks_a_process_that_has_threads(tmp_path: Path) -> None:
    """A rank has threads, and CUDA: its loader processes are forked by a child without threads."""
    config = small_run.write_dataset(tmp_path)
    with Pool(2) as own:  # the hooks stay in the processes
        for found in own.run(forks_of_stages, config, tmp_path / "run"):
            assert found["forks"] == []
            assert found["loaders"] >= 4
            assert found["rank"] > 1 and found["server"] == 1


def consume(folder: str, run: str, rank: int, world_size: int, start: dict[str, Any] | None, step_done: Any) -> None:
    """Run as a training rank: log every step's row ids, synchronize, save the state, until killed."""
    stream = PairStream(
        folder, rows_global=ROWS_GLOBAL, lanes=LANES, rank=rank, world_size=world_size, num_workers=1,
        start_step=start["step"] if start else 0,
    )  # fmt: skip
    if start:
        stream.check_state(start)
    with open(f"{run}/rows-{world_size}-{rank}.jsonl", "a", encoding="utf-8") as log:
        for rows in stream:
            log.write(json.dumps([rows.step, rows.row_ids.tolist()]) + "\n")
            log.flush()
            step_done.wait()
            if rank == 0 and stream.step % SAVE_EVERY_STEPS == 0:
                Path(f"{run}/state.new").write_text(json.dumps(stream.state()))
                os.replace(f"{run}/state.new", f"{run}/state.json")


def run_and_kill(dataset: Path, run: Path, world_size: int, start: dict[str, Any] | None, upto: int) -> None:
    """Start the ranks, and kill -9 them after step `upto` of rank 0, each at a different time."""
    context = mp.get_context("spawn")
    step_done = context.Barrier(world_size)
    ranks = [
        context.Process(target=consume, args=(str(dataset), str(run), rank, world_size, start, step_done))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + 60
    while read_log(run, world_size).get(upto) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for process in ranks:
        os.kill(process.pid or 0, signal.SIGKILL)
        time.sleep(random.random() / 50)
    for process in ranks:
        process.join()


def read_log(run: Path, world_size: int) -> dict[int, list[int]]:
    """Return the row ids by step that all ranks have logged."""
    steps: dict[int, list[list[int]]] = {}
    for path in run.glob(f"rows-{world_size}-*.jsonl"):
        for line in path.read_text().splitlines():
            if line.endswith("]]"):
                step, ids = json.loads(line)
                steps.setdefault(step, []).append(ids)
    return {step: sorted(row for part in ids for row in part) for step, ids in steps.items() if len(ids) == world_size}


@pytest.mark.slow
@pytest.mark.parametrize("resumed_on", [1, 3])
def test_killed_ranks_resume_with_the_rows_of_an_unbroken_run(dataset: Path, tmp_path: Path, resumed_on: int) -> None:
    order = Order(Dataset.open(dataset).index("train").rows, rows_global=ROWS_GLOBAL, lanes=LANES)
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    after.mkdir()
    run_and_kill(dataset, before, 2, None, upto=random.randint(SAVE_EVERY_STEPS, 40))
    state = json.loads((before / "state.json").read_text())
    run_and_kill(dataset, after, resumed_on, state, upto=state["step"] + 40)
    first, second = read_log(before, 2), read_log(after, resumed_on)
    assert set(range(state["step"])) <= set(first)
    assert min(second) == state["step"]
    for step, ids in [*first.items(), *second.items()]:
        assert ids == np.sort(order.row_ids(step)).tolist()
