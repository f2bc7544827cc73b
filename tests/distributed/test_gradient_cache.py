"""Encoding in chunks, with graphs retained or recomputed, on 1, 2 and 3 ranks, does not change results."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bigdssm.config import EngineConfig
from bigdssm.loader import step_plan
from bigdssm.loader.batch import Batch
from bigdssm.loader.step_plan import TokenBudget, plan_step
from bigdssm.losses import LossOutput, fps_loss
from bigdssm.models import Encoded, use_packing
from bigdssm.training.optimizers import AdamW
from tests.packing import within_rows

from . import small_run
from .small_model import share_of, small_model
from .spawn import Pool

LR, CLIPPING, STEPS = 1.0, 0.1, 3


@dataclass(frozen=True)
class Case:
    """One way of computing the same steps."""

    zero_stage: int
    chunk_tokens: int
    keep_graph_tokens: int | None = None
    packed: bool = False  # texts


CASES = [Case(stage, *budget) for stage in (0, 3) for budget in ((0, None), (40, None), (40, 90))]
CASES += [Case(1, 40), Case(2, 0), Case(2, 40, 90), Case(0, 12, 0), Case(3, 40, 10**6)]
CASES += [Case(*case, packed=True) for case in ((1, 40, 90), (3, 40, 0))]


def loss_of(encoded: Encoded, batch: Batch) -> LossOutput:
    assert encoded.U is not None and encoded.W is not None
    return fps_loss(
        encoded.U, encoded.W, batch.positive, alpha=encoded.alpha, beta=encoded.beta, direction="both",
        neg_bias=batch.counts.double().log(), query_ids=batch.query_ids, doc_ids=batch.doc_ids,
    )  # fmt: skip


def plain_steps(rank: int, world_size: int) -> dict[str, Tensor]:
    """Return the weights after the same steps without engine, chunks and ranks."""
    model = small_model(0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for step in range(STEPS):
        batch = share_of(0, 1, step)
        optimizer.zero_grad()
        loss_of(model(batch.query, batch.doc), batch).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        assert norm > CLIPPING
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@dataclass(frozen=True)
class Plain(AdamW):
    """SGD in one group, since Adam would hide a wrong scale."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        parameters = [parameter for group in groups for parameter in group["params"]]
        return torch.optim.SGD([{"name": "all", "params": parameters, "lr": LR, "base_lr": LR}])

    def state_of(self, group: str) -> tuple[str, ...]:
        return ()


@contextmanager
def sharded_parameters() -> Iterator[None]:
    """A context in which engines take any optimizer, and ZeRO 3 shards small parameters."""
    from bigdssm.training import engine

    derive = engine.deepspeed_config

    def derived(*args: Any) -> dict[str, Any]:
        config = derive(*args) | {"zero_allow_untested_optimizer": True}
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return config

    engine.deepspeed_config = derived
    try:
        yield
    finally:
        engine.deepspeed_config = derive


def new_engine(case: Case, dropout: float) -> tuple[Any, Any]:
    """Return an engine, within `sharded_parameters`, and the budget of its steps."""
    from bigdssm.training.engine import Engine

    config = EngineConfig(
        zero_stage=case.zero_stage, chunk_tokens=case.chunk_tokens, keep_graph_tokens=case.keep_graph_tokens
    )
    model = small_model(dropout)
    if case.packed:
        use_packing(model, within_rows)
        assert model.accepts_packed(training=True) == ({"words", "history"}, {"words"})
    budget = TokenBudget.of(config, model.accepts_packed(training=True))
    return Engine(model, config, Plain(gradient_clipping=CLIPPING), 1), budget


def one_step(engine: Any, batch: Batch, budget: TokenBudget) -> Any:
    from bigdssm.training.step import train_step

    return train_step(engine, batch, plan_step(batch, budget), loss_of, 1.0)


