"""Several sources in one stream: exact shares by weight, and all guarantees of a single source."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from bigdssm.config import DataConfig, SourceConfig, TokenizerConfig
from bigdssm.dataset.dataset import Dataset, open_dataset
from bigdssm.dataset.partition import ROUND_STEPS, steps_per_round
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Categorical, Numeric, Text
from bigdssm.ingest.job import IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs
from bigdssm.loader.batch import Collator
from bigdssm.loader.order import MixedOrder, Order
from bigdssm.loader.stream import PairStream
from tests.tiny_datasets import NUM_DOCS, Writer

NUMBERS = {"rows_global": 48, "lanes": 8}


@st.composite
def mixtures(draw: st.DrawFn) -> Callable[[], MixedOrder]:
    """Return a function that opens the mixture again."""
    lanes, per_lane = draw(st.integers(1, 8)), draw(st.integers(1, 5))
    weights = draw(st.lists(st.floats(0.01, 1), min_size=1, max_size=4))
    blocks = [draw(st.lists(st.integers(1, 20), min_size=lanes, max_size=20)) for _ in weights]
    seed = draw(st.integers(0, 2**63))

    def make() -> MixedOrder:
        first_rows = np.cumsum([0, *map(sum, blocks)]).tolist()
        orders = [
            Order(np.array(b, np.int32), rows_global=lanes * per_lane, lanes=lanes, seed=seed + i, first_row=first)
            for i, (b, first) in enumerate(zip(blocks, first_rows, strict=False))
        ]
        return MixedOrder(orders, steps_per_round([""] * len(weights), weights), seed)

    make.weights = weights  # type: ignore[attr-defined]
    return make


@settings(max_examples=40, deadline=None)
@given(mixtures())
def test_every_source_runs_through_its_own_epochs_and_has_its_share(make: Callable[[], MixedOrder]) -> None:
    order, weights = make(), np.array(make.weights)  # type: ignore[attr-defined]
    for lane in range(order.lanes):
        steps: list[list[int]] = [[] for _ in weights]
        for step in range(2 * ROUND_STEPS + 3):
            source, source_step_number = order.source_step(step, lane)
            steps[order.orders.index(source)].append(source_step_number)
        assert all(own == list(range(len(own))) for own in steps)  # no row of a source is skipped, none comes twice
        shares = np.array(
            [
                sum(source_step_number < count for source_step_number in own)
                for own, count in zip(steps, order.steps_per_round, strict=True)
            ]
        )
        assert (
            shares.sum() == ROUND_STEPS
            and np.abs(shares / ROUND_STEPS - weights / weights.sum()).max() <= 1 / ROUND_STEPS
        )


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(mixtures(), st.lists(st.integers(0, 10**7), min_size=1, max_size=4))
def test_a_mixture_step_does_not_depend_on_previous_steps_or_instances(
    make: Callable[[], MixedOrder], steps: list[int]
) -> None:
    used = make()
    for step in [*range(20), *steps]:
        used.row_ids(step)
    for step in steps:
        whole = used.row_ids(step)
        assert np.array_equal(whole, make().row_ids(step))
        for world_size in (2, 3, 4, 8):
            shares = [
                make().row_ids(step, range(k, used.lanes, world_size)) for k in range(min(world_size, used.lanes))
            ]
            assert np.array_equal(np.sort(np.concatenate(shares)), np.sort(whole))


def test_the_order_of_a_mixture_never_changes() -> None:
    """A release that changes this hash changes the rows of every resumed run."""
    sizes = [np.array([100 + 37 * i % 61 for i in range(n)], np.int32) for n in (53, 20)]
    orders = [Order(rows, rows_global=96, lanes=8, seed=i, window_blocks=3) for i, rows in enumerate(sizes)]
    digest = xxhash.xxh3_64()
    order = MixedOrder(orders, [700, 300], 5)
    for step in [*range(130), 10**6, 10**9]:
        digest.update(order.row_ids(step).astype("<i8").tobytes())
    assert digest.hexdigest() == "f9ebaa53c79fd45c"


def test_weights_too_small_for_a_thousandth_are_refused() -> None:
    assert steps_per_round("ab", [2, 1]) == [667, 333]
    with pytest.raises(ConfigError, match=r"b has weight 0.0001, needs at least 0.0010001, a thousandth"):
        steps_per_round("ab", [1, 0.0001])


def config(folder: Path, *sources: SourceConfig) -> DataConfig:
    return DataConfig(dir=str(folder), mixture=list(sources))


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three partitions of 300 rows each; a row of day d has the query id 10 × its number in the day + d."""
    return Writer(tmp_path_factory.mktemp("days") / "data", rows=300).write("day0", "day1", "day2")


WEIGHTED = (SourceConfig(partitions=("day2",), weight=3), SourceConfig(partitions=("day0", "day1"), weight=1))


