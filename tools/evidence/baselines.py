"""Registers further baselines in addition to those of the package; imported for this side effect."""

from __future__ import annotations

from bigdssm.evaluation.baselines import BASELINES, BOUNDS, Bounds
from tools.evidence.item_baselines import Ease, ImplicitALS, ItemKNN
from tools.evidence.text_baselines import PretrainedTexts, SentenceTransformerTexts

BASELINES.update(
    item_knn=ItemKNN,
    ease=Ease,
    ials=ImplicitALS,
    pretrained=PretrainedTexts,
    sentence_transformers=SentenceTransformerTexts,
)
BOUNDS.update(
    {
        **dict.fromkeys(("neighbours", "factors", "iterations", "steps", "rows"), Bounds(1)),
        **dict.fromkeys(("regularisation", "weight", "lr"), Bounds(0, exclusive=True)),
        **dict.fromkeys(("warmup_steps", "seed"), Bounds(0)),
    }
)
