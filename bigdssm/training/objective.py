"""The loss of a stage as a function of vectors and batch: weights, sampling correction, masks.

The sampling correction's log q goes on the negatives alone (`corrected`) or on every column (`classic`); neither
enters the serving score.

Shapes: m queries, n document columns.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bigdssm.config import LossConfig
from bigdssm.data import Batch
from bigdssm.losses import LossOutput, fps_loss, ranking_loss
from bigdssm.models import Encoded


class Objective:
    """Calls the configured loss."""

    def __init__(self, config: LossConfig, tile: int | None, doc_counts: np.ndarray | None, rows_global: int) -> None:
        """`doc_counts` are int64 train positives per catalogue row, needed where `config.sampling` is not none."""
        self._config = config
        self._tile = tile
        self._log_expected = None
        if doc_counts is not None and config.sampling != "none":
            expected = expected_columns(doc_counts, rows_global, config.uniform_negatives)
            self._log_expected = torch.from_numpy(np.log(expected)).float()

    def __call__(self, encoded: Encoded, batch: Batch) -> LossOutput:
        """Return the loss of this rank's vectors; a collective."""
        assert encoded.U is not None and encoded.W is not None
        config, r = self._config, batch.relevance
        weight = (r > 0).float() if config.weight == "indicator" else r
        beta, neg_bias = self._biases(encoded.beta, batch)
        if config.name == "fps":
            return fps_loss(
                encoded.U, encoded.W, batch.positive, alpha=encoded.alpha, beta=beta, neg_bias=neg_bias, weight=weight,
                query_ids=batch.query_ids, doc_ids=batch.doc_ids, known=batch.known,
                direction=config.direction, tile=self._tile,
            )  # fmt: skip
        return ranking_loss(
            config.name, encoded.U, encoded.W, batch.positive, alpha=encoded.alpha, beta=beta, neg_bias=neg_bias,
            weight=weight, negatives=batch.negatives, in_batch=config.in_batch, query_ids=batch.query_ids,
            doc_ids=batch.doc_ids, known=batch.known, margin=config.margin,
        )  # fmt: skip

    def _biases(self, beta: Tensor | None, batch: Batch) -> tuple[Tensor | None, Tensor]:
        """Return (beta, neg_bias) of the columns.

        A column into which c documents were merged stands for c columns: log c keeps the loss that of the unmerged
        batch, which is what makes it the same at every number of ranks.
        """
        neg_bias = batch.multiplicity.float().log()
        if self._log_expected is None:
            return beta, neg_bias
        correction = self._config.gamma * self._log_expected.to(neg_bias.device)[batch.doc_rows]
        if self._config.sampling == "corrected":
            return beta, neg_bias - correction
        return (-correction if beta is None else beta - correction), neg_bias


def expected_columns(doc_counts: np.ndarray, rows_global: int, uniform_negatives: int) -> np.ndarray:
    """Return float64 [N]: how often each document is expected among the columns of a global batch.

    The mixture of popularity (positives) and the uniform draws (mixed negative sampling, Yang et al. 2020). A document
    never seen counts as seen once, so that its logarithm exists.
    """
    counts = np.maximum(doc_counts, 1).astype(np.float64)
    return rows_global * counts / counts.sum() + uniform_negatives / len(counts)
