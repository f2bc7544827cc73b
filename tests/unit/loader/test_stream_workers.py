"""Batches of loader processes: bit-identical for any number of processes, and built entirely there."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch

from bigdssm.cluster.launcher import children_of
from bigdssm.config import NegativesConfig, StageConfig
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.negatives import NegativeDocuments
from bigdssm.dataset.rows import Rows
from bigdssm.errors import DataError
from bigdssm.features.base import OUT_OF_VOCABULARY, PADDING
from bigdssm.loader.batch import Batch, ListLengths
from bigdssm.loader.messages import ALIGNMENT, Message
from bigdssm.loader.order import Order
from bigdssm.loader.stream import PairStream
from bigdssm.loader.workers import fork_server
from bigdssm.losses import Softmax
from bigdssm.retrieval.hard_negatives import HardNegatives, UniformNegatives, window_records
from bigdssm.training.batches import BatchBuilder, read_batches
from tests.tiny_datasets import Writer

LANES, ROWS_GLOBAL = 6, 60
CPU = torch.device("cpu")
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # else loader processes import pytest


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Sequences with up to three queries per row."""
    return Dataset.open(Writer(tmp_path_factory.mktemp("pieces") / "data", targets_per_row=3).write())


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    writer = Writer(tmp_path_factory.mktemp("texts") / "data", text=True, interactions=False)
    return Dataset.open(writer.write())


def values(part: Any) -> Iterator[tuple[str, bytes]]:
    """Yield type, shape and bytes of every tensor and array of a batch, in order."""
    if isinstance(part, torch.Tensor | np.ndarray):
        array = part if isinstance(part, np.ndarray) else part.numpy()
        yield f"{type(part).__name__} {array.dtype} {array.shape}", array.tobytes()
    elif isinstance(part, dict):
        for name, value in part.items():
            yield name, b""
            yield from values(value)
    elif isinstance(part, Batch | ListLengths):
        for field in fields(part):
            yield field.name, b""
            yield from values(getattr(part, field.name))
    elif isinstance(part, tuple):
        for value in part:
            yield from values(value)
    else:
        yield repr(part), b""


