"""Losses on plain tensors, without a model, exact over any number of ranks."""

from typing import TYPE_CHECKING

from bigdssm.utils.lazy import lazy_attributes

if TYPE_CHECKING:
    from bigdssm.losses.contrastive import (
        LossOutput,
        contrastive_loss,
        fps_loss,
        matryoshka_loss,
        ranking_loss,
        relevance_weight,
    )
    from bigdssm.losses.declarations import (
        FPS,
        ListwiseKL,
        MarginMSE,
        PairCE,
        PairLoss,
        Softmax,
        Triplet,
        register_distillation,
        register_loss,
        register_sampling,
    )
    from bigdssm.losses.distillation import BatchTeacher, batch_kl
    from bigdssm.losses.inputs import LossBatch, LossInputError
    from bigdssm.losses.sampling import (
        CountedFrequency,
        StreamingFrequency,
        apply_sampling,
        sample_uniform,
    )

__all__ = [
    "FPS",
    "BatchTeacher",
    "CountedFrequency",
    "ListwiseKL",
    "LossBatch",
    "LossInputError",
    "LossOutput",
    "MarginMSE",
    "PairCE",
    "PairLoss",
    "Softmax",
    "StreamingFrequency",
    "Triplet",
    "apply_sampling",
    "batch_kl",
    "contrastive_loss",
    "fps_loss",
    "matryoshka_loss",
    "ranking_loss",
    "register_distillation",
    "register_loss",
    "register_sampling",
    "relevance_weight",
    "sample_uniform",
]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        "bigdssm.losses.declarations": [
            "FPS", "ListwiseKL", "MarginMSE", "PairCE", "PairLoss", "Softmax", "Triplet",
            "register_distillation", "register_loss", "register_sampling",
        ],
        "bigdssm.losses.distillation": ["BatchTeacher", "batch_kl"],
        "bigdssm.losses.contrastive": [
            "LossOutput", "contrastive_loss", "fps_loss", "matryoshka_loss", "ranking_loss",
            "relevance_weight",        ],
        "bigdssm.losses.inputs": ["LossBatch", "LossInputError"],
        "bigdssm.losses.sampling": [
            "CountedFrequency", "StreamingFrequency", "apply_sampling", "sample_uniform",
        ],
    },
)  # fmt: skip
