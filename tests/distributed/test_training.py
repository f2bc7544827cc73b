"""Training as a whole, on 1, 2 and 3 ranks: one curve, exact resumes, steps that skip together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from bigdssm.checkpoints.checkpoint import verify
from tests.tiny_datasets import Writer

from . import small_run
from .compared_runs import (
    STREAMING,
    TABLES_LR_RATIO,
    assembled,
    assert_same_curve,
    assert_same_tensors,
    assert_same_weights,
    common,
    merged,
    restored_share,
    stop_after,
    write_dataset_with_two_rates,
)
from .spawn import Pool, RankFailed, run_ranks

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset_with_two_rates(tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("zero_stage", [pytest.param(1, marks=slow), 3])
def test_a_rank_ends_without_threads_of_its_groups(config: Path, tmp_path: Path, zero_stage: int) -> None:
    """A thread that releases a tensor while the interpreter exits would abort the process."""
    assert run_ranks(train_and_leave, 2, (config, tmp_path, zero_stage)) == [(True, 0), (True, 0)]


def train_and_leave(rank: int, world_size: int, config: Path, run_dir: Path, zero_stage: int) -> tuple[bool, int]:
    from bigdssm.training.process_group import leave_process_group

    modes = (f"engine.zero_stage={zero_stage}", "pretrain.save_every_steps=5", "engine.async_checkpoints=true")
    small_run.run(rank, world_size, config, run_dir, modes)
    during = small_run.group_threads()
    leave_process_group()
    return during > 0, small_run.group_threads()


@pytest.fixture(scope="module")
def reference(config: Path, tmp_path_factory: pytest.TempPathFactory, pools: dict[int, Pool]) -> Path:
    """One rank, ZeRO 1, float32, without chunks."""
    run_dir = tmp_path_factory.mktemp("reference")
    pools[1].run(small_run.run, config, run_dir)
    return run_dir


def test_the_loss_falls(reference: Path) -> None:
    records = small_run.records(reference)
    losses = [record["loss"] for record in records]
    assert len(losses) == 12
    assert losses[-1] < 0.9 * losses[0]
    said = {
        "lr", "grad_norm", "alpha", "dropped_fraction", "rows_per_s", "tokens_per_s",
        "padding_fraction", "data_wait_fraction", "skipped", "memory_gb",
    }  # fmt: skip
    assert all(said <= record.keys() and record["tokens_per_s"] > record["rows_per_s"] for record in records)
    assert not any("in_batch_accuracy" in record for record in records), "it would count scores with the correction"


@pytest.mark.parametrize(
    ("world_size", "zero_stage"),
    [
        (1, 0), (1, 3), (2, 1), (2, 2), (3, 0), (3, 3),
        *(pytest.param(*case, marks=slow) for case in ((1, 2), (2, 0), (2, 3), (3, 1), (3, 2))),
    ],
)  # fmt: skip
def test_one_curve_at_any_world_size_and_zero_stage(
    config: Path, reference: Path, tmp_path: Path, pools: dict[int, Pool], world_size: int, zero_stage: int
) -> None:
    pools[world_size].run(small_run.run, config, tmp_path, (f"engine.zero_stage={zero_stage}",))
    assert_same_curve(tmp_path, reference)
    assert_same_weights(tmp_path, reference)


@pytest.mark.parametrize(
    ("world_size", "zero_stage"), [(3, 1), *(pytest.param(2, stage, marks=slow) for stage in (0, 2, 3))]
)
def test_the_gradient_cache_changes_nothing(
    config: Path, reference: Path, tmp_path: Path, pools: dict[int, Pool], world_size: int, zero_stage: int
) -> None:
    pools[world_size].run(
        small_run.run, config, tmp_path, (f"engine.zero_stage={zero_stage}", "engine.chunk_tokens=100")
    )
    assert_same_curve(tmp_path, reference)
    assert_same_weights(tmp_path, reference)


@pytest.mark.slow
def test_streaming_frequencies_are_the_same_at_any_world_size_and_resume(
    config: Path, reference: Path, tmp_path: Path, pools: dict[int, Pool]
) -> None:
    overrides = (*STREAMING, "pretrain.save_every_steps=6", "pretrain.loss.direction=both")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pools[1].run(small_run.run, config, whole, overrides)
    pools[2].run(stop_after, config, cut, overrides, 6)
    assert_same_tensors(common(cut, 6), common(whole, 6))
    pools[3].run(small_run.run, config, cut, overrides, "pretrain", True)
    assert_same_tensors(common(cut, 12), common(whole, 12))
    assert common(whole, 12)["step"].tolist() == [12]
    curve = {record["step"]: record["loss"] for record in small_run.records(cut)}
    for record in small_run.records(whole):
        assert curve[record["step"]] == pytest.approx(record["loss"], rel=1e-5)
    assert_same_weights(cut, whole)
    with_counts = [record["loss"] for record in small_run.records(reference)]
    assert curve[12] != pytest.approx(with_counts[-1], rel=1e-3)


def test_streaming_frequencies_do_not_depend_on_the_number_of_ranks(tmp_path: Path, pools: dict[int, Pool]) -> None:
    Writer(tmp_path / "data", text=True, interactions=False).write()
    path = tmp_path / "config.yaml"
    content = TEXT_CONFIG | {"data": {**TEXT_CONFIG["data"], "dir": str(tmp_path / "data")}}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    for ranks in (1, 3):
        pools[ranks].run(small_run.run, path, tmp_path / f"{ranks}", STREAMING)
    assert len(small_run.records(tmp_path / "1")) == 6
    assert_same_curve(tmp_path / "3", tmp_path / "1")
    assert_same_tensors(common(tmp_path / "3", 6), common(tmp_path / "1", 6))


TEXT_CONFIG: dict[str, Any] = {
    "run": {"dir": "replaced", "trackers": []},
    "data": {
        "lanes": 6,
        "num_workers": 0,
        "query": {
            "age": {"type": "numeric"},
            "words": {"type": "text", "max_tokens": 6},
            "job": {"type": "categorical"},
            "likes": {"type": "categorical", "multi": True},
        },
        "doc": {
            "item": {"type": "categorical"},
            "tags": {"type": "categorical", "multi": True},
            "year": {"type": "numeric"},
            "title": {"type": "text", "max_tokens": 8},
        },
    },
    "model": {side: {"text": {"layers": 1, "hidden": 16, "heads": 2}} for side in ("query", "doc")},
    "pretrain": {
        "rows_global": 60,
        "steps": 6,
        "sampling": {"name": "corrected"},
        "log_every_steps": 1,
    },
}

FINE_TUNING = {
    "pair_ce, mined": ("sft.loss.name=pair_ce",),
    "triplet, both": ("sft.loss.name=triplet", "sft.negatives.in_batch=true", "sft.loss.weight=relevance"),
    "softmax, both": (
        "sft.loss.name=softmax", "sft.negatives.in_batch=true", "sft.sampling.name=corrected",
        "sft.sampling.frequency=streaming", "sft.negatives.mask=user",
    ),
    "fps, mined columns": ("sft.loss.name=fps", "sft.negatives.in_batch=true", "sft.sampling.name=corrected"),
}  # fmt: skip
QUICK = ("pair_ce, mined", "fps, mined columns")


@pytest.mark.slow
@pytest.mark.parametrize("loss", [pytest.param(loss, marks=() if loss in QUICK else slow) for loss in FINE_TUNING])
def test_fine_tuning_has_one_curve_at_any_world_size(
    config: Path, reference: Path, tmp_path: Path, pools: dict[int, Pool], loss: str
) -> None:
    """Also if rows of one rank share columns of documents and negatives, which rows of two ranks cannot."""
    overrides = (f"sft.init={reference / 'pretrain' / 'best'}", *FINE_TUNING[loss])
    for ranks in (1, 2, 3):
        pools[ranks].run(small_run.run, config, tmp_path / f"{ranks}", overrides, "sft")
    assert len(small_run.records(tmp_path / "1", "sft")) == 4
    start = pytest.approx(small_run.validations(reference)[-1]["ndcg_at_10"], abs=1e-5)  # best/ there is its last state
    queries_to_come = np.unique(np.load(tmp_path / "1" / "sft" / "mined_negatives.npy")["query"])
    assert len(queries_to_come) == 4 * 48
    for ranks in (1, 2, 3):
        assert small_run.validations(tmp_path / f"{ranks}", "sft")[0]["ndcg_at_10"] == start
        mined = np.load(tmp_path / f"{ranks}" / "sft" / "mined_negatives.npy")
        np.testing.assert_array_equal(mined["query"], queries_to_come)
        assert_same_curve(tmp_path / f"{ranks}", tmp_path / "1", stage="sft")


def test_existing_hard_negatives_are_used_and_missing_files_refused(
    config: Path, reference: Path, tmp_path: Path, pools: dict[int, Pool]
) -> None:
    """A resumed run would mine others, by its current weights. A checkpoint is as good a start as best/."""
    overrides = (f"sft.init={reference / 'pretrain' / 'best'}", *FINE_TUNING["pair_ce, mined"])
    checkpoint = f"sft.init={reference / 'pretrain' / 'checkpoints' / 'step-00000012'}"
    own, given = tmp_path / "own", tmp_path / "given"
    mined = own / "sft" / "mined_negatives.npy"
    pools[1].run(small_run.run, config, own, overrides, "sft")
    pools[1].run(small_run.run, config, given, (*overrides, checkpoint, f"sft.negatives.mining.file={mined}"), "sft")
    assert not (given / "sft" / "mined_negatives.npy").exists()
    assert_same_curve(given, own, tolerance=0, stage="sft")
    mined.unlink()
    with pytest.raises(RankFailed, match=r"CheckpointError: .*mined_negatives.npy is missing"):
        pools[1].run(small_run.run, config, own, overrides, "sft", True)


@pytest.mark.parametrize(
    ("stops", "mode"),
    [
        ((3,), ("engine.zero_stage=1", "engine.chunk_tokens=400")),
        pytest.param((3, 6), ("engine.zero_stage=1", "engine.chunk_tokens=400"), marks=slow),
        pytest.param((3, 6), ("engine.zero_stage=2", "engine.offload_optimizer=true"), marks=slow),
        pytest.param(
            (3,), ("engine.zero_stage=3", "engine.precision=bf16", "engine.checkpoint_activations=true"), marks=slow
        ),
        pytest.param((3,), ("engine.zero_stage=1", "engine.precision=bf16_pure"), marks=slow),
    ],
)
def test_an_interrupted_run_ends_with_the_same_bits(
    config: Path, tmp_path: Path, pools: dict[int, Pool], stops: tuple[int, ...], mode: tuple[str, ...]
) -> None:
    steps = 3 * len(stops) + 3
    options = (
        f"pretrain.steps={steps}",
        "model.query.history.dropout=0.1",
        "model.doc.dropout=0.1",
        "pretrain.save_every_steps=3",
        "debug.log_row_ids=true",
        *STREAMING,
        *mode,
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pools[2].run(small_run.run, config, whole, options)
    for stop_at in stops:
        pools[2].run(stop_after, config, cut, options, stop_at)
    pools[2].run(small_run.run, config, cut, options, "pretrain", True)
    first, second = (merged(run_dir / "pretrain" / "checkpoints" / f"step-{steps:08}") for run_dir in (whole, cut))
    assert len(first) > 3 * 20  # weights and both moments
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("row_ids-00000.jsonl", "row_ids-00001.jsonl"):
        assert (whole / "pretrain" / name).read_text() == (cut / "pretrain" / name).read_text()
    assert small_run.validations(cut) == small_run.validations(whole) != []
    logged = [[(record["step"], record["loss"]) for record in small_run.records(run_dir)] for run_dir in (whole, cut)]
    assert logged[0] == logged[1], "metrics.jsonl has each step once"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "stage_before", "stage_after"),
    [
        (2, 3, 2, 2),
        (3, 2, 0, 0),
        pytest.param(1, 2, 3, 3, marks=slow),
        pytest.param(2, 1, 1, 1, marks=slow),
        pytest.param(2, 3, 3, 1, marks=slow),
    ],
)
def test_another_world_size_resumes_with_the_same_state(
    config: Path,
    reference: Path,
    tmp_path: Path,
    pools: dict[int, Pool],
    before: int,
    after: int,
    stage_before: int,
    stage_after: int,
) -> None:
    """Weights and optimizer states are equal after the change, and the run continues as an uninterrupted one."""
    saving = "pretrain.save_every_steps=6"
    stage = (saving, f"engine.zero_stage={stage_before}")
    pools[before].run(stop_after, config, tmp_path, stage, 6)
    checkpoints = tmp_path / "pretrain" / "checkpoints"
    first = merged(checkpoints / "step-00000006")
    stage = (saving, f"engine.zero_stage={stage_after}")
    shares = pools[after].run(restored_share, config, tmp_path, stage)
    second = assembled([piece for share, _ in shares for piece in share])
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sum(name.startswith("exp_avg_sq/") for name in first) == len(first) // 3
    expected = {("matrices", 6.0, 0.01), ("tables", 6.0, 0.0), ("rest", 6.0, 0.0)}
    assert all(groups == expected for _, groups in shares)
    told = pools[after].run(learning_rates, config, tmp_path, stage)
    rate = small_run.records(tmp_path)[-1]["lr"]
    assert rate > 0
    assert told == [{"matrices": rate, "tables": TABLES_LR_RATIO * rate, "rest": rate}] * after
    curve = {record["step"]: record["loss"] for record in small_run.records(tmp_path)}
    for record in small_run.records(reference):
        assert curve[record["step"]] == pytest.approx(record["loss"], rel=1e-5)
    assert_same_weights(tmp_path, reference)


def learning_rates(
    rank: int, world_size: int, config: Path, run_dir: Path, overrides: tuple[str, ...]
) -> dict[str, float]:
    """Resume, run to the end, and return the learning rate of each group in the last step."""
    from bigdssm.training.trainer import Trainer

    found = {}
    original = Trainer.train

    def look(stage: object) -> object:
        progress = original(stage)  # type: ignore[arg-type]
        engine = stage.engine  # type: ignore[attr-defined]
        groups = engine.base_optimizer.param_groups
        found.update({group["name"]: float(group["lr"]) for group in groups})
        return progress

    Trainer.train = look  # type: ignore[method-assign,assignment]
    try:
        small_run.run(rank, world_size, config, run_dir, overrides, resume=True)
    finally:
        Trainer.train = original  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize(
    ("precision", "zero_stage", "more"),
    [
        ("fp32", 0, ()),
        ("fp32", 2, ("engine.offload_optimizer=true", "engine.chunk_tokens=400")),
        pytest.param("bf16", 3, (), marks=slow),
        ("bf16_pure", 1, ()),
        pytest.param("fp32", 1, (), marks=slow),
        pytest.param("fp32", 3, ("engine.offload_optimizer=true",), marks=slow),
        pytest.param("bf16_pure", 3, ("engine.offload_optimizer=true",), marks=slow),
    ],
)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(
    config: Path, tmp_path: Path, pools: dict[int, Pool], precision: str, zero_stage: int, more: tuple[str, ...]
) -> None:
    """If only a loss or only a gradient in the towers is NaN, the step changes nothing: weights are bit-identical."""
    log = ("pretrain.steps=4", "debug.log_row_ids=true")
    mode = (*log, f"engine.precision={precision}", f"engine.zero_stage={zero_stage}", *more)
    finals = []
    for where in ("loss", "gradient"):
        run_dir = tmp_path / where
        finals += pools[2].run(with_a_nan, config, run_dir, mode, 1, where)
        records = [record for record in small_run.records(run_dir) if record["step"] != 2]
        assert [(record["step"], record["skipped"]) for record in records] == [(1, 0), (3, 1), (4, 1)]
        for rank in (0, 1):
            consumed, skipped = (
                (run_dir / "pretrain" / f"{name}-0000{rank}.jsonl").read_text().splitlines()
                for name in ("row_ids", "skipped_rows")
            )
            assert skipped == [consumed[1]]
    for final in finals:
        assert all(tensor.isfinite().all() for tensor in final.values())
        assert all(torch.equal(final[name], finals[0][name]) for name in final)


def with_a_nan(
    rank: int, world_size: int, config: Path, run_dir: Path, overrides: tuple[str, ...], step: int, where: str
) -> dict[str, torch.Tensor]:
    """Run with a NaN in rank 1's loss, or only in its towers' gradients, at one step; return the final weights."""
    from bigdssm.training.engine import Engine
    from bigdssm.training.objective import Objective
    from bigdssm.training.trainer import Trainer

    found, now = {}, -1
    call, backward, train = Objective.__call__, Engine.backward, Trainer.train

    def spoiled(self: Objective, encoded: object, batch: object) -> object:
        nonlocal now
        now = batch.step  # type: ignore[attr-defined]
        output = call(self, encoded, batch)  # type: ignore[arg-type]
        if rank == 1 and now == step and where == "loss":
            return type(output)(output.loss + float("nan"), output.stats)  # its gradients stay finite
        return output

    def spoiled_backward(self: Engine, outputs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        if rank == 1 and now == step and where == "gradient":
            outputs = [(output, gradient * float("nan")) for output, gradient in outputs]
        backward(self, outputs)

    def keep(stage: Trainer) -> object:
        progress = train(stage)
        found.update(stage.engine.state_dict())
        return progress

    Objective.__call__, Engine.backward = spoiled, spoiled_backward  # type: ignore[method-assign,assignment]
    Trainer.train = keep  # type: ignore[method-assign,assignment]
    try:
        small_run.run(rank, world_size, config, run_dir, overrides)
    finally:
        Objective.__call__, Engine.backward = call, backward  # type: ignore[method-assign]
        Trainer.train = train  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("zero_stage", [0, *(pytest.param(stage, marks=slow) for stage in (1, 2, 3))])
def test_a_run_that_diverges_stops_on_all_ranks(
    config: Path, tmp_path: Path, pools: dict[int, Pool], zero_stage: int
) -> None:
    with pytest.raises(RankFailed, match="5 steps in a row had no finite loss") as caught:
        pools[2].run(exploding, config, tmp_path, (f"engine.zero_stage={zero_stage}",))
    assert str(caught.value).count("DivergedError") >= 2


def exploding(rank: int, world_size: int, config: Path, run_dir: Path, overrides: tuple[str, ...]) -> None:
    """Run with a learning rate out of bounds: weights become infinite within a step or two."""
    from bigdssm.training.engine import Engine

    step = Engine.step
    Engine.step = lambda engine, lr_factor: step(engine, 1e32)  # type: ignore[method-assign]
    try:
        small_run.run(rank, world_size, config, run_dir, overrides)
    finally:
        Engine.step = step  # type: ignore[method-assign]


def test_a_stopped_run_saves_on_all_ranks_first(config: Path, tmp_path: Path, pools: dict[int, Pool]) -> None:
    with pytest.raises(RankFailed, match="stopped on request after step 4, saved") as caught:
        pools[2].run(with_a_signal, config, tmp_path, 3)
    assert str(caught.value).count("Preempted") >= 2
    assert [path.name for path in (tmp_path / "pretrain" / "checkpoints").glob("step-*")] == ["step-00000004"]


def with_a_signal(rank: int, world_size: int, config: Path, run_dir: Path, step: int) -> None:
    """Run, with a SIGTERM to rank 1 in the middle of a step."""
    import os
    import signal

    from bigdssm.training import trainer

    original = trainer.train_step

    def signalled(*args: object) -> object:
        if rank == 1 and args[1].step == step:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)  # type: ignore[arg-type]

    trainer.train_step = signalled  # type: ignore[assignment]
    try:
        small_run.run(rank, world_size, config, run_dir)
    finally:
        trainer.train_step = original


def test_a_checkpoint_that_is_due_on_one_rank_is_saved_on_all_with_its_origin(
    config: Path, tmp_path: Path, pools: dict[int, Pool]
) -> None:
    pools[2].run(with_a_fast_clock, config, tmp_path, 3)
    checkpoints = tmp_path / "pretrain" / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-00000004", "step-00000012"]
    state = verify(checkpoints / "step-00000004").state
    assert state["config"]["pretrain"]["save_every_minutes"] == 1
    assert {"torch", "deepspeed", "bigdssm"} <= state["versions"].keys()


def with_a_fast_clock(rank: int, world_size: int, config: Path, run_dir: Path, step: int) -> None:
    """Save every minute; on rank 1 a minute passes in the middle of a step."""
    import time

    from bigdssm.training import trainer

    train_step, clock = trainer.train_step, time.monotonic

    def slow(*args: Any) -> object:
        if rank == 1 and args[1].step == step:
            time.monotonic = lambda: clock() + 61
        return train_step(*args)

    trainer.train_step = slow  # type: ignore[assignment]
    try:
        small_run.run(rank, world_size, config, run_dir, ("pretrain.save_every_minutes=1",))
    finally:
        trainer.train_step, time.monotonic = train_step, clock