def day_and_row(row_ids: np.ndarray) -> np.ndarray:
    """Return a row's number in its partition, times 10, plus the day: day2 is first in the mixture, then day0, day1."""
    place, local = np.divmod(row_ids, 300)
    return local * 10 + np.array([2, 0, 1])[place]


@pytest.mark.slow
def test_partitions_by_weight_on_any_ranks_and_workers(days: Path) -> None:
    dataset = open_dataset(config(days, *WEIGHTED))
    order = PairStream(dataset, **NUMBERS).order
    new = 0
    for world_size, num_workers in [(1, 0), (1, 4), (2, 2), (3, 1), (8, 0)]:
        ranks = [
            PairStream(dataset, **NUMBERS, rank=rank, world_size=world_size, num_workers=num_workers)
            for rank in range(world_size)
        ]
        for step in range(30):
            parts = [next(stream) for stream in ranks]
            for rows in parts:
                local, day = np.divmod(day_and_row(rows.row_ids), 10)
                assert np.array_equal(rows.position, (local + day) % 30)
                assert np.array_equal(rows.query["age"], local % 11 + 100 * day)
            together = np.sort(np.concatenate([rows.row_ids for rows in parts]))
            assert np.array_equal(together, np.sort(order.row_ids(step)))
            from_new = (together < 300).mean()
            new += from_new
            assert from_new * 8 == int(from_new * 8)  # whole lanes
        for stream in ranks:
            stream.close()
    assert 0.6 < new / 150 < 0.9
    assert dataset.num_rows("train") == 900 and len(dataset.index("train").rows) == 15


def test_a_mixture_resumes_from_any_step_on_other_ranks_and_workers(days: Path) -> None:
    dataset = open_dataset(config(days, *WEIGHTED))
    whole = [rows.row_ids for rows in islice(PairStream(dataset, **NUMBERS), 60)]
    stream = PairStream(dataset, **NUMBERS, rank=1, world_size=2, num_workers=2)
    for _ in range(37):
        next(stream)
    state = json.loads(json.dumps(stream.state()))
    stream.close()
    again = open_dataset(config(days, *WEIGHTED))
    ranks = [
        PairStream(again, **NUMBERS, rank=k, world_size=3, num_workers=1, start_step=state["step"]) for k in range(3)
    ]
    assert all(stream.check_state(state) for stream in ranks)
    for expected in whole[37:]:
        together = np.concatenate([next(stream).row_ids for stream in ranks])
        assert np.array_equal(np.sort(together), np.sort(expected))


def test_a_changed_mixture_is_refused_by_name(days: Path) -> None:
    def stream(*sources: SourceConfig) -> PairStream:
        return PairStream(open_dataset(config(days, *sources)), **NUMBERS)

    new, old = WEIGHTED
    state = stream(*WEIGHTED).state()
    assert state["mixture"] == [["day2", 750], ["day0+day1", 250]]
    for changed, message in [
        (stream(new, replace(old, weight=2)), r"mixture was \[\['day2', 750\], .*\], is \[\['day2', 600\]"),
        (stream(old, new), "mixture was "),
        (stream(new, replace(old, partitions=("day0",))), "partition day1 is missing"),
        (PairStream(days, **NUMBERS), r"mixture was \[.*\], is None"),
    ]:
        with pytest.raises(DataError, match=message):
            changed.check_state(state)
    with pytest.raises(DataError, match="mixture was None, is"):
        stream(*WEIGHTED).check_state(PairStream(days, **NUMBERS).state())
    # a new partition in it starts a new segment; the old ones must be unchanged
    before = PairStream(Dataset.open(days, ["day0", "day1"]), **NUMBERS).state()
    assert stream(*WEIGHTED).check_state(before) is False
    with pytest.raises(DataError, match="partition day0 has changed"):
        before["partitions"][0][1] = "another"
        stream(*WEIGHTED).check_state(before)
    with pytest.raises(DataError, match="rows_global was 48, is 96"):
        PairStream(open_dataset(config(days, *WEIGHTED)), rows_global=96, lanes=8).check_state(
            PairStream(Dataset.open(days, ["day0"]), **NUMBERS).state()
        )


@pytest.mark.slow
def test_memory_is_bounded_by_lanes_window_and_sources(tmp_path: Path) -> None:
    """One window per lane and source, and one more during loading; independent of partitions and duration."""
    lanes, window, rows_per_block, num_sources = 4, 3, 100, 3
    writer = Writer(tmp_path / "data", rows=12_000, rows_per_block=rows_per_block, interactions=False, text=True)
    writer.write("a", "b", "c")
    sources = [SourceConfig(partitions=(name,), weight=weight) for name, weight in (("a", 5), ("b", 3), ("c", 2))]
    dataset = open_dataset(config(tmp_path / "data", *sources))
    stream = PairStream(dataset, rows_global=64, lanes=lanes, window_blocks=window)
    bytes_per_row = sum(column.nbytes for column in writer.columns(0, 1000, 0).values()) / 1000
    window_bytes = window * rows_per_block * bytes_per_row
    before, most = pa.total_allocated_bytes(), 0
    for rows in islice(stream, 2 * stream.steps_per_epoch):
        most = max(most, pa.total_allocated_bytes() - before)
        assert len(rows) == 64
    held = lanes * num_sources * window_bytes
    assert held / 2 < most < held + 2 * window_bytes, (most, held)  # the window being loaded, and its reordered copy
    assert most < 0.15 * 36_000 * bytes_per_row


