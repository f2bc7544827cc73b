"""The sampling correction: its estimates, and the error of each kind relative to the full softmax's gradient."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bigdssm.config import FrequencyCorrection
from bigdssm.dataset.catalogue import candidate_rows
from bigdssm.losses import (
    CountedFrequency,
    LossInputError,
    StreamingFrequency,
    apply_sampling,
    relevance_weight,
    sample_uniform,
)
from bigdssm.losses.declarations import Corrected


def load_tool() -> Any:
    path = Path(__file__).resolve().parents[3] / "tools/bench/bench_sampling.py"
    spec = importlib.util.spec_from_file_location("bench_sampling", path)
    assert spec is not None and spec.loader is not None
    sys.modules["bench_sampling"] = module = importlib.util.module_from_spec(spec)  # required by dataclasses
    spec.loader.exec_module(module)
    return module


tool = load_tool()
gradient_bias = tool.gradient_bias


@pytest.fixture(scope="module")
def world() -> Any:
    """10,000 items with Zipf popularity, and queries."""
    return tool.make_world()


@pytest.mark.slow
def test_each_correction_brings_the_gradient_nearer_to_the_full_softmax(world: Any) -> None:
    none, corrected = (gradient_bias(world, sampling) for sampling in (None, Corrected()))
    half = gradient_bias(world, Corrected(gamma=0.5))
    assert corrected < half < none


@pytest.mark.slow
def test_uniform_negatives_with_the_mixtures_counts_are_nearer_still(world: Any) -> None:
    assert gradient_bias(world, Corrected(), num_uniform=2048) < gradient_bias(world, Corrected())


def test_strength_zero_changes_nothing() -> None:
    log_expected = torch.tensor([-1.0, -2.0])
    assert apply_sampling(Corrected(gamma=0.0), log_expected) == (None, None)


@dataclass(frozen=True)
class EveryScore(FrequencyCorrection):
    """The correction of a plugin, of positives and negatives."""

    def shares(self, correction: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return correction, None


def test_corrections_add_to_existing_biases() -> None:
    log_expected, own = torch.tensor([-1.0, -2.0]), torch.tensor([5.0, 7.0])
    beta, neg_bias = apply_sampling(EveryScore(gamma=0.5), log_expected, beta=own)
    assert beta is not None and beta.tolist() == [5.5, 8.0] and neg_bias is None
    beta, neg_bias = apply_sampling(Corrected(), log_expected, neg_bias=own)
    assert neg_bias is not None and neg_bias.tolist() == [6.0, 9.0] and beta is None


def test_expected_columns_from_counts() -> None:
    counts = torch.tensor([6, 3, 0])
    expected = CountedFrequency(counts, num_columns=100, num_uniform=30).log_expected(torch.tensor([0, 2])).exp()
    torch.testing.assert_close(expected, torch.tensor([60.0 + 10, 10 + 10], dtype=torch.float64))


def test_drawn_documents_are_expected_as_often_as_they_are_drawn() -> None:
    """Withdrawn documents are in batches alone."""
    counts, withdrawn, steps = np.array([6.0, 0, 3, 11, 1]), np.array([3]), 4000
    frequency = CountedFrequency(torch.from_numpy(counts), 0, num_uniform=8, undrawn=withdrawn)
    drawn = candidate_rows(sample_uniform(8 * steps, 4, torch.Generator().manual_seed(0)).numpy(), withdrawn)
    uniform = np.bincount(drawn, minlength=5)
    expected = frequency.log_expected(torch.tensor([0, 1, 2, 4])).exp()
    assert uniform[3] == 0
    np.testing.assert_allclose(uniform[[0, 1, 2, 4]] / steps, expected, rtol=0.05)


def test_counts_are_added_up_once() -> None:
    counts = torch.tensor([6.5, 3.0, 0.0, 11.0], dtype=torch.float64)
    documents = torch.tensor([3, 0, 2, 2])
    seen = counts.clamp(min=1)
    expected = (100 * (seen[documents] / seen.sum()) + 30 / 4).log()
    counted = CountedFrequency(counts, 100, 30)
    assert torch.equal(counted.log_expected(documents), expected)
    assert torch.equal(CountedFrequency(counts, 100, 30).log_expected(documents), expected)
    counts[1] = torch.nan  # of a document that is not requested: nothing reads it again
    assert torch.equal(counted.log_expected(documents), expected)
    with pytest.raises(LossInputError, match="negative values"):
        CountedFrequency(torch.tensor([1, -1]), 100)


def test_streaming_estimate_follows_the_stream() -> None:
    """Documents with a period of 1, 4 and 16 steps, among thousands that occur once."""
    estimate = StreamingFrequency(num_buckets=1 << 16, rate=0.05)
    for step in range(400):
        ids = [10] + [20] * (step % 4 == 0) + [30] * (step % 16 == 0) + list(range(1000 + 5 * step, 1005 + 5 * step))
        estimate.update(torch.tensor(ids))
    found = estimate.log_expected(torch.tensor([10, 20, 30])).exp()
    torch.testing.assert_close(found, torch.tensor([1.0, 1 / 4, 1 / 16], dtype=torch.float64), rtol=0.02, atol=0)


def test_streaming_estimate_counts_copies() -> None:
    """The estimate of a document in every step grows with its number of columns, merged or not."""
    estimate = StreamingFrequency(num_buckets=1 << 16, rate=0.05)
    for step in range(400):
        estimate.update(torch.tensor([10, 20, 10, 30]), torch.tensor([3, 2 + 2 * (step % 2), 4, 1]))
    found = estimate.log_expected(torch.tensor([10, 20, 30, 40])).exp()
    expected = torch.tensor([7.0, 3.0, 1.0, 1 / 400], dtype=torch.float64)  # 40: never seen
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0)


def test_streaming_estimate_is_as_good_as_the_counts(world: Any) -> None:
    """With Zipf popularity and batches of 256: the 100 most frequent documents, after 2,000 steps."""
    generator = torch.Generator().manual_seed(2)
    share = world.probability.mean(0)
    estimate = StreamingFrequency(num_buckets=1 << 16, rate=0.01)
    for _ in range(2000):
        estimate.update(torch.multinomial(share, tool.BATCH, replacement=True, generator=generator))
    top = share.topk(100).indices
    exact = CountedFrequency(share * 1e12, tool.BATCH).log_expected(top)
    assert float((estimate.log_expected(top) - exact).abs().mean()) < 0.1


def test_several_hashes_see_through_collisions() -> None:
    """Collisions overestimate a document's frequency; more hashes reduce the error."""
    errors = []
    for num_hashes in (1, 8):
        estimate = StreamingFrequency(num_buckets=2000, num_hashes=num_hashes, rate=0.2)
        for step in range(2000):
            estimate.update(torch.tensor([step % 500]))
        errors.append(float((estimate.log_expected(torch.arange(500)) + math.log(500)).abs().mean()))
    assert errors[1] < 0.1 * errors[0]


def test_streaming_state_goes_through_a_checkpoint() -> None:
    first, second = StreamingFrequency(1000), StreamingFrequency(1000)
    batches = [torch.randint(300, (20,), generator=torch.Generator().manual_seed(k)) for k in range(20)]
    for ids in batches[:10]:
        first.update(ids)
    assert all(isinstance(value, Tensor) for value in first.state_dict().values())
    second.load_state_dict(first.state_dict())
    for ids in batches[10:]:
        first.update(ids)
        second.update(ids)
    everything = torch.arange(300)
    assert torch.equal(first.log_expected(everything), second.log_expected(everything))
    with pytest.raises(LossInputError, match="the checkpoint's estimator"):
        StreamingFrequency(999).load_state_dict(first.state_dict())


def test_relevance_weights() -> None:
    relevance = torch.tensor([0.0, 0.5, 3.0])
    assert relevance_weight(relevance, "indicator").tolist() == [0.0, 1.0, 1.0]
    assert relevance_weight(relevance, "relevance").tolist() == [0.0, 0.5, 3.0]
    for bad in (-1.0, math.nan):
        with pytest.raises(LossInputError, match="relevance holds NaN"):
            relevance_weight(torch.tensor([1.0, bad]), "relevance")
