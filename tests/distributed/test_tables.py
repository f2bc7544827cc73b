"""Tables sharded by rows against dense ones: values, gradients, optimizers, traffic, and files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bigdssm.tables.rows as rows_module
import bigdssm.tables.sharded as sharded_module
from bigdssm.config import TABLE_OPTIMIZERS
from bigdssm.config.components import TableOptimizerConfig
from bigdssm.errors import CheckpointError
from bigdssm.loader.batch import Batch
from bigdssm.tables.files import MappedTables, load_tables, row_file, store_sources, write_row_file
from bigdssm.tables.initial_rows import initial_rows
from bigdssm.tables.rows import SHARDS, RowPartition, RowStore, TableSpec, shard_of, table_key
from bigdssm.tables.sharded import ShardedTables
from bigdssm.training.batches import drop_ids
from tests import simgpu

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


@dataclass(frozen=True)
class Plain(TableOptimizerConfig):
    """Gradient descent without state, whose rows are exact."""

    name: str = "plain"

    def state_widths(self, dim: int) -> dict[str, int]:
        return {}

    def update(self, rows: Tensor, gradients: Tensor, states: dict[str, Tensor], lr: float, step: int) -> None:
        rows.add_(gradients, alpha=-lr)


def optimizer_of(name: str) -> TableOptimizerConfig:
    cls = Plain if name == "plain" else TABLE_OPTIMIZERS.find(name, "")
    return cls(lr=0.1)


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
    return whole, norms, content, tables.sent_bytes


class Dense:
    """The same tables as dense weights, with the gradient of the mean over the shares."""

    def __init__(self, optimizer: str) -> None:
        self.weights = {
            spec.name: torch.from_numpy(
                initial_rows(np.arange(spec.rows), spec.dim, table_key(SEED, spec.name), spec.std).numpy()
            )
            for spec in SPECS
        }
        for weight in self.weights.values():
            weight[0] = 0
        self.name, self.norms = optimizer, []
        self.squares = {spec.name: torch.zeros(spec.rows, 1) for spec in SPECS}
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
        if self.name == "plain":
            parameter[rows] -= 0.1 * gradient
            return
        self.squares[name][rows] += gradient.square().mean(1, keepdim=True)
        parameter[rows] -= 0.1 * gradient / (self.squares[name][rows].sqrt() + 1e-8)


LIMITS = {"plain": 1e-6, "rowwise_adagrad": 1e-5, "lazy_adam": 2e-5}


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
            initial = initial_rows(new, spec.dim, table_key(SEED, spec.name), spec.std).numpy()
            np.testing.assert_array_equal(grown[spec.name][spec.rows :], initial)
    for spec in SPECS:
        rows = torch.arange(spec.rows).view(-1, 10 if spec.rows % 10 == 0 else 1)
        assert torch.equal(mapped.look_up(spec.name, rows).view(-1, spec.dim), saved[spec.name])
    content = bytearray((tmp_path / row_file(1)).read_bytes())
    (tmp_path / row_file(1)).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"is not a row file|does not hold the table"):
        MappedTables([[tmp_path / row_file(1)]], {spec.name: spec for spec in SPECS})


def test_traffic_follows_the_distinct_rows(pools: dict[int, Pool]) -> None:
    for rank, (_, _, _, sent) in enumerate(pools[3].run(train, "plain", 1.0, 1, None, range(1))):
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
            positions = part.positions(mine)
            assert len(np.unique(positions)) == len(positions) and positions.max() < part.capacity(100_000)
            np.testing.assert_array_equal(part.rows(positions), mine)
            assert part.positions(mine[mine < 50_000]).tolist() == positions[mine < 50_000].tolist()
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
    values = initial_rows(rows, 16, table_key(0, "items"), 0.02).numpy()
    np.testing.assert_array_equal(initial_rows(rows[::-7], 16, table_key(0, "items"), 0.02).numpy(), values[::-7])
    assert values.std() == pytest.approx(0.02, rel=0.01) and abs(values.mean()) < 1e-4
    for other in (table_key(1, "items"), table_key(0, "users")):
        assert abs(np.corrcoef(initial_rows(rows, 16, other, 0.02).numpy().ravel(), values.ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(values[:-1].ravel(), values[1:].ravel())[0, 1]) < 0.01
    assert (
        values.view(np.int32).sum() == initial_rows(rows, 16, table_key(0, "items"), 0.02).numpy().view(np.int32).sum()
    )


def initial_value(row: int, column: int, dim: int, key: int, std: float) -> np.float32:
    """The definition, in Python's integers."""
    bits = key + row * dim + column
    for _ in range(2):
        bits = (bits + 0x9E3779B97F4A7C15) % (1 << 64)
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % (1 << 64)
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % (1 << 64)
        bits ^= bits >> 31
    total = sum(bits >> shift & 0xFFFF for shift in (0, 16, 32, 48))
    return np.float32(total - 2 * 0xFFFF) * np.float32(std / np.sqrt(4 * ((1 << 32) - 1) / 12))


