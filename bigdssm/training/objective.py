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
from bigdssm.losses import (
    LossOutput,
    apply_sampling,
    fps_loss,
    log_expected_from_counts,
    ranking_loss,
    relevance_weight,
)
from bigdssm.models import Encoded


class Objective:
    """Calls the configured loss."""

    def __init__(self, config: LossConfig, tile: int | None, doc_counts: np.ndarray | None, rows_global: int) -> None:
        """`doc_counts` says how often each catalogue row is a positive, needed where `config.sampling` is not none."""
        self._config = config
        self._tile = tile
        self._counts = None if doc_counts is None else torch.from_numpy(doc_counts)
        self._rows_global = rows_global

    def __call__(self, encoded: Encoded, batch: Batch) -> LossOutput:
        """Return the loss of this rank's vectors; a collective."""
        assert encoded.U is not None and encoded.W is not None
        config = self._config
        weight = relevance_weight(batch.relevance, config.weight)
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

    def _biases(self, beta: Tensor | None, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """Return (beta, neg_bias) of the columns.

        A column into which c documents were merged stands for c columns: log c keeps the loss that of the unmerged
        batch, which is what makes it the same at every number of ranks.
        """
        neg_bias = batch.multiplicity.double().log()
        if self._counts is None:
            return beta, neg_bias
        log_expected = log_expected_from_counts(
            self._counts, batch.doc_rows.cpu(), self._rows_global, self._config.uniform_negatives
        ).to(neg_bias.device)
        biases = apply_sampling(
            self._config.sampling, log_expected, gamma=self._config.gamma, beta=beta, neg_bias=neg_bias
        )
        return biases.beta, biases.neg_bias
