"""The order of rows is a pure function of (seed, step), each epoch a permutation, and the same in every release."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from bigdssm.dataset.schema import shuffle_keys
from bigdssm.errors import ConfigError, DataError
from bigdssm.ingest.job import block_rows
from bigdssm.loader.order import Order


def uniform(rows: int, rows_per_block: int) -> np.ndarray:
    full, rest = divmod(rows, rows_per_block)
    return np.array([rows_per_block] * full + [rest] * (rest > 0), np.int32)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    rows = np.array(draw(st.lists(st.integers(1, 40), min_size=1, max_size=30)), np.int32)
    lanes = draw(st.integers(1, min(9, int(rows.sum()))))
    per_lane = draw(st.integers(1, max(1, int(rows.sum()) // lanes)))
    window = draw(st.integers(1, 6))
    seed = draw(st.integers(0, 2**63))
    return Order(rows, rows_global=lanes * per_lane, lanes=lanes, seed=seed, window_blocks=window)


def lane_epoch(order: Order, lane: int, epoch: int) -> np.ndarray:
    """Return the rows of one lane and epoch, from its windows."""
    parts, position, rows = [], 0, order.lane_rows(lane)
    while position < rows:
        window = order.window(epoch, lane, position)
        assert window.start == position
        parts.append(window.row_ids[window.order])
        position += len(window.order)
    return np.concatenate(parts)[:rows]


@settings(max_examples=60, deadline=None)
@given(orders(), st.integers(0, 5))
def test_an_epoch_gives_every_row_of_an_epoch_exactly_once(order: Order, epoch: int) -> None:
    rows = np.concatenate([lane_epoch(order, lane, epoch) for lane in range(order.lanes)])
    assert np.array_equal(np.sort(rows), np.arange(order.num_rows))


@settings(max_examples=60, deadline=None)
@given(orders())
def test_steps_run_through_the_lanes_without_a_gap(order: Order) -> None:
    steps = range(2 * order.steps_per_epoch + 1)
    for lane in range(order.lanes):
        given_rows = np.concatenate([order.row_ids(step, range(lane, lane + 1)) for step in steps])
        epochs = -(-len(given_rows) // order.lane_rows(lane))
        expected = np.concatenate([lane_epoch(order, lane, epoch) for epoch in range(epochs)])
        assert np.array_equal(given_rows, expected[: len(given_rows)])
    first = np.concatenate([order.row_ids(step) for step in range(order.steps_per_epoch)])
    assert len(np.unique(first)) == order.num_rows
    assert all(len(order.row_ids(step)) == order.rows_global for step in steps)


@settings(max_examples=40, deadline=None)
@given(orders(), st.lists(st.integers(0, 200), min_size=1, max_size=5))
def test_a_step_does_not_depend_on_previous_steps(order: Order, steps: list[int]) -> None:
    fresh = Order(
        order.rows, rows_global=order.rows_global, lanes=order.lanes, seed=order.seed, window_blocks=order.window_blocks
    )
    for step in steps:
        order.row_ids(step)
    assert np.array_equal(order.row_ids(steps[0]), fresh.row_ids(steps[0]))


GOLDEN = {0: "92c84697948b762d", 7: "a4cb80b53343b7c1"}  # by seed


@pytest.mark.parametrize("seed", GOLDEN)
def test_the_order_never_changes(seed: int) -> None:
    """A release that changes these hashes changes the rows of every resumed run."""
    rows = np.array([100 + 37 * i % 61 for i in range(53)], np.int32)
    order = Order(rows, rows_global=96, lanes=8, seed=seed, window_blocks=3)
    digest = xxhash.xxh3_64()
    for step in [*range(130), 10**6, 10**9]:
        digest.update(order.row_ids(step).astype("<i8").tobytes())
    assert digest.hexdigest() == GOLDEN[seed]


def test_neighbours_of_the_source_are_far_apart_and_epochs_differ(tmp_path: Path) -> None:
    """A million rows in the order of ingestion; the numbers are in docs/stream.md."""
    num_rows = 10**6
    rows_per_block = block_rows(num_rows)
    order = Order(uniform(num_rows, rows_per_block), rows_global=65536, lanes=8)
    epochs = []
    for epoch in range(2):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        epochs.append(np.concatenate([order.row_ids(step) for step in steps]))
    source_rows = written_order(num_rows)[epochs[0]]
    position = np.unique(source_rows, return_index=True)[1]
    assert np.abs(np.diff(position)).mean() >= 0.33 * num_rows  # neighbours in the source: steps apart
    assert np.abs(np.diff(source_rows)).mean() >= 0.33 * num_rows  # rows of one step: from all over the source
    # the order takes consecutive rows from all over the dataset …
    assert np.abs(np.diff(epochs[0])).mean() >= 0.3 * num_rows
    assert np.mean(epochs[0] == epochs[1]) < 1e-4
    assert np.mean(lane_epoch(order, 0, 0) == lane_epoch(order, 0, 1)) < 1e-4  # also without carried rows
    # … and mixes the blocks of a window: rows of one block rarely follow each other
    assert np.mean(epochs[0][1:] // rows_per_block == epochs[0][:-1] // rows_per_block) < 0.1


def written_order(num_rows: int, seed: int = 0) -> np.ndarray:
    """Return the source row per row of a dataset, in the shuffled order of ingested pairs."""
    return np.argsort(shuffle_keys(np.arange(num_rows), seed), kind="stable")


def test_every_lane_reads_every_shard_over_time() -> None:
    order = Order(uniform(64 * 100, 100), rows_global=64, lanes=8)
    blocks_per_shard, met = 8, [set() for _ in range(8)]
    for epoch in range(12):
        for lane in range(8):
            met[lane] |= set((order.window(epoch, lane, 0).blocks // blocks_per_shard).tolist())
    assert all(shards == set(range(8)) for shards in met)


def test_block_keys_are_uniform() -> None:
    """Over many epochs every block is equally often at every position (chi-square, 16 × 16 cells)."""
    counts = np.zeros((16, 16))
    for epoch in range(3000):
        order = Order(np.ones(16, np.int32), rows_global=16, lanes=1, seed=5)
        blocks = order.window(epoch, 0, 0).blocks
        counts[np.arange(16), blocks] += 1
    chi2 = ((counts - 3000 / 16) ** 2 / (3000 / 16)).sum()
    assert 150 < chi2 < 310  # 225 degrees of freedom, ± 4 sigma


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rows_global": 10, "lanes": 4}, ConfigError, "rows_global=10 must be a positive multiple of lanes=4"),
        ({"rows_global": 4, "lanes": 4, "window_blocks": 0}, ConfigError, "window_blocks=0"),
        ({"rows_global": 200, "lanes": 200}, DataError, "the split has 100 rows, at least 200"),
    ],
)
def test_inconsistent_sizes_are_refused(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Order(uniform(100, 10), **arguments)
