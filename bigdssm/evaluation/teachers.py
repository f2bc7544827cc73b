"""Teachers that score query–document pairs: models, encoders of texts, BM25; files of their scores."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from torch import Tensor

from bigdssm.checkpoints.model_folder import ModelFolder
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.errors import ConfigError, DataError
from bigdssm.retrieval.embed import Encoders, tower_encoders
from bigdssm.retrieval.hard_negatives import HardNegatives, record_dtype, rows_of_queries, window_records
from bigdssm.retrieval.reranking import Reranker, Texts
from bigdssm.retrieval.shards import ShardedFolder, Share
from bigdssm.utils.array_file import new_array, seal
from bigdssm.utils.atomic import real_path
from bigdssm.utils.log import Progress, no_progress

K1, B = 0.9, 0.4  # Anserini's defaults, used for BEIR's published results
DOCUMENTS_AT_ONCE = 1024
QUERIES_AT_ONCE = 256
UNFINISHED_FILE = "judged.npy"  # the records while they are written

PairTeacher = Callable[[Rows, np.ndarray], np.ndarray]
"""Maps m Rows and catalogue rows int64 [m, l] to scores [m, l]."""


class Bm25:
    """BM25 index of N texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Raises ConfigError: bm25s or PyStemmer is not installed."""
        try:
            import bm25s
            import Stemmer
        except ImportError as error:
            raise ConfigError(f"BM25 needs the package {error.name}; install bigdssm[bm25]") from None
        self._tokenize, self._stemmer = bm25s.tokenize, Stemmer.Stemmer("english")
        self._index = bm25s.BM25(k1=K1, b=B)
        self._index.index(self._words(texts), show_progress=False)
        self._num_texts = len(texts)

    def search(self, queries: Sequence[str], top: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (indices of texts, scores), both [m, top], best first."""
        indices, scores = self._index.retrieve(self._words(queries), k=top, show_progress=False)
        return indices, scores

    def scores(self, query: str) -> np.ndarray:
        """Return the scores of all texts, float32 [N]."""
        words = self._words([query], return_ids=False)[0]
        ids = self._index.get_tokens_ids(words)
        if not ids:
            return np.zeros(self._num_texts, np.float32)
        return self._index.get_scores_from_ids(ids)

    def _words(self, texts: Sequence[str], return_ids: bool = True) -> list[list[str]]:
        return self._tokenize(
            list(texts), stopwords="en", stemmer=self._stemmer, return_ids=return_ids, show_progress=False
        )


def model_teacher(folder: ModelFolder, dataset: Dataset) -> PairTeacher:
    """Return a model folder as a teacher for rows of `dataset`, with the score of its vectors.

    Raises CheckpointError: see `ModelFolder.view`.
    """
    view = folder.view(dataset)
    teacher = VectorTeacher(tower_encoders(folder.model, view), view.catalogue.num_docs)
    return lambda rows, docs: teacher(replace(rows, query=view.limited_query(rows.query)), docs)


def cross_encoder_teacher(folder: Path, texts: Texts) -> PairTeacher:
    """Return a cross-encoder of sentence-transformers as a teacher, with its logits as scores.

    Raises ConfigError: sentence-transformers is missing, or no one-output model in `folder`.
    """
    reranker = Reranker(folder, texts)
    return lambda rows, docs: reranker.score(rows.query, docs)


class VectorTeacher:
    """Scores vectors by inner product; document vectors are cached."""

    def __init__(self, encoders: Encoders, num_docs: int) -> None:
        self._encoders, self._encoded = encoders, np.zeros(num_docs, bool)
        self._vectors: Tensor | None = None  # float32 [N, D or D+1], valid for encoded documents

    def __call__(self, rows: Rows, docs: np.ndarray) -> np.ndarray:
        """Return scores [m, l]."""
        queries, vectors = self._encoders.queries(rows)[:, None], self._documents(np.unique(docs))[docs]
        return (queries * vectors).sum(-1).cpu().numpy()

    def _documents(self, docs: np.ndarray) -> Tensor:
        """Return the cache of document vectors after encoding `docs`."""
        new = docs[~self._encoded[docs]]
        for first in range(0, len(new), DOCUMENTS_AT_ONCE):
            rows = new[first : first + DOCUMENTS_AT_ONCE]
            vectors = self._encoders.documents(rows)
            if self._vectors is None:
                self._vectors = vectors.new_empty(len(self._encoded), vectors.shape[1])
            self._vectors[rows] = vectors
        self._encoded[new] = True
        assert self._vectors is not None, "there are documents to score"
        return self._vectors