def test_initial_values_have_the_same_bits_on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million of them by NumPy and by torch, in blocks of other sizes, and a thousand by the definition."""
    rows, key = np.random.RandomState(0).randint(0, 10**12, 15_626), table_key(0, "items")
    values = initial_rows(rows, 64, key, 0.02).numpy()
    monkeypatch.setattr("bigdssm.tables.initial_rows._DEVICE_NUMBERS", 10_000)
    with simgpu.Device():
        on_device = initial_rows(rows, 64, key, 0.02, simgpu.PLACE)
        assert on_device.device == simgpu.PLACE
        found = on_device.cpu().numpy()
    np.testing.assert_array_equal(found.view(np.int32), values.view(np.int32))
    for place in range(1000):
        row, column = place * 13, place % 64
        assert values[row, column] == initial_value(int(rows[row]), column, 64, key, 0.02)


def test_initial_values_of_an_update_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []

    def counted(rows: np.ndarray, *arguments: Any) -> torch.Tensor:
        computed.append(len(rows))
        return initial_rows(rows, *arguments)

    monkeypatch.setattr("bigdssm.tables.rows.initial_rows", counted)
    spec = TableSpec("items", 1000, 4)
    store = RowStore(spec, SEED, RowPartition(0, 1), optimizer_of("plain"), torch.device("cpu"))
    requested = np.array([5, 9, 5, 2])  # by two ranks
    store.read(requested, 0)
    store.update(np.array([2, 5, 9]), torch.ones(3, 4), 0.1, 0)
    assert computed == [3]
    store.read(requested, 1)
    assert computed == [3]


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
    initial = initial_rows(np.array([2]), 4, table_key(SEED, "lives"), 0.1).numpy()[0]
    np.testing.assert_array_equal(frequent[2], initial.astype(np.float32))  # not trained while it was unknown
    assert (frequent[3] != frequent[2]).all() and (unknown[1] != unknown[0]).all()


CODES = TableSpec("codes", 8000, 3, std=0.1, admit_after=2, evict_after=4)


def train_codes(
    rank: int, world_size: int, keyed: bool, spec: TableSpec, folder: Path | None, steps: int = 24
) -> list[dict[str, Tensor]]:
    """Train on codes that drift, with keyed or direct storage; return vectors and content of each step."""
    direct, first = rows_module.DIRECT_ROWS, rows_module.FIRST_SLOTS
    rows_module.DIRECT_ROWS, rows_module.FIRST_SLOTS = (0, 16) if keyed else (2**31, first)
    try:
        tables, found = ShardedTables([spec], optimizer_of("lazy_adam"), SEED, folder=folder), []
        for step in range(steps):
            if step == steps // 2:  # as a resumed run
                content = tables.stores[spec.name].content(tables.steps, states=True)
                tables = ShardedTables([spec], optimizer_of("lazy_adam"), SEED, folder=folder)
                tables.stores[spec.name].load(content)
                tables.steps = step
            random = np.random.RandomState([step, rank])
            codes = np.unique(1 + (step * 150 + random.randint(0, 600, 300)) % (spec.rows - 1))
            working = tables.fetch({spec.name: codes})
            vectors = working.look_up(spec.name, torch.arange(1, len(codes) + 1))
            vectors.sin().sum().backward()
            tables.reduce(working)
            tables.commit(1.0, 1.0)
            store = tables.stores[spec.name]
            kept = {f"kept_{key}": value for key, value in store.content(tables.steps, states=False).items()}
            found.append({"vectors": vectors.detach(), **kept, **store.content(tables.steps, states=True)})
        assert (store._slots is not None) == keyed
        assert not keyed or not spec.evict_after or len(store.updated) <= 2048  # slots are used again
        return found
    finally:
        rows_module.DIRECT_ROWS, rows_module.FIRST_SLOTS = direct, first


@pytest.mark.parametrize(
    ("world_size", "in_files", "changes"),
    [
        (1, False, {"dtype": torch.bfloat16}),
        (2, True, {}),
        (3, False, {"admit_after": 1}),
        (1, True, {"evict_after": 0}),
    ],
)
def test_keyed_storage_is_direct_storage(
    pools: dict[int, Pool], tmp_path: Path, world_size: int, in_files: bool, changes: dict[str, Any]
) -> None:
    """Bit for bit, with growth, eviction and slots that are used again."""
    arguments = replace(CODES, **changes), tmp_path / "rows" if in_files else None
    for direct, keyed in zip(
        *(pools[world_size].run(train_codes, is_keyed, *arguments) for is_keyed in (False, True)), strict=True
    ):
        for step, other in zip(direct, keyed, strict=True):
            assert step.keys() == other.keys()
            assert all(torch.equal(step[key], other[key]) for key in step)


CAPPED = TableSpec("capped", 10**6, 2, admit_after=2, capacity=8 * SHARDS)
SOME_SHARDS = np.arange(2, 10**6)[shard_of(np.arange(2, 10**6)) % 512 == 0]


def capped_rows(step: int) -> np.ndarray:
    return np.unique(np.random.RandomState(step).permutation(SOME_SHARDS)[:60])


def train_capped(rank: int, world_size: int, steps: range, saved: Any = ()) -> tuple[dict[str, Tensor], Tensor]:
    """Train on this rank's part of the rows of some shards; return its content, and vectors of all rows."""
    every, sharded_module.TRIM_STEPS = sharded_module.TRIM_STEPS, 4
    try:
        tables = ShardedTables([CAPPED], optimizer_of("rowwise_adagrad"), SEED)
        store, tables.steps = tables.stores["capped"], steps.start
        for content in saved:
            owned = torch.from_numpy(tables.partition.owns(content["rows"].numpy()))
            store.load({key: value[owned] for key, value in content.items()})
        for step in steps:
            rows = capped_rows(step)[rank::world_size]
            working = tables.fetch({"capped": rows})
            (working.leaves["capped"][: 1 + len(rows)].sum() * world_size).backward()
            tables.reduce(working)
            tables.commit(1.0, 1.0)
        return store.content(tables.steps, states=True), tables.look_up("capped", torch.from_numpy(SOME_SHARDS))
    finally:
        sharded_module.TRIM_STEPS = every


