"""Text baselines: a pretrained text encoder, and one trained with sentence-transformers.

Both truncate texts to the same length as the towers.

Shapes: m queries, N catalogue rows.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from torch import Tensor

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.errors import ConfigError
from bigdssm.evaluation.baselines import Count
from bigdssm.evaluation.pretrained import PretrainedEncoder, check_encoder, text_encoders
from bigdssm.models.precision import resolve_precision
from bigdssm.retrieval.embed import Encoders
from bigdssm.retrieval.reranking import Texts
from bigdssm.utils.components import Bound
from tools.evidence.item_baselines import Positive, Seed

ROWS_PER_BATCH = 16_384


@dataclass(frozen=True)
class VectorTexts:
    """Cosine scores of a text encoder with unit vectors."""

    encoders: Encoders
    documents: Tensor  # float32 [N, H]

    def __call__(self, rows: Rows) -> np.ndarray:
        """Return scores float64 [m, N]."""
        return (self.encoders.queries(rows) @ self.documents.T).double().numpy()


class PretrainedTexts(VectorTexts):
    """An unchanged Hugging Face text encoder."""

    @classmethod
    def fit(cls, dataset: Dataset, folder: str, precision: str = "fp32") -> PretrainedTexts:
        """Encode the catalogue. Raises ConfigError: a side without texts, or no encoder in `folder`."""
        encoders = text_encoders(PretrainedEncoder(Path(folder), precision=precision), Texts.of(dataset))
        return cls(encoders, encoders.documents(np.arange(dataset.catalogue.num_docs)))


@dataclass(frozen=True)
class SentenceTransformerTexts(VectorTexts):
    """A text encoder trained with sentence-transformers."""

    model: Any  # SentenceTransformer

    @classmethod
    def fit(
        cls, dataset: Dataset, folder: str, steps: Count, rows: Count = 512, lr: Positive = 5e-5,
        warmup_steps: Annotated[int, Bound(0)] = 0, precision: str = "fp32", seed: Seed = 0,
    ) -> SentenceTransformerTexts:  # fmt: skip
        """Train a mean-pooled Hugging Face text encoder as recommended by the sentence-transformers documentation.

        MultipleNegativesRankingLoss over batches of `rows` pairs without duplicate texts; other settings are defaults.
        Raises ConfigError: a side without texts, no encoder in `folder`, no steps or rows, or a missing package.
        """
        try:
            from datasets import Dataset as Table
            from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
            from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
            from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
            from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
        except ImportError as error:
            raise ConfigError(f"the baseline sentence_transformers: {error}; install bigdssm[baselines]") from None
        for name, number in (("steps", steps), ("rows", rows)):
            if number < 1:
                raise ConfigError(f"the baseline sentence_transformers: {name}={number}: needs at least 1")
        check_encoder(Path(folder))
        texts = Texts.of(dataset)
        encoder = Transformer(folder)
        model = SentenceTransformer(modules=[encoder, Pooling(encoder.get_embedding_dimension())], device="cpu")
        pairs: dict[str, list[str]] = {"anchor": [], "positive": []}
        for batch in dataset.iterate("train", ROWS_PER_BATCH):
            relevant = np.flatnonzero(batch.relevance > 0)
            pairs["anchor"] += texts.queries(batch.take(relevant).query)
            pairs["positive"] += texts.documents(batch.doc_rows[relevant])
        with tempfile.TemporaryDirectory() as spool:
            arguments = Arguments(
                spool, max_steps=steps, per_device_train_batch_size=rows, learning_rate=lr, warmup_steps=warmup_steps,
                bf16=resolve_precision(precision, model) == "bf16",
                seed=seed, batch_sampler="no_duplicates", use_cpu=True, save_strategy="no",
                logging_strategy="no", report_to="none", disable_tqdm=True,
            )  # fmt: skip
            loss = MultipleNegativesRankingLoss(model)
            SentenceTransformerTrainer(model, arguments, Table.from_dict(pairs), loss=loss).train()
        encode = partial(model.encode, normalize_embeddings=True, show_progress_bar=False, convert_to_tensor=True)
        encoders = Encoders(lambda rows: encode(texts.queries(rows.query)), lambda docs: encode(texts.documents(docs)))
        return cls(encoders, encoders.documents(np.arange(dataset.catalogue.num_docs)), model)
