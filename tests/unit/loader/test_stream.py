"""A rank reads its lanes' share of the order, for any number of workers, ranks and restarts."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pyarrow as pa
import pytest
import torch

from bigdssm.cluster.launcher import children_of, state_of
from bigdssm.config import DataConfig, TokenizerConfig
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.errors import ConfigError, DataError, PeerError
from bigdssm.features import Numeric, Ragged, Text
from bigdssm.ingest.job import IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs
from bigdssm.loader.order import Order
from bigdssm.loader.stream import PairStream
from bigdssm.loader.workers import LoadedStep, Peers, WorkerSteps, fork_server, load
from bigdssm.utils.hashing import hash64
from tests.tiny_datasets import NUM_DOCS, Writer

ROWS_GLOBAL, LANES = 48, 8
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # else loader processes import pytest


def steps(dataset: Path | Dataset, count: int, **arguments: int) -> list[Rows]:
    stream = PairStream(dataset, **{"rows_global": ROWS_GLOBAL, "lanes": LANES, **arguments})  # type: ignore[arg-type]
    rows = list(islice(stream, count))
    stream.close()
    return rows


def same(a: Rows, b: Rows) -> bool:
    """Return whether two Rows are equal in all values."""

    def columns(rows: Rows) -> list[np.ndarray]:
        out = [rows.row_ids, rows.doc_rows, rows.relevance, rows.query_ids]
        out += [value for value in (rows.row, rows.sequence, rows.position, rows.doc_ids) if value is not None]
        for column in [*rows.query.values(), *rows.doc.values()]:
            out += [column.values, column.offsets] if isinstance(column, Ragged) else [column]
        return out

    return a.step == b.step and all(np.array_equal(x, y) for x, y in zip(columns(a), columns(b), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1, 2, 3, 4])
def test_any_world_size_and_workers_give_the_same_global_batches(interactions: Path, num_workers: int) -> None:
    dataset = Dataset.open(interactions)
    order = Order(dataset.index("train").rows, rows_global=ROWS_GLOBAL, lanes=LANES)
    for world_size in (1, 2, 3, 4, 8):
        ranks = [
            steps(dataset, 25, rank=rank, world_size=world_size, num_workers=num_workers) for rank in range(world_size)
        ]
        for step in range(25):  # 20.8 steps are an epoch
            together = np.concatenate([rows[step].row_ids for rows in ranks])
            assert np.array_equal(np.sort(together), np.sort(order.row_ids(step)))


@pytest.mark.parametrize("kind", ["interactions", "texts"])
def test_rows_are_equal_for_every_number_of_workers(kind: str, request: pytest.FixtureRequest) -> None:
    dataset = request.getfixturevalue(kind)
    plain = steps(dataset, 23, rank=1, world_size=2)
    for num_workers in (1, 3):
        loaded = steps(dataset, 23, rank=1, world_size=2, num_workers=num_workers)
        assert all(same(a, b) for a, b in zip(plain, loaded, strict=True))


def test_every_row_carries_its_own_values(interactions: Path) -> None:
    for rows in steps(interactions, 22):
        ids = rows.row_ids
        docs = (ids % 11 + ids % 30) % NUM_DOCS
        assert rows.query_ids.tolist() == [hash64(f"u{row % 11}") for row in ids.tolist()]
        assert np.array_equal(rows.doc_rows, docs)
        assert np.array_equal(rows.relevance, (docs % 3 / 2).astype(np.float32))
        assert np.array_equal(rows.query["age"], ids % 11)
        history, (seen, offsets) = rows.query["history"], rows.seen_ragged()
        for i, row in enumerate(ids.tolist()):
            events = [(row % 11 + event) % NUM_DOCS for event in range(row % 30)]
            assert history[i].tolist() == [event + 2 for event in events[-5:]]  # codes; the newest five, newest last
            assert seen[offsets[i] : offsets[i + 1]].tolist() == rows.seen(i).tolist() == events


def test_text_rows_carry_their_own_tokens(texts: Path) -> None:
    for rows in steps(texts, 21):
        for i, row in enumerate(rows.row_ids.tolist()):
            assert rows.query["words"][i].tolist() == [1, *range(3, 3 + row % 4), 2]
        assert np.array_equal(rows.query["age"], rows.row_ids % 80)
        assert rows.seen_ragged()[1].tolist() == [0] * (len(rows) + 1)


def test_two_partitions_are_one_order_with_their_own_sequences(tmp_path: Path) -> None:
    folder = Writer(tmp_path / "data", rows=300).write("day1", "day2")
    for rows in steps(folder, 14, num_workers=1):
        day, local = np.divmod(rows.row_ids, 300)
        assert np.array_equal(rows.position, (local + day) % 30)
        assert np.array_equal(rows.query["age"], local % 11 + 100 * day)
        assert np.array_equal(rows.sequence, local % 11 + 11 * day)
        for i in range(len(rows)):
            first = (local[i] % 11 + day[i]) % NUM_DOCS
            assert rows.seen(i)[:1].tolist() == [first][: (local[i] + day[i]) % 30]
    only = Dataset.open(folder, partitions=["day2"])
    assert only.num_rows("train") == 300
    assert only.doc_counts().tolist() == [2] * NUM_DOCS
    assert all((rows.query["age"] >= 100).all() for rows in steps(only, 5))


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (1, 2), (2, 1), (3, 0)])
def test_a_stream_resumes_from_any_step_on_other_ranks_and_workers(
    interactions: Path, world_size: int, num_workers: int
) -> None:
    whole = steps(interactions, 40)
    stream = PairStream(interactions, rows_global=ROWS_GLOBAL, lanes=LANES, rank=0, world_size=2, num_workers=2)
    for _ in range(23):
        next(stream)
    state = json.loads(json.dumps(stream.state()))
    stream.close()
    assert (state["step"], state["epoch"]) == (23, 1)
    ranks = []
    for rank in range(world_size):
        resumed = PairStream(
            interactions, rows_global=ROWS_GLOBAL, lanes=LANES, rank=rank, world_size=world_size,
            num_workers=num_workers, start_step=state["step"],
        )  # fmt: skip
        resumed.check_state(state)
        ranks.append(list(islice(resumed, 17)))
        resumed.close()
    for i, expected in enumerate(whole[23:]):
        together = np.sort(np.concatenate([rows[i].row_ids for rows in ranks]))
        assert np.array_equal(together, np.sort(expected.row_ids))
        assert all(rows[i].step == expected.step for rows in ranks)


def test_changes_are_refused_by_name(interactions: Path, texts: Path, tmp_path: Path) -> None:
    arguments = {"rows_global": ROWS_GLOBAL, "lanes": LANES}
    state = PairStream(interactions, **arguments).state()
    for change, message in [
        ({"rows_global": 96}, "rows_global was 48, is 96"),
        ({"lanes": 4}, "lanes was 8, is 4"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"window_blocks": 2}, "window_blocks was 16, is 2"),
        ({"split": "test"}, "split was 'train', is 'test'"),
    ]:
        with pytest.raises(DataError, match=message):
            PairStream(interactions, **{**arguments, **change}).check_state(state)
    with pytest.raises(DataError, match="schema was"):
        PairStream(texts, **arguments).check_state(state)

    folder = Writer(tmp_path / "text", text=True, interactions=False).write("a")
    state = PairStream(folder, **arguments).state()
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"w49"', '"x49"'))
    with pytest.raises(DataError, match="tokenizer was"):
        PairStream(folder, **arguments).check_state(state)


def test_changed_partitions_are_refused_by_name(tmp_path: Path) -> None:
    arguments = {"rows_global": ROWS_GLOBAL, "lanes": LANES}
    writer = Writer(tmp_path / "data")
    state = PairStream(writer.write("a", "b"), **arguments).state()
    only_a = PairStream(Dataset.open(writer.dir, ["a"]), **arguments)
    with pytest.raises(DataError, match="partition b is missing"):
        only_a.check_state(state)
    with pytest.raises(DataError, match="partition b is new"):
        PairStream(writer.dir, **arguments).check_state(only_a.state())
    with pytest.raises(DataError, match="partitions were"):
        PairStream(Dataset.open(writer.dir, ["b", "a"]), **arguments).check_state(state)
    other = Writer(tmp_path / "other", rows=1001).write("a", "b")
    with pytest.raises(DataError, match="partition a has changed; partition b has changed"):
        PairStream(other, **arguments).check_state(state)


def test_numbers_that_cannot_work_are_refused(interactions: Path) -> None:
    for arguments, message in [
        ({"rank": 2, "world_size": 2}, "rank=2 must be at least 0 and below world_size=2"),
        ({"rank": 0, "world_size": 9}, "world_size=9 is more than lanes=8"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"start_step": -1}, "start_step=-1"),
    ]:
        with pytest.raises(ConfigError, match=message):
            PairStream(interactions, rows_global=ROWS_GLOBAL, lanes=LANES, **arguments)


def test_order_is_untouched_by_the_global_random_state(interactions: Path) -> None:
    a = steps(interactions, 3)
    np.random.seed(1)
    torch.manual_seed(1)
    assert all(same(x, y) for x, y in zip(a, steps(interactions, 3), strict=True))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_opening_a_stream_leaves_the_global_random_state_alone(interactions: Path, num_workers: int) -> None:
    """Otherwise a resumed run would draw other dropout masks than an uninterrupted one."""
    before = torch.get_rng_state()
    stream = PairStream(interactions, rows_global=ROWS_GLOBAL, lanes=LANES, num_workers=num_workers)
    next(stream)
    stream.close()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_dataset_pickles_as_its_path(interactions: Path) -> None:
    dataset = Dataset.open(interactions)
    content = pickle.dumps(dataset)
    assert len(content) < 1000
    assert pickle.loads(content).fingerprint == dataset.fingerprint


class Values(WorkerSteps[Any]):
    """Steps of one process, with the given values; `seen` has a byte for each that was built."""

    def __init__(self, values: Callable[[], Iterable[Any]], seen: Path) -> None:
        super().__init__(len)
        self._values, self._seen = values, seen

    def read(self, peers: Peers) -> Iterator[LoadedStep[Rows]]:
        raise NotImplementedError

    def load(self, peers: Peers) -> Iterator[LoadedStep[Any]]:
        with self._seen.open("wb", buffering=0) as seen:
            for number, value in enumerate(self._values()):
                seen.write(b".")
                yield LoadedStep(number, value, 0, 0)


def loaders() -> list[int]:
    """Return the pids of the loader processes."""
    assert fork_server._process is not None
    return children_of(fork_server._process.pid)  # not those of the server that forks the ranks of other tests


class Unpicklable:
    """As an object with a lock or an open file."""

    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle 'planted' object")


class KilledWhenPickled:
    """Ends the process that pickles it."""

    def __reduce__(self) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        (Unpicklable, DataError, "^TypeError: cannot pickle 'planted' object$"),
        (KilledWhenPickled, PeerError, r"^a loader process died: pid \d+ was killed by SIGKILL$"),
    ],
)
def test_a_fault_while_a_step_is_sent_ends_the_stream_at_once(
    num_workers: int, fault: type, error: type[Exception], text: str, tmp_path: Path
) -> None:
    """With its own text, and not by the watchdog's time limit: the fault could be in a thread that nobody observes."""
    started = time.monotonic()
    values = Values(lambda: [b"small", bytes(1_000_000), fault()], tmp_path / "seen")
    with closing(load(values, num_workers)) as steps:
        assert next(steps).value == b"small"
        with pytest.raises(error, match=text):
            list(steps)
    assert time.monotonic() - started < 20  # with the imports of the fork server


