"""Writing and reading of checkpoint shares by each rank; damage, full disks and lost ranks."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bigdssm.checkpoints import checkpoint as checkpoint_module
from bigdssm.checkpoints.checkpoint import TensorPiece, even_share, open_tensors
from bigdssm.checkpoints.store import CheckpointStore
from bigdssm.config import EngineConfig
from bigdssm.errors import BigDSSMError
from bigdssm.training.optimizers import AdamW

from . import small_run
from .compared_runs import assembled
from .spawn import Pool

BLOCK = 1024  # the files have tens of kB
TENSORS = [("weight", torch.arange(3000.0).view(30, 100)), ("exp_avg/weight", torch.ones(30, 100))]


class Counted:
    """A file that counts the bytes written and read."""

    def __init__(self, file: Any, counts: Counter[str]) -> None:
        self._file, self._counts = file, counts

    def write(self, content: Any) -> int:
        self._counts["written"] += len(content)
        return int(self._file.write(content))

    def readinto(self, content: Any) -> int:
        number = int(self._file.readinto(content))
        self._counts["read"] += number
        return number

    def read(self, *arguments: int) -> bytes:
        content: bytes = self._file.read(*arguments)
        self._counts["read"] += len(content)
        return content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class Toy(nn.Module):
    """A table, a matrix, a vector whose size is not divisible by the world size, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.matrix = nn.Embedding(300, 17), nn.Linear(17, 61)
        self.frozen = nn.Parameter(torch.randn(1001), requires_grad=False)

    def forward(self, query: torch.Tensor, doc: None) -> torch.Tensor:
        vectors: torch.Tensor = self.matrix(self.table(query)) + self.frozen.sum()
        return vectors


@contextmanager
def counted_bytes() -> Iterator[Counter[str]]:
    """A context that counts the bytes of checkpoint tensors written and read."""
    counts: Counter[str] = Counter()
    opened = Path.open

    def counting(path: Path, *arguments: Any, **options: Any) -> Any:
        file = opened(path, *arguments, **options)
        return Counted(file, counts) if path.suffix == ".safetensors" else file

    Path.open = counting  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        Path.open = opened  # type: ignore[method-assign]


@contextmanager
def small_blocks() -> Iterator[None]:
    block, checkpoint_module.BLOCK = checkpoint_module.BLOCK, BLOCK
    try:
        yield
    finally:
        checkpoint_module.BLOCK = block


def one_step(
    rank: int, world_size: int, folder: Path, zero_stage: int, step: int
) -> tuple[Counter[str], list[TensorPiece], list[TensorPiece]]:
    """Resume from the previous checkpoint, take a step, save; return bytes, and this rank's pieces before and after."""
    from bigdssm.training.engine import Engine
    from bigdssm.training.process_group import init_process_group

    init_process_group()
    torch.manual_seed(step)  # another model each time, which the checkpoint replaces
    with small_blocks(), counted_bytes() as counts:
        store, model = CheckpointStore(folder, keep=9), Toy()
        newest = store.newest_valid()
        if newest is not None:
            missing, unexpected = model.load_state_dict(newest.reader().weights(), strict=False)
            assert missing == ["frozen"] and not unexpected
        engine = Engine(model, EngineConfig(zero_stage=zero_stage), AdamW(), 1)
        if newest is not None:
            engine.restore(newest.reader(), newest.step)
        begin = [piece.on_host(copy=True) for piece in engine.local_pieces()]
        vectors: Any = engine.forward(query=torch.arange(50) + rank)  # type: ignore[arg-type]
        engine.backward([(vectors, torch.ones_like(vectors))])
        engine.step(1.0)
        end = [piece.on_host(copy=True) for piece in engine.local_pieces()]
        common = {"average": torch.arange(4000.0)}
        store.save(step, {}, common, {"cpu": torch.get_rng_state()}, engine.local_pieces(), in_background=True)
        store.wait()
    return counts, begin, end


@pytest.mark.slow
def test_each_rank_writes_and_reads_its_share(tmp_path: Path, pools: dict[int, Pool]) -> None:
    """Each continues from the previous checkpoint, bit by bit, on other ranks and at another ZeRO stage."""
    before, saved = 0, {}
    for step, (ranks, stage) in enumerate([(2, 1), (3, 3), (2, 2), (3, 0), (2, 3), (3, 1)], start=1):
        done = pools[ranks].run(one_step, tmp_path, stage, step)
        folder = tmp_path / f"step-{step:08d}"
        written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for what, total in (("written", written), ("read", before)):
            assert sum(counts[what] for counts, _, _ in done) == total, (what, step)
            assert max(counts[what] for counts, _, _ in done) <= 1.1 * total / ranks, (what, step)
        begin, end = (assembled([piece for one in done for piece in one[n]]) for n in (1, 2))
        assert saved.keys() <= begin.keys()
        assert all(torch.equal(begin[name], saved[name]) for name in saved), step
        read = open_tensors(folder)
        assert end.keys() == {name for name in read.names if not name.startswith("common/")}
        assert all(torch.equal(read(name), end[name]) for name in end)
        assert len(end) == 3 * 3 and not any("frozen" in name for name in end)  # weights and states that are trained
        assert not torch.equal(end["matrix.weight"], begin["matrix.weight"])
        before, saved = written, end


