"""The loss of a stage as a function of vectors and batch: weights, sampling correction, masks, what is added to it.

The sampling correction's log q goes on the negatives alone (`corrected`) or on every column (`classic`); neither
enters the serving score.

Shapes: m queries, n document columns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.config import FrequencyCorrection, ModelConfig, StageConfig
from bigdssm.dataset.tensors import Features
from bigdssm.loader.batch import Batch
from bigdssm.losses import (
    BatchTeacher,
    CountedFrequency,
    LossBatch,
    LossOutput,
    StreamingFrequency,
    apply_sampling,
    batch_kl,
    contrastive_loss,
    matryoshka_loss,
    norm_penalty,
    relevance_weight,
    scored_loss,
)
from bigdssm.losses.contrastive import SharedColumns
from bigdssm.losses.declarations import BatchKL, ListDistillation
from bigdssm.losses.masks import occurrences
from bigdssm.models import Encoded


class Objective:
    """Calls the configured loss."""

    def __init__(
        self,
        stage: StageConfig,
        model: ModelConfig,
        tile: int | None,
        doc_counts: np.ndarray | None,
        queries_per_step: float,
        operand: torch.dtype | None = None,
    ) -> None:
        """`doc_counts`: how often each catalogue row is a positive, needed where the sampling correction uses them.

        operand: what vectors are rounded to for the products, normalised before; None: they stay as they are.
        """
        self._stage, self._loss = stage, stage.loss
        self._normalise = model.score == "cosine"
        # A relative loss cancels it: its gradient would be rounding noise, which Adam turns into steps.
        self._scalar_beta = model.beta == "scalar"
        self._without_beta = self._scalar_beta and stage.loss.relative
        self._tile, self._operand = tile, operand
        self._counted = (
            None
            if doc_counts is None
            else CountedFrequency(torch.from_numpy(doc_counts), queries_per_step, stage.negatives.uniform)
        )
        sampling = stage.sampling
        self._sampling = sampling if isinstance(sampling, FrequencyCorrection) else None
        self._streaming = None
        if self._sampling is not None and self._sampling.frequency == "streaming":
            self._streaming = StreamingFrequency(self._sampling.frequency_buckets)

    def __call__(self, encoded: Encoded, batch: Batch) -> LossOutput:
        """Return the loss of this rank's vectors; a collective.

        It is called once a step: a streaming estimate of frequencies takes the batch in, whether the step that follows
        is applied or skipped.
        """
        loss = self._loss
        weight = relevance_weight(batch.relevance, loss.weight)
        score = self._on_scores if self._stage.scorer else self._on_vectors
        output = score(encoded, batch, weight)
        if self._sampling is not None and self._sampling.gamma > 0:  # it would count corrected scores
            stats = {name: value for name, value in output.stats.items() if name != "in_batch_accuracy"}
            output = replace(output, stats=stats)
        if loss.norm_penalty == 0:
            return output
        assert encoded.U is not None and encoded.W is not None
        norms = norm_penalty(encoded.U) + norm_penalty(encoded.W, batch.counts)
        return replace(output, loss=output.loss + loss.norm_penalty * norms)

    def model_inputs(self, batch: Batch) -> Features:
        """Return what the model's forward takes beside both sides' features, for this loss."""
        listed = self.listed(batch)
        return {} if listed is None else {"candidates": listed}

    def listed(self, batch: Batch) -> Tensor | None:
        """Return int64 [m, 1 + k], the columns that a scorer scores for each query, positives first; None without."""
        return None if self._stage.scorer is None else candidate_columns(batch)

    def _on_scores(self, encoded: Encoded, batch: Batch, weight: Tensor) -> LossOutput:
        listed = self.listed(batch)
        assert listed is not None and encoded.scores is not None and batch.negatives is not None
        absent = torch.nn.functional.pad(batch.negatives < 0, (1, 0))  # the positive is always there
        scores = encoded.scores.float().masked_fill(absent, -torch.inf)
        output = scored_loss(
            self._loss, scores, weight=weight, doc_ids=batch.doc_ids[listed], **self._queries(batch, gathered=True)
        )
        distillation = self._stage.distillation
        if not isinstance(distillation, ListDistillation):
            return output
        copies = torch.nn.functional.pad(batch.negatives == batch.positive[:, None], (1, 0))
        scores = scores.masked_fill(copies, -torch.inf)
        return self._added(output, scored_loss(distillation, scores, weight=weight, teacher=batch.teacher).loss)

    def _on_vectors(self, encoded: Encoded, batch: Batch, weight: Tensor) -> LossOutput:
        assert encoded.U is not None and encoded.W is not None
        negatives, distillation = self._stage.negatives, self._stage.distillation
        beta = None if self._without_beta else encoded.beta
        if self._loss.all_columns:
            # A column into which c documents were merged stands for c columns: log c keeps the loss that of the
            # unmerged batch, which is what makes it the same at every number of ranks.
            copies, neg_bias = batch.counts, batch.counts.double().log()
            if negatives.columns == "catalogue":
                shared = is_shared(batch, distributed.rank(), distributed.world_size())
                neg_bias = torch.where(shared, 0.0, -torch.inf).double()
        else:
            # here the loss counts the copies itself: only positives are shared among queries
            copies, neg_bias = occurrences(batch.positive, len(batch.doc_ids)), None
        beta, neg_bias = self._corrected(beta, neg_bias, batch, copies)
        queries = self._queries(batch)

        def loss(U: Tensor, W: Tensor) -> LossOutput:
            vectors = U.to(self._operand or U.dtype), W.to(self._operand or W.dtype)
            inputs = LossBatch(
                *vectors, batch.positive, alpha=encoded.alpha, beta=beta, neg_bias=neg_bias, weight=weight,
                doc_ids=batch.doc_ids, negatives=None if self._loss.all_columns else batch.negatives, **queries,
            )  # fmt: skip
            columns: SharedColumns = "all" if self._loss.all_columns else "in_batch" if negatives.in_batch else "none"
            output = contrastive_loss(self._loss, inputs, columns=columns, tile=self._tile)
            if isinstance(distillation, BatchKL):
                return self._added(output, self._of_teacher(distillation.temperature, vectors, encoded, batch, weight))
            if not isinstance(distillation, ListDistillation):
                return output
            # of the serving score, without corrections or masks: the teacher scores every listed document
            inputs = LossBatch(
                *vectors, batch.positive, alpha=encoded.alpha, beta=None if self._scalar_beta else encoded.beta,
                weight=weight, negatives=batch.negatives, teacher=batch.teacher,
            )  # fmt: skip
            return self._added(output, contrastive_loss(distillation, inputs, columns="none").loss)

        return matryoshka_loss(loss, encoded.U, encoded.W, self._loss.widths, self._normalise)

    def _of_teacher(
        self, temperature: float, vectors: tuple[Tensor, Tensor], encoded: Encoded, batch: Batch, weight: Tensor
    ) -> Tensor:
        """Return how far the serving scores are from the teacher's, in the loss's directions; a collective."""
        assert batch.teacher_query is not None and batch.teacher_doc is not None
        (U, W), queries, documents = vectors, batch.teacher_query, batch.teacher_doc
        alpha, direction = encoded.alpha, self._loss.direction
        found = []
        if direction in ("q2d", "both"):
            beta = None if self._scalar_beta else encoded.beta
            teacher = BatchTeacher(queries, documents, temperature)
            found.append(batch_kl(U, W, teacher, alpha=alpha, beta=beta, weight=weight, counts=batch.counts))
        if direction in ("d2q", "both"):  # each query's document among the queries; its bias is the same for all
            own = batch.positive
            teacher = BatchTeacher(documents[own], queries, temperature)
            found.append(batch_kl(W[own], U, teacher, alpha=alpha, weight=weight))
        return torch.stack(found).mean()

    def _added(self, output: LossOutput, distillation: Tensor) -> LossOutput:
        """Return a loss with the distillation added to it, and to its statistics."""
        assert self._stage.distillation is not None
        stats = {**output.stats, "distillation": distillation.detach()}
        return LossOutput(output.loss + self._stage.distillation.weight * distillation, stats)

    def _queries(self, batch: Batch, gathered: bool = False) -> dict[str, Any]:
        """Return the loss's query_ids and known pairs: by mask, queries of one id know of each other, or each is alone.

        gathered: numbers that no other rank has, for a loss that compares queries of all ranks in any case.
        """
        if self._stage.negatives.mask not in ("past", "none"):  # a loss outside a config has batch
            return {"query_ids": batch.query_ids, "known": batch.known_positives}
        if not gathered:
            return {"query_ids": None, "known": batch.known_positives}
        first = distributed.rank() << 40
        known = (
            None
            if batch.known_positives is None
            else torch.stack([first + batch.known_positives[:, 0], batch.known_positives[:, 1]], 1)
        )
        return {"query_ids": first + torch.arange(len(batch.query_ids), device=batch.query_ids.device), "known": known}

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the next step's loss depends on besides the model; the same on every rank."""
        return {} if self._streaming is None else self._streaming.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from the `state` of a checkpoint."""
        if self._streaming is not None:
            self._streaming.load_state_dict(state)

    def _corrected(
        self, beta: Tensor | None, neg_bias: Tensor | None, batch: Batch, copies: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return (beta, neg_bias) [n] with the sampling correction; `copies` [n] are the loss's columns of each."""
        assert self._stage.sampling.name != "auto", "a Config has decided it"
        if self._sampling is None:
            return beta, neg_bias
        if self._streaming is not None:
            self._streaming.update(batch.doc_ids, copies)
            log_expected = self._streaming.log_expected(batch.doc_ids)
        else:
            assert self._counted is not None
            log_expected = self._counted.log_expected(batch.doc_rows)
        return apply_sampling(self._sampling, log_expected, beta=beta, neg_bias=neg_bias)


