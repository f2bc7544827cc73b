"""Tables sharded by rows against dense ones: values, gradients, optimizers, traffic, and files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bigdssm.tables.optimizers  # noqa: F401, registers them
from bigdssm.config import TABLE_OPTIMIZERS
from bigdssm.config.components import TableOptimizerConfig
from bigdssm.errors import CheckpointError
from bigdssm.loader.batch import Batch
from bigdssm.tables.files import MappedTables, load_tables, row_file, store_sources, write_row_file
from bigdssm.tables.rows import SHARDS, RowPartition, TableSpec, initial_rows, shard_of, table_key
from bigdssm.tables.sharded import ShardedTables
from bigdssm.training.batches import drop_ids

from .spawn import Pool

SPECS = (TableSpec("items", 5000, 8, std=0.1), TableSpec("users", 300, 8), TableSpec("tags", 70, 3, std=1.0))
SEED, STEPS, ALL_RANKS = 3, 5, 3


def batch(step: int, rank: int, name: str) -> tuple[np.ndarray, Tensor]:
    """Return codes int64 [n, 4] of a rank, with padding and repetitions, and the weights [n, 4, d] of the loss."""
    random = np.random.RandomState([step, rank, len(name)])
    spec = next(spec for spec in SPECS if spec.name == name)
    n = 0 if (step, rank) == (1, 1) else 6 + rank
    codes = (spec.rows * random.rand(n, 4) ** 3).astype(np.int64)
    return codes, torch.from_numpy(random.randn(n, 4, spec.dim).astype(np.float32))


def loss_of(vectors: Tensor, weights: Tensor) -> Tensor:
    return (vectors * weights).sum() + vectors.sin().sum()


def optimizer_of(name: str) -> TableOptimizerConfig:
    return TABLE_OPTIMIZERS.classes[name](lr=0.1)  # type: ignore[call-arg]


def train(
    rank: int, world_size: int, optimizer: str, coefficient: float, chunks: int, folder: Path | None, steps: range,
    saved: Any = None,
) -> tuple[dict[str, Tensor], list[float], dict[str, Any], int]:  # fmt: skip
    """Train on this rank's part of ALL_RANKS shares; return the whole tables, squared norms, content and bytes."""
    tables = ShardedTables(SPECS, optimizer_of(optimizer), SEED, folder=folder)
    for name, contents in (saved or {}).items():
        for content in contents:
            owned = tables.partition.owner(content["rows"].numpy()) == rank
            tables.stores[name].load({key: value[torch.from_numpy(owned)] for key, value in content.items()})
    norms = []
    tables.steps = steps.start
    for step in steps:
        shares = range(rank, ALL_RANKS, world_size)
        batches = {spec.name: [batch(step, share, spec.name) for share in shares] for spec in SPECS}
        rows = {
            name: np.unique(np.concatenate([codes.ravel() for codes, _ in parts])) for name, parts in batches.items()
        }
        rows = {name: found[found > 0] for name, found in rows.items()}
        working = tables.fetch(rows)
        for name, parts in batches.items():
            for codes, weights in parts:
                positions = torch.from_numpy(np.where(codes > 0, np.searchsorted(rows[name], codes) + 1, 0))
                for some, w in zip(positions.chunk(chunks), weights.chunk(chunks), strict=True):
                    # the mean over ranks is the mean over the shares
                    (loss_of(working.look_up(name, some), w) * world_size / ALL_RANKS).backward()
        norms.append(float(tables.reduce(working)))
        tables.commit(coefficient, 1.0)
    whole = {spec.name: tables.look_up(spec.name, torch.arange(spec.rows)) for spec in SPECS}
    content = {name: store.content(tables.steps, states=True) for name, store in tables.stores.items()}
    return whole, norms, content, tables.traffic.sent