def saved_twice(rank: int, world_size: int, folder: Path, struck: int, in_background: bool) -> tuple[str, bool]:
    """Save, the second time with a full disk on rank `struck`; return its error, and whether `has_failed` was set."""

    def strike(step: int) -> None:
        time.sleep(0.2)
        if rank == struck:
            raise OSError(28, "No space left on device")

    store, share = CheckpointStore(folder, keep=3), even_share(TENSORS, rank, world_size)
    state = {"cpu": torch.full((3,), rank)}
    foreseen = False
    with small_blocks():
        store.save(4, {}, {}, state, share)
        try:
            store.between_files = strike
            store.save(8, {}, {}, state, share, in_background=in_background)
            until = time.monotonic() + 30
            while not store.has_failed() and time.monotonic() < until and struck < world_size:
                time.sleep(0.05)
            foreseen = store.has_failed()
            store.wait()
        except BigDSSMError as error:
            return f"{type(error).__name__}: {error}", foreseen
    return "", foreseen


def read_newest(rank: int, world_size: int, folder: Path) -> tuple[int, bool, list[int] | None] | None:
    """Return step, equality of the tensors with the saved ones, and this rank's state, of the newest checkpoint."""
    newest = CheckpointStore(folder, keep=3).newest_valid()
    if newest is None:
        return None
    read = newest.reader()
    same = all(torch.equal(read(name), tensor) for name, tensor in TENSORS)
    return newest.step, same, None if newest.rank_state is None else newest.rank_state["cpu"].tolist()


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_on_one_rank_stops_all(tmp_path: Path, pools: dict[int, Pool], in_background: bool) -> None:
    errors = pools[2].run(saved_twice, tmp_path, 1, in_background)
    assert "PeerError: rank 1 stopped: could not write a checkpoint" in errors[0][0]
    assert "CheckpointError: could not write" in errors[1][0] and "No space left on device" in errors[1][0]
    assert [foreseen for _, foreseen in errors] == [in_background] * 2
    assert pools[2].run(read_newest, tmp_path) == [(4, True, [rank] * 3) for rank in range(2)]
    assert (tmp_path / "latest").read_text() == "step-00000004"


def test_damage_that_one_rank_reads_is_damage_to_all(tmp_path: Path, pools: dict[int, Pool]) -> None:
    assert pools[3].run(saved_twice, tmp_path, 3, True) == [("", False)] * 3
    assert pools[2].run(read_newest, tmp_path) == [(8, True, None)] * 2
    file = tmp_path / "step-00000008" / "tensors-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert pools[2].run(read_newest, tmp_path) == [(4, True, None)] * 2
    assert (tmp_path / "damaged-step-00000008").is_dir()
    random = tmp_path / "step-00000004" / "rank-00002.safetensors"
    random.write_bytes(random.read_bytes()[:-1] + b"?")
    assert pools[2].run(read_newest, tmp_path) == [None] * 2  # though two ranks would not use it


def test_a_file_missing_on_one_rank_is_not_damage(tmp_path: Path, pools: dict[int, Pool]) -> None:
    assert pools[2].run(saved_twice, tmp_path, 2, False) == [("", False)] * 2
    errors = pools[2].run(unseen, tmp_path)
    assert "PeerError: rank 1 stopped: could not read a checkpoint" in errors[0]
    assert "tensors-00001.safetensors" in errors[1] and "No such file" in errors[1]
    assert sorted(path.name for path in tmp_path.glob("*step*")) == ["step-00000004", "step-00000008"]


def unseen(rank: int, world_size: int, folder: Path) -> str:
    """Load a checkpoint from a folder that rank 1 does not have; return the error."""
    opened = Path.open

    def not_there(path: Path, *arguments: Any, **options: Any) -> Any:
        return opened(path.with_name("elsewhere") / path.name if rank == 1 else path, *arguments, **options)

    Path.open = not_there  # type: ignore[method-assign]
    try:
        CheckpointStore(folder, keep=3).newest_valid()
    except BigDSSMError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        Path.open = opened  # type: ignore[method-assign]
    raise AssertionError("nothing was missed")


@pytest.mark.slow
def test_a_run_stops_soon_after_the_writing_behind_it_has_failed(tmp_path: Path, pools: dict[int, Pool]) -> None:
    """Not only at the next save, since there is none before the end."""
    done = pools[2].run(with_a_full_disk, small_run.write_dataset(tmp_path), tmp_path / "run", 2, 40)
    assert done[0][0].startswith("PeerError: rank 1 stopped: could not write a checkpoint")
    assert done[1][0].startswith("CheckpointError") and "No space left on device" in done[1][0]
    assert 2 < done[0][1] == done[1][1] < 40


def with_a_full_disk(
    rank: int, world_size: int, config: Path, run_dir: Path, full_at: int, steps: int
) -> tuple[str, int]:
    """Run with one checkpoint in the middle, for which rank 1 has no disk space; return the error and the steps."""
    from bigdssm.training import trainer

    done = 0
    train_step = trainer.train_step

    def counted(*arguments: Any) -> Any:
        nonlocal done
        done += 1
        time.sleep(0.03)
        return train_step(*arguments)

    trainer.train_step = counted
    train = trainer.Trainer.train

    def with_limited_space(self: Any) -> Any:
        if rank == 1:
            self.store.between_files = limit
        return train(self)

    def limit(step: int) -> None:
        if step == full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trainer.Trainer.train = with_limited_space
    overrides = (f"pretrain.steps={steps}", f"pretrain.save_every_steps={full_at}", "pretrain.validate_every_steps=0")
    due = trainer._is_due
    trainer._is_due = lambda step, every: step == full_at == every
    try:
        small_run.run(rank, world_size, config, run_dir, overrides)
    except BigDSSMError as error:
        return f"{type(error).__name__}: {error}", done
    finally:
        trainer.train_step, trainer._is_due = train_step, due
        trainer.Trainer.train = train
    return "", done
