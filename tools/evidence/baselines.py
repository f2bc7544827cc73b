"""Registers further baselines in addition to those of the package; imported for this side effect."""

from __future__ import annotations

from bigdssm.evaluation.baselines import BASELINES
from tools.evidence.item_baselines import Ease, ImplicitALS, ItemKNN
from tools.evidence.text_baselines import PretrainedTexts, SentenceTransformerTexts

BASELINES.update(
    item_knn=ItemKNN.fit,
    ease=Ease.fit,
    ials=ImplicitALS.fit,
    pretrained=PretrainedTexts.fit,
    sentence_transformers=SentenceTransformerTexts.fit,
)
