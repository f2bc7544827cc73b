"""Fine-tuning with periodically mined or teacher-scored hard negatives: one curve, exact resumes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bigdssm.checkpoints.checkpoint import checkpoints_in, load_checkpoint, read_manifest
from bigdssm.checkpoints.model_folder import load_checkpoint_model, load_model_folder
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.retrieval.embed import Encoders, tower_encoders
from bigdssm.retrieval.hard_negatives import HardNegatives, window_records
from bigdssm.retrieval.mining import mine
from bigdssm.retrieval.shards import Share
from bigdssm.retrieval.teacher_vectors import write_teacher_vectors
from tests.hard_negatives import write_hard_negatives

from . import small_run
from .compared_runs import assert_same_curve, write_dataset_with_two_rates
from .spawn import Pool, RankFailed

AGAIN = ("sft.steps=8", "sft.negatives.mining.every_steps=3", "sft.save_every_steps=2", "sft.keep_checkpoints=2")


class Stopped(Exception):
    """Raised on every rank, so that nothing is done at the end of the run."""


def break_off(rank: int, world_size: int, config: Path, run_dir: Path, overrides: tuple[str, ...], step: int) -> None:
    """Fine-tune, and stop in `step`."""
    from bigdssm.training import trainer

    original: Callable[..., Any] = trainer.train_step

    def failing(*args: Any, **kwargs: Any) -> Any:
        if args[1].step == step:
            raise Stopped
        return original(*args, **kwargs)

    trainer.train_step = failing
    try:
        small_run.run(rank, world_size, config, run_dir, overrides, "sft", (run_dir / "sft").exists())
    except Stopped:
        return
    finally:
        trainer.train_step = original
    raise AssertionError(f"the run has no step {step}")


def break_off_while_writing(rank: int, world_size: int, *args: Any) -> None:
    """The same, but a checkpoint is written during the second step after it."""
    from bigdssm.checkpoints.store import CheckpointStore

    original: Callable[..., Any] = CheckpointStore._write

    def slow(self: CheckpointStore, *parts: Any) -> None:
        time.sleep(2)
        original(self, *parts)

    CheckpointStore._write = slow  # type: ignore[method-assign]
    try:
        break_off(rank, world_size, *args)
    finally:
        CheckpointStore._write = original  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset_with_two_rates(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def reference(config: Path, tmp_path_factory: pytest.TempPathFactory, pools: dict[int, Pool]) -> Path:
    """One rank, ZeRO 1, float32, without chunks."""
    run_dir = tmp_path_factory.mktemp("reference")
    pools[1].run(small_run.run, config, run_dir)
    return run_dir


def start(reference: Path) -> str:
    return f"sft.init={reference / 'pretrain' / 'best'}"


def hard_negative_files(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "sft").glob("mined_negatives*"))


@pytest.fixture(scope="module")
def refreshing_run(
    config: Path, reference: Path, tmp_path_factory: pytest.TempPathFactory, pools: dict[int, Pool]
) -> Path:  # fmt: skip
    """One rank, never interrupted: mined before the steps 0, 3 and 6 of 8."""
    run_dir = tmp_path_factory.mktemp("refreshing_run")
    pools[1].run(small_run.run, config, run_dir, (start(reference), *AGAIN), "sft")
    return run_dir


@pytest.mark.slow
def test_refreshed_negatives_use_the_weights_of_their_step(
    config: Path, reference: Path, refreshing_run: Path, tmp_path: Path, pools: dict[int, Pool]
) -> None:  # fmt: skip
    """On any number of ranks. Files that no checkpoint needs are removed."""
    names = [f"mined_negatives.step-0000000{step}.npy" for step in (3, 6)]
    assert hard_negative_files(refreshing_run) == names
    loaded = load_checkpoint_model(refreshing_run / "sft" / "checkpoints" / "step-00000006")
    dataset = loaded.view(Dataset.open(load_config(config).data.dir))
    everything = HardNegatives(mine(tower_encoders(loaded.model, dataset), dataset, first=1, last=20))
    third, last = (HardNegatives.open(refreshing_run / "sft" / name) for name in names)
    assert len(last) == len(third) == 3 * 48
    np.testing.assert_array_equal(last.windows(last.queries), everything.windows(last.queries))
    assert (third.windows(third.queries) != everything.windows(third.queries)).any()
    pools[2].run(small_run.run, config, tmp_path, (start(reference), *AGAIN), "sft")
    assert_same_curve(tmp_path, refreshing_run, stage="sft")
    assert len(small_run.records(refreshing_run, "sft")) == 8


@pytest.mark.slow
def test_a_run_that_refreshes_negatives_resumes_exactly(
    config: Path, reference: Path, refreshing_run: Path, tmp_path: Path, pools: dict[int, Pool]
) -> None:  # fmt: skip
    """Between two minings, and just where it is mined: then from the same weights, the file being there or not.

    It may become longer: what was mined last reaches as far as it always does.
    """
    overrides = (start(reference), *AGAIN)
    pools[1].run(break_off, config, tmp_path, overrides, 5)
    assert hard_negative_files(tmp_path) == [f"mined_negatives.step-0000000{step}.npy" for step in (0, 3)]
    third = tmp_path / "sft" / "mined_negatives.step-00000003.npy"
    kept = third.read_bytes()
    third.unlink()
    with pytest.raises(RankFailed, match=r"CheckpointError: .*step-00000003.npy is missing"):
        pools[1].run(small_run.run, config, tmp_path, overrides, "sft", True)
    third.write_bytes(kept)
    pools[1].run(break_off, config, tmp_path, overrides, 7)
    (tmp_path / "sft" / "mined_negatives.step-00000006.npy").unlink()
    pools[1].run(small_run.run, config, tmp_path, overrides, "sft", True)
    curve = {record["step"]: record for record in small_run.records(tmp_path, "sft")}
    for record in small_run.records(refreshing_run, "sft"):
        assert (curve[record["step"]]["loss"], curve[record["step"]]["grad_norm"]) == (
            record["loss"], record["grad_norm"]
        )  # fmt: skip
    pools[1].run(small_run.run, config, tmp_path, (*overrides, "sft.steps=9"), "sft", True)
    assert small_run.records(tmp_path, "sft")[-1]["step"] == 9


def test_negatives_of_a_checkpoint_are_retained_during_its_write(
    config: Path, reference: Path, tmp_path: Path, pools: dict[int, Pool]
) -> None:  # fmt: skip
    """The checkpoint of step 2 needs the file mined at step 0, and is being written during the mining at step 3."""
    pools[1].run(break_off_while_writing, config, tmp_path, (start(reference), *AGAIN), 3)
    assert [path.name for path in checkpoints_in(tmp_path / "sft" / "checkpoints")] == ["step-00000002"]
    assert hard_negative_files(tmp_path) == [f"mined_negatives.step-0000000{step}.npy" for step in (0, 3)]


def assert_is_followed(config: Path, folder: Path, pools: dict[int, Pool], given: tuple[str, ...]) -> None:
    """The distillation loss decreases, with the same curve on any number of ranks."""
    overrides = (*given, "sft.steps=12", "sft.optimizer.lr=0.01")
    for ranks in (1, 2):
        pools[ranks].run(small_run.run, config, folder / f"{ranks}", overrides, "sft")
    assert_same_curve(folder / "2", folder / "1", stage="sft")
    left = [record["distillation"] for record in small_run.records(folder / "1", "sft")]
    assert left[-1] < 0.9 * left[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fps, direction: both", "softmax"])
def test_teacher_vectors_are_learned_on_any_number_of_ranks(
    config: Path, reference: Path, tmp_path: Path, pools: dict[int, Pool], name: str
) -> None:  # fmt: skip
    """A teacher that ranks documents by number, over the global batch, on any number of ranks and chunks."""
    dataset = Dataset.open(load_config(config).data.dir)

    def by_number(rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(rows / 10.0)[:, None].float()

    likes = Encoders(lambda rows: torch.ones(len(rows), 1), by_number)
    assert write_teacher_vectors(tmp_path / "teacher", likes, dataset, "likes", Share()) is not None
    distillation = f"{{name: batch_kl, temperature: 0.5, teacher: {tmp_path / 'teacher'}}}"
    blocks = f"{{loss: {{name: {name}}}, negatives: {{in_batch: true, hard: 2}}, distillation: {distillation}}}"
    given = (start(reference), f"sft={blocks}")
    assert_is_followed(config, tmp_path, pools, given)


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    ["{loss: {name: fps}, negatives: {in_batch: true, hard: 3}, distillation: {name: kl, temperature: 0.5}}",
     "{loss: {name: pair_ce}, negatives: {in_batch: false, hard: 3}, distillation: {name: margin_mse, weight: 0.1}}"],
    ids=["fps and kl", "pair_ce and margin_mse"],
)  # fmt: skip
def test_teacher_scores_are_learned_on_any_number_of_ranks(
    config: Path, reference: Path, refreshing_run: Path, tmp_path: Path, pools: dict[int, Pool], loss: str
) -> None:  # fmt: skip
    """A teacher that ranks documents by number: the distillation loss decreases on any number of ranks."""
    dataset = Dataset.open(load_config(config).data.dir)
    model = load_checkpoint_model(refreshing_run / "sft" / "checkpoints" / "step-00000006").model
    mined = mine(tower_encoders(model, dataset), dataset, first=1, last=20)
    own = np.concatenate([rows.doc_rows for rows in dataset.iterate("train", 999)])
    scores = np.concatenate([own[:, None], mined["window"]], 1) / 10.0
    write_hard_negatives(tmp_path / "scored.npy", window_records(mined["query"], mined["window"], scores), dataset)
    given = (start(reference), f"sft.negatives.mining.file={tmp_path / 'scored.npy'}", f"sft={loss}")
    assert_is_followed(config, tmp_path, pools, given)


@pytest.mark.slow
def test_a_position_bias_is_exact_on_any_number_of_ranks(
    config: Path, reference: Path, tmp_path: Path, pools: dict[int, Pool]
) -> None:  # fmt: skip
    """At ZeRO 3, in chunks and after a resume; it is in checkpoints, and in no model folder."""
    dataset = Dataset.open(load_config(config).data.dir)
    parts = [(rows.query_keys, rows.doc_rows) for rows in dataset.iterate("train", 999)]
    keys, own = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    random = np.random.RandomState(0)
    window = (own[:, None] + 1 + np.argsort(random.rand(len(own), 47))[:, :6]) % 48
    shown = 1 + np.argsort(random.rand(len(own), 7))
    write_hard_negatives(tmp_path / "shown.npy", window_records(keys, window, shown=shown), dataset)
    given = (
        start(reference), f"sft.negatives.mining.file={tmp_path / 'shown.npy'}", "sft.steps=8",
        "sft.save_every_steps=2", "sft.loss.position_bias=5",
    )  # fmt: skip
    other = ("engine.zero_stage=3", "engine.chunk_tokens=64")
    pools[1].run(small_run.run, config, tmp_path / "1", given, "sft")
    pools[2].run(small_run.run, config, tmp_path / "2", (*given, *other), "sft")
    pools[1].run(break_off, config, tmp_path / "3", given, 5)
    pools[2].run(small_run.run, config, tmp_path / "3", (*given, *other), "sft", True)
    pools[1].run(small_run.run, config, tmp_path / "none", (*given, "sft.loss.position_bias=0"), "sft")
    assert_same_curve(tmp_path / "2", tmp_path / "1", stage="sft")
    without, curve = small_run.records(tmp_path / "none", "sft"), small_run.records(tmp_path / "1", "sft")
    assert without[0]["loss"] == curve[0]["loss"] and abs(without[-1]["loss"] / curve[-1]["loss"] - 1) > 1e-4
    biases = [checkpoints_in(tmp_path / run / "sft/checkpoints")[-1] for run in "123"]
    read = [load_checkpoint(read_manifest(path), 0, 1) for path in biases]
    first, *others = (checkpoint.common_tensors()["position_bias"] for checkpoint in read)
    assert first.shape == (3, 5) and float(first[0].abs().min()) > 0 and float(first[0].abs().max()) > 0.05
    for bias in others:
        torch.testing.assert_close(bias, first, rtol=1e-4, atol=1e-7)
    records = {record["step"]: record for record in small_run.records(tmp_path / "3", "sft")}
    for record in curve:
        assert records[record["step"]]["loss"] == pytest.approx(record["loss"], rel=1e-5)
        assert records[record["step"]]["position_bias"] == pytest.approx(record["position_bias"], rel=1e-4, abs=1e-9)
    biased, plain = (load_model_folder(tmp_path / run / "sft/best").model.state_dict() for run in ("1", "none"))
    assert biased.keys() == plain.keys()
