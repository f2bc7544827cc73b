"""Registers further baselines in addition to those of the package; imported for this side effect."""

from __future__ import annotations

from bigdssm.evaluation.baselines import BASELINES, LOWER_BOUNDS
from tools.evidence.item_baselines import Ease, ImplicitALS, ItemKNN
from tools.evidence.text_baselines import PretrainedTexts, SentenceTransformerTexts

BASELINES.update(
    item_knn=ItemKNN,
    ease=Ease,
    ials=ImplicitALS,
    pretrained=PretrainedTexts,
    sentence_transformers=SentenceTransformerTexts,
)
LOWER_BOUNDS.update(
    {
        **dict.fromkeys(("neighbours", "factors", "iterations", "steps", "rows"), (1, False)),
        **dict.fromkeys(("regularisation", "weight", "lr"), (0, True)),
        **dict.fromkeys(("warmup_steps", "seed"), (0, False)),
    }
)
