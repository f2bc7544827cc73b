"""Parts of training: parameter groups, schedule, chunks, random states, the row log, expected columns."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import bigdssm
from bigdssm.cluster.run_folder import CONSUMED, RowLog
from bigdssm.config import EngineConfig, MiningConfig, NegativesConfig, StageConfig, load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.distributed import free_port
from bigdssm.errors import ConfigError, DataError
from bigdssm.loader.batch import ListLengths, lengths_of, prefetch
from bigdssm.loader.step_plan import ChunkCounts, Chunked, StepPlan, TokenBudget, plan_locally, plan_side
from bigdssm.loader.stream import PairStream, RowCounts
from bigdssm.losses import ListwiseKL, Softmax
from bigdssm.retrieval.hard_negatives import HardNegatives, window_records
from bigdssm.training import engine, process_group
from bigdssm.training.batches import BatchBuilder, known_pairs, read_batches
from bigdssm.training.objective import catalogue_share, in_catalogue_share
from bigdssm.training.optimizers import AdamW, parameter_groups, schedule_factor, warmup_steps
from bigdssm.training.start import StageProgress
from bigdssm.training.step import RankReport
from bigdssm.utils.device import RandomState
from tests.conftest import NUM_ITEMS, TinyDataset


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.layer = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.log_alpha = nn.Parameter(torch.zeros(1))
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def test_only_matrices_decay() -> None:
    model = Everything()
    config = AdamW(lr=0.1, embedding_lr_ratio=2.0, weight_decay=0.5)
    groups = {group["name"]: group for group in parameter_groups(model, config)}
    assert [id(p) for p in groups["matrices"]["params"]] == [id(model.layer.weight)]
    assert [id(p) for p in groups["tables"]["params"]] == [id(model.table.weight)]
    rest = {id(p) for p in groups["rest"]["params"]}
    assert rest == {id(model.layer.bias), id(model.norm.weight), id(model.norm.bias), id(model.log_alpha)}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "matrices": 0.5,
        "tables": 0.0,
        "rest": 0,
    }
    assert groups["tables"]["lr"] == pytest.approx(0.2)


def test_the_schedule_warms_up_and_falls_to_its_end() -> None:
    config = AdamW(warmup_steps=10, final_lr_ratio=0.1)
    factors = [schedule_factor(step, 100, config) for step in range(101)]
    assert factors[:10] == sorted(factors[:10]) and factors[0] == pytest.approx(1 / 11)
    assert factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0.1)


@pytest.mark.parametrize("steps", [1, 2, 3, 60, 150, 1000])
def test_a_short_run_ends_at_the_end_of_its_schedule_too(steps: int) -> None:
    """Its warm-up is at most half of it: otherwise the last step would have nearly the highest rate."""
    factors = [schedule_factor(step, steps, AdamW(warmup_steps=100)) for step in range(steps + 1)]
    assert factors[steps] == pytest.approx(0.0 if steps > 1 else 1.0)
    assert steps < 60 or (factors[steps - 1] < 0.01 and max(factors) == 1.0)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[3] / "configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shipped_configs_have_the_warm_up_that_they_name(path: Path) -> None:
    config = load_config(path)
    for stage in (config.pretrain, config.sft):
        if stage is not None and stage.steps:
            assert warmup_steps(stage.steps, stage.optimizer) == stage.optimizer.warmup_steps


@pytest.mark.parametrize(
    ("progress", "words"),
    [
        (StageProgress(best=0.25, history=[{}]), "best validation NDCG@10 0.2500"),
        (StageProgress(), "no validation split"),
        (StageProgress(history=[{"step": 1}], segment_start_step=1), "no validation split"),  # in a new segment
    ],
)
def test_the_best_metric_is_described_if_it_exists(progress: StageProgress, words: str) -> None:
    assert words in progress.describe_best("ndcg_at_10") and "inf" not in progress.describe_best("ndcg_at_10")


def test_progress_and_reports_are_read_as_they_were_written() -> None:
    progress = StageProgress(step=9, applied=8, history=[{"step": 4}], segment_start_step=4, segment_start_applied=3)
    state = progress.state_dict()
    assert (state["part_step"], state["part_applied"], len(state)) == (4, 3, 10)
    assert StageProgress.from_state_dict(state) == progress
    report = RankReport(1.0, 0.0, 5.0, RowCounts(0.0, 1.5, 64.0), ChunkCounts(2, 3, 1, 0))
    row = torch.tensor(report.numbers(), dtype=torch.float64).tolist()
    assert RankReport.of_numbers(row) == report and len(row) == 10
    assert all(type(number) is int for number in RankReport.of_numbers(row).chunks)


def test_trailing_zeros_of_a_vector_are_not_padding() -> None:
    features = {"items": torch.tensor([[1, 2, 3], [1, 0, 0], [0, 0, 0]]), "vector": torch.tensor([[1.0, 0.0, 0.0]] * 3)}
    pads = {"items": 0}
    plan = plan_side(lengths_of(features, pads), 3, 4)
    side = Chunked(features, plan)
    assert [side.features(chunk)["vector"].shape[1] for chunk in plan.chunks] == [3, 3]
    assert [chunk.tokens for chunk in plan.chunks] == [4, 4] and plan.filled == 4
    whole = plan_side(lengths_of(features, pads), 3, 0)
    assert StepPlan(whole, plan_side({}, 2, 0), whole=True).padding == 5 / 9


@pytest.mark.parametrize("pad", [0, 9])
def test_chunks_keep_the_budget_and_every_row_once(pad: int) -> None:
    """For any padding token; token 0 is then an ordinary one, also as the last of a row."""
    lengths, pads = [1, 7, 3, 3, 9, 2, 0], {"tags": 0, "text": pad}
    text = torch.full((7, 9), pad)
    for row, length in enumerate(lengths):
        text[row, :length] = 0 if pad else row + 1
    tags = torch.tensor([[0, 0], [1, 0], [1, 1], [0, 0], [1, 1], [0, 0], [1, 0]])
    features = {"tags": tags, "text": text, "number": torch.arange(7.0)}
    plan = plan_side(lengths_of(features, pads), 7, 14)
    assert plan.order.tolist() == [4, 1, 2, 3, 5, 0, 6]
    side, cells = Chunked(features, plan), 0
    for chunk in plan.chunks:
        taken, rows = side.features(chunk), side.outputs(chunk)
        part = taken["text"]
        assert part.shape[1] == max(1, max(lengths[row] for row in rows.tolist()))
        assert len(rows) == chunk.num_rows and (len(rows) == 1 or chunk.tokens <= 14)
        assert torch.equal(taken["number"], rows.float())
        assert torch.equal(part, text[rows][:, : part.shape[1]])
        cells += part.numel() + taken["tags"].numel()
    assert plan.filled == sum(lengths) + 6 and plan.cells == cells
    parts = [side.features(chunk)["number"] for chunk in plan.chunks]
    assert torch.equal(side.assemble(parts), features["number"])
    whole = plan_side(lengths_of(features, pads), 7, 0)
    assert StepPlan(whole, plan_side({}, 2, 0), whole=True).padding == pytest.approx(1 - plan.filled / (7 * 11))


def test_padding_tokens_within_a_row_are_not_cut_off() -> None:
    """A tokenizer may return its padding token for a word of the text."""
    features = {"text": torch.tensor([[4, 0, 5, 0], [4, 5, 0, 0], [0, 0, 0, 0]])}
    lengths = lengths_of(features, {"text": 0})["text"]
    assert (lengths.filled.tolist(), lengths.used.tolist(), lengths.width) == ([2, 2, 0], [3, 2, 0], 4)
    assert [len(plan_side({"text": lengths}, 3, budget).chunks) for budget in (12, 11)] == [1, 2]
    plan = plan_side({"text": lengths}, 3, 1)
    side = Chunked(features, plan)
    assert [side.features(chunk)["text"].tolist() for chunk in plan.chunks] == [[[4, 0, 5]], [[4, 5]], [[0]]]


def test_uniform_draws_differ_by_step_and_seed_and_take_any_seed() -> None:
    catalogue = SimpleNamespace(num_docs=10**6, withdrawn=np.zeros(0, np.int64))
    dataset = SimpleNamespace(schema=None, catalogue=catalogue, header=SimpleNamespace(dated=False))
    stream = SimpleNamespace(dataset=dataset, inline=False, steps_per_epoch=1, rank=0, world_size=1)
    stage = StageConfig(negatives=NegativesConfig(uniform=5))
    drawn = {
        (seed, step): tuple(BatchBuilder(stream, stage, seed).drawn(step))  # type: ignore[arg-type]
        for seed in (0, 1, 20251123, 2**32 - 1)
        for step in (0, 1)
    }
    assert len(set(drawn.values())) == 8 and all(len(draws) == 5 for draws in drawn.values())


def test_negatives_that_the_teacher_scores_above_the_positive_are_not_drawn(tiny_interactions: TinyDataset) -> None:
    """Minus the margin; documents without a score may be drawn, and the scores of drawn ones are returned."""
    stream = PairStream(Dataset.open(tiny_interactions.dir), rows_global=24, lanes=4)
    rows = next(iter(stream))
    m = rows.num_queries
    windows = np.tile(np.arange(5, dtype=np.int32), (m, 1))
    teacher = np.tile(np.array([1, 0.2, 0.6, 1.5, np.nan, 0.7], np.float32), (m, 1))
    order = np.argsort(rows.query_keys)
    mined = HardNegatives(window_records(rows.query_keys[order], windows, teacher))

    def drawn(teacher_margin: float | None) -> tuple[set[int], np.ndarray]:
        negatives = NegativesConfig(hard=5, mining=MiningConfig(teacher_margin=teacher_margin))
        stage = StageConfig(loss=Softmax(), negatives=negatives, distillation=ListwiseKL())
        drawn, scores, positions = BatchBuilder(stream, stage, 0, mined).negatives(rows)
        assert positions is None and scores is not None and (scores[:, 0] == 1).all()
        np.testing.assert_array_equal(scores[:, 1:], np.where(drawn < 0, np.nan, teacher[0, 1:][drawn]))
        return set(drawn[drawn >= 0].tolist()), scores

    assert [drawn(margin)[0] for margin in (None, 0.0, 0.35, -1.0)] == [
        {0, 1, 2, 3, 4}, {0, 1, 3, 4}, {0, 1, 3}, {0, 1, 2, 3, 4}
    ]  # fmt: skip


@pytest.mark.parametrize("mask", ["user", "past"])
def test_known_pairs_are_the_events_before_each_query(tiny_interactions: TinyDataset, mask: str) -> None:
    """By query index, the events before it; by query id, the events before the last of its rows."""
    dataset = Dataset.open(tiny_interactions.dir)
    rows = next(iter(PairStream(dataset, rows_global=160, lanes=4)))
    ids = dataset.catalogue.doc_ids
    assert len(set(rows.query_ids.tolist())) < len(rows)
    expected: set[tuple[int, int]] = set()
    for row, query in enumerate(rows.query_ids.tolist()):
        expected |= {(row if mask == "past" else query, int(ids[doc])) for doc in rows.seen(row)}
    found = [tuple(pair) for pair in known_pairs(rows, mask, ids, dataset).tolist()]
    assert set(found) == expected
    assert len(found) < len(expected) + 160 * 5  # an item that occurred twice is there twice, a row is not
    nothing = rows.take(np.empty(0, np.int64))
    assert known_pairs(nothing, mask, ids, dataset).shape == (0, 2)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_catalogue_as_columns(tiny_interactions: TinyDataset, world_size: int) -> None:
    """Every document is once in one rank's share, after the positives of the rank's rows."""
    dataset = Dataset.open(tiny_interactions.dir)
    stage = StageConfig(negatives=NegativesConfig(columns="catalogue", mask="past"))
    shares = []
    for rank in range(world_size):
        stream = PairStream(dataset, rows_global=24, lanes=4, rank=rank, world_size=world_size)
        make = BatchBuilder(stream, stage)
        batch = next(read_batches(stream, make, torch.device("cpu")))
        docs, num_positives = batch.doc_rows.tolist(), len(set(batch.positive.tolist()))
        assert len(set(docs)) == len(docs) and set(batch.positive.tolist()) == set(range(num_positives))
        share = catalogue_share(NUM_ITEMS, rank, world_size).tolist()
        assert docs[num_positives:] == [doc for doc in share if doc not in docs[:num_positives]]
        assert [doc for doc, own in zip(docs, in_catalogue_share(batch, rank, world_size), strict=True) if own] == (
            [doc for doc in docs if doc in share]
        )
        assert int(batch.counts.sum()) == len(batch.positive) + len(share)
        shares += share
    assert sorted(shares) == list(range(NUM_ITEMS))


def test_a_rank_without_rows_still_has_something_to_encode() -> None:
    features = {"text": torch.zeros(0, 0, dtype=torch.int64), "number": torch.zeros(0)}
    plan = plan_side(lengths_of(features, {"text": 0}), 0, 12)
    assert plan.chunks == ()
    plan = plan.padded_to(2)
    side, (dummy, other) = Chunked(features, plan), plan.chunks
    taken = side.features(dummy)
    assert taken["text"].shape == (1, 1) and taken["number"].shape == (1,)
    assert dummy == other and dummy.num_rows == len(side.outputs(dummy)) == 0
    assert side.assemble([taken["number"], taken["number"]]).shape == (0,)


def test_a_replayed_state_draws_the_same_and_leaves_no_trace() -> None:
    state = RandomState.now()
    first = torch.rand(3), np.random.rand(), random.random()
    torch.rand(5), np.random.rand(5), random.random()  # advance further than the replay
    following = RandomState.now()
    with state.replayed():
        assert torch.equal(torch.rand(3), first[0]) and (np.random.rand(), random.random()) == first[1:]
    present = RandomState.now()
    assert torch.equal(present.cpu, following.cpu) and present.python == following.python
    assert np.array_equal(present.numpy[1], following.numpy[1]) and present.numpy[2] == following.numpy[2]


def test_the_row_log_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    log = RowLog(tmp_path, CONSUMED, 0, 1, 0)
    for step in range(1, 5):
        log.write(step, torch.tensor([step, step + 10]))
    with (tmp_path / "row_ids-00000.jsonl").open("a") as file:
        file.write('{"step": 5, "row_i')  # killed while writing
    RowLog(tmp_path, CONSUMED, 0, 1, 2).write(3, torch.tensor([7]))
    lines = [json.loads(line) for line in (tmp_path / "row_ids-00000.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[2]["row_ids"] == [7]


@pytest.mark.slow
def test_an_engine_without_a_launcher_compiles_nothing(tmp_path: Path) -> None:
    """DeepSpeed joins a process group by itself if none exists. Nothing that takes seconds is imported."""
    code = """
