"""A pretrained Hugging Face text encoder without fine-tuning: a reference system and a teacher."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bigdssm.errors import ConfigError
from bigdssm.features import Text, TextTokenizer
from bigdssm.features.canonical import columns_of_values
from bigdssm.features.tokenizer import prompts_in
from bigdssm.models import Values
from bigdssm.retrieval.embed import Encoders, encode_columns, encode_in
from bigdssm.retrieval.reranking import Texts
from bigdssm.utils.device import device_of
from bigdssm.utils.log import Progress, no_progress

MAX_TOKENS = 256  # of a text, for a pretrained encoder


def check_encoder(folder: Path) -> None:
    """Raise ConfigError if `folder` does not hold a Hugging Face model with its tokenizer."""
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(f"{folder} has no tokenizer.json; give the folder of a Hugging Face model and its tokenizer")


class PretrainedEncoder:
    """Encodes texts to vectors of norm 1, with the pooling of the folder."""

    def __init__(
        self, folder: Path, max_tokens: int = MAX_TOKENS, precision: str = "fp32", device: torch.device | str = "cpu"
    ) -> None:
        """`max_tokens`: of a text, with its prompt; `precision`: fp32 or bf16, for auto the faster one.

        Raises ConfigError: `folder` holds no such encoder and tokenizer.
        """
        from bigdssm.models.encoders.pretrained import pretrained_encoder  # late: transformers takes seconds

        check_encoder(folder)
        self._encoder = pretrained_encoder(str(folder)).to(device).eval()
        self.precision = encode_in(self._encoder, precision)
        self.prompts = prompts_in(folder)
        self._tokenizer, self._max_tokens = TextTokenizer(folder), max_tokens

    def __call__(
        self, texts: Sequence[str], prompt: str = "", what: str = "texts encoded", progress: Progress = no_progress
    ) -> Tensor:
        """Return float32 [n, H] for n texts, at least one, after `prompt`."""
        feature = Text(max_tokens=self._max_tokens, prompt=prompt).with_name("text")
        feature = feature.with_prompt("", self.prompts.pooled, self._tokenizer)
        columns, _ = columns_of_values(texts, {"text": feature}, {}, self._tokenizer)
        encode = partial(self._encode, feature.prompt_tokens)
        return encode_columns({"text": feature}, columns, encode, what, progress, device_of(self._encoder))

    def _encode(self, skip: int, values: dict[str, Values]) -> Tensor:
        with torch.no_grad():
            vectors = self._encoder(values["text"], skip=skip)
        return torch.nn.functional.normalize(vectors.float(), dim=1)


def text_encoders(encoder: PretrainedEncoder, texts: Texts) -> Encoders:
    """Return the Encoders of a pretrained encoder for a dataset's texts, with the prompts of its folder."""
    prompts = encoder.prompts
    return Encoders(
        lambda rows: encoder(texts.queries(rows.query), prompts.query),
        lambda doc_rows: encoder(texts.documents(doc_rows), prompts.doc),
    )
