"""Losses: the Full Product Softmax and the fine-tuning losses, over any number of ranks; plain tensors in, no model."""

from bigdssm.losses.extras import norm_penalty, relevance_weight
from bigdssm.losses.fps import DIRECTIONS, fps_loss
from bigdssm.losses.inputs import LossInputError
from bigdssm.losses.matryoshka import matryoshka_loss
from bigdssm.losses.output import LossOutput
from bigdssm.losses.ranking import RANKING_NAMES, ranking_loss
from bigdssm.losses.sampling import (
    SAMPLINGS,
    StreamingFrequency,
    apply_sampling,
    log_expected_from_counts,
    sample_uniform,
)
from bigdssm.losses.scored import scored_loss

__all__ = [
    "DIRECTIONS",
    "RANKING_NAMES",
    "SAMPLINGS",
    "LossInputError",
    "LossOutput",
    "StreamingFrequency",
    "apply_sampling",
    "fps_loss",
    "log_expected_from_counts",
    "matryoshka_loss",
    "norm_penalty",
    "ranking_loss",
    "relevance_weight",
    "sample_uniform",
    "scored_loss",
]