import sys
import torch
import bigdssm.training.stages
slow = {"transformers", "torch._dynamo", "matplotlib"} & set(sys.modules)
from bigdssm.config import EngineConfig
from bigdssm.training.engine import Engine
from bigdssm.training.optimizers import AdamW
Engine(torch.nn.Linear(2, 2), EngineConfig(), AdamW(), 1)
assert not slow and "torch._inductor.lowering" not in sys.modules
"""
    variables = {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env={**os.environ, **variables})
    assert not (tmp_path / "extensions").exists()


USERS_ENGINE = """
import os, sys
import deepspeed, torch

def attributes():
    found = {("environment", name): value for name, value in os.environ.items()}
    registry = "__warningregistry__"
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("deepspeed", "torch"):
            found |= {(name, key): id(value) for key, value in list(vars(module).items()) if key != registry}
            for value in list(vars(module).values()):
                if isinstance(value, type) and value.__module__ == name and name.startswith("deepspeed"):
                    found |= {(name, value.__name__, key): id(member) for key, member in list(vars(value).items())}
    return found

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # the user's decision: compile nothing
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "zero_optimization": {"stage": 3}}
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
engine.backward(engine(torch.ones(2, 4)).sum())
engine.step()

before, ops = attributes(), dict(deepspeed.ops.__compatible_ops__)
import bigdssm
for _ in range(3):
    batch = bigdssm.pair_batch({"x": torch.randn(6, 4)}, {"x": torch.randn(6, 4)})
    bigdssm.cached_step(engine, batch, chunk_tokens=3, encode_side=lambda engine, side, inputs: engine(inputs["x"]))
    engine.step()