def batches(
    dataset: Dataset, num_workers: int, num: int, start_step: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    stream = PairStream(
        dataset, rows_global=ROWS_GLOBAL, lanes=LANES, rank=rank, world_size=world_size, num_workers=num_workers,
        start_step=start_step, window_blocks=2,
    )  # fmt: skip
    mask = "batch" if dataset.sequences is None else "user"
    stage = StageConfig(loss=Softmax(), negatives=NegativesConfig(hard=3, uniform=7, mask=mask))
    negatives = UniformNegatives(NegativeDocuments(dataset.catalogue.num_docs))
    return read_batches(stream, BatchBuilder(stream, stage, 5, negatives), CPU, num)


@pytest.mark.parametrize("kind", ["pieces", "texts"])
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_batches_are_the_same_to_the_bit_on_any_number_of_loader_processes(
    kind: str, num_workers: int, request: pytest.FixtureRequest
) -> None:
    """From the beginning, and after a resume within an epoch."""
    dataset = request.getfixturevalue(kind)
    here = [list(values(batch)) for batch in batches(dataset, 0, 21)]
    assert len({str(batch) for batch in here}) == 21
    for start in (0, 8):
        there = [list(values(batch)) for batch in batches(dataset, num_workers, 21 - start, start)]
        assert there == here[start:]
    for rank in (0, 1):  # with three lanes each
        one, other = (list(batches(dataset, number, 5, 3, rank, 2)) for number in (0, num_workers))
        assert all(len(batch.row_ids) == ROWS_GLOBAL // 2 for batch in one)
        assert [list(values(batch)) for batch in one] == [list(values(batch)) for batch in other]


def test_dropped_ids_are_the_same_on_any_number_of_ranks(pieces: Dataset) -> None:
    """Of documents and of histories, also without sharded tables; other features of documents stay."""
    stage = StageConfig(loss=Softmax(), negatives=NegativesConfig(columns="catalogue", mask="none"))

    def codes(share: float, world_size: int) -> dict[tuple[Any, ...], int]:
        found: dict[tuple[Any, ...], int] = {}
        for rank in range(world_size):
            stream = PairStream(pieces, rows_global=ROWS_GLOBAL, lanes=LANES, rank=rank, world_size=world_size)
            for batch in read_batches(stream, BatchBuilder(stream, stage, 5, id_dropout=share), CPU, 3):
                for name, ids, features in (("doc", batch.doc_ids, batch.doc), ("query", batch.row_ids, batch.query)):
                    for feature, values in features.items():
                        for row, cells in zip(ids.tolist(), values.reshape(len(ids), -1).tolist(), strict=True):
                            filled = [cell for cell in cells if cell != PADDING]
                            found |= {(batch.step, name, feature, row, at): cell for at, cell in enumerate(filled)}
        return found

    all_ids, some = codes(0.0, 1), codes(0.4, 1)
    changed = {key: some[key] for key in some if some[key] != all_ids[key]}
    assert codes(0.4, 2) == some and set(changed.values()) == {OUT_OF_VOCABULARY}
    ids = {("doc", "item"), ("query", "history")}
    assert {key[1:3] for key in changed} == ids
    for side in ids:
        number = sum(key[1:3] == side for key in some)
        assert sum(key[1:3] == side for key in changed) / number == pytest.approx(0.4, abs=0.1)


def where(rows: Rows) -> tuple[int, int]:
    """Return the step and the process that builds it."""
    return rows.step, os.getpid()


@pytest.mark.parametrize("num_workers", [1, 3])
def test_every_loader_process_makes_its_share_of_the_steps(pieces: Dataset, num_workers: int) -> None:
    stream = PairStream(pieces, rows_global=ROWS_GLOBAL, lanes=LANES, num_workers=num_workers)
    with closing(stream.map_steps(where, 9)) as made:
        steps, processes = zip(*made, strict=True)
    assert steps == tuple(range(9)) and os.getpid() not in processes
    assert len(set(processes)) == num_workers and processes == processes[:num_workers] * (9 // num_workers)


@pytest.mark.parametrize("num_workers", [0, 3])
def test_no_batch_is_built_after_the_last_requested_step(pieces: Dataset, num_workers: int) -> None:
    """Later steps have other mining windows: their rows have no hard negatives yet."""
    stream = PairStream(pieces, rows_global=ROWS_GLOBAL, lanes=LANES, num_workers=num_workers)
    keys = np.unique(np.concatenate([rows.query_keys for rows in islice(stream, 5)]))
    stream.close()
    again = PairStream(pieces, rows_global=ROWS_GLOBAL, lanes=LANES, num_workers=num_workers)
    stage = StageConfig(loss=Softmax(), negatives=NegativesConfig(hard=2))
    first = HardNegatives(window_records(keys, np.zeros((len(keys), 1), np.int32)))
    make = BatchBuilder(again, stage, 0, first)
    made = [batch.negatives for batch in read_batches(again, make, CPU, 5)]
    assert [int((negatives >= 0).sum(dim=1).max()) for negatives in made if negatives is not None] == [1] * 5
    assert again.step == 5 and not again.counts().failed
    make.hard_negatives = UniformNegatives(NegativeDocuments(pieces.catalogue.num_docs))
    assert [batch.step for batch in read_batches(again, make, CPU, 4)] == [5, 6, 7, 8]
    make.hard_negatives = first
    assert [len(batch.row_ids) for batch in read_batches(again, make, CPU, 1)] == [
        0
    ]  # a rank that failed: the others receive the error
    assert again.counts().failed
    with pytest.raises(DataError, match=r"has no negatives for row .*mine again"):
        again.check()


def failing_at_7(rows: Rows) -> int:
    """Fail at a step with rows, as missing hard negatives do."""
    if rows.step == 7 and len(rows):
        raise DataError("planted")
    return len(rows)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_a_batch_that_cannot_be_built_stops_the_rank_at_its_step(pieces: Dataset, num_workers: int) -> None:
    stream = PairStream(pieces, rows_global=ROWS_GLOBAL, lanes=LANES, num_workers=num_workers)
    with closing(stream.map_steps(failing_at_7, 12)) as made:
        assert list(islice(made, 7)) == [ROWS_GLOBAL] * 7 and not stream.counts().failed
        assert list(made) == [0] * 5 and stream.counts().failed
    with pytest.raises(DataError, match=r"rank 0 cannot read .*planted"):
        stream.check()


class PlantedOrder(Order):
    """Calls `planted` before lane 0 of step 8 is read."""

    planted: Callable[[], None]

    def source_step(self, step: int, lane: int) -> tuple[Order, int]:
        if (step, lane) == (8, 0):
            self.planted()
        return super().source_step(step, lane)


def with_planted_order(stream: PairStream, planted: Callable[[], None]) -> PairStream:
    stream.order.__class__ = PlantedOrder
    stream.order.planted = planted
    return stream


@pytest.mark.parametrize("num_workers", [2, 3])
def test_lanes_that_one_process_cannot_read_stop_the_rank_at_that_step(pieces: Dataset, num_workers: int) -> None:
    """For any process of the step: the error is sent in place of the part."""

    def fail() -> None:
        raise DataError("planted")

    stream = PairStream(pieces, rows_global=ROWS_GLOBAL, lanes=LANES, num_workers=num_workers)
    with closing(with_planted_order(stream, fail).map_steps(len, 12)) as made:
        assert list(made) == [ROWS_GLOBAL] * 8 + [0] * 4
    with pytest.raises(DataError, match=r"rank 0 cannot read .*planted"):
        stream.check()


@pytest.mark.timeout(60)  # a hang is what it is for
def test_a_part_that_cannot_be_sent_to_another_process_stops_the_rank(pieces: Dataset) -> None:
    """The other process waits for the part, and the rank for the other process."""
    stream = PairStream(pieces, rows_global=ROWS_GLOBAL, lanes=LANES, num_workers=2)

    def fail() -> None:
        def reduce(rows: Rows) -> Any:
            raise TypeError("cannot pickle 'planted' object")

        Rows.__reduce__ = reduce

    with closing(with_planted_order(stream, fail).map_steps(len, 12)) as made:
        assert list(made) == [ROWS_GLOBAL] * 9 + [0] * 3  # process 0 sends its part of step 9
    with pytest.raises(DataError, match=r"rank 0 cannot read .*cannot pickle 'planted' object"):
        stream.check()


def test_a_batch_travels_in_one_piece_of_shared_memory(pieces: Dataset) -> None:
    """With one file of shared memory per tensor there would be 20 per batch."""
    (here,) = batches(pieces, 0, 1)
    (sent,) = batches(pieces, 1, 1)
    assert list(values(sent)) == list(values(here))
    before = {path.name for path in Path("/proc/self/fd").iterdir()}
    message = Message.of(here)
    assert len({path.name for path in Path("/proc/self/fd").iterdir()} - before) == 1
    back = message.read()
    assert list(values(back)) == list(values(here))
    first, *_, last = sorted(tensor.data_ptr() for tensor in back.tensors() if tensor.nbytes)
    assert last - first < sum(message.sizes) + ALIGNMENT * len(message.sizes)
    assert all(tensor.data_ptr() % ALIGNMENT == 0 and tensor.is_contiguous() for tensor in back.tensors())
    back.row_ids.zero_()  # writable


def test_arrays_of_files_are_mapped_by_loader_processes(tmp_path: Path) -> None:
    """Also a part of one; their contents are not sent."""
    path = tmp_path / "vectors.npy"
    np.save(path, np.arange(200_000, dtype=np.int32).reshape(-1, 2))
    mapped = np.load(path, mmap_mode="r")
    for array in (mapped, mapped[70_000:70_100]):
        with closing(Message.of(array, by_value=True)) as message:
            assert sum(message.sizes) < 1000
            copy = Message(os.dup(message.file), *message[1:]).read()
        assert isinstance(copy, np.memmap) and not copy.flags.writeable
        np.testing.assert_array_equal(copy, array)
    columns = mapped[:, 1]  # not contiguous
    np.testing.assert_array_equal(Message.of(columns, by_value=True).read(), columns)


def test_loader_processes_share_the_memory_of_a_batch_builder(pieces: Dataset) -> None:
    """A write to an array in one of them is its own."""
    array = np.zeros(1_000_000)
    stream = PairStream(pieces, rows_global=ROWS_GLOBAL, lanes=LANES, num_workers=2)

    def written(rows: Rows) -> tuple[float, int]:
        maps = Path("/proc/self/smaps").read_text().split("memfd:bigdssm")
        private = [int(re.search(r"Private_Dirty: +(\d+)", entry)[1]) for entry in maps[1:]]
        value = float(array[0])
        array[0] += 1
        return value, max(private)

    with closing(stream.map_steps(written, 6)) as made:
        values_of_steps, private_kb = zip(*made, strict=True)
    assert values_of_steps == (0, 0, 1, 1, 2, 2)
    assert max(private_kb) < 1000  # of 8 MB


def test_loader_processes_that_wait_for_each_other_end_at_once(pieces: Dataset) -> None:
    stream = PairStream(pieces, rows_global=ROWS_GLOBAL, lanes=LANES, num_workers=3)
    before = time.monotonic()
    for _ in range(3):
        with closing(stream.map_steps(len)) as made:
            assert next(made) == ROWS_GLOBAL
    assert fork_server._process is not None
    while children_of(fork_server._process.pid):
        assert time.monotonic() - before < 10
        time.sleep(0.05)


def test_a_process_that_is_done_ends_when_others_have_its_parts(pieces: Dataset) -> None:
    """The last part of process 1, larger than a pipe, is read a second after its iteration has ended."""
    stream = PairStream(pieces, rows_global=12_000, lanes=LANES, num_workers=2)
    with closing(with_planted_order(stream, partial(time.sleep, 1)).map_steps(len, 9)) as made:
        assert list(made) == [12_000] * 9