def test_the_least_recently_updated_rows_above_a_capacity_are_evicted(pools: dict[int, Pool]) -> None:
    """The same rows on any number of ranks, and after a resume."""
    updated: dict[int, int] = {}
    occurrences: dict[int, int] = {}
    for step in range(12):
        for row in [1, *capped_rows(step).tolist()]:  # admission reads the row out of vocabulary in each step
            updated[row], occurrences[row] = step + 1, min(2, occurrences.get(row, 0) + 1)
        if step % 4 == 3:
            of_shard: dict[int, list[int]] = {}
            for row in updated:
                of_shard.setdefault(int(shard_of(np.array(row))), []).append(row)
            for rows in of_shard.values():
                if len(rows) > 8:
                    for row in sorted(rows, key=lambda row: (-updated[row], row))[7:]:
                        del updated[row], occurrences[row]
    assert 40 < len(updated) < 70  # of 8 shards
    half = [content for content, _ in pools[2].run(train_capped, range(6))]
    whole = pools[1].run(train_capped, range(12))[0][1].numpy()
    for world_size, first, saved in ((1, 0, ()), (2, 0, ()), (3, 0, ()), (3, 6, half)):
        ranks = pools[world_size].run(train_capped, range(first, 12), saved)
        found = {key: torch.cat([content[key] for content, _ in ranks]).tolist() for key in ranks[0][0]}
        assert dict(zip(found["rows"], found["updated"], strict=True)) == updated
        assert dict(zip(found["rows"], found["occurrences"], strict=True)) == occurrences
        evicted = ~np.isin(SOME_SHARDS, [row for row, number in occurrences.items() if number == 2])
        vectors = ranks[0][1].numpy()
        assert len(np.unique(vectors[evicted], axis=0)) == 1 < len(np.unique(vectors, axis=0))
        np.testing.assert_allclose(vectors, whole, atol=1e-6)


