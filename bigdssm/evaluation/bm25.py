"""BM25 over whole texts: English stop words left out, words stemmed (Snowball). Source: Robertson and Zaragoza 2009."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bigdssm.errors import ConfigError

K1, B = 0.9, 0.4  # Anserini's, with which BEIR's figures were made


class Bm25:
    """The index of N texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Raises ConfigError where bm25s or PyStemmer is not installed."""
        try:
            import bm25s
            import Stemmer
        except ImportError as error:
            raise ConfigError(f"BM25 needs the package {error.name}; install bigdssm[bm25]") from None
        self._tokenize, self._stemmer = bm25s.tokenize, Stemmer.Stemmer("english")
        self._index = bm25s.BM25(k1=K1, b=B)
        self._index.index(self._words(texts), show_progress=False)
        self._num_texts = len(texts)

    def best(self, queries: Sequence[str], number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the places of each query's best texts, best first, and their scores: [m, number]."""
        places, scores = self._index.retrieve(self._words(queries), k=number, show_progress=False)
        return places, scores

    def scores(self, query: str) -> np.ndarray:
        """Return the scores of all texts, float32 [N]."""
        words = self._words([query], return_ids=False)[0]
        known = self._index.get_tokens_ids(words)
        if not known:
            return np.zeros(self._num_texts, np.float32)
        scores: np.ndarray = self._index.get_scores_from_ids(known)
        return scores

    def _words(self, texts: Sequence[str], return_ids: bool = True) -> list[list[str]]:
        words: list[list[str]] = self._tokenize(
            list(texts), stopwords="en", stemmer=self._stemmer, return_ids=return_ids, show_progress=False
        )
        return words