class Dense:
    """The same tables as dense weights, with the gradient of the mean over the shares."""

    def __init__(self, optimizer: str) -> None:
        self.weights = {
            spec.name: torch.from_numpy(
                initial_rows(np.arange(spec.rows), spec.dim, table_key(SEED, spec.name), spec.std)
            )
            for spec in SPECS
        }
        for weight in self.weights.values():
            weight[0] = 0
        self.name, self.norms = optimizer, []
        self.squares = {spec.name: torch.zeros(spec.rows, spec.dim) for spec in SPECS}
        self.adam: Any = None

    def run(self, coefficient: float, steps: range) -> None:
        parameters = {name: torch.nn.Parameter(weight) for name, weight in self.weights.items()}
        if self.name == "lazy_adam":
            self.adam = self.adam or torch.optim.SparseAdam(parameters.values(), lr=0.1, betas=(0.9, 0.98))
        for step in steps:
            total = 0.0
            for name, parameter in parameters.items():
                parameter.grad = None
                seen: set[int] = set()
                for share in range(ALL_RANKS):
                    codes, weights = batch(step, share, name)
                    seen |= set(codes[codes > 0].tolist())
                    vectors = torch.nn.functional.embedding(torch.from_numpy(codes), parameter, padding_idx=0)
                    (loss_of(vectors, weights) / ALL_RANKS).backward()
                assert parameter.grad is not None
                total += float(parameter.grad.double().square().sum())
                rows = torch.tensor(sorted(seen))
                gradient = coefficient * parameter.grad[rows]
                self.update(name, parameter, rows, gradient)
            if self.adam is not None:
                self.adam.step()
            self.norms.append(total)

    @torch.no_grad()
    def update(self, name: str, parameter: Tensor, rows: Tensor, gradient: Tensor) -> None:
        if self.name == "lazy_adam":
            parameter.grad = torch.sparse_coo_tensor(rows[None], gradient, parameter.shape)
            return
        if self.name == "sgd":
            parameter[rows] -= 0.1 * gradient
            return
        square = gradient.square()
        self.squares[name][rows] += square.mean(1, keepdim=True) if self.name == "rowwise_adagrad" else square
        parameter[rows] -= 0.1 * gradient / (self.squares[name][rows].sqrt() + 1e-8)


LIMITS = {"sgd": 1e-6, "rowwise_adagrad": 1e-5, "adagrad": 5e-5, "lazy_adam": 2e-5}


@pytest.mark.parametrize(
    ("world_size", "chunks", "coefficient", "in_files"), [(1, 1, 1.0, True), (2, 4, 0.3, False), (3, 1, 1.0, True)]
)
@pytest.mark.parametrize("optimizer", LIMITS)
def test_a_sharded_table_is_the_dense_one(
    pools: dict[int, Pool], tmp_path: Path, optimizer: str, world_size: int, chunks: int, coefficient: float,
    in_files: bool,
) -> None:  # fmt: skip
    dense = Dense(optimizer)
    start = {name: weight.clone() for name, weight in dense.weights.items()}
    dense.run(coefficient, range(STEPS))
    folder = tmp_path / "tables" if in_files else None
    for whole, norms, _, _ in pools[world_size].run(train, optimizer, coefficient, chunks, folder, range(STEPS)):
        assert norms == pytest.approx(dense.norms, rel=1e-5)
        for name, expected in dense.weights.items():
            limit = LIMITS[optimizer] * float(expected.abs().max())
            torch.testing.assert_close(whole[name], expected, rtol=0, atol=limit)
            assert (expected - start[name]).abs().max() > 0.01


def test_saved_rows_resume_on_any_number_of_ranks_and_repeat_bit_by_bit(pools: dict[int, Pool]) -> None:
    arguments = ("rowwise_adagrad", 1.0, 1, None)
    whole = pools[3].run(train, *arguments, range(STEPS))
    again = pools[3].run(train, *arguments, range(STEPS))
    half = pools[3].run(train, *arguments, range(2))
    assert all(torch.equal(whole[0][0][name], again[0][0][name]) for name in whole[0][0])
    saved = {spec.name: [content[spec.name] for _, _, content, _ in half] for spec in SPECS}
    for world_size in (1, 2, 3):
        resumed = pools[world_size].run(train, *arguments, range(2, STEPS), saved)
        for name, expected in whole[0][0].items():
            exact = {"rtol": 0, "atol": 0} if world_size == 3 else {"rtol": 0, "atol": 2e-6}
            torch.testing.assert_close(resumed[0][0][name], expected, **exact)