WORDS = DataConfig(
    dir="data",
    query={"words": Text(max_tokens=8)},
    doc={"kind": Categorical(), "size": Numeric()},
    tokenizer=TokenizerConfig(vocab_size=200),
)


def write_pairs(folder: Path, name: str, first: int, count: int, like: Path | None = None) -> Path:
    rows = [
        {"words": f"word{i % 50} of {name}", "kind": f"kind {i % 40}", "size": i % 40 + first}
        for i in range(first, first + count)
    ]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = PairTables(files=(folder / f"{name}.jsonl",), split="train")
    make_pairs(WORDS, tables, IngestTarget(folder / name, like=like))
    return folder / name


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pairs")
    big = write_pairs(folder, "big", 0, 3000)
    return big, write_pairs(folder, "small", 1000, 400, like=big)


@pytest.mark.slow
def test_datasets_with_catalogues_of_their_own(pairs: tuple[Path, Path]) -> None:
    big, small = pairs
    mixed = config(big, SourceConfig(weight=1), SourceConfig(dir=str(small), weight=1))
    dataset = open_dataset(mixed)
    assert [p.name for p in dataset.partitions] == ["base", "small/base"]
    assert dataset.catalogue.num_docs == 80 and dataset.num_rows("train") == 3400
    stream, collate = PairStream(dataset, num_workers=1, **NUMBERS), Collator(dataset.schema, dataset.catalogue)
    met = np.zeros(80)
    for rows in islice(stream, 400):
        batch = collate(rows)
        is_small = rows.row_ids >= 3000
        assert np.array_equal(batch.doc_rows[batch.positive] >= 40, is_small)
        sizes = batch.doc["size"][batch.positive].numpy()
        assert np.array_equal(sizes >= 1000, is_small)
        met += np.bincount(rows.doc_rows, minlength=80)
    expected = stream.doc_weights()
    stream.close()
    assert expected[:40].sum() == pytest.approx(expected[40:].sum()) == pytest.approx(1700)
    assert dataset.doc_counts().sum() == 3400
    assert np.abs(met[:40].sum() / met.sum() - 0.5) < 0.05
    one = open_dataset(config(big, SourceConfig(dir=str(big)), SourceConfig(dir=str(small))))
    assert [p.name for p in one.partitions] == ["base", "small/base"]  # the same, whether data.dir is named or not


def test_incompatible_sources_are_refused(pairs: tuple[Path, Path], days: Path, tmp_path: Path) -> None:
    big, _ = pairs
    other = write_pairs(tmp_path, "other", 7, 500)
    other_words = replace(WORDS, query={"words": Text(max_tokens=9)})
    refused = [
        (
            SourceConfig(dir=str(other)),
            r"doc\.kind was fitted to different data \(40 values, 40 .*; build it with .*--like",
        ),
        (SourceConfig(), "has the partition base twice"),
        (SourceConfig(dir=str(days)), "query features"),
        (SourceConfig(partitions=("day9",)), "has no partition 'day9'"),
    ]
    for source, message in refused:
        with pytest.raises((ConfigError, DataError), match=message):
            open_dataset(config(big, SourceConfig(), source))
    with pytest.raises(ConfigError, match=r"query\.words\.max_tokens=9 against 8"):
        make_pairs(other_words, PairTables(files=(tmp_path / "other.jsonl",)), IngestTarget(tmp_path / "x", like=big))
    tiny = write_pairs(tmp_path, "tiny", 0, 5, like=big)
    dataset = open_dataset(config(big, SourceConfig(), SourceConfig(dir=str(tiny))))
    with pytest.raises(DataError, match=r"data\.mixture: tiny/base is too small: the split has 5 rows, at least 8"):
        PairStream(dataset, **NUMBERS)


def test_histories_need_one_catalogue(days: Path, tmp_path: Path) -> None:
    writer = Writer(tmp_path / "other", rows=300)
    other = writer.write("base")
    both = config(days, SourceConfig(partitions=("day0",)), SourceConfig(dir=str(other)))
    dataset = open_dataset(both)  # the same catalogue in two folders is one
    assert dataset.catalogue.num_docs == NUM_DOCS
    content = json.loads((other / "dataset.json").read_text())
    content["catalogue"][0]["checksum"] = "0"
    (other / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(
        ConfigError, match="their catalogues differ, but datasets with histories must share one catalogue"
    ):
        open_dataset(both)
