"""Texts as token ids, and back, by the tokenizer of a dataset or a model folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from bigdssm.features.ragged import Ragged, concat, gather_ranges

TEXTS_AT_ONCE = 4096  # encodings take about 100 bytes a token until they are arrays
BYTES_AT_ONCE = 1 << 23  # of texts whose words are told apart


class TextTokenizer:
    """Texts → token ids, special tokens included, with the tokenizer of a folder; uses all cores, in any threads."""

    def __init__(self, folder: Path) -> None:
        self._file = str(folder / "tokenizer.json")
        self._cutting: dict[int | None, Tokenizer] = {}  # one for each length: another would disturb other threads

    def encode(self, texts: pa.Array, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids int32, offsets int64 [rows + 1]): text i is ids[offsets[i]:offsets[i + 1]], cut to max_tokens."""
        rows = [
            self._joined(piece, max_tokens) if self._parts_at_blanks else self._tokenized(piece, max_tokens)
            for piece in _pieces(texts)
        ]
        joined = concat(rows) if rows else Ragged(np.empty(0, np.int32), np.zeros(1, np.int64))
        assert isinstance(joined, Ragged)
        return joined.values, joined.offsets

    def _tokenized(self, texts: pa.Array, max_tokens: int | None, *, special: bool = True) -> Ragged:
        """Return the token ids of texts: all that the library does."""
        if max_tokens not in self._cutting:
            tokenizer = Tokenizer.from_file(self._file)
            tokenizer.no_padding()
            tokenizer.no_truncation() if max_tokens is None else tokenizer.enable_truncation(max_tokens)
            self._cutting[max_tokens] = tokenizer
        ids: list[list[int]] = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            chunk = texts.slice(start, TEXTS_AT_ONCE).to_pylist()
            encodings = self._cutting[max_tokens].encode_batch_fast(chunk, add_special_tokens=special)
            ids += [encoding.ids for encoding in encodings]
        return Ragged.of_lists(ids)

    def _joined(self, texts: pa.Array, max_tokens: int) -> Ragged:
        """Return what `_tokenized` does, but each distinct word is tokenised once: a third of the time, or less."""
        words = pc.split_pattern(pc.replace_substring(texts, "\n", " "), " ")
        distinct = words.flatten().dictionary_encode()
        tokens = self._tokenized(distinct.dictionary, None, special=False).take(distinct.indices.to_numpy())
        starts = tokens.offsets[np.append(0, np.cumsum(pc.list_value_length(words).to_numpy()))]
        before, behind = self._around
        ends = np.minimum(starts[1:], starts[:-1] + max_tokens - len(before) - len(behind))
        values = np.concatenate([tokens.values, before, behind]).astype(np.int32)
        first, last = len(tokens.values), len(values) - len(behind)
        ranges = np.empty((len(texts), 3, 2), np.int64)
        for part, (begin, end) in enumerate([(first, last), (starts[:-1], ends), (last, len(values))]):
            ranges[:, part, 0], ranges[:, part, 1] = begin, end
        parts = gather_ranges(values, *ranges.reshape(-1, 2).T)
        return Ragged(parts.values, parts.offsets[::3])

    @cached_property
    def _parts_at_blanks(self) -> bool:
        """Return whether a text's tokens are those of its words in a row: BERT's, which parts at blanks before all."""
        described = json.loads(Path(self._file).read_text(encoding="utf-8"))
        kinds = [(described[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")]
        whole = all(not {" ", "\n"} & set(token["content"]) for token in described["added_tokens"])
        return whole and kinds == ["BertNormalizer", "BertPreTokenizer", "WordPiece"]

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """Return the special tokens before and behind a text."""
        alone, whole = (self._tokenized(pa.array(["a"]), None, special=s).values.tolist() for s in (False, True))
        at = next(at for at in range(len(whole)) if whole[at : at + len(alone)] == alone)
        return whole[:at], whole[at + len(alone) :]

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


def _pieces(texts: pa.Array) -> Iterator[pa.Array]:
    """Yield texts of about BYTES_AT_ONCE at a time, one at least."""
    ends = np.cumsum(pc.binary_length(texts).to_numpy())
    first = 0
    while first < len(texts):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + BYTES_AT_ONCE, "right")))
        yield texts.slice(first, last - first)
        first = last
