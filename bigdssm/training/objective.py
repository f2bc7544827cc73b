"""The loss of a stage: weights, sampling correction, masks and distillation.

The logQ correction of `corrected` applies to negatives only; the serving score has none.

Shapes: m queries, n document columns.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.config import FrequencyCorrection, ModelConfig, StageConfig
from bigdssm.dataset.catalogue import NO_ROWS
from bigdssm.loader.batch import Batch
from bigdssm.losses import (
    BatchTeacher,
    CountedFrequency,
    LossBatch,
    LossOutput,
    StreamingFrequency,
    apply_sampling,
    contrastive_loss,
    matryoshka_loss,
    relevance_weight,
)
from bigdssm.losses.contrastive import SharedColumns
from bigdssm.losses.declarations import BatchDistillation, ListDistillation
from bigdssm.losses.ids import occurrences
from bigdssm.losses.inputs import add_biases
from bigdssm.models import Encoded


class Objective:
    """The configured loss of a stage."""

    def __init__(
        self,
        stage: StageConfig,
        model: ModelConfig,
        doc_counts: np.ndarray | None,
        queries_per_step: float,
        operand: torch.dtype | None = None,
        undrawn: np.ndarray = NO_ROWS,
        device: torch.device | None = None,
    ) -> None:
        """Build the loss.

        doc_counts: number of times that each catalogue row is a positive, required by a sampling correction by counts.
        operand: dtype that normalized vectors are rounded to for products; None: no rounding. undrawn: catalogue rows
        that no negatives are drawn from. device: of the batches, None: the CPU.
        """
        self._stage, self._loss = stage, stage.loss
        self._normalize = model.score == "cosine"
        self._operand = operand
        self._counted = (
            None
            if doc_counts is None
            else CountedFrequency(torch.from_numpy(doc_counts), queries_per_step, stage.negatives.uniform, undrawn)
        )
        sampling = stage.sampling
        self._sampling = sampling if isinstance(sampling, FrequencyCorrection) else None
        self._streaming = None
        if self._sampling is not None and self._sampling.frequency == "streaming":
            self._streaming = StreamingFrequency(self._sampling.frequency_buckets)
        positions = self._loss.position_bias
        self._position_bias = PositionBias(positions, self._loss.position_bias_lr, device) if positions else None

    def __call__(self, encoded: Encoded, batch: Batch) -> LossOutput:
        """Compute the loss of this rank's vectors; a collective.

        Must be called once per step: it updates the streaming estimate of frequencies, even if the step is skipped.
        """
        weight = relevance_weight(batch.relevance, self._loss.weight)
        output = self._on_vectors(encoded, batch, weight)
        if self._position_bias is not None:
            output = replace(output, stats={**output.stats, "position_bias": self._position_bias.range()})
        if self._sampling is not None and self._sampling.gamma > 0:  # it would be of corrected scores
            stats = {name: value for name, value in output.stats.items() if name != "in_batch_accuracy"}
            output = replace(output, stats=stats)
        return output

    def step(self, applied: bool, lr_factor: float) -> None:
        """Update the weights of the loss itself, unless the step is skipped; a collective."""
        if self._position_bias is not None:
            self._position_bias.step(applied, lr_factor)

    def _on_vectors(self, encoded: Encoded, batch: Batch, weight: Tensor) -> LossOutput:
        assert encoded.U is not None and encoded.W is not None
        negatives, distillation = self._stage.negatives, self._stage.distillation
        beta = encoded.beta
        if self._loss.all_columns:
            # With a bias of log c for a column merged from c documents, the loss equals that of the unmerged batch,
            # and so is the same on any number of ranks.
            counts, neg_bias = batch.counts, batch.counts.double().log()
            if negatives.columns == "catalogue":
                shared = in_catalogue_share(batch, distributed.rank(), distributed.world_size())
                neg_bias = torch.where(shared, 0.0, -torch.inf).double()
        else:
            # this loss applies counts itself: only positives are shared among queries
            counts, neg_bias = occurrences(batch.positive, len(batch.doc_ids)), None
        candidates = None if self._loss.all_columns else batch.negatives
        if batch.no_negative is not None:
            neg_bias = add_biases(neg_bias, torch.where(batch.no_negative, -torch.inf, 0.0).double())
            if candidates is not None:
                candidates = candidates.masked_fill(batch.no_negative[candidates.clamp(min=0)], -1)
        assert self._stage.sampling.name != "auto", "resolved by Config"
        if self._sampling is not None:
            if self._streaming is not None:
                self._streaming.update(batch.doc_ids, counts)
                log_expected = self._streaming.log_expected(batch.doc_ids)
            else:
                assert self._counted is not None
                log_expected = self._counted.log_expected(batch.doc_rows)
            beta, neg_bias = apply_sampling(self._sampling, log_expected, beta=beta, neg_bias=neg_bias)
        queries = self._queries(batch)
        score_bias = None if self._position_bias is None else self._position_bias(batch.shown)

        def loss(U: Tensor, W: Tensor) -> LossOutput:
            vectors = U.to(self._operand or U.dtype), W.to(self._operand or W.dtype)
            inputs = LossBatch(
                *vectors, batch.positive, alpha=encoded.alpha, beta=beta, neg_bias=neg_bias, weight=weight,
                doc_ids=batch.doc_ids, time=batch.time, since=batch.since,
                negatives=candidates, score_bias=score_bias, **queries,
            )  # fmt: skip
            columns: SharedColumns = "all" if self._loss.all_columns else "in_batch" if negatives.in_batch else "none"
            output = contrastive_loss(self._loss, inputs, columns=columns)
            if isinstance(distillation, BatchDistillation):
                return self._added(output, self._of_teacher(distillation, vectors, encoded, batch, weight))
            if not isinstance(distillation, ListDistillation):
                return output
            # on the serving score, without corrections or masks: the teacher scores every candidate
            inputs = LossBatch(
                *vectors, batch.positive, alpha=encoded.alpha, beta=encoded.beta,
                weight=weight, negatives=batch.negatives, teacher=batch.teacher,
            )  # fmt: skip
            return self._added(output, contrastive_loss(distillation, inputs, columns="none").loss)

        return matryoshka_loss(loss, encoded.U, encoded.W, self._loss.widths or (), self._normalize)

    def _of_teacher(
        self, distillation: BatchDistillation, vectors: tuple[Tensor, Tensor], encoded: Encoded, batch: Batch,
        weight: Tensor,
    ) -> Tensor:  # fmt: skip
        """Compute the distillation of the teacher's scores, in the loss's directions; a collective."""
        assert batch.teacher_query is not None and batch.teacher_doc is not None
        (U, W), queries, documents = vectors, batch.teacher_query, batch.teacher_doc
        alpha, direction, temperature = encoded.alpha, self._loss.direction, distillation.temperature
        loss, values = distillation.build(), []
        if direction in ("q2d", "both"):
            teacher = BatchTeacher(queries, documents, temperature)
            values.append(loss(U, W, teacher, alpha=alpha, beta=encoded.beta, weight=weight, counts=batch.counts))
        if direction in ("d2q", "both"):  # the queries of each positive; beta is constant and cancels
            positive = batch.positive
            teacher = BatchTeacher(documents[positive], queries, temperature)
            values.append(loss(W[positive], U, teacher, alpha=alpha, weight=weight))
        return torch.stack(values).mean()

    def _added(self, output: LossOutput, distillation: Tensor) -> LossOutput:
        """Add the weighted distillation to a loss, and its value to the statistics."""
        assert self._stage.distillation is not None
        stats = {**output.stats, "distillation": distillation.detach()}
        return LossOutput(output.loss + self._stage.distillation.weight * distillation, stats)

    def _queries(self, batch: Batch) -> dict[str, Any]:
        """Return query_ids and known pairs by the mask: queries with equal ids share positives, or are distinct."""
        if self._stage.negatives.mask in ("past", "none"):
            return {"query_ids": None, "known": batch.known_positives}
        # without a config, the mask is batch
        return {"query_ids": batch.query_ids, "known": batch.known_positives, "is_known": batch.is_known}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of the loss; the same on every rank."""
        parts = (self._streaming, self._position_bias)
        return {name: value for part in parts if part is not None for name, value in part.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the `state` of a checkpoint."""
        for part in (self._streaming, self._position_bias):
            if part is not None:
                part.load_state_dict(state)


class PositionBias:
    """A learned bias of the pairs shown at each position, part of the loss alone; the same on every rank.

    Serving, evaluation and the model folder do not have it. It is no weight of the model, so that its gradient, summed
    over ranks in float64, does not depend on ZeRO's partitions or on chunks. Updated by Adam (Kingma and Ba 2015).
    """

    STATE = "position_bias"  # in a checkpoint: the biases and both moments, and the number of updates

    def __init__(self, positions: int, lr: float, device: torch.device | None) -> None:
        self._values = torch.zeros(positions, dtype=torch.float64, device=device, requires_grad=True)
        self._averages = torch.zeros(2, positions, dtype=torch.float64, device=device)
        self._lr, self._updates = lr, 0

    def __call__(self, shown: Tensor | None) -> Tensor:
        """Return the biases float64 [m, 1 + k] of positions from 1; 0 for an unknown one."""
        assert shown is not None, "checks.py requires the positions of candidates"
        return torch.cat([self._values.new_zeros(1), self._values])[shown.clamp(max=len(self._values))]

    def range(self) -> Tensor:
        """Return the bias of the first position minus that of the last."""
        return (self._values[0] - self._values[-1]).detach()

    def step(self, applied: bool, lr_factor: float) -> None:
        """Update the biases by the mean gradient over the ranks; a collective."""
        gradient = torch.zeros_like(self._values) if self._values.grad is None else self._values.grad
        self._values.grad = None
        distributed.all_reduce(gradient, "sum")
        if not applied:
            return
        gradient /= distributed.world_size()
        self._updates += 1
        first, second = self._averages
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.001)
        change = first / (1 - 0.9**self._updates) / ((second / (1 - 0.999**self._updates)).sqrt() + 1e-8)
        with torch.no_grad():
            self._values -= self._lr * lr_factor * change

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state, the same on every rank."""
        state = torch.cat([self._values.detach()[None], self._averages])
        return {self.STATE: state, f"{self.STATE}.updates": torch.tensor(self._updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the state of a checkpoint."""
        self._updates = int(state[f"{self.STATE}.updates"])
        self._averages.copy_(state[self.STATE][1:])
        with torch.no_grad():
            self._values.copy_(state[self.STATE][0])


def num_negatives(stage: StageConfig, batch: Batch, world_size: int, num_docs: int) -> int:
    """Return the number of negatives per query, with multiplicity, before masks.

    `batch` is that of one rank; num_docs is the size of the catalogue.
    """
    if stage.negatives.columns == "catalogue":
        return num_docs - 1
    if not stage.loss.all_columns:
        return (len(batch.query_ids) * world_size - 1 if stage.negatives.in_batch else 0) + stage.negatives.hard
    return int(batch.counts.sum()) * world_size - 1


def catalogue_share(num_docs: int, rank: int, world_size: int) -> np.ndarray:
    """Return the catalogue rows int64 that a rank encodes; the shares of all ranks are disjoint and complete."""
    return np.arange(rank, num_docs, world_size, dtype=np.int64)


def in_catalogue_share(batch: Batch, rank: int, world_size: int) -> Tensor:
    """Return bool [n]: whether columns are in the rank's catalogue share, without those that are no negatives."""
    local = batch.doc_rows % world_size == rank
    return local if batch.no_negative is None else local & ~batch.no_negative