def test_a_process_that_is_killed_before_its_steps_are_read_ends_the_stream_at_once(tmp_path: Path) -> None:
    """A step that waits in a full pipe would be read in part, and the rank would wait for the rest."""
    with closing(load(Values(lambda: repeat(bytes(10_000_000)), tmp_path / "seen"), 1)) as steps:
        next(steps)
        (loader,) = loaders()
        while (tmp_path / "seen").stat().st_size < 3:
            time.sleep(0.01)
        os.kill(loader, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(PeerError, match=f"a loader process died: pid {loader} was killed by SIGKILL"):
            list(steps)
        assert time.monotonic() - started < 5


@pytest.mark.timeout(60)  # a hang is what it is for
def test_a_killed_worker_stops_the_stream(interactions: Path) -> None:
    """Also while the rank waits for another process, which waits for a part of the killed one."""
    stream = PairStream(interactions, rows_global=ROWS_GLOBAL, lanes=LANES, num_workers=2)
    next(stream)
    killed = loaders()[1]
    os.kill(killed, signal.SIGKILL)
    with pytest.raises(PeerError, match=f"a loader process died: pid {killed} was killed by SIGKILL"):
        for _ in range(100):
            next(stream)
    stream.close()


def test_a_batch_builder_that_cannot_be_sent_ends_the_stream_at_once(interactions: Path) -> None:
    stream = PairStream(interactions, rows_global=ROWS_GLOBAL, lanes=LANES, num_workers=1)
    lock = threading.Lock()
    with pytest.raises(TypeError, match=r"cannot pickle '_thread\.lock' object"):
        next(stream.map_steps(lambda rows: lock))


def test_the_fork_server_may_be_killed(interactions: Path) -> None:
    """Processes that it has forked continue, and another server forks further ones."""
    stream = PairStream(interactions, rows_global=ROWS_GLOBAL, lanes=LANES, num_workers=1)
    next(stream)
    assert fork_server._process is not None
    os.kill(fork_server._process.pid, signal.SIGKILL)
    assert [rows.step for rows in islice(stream, 20)] == list(range(1, 21))
    stream.close()
    assert [rows.step for rows in steps(interactions, 3, num_workers=1)] == [0, 1, 2]


def threads_of_server(rows: Rows) -> tuple[bytes, list[str]]:
    """Return the command line and the threads of the parent of the process that builds a step."""
    server = Path(f"/proc/{os.getppid()}")
    return (server / "cmdline").read_bytes(), [path.name for path in (server / "task").iterdir()]


def test_loader_processes_are_forked_by_a_process_without_threads(interactions: Path) -> None:
    """Locks that a thread holds during a fork stay locked in the new process, and CUDA fails in it."""
    stream = PairStream(interactions, rows_global=ROWS_GLOBAL, lanes=LANES, num_workers=2)
    with closing(stream.map_steps(threads_of_server, 4)) as made:
        for command, threads in made:
            assert b"fork_server" in command and len(threads) == 1


SCRIPT = """
import sys
from itertools import islice
from bigdssm.loader.stream import PairStream

class Counter:
    def __call__(self, rows):
        return len(rows), sys.modules["__main__"].__name__, __name__

stream = PairStream(sys.argv[1], rows_global=48, lanes=8, num_workers=2)
print(list(stream.map_steps(Counter(), 2)))
"""


def test_a_script_needs_no_main_guard(interactions: Path, tmp_path: Path) -> None:
    """And its own classes need no module that loader processes can import."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(interactions)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[(48, '__main__', '__main__'), (48, '__main__', '__main__')]\n", done.stderr
    assert done.stderr == ""


def load_and_die(folder: Path) -> None:
    steps = load(Values(lambda: repeat(bytes(1_000_000)), folder / "seen"), 1)
    next(steps)
    (worker,) = loaders()
    (folder / "pid").write_text(str(worker))
    while (folder / "seen").stat().st_size < 3:  # the second waits until it is read
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_loader_process_ends_with_its_rank(tmp_path: Path) -> None:
    rank = multiprocessing.get_context("spawn").Process(target=load_and_die, args=(tmp_path,))
    rank.start()
    rank.join()
    worker, latest = int((tmp_path / "pid").read_text()), time.monotonic() + 30
    while state_of(worker) not in (None, "Z"):
        assert time.monotonic() < latest, os.kill(worker, signal.SIGKILL)
        time.sleep(0.1)


def test_memory_is_bounded_by_lanes_and_window_not_by_the_dataset(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "data", rows=40_000, rows_per_block=100, interactions=False, text=True)
    dataset = Dataset.open(writer.write())
    stream = PairStream(dataset, rows_global=64, lanes=2, window_blocks=4)
    bytes_per_row = sum(column.nbytes for column in writer.columns(0, 1000, 0).values()) / 1000
    held = 2 * 4 * 100 * bytes_per_row
    before, most = pa.total_allocated_bytes(), 0
    for rows in islice(stream, stream.steps_per_epoch):
        most = max(most, pa.total_allocated_bytes() - before)
        assert len(rows) == 64
    assert held / 2 < most < 2 * held
    assert most < 0.05 * 40_000 * bytes_per_row


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_texts_tokenised_while_reading_are_those_tokenised_before(
    tmp_path: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"a": f"word{i % 50} of {i % 7}", "n": i, "b": "" if i % 3 else "more", "d": f"doc {i % 9}"})
             for i in range(900)]  # fmt: skip
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    text = Text(max_tokens=4)
    query = {"a": text, "n": Numeric(), "b": text}
    config = DataConfig(dir="x", query=query, doc={"d": text}, tokenizer=TokenizerConfig(vocab_size=200))
    for name in ("tokens", "raw"):
        tables = PairTables(files=(tmp_path / "t.jsonl",), raw_text=name == "raw")
        make_pairs(config, tables, IngestTarget(tmp_path / name))
    raw = Dataset.open(tmp_path / "raw")
    assert (
        raw.layout.types["a"] == pa.large_string() and raw.catalogue.columns(np.arange(1))["d"].values.dtype == np.int32
    )
    before, while_reading = (steps(tmp_path / name, 20, num_workers=num_workers) for name in ("tokens", "raw"))
    assert all(same(a, b) for a, b in zip(before, while_reading, strict=True))
    held_out = [list(Dataset.open(tmp_path / name).iterate("test", 100)) for name in ("tokens", "raw")]
    assert all(same(a, b) for a, b in zip(*held_out, strict=True))
    # an added partition has the same kind
    make_pairs(config, PairTables(files=(tmp_path / "t.jsonl",)), IngestTarget(tmp_path / "raw", "more", append=True))
    assert len(steps(tmp_path / "raw", 40)) == 40
    monkeypatch.setattr("bigdssm.features.text.MAX_FIELD_BYTES", 10)
    stream = PairStream(raw, rows_global=ROWS_GLOBAL, lanes=LANES, max_bad_fraction=1.0)
    assert sum(map(len, islice(stream, 10))) == 10 * ROWS_GLOBAL - stream.rows_bad
    assert stream.rows_bad > 100
