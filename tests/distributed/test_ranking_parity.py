"""The fine-tuning losses on 1, 2 and 3 ranks equal the dense losses of the concatenated batch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bigdssm.config import LossConfig
from bigdssm.losses import LossInputError, PairCE, Softmax, Triplet, fps_loss, ranking_loss
from bigdssm.losses.reference import dense_loss

from . import reference
from .parity import assert_close, assert_parity, run, with_dense_mask
from .reference import Shard, make_shards
from .spawn import Pool

LOSSES = (Softmax(), PairCE(), Triplet(margin=0.3))
OPTIONS = ("beta", "neg_bias", "weight", "query_ids", "doc_ids", "shared", "known", "is_known", "times")


def check(
    pools: dict[int, Pool],
    loss: LossConfig,
    shards: list[Shard],
    alpha: float,
    in_batch: bool,
    tile: int | None,
    tolerance: float = 1e-10,
    matrix: bool = False,
) -> None:
    expected = reference.ranking(loss, shards, alpha, in_batch)
    arguments = {"in_batch": in_batch, "tile": tile}
    called = partial(ranking_loss, loss)
    found = run(pools, partial(with_dense_mask, called) if matrix else called, shards, alpha, **arguments)
    assert_close(found[0], expected[0], min(tolerance, 1e-5), "loss")  # never rounded to bfloat16, as gradients are
    assert_parity(shards, alpha, found, expected, tolerance)


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    ranks = draw(st.integers(1, 3))
    sizes = draw(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), min_size=ranks, max_size=ranks))
    loss, in_batch = draw(st.sampled_from(LOSSES)), draw(st.booleans())
    options = draw(st.sets(st.sampled_from(OPTIONS)))
    if not in_batch or draw(st.booleans()):
        options |= {"negatives"}
    shards = make_shards(
        torch.Generator().manual_seed(draw(st.integers(0, 2**31))),
        sizes,
        D=draw(st.sampled_from([1, 3, 8])),
        num_queries=draw(st.sampled_from([None, 3, 8])),
        num_docs=draw(st.sampled_from([None, 4, 12])),
        options=frozenset(options),
    )
    tile = draw(st.sampled_from([None, 1, 2, 3, 5]))
    return {
        "loss": loss,
        "shards": shards,
        "alpha": draw(st.sampled_from([0.5, 20.0])),
        "in_batch": in_batch,
        "tile": tile,
        "matrix": draw(st.booleans()),
    }


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(batch=batches())
def test_equals_dense_reference(pools: dict[int, Pool], batch: dict[str, Any]) -> None:
    check(pools, **batch)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize(("given_negatives", "in_batch"), [(True, False), (False, True), (True, True)])
def test_each_loss_and_source_of_negatives(
    pools: dict[int, Pool], loss: LossConfig, given_negatives: bool, in_batch: bool
) -> None:
    options = {"beta", "neg_bias", "weight", "query_ids", "doc_ids", "known", "shared"}
    options |= {"negatives"} if given_negatives else set()
    generator = torch.Generator().manual_seed(4)
    shards = make_shards(
        generator, [(7, 12), (0, 0), (9, 11)], 6, num_queries=6, num_docs=15, options=frozenset(options)
    )
    check(pools, loss, shards, 5.0, in_batch, 4)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-3)])
def test_lower_precision(pools: dict[int, Pool], loss: LossConfig, dtype: torch.dtype, tolerance: float) -> None:
    """On the same rounded inputs; bfloat16 gradients are rounded once, to 8 bits."""
    options = frozenset({"beta", "neg_bias", "query_ids", "doc_ids", "weight", "negatives", "shared"})
    shards = make_shards(
        torch.Generator().manual_seed(1), [(40, 60), (37, 37)], 32, num_queries=30, num_docs=50, options=options,
        dtype=dtype,
    )  # fmt: skip
    check(pools, loss, shards, 100.0, True, 16, tolerance=tolerance)


def test_in_batch_softmax_is_the_fps_loss(pools: dict[int, Pool]) -> None:
    shards = make_shards(
        torch.Generator().manual_seed(6), [(5, 5), (6, 6)], 4, num_docs=7, options=frozenset({"doc_ids"})
    )
    found, found_grads, found_stats = run(pools, partial(ranking_loss, Softmax()), shards, 9.0, in_batch=True)
    right, right_grads, right_stats = run(pools, fps_loss, shards, 9.0)
    assert_close(found, right, 1e-12, "loss")
    assert_close(found_grads[0], right_grads[0], 1e-12, "U")
    assert_close(found_grads[1], right_grads[1], 1e-12, "W")
    assert found_stats == right_stats


def score_bias(U: torch.Tensor, W: torch.Tensor, positive: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    """Return biases [m, 1 + k] that depend on the vectors, so that their gradient reaches them."""
    listed = torch.cat([positive[:, None], negatives.clamp(min=0)], 1)
    return torch.sin(3 * torch.einsum("md,mkd->mk", U.double(), W.double()[listed]))


def with_score_bias(
    loss: LossConfig, U: torch.Tensor, W: torch.Tensor, positive: torch.Tensor, *, negatives: torch.Tensor, **given: Any
) -> Any:
    bias = score_bias(U, W, positive, negatives)
    return ranking_loss(loss, U, W, positive, negatives=negatives, score_bias=bias, **given)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_biases_of_shown_pairs(pools: dict[int, Pool], loss: LossConfig) -> None:
    options = frozenset({"neg_bias", "weight", "query_ids", "doc_ids", "known", "shared", "negatives"})
    shards = make_shards(
        torch.Generator().manual_seed(4), [(7, 12), (2, 3), (9, 11)], 6, num_queries=6, num_docs=15, options=options
    )
    batch = reference.concatenate(shards, 5.0)
    assert batch.positive is not None and batch.negatives is not None
    batch = replace(batch, score_bias=score_bias(batch.U, batch.W, batch.positive, batch.negatives))
    expected = reference.gradients(dense_loss(loss, batch, columns="none"), batch)
    found = run(pools, partial(with_score_bias, loss), shards, 5.0)
    assert_parity(shards, 5.0, found, expected, 1e-10)
    assert abs(float(expected[0]) - float(reference.ranking(loss, shards, 5.0, False)[0])) > 1e-3


@pytest.mark.parametrize(
    ("bias", "in_batch", "words"),
    [
        (torch.ones(3, 3), True, "score_bias is of candidates: it needs columns='none', got 'in_batch'"),
        (torch.ones(3, 2), False, r"score_bias must be floating point \[3, 3\], got torch.float32 \[3, 2\]"),
    ],
)
def test_invalid_biases_are_refused(bias: torch.Tensor, in_batch: bool, words: str) -> None:
    U, negatives = torch.ones(3, 4), torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(LossInputError, match=words):
        ranking_loss(PairCE(), U, U, alpha=1.0, in_batch=in_batch, negatives=negatives, score_bias=bias)
