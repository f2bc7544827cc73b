"""Distillation over the documents of all ranks, on 1, 2 and 3 ranks, against the whole matrix in float64."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from bigdssm.errors import BigDSSMError
from bigdssm.losses import BatchTeacher, LossOutput, batch_kl

from . import reference
from .parity import assert_parity, run
from .reference import DOUBLE, Shard, make_shards
from .spawn import Pool

TEMPERATURE = 0.3
OPTIONS = frozenset({"beta", "weight", "shared"})
SIZES = [(7, 12), (0, 3), (9, 11)]


def teacher(U: Tensor, W: Tensor) -> BatchTeacher:
    """Return deterministic teacher vectors of another width."""
    return BatchTeacher(U.detach().double().flip(1)[:, :4].sin(), W.detach().double()[:, :4].cos(), TEMPERATURE)


def counts(W: Tensor) -> Tensor:
    return 1 + (W.detach()[:, 0] > 0).long() * 2


def dense(shards: list[Shard], alpha: float) -> tuple[Tensor, list[Tensor | None]]:
    """Return the loss of the concatenated batch and its gradients."""
    x = reference.concatenate(shards, alpha)
    assert x.beta is not None and x.weight is not None
    vectors, log_counts = teacher(x.U, x.W), counts(x.W).double().log()
    S = x.alpha * (x.U @ x.W.T) + x.beta
    p = (vectors.queries @ vectors.documents.T / TEMPERATURE + log_counts).softmax(1)
    kl = torch.nn.functional.kl_div((S + log_counts).log_softmax(1), p, reduction="none").sum(1)
    return reference.gradients((x.weight * kl).sum() / x.weight.sum(), x)


def loss(U: Tensor, W: Tensor, positive: Tensor, **given: Any) -> LossOutput:
    return LossOutput(batch_kl(U, W, teacher(U, W), counts=counts(W), **given), {})


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_equals_the_dense_divergence(pools: dict[int, Pool], ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "bigdssm.losses.distillation.STRIP_CELLS", 40
    )  # of this process, which is the rank of a world of 1
    for seed in range(3):
        shards = make_shards(torch.Generator().manual_seed(seed), SIZES[:ranks], 6, num_docs=15, options=OPTIONS)
        expected = dense(shards, 5.0)
        assert float(expected[0]) > 0.1
        assert_parity(shards, 5.0, run(pools, loss, shards, 5.0), expected, 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-3)])
def test_lower_precision(pools: dict[int, Pool], dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    shards = make_shards(generator, [(40, 60), (0, 0)], 32, num_docs=50, options=OPTIONS, dtype=dtype)
    assert_parity(shards, 100.0, run(pools, loss, shards, 100.0), dense(shards, 100.0), tolerance)


def test_a_column_of_several_documents_is_as_many_columns() -> None:
    generator = torch.Generator().manual_seed(3)
    U, W = (torch.randn(n, 5, generator=generator, dtype=DOUBLE) for n in (4, 3))
    alpha, twice = torch.tensor(2.0), torch.tensor([0, 0, 1, 2])
    merged = batch_kl(U.requires_grad_(), W, teacher(U, W), alpha=alpha, counts=torch.tensor([2, 1, 1]))
    apart = batch_kl(U, W[twice], teacher(U, W[twice]), alpha=alpha)
    torch.testing.assert_close(merged, apart)
    torch.testing.assert_close(*(torch.autograd.grad(value, U)[0] for value in (merged, apart)))


def refused(rank: int, world_size: int, calls: list[dict[str, Any]]) -> str:
    U = torch.ones(2, 3)
    try:
        batch_kl(**{"U": U, "W": U, "teacher": BatchTeacher(U, U), "alpha": torch.tensor(2.0), **calls[rank]})
    except BigDSSMError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            {"teacher": BatchTeacher(torch.ones(3, 4), torch.ones(2, 4))},
            r"queries must be floating point \[2, E\], got \[3, 4\]",
        ),
        ({"teacher": BatchTeacher(torch.ones(2, 4), torch.ones(2, 5))}, "the teacher's two sides must be of one width"),
        ({"W": torch.full((2, 3), torch.nan)}, "vectors, or the teacher's, hold NaN or inf"),
    ],
)
def test_invalid_teacher_scores_are_refused_on_all_ranks(
    pools: dict[int, Pool], wrong: dict[str, Any], words: str
) -> None:
    assert re.search(words, refused(0, 1, [wrong]))
    errors = pools[2].run(refused, [{}, wrong], timeout_s=20)
    assert errors[0].startswith("PeerError") and re.search(f"LossInputError.*{words}", errors[1])
