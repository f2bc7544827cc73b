"""Launches, synchronizations and collectives of a step on a simulated device: bounded per chunk."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bigdssm.config import HISTORY_BLOCKS, StageConfig, TablesConfig
from bigdssm.features import Timestamp
from bigdssm.loader.batch import Batch, lengths_of, on_device
from bigdssm.loader.step_plan import TokenBudget, plan_locally
from bigdssm.losses.declarations import Corrected, NoCorrection
from bigdssm.models import Encoded, QueryPositions, new_model, use_packing
from bigdssm.models.embedding_tables import tables_of_features
from bigdssm.tables.optimizers import LazyAdam
from bigdssm.tables.sharded import ShardedTables
from bigdssm.training.batches import with_positions
from bigdssm.training.engine import Engine
from bigdssm.training.objective import Objective
from bigdssm.training.step import train_step
from tests import simgpu
from tests.distributed.small_model import MODEL, SCHEMA, share_of
from tests.packing import by_mask

# launches of a step without its chunks; of a chunk's forward, second forward and backward; of `attend` in it
FIXED, EACH, ATTEND = 700, 370, 140


class DeepSpeed:
    """The calls of the engine to DeepSpeed at ZeRO stage 0; the loss, the towers and the norm are counted."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.optimizer = SimpleNamespace(param_groups=[], zero_grad=module.zero_grad)

    def __call__(self, **given: object) -> Encoded:
        encoded: Encoded = self.module(**given)
        return encoded

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()

    def allreduce_gradients(self) -> None:
        """Over the ranks, by DeepSpeed."""

    def step(self) -> None:
        self.optimizer.zero_grad()


@dataclass(frozen=True)
class Case:
    """A code path of the towers: layout of histories and texts, and the source of log q."""

    block: str = "sasrec"
    positions: str = "age"
    frequency: str = "counts"
    kernel: bool = False  # a kernel for packed rows, including texts
    many: bool = False  # queries per row
    times: Literal["none", "rotary"] = "none"


CASES = [
    Case(frequency="streaming"),
    Case("gated", "relative", many=True),
    Case("lowpass", "relative", many=True),
    Case("gated", "rotary", kernel=True),
    Case("gated", "rotary", "streaming", kernel=True, many=True),
    Case("gated", "rotary", kernel=True, many=True, times="rotary"),
]


def new_engine(case: Case, sharding: Literal["replicated", "rows"] = "replicated") -> Engine:
    history = HISTORY_BLOCKS.read("", {"block": case.block, "positions": case.positions, "times": case.times})
    model = replace(MODEL, query=replace(MODEL.query, history=history), tables=TablesConfig(sharding=sharding))
    torch.manual_seed(0)
    event = {"when": Timestamp().with_name("when")} if case.times != "none" else {}
    module = new_model(model, replace(SCHEMA, event=event), vocab_size=30).train()
    if case.kernel:
        use_packing(module, by_mask)
    engine = object.__new__(Engine)
    engine.deepspeed = engine._call = DeepSpeed(module)
    engine.zero_stage, engine._clipping = 0, 1.0
    return engine


