"""Distillation terms on 1 and 2 ranks, against dense matrices."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bigdssm.errors import BigDSSMError
from bigdssm.losses import ListwiseKL, LossBatch, MarginMSE, PairCE, contrastive_loss
from bigdssm.losses.reference import dense_loss

from . import reference
from .parity import assert_parity, run
from .reference import DOUBLE, Shard, make_shards
from .spawn import Pool

TEMPERATURE = 1.7
DISTILLATIONS = {kind.name: kind for kind in (ListwiseKL, MarginMSE)}
OPTIONS = frozenset({"beta", "weight", "shared", "negatives"})
SIZES = [(7, 12), (9, 11)]


def teacher_scores(U: Tensor, W: Tensor, positive: Tensor, negatives: Tensor) -> Tensor:
    """Return deterministic teacher scores [m, 1 + k], some of them missing."""
    listed = torch.cat([positive[:, None], negatives.clamp(min=0)], 1)
    scores = 3 * torch.einsum("md,mkd->mk", U.detach().double().flip(1), W.detach().double()[listed])
    return scores.masked_fill(scores > 2.0, torch.nan)


def dense(name: str, shards: list[Shard], alpha: float) -> reference.Dense:
    """Return the loss of the concatenated batch and its gradients."""
    batch = reference.concatenate(shards, alpha)
    assert batch.positive is not None and batch.negatives is not None
    batch = replace(batch, teacher=teacher_scores(batch.U, batch.W, batch.positive, batch.negatives))
    return reference.gradients(dense_loss(DISTILLATIONS[name](temperature=TEMPERATURE), batch, columns="none"), batch)


def by_vectors(name: str, U: Tensor, W: Tensor, positive: Tensor, *, negatives: Tensor, **given: Any) -> Any:
    teacher = teacher_scores(U, W, positive, negatives)
    term = DISTILLATIONS[name](temperature=TEMPERATURE)
    return contrastive_loss(
        term, LossBatch(U, W, positive, negatives=negatives, teacher=teacher, **given), columns="none"
    )


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", DISTILLATIONS)
def test_equals_the_dense_loss(pools: dict[int, Pool], name: str, ranks: int) -> None:
    for seed in range(3):
        shards = make_shards(torch.Generator().manual_seed(seed), SIZES[:ranks], 6, num_docs=15, options=OPTIONS)
        expected = dense(name, shards, 5.0)
        assert float(expected[0]) > 0.1
        assert_parity(shards, 5.0, run(pools, partial(by_vectors, name), shards, 5.0), expected, 1e-10)


@pytest.mark.parametrize("name", DISTILLATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-3)])
def test_lower_precision(pools: dict[int, Pool], name: str, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    shards = make_shards(generator, [(40, 60), (0, 0)], 32, num_docs=50, options=OPTIONS, dtype=dtype)
    found = run(pools, partial(by_vectors, name), shards, 100.0)
    assert_parity(shards, 100.0, found, dense(name, shards, 100.0), tolerance)


@pytest.mark.parametrize("name", DISTILLATIONS)
def test_queries_without_teacher_scores_have_no_loss(name: str) -> None:
    """Queries without a score of the positive, or of any other document, have no loss, but count in the mean."""
    U, W = (torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE) for seed in (0, 1))
    U, nan = U.requires_grad_(), torch.nan
    teacher = torch.tensor([[nan, 1.0, 2.0], [1.0, nan, nan], [3.0, 1.0, torch.inf]])
    negatives = torch.tensor([[1, 2], [0, 2], [0, 1]])
    whole = LossBatch(U, W, alpha=2.0, negatives=negatives, teacher=teacher)
    loss = partial(contrastive_loss, DISTILLATIONS[name](), columns="none")
    out = loss(whole)
    out.loss.backward()
    assert U.grad is not None and not U.grad[:2].any() and bool(U.grad[2].any())
    one = LossBatch(U[2:], W, torch.tensor([2]), alpha=2.0, negatives=negatives[2:, :1], teacher=teacher[2:, :2])
    alone = loss(one)
    assert out.loss.item() == pytest.approx(alone.loss.item() / 3, rel=1e-12)
    assert loss(replace(whole, teacher=torch.full((3, 3), nan))).loss.item() == 0


def refused(rank: int, world_size: int, calls: list[dict[str, Any]]) -> str:
    U, negatives = torch.ones(2, 3), torch.zeros(2, 2, dtype=torch.int64)
    try:
        call = {"U": U, "W": U, "alpha": 2.0, "negatives": negatives, "columns": "none", **calls[rank]}
        loss, columns = call.pop("loss"), call.pop("columns")
        contrastive_loss(loss, LossBatch(**call), columns=columns)
    except BigDSSMError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"teacher": None}, r"kl\(temperature=1.0\) needs scores of a teacher"),
        ({"teacher": torch.ones(2, 2)}, r"teacher must be floating point \[2, 3\], got torch.float32 \[2, 2\]"),
        ({"teacher": torch.ones(2, 3).long()}, r"teacher must be floating point \[2, 3\], got torch.int64"),
        ({"columns": "in_batch"}, r"kl\(temperature=1.0\) compares only candidates: it needs columns='none'"),
        ({"loss": PairCE()}, "pair_ce takes no scores of a teacher"),
    ],
)
def test_invalid_distillation_inputs_are_refused_on_all_ranks(
    pools: dict[int, Pool], wrong: dict[str, Any], words: str
) -> None:
    good = {"loss": DISTILLATIONS["kl"](), "teacher": torch.ones(2, 3)}
    assert re.search(f"LossInputError: {words}", refused(0, 1, [{**good, **wrong}]))
    errors = pools[2].run(refused, [good, {**good, **wrong}], timeout_s=20)
    assert errors[0].startswith("PeerError") and errors[1].startswith("LossInputError")
