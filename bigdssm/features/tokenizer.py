"""Texts as token ids, and back, by the tokenizer of a dataset or a model folder."""

from __future__ import annotations

from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from bigdssm.features.ragged import Ragged

TEXTS_AT_ONCE = 4096  # encodings take about 100 bytes a token until they are arrays


class TextTokenizer:
    """Texts → token ids, special tokens included, with the tokenizer of a folder; uses all cores, in any threads."""

    def __init__(self, folder: Path) -> None:
        self._file = str(folder / "tokenizer.json")
        self._cutting: dict[int, Tokenizer] = {}  # one for each length: setting another would disturb other threads

    def tokenize(self, texts: list[str], max_tokens: int) -> list[list[int]]:
        """Return the token ids of some texts, each cut to max_tokens: all that the library does."""
        if max_tokens not in self._cutting:
            tokenizer = Tokenizer.from_file(self._file)
            tokenizer.no_padding()
            tokenizer.enable_truncation(max_tokens)
            self._cutting[max_tokens] = tokenizer
        return [encoding.ids for encoding in self._cutting[max_tokens].encode_batch_fast(texts)]

    def encode(self, texts: pa.Array, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids int32, offsets int64 [rows + 1]): text i is ids[offsets[i]:offsets[i + 1]], cut to max_tokens."""
        parts: list[np.ndarray] = []
        lengths: list[int] = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            chunk = texts.slice(start, TEXTS_AT_ONCE).to_pylist()
            ids = self.tokenize(chunk, max_tokens)
            lengths += map(len, ids)
            parts.append(np.fromiter(chain.from_iterable(ids), np.int32, sum(lengths[-len(ids) :])))
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return np.concatenate(parts) if parts else np.empty(0, np.int32), offsets

    def decode(self, tokens: Ragged, *, special: bool = False) -> list[str]:
        """Return the texts that token ids stand for, as the tokenizer writes them: cut, and in its case."""
        rows = [tokens[row].tolist() for row in range(len(tokens))]
        return self._whole.decode_batch(rows, skip_special_tokens=not special)

    def words(self) -> list[str]:
        """Return the whole words of the vocabulary, without the marks that some tokenizers put before them."""
        return sorted(word for word in {token.lstrip("▁Ġ") for token in self._whole.get_vocab()} if word.isalnum())

    @property
    def vocab_size(self) -> int:
        """Return the number of its tokens."""
        return int(self._whole.get_vocab_size())

    @cached_property
    def _whole(self) -> Tokenizer:
        return Tokenizer.from_file(self._file)