def steps(rank: int, world_size: int, cases: list[Case], dropout: float) -> list[dict[str, Tensor]]:
    """Return the weights after the steps of every case."""
    weights = []
    with sharded_parameters():
        for case in cases:
            running, budget = new_engine(case, dropout)
            torch.manual_seed(rank + 1)
            for step in range(STEPS):
                result = one_step(running, share_of(rank, world_size, step), budget)
                assert result.applied and result.gradient_norm > CLIPPING
            weights.append(running.state_dict())
    return weights


def reductions(rank: int, world_size: int, cases: list[Case]) -> list[tuple[int, list[tuple[str, int]]]]:
    """Return, for a step of each case, its number of backwards, and (collective, elements) of every reduction."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    backend = deepspeed.comm.comm.cdb  # may hold a function of an earlier test
    names = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "all_reduce_coalesced")
    originals = {name: getattr(dist, name) for name in names}
    sent: list[tuple[str, int]] = []
    found = []

    def spy(name: str, function: Any) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            given = [x for value in (*args, *kwargs.values()) for x in (value if isinstance(value, list) else [value])]
            sent.append((name, max(x.numel() for x in given if isinstance(x, Tensor))))
            return function(*args, **kwargs)

        return counting

    try:
        for name, function in originals.items():
            setattr(dist, name, spy(name, function))
        kept = backend.reduce_scatter_function
        backend.reduce_scatter_function = spy("reduce_scatter_tensor", kept)
        with sharded_parameters():
            for case in cases:
                running, budget = new_engine(case, 0.0)
                backwards = []
                run = running.backward
                running.backward = lambda outputs, run=run, made=backwards: made.append(len(outputs)) or run(outputs)
                sent.clear()
                one_step(running, share_of(rank, world_size, 0), budget)
                found.append((len(backwards), list(sent)))
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)
        backend.reduce_scatter_function = kept
    return found


def test_gradients_are_reduced_once_per_step_for_any_number_of_chunks(pools: dict[int, Pool]) -> None:
    cases = [Case(stage, 40, 90) for stage in (0, 1, 2, 3)]
    parameters = sum(parameter.numel() for parameter in small_model(0.0).parameters())
    for found in pools[2].run(reductions, cases):
        for case, (backwards, sent) in zip(cases, found, strict=True):
            assert backwards > 3
            # the loss, the norm and the agreements on chunks reduce a few numbers each
            gradients = [(name, size) for name, size in sent if size > 64]
            if case.zero_stage < 3:
                assert gradients == [("all_reduce", parameters)], case
            else:  # each rank gets its share, the last with padding
                assert gradients == [("reduce_scatter_tensor", parameters + parameters % 2)], case


def broadcasts(rank: int, world_size: int, case: Case) -> list[int]:
    """Return the number of broadcasts of each step."""
    found = []
    with sharded_parameters():
        running, budget = new_engine(case, 0.0)
        for step in range(3):
            with mock.patch.object(dist, "broadcast", wraps=dist.broadcast) as sent:
                one_step(running, share_of(rank, world_size, step), budget)
            found.append(sent.call_count)
    return found


@pytest.mark.slow
def test_ranks_do_not_compare_the_order_of_modules(pools: dict[int, Pool]) -> None:
    """DeepSpeed would broadcast at ZeRO 3 after every pass that differs from the previous one."""
    assert pools[2].run(broadcasts, Case(3, 40, 0)) == [[0, 0, 0], [0, 0, 0]]


class Reads(TorchDispatchMode):
    """Counts reads of tensors by the engine and DeepSpeed; a fused optimizer, as on a device, reads nothing."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            files = " ".join(frame.filename for frame in traceback.extract_stack())
            self.count += "torch/optim/" not in files and ("/deepspeed/" in files or "training/engine.py" in files)
        return func(*args, **(kwargs or {}))


