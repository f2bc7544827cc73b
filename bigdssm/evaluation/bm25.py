"""BM25 over full texts, without English stop words, stemmed (Snowball). Source: Robertson and Zaragoza 2009."""

from collections.abc import Sequence

import numpy as np

from bigdssm.errors import ConfigError

K1, B = 0.9, 0.4  # Anserini's defaults, used for BEIR's published results


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
        """Return (text numbers, scores), both [m, top], best first."""
        numbers, scores = self._index.retrieve(self._words(queries), k=top, show_progress=False)
        return numbers, scores

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
