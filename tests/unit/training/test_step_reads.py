"""Host reads of tensors in a step, which synchronize with a device, do not grow with chunks."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import bigdssm
from bigdssm.config import NegativesConfig, StageConfig
from bigdssm.loader.step_plan import TokenBudget, plan_step
from bigdssm.losses import CountedFrequency, StreamingFrequency
from bigdssm.losses.declarations import Corrected
from bigdssm.models import Encoded
from bigdssm.training.objective import Objective
from bigdssm.training.step import train_step
from tests.distributed.small_model import MODEL, share_of, small_model

PACKAGE = f"{Path(bigdssm.__file__).parent}/"
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "_unique2", "unique_dim", "masked_select", "equal")
CATALOGUE = 10**5  # documents, larger than any other size


class Reads(TorchDispatchMode):
    """Records who reads values, except the losses, and the sizes of inputs and outputs of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.by: list[str] = []
        self.largest = 0  # size of an output
        self.taking: Counter[str] = Counter()  # operations with an input of catalogue size
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name.split("::")[1] in READS:
            frame: Any = sys._getframe(1)
            while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
                frame = frame.f_back
            where = "elsewhere" if frame is None else frame.f_code.co_filename.removeprefix(PACKAGE)
            if not where.startswith("losses/"):
                self.by.append(where)
        given, taken = (
            [x.numel() for x in pytree.tree_leaves(some) if isinstance(x, Tensor)] for some in (result, args)
        )
        self.number += 1
        if not func.is_view and not func._schema.name.endswith("_"):
            self.largest = max([self.largest, *given])
        if max(taken, default=0) >= CATALOGUE:
            self.taking[func._schema.name] += 1
        return result


class PlainEngine:
    """A model without DeepSpeed, which has its own reads."""

    def __init__(self) -> None:
        self.module = small_model(0.0)

    def forward(self, *given: Any, **further: Any) -> Encoded:
        encoded: Encoded = self.module(*given, **further)
        return encoded

    def backward(self, outputs: list[tuple[Tensor, Tensor]]) -> None:
        torch.stack([(output * gradient).sum() for output, gradient in outputs]).sum().backward()

    @contextmanager
    def single_reduction(self) -> Iterator[None]:
        yield

    def step(self, lr_factor: float) -> bool:
        return True

    def gradient_norm(self) -> float:
        return 1.0


@pytest.mark.parametrize("frequency", ["counts", "streaming"])
def test_host_reads_of_a_step_do_not_grow_with_chunks(frequency: Any) -> None:
    engine, batch = PlainEngine(), share_of(0, 1, 0)
    objective = Objective(StageConfig(sampling=Corrected(frequency=frequency)), MODEL, np.arange(1.0, 40.0), 24.0)
    for chunk_tokens, fewest in ((0, 2), (40, 8), (12, 20)):
        plan = plan_step(batch, TokenBudget(chunk_tokens, 0))
        assert len(plan.query.chunks) + len(plan.doc.chunks) >= fewest
        with Reads() as reads:
            train_step(engine, batch, plan, objective, 1.0)  # type: ignore[arg-type]
        assert reads.by == [], chunk_tokens  # the gather is read as a list, which is not recorded


def test_the_work_of_a_step_does_not_depend_on_the_catalogue() -> None:
    """It looks up the counts of its columns; no other operation takes those of all documents."""
    work = []
    for num_documents in (CATALOGUE, 1000 * CATALOGUE):
        counts = np.lib.stride_tricks.as_strided(np.ones(1), (num_documents,), (0,))  # in 8 bytes
        stage = StageConfig(sampling=Corrected(), negatives=NegativesConfig(uniform=8))
        objective = Objective(stage, MODEL, counts, 24.0)
        engine, batch = PlainEngine(), share_of(0, 1, 0)
        with Reads() as reads:
            train_step(engine, batch, plan_step(batch, TokenBudget(40, 0)), objective, 1.0)  # type: ignore[arg-type]
        work.append((reads.number, reads.largest, reads.taking))
    assert work[0] == work[1] and work[0][2] == {"aten::index": 1}


def test_a_correction_touches_the_columns_alone() -> None:
    """For any size of the catalogue or of the estimator's table."""
    ids = torch.randint(10**6, (50,), generator=torch.Generator().manual_seed(0))
    counted = CountedFrequency(torch.ones(10**6, dtype=torch.float64), 100, 10)
    streaming = StreamingFrequency(10**6)
    streaming.update(ids)
    with Reads() as reads:
        counted.log_expected(ids)
        streaming.update(ids)
        streaming.log_expected(ids)
    assert 0 < reads.largest <= 4 * 2 * len(ids)