def waits(rank: int, world_size: int, stage: int, chunk_tokens: int) -> tuple[int, int]:
    """Return the number of synchronizations of a step with the device, and of numbers read, without the loss."""
    from deepspeed.accelerator import get_accelerator

    from bigdssm.training.engine import Engine

    config = EngineConfig(zero_stage=stage, chunk_tokens=chunk_tokens)
    engine = Engine(small_model(0.0), config, AdamW(gradient_clipping=CLIPPING), 1)
    assert len(engine.deepspeed.optimizer.param_groups) > 1
    for step in range(4):  # DeepSpeed's timer starts in the third
        with mock.patch.object(get_accelerator(), "synchronize") as synchronize, Reads() as reads:
            one_step(engine, share_of(rank, world_size, step), TokenBudget.of(config))
    return synchronize.call_count, reads.count


@pytest.mark.parametrize("chunk_tokens", [0, 40])
def test_deepspeed_waits_at_most_twice_for_any_number_of_chunks(pools: dict[int, Pool], chunk_tokens: int) -> None:
    found = [pools[1].run(waits, stage, chunk_tokens)[0] for stage in (0, 1, 2, 3)]
    assert found == [(0, 1), (0, 2), (0, 2), (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 3])
def test_chunks_and_retained_graphs_change_no_weight(pools: dict[int, Pool], world_size: int) -> None:
    (plain,) = pools[1].run(plain_steps)
    start = dict(small_model(0.0).named_parameters())
    assert all((plain[name] - start[name]).abs().max() > 5e-5 for name in plain if "key.bias" not in name)
    for rank, found in enumerate(pools[world_size].run(steps, CASES, 0.0, timeout_s=300)):
        for case, weights in zip(CASES, found, strict=True):
            assert weights.keys() == plain.keys()
            for name in plain:
                torch.testing.assert_close(
                    weights[name], plain[name], rtol=1e-5, atol=1e-6, msg=f"{name} of rank {rank} in {case}"
                )


@pytest.mark.slow
def test_chunks_encoded_again_have_the_dropout_of_the_first_time(pools: dict[int, Pool]) -> None:
    """A retained graph is that of the loss."""
    for stage in (0, 1, 2, 3):
        cases = [Case(stage, 40, keep) for keep in (10**6, 90, 0)]
        for kept, some, none in pools[3].run(steps, cases, 0.1, timeout_s=300):
            for name in kept:
                torch.testing.assert_close(some[name], kept[name], rtol=1e-5, atol=1e-6, msg=f"{name} at stage {stage}")
                torch.testing.assert_close(none[name], kept[name], rtol=1e-5, atol=1e-6, msg=f"{name} at stage {stage}")
    (without,) = pools[1].run(plain_steps)
    word = "text.shared.transformer.embeddings.word_embeddings.weight"
    assert (without[word] - kept[word]).abs().max() > 1e-3


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_dataset(tmp_path_factory.mktemp("small"))


@pytest.mark.slow
def test_validation_in_uneven_chunks_measures_the_same(config: Path, tmp_path: Path, pools: dict[int, Pool]) -> None:
    """At ZeRO 3 a forward is a collective: a rank with fewer chunks adds filler chunks."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pools[1].run(small_run.run, config, whole, ("pretrain.steps=2",))
    pools[3].run(in_small_chunks, config, cut)
    assert small_run.validations(cut)[-1] == pytest.approx(small_run.validations(whole)[-1], abs=1e-9)


def in_small_chunks(rank: int, world_size: int, config: Path, run_dir: Path) -> None:
    """Run at ZeRO 3, every rank encoding in chunks of another size."""
    usual, step_plan.CHUNK_TOKENS_CPU = step_plan.CHUNK_TOKENS_CPU, 12 * (rank + 1)
    try:
        small_run.run(rank, world_size, config, run_dir, ("pretrain.steps=2", "engine.zero_stage=3"))
    finally:
        step_plan.CHUNK_TOKENS_CPU = usual