SHARED = TableSpec("shared", 2**62, 4, std=0.1, hashes=3, hash_rows=50)


def shared_codes(step: int, share: int) -> np.ndarray:
    """Return codes int64 [5, 6] with padding, out of vocabulary, repetitions and few common ones."""
    random = np.random.RandomState([step, share])
    return np.array([0, 1, 2, 3, *random.randint(2, 2**62, 8)])[random.randint(0, 12, (5, 6))]


def train_shared(rank: int, world_size: int, folder: Path) -> tuple[Tensor, list[float]]:
    """Train on this rank's part of ALL_RANKS shares; return the vectors of all codes, and the squared norms."""
    tables, norms = ShardedTables([SHARED], optimizer_of("plain"), SEED), []
    for step in range(STEPS):
        shares = [shared_codes(step, share) for share in range(rank, ALL_RANKS, world_size)]
        codes = np.unique(np.concatenate(shares))
        working = tables.fetch({"shared": codes[codes > 0]})
        assert len(working.leaves["shared"]) <= 1 + 1 + SHARED.hash_rows
        for share in shares:
            positions = torch.from_numpy(np.where(share > 0, np.searchsorted(codes[codes > 0], share) + 1, 0))
            (working.look_up("shared", positions).sin().sum() * world_size / ALL_RANKS).backward()
        norms.append(float(tables.reduce(working)))
        tables.commit(1.0, 1.0)
    write_row_file(folder / row_file(rank), store_sources(tables))
    return tables.look_up("shared", torch.from_numpy(shared_codes(0, 0))), norms


def test_vectors_of_hashed_ids_are_sums_of_shared_rows(pools: dict[int, Pool], tmp_path: Path) -> None:
    """Against torch.nn.functional.embedding of a dense table; each hash is uniform and independent of the others."""
    initial = initial_rows(np.arange(52), 4, table_key(SEED, "shared"), 0.1).numpy()
    dense = torch.nn.Parameter(torch.from_numpy(initial))

    def vectors(codes: np.ndarray) -> Tensor:
        return torch.nn.functional.embedding(torch.from_numpy(SHARED.hashed(codes)), dense, padding_idx=0).sum(-2)

    dense.data[0], norms = 0, []
    for step in range(STEPS):
        dense.grad = None
        for share in range(ALL_RANKS):
            (vectors(shared_codes(step, share)).sin().sum() / ALL_RANKS).backward()
        norms.append(float(dense.grad.double().square().sum()))
        dense.data -= 0.1 * dense.grad
    expected = vectors(shared_codes(0, 0)).detach()
    for world_size in (1, 2, 3):
        (folder := tmp_path / str(world_size)).mkdir()
        for found, of_steps in pools[world_size].run(train_shared, folder):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
            assert of_steps == pytest.approx(norms, rel=1e-5)
        mapped = MappedTables([[file] for file in sorted(folder.iterdir())], {"shared": SHARED})
        assert torch.equal(mapped.look_up("shared", torch.from_numpy(shared_codes(0, 0))), found)
    rows = SHARED.hashed(np.arange(2, 100_000))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        pairs = np.bincount((rows[:, one] - 2) * 50 + rows[:, other] - 2, minlength=2500)
        assert ((pairs - 40) ** 2 / 40).sum() == pytest.approx(2500, abs=6 * 5000**0.5)  # chi-squared


def test_slots_of_rows() -> None:
    random, index, slots = np.random.RandomState(0), rows_module.RowIndex(), {}
    for _ in range(20):
        rows = np.unique(random.randint(0, 2**62, 400))
        while len(index.free) < len(rows):
            index.grow()
        slots |= dict(zip(rows.tolist(), index.add(rows).tolist(), strict=True))
        removed = random.permutation(list(slots))[:150]
        index.remove(np.array([slots.pop(row) for row in removed.tolist()]))
        assert not index.find(np.append(removed, 7)).any()
        assert index.find(np.array(list(slots))).tolist() == list(slots.values())
    assert len(set(slots.values())) == 20 * 250 and 0 not in slots.values()


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
