"""Teachers that score query–document pairs, and the file of their scores of hard negatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from bigdssm.checkpoints.model_folder import ModelFolder
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.errors import ConfigError, DataError
from bigdssm.evaluation.bm25 import Bm25
from bigdssm.evaluation.pretrained import text_encoders
from bigdssm.evaluation.reranking import ScoredEncoders, encoders_of
from bigdssm.models import CrossEncoder
from bigdssm.retrieval.embed import Encoders
from bigdssm.retrieval.hard_negatives import HardNegatives, record_dtype, rows_of_queries, window_records
from bigdssm.retrieval.pair_scorer import PairScorer
from bigdssm.retrieval.shards import ShardedFolder, ShardWork
from bigdssm.retrieval.texts import Texts
from bigdssm.utils.array_file import new_array, seal
from bigdssm.utils.atomic import real_path
from bigdssm.utils.log import Progress, no_progress

PairTeacher = Callable[[Rows, np.ndarray], np.ndarray]

DOCUMENTS_AT_ONCE = 1024
PAIRS_AT_ONCE = 64  # that a cross-encoder reads together: what a CPU's caches hold


def model_teacher(folder: ModelFolder, dataset: Dataset) -> PairTeacher:
    """Return the judge that a model of this library is: its cross-encoder, or what it scores by vectors.

    It scores rows of `dataset`. Raises CheckpointError: see `ModelFolder.view`.
    """
    view = folder.view(dataset)
    if isinstance(folder.model.scorer, CrossEncoder):
        reader = PairScorer.of(folder, view)
        return lambda rows, docs: reader.score(view.limited_query(rows.query), docs)
    judge = VectorTeacher(encoders_of(folder.model, view), view.catalogue.num_docs)
    return lambda rows, docs: judge(replace(rows, query=view.limited_query(rows.query)), docs)


def pretrained_teacher(folder: Path, dataset: Dataset, texts: Texts) -> PairTeacher:
    """Return the judge that a Hugging Face text encoder is as it is. Raises ConfigError where `folder` holds none."""
    return VectorTeacher(text_encoders(folder, texts), dataset.catalogue.num_docs)


class VectorTeacher:
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


class CrossEncoderTeacher:
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


class Bm25Teacher:
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


def ensemble(judges: Sequence[PairTeacher], rows: Rows, docs: np.ndarray) -> np.ndarray:
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


QUERIES_AT_ONCE = 256
FILE = "judged.npy"


def score_pairs(
    out: Path,
    mined: HardNegatives,
    dataset: Dataset,
    judges: Sequence[PairTeacher],
    names: Sequence[str],
    work: ShardWork,
) -> HardNegatives | None:
    """Write `mined` with the judges' scores to `out`; return it on the rank that put it in its place, None on others.

    `names` tell what is scored, and by whom, from anything else: finished shards of a run that was ended are kept where
    these are the same. Raises DataError where a judge's score is not finite.
    """
    out = real_place(out)
    record = record_dtype(mined.width, scored=True)

    def prepare(aside: Path) -> None:
        new_array(aside / FILE, record, (len(mined),))

    job = {"kind": "score_pairs", "names": list(names), "dataset": dataset.fingerprint}
    shards = ShardedFolder(out, job, len(mined), work, prepare)
    whole = open_memmap(shards.aside / FILE, "r+")
    for _, first, last in shards.pending("shards scored"):
        whole[first:last] = _scored(mined.queries[first:last], mined, dataset, judges)
        whole.flush()
    finished = shards.finish_file(FILE, lambda path: seal(path, dataset.fingerprint))
    return HardNegatives.open(out) if finished else None


def _scored(queries: np.ndarray, mined: HardNegatives, dataset: Dataset, judges: Sequence[PairTeacher]) -> np.ndarray:
    """Return the records of some queries, whose keys ascend; NaN where a query's row cannot be read."""
    windows = mined.windows(queries)
    teacher = np.full((len(queries), 1 + mined.width), np.nan, np.float32)
    for asked in rows_of_queries(dataset, queries, QUERIES_AT_ONCE):
        at = np.searchsorted(queries, asked.query_keys)
        docs = np.concatenate([asked.doc_rows[:, None], windows[at]], 1)
        scores = ensemble(judges, asked, docs)
        if not np.isfinite(scores[docs >= 0]).all():
            raise DataError(f"a judge's scores of rows {asked.row_ids[0]} to {asked.row_ids[-1]} hold NaN or inf")
        teacher[at] = scores
    return window_records(queries, windows, teacher)
