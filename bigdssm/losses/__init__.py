"""Losses: the Full Product Softmax and the fine-tuning losses, over any number of ranks; plain tensors in, no model."""

from bigdssm.losses.distillation import DISTILLATIONS, BatchTeacher, Distillation, ListwiseKL, MarginMSE, batch_kl
from bigdssm.losses.engine import (
    RANKING_NAMES,
    contrastive_loss,
    fps_loss,
    matryoshka_loss,
    norm_penalty,
    ranking_loss,
    relevance_weight,
)
from bigdssm.losses.inputs import LossBatch, LossInputError
from bigdssm.losses.output import LossOutput
from bigdssm.losses.sampling import SAMPLINGS, CountedFrequency, StreamingFrequency, apply_sampling, sample_uniform
from bigdssm.losses.scored import scored_loss
from bigdssm.losses.terms import PairCE, PairTerm, Sigmoid, Softmax, Term, Triplet, find_term, register

__all__ = [
    "DISTILLATIONS",
    "RANKING_NAMES",
    "SAMPLINGS",
    "BatchTeacher",
    "CountedFrequency",
    "Distillation",
    "ListwiseKL",
    "LossBatch",
    "LossInputError",
    "LossOutput",
    "MarginMSE",
    "PairCE",
    "PairTerm",
    "Sigmoid",
    "Softmax",
    "StreamingFrequency",
    "Term",
    "Triplet",
    "apply_sampling",
    "batch_kl",
    "contrastive_loss",
    "find_term",
    "fps_loss",
    "matryoshka_loss",
    "norm_penalty",
    "ranking_loss",
    "register",
    "relevance_weight",
    "sample_uniform",
    "scored_loss",
]
