"""Text features: tokenized, truncated to their first tokens."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdssm.errors import ConfigError
from bigdssm.features.base import FITTED, Decoder, Fault, Feature, code_faults, outside, pad_lists, register
from bigdssm.features.columns import MAX_FIELD_BYTES, RowCheck, strings
from bigdssm.features.ragged import Column, Ragged, gather_ranges
from bigdssm.features.tokenizer import TextTokenizer
from bigdssm.utils.components import bounded

NO_TOKEN = -1  # fills the cells after the end of a text


def text_input(feature, values, exported):  # type: ignore[no-untyped-def]
    """Return token ids, int64 [rows, T]."""
    exported.tokenizer.no_padding()
    exported.tokenizer.enable_truncation(feature["max_tokens"])
    texts = exported.tokenizer.encode_batch([feature["prompt"] + (value or "") for value in values])
    return pad_lists([text.ids for text in texts], -1)


@register
@dataclass(frozen=True)
class Text(Feature):
    """A text, for a tower's text encoder; '' is missing."""

    type: ClassVar[str] = "text"
    example: ClassVar[str] = '"a text"'
    canonical_type: ClassVar[pa.DataType] = pa.large_string()
    missing: ClassVar[str] = ""
    raw_type: ClassVar[pa.DataType] = pa.large_string()  # the texts themselves
    padding: ClassVar[int] = NO_TOKEN  # no token: a tokenizer's padding token may also end a text
    onnx_code: ClassVar = (pad_lists, text_input)

    max_tokens: int = bounded(64, 3, 65_536)  # longer texts, with their prompt, are truncated to their first tokens
    # Precedes every text, for example "query: "; none: that of its side in data.tokenizer.path, if it has one.
    prompt: str | None = None
    # Whether the prompt's tokens, which are always attended to, are pooled; none: as in that folder, else true.
    pool_prompt: bool | None = None
    prompt_tokens: int = field(default=0, metadata=FITTED)  # first tokens that are not pooled

    def exported(self) -> dict[str, Any]:
        """Return all fields; without a prompt it is ''."""
        return {**self.to_dict(), "prompt": self.prompt or ""}

    def read(self, check: RowCheck) -> pa.Array:
        """Return the texts unchanged, null as ''."""
        return strings(check, self.source, trim=False)

    def is_missing(self, column: pa.Array) -> np.ndarray:
        """Return the mask of empty or blank texts, bool [R]."""
        return super().is_missing(pc.utf8_trim_whitespace(column))

    def arrow_type(self, *, large: bool = False) -> pa.DataType:
        """Return a list of int32 token ids."""
        return pa.large_list(pa.int32()) if large else pa.list_(pa.int32())

    def encode(self, column: pa.Array, tokenizer: TextTokenizer | None, *, large: bool = False) -> pa.Array:
        """Return the token ids of texts, special tokens included."""
        assert tokenizer is not None, "a schema with text has a tokenizer"
        if self.prompt:
            prompt, nothing = (pa.scalar(text, column.type) for text in (self.prompt, ""))
            column = pc.binary_join_element_wise(prompt, column, nothing)
        ids, offsets = tokenizer.encode(column, self.max_tokens)
        if large:
            return pa.LargeListArray.from_arrays(pa.array(offsets), ids)
        return pa.ListArray.from_arrays(offsets.astype(np.int32), ids)

    def with_prompt(self, default: str, pooled: bool, tokenizer: TextTokenizer) -> "Text":
        """Return the feature with its prompt, and the number of first tokens that are not pooled.

        These are the prompt's, and those before it. `default` and `pooled` replace values that are not declared. Raises
        ConfigError: the prompt leaves no token for the text.
        """
        prompt, skipped = default if self.prompt is None else self.prompt, 0
        pooled = pooled if self.pool_prompt is None else self.pool_prompt
        if prompt and not pooled:
            skipped = tokenizer.prompt_tokens(prompt)
        feature = replace(self, prompt=prompt, pool_prompt=pooled, prompt_tokens=skipped)
        if feature.text_tokens(tokenizer) < 1:
            raise ConfigError(
                f"text feature {self.name}: its prompt {prompt!r:.80} and special tokens leave none of max_tokens="
                f"{self.max_tokens} for the text; raise max_tokens, or shorten the prompt"
            )
        return feature

    def text_tokens(self, tokenizer: TextTokenizer) -> int:
        """Return the maximum number of tokens of the text itself, without prompt and special tokens."""
        return self.max_tokens - tokenizer.prompt_tokens(self.prompt or "", with_end=True)

    def decode(self, column: Ragged, tokenizer: TextTokenizer) -> list[str]:
        """Return the texts of token ids, without prompt and special tokens."""
        if self.prompt:
            starts = np.minimum(column.offsets[:-1] + tokenizer.prompt_tokens(self.prompt), column.offsets[1:])
            column = gather_ranges(column.values, starts, column.offsets[1:])
        return tokenizer.decode(column)

    def encode_raw(self, column: pa.Array) -> pa.Array:
        """Return the texts themselves."""
        return column

    def faults(self, column: Column, vocab_size: int) -> Iterator[Fault]:
        """Yield unknown token ids, and texts without or with too many tokens."""
        assert isinstance(column, Ragged)
        yield from code_faults(self.name, "token id", column, 0, vocab_size)
        lengths = column.lengths
        if outside(lengths, 1, self.max_tokens + 1):
            wrong = (lengths < 1) | (lengths > self.max_tokens)
            yield wrong, lambda row: f"{self.name} has {lengths[row]} tokens, needs 1 to {self.max_tokens}"

    def raw_faults(self, column: pa.Array) -> Iterator[Fault]:
        """Yield texts that are too long for tokenization."""
        lengths = pc.binary_length(column).to_numpy()
        if outside(lengths, 0, MAX_FIELD_BYTES + 1):
            yield (
                lengths > MAX_FIELD_BYTES,
                lambda row: f"{self.name} has {lengths[row]} bytes, at most {MAX_FIELD_BYTES} are allowed",
            )

    @property
    def max_length(self) -> int:
        """Return `max_tokens`."""
        return self.max_tokens

    def texts(self, random: np.random.RandomState, rows: int, words: list[str]) -> list[str]:
        """Return random texts of these words, from empty to longer than `max_tokens`, to test a model with."""
        lengths = np.linspace(0, 1.5 * self.max_tokens, rows).astype(int)
        drawn = [random.choice(words, length) for length in lengths]
        return [" ".join(chosen).capitalize() + "." * (len(chosen) % 3) for chosen in drawn]

    def probe(self, random: np.random.RandomState, rows: int, docs: Mapping[str, Feature]) -> Column:
        """Not implemented, since texts need a tokenizer: use `texts`."""
        raise NotImplementedError

    def describe(self, vocab_size: int) -> str:
        """Return the size of the vocabulary and the maximum length."""
        return f"{vocab_size:,} word pieces, at most {self.max_tokens} tokens"

    def display(self, values: np.ndarray, decoder: Decoder) -> Any:
        """Return the text, special tokens included."""
        assert decoder.tokenizer is not None
        ids = values[values != NO_TOKEN]
        return decoder.tokenizer.decode(Ragged.of_lists([ids]), special=True)[0]


def texts_of(features: Mapping[str, Feature]) -> dict[str, Text]:
    """Return the text features."""
    return {name: feature for name, feature in features.items() if isinstance(feature, Text)}