def batch_of(case: Case) -> Batch:
    """Return 24 queries, one per row or two per row."""
    batch = share_of(0, 1, 0)
    if case.times != "none":
        query = {**batch.query, "history.when": batch.query["history"].cumsum(1) * 10**9}
        batch = replace(batch, query=query, query_lengths=lengths_of(query, {"words": -1, "history": 0}))
    if not case.many:
        return batch
    rows = torch.arange(12)
    seen = torch.stack([torch.zeros_like(rows), (batch.query["history"][rows] != 0).sum(1)], 1)
    return replace(
        batch,
        row_ids=rows,
        query={name: tensor[rows] for name, tensor in batch.query.items()},
        query_lengths={name: list_.take(rows) for name, list_ in batch.query_lengths.items()},
        query_positions=QueryPositions(rows.repeat_interleave(2), seen.flatten()),
        queries_of_row=np.full(12, 2),
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_operations_of_a_training_step(case: Case) -> None:
    """Without and with a gradient cache, with few and many chunks."""
    engine, host = new_engine(case), batch_of(case)
    objective = Objective(
        StageConfig(sampling=Corrected(frequency=case.frequency)),  # type: ignore[arg-type]
        MODEL, np.arange(1.0, 40.0), 24.0,
    )  # fmt: skip
    streaming = case.frequency == "streaming"
    waits = []
    with simgpu.ranks(64), simgpu.Device() as device:
        device.put_module(engine.module)
        for chunk_tokens, retained_tokens, fewest in ((0, 0, 2), (90, 0, 3), (12, 60, 20)):
            draft = plan_locally(
                host, TokenBudget(chunk_tokens, retained_tokens, engine.module.accepts_packed(training=True))
            )  # type: ignore[operator]
            plan = draft.synchronized(draft.counts)
            pieces = len(plan.query.chunks) + len(plan.doc.chunks)
            assert pieces >= fewest and plan.whole == (chunk_tokens == 0)
            if plan.whole:  # the first step uploads the catalogue's counts or the estimator's table
                train_step(engine, on_device(host, simgpu.PLACE), plan, objective, 1.0)
            device.reset()
            result = train_step(engine, on_device(host, simgpu.PLACE), plan, objective, 1.0)
            assert result.applied and result.gradient_norm > 0
            assert not device.mixed and not device.uploads
            # the loss, the gather, the norm; for the estimate, the number of documents per rank
            assert sum(device.waits.values()) <= 3 + 1 + 1 + streaming <= 8, device.waits
            waits.append(device.waits)
            counted = "\n".join(f"{number} {operation}" for operation, number in sorted(device.operations.items()))
            assert device.launches <= FIXED + pieces * (EACH + ATTEND * case.kernel), counted
            assert {backend for _, backend, _ in device.collectives} == {"nccl"}
            names = Counter(name for name, _, _ in device.collectives)
            assert names == {"all_gather": 2 + 1 + 2 * streaming, "all_reduce": 2, "reduce_scatter": 2}
    assert all(other == waits[0] for other in waits)


def test_operations_of_sharded_tables() -> None:
    """No operation waits for the device, and their number depends neither on ranks nor on chunks."""
    case = Case()
    launches = []
    for ranks, chunk_tokens in ((4, 0), (12, 90)):
        engine = new_engine(case, "rows")
        specs = engine.module.tables.sharded  # type: ignore[union-attr]
        host = with_positions(batch_of(case), tables_of_features(SCHEMA, specs))  # type: ignore[arg-type]
        plan = (draft := plan_locally(host, TokenBudget(chunk_tokens, 0))).synchronized(draft.counts)
        objective = Objective(StageConfig(sampling=NoCorrection()), MODEL, None, 24.0)
        with simgpu.ranks(ranks), simgpu.Device() as device:
            device.put_module(engine.module)
            engine.tables = ShardedTables(list(specs.values()), LazyAdam(), 0, device=simgpu.PLACE)  # type: ignore[arg-type]
            for _ in range(2):
                device.reset()
                assert train_step(engine, on_device(host, simgpu.PLACE), plan, objective, 1.0).applied
            of_tables = {name: number for name, number in device.operations.items() if " tables/" in name}
            assert not device.mixed and not device.uploads and not any(" tables/" in name for name in device.waits)
            exchanges = Counter(backend for name, backend, _ in device.collectives if name == "all_to_all")
            assert exchanges == {"gloo": 2, "nccl": 2}  # numbers and rows on the host; values and gradients
            assert engine.tables.steps == 2 and "lerp_" in str(of_tables)  # rows of this rank were updated
            look_ups = sum(number for name, number in of_tables.items() if name.startswith("embedding "))
            launches.append(sum(of_tables.values()) - look_ups)
    assert launches[0] == launches[1] <= 30 * len(specs), of_tables
