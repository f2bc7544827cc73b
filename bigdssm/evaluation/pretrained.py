"""A pretrained Hugging Face text encoder without fine-tuning: a reference system and a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bigdssm.errors import ConfigError
from bigdssm.features import Text, TextTokenizer
from bigdssm.features.canonical import columns_of_values
from bigdssm.models import Values
from bigdssm.models.encoders.pretrained import pretrained_encoder
from bigdssm.retrieval.embed import Encoders, encode_columns, encode_in
from bigdssm.retrieval.texts import Texts
from bigdssm.utils.log import Progress, no_progress

MAX_TOKENS = 256


def check_encoder(folder: Path) -> None:
    """Raise ConfigError if `folder` does not hold a Hugging Face model with its tokenizer."""
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(f"{folder} has no tokenizer.json; give the folder of a Hugging Face model and its tokenizer")


class PretrainedEncoder:
    """Encodes texts to vectors of norm 1, with the pooling of the folder; without prompts."""

    def __init__(self, folder: Path, max_tokens: int = MAX_TOKENS, precision: str = "fp32") -> None:
        """Raises ConfigError: `folder` holds no such encoder and tokenizer."""
        check_encoder(folder)
        self._encoder = pretrained_encoder(str(folder)).eval()
        encode_in(self._encoder, precision)
        self._tokenizer, self._features = TextTokenizer(folder), {"text": Text(max_tokens=max_tokens).with_name("text")}

    def __call__(self, texts: Sequence[str], what: str = "texts encoded", progress: Progress = no_progress) -> Tensor:
        """Return float32 [n, H] for n texts, at least one."""
        columns, _ = columns_of_values(texts, self._features, {}, self._tokenizer)
        return encode_columns(self._features, columns, self._encode, what, progress)

    def _encode(self, values: dict[str, Values]) -> Tensor:
        with torch.no_grad():
            vectors = self._encoder(values["text"])
        return torch.nn.functional.normalize(vectors.float(), dim=1)


def text_encoders(folder: Path, texts: Texts, precision: str = "fp32") -> Encoders:
    """Return the Encoders of a pretrained encoder for a dataset's texts. Raises ConfigError: none in `folder`."""
    encoder = PretrainedEncoder(folder, precision=precision)
    return Encoders(lambda rows: encoder(texts.queries(rows)), lambda docs: encoder(texts.documents(docs)))
