"""Concurrent writers to one path: each one succeeds or is refused; none overwrites the work of another."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bigdssm.config import DataConfig
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import DataError
from bigdssm.features import Categorical
from bigdssm.ingest import dataset_writer
from bigdssm.ingest.job import IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs
from bigdssm.retrieval.shards import ShardedFolder, Share
from bigdssm.utils.atomic import WriterLock

CONFIG = DataConfig(dir="", query={"q": Categorical()}, doc={"d": Categorical()})
PROCESSES = 4


def make(out: Path, partition: str = "base", *, append: bool = False, overwrite: bool = False) -> None:
    table = out.with_name(f"{out.name}-{partition}.csv")
    table.write_text("q,d\n" + "".join(f"{partition}{row},{row}\n" for row in range(4)))
    target = IngestTarget(out, partition, append=append, overwrite=overwrite, processes=1)
    make_pairs(CONFIG, PairTables((table,), split="train"), target)


def at_once(work: Callable[[int], None]) -> list[bool]:
    """Run `work` in concurrent processes; return per process whether it succeeded or was refused by a lock."""
    forked = multiprocessing.get_context("fork")
    barrier, answers = forked.Barrier(PROCESSES), forked.SimpleQueue()

    def run(number: int) -> None:
        barrier.wait()
        try:
            work(number)
            answers.put((number, "done"))
        except DataError as error:
            answers.put((number, str(error)))
        except BaseException as error:
            answers.put((number, repr(error)))
        os._exit(0)

    processes = [forked.Process(target=run, args=(number,)) for number in range(PROCESSES)]
    for process in processes:
        process.start()
    found = dict(answers.get() for _ in processes)
    for process in processes:
        process.join()
    others = [text for text in found.values() if text != "done" and "another process is writing" not in text]
    assert not others
    return [found[number] == "done" for number in range(PROCESSES)]


def test_every_append_that_succeeds_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out)
    expected = {"base"}
    for turn in range(4):

        def append(number: int, turn: int = turn) -> None:
            time.sleep(0.004 * number * turn)  # the next one starts while the files of the last one are moved
            make(out, f"{turn}-{number}", append=True)

        expected |= {f"{turn}-{number}" for number, done in enumerate(at_once(append)) if done}
        dataset = Dataset.open(out)
        assert {partition.name for partition in dataset.partitions} == expected
        assert dataset.num_rows("train") == 4 * len(expected)
    assert not list(out.glob(".*")) and not list(tmp_path.glob(".*"))


def others(kind: str, out: Path) -> None:
    """Start another ingestion to the same path."""
    if kind == "append":
        make(out, "other", append=True)
    else:
        make(out, "other", overwrite=kind == "overwrite")


@contextmanager
def within(monkeypatch: pytest.MonkeyPatch, name: str, then: Callable[[], None]) -> Iterator[None]:
    """Call `then` within a function of the writer's module."""
    original = getattr(dataset_writer, name)
    with monkeypatch.context() as patch:

        def hooked(*args: Any) -> Any:
            patch.setattr(dataset_writer, name, original)
            result = original(*args)
            then()
            return result

        patch.setattr(dataset_writer, name, hooked)
        yield


@pytest.mark.parametrize(
    ("name", "kind", "other"),
    [
        ("read_dataset_json", "append", "append"),
        ("read_dataset_json", "append", "overwrite"),
        ("_check_free", "new", "new"),
        ("_check_free", "overwrite", "append"),
        ("replace_folder", "new", "overwrite"),
    ],
)
def test_the_state_for_decisions_is_read_under_the_lock(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, kind: str, other: str
) -> None:
    """Another process starts right after the state is read, or before the last rename."""
    out = tmp_path / "out"
    if kind != "new":
        make(out)

    def refused() -> None:
        with pytest.raises(DataError, match=r"another process is writing .*/out"):
            others(other, out)

    with within(monkeypatch, name, refused):
        make(out, "own", append=kind == "append", overwrite=kind == "overwrite")
    names = ["base", "own"] if kind == "append" else ["own"]
    assert [partition.name for partition in Dataset.open(out).partitions] == names


def test_a_lock_on_a_removed_file_is_taken_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The holder removes its file after another process opened it and before it is locked."""
    path = tmp_path / ".lock"
    first = WriterLock(path, tmp_path)
    flock = dataset_writer.WriterLock.__init__.__globals__["fcntl"].flock

    def late(*args: Any) -> None:
        first.close()
        flock(*args)

    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", late)
        second = WriterLock(path, tmp_path)
    with pytest.raises(DataError, match="another process is writing"):
        WriterLock(path, tmp_path)
    second.close()
    second.close()
    assert not path.exists()


@contextmanager
def held(work: Callable[[], Any]) -> Iterator[None]:
    """Run the block while another process is in the middle of `work`."""
    forked = multiprocessing.get_context("fork")
    begun, ended = forked.Event(), forked.Event()

    def run() -> None:
        result = work()  # held until the process ends
        begun.set()
        ended.wait()
        del result
        os._exit(0)

    process = forked.Process(target=run)
    process.start()
    assert begun.wait(20)
    try:
        yield
    finally:
        ended.set()
        process.join()


def test_shards_of_one_folder_are_of_one_job_at_a_time(tmp_path: Path) -> None:
    """A folder is locked by one job, whose ranks share it; another job must not use its finished shards."""
    out = tmp_path / "vectors"

    def begin(model: str) -> ShardedFolder:
        return ShardedFolder(out, {"model": model}, 8, Share(rows_per_chunk=4))

    with held(lambda: begin("a")):
        assert [shard for shard, *_ in begin("a").pending("rows")] == [0, 1]
        with pytest.raises(DataError, match=r"another process is writing .*/vectors with other inputs or options"):
            begin("b")
        assert begin("a").resumed == 2, "what is done stays"
    filled = begin("b")
    assert [shard for shard, *_ in filled.pending("rows")] == [0, 1]
    assert filled.finish(lambda aside: None)
    assert not list(out.iterdir())
