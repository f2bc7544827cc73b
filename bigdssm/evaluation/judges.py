"""Judges: who scores pairs of a query and a document, for fine-tuning to follow.

A judge is called with m rows of one query each and catalogue rows int64 [m, l], and returns scores [m, l]: the higher
the better, on any scale.

Shapes: m queries, l documents of each, N catalogue rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigdssm.artifacts.model_folder import ModelFolder
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.errors import ConfigError
from bigdssm.evaluation.bm25 import Bm25
from bigdssm.evaluation.pretrained import text_encoders
from bigdssm.evaluation.scorer import ScoredEncoders, encoders_of
from bigdssm.models import CrossEncoder
from bigdssm.progress import Progress, no_progress
from bigdssm.retrieval.embed import Encoders
from bigdssm.retrieval.pair_scorer import PairScorer
from bigdssm.retrieval.texts import Texts

Judge = Callable[[Rows, np.ndarray], np.ndarray]

DOCUMENTS_AT_ONCE = 1024
PAIRS_AT_ONCE = 64  # that a cross-encoder reads together: what a CPU's caches hold


def model_judge(folder: ModelFolder, dataset: Dataset) -> Judge:
    """Return the judge that a model of this library is: its cross-encoder, or what it scores by vectors.

    It scores rows of `dataset`. Raises CheckpointError: see `ModelFolder.view`.
    """
    view = folder.view(dataset)
    if isinstance(folder.model.scorer, CrossEncoder):
        reader = PairScorer.of(folder, view)
        return lambda rows, docs: reader.score(view.limited_query(rows.query), docs)
    judge = VectorJudge(encoders_of(folder.model, view), view.catalogue.num_docs)
    return lambda rows, docs: judge(replace(rows, query=view.limited_query(rows.query)), docs)


def pretrained_judge(folder: Path, dataset: Dataset, texts: Texts) -> Judge:
    """Return the judge that a Hugging Face text encoder is as it is. Raises ConfigError where `folder` holds none."""
    return VectorJudge(text_encoders(folder, texts), dataset.catalogue.num_docs)


class VectorJudge:
    """A model that scores vectors, by their product or an MLP; each document is encoded once."""

    def __init__(self, encoders: Encoders, num_docs: int) -> None:
        """`encoders` as `encoders_of` makes them, or whatever else gives vectors."""
        self._encoders, self._known = encoders, np.zeros(num_docs, bool)
        self._vectors: Tensor | None = None  # float32 [N, D or D+1], of those that are known

    def __call__(self, rows: Rows, docs: np.ndarray) -> np.ndarray:
        """Return scores [m, l]."""
        queries, vectors = self._encoders.queries(rows)[:, None], self._documents(np.unique(docs))[docs]
        if isinstance(self._encoders, ScoredEncoders):
            with torch.no_grad():
                return self._encoders.scorer(queries, vectors).numpy()
        return (queries * vectors).sum(-1).numpy()

    def _documents(self, docs: np.ndarray) -> Tensor:
        """Return the vectors of the whole catalogue, those of `docs` being there."""
        new = docs[~self._known[docs]]
        for first in range(0, len(new), DOCUMENTS_AT_ONCE):
            some = new[first : first + DOCUMENTS_AT_ONCE]
            made = self._encoders.documents(some)
            if self._vectors is None:
                self._vectors = made.new_empty(len(self._known), made.shape[1])
            self._vectors[some] = made
        self._known[new] = True
        assert self._vectors is not None, "there are documents to score"
        return self._vectors


class CrossEncoderJudge:
    """A cross-encoder of sentence-transformers, which reads query and document together; scores are its logits."""

    def __init__(self, folder: Path, texts: Texts) -> None:
        """Raises ConfigError where sentence-transformers is not installed, or `folder` holds no model of one score."""
        try:
            from sentence_transformers import CrossEncoder
        except ImportError:
            raise ConfigError(
                "a cross-encoder needs sentence-transformers; install bigdssm[sentence-transformers]"
            ) from None
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder} holds no cross-encoder: it has no config.json; give the folder of one")
        try:
            self._model: Any = CrossEncoder(str(folder), local_files_only=True, activation_fn=torch.nn.Identity())
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"the cross-encoder in {folder} does not load: {' '.join(str(error).split())}") from None
        if self._model.num_labels != 1:
            raise ConfigError(
                f"the cross-encoder in {folder} gives {self._model.num_labels} numbers, needs one: a score"
            )
        self._texts = texts

    def __call__(self, rows: Rows, docs: np.ndarray) -> np.ndarray:
        """Return scores [m, l]."""
        distinct, place = np.unique(docs, return_inverse=True)
        documents = self._texts.documents(distinct)
        asked = np.repeat(np.array(self._texts.queries(rows), object), docs.shape[1])
        pairs = [(query, documents[at]) for query, at in zip(asked, place.flatten(), strict=True)]
        scores = self._model.predict(pairs, batch_size=PAIRS_AT_ONCE, show_progress_bar=False)
        return np.asarray(scores, np.float32).reshape(docs.shape)


class Bm25Judge:
    """BM25 over the catalogue."""

    def __init__(self, dataset: Dataset, texts: Texts, progress: Progress = no_progress) -> None:
        """Raises ConfigError where bm25s or PyStemmer is not installed."""
        documents: list[str] = []
        for first in range(0, dataset.catalogue.num_docs, DOCUMENTS_AT_ONCE):
            documents += texts.documents(np.arange(first, min(first + DOCUMENTS_AT_ONCE, dataset.catalogue.num_docs)))
            progress("documents read for BM25", len(documents), dataset.catalogue.num_docs)
        self._texts, self._index = texts, Bm25(documents)

    def __call__(self, rows: Rows, docs: np.ndarray) -> np.ndarray:
        """Return scores [m, l]."""
        asked = zip(self._texts.queries(rows), docs, strict=True)
        return np.stack([self._index.scores(query)[of_query] for query, of_query in asked])


def ensemble(judges: Sequence[Judge], rows: Rows, docs: np.ndarray) -> np.ndarray:
    """Return float32 [m, l]: the mean of the judges' scores, NaN where `docs` [m, l] is -1.

    The scores of several are standardised within each query, which makes their scales one; those of one stay.
    """
    there = docs >= 0
    found = [np.where(there, judge(rows, np.where(there, docs, 0)), np.nan) for judge in judges]
    if len(found) > 1:
        found = [_standardised(scores) for scores in found]
    mean: np.ndarray = np.mean(found, axis=0)
    return mean.astype(np.float32)


def _standardised(scores: np.ndarray) -> np.ndarray:
    """Return scores [m, l] less their row's mean, over its standard deviation; 0 where all of a row are the same."""
    centred = scores - np.nanmean(scores, axis=1, keepdims=True)
    spread = np.nanstd(scores, axis=1, keepdims=True)
    return centred / np.where(spread > 0, spread, 1)
