"""Baselines that read texts: BM25, and a text encoder as it is. Both see of a text what the towers see.

Shapes: m queries, N catalogue rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.evaluation.judges import Bm25Judge
from bigdssm.evaluation.pretrained import text_encoders
from bigdssm.retrieval.embed import Encoders
from bigdssm.retrieval.texts import Texts


@dataclass(frozen=True)
class Bm25Texts:
    """The score of a document is BM25's."""

    judge: Bm25Judge
    documents: np.ndarray  # int64 [N], all of them

    @classmethod
    def fit(cls, dataset: Dataset) -> Bm25Texts:
        """Return the baseline of `dataset`. Raises ConfigError: a side without texts, or a package is missing."""
        return cls(Bm25Judge(dataset, Texts(dataset)), np.arange(dataset.catalogue.num_docs))

    def __call__(self, rows: Rows) -> np.ndarray:
        """Return scores float64 [m, N]."""
        return self.judge(rows, np.broadcast_to(self.documents, (len(rows), len(self.documents)))).astype(np.float64)


@dataclass(frozen=True)
class PretrainedTexts:
    """The score of a document is the cosine of what a Hugging Face text encoder makes of both texts."""

    encoders: Encoders
    documents: Tensor  # float32 [N, H]

    @classmethod
    def fit(cls, dataset: Dataset, folder: str, bf16: bool = False) -> PretrainedTexts:
        """Return the baseline of `dataset`. Raises ConfigError: a side without texts, or `folder` holds no encoder."""
        encoders = text_encoders(Path(folder), Texts(dataset), bf16)
        return cls(encoders, encoders.documents(np.arange(dataset.catalogue.num_docs)))

    def __call__(self, rows: Rows) -> np.ndarray:
        """Return scores float64 [m, N]."""
        return (self.encoders.queries(rows) @ self.documents.T).double().numpy()
