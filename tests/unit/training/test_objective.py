"""A stage's loss of a batch: each config key against an explicit call of the loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from bigdssm.config import FrequencyCorrection, LossConfig, ModelConfig, NegativesConfig, StageConfig
from bigdssm.loader.batch import Batch
from bigdssm.losses import (
    FPS,
    ListwiseKL,
    LossBatch,
    MarginMSE,
    PairCE,
    Softmax,
    Triplet,
    contrastive_loss,
    fps_loss,
    ranking_loss,
)
from bigdssm.losses.declarations import Corrected, NoCorrection
from bigdssm.models import Encoded
from bigdssm.training.objective import Objective

M, N, D = 4, 6, 3
GENERATOR = torch.Generator().manual_seed(0)
U, W = (torch.randn(rows, D, generator=GENERATOR, dtype=torch.float64) for rows in (M, N))
BETA = torch.randn(N, generator=GENERATOR, dtype=torch.float64)
ALPHA = torch.tensor([2.0])
POSITIVE = torch.tensor([0, 1, 0, 2])
RELEVANCE = torch.tensor([1.0, 0.0, 2.5, 0.5])
COLUMN_COUNTS = torch.tensor([2, 1, 1, 3, 1, 1])
LOG_COPIES = COLUMN_COUNTS.double().log()
COUNTS = np.array([40, 10, 0, 5, 30, 15])
BATCH = Batch(
    step=0,
    row_ids=torch.arange(M),
    query={},
    doc={},
    positive=POSITIVE,
    relevance=RELEVANCE,
    query_ids=torch.arange(M),
    doc_ids=torch.arange(N) + 100,
    doc_rows=torch.arange(N),
    counts=COLUMN_COUNTS,
    query_lengths={},
    doc_lengths={},
    negatives=torch.tensor([[3, 4], [5, -1], [3, 3], [4, 5]]),
)
IDS = {"query_ids": BATCH.query_ids, "doc_ids": BATCH.doc_ids}
ENCODED = Encoded(U, W, BETA, ALPHA)
INDICATOR = torch.tensor([1.0, 0.0, 1.0, 1.0])
LISTED = NegativesConfig(in_batch=False, hard=2)


def stage(loss: LossConfig | None = None, **blocks: Any) -> StageConfig:
    """Return a stage without a sampling correction."""
    return StageConfig(**{"loss": loss or FPS(), "sampling": NoCorrection(), **blocks})


def loss(config: StageConfig, model: ModelConfig | None = None) -> float:
    objective = Objective(config, model or ModelConfig(score="dot"), COUNTS, 20)
    return float(objective(ENCODED, BATCH).loss)


def fps(**arguments: object) -> float:
    given = {"alpha": 2.0, "beta": BETA, "neg_bias": LOG_COPIES, "weight": INDICATOR, **IDS, **arguments}
    return float(fps_loss(U, W, POSITIVE, **given).loss)  # type: ignore[arg-type]


def test_merged_columns_count_as_often_as_they_were() -> None:
    assert loss(stage()) == pytest.approx(fps(), rel=1e-12)
    assert loss(stage(FPS(direction="both"))) == pytest.approx(fps(direction="both"), rel=1e-12)


def test_products_take_vectors_rounded_after_they_were_normalised() -> None:
    objective = Objective(stage(FPS(widths=(2,))), ModelConfig(), None, 20, torch.bfloat16)
    found = float(objective(ENCODED, BATCH).loss)

    def rounded(vectors: torch.Tensor) -> torch.Tensor:
        return vectors.to(torch.bfloat16)

    given = {"alpha": 2.0, "beta": BETA, "neg_bias": LOG_COPIES, "weight": INDICATOR, **IDS}
    at_widths = [(U, W), tuple(torch.nn.functional.normalize(part[:, :2], dim=1) for part in (U, W))]
    expected = [float(fps_loss(rounded(u), rounded(w), POSITIVE, **given).loss) for u, w in at_widths]  # type: ignore[arg-type]
    assert found == pytest.approx(sum(expected) / 2, rel=1e-6)


def test_relevance_is_an_indicator_or_a_weight() -> None:
    assert loss(stage(FPS(weight="relevance"))) == pytest.approx(fps(weight=RELEVANCE), rel=1e-12)
    assert loss(stage()) != pytest.approx(fps(weight=RELEVANCE), rel=1e-3)


@dataclass(frozen=True)
class EveryScore(FrequencyCorrection):
    """The correction of a plugin, of positives and negatives."""

    def shares(self, correction: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return correction, None


def test_the_sampling_correction_applies_to_all_columns_or_to_negatives() -> None:
    counts = torch.tensor(COUNTS).double()
    expected = (20 * counts.clamp(min=1) / 101 + 6 / N).log()
    corrections, drawn = (EveryScore(gamma=0.5), Corrected(gamma=0.5)), NegativesConfig(uniform=6)
    of_all, corrected = (loss(stage(sampling=kind, negatives=drawn)) for kind in corrections)
    assert of_all == pytest.approx(fps(beta=BETA - 0.5 * expected), rel=1e-12)
    assert corrected == pytest.approx(fps(neg_bias=LOG_COPIES - 0.5 * expected), rel=1e-12)


@pytest.mark.parametrize("kind", [FPS, Softmax])
def test_masks_of_known_pairs(kind: type[LossConfig]) -> None:
    """Rows 0 and 3 have one query id; documents 101 and 102 precede row 2, 101 precedes row 3."""
    ids, by_id = torch.tensor([7, 8, 9, 7]), torch.tensor([[9, 101], [9, 102], [7, 101]])
    by_row = torch.tensor([[2, 101], [2, 102], [3, 101]])
    given = {"query_ids": ids, "known": by_id}
    found = {}
    for mask, known, arguments in (
        ("batch", None, {**given, "known": None}), ("user", by_id, given),
        ("past", by_row, {"query_ids": None, "known": by_row}), ("none", None, {"query_ids": None, "known": None}),
    ):  # fmt: skip
        batch = replace(BATCH, query_ids=ids, known_positives=known)
        config = stage(kind(weight="relevance"), negatives=NegativesConfig(mask=mask))  # type: ignore[arg-type]
        found[mask] = float(Objective(config, ModelConfig(score="dot"), None, 20)(ENCODED, batch).loss)
        common = {"alpha": 2.0, "beta": BETA, "weight": RELEVANCE, "doc_ids": BATCH.doc_ids, **arguments}
        if kind is FPS:
            right = fps_loss(U, W, POSITIVE, neg_bias=LOG_COPIES, **common)
        else:
            right = ranking_loss(kind(), U, W, POSITIVE, in_batch=True, negatives=BATCH.negatives, **common)
        assert found[mask] == pytest.approx(float(right.loss), rel=1e-12)
    assert len({round(value, 9) for value in found.values()}) == 4


def test_candidates_are_masked_by_each_querys_past() -> None:
    objective = Objective(stage(Softmax(), negatives=replace(LISTED, mask="past")), ModelConfig(score="dot"), None, 20)
    seen = torch.tensor([[2, 103], [3, 105]])
    unmasked, masked = (
        float(objective(ENCODED, replace(BATCH, known_positives=known)).loss) for known in (seen[:0], seen)
    )
    candidates = torch.tensor([[0, 3, 4], [1, 5, 0], [0, 3, 3], [2, 4, 5]])
    scores = 2.0 * torch.einsum("md,mkd->mk", U, W[candidates]) + BETA[candidates]
    # The second negative of row 1 is absent. Row 2 has seen document 103, its candidate twice, and row 3 105.
    for row, column in ((1, 2), (2, 1), (2, 2), (3, 2)):
        scores[row, column] = -torch.inf
    targets = torch.zeros(M, dtype=torch.int64)
    right = torch.nn.functional.cross_entropy(scores, targets, reduction="none")[INDICATOR > 0]
    assert masked == pytest.approx(float(right.mean()), rel=1e-12)
    assert unmasked > masked


TEACHER = torch.tensor([[1.0, 0.5, 2.0], [1.0, 0.0, np.nan], [np.nan, 1.0, 2.0], [0.5, 3.0, -1.0]])


@pytest.mark.parametrize("kind", [ListwiseKL, MarginMSE])
@pytest.mark.parametrize("base", [stage(sampling=Corrected()), stage(Softmax(), negatives=NegativesConfig(hard=2))])
def test_a_teacher_is_learned_in_addition_to_the_loss(kind: type[ListwiseKL | MarginMSE], base: StageConfig) -> None:
    """On the serving score, for any corrections and masks of the loss."""
    batch = replace(BATCH, teacher=TEACHER)
    plain, both = (
        Objective(config, ModelConfig(score="dot"), COUNTS, 20)(ENCODED, batch)
        for config in (base, replace(base, distillation=kind(weight=0.3, temperature=2.0)))
    )
    candidates = LossBatch(
        U, W, POSITIVE, alpha=2.0, beta=BETA, weight=INDICATOR, negatives=BATCH.negatives, teacher=TEACHER
    )
    distilled = contrastive_loss(kind(temperature=2.0), candidates, columns="none").loss
    assert float(both.loss) == pytest.approx(float(plain.loss + 0.3 * distilled), rel=1e-12)
    assert float(both.stats["distillation"]) == pytest.approx(float(distilled), rel=1e-12) and float(distilled) > 0.01


@pytest.mark.parametrize("config", [Softmax(), PairCE(), Triplet(margin=0.3)], ids=lambda loss: loss.name)
def test_a_query_is_compared_with_its_candidates_alone(config: LossConfig) -> None:
    right = ranking_loss(
        config, U, W, POSITIVE, alpha=2.0, beta=BETA, weight=INDICATOR, negatives=BATCH.negatives, **IDS
    ).loss
    assert loss(stage(config, negatives=LISTED)) == pytest.approx(float(right), rel=1e-12)
