"""Encode and decode texts with the tokenizer of a dataset or a model folder."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from bigdssm.errors import ConfigError
from bigdssm.features.ragged import Ragged, concat, gather_ranges

TEXTS_PER_CALL = 4096  # encodings take about 100 bytes per token until they are arrays
BYTES_PER_PIECE = 1 << 23  # of texts that are split into words together
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]  # of the Hub: never pickled weights or code
TOKENIZER_FILES = ["tokenizer*", "vocab*", "*.model"]


class TextTokenizer:
    """Texts → token ids, including special tokens, with a folder's tokenizer; multi-threaded and thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._file = str(folder / "tokenizer.json")
        self._by_length: dict[int | None, Tokenizer] = {}  # one per length: changing it would affect other threads

    def encode(self, texts: pa.Array, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids int32, offsets int64 [rows + 1]): text i is ids[offsets[i]:offsets[i + 1]]."""
        rows, last = [], 0
        ends = np.cumsum(pc.binary_length(texts).to_numpy())
        while (first := last) < len(texts):  # about BYTES_PER_PIECE at once, at least one text
            before = ends[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(ends, before + BYTES_PER_PIECE, "right")))
            piece = texts.slice(first, last - first)
            by_words = self._splits_at_spaces
            rows.append(self._tokenize_words(piece, max_tokens) if by_words else self._tokenize(piece, max_tokens))
        joined = concat(rows) if rows else Ragged(np.empty(0, np.int32), np.zeros(1, np.int64))
        assert isinstance(joined, Ragged)
        return joined.values, joined.offsets

    def _tokenize(self, texts: pa.Array, max_tokens: int | None, *, special: bool = True) -> Ragged:
        if max_tokens not in self._by_length:
            tokenizer = read_tokenizer(self._file)
            tokenizer.no_padding()
            tokenizer.no_truncation() if max_tokens is None else tokenizer.enable_truncation(max_tokens)
            self._by_length[max_tokens] = tokenizer
        ids: list[list[int]] = []
        for start in range(0, len(texts), TEXTS_PER_CALL):
            chunk = texts.slice(start, TEXTS_PER_CALL).to_pylist()
            encodings = self._by_length[max_tokens].encode_batch_fast(chunk, add_special_tokens=special)
            ids += [encoding.ids for encoding in encodings]
        return Ragged.of_lists(ids)

    def _tokenize_words(self, texts: pa.Array, max_tokens: int) -> Ragged:
        """Same as `_tokenize`, but tokenize each distinct word once: at most a third of the time."""
        words = pc.split_pattern(pc.replace_substring(texts, "\n", " "), " ")
        distinct = words.flatten().dictionary_encode()
        tokens = self._tokenize(distinct.dictionary, None, special=False).take(distinct.indices.to_numpy())
        starts = tokens.offsets[np.append(0, np.cumsum(pc.list_value_length(words).to_numpy()))]
        before, behind = self._special_tokens
        ends = np.minimum(starts[1:], starts[:-1] + max_tokens - len(before) - len(behind))
        values = np.concatenate([tokens.values, before, behind]).astype(np.int32)
        first, last = len(tokens.values), len(values) - len(behind)
        ranges = np.empty((len(texts), 3, 2), np.int64)
        for part, (begin, end) in enumerate([(first, last), (starts[:-1], ends), (last, len(values))]):
            ranges[:, part, 0], ranges[:, part, 1] = begin, end
        parts = gather_ranges(values, *ranges.reshape(-1, 2).T)
        return Ragged(parts.values, parts.offsets[::3])

    @cached_property
    def _splits_at_spaces(self) -> bool:
        """Return whether the tokens of a text are those of its words, concatenated: BERT splits at spaces first."""
        described = json.loads(Path(self._file).read_text(encoding="utf-8"))
        kinds = [(described[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")]
        no_space_in_tokens = all(not {" ", "\n"} & set(token["content"]) for token in described["added_tokens"])
        return no_space_in_tokens and kinds == ["BertNormalizer", "BertPreTokenizer", "WordPiece"]

    @cached_property
    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """Return the special tokens before and after a text."""
        plain, with_special = (self._tokenize(pa.array(["a"]), None, special=s).values.tolist() for s in (False, True))
        start = next(start for start in range(len(with_special)) if with_special[start : start + len(plain)] == plain)
        return with_special[:start], with_special[start + len(plain) :]

    def prompt_tokens(self, prompt: str, *, with_end: bool = False) -> int:
        """Return the number of tokens of a prompt, with the special tokens before it, and those after a text."""
        return len(self._tokenize(pa.array([prompt]), None).values) - len([] if with_end else self._special_tokens[1])

    def decode(self, tokens: Ragged, *, special: bool = False) -> list[str]:
        """Decode token ids to texts."""
        rows = [tokens[row].tolist() for row in range(len(tokens))]
        return self._whole.decode_batch(rows, skip_special_tokens=not special)

    def words(self) -> list[str]:
        """Return the alphanumeric tokens of the vocabulary, sorted, without word-start markers."""
        return sorted(word for word in {token.lstrip("▁Ġ") for token in self._whole.get_vocab()} if word.isalnum())

    @property
    def vocab_size(self) -> int:
        """Return the size of the vocabulary."""
        return int(self._whole.get_vocab_size())

    @cached_property
    def _whole(self) -> Tokenizer:
        return read_tokenizer(self._file)


@dataclass(frozen=True)
class FolderPrompts:
    """The prompts of a sentence-transformers folder by side, '' for none, and whether their tokens are pooled."""

    query: str = ""
    doc: str = ""
    pooled: bool = True


def prompts_in(folder: Path) -> FolderPrompts:
    """Return the prompts of a folder with a tokenizer. Raises ConfigError: a file is damaged."""
    try:
        prompts = _json(folder / "config_sentence_transformers.json").get("prompts") or {}
        document_prompt = prompts.get("document") or prompts.get("passage") or ""
        pooled = all(_json(file).get("include_prompt", True) for file in folder.glob("*_Pooling/config.json"))
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{folder} has a damaged file of sentence-transformers: {error}; copy it again") from None
    return FolderPrompts(prompts.get("query") or "", document_prompt, pooled)


def read_tokenizer(file: str) -> Tokenizer:
    """Read a tokenizer.json. Raises ConfigError: it is damaged."""
    try:
        return Tokenizer.from_file(file)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ConfigError(f"{file} is not a readable tokenizer: {str(error).splitlines()[0]}; copy it again") from None


def locate(name: str, *, download: bool = True) -> Path:
    """Return the folder of a model, of the Hugging Face Hub if `name` is not a local folder.

    Raises ConfigError: neither a folder nor a model of the Hub that is cached or can be downloaded.
    """
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=MODEL_FILES, local_files_only=not download))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"text.init={name} is not a folder, and not a model of the Hugging Face Hub that is cached here or can be "
            f"downloaded: {reason}"
        ) from None


def token_difference(folder: Path, dataset: Path) -> str | None:
    """Return the first difference of the tokens that two folders' tokenizers give, None for the same tokens.

    A folder without a tokenizer has no difference. Raises ConfigError: a tokenizer is damaged.
    """
    folders = [folder, *sorted(folder.glob("*_Transformer"))]  # of sentence-transformers
    holder = next((one for one in folders for pattern in TOKENIZER_FILES for _ in one.glob(pattern)), None)
    if holder is None:
        return None
    ours, first = next(_rules(dataset)), None
    for theirs in _rules(holder):
        different = [part for part in ours if ours[part] != theirs[part]]
        if not different:
            return None
        if first is None and different[0] == "vocabulary":
            mine, other = ours["vocabulary"], theirs["vocabulary"]
            token = min(token for token in {**mine, **other} if mine.get(token) != other.get(token))
            sizes = f"{len(other):,} tokens against {len(mine):,}"
            first = f"{sizes}, {token!r} is {other.get(token)} against {mine.get(token)}"
        first = first or f"another {different[0]}"
    return first


def _rules(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield everything that determines the token ids of a folder: of its file, then as transformers converts it."""
    if (folder / "tokenizer.json").is_file():
        yield _rules_of(read_tokenizer(str(folder / "tokenizer.json")))
    from transformers import AutoTokenizer  # a slow import

    try:
        converted = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        rules = _rules_of(converted.backend_tokenizer)
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{folder} holds no usable tokenizer: {str(error).splitlines()[0]}") from None
    yield rules


def _rules_of(tokenizer: Tokenizer) -> dict[str, Any]:
    tokenizer.no_padding()
    tokenizer.no_truncation()
    content = json.loads(tokenizer.to_str())
    added = [{key: value for key, value in token.items() if key != "special"} for token in content["added_tokens"]]
    return {
        "vocabulary": tokenizer.get_vocab(), "normalizer": content["normalizer"],
        "pre-tokenizer": content["pre_tokenizer"], "model": content["model"], "set of special tokens": added,
        "order of special tokens": tokenizer.encode("a").ids,
    }  # fmt: skip


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