class Bm25Teacher:
    """BM25 over the catalogue."""

    def __init__(self, dataset: Dataset, texts: Texts, progress: Progress = no_progress) -> None:
        """Raises ConfigError: bm25s or PyStemmer is not installed."""
        documents: list[str] = []
        for first in range(0, dataset.catalogue.num_docs, DOCUMENTS_AT_ONCE):
            documents += texts.documents(np.arange(first, min(first + DOCUMENTS_AT_ONCE, dataset.catalogue.num_docs)))
            progress("documents read for BM25", len(documents), dataset.catalogue.num_docs)
        self._texts, self._index = texts, Bm25(documents)

    def __call__(self, rows: Rows, docs: np.ndarray) -> np.ndarray:
        """Return scores [m, l]."""
        pairs = zip(self._texts.queries(rows.query), docs, strict=True)
        return np.stack([self._index.scores(query)[candidates] for query, candidates in pairs])


def ensemble(teachers: Sequence[PairTeacher], rows: Rows, docs: np.ndarray) -> np.ndarray:
    """Return the mean of the teachers' scores, float32 [m, l], NaN for `docs` [m, l] of -1.

    Scores of several teachers are standardized per query to a common scale; those of a single one are unchanged.
    """
    present = docs >= 0
    all_scores = [np.where(present, teacher(rows, np.where(present, docs, 0)), np.nan) for teacher in teachers]
    if len(all_scores) > 1:
        for i, scores in enumerate(all_scores):
            spread = np.nanstd(scores, axis=1, keepdims=True)  # 0 if all scores of a row are equal
            all_scores[i] = (scores - np.nanmean(scores, axis=1, keepdims=True)) / np.where(spread > 0, spread, 1)
    return np.asarray(np.mean(all_scores, axis=0), np.float32)


def score_pairs(
    out: Path,
    hard: HardNegatives,
    dataset: Dataset,
    teachers: Sequence[PairTeacher],
    names: Sequence[str],
    work: Share,
) -> HardNegatives | None:
    """Write `hard` with teacher scores to `out`; returned on the rank that finishes, else None.

    `names` identify the input and the teachers: finished shards of an earlier run with the same names are reused.
    Raises DataError: a teacher score is not finite.
    """
    out = real_path(out)
    record = record_dtype(hard.width, scored=True)

    def prepare(temporary: Path) -> None:
        new_array(temporary / UNFINISHED_FILE, record, (len(hard),))

    job = {"kind": "score_pairs", "names": list(names), "dataset": dataset.rows_fingerprint}
    shards = ShardedFolder(out, job, len(hard), work, prepare)
    records = open_memmap(shards.aside / UNFINISHED_FILE, "r+")
    for _, first, last in shards.pending("shards scored"):
        queries = hard.queries[first:last]
        windows = hard.windows(queries)
        teacher_scores = np.full((len(queries), 1 + hard.width), np.nan, np.float32)  # NaN for unreadable rows
        for rows in rows_of_queries(dataset, queries, QUERIES_AT_ONCE):
            positions = np.searchsorted(queries, rows.query_keys)
            docs = np.concatenate([rows.doc_rows[:, None], windows[positions]], 1)
            scores = ensemble(teachers, rows, docs)
            if not np.isfinite(scores[docs >= 0]).all():
                raise DataError(f"teacher scores of rows {rows.row_ids[0]} to {rows.row_ids[-1]} hold NaN or inf")
            teacher_scores[positions] = scores
        records[first:last] = window_records(queries, windows, teacher_scores)
        records.flush()
    finished = shards.finish(lambda path: seal(path, dataset.rows_fingerprint), UNFINISHED_FILE)
    return HardNegatives.open(out) if finished else None