def saved_and_grown(rank: int, world_size: int, folder: Path, grown: bool) -> dict[str, Tensor]:
    """Train two steps and write row files, or read them into tables of half as many rows more; return all rows."""
    specs = [replace(spec, rows=spec.rows * 3 // 2) for spec in SPECS] if grown else SPECS
    tables = ShardedTables(specs, optimizer_of("rowwise_adagrad"), SEED + grown)
    if grown:
        files = [[path] for path in sorted(folder.glob("*.safetensors"))]
        load_tables(tables, MappedTables(files, tables.specs), states=False)
    else:
        for step in range(2):
            rows = {spec.name: np.unique(batch(step, rank, spec.name)[0]) for spec in SPECS}
            working = tables.fetch({name: found[found > 0] for name, found in rows.items()})
            sum(leaf.sum() for leaf in working.leaves.values()).backward()  # type: ignore[union-attr]
            tables.reduce(working)
            tables.commit(1.0, 1.0)
        write_row_file(folder / row_file(rank), store_sources(tables))
    return {spec.name: tables.look_up(spec.name, torch.arange(spec.rows)) for spec in specs}


def test_row_files_are_read_by_other_ranks_and_larger_tables(pools: dict[int, Pool], tmp_path: Path) -> None:
    saved = pools[2].run(saved_and_grown, tmp_path, False)[0]
    files = [[path] for path in sorted(tmp_path.glob("*.safetensors"))]
    mapped = MappedTables(files, {spec.name: spec for spec in SPECS})
    for grown in pools[3].run(saved_and_grown, tmp_path, True):
        for spec in SPECS:
            assert torch.equal(grown[spec.name][: spec.rows], saved[spec.name])
            new = np.arange(spec.rows, spec.rows * 3 // 2)
            initial = initial_rows(new, spec.dim, table_key(SEED, spec.name), spec.std)
            np.testing.assert_array_equal(grown[spec.name][spec.rows :], initial)
    for spec in SPECS:
        rows = torch.arange(spec.rows).view(-1, 10 if spec.rows % 10 == 0 else 1)
        assert torch.equal(mapped.look_up(spec.name, rows).view(-1, spec.dim), saved[spec.name])
    content = bytearray((tmp_path / row_file(1)).read_bytes())
    (tmp_path / row_file(1)).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"is not a row file|does not hold the table"):
        MappedTables([[tmp_path / row_file(1)]], {spec.name: spec for spec in SPECS})


def test_traffic_follows_the_distinct_rows(pools: dict[int, Pool]) -> None:
    for rank, (_, _, _, sent) in enumerate(pools[3].run(train, "sgd", 1.0, 1, None, range(1))):
        least = 0
        for spec in SPECS:
            requested = [np.unique(batch(0, other, spec.name)[0]) for other in range(3)]
            owners = [RowPartition(0, 3).owner(rows[rows > 0]) for rows in requested]
            out = int((owners[rank] != rank).sum())  # rows and their gradients are sent
            back = sum(int((owner == rank).sum()) for other, owner in enumerate(owners) if other != rank)
            least += out * (8 + 4 * spec.dim) + back * 4 * spec.dim
        in_look_up = sum(8 * int((RowPartition(0, 3).owner(np.arange(1, s.rows)) != rank).sum()) for s in SPECS)
        values = sum(2 * 4 * s.dim * int((RowPartition(0, 3).owner(np.arange(1, s.rows)) == rank).sum()) for s in SPECS)
        assert least < sent < 1.05 * (least + in_look_up + values) + 2000


def test_the_division_of_rows() -> None:
    rows = np.arange(1, 100_000)
    for world_size in (1, 2, 3, 7, 64):
        parts = [RowPartition(rank, world_size) for rank in range(world_size)]
        owner = parts[0].owner(rows)
        for rank, part in enumerate(parts):
            mine = rows[owner == rank]
            first, end = part.shards
            assert ((shard_of(mine) >= first) & (shard_of(mine) < end)).all()
            local = part.local(mine)
            assert len(np.unique(local)) == len(local) and local.max() < part.capacity(100_000)
            np.testing.assert_array_equal(part.rows(local), mine)
            assert part.local(mine[mine < 50_000]).tolist() == local[mine < 50_000].tolist()
            assert part.capacity(50_000) <= part.capacity(100_000)
    weight = 1 / np.arange(1, 100_000) ** 1.05  # Zipf: frequent rows are neighbours
    for world_size in (2, 8, 64):
        random = np.random.RandomState(0)
        drawn = np.unique(random.choice(rows, 20_000, p=weight / weight.sum()))
        load = np.bincount(RowPartition(0, world_size).owner(drawn), minlength=world_size)
        assert load.max() / load.mean() <= 1.5
    assert SHARDS % 2 == 0


def test_initial_values_are_those_of_their_rows() -> None:
    rows = np.arange(1, 20_001)
    values = initial_rows(rows, 16, table_key(0, "items"), 0.02)
    np.testing.assert_array_equal(initial_rows(rows[::-7], 16, table_key(0, "items"), 0.02), values[::-7])
    assert values.std() == pytest.approx(0.02, rel=0.01) and abs(values.mean()) < 1e-4
    for other in (table_key(1, "items"), table_key(0, "users")):
        assert abs(np.corrcoef(initial_rows(rows, 16, other, 0.02).ravel(), values.ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(values[:-1].ravel(), values[1:].ravel())[0, 1]) < 0.01
    assert values.view(np.int32).sum() == initial_rows(rows, 16, table_key(0, "items"), 0.02).view(np.int32).sum()


LIVES = TableSpec("lives", 100, 4, std=0.1, admit_after=2, evict_after=3)


def live(rank: int, world_size: int, occurrences: list[list[int]]) -> list[list[list[float]]]:
    """Train on the rows of each step, which this rank has every `world_size`-th of; return the vectors of rows 1 to 4.

    They are as looked up before each step, and after the last one.
    """
    tables = ShardedTables([LIVES], optimizer_of("rowwise_adagrad"), SEED)
    found = []
    for step in [*occurrences, []]:
        found.append(tables.look_up("lives", torch.arange(1, 5)).tolist())
        rows = np.array(step[rank::world_size], np.int64)
        working = tables.fetch({"lives": rows})
        positions = torch.arange(1, len(rows) + 1)
        (working.look_up("lives", positions).sum() * world_size).backward()
        tables.reduce(working)
        tables.commit(1.0, 1.0)
    return found


def test_rows_are_admitted_and_evicted(pools: dict[int, Pool]) -> None:
    occurrences = [[2, 3], [2, 4], [2], [2], [2, 4], [2, 3, 4], [4]]
    one, two = pools[1].run(live, occurrences)[0], pools[2].run(live, occurrences)[0]
    np.testing.assert_allclose(two, one, atol=1e-6)
    unknown, frequent, rare, late = (np.array([step[row] for step in one]) for row in range(4))

    def is_unknown(vectors: np.ndarray) -> list[bool]:
        return [bool(np.array_equal(*pair)) for pair in zip(vectors, unknown, strict=True)]

    assert is_unknown(frequent) == [True, True, *[False] * 6]  # admitted after its second step
    assert is_unknown(rare) == [True] * 8  # steps 0 and 5: it is evicted in between
    assert is_unknown(late) == [True] * 5 + [False] * 3  # steps 1, 4, 5, 6
    initial = initial_rows(np.array([2]), 4, table_key(SEED, "lives"), 0.1)[0]
    np.testing.assert_array_equal(frequent[2], initial.astype(np.float32))  # not trained while it was unknown
    assert (frequent[3] != frequent[2]).all() and (unknown[1] != unknown[0]).all()


def test_dropped_ids_are_a_function_of_step_and_row() -> None:
    random = np.random.RandomState(0)
    codes = {"item": random.randint(0, 50, (400, 6)), "kind": random.randint(0, 50, 400)}

    def dropped(rows: np.ndarray, key: int) -> dict[str, np.ndarray]:
        side = {name: torch.from_numpy(values[rows]) for name, values in codes.items()}
        none = torch.zeros(0)
        made = Batch(
            0, torch.from_numpy(rows), side, side, none, none, none, torch.from_numpy(-rows), none, none, {}, {}
        )
        kept = drop_ids(made, [("query", "item", "t"), ("doc", "kind", "t")], key, 0.3)
        return {"item": kept.query["item"].numpy(), "kind": kept.doc["kind"].numpy()}

    whole, other = dropped(np.arange(400), 1), dropped(np.arange(400), 2)
    for name, values in codes.items():
        changed = (whole[name] != values) & (values > 1)
        assert changed.sum() / (values > 1).sum() == pytest.approx(0.3, abs=0.05)
        assert (whole[name][changed] == 1).all() and (whole[name][values == 0] == 0).all()
        assert (whole[name] != other[name]).any()
        part = dropped(np.arange(399, 0, -3), 1)[name]
        np.testing.assert_array_equal(part, whole[name][np.arange(399, 0, -3)])
