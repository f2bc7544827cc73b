"""Checkpoints that contain the changed rows of sharded tables, and links to the row files of the one before."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bigdssm.checkpoints import store as stores
from bigdssm.checkpoints.checkpoint import even_share, read_manifest, verify
from bigdssm.checkpoints.store import CheckpointStore
from bigdssm.errors import BigDSSMError, CheckpointError
from bigdssm.tables import sharded
from bigdssm.tables.files import MappedTables, RowFile, load_tables
from bigdssm.tables.initial_rows import initial_rows
from bigdssm.tables.optimizers import LazyAdam
from bigdssm.tables.rows import TableSpec, table_key
from bigdssm.tables.sharded import ShardedTables

from .spawn import Pool

SPECS = (TableSpec("items", 20_000, 4, evict_after=8), TableSpec("tags", 500, 3, admit_after=2))
SAVES = (3, 4, 5, 9)
STEPS = 11
WEIGHTS = [("weight", torch.ones(7))]


def rows_of(step: int) -> dict[str, np.ndarray]:
    """Return the rows of a step: many in the first, some of which are evicted before the last save; later few."""
    items = np.arange(1, [12_001, 7001, 5501][step]) if step < 3 else np.arange(40 * step, 40 * step + 60)
    return {"items": items, "tags": np.arange(1 + 3 * step, 80 + 3 * step)}


def train(tables: ShardedTables, rank: int, world_size: int, step: int) -> None:
    rows = {name: found[rank::world_size] for name, found in rows_of(step).items()}
    working = tables.fetch(rows)
    vectors = [working.look_up(name, torch.arange(1, len(found) + 1)) for name, found in rows.items()]
    sum((some * (step + 1)).sin().sum() for some in vectors).backward()  # type: ignore[union-attr]
    tables.reduce(working)
    tables.commit(1.0, 1.0)


def save(store: CheckpointStore, tables: ShardedTables, step: int, **options: Any) -> None:
    share = even_share(WEIGHTS, tables.partition.rank, tables.partition.world_size)
    store.save(step, {}, {}, {"cpu": torch.arange(3)}, share, tables, **options)


def content(tables: ShardedTables) -> dict[str, dict[str, Tensor]]:
    return {name: table.content(tables.steps, states=True) for name, table in tables.stores.items()}


def run(
    rank: int, world_size: int, folder: Path, most_files: int = 16, keep: int = 9, fails_at: int = 0,
    saves: tuple[int, ...] = SAVES,
) -> tuple[dict[str, dict[str, Tensor]], list[dict[str, int]]]:  # fmt: skip
    """Train and save; return the content at the last save, and the rows that changed before each save."""

    def full(step: int) -> None:
        raise OSError(28, "No space left on device")

    tables, changed, last = ShardedTables(SPECS, LazyAdam(lr=0.1), 0), [], 0
    most, stores.MAX_ROW_FILES = stores.MAX_ROW_FILES, most_files
    try:
        with CheckpointStore(folder, keep=keep) as store:
            for step in range(saves[-1]):
                train(tables, rank, world_size, step)
                if step + 1 in saves:
                    changed.append({name: int((table.updated > last).sum()) for name, table in tables.stores.items()})
                    if step + 1 == fails_at:
                        store.wait()  # for the checkpoint before, which does not fail
                        with pytest.raises(BigDSSMError, match=r"stopped|No space left on device"):
                            store.between_files, between = full, store.between_files
                            save(store, tables, step + 1)
                        store.between_files = between
                        continue
                    save(store, tables, step + 1, in_background=step % 2 == 0)
                    last = step + 1
            store.wait()
    finally:
        stores.MAX_ROW_FILES = most
    return content(tables), changed


def resumed(rank: int, world_size: int, folder: Path) -> tuple[int, Any, dict[str, Tensor]]:
    """Load the newest checkpoint; return its step, the content of this rank, and all rows after further steps."""
    newest = CheckpointStore(folder, keep=9).newest_valid()
    assert newest is not None
    tables = ShardedTables(SPECS, LazyAdam(lr=0.1), 0)
    load_tables(tables, MappedTables(newest.table_files(), tables.specs), states=True)
    tables.steps = newest.step
    loaded = content(tables)
    for step in range(newest.step, STEPS):
        train(tables, rank, world_size, step)
    return newest.step, loaded, {spec.name: tables.look_up(spec.name, torch.arange(spec.rows)) for spec in SPECS}


def by_row(contents: list[dict[str, dict[str, Tensor]]]) -> dict[str, dict[str, Tensor]]:
    """Return the content of all ranks, ascending by row."""
    whole: dict[str, dict[str, Tensor]] = {}
    for name in contents[0]:
        order = torch.cat([content[name]["rows"] for content in contents]).argsort()
        whole[name] = {key: torch.cat([content[name][key] for content in contents])[order] for key in contents[0][name]}
    return whole


def assert_equal(mine: dict[str, dict[str, Tensor]], theirs: dict[str, dict[str, Tensor]]) -> None:
    assert mine.keys() == theirs.keys()
    for name, tensors in theirs.items():
        assert mine[name].keys() == tensors.keys()
        assert all(torch.equal(mine[name][key], tensor) for key, tensor in tensors.items()), name


def row_files(folder: Path, step: int, rank: int = 0) -> list[Path]:
    return sorted((folder / f"step-{step:08d}").glob(f"tables-{rank:05d}-*"))


def damage(path: Path, *, all_links: bool) -> None:
    """Change the last byte of a file, or of its name in this folder alone."""
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    if not all_links:
        path.unlink()
    path.write_bytes(changed)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, pools: dict[int, Pool]) -> tuple[Path, Any]:
    """Return the checkpoints of two ranks, and the result of `run`."""
    folder = tmp_path_factory.mktemp("incremental")
    return folder, pools[2].run(run, folder)


@pytest.fixture
def copied(two: tuple[Path, Any], tmp_path: Path) -> Path:
    """Return a copy of the checkpoints of two ranks, with their links."""
    for step in SAVES:
        (tmp_path / f"step-{step:08d}").mkdir(parents=True)
        for file in (two[0] / f"step-{step:08d}").iterdir():
            first = tmp_path / f"step-{SAVES[0]:08d}" / file.name
            is_linked = first.exists() and file.samefile(two[0] / first.parent.name / first.name)
            copy, source = (os.link, first) if is_linked else (shutil.copy, file)
            copy(source, tmp_path / file.parent.name / file.name)
    return tmp_path


def test_further_row_files_have_the_changed_rows_alone(two: tuple[Path, Any]) -> None:
    folder, done = two
    for rank, (_, changed) in enumerate(done):
        base, second, third = (row_files(folder, step, rank) for step in SAVES[:3])
        assert [len(files) for files in (base, second, third)] == [1, 2, 3]
        assert base[0].samefile(second[0]) and second[1].samefile(third[1])
        for name, rows in changed[1].items():
            assert 0 < rows == RowFile(second[1]).count(name) < changed[0][name] == RowFile(base[0]).count(name)
        per_row = {"items": 8 + 4 + 3 * 4 * 4, "tags": 8 + 4 + 4 + 3 * 3 * 4}
        least = sum(rows * per_row[name] for name, rows in changed[1].items())
        assert least < second[1].stat().st_size < least + 4000 < base[0].stat().st_size / 2
        listed = [share.file for share in read_manifest(folder / "step-00000005").table_shares(rank)]
        assert listed == [file.name for file in third]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_resumed_runs_equal_those_of_whole_checkpoints(
    two: tuple[Path, Any], tmp_path: Path, pools: dict[int, Pool], ranks: int
) -> None:
    """Rows are evicted between the last two checkpoints."""
    incremental, done = two
    whole = pools[2].run(run, tmp_path, 1)
    assert [len(row_files(tmp_path, step)) for step in SAVES] == [1] * len(SAVES)
    assert len(row_files(incremental, SAVES[-1])) == len(SAVES)
    assert RowFile(row_files(incremental, SAVES[-1])[-1])._arrays["items/evicted"].size > 2000
    assert_equal(by_row([one for one, _ in whole]), by_row([one for one, _ in done]))
    mine, theirs = (pools[ranks].run(resumed, folder) for folder in (incremental, tmp_path))
    assert_equal(by_row([one for _, one, _ in mine]), by_row([one for one, _ in done]))
    for (step, one, rows), (_, other, others) in zip(mine, theirs, strict=True):
        assert step == SAVES[-1]
        assert_equal(one, other)
        assert all(torch.equal(rows[name], others[name]) for name in rows)


def test_evicted_rows_have_their_initial_values(two: tuple[Path, Any]) -> None:
    specs = {spec.name: spec for spec in SPECS}
    before, after = (
        MappedTables(read_manifest(two[0] / f"step-0000000{step}").table_files(), specs) for step in (5, 9)
    )
    evicted = np.arange(7001, 12_001)
    initial = initial_rows(evicted, 4, table_key(0, "items"), 0.02)
    assert torch.equal(after.look_up("items", torch.from_numpy(evicted)), initial)
    assert (before.look_up("items", torch.from_numpy(evicted)) != initial).any(1).all()


def test_a_row_that_was_not_admitted_has_the_vector_out_of_vocabulary(two: tuple[Path, Any]) -> None:
    specs = {spec.name: spec for spec in SPECS}
    chains = MappedTables(read_manifest(two[0] / "step-00000009").table_files(), specs)
    rows = torch.arange(500)
    together = chains.look_up("tags", rows)
    assert torch.equal(together, torch.stack([chains.look_up("tags", row[None])[0] for row in rows]))
    assert torch.equal(together[499], together[1]) and not torch.equal(together[50], together[1])
    initial = initial_rows(np.array([1]), 3, table_key(0, "tags"), 0.02).numpy()
    assert not torch.equal(together[1], torch.from_numpy(initial[0])), "it is trained"


def test_model_folders_have_one_file_per_rank(two: tuple[Path, Any], tmp_path: Path) -> None:
    specs = {spec.name: spec for spec in SPECS}
    chains = MappedTables(read_manifest(two[0] / "step-00000009").table_files(), specs)
    chains.write(tmp_path / "tables")
    files = sorted((tmp_path / "tables").iterdir())
    assert len(files) == 2
    written = MappedTables([[file] for file in files], specs)
    for spec in SPECS:
        every = torch.arange(spec.rows)
        assert torch.equal(written.look_up(spec.name, every), chains.look_up(spec.name, every))
        contents = (tables.contents(spec.name, lambda rows: rows > 0, states=False) for tables in (written, chains))
        for mine, theirs in zip(*contents, strict=True):
            assert all(torch.equal(mine[key], theirs[key]) for key in ("rows", "values"))


def test_all_rows_are_written_again_in_time(tmp_path: Path, pools: dict[int, Pool]) -> None:
    """After as many files, and before the changed rows are more than those of the first file."""
    for number, (most, saves, files) in enumerate(
        [
            (3, (3, 4, 5, 6, 7), [1, 2, 3, 1, 2]),
            (16, (1, 2, 3), [1, 2, 1]),
        ]
    ):
        folder = tmp_path / str(number)
        done = pools[1].run(run, folder, most, 9, 0, saves)
        assert [len(row_files(folder, step)) for step in saves] == files
        assert_equal(by_row([one for _, one, _ in pools[2].run(resumed, folder)]), by_row([done[0][0]]))


def test_older_checkpoints_are_removed(tmp_path: Path, pools: dict[int, Pool]) -> None:
    done = pools[2].run(run, tmp_path, 16, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000009"]
    assert len(verify(tmp_path / "step-00000009").table_files()[1]) == len(SAVES)
    assert_equal(by_row([one for _, one, _ in pools[3].run(resumed, tmp_path)]), by_row([one for one, _ in done]))


def test_a_damaged_link_is_damage_of_the_checkpoint(copied: Path, pools: dict[int, Pool]) -> None:
    damage(row_files(copied, 9, 1)[0], all_links=False)
    with pytest.raises(CheckpointError, match=r"tables-00001-00\.safetensors is damaged"):
        verify(copied / "step-00000009")
    assert [step for step, *_ in pools[3].run(resumed, copied)] == [5] * 3
    row_files(copied, 5, 0)[1].unlink()
    assert [step for step, *_ in pools[2].run(resumed, copied)] == [4] * 2
    assert sorted(path.name for path in copied.glob("*step-*"))[:2] == [
        "damaged-step-00000005",
        "damaged-step-00000009",
    ]
    damage(row_files(copied, 3, 0)[0], all_links=True)  # of all checkpoints
    assert pools[2].run(newest, copied) == [None] * 2


def newest(rank: int, world_size: int, folder: Path) -> int | None:
    found = CheckpointStore(folder, keep=9).newest_valid()
    return None if found is None else found.step


def test_a_failed_checkpoint_is_not_built_on(two: tuple[Path, Any], tmp_path: Path, pools: dict[int, Pool]) -> None:
    done = pools[2].run(run, tmp_path, 16, 9, 4)
    assert sorted(path.name for path in tmp_path.glob("*step-*")) == [f"step-0000000{step}" for step in (3, 5, 9)]
    assert [len(row_files(tmp_path, step)) for step in (3, 5, 9)] == [1, 2, 3]
    assert [RowFile(row_files(tmp_path, 5, rank)[1]).count("items") for rank in range(2)] == [
        changed[2]["items"] for _, changed in done
    ]
    assert_equal(by_row([one for one, _ in done]), by_row([one for one, _ in two[1]]))
    assert_equal(by_row([one for _, one, _ in pools[1].run(resumed, tmp_path)]), by_row([one for one, _ in two[1]]))


def test_a_checkpoint_that_was_put_aside_is_not_built_on(tmp_path: Path, pools: dict[int, Pool]) -> None:
    assert pools[1].run(lost_parent, tmp_path) == [[1, 2, 1]]


def lost_parent(rank: int, world_size: int, folder: Path) -> list[int]:
    """Save three times, the parent of the last damaged; return the numbers of row files."""
    tables, store = ShardedTables(SPECS, LazyAdam(lr=0.1), 0), CheckpointStore(folder, keep=9)
    for step in range(3):
        train(tables, rank, world_size, step)
        if step == 2:
            damage(row_files(folder, 2)[1], all_links=False)
            assert (found := store.newest_valid()) is not None and found.step == 1
        save(store, tables, step + 1)
    return [len(list(folder.glob(f"*step-0000000{step}/tables-*"))) for step in (1, 2, 3)]


REPLACED = (TableSpec("keys", 2**40, 3, evict_after=5), TableSpec("few", 5000, 3, capacity=4096))


def replacing(rank: int, world_size: int, folder: Path, log: bool) -> dict[str, dict[str, Tensor]]:
    """Train with rows that lose their slot or exceed a capacity between two saves; return the content."""
    keys = [1000, 10, 2000, 350, 350, 350, 350]
    trim_steps, sharded.TRIM_STEPS = sharded.TRIM_STEPS, 2
    tables = ShardedTables(REPLACED, LazyAdam(lr=0.1), 0)
    store = CheckpointStore(folder, keep=9)
    for step, number in enumerate(keys):
        few = np.arange(1, 601) if step == 0 else np.arange(4096 + 20 * step, 4116 + 20 * step)
        rows = {"keys": 10**9 + sum(keys[:step]) + np.arange(number), "few": few}
        working = tables.fetch({name: found[rank::world_size] for name, found in rows.items()})
        sum(leaf.sin().sum() for leaf in working.leaves.values()).backward()  # type: ignore[union-attr]
        tables.reduce(working)
        tables.commit(1.0, 1.0)
        if step in (2, 6):
            if step == 6:
                assert all(store.evictions_known_from <= 3 and store._released for store in tables.stores.values())
                if not log:
                    tables.stores["keys"].evictions_known_from = 5
            save(store, tables, step + 1)
    sharded.TRIM_STEPS = trim_steps
    return content(tables)


def replaced(rank: int, world_size: int, folder: Path) -> dict[str, dict[str, Tensor]]:
    newest = CheckpointStore(folder, keep=9).newest_valid()
    assert newest is not None
    tables = ShardedTables(REPLACED, LazyAdam(lr=0.1), 0)
    tables.steps = newest.step
    load_tables(tables, MappedTables(newest.table_files(), tables.specs), states=True)
    return content(tables)


@pytest.mark.parametrize("log", [True, False])
def test_rows_that_are_replaced_are_evicted(tmp_path: Path, pools: dict[int, Pool], log: bool) -> None:
    """Also if more of them were replaced than are listed: then all rows are written."""
    trained = by_row(pools[2].run(replacing, tmp_path, log))
    assert len(row_files(tmp_path, 7)) == 1 + log
    assert len(trained["keys"]["rows"]) == 3400 and len(trained["few"]["rows"]) == 620
    assert_equal(by_row(pools[3].run(replaced, tmp_path)), trained)