def candidate_columns(batch: Batch) -> Tensor:
    """Return int64 [m, 1 + k], the columns of each query's positive and of its listed negatives."""
    assert batch.negatives is not None
    return torch.cat([batch.positive[:, None], batch.negatives.clamp(min=0)], 1)


def num_negatives(stage: StageConfig, batch: Batch, world_size: int, num_docs: int) -> int:
    """Return how many documents, copies included, a query's own is told apart from, before any mask.

    `batch` is one rank's, num_docs the catalogue's.
    """
    if stage.negatives.columns == "catalogue":
        return num_docs - 1
    if not stage.loss.all_columns:
        return (len(batch.query_ids) * world_size - 1 if stage.negatives.in_batch else 0) + stage.negatives.hard
    return int(batch.counts.sum()) * world_size - 1


def catalogue_share(num_docs: int, rank: int, world_size: int) -> np.ndarray:
    """Return the catalogue rows that a rank encodes for all, int64: every document is in one rank's share."""
    return np.arange(rank, num_docs, world_size, dtype=np.int64)


def is_shared(batch: Batch, rank: int, world_size: int) -> Tensor:
    """Return bool [n]: whether columns of a rank are of its share; what a document was before it changed is not."""
    own = batch.doc_rows % world_size == rank
    return own if batch.superseded is None else own & ~batch.superseded