after = attributes()
assert before == after, {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
assert ops == deepspeed.ops.__compatible_ops__

from bigdssm.training.patches import MUON, apply_patches, undo_patches
for name in [name for name in sys.modules if name.startswith(MUON)]:
    del sys.modules[name]
before = attributes()
apply_patches()
apply_patches()  # as a second engine
changed = {f"{key[0]}.{key[1]}" for key, value in attributes().items() if key in before and before[key] != value}
assert changed - {"deepspeed.runtime.zero.muon"} == set(sys.argv[1:]), changed
assert not hasattr(sys.modules[f"{MUON}.original_muon"].muon_update, "_torchdynamo_orig_callable")
undo_patches()
after = attributes()
assert all(after[key] == value for key, value in before.items() if key[:2] != ("deepspeed.runtime.zero", "muon"))
assert not any(name.startswith(MUON) for name in sys.modules)
"""
PATCHED = {  # the function, its signature, and a call of it
    "deepspeed.comm.torch.build_shm_op": ("()", "self.shm_comm_op = build_shm_op()"),
    "deepspeed.runtime.zero.partitioned_param_coordinator.assert_ints_same_as_other_ranks": (
        "(*args, **kwargs)", "assert_ints_same_as_other_ranks([m.ds_id for m in self.__submodule_order])",
    ),
    "deepspeed.runtime.zero.stage_1_and_2.is_invalid_grad_norm": (
        "(norm)", "or self.check_grad_overflow) and is_invalid_grad_norm(scaled_global_grad_norm)",
    ),
    "deepspeed.runtime.zero.stage_1_and_2.mask_nan_or_inf_with_val_inplace": (
        "(input, device=None, val=-1.0)", "mask_nan_or_inf_with_val_inplace(total_norm, device=self.device)",
    ),
    "deepspeed.runtime.zero.stage3.mask_nan_or_inf_with_val_inplace": (
        "(input, device=None, val=-1.0)", "mask_nan_or_inf_with_val_inplace(total_norm, device=total_norm.device)",
    ),
}  # fmt: skip


def test_a_users_engine_runs_without_the_patches(tmp_path: Path) -> None:
    """No attribute of DeepSpeed and torch differs after cached steps, nor after an engine of the project's own."""
    variables = {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", "-c", USERS_ENGINE, *PATCHED]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, **variables})


@pytest.mark.parametrize(
    ("ranks", "variables", "words"),
    [
        (1, {"WORLD_SIZE": "2"}, "got 1 ranks of 2, needs all"),
        (1, {"ACCELERATE_USE_DEEPSPEED": "true"}, "got a DeepSpeed config and MULTI_CPU, needs an engine"),
        (1, {}, ""),
    ],
)
def test_a_trainer_without_its_ranks_or_deepspeed_is_refused(
    ranks: int, variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = SimpleNamespace(num_processes=ranks, distributed_type="MULTI_CPU")
    accelerate = SimpleNamespace(is_initialized=lambda: True, AcceleratorState=lambda: state)
    monkeypatch.setitem(sys.modules, "accelerate.state", accelerate)  # type: ignore[arg-type]
    for name in ("WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    batch = bigdssm.pair_batch({"input": torch.randn(4, 3)}, {"input": torch.randn(4, 3)})
    model = bigdssm.TwoTowers(nn.Linear(3, 2), nn.Linear(3, 2))
    with pytest.raises(ConfigError, match=words) if words else nullcontext():
        bigdssm.cached_step(model, batch, chunk_tokens=0)


@pytest.mark.parametrize("name", PATCHED)
def test_deepspeed_still_has_the_functions_that_are_replaced(name: str) -> None:
    module_name, _, function = name.rpartition(".")
    module, (signature, call) = importlib.import_module(module_name), PATCHED[name]
    assert str(inspect.signature(getattr(module, function))) == signature
    assert call in inspect.getsource(module)


def test_deepspeed_still_compiles_muon_on_import() -> None:
    import deepspeed

    source = (Path(deepspeed.__file__).parent / "runtime" / "zero" / "muon" / "original_muon.py").read_text()
    assert "from deepspeed.runtime import compiler" in source and "\n@compiler.compile()\n" in source


def test_a_norm_is_marked_as_by_deepspeed() -> None:
    from deepspeed.runtime import utils

    from bigdssm.training.patches import _mark

    for value in (0.0, 2.5, math.inf, -math.inf, math.nan):
        norms = torch.tensor(value), torch.tensor(value)
        utils.mask_nan_or_inf_with_val_inplace(norms[0])
        _mark(norms[1])
        assert torch.equal(*norms)


def test_ranks_with_devices_also_talk_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL alone rejects CPU tensors, in which ranks agree on chunks, losses and stops."""
    assert process_group._backend() == "gloo"
    card = SimpleNamespace(device_name=lambda: "cuda", communication_backend_name=lambda: "nccl")
    monkeypatch.setattr(process_group, "get_accelerator", lambda: card)
    assert process_group._backend() == "cpu:gloo,cuda:nccl"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_device_has_a_fused_optimizer_and_reductions_behind_the_backward(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU, on which buckets would only be copies, has neither."""

    class There(nn.Parameter):
        is_cuda = device == "cuda"

    monkeypatch.setattr(process_group, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: device))
    model = Everything()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            assert parameter is not None
            module._parameters[name] = There(parameter.detach(), parameter.requires_grad)
    groups = AdamW().build(parameter_groups(model, AdamW())).param_groups
    assert {bool(group["fused"]) for group in groups} == {device == "cuda"}
    for stage in (0, 1, 2, 3):
        zero = engine.deepspeed_config(EngineConfig(zero_stage=stage), AdamW(), 8)["zero_optimization"]
        overlapping = {"overlap_comm": True, "reduce_bucket_size": 50_000_000}
        assert zero == {"stage": stage, **(overlapping if device == "cuda" and stage else {})}


def test_one_reduction_agrees_on_chunks_and_retained_graphs() -> None:
    """As many graphs are retained as fit on every rank; filler chunks count as nothing."""
    generator = np.random.default_rng(0)
    seen = set()
    for _ in range(120):
        drafts = []
        budget = TokenBudget(chunk_tokens=12, retained_tokens=int(generator.integers(0, 80)))
        for _ in range(3):
            sides = [{"text": ragged_lengths(generator.integers(0, 9, generator.integers(0, 12)))} for _ in range(2)]
            batch = SimpleNamespace(
                query_lengths=sides[0], doc_lengths=sides[1], queries_of_row=None, row_ids=sides[0]["text"].filled,
                doc_ids=sides[1]["text"].filled, doc=sides[1],
            )  # fmt: skip
            drafts.append(plan_locally(batch, budget))  # type: ignore[arg-type]
        most = ChunkCounts(*(max(numbers) for numbers in zip(*(draft.counts for draft in drafts), strict=True)))
        plans = [draft.synchronized(most) for draft in drafts]
        groups = [[plan.query, plan.doc] for plan in plans]
        sizes = {(plan.whole, plan.num_retained, *(len(side.chunks) for side in group))
                 for plan, group in zip(plans, groups, strict=True)}  # fmt: skip
        assert len(sizes) == 1
        if plans[0].whole:
            continue
        fitting = []
        for group in groups:
            tokens = [chunk.tokens if chunk.num_rows else 0 for side in group for chunk in side.chunks]
            fitting.append(int((np.cumsum(tokens[::-1]) <= budget.retained_tokens).sum()))
        assert plans[0].num_retained == min(fitting)
        seen.add(np.sign(plans[0].num_retained - len(plans[0].doc.chunks)))
    assert seen == {-1, 0, 1}


def ragged_lengths(lengths: np.ndarray) -> ListLengths:
    return ListLengths(lengths, lengths, 8, 0)


def test_the_next_item_is_made_while_one_is_used_and_errors_come_when_they_are_due() -> None:
    made = [threading.Event() for _ in range(4)]

    def items() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number
        raise DataError("behind the last")

    coming = prefetch(items())
    for number in range(3):
        assert next(coming) == number
        assert made[number + 1].wait(5), "nobody asked for it yet"
    assert next(coming) == 3
    with pytest.raises(DataError, match="behind the last"):
        next(coming)
    threads = threading.active_count()
    coming = prefetch(iter(range(10)))
    assert next(coming) == 0 and threading.active_count() == threads + 1
    coming.close()
    assert threading.active_count() == threads


def test_a_stream_that_reads_ahead_has_a_state_before_any_step(tiny_interactions: TinyDataset) -> None:
    stream = PairStream(Dataset.open(tiny_interactions.dir), rows_global=16, lanes=4)
    before = stream.state()
    batches = read_batches(stream, BatchBuilder(stream, StageConfig()), torch.device("cpu"), 3)
    assert [batch.step for batch in batches] == [0, 1, 2]
    assert stream.step == 3 and stream.state(0) == before and stream.state(2)["step"] == 2
